"""The pure maths that the Linen and the NNX twin share: no modules, no state, no mesh.

Legend of shape suffixes: B sequences, R rows of a cache part, Q readers of a shared row, E = R * Q, T token positions,
S cache positions, V vocab, D model, N query heads, K kv heads, J = N / K query heads per kv head, H head dim, F mlp.
"""

import dataclasses
import math
import zlib
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from rl.models.config import (
    A_LOG,
    DT_BIAS,
    GATED_SCALE,
    LAYER_SCALAR,
    LAYER_TYPES,
    LORA_A,
    LORA_B,
    ModelConfig,
    RopeScaling,
    flatten_specs,
    has_rotary,
    has_window,
    parameter_specs,
)
from rl.models.inputs import Inputs
from rl.models.quantized import QuantizedArray, Weight, dequantize

# (q [B, T, N, H], k and v [B, S, K, H], mask [B, T, S], scale) -> [B, T, N, H]; where scores have a soft cap, it is one
# more argument
AttentionFn = Callable[..., jax.Array]

# Names of the values of a layer that `remat: outputs` keeps.
ATTENTION_OUTPUT, MLP_OUTPUT = "attention_output", "mlp_output"


def remat_options(mode: str) -> dict[str, Any]:
    """Arguments of `jax.checkpoint` around one layer. They say what is kept for the backward pass besides its inputs.

    "dots" keeps the products with weights, "outputs" the outputs of attention and MLP, "block" and "full" nothing.
    """
    policies = jax.checkpoint_policies
    names = policies.save_only_these_names(ATTENTION_OUTPUT, MLP_OUTPUT)
    policy = {"dots": policies.dots_with_no_batch_dims_saveable, "outputs": names}.get(mode)
    return {} if policy is None else {"policy": policy}


def remat_segments(config: ModelConfig) -> list[range]:
    """Segments of consecutive layers, which the backward pass computes again from the input of the first layer.

    A segment has about sqrt(L) layers in "full" (https://arxiv.org/abs/1604.06174, section 4.3), else one.
    """
    size = round(math.sqrt(config.num_layers)) if config.remat == "full" else 1
    return [range(i, min(i + size, config.num_layers)) for i in range(0, config.num_layers, size)]


@struct.dataclass
class LayerContext:
    """What layers of one attention type share: rotary tables, the mask, and masks [R, Q * T, S] of shared cache parts.

    `attend` computes attention where there is no cache, see `rl.models.attention_kernels`. `query_scale_BT` are factors
    on queries. Two values belong to one layer: its own input [B, T, P], and what it reads of an earlier layer in place
    of keys and values of its own: keys and values [B, T, K, H], or a `LayerCache`.
    """

    cos_BTH: jax.Array
    sin_BTH: jax.Array
    mask_BTS: jax.Array
    shared_masks_RTS: tuple[jax.Array, ...] = ()
    attend: AttentionFn | None = struct.field(pytree_node=False, default=None)
    query_scale_BT: jax.Array | None = None
    layer_input_BTP: jax.Array | None = None
    shared_kv: Any = None


class SharedRows(NamedTuple):
    """Which own rows read which rows of a shared part. Indices count inside each shard.

    Either `places` or `reads` is set.

    readers: int32 [shards, R / shards * Q]: the own rows that read each shared row, Q for each. Where a row has fewer
      than Q readers, any own row fills the place, and its result is dropped.
    places: int32 [shards, B / shards]: the place of each own row in `readers`, if every own row reads exactly one
      shared row.
    reads: bool [shards, B / shards, R / shards * Q]: the places of each own row in `readers`, if it may read any number
      of shared rows.
    """

    readers: jax.Array
    places: jax.Array | None = None
    reads: jax.Array | None = None


class AttentionPart(NamedTuple):
    """Cached keys [R, K, H, S] and values [R, K, S, H], scales [R, K, S] if they are int8, and a mask.

    Without `rows` the part holds the queries' own rows and the mask is [B, T, S]. With `rows` it is a shared part and
    the mask is [R, Q * T, S].
    """

    keys_RKHS: jax.Array
    values_RKSH: jax.Array
    key_scales_RKS: jax.Array | None
    value_scales_RKS: jax.Array | None
    mask_RTS: jax.Array
    rows: SharedRows | None = None


class Adapter(NamedTuple):
    """A low-rank addition to a kernel: scale times a [*inputs, rank] times b [rank, *outputs]."""

    a: jax.Array
    b: jax.Array
    scale: float


# Types and initial values


