"""The decode engine: `prefill`, `insert`, `generate` on one mesh, in the terms of JetStream and MaxEngine.

In: parameters, packed prompts, requests. Out: the decode state and the drawn tokens. The engine holds compiled programs
and no parameters. Not here: which requests run when (`rl.sampler.request_queue`), whole calls
(`rl.sampler.slot_sampler`).

A decode state has slots, each of which draws one completion into its row of the own cache, and a table of prompts that
slots read in place. Inside the compiled loop, `rl.sampler.decoding.generate` hands a slot whose completion ended to the
next waiting request. Between calls the own cache grows and idle slots are dropped. Shapes come from a short list, and
every shape is one compiled program.
Legend: B slots, P rows of prompts, M table rows of the longest prompt, T prompt positions, S cache positions.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from rl.devices import hosts
from rl.devices.mesh import num_row_shards, partition_spec, replicated, row_sharding
from rl.devices.programs import Build, Program, Programs, stored_program
from rl.models.cache import (
    LABELS,
    CachePart,
    LayerKV,
    empty_part,
    map_arrays,
    named_arrays,
    pad_positions,
    position_axis,
)
from rl.models.inputs import Inputs, check_segments
from rl.models.ops import take_in_shards
from rl.models.policy import Params, Policy
from rl.sampler import decoding
from rl.sampler.decoding import ChunkReport, Requests, Slots
from rl.sampler.slot_rules import rule_arrays
from rl.sampler.token_draw import SamplingParams


@dataclasses.dataclass(frozen=True)
class Shape:
    """The sizes on which the programs of a decode state depend. Counts are over all shards, unless said otherwise.

    num_slots, length: slots, and positions of the own cache for each.
    table_rows, table_length: rows of the prompt table, and their positions.
    rows_per_prompt: table rows of the longest prompt.
    num_readers: slots that may read one table row at a time.
    prefill_rows: rows that one prefill fills, each as long as the longest prompt.
    common_length: positions of the common prefix; 0: none.
    num_waiting: waiting requests of a shard.
    num_kept, kept_length: rows of own caches that are kept between turns, and their positions; 0: completions have one
      turn.
    num_active: rows of the prompt table that a chunk reads; 0: all.
    """

    num_slots: int
    length: int
    table_rows: int
    table_length: int
    rows_per_prompt: int
    num_readers: int
    prefill_rows: int
    common_length: int
    num_waiting: int
    num_kept: int = 0
    kept_length: int = 0
    num_active: int = 0

    @property
    def prefill_length(self) -> int:
        """Positions of a row of prefill: a whole number of table rows."""
        return self.rows_per_prompt * self.table_length

    @property
    def counted_length(self) -> int:
        """The most tokens before the first one that a request draws, for penalties."""
        return self.common_length + self.prefill_length + 1 + self.kept_length

    def resized(self, num_slots: int, length: int, num_shards: int) -> "Shape":
        """The shape with fewer slots, or a longer own cache. A table row has no more readers than a shard has slots."""
        num_readers = min(self.num_readers, num_slots // num_shards)
        return dataclasses.replace(self, num_slots=num_slots, length=length, num_readers=num_readers)


# XLA for TPU turns a product over shards into a loop that passes pieces on, to overlap computing with transport. One
# token of each slot is too little work for that: each piece waits for the one before, and each loop must be compiled.
WHOLE_PRODUCTS = {"xla_jf_spmd_threshold_for_windowed_einsum_mib": 2**40}


@dataclasses.dataclass
class DecodeState:
    """The arrays that decoding changes, and the prompts that it reads (no table before the first `insert`).

    It is passed on and never copied. After a call the old state must not be used. `kept` has rows like those that the
    own cache has in the end, for requests between two turns.
    """

    shape: Shape
    sampling: SamplingParams
    own: CachePart
    slots: Slots
    table: CachePart | None
    common: CachePart | None
    kept: CachePart | None = None


class Engine:
    """Compiled decoding for one policy on one mesh.

    Args:
      policy: the policy to sample from.
      mesh: the mesh of the parameters. `rules["batch"]` names the axes that cut slots, `rules["kv_heads"]` those that
        cut the heads of the cache.
      param_shardings: a `NamedSharding` for each parameter.
      rules: logical axis -> mesh axes, the `mesh.rules` of the config.
      kv_dtype: None: keys and values in the compute dtype; "int8".
    """

    def __init__(
        self,
        policy: Policy,
        mesh: Mesh,
        param_shardings: Any,
        *,
        rules: Mapping[str, Sequence[str]],
        kv_dtype: str | None = None,
    ) -> None:
        self.policy = policy
        self.num_shards = num_row_shards(mesh, rules)
        self.programs = Programs()
        self.peak_kv_bytes = 0
        self._param_shardings = param_shardings
        self._kv_dtype = kv_dtype
        self._everywhere = replicated(mesh)
        self._rows = row_sharding(mesh, rules)
        self._array_shardings = self._part_shardings(mesh, rules)
        self._decode_options = WHOLE_PRODUCTS if mesh.devices.flat[0].platform == "tpu" else None

    @property
    def logits_dtype(self) -> np.dtype:
        """Of logits and log-probs."""
        return jnp.promote_types(self.policy.config.dtype, jnp.float32)

    # Prefill: prompts into rows of a cache

    def prefill(
        self,
        params: Params,
        inputs: Inputs,
        common: CachePart | None = None,
        chunk: int | None = None,
        state: DecodeState | None = None,
    ) -> CachePart:
        """Runs packed prompts, `chunk` positions at a time (all at once by default), over a cache that grows with them.
        Pieces after the last token of all rows are not run. Of a recurrent model a piece may be shorter, see
        `piece_size`, and a row holds one prompt, padded on the right.

        Args:
          inputs: numpy arrays; a row holds one or more prompts, see `decoding.prefill_chunk`. Their number is a
            multiple of the shards.
          common: the common prefix of all prompts, in a cache of one row for each shard.
          state: the decode state that is in memory meanwhile, for `peak_kv_bytes`.

        Returns:
          The keys and values, one row for each row of the input, and the states after the last token of each.
        """
        check_segments(inputs)
        num_rows, num_positions = inputs.tokens_BT.shape
        size = self.piece_size(num_positions, num_positions if chunk is None else chunk)
        held = (common,) if state is None else (common, state.own, state.table)
        part = self._empty(num_rows, size)
        common_length = 0 if common is None else common.length
        num_filled = int(np.max(np.flatnonzero(np.any(inputs.group_ids_BT >= 0, axis=0)), initial=-1)) + 1
        if self.policy.config.is_recurrent:
            num_filled = max(num_filled, 1)  # the first piece takes over the state of the common prefix
        num_done = 0
        for start, length in prefill_pieces(num_positions, size):
            if length > part.length:
                self._note_growth(part, length, *held)
                part = self._grow(part, length)
            self._count_bytes(part, *held)
            if num_done >= num_filled:
                continue
            num_done = start + size
            piece = Inputs(*(x[:, start:num_done] for x in inputs))
            piece, first = hosts.put((piece, np.int32(start)), (self._rows, self._everywhere))
            program = self.programs.get(*self._prefill_build(params, num_rows, size, length, common_length))
            part = program(params, part, common, piece, first)
        return part

    # The decode state

    def init_state(
        self, shape: Shape, sampling: SamplingParams, key: jax.Array, common: CachePart | None = None
    ) -> DecodeState:
        """A state with idle slots and no prompts."""
        slots = self.programs.get(*self._slots_build(shape, sampling))(hosts.put_key(key, self._everywhere))
        own = self._empty(shape.num_slots, shape.length)
        kept = self._empty(shape.num_kept, shape.kept_length) if shape.num_kept else None
        self._count_bytes(own, common, kept)
        return DecodeState(shape, sampling.compiled, own, slots, None, common, kept)

    def insert(self, state: DecodeState, prefix: CachePart, rows: np.ndarray) -> DecodeState:
        """Puts prefilled rows, each cut into M, into the rows [shards, R, M] of the prompt table, counted inside each
        shard. Rows past the end are dropped. If the first prefilled rows are the whole table, in order, they become the
        table.
        """
        shape = state.shape
        assert prefix.length == shape.prefill_length, (prefix.length, shape.prefill_length)
        in_order = np.arange(rows[0].size).reshape(rows.shape[1:])
        if state.table is None:
            rows_per_shard = shape.table_rows // self.num_shards
            is_all = prefix.num_rows == shape.table_rows and prefix.length == shape.table_length
            if is_all and np.all((rows == in_order) | (rows >= rows_per_shard)):
                state.table = prefix
                return state
            state.table = self._empty(shape.table_rows, shape.table_length)
        self._count_bytes(state.own, state.table, state.common, state.kept, prefix)
        state.table = self._put_rows(state.table, prefix, rows)
        return state

    # Turns: between two of them a request has its own cache among the kept rows. Indices [shards, R] count rows of a
    # shard; one past the end puts nothing.

    def keep(self, state: DecodeState, slots: np.ndarray, rows: np.ndarray) -> DecodeState:
        """Copies the own caches of the slots `slots` to the kept rows `rows`."""
        assert state.kept is not None
        self._count_bytes(state.own, state.table, state.kept)
        state.kept = self._move(state.kept, state.own, slots, rows)
        return state

    def read(
        self,
        params: Params,
        state: DecodeState,
        rows: np.ndarray,
        requests: Requests,
        tokens: np.ndarray,
        nums_cached: np.ndarray,
        nums_read: np.ndarray,
        num_tokens: int,
    ) -> CachePart:
        """The own caches of requests, behind what they have in the kept rows `rows` and what is read here.

        Args:
          requests: [shards, R]. tokens: [shards, R, S], of each by the position of the own cache.
          nums_cached, nums_read: [shards, R], positions of the own cache before and after reading.
          num_tokens: read at a time.
        """
        assert state.kept is not None
        assert state.table is not None
        program = self.programs.get(*self._read_build(params, state.shape, state.sampling, rows.shape[1], num_tokens))
        flat = [x.reshape(-1, *x.shape[2:]) for x in (tokens, nums_cached, nums_read)]
        part = program(params, state.kept, state.table, *hosts.put((rows, requests, *flat), self._rows))
        self._count_bytes(state.own, state.table, state.kept, part)
        return part

    def keep_read(self, state: DecodeState, part: CachePart, rows: np.ndarray) -> DecodeState:
        """Puts the rows of `part`, which `read` has made, in their order to the kept rows `rows`."""
        assert state.kept is not None
        state.kept = self._move(state.kept, part, _in_order(rows), rows)
        return state

    def go_on(
        self,
        state: DecodeState,
        requests: Requests,
        nums_cached: np.ndarray,
        slots: np.ndarray,
        key: jax.Array,
        rows: np.ndarray,
        part: CachePart | None = None,
    ) -> DecodeState:
        """Gives requests slots again.

        Args:
          requests: [shards, R]. nums_cached: [shards, R], positions of their own caches.
          slots: where they go; a place past the end: no request.
          rows: of `part`, where their own caches are. part: None: the kept rows.
        """
        shape = state.shape
        part = state.kept if part is None else part
        assert part is not None
        state.own = self._move(state.own, part, rows, slots)
        by_slot = np.full((self.num_shards, shape.num_slots // self.num_shards + 1), -1, np.int32)
        np.put_along_axis(by_slot, slots, _in_order(slots), axis=1)
        by_slot = by_slot[:, :-1]
        give = self.programs.get(*self._give_build(shape, state.sampling, slots.shape[1]))
        arrays = hosts.put((requests, by_slot, nums_cached), self._rows)
        state.slots = give(state.slots, *arrays, hosts.put_key(key, self._everywhere))
        return state

    def prepare_turns(
        self,
        params: Params,
        shape: Shape,
        sampling: SamplingParams,
        num_moved: int,
        num_read: int,
        sizes: Sequence[int],
    ) -> None:
        """Compiles, in the background, the programs that keep `num_moved` rows of own caches, let as many go on, and
        read `num_read` ones, as many tokens at a time as one of `sizes`.
        """
        moved, read = num_moved // self.num_shards, num_read // self.num_shards
        own, kept = (
            self._abstract_part(shape.num_slots, shape.length),
            self._abstract_part(shape.num_kept, shape.kept_length),
        )
        part = self._abstract_part(num_read, shape.length)
        for to, source, width in ((kept, own, moved), (own, kept, moved), (kept, part, read), (own, part, read)):
            self.programs.prepare(*self._move_build(to, source, width))
        self.programs.prepare(*self._empty_build(shape.num_kept, shape.kept_length))
        for size in sizes:
            self.programs.prepare(*self._read_build(_abstract(params), shape, sampling, read, size))
        for width in {moved, read}:
            self.programs.prepare(*self._give_build(shape, sampling, width))

    def _move(self, part: CachePart, source: CachePart, taken: np.ndarray, index: np.ndarray) -> CachePart:
        program = self.programs.get(*self._move_build(part, source, index.shape[1]))
        return program(part, source, *hosts.put((taken, index), self._rows))

    def generate(
        self,
        params: Params,
        state: DecodeState,
        requests: Requests,
        num_requests: np.ndarray,
        key: jax.Array,
        cancelled_B: np.ndarray,
        few: int,
        chunk: int,
        active: np.ndarray | None = None,
    ) -> tuple[DecodeState, ChunkReport]:
        """Draws up to `chunk` tokens for each slot, see `decoding.generate`. The report is on the host. active: of
        `num_active` rows; None: slots and requests read any rows.
        """
        shape = state.shape if active is not None else dataclasses.replace(state.shape, num_active=0)
        program = self.programs.get(*self._generate_build(params, shape, state.sampling, chunk))
        key = hosts.put_key(key, self._everywhere)
        waiting = hosts.put((requests, num_requests), self._rows)
        cancelled, minimum = hosts.put((cancelled_B, np.int32(few)), (self._rows, self._everywhere))
        state.own, state.slots, report = program(
            params,
            state.own,
            state.slots,
            state.table,
            state.common,
            None if active is None else hosts.put(active, self._rows),
            *waiting,
            key,
            cancelled,
            minimum,
        )
        return state, jax.device_get(report)

    def resize(self, state: DecodeState, index: np.ndarray | None, length: int) -> DecodeState:
        """Keeps the slots `index` [shards, R] (None: all), counted in each shard, and grows the own cache to
        `length`.
        """
        if index is not None:
            kept = hosts.put(index, self._rows)
            state.own = map_arrays(state.own, partial(self._take_rows, kept))
            state.slots = jax.tree.map(partial(self._take_rows, kept, "slots"), state.slots)
        assert length >= state.own.length, (length, state.own.length)
        if length > state.own.length:
            self._note_growth(state.own, length, state.table, state.common)
            state.own = self._grow(state.own, length)
        state.shape = state.shape.resized(state.own.num_rows, length, self.num_shards)
        return state

    # Programs that will be needed, compiled ahead of time

    def prepare(self, params: Params, shape: Shape, sampling: SamplingParams, chunk: int) -> None:
        """Compiles the decode program of a shape in the background."""
        self.programs.prepare(*self._generate_build(_abstract(params), shape, sampling, chunk))

    def prepare_state(self, shape: Shape, sampling: SamplingParams) -> None:
        """Compiles, in the background, the programs that make a state of this shape."""
        self.programs.prepare(*self._slots_build(shape, sampling))
        self.programs.prepare(*self._empty_build(shape.num_slots, shape.length))

    def prepare_prefill(
        self, params: Params, num_rows: int, num_positions: int, chunk: int, common_length: int
    ) -> None:
        """Compiles the programs of a prefill of this size in the background."""
        part_length = size = self.piece_size(num_positions, chunk)
        self.programs.prepare(*self._empty_build(num_rows, size))
        for _, length in prefill_pieces(num_positions, size):
            if length > part_length:
                self._prepare_grow(num_rows, part_length, length)
                part_length = length
            self.programs.prepare(*self._prefill_build(_abstract(params), num_rows, size, length, common_length))

    def prepare_insert(self, shape: Shape, num_rows: int) -> None:
        """Compiles, in the background, the programs that put `num_rows` prefilled rows into a prompt table."""
        self.programs.prepare(*self._empty_build(shape.table_rows, shape.table_length))
        index_shape = (self.num_shards, num_rows // self.num_shards, shape.rows_per_prompt)
        for name, array in named_arrays(self._abstract_part(shape.table_rows, shape.table_length)):
            self.programs.prepare(*self._put_build(name, array, index_shape))

    def prepare_resize(self, shape: Shape, sampling: SamplingParams, num_slots: int, length: int) -> None:
        """Compiles, in the background, the programs that give a state of `shape` fewer slots or a longer own cache."""
        arrays = named_arrays(self._abstract_part(shape.num_slots, shape.length))
        if num_slots != shape.num_slots:
            index_shape = (self.num_shards, num_slots // self.num_shards)
            slots = jax.tree.leaves(self._abstract_slots(shape.num_slots, sampling, shape.rows_per_prompt))
            for name, array in [*arrays, *(("slots", leaf) for leaf in slots)]:
                self.programs.prepare(*self._take_build(name, array, index_shape))
        if length != shape.length:
            self._prepare_grow(num_slots, shape.length, length)

    def _prepare_grow(self, num_rows: int, old_length: int, length: int) -> None:
        for name, array in named_arrays(self._abstract_part(num_rows, old_length)):
            if position_axis(name) is not None:
                self.programs.prepare(*self._grow_build(name, array, length))

    def piece_size(self, num_positions: int, chunk: int) -> int:
        """Positions of one piece of a prefill of `num_positions`, at most `chunk`. Pieces of a recurrent model do not
        overlap, because a state that has read a token cannot forget it: theirs is a divisor of `num_positions`.
        """
        size = min(chunk, num_positions)
        if self.policy.config.is_recurrent:
            size = next(divisor for divisor in range(size, 0, -1) if num_positions % divisor == 0)
        return size

    def bytes_per_position(self) -> int:
        """Bytes of one cache position of one row in all layers, on the device with the largest part of it."""
        return sum(self.array_bytes_per_position())

    def bytes_per_row(self) -> int:
        """Bytes of the states of one row, whatever its length, on the device with the largest part of them."""
        return sum(self.array_bytes_per_row())

    def array_bytes_per_position(self) -> list[int]:
        """`bytes_per_position` of each array of keys, values or labels."""
        return self._array_bytes(have_positions=True)

    def array_bytes_per_row(self) -> list[int]:
        """`bytes_per_row` of each array of states."""
        return self._array_bytes(have_positions=False)

    def _array_bytes(self, have_positions: bool) -> list[int]:
        return [
            int(np.prod(self._array_shardings[name].shard_shape(array.shape))) * array.dtype.itemsize
            for name, array in named_arrays(self._abstract_part(self.num_shards, 1))
            if (position_axis(name) is not None) == have_positions
        ]

    def _put_rows(self, part: CachePart, new: CachePart, rows: np.ndarray) -> CachePart:
        """The part with the rows of `new`, each cut into M, at `rows` [shards, R, M]."""
        arrays, rows_on_device = iter(named_arrays(new)), hosts.put(rows, self._rows)

        def put(name: str, array: jax.Array) -> jax.Array:
            _, rows_of_array = next(arrays)
            program = self.programs.get(*self._put_build(name, array, rows.shape))
            return program(array, rows_of_array, rows_on_device)

        return map_arrays(part, put)

    # Programs, by everything on which their shapes depend

    def prefill_program(
        self, params: Any, num_rows: int, chunk: int, length: int, common_length: int
    ) -> tuple[Program, tuple[Any, ...]]:
        """The program of one piece of a prefill (`chunk` positions into a cache of `length`), and its abstract
        arguments.
        """

        def function(params, part, common, inputs, start):
            return decoding.prefill_chunk(self.policy, params, part, common, self.num_shards, inputs, start)

        small = jax.ShapeDtypeStruct((num_rows, chunk), jnp.int32)
        parts = self._shard_part()
        arguments = (
            _abstract(params),
            self._abstract_part(num_rows, length),
            self._abstract_part(self.num_shards, common_length) if common_length else None,
            Inputs(*(small,) * 4),
            jax.ShapeDtypeStruct((), jnp.int32),
        )
        shardings = (
            self._param_shardings,
            parts,
            parts if common_length else None,
            Inputs(*(self._rows,) * 4),
            self._everywhere,
        )
        return Program(function, shardings, parts, donate=(1,)), arguments

    def generate_program(
        self, params: Any, shape: Shape, sampling: SamplingParams, chunk: int
    ) -> tuple[Program, tuple[Any, ...]]:
        """The program that draws a chunk of tokens, and its abstract arguments."""
        sampling = sampling.compiled

        def integers(*dims: int, dtype: Any = jnp.int32) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct(dims, dtype)

        requests = self._abstract_requests(shape, sampling, shape.num_waiting)
        arguments = (
            _abstract(params),
            self._abstract_part(shape.num_slots, shape.length),
            self._abstract_slots(shape.num_slots, sampling, shape.rows_per_prompt),
            self._abstract_part(shape.table_rows, shape.table_length),
            self._abstract_part(self.num_shards, shape.common_length) if shape.common_length else None,
            integers(self.num_shards, shape.num_active // self.num_shards) if shape.num_active else None,
            requests,
            integers(self.num_shards),
            jax.eval_shape(lambda: jax.random.key(0)),
            integers(shape.num_slots, dtype=bool),
            integers(),
        )
        parts, slots = self._shard_part(), self._slots_shardings(sampling)
        shardings = (
            self._param_shardings,
            parts,
            slots,
            parts,
            parts if shape.common_length else None,
            self._rows if shape.num_active else None,
            jax.tree.map(lambda _: self._rows, requests),
            self._rows,
            self._everywhere,
            self._rows,
            self._everywhere,
        )
        holds = shape.num_kept > 0
        function = partial(decoding.generate, self.policy, sampling, chunk, shape.num_readers, holds, self._rows)
        results = (parts, slots, self._everywhere)
        return Program(function, shardings, results, donate=(1, 2), compiler_options=self._decode_options), arguments

    def _read_build(
        self, params: Any, shape: Shape, sampling: SamplingParams, width: int, num_tokens: int
    ) -> tuple[tuple, Build]:
        sizes = (
            shape.length,
            shape.num_kept,
            shape.kept_length,
            shape.table_rows,
            shape.table_length,
            shape.rows_per_prompt,
        )
        counts = shape.counted_length if sampling.needs_counts else 0
        key = "read", width, num_tokens, *sizes, counts, sampling.is_by_slot

        def build() -> Callable:
            num_rows = self.num_shards * width
            integers = jax.ShapeDtypeStruct((num_rows,), jnp.int32)
            requests = self._abstract_requests(shape, sampling, width)
            arguments = (
                _abstract(params),
                self._abstract_part(shape.num_kept, shape.kept_length),
                self._abstract_part(shape.table_rows, shape.table_length),
                requests.request_ids,
                requests,
                jax.ShapeDtypeStruct((num_rows, shape.kept_length), jnp.int32),
                integers,
                integers,
            )
            parts, rows = self._shard_part(), self._rows
            of_requests = jax.tree.map(lambda _: rows, requests)
            shardings = (self._param_shardings, parts, parts, rows, of_requests, rows, rows, rows)
            function = partial(decoding.read_on, self.policy, num_tokens, shape.length)
            return self._build(key, Program(function, shardings, parts), arguments)

        return key, build

    def _move_build(self, part: Any, source: Any, width: int) -> tuple[tuple, Build]:
        def build() -> Callable:
            index = jax.ShapeDtypeStruct((self.num_shards, width), jnp.int32)
            parts = self._shard_part()
            program = Program(decoding.move_rows, (parts, parts, self._rows, self._rows), parts, donate=(0,))
            return program.compile((_abstract(part), _abstract(source), index, index))

        return ("move", part.num_rows, source.num_rows, part.length, source.length, width), build

    def _give_build(self, shape: Shape, sampling: SamplingParams, width: int) -> tuple[tuple, Build]:
        def build() -> Callable:
            key = jax.eval_shape(lambda: jax.random.key(0))
            requests = self._abstract_requests(shape, sampling, width)
            slots = self._abstract_slots(shape.num_slots, sampling, shape.rows_per_prompt)
            index = jax.ShapeDtypeStruct((self.num_shards, shape.num_slots // self.num_shards), jnp.int32)
            arguments = (slots, requests, index, requests.request_ids, key)
            shardings = self._slots_shardings(sampling)
            of_requests = jax.tree.map(lambda _: self._rows, requests)
            program = Program(
                decoding.give,
                (shardings, of_requests, self._rows, self._rows, self._everywhere),
                shardings,
                donate=(0,),
            )
            return program.compile(arguments)

        return ("give", shape, width, sampling.needs_counts, sampling.is_by_slot), build

    def _prefill_build(
        self, params: Any, num_rows: int, chunk: int, length: int, common_length: int
    ) -> tuple[tuple, Build]:
        key = prefill_key(num_rows, chunk, length, common_length)
        return key, lambda: self._build(key, *self.prefill_program(params, num_rows, chunk, length, common_length))

    def _generate_build(self, params: Any, shape: Shape, sampling: SamplingParams, chunk: int) -> tuple[tuple, Build]:
        """The key of a decode program, and the function that compiles it. Only the key is cheap enough to make for each
        chunk.
        """
        key = generate_key(shape, sampling, chunk)
        return key, lambda: self._build(key, *self.generate_program(params, shape, sampling, chunk))

    def _build(self, key: tuple, program: Program, arguments: tuple) -> Callable:
        return stored_program(repr(key), program) or program.prepare(arguments)

    def _put_build(self, name: str, array: Any, index_shape: tuple[int, ...]) -> tuple[tuple, Build]:
        sharding, axis = self._array_shardings[name], position_axis(name)
        new_shape = list(array.shape)
        new_shape[0] = math.prod(index_shape[:2])
        if axis is not None:
            new_shape[axis] = index_shape[2] * array.shape[axis]
        new = jax.ShapeDtypeStruct(tuple(new_shape), array.dtype)
        arguments = (_abstract(array), new, jax.ShapeDtypeStruct(index_shape, jnp.int32))
        program = Program(
            partial(decoding.put_rows, axis=axis), (sharding, sharding, self._rows), sharding, donate=(0,)
        )
        return ("put", axis, array.shape, array.dtype, index_shape), partial(program.compile, arguments)

    def _take_rows(self, index: jax.Array, name: str, array: jax.Array) -> jax.Array:
        return _consume(self.programs.get(*self._take_build(name, array, index.shape)), array, index)

    def _take_build(self, name: str, array: Any, index_shape: tuple[int, ...]) -> tuple[tuple, Build]:
        sharding = self._array_shardings.get(name, self._rows)
        arguments = (_abstract(array), jax.ShapeDtypeStruct(index_shape, jnp.int32))
        key = ("take", sharding.spec, array.shape, array.dtype, index_shape)
        return key, partial(Program(take_in_shards, (sharding, self._rows), sharding).compile, arguments)

    def _grow(self, part: CachePart, length: int) -> CachePart:
        """The part with `length` positions."""

        def pad(name: str, array: jax.Array) -> jax.Array:
            if position_axis(name) is None:
                return array
            return _consume(self.programs.get(*self._grow_build(name, array, length)), array)

        return map_arrays(part, pad)

    def _grow_build(self, name: str, array: Any, length: int) -> tuple[tuple, Build]:
        sharding, axis = self._array_shardings[name], position_axis(name)
        assert axis is not None, name
        function = partial(pad_positions, name, added=length - array.shape[axis])
        key = ("grow", name, array.shape, array.dtype, length)
        return key, partial(Program(function, (sharding,), sharding).compile, (_abstract(array),))

    def _empty(self, num_rows: int, length: int) -> CachePart:
        return self.programs.get(*self._empty_build(num_rows, length))()

    def _empty_build(self, num_rows: int, length: int) -> tuple[tuple, Build]:
        function = partial(empty_part, self.policy.config, num_rows, length, self._kv_dtype)
        return ("empty", num_rows, length), lambda: Program(function, (), self._shard_part()).compile(())

    def _slots_build(self, shape: Shape, sampling: SamplingParams) -> tuple[tuple, Build]:
        def build() -> Callable:
            key = jax.eval_shape(lambda: jax.random.key(0))
            function = self._empty_slots(shape.num_slots, sampling, shape.rows_per_prompt)
            return Program(function, (self._everywhere,), self._slots_shardings(sampling)).compile((key,))

        key = "slots", shape.num_slots, sampling.needs_counts, sampling.is_by_slot, shape.rows_per_prompt
        return key, build

    # Shapes, shardings, bytes

    def _part_shardings(self, mesh: Mesh, rules: Mapping[str, Sequence[str]]) -> dict[str, NamedSharding]:
        config = self.policy.config
        heads = partition_spec(("batch", "kv_heads"), (self.num_shards, config.common_kv_heads), mesh, rules)
        heads = NamedSharding(mesh, heads)
        arrays = {**dict.fromkeys(LayerKV._fields, heads), **dict.fromkeys(LABELS, self._rows)}
        if config.is_recurrent:
            heads = partition_spec(("batch", "kv_heads"), (self.num_shards, config.linear_num_value_heads), mesh, rules)
            arrays |= {"state": NamedSharding(mesh, heads), "conv": self._rows}
        return arrays

    def _shard_part(self) -> Any:
        shardings: Any = self._array_shardings
        return map_arrays(self._abstract_part(self.num_shards, 1), lambda name, _: shardings[name])

    def _abstract_part(self, num_rows: int, length: int) -> Any:
        return jax.eval_shape(partial(empty_part, self.policy.config, num_rows, length, self._kv_dtype))

    def _abstract_requests(self, shape: Shape, sampling: SamplingParams, width: int) -> Requests:
        """Shapes of [shards, width] requests."""
        waiting = (self.num_shards, width)

        def integers(*dims: int, dtype: Any = jnp.int32) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct(dims, dtype)

        return Requests(*(integers(*waiting),) * 11)._replace(  # pyright: ignore[reportArgumentType]
            seeds=integers(*waiting, dtype=jnp.uint32),
            seeded=integers(*waiting, dtype=bool),
            prefix_rows=integers(*waiting, shape.rows_per_prompt),
            prompt_tokens=integers(*waiting, shape.counted_length) if sampling.needs_counts else None,
            rules=rule_arrays(lambda dtype: integers(*waiting, dtype=dtype), self.logits_dtype)
            if sampling.is_by_slot
            else None,
        )

    def _empty_slots(
        self, num_slots: int, sampling: SamplingParams, rows_per_prompt: int
    ) -> Callable[[jax.Array], Slots]:
        return partial(
            decoding.empty_slots,
            num_slots,
            sampling=sampling,
            vocab_size=self.policy.config.vocab_size,
            rows_per_prompt=rows_per_prompt,
            logits_dtype=self.logits_dtype,
        )

    def _abstract_slots(self, num_slots: int, sampling: SamplingParams, rows_per_prompt: int) -> Any:
        function = self._empty_slots(num_slots, sampling, rows_per_prompt)
        return jax.eval_shape(function, jax.eval_shape(lambda: jax.random.key(0)))

    def _slots_shardings(self, sampling: SamplingParams) -> Any:
        return jax.tree.map(lambda _: self._rows, self._abstract_slots(self.num_shards, sampling, 1))

    def _count_bytes(self, *parts: CachePart | None) -> None:
        self.peak_kv_bytes = max(self.peak_kv_bytes, sum(_nbytes(part) for part in parts))

    def _note_growth(self, part: CachePart, length: int, *others: CachePart | None) -> None:
        """Notes the bytes at the end of a growth, when the last array exists twice and all others have grown."""
        growing = [array.nbytes for name, array in named_arrays(part) if position_axis(name) is not None]
        grown = _nbytes(part) - sum(growing) + sum(growing) * length // part.length + max(growing)
        self.peak_kv_bytes = max(self.peak_kv_bytes, grown + sum(_nbytes(other) for other in others))


def prefill_pieces(num_positions: int, size: int) -> Iterator[tuple[int, int]]:
    """(first position, length of the cache) of every piece of a prefill. The cache doubles when it is full."""
    length = size
    for start in range(0, num_positions, size):
        stop = min(start + size, num_positions)
        if stop > length:
            length = min(2 * length, num_positions)
        yield stop - size, length  # the last piece may run some positions again, so that all pieces have one shape


def prefill_key(num_rows: int, chunk: int, length: int, common_length: int) -> tuple:
    """The key of a prefill program; its text is the name in files of compiled programs."""
    return "prefill", num_rows, chunk, length, common_length


def generate_key(shape: Shape, sampling: SamplingParams, chunk: int) -> tuple:
    """The key of a decode program; its text is the name in files of compiled programs."""
    return "generate", shape, sampling.compiled, chunk


def _in_order(index: np.ndarray) -> np.ndarray:
    """0, 1, 2, ... for each shard, in the shape of `index` [shards, R]."""
    return np.broadcast_to(np.arange(index.shape[1], dtype=np.int32), index.shape)


def _consume(program: Callable, array: jax.Array, *arguments: Any) -> jax.Array:
    """program(array, ...). The memory of `array` is free once the program has run."""
    result = program(array, *arguments)
    array.delete()
    return result


def _abstract(tree: Any) -> Any:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)


def _nbytes(part: CachePart | None) -> int:
    return sum(array.nbytes for array in jax.tree.leaves(part))
