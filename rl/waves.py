"""The host side of sampling: which rows are decoded together, what was drawn, when completions end. No model, no jit.

A wave is a list of groups; a group is rows that share a prompt. Shapes come from a short list of sizes, so that few
functions are compiled.
Legend: B device rows, P prompts (= groups) of a wave, G rows of a group, T prompt positions.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import numpy as np

from rl.decoding import Drawn, WaveInputs
from rl.sampling import SamplingParams

MIN_PROMPT_SLOTS = 16
MIN_COMPACT_ROWS = 16


@dataclasses.dataclass(frozen=True)
class Completion:
    """One completion of one prompt.

    prompt_index, sample_index: which completion it is; the key, these two and the position are all its randomness.
    token_ids: int32, the EOS or the token that completes a stop string included, nothing after it.
    sampler_logprobs: per token, under the distribution it was drawn from (after truncation); 0 when greedy.
    policy_logprobs: per token, under softmax(logits / temperature); at temperature 1 when greedy.
    finish_reason: "eos", "stop" (a stop string) or "length".
    """

    prompt_index: int
    sample_index: int
    token_ids: np.ndarray
    sampler_logprobs: np.ndarray
    policy_logprobs: np.ndarray
    finish_reason: str


class Row(NamedTuple):
    """Which completion a row is: the position of its prompt in the caller's list, and the sample."""

    prompt: int
    sample: int


def size_at_least(n: int) -> int:
    """The smallest of 1, 2, 3, 4, 6, 8, 12, 16, ... that is >= n: few shapes, at most a third wasted."""
    power = 1 << max(n - 1, 0).bit_length()
    return power * 3 // 4 if power >= 4 and power * 3 // 4 >= n else power


def size_at_most(n: int) -> int:
    """The largest of 1, 2, 3, 4, 6, 8, 12, 16, ... that is <= n, for n >= 1."""
    power = 1 << (n.bit_length() - 1)
    return power * 3 // 2 if power >= 2 and power * 3 // 2 <= n else power