def dtype_of(name: str) -> Any:
    """The jax dtype called `name`. Raises ValueError for float64 unless jax is in 64-bit mode."""
    if name == "float64" and not jax.config.read("jax_enable_x64"):
        raise ValueError(
            "dtype must be 32 bits or narrower unless 64-bit mode is on, got float64; set JAX_ENABLE_X64=1"
        )
    return jnp.dtype(name)


def widen(dtype: Any) -> Any:
    """The wider of `dtype` and float32: the type of norms, softmax, logits, sums of gradients, and moments."""
    return jnp.promote_types(dtype, jnp.float32)


def initial_value(config: ModelConfig, key: jax.Array, path: Sequence[str], shape: tuple[int, ...]) -> jax.Array:
    """The initial parameter at `path`, in `config.param_dtype`.

    Matrices are normal with standard deviation `initializer_range`, biases are 0, norms the identity. Decays of states
    start at exp(A_log) uniform in (0, 16) and dt_bias 1. An adapter's A is
    uniform in +-1 / sqrt(inputs) and its B is 0, so that it starts as nothing (as in
    https://github.com/huggingface/peft). The draw depends on (key, path) only, so both twins, and any subset of the
    layers, draw the same numbers.
    """
    name = path[-1]
    if _is_drawn(name):
        return _draw(config, jax.random.fold_in(key, _path_hash(path)), name, shape)
    ones = dict.fromkeys((LAYER_SCALAR, DT_BIAS, GATED_SCALE), 1.0)
    value = {"scale": 1.0 - config.features.norm_offset, **ones}.get(name, 0.0)
    return jnp.full(shape, value, dtype_of(config.param_dtype))


def init_params(config: ModelConfig, key: jax.Array) -> dict[str, Any]:
    """The whole parameter tree at its initial values, equal to what either twin's own initialisation gives.

    Matrices of one shape are drawn together: a model of 28 layers is 6 draws to compile instead of 197.
    """
    specs = list(flatten_specs(parameter_specs(config)))
    values: dict[tuple[str, ...], jax.Array] = {}
    alike: dict[tuple[str, tuple[int, ...]], list[tuple[str, ...]]] = {}
    for path, spec in specs:
        if _is_drawn(path[-1]):
            kind = path[-1] if path[-1] in (LORA_A, A_LOG) else "normal"
            alike.setdefault((kind, spec.shape), []).append(path)
        else:
            values[path] = initial_value(config, key, path, spec.shape)
    for (_, shape), paths in alike.items():
        hashes = jnp.asarray([_path_hash(path) for path in paths], jnp.uint32)
        keys = jax.vmap(partial(jax.random.fold_in, key))(hashes)
        drawn = jax.vmap(lambda path_key, name=paths[0][-1], shape=shape: _draw(config, path_key, name, shape))(keys)
        values.update(zip(paths, drawn, strict=True))
    params: dict[str, Any] = {}
    for path, _ in specs:
        node = params
        for name in path[:-1]:
            node = node.setdefault(name, {})
        node[path[-1]] = values[path]
    return params


def _is_drawn(name: str) -> bool:
    return name not in (LORA_B, "bias", "scale", LAYER_SCALAR, DT_BIAS, GATED_SCALE)


def _path_hash(path: Sequence[str]) -> int:
    return zlib.crc32("/".join(path).encode())


def _draw(config: ModelConfig, path_key: jax.Array, name: str, shape: tuple[int, ...]) -> jax.Array:
    dtype = dtype_of(config.param_dtype)
    if name == LORA_A:
        bound = float(np.prod(shape[:-1])) ** -0.5
        return jax.random.uniform(path_key, shape, widen(dtype), -bound, bound).astype(dtype)
    if name == A_LOG:  # decays of very different speed, as in transformers' class
        return jnp.log(jax.random.uniform(path_key, shape, widen(dtype), 1e-3, 16.0)).astype(dtype)
    return (config.initializer_range * jax.random.normal(path_key, shape, widen(dtype))).astype(dtype)


# Projections, norms, activations


