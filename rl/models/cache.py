"""The key/value cache of decoding: a pytree of plain arrays, in two parts.

`prefix` holds the prompts, once each, shared by all completions of a prompt; `own` holds what every row adds. All rows
write at the same slot (`cursor`); how far a row really is, and which slots are empty, stands in the labels alone.
Legend: B sequences, P prompts, R rows of a part, T token positions, S cache positions (slots), K kv heads, H head dim.
"""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import struct

from rl.models import ops
from rl.models.config import ModelConfig


@struct.dataclass
class CachePart:
    """Keys and values [R, S, K, H] of every layer, and the labels int32 [R, S] of each slot (group -1: empty)."""

    keys: tuple[jax.Array, ...]
    values: tuple[jax.Array, ...]
    positions: jax.Array
    group_ids: jax.Array
    branch_ids: jax.Array

    @property
    def num_rows(self) -> int:
        return self.positions.shape[0]

    @property
    def num_slots(self) -> int:
        return self.positions.shape[1]


@struct.dataclass
class KVCache:
    """Own rows [p * G, (p + 1) * G) read prefix row p, G = own rows / prefix rows. `cursor`: the next free own slot."""

    own: CachePart
    cursor: jax.Array
    prefix: CachePart | None = None


class LayerCache(NamedTuple):
    """One layer's share of a `KVCache`."""

    keys_BSKH: jax.Array
    values_BSKH: jax.Array
    cursor: jax.Array
    prefix_keys_PSKH: jax.Array | None
    prefix_values_PSKH: jax.Array | None


def empty_part(config: ModelConfig, num_rows: int, num_slots: int) -> CachePart:
    """A part without entries, in the compute dtype."""
    shape = (num_rows, num_slots, config.num_kv_heads, config.head_dim)
    dtype = ops.dtype_of(config.dtype)
    # One buffer per leaf: a cache is donated, and two leaves of one buffer cannot be.
    return CachePart(
        keys=tuple(jnp.zeros(shape, dtype) for _ in range(config.num_layers)),
        values=tuple(jnp.zeros(shape, dtype) for _ in range(config.num_layers)),
        positions=jnp.zeros((num_rows, num_slots), jnp.int32),
        group_ids=jnp.full((num_rows, num_slots), -1, jnp.int32),
        branch_ids=jnp.zeros((num_rows, num_slots), jnp.int32),
    )


def init_cache(config: ModelConfig, num_rows: int, num_slots: int, prefix: CachePart | None = None) -> KVCache:
    """An empty cache of `num_rows` own rows; raises ValueError unless the prefix's rows divide them."""
    if prefix is not None and num_rows % prefix.num_rows:
        raise ValueError(f"num_rows must be a multiple of the prefix's {prefix.num_rows} rows, got {num_rows}")
    return KVCache(own=empty_part(config, num_rows, num_slots), cursor=jnp.zeros((), jnp.int32), prefix=prefix)


def share_prefix(cache: KVCache, num_samples: int, num_slots: int) -> KVCache:
    """The prompts just prefilled become the prefix of `num_samples` times as many rows, with `num_slots` fresh slots.

    Raises ValueError if the cache already has a prefix.
    """
    if cache.prefix is not None:
        raise ValueError("cache must have no prefix yet, got one that is already shared; prefill into init_cache(...)")
    own = _empty_like(cache.own, cache.own.num_rows * num_samples, num_slots)
    return KVCache(own=own, cursor=jnp.zeros((), jnp.int32), prefix=cache.own)


def grow(cache: KVCache, num_slots: int) -> KVCache:
    """The same cache with `num_slots` own slots; raises ValueError if that would drop slots."""
    added = num_slots - cache.own.num_slots
    if added < 0:
        raise ValueError(f"num_slots must be >= the {cache.own.num_slots} slots there are, got {num_slots}")

    def pad(x: jax.Array, value: int) -> jax.Array:
        return jnp.pad(x, [(0, 0), (0, added)] + [(0, 0)] * (x.ndim - 2), constant_values=value)

    own = CachePart(
        keys=tuple(pad(keys, 0) for keys in cache.own.keys),
        values=tuple(pad(values, 0) for values in cache.own.values),
        positions=pad(cache.own.positions, 0),
        group_ids=pad(cache.own.group_ids, -1),
        branch_ids=pad(cache.own.branch_ids, 0),
    )
    return dataclasses.replace(cache, own=own)


# The three steps of extend: label the new slots, write each layer, advance


