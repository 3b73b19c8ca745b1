"""The key/value cache of decoding: a pytree of plain arrays, an own part and any number of shared ones.

The own part holds the tokens that every row adds; each row writes at its own cursor. A shared part holds each prompt
once, and many own rows read it without a copy. Labels alone decide what a token sees (`ops.visible`). Keys lie as [R,
K, H, S] and values as [R, K, S, H]: both products of attention then read the cache as it lies, which on CPU is about
twice as fast as [R, S, K, H].
Legend: B own rows, R rows of a part, Q readers of a row, T token positions, S cache positions, K kv heads, H head dim.
Shards are the pieces into which a mesh cuts the rows.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import struct

from rl.models import delta_rule, ops
from rl.models.config import LayerShape, ModelConfig
from rl.models.delta_rule import LayerState
from rl.models.inputs import PADDING_GROUP, Inputs

INT8_MAX = 127.0
LABELS = ("positions", "group_ids", "branch_ids")  # in the order of `Inputs.labels`
_POSITION_AXES = {"keys": 3, "values": 2, "key_scales": 2, "value_scales": 2}
_POSITION_AXES |= {**dict.fromkeys(LABELS, 1), **dict.fromkeys(LayerState._fields)}


class LayerKV(NamedTuple):
    """One layer's keys [R, K, H, S] and values [R, K, S, H]; int8 ones come with scales [R, K, S]."""

    keys: jax.Array
    values: jax.Array
    key_scales: jax.Array | None = None
    value_scales: jax.Array | None = None


@struct.dataclass
class CachePart:
    """The layers that have keys and values (`cached_layers`), int32 labels [R, S] of every position (group -1: empty),
    and the states of the layers that have one.
    """

    layers: tuple[LayerKV, ...]
    positions: jax.Array
    group_ids: jax.Array
    branch_ids: jax.Array
    states: tuple[LayerState, ...] = ()

    @property
    def num_rows(self) -> int:
        return self.positions.shape[0]

    @property
    def length(self) -> int:
        return self.positions.shape[1]


@struct.dataclass
class SharedPart:
    """A part that own rows read and never write. `any_group`: rows of every group read it (a prefix of all prompts)."""

    part: CachePart
    rows: ops.SharedRows
    any_group: bool = struct.field(pytree_node=False, default=False)


@struct.dataclass
class KVCache:
    """The own part, the shared parts, and what decoding keeps beside them.

    Attributes:
      cursors: int32 [B], the next free position of each own row.
      rope: {layer type: cos and sin [positions, H / 2]}, see `rope_tables`. None: computed when needed, which XLA for
        CPU does again in every layer.
    """

    own: CachePart
    cursors: jax.Array
    shared: tuple[SharedPart, ...] = ()
    rope: dict[str, tuple[jax.Array, jax.Array]] | None = None


class LayerCache(NamedTuple):
    """One layer's share of a `KVCache`."""

    own: LayerKV
    cursors: jax.Array
    shared: tuple[LayerKV, ...]
    shared_rows: tuple[ops.SharedRows, ...]


def empty_part(config: ModelConfig, num_rows: int, length: int, kv_dtype: str | None = None) -> CachePart:
    """A part without entries; keys and values in the compute dtype, or in `kv_dtype` "int8"."""
    dtype = ops.dtype_of(config.dtype)

    def layer(shape: LayerShape) -> LayerKV:
        keys = (num_rows, shape.num_kv_heads, shape.head_dim, length)
        values = (num_rows, shape.num_kv_heads, length, shape.head_dim)
        scales = (num_rows, shape.num_kv_heads, length)
        # One buffer for each leaf, because a donated cache must not share a buffer between leaves.
        if kv_dtype is None:
            return LayerKV(jnp.zeros(keys, dtype), jnp.zeros(values, dtype))
        assert kv_dtype == "int8", kv_dtype
        wide = ops.widen(dtype)
        return LayerKV(
            jnp.zeros(keys, jnp.int8), jnp.zeros(values, jnp.int8), jnp.zeros(scales, wide), jnp.zeros(scales, wide)
        )

    def state() -> LayerState:
        heads = (config.linear_num_value_heads, config.linear_key_head_dim, config.linear_value_head_dim)
        conv = (num_rows, config.linear_conv_kernel_dim - 1, config.linear_channels)
        return LayerState(jnp.zeros((num_rows, *heads), ops.widen(dtype)), jnp.zeros(conv, dtype))

    num_states = sum(config.layer_shape(i).is_recurrent for i in range(config.num_layers))
    return CachePart(
        layers=tuple(map(layer, cached_layers(config))),
        positions=jnp.zeros((num_rows, length), jnp.int32),
        group_ids=jnp.full((num_rows, length), PADDING_GROUP, jnp.int32),
        branch_ids=jnp.zeros((num_rows, length), jnp.int32),
        states=tuple(state() for _ in range(num_states)),
    )