def dense(
    x: jax.Array,
    kernel: Weight,
    bias: jax.Array | None = None,
    num_input_dims: int = 1,
    out_dtype: Any = None,
    adapter: Adapter | None = None,
) -> jax.Array:
    """x [..., *inputs] times kernel [*inputs, *outputs] plus bias [*outputs]: one matrix product, in x's dtype.

    `num_input_dims` is the number of trailing dims of x to sum over. `out_dtype` is the type of the sums and of the
    result. With a quantised kernel the result is (x times values) times scale, summed and scaled in float32 or wider;
    with scales by group of inputs it is x times (values times scale) in x's dtype. An `adapter` adds scale (x a) b, two
    thin products, in training and decoding. No merged kernel exists.
    """
    if adapter is not None:
        low = dense(x, adapter.a, num_input_dims=num_input_dims) * jnp.asarray(adapter.scale, x.dtype)
        added = dense(low, adapter.b, out_dtype=out_dtype)
        return dense(x, kernel, bias, num_input_dims, out_dtype) + added
    if isinstance(kernel, QuantizedArray) and max(kernel.scale.shape[:num_input_dims]) > 1:
        kernel = dequantize(kernel, x.dtype)
    if isinstance(kernel, QuantizedArray):
        out_dtype = x.dtype if out_dtype is None else out_dtype
        out_shape = kernel.shape[num_input_dims:]
        assert kernel.scale.shape == (1,) * num_input_dims + out_shape, (kernel.scale.shape, kernel.shape)
        # 8-bit values fit every compute type exactly. But their sums overflow float16, and a scale that is rounded to
        # bfloat16 distorts a whole channel.
        y = dense(x, kernel.values, num_input_dims=num_input_dims, out_dtype=widen(out_dtype))
        y = (y * kernel.scale.reshape(out_shape).astype(y.dtype)).astype(out_dtype)
        return y if bias is None else y + bias.astype(y.dtype)
    in_shape, out_shape = kernel.shape[:num_input_dims], kernel.shape[num_input_dims:]
    lead_shape = x.shape[: x.ndim - num_input_dims]
    matrix = kernel.astype(x.dtype).reshape(int(np.prod(in_shape)), int(np.prod(out_shape)))
    # Two dims only: with more, XLA for CPU copies the inputs of the kernel's gradient element by element.
    y = jnp.matmul(x.reshape(-1, matrix.shape[0]), matrix, preferred_element_type=out_dtype)
    y = y.reshape(*lead_shape, *out_shape)
    return y if bias is None else y + bias.astype(y.dtype)


def embed(embedding_VD: Weight, tokens_BT: jax.Array, config: ModelConfig) -> jax.Array:
    """Rows of the embedding table [B, T, D] in the compute dtype, times sqrt(D) where the family scales them, and times
    the model's multiplier.
    """
    x_BTD = _rows(embedding_VD, tokens_BT, config)
    if config.features.scales_embedding:
        return x_BTD * jnp.asarray(config.hidden_size**0.5, x_BTD.dtype)
    return _times(x_BTD, config.embedding_multiplier)


def embed_per_layer(embedding_VE: Weight, tokens_BT: jax.Array, config: ModelConfig) -> jax.Array:
    """What tokens say to each layer [B, T, L * P], times sqrt(P)."""
    x_BTE = _rows(embedding_VE, tokens_BT, config)
    return x_BTE * jnp.asarray(config.per_layer_input_size**0.5, x_BTE.dtype)


def _rows(embedding_VD: Weight, tokens_BT: jax.Array, config: ModelConfig) -> jax.Array:
    dtype = dtype_of(config.dtype)
    # A quantised table has rows in both values [V, D] and scale [V, 1].
    rows = jax.tree.map(lambda table: jnp.take(table, tokens_BT, axis=0), embedding_VD)
    return dequantize(rows, dtype) if isinstance(rows, QuantizedArray) else rows.astype(dtype)


def layer_inputs(
    x_BTD: jax.Array,
    of_tokens_BTE: jax.Array,
    project: Callable[[jax.Array], jax.Array],
    norm: Callable[[jax.Array], jax.Array],
    config: ModelConfig,
) -> jax.Array:
    """The input of its own of each layer [L, B, T, P] (Gemma 4 E): (norm(D^-1/2 project(x)) + of_tokens) / sqrt(2).

    Args:
      x_BTD: embeddings.
      of_tokens_BTE: from `embed_per_layer`.
      project, norm: [B, T, D] -> [B, T, L * P], and the norm over the last dim of [B, T, L, P].
    """
    shape = (*x_BTD.shape[:2], config.num_layers, config.per_layer_input_size)
    projected = _times(project(x_BTD), config.hidden_size**-0.5).reshape(shape)
    return jnp.moveaxis(_times(norm(projected) + of_tokens_BTE.reshape(shape), 2**-0.5), 2, 0)


