"""What becomes of episodes at their limits, and of those that are lost: a sampler and environments that are made up."""

import dataclasses
import re
import types
from collections.abc import Sequence
from typing import Any, cast

import numpy as np
import pytest

from rewards.environment_runner import EnvironmentReply
from rl.config.load import load_config
from rl.data.byte_tokenizer import ByteBackend
from rl.data.prompt_rows import PromptRow
from rl.data.tokenizer import Tokenizer
from rl.data.turns import chat_turns, text_turns
from rl.rollout.environments import EnvironmentReward
from rl.rollout.episode import Episode, shared_prompt, with_begun
from rl.rollout.episodes import MOST_TOOLS, EpisodeLimits, EpisodeSource
from rl.sampler.contract import Completion, Request, requests_for
from rl.sampler.request_queue import deal
from rl.sampler.shape_plan import ExpectedPrompts, ShardRequests, turn_shape
from rl.sampler.token_draw import SamplingParams

TOKENIZER = Tokenizer(ByteBackend())
# A conversation that begins with another's message than the user's is refused, as by Gemma's template.
ALTERNATING = (
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('order') }}"
    "{% endif %}{{ m.role }}: {{ m.content }}<eos>{% endfor %}assistant: "
)


class Session:
    """Draws turns of C's, as long as they may be, or of `turn` tokens."""

    def __init__(self, turn: int | None) -> None:
        self._turn, self._jobs, self._lengths = turn, [], []

    def submit(self, prompts: Sequence[Any], requests: Sequence[Request]) -> range:
        assert all(len(prompt) for prompt in prompts)
        assert all(request.limit >= 1 for request in requests)
        numbers = range(len(self._lengths), len(self._lengths) + len(requests))
        self._lengths += [0] * len(requests)
        self._jobs += [(number, request.limit) for number, request in zip(numbers, requests, strict=True)]
        return numbers

    def go_on(self, number: int, token_ids: Sequence[int], limit: int) -> None:
        self._lengths[number] += len(token_ids)
        self._jobs.append((number, limit - self._lengths[number]))

    def finish(self, number: int) -> None:
        pass

    @property
    def has_work(self) -> bool:
        return bool(self._jobs)

    def poll(self) -> list[tuple[int, Completion]]:
        jobs, self._jobs, ended = self._jobs, [], []
        for number, limit in jobs:
            size = min(limit, self._turn or limit)
            self._lengths[number] += size
            ids, zeros = np.full(size, TOKENIZER.encode("C")[-1], np.int32), np.zeros(size, np.float32)
            reason, empty = "length" if size == limit else "stop", np.zeros((size, 0))
            ended.append((number, Completion(0, 0, ids, zeros, zeros, reason, None, empty, empty)))
        return ended


class Environments:
    """Environments that open with the prompts `opened`, and answer with `said`; the last one raises in its step."""

    def __init__(self, opened: Sequence[Any], said: str, *, last_raises: bool = False) -> None:
        self._opened, self._said, self._last_raises = opened, said, last_raises
        self._replies: list[EnvironmentReply] = []

    def environment_of(self, row: Any) -> str:
        return "game"

    def begin(self, episode: int, row: Any, seed: int, expects: Any = None) -> None:
        self._replies.append(EnvironmentReply(episode, "begin", self._opened[episode]))

    def step(self, episode: int, text: str, tokens: Any = None, expects: Any = None) -> None:
        failure = ("exception", "lost") if self._last_raises and episode == len(self._opened) - 1 else None
        action, said = {"role": "assistant", "content": text}, [{"role": "user", "content": self._said}]
        self._replies.append(EnvironmentReply(episode, "step", said, action, failure=failure))

    def finish(self, episode: int, reason: str, facts: Any = None) -> None:
        self._replies.append(EnvironmentReply(episode, "finish"))

    def poll(self, timeout: float) -> list[EnvironmentReply]:
        replies, self._replies = self._replies, []
        return replies

    def drop_all(self) -> None:
        pass


def play(environments: Environments, sampling: SamplingParams, turns: Any, turn: int | None = None) -> list[Episode]:
    """The episodes of one group."""
    sampler: Any = types.SimpleNamespace(open=lambda *arguments: Session(turn))
    limits = EpisodeLimits(prompt_tokens=40, turns=20, turn_tokens=7, tokens=64)
    given: Any = environments
    source = EpisodeSource(given, {"game": turns}, TOKENIZER, limits, EnvironmentReward())
    row = PromptRow("asked", np.array(TOKENIZER.encode("asked"), np.int32), {}, 0)
    size = len(environments._opened)
    found = dict(source.draw(sampler, None, [row], size, sampling, None, [0], 0, 0))
    return [found[b] for b in range(size)]


def test_a_turn_that_a_limit_cuts_is_among_the_messages():
    sampling = SamplingParams(max_completion_length=10)
    (episode,) = play(Environments(["asked"], "on"), sampling, text_turns(TOKENIZER))
    assert episode.ended == "max_drawn"
    assert [message["content"] for message in episode.messages] == ["C" * 7, "on", "C" * 3]


def test_an_environment_that_goes_on_in_a_sequence_that_is_not_there_costs_its_episode():
    class Elsewhere(Environments):
        def step(self, episode: int, text: str, tokens: Any = None, expects: Any = None) -> None:
            super().step(episode, text)
            self._replies[-1] = dataclasses.replace(self._replies[-1], sequence=episode)

    sampling = SamplingParams(max_completion_length=10)
    one, other = play(Elsewhere(["asked"] * 2, "on"), sampling, text_turns(TOKENIZER))
    assert (one.failure, one.ended) == (None, "max_drawn")
    assert other.failure == ("not_a_step", "step gave the sequence 1, the episode has 1, from 0 on")


