"""One call of the slot sampler, as it runs: requests go in at any time, a chunk is decoded, ended completions come out.

In: prompts and requests, then what is put behind a turn that has ended. Out: completions, as they end. Not here: the
shape (`rl.sampler.shape_plan`), compiled programs (`rl.sampler.engine`), the book of requests
(`rl.sampler.request_queue`).

A completion of several turns draws a turn, waits outside for an observation, and goes on. While it waits, its slot
draws others: its own cache, the keys and values of its turns, is copied to a kept row. When it goes on, the observation
is read behind them, for many completions at a time, and the row is copied to a slot that is free. So a prompt is
prefilled once for its group, and each token of an observation is read once. If all kept rows are taken, the one that
has waited longest is given away, and its tokens are read again. So are those of a completion that goes on from an
earlier token than its last one, where layers have states, which know no way back.
Legend: B slots, T tokens of a piece.
"""

import collections
import dataclasses
import math
from collections.abc import Callable, Sequence

import jax
import numpy as np

from rl.models.cache import CachePart
from rl.models.policy import Params
from rl.sampler.contract import Completion, Request, check_requests
from rl.sampler.decoding import ChunkReport
from rl.sampler.engine import DecodeState, Engine, Shape
from rl.sampler.request_queue import Schedule
from rl.sampler.shape_plan import READ_SIZES, few_rows, rows_moved, rows_read
from rl.sampler.sizes import CacheSize, next_cache_size, next_session_size
from rl.sampler.token_draw import SamplingParams

PREFILL_TOKENS = 4096  # tokens of one piece of prefill, over all rows
MIN_PREFILL_CHUNK = 128
MAX_PREFILL_CHUNK = 512  # positions; a row for the longest prompt then costs little more than the prompts in it
# A completion of several turns waits for an observation, then to have it read, then for a slot; or it has one.
_OUTSIDE, _UNREAD, _READY, _DRAWING = "outside", "unread", "ready", "drawing"