def label_slots(cache: KVCache, positions_BT: jax.Array, group_ids_BT: jax.Array, branch_ids_BT: jax.Array) -> KVCache:
    """Labels of T new tokens written at the cursor. The caller keeps cursor + T <= slots."""
    num_tokens = positions_BT.shape[1]
    assert num_tokens <= cache.own.num_slots, f"{num_tokens} tokens do not fit in {cache.own.num_slots} slots"

    def write(labels: jax.Array, new: jax.Array) -> jax.Array:
        return _write_at_slot(labels, new.astype(jnp.int32), cache.cursor)

    own = dataclasses.replace(
        cache.own,
        positions=write(cache.own.positions, positions_BT),
        group_ids=write(cache.own.group_ids, group_ids_BT),
        branch_ids=write(cache.own.branch_ids, branch_ids_BT),
    )
    return dataclasses.replace(cache, own=own)


def cached_contexts(
    config: ModelConfig, positions_BT: jax.Array, group_ids_BT: jax.Array, branch_ids_BT: jax.Array, cache: KVCache
) -> dict[str, ops.LayerContext]:
    """The context of each layer type for new tokens against a cache whose slots are already labelled."""
    contexts = {}
    for layer_type in ops.used_layer_types(config):
        window = ops.layer_window(config, layer_type)

        def mask_against(part: CachePart, window: int | None = window) -> jax.Array:
            positions, groups, branches = (
                labels.reshape(part.num_rows, -1) for labels in (positions_BT, group_ids_BT, branch_ids_BT)
            )
            return ops.visible(
                positions, groups, branches, part.positions, part.group_ids, part.branch_ids, window=window
            )

        prefix_mask = None if cache.prefix is None else mask_against(cache.prefix)
        cos, sin = ops.layer_rope(config, positions_BT, layer_type)
        contexts[layer_type] = ops.LayerContext(cos, sin, mask_against(cache.own), prefix_mask)
    return contexts


def layer_caches(cache: KVCache) -> list[LayerCache]:
    """The cache by layer."""
    prefix = cache.prefix
    return [
        LayerCache(
            keys,
            values,
            cache.cursor,
            None if prefix is None else prefix.keys[i],
            None if prefix is None else prefix.values[i],
        )
        for i, (keys, values) in enumerate(zip(cache.own.keys, cache.own.values, strict=True))
    ]


def append(layer_cache: LayerCache, keys_BTKH: jax.Array, values_BTKH: jax.Array) -> LayerCache:
    """One layer's keys and values of T new tokens written at the cursor."""
    return layer_cache._replace(
        keys_BSKH=_write_at_slot(layer_cache.keys_BSKH, keys_BTKH, layer_cache.cursor),
        values_BSKH=_write_at_slot(layer_cache.values_BSKH, values_BTKH, layer_cache.cursor),
    )


def attention_parts(layer_cache: LayerCache, context: ops.LayerContext) -> list[ops.AttentionPart]:
    """What a layer's queries attend to: the shared prefix, if there is one, then the own slots."""
    own = ops.AttentionPart(layer_cache.keys_BSKH, layer_cache.values_BSKH, context.mask_BTS)
    if context.prefix_mask_RTS is None:
        return [own]
    assert layer_cache.prefix_keys_PSKH is not None
    assert layer_cache.prefix_values_PSKH is not None
    prefix = ops.AttentionPart(layer_cache.prefix_keys_PSKH, layer_cache.prefix_values_PSKH, context.prefix_mask_RTS)
    return [prefix, own]


def advance(cache: KVCache, layers: Sequence[LayerCache], num_tokens: int) -> KVCache:
    """The cache with the layers' new keys and values, its cursor `num_tokens` further."""
    own = dataclasses.replace(
        cache.own, keys=tuple(layer.keys_BSKH for layer in layers), values=tuple(layer.values_BSKH for layer in layers)
    )
    return dataclasses.replace(cache, own=own, cursor=cache.cursor + num_tokens)


def _write_at_slot(slots: jax.Array, new: jax.Array, cursor: jax.Array) -> jax.Array:
    zero = jnp.zeros_like(cursor)
    return jax.lax.dynamic_update_slice(slots, new, (zero, cursor, *(zero,) * (slots.ndim - 2)))


def _empty_like(part: CachePart, num_rows: int, num_slots: int) -> CachePart:
    def zeros(x: jax.Array) -> jax.Array:
        return jnp.zeros((num_rows, num_slots, *x.shape[2:]), x.dtype)

    return CachePart(
        keys=tuple(zeros(keys) for keys in part.keys),
        values=tuple(zeros(values) for values in part.values),
        positions=zeros(part.positions),
        group_ids=zeros(part.group_ids) - 1,
        branch_ids=zeros(part.branch_ids),
    )