def cached_layers(config: ModelConfig) -> list[LayerShape]:
    """The layers that have keys and values of their own, and so a place in a cache, in order."""
    shapes = map(config.layer_shape, range(config.num_layers))
    return [shape for shape in shapes if shape.has_keys]


def share_evenly(part: CachePart, num_rows: int, num_shards: int = 1, any_group: bool = False) -> SharedPart:
    """`part` as a shared part of `num_rows` own rows. The own rows [r * Q, (r + 1) * Q) read its row r.

    Raises ValueError unless the part's rows divide `num_rows`.
    """
    if num_rows % part.num_rows:
        raise ValueError(f"num_rows must be a multiple of the shared part's {part.num_rows} rows, got {num_rows}")
    in_order = jnp.broadcast_to(
        jnp.arange(num_rows // num_shards, dtype=jnp.int32), (num_shards, num_rows // num_shards)
    )
    return SharedPart(part, ops.SharedRows(in_order, in_order), any_group)


def rope_tables(config: ModelConfig, num_positions: int) -> dict[str, tuple[jax.Array, jax.Array]]:
    """cos and sin of positions below `num_positions`, to be made once, outside the loop that extends a cache."""
    positions_1T = jnp.arange(num_positions, dtype=jnp.int32)[None]
    tables = {}
    for layer_type in ops.used_layer_types(config):
        cos, sin = ops.layer_rope(config, positions_1T, layer_type)
        tables[layer_type] = (cos[0], sin[0])
    return tables


# The steps of extend: label the new positions, write each layer, attend, advance


def label_positions(cache: KVCache, inputs: Inputs) -> KVCache:
    """Labels of T new tokens written at each row's cursor. The caller keeps cursor + T within the cache."""
    num_tokens = inputs.tokens_BT.shape[1]
    assert num_tokens <= cache.own.length, f"{num_tokens} tokens do not fit in a cache of {cache.own.length}"

    def write(labels_BS: jax.Array, new_BT: jax.Array) -> jax.Array:
        return _write(labels_BS, new_BT.astype(jnp.int32), cache.cursors, axis=0)

    labels = {name: write(getattr(cache.own, name), new) for name, new in zip(LABELS, inputs.labels, strict=True)}
    return dataclasses.replace(cache, own=dataclasses.replace(cache.own, **labels))


def cached_contexts(config: ModelConfig, inputs: Inputs, cache: KVCache) -> dict[str, Any]:
    """{layer type: context} for new tokens and a cache in which their positions are already labelled."""
    labels, positions_BT = inputs.labels, inputs.positions_BT
    contexts = delta_rule.cached_context(config, inputs)
    for layer_type in ops.used_layer_types(config):
        window = ops.layer_window(config, layer_type)
        own_mask = _mask(labels, cache.own, window)
        shared_masks = tuple(_shared_mask(labels, shared, window) for shared in cache.shared)
        if cache.rope is None:
            cos, sin = ops.layer_rope(config, positions_BT, layer_type)
        else:
            cos, sin = (table[positions_BT] for table in cache.rope[layer_type])
        factors_BT = ops.query_scale(config, positions_BT, layer_type)
        contexts[layer_type] = ops.LayerContext(cos, sin, own_mask, shared_masks, query_scale_BT=factors_BT)
    return contexts


def layer_caches(config: ModelConfig, cache: KVCache) -> list[LayerCache | LayerState | None]:
    """The cache by layer; None for layers that read the keys and values of another."""
    rows = tuple(shared.rows for shared in cache.shared)
    cached = iter(
        LayerCache(own, cache.cursors, tuple(shared.part.layers[i] for shared in cache.shared), rows)
        for i, own in enumerate(cache.own.layers)
    )
    states = iter(cache.own.states)
    shapes = map(config.layer_shape, range(config.num_layers))
    return [next(cached) if shape.has_keys else next(states) if shape.is_recurrent else None for shape in shapes]


def append(layer_cache: LayerCache, keys_BTKH: jax.Array, values_BTKH: jax.Array) -> LayerCache:
    """One layer's keys and values of T new tokens written at the cursors."""
    own, cursors = layer_cache.own, layer_cache.cursors
    keys_BKHT, values_BKTH = jnp.moveaxis(keys_BTKH, 1, 3), jnp.swapaxes(values_BTKH, 1, 2)
    if own.key_scales is None or own.value_scales is None:
        new = LayerKV(_write(own.keys, keys_BKHT, cursors, axis=2), _write(own.values, values_BKTH, cursors, axis=1))
        return layer_cache._replace(own=new)
    keys_BKHT, key_scales_BKT = _to_int8(keys_BKHT, axis=2)
    values_BKTH, value_scales_BKT = _to_int8(values_BKTH, axis=3)
    new = LayerKV(
        _write(own.keys, keys_BKHT, cursors, axis=2),
        _write(own.values, values_BKTH, cursors, axis=1),
        _write(own.key_scales, key_scales_BKT, cursors, axis=1),
        _write(own.value_scales, value_scales_BKT, cursors, axis=1),
    )
    return layer_cache._replace(own=new)


def attend(
    config: ModelConfig,
    q_BTNH: jax.Array,
    kv_BTKH: tuple[jax.Array, jax.Array] | None,
    context: ops.LayerContext,
    layer_cache: LayerCache | None,
    is_read: bool = False,
) -> tuple[jax.Array, Any]:
    """Attention of one layer [B, T, N, H], over the tokens themselves or over a cache.

    Args:
      kv_BTKH: keys and values of the tokens; None: those of an earlier layer, `context.shared_kv`.
      is_read: whether later layers read this layer's keys and values.

    Returns:
      The output, and what goes on from the layer: its cache with the new tokens; or, without a cache, keys and values
      if later layers read them, else None.
    """
    scale, softcap = config.attention_scale, config.attention_softcap
    if kv_BTKH is None:
        source = context.shared_kv
        if isinstance(source, LayerCache):
            return ops.attention_over_parts(q_BTNH, attention_parts(source, context), scale, softcap), None
        k_BTKH, v_BTKH = source
        return ops.attend_tokens(q_BTNH, k_BTKH, v_BTKH, context, config), None
    k_BTKH, v_BTKH = kv_BTKH
    if layer_cache is None:
        return ops.attend_tokens(q_BTNH, k_BTKH, v_BTKH, context, config), kv_BTKH if is_read else None
    layer_cache = append(layer_cache, k_BTKH, v_BTKH)
    return ops.attention_over_parts(q_BTNH, attention_parts(layer_cache, context), scale, softcap), layer_cache


def attention_parts(layer_cache: LayerCache, context: ops.LayerContext) -> list[ops.AttentionPart]:
    """The parts that a layer's queries attend to: the own part, then the shared ones."""
    parts = [_attention_part(layer_cache.own, context.mask_BTS, None)]
    for layer, rows, mask in zip(layer_cache.shared, layer_cache.shared_rows, context.shared_masks_RTS, strict=True):
        parts.append(_attention_part(layer, mask, rows))
    return parts


def advance(cache: KVCache, layers: Sequence[LayerCache | LayerState | None], num_tokens: int) -> KVCache:
    """The cache with the layers' new keys, values and states, its cursors `num_tokens` further."""
    keys = tuple(layer.own for layer in layers if isinstance(layer, LayerCache))
    states = tuple(layer for layer in layers if isinstance(layer, LayerState))
    own = dataclasses.replace(cache.own, layers=keys, states=states)
    return dataclasses.replace(cache, own=own, cursors=cache.cursors + num_tokens)


# A cache changes its shape array by array, so that only one array exists in both shapes at a time


def empty_value(name: str) -> int:
    """The value of an unused position in the label or layer array called `name`."""
    return PADDING_GROUP if name == "group_ids" else 0


def position_axis(name: str) -> int | None:
    """The axis of cache positions in the arrays called `name`; None: they belong to whole rows."""
    return _POSITION_AXES[name]


def named_arrays(part: CachePart) -> list[tuple[str, Any]]:
    """(name, array) of every array of the part: layer by layer, then the states, then the labels."""
    layers = [pair for layer in (*part.layers, *part.states) for pair in layer._asdict().items() if pair[1] is not None]
    return [*layers, *((name, getattr(part, name)) for name in LABELS)]


def map_arrays(part: CachePart, function: Callable[[str, jax.Array], jax.Array]) -> CachePart:
    """The part with every array replaced by function(name, array), in the order of `named_arrays`."""

    def of_layer(layer: Any) -> Any:
        return layer._replace(**{name: function(name, x) for name, x in layer._asdict().items() if x is not None})

    layers, states = (tuple(map(of_layer, group)) for group in (part.layers, part.states))
    labels = {name: function(name, getattr(part, name)) for name in LABELS}
    return dataclasses.replace(part, layers=layers, states=states, **labels)


def pad_positions(name: str, array: jax.Array, added: int) -> jax.Array:
    """The array called `name` of a part with `added` empty positions at its end; one without positions as it is."""
    if position_axis(name) is None:
        return array
    padding = [(0, added if axis == position_axis(name) else 0) for axis in range(array.ndim)]
    return jnp.pad(array, padding, constant_values=empty_value(name))


def _write(cache: jax.Array, new: jax.Array, cursors_B: jax.Array, axis: int) -> jax.Array:
    """`new` written into `cache` at each row's cursor; `axis` counts positions, with the row axis left out."""

    def write_row(row: jax.Array, new_row: jax.Array, cursor: jax.Array) -> jax.Array:
        return jax.lax.dynamic_update_slice_in_dim(row, new_row, cursor, axis)

    return jax.vmap(write_row)(cache, new, cursors_B)


def _attention_part(layer: LayerKV, mask: jax.Array, rows: ops.SharedRows | None) -> ops.AttentionPart:
    return ops.AttentionPart(layer.keys, layer.values, layer.key_scales, layer.value_scales, mask, rows)


def _to_int8(x: jax.Array, axis: int) -> tuple[jax.Array, jax.Array]:
    """int8 values and their scales, one for each vector along `axis`: symmetric, absmax / 127."""
    wide = x.astype(ops.widen(x.dtype))
    scales = jnp.max(jnp.abs(wide), axis=axis) / INT8_MAX
    safe = jnp.expand_dims(jnp.where(scales > 0, scales, 1), axis)
    return jnp.round(wide / safe).astype(jnp.int8), scales


def _mask(labels: tuple[jax.Array, jax.Array, jax.Array], part: CachePart, window: int | None) -> jax.Array:
    return ops.visible(*labels, part.positions, part.group_ids, part.branch_ids, window=window)


def _shared_mask(labels: tuple[jax.Array, jax.Array, jax.Array], shared: SharedPart, window: int | None) -> jax.Array:
    """bool [R, Q * T, S] of the readers of every row."""
    num_rows = shared.part.num_rows
    positions, groups, branches = (ops.to_readers(x, shared.rows, num_rows).reshape(num_rows, -1) for x in labels)
    groups = jnp.zeros_like(groups) if shared.any_group else groups
    return _mask((positions, groups, branches), shared.part, window)