class SlotSession:
    """Draws requests with one set of weights until it is dropped.

    Args:
      params: the weights, laid out for decoding.
      shape: where decoding starts. With `num_kept` completions can have several turns, see `go_on`.
      sizes: those that the own cache can have, from `rl.sampler.sizes`.
      common: the cache of a prefix of all prompts, or None.
      chunk: tokens decoded in one `poll`.
      total: requests that will come at most, with turns.
    """

    def __init__(
        self,
        engine: Engine,
        params: Params,
        shape: Shape,
        sizes: Sequence[CacheSize],
        sampling: SamplingParams,
        key: jax.Array,
        common: CachePart | None,
        decode_text: Callable[[Sequence[int]], str] | None,
        chunk: int,
        total: int = 0,
    ) -> None:
        num_shards = engine.num_shards
        self._engine, self._params, self._sizes = engine, params, sizes
        self._sampling, self._key, self._chunk = sampling, key, chunk
        self._decode_text, self._total = decode_text, total or None
        self._is_stuck = False  # what is left waits for others to go on or to finish
        self._schedule = Schedule(
            sampling,
            decode_text,
            shape.common_length,
            num_shards,
            shape.table_rows // num_shards,
            shape.table_length,
            shape.rows_per_prompt,
            shape.num_waiting,
            shape.counted_length,
            holds=shape.num_kept > 0,
            logits_dtype=engine.logits_dtype,
        )
        self._state = engine.init_state(shape, sampling, key, common)
        self._schedule.set_slots(shape.num_slots)
        self._prefill_rows = shape.prefill_rows // num_shards
        self._filled = 0  # positions of the own cache that are written in the fullest slot that draws
        self._has_turns = shape.num_kept > 0
        self._has_states = engine.policy.config.is_recurrent
        self._move_rows, self._read_rows = (rows(shape.num_slots // num_shards) for rows in (rows_moved, rows_read))
        self._turns: dict[int, _Turns] = {}  # {unfinished request of which a turn has ended}
        self._unread: list[collections.deque[int]] = [collections.deque() for _ in range(num_shards)]
        self._ready: list[collections.deque[int]] = [collections.deque() for _ in range(num_shards)]
        self._free_rows = [list(range(shape.num_kept // num_shards)) for _ in range(num_shards)]
        self._num_outside = 0  # requests that wait for what follows their turn
        self._next_wait = 0
        self.num_read = self.num_read_again = 0

    def submit(
        self,
        prompts: Sequence[Sequence[int] | np.ndarray],
        requests: Sequence[Request],
        shards: Sequence[Sequence[Sequence[int]]] | None = None,
    ) -> range:
        """Takes in requests for further prompts, see `Schedule.add`; returns their numbers here. With turns, one that
        continues tokens goes on behind them as after `go_on`, and has its limit.

        Raises:
          ValueError: with turns, what no sampler can draw.
        """
        if self._has_turns:
            sampling = self._sampling
            if any(request.continues for request in requests):
                sampling = dataclasses.replace(sampling, max_completion_length=self._most_tokens)
            check_requests(self._engine.policy.config, self._decode_text, prompts, requests, sampling)
        self._is_stuck = False
        return self._schedule.add(prompts, requests, shards, self._total)

    @property
    def num_left(self) -> int:
        """The number of requests that have not ended; with turns, that are not finished."""
        return self._schedule.num_left

    @property
    def has_work(self) -> bool:
        """Whether `poll` would draw: some request is not waiting for what follows its turn."""
        return self.num_left > self._num_outside and not self._is_stuck

    def go_on(self, number: int, token_ids: Sequence[int], limit: int) -> None:
        """Lets a request whose turn has ended draw another turn.

        Args:
          token_ids: what is put behind its turn; may be empty.
          limit: tokens that the whole completion may have then, with all turns and what was between them.
        """
        turns = self._turns[number]
        assert turns.state == _OUTSIDE, number
        turns.tokens.extend(int(token) for token in token_ids)
        assert len(turns.tokens) < limit <= self._most_tokens, (len(turns.tokens), limit)
        request = self._schedule.request(number)
        self._schedule.replace(number, dataclasses.replace(request, continues=tuple(turns.tokens), limit=limit))
        self.num_read += len(token_ids)
        self._queue(number)

    def follow(self, number: int, num_kept: int, token_ids: Sequence[int], request: Request) -> None:
        """Has another request drawn behind a turn that has ended, in its place and under its number: one whose prompt
        begins with what is cached already.

        Args:
          num_kept: the first tokens of the completion, of all turns and what was between them, with which the prompt of
            the request goes on behind the first prompt. token_ids: what follows them in it.
          request: its limit is of its own tokens; its prompt is not read.

        Raises:
          ValueError: what no sampler can draw.
        """
        turns, old = self._turns[number], self._schedule.request(number)
        assert turns.state == _OUTSIDE, number
        assert num_kept <= len(turns.tokens), (num_kept, len(turns.tokens))
        tokens = [*turns.tokens[:num_kept], *(int(token) for token in token_ids)]
        assert self.has_room(len(tokens) + request.limit), (len(tokens), request.limit)
        whole = [*self._schedule.prompt(number), *tokens]
        alone = dataclasses.replace(request, prompt=0)
        check_requests(self._engine.policy.config, self._decode_text, [whole], [alone], self._sampling)
        turns.tokens = tokens
        turns.cut(num_kept, self._has_states)
        limit = len(tokens) + request.limit
        given = {"continues": tuple(tokens), "num_given": len(tokens), "limit": limit}
        self._schedule.replace(number, dataclasses.replace(request, prompt=old.prompt, **given))
        self.num_read += len(token_ids)
        self._queue(number)

    def prompt_length(self, number: int) -> int:
        """The number of tokens of a request's first prompt."""
        return len(self._schedule.prompt(number))

    def has_room(self, num_tokens: int) -> bool:
        """Whether so many tokens fit behind a prompt."""
        return num_tokens <= self._most_tokens

    def drawn(self, number: int, num_seen: int) -> tuple[np.ndarray, ...] | None:
        """What a request that is being drawn has after the first `num_seen` tokens of its turn: token_ids,
        sampler_logprobs, policy_logprobs, top_ids, top_logprobs as in `Completion`; None where there is nothing.
        """
        return self._schedule.drawn(number, num_seen)

    def cancel(self, number: int) -> None:
        """Ends a request, whatever has become of it, and frees what it takes."""
        self._is_stuck = False
        turns = self._turns.pop(number, None)
        if turns is not None:
            if turns.state == _OUTSIDE:
                self._num_outside -= 1
            elif turns.state in (_UNREAD, _READY):
                (self._ready if turns.state == _READY else self._unread)[turns.shard].remove(number)
            if turns.row is not None:
                self._free_rows[turns.shard].append(turns.row)
        self._schedule.cancel(number)

    def finish(self, number: int) -> None:
        """Frees what a request takes, whose last turn has ended."""
        turns = self._turns.pop(number)
        assert turns.state == _OUTSIDE, number
        self._is_stuck = False
        self._num_outside -= 1
        if turns.row is not None:
            self._free_rows[turns.shard].append(turns.row)
        self._schedule.finish(number)

    def poll(self) -> list[tuple[int, Completion]]:
        """Decodes one chunk. Returns (number, completion) of each turn that ended; the completion has its tokens."""
        if not self.has_work:
            return []
        schedule, state = self._schedule, self._state
        if self._has_turns:
            state = self._keep(state)
        while needed := schedule.num_to_prefill(self._prefill_rows):
            state = self._admit(state, needed)
        for number in schedule.begun:
            shard = schedule.shard(number)
            self._turns[number] = _Turns(shard, list(schedule.request(number).continues), state=_UNREAD)
            self._unread[shard].append(number)
        schedule.begun.clear()
        state = self._fit(state, self._filled)
        if self._has_turns:
            state = self._go_on(state)
        waiting, num_waiting = schedule.waiting()
        if self._has_turns and not num_waiting.any() and not schedule.busy_slots().any():
            self._state, self._is_stuck = state, True  # prompts wait for the rows of others in the table
            return []
        few = self._move_rows * self._engine.num_shards if self._has_turns else self._few(state)
        cancelled_B = schedule.cancelled()
        num_active = state.shape.num_active // self._engine.num_shards
        active = schedule.active_rows(num_active) if num_active else None
        self._state, report = self._engine.generate(
            self._params, state, waiting, num_waiting, self._key, cancelled_B, few, self._chunk, active
        )
        assert report.num_steps > 0, "a chunk without a step, though there are requests left"
        self._filled = int(np.max(self._cursors(report), initial=0))
        ended = list(schedule.read(report))
        if self._has_turns:
            for number, completion in ended:
                self._end_turn(number, completion, int(report.num_drawn[schedule.ended[number]]))
        return ended

    # Prompts and sizes

    def _admit(self, state: DecodeState, needed: int) -> DecodeState:
        """Prefills `needed` rows of each shard. Takes the smaller prefill where half the rows would be empty."""
        few = few_rows(self._prefill_rows)
        count = math.ceil(needed / few)
        for num_rows in [few] * count if 2 * count * few <= self._prefill_rows else [self._prefill_rows]:
            inputs, places = self._schedule.admit(num_rows)
            chunk = prefill_chunk(inputs.tokens_BT.shape[0])
            prefix = self._engine.prefill(self._params, inputs, common=state.common, chunk=chunk, state=state)
            state = self._engine.insert(state, prefix, places)
        return state

    def _fit(self, state: DecodeState, filled: int) -> DecodeState:
        """Drops idle slots once half of the slots can go, and grows the own cache where `filled` positions of a slot
        fill it.
        """
        schedule = self._schedule
        busy = schedule.busy_slots()
        now = self._cache_size(state)
        needed = int(busy.sum(axis=1).max()) + schedule.num_waiting
        if schedule.has_pending():
            needed = now.slots
        elif self._has_turns:  # each of them may want a slot again
            needed = max(schedule.loads())
        next_size = next_session_size if self._has_turns else next_cache_size
        size = next_size(self._sizes, now, min(needed, now.slots), filled)
        index = None
        if size.slots < now.slots:
            index = np.argsort(~busy, axis=1, kind="stable")[:, : size.slots].astype(np.int32)
            schedule.keep_slots(index)
        return state if size == now else self._engine.resize(state, index, size.length)

    def _few(self, state: DecodeState) -> int:
        """The number of busy slots at which the chunk ends early, so that the host adds requests or drops idle slots;
        0: never.
        """
        now, schedule = self._cache_size(state), self._schedule
        if schedule.has_more():
            wanted = now.slots - 1
        else:
            sizes = self._sizes
            fewer = [next_cache_size(sizes, now, size.slots, 0).slots for size in sizes if size.slots < now.slots]
            wanted = max((slots for slots in fewer if slots < now.slots), default=0)
        # The host can do nothing about slots that are idle now. It looks again when a completion has ended.
        return min(wanted * self._engine.num_shards, schedule.num_soon_busy() - 1)

    @property
    def _most_tokens(self) -> int:
        """Tokens that a completion of several turns may have."""
        return self._state.shape.kept_length

    def _cursors(self, report: ChunkReport) -> np.ndarray:
        """[B], positions of the own cache that are written in each slot that draws; 0 in others."""
        ids = report.request_ids
        cached = [len(self._schedule.request(number).continues) if number >= 0 else 0 for number in ids.tolist()]
        return np.where(ids >= 0, report.num_drawn + (np.asarray(cached) if self._has_turns else 0), 0)

    def _cache_size(self, state: DecodeState) -> CacheSize:
        return CacheSize(state.own.num_rows // self._engine.num_shards, state.own.length)

    # Turns

    def _end_turn(self, number: int, completion: Completion, num_drawn: int) -> None:
        """num_drawn: the tokens that the slot has drawn, more than the turn has where a stop string ended it."""
        turns = self._turns.get(number)
        if turns is None:
            turns = self._turns[number] = _Turns(self._schedule.shard(number))
        turns.tokens.extend(completion.token_ids.tolist())
        turns.num_cached = len(turns.tokens) - len(completion.token_ids) + num_drawn
        turns.cut(len(turns.tokens), self._has_states)
        turns.state = _OUTSIDE
        turns.num_turns += 1
        self._num_outside += 1
        turns.waits_since, self._next_wait = self._next_wait, self._next_wait + 1

    def _keep(self, state: DecodeState) -> DecodeState:
        """Copies what ended turns have drawn to kept rows, before their slots are drawn in again."""
        num_slots = state.own.num_rows // self._engine.num_shards
        moves: list[list[tuple[int, int]]] = [[] for _ in self._ready]
        for number in self._schedule.ended:
            turns = self._turns[number]
            if turns.num_cached or not self._has_states:
                turns.row = self._take_row(turns.shard)
        for number, slot in self._schedule.ended.items():
            turns = self._turns[number]
            if turns.row is not None:  # else one that ended later has it: no row is written twice at a time
                moves[turns.shard].append((slot % num_slots, turns.row))
        self._schedule.ended.clear()
        past = state.shape.num_kept // self._engine.num_shards
        for first in range(0, max(map(len, moves)), self._move_rows):
            slots = np.zeros((len(moves), self._move_rows), np.int32)
            rows = np.full_like(slots, past)
            for shard, own in enumerate(moves):
                for i, (slot, row) in enumerate(own[first : first + self._move_rows]):
                    slots[shard, i], rows[shard, i] = slot, row
            state = self._engine.keep(state, slots, rows)
        return state

    def _take_row(self, shard: int) -> int:
        """A kept row; where all are taken, that of the request that has waited longest, rather of one whose
        observation is not read yet.
        """
        if not self._free_rows[shard]:
            holders = [(number, turns) for number, turns in self._turns.items() if turns.shard == shard]
            holders = [(number, turns) for number, turns in holders if turns.row is not None]
            number, longest = min(holders, key=lambda of: (of[1].state == _READY, of[1].waits_since))
            self.num_read_again += longest.num_cached
            row, longest.row, longest.num_cached = longest.row, None, 0
            if longest.state == _READY:
                self._ready[shard].remove(number)
                self._unread[shard].appendleft(number)
                longest.state = _UNREAD
            assert row is not None
            return row
        return self._free_rows[shard].pop()

    def _queue(self, number: int) -> None:
        """Has a request wait for what it goes on with to be read, or for a slot where there is nothing to read."""
        turns = self._turns[number]
        self.num_read_again, turns.num_lost = self.num_read_again + turns.num_lost, 0
        has_row = turns.num_cached > 0 or not self._has_states
        turns.state = _READY if turns.num_unread == 0 and has_row else _UNREAD
        (self._ready if turns.state == _READY else self._unread)[turns.shard].append(number)
        self._is_stuck = False
        self._num_outside -= 1

    def _go_on(self, state: DecodeState) -> DecodeState:
        """Gives requests that go on the slots that are idle.

        In a call that ends, requests that begin come first, as long as there are kept rows for them: the own caches of
        those that draw are then about equally long, and few prompts are read at a time.
        """
        while True:
            idle = self._num_idle()
            taken = [
                self._in_order(ready)[: min(free, self._move_rows)]
                for ready, free in zip(self._ready, idle, strict=True)
            ]
            if any(taken):
                state = self._resume(state, taken)
            elif any(free and unread for free, unread in zip(idle, self._unread, strict=True)):
                state = self._read(state, idle)
            else:
                return state

    def _in_order(self, queue: collections.deque[int]) -> list[int]:
        """The requests of a queue in the order in which they go on: as they came; in a call that ends those with fewer
        turns first, and those of one prompt together.
        """
        if self._total is None:
            return list(queue)
        return sorted(queue, key=lambda number: (self._turns[number].num_turns, self._schedule.request(number).prompt))

    def _num_idle(self) -> list[int]:
        """By shard, the idle slots that requests may have that go on."""
        idle = (~self._schedule.busy_slots()).sum(axis=1)
        if self._total is not None:
            idle = np.maximum(idle - self._schedule.num_beginning(self._state.shape.num_kept // idle.size), 0)
        return idle.tolist()

    def _read(self, state: DecodeState, idle: Sequence[int]) -> DecodeState:
        """Reads what requests go on with. Those that have a kept row, or get one, wait there for a slot."""
        num_shards, width = len(idle), self._read_rows
        at_once, group = zip(*(self._read_together(shard, free) for shard, free in enumerate(idle)), strict=True)
        longest = max(self._turns[number].num_unread for own in group for number in own)
        size = next((size for size in READ_SIZES if longest > size * 3 // 4), READ_SIZES[-1])
        state = self._fit(state, max(len(self._turns[number].tokens) for own in group for number in own))
        rows, nums_cached, nums_read = np.zeros((3, num_shards, width), np.int32)
        kept = np.full((num_shards, width), state.shape.num_kept // num_shards, np.int32)
        tokens = np.zeros((num_shards, width, state.shape.kept_length), np.int32)
        for shard, own in enumerate(group):
            for i, number in enumerate(own):
                self._unread[shard].remove(number)
                turns, place = self._turns[number], (shard, i)
                fed = [self._schedule.prompt(number)[-1], *turns.tokens]
                tokens[place][: len(fed)] = fed
                nums_cached[place], nums_read[place] = turns.num_cached, len(fed) - 1  # decoding feeds the last one
                if i < len(at_once[shard]):
                    turns.state = _DRAWING
                    continue
                if turns.row is None:
                    turns.row = self._free_rows[shard].pop()
                rows[place] = kept[place] = turns.row
                turns.state, turns.num_cached = _READY, len(turns.tokens)
                self._ready[shard].append(number)
        requests = self._schedule.arrays(group, width, are_own=True)
        part = self._engine.read(self._params, state, rows, requests, tokens, nums_cached, nums_read, size)
        if any(at_once):
            slots = self._schedule.go_on(at_once, width)
            in_order = np.broadcast_to(np.arange(width, dtype=np.int32), slots.shape)
            state = self._engine.go_on(state, requests, nums_read, slots, self._key, in_order, part)
        is_kept = any(len(own) > len(direct) for own, direct in zip(group, at_once, strict=True))
        return self._engine.keep_read(state, part, kept) if is_kept else state

    def _read_together(self, shard: int, num_idle: int) -> tuple[list[int], list[int]]:
        """Requests of a shard that are read at a time: the one that has waited longest, and those that take as long or
        little less. Returns those among them which have no kept row and go to one of `num_idle` idle slots at once;
        and all of them, these first.
        """

        def num_pieces(number: int) -> int:
            return math.ceil(self._turns[number].num_unread / READ_SIZES[-1])

        at_once, kept, num_free = [], [], len(self._free_rows[shard])
        order = self._in_order(self._unread[shard])[: 2 * self._read_rows]  # of few prompts
        first = num_pieces(order[0]) if order else 0
        order.sort(key=lambda number: ((n := num_pieces(number)) > first, abs(n - first)))
        for number in order:
            if len(at_once) + len(kept) == self._read_rows:
                break
            if self._turns[number].row is not None or num_free:
                num_free -= self._turns[number].row is None
                kept.append(number)
            elif len(at_once) < num_idle:
                at_once.append(number)
        return at_once, [*at_once, *kept]

    def _resume(self, state: DecodeState, taken: Sequence[Sequence[int]]) -> DecodeState:
        """Gives the requests `taken`, by shard, idle slots."""
        width = self._move_rows
        filled = max(self._turns[number].num_cached for own in taken for number in own)
        if filled >= state.own.length:  # the turn before ended at the last position
            state = self._fit(state, filled)
        rows, nums_cached = np.zeros((2, len(taken), width), np.int32)
        requests = self._schedule.arrays(taken, width, are_own=True)
        for shard, own in enumerate(taken):
            for i, number in enumerate(own):
                self._ready[shard].remove(number)
                turns = self._turns[number]
                assert turns.row is not None
                rows[shard, i], nums_cached[shard, i] = turns.row, turns.num_cached
                self._free_rows[shard].append(turns.row)
                turns.row, turns.state = None, _DRAWING
        slots = self._schedule.go_on(taken, width)
        return self._engine.go_on(state, requests, nums_cached, slots, self._key, rows)


@dataclasses.dataclass
class _Turns:
    """A request that has several turns.

    tokens: of its completion, with what was put between turns. num_cached: positions of its own cache that are there,
      as its last turn ended or what follows it was read. row: the kept row that holds them. waits_since: counts the
      turns that ended. num_turns: its own. num_lost: tokens that must be read again if it goes on.
    """

    shard: int
    tokens: list[int] = dataclasses.field(default_factory=list)
    num_cached: int = 0
    row: int | None = None
    state: str = ""
    waits_since: int = 0
    num_turns: int = 0
    num_lost: int = 0

    def cut(self, num_kept: int, has_states: bool) -> None:
        """Has the own cache hold the first `num_kept` positions at most. A state cannot forget a token, so a model with
        states reads these tokens again from the end of the prompt.
        """
        self.num_lost = min(self.num_lost, num_kept)
        if num_kept >= self.num_cached:
            return
        if has_states:
            self.num_lost, num_kept = num_kept, 0
        self.num_cached = num_kept

    @property
    def num_unread(self) -> int:
        """Tokens to read before another turn."""
        return len(self.tokens) - self.num_cached


def prefill_chunk(num_rows: int) -> int:
    """Positions of one piece of a prefill with so many rows."""
    return min(max(PREFILL_TOKENS // num_rows, MIN_PREFILL_CHUNK), MAX_PREFILL_CHUNK)
