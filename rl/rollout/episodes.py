"""Draws episodes: completions of several turns, with the observations of an environment or of tools between them.

In: an open session of the sampler, running environments, data rows. Out: an `Episode` for each sample as it ends. Token
ids are appended and never made again from text: a turn's tokens are those that were drawn, an observation's tokens are
put behind them untrained. Not here: rewards (`rl.rollout.scoring`), worker processes (`rewards.environment_runner`),
the text of observations (`rl.data.turns`), decoding (`rl.sampler`).

What an episode looks like, with two turns (d: drawn and trained; o: put there and only read):

    prompt                     turn 1    observation           turn 2
    <user>7 * 12?<assistant>   dddddddd  oooooooooooooooooooo  dddddd
    shared by the group        \\_______ token_ids of the completion _______/

Legend: P prompts, G episodes per prompt, B = P * G.
"""

import collections
import dataclasses
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

from rewards.environment_runner import EnvironmentReply, EnvironmentRunner
from rewards.in_process import InProcess
from rewards.moment import sample_seed
from rl.data.prompt_rows import Prompt, PromptRow
from rl.data.tokenizer import Tokenizer
from rl.data.turns import Turns
from rl.sampler.contract import Completion, CompletionSource, DrawSession, Request
from rl.sampler.token_draw import SamplingParams

# How an episode ended. The first is as it should be, the next three are limits, "failed" is lost.
DONE, MAX_TURNS, MAX_DRAWN, MAX_TOKENS, FAILED = "done", "max_turns", "max_drawn", "max_tokens", "failed"
ENDS = (DONE, MAX_TURNS, MAX_DRAWN, MAX_TOKENS, FAILED)

_OWN_METRICS = (
    "seconds_mean",
    "failures",
    "reward_mean",
)  # of each environment; those that it gives are called otherwise
_WAIT_SECONDS = 0.05  # for environments, when there is nothing to draw


@dataclasses.dataclass
class Episode:
    """One sample that is drawn in turns.

    Attributes:
      prompt, prompt_ids: what the environment's reset asked, and its tokens.
      messages: what came after the prompt: turns, and observations between them.
      unread: observations behind the last turn, which the policy did not read.
      token_ids, trained: of all turns and observations, and whether the policy drew each.
      num_turns, num_tool_calls, num_bad_tool_calls: counts.
      reward: the sum of what the environment gave; None where it gave nothing.
      metrics: numbers of the environment, the last value of each. ended: one of `ENDS`.
      failure: (kind, one line) of an episode that is lost.
    """

    prompt: Prompt = ""
    prompt_ids: list[int] = dataclasses.field(default_factory=list)
    messages: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    unread: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    turns: list[Completion] = dataclasses.field(default_factory=list)
    token_ids: list[int] = dataclasses.field(default_factory=list)
    trained: list[bool] = dataclasses.field(default_factory=list)
    num_tool_calls: int = 0
    num_bad_tool_calls: int = 0
    reward: float | None = None
    metrics: dict[str, float] = dataclasses.field(default_factory=dict)
    ended: str = ""
    failure: tuple[str, str] | None = None
    seconds: float = 0.0  # in the environment

    @property
    def num_turns(self) -> int:
        """The number of turns."""
        return len(self.turns)

    @property
    def told(self) -> list[dict[str, Any]]:
        """What reward functions read of it: `messages`. They read a turn where there is none, because the episode was
        lost: what they say of it does not count, and they should not fail for the environment.
        """
        return self.messages or [{"role": "assistant", "content": ""}]

    @property
    def num_drawn(self) -> int:
        """The number of tokens that the policy drew."""
        return sum(self.trained)

    def completion(self, prompt_index: int, sample_index: int, sampling: SamplingParams) -> Completion:
        """The episode as one completion. Its log-probs are 0 where the policy drew nothing."""
        trained = np.array(self.trained, bool)
        last = self.turns[-1] if self.turns else None
        is_cut = self.ended in (MAX_DRAWN, MAX_TOKENS) or last is None

        def column(name: str, width: tuple[int, ...], dtype: Any) -> np.ndarray:
            values = np.zeros((trained.size, *width), dtype)
            if last is not None:
                values[trained] = np.concatenate([getattr(turn, name) for turn in self.turns])
            return values

        def like(name: str) -> np.ndarray:
            example = np.zeros((0, sampling.top_logprobs) if name.startswith("top") else 0, np.float32)
            example = example if last is None else getattr(last, name)
            return column(name, example.shape[1:], example.dtype)

        return Completion(
            prompt_index,
            sample_index,
            np.array(self.token_ids, np.int32),
            like("sampler_logprobs"),
            like("policy_logprobs"),
            *self._end_of(last, is_cut),
            like("top_ids"),
            like("top_logprobs"),
            None if last is None or last.kept_words is None else like("kept_words"),
            None if trained.all() else trained,
        )

    def _end_of(self, last: Completion | None, is_cut: bool) -> tuple[str, int | str | None]:
        """Finish and stop reason of the whole: a limit of tokens, or how the last turn ended. An environment that is
        done ends the episode also where the last turn was cut.
        """
        if is_cut or last is None:
            return "length", None
        if last.finish_reason == "length" and self.ended == DONE:
            return "stop", DONE
        return last.finish_reason, last.stop_reason


