"""The host's book of decoding: where prompts lie in the prompt table, which requests wait, how each one ended.

In: requests, the reports of the engine. Out: packed prompts to prefill, waiting requests as arrays, completions as they
end. No model, no jit. Not here: where a completion ends (`rl.sampler.endings`), sizes (`rl.sampler.sizes`).
Legend: B slots, P rows of prompts, M rows of the prompt table that the longest prompt takes, T prompt positions, W
waiting requests of a shard, C tokens of a chunk.
"""

import collections
import dataclasses
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from rl.models.inputs import Inputs, empty_inputs
from rl.sampler.contract import Completion, Request
from rl.sampler.decoding import ChunkReport, Requests
from rl.sampler.endings import Drawing, find_end
from rl.sampler.slot_rules import device_rules, rule_arrays
from rl.sampler.token_draw import SamplingParams

UNUSED = -2  # in place of a row of the prompt table; -1 is a part that a prompt does not have

# Prompts to shards and into rows


def deal(
    requests: Sequence[Request],
    num_shards: int,
    loads: Sequence[int] | None = None,
    first: int = 0,
    total: int | None = None,
) -> list[list[list[int]]]:
    """Deals requests, by number, to the shards: [shard][piece][request]. The next piece goes to the shard with the
    fewest.

    loads: the requests that each shard has already; None: none. first: the number of the first of these requests.
    total: the requests of the whole call; None: these.

    A piece is all requests of one prompt. A prompt with more requests than a shard's share is cut into several pieces,
    and several shards prefill it at the same time. If all prompts have equally many requests, fewer prompts never give
    a shard more requests, more pieces or larger ones.
    """
    groups: dict[int, list[int]] = {}
    for number, request in enumerate(requests, first):
        groups.setdefault(request.prompt, []).append(number)
    shards: list[dict[int, list[int]]] = [{} for _ in range(num_shards)]  # by prompt: none is twice in a shard
    loads = [0] * num_shards if loads is None else list(loads)
    for prompt, group in groups.items():
        size = math.ceil(len(group) / max(len(group) * num_shards // (total or len(requests)), 1))
        for begin in range(0, len(group), size):
            piece = group[begin : begin + size]
            shard = loads.index(min(loads))
            shards[shard].setdefault(prompt, []).extend(piece)
            loads[shard] += len(piece)
    return [list(pieces.values()) for pieces in shards]


def rows_taken(lengths: Any, table_length: int) -> Any:
    """Rows of the prompt table for prompts of so many cached tokens (a number, or an array). At least one, because
    slots always read a row.
    """
    return np.maximum(-(-lengths // table_length), 1)


def common_prefix_length(prompts: Iterable[Sequence[int] | np.ndarray]) -> int:
    """The number of tokens with which all prompts start. The last token of a prompt does not count."""
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


class _Fitting(NamedTuple):
    """The places at which the next pending prompts of a shard would be prefilled: (row, first of its parts) of each.

    is_table_full: whether there are no more because the prompt table is full.
    """

    places: list[tuple[int, int]]
    is_table_full: bool


class Schedule:
    """Requests on their way: waiting for prefill, waiting for a slot, being drawn, ended.

    Args:
      common_length: tokens at the start of every prompt, which are cached elsewhere.
      num_shards: shards of slots and of the prompt table.
      table_rows, table_length, rows_per_prompt: the prompt table's rows of a shard, their positions, and the most rows
        of a prompt. A prompt takes as many whole rows as it needs.
      num_waiting: W, the most requests of a shard that wait on the device.
      counted_length: the most tokens before the first one that a request draws, where penalties count them.
      holds: completions have several turns: what a request takes is free when `finish` says so, and the slot of one
        that ends is listed in `ended`. A request that continues tokens is listed in `begun`, and waits for no slot.
      logits_dtype: of the numbers in the rules of requests.
    """

    def __init__(
        self,
        sampling: SamplingParams,
        decode_text: Callable[[Sequence[int]], str] | None,
        common_length: int,
        num_shards: int,
        table_rows: int,
        table_length: int,
        rows_per_prompt: int,
        num_waiting: int,
        counted_length: int = 0,
        holds: bool = False,
        logits_dtype: Any = np.float32,
    ) -> None:
        assert rows_per_prompt <= table_rows, (rows_per_prompt, table_rows)
        # {number: what is not finished}; numbers are never used again.
        self._prompts: dict[int, Sequence[int] | np.ndarray] = {}
        self._requests: dict[int, Request] = {}
        self._uses: dict[int, int] = {}  # {prompt: its requests}
        self._num_prompts = self._num_requests = 0  # so far
        self._sampling, self._decode_text = sampling, decode_text
        self._common_length, self._num_waiting = common_length, num_waiting
        self._table_length, self._rows_per_prompt = table_length, rows_per_prompt
        self._counted_length, self._holds, self._logits_dtype = counted_length, holds, np.dtype(logits_dtype)
        self._pending: list[collections.deque[Sequence[int]]] = [collections.deque() for _ in range(num_shards)]
        self._waiting: list[collections.deque[int]] = [collections.deque() for _ in range(num_shards)]
        self._left = np.zeros(
            (num_shards, table_rows), np.int64
        )  # {shard, table row: its requests that have not ended}
        self._rows_of: dict[int, tuple[int, np.ndarray]] = {}  # {begun request: (shard, table rows of its prompt)}
        self._drawing: dict[int, Drawing] = {}
        self._slots = np.zeros(0, np.int64)
        self._cancelled = np.zeros(0, bool)  # slots that the host has ended, and that the device takes for busy
        self.ended: dict[int, int] = {}  # {request whose turn has ended: the slot that still has what it drew}
        self.begun: list[int] = []  # where they have turns: requests that had some before they came, and may go on now
        self.num_left = 0  # requests that have not ended

    def add(
        self,
        prompts: Sequence[Sequence[int] | np.ndarray],
        requests: Sequence[Request],
        shards: Sequence[Sequence[Sequence[int]]] | None = None,
        total: int | None = None,
    ) -> range:
        """Takes in further prompts, with the requests for them; requests name a prompt by its place in `prompts`.

        shards: from `deal`: the numbers of the requests of each shard, by prompt, in the order in which prompts are
          prefilled. None: dealt by what each shard has already; `total` requests will come in all.

        Returns:
          The numbers of the requests here, in their order.
        """
        numbers = range(self._num_requests, self._num_requests + len(requests))
        if shards is None:
            shards = deal(requests, len(self._pending), self.loads(), numbers.start, total)
        first_prompt = self._num_prompts
        if first_prompt:
            requests = [dataclasses.replace(request, prompt=first_prompt + request.prompt) for request in requests]
        for number, request in zip(numbers, requests, strict=True):
            self._requests[number] = request
            self._prompts[request.prompt] = prompts[request.prompt - first_prompt]
            self._uses[request.prompt] = self._uses.get(request.prompt, 0) + 1
        self._num_prompts += len(prompts)
        self._num_requests += len(requests)
        for pending, pieces in zip(self._pending, shards, strict=True):
            pending.extend(pieces)
        self.num_left += len(requests)
        return numbers

    def loads(self) -> list[int]:
        """The requests of each shard that have not ended."""
        loads = [sum(map(len, pieces)) for pieces in self._pending]
        for shard, _ in self._rows_of.values():
            loads[shard] += 1
        return loads

    def request(self, number: int) -> Request:
        """The request of this number; its prompt is a number of this schedule's."""
        return self._requests[number]

    def prompt(self, number: int) -> Sequence[int] | np.ndarray:
        """The prompt of the request of this number."""
        return self._prompts[self._requests[number].prompt]

    def shard(self, number: int) -> int:
        """The shard of a request that has begun."""
        return self._rows_of[number][0]

    # Prompts to prefill

    def has_pending(self) -> bool:
        """Whether there are prompts to prefill."""
        return any(self._pending)

    def num_to_prefill(self, num_rows: int) -> int:
        """How many of `num_rows` rows of each shard to prefill now, as the most of any shard; 0: none.

        It is time to prefill in two cases. In every shard with pending prompts, the rows would be full or nothing would
        remain pending. Or some shard has free slots without waiting requests, and could prefill a prompt.
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

    def admit(self, num_rows: int) -> tuple[Inputs, np.ndarray]:
        """Gives places in the table to as many pending prompts of each shard as fit, in `num_rows` rows and in the
        table. Their requests wait from now on.

        Returns:
          Tokens with their labels, numpy [shards * num_rows, T], int32; and the table row of each of the M parts of a
          row, [shards, num_rows, M] (past the table's end for an empty part).
        """
        num_shards, table_rows = self._left.shape
        inputs = empty_inputs(num_shards * num_rows, self._rows_per_prompt * self._table_length)
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
                place = shard * num_rows + row, slice(first, first + prefix.size)
                inputs.tokens_BT[place] = prefix
                inputs.positions_BT[place] = self._common_length + np.arange(prefix.size)
                inputs.group_ids_BT[place] = prompt_number
                self._left[shard, rows] += len(piece)
                for number in piece:
                    is_begun = self._holds and self._requests[number].continues
                    (self.begun if is_begun else self._waiting[shard]).append(number)
                self._rows_of.update((request, (shard, rows)) for request in piece)
        return inputs, places

    def _num_rows(self, piece: Sequence[int]) -> int:
        """Rows of the table for the prompt of these requests."""
        length = len(self._prompts[self._requests[piece[0]].prompt]) - 1 - self._common_length
        return int(rows_taken(length, self._table_length))

    def _fitting(self, shard: int, num_rows: int) -> _Fitting:
        """The next pending prompts of a shard, in order, that fit into `num_rows` rows and into the table."""
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
        """The most requests of any shard that wait for a slot."""
        return max(len(waiting) for waiting in self._waiting)

    def num_beginning(self, num_kept: int) -> np.ndarray:
        """By shard, the requests that wait for a first slot, as far as no more than `num_kept` have begun with them."""
        waiting = np.array([len(waiting) for waiting in self._waiting])
        begun = np.bincount([shard for shard, _ in self._rows_of.values()], minlength=waiting.size) - waiting
        return np.clip(num_kept - begun, 0, waiting)

    def has_more(self) -> bool:
        """Whether there are requests that are not on the device yet."""
        return self.has_pending() or self.num_waiting > self._num_waiting

    def num_soon_busy(self) -> int:
        """The number of slots that draw once waiting requests have taken idle slots."""
        busy = self.busy_slots()
        waiting = np.array([min(len(waiting), self._num_waiting) for waiting in self._waiting])
        return int(np.minimum(busy.sum(axis=1) + waiting, busy.shape[1]).sum())

    def busy_slots(self) -> np.ndarray:
        """bool [shards, slots]: which slots are drawing."""
        return self._slots.reshape(len(self._pending), -1) >= 0

    def set_slots(self, num_slots: int) -> None:
        """Starts with `num_slots` idle slots over all shards."""
        self._slots = np.full(num_slots, -1)
        self._cancelled = np.zeros(num_slots, bool)

    def keep_slots(self, index: np.ndarray) -> None:
        """Keeps the slots `index` [shards, kept], counted in each shard. No other slot may be drawing."""
        self._slots, self._cancelled = (
            np.take_along_axis(x.reshape(index.shape[0], -1), index, axis=1).reshape(-1)
            for x in (self._slots, self._cancelled)
        )

    def waiting(self) -> tuple[Requests, np.ndarray]:
        """The next requests of each shard in the device's form, and their number [shards]. Where they have turns, as
        many as slots are idle: no other becomes idle in a chunk.
        """
        first = self._next_waiting()
        return self.arrays(first, self._num_waiting), np.array([len(numbers) for numbers in first], np.int32)

    def _next_waiting(self) -> list[list[int]]:
        most = (~self.busy_slots()).sum(axis=1) if self._holds else [self._num_waiting] * len(self._waiting)
        return [list(itertools.islice(waiting, int(n))) for waiting, n in zip(self._waiting, most, strict=True)]

    def active_rows(self, num_rows: int) -> np.ndarray | None:
        """[shards, num_rows], the rows of the prompt table that are read in the next chunk, counted in the shard;
        `UNUSED` where there are fewer. None: there are more. Where completions have turns only.
        """
        active = np.full((len(self._waiting), num_rows), UNUSED, np.int32)
        slots = self._slots.reshape(len(self._waiting), -1)
        for shard, waiting in enumerate(self._next_waiting()):
            numbers = [*slots[shard][slots[shard] >= 0].tolist(), *waiting]
            rows = {row for number in numbers for row in self._rows_of[number][1].tolist()}
            if len(rows) > num_rows:
                return None
            active[shard, : len(rows)] = sorted(rows)
        return active

    def arrays(self, numbers: Sequence[Sequence[int]], width: int, are_own: bool = False) -> Requests:
        """Requests, by shard, in the device's form, padded to `width`.

        are_own: what they continue is in their own caches, and not behind their prompts.
        """
        shape = (len(numbers), width)
        fields: dict[str, np.ndarray] = {name: np.zeros(shape, np.int32) for name in Requests._fields[:-2]}
        fields["seeds"], fields["seeded"] = np.zeros(shape, np.uint32), np.zeros(shape, bool)
        fields["prefix_rows"] = np.full((*shape, self._rows_per_prompt), -1, np.int32)
        prompt_tokens = None
        if self._sampling.needs_counts:
            prompt_tokens = np.full((*shape, self._counted_length), -1, np.int32)
        rules = rule_arrays(partial(np.zeros, shape), self._logits_dtype) if self._sampling.is_by_slot else None
        for shard, own in enumerate(numbers):
            for i, number in enumerate(own):
                request = self._requests[number]
                prompt = before = self._prompts[request.prompt]
                if are_own and request.continues:
                    before = np.concatenate([prompt, request.continues])
                values = {
                    "request_ids": number,
                    "prompt_indices": request.prompt_index,
                    "sample_indices": request.sample_index,
                    "seeds": request.seed or 0,
                    "seeded": request.seed is not None,
                    "last_tokens": before[-1],
                    "prompt_lengths": len(prompt),
                    "limits": request.limit - len(request.continues),
                    "nums_before": len(request.begun),
                    "group_ids": request.prompt,
                }
                for name, value in values.items():
                    fields[name][shard, i] = value
                _, rows = self._rows_of[number]
                fields["prefix_rows"][shard, i, : rows.size] = rows
                if prompt_tokens is not None:
                    prompt_tokens[shard, i, : len(before)] = before
                if rules is not None:
                    own_rules = device_rules(self._sampling_of(request), self._logits_dtype)
                    for array, value in zip(rules, own_rules, strict=True):
                        array[shard, i] = value
        return Requests(**fields, prompt_tokens=prompt_tokens, rules=rules)

    def _sampling_of(self, request: Request) -> SamplingParams:
        return self._sampling if request.rules is None else request.rules.applied_to(self._sampling)

    def cancelled(self) -> np.ndarray:
        """bool [B]: slots whose completions ended by a stop string since the last call, and held ones."""
        cancelled, self._cancelled = self._cancelled, np.zeros_like(self._cancelled)
        return cancelled

    def read(self, report: ChunkReport) -> Iterator[tuple[int, Completion]]:
        """Reads the report of a chunk and yields (request, completion) of each completion that ended."""
        num_steps = int(report.num_steps)
        for shard, taken in enumerate(report.num_taken):
            for _ in range(int(taken)):
                self._waiting[shard].popleft()
        self._slots = np.array(report.request_ids, np.int64)
        ids_BC = np.asarray(report.columns.request_ids)[:num_steps].T
        drawn = [
            np.swapaxes(np.asarray(column)[:num_steps], 0, 1) for column in report.columns[1:] if column is not None
        ]
        for slot, ids_C in enumerate(ids_BC):
            edges = np.flatnonzero(np.diff(ids_C)) + 1
            for first, last in zip([0, *edges], [*edges, num_steps], strict=True):
                if first < last and ids_C[first] >= 0:
                    request = int(ids_C[first])
                    columns = tuple(column[slot, first:last].copy() for column in drawn)
                    completion = self._add(request, columns)
                    if completion is not None:
                        yield request, completion
                        if self._holds:
                            self.ended[request] = slot
                        if self._slots[slot] == request or self._holds:
                            self._slots[slot] = -1
                            self._cancelled[slot] = True

    def _add(self, request: int, columns: tuple[np.ndarray, ...]) -> Completion | None:
        asked = self._requests[request]
        begun, sampling = asked.begun, self._sampling_of(asked)
        drawing = self._drawing.setdefault(request, Drawing(begun))
        num_checked, num_before = drawing.num_tokens, len(begun)
        drawing.add(columns)
        tokens = columns[0] if not sampling.stop_strings else drawing.token_ids()
        num_earlier = num_before if self._holds else 0  # a session with turns continues whole ones
        ends = asked.limit - asked.num_given, sampling, self._decode_text, num_before, num_earlier
        end = find_end(tokens, num_checked, drawing.num_tokens, *ends)
        if end is None:
            return None
        length, finish_reason, stop_reason = end
        token_ids, sampler_logprobs, policy_logprobs, *more = (
            column[: length - num_before] for column in drawing.columns()
        )
        del self._drawing[request]
        if not self._holds:
            self.finish(request)
        return Completion(
            asked.prompt_index,
            asked.sample_index,
            token_ids,
            sampler_logprobs,
            policy_logprobs,
            finish_reason,
            stop_reason,
            *more,
        )

    # Turns

    def finish(self, number: int) -> None:
        """Frees what a request takes, whose last turn has ended."""
        assert number not in self._drawing, number
        self.ended.pop(number, None)
        shard, rows = self._rows_of.pop(number)
        self._left[shard, rows] -= 1
        self._forget(number)

    def cancel(self, number: int) -> None:
        """Ends a request wherever it is, and frees what it takes; nothing more of it is drawn."""
        for pending in self._pending:
            for place, piece in enumerate(pending):
                if number in piece:
                    pending[place] = [other for other in piece if other != number]
                    if not pending[place]:
                        del pending[place]
                    self._forget(number)
                    return
        for waiting in self._waiting:
            if number in waiting:
                waiting.remove(number)
        at = self._slots == number
        self._slots[at], self._cancelled[at] = -1, True
        self._drawing.pop(number, None)
        self.finish(number)

    def _forget(self, number: int) -> None:
        prompt = self._requests.pop(number).prompt
        self._uses[prompt] -= 1
        if not self._uses[prompt]:
            del self._uses[prompt], self._prompts[prompt]
        self.num_left -= 1

    def drawn(self, number: int, num_seen: int) -> tuple[np.ndarray, ...] | None:
        """What a request that has not ended has drawn after its first `num_seen` tokens, see `Drawing.since`."""
        drawing = self._drawing.get(number)
        return None if drawing is None else drawing.since(num_seen)

    def go_on(self, numbers: Sequence[Sequence[int]], width: int) -> np.ndarray:
        """Gives requests, by shard, whose turns go on, idle slots; as many of each shard as there are.

        Returns:
          The slots [shards, width], counted in each shard; past the end where there is no request.
        """
        busy = self.busy_slots()
        slots = np.full((len(numbers), width), busy.shape[1], np.int32)
        for shard, own in enumerate(numbers):
            idle = np.flatnonzero(~busy[shard])[: len(own)]
            slots[shard, : len(own)] = idle
            places = shard * busy.shape[1] + idle
            self._slots[places], self._cancelled[places] = own, False
        return slots

    def replace(self, number: int, request: Request) -> None:
        """Another form of a request whose turn has ended, for the next one."""
        self._requests[number] = request
