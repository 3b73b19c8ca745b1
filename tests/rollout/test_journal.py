"""The journal of episodes: what a step that was cut short takes from it, and what it must not take."""

import itertools
import json
import pathlib
import re
import types
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from rewards.environment_runner import EnvironmentReply
from rewards.replies import Result
from rl.config.load import load_config
from rl.data.byte_tokenizer import ByteBackend
from rl.data.prompt_rows import PromptRow
from rl.data.tokenizer import Tokenizer, load_tokenizer
from rl.data.turns import chat_turns, text_turns
from rl.rollout.environments import EnvironmentReward
from rl.rollout.episode import Episode, episode_metrics
from rl.rollout.episodes import EpisodeLimits, EpisodeSource, LeftStep
from rl.rollout.journal import Journal, StepJournal, code_digest, weights_mark
from rl.sampler.contract import Completion, Request
from rl.sampler.token_draw import SamplingParams
from tests.helpers.environments import start

TOKENIZER = Tokenizer(ByteBackend())
SAMPLING = SamplingParams(max_completion_length=40)
TURNS = {0: 1, 1: 2, 2: 3, 3: 4}  # of each sample
PARAMS = {"a": np.arange(6, dtype=np.float32), "b": np.ones((2, 2), np.int8)}


class StoppedError(Exception):
    """In place of a kill."""


class Session:
    """Draws turns of three tokens, which follow from the sample and its length so far; stops after so many turns."""

    def __init__(self, most: int) -> None:
        self._most, self._jobs, self._known = most, [], []
        self.num_drawn = 0

    def submit(self, prompts: Sequence[Any], requests: Sequence[Request]) -> range:
        numbers = range(len(self._known), len(self._known) + len(requests))
        self._known += [[request.sample_index, [*request.continues]] for request in requests]
        self._jobs += numbers
        return numbers

    def go_on(self, number: int, token_ids: Sequence[int], limit: int) -> None:
        self._known[number][1] += token_ids
        self._jobs.append(number)

    def finish(self, number: int) -> None:
        pass

    @property
    def has_work(self) -> bool:
        return bool(self._jobs)

    def poll(self) -> list[tuple[int, Completion]]:
        if not self._jobs:
            return []
        number = self._jobs.pop(0)
        sample, tokens = self._known[number]
        if self.num_drawn == self._most:
            raise StoppedError
        self.num_drawn += 1
        ids = np.array([65 + (sample + len(tokens) + i) % 26 for i in range(3)], np.int32)
        tokens += ids.tolist()
        logprobs = -np.arange(1, 4, dtype=np.float32) / (7 + len(tokens))
        top = np.zeros((3, 0), np.int32), np.zeros((3, 0), np.float32)
        return [(number, Completion(0, sample, ids, logprobs, logprobs * 2, "stop", ".", *top))]


class Environments:
    """Answers with what it was asked; sample g is done with its `TURNS[g]`-th turn. `said` is in all it says."""

    def __init__(self, said: str = "on") -> None:
        self._said, self._turns, self._replies = said, {}, []
        self.asked: list[tuple[str, int]] = []

    def environment_of(self, row: Any) -> str:
        return "game"

    def begin(self, episode: int, row: Any, seed: int, expects: Any = None) -> None:
        self._turns[episode] = 0
        self._reply("begin", episode, row["prompt"])

    def step(self, episode: int, text: str, tokens: Any = None, expects: Any = None) -> None:
        self._turns[episode] += 1
        turns, said = self._turns[episode], [{"role": "user", "content": f"{self._said} {text}"}]
        action, done = {"role": "assistant", "content": text}, turns == TURNS[episode % 4]
        self._reply("step", episode, said, action=action, reward=turns / 3, done=done, metrics={"turns": turns})

    def finish(self, episode: int, reason: str, facts: Any = None) -> None:
        self._reply("finish", episode, reward=0.5)

    def poll(self, timeout: float) -> list[EnvironmentReply]:
        replies, self._replies = self._replies, []
        return replies

    def drop_all(self) -> None:
        self._replies = []

    def _reply(self, op: Any, episode: int, *arguments: Any, **fields: Any) -> None:
        self.asked.append((op, episode))
        self._replies.append(EnvironmentReply(episode, op, *arguments, **fields))


