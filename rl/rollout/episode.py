"""One episode: what was said and drawn, and what becomes of it in a group, in metrics and in samples.jsonl.

In: episodes that have ended. Out: completions with their `trained` tokens, the prompt that a group shares, metrics,
what went wrong. Not here: how episodes are drawn (`rl.rollout.episodes`).
"""

import dataclasses
import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from rewards.replies import Failure
from rl.data.prompt_rows import Prompt, PromptRow
from rl.sampler.contract import Completion, FurtherSequence
from rl.sampler.token_draw import SamplingParams

# How an episode ended. The first is as it should be, the next three are limits, the last two are lost.
DONE, MAX_TURNS, MAX_DRAWN, MAX_TOKENS = "done", "max_turns", "max_drawn", "max_tokens"
TOO_MANY_SEQUENCES, FAILED = "too_many_sequences", "failed"
ENDS = (DONE, MAX_TURNS, MAX_DRAWN, MAX_TOKENS, TOO_MANY_SEQUENCES, FAILED)

_OWN_METRICS = (  # of each environment; those that it gives are called otherwise
    "seconds_mean",
    "failures",
    "reward_mean",
)


@dataclasses.dataclass
class EpisodeSequence:
    """Token ids that were drawn and read one behind the other.

    Attributes:
      prompt_ids: what the policy read before its first turn.
      prompt: the same as messages or text, of a further sequence. messages: what came after it.
      sample: the number of the sample whose randomness a further sequence has.
      turns: as they were drawn.
      token_ids, trained: of all turns and observations, and whether the policy drew each.
    """

    prompt_ids: list[int] = dataclasses.field(default_factory=list)
    turns: list[Completion] = dataclasses.field(default_factory=list)
    token_ids: list[int] = dataclasses.field(default_factory=list)
    trained: list[bool] = dataclasses.field(default_factory=list)
    prompt: Prompt = ""
    messages: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    sample: int = -1

    @property
    def num_drawn(self) -> int:
        """The number of tokens that the policy drew."""
        return sum(self.trained)

    def add_turn(self, turn: Completion) -> None:
        """Puts a turn behind what is there."""
        self.turns.append(turn)
        self.token_ids.extend(turn.token_ids.tolist())
        self.trained.extend([True] * len(turn.token_ids))

    def add_read(self, token_ids: Sequence[int]) -> None:
        """Puts an observation behind what is there."""
        self.token_ids.extend(token_ids)
        self.trained.extend([False] * len(token_ids))