def plan_waves(num_prompts: int, num_samples: int, max_rows: int, num_shards: int) -> list[list[list[Row]]]:
    """Waves of groups of rows; the rows of a group share one prompt, and a wave has at most `max_rows` rows.

    A group is all samples of a prompt. It is cut where it exceeds `max_rows` (one shard's part of it), or where there
    are fewer prompts than shards: then several shards prefill the same prompt, at the same time.
    """
    if not num_prompts:
        return []
    group_size = min(num_samples, max_rows // num_shards)
    pieces = math.ceil(num_shards / num_prompts)
    group_size = min(group_size, math.ceil(num_samples / pieces))
    groups = [
        [Row(prompt, sample) for sample in range(first, min(first + group_size, num_samples))]
        for prompt in range(num_prompts)
        for first in range(0, num_samples, group_size)
    ]
    per_wave = num_shards * size_at_most(max_rows // (group_size * num_shards))
    return [groups[first : first + per_wave] for first in range(0, len(groups), per_wave)]


def wave_inputs(
    prompts: Sequence[Sequence[int] | np.ndarray], indices: Sequence[int], groups: list[list[Row]], num_shards: int
) -> WaveInputs:
    """The wave's prompts, one per group, padded to a number of prompts, positions and rows out of a few."""
    num_prompts = num_shards * size_at_least(math.ceil(len(groups) / num_shards))
    group_size = max(len(group) for group in groups)
    longest = max(len(prompts[group[0].prompt]) for group in groups)
    tokens_PT = np.zeros((num_prompts, max(MIN_PROMPT_SLOTS, size_at_least(longest))), np.int32)
    lengths_P = np.ones(num_prompts, np.int32)
    indices_P = np.zeros(num_prompts, np.int32)
    samples_PG = np.zeros((num_prompts, group_size), np.int32)
    for p, group in enumerate(groups):
        prompt = prompts[group[0].prompt]
        tokens_PT[p, : len(prompt)] = prompt
        lengths_P[p] = len(prompt)
        indices_P[p] = indices[group[0].prompt]
        samples_PG[p, : len(group)] = [row.sample for row in group]
    return WaveInputs(tokens_PT, lengths_P, indices_P, samples_PG.reshape(-1))


def stop_length(
    token_ids: Sequence[int],
    num_checked: int,
    sampling: SamplingParams,
    decode_text: Callable[[Sequence[int]], str],
) -> int | None:
    """Number of tokens up to the one that completes the first stop string, or None.

    The text is that of the tokens together, so a stop string is found across token boundaries. One that the first
    `min_completion_length` tokens complete does not count.

    Args:
      num_checked: tokens known to complete none.
    """
    num_ignored = len(decode_text(token_ids[: sampling.min_completion_length]))

    def completes(num_tokens: int) -> bool:
        text = decode_text(token_ids[:num_tokens])
        return any(text.find(stop, max(0, num_ignored - len(stop) + 1)) >= 0 for stop in sampling.stop_strings)

    first = max(num_checked, sampling.min_completion_length) + 1
    if first > len(token_ids) or not completes(len(token_ids)):
        return None
    return next(num_tokens for num_tokens in range(first, len(token_ids) + 1) if completes(num_tokens))


class Tracker:
    """What the host knows of a wave: every completion's tokens, which ended and why, and which device row is whose.

    Attributes:
      length: tokens drawn so far for every live row.
      finished_B: bool; device rows that are finished, or that no completion owns.
      last_tokens_B: int32; the token to feed next.
    """

    def __init__(
        self,
        groups: list[list[Row]],
        inputs: WaveInputs,
        sampling: SamplingParams,
        decode_text: Callable[[Sequence[int]], str] | None,
    ) -> None:
        num_device_rows = inputs.sample_indices_B.size
        group_size = num_device_rows // inputs.prompt_lengths_P.size
        self._sampling = sampling
        self._decode_text = decode_text
        self._rows = [row for group in groups for row in group]
        self._owner_B = np.full(num_device_rows, -1)
        device_rows = [p * group_size + slot for p, group in enumerate(groups) for slot in range(len(group))]
        self._owner_B[device_rows] = np.arange(len(self._rows))
        self._tokens = np.zeros((len(self._rows), sampling.max_completion_length), np.int32)
        self._logprobs: np.ndarray | None = None
        self._ends: dict[int, tuple[int, str]] = {}
        self.length = 0
        self.finished_B = self._owner_B < 0
        self.last_tokens_B = np.zeros(num_device_rows, np.int32)

    @property
    def num_live(self) -> int:
        """Completions that have not ended."""
        return len(self._rows) - len(self._ends)

    def read(self, drawn: Drawn) -> None:
        """Takes a chunk from the device, in one transfer, and ends the completions that end in it."""
        drawn = jax.device_get(drawn)
        num_steps = int(drawn.num_steps)
        assert num_steps > 0, "a chunk without a step, though there were live rows"
        live_B = np.flatnonzero(~self.finished_B)
        owners = self._owner_B[live_B]
        start, self.length = self.length, self.length + num_steps
        if self._logprobs is None:
            self._logprobs = np.zeros((2, *self._tokens.shape), drawn.policy_logprobs_BC.dtype)
        self._tokens[owners, start : self.length] = drawn.tokens_BC[live_B, :num_steps]
        self._logprobs[0, owners, start : self.length] = drawn.sampler_logprobs_BC[live_B, :num_steps]
        self._logprobs[1, owners, start : self.length] = drawn.policy_logprobs_BC[live_B, :num_steps]
        self.last_tokens_B = drawn.tokens_BC[:, num_steps - 1]
        self.finished_B = self.finished_B.copy()
        for device_row, owner in zip(live_B, owners, strict=True):
            end = self._find_end(self._tokens[owner, : self.length], start)
            if end is not None:
                self._ends[owner] = end
                self.finished_B[device_row] = True

    def compact(self, num_shards: int) -> np.ndarray | None:
        """Forgets finished rows once half of the device rows can go; the indices of those kept, or None."""
        live_B = np.flatnonzero(~self.finished_B)
        num_kept = num_shards * (1 << max(math.ceil(live_B.size / num_shards) - 1, 0).bit_length())
        num_kept = max(num_kept, num_shards * math.ceil(MIN_COMPACT_ROWS / num_shards))
        if 2 * num_kept > self.finished_B.size:
            return None
        kept_B = np.resize(live_B, num_kept).astype(np.int32)  # repeats live rows; the repetitions belong to nobody
        owned_B = np.arange(num_kept) < live_B.size
        self._owner_B = np.where(owned_B, self._owner_B[kept_B], -1)
        self.last_tokens_B = self.last_tokens_B[kept_B]
        self.finished_B = ~owned_B
        return kept_B

    def completions(self, indices: Sequence[int]) -> dict[Row, Completion]:
        """The completions, all of which have ended; `indices` are the prompt indices by position."""
        assert self._logprobs is not None
        assert not self.num_live
        result = {}
        for owner, (length, reason) in self._ends.items():
            row = self._rows[owner]
            sampler_logprobs, policy_logprobs = self._logprobs[:, owner, :length].copy()
            token_ids = self._tokens[owner, :length].copy()
            result[row] = Completion(
                indices[row.prompt], row.sample, token_ids, sampler_logprobs, policy_logprobs, reason
            )
        return result

    def _find_end(self, token_ids: np.ndarray, num_checked: int) -> tuple[int, str] | None:
        """(length, finish reason) of a completion that ends among its tokens from `num_checked` on."""
        eos_at = np.flatnonzero(np.isin(token_ids[num_checked:], self._sampling.eos_ids))
        num_text = num_checked + int(eos_at[0]) if eos_at.size else token_ids.size
        if self._sampling.stop_strings:
            assert self._decode_text is not None
            stop = stop_length(token_ids[:num_text].tolist(), num_checked, self._sampling, self._decode_text)
            if stop is not None:
                return stop, "stop"
        if eos_at.size:
            return num_text + 1, "eos"
        return (token_ids.size, "length") if token_ids.size == self._sampling.max_completion_length else None