class EpisodeLimits(NamedTuple):
    """The limits of an episode beside `sampling.max_completion_length`, the tokens that the policy draws: tokens of the
    prompt, turns, tokens of a turn, and tokens after the prompt.
    """

    prompt_tokens: int
    turns: int
    turn_tokens: int
    tokens: int


class EpisodeReward(InProcess, Protocol):
    """A reward function that judges episodes by what their environments gave: those that are handed over here."""

    episodes: Sequence[Episode]


class EpisodeSource:
    """What episodes are drawn with, besides a sampler and weights.

    environments: running, and closed by whoever made them.
    turns: the tokens of turns and observations, by the name of the environment; each shows its own tools.
    reward: the reward function of the environments, which gets the episodes of a batch.
    in_order: wait for all environments that were asked before anything more is drawn. What is computed together then
      follows from what was drawn, and not from the clock, and log-probs are the same bit for bit.
    max_running: episodes that may have an environment at a time; groups begin as a whole.
    """

    def __init__(
        self,
        environments: EnvironmentRunner,
        turns: Mapping[str, Turns],
        tokenizer: Tokenizer,
        limits: EpisodeLimits,
        reward: EpisodeReward,
        in_order: bool = False,
        max_running: int = 2**31,
    ) -> None:
        self.environments, self.turns, self.tokenizer = environments, turns, tokenizer
        self.limits, self.reward = limits, reward
        self.in_order, self.max_running = in_order, max_running

    def notes(self) -> list[str]:
        """What a run should say once."""
        return list(dict.fromkeys(note for turns in self.turns.values() for note in turns.notes()))

    def draw(
        self,
        sampler: CompletionSource,
        params: Any,
        rows: Sequence[PromptRow],
        num_samples: int,
        sampling: SamplingParams,
        key: Any,
        prompt_indices: Sequence[int],
        seed: int,
        step: int,
    ) -> Iterator[tuple[int, Episode]]:
        """Draws `num_samples` episodes of every row; yields (place [B], episode) as each ends.

        Args:
          seed, step: of the run; the seed of an environment follows from both and from the prompt's index, and is the
            same for the whole group.
        """
        session = sampler.open(params, sampling, key, len(rows), num_samples, self.limits.tokens)
        seeds = [sample_seed(seed, step, index, 0) for index in prompt_indices]
        call = _Call(self, session, rows, num_samples, sampling, prompt_indices, seeds)
        try:
            yield from call.run()
        finally:
            self.environments.drop_all()


