"""The shapes that a call of the sampler decodes in: what is expected of its prompts, and what fits in a memory budget.

In: what a shard gets of the requests, the lengths of prompts, a limit in tokens, a number of slots or of bytes. Out:
the `rl.sampler.engine.Shape` that decoding starts with. Arithmetic only; the sizes that follow it are
`rl.sampler.sizes`.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from rl.sampler import request_queue
from rl.sampler.engine import Shape
from rl.sampler.sizes import MIN_TABLE_LENGTH, cache_sizes, size_at_least, size_at_most

MAX_DERIVED_SLOTS = 256  # when a memory budget sets the number: more make a step longer and hardly cheaper per token
MIN_COMMON_LENGTH = 64
MIN_CUT_LENGTH = 32  # of a row of the prompt table that is shorter than the longest prompt
MIN_SAVED = 1 / 8  # of the positions that prompts take, for rows half as long


@dataclasses.dataclass(frozen=True)
class Expected:
    """What calls are planned for: the prefix of all prompts, and how many tokens of each are cached behind it."""

    common: tuple[int, ...] = ()
    lengths: tuple[int, ...] = ()

    @functools.cached_property
    def table_length(self) -> int:
        """Positions of a row of the prompt table. A prompt takes whole rows, as many as it needs: rows for the longest
        are halved for as long as that saves an eighth of the positions that all prompts take.
        """
        lengths = np.asarray(self.lengths)
        length = max(MIN_TABLE_LENGTH, size_at_least(int(lengths.max())))
        half = _half(length)
        while half >= MIN_CUT_LENGTH and request_queue.rows_taken(lengths, half).sum() * half <= (1 - MIN_SAVED) * (
            request_queue.rows_taken(lengths, length).sum() * length
        ):
            length, half = half, _half(half)
        return length

    @functools.cached_property
    def rows_per_prompt(self) -> int:
        """Rows of the prompt table that the longest prompt takes."""
        return int(request_queue.rows_taken(np.asarray(self.lengths), self.table_length).max())

    @functools.cached_property
    def mean_rows(self) -> float:
        """Rows of the prompt table that a prompt takes on average."""
        return float(request_queue.rows_taken(np.asarray(self.lengths), self.table_length).mean())


class KVBudget(NamedTuple):
    """Bytes on a device: what keys, values and their labels may take, and one position of each of the arrays."""

    allowed: int
    per_position: list[int]


@dataclasses.dataclass(frozen=True)
class Load:
    """What the shards get: how many requests each prompt, or part of one, has there, in the order of their prefill."""

    shards: tuple[tuple[int, ...], ...]

    @classmethod
    def of(cls, shards: Sequence[Sequence[Sequence[int]]]) -> "Load":
        """Of what `request_queue.deal` gives."""
        return cls(tuple(tuple(len(piece) for piece in pieces) for pieces in shards))

    @functools.cached_property
    def requests(self) -> int:
        """The most of any shard."""
        return max(sum(sizes) for sizes in self.shards)

    @functools.cached_property
    def pieces(self) -> int:
        """The most prompts, or parts of them, of any shard."""
        return max(len(sizes) for sizes in self.shards)

    @functools.cached_property
    def piece_size(self) -> int:
        """The most requests of one of these."""
        return max(size for sizes in self.shards for size in sizes)

    def fits(self, other: "Load", num_slots: int) -> bool:
        """Whether a shape of so many slots for the other one serves this one: fewer samples of a prompt than the other
        has need more prompts at a time to keep the slots busy.
        """
        return (
            self.requests <= other.requests
            and self.pieces <= other.pieces
            and self.piece_size <= other.piece_size
            and self.prompts_at_once(num_slots) <= other.prompts_at_once(num_slots)
        )

    def in_flight(self, num_slots: int) -> int:
        """Prompts whose samples are being drawn, half as many again for stragglers and for those that come next: as
        many as it takes where prompts in a row have fewest requests.
        """
        return max(_longest_run(totals, math.ceil(1.5 * num_slots)) for totals in self._running_totals) + 1

    @functools.cached_property
    def _running_totals(self) -> list[np.ndarray]:
        """Requests of the first 0, 1, 2, ... pieces of each shard."""
        return [np.cumsum((0, *sizes)) for sizes in self.shards]

    def prompts_at_once(self, num_slots: int) -> int:
        """Prompts that the table holds at one time."""
        return min(self.pieces, self.in_flight(num_slots))

    def table_rows(self, num_slots: int, expected: Expected) -> int:
        """Rows of the prompt table: for prompts of mean length a quarter more than they take, or for the longest."""
        in_flight, most = self.prompts_at_once(num_slots), expected.rows_per_prompt
        rows = max(math.ceil(1.25 * in_flight * expected.mean_rows), most)
        return size_at_least(min(rows, in_flight * most), 4)

    def prefill_rows(self, num_slots: int, expected: Expected) -> int:
        """Rows for the longest prompt that one prefill fills: as many as fill the table where it holds all prompts,
        else a quarter of them.
        """
        rows = math.ceil(self.table_rows(num_slots, expected) / expected.rows_per_prompt)
        return rows if self.pieces <= self.in_flight(num_slots) else math.ceil(rows / 4)


def rest_lengths(prompts: Sequence[Sequence[int] | np.ndarray], common_length: int) -> tuple[int, ...]:
    """Tokens of each prompt that are cached behind a common prefix: all but the last, which decoding feeds."""
    return tuple(len(prompt) - 1 - common_length for prompt in prompts)


def usable_common_length(length: int, num_prompts: int) -> int:
    """Tokens of a common prefix that get a cache of their own: a size, so that few programs are compiled, or none."""
    return size_at_most(length, 8) if num_prompts > 1 and length >= MIN_COMMON_LENGTH else 0


def few_rows(prefill_rows: int) -> int:
    """Rows of a shard in a prefill of few prompts, where it could be `prefill_rows`."""
    return math.ceil(prefill_rows / 4)


def first_shape(
    num_shards: int,
    load: Load,
    expected: Expected,
    limit: int,
    slots: int | None,
    budget: KVBudget | None,
    serves_fewer: bool = False,
) -> Shape:
    """The shape that decoding starts with.

    Args:
      limit: tokens of a completion.
      slots: over all shards; None: as many as the budget allows, without one as there are requests, up to 256.
      serves_fewer: whether calls of fewer prompts take this shape as well.

    Raises:
      ValueError: the budget does not hold one completion.
    """
    lengths = [size.length for size in cache_sizes(1, limit)]
    most = size_at_least(load.requests, 4)
    if slots is not None:
        most = min(most, slots // num_shards)
    else:
        most = min(most, MAX_DERIVED_SLOTS // num_shards or 1)
        if budget is not None:
            most = _affordable_slots(budget, most, lengths, load, expected, serves_fewer)
    return Shape(
        num_slots=most * num_shards,
        length=lengths[0],
        table_rows=load.table_rows(most, expected) * num_shards,
        table_length=expected.table_length,
        rows_per_prompt=expected.rows_per_prompt,
        prefill_rows=load.prefill_rows(most, expected) * num_shards,
        num_readers=min(load.piece_size, most),
        common_length=len(expected.common),
        num_waiting=2 * most,
    )


def _longest_run(totals: np.ndarray, enough: int) -> int:
    """The most pieces in a row that it takes to have enough requests, or that there are; see `Load._running_totals`."""
    lasts = np.searchsorted(totals, totals[:-1] + enough).clip(max=len(totals) - 1)
    return int(np.max(lasts - np.arange(len(lasts)), initial=0))


def _half(table_length: int) -> int:
    """Half of a length, in whole units of the shortest."""
    return math.ceil(table_length / 2 / MIN_TABLE_LENGTH) * MIN_TABLE_LENGTH


def _affordable_slots(
    budget: KVBudget, most: int, lengths: Sequence[int], load: Load, expected: Expected, serves_fewer: bool
) -> int:
    num_slots = most
    while num_slots and _peak_bytes(budget, num_slots, lengths, load, expected, serves_fewer) > budget.allowed:
        num_slots -= 1
    if not num_slots:
        least = _peak_bytes(budget, 1, lengths, load, expected, serves_fewer)
        raise ValueError(
            f"sampling.kv_memory must allow at least one completion of {lengths[-1]} tokens, which takes {least:,} "
            f"bytes of keys and values, got {budget.allowed:,}; raise it, or shorten sampling.max_completion_length"
        )
    return num_slots


def _peak_bytes(
    budget: KVBudget, num_slots: int, lengths: Sequence[int], load: Load, expected: Expected, serves_fewer: bool
) -> int:
    """The most bytes that keys and values of a shard take at one time: own cache, prompt table, common prefix, prompts
    that are prefilled meanwhile, and one array that exists twice while a cache becomes longer or loses rows.

    Args:
      lengths: of the own cache, in order.
    """
    whole, largest = sum(budget.per_position), max(budget.per_position)
    own, prefill_rows = num_slots * lengths[-1], load.prefill_rows(num_slots, expected)
    prefilled = prefill_rows * expected.rows_per_prompt * expected.table_length
    read = load.table_rows(num_slots, expected) * expected.table_length + len(expected.common)
    # Where one prefill is all there is, and its rows are not cut, it becomes the table.
    becomes_table = load.pieces <= prefill_rows and expected.rows_per_prompt == 1
    beside = 0 if becomes_table else prefilled
    peak = (own + read) * whole + max(beside * whole + prefilled * largest, own * largest)
    if serves_fewer and becomes_table and prefill_rows > 1:
        # That of a few rows does not, and lies beside the table before anything is drawn.
        few = few_rows(prefill_rows) * expected.table_length
        peak = max(peak, (num_slots * lengths[0] + read + few) * whole + few * largest)
    return peak
