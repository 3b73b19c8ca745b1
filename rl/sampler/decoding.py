"""The functions that the engine compiles: prefill, the decode loop, and the moves of cached rows.

In: a policy, its parameters, requests as arrays. Out: drawn tokens and the cache. Pure functions. Not here: which
request waits where (`rl.sampler.request_queue`), jit, shardings and shapes (`rl.sampler.engine`).

A slot is a row of the own cache. It first feeds the last token of its prompt. So handing a slot to the next request
needs new labels only, and happens inside the loop. The mesh cuts slots and requests into shards; a slot takes requests
and reads prompts of its own shard only.
Legend: B slots, P rows of the prompt table, Q readers of such a row, M table rows of the longest prompt, W waiting
requests of a shard, C tokens of a chunk, S cache positions, T prompt positions, V vocab, D model, N most likely tokens,
X words of `rl.models.drawn_from`.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import struct
from jax.sharding import NamedSharding

from rl.models.cache import (
    CachePart,
    KVCache,
    SharedPart,
    map_arrays,
    named_arrays,
    pad_positions,
    position_axis,
    rope_tables,
    share_evenly,
)
from rl.models.delta_rule import LayerState
from rl.models.inputs import PADDING_GROUP, Inputs
from rl.models.ops import SharedRows, take_in_shards
from rl.models.policy import Params, Policy
from rl.sampler.slot_rules import RuleArrays, draw_by_slot, neutral_rules
from rl.sampler.token_draw import Draw, SamplingParams, TokenCounts, add_token, draw, reset_rows

OWN_BRANCH = 1  # prompts are branch 0; no slot sees another slot's own part
IDLE, HELD = -1, -2  # request of a slot that draws nothing; a held one is kept for what it has drawn
TOKEN_LOOP = "tokens"  # name of the decode loop in compiled programs


class Requests(NamedTuple):
    """Completions that wait for a slot. Fields are int32 [shards, W] unless said otherwise.

    request_ids: any number >= 0.
    prompt_indices, sample_indices: their randomness, see `request_key`.
    seeds, seeded: uint32 and bool: a seed in place of the call's key and the prompt index.
    last_tokens, prompt_lengths: the last token and the number of all tokens of the prompt.
    limits: the most tokens to draw.
    nums_before: tokens at the end of the prompt that belong to the completion, which the request continues.
    prefix_rows: [shards, W, M], rows of the prompt table, counted in the shard; -1 where the prompt takes fewer.
    group_ids: the labels of the prompts in the table.
    prompt_tokens: [shards, W, T], with penalties the whole prompts, followed by -1; else None.
    rules: each [shards, W], where requests have rules of their own; else None.
    """

    request_ids: Any
    prompt_indices: Any
    sample_indices: Any
    seeds: Any
    seeded: Any
    last_tokens: Any
    prompt_lengths: Any
    limits: Any
    nums_before: Any
    prefix_rows: Any
    group_ids: Any
    prompt_tokens: Any = None
    rules: RuleArrays | None = None


@struct.dataclass
class Slots:
    """The state of every slot, each [B] except prefix_rows [B, M]. request_ids is IDLE or HELD in a slot that draws
    nothing, `tokens` is fed next, `num_drawn` counts the tokens that the request has drawn. `nums_cached` counts the
    positions of the own cache that were there when the request took the slot: of earlier turns and observations.
    """

    request_ids: jax.Array
    keys: jax.Array
    tokens: jax.Array
    num_drawn: jax.Array
    prompt_lengths: jax.Array
    limits: jax.Array
    nums_before: jax.Array
    nums_cached: jax.Array
    prefix_rows: jax.Array
    group_ids: jax.Array
    counts: TokenCounts | None = None
    rules: RuleArrays | None = None

    @property
    def cursors(self) -> jax.Array:
        """[B], the position of the own cache that the next token is fed to."""
        return self.nums_cached + self.num_drawn


class Columns(NamedTuple):
    """The tokens that a chunk drew, by step and slot [C, B]; request -1 for none. Top tokens [C, B, N]. Words of the
    ids that could be drawn [C, B, X], None where they are not reported.
    """

    request_ids: jax.Array
    tokens: jax.Array
    sampler_logprobs: jax.Array
    policy_logprobs: jax.Array
    top_ids: jax.Array
    top_logprobs: jax.Array
    kept_words: jax.Array | None = None


class ChunkReport(NamedTuple):
    """What the host reads after a chunk: columns (the first num_steps count), and the state of every slot and queue."""

    columns: Columns
    num_steps: jax.Array
    request_ids: jax.Array
    num_drawn: jax.Array
    num_taken: jax.Array


def prefill_chunk(
    policy: Policy,
    params: Params,
    part: CachePart,
    common: CachePart | None,
    num_shards: int,
    inputs: Inputs,
    start: jax.Array,
) -> CachePart:
    """Writes prompt tokens into `part` (donated) from position `start` on. A row holds one or more prompts.

    Group ids tell the prompts of a row apart; positions are those in the whole prompt. States go on from those of
    `part`, at position 0 from those of `common`.
    """
    if common is not None and part.states:
        part = dataclasses.replace(part, states=_begin(part.states, common.states, num_shards, start == 0))
    shared = () if common is None else (share_evenly(common, part.num_rows, num_shards, any_group=True),)
    cursors = jnp.broadcast_to(start, (part.num_rows,))
    cache = KVCache(own=part, cursors=cursors, shared=shared)
    return policy.extend(params, inputs, cache)[1].own


def read_on(
    policy: Policy,
    num_tokens: int,
    length: int,
    params: Params,
    kept: CachePart,
    table: CachePart,
    rows: jax.Array,
    requests: Requests,
    tokens_BS: jax.Array,
    cursors_B: jax.Array,
    ends_B: jax.Array,
) -> CachePart:
    """The own caches of requests that go on: copies of their kept rows, behind which tokens are read, as many at a time
    as it takes for the longest.

    Each row reads a copy of its prompt. In place, the few rows that go on would take a map with room for all readers of
    all prompts, and attention is computed for the whole of a map. A row that has nothing yet starts from the states of
    its prompt.

    Args:
      num_tokens: T, read at a time.
      length: positions of the copies; the kept rows may have more, which are empty.
      table: the prompts that the rows read.
      rows: [shards, R], of `kept`, counted in the shard. requests: [shards, R], whose rows they are.
      tokens_BS: [shards * R, S], the tokens of each by the position of the own cache at which they are fed; S may be
        more than `length`.
      cursors_B, ends_B: the positions that are there already, and those that are there in the end.
    """
    num_shards, num_rows, rows_per_prompt = requests.prefix_rows.shape
    index = jnp.maximum(requests.prefix_rows, 0).reshape(num_shards, -1)
    table, of_prompts = dataclasses.replace(table, states=()), table.states

    def own_prompt(name: str, array: jax.Array) -> jax.Array:
        taken = take_in_shards(array, index)  # M rows of each, one after the other
        axis = position_axis(name)
        assert axis is not None, name
        cut = taken.reshape(num_shards * num_rows, rows_per_prompt, *taken.shape[1:])
        joined = jnp.moveaxis(cut, 1, axis)
        shape = list(taken.shape)
        shape[0], shape[axis] = num_shards * num_rows, rows_per_prompt * taken.shape[axis]
        if name == "group_ids":
            is_own = requests.prefix_rows.reshape(-1, rows_per_prompt, 1) >= 0
            joined = jnp.where(is_own, joined, PADDING_GROUP)
        return joined.reshape(shape)

    def own_row(name: str, array: jax.Array) -> jax.Array:
        taken = _first_positions(name, take_in_shards(array, rows), length)
        return pad_positions(name, taken, added=num_tokens)  # for the padding of the last piece

    prompts = map_arrays(table, own_prompt)
    shared = (share_evenly(prompts, num_shards * num_rows, num_shards),)
    rope = rope_tables(policy.config, prompts.length + length + num_tokens + 1)
    before_B, group_ids_B = (x.reshape(-1) for x in (requests.prompt_lengths - 1, requests.group_ids))
    tokens_BS = jnp.pad(tokens_BS[:, :length], ((0, 0), (0, num_tokens)))

    def unread(carry: tuple[CachePart, jax.Array]) -> jax.Array:
        return jnp.any(carry[1] < ends_B)

    def read(carry: tuple[CachePart, jax.Array]) -> tuple[CachePart, jax.Array]:
        part, cursors_B = carry
        places_BT = cursors_B[:, None] + jnp.arange(num_tokens, dtype=jnp.int32)
        is_read_BT = places_BT < ends_B[:, None]
        inputs = Inputs(
            tokens_BT=jnp.where(is_read_BT, jnp.take_along_axis(tokens_BS, places_BT, axis=1), 0),
            positions_BT=jnp.where(is_read_BT, before_B[:, None] + places_BT, 0),
            group_ids_BT=jnp.where(is_read_BT, group_ids_B[:, None], PADDING_GROUP),
            branch_ids_BT=jnp.where(is_read_BT, OWN_BRANCH, 0),
        )
        cache = KVCache(own=part, cursors=cursors_B, shared=shared, rope=rope)
        return policy.extend(params, inputs, cache)[1].own, jnp.minimum(cursors_B + num_tokens, ends_B)

    own = map_arrays(kept, own_row)
    if own.states:
        own = dataclasses.replace(own, states=_put_states(own.states, of_prompts, index, cursors_B == 0))
    part, _ = jax.lax.while_loop(unread, read, (own, cursors_B))

    def without_padding(name: str, array: jax.Array) -> jax.Array:
        return _first_positions(name, array, length)

    return map_arrays(part, without_padding)


def move_rows(part: CachePart, source: CachePart, taken: jax.Array, index: jax.Array) -> CachePart:
    """`part` (donated) with the rows `taken` [shards, R] of `source` at the rows `index` [shards, R], both counted in
    the shard. Places past the end are dropped. Of different lengths, the positions that both have are put.
    """
    arrays, length = iter(named_arrays(source)), min(part.length, source.length)

    def put(name: str, array: jax.Array) -> jax.Array:
        _, of_source = next(arrays)
        axis = position_axis(name)
        rows = _first_positions(name, take_in_shards(of_source, taken), length)
        by_shard = array.reshape(index.shape[0], -1, *array.shape[1:])
        new = rows.reshape(*index.shape, *rows.shape[1:])
        which = () if axis is None else (slice(None),) * (axis - 1) + (slice(0, length),)
        moved = jax.vmap(lambda values, picked, row: values.at[(picked, *which)].set(row, mode="drop"))(
            by_shard, index, new
        )
        return moved.reshape(array.shape)

    return map_arrays(part, put)


def empty_slots(
    num_slots: int,
    key: jax.Array,
    sampling: SamplingParams,
    vocab_size: int,
    rows_per_prompt: int,
    logits_dtype: Any = jnp.float32,
) -> Slots:
    """Idle slots."""

    def zeros() -> jax.Array:
        return jnp.zeros(num_slots, jnp.int32)

    counts = None
    if sampling.needs_counts:
        counts = TokenCounts(jnp.zeros((num_slots, vocab_size), jnp.int32), jnp.zeros((num_slots, vocab_size), bool))
    keys = jnp.broadcast_to(key, (num_slots,))
    prefix_rows = jnp.zeros((num_slots, rows_per_prompt), jnp.int32)
    return Slots(
        request_ids=zeros() + IDLE,
        keys=keys,
        tokens=zeros(),
        num_drawn=zeros(),
        prompt_lengths=zeros() + 1,
        limits=zeros(),
        nums_before=zeros(),
        nums_cached=zeros(),
        prefix_rows=prefix_rows,
        group_ids=zeros() - 1,
        counts=counts,
        rules=neutral_rules(num_slots, logits_dtype) if sampling.is_by_slot else None,
    )


def generate(
    policy: Policy,
    sampling: SamplingParams,
    chunk: int,
    num_readers: int,
    holds: bool,
    rows: NamedSharding,
    params: Params,
    own: CachePart,
    slots: Slots,
    table: CachePart,
    common: CachePart | None,
    active: jax.Array | None,
    requests: Requests,
    num_requests: jax.Array,
    key: jax.Array,
    cancelled_B: jax.Array,
    few: jax.Array,
) -> tuple[CachePart, Slots, ChunkReport]:
    """Draws up to `chunk` tokens for each slot. A slot whose completion ends takes the next waiting request at once.

    A slot that takes a request starts from the states of its prompt in the table, where layers have them.

    Stops early when nothing is left to draw, when a slot has filled its cache, or when no request waits and at most
    `few` slots are busy (a smaller cache is then cheaper). Where slots are held it stops when `few` of them are.

    Args:
      num_readers: Q, the most slots that read one row of the table at a time.
      holds: a slot whose completion ends is held, because what it has drawn is read again in a later turn.
      own, slots: donated.
      active: [shards, A], the rows of the table that slots and waiting requests read, counted in the shard; a number
        below -1 where there are fewer. They are copied once, so that no step attends to others. None: all rows.
      requests, num_requests: the waiting requests, and [shards] how many of each shard's W there are.
      cancelled_B: slots whose completions the host has ended, and held slots that are free again.

    Returns:
      The cache, the slots, and the report for the host.
    """
    num_slots, num_shards = own.num_rows, num_requests.shape[0]
    shape = (num_shards, num_slots // num_shards)
    eos_ids = jnp.asarray(sampling.eos_ids, jnp.int32)
    ended_id = HELD if holds else IDLE
    slots = dataclasses.replace(slots, request_ids=jnp.where(cancelled_B, IDLE, slots.request_ids))
    is_recurrent = bool(own.states)
    table, of_prompts = dataclasses.replace(table, states=()), table.states
    if active is None:
        active = jnp.broadcast_to(jnp.arange(table.num_rows // num_shards), (num_shards, table.num_rows // num_shards))
    else:
        table = map_arrays(table, lambda _, array: take_in_shards(array, jnp.maximum(active, 0)))

    def reader_maps(slots: Slots) -> SharedRows:
        live = (slots.request_ids >= 0).reshape(shape)
        return _reader_maps(slots.prefix_rows.reshape(*shape, -1), live, active, num_readers)

    maps = reader_maps(slots)
    columns = _empty_columns(policy, sampling, chunk, num_slots)
    num_taken = jnp.zeros(num_shards, jnp.int32)
    common_length = 0 if common is None else common.length
    longest_prefix = slots.prefix_rows.shape[1] * table.length
    rope = rope_tables(policy.config, common_length + longest_prefix + own.length + 1)

    def unfinished(carry: tuple) -> jax.Array:
        own, slots, _, num_taken, step, _ = carry
        live_B = slots.request_ids >= 0
        waiting = jnp.any(num_taken < num_requests)
        # A further step would write over the last position of a slot that is held.
        fills_B = slots.request_ids != IDLE if holds else live_B
        room = jnp.max(jnp.where(fills_B, slots.cursors, -1)) < own.length
        if holds:
            return (step < chunk) & room & (jnp.sum(slots.request_ids == HELD) < few) & (waiting | jnp.any(live_B))
        return (step < chunk) & room & (waiting | (jnp.sum(live_B) > few))

    def hand_over(own: CachePart, slots: Slots, num_taken: jax.Array) -> tuple:
        slots, taken_B, num_taken = _take_requests(slots, requests, num_requests, num_taken, key, shape)
        own = dataclasses.replace(own, group_ids=jnp.where(taken_B[:, None], -1, own.group_ids))
        states = _put_states(own.states, of_prompts, slots.prefix_rows.reshape(shape), taken_B) if is_recurrent else ()
        return own.group_ids, states, slots, reader_maps(slots), num_taken

    def step(carry: tuple) -> tuple:
        own, slots, maps, num_taken, step, columns = carry
        free = jnp.any((slots.request_ids == IDLE).reshape(shape) & (num_taken < num_requests)[:, None])
        group_ids, states, slots, maps, num_taken = jax.lax.cond(
            free,
            hand_over,
            lambda own, slots, num_taken: (own.group_ids, own.states, slots, maps, num_taken),
            own,
            slots,
            num_taken,
        )
        own = dataclasses.replace(own, group_ids=group_ids, states=states)
        live_B = slots.request_ids >= 0
        tokens_B = jax.lax.with_sharding_constraint(slots.tokens, rows)
        shared = (SharedPart(table, maps),)
        if common is not None:
            shared += (share_evenly(common, num_slots, num_shards, any_group=True),)
        # The states of slots that draw nothing must stay as they are.
        group_ids_B = jnp.where(live_B, slots.group_ids, PADDING_GROUP) if is_recurrent else slots.group_ids
        inputs = Inputs(
            tokens_BT=tokens_B[:, None],
            positions_BT=(slots.prompt_lengths - 1 + slots.cursors)[:, None],
            group_ids_BT=group_ids_B[:, None],
            branch_ids_BT=jnp.full((num_slots, 1), OWN_BRANCH, jnp.int32),
        )
        cache = KVCache(own=own, cursors=slots.cursors, shared=shared, rope=rope)
        hidden_B1D, cache = policy.extend(params, inputs, cache)
        drawn = draw_next(policy.unembed(params, hidden_B1D[:, 0]), slots, sampling)
        columns = _write_columns(columns, step, slots.request_ids, drawn)
        num_drawn = slots.num_drawn + live_B
        is_end_B = jnp.isin(drawn.token_B, eos_ids)
        if slots.rules is not None:
            is_end_B &= slots.rules.ends_at_eos
        ended_B = live_B & (is_end_B | (num_drawn >= slots.limits))
        slots = dataclasses.replace(
            slots,
            request_ids=jnp.where(ended_B, ended_id, slots.request_ids),
            tokens=drawn.token_B,
            num_drawn=num_drawn,
            counts=None if slots.counts is None else add_token(slots.counts, drawn.token_B, live_B),
        )
        return cache.own, slots, maps, num_taken, step + 1, columns

    carry = (own, slots, maps, num_taken, jnp.int32(0), columns)
    with jax.named_scope(TOKEN_LOOP):
        own, slots, _, num_taken, num_steps, columns = jax.lax.while_loop(unfinished, step, carry)
    return own, slots, ChunkReport(columns, num_steps, slots.request_ids, slots.num_drawn, num_taken)


def draw_next(logits_BV: jax.Array, slots: Slots, sampling: SamplingParams) -> Draw:
    """The next token of every slot, with the slot's random number at this position of its completion."""

    def uniform(key: jax.Array, position: jax.Array) -> jax.Array:
        return jax.random.uniform(jax.random.fold_in(key, position), dtype=logits_BV.dtype)

    positions_B = slots.nums_before + slots.num_drawn
    uniform_B = jax.vmap(uniform)(slots.keys, positions_B)
    # Tokens that the turn has so far. What is cached and no part of the completion belongs to its prompt.
    of_turn_B = jnp.maximum(slots.nums_before - slots.nums_cached, 0) + slots.num_drawn
    if slots.rules is not None:
        assert slots.counts is not None
        live_B = slots.request_ids >= 0
        return draw_by_slot(logits_BV, uniform_B, sampling, slots.rules, of_turn_B, live_B, slots.counts)
    return draw(logits_BV, uniform_B, sampling, of_turn_B < sampling.min_completion_length, slots.counts)


