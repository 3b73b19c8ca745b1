"""The host side of decoding: where prompts lie in the prompt table, which requests wait, what became of each.

In: requests, the reports of the engine. Out: packed prompts to prefill, waiting requests as arrays, completions as they
end. No model, no jit.
Legend: B slots, P rows of prompts, M rows of the prompt table that the longest prompt takes, T prompt positions, W
waiting requests of a shard, C tokens of a chunk.
"""

import collections
import dataclasses
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

from rl.sampler.decoding import Report, Requests
from rl.sampler.token_draw import SamplingParams

MIN_SLOTS = 8  # per shard: fewer rows than this make no step faster
MAX_HALVINGS = 3  # of the slots: each is a program to compile
MIN_LENGTH = 64  # of the own cache, where completions may be longer
LENGTH_UNIT = 16
MIN_TABLE_LENGTH = 16
REPLACEMENT = "\ufffd"


@dataclasses.dataclass(frozen=True)
class Completion:
    """One completion of one prompt.

    prompt_index, sample_index: which completion it is; the key, these two and the position are all its randomness.
    token_ids: int32, the EOS or the token that completes a stop string included, nothing after it.
    sampler_logprobs: per token, under the distribution it was drawn from (penalties, truncation); 0 when greedy.
    policy_logprobs: per token, under softmax(logits / temperature); at temperature 1 when greedy.
    finish_reason: "eos", "stop" (a stop string) or "length".
    stop_reason: the EOS id, the stop string, or None.
    top_ids, top_logprobs: [tokens, N], the N most likely tokens of the plain softmax, best first; N may be 0.
    """

    prompt_index: int
    sample_index: int
    token_ids: np.ndarray
    sampler_logprobs: np.ndarray
    policy_logprobs: np.ndarray
    finish_reason: str
    stop_reason: int | str | None
    top_ids: np.ndarray
    top_logprobs: np.ndarray


@dataclasses.dataclass(frozen=True)
class Request:
    """One completion to draw: the prompt's place in the caller's list, its randomness, its limit in tokens."""

    prompt: int
    prompt_index: int
    sample_index: int
    limit: int
    seed: int | None = None


def requests_for(prompt_indices: Sequence[int], num_samples: int, limit: int) -> list[Request]:
    """`num_samples` requests of each prompt in turn. prompt_indices: what stands for each prompt in its randomness."""
    return [
        Request(place, int(index), sample, limit)
        for place, index in enumerate(prompt_indices)
        for sample in range(num_samples)
    ]


class CompletionSource(Protocol):
    """What draws completions: `rl.sampler.slot_sampler.Sampler`, or `rl.sampler.wave_sampler.WaveSampler`, as the
    policy asks for.
    """

    def expect(self, prompts: Sequence[Sequence[int] | np.ndarray], num_prompts: int = 0, num_samples: int = 0) -> None:
        """Plans shapes for prompts like these, and for calls of up to so many prompts and samples of each."""
        ...

    def stream(
        self,
        params: Any,
        prompts: Sequence[Sequence[int] | np.ndarray],
        requests: Sequence[Request],
        sampling: SamplingParams,
        key: Any,
    ) -> Iterator[tuple[int, Completion]]:
        """Draws the requests and yields (its place in `requests`, completion) of each as it ends."""
        ...

    def prompt_logprobs(
        self, params: Any, prompts: Sequence[Sequence[int] | np.ndarray], temperature: float, chunk_size: int | None
    ) -> list[np.ndarray]:
        """Log-probs of prompt tokens under the weights that completions are drawn with."""
        ...

    def release(self) -> None:
        """Drops what calls with the same weights share: the weights are about to change."""
        ...

    def warm_up(self, params: Any, num_prompts: int, num_samples: int, sampling: SamplingParams) -> None:
        """Compiles what calls of this size can need, in the background where it can."""
        ...

    def close(self) -> None:
        """Drops what waits to be compiled in the background; what is being compiled already comes to its end first."""
        ...


# Sizes: few, so that few programs are compiled