class Interleaved(Environments):
    """Leads two conversations that take turns, in five turns. told: what each turn took and what was expected."""

    def __init__(self) -> None:
        super().__init__()
        self.told: dict[tuple[int, int], tuple[Any, Any]] = {}

    def step(self, episode: int, text: str, tokens: Any = None, expects: Any = None) -> None:
        self._turns[episode] += 1
        turns, action = self._turns[episode], {"role": "assistant", "content": text}
        self.told[episode, turns] = tokens, expects
        said = [] if turns in (1, 5) else [{"role": "user", "content": f"on {text}"}]
        more = {1: {"prompt": "other"}, 2: {"sequence": 0}, 3: {"sequence": 1}}.get(turns, {})
        self._reply("step", episode, said, action=action, done=turns == 5, **more)


def play(
    journal: StepJournal | None,
    environments: Any,
    most: int = 10**6,
    in_order: bool = False,
    asked: str = "asked",
    index: int = 0,
    stops: Any = None,
) -> tuple[list[Episode], Session]:
    """A group of four episodes. most: turns after which the run stops. index: of its prompt."""
    session = Session(most)
    sampler: Any = types.SimpleNamespace(open=lambda *arguments: session)
    limits = EpisodeLimits(prompt_tokens=40, turns=20, turn_tokens=7, tokens=200, sequences=2)
    source = EpisodeSource(environments, {"game": text_turns(TOKENIZER)}, TOKENIZER, limits, EnvironmentReward())
    source.in_order = in_order
    row = PromptRow(asked, np.array(TOKENIZER.encode(asked), np.int32), {"answer": 4}, 0)
    found = dict(source.draw(sampler, None, [row], 4, SAMPLING, None, [index], 0, 0, journal, None, stops))
    return [found[b] for b in range(4)], session


@pytest.fixture
def folder(tmp_path) -> pathlib.Path:
    (tmp_path / "run.json").write_text(json.dumps({"run": "mine"}))
    return tmp_path


def stop(folder: pathlib.Path, most: int, in_order: bool = False) -> None:
    """A step that is cut short after so many turns."""
    with pytest.raises(StoppedError), Journal(folder) as journal:
        play(journal.step(0, PARAMS), Environments(), most, in_order)


def outcome(episodes: Sequence[Episode]) -> list[Any]:
    """All that must be equal, bit for bit."""
    return [
        [e.all_ids, e.trained, e.messages, e.unread, e.reward, e.ended, e.metrics, e.places]
        + [(turn.policy_logprobs.tobytes(), turn.sampler_logprobs.tobytes()) for turn in e.turns]
        for e in episodes
    ]


@pytest.mark.parametrize("in_order", [False, True])
@pytest.mark.parametrize("most", [0, 1, 3, 5, 8, 9])
def test_a_step_that_was_cut_short_goes_on_as_if_it_had_not_been(folder, most, in_order):
    whole, session = play(None, Environments(), in_order=in_order)
    assert session.num_drawn == sum(TURNS.values())
    stop(folder, most, in_order)
    with (folder / "journal.jsonl").open("ab") as file:
        file.write(b'{"p": 0, "s": 1, "n": 9, "tu')  # torn by the kill
    environments = Environments()
    with Journal(folder) as journal:
        step = journal.step(0, PARAMS)
        episodes, session = play(step, environments, in_order=in_order)
        assert outcome(episodes) == outcome(whole)
        assert session.num_drawn == sum(TURNS.values()) - (0 if in_order else most)
        begun = [episode for op, episode in environments.asked if op == "begin"]
        assert len(begun) == 4 - step.num_taken, "an episode that was over asks no environment"
        assert step.num_continued == 4 - step.num_taken
        assert "journal/drawn_again" not in step.metrics()
    with Journal(folder) as journal:  # and once more, when all of it is there
        environments, again = Environments(), journal.step(0, PARAMS)
        episodes, _ = play(again, environments, in_order=in_order)
        assert (outcome(episodes), environments.asked) == (outcome(whole), [])
        assert again.told() == ["step 1: 4 whole episodes and 0 begun ones are from the journal"]
    assert episode_metrics(episodes) == episode_metrics(whole)