@dataclasses.dataclass
class Episode:
    """One sample that is drawn in turns.

    Attributes:
      prompt: what the environment's reset asked.
      sequences: at least one. There are more where an agent goes on with other tokens than those that are there.
        current: the one that goes on.
      messages: what came after the prompt, in time: turns, and observations between them.
      unread: observations behind the last turn, which the policy did not read.
      prompt_ids, token_ids, trained: of the first sequence.
      turns: of all sequences, one sequence after the other. places: the sequence of each turn, in time.
      num_turns, num_tool_calls, num_bad_tool_calls: counts.
      reward: the sum of what the environment gave; None where it gave nothing. rewards: what it gave after each turn,
        which may be fewer than the turns.
      judged: what each reward function that asks for environments gave: a number, None, or a failure.
      metrics: numbers of the environment, the last value of each. ended: one of `ENDS`.
      failure: (kind, one line) of an episode that is lost.
    """

    prompt: Prompt = ""
    sequences: list[EpisodeSequence] = dataclasses.field(default_factory=lambda: [EpisodeSequence()])
    current: int = 0
    places: list[int] = dataclasses.field(default_factory=list)
    messages: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    unread: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    num_tool_calls: int = 0
    num_bad_tool_calls: int = 0
    reward: float | None = None
    rewards: list[float | None] = dataclasses.field(default_factory=list)
    judged: dict[str, float | Failure | None] = dataclasses.field(default_factory=dict)
    metrics: dict[str, float] = dataclasses.field(default_factory=dict)
    ended: str = ""
    failure: tuple[str, str] | None = None
    seconds: float = 0.0  # in the environment

    @property
    def prompt_ids(self) -> list[int]:
        """The prompt of the first sequence."""
        return self.sequences[0].prompt_ids

    @property
    def token_ids(self) -> list[int]:
        """The tokens behind the prompt of the first sequence."""
        return self.sequences[0].token_ids

    @property
    def trained(self) -> list[bool]:
        """Whether the policy drew each of `token_ids`."""
        return self.sequences[0].trained

    @property
    def all_ids(self) -> list[int]:
        """The tokens of all sequences without their prompts."""
        return [token for sequence in self.sequences for token in sequence.token_ids]

    @property
    def turns(self) -> list[Completion]:
        """The turns of all sequences."""
        return [turn for sequence in self.sequences for turn in sequence.turns]

    @property
    def num_turns(self) -> int:
        """The number of turns."""
        return sum(len(sequence.turns) for sequence in self.sequences)

    @property
    def told(self) -> list[dict[str, Any]]:
        """What reward functions read of it: `messages`. They read a turn where there is none, because the episode was
        lost: what they say of it does not count, and they should not fail for the environment.
        """
        return self.messages or [{"role": "assistant", "content": ""}]

    @property
    def num_drawn(self) -> int:
        """The number of tokens that the policy drew."""
        return sum(sequence.num_drawn for sequence in self.sequences)

    @property
    def now(self) -> EpisodeSequence:
        """The sequence that goes on."""
        return self.sequences[self.current]

    @property
    def last_turn(self) -> Completion | None:
        """The turn that was drawn last."""
        return self.sequences[self.places[-1]].turns[-1] if self.places else None

    @property
    def history(self) -> list[dict[str, Any]]:
        """The conversation so far, as the policy has read it. A prompt of text is what a user said."""
        prompt = self.now.prompt if self.current else self.prompt
        prompt = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        return [*prompt, *self.now.messages]

    def say(self, messages: Sequence[dict[str, Any]]) -> None:
        """Notes what was said in the sequence that goes on."""
        self.messages.extend(messages)
        self.now.messages.extend(messages)

    def add_turn(self, turn: Completion) -> None:
        """Puts a turn behind the sequence that goes on."""
        self.places.append(self.current)
        self.now.add_turn(turn)

    def begin_again(self, prompt: Prompt, prompt_ids: Sequence[int], first_sample: int, num_samples: int) -> None:
        """Goes on in another sequence. Its randomness follows from its prompt, so that it does not matter when it
        begins: it is that of a sample that no episode has. first_sample: the number of the episode's sample, of
        `num_samples`.
        """
        num_alike = sum(sequence.prompt_ids == [*prompt_ids] for sequence in self.sequences)
        content = np.array([num_alike, *prompt_ids], np.int64).tobytes()
        number = int.from_bytes(hashlib.blake2b(content, digest_size=8).digest()) % (2**31 // num_samples - 1) + 1
        sample = first_sample + num_samples * number
        self.sequences.append(EpisodeSequence([*prompt_ids], prompt=prompt, sample=sample))
        self.current = len(self.sequences) - 1

    def add_reward(self, reward: float) -> None:
        """Adds what the environment gave after the last turn."""
        self.reward = (self.reward or 0.0) + reward
        if self.num_turns:
            self.rewards.extend([None] * (self.num_turns - len(self.rewards)))
            self.rewards[-1] = (self.rewards[-1] or 0.0) + reward

    def settle(self, max_sequences: int) -> None:
        """Leaves out sequences of which nothing was drawn, and loses the episode where more than `max_sequences` are
        left: a train step holds no more of them.
        """
        kept = [place for place, sequence in enumerate(self.sequences) if sequence.turns] or [0]
        self.sequences, self.current = [self.sequences[place] for place in kept], 0
        self.places = [kept.index(place) for place in self.places]
        if self.failure is None and len(self.sequences) > max_sequences:
            self.failure = too_many_sequences(len(self.sequences), max_sequences)
        if self.failure is not None and self.failure[0] == TOO_MANY_SEQUENCES:
            self.ended = TOO_MANY_SEQUENCES

    def completion(self, prompt_index: int, sample_index: int, sampling: SamplingParams) -> Completion:
        """The episode as one completion. Its log-probs are 0 where the policy drew nothing."""
        first, *further = (self._completion_of(s, prompt_index, sample_index, sampling) for s in self.sequences)
        prompts = [np.array(sequence.prompt_ids, np.int32) for sequence in self.sequences[1:]]
        return dataclasses.replace(first, further=tuple(map(FurtherSequence, prompts, further)))

    def _completion_of(
        self, sequence: EpisodeSequence, prompt_index: int, sample_index: int, sampling: SamplingParams
    ) -> Completion:
        """One sequence; how the whole episode ended."""
        trained = np.array(sequence.trained, bool)
        last = sequence.turns[-1] if sequence.turns else None
        is_cut = self.ended in (MAX_DRAWN, MAX_TOKENS) or last is None

        def column(name: str, width: tuple[int, ...], dtype: Any) -> np.ndarray:
            values = np.zeros((trained.size, *width), dtype)
            if last is not None:
                values[trained] = np.concatenate([getattr(turn, name) for turn in sequence.turns])
            return values

        def like(name: str) -> np.ndarray:
            example = np.zeros((0, sampling.top_logprobs) if name.startswith("top") else 0, np.float32)
            example = example if last is None else getattr(last, name)
            return column(name, example.shape[1:], example.dtype)

        return Completion(
            prompt_index,
            sample_index,
            np.array(sequence.token_ids, np.int32),
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
        done ends the episode also where the last turn was cut; one that is lost is not cut by a limit.
        """
        if self.failure is not None:
            return "stop", self.ended
        if is_cut or last is None:
            return "length", None
        if last.finish_reason == "length" and self.ended == DONE:
            return "stop", DONE
        return last.finish_reason, last.stop_reason


def too_many_sequences(count: int, most: int) -> tuple[str, str]:
    """The failure of an episode of so many sequences."""
    rule = f"rollout.max_sequences must be >= {count}, the sequences of an episode, got {most}"
    return TOO_MANY_SEQUENCES, rule


def shared_prompt(episodes: Sequence[Episode]) -> tuple[list[int], list[list[int]]]:
    """The tokens with which the prompts of a group begin, and what each has behind them.

    An environment that starts alike for the whole group leaves nothing behind. What it leaves is trained on as an
    observation is: it is read only.
    """
    prompts = [episode.prompt_ids for episode in episodes if episode.prompt_ids]
    count = num_alike(prompts) if prompts else 0
    return (prompts[0][:count] if prompts else []), [episode.prompt_ids[count:] for episode in episodes]


def episode_metrics(episodes: Sequence[Episode], names: Sequence[str] = ()) -> dict[str, float]:
    """Metrics of episodes. names: of the environment of each; without them nothing is told by environment."""
    turns = np.array([episode.num_turns for episode in episodes])
    observed = [sum(len(s.token_ids) - s.num_drawn for s in episode.sequences) for episode in episodes]
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
    for name, episode in zip(names, episodes, strict=bool(names)):
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
    if len(episode.sequences) > 1:
        record["turn_sequences"] = episode.places
    if any(reward is not None for reward in episode.rewards):
        record["turn_rewards"] = episode.rewards + [None] * (episode.num_turns - len(episode.rewards))
    if episode.unread:
        record["unread"] = episode.unread
    if episode.failure is not None:
        record["failure"] = list(episode.failure)
    return record


def num_alike(prompts: Sequence[Sequence[int]]) -> int:
    """The number of tokens with which all prompts start; at least their last tokens are left where they differ."""
    count = min(map(len, prompts))
    while count and any(tuple(prompt[:count]) != tuple(prompts[0][:count]) for prompt in prompts[1:]):
        count -= 1
    return count


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