def size_at_least(n: int, steps: int = 2) -> int:
    """The smallest size >= n, with `steps` sizes per doubling (2: 1, 2, 3, 4, 6, 8, 12, ...; 4: 8, 10, 12, ...)."""
    unit = max((1 << (n - 1).bit_length() - 1) // steps, 1) if n > 2 else 1
    return math.ceil(max(n, 1) / unit) * unit


def size_at_most(n: int, steps: int = 2) -> int:
    """The largest of the same sizes that is <= n, for n >= 1."""
    unit = max((1 << n.bit_length() - 1) // steps, 1)
    return n // unit * unit


class CacheSize(NamedTuple):
    """Slots per shard, and positions that the own cache has for each."""

    slots: int
    length: int


def cache_sizes(most_slots: int, limit: int) -> list[CacheSize]:
    """The sizes that the own cache may have while completions of at most `limit` tokens are drawn.

    Slots are up to three times halved and lengths double until the limit. Three quarters of the slots go with one and a
    half of the lengths, and where memory is at its highest there are steps between these: five eighths and five
    sixteenths of the slots with the lengths from the second on, half of the slots with five quarters of these. Where
    completions end at a steady rate, growing from size to size then takes no more than a quarter above the
    first size, not even in a call whose completions happen to end late (99 of 100 at a mean of 0.4 times the limit).
    """
    halved = [most_slots]
    while halved[-1] > MIN_SLOTS and len(halved) <= MAX_HALVINGS:
        halved.append(max(math.ceil(halved[-1] / 2), MIN_SLOTS))
    last = LENGTH_UNIT * math.ceil(limit / LENGTH_UNIT)
    doubled = [MIN_LENGTH << k for k in range(limit.bit_length()) if MIN_LENGTH << k < last]
    quarters = [count for slots in halved if (count := slots * 3 // 4) >= MIN_SLOTS]
    eighths = [count for slots in halved[:2] if (count := slots * 5 // 8) >= MIN_SLOTS]

    def sizes(slots: Sequence[int], lengths: Sequence[int]) -> list[CacheSize]:
        return [CacheSize(count, length) for length in lengths for count in slots]

    if not doubled:
        return sizes(halved, [last])
    between = sizes(quarters, [*(length * 3 // 2 for length in doubled if length * 3 // 2 < last), last])
    between += sizes(eighths, [*doubled[1:], last])
    between += sizes(halved[1:2], [length * 5 // 4 for length in doubled[1:] if length * 5 // 4 < last])
    return sizes(halved, [*doubled, last]) + between


def next_cache_size(sizes: Sequence[CacheSize], now: CacheSize, needed: int, filled: int) -> CacheSize:
    """The size to go on with: the smallest that is longer once the cache is full; before that, fewer slots once half
    can go.

    Args:
      sizes: from `cache_sizes`.
      needed: slots that must stay.
      filled: positions of the busiest slot.
    """
    enough = [size for size in sizes if needed <= size.slots <= now.slots]
    if filled >= now.length:
        return min((size for size in enough if size.length > filled), key=lambda size: (math.prod(size), size.length))
    smallest = min(size for size in enough if size.length == now.length)
    return smallest if smallest.slots <= math.ceil(now.slots / 2) else now


def later_cache_sizes(sizes: Sequence[CacheSize], now: CacheSize) -> list[CacheSize]:
    """All that `next_cache_size` can answer, other than `now`, in an order that does not change."""
    fills = [0] if now.length == max(size.length for size in sizes) else [0, now.length]
    needs = sorted({size.slots for size in sizes if size.slots <= now.slots})
    later = (next_cache_size(sizes, now, needed, filled) for filled in fills for needed in needs)
    return [size for size in dict.fromkeys(later) if size != now]


# Prompts to shards and into rows


def deal(requests: Sequence[Request], num_shards: int) -> list[list[list[int]]]:
    """Requests (by number) of each prompt, dealt to the shards: [shard][piece][request]; the busiest shard gets least.

    Pieces are whole prompts, or parts of those that have more requests than a shard's share of all: then several shards
    prefill the same prompt, at the same time. Of prompts with equally many requests, fewer prompts never give a shard
    more requests, more pieces or larger ones.
    """
    groups: dict[int, list[int]] = {}
    for number, request in enumerate(requests):
        groups.setdefault(request.prompt, []).append(number)
    shards: list[dict[int, list[int]]] = [{} for _ in range(num_shards)]  # by prompt: none is twice in a shard
    loads = [0] * num_shards
    for prompt, group in groups.items():
        size = math.ceil(len(group) / max(len(group) * num_shards // len(requests), 1))
        for first in range(0, len(group), size):
            piece = group[first : first + size]
            shard = loads.index(min(loads))
            shards[shard].setdefault(prompt, []).extend(piece)
            loads[shard] += len(piece)
    return [list(pieces.values()) for pieces in shards]


def rows_taken(lengths: Any, table_length: int) -> Any:
    """Rows of the prompt table that prompts of so many cached tokens (a number, or an array) take; one at least, as its
    readers read one.
    """
    return np.maximum(-(-lengths // table_length), 1)


def common_prefix_length(prompts: Iterable[Sequence[int] | np.ndarray]) -> int:
    """Tokens that all prompts start with, the last token of each left out."""
    shared: np.ndarray | None = None
    for prompt in prompts:
        head = np.asarray(prompt, np.int32)[:-1]
        if shared is None:
            shared = head
            continue
        size = min(shared.size, head.size)
        differ = np.flatnonzero(shared[:size] != head[:size])
        shared = shared[: differ[0] if differ.size else size]
        if not shared.size:
            return 0
    return 0 if shared is None else int(shared.size)


# Stop strings


def find_stop(
    token_ids: Sequence[int],
    num_checked: int,
    sampling: SamplingParams,
    decode_text: Callable[[Sequence[int]], str],
) -> tuple[int, str] | None:
    """(number of tokens up to the one that completes the first stop string, that string), or None.

    The text is that of the tokens together, so a stop string is found across token boundaries. It ends a completion
    after the fewest tokens whose text shows it, however many are looked at together and whatever follows. One that the
    first `min_completion_length` tokens or fewer show does not count.

    Args:
      num_checked: tokens known to complete none.
    """
    stops, minimum = sampling.stop_strings, sampling.min_completion_length

    def completed(text: str) -> str | None:
        held = [stop for stop in stops if stop in text]
        num_ignored = _num_shown(token_ids[:minimum], text, decode_text) if held else 0
        return next((stop for stop in held if text.find(stop, max(0, num_ignored - len(stop) + 1)) >= 0), None)

    first = max(num_checked, minimum) + 1
    if first > len(token_ids):
        return None
    text = decode_text(token_ids)
    if completed(text) is None and not _may_hide(text, token_ids[: first - 1], stops, decode_text):
        return None
    for num_tokens in range(first, len(token_ids) + 1):
        stop = completed(decode_text(token_ids[:num_tokens]))
        if stop is not None:
            return num_tokens, stop
    return None


def _num_shown(token_ids: Sequence[int], text: str, decode_text: Callable[[Sequence[int]], str]) -> int:
    """Characters at the start of a text that some of the first of these tokens show as they are there.

    The text of all of them may end in characters that are not finished; then that of fewer tokens shows more.
    """
    num_shown = 0
    for num_tokens in range(len(token_ids), 0, -1):
        beginning = decode_text(token_ids[:num_tokens])
        num_shared = _num_shared(beginning, text)
        num_shown = max(num_shown, num_shared)
        if num_shared == len(beginning):
            break
    return num_shown


def _may_hide(
    text: str, checked: Sequence[int], stops: Sequence[str], decode_text: Callable[[Sequence[int]], str]
) -> bool:
    """Whether the text of fewer tokens, but more than the checked ones, may show what that of all does not.

    Decoders put U+FFFD for bytes that are no character, and some of them for every byte of a run until the last
    character of the run is finished. All else only grows.
    """
    if any(REPLACEMENT in stop for stop in stops):
        return True
    return REPLACEMENT in text and REPLACEMENT in text[_num_shared(decode_text(checked), text) :]


def _num_shared(left: str, right: str) -> int:
    """Characters that both texts start with."""
    if right.startswith(left):
        return len(left)
    return next(i for i, (a, b) in enumerate(itertools.zip_longest(left, right)) if a != b)


def find_end(
    tokens: np.ndarray,
    num_checked: int,
    num_tokens: int,
    limit: int,
    sampling: SamplingParams,
    decode_text: Callable[[Sequence[int]], str] | None,
) -> tuple[int, str, int | str | None] | None:
    """(length, finish reason, stop reason) of a completion that ends among its newest tokens, or None.

    Args:
      tokens: all `num_tokens` tokens with stop strings, else only those after the `num_checked` older ones.
      limit: tokens it may have.
    """
    new_tokens = tokens[len(tokens) - (num_tokens - num_checked) :]
    eos_at = np.flatnonzero(np.isin(new_tokens, sampling.eos_ids))
    num_text = num_checked + int(eos_at[0]) if eos_at.size else num_tokens
    if sampling.stop_strings:
        assert decode_text is not None
        stop = find_stop(tokens[:num_text].tolist(), num_checked, sampling, decode_text)
        if stop is not None:
            return stop[0], "stop", stop[1]
    if eos_at.size:
        return num_text + 1, "eos", int(new_tokens[eos_at[0]])
    return (num_tokens, "length", None) if num_tokens == limit else None


class Drawing:
    """What is known of a request that has been begun: one array of columns per chunk."""

    def __init__(self) -> None:
        self.parts: list[tuple[np.ndarray, ...]] = []
        self.num_tokens = 0

    def add(self, columns: tuple[np.ndarray, ...]) -> None:
        self.parts.append(columns)
        self.num_tokens += len(columns[0])

    def columns(self) -> list[np.ndarray]:
        return [np.concatenate(part) for part in zip(*self.parts, strict=True)]

    def token_ids(self) -> np.ndarray:
        """The first column alone."""
        return np.concatenate([part[0] for part in self.parts])


class _Fitting(NamedTuple):
    """Where the next pending prompts of a shard would be prefilled, (row, first of its parts) of each.

    is_table_full: whether it is for want of room in the prompt table that there are no more.
    """

    places: list[tuple[int, int]]
    is_table_full: bool


class Schedule:
    """Requests on their way: waiting for prefill, waiting for a slot, being drawn, ended.

    Args:
      prompts: token ids by place; `requests` name them.
      common_length: tokens at the start of every prompt that are cached elsewhere.
      shards: from `deal`: the requests of each shard, by prompt, in the order in which prompts are prefilled.
      table_rows, table_length, rows_per_prompt: of the prompt table, rows per shard. A prompt takes as many whole rows
        as it needs, at most `rows_per_prompt`, which are no more than there are.
      num_waiting: W, requests per shard that the device may see waiting.
    """

    def __init__(
        self,
        prompts: Sequence[Sequence[int] | np.ndarray],
        requests: Sequence[Request],
        sampling: SamplingParams,
        decode_text: Callable[[Sequence[int]], str] | None,
        common_length: int,
        shards: Sequence[Sequence[Sequence[int]]],
        table_rows: int,
        table_length: int,
        rows_per_prompt: int,
        num_waiting: int,
    ) -> None:
        assert rows_per_prompt <= table_rows, (rows_per_prompt, table_rows)
        self._prompts, self._requests = prompts, requests
        self._sampling, self._decode_text = sampling, decode_text
        self._common_length, self._num_waiting = common_length, num_waiting
        self._table_length, self._rows_per_prompt = table_length, rows_per_prompt
        num_shards = len(shards)
        self._pending = [collections.deque(pieces) for pieces in shards]
        self._waiting: list[collections.deque[int]] = [collections.deque() for _ in range(num_shards)]
        self._left = np.zeros((num_shards, table_rows), np.int64)  # requests of each table row that have not ended
        self._rows_of: dict[int, tuple[int, np.ndarray]] = {}  # shard and rows of the prompt of each begun request
        self._drawing: dict[int, Drawing] = {}
        self._slots = np.zeros(0, np.int64)
        self._cancelled = np.zeros(0, bool)  # slots that the device takes for busy, though the host has ended them
        self.num_left = len(requests)

    # Prompts to prefill

    def has_pending(self) -> bool:
        """Whether there are prompts to prefill."""
        return any(self._pending)

    def num_to_prefill(self, num_rows: int) -> int:
        """How many of `num_rows` rows of each shard to prefill now, the most of any shard; 0: none.

        Some, if in all shards with pending prompts either these rows would be full or nothing would be pending any
        more; or if one of them could prefill at least one prompt, and has free slots with no request waiting for them.
        """
        fitting = {shard: self._fitting(shard, num_rows) for shard, pieces in enumerate(self._pending) if pieces}
        busy = self.busy_slots()
        is_full = all(fits.places and not fits.is_table_full for fits in fitting.values())
        are_idle = any(
            fits.places and not self._waiting[shard] and not busy[shard].all() for shard, fits in fitting.items()
        )
        if not is_full and not are_idle:
            return 0
        return max((len({row for row, _ in fits.places}) for fits in fitting.values()), default=0)

    def admit(self, num_rows: int) -> tuple[tuple[np.ndarray, np.ndarray, np.ndarray], np.ndarray]:
        """As many pending prompts of each shard as `num_rows` rows hold and the table has room for get their places in
        it, and their requests wait from now on.

        Returns:
          tokens, positions and group ids [shards * num_rows, T], int32; and where in the table each of the M parts of a
          row goes, [shards, num_rows, M] (past its end where a part is empty).
        """
        num_shards, table_rows = self._left.shape
        shape = (num_shards, num_rows, self._rows_per_prompt * self._table_length)
        tokens, positions, group_ids = (np.zeros(shape, np.int32) for _ in range(3))
        group_ids -= 1
        places = np.full((num_shards, num_rows, self._rows_per_prompt), table_rows, np.int32)
        for shard, pending in enumerate(self._pending):
            fits = self._fitting(shard, num_rows)
            free = iter(np.flatnonzero(self._left[shard] == 0))
            for row, first_part in fits.places:
                piece = pending.popleft()
                prompt_number = self._requests[piece[0]].prompt
                prefix = np.asarray(self._prompts[prompt_number][self._common_length : -1], np.int32)
                rows = np.fromiter(itertools.islice(free, self._num_rows(piece)), np.int64)
                places[shard, row, first_part : first_part + rows.size] = rows
                first = first_part * self._table_length
                span = slice(first, first + prefix.size)
                tokens[shard, row, span] = prefix
                positions[shard, row, span] = self._common_length + np.arange(prefix.size)
                group_ids[shard, row, span] = prompt_number
                self._left[shard, rows] += len(piece)
                self._waiting[shard].extend(piece)
                self._rows_of.update((request, (shard, rows)) for request in piece)
        length = shape[-1]
        return (tokens.reshape(-1, length), positions.reshape(-1, length), group_ids.reshape(-1, length)), places

    def _num_rows(self, piece: Sequence[int]) -> int:
        """Rows of the table that the prompt of these requests takes."""
        length = len(self._prompts[self._requests[piece[0]].prompt]) - 1 - self._common_length
        return int(rows_taken(length, self._table_length))

    def _fitting(self, shard: int, num_rows: int) -> _Fitting:
        """Which of the next pending prompts of a shard `num_rows` rows hold and the table has room for, in order."""
        places: list[tuple[int, int]] = []
        used = [0] * num_rows
        num_free = int(np.sum(self._left[shard] == 0))
        for piece in self._pending[shard]:
            size = self._num_rows(piece)
            row = next((row for row in range(num_rows) if used[row] + size <= self._rows_per_prompt), None)
            if row is None or size > num_free:
                return _Fitting(places, is_table_full=row is not None)
            places.append((row, used[row]))
            used[row] += size
            num_free -= size
        return _Fitting(places, is_table_full=False)

    # Requests to draw

    @property
    def num_waiting(self) -> int:
        """The most requests that wait for a slot in any shard."""
        return max(len(waiting) for waiting in self._waiting)

    def has_more(self) -> bool:
        """Whether there are requests that the device is not told of yet."""
        return self.has_pending() or self.num_waiting > self._num_waiting

    def num_soon_busy(self) -> int:
        """Slots that draw once the waiting requests have taken the idle ones."""
        busy = self.busy_slots()
        waiting = np.array([min(len(waiting), self._num_waiting) for waiting in self._waiting])
        return int(np.minimum(busy.sum(axis=1) + waiting, busy.shape[1]).sum())

    def busy_slots(self) -> np.ndarray:
        """Which slots are drawing, bool [shards, slots]."""
        return self._slots.reshape(len(self._pending), -1) >= 0

    def set_slots(self, num_slots: int) -> None:
        """So many idle slots, over all shards."""
        self._slots = np.full(num_slots, -1)
        self._cancelled = np.zeros(num_slots, bool)

    def keep_slots(self, index: np.ndarray) -> None:
        """Only the slots `index` [shards, kept], counted in each shard; none of the others is drawing."""
        self._slots, self._cancelled = (
            np.take_along_axis(x.reshape(index.shape[0], -1), index, axis=1).reshape(-1)
            for x in (self._slots, self._cancelled)
        )

    def waiting(self) -> tuple[Requests, np.ndarray]:
        """The next requests of each shard as the device takes them, and how many there are [shards]."""
        shape = (len(self._waiting), self._num_waiting)
        fields: dict[str, np.ndarray] = {name: np.zeros(shape, np.int32) for name in Requests._fields[:-1]}
        fields["seeds"], fields["seeded"] = np.zeros(shape, np.uint32), np.zeros(shape, bool)
        fields["prefix_rows"] = np.full((*shape, self._rows_per_prompt), -1, np.int32)
        longest = self._common_length + self._rows_per_prompt * self._table_length + 1
        prompt_tokens = np.full((*shape, longest), -1, np.int32) if self._sampling.needs_counts else None
        counts = np.zeros(shape[0], np.int32)
        for shard, waiting in enumerate(self._waiting):
            counts[shard] = min(len(waiting), self._num_waiting)
            for i in range(counts[shard]):
                request = self._requests[waiting[i]]
                prompt = self._prompts[request.prompt]
                values = {
                    "request_ids": waiting[i],
                    "prompt_indices": request.prompt_index,
                    "sample_indices": request.sample_index,
                    "seeds": request.seed or 0,
                    "seeded": request.seed is not None,
                    "last_tokens": prompt[-1],
                    "prompt_lengths": len(prompt),
                    "limits": request.limit,
                    "group_ids": request.prompt,
                }
                for name, value in values.items():
                    fields[name][shard, i] = value
                _, rows = self._rows_of[waiting[i]]
                fields["prefix_rows"][shard, i, : rows.size] = rows
                if prompt_tokens is not None:
                    prompt_tokens[shard, i, : len(prompt)] = prompt
        return Requests(**fields, prompt_tokens=prompt_tokens), counts

    def cancelled(self) -> np.ndarray:
        """Slots whose completions ended by a stop string, bool [B]; told once."""
        cancelled, self._cancelled = self._cancelled, np.zeros_like(self._cancelled)
        return cancelled

    def read(self, report: Report) -> Iterator[tuple[int, Completion]]:
        """Takes what a chunk drew; yields (request, completion) of all that ended."""
        num_steps = int(report.num_steps)
        for shard, taken in enumerate(report.num_taken):
            for _ in range(int(taken)):
                self._waiting[shard].popleft()
        self._slots = np.array(report.request_ids, np.int64)
        ids_BC = np.asarray(report.columns.request_ids)[:num_steps].T
        drawn = [np.swapaxes(np.asarray(column)[:num_steps], 0, 1) for column in report.columns[1:]]
        for slot, ids_C in enumerate(ids_BC):
            edges = np.flatnonzero(np.diff(ids_C)) + 1
            for first, last in zip([0, *edges], [*edges, num_steps], strict=True):
                if first < last and ids_C[first] >= 0:
                    request = int(ids_C[first])
                    columns = tuple(column[slot, first:last].copy() for column in drawn)
                    completion = self._add(request, columns)
                    if completion is not None:
                        yield request, completion
                        if self._slots[slot] == request:
                            self._slots[slot] = -1
                            self._cancelled[slot] = True

    def _add(self, request: int, columns: tuple[np.ndarray, ...]) -> Completion | None:
        drawing = self._drawing.setdefault(request, Drawing())
        num_checked = drawing.num_tokens
        drawing.add(columns)
        tokens = columns[0] if not self._sampling.stop_strings else drawing.token_ids()
        limit = self._requests[request].limit
        end = find_end(tokens, num_checked, drawing.num_tokens, limit, self._sampling, self._decode_text)
        if end is None:
            return None
        length, finish_reason, stop_reason = end
        token_ids, sampler_logprobs, policy_logprobs, top_ids, top_logprobs = (
            column[:length] for column in drawing.columns()
        )
        del self._drawing[request]
        shard, rows = self._rows_of.pop(request)
        self._left[shard, rows] -= 1
        self.num_left -= 1
        asked = self._requests[request]
        return Completion(
            asked.prompt_index,
            asked.sample_index,
            token_ids,
            sampler_logprobs,
            policy_logprobs,
            finish_reason,
            stop_reason,
            top_ids,
            top_logprobs,
        )