def request_key(
    key: jax.Array, prompt_index: jax.Array, sample_index: jax.Array, seed: jax.Array, seeded: jax.Array
) -> jax.Array:
    """The PRNG key of one completion, from (key, prompt index, sample index) or from (seed, sample index).

    fold_in gives independent streams, whatever the order: https://docs.jax.dev/en/latest/random-numbers.html
    """
    base = jnp.where(seeded, jax.random.key(seed), jax.random.fold_in(key, prompt_index))
    return jax.random.fold_in(base, sample_index)


def put_rows(array: jax.Array, rows: jax.Array, index: jax.Array, axis: int | None) -> jax.Array:
    """`array` with `rows` at the places `index` [shards, R, M], counted in each shard. Places past the end are dropped.

    `axis` counts positions. Each of the rows is cut into M rows of the array's length. None: M is 1.
    """
    by_shard = array.reshape(index.shape[0], -1, *array.shape[1:])
    if axis is None:
        assert index.shape[2] == 1, index.shape
        new = rows.reshape(index.shape[0], -1, *array.shape[1:])
    else:
        cut = rows.reshape(*rows.shape[:axis], index.shape[2], array.shape[axis], *rows.shape[axis + 1 :])
        new = jnp.moveaxis(cut, axis, 1).reshape(index.shape[0], -1, *array.shape[1:])
    index = index.reshape(index.shape[0], -1)
    put = jax.vmap(lambda values, picked, row: values.at[picked].set(row, mode="drop"))(by_shard, index, new)
    return put.reshape(array.shape)