def finish_logits(logits: jax.Array, config: ModelConfig) -> jax.Array:
    """Logits divided by the model's divisor, and under its soft cap."""
    logits = logits if config.logits_divisor == 1 else logits / config.logits_divisor
    return soft_cap(logits, config.logit_softcap)


def soft_cap(x: jax.Array, cap: float | None) -> jax.Array:
    """cap tanh(x / cap); x itself where there is no cap."""
    return x if cap is None else cap * jnp.tanh(x / cap)


def add_residual(x: jax.Array, added: jax.Array, config: ModelConfig) -> jax.Array:
    """x + added times the model's multiplier."""
    return x + _times(added, config.residual_multiplier)


def _times(x: jax.Array, factor: float) -> jax.Array:
    return x if factor == 1 else x * jnp.asarray(factor, x.dtype)


def rms_norm(x: jax.Array, scale: jax.Array | None, config: ModelConfig) -> jax.Array:
    """x / rms(x) over the last dim, times (scale + the family's `norm_offset`), computed in float32 or wider; x's
    dtype. Without `scale`, x / rms(x).

    Zhang and Sennrich, "Root Mean Square Layer Normalization", https://arxiv.org/abs/1910.07467
    """
    wide = widen(x.dtype)
    x_wide = x.astype(wide)
    mean = jnp.mean(jnp.square(x_wide), axis=-1, keepdims=True) + config.norm_eps
    # XLA for CPU rounds the power better, which models of Gemma 4 feel.
    y = x_wide * (jnp.power(mean, -0.5) if config.features.rounds_norm_once else jax.lax.rsqrt(mean))
    if scale is None:
        return y.astype(x.dtype)
    if config.features.norm_offset:
        return (y * (config.features.norm_offset + scale.astype(wide))).astype(x.dtype)
    if config.features.rounds_norm_once:
        return (y * scale.astype(wide)).astype(x.dtype)
    # Other families round before they scale; in float32 there is no difference.
    return y.astype(x.dtype) * scale.astype(x.dtype)


def norm_heads(x_BTNH: jax.Array, norm: Callable[[jax.Array], jax.Array], config: ModelConfig) -> jax.Array:
    """Queries or keys normalised in each head, or over all heads together where the family does."""
    if not config.features.qk_norm_of_all:
        return norm(x_BTNH)
    return norm(x_BTNH.reshape(*x_BTNH.shape[:2], -1)).reshape(x_BTNH.shape)


def activation(x: jax.Array, name: str) -> jax.Array:
    """silu, gelu, or gelu_tanh (the tanh approximation) of x."""
    functions = {"silu": jax.nn.silu, "gelu": _gelu_exact, "gelu_tanh": jax.nn.gelu}
    return functions[name](x)


def _gelu_exact(x: jax.Array) -> jax.Array:
    return jax.nn.gelu(x, approximate=False)


# Rotary position embedding