class Hung(Environments):
    """The turn of a sample gets no answer. asked: how often the run has looked for one since."""

    def step(self, episode: int, text: str, tokens: Any = None, expects: Any = None) -> None:
        if episode != 2:
            super().step(episode, text, tokens, expects)


@pytest.mark.parametrize("in_order", [False, True])
def test_a_step_is_left_when_the_run_is_asked_to_stop_though_an_environment_hangs(folder, in_order):
    whole, _ = play(None, Environments(), in_order=in_order)
    looks: list[bool] = []

    def stops(is_idle: bool) -> bool:
        looks.append(is_idle)
        return is_idle and len(looks) > 40

    with Journal(folder) as journal, pytest.raises(LeftStep):
        play(journal.step(0, PARAMS), Hung(), in_order=in_order, stops=stops)
    assert looks[-1]
    with Journal(folder) as journal:
        step = journal.step(0, PARAMS)
        episodes, _ = play(step, Environments(), in_order=in_order)
    assert outcome(episodes) == outcome(whole)
    assert (step.num_taken, step.num_continued) == ((1, 3) if in_order else (3, 1))


@pytest.mark.parametrize("most", [1, 6, 11, 15, 19])
def test_sequences_that_take_turns_go_on_as_if_the_step_had_not_been_cut_short(folder, most):
    environments = Interleaved()
    whole, session = play(None, environments)
    for episode in whole:
        first, second = episode.sequences
        assert (episode.ended, episode.places) == ("done", [0, 1, 0, 1, 1])
        assert [len(first.turns), len(second.turns)] == [2, 3]
        assert sum(first.trained) == 6 < len(first.token_ids)
    assert len({episode.sequences[1].sample for episode in whole}) == 4
    with pytest.raises(StoppedError), Journal(folder) as journal:
        play(journal.step(0, PARAMS), Interleaved(), most)
    again = Interleaved()
    with Journal(folder) as journal:
        episodes, session = play(journal.step(0, PARAMS), again)
    assert outcome(episodes) == outcome(whole)
    assert session.num_drawn == 20 - most
    told = {key: tokens for key, (tokens, _) in environments.told.items()}
    assert {key: told[key] for key in again.told} == {key: tokens for key, (tokens, _) in again.told.items()}
    expected = [key for key, (_, expects) in again.told.items() if expects is not None]
    assert expected, "an environment that is played again hears what it asked before"


AGENT = """
import asyncio
import pathlib

import httpx


async def run(base_url, row):
    slow = pathlib.Path(__file__).with_name("slow").read_text()

    async def lead(client, name):
        messages = [{"role": "user", "content": name}]
        for _ in range(2):
            await asyncio.sleep(0.1 * (name == slow))
            answer = await client.post(f"{base_url}/chat/completions", json={"messages": messages})
            messages += [answer.json()["choices"][0]["message"], {"role": "user", "content": "on"}]

    async with httpx.AsyncClient(timeout=60) as client:
        await asyncio.gather(lead(client, "a"), lead(client, "b"))
    return 0.5
"""
TEMPLATE = "{% for m in messages %}{{ m.role[0] }}:{{ m.content }}<eos>{% endfor %}a:"


@pytest.mark.parametrize("most", [2, 13])
def test_chats_that_an_agent_leads_at_one_time_go_on_with_the_same_tokens_whichever_is_slow(folder, most):
    (folder / "agent.py").write_text(AGENT)
    (folder / "chat.jinja").write_text(TEMPLATE)
    tokenizer = load_tokenizer("byte", folder / "chat.jinja")

    def make_turns(tools: Sequence[Any]) -> Any:
        return chat_turns(tokenizer, tokenizer.eos_ids, tools)

    def play_agent(slow: str, journal: StepJournal | None, most: int = 10**6) -> list[Episode]:
        (folder / "slow").write_text(slow)
        sampler: Any = types.SimpleNamespace(open=lambda *arguments: Session(most))
        limits = EpisodeLimits(prompt_tokens=40, turns=20, turn_tokens=7, tokens=200, sequences=2)
        with start({"game": f"agent:{folder / 'agent.py'}:run"}) as runner:
            how: dict[str, Any] = {"make_turns": make_turns}
            source = EpisodeSource(runner, {"game": make_turns([])}, tokenizer, limits, EnvironmentReward(), **how)
            row = PromptRow([{"role": "user", "content": "?"}], np.zeros(1, np.int32), {}, 0)
            found = dict(source.draw(sampler, None, [row], 4, SAMPLING, None, [0], 0, 0, journal))
        return [found[b] for b in range(4)]

    def told(episode: Episode) -> Any:
        sequences = {tuple(one.prompt_ids): (one.token_ids, one.trained) for one in episode.sequences}
        return sequences, episode.reward, episode.ended, episode.sequences[0].prompt_ids

    whole = [told(episode) for episode in play_agent("b", None)]
    assert [len(sequences) for sequences, *_ in whole] == [2] * 4
    with pytest.raises(StoppedError), Journal(folder) as journal:
        play_agent("b", journal.step(0, PARAMS), most)
    with Journal(folder) as journal:
        step = journal.step(0, PARAMS)
        assert [told(episode) for episode in play_agent("a", step)] == whole
        assert (step.num_again, step.num_taken + step.num_continued) == (0, 4)