def _first_positions(name: str, array: jax.Array, length: int) -> jax.Array:
    """The first `length` positions of the array called `name`; all of one without positions."""
    axis = position_axis(name)
    return array if axis is None else jax.lax.slice_in_dim(array, 0, length, axis=axis)


def _begin(
    states: tuple[LayerState, ...], of_common: tuple[LayerState, ...], num_shards: int, is_first: jax.Array
) -> tuple[LayerState, ...]:
    """The states of all rows; those of their shard's row of the common prefix where `is_first`."""

    def begin(own: jax.Array, common: jax.Array) -> jax.Array:
        return jnp.where(is_first, jnp.repeat(common, own.shape[0] // num_shards, axis=0), own)

    return jax.tree.map(begin, states, of_common)


def _put_states(
    states: tuple[LayerState, ...], of_prompts: tuple[LayerState, ...], index: jax.Array, is_put_B: jax.Array
) -> tuple[LayerState, ...]:
    """The states [B, ...]; where `is_put_B` those of the rows `index` [shards, B / shards] of the prompt table."""

    def put(own: jax.Array, prompts: jax.Array) -> jax.Array:
        taken = take_in_shards(prompts, jnp.maximum(index, 0))
        return jnp.where(is_put_B.reshape(-1, *(1,) * (own.ndim - 1)), taken, own)

    return jax.tree.map(put, states, of_prompts)


def _take_requests(
    slots: Slots, requests: Requests, num_requests: jax.Array, num_taken: jax.Array, key: jax.Array, shape: tuple
) -> tuple[Slots, jax.Array, jax.Array]:
    """Gives idle slots the next waiting requests of their shard. Returns the slots, which took one, and how many were
    taken.
    """
    free = (slots.request_ids == IDLE).reshape(shape)
    index = num_taken[:, None] + jnp.cumsum(free, axis=1) - 1
    taken = free & (index < num_requests[:, None])
    slots = give(slots, requests, jnp.where(taken, index, -1), jnp.zeros_like(requests.request_ids), key)
    return slots, taken.reshape(-1), num_taken + jnp.sum(taken, axis=1, dtype=jnp.int32)


def give(slots: Slots, requests: Requests, index: jax.Array, nums_cached: jax.Array, key: jax.Array) -> Slots:
    """The slots with other requests. Their own caches are those of the slots.

    Args:
      index: [shards, slots of a shard], the place in `requests` of the one that a slot takes; -1: it keeps its own.
      nums_cached: [shards, W], the positions that the own cache holds already.
    """
    taken_B = (index >= 0).reshape(-1)
    index = jnp.clip(index, 0, requests.request_ids.shape[1] - 1)
    picked, cached_B = jax.tree.map(
        lambda x: take_in_shards(x.reshape(-1, *x.shape[2:]), index), (requests, nums_cached)
    )
    keys_B = jax.vmap(request_key, (None, 0, 0, 0, 0))(
        key, picked.prompt_indices, picked.sample_indices, picked.seeds, picked.seeded
    )

    def replace(new: jax.Array, old: jax.Array) -> jax.Array:
        return jnp.where(taken_B.reshape(-1, *(1,) * (old.ndim - 1)), new, old)

    counts = slots.counts
    return Slots(
        request_ids=replace(picked.request_ids, slots.request_ids),
        keys=replace(keys_B, slots.keys),
        tokens=replace(picked.last_tokens, slots.tokens),
        num_drawn=replace(jnp.int32(0), slots.num_drawn),
        prompt_lengths=replace(picked.prompt_lengths, slots.prompt_lengths),
        limits=replace(picked.limits, slots.limits),
        nums_before=replace(picked.nums_before, slots.nums_before),
        nums_cached=replace(cached_B, slots.nums_cached),
        prefix_rows=replace(picked.prefix_rows, slots.prefix_rows),
        group_ids=replace(picked.group_ids, slots.group_ids),
        counts=None if counts is None else reset_rows(counts, taken_B, *_counted(picked, cached_B, counts)),
        rules=jax.tree.map(replace, picked.rules, slots.rules),
    )


def _counted(picked: Requests, cached_B: jax.Array, counts: TokenCounts) -> tuple[jax.Array, jax.Array]:
    """Of requests [B]: which tokens of the vocabulary the prompts hold, bool [B, V], and how often the completions that
    they continue hold each, int32 [B, V].
    """
    vocab_size = counts.prompt_BV.shape[-1]
    tokens_BT = picked.prompt_tokens
    num_tokens_B = picked.prompt_lengths + cached_B
    is_before_BT = jnp.arange(tokens_BT.shape[1]) >= (num_tokens_B - picked.nums_before)[:, None]

    def count(tokens_T: jax.Array, is_before_T: jax.Array) -> tuple[jax.Array, jax.Array]:
        of_prompt_T = jnp.where((tokens_T < 0) | is_before_T, vocab_size, tokens_T)
        of_completion_T = jnp.where((tokens_T < 0) | ~is_before_T, vocab_size, tokens_T)
        seen_V = jnp.zeros(vocab_size, bool).at[of_prompt_T].set(True, mode="drop")
        return seen_V, jnp.zeros(vocab_size, jnp.int32).at[of_completion_T].add(1, mode="drop")

    return jax.vmap(count)(tokens_BT, is_before_BT)


def _reader_maps(prefix_rows: jax.Array, live: jax.Array, active: jax.Array, num_readers: int) -> SharedRows:
    """Which slots read which of the active rows of the prompt table.

    prefix_rows: [shards, slots, M]. live: bool [shards, slots]; the others read nothing. active: [shards, P], the
      numbers of the rows in the order in which they lie.
    """
    num_rows = active.shape[1]

    def in_shard(rows_BM: jax.Array, live_B: jax.Array, active_P: jax.Array) -> SharedRows:
        is_row_BMP = rows_BM[..., None] == active_P
        rows_BM = jnp.argmax(is_row_BMP, axis=2).astype(jnp.int32)
        reads_BMP = is_row_BMP & live_B[:, None, None]
        earlier_BP = jnp.cumsum(jnp.any(reads_BMP, axis=1), axis=0) - 1  # slots before this one that read the row
        rank_BM = jnp.sum(jnp.where(reads_BMP, earlier_BP[:, None], 0), axis=2)
        places_BM = (rows_BM * num_readers + rank_BM).astype(jnp.int32)
        target_BM = jnp.where(jnp.any(reads_BMP, axis=2), places_BM, num_rows * num_readers)
        slots_BM = jnp.broadcast_to(jnp.arange(live_B.size, dtype=jnp.int32)[:, None], rows_BM.shape)
        readers = jnp.zeros(num_rows * num_readers, jnp.int32).at[target_BM].set(slots_BM, mode="drop")
        if rows_BM.shape[1] == 1:
            return SharedRows(readers, places=jnp.where(live_B, places_BM[:, 0], 0))
        reads = jnp.any(target_BM[..., None] == jnp.arange(num_rows * num_readers), axis=1)
        return SharedRows(readers, reads=reads)

    return jax.vmap(in_shard)(prefix_rows, live, active)


def _empty_columns(policy: Policy, sampling: SamplingParams, chunk: int, num_slots: int) -> Columns:
    logprob_dtype = jnp.promote_types(policy.config.dtype, jnp.float32)
    shape, top = (chunk, num_slots), (chunk, num_slots, sampling.top_logprobs)
    num_words = sampling.num_kept_words(policy.config.vocab_size)
    return Columns(
        jnp.full(shape, -1, jnp.int32),
        jnp.zeros(shape, jnp.int32),
        jnp.zeros(shape, logprob_dtype),
        jnp.zeros(shape, logprob_dtype),
        jnp.zeros(top, jnp.int32),
        jnp.zeros(top, logprob_dtype),
        jnp.zeros((*shape, num_words), jnp.uint32) if num_words else None,
    )


def _write_columns(columns: Columns, step: jax.Array, request_ids_B: jax.Array, drawn: Draw) -> Columns:
    new = Columns(
        request_ids_B,
        drawn.token_B,
        drawn.sampler_logprob_B,
        drawn.policy_logprob_B,
        drawn.top_ids_BN,
        drawn.top_logprobs_BN,
        drawn.kept_words_BX,
    )
    return jax.tree.map(lambda column, x: jax.lax.dynamic_update_index_in_dim(column, x, step, 0), columns, new)