def rope_frequencies(rotary_dim: int, theta: float, scaling: RopeScaling) -> np.ndarray:
    """The angle per position of each rotated pair of dims, in radians: float64 [rotary_dim / 2].

    Su et al., https://arxiv.org/abs/2104.09864. "llama3": pairs with a wavelength above original / low_freq_factor are
    slowed by `factor`, pairs below original / high_freq_factor are kept, and pairs in between are blended
    (https://github.com/meta-llama/llama-models, apply_scaling). "yarn": pairs that turn less than beta_slow times over
    the original length are slowed, those that turn more than beta_fast times are kept, and the pairs in between are
    blended by their number (Peng et al., https://arxiv.org/abs/2309.00071, section 3.2). "longrope": each pair is
    slowed by a number of its own, of which there is a set for short and one for long runs (Ding et al.,
    https://arxiv.org/abs/2402.13753). "proportional": the first pairs turn as in a head that is rotated whole, divided
    by `factor`; the others do not turn.
    """
    frequencies = theta ** -(np.arange(0, rotary_dim, 2, dtype=np.float64) / rotary_dim)
    if scaling.kind == "linear":
        return frequencies / scaling.factor
    if scaling.kind == "llama3":
        turns = scaling.original_max_position_embeddings * frequencies / (2 * np.pi)
        span = scaling.high_freq_factor - scaling.low_freq_factor
        kept = np.clip((turns - scaling.low_freq_factor) / span, 0.0, 1.0)
        return kept * frequencies + (1.0 - kept) * frequencies / scaling.factor
    if scaling.kind == "yarn":
        low, high = _yarn_borders(rotary_dim, theta, scaling)
        kept = 1.0 - np.clip((np.arange(rotary_dim // 2) - low) / (high - low), 0.0, 1.0)
        return kept * frequencies + (1.0 - kept) * frequencies / scaling.factor
    if scaling.kind == "longrope":
        return frequencies / np.asarray(scaling.long_factor if scaling.is_long else scaling.short_factor)
    if scaling.kind == "proportional":
        turning = int(scaling.share * rotary_dim // 2)
        return np.where(np.arange(rotary_dim // 2) < turning, frequencies / scaling.factor, 0.0)
    return frequencies


def _yarn_borders(rotary_dim: int, theta: float, scaling: RopeScaling) -> tuple[float, float]:
    """The numbers of the pairs that turn beta_fast and beta_slow times over the original length."""

    def pair_that_turns(times: float) -> float:
        length = scaling.original_max_position_embeddings
        return rotary_dim * math.log(length / (times * 2 * math.pi)) / (2 * math.log(theta))

    low, high = pair_that_turns(scaling.beta_fast), pair_that_turns(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rotary_dim - 1)
    return low, high + 0.001 if low == high else high


def rope_factor(scaling: RopeScaling) -> float:
    """The factor on cos and sin.

    "yarn": 0.1 log(factor) + 1, or the quotient of two such numbers with mscale and mscale_all_dim before the log (Peng
    et al., section 3.4). "longrope": sqrt(1 + log(factor) / log(original length)). `attention_factor` replaces both.
    """
    if scaling.kind not in ("yarn", "longrope"):
        return 1.0
    if scaling.attention_factor is not None:
        return scaling.attention_factor
    if scaling.factor <= 1:
        return 1.0
    grown = math.log(scaling.factor)
    if scaling.kind == "longrope":
        return math.sqrt(1 + grown / math.log(scaling.original_max_position_embeddings))
    if scaling.mscale and scaling.mscale_all_dim:
        return (0.1 * scaling.mscale * grown + 1.0) / (0.1 * scaling.mscale_all_dim * grown + 1.0)
    return 0.1 * grown + 1.0


def rope_tables(
    positions_BT: jax.Array, frequencies: np.ndarray, dtype: Any, factor: float = 1.0
) -> tuple[jax.Array, jax.Array]:
    """cos and sin [B, T, H / 2] of position times frequency, times `factor`, in float32 or wider.

    Angles are rounded to float32 in any case, as in the programs that models were trained with.
    """
    wide = widen(dtype)
    angles = positions_BT.astype(wide)[..., None] * jnp.asarray(frequencies.astype(np.float32), wide)
    if wide != jnp.float32:
        angles = jax.lax.reduce_precision(angles, exponent_bits=8, mantissa_bits=23)
    return _times(jnp.cos(angles), factor), _times(jnp.sin(angles), factor)


def apply_rope(x_BTNH: jax.Array, cos_BTH: jax.Array, sin_BTH: jax.Array, interleaved: bool = False) -> jax.Array:
    """Rotates pairs (i, i + R / 2) of the first R dims of every head by the position's angles; x's dtype.

    R is twice the last dim of `cos_BTH`; with `rotary_share` 1 it is H. If `interleaved`, pairs are (2 i, 2 i + 1).
    """
    rotary_dim = 2 * cos_BTH.shape[-1]
    if rotary_dim < x_BTNH.shape[-1]:
        rotated_BTNH, kept_BTNH = x_BTNH[..., :rotary_dim], x_BTNH[..., rotary_dim:]
        return jnp.concatenate([apply_rope(rotated_BTNH, cos_BTH, sin_BTH, interleaved), kept_BTNH], axis=-1)
    cos, sin = cos_BTH[:, :, None, :], sin_BTH[:, :, None, :]
    wide = x_BTNH.astype(cos.dtype)
    if interleaved:
        first, second = wide[..., 0::2], wide[..., 1::2]
        rotated = jnp.stack([first * cos - second * sin, second * cos + first * sin], axis=-1)
        return rotated.reshape(x_BTNH.shape).astype(x_BTNH.dtype)
    first, second = jnp.split(wide, 2, axis=-1)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x_BTNH.dtype)


def gate_layer_input(gate_BTP: jax.Array, context: LayerContext, config: ModelConfig) -> jax.Array:
    """The layer's own input [B, T, P] times the activated gate."""
    assert context.layer_input_BTP is not None
    return activation(gate_BTP, config.activation) * context.layer_input_BTP


def split_gate(q_BTNE: jax.Array, config: ModelConfig) -> tuple[jax.Array, jax.Array | None]:
    """Queries [B, T, N, H] and, where attention is gated, the numbers of the gate, both from one projection."""
    if not config.features.gated_attention:
        return q_BTNE, None
    q_BTNH, gate_BTNH = jnp.split(q_BTNE, 2, axis=-1)
    return q_BTNH, gate_BTNH


def gate_heads(x_BTNH: jax.Array, gate_BTNH: jax.Array | None) -> jax.Array:
    """x times the sigmoid of the gate, where there is one."""
    return x_BTNH if gate_BTNH is None else x_BTNH * jax.nn.sigmoid(gate_BTNH)


def scale_queries(q_BTNH: jax.Array, context: LayerContext) -> jax.Array:
    """Queries times the factors of their positions, where the context has any."""
    factors_BT = context.query_scale_BT
    return q_BTNH if factors_BT is None else q_BTNH * factors_BT[..., None, None].astype(q_BTNH.dtype)


# Attention


def visible(
    query_positions: jax.Array,
    query_groups: jax.Array,
    query_branches: jax.Array,
    key_positions: jax.Array,
    key_groups: jax.Array,
    key_branches: jax.Array,
    window: int | None = None,
) -> jax.Array:
    """The one attention rule: bool [..., Tq, Tk] from int arrays [..., Tq] and [..., Tk].

    A query sees a key of its own group that is in branch 0 (the prompt) or in the query's branch, and is not later.
    With a `window` the key must also be fewer than `window` positions earlier. Padding has group -1 and sees only
    padding.
    """
    distance = query_positions[..., :, None] - key_positions[..., None, :]
    same_group = query_groups[..., :, None] == key_groups[..., None, :]
    key_branches = key_branches[..., None, :]
    readable = (key_branches == 0) | (key_branches == query_branches[..., :, None])
    mask = same_group & readable & (distance >= 0)
    return mask if window is None else mask & (distance < window)


def attention(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    mask_BTS: jax.Array,
    scale: float,
    softcap: float | None = None,
) -> jax.Array:
    """Softmax attention with grouped heads [B, T, N, H]: query heads [k * N / K, (k + 1) * N / K) read kv head k.

    Scores and softmax in float32 or wider. A query that sees no key at all gets the plain mean of the values.
    """
    num_sequences, num_tokens, num_heads, head_dim = q_BTNH.shape
    q_BTKJH = q_BTNH.reshape(num_sequences, num_tokens, k_BSKH.shape[2], -1, head_dim)
    wide = widen(q_BTNH.dtype)
    scores_BKTJS = jnp.einsum("BTKJH,BSKH->BKTJS", q_BTKJH, k_BSKH, preferred_element_type=wide)
    scores_BKTJS = soft_cap(scores_BKTJS * scale, softcap)
    scores_BKTJS = jnp.where(mask_BTS[:, None, :, None, :], scores_BKTJS, _masked_score(wide))
    weights_BKTJS = jax.nn.softmax(scores_BKTJS, axis=-1).astype(q_BTNH.dtype)
    output_BTKJH = jnp.einsum("BKTJS,BSKH->BTKJH", weights_BKTJS, v_BSKH)
    return output_BTKJH.reshape(num_sequences, num_tokens, num_heads, head_dim)


class _Partial(NamedTuple):
    """Attention over one part: the sum of values weighted by exp(score - highest), the sum of these weights, and the
    highest score.
    """

    output_BTKJH: jax.Array
    total_BTKJ: jax.Array
    highest_BTKJ: jax.Array


def attend_tokens(
    q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array, context: LayerContext, config: ModelConfig
) -> jax.Array:
    """Attention of tokens to one another [B, T, N, H], by the context's kernel."""
    assert context.attend is not None
    cap = () if config.attention_softcap is None else (config.attention_softcap,)
    return context.attend(q_BTNH, k_BTKH, v_BTKH, context.mask_BTS, config.attention_scale, *cap)


def attention_over_parts(
    q_BTNH: jax.Array, parts: Sequence[AttentionPart], scale: float, softcap: float | None = None
) -> jax.Array:
    """One softmax over the cached keys of all parts [B, T, N, H]; scores and sums in float32 or wider.

    Each part is read in place, and a shared row once for all its readers. The partial results are merged as in Dao et
    al., "Flash-Decoding", https://crfm.stanford.edu/2023/10/12/flashdecoding.html, and for shared prefixes Juravsky et
    al., "Hydragen", https://arxiv.org/abs/2402.05099.
    """
    num_sequences, num_tokens, num_heads, head_dim = q_BTNH.shape
    q_BTKJH = q_BTNH.reshape(num_sequences, num_tokens, parts[0].keys_RKHS.shape[1], -1, head_dim)
    partials = [(_attend_shared if part.rows else _attend)(q_BTKJH, part, scale, softcap) for part in parts]
    highest_BTKJ = partials[0].highest_BTKJ
    for other in partials[1:]:
        highest_BTKJ = jnp.maximum(highest_BTKJ, other.highest_BTKJ)
    output_BTKJH, total_BTKJ = 0.0, 0.0
    for part in partials:
        weight_BTKJ = jnp.exp(part.highest_BTKJ - highest_BTKJ)
        output_BTKJH += weight_BTKJ[..., None] * part.output_BTKJH
        total_BTKJ += weight_BTKJ * part.total_BTKJ
    output_BTKJH = output_BTKJH / jnp.asarray(total_BTKJ)[..., None]
    return output_BTKJH.reshape(num_sequences, num_tokens, num_heads, head_dim).astype(q_BTNH.dtype)


def take_in_shards(x: jax.Array, index: jax.Array) -> jax.Array:
    """x[index] -> [shards * n, ...], where `index` [shards, n] counts the rows of x inside each shard."""
    by_shard = x.reshape(index.shape[0], -1, *x.shape[1:])
    return jax.vmap(lambda values, picked: values[picked])(by_shard, index).reshape(-1, *x.shape[1:])


def to_readers(x: jax.Array, rows: SharedRows, num_rows: int) -> jax.Array:
    """x [B, ...] by own row -> [R, Q, ...] by shared row and reader. Rows stay in their shard."""
    return take_in_shards(x, rows.readers).reshape(num_rows, -1, *x.shape[1:])


def _attend_shared(q_BTKJH: jax.Array, part: AttentionPart, scale: float, softcap: float | None) -> _Partial:
    assert part.rows is not None
    num_rows, num_tokens = part.keys_RKHS.shape[0], q_BTKJH.shape[1]
    q_RQTKJH = to_readers(q_BTKJH, part.rows, num_rows)
    partial = _attend(q_RQTKJH.reshape(num_rows, -1, *q_BTKJH.shape[2:]), part, scale, softcap)
    partial = _Partial(*(x.reshape(-1, num_tokens, *x.shape[2:]) for x in partial))  # by row and reader [E, T, ...]
    if part.rows.places is None:
        return _merge_rows(partial, part.rows)
    return _Partial(*(take_in_shards(x, part.rows.places) for x in partial))


def _merge_rows(partial: _Partial, rows: SharedRows) -> _Partial:
    """Partials [E, T, ...] by shared row and reader -> [B, T, ...] by own row, merged over the rows that it reads.

    The sums are a product with `reads`. Gathering the few of E that an own row reads takes many times as long.
    """
    reads = rows.reads
    assert reads is not None
    num_shards, num_own, num_places = reads.shape
    dtype = partial.output_BTKJH.dtype

    def by_shard(x: jax.Array) -> jax.Array:
        return x.reshape(num_shards, num_places, *x.shape[1:])

    highest = jnp.where(reads[..., None, None, None], by_shard(partial.highest_BTKJ)[:, None], _masked_score(dtype))
    highest_BTKJ = jnp.max(highest, axis=2).reshape(num_shards * num_own, *partial.highest_BTKJ.shape[1:])
    # A place that is read has no higher score than this. The minimum keeps places that nobody reads finite.
    weight_ETKJ = jnp.exp(jnp.minimum(partial.highest_BTKJ - take_in_shards(highest_BTKJ, rows.readers), 0))

    def total(x: jax.Array) -> jax.Array:
        summed = jnp.einsum("sbe,se...->sb...", reads.astype(dtype), by_shard(x), precision="highest")
        return summed.reshape(num_shards * num_own, *x.shape[1:])

    output_BTKJH = total(weight_ETKJ[..., None] * partial.output_BTKJH)
    return _Partial(output_BTKJH, total(weight_ETKJ * partial.total_BTKJ), highest_BTKJ)


def _attend(q_RTKJH: jax.Array, part: AttentionPart, scale: float, softcap: float | None) -> _Partial:
    dtype = q_RTKJH.dtype
    wide = widen(dtype)
    # Both products take the cache as it lies, with rows and kv heads as leading batch dims.
    scores_RKTJS = jnp.einsum("RTKJH,RKHS->RKTJS", q_RTKJH, part.keys_RKHS.astype(dtype), preferred_element_type=wide)
    if part.key_scales_RKS is not None:
        scores_RKTJS = scores_RKTJS * part.key_scales_RKS[:, :, None, None]
    scores_RKTJS = soft_cap(scores_RKTJS * scale, softcap)
    scores_RKTJS = jnp.where(part.mask_RTS[:, None, :, None, :], scores_RKTJS, _masked_score(wide))
    highest_RKTJ = jnp.max(scores_RKTJS, axis=-1)
    weights_RKTJS = jnp.exp(scores_RKTJS - highest_RKTJ[..., None])
    total_RKTJ = jnp.sum(weights_RKTJS, axis=-1)
    if part.value_scales_RKS is not None:
        weights_RKTJS = weights_RKTJS * part.value_scales_RKS[:, :, None, None]
    output_RKTJH = jnp.einsum(
        "RKTJS,RKSH->RKTJH", weights_RKTJS.astype(dtype), part.values_RKSH.astype(dtype), preferred_element_type=wide
    )
    return _Partial(*(jnp.swapaxes(x, 1, 2) for x in (output_RKTJH, total_RKTJ, highest_RKTJ)))


def _masked_score(dtype: Any) -> jax.Array:
    # Finite, so that a query without any visible key gives numbers, in value and in gradient.
    return jnp.asarray(0.5 * float(jnp.finfo(dtype).min), dtype)


# What all layers of one type share


def layer_rope(config: ModelConfig, positions_BT: jax.Array, layer_type: str) -> tuple[jax.Array, jax.Array]:
    """cos and sin [B, T, R / 2] for the layers of one type; those without rotary positions turn by no angle."""
    rotated_dims, theta, scaling = config.rope_of(layer_type)
    if not has_rotary(layer_type):
        return rope_tables(positions_BT, np.zeros(rotated_dims // 2), dtype_of(config.dtype))
    frequencies = rope_frequencies(rotated_dims, theta, scaling)
    return rope_tables(positions_BT, frequencies, dtype_of(config.dtype), rope_factor(scaling))


def query_scale(config: ModelConfig, positions_BT: jax.Array, layer_type: str) -> jax.Array | None:
    """Factors on queries [B, T] by their position p: 1 + beta log(1 + floor(p / original length)); None: there are
    none.
    """
    _, _, scaling = config.rope_of(layer_type)
    if scaling.query_scale_beta is None:
        return None
    wide = widen(dtype_of(config.dtype))
    spans_BT = jnp.floor_divide(positions_BT, scaling.original_max_position_embeddings).astype(wide)
    return 1 + jnp.asarray(scaling.query_scale_beta, wide) * jnp.log1p(spans_BT)


def layer_context(
    config: ModelConfig, contexts: Mapping[str, LayerContext], inputs_LBTP: jax.Array | None, index: int
) -> LayerContext:
    """The context of one layer: that of its type, with its own input where layers have one."""
    context = contexts[config.layer_types[index]]
    return context if inputs_LBTP is None else dataclasses.replace(context, layer_input_BTP=inputs_LBTP[index])


def with_source(config: ModelConfig, index: int, context: LayerContext, read: Mapping[str, Any]) -> LayerContext:
    """The context with what a layer reads of an earlier one. `read`: {layer type: what its last layer with keys
    gave}.
    """
    if config.kv_source(index) is None:
        return context
    return dataclasses.replace(context, shared_kv=read[config.layer_types[index]])


def layer_window(config: ModelConfig, layer_type: str) -> int | None:
    """The window of a layer of this type in positions; None for full attention."""
    return config.sliding_window if has_window(layer_type) else None


def used_layer_types(config: ModelConfig) -> tuple[str, ...]:
    """The attention types that occur in the model, in a fixed order."""
    return tuple(name for name in LAYER_TYPES if name in config.layer_types)


def plain_contexts(config: ModelConfig, inputs: Inputs, attend: AttentionFn) -> dict[str, LayerContext]:
    """The context of each layer type for tokens that attend to one another, by `attend`, without a cache."""
    contexts = {}
    for layer_type in used_layer_types(config):
        mask = visible(*inputs.labels, *inputs.labels, window=layer_window(config, layer_type))
        tables = layer_rope(config, inputs.positions_BT, layer_type)
        factors_BT = query_scale(config, inputs.positions_BT, layer_type)
        contexts[layer_type] = LayerContext(*tables, mask, attend=attend, query_scale_BT=factors_BT)
    return contexts