def test_an_environment_that_answers_otherwise_gets_its_episode_drawn_again_and_the_next_start_knows(folder):
    stop(folder, 5)
    whole, _ = play(None, Environments("off"))
    with Journal(folder) as journal:
        step = journal.step(0, PARAMS)
        taken = step.num_taken
        episodes, _ = play(step, Environments("off"))
        assert outcome(episodes[1:]) == outcome(whole[1:])
        assert (step.num_taken - taken, step.num_continued, step.num_again) == (1, 0, 3)
        assert step.metrics()["journal/drawn_again"] == 3
    with Journal(folder) as journal:
        episodes, session = play(journal.step(0, PARAMS), Environments("not asked"))
        assert outcome(episodes[1:]) == outcome(whole[1:])
        assert session.num_drawn == 0


def test_calls_of_one_step_do_not_mix(folder):
    """Dynamic sampling draws a step's refills in further calls."""
    with Journal(folder) as journal:
        step = journal.step(0, PARAMS)
        found = [play(step, Environments(said), index=index)[0] for index, said in enumerate("xyz")]
    with Journal(folder) as journal:
        step = journal.step(0, PARAMS)
        again = {index: play(step, Environments("not asked"), index=index)[0] for index in (2, 0, 1)}
        assert step.num_taken == 12
    assert [outcome(again[index]) for index in range(3)] == [outcome(episodes) for episodes in found]
    assert outcome(found[0]) != outcome(found[1])


def test_in_order_a_turn_that_is_drawn_otherwise_is_answered_by_an_environment_that_hears_all(folder, monkeypatch):
    """Weights are the same, and the machine is another one."""
    stop(folder, 7, in_order=True)
    original = Session.poll

    def poll(self):
        ended = original(self)
        for number, completion in ended:
            if completion.sample_index == 2 and self.num_drawn > 4:
                completion.token_ids[0] = self._known[number][1][-3] = 90
        return ended

    monkeypatch.setattr(Session, "poll", poll)
    whole, _ = play(None, Environments(), in_order=True)
    with Journal(folder) as journal:
        episodes, _ = play(journal.step(0, PARAMS), Environments(), in_order=True)
        assert outcome(episodes) == outcome(whole)
    assert 90 in episodes[2].turns[1].token_ids
    with Journal(folder) as journal:
        environments = Environments()
        episodes, _ = play(journal.step(0, PARAMS), environments, in_order=True)
        assert (outcome(episodes), environments.asked) == (outcome(whole), [])


@pytest.mark.parametrize("what", ["run", "weights", "step", "row", "code", "nothing", "damage"])
def test_a_journal_of_something_else_is_not_taken(folder, what):
    stop(folder, 5)
    path = folder / "journal.jsonl"
    if what == "run":
        path.write_text(path.read_text().replace('"mine"', '"other"'))
    if what == "damage":
        first, *others = path.read_bytes().splitlines(keepends=True)
        path.write_bytes(first + b"\xff not JSON\n" + b"".join(others))
    weights = {**PARAMS, "b": PARAMS["b"] + (np.arange(4).reshape(2, 2) == 3)} if what == "weights" else PARAMS
    with Journal(folder, "mended" if what == "code" else "") as journal:
        step = journal.step(1 if what == "step" else 0, weights)
        episodes, session = play(step, Environments(), asked="other" if what == "row" else "asked")
        assert len(episodes) == 4
        assert session.num_drawn == sum(TURNS.values()) - (5 if what == "nothing" else 0)
        assert bool(step.told()) == (what == "nothing")


