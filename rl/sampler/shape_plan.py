"""Plans the shape in which a call of the sampler starts to decode, from its prompts, requests and memory.

In: the requests of each shard, the lengths of prompts, the longest completion in tokens, a number of slots or of bytes.
Out: the first `rl.sampler.engine.Shape`. Arithmetic only. The sizes that follow the first are in `rl.sampler.sizes`.

An example on one device: 64 prompts with 8 requests each, completions of at most 128 tokens, 64 slots. 63 prompts have
101 tokens and one has 2,001. The last token of a prompt is fed by decoding, so 100 and 2,000 tokens are cached.

- Table length. Rows of 2,048 positions would hold each prompt in one row: 64 x 2,048 = 131,072 positions. Halving the
  rows down to 128 saves an eighth or more each time: then 63 prompts take one row and one takes 16, in all 79 x 128 =
  10,112 positions. Rows of 64 would take 158 x 64, exactly as many, so `table_length` is 128 and `rows_per_prompt` 16.
- Prompts at once. 64 slots, half as many again for what comes next: 96 requests, which 12 prompts have. With one more,
  the table has room for 13 prompts.
- Table rows. A prompt takes 79 / 64 = 1.23 rows on average. 13 prompts and a quarter more take 1.25 x 13 x 1.23 = 20.1
  rows. The next size is 24, more than the 16 of the longest prompt: `table_rows` is 24.
- Prefill rows. The table of 24 rows holds two of the longest prompts. It does not hold all 64 prompts, so one prefill
  fills a quarter of it, at least one row of 16 x 128 positions: `prefill_rows` is 1.
- Readers. Up to 8 slots draw from one prompt, so `num_readers` is 8. The own cache starts with 64 positions a slot.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from rl.sampler import request_queue
from rl.sampler.engine import Shape
from rl.sampler.sizes import MIN_TABLE_LENGTH, cache_sizes, session_sizes, size_at_least, size_at_most

MAX_DERIVED_SLOTS = 256  # when a memory budget sets the number: more slots are hardly cheaper for each token
MIN_COMMON_LENGTH = 64
MIN_CUT_LENGTH = 32  # positions of a table row that is shorter than the longest prompt
OPEN_PREFILL_ROWS = 4  # prompts of a shard that are prefilled at a time where they come one by one
READ_SIZES = (64, 8)  # tokens of an observation that are read at a time
MIN_SAVED = 1 / 8  # the share of positions that halving the table rows must save


@dataclasses.dataclass(frozen=True)
class ExpectedPrompts:
    """The prompts that are planned for: their common prefix, and for each the tokens that are cached after it.

    are_whole: each prompt takes one row of the table, as where a row has a state.
    """

    common: tuple[int, ...] = ()
    lengths: tuple[int, ...] = ()
    are_whole: bool = False

    @functools.cached_property
    def table_length(self) -> int:
        """Positions of a row of the prompt table; a prompt takes as many whole rows as it needs.

        The length starts at that of the longest prompt. It is halved as long as that saves an eighth of the positions
        that all prompts take together.
        """
        lengths = np.asarray(self.lengths)
        length = max(MIN_TABLE_LENGTH, size_at_least(int(lengths.max())))
        if self.are_whole:
            return length
        half = _half(length)
        while half >= MIN_CUT_LENGTH and request_queue.rows_taken(lengths, half).sum() * half <= (1 - MIN_SAVED) * (
            request_queue.rows_taken(lengths, length).sum() * length
        ):
            length, half = half, _half(half)
        return length

    @functools.cached_property
    def rows_per_prompt(self) -> int:
        """Table rows of the longest prompt."""
        return int(request_queue.rows_taken(np.asarray(self.lengths), self.table_length).max())

    @functools.cached_property
    def mean_rows(self) -> float:
        """Table rows of a prompt on average."""
        return float(request_queue.rows_taken(np.asarray(self.lengths), self.table_length).mean())


class KVBudget(NamedTuple):
    """Bytes on a device: the limit for caches, and what each of their arrays takes.

    allowed: for keys, values, labels and states.
    per_position: bytes of one position in each array of keys, values or labels.
    per_row: bytes of one row in each array of states, whatever the row's length.
    """

    allowed: int
    per_position: Sequence[int]
    per_row: Sequence[int] = ()

    @property
    def content(self) -> str:
        """What the bytes hold, in words."""
        return "keys, values and states" if self.per_row else "keys and values"

    def of_rows(self, num_rows: int, length: int) -> int:
        """Bytes of so many rows of `length` positions."""
        return num_rows * (length * sum(self.per_position) + sum(self.per_row))

    def of_positions(self, num_rows: int, length: int) -> int:
        """The same without states."""
        return num_rows * length * sum(self.per_position)

    def of_largest(self, num_rows: int, length: int) -> int:
        """Bytes of the largest array of so many rows."""
        return num_rows * max(length * max(self.per_position), *self.per_row, 0)


@dataclasses.dataclass(frozen=True)
class ShardRequests:
    """The requests of each shard: how many each of its pieces has, in the order of prefill.

    A piece is a prompt with the requests for it that one shard draws (`request_queue.deal`).
    """

    shards: tuple[tuple[int, ...], ...]

    @classmethod
    def of(cls, shards: Sequence[Sequence[Sequence[int]]]) -> "ShardRequests":
        """From the result of `request_queue.deal`."""
        return cls(tuple(tuple(len(piece) for piece in pieces) for pieces in shards))

    @functools.cached_property
    def most_requests(self) -> int:
        """The most requests of any shard."""
        return max(sum(sizes) for sizes in self.shards)

    @functools.cached_property
    def most_pieces(self) -> int:
        """The most pieces of any shard."""
        return max(len(sizes) for sizes in self.shards)

    @functools.cached_property
    def largest_piece(self) -> int:
        """The most requests of any piece."""
        return max(size for sizes in self.shards for size in sizes)

    def fits(self, other: "ShardRequests", num_slots: int) -> bool:
        """Whether the shape for `other`, with so many slots of a shard, also serves these requests.

        With fewer requests for each prompt, more prompts must be in the table to keep the slots busy.
        """
        return self.is_within(other) and self.prompts_at_once(num_slots) <= other.prompts_at_once(num_slots)

    def is_within(self, other: "ShardRequests") -> bool:
        """Whether no shard has more requests, more pieces or larger ones."""
        return (
            self.most_requests <= other.most_requests
            and self.most_pieces <= other.most_pieces
            and self.largest_piece <= other.largest_piece
        )

    def pieces_in_work(self, num_slots: int) -> int:
        """The number of pieces in work: enough for one and a half requests a slot, and one more.

        The half is for stragglers and for the pieces that come next. Counted where successive pieces have the fewest
        requests.
        """
        return self.pieces_of(math.ceil(1.5 * num_slots)) + 1

    def pieces_of(self, num_requests: int) -> int:
        """The most successive pieces of a shard that are needed for so many requests; all, where it has fewer."""
        return max(_longest_run(totals, num_requests) for totals in self._running_totals)

    @functools.cached_property
    def _running_totals(self) -> list[np.ndarray]:
        """For each shard, the number of requests in its first 0, 1, 2, ... pieces."""
        return [np.cumsum((0, *sizes)) for sizes in self.shards]

    def prompts_at_once(self, num_slots: int) -> int:
        """The number of pieces whose prompts the table holds at one time."""
        return min(self.most_pieces, self.pieces_in_work(num_slots))

    def table_rows(self, num_slots: int, expected: ExpectedPrompts) -> int:
        """Rows of the prompt table: a quarter more than its prompts take on average, and enough for the longest one."""
        in_flight, most = self.prompts_at_once(num_slots), expected.rows_per_prompt
        rows = max(math.ceil(1.25 * in_flight * expected.mean_rows), most)
        return size_at_least(min(rows, in_flight * most), 4)

    def prefill_rows(self, num_slots: int, expected: ExpectedPrompts) -> int:
        """Rows, each for the longest prompt, that one prefill fills: the whole table if it holds all prompts at once,
        else a quarter of it.
        """
        rows = math.ceil(self.table_rows(num_slots, expected) / expected.rows_per_prompt)
        return rows if self.most_pieces <= self.pieces_in_work(num_slots) else math.ceil(rows / 4)


def rest_lengths(prompts: Sequence[Sequence[int] | np.ndarray], common_length: int) -> tuple[int, ...]:
    """Tokens of each prompt that are cached after a common prefix: all but the last, which decoding feeds."""
    return tuple(len(prompt) - 1 - common_length for prompt in prompts)


def usable_common_length(length: int, num_prompts: int) -> int:
    """Tokens of a common prefix that get a cache of their own, rounded down to a size; 0 where it is not worth it."""
    return size_at_most(length, 8) if num_prompts > 1 and length >= MIN_COMMON_LENGTH else 0


def few_rows(prefill_rows: int) -> int:
    """Rows of a shard in the smaller prefill, for few prompts."""
    return math.ceil(prefill_rows / 4)


def first_shape(
    num_shards: int,
    demand: ShardRequests,
    expected: ExpectedPrompts,
    limit: int,
    slots: int | None,
    budget: KVBudget | None,
    serves_fewer: bool = False,
) -> Shape:
    """The shape that decoding starts with.

    Args:
      limit: tokens of a completion.
      slots: over all shards; None: as many as the budget allows, or as there are requests, up to 256.
      serves_fewer: whether calls with fewer prompts use this shape as well.

    Raises:
      ValueError: the budget is too small for one completion.
    """
    lengths = [size.length for size in cache_sizes(1, limit)]
    most = size_at_least(demand.most_requests, 4)
    if slots is not None:
        most = min(most, slots // num_shards)
    else:
        most = min(most, MAX_DERIVED_SLOTS // num_shards or 1)
        if budget is not None:
            most = _affordable_slots(budget, most, lengths, demand, expected, serves_fewer)
    return Shape(
        num_slots=most * num_shards,
        length=lengths[0],
        table_rows=demand.table_rows(most, expected) * num_shards,
        table_length=expected.table_length,
        rows_per_prompt=expected.rows_per_prompt,
        prefill_rows=demand.prefill_rows(most, expected) * num_shards,
        num_readers=min(demand.largest_piece, most),
        common_length=len(expected.common),
        num_waiting=2 * most,
    )


def turn_shape(
    num_shards: int,
    demand: ShardRequests,
    expected: ExpectedPrompts,
    longest: int,
    slots: int | None,
    budget: KVBudget | None,
) -> Shape:
    """The shape for completions of several turns.

    A row of the own cache grows up to a whole completion. Four requests for each slot have a kept row, as far as there
    are so many and the memory allows. The table holds the prompts of those that are in work, which have a slot or a
    kept row: a prompt is needed until its last completion is done.

    Args:
      longest: tokens of a completion, with what is put between its turns.

    Raises:
      ValueError: the budget is too small for one completion.
    """
    most = size_at_least(demand.most_requests, 4)
    most = min(most, MAX_DERIVED_SLOTS // num_shards or 1) if slots is None else min(most, slots // num_shards)
    lengths = [size.length for size in session_sizes(1, longest)]
    length = max(lengths)
    num_kept = min(demand.most_requests, 4 * most)

    def table_rows(most: int, num_kept: int) -> int:
        pieces = min(demand.most_pieces, demand.pieces_of(most + num_kept) + 1)
        return size_at_least(pieces * expected.rows_per_prompt, 4)

    def num_active(most: int, num_kept: int) -> int:
        rows = size_at_least(demand.prompts_at_once(most) * expected.rows_per_prompt, 4)
        return _if_fewer(rows, table_rows(most, num_kept))

    def shape(most: int, num_kept: int) -> Shape:
        # A prompt of which some requests are missing is cut into fewer and larger pieces than planned. A shard of one
        # piece may get the whole prompt; others have whole prompts anyway.
        is_cut = demand.largest_piece == demand.most_requests
        return Shape(
            num_slots=most * num_shards,
            length=min(lengths),
            table_rows=table_rows(most, num_kept) * num_shards,
            table_length=expected.table_length,
            rows_per_prompt=expected.rows_per_prompt,
            prefill_rows=demand.prefill_rows(most, expected) * num_shards,
            num_readers=most if is_cut else min(demand.largest_piece, most),
            common_length=0,
            num_waiting=2 * most,
            num_kept=num_kept * num_shards,
            kept_length=length,
            num_active=num_active(most, num_kept) * num_shards,
        )

    def peak(most: int, num_kept: int) -> int:
        assert budget is not None
        kept = budget.of_rows(most + num_kept, length) + budget.of_rows(rows_read(most), length + max(READ_SIZES))
        read = budget.of_rows(table_rows(most, num_kept), expected.table_length)
        read += budget.of_positions(num_active(most, num_kept), expected.table_length)
        prefill = demand.prefill_rows(most, expected), expected.rows_per_prompt * expected.table_length
        beside = max(budget.of_rows(*prefill) + budget.of_largest(*prefill), budget.of_largest(most, length))
        return kept + read + beside

    if budget is not None:
        while most > 1 and peak(most, min(num_kept, most)) > budget.allowed:
            most -= 1
        if peak(most, 1) > budget.allowed:
            raise ValueError(
                f"sampling.kv_memory must allow at least one completion of {longest} tokens in several turns, which "
                f"takes {peak(1, 1):,} bytes of {budget.content}, got {budget.allowed:,}; raise it, or shorten "
                "rollout.max_episode_tokens"
            )
        while num_kept > 1 and peak(most, num_kept) > budget.allowed:
            num_kept -= 1
    return shape(most, num_kept)


def open_shape(
    num_shards: int, num_slots: int, num_kept: int, expected: ExpectedPrompts, longest: int, budget: KVBudget | None
) -> Shape:
    """The shape for requests that come one by one and without an end: as `turn_shape`, where the table holds a prompt
    for each slot and each kept row, and few prompts are prefilled at a time.

    Args:
      num_slots, num_kept: over all shards.

    Raises:
      ValueError: the budget is too small.
    """
    slots, kept = max(num_slots // num_shards, 1), max(math.ceil(num_kept / num_shards), 1)
    lengths = [size.length for size in session_sizes(1, longest)]
    length = max(lengths)
    table_rows = size_at_least((slots + num_kept // num_shards) * expected.rows_per_prompt, 4)
    num_active = _if_fewer(slots * expected.rows_per_prompt, table_rows)
    prefill_rows = min(OPEN_PREFILL_ROWS, slots)
    if budget is not None:
        prefill = prefill_rows, expected.rows_per_prompt * expected.table_length
        peak = budget.of_rows(slots + kept, length) + budget.of_rows(rows_read(slots), length + max(READ_SIZES))
        peak += budget.of_rows(table_rows, expected.table_length)
        peak += budget.of_positions(num_active, expected.table_length)
        peak += max(budget.of_rows(*prefill) + budget.of_largest(*prefill), budget.of_largest(slots, length))
        if peak > budget.allowed:
            raise ValueError(
                f"sampling.kv_memory must hold {slots} completions of {longest} tokens at a time and {kept} kept ones, "
                f"which take {peak:,} bytes of {budget.content}, got {budget.allowed:,}; raise it, or lower "
                "sampling.slots, data.max_prompt_length or sampling.max_completion_length"
            )
    return Shape(
        num_slots=slots * num_shards,
        length=min(lengths),
        table_rows=table_rows * num_shards,
        table_length=expected.table_length,
        rows_per_prompt=expected.rows_per_prompt,
        num_readers=1,
        prefill_rows=prefill_rows * num_shards,
        common_length=0,
        num_waiting=slots,
        num_kept=kept * num_shards,
        kept_length=length,
        num_active=num_active * num_shards,
    )


def _if_fewer(num_active: int, table_rows: int) -> int:
    """Rows of the prompt table that are copied for a chunk; 0 where it would save less than a quarter of them."""
    return num_active if num_active <= table_rows * 3 / 4 else 0


def rows_read(num_slots: int) -> int:
    """Rows of a shard behind which observations are read at a time."""
    return min(2 * rows_moved(num_slots), num_slots)


def rows_moved(num_slots: int) -> int:
    """Rows of a shard that are kept, or go on, at a time: an eighth of its slots, at least 4 of them. Decoding stops
    for them when so many turns have ended: fewer would stop it more often, more would wait longer.
    """
    return max(math.ceil(num_slots / 8), min(num_slots, 4))


def _longest_run(totals: np.ndarray, enough: int) -> int:
    """The largest number of successive pieces that are needed for `enough` requests; all, where there are not enough.

    totals: of one shard, see `ShardRequests._running_totals`.
    """
    lasts = np.searchsorted(totals, totals[:-1] + enough).clip(max=len(totals) - 1)
    return int(np.max(lasts - np.arange(len(lasts)), initial=0))


def _half(table_length: int) -> int:
    """Half of a length, rounded up to a multiple of the shortest one."""
    return math.ceil(table_length / 2 / MIN_TABLE_LENGTH) * MIN_TABLE_LENGTH


def _affordable_slots(
    budget: KVBudget,
    most: int,
    lengths: Sequence[int],
    demand: ShardRequests,
    expected: ExpectedPrompts,
    serves_fewer: bool,
) -> int:
    num_slots = most
    while num_slots and _peak_bytes(budget, num_slots, lengths, demand, expected, serves_fewer) > budget.allowed:
        num_slots -= 1
    if not num_slots:
        least = _peak_bytes(budget, 1, lengths, demand, expected, serves_fewer)
        raise ValueError(
            f"sampling.kv_memory must allow at least one completion of {lengths[-1]} tokens, which takes {least:,} "
            f"bytes of {budget.content}, got {budget.allowed:,}; raise it, or shorten sampling.max_completion_length"
        )
    return num_slots


def _peak_bytes(
    budget: KVBudget,
    num_slots: int,
    lengths: Sequence[int],
    demand: ShardRequests,
    expected: ExpectedPrompts,
    serves_fewer: bool,
) -> int:
    """The most bytes that the caches of a shard take at one time.

    They are the own cache, the prompt table, the common prefix, the prompts of a running prefill, and one array that
    exists twice while a cache becomes longer or loses rows.

    Args:
      lengths: the lengths that the own cache has, in order.
    """
    prefill_rows = demand.prefill_rows(num_slots, expected)
    prefill = prefill_rows, expected.rows_per_prompt * expected.table_length
    read = budget.of_rows(demand.table_rows(num_slots, expected), expected.table_length)
    if expected.common:
        read += budget.of_rows(1, len(expected.common))
    # If one prefill holds all prompts, and its rows are not cut, its cache becomes the table.
    becomes_table = demand.most_pieces <= prefill_rows and expected.rows_per_prompt == 1
    beside = 0 if becomes_table else budget.of_rows(*prefill)
    twice = max(beside + budget.of_largest(*prefill), budget.of_largest(num_slots, lengths[-1]))
    peak = budget.of_rows(num_slots, lengths[-1]) + read + twice
    if serves_fewer and becomes_table and prefill_rows > 1:
        # The smaller prefill's cache does not become the table. It lies beside the table before anything is drawn.
        few = few_rows(prefill_rows), expected.table_length
        begun = budget.of_rows(num_slots, lengths[0]) + read + budget.of_rows(*few) + budget.of_largest(*few)
        peak = max(peak, begun)
    return peak