def test_an_episode_that_is_lost_takes_nothing_from_the_room_of_the_others():
    opened = [*(f"{'a' * 17}{i}" for i in range(3)), "z" * 18]
    environments = Environments(opened, "?" * 9, last_raises=True)
    sampling = SamplingParams(max_completion_length=60)
    episodes = play(environments, sampling, text_turns(TOKENIZER))
    assert [episode.ended for episode in episodes] == ["max_tokens"] * 3 + ["failed"]
    prompt, begun = shared_prompt(episodes)
    assert len(prompt) == 1
    whole = [with_begun(e.completion(0, 0, sampling), own) for e, own in zip(episodes, begun, strict=True)]
    assert max(len(completion.token_ids) for completion in whole) <= 64, "what a row of training has room for"


@pytest.mark.parametrize(
    ("opened", "least", "why"),
    [
        ([[{"role": role, "content": "hi"}] for role in ("user", "tool")], 0, "0 tokens alike"),
        ([[{"role": "user", "content": text}] for text in ("a" * 15, "b" * 15)], 30, "6 tokens alike"),
        ([[{"role": "user", "content": "a" * 50}]] * 2, 0, "must have 1 to data.max_prompt_length"),
    ],
    ids=["nothing_in_common", "no_room", "too_long"],
)
def test_prompts_that_a_group_cannot_share_cost_its_episodes_and_not_the_run(opened, least, why):
    backend = ByteBackend()
    backend.chat_template = ALTERNATING.replace("!=", "and false and")
    turns = chat_turns(Tokenizer(backend), (2,))
    sampling = SamplingParams(max_completion_length=40, min_completion_length=least)
    episodes = play(Environments(opened, "on"), sampling, turns)
    assert [(episode.ended, episode.prompt_ids, episode.num_turns) for episode in episodes] == [("failed", [], 0)] * 2
    for episode in episodes:
        assert episode.told == [{"role": "assistant", "content": ""}], "so that reward functions do not fail as well"
        assert episode.failure is not None
        assert episode.failure[0] == "prompt"
        assert why in episode.failure[1]


def test_a_prompt_of_text_is_what_a_user_said_when_the_template_writes_what_follows():
    backend = ByteBackend()
    backend.chat_template = ALTERNATING
    sampling = SamplingParams(max_completion_length=14)
    (episode,) = play(Environments(["a question"], "on"), sampling, chat_turns(Tokenizer(backend), (2,)), turn=6)
    assert episode.failure is None
    assert episode.num_turns == 3


def test_each_slot_of_a_shard_may_read_a_prompt_that_is_cut_for_the_shards():
    """17 of 18 requests are not cut in two, as 18 are, when one was lost before its first turn."""
    planned = ShardRequests.of(deal(requests_for([0], 18, 1), 2))
    shape = turn_shape(2, planned, ExpectedPrompts((), (8,)), 120, None, None)
    (pieces, *_) = deal(requests_for([0], 17, 1), 2, total=18)
    assert [len(piece) for piece in pieces] == [17]
    assert shape.num_readers == shape.num_slots // 2 == 10


def test_a_rule_tells_of_turns_that_are_too_short_and_the_reward_of_an_environment_counts():
    game = "rollout.environment=game.py:Game"
    short = [game, "rollout.max_turn_tokens=7", "sampling.min_completion_length=10"]
    with pytest.raises(ValueError, match=re.escape("rollout.max_turn_tokens must be >= sampling.min_completion_leng")):
        load_config(None, short)
    functions = "rewards.functions=[rewards.number:exact_number_flexible]"
    assert load_config(None, [game, functions, "eval.reward=environment"]).eval.reward == "environment"
    with pytest.raises(ValueError, match=r"eval\.reward must name one of rewards\.functions"):
        load_config(None, [functions, "eval.reward=environment"])


def test_a_recipe_names_servers_and_games():
    names = {"openenv:http://127.0.0.1:8000": "openenv", "textarena:Wordle-v0": "Wordle-v0"}
    for reference, name in names.items():
        config = load_config(None, [f"rollout.environment={reference}"])
        assert config.rollout.environments == {name: reference}
    with pytest.raises(
        ValueError, match=r"rollout\.environment must be path/to/file\.py:name, openenv:URL or textarena"
    ):
        load_config(None, ["rollout.environment=gym:Wordle"])
    for kind in ("openenv:", "textarena:", "'openenv:'"):  # the first two are mappings to nothing in YAML
        with pytest.raises(ValueError, match="must name a server behind openenv: or a game behind textarena:"):
            load_config(None, [f"rollout.environment={kind}"])
    with pytest.raises(ValueError, match=r"rollout\.tools\.0 must be path/to/file\.py:name, got"):
        load_config(None, ["rollout.tools=[textarena:Wordle-v0]"])


def test_tools_of_agents_that_differ_in_every_call_are_not_kept_for_ever():
    made, unused = [], cast(Any, None)

    def make(tools):
        made.append(tools[0]["name"])
        return unused

    source = EpisodeSource(unused, {}, unused, unused, EnvironmentReward(), make_turns=make)
    for place in [*range(MOST_TOOLS + 1), MOST_TOOLS, 0]:
        source.with_tools([{"name": place}])
    assert made == [*range(MOST_TOOLS + 1), 0], "the oldest was made again, the newest was not"