def test_rewards_of_whole_episodes_are_kept_and_go_with_what_they_judged(folder):
    given = Result(0, 0.25, None, {"note": "x"}, {"metric": [2.0, 1]}, 0.5, 1)
    with Journal(folder) as journal:
        step = journal.step(0, PARAMS)
        play(step, Environments())
        for sample in range(2):
            step.note_reward((0, sample), "mine", given)
        step.sync(waits=True)
    with Journal(folder) as journal:
        step = journal.step(0, PARAMS)
        play(step, Environments())
        assert [step.rewards((0, sample)) for sample in range(3)] == [{"mine": given}, {"mine": given}, {}]
        turn = Completion(
            0, 0, np.array([1], np.int32), *[np.zeros(1, np.float32)] * 2, "stop", None, *[np.zeros((1, 0))] * 2
        )
        step.add_turn((0, 0), 0, turn, "other")
        step.sync()
    with Journal(folder) as journal:
        step = journal.step(0, PARAMS)
        play(step, Environments())
        assert [step.rewards((0, sample)) for sample in range(2)] == [{}, {"mine": given}]


def test_steps_that_a_checkpoint_has_are_dropped(folder):
    def write(step: int) -> None:
        play(journal.step(step, {"a": np.full(3, step)}), Environments())

    def steps() -> list[int]:
        path = folder / "journal.jsonl"
        lines = map(json.loads, path.read_text().splitlines()) if path.exists() else ()
        return [line["step"] for line in lines if "step" in line]

    with Journal(folder) as journal:
        for step in range(3):
            write(step)
        assert steps() == [0, 1, 2]
        (folder / "checkpoints" / "2").mkdir(parents=True)
        write(3)
        assert steps() == [2, 3]
    with Journal(folder) as journal:  # a start from the checkpoint
        for step in (2, 3):
            again = journal.step(step, {"a": np.full(3, step)})
            _, session = play(again, Environments())
            assert (session.num_drawn, again.num_taken) == (0, 4)
        again = journal.step(2, {"a": np.full(3, 2)})
        assert steps() == [2, 3]
        (folder / "checkpoints" / "4").mkdir()
    assert steps() == []
    assert not (folder / "journal.jsonl").exists()


def test_a_full_disk_ends_the_run_in_words_and_what_is_there_stays(folder):
    stop(folder, 3)
    before = (folder / "journal.jsonl").read_bytes()

    def run() -> None:
        with open("/dev/full", "ab", buffering=0) as full, Journal(folder) as journal:
            journal._file = full
            play(journal.step(0, PARAMS), Environments())

    with pytest.raises(ValueError, match=re.escape("journal.jsonl could not be written: No space left")):
        run()
    assert (folder / "journal.jsonl").read_bytes() == before


def test_a_file_that_was_mended_is_other_code(tmp_path):
    (tmp_path / "game.py").write_text("old")
    game, function = (
        f"rollout.environment={tmp_path}/game.py:Game",
        "{function: rewards.number:exact_number_strict, name: a}",
    )
    settings = [game, f"rewards.functions=[{function}]"]
    marks = [code_digest(load_config(None, settings)) for _ in range(2)]
    (tmp_path / "game.py").write_text("mended")
    marks.append(code_digest(load_config(None, settings)))
    marks.append(
        code_digest(load_config(None, [game, f"rewards.functions=[{function[:-1]}, kwargs: {{right: 2.0}}}}]"]))
    )
    assert marks[0] == marks[1]
    assert len({*marks}) == 3


def test_the_mark_of_weights_tells_one_bit_and_not_how_they_lie():
    arrays = [np.linspace(-1, 1, 24).astype(dtype) for dtype in ("float32", "float16", "int32", "uint8", "bool")]
    marks = {weights_mark({"x": array.reshape(shape)}) for array, shape in itertools.product(arrays, [(24,), (4, 6)])}
    assert len(marks) == len(arrays)
    changed = arrays[0].copy()
    changed[3] = np.nextafter(changed[3], np.float32(2))
    assert weights_mark({"x": changed}) not in marks
