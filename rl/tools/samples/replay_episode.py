"""Plays one episode of a training run again: its recorded turns with a fresh environment.

In: a run folder and the episode's numbers. Out: what is said, and where the environment answers otherwise than
samples.jsonl has it. No weights are read, and nothing is drawn. Not here: completions of one turn, which are drawn
again (`rl.tools.samples.replay`).
"""

import dataclasses
import itertools
import os
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rewards.environment_replies import FAILURES
from rewards.environment_runner import EnvironmentReply
from rewards.moment import sample_seed
from rl.config.load import Config
from rl.config.sections import ENVIRONMENT
from rl.data.tokenizer import Tokenizer
from rl.rollout.environments import start_episodes
from rl.rollout.episode import FAILED
from rl.rollout.shared_environments import Environments
from rl.run_folder.trust import ENVIRONMENT as ENVIRONMENT_CODE
from rl.run_folder.trust import TO_REPLAY
from rl.sampler.create import eos_ids
from rl.state.origin import find_origin, tokenizer_from_config
from rl.tools.samples.replay import NOT_HELD, recorded, rows_of_step, run_of_replay

_WAIT_SECONDS = 1.0
_SHOWN = 200  # characters of a message in a difference


@dataclasses.dataclass
class PlayedAgain:
    """An episode that is played again. Iterate over `lines` to play it; `differences` are known then.

    lines: what is said, as JSON values: the prompt, each turn and each observation, and how it ended.
    differences: where the environment answered otherwise, in words.
    """

    lines: Iterator[dict[str, Any]]
    differences: list[str]


def play_again(
    run: str | os.PathLike, step: int, prompt: int, sample: int, overrides: Sequence[str] = (), trust: bool = False
) -> PlayedAgain:
    """Plays an episode of a run again. Arguments: see `rl.tools.samples.replay.draw_again`.

    Raises:
      ValueError: there is no such run, step or episode, samples.jsonl does not hold it, or data or environments are not
        there or have changed.
    """
    folder = pathlib.Path(run)
    config, identity = run_of_replay(folder, overrides, (*TO_REPLAY, ENVIRONMENT_CODE), trust)
    data, rows = rows_of_step(config, folder, identity, step, prompt, sample)
    record = recorded(run, step, prompt, sample)
    if record is None or "messages" not in record:
        raise ValueError(
            f"--replay plays the turns of an episode that samples.jsonl has, and it does not hold step {step}, prompt "
            f"{prompt}, sample {sample} {NOT_HELD}"
        )
    differences: list[str] = []
    seed = sample_seed(config.seed, step - 1, prompt, 0)
    row = {**rows[prompt].columns, "prompt": rows[prompt].prompt}
    return PlayedAgain(_play(config, record, row, seed, data.train[:1], differences), differences)


def _play(
    config: Config,
    record: Mapping[str, Any],
    row: Mapping[str, Any],
    seed: int,
    rows: Sequence[Any],
    differences: list[str],
) -> Iterator[dict[str, Any]]:
    tokenizer = tokenizer_from_config(config)
    ids = eos_ids(config, find_origin(config, tokenizer).model_config, tokenizer)
    texts = turn_texts(record, tokenizer, ids)
    # Turns of the assistant, each with the observations behind it.
    said: list[list[Mapping[str, Any]]] = []
    for message in [*record["messages"], *record.get("unread", [])]:
        if message["role"] == "assistant":
            said.append([])
        said[-1].append(message)
    prompts = [sequence["prompt"] for sequence in record.get("further", [])]  # with which it began again
    with start_episodes(config, tokenizer, ids, rows, None) as source:
        assert source is not None, "a run without turns"
        environments, reward = source.environments, None
        environments.begin(0, row, seed)
        reply = _answer(environments)
        if reply.failure is None:
            yield {"prompt": reply.messages}
            _compare("the prompt", record["prompt"], reply.messages, differences)
        for number, text in enumerate(texts):
            if reply.failure is not None:
                break
            environments.step(0, text)
            reply = _answer(environments)
            answer = [reply.action or {"role": "assistant", "content": text}, *reply.messages]
            for message in answer:
                yield {"turn": number + 1, **message}
            reward = _added(reward, reply.reward)
            known = said[number] if number < len(said) else answer[:1]  # a turn that failed has no message
            for then, now in itertools.zip_longest(known, answer if reply.failure is None else known):
                _compare(f"turn {number + 1}", then, now, differences)
            if reply.prompt is not None and number + 1 < len(texts):
                yield {"turn": number + 1, "prompt": reply.prompt}
                then = prompts.pop(0) if prompts else None
                _compare(f"the prompt after turn {number + 1}", then, reply.prompt, differences)
        failure = reply.failure
        if failure is None:
            environments.finish(0, record["ended"])
            last = _answer(environments)
            reward, failure = _added(reward, last.reward), last.failure
        ended = record["ended"] if failure is None else FAILED
        yield {"ended": ended, "reward": reward, **({} if failure is None else {"failure": list(failure)})}
        was_lost = record.get("failure", [None])[0] in FAILURES  # else it was the run that could not go on
        if (failure is not None) != was_lost:
            _compare("the end", record.get("failure", record["ended"]), failure or ended, differences)
        elif "failure" not in record and ENVIRONMENT in record["rewards"]:
            _compare("the reward", record["rewards"][ENVIRONMENT], reward, differences)


def turn_texts(record: Mapping[str, Any], tokenizer: Tokenizer, end_ids: Sequence[int]) -> list[str]:
    """The text of each turn of a line of samples.jsonl, as its environment got it. end_ids: those that end a turn.

    ValueError where two turns have no token between them, and their messages do not show the text either.
    """
    turns = []
    for sequence in (record, *record.get("further", [])):
        ids = sequence["token_ids"]
        runs = itertools.groupby(
            zip(sequence.get("trained", [1] * len(ids)), ids, strict=True), key=lambda pair: pair[0]
        )
        turns += [[token for _, token in run] for is_drawn, run in runs if is_drawn]
    if len(turns) == record["turns"]:
        # One sequence after the other; they were drawn in the order of `turn_sequences`.
        places = record.get("turn_sequences", [0] * len(turns))
        order = iter(turns)
        by_sequence = {place: [next(order) for _ in range(places.count(place))] for place in sorted({*places})}
        turns = [by_sequence[place].pop(0) for place in places]
        turns = [turn[:-1] if turn[-1] in end_ids else turn for turn in turns]
        return [tokenizer.decode(turn, skip_special_tokens=False) for turn in turns]
    messages = [message for message in record["messages"] if message["role"] == "assistant"]
    if len(messages) != record["turns"] or any("tool_calls" in message for message in messages):
        raise ValueError(
            f"--replay cannot tell the {record['turns']} turns of this episode apart: observations between them have "
            "no tokens"
        )
    return [message["content"] for message in messages]


def _answer(environments: Environments) -> EnvironmentReply:
    """The reply to what was asked; its limits of time hold."""
    while not (replies := environments.poll(_WAIT_SECONDS)):
        pass
    return replies[0]


def _added(reward: float | None, more: float | None) -> float | None:
    return reward if more is None else (reward or 0.0) + more


def _compare(where: str, then: Any, now: Any, differences: list[str]) -> None:
    if then != now:
        differences.append(f"{where} was {str(then)[:_SHOWN]!r}, is {str(now)[:_SHOWN]!r}")