class _Call:
    """One call of `EpisodeSource.draw`: where each of its episodes stands."""

    def __init__(
        self,
        source: EpisodeSource,
        session: DrawSession,
        rows: Sequence[PromptRow],
        num_samples: int,
        sampling: SamplingParams,
        prompt_indices: Sequence[int],
        seeds: Sequence[int],
    ) -> None:
        self._environments, self._tokenizer = source.environments, source.tokenizer
        self._turns_P = [source.turns[source.environments.environment_of(row.columns)] for row in rows]
        self._limits, self._session, self._sampling = source.limits, session, sampling
        self._in_order, self._num_asked = source.in_order, 0
        self._groups = collections.deque(enumerate(zip(rows, seeds, strict=True)))  # that have not begun
        self._max_running, self._num_running = source.max_running, 0
        self._num_samples, self._indices = num_samples, prompt_indices
        self._episodes = [Episode(prompt=row.prompt) for row in rows for _ in range(num_samples)]
        self._to_begin = [num_samples] * len(rows)  # episodes of each group whose environment has not begun
        self._numbers: dict[int, int] = {}  # {place: number in the session}, until it is finished there
        self._places: dict[int, int] = {}  # the other way
        self._drawing: set[int] = set()  # places of which a turn is being drawn
        self._over: list[int] = []  # places that have ended since they were yielded last

    def _ask(self, p: int, row: PromptRow, seed: int) -> None:
        """Has the environments of a group begin."""
        self._num_running += self._num_samples
        for b in range(p * self._num_samples, (p + 1) * self._num_samples):
            try:
                self._environments.begin(b, {**row.columns, "prompt": row.prompt}, seed)
                self._num_asked += 1
            except ValueError as error:  # a value of the row that cannot be sent
                self._begin(b, EnvironmentReply(b, "begin", failure=("row", f"{row.where}: {error}")))

    def run(self) -> Iterator[tuple[int, Episode]]:
        """Until all episodes have ended."""
        num_left = len(self._episodes)
        while num_left:
            while self._groups and self._num_running + self._num_samples <= max(self._max_running, self._num_samples):
                p, (row, seed) = self._groups.popleft()
                self._ask(p, row, seed)
            for reply in self._replies():
                self._read(reply)
            for number, completion in self._session.poll():
                self._end_turn(self._places[number], completion)
            over, self._over = self._over, []
            for b in over:
                yield b, self._episodes[b]
            num_left -= len(over)
            self._num_running -= len(over)

    def _replies(self) -> list[EnvironmentReply]:
        """The replies that are there. In order: all that were asked for, by the places of their episodes."""
        if not self._in_order:
            return self._environments.poll(0.0 if self._session.has_work else _WAIT_SECONDS)
        replies: list[EnvironmentReply] = []
        while len(replies) < self._num_asked:
            replies += self._environments.poll(_WAIT_SECONDS)
        self._num_asked = 0
        return sorted(replies, key=lambda reply: reply.episode)

    def _read(self, reply: EnvironmentReply) -> None:
        b, episode = reply.episode, self._episodes[reply.episode]
        if episode.failure is not None or b in self._over:
            return
        episode.seconds += reply.seconds
        episode.metrics.update(reply.metrics)
        if reply.reward is not None:
            episode.reward = (episode.reward or 0.0) + reply.reward
        if reply.op == "begin":
            self._begin(b, reply)
        elif reply.failure is not None:
            self._fail(b, reply.failure)
        elif reply.op == "step":
            self._go_on(b, reply)
        else:
            self._over.append(b)

    def _begin(self, b: int, reply: EnvironmentReply) -> None:
        """Notes the prompt of an episode. When its group is complete, the turns of all its episodes are asked for."""
        episode, p = self._episodes[b], b // self._num_samples
        failure = reply.failure
        if failure is None:
            episode.prompt = reply.messages
            try:
                prompt_ids = self._turns_P[p].prompt_ids(reply.messages)
                if not 1 <= len(prompt_ids) <= self._limits.prompt_tokens:
                    most = f"data.max_prompt_length ({self._limits.prompt_tokens})"
                    raise ValueError(f"what reset returns must have 1 to {most} tokens, got {len(prompt_ids)}")
                episode.prompt_ids = prompt_ids
            except ValueError as error:
                failure = "prompt", str(error)
        if failure is not None:
            self._fail(b, failure, is_running=reply.failure is None)
        self._to_begin[p] -= 1
        if self._to_begin[p]:
            return
        prompts: dict[tuple[int, ...], list[int]] = {}
        for place in range(p * self._num_samples, (p + 1) * self._num_samples):
            if self._episodes[place].failure is None:
                prompts.setdefault(tuple(self._episodes[place].prompt_ids), []).append(place)
        if not prompts:
            return
        num_common = _num_common(list(prompts))
        num_others = max(map(len, prompts)) - num_common
        limit = min(self._limits.turn_tokens, self._limits.tokens - num_others)
        least = max(self._sampling.min_completion_length, 1)
        if not num_common or limit < least:
            rule = f"prompts of a group must begin alike, and leave {least} of rollout.max_episode_tokens to the policy"
            why = f"{rule}, got {num_common} tokens alike and up to {num_others} behind them; reset must use its seed"
            for place in [place for members in prompts.values() for place in members]:
                self._episodes[place].prompt_ids = []
                self._fail(place, ("prompt", why), is_running=True)
            return
        requests, places = [], []
        for number, members in enumerate(prompts.values()):
            for place in members:
                requests.append(Request(number, int(self._indices[p]), place % self._num_samples, limit))
                places.append(place)
        numbers = self._session.submit([np.array(prompt, np.int32) for prompt in prompts], requests)
        for place, number in zip(places, numbers, strict=True):
            self._numbers[place], self._places[number] = number, place
            self._drawing.add(place)

    def _end_turn(self, b: int, completion: Completion) -> None:
        """Hands a turn to the environment, or ends the episode at a limit."""
        episode = self._episodes[b]
        self._drawing.discard(b)
        ids = completion.token_ids.tolist()
        episode.turns.append(completion)
        episode.token_ids.extend(ids)
        episode.trained.extend([True] * len(ids))
        if episode.failure is not None:  # its environment was lost meanwhile
            self._leave_session(b)
            self._over.append(b)
            return
        if completion.finish_reason == "length":
            if episode.num_drawn >= self._sampling.max_completion_length:
                episode.ended = MAX_DRAWN
            elif len(episode.token_ids) >= self._most_tokens(b):
                episode.ended = MAX_TOKENS
        # Also where a limit has cut the turn: the environment judges what there is.
        text = self._tokenizer.decode(_without_end(completion), skip_special_tokens=False)
        self._environments.step(b, text)
        self._num_asked += 1

    def _go_on(self, b: int, reply: EnvironmentReply) -> None:
        """Puts the observation behind the turn, or ends the episode."""
        episode = self._episodes[b]
        assert reply.action is not None
        episode.messages.append(reply.action)
        episode.num_tool_calls += reply.num_tool_calls
        episode.num_bad_tool_calls += reply.num_bad_tool_calls
        assert not isinstance(reply.messages, str), "observations are messages"
        observations = episode.unread = reply.messages
        if episode.ended or reply.done or episode.num_turns >= self._limits.turns:
            self._end(b, episode.ended or (DONE if reply.done else MAX_TURNS))
            return
        last, turns = episode.turns[-1], self._turns_P[b // self._num_samples]
        has_ended = last.finish_reason == "eos" and last.stop_reason in turns.end_ids
        try:
            ids = turns.observation_ids(_history(episode), observations, has_ended)
        except ValueError as error:
            self._fail(b, ("observation", str(error)), is_running=True)
            return
        left = self._sampling.max_completion_length - episode.num_drawn
        room = self._most_tokens(b) - len(episode.token_ids) - len(ids)
        if left <= 0 or room <= 0:
            self._end(b, MAX_DRAWN if left <= 0 else MAX_TOKENS)
            return
        episode.messages.extend(observations)
        episode.unread = []
        episode.token_ids.extend(ids)
        episode.trained.extend([False] * len(ids))
        limit = len(episode.token_ids) + min(left, room, self._limits.turn_tokens)
        self._session.go_on(self._numbers[b], ids, limit)
        self._drawing.add(b)

    def _most_tokens(self, b: int) -> int:
        """Tokens that an episode may have: less where the prompts of its group differ, see `shared_prompt`."""
        first = b - b % self._num_samples
        # As in `shared_prompt`: an episode that is lost later has its part in what the group shares.
        prompts = [e.prompt_ids for e in self._episodes[first : first + self._num_samples] if e.prompt_ids]
        return self._limits.tokens - (max(map(len, prompts)) - _num_common(prompts))

    def _end(self, b: int, ended: str) -> None:
        self._episodes[b].ended = ended
        self._leave_session(b)
        self._environments.finish(b, ended)
        self._num_asked += 1

    def _fail(self, b: int, failure: tuple[str, str], is_running: bool = False) -> None:
        """Ends an episode without a reward. is_running: its environment knows nothing of the failure."""
        episode = self._episodes[b]
        episode.failure, episode.ended = failure, FAILED
        if is_running:
            self._environments.finish(b, FAILED)  # nobody reads the reply
            self._num_asked += 1
        if b not in self._drawing:  # else when its turn has ended
            self._leave_session(b)
            self._over.append(b)

    def _leave_session(self, b: int) -> None:
        number = self._numbers.pop(b, None)
        if number is not None:
            self._session.finish(number)


def shared_prompt(episodes: Sequence[Episode]) -> tuple[list[int], list[list[int]]]:
    """The tokens with which the prompts of a group begin, and what each has behind them.

    An environment that starts alike for the whole group leaves nothing behind. What it leaves is trained on as an
    observation is: it is read only.
    """
    prompts = [episode.prompt_ids for episode in episodes if episode.prompt_ids]
    count = _num_common(prompts) if prompts else 0
    return (prompts[0][:count] if prompts else []), [episode.prompt_ids[count:] for episode in episodes]


def episode_metrics(episodes: Sequence[Episode], names: Sequence[str]) -> dict[str, float]:
    """Metrics of a step's episodes. names: of the environment of each."""
    turns = np.array([episode.num_turns for episode in episodes])
    observed = [len(episode.token_ids) - episode.num_drawn for episode in episodes]
    calls = [episode.num_tool_calls for episode in episodes]
    metrics = {
        "turns/mean": float(turns.mean()),
        "turns/max": float(turns.max()),
        "observation_length/mean": float(np.mean(observed)),
        "tool_calls/mean": float(np.mean(calls)),
        "tool_calls/bad": float(sum(episode.num_bad_tool_calls for episode in episodes)),
    }
    ends = Counter(episode.ended for episode in episodes)
    metrics |= {f"episodes/{end}": ends[end] / len(episodes) for end in ENDS}
    by_name: dict[str, list[Episode]] = {}
    for name, episode in zip(names, episodes, strict=True):
        by_name.setdefault(name, []).append(episode)
    for name, own in by_name.items():
        metrics[f"environment/{name}/seconds_mean"] = float(np.mean([episode.seconds for episode in own]))
        metrics[f"environment/{name}/failures"] = float(sum(episode.failure is not None for episode in own))
        rewards = [episode.reward for episode in own if episode.reward is not None]
        if rewards:
            metrics[f"environment/{name}/reward_mean"] = float(np.mean(rewards))
        for metric in sorted({key for episode in own for key in episode.metrics}):
            values = [episode.metrics[metric] for episode in own if metric in episode.metrics]
            shown = f"logged_{metric}" if metric in _OWN_METRICS else metric
            metrics[f"environment/{name}/{shown}"] = float(np.mean(values))
    return metrics


def failure_problems(episodes: Sequence[Episode]) -> list[str]:
    """What went wrong in environments, one line for each kind of failure."""
    found: dict[str, list[str]] = {}
    for episode in episodes:
        if episode.failure is not None:
            kind, line = episode.failure
            found.setdefault(kind, []).append(line)
    return [f"{len(lines)} episodes were lost ({kind}): {lines[0]}" for kind, lines in found.items()]


def record_of(episode: Episode) -> dict[str, Any]:
    """What samples.jsonl has of an episode beside the fields of every completion."""
    record: dict[str, Any] = {
        "prompt": episode.prompt,
        "messages": episode.messages,
        "turns": episode.num_turns,
        "tool_calls": episode.num_tool_calls,
        "ended": episode.ended,
    }
    if episode.unread:
        record["unread"] = episode.unread
    if episode.failure is not None:
        record["failure"] = list(episode.failure)
    return record


def _num_common(prompts: Sequence[Sequence[int]]) -> int:
    """The number of tokens with which all prompts start; at least their last tokens are left where they differ."""
    count = min(map(len, prompts))
    while count and any(tuple(prompt[:count]) != tuple(prompts[0][:count]) for prompt in prompts[1:]):
        count -= 1
    return count


def _history(episode: Episode) -> list[dict[str, Any]]:
    """The conversation so far. A prompt of text is what a user said."""
    prompt = [{"role": "user", "content": episode.prompt}] if isinstance(episode.prompt, str) else episode.prompt
    return [*prompt, *episode.messages]


def _without_end(completion: Completion) -> list[int]:
    """The tokens of a turn without the EOS that ended it."""
    ids = completion.token_ids.tolist()
    return ids[:-1] if completion.finish_reason == "eos" else ids


def row_of(row: PromptRow, episodes: Sequence[Episode], prompt_ids: Sequence[int]) -> PromptRow:
    """The data row with the prompt that its episodes had."""
    prompt = next((episode.prompt for episode in episodes if episode.prompt_ids), row.prompt)
    return dataclasses.replace(row, prompt=prompt, prompt_ids=np.array(prompt_ids, np.int32))


def with_begun(completion: Completion, begun: Sequence[int]) -> Completion:
    """The completion with tokens of its own prompt in front, which are only read, see `shared_prompt`."""
    if not begun:
        return completion
    size, trained = len(begun), completion.trained
    trained = np.ones(len(completion.token_ids), bool) if trained is None else trained

    def longer(array: np.ndarray | None) -> Any:
        return None if array is None else np.concatenate([np.zeros((size, *array.shape[1:]), array.dtype), array])

    fields: Mapping[str, Any] = {
        name: longer(getattr(completion, name))
        for name in ("sampler_logprobs", "policy_logprobs", "top_ids", "top_logprobs", "kept_words")
    }
    token_ids = np.concatenate([np.array(begun, np.int32), completion.token_ids])
    trained = np.concatenate([np.zeros(size, bool), trained])
    return dataclasses.replace(completion, token_ids=token_ids, trained=trained, **fields)
