"""Layers with a state: the gated delta rule over packed rows with shared prompts, and over a cache.

In: queries, keys, values and gates of tokens, with the labels of `rl.models.inputs`, or a state from before. Out: what
the layer reads of its state at each token. Pure functions; the modules are in the twins.

A token's state follows from the tokens that it sees, its path, as attention does (`ops.visible`). With key k, value v,
log decay g <= 0 and step beta in (0, 1) of a head, the state S [key dim, value dim] after a token is S' + k u^T, where
S' = exp(g) S is the decayed state before it and u = beta (v - S'^T k). A query reads S^T q (Yang, Kautz, Hatamizadeh,
"Gated Delta Networks", https://arxiv.org/abs/2412.06464, section 3). Tokens are computed in chunks, as there. What
differs is the path: a row holds a prompt and its branches, one after the other, and a chunk may begin anywhere. Two
states are carried from chunk to chunk: the *last* one, after the token before the chunk, and that of the newest prompt.
A token starts from the last one where it sees that token, else from the prompt's where it sees the prompt of its group
before the chunk, else from zero. The cost is linear in the length of a row.

Legend: B rows, T token positions, N chunks, C and S tokens of a chunk, G key heads, J value heads per key head, H value
heads, K key dim, V value dim, W tokens that the convolution reads, X channels.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from rl.models.config import LINEAR_ATTENTION, ModelConfig
from rl.models.inputs import PADDING_GROUP, Inputs
from rl.models.ops import rms_norm, visible, widen

CHUNK = 64
_SMALL = 16  # the largest triangle that is inverted at once
_NORM_EPS = 1e-6  # of queries and keys, whatever the model's `norm_eps`

_einsum = functools.partial(jnp.einsum, precision="highest")
_matmul = functools.partial(jnp.matmul, precision="highest")


class LayerState(NamedTuple):
    """What one layer with a state has of each row.

    Attributes:
      state: [B, H, K, V], in float32 or wider.
      conv: [B, W - 1, X], the newest inputs of the convolution, the oldest first, in the compute dtype.
    """

    state: jax.Array
    conv: jax.Array


class Gates(NamedTuple):
    """What turns the numbers of the two gates into decay and step: A_log and dt_bias, each [H]."""

    a_log: jax.Array
    dt_bias: jax.Array


@struct.dataclass
class PathContext:
    """What layers with a state share: the paths of the tokens.

    Attributes:
      is_live_BT: whether a token is none of padding, which leaves the state as it is.
      ancestors_DBT: the place in the row of the token that is d + 1 before a token on its path; -1: there is none.
      sees_BNCC: whether a token sees another of its chunk.
      from_last_BNC, from_prompt_BNC: whether a token starts from the last state, or from the prompt's.
      is_prompt_end_BNC: the newest token of a prompt in the chunk.

    With a cache each row is one path, live tokens first, and all but `is_live_BT` are None.
    """

    is_live_BT: jax.Array
    ancestors_DBT: jax.Array | None = None
    sees_BNCC: jax.Array | None = None
    from_last_BNC: jax.Array | None = None
    from_prompt_BNC: jax.Array | None = None
    is_prompt_end_BNC: jax.Array | None = None


# Paths


def plain_context(config: ModelConfig, inputs: Inputs) -> dict[str, Any]:
    """{layer type: context} for tokens that see one another; {} for a model without states."""
    if not config.is_recurrent:
        return {}
    positions_BT, groups_BT, branches_BT = inputs.labels
    num_tokens = groups_BT.shape[1]
    is_live_BT = groups_BT != PADDING_GROUP
    places_T = jnp.arange(num_tokens, dtype=jnp.int32)
    # The newest token of a prompt at or before each place.
    ends_BT = jax.lax.cummax(jnp.where((branches_BT == 0) & is_live_BT, places_T, -1), axis=1)
    of_end_BT = jnp.take_along_axis(groups_BT, jnp.maximum(ends_BT, 0), axis=1)
    ends_BT = jnp.where((ends_BT >= 0) & (of_end_BT == groups_BT), ends_BT, -1)

    before = tuple(jnp.pad(x, ((0, 0), (1, 0)), constant_values=PADDING_GROUP)[:, :-1] for x in inputs.labels)
    follows_BT = _sees_one(inputs.labels, before) & is_live_BT
    parents_BT = jnp.where(follows_BT, places_T - 1, jnp.where(ends_BT == places_T, -1, ends_BT))
    ancestors = [parents_BT]
    while len(ancestors) < config.linear_conv_kernel_dim - 1:
        further_BT = jnp.take_along_axis(parents_BT, jnp.maximum(ancestors[-1], 0), axis=1)
        ancestors.append(jnp.where(ancestors[-1] < 0, -1, further_BT))

    chunk = min(CHUNK, num_tokens)
    positions_BNC = _chunked(positions_BT, chunk)
    groups_BNC, branches_BNC = _chunked(groups_BT, chunk, PADDING_GROUP), _chunked(branches_BT, chunk)
    labels_BNC = positions_BNC, groups_BNC, branches_BNC
    ends_BNC = _chunked(ends_BT, chunk, -1)
    starts_N = jnp.arange(groups_BNC.shape[1], dtype=jnp.int32) * chunk
    before_BN = tuple(x[:, starts_N] for x in before)  # before[t] is the label of the token before t
    from_last_BNC = _sees_one(labels_BNC, tuple(x[..., None] for x in before_BN)) & (groups_BNC != PADDING_GROUP)
    from_prompt_BNC = ~from_last_BNC & (ends_BNC >= 0) & (ends_BNC < starts_N[:, None])
    is_prompt_BNC = (branches_BNC == 0) & (groups_BNC != PADDING_GROUP)
    newest_BN1 = jnp.max(jnp.where(is_prompt_BNC, jnp.arange(chunk), -1), axis=-1, keepdims=True)
    context = PathContext(
        is_live_BT=is_live_BT,
        ancestors_DBT=jnp.stack(ancestors),
        sees_BNCC=visible(*labels_BNC, *labels_BNC),
        from_last_BNC=from_last_BNC,
        from_prompt_BNC=from_prompt_BNC,
        is_prompt_end_BNC=newest_BN1 == jnp.arange(chunk),
    )
    return {LINEAR_ATTENTION: context}


def cached_context(config: ModelConfig, inputs: Inputs) -> dict[str, Any]:
    """{layer type: context} for tokens that go on from the states of a cache; {} for a model without states."""
    return {LINEAR_ATTENTION: PathContext(inputs.group_ids_BT != PADDING_GROUP)} if config.is_recurrent else {}


def _sees_one(labels: tuple[jax.Array, ...], other: tuple[jax.Array, ...]) -> jax.Array:
    """Whether tokens see the one beside them in `other`."""
    (q_positions, q_groups, q_branches), (k_positions, k_groups, k_branches) = (
        [x[..., None] for x in of_tokens] for of_tokens in (labels, other)
    )
    return visible(q_positions, q_groups, q_branches, k_positions, k_groups, k_branches)[..., 0, 0]


def _chunked(x_BT: jax.Array, chunk: int, fill: int = 0) -> jax.Array:
    """[B, T, ...] -> [B, N, C, ...], filled up at the end."""
    num_rows, num_tokens = x_BT.shape[:2]
    padding = [(0, 0), (0, -num_tokens % chunk), *((0, 0) for _ in x_BT.shape[2:])]
    return jnp.pad(x_BT, padding, constant_values=fill).reshape(num_rows, -1, chunk, *x_BT.shape[2:])


# The layer


def mix(
    qkv: tuple[jax.Array, jax.Array, jax.Array],
    a_BTH: jax.Array,
    b_BTH: jax.Array,
    taps: tuple[jax.Array, jax.Array, jax.Array],
    gates: Gates,
    context: PathContext,
    before: LayerState | None,
) -> tuple[jax.Array, LayerState | None]:
    """What a layer reads of its state at each token, [B, T, H, V] in the compute dtype.

    Args:
      qkv: projections [B, T, G, K], [B, T, G, K], [B, T, H, V], before the convolution.
      a_BTH, b_BTH: what decay and step follow from.
      taps: of the convolution of each, [heads, dim, W], the token's own last.
      before: the state that tokens go on from; None: they see one another alone.

    Returns:
      The output, and the state after the last live token of each row, where one was given.
    """
    dtype, wide = qkv[0].dtype, widen(qkv[0].dtype)
    shapes = [x.shape[2:] for x in qkv]
    flat = [x.reshape(*x.shape[:2], -1) for x in qkv]
    taps_XW = [x.reshape(-1, x.shape[-1]).astype(wide) for x in taps]
    after = None
    if before is None:
        assert context.ancestors_DBT is not None
        mixed = [_convolve_paths(x, w, context.ancestors_DBT) for x, w in zip(flat, taps_XW, strict=True)]
    else:
        window_BTX = jnp.concatenate([before.conv, jnp.concatenate(flat, axis=-1)], axis=1)
        after = LayerState(before.state, _newest(window_BTX, context.is_live_BT, before.conv.shape[1]))
        sizes = np.cumsum([x.shape[-1] for x in flat])[:-1].tolist()
        parts = jnp.split(window_BTX, sizes, axis=-1)
        mixed = [_convolve(x, w, a_BTH.shape[1]) for x, w in zip(parts, taps_XW, strict=True)]
    q, k, v = (jax.nn.silu(x).reshape(*x.shape[:2], *shape) for x, shape in zip(mixed, shapes, strict=True))
    q, k = _normalised(q) * q.shape[-1] ** -0.5, _normalised(k)
    is_live_BT1 = context.is_live_BT[..., None]
    decay_H = -jnp.exp(gates.a_log.astype(wide))
    g_BTH = jnp.where(is_live_BT1, decay_H * jax.nn.softplus(a_BTH.astype(wide) + gates.dt_bias.astype(wide)), 0)
    beta_BTH = jnp.where(is_live_BT1, jax.nn.sigmoid(b_BTH.astype(wide)), 0)
    out, state = gated_delta_rule(q, k, v, g_BTH, beta_BTH, context, None if before is None else before.state)
    return out.astype(dtype), None if after is None else after._replace(state=state)


def gate_output(out_BTHV: jax.Array, z_BTHV: jax.Array, scale_V: jax.Array, config: ModelConfig) -> jax.Array:
    """out / rms(out) times scale times silu(z), in each head; z's dtype. As in transformers it is rounded before the
    gate.
    """
    wide = widen(z_BTHV.dtype)
    scaled = rms_norm(out_BTHV, None, config) * scale_V.astype(z_BTHV.dtype)
    return (scaled.astype(wide) * jax.nn.silu(z_BTHV.astype(wide))).astype(z_BTHV.dtype)


def _normalised(x: jax.Array) -> jax.Array:
    return x * jax.lax.rsqrt(jnp.sum(jnp.square(x), axis=-1, keepdims=True) + _NORM_EPS)


# The convolution: each channel over the newest tokens of the path


def _convolve_paths(x_BTX: jax.Array, taps_XW: jax.Array, ancestors_DBT: jax.Array) -> jax.Array:
    wide = taps_XW.dtype
    result = x_BTX.astype(wide) * taps_XW[:, -1]
    for d, places_BT in enumerate(ancestors_DBT):
        earlier_BTX = jax.vmap(lambda x, places: x[places])(x_BTX, jnp.maximum(places_BT, 0)).astype(wide)
        result += jnp.where(places_BT[..., None] >= 0, earlier_BTX, 0) * taps_XW[:, -2 - d]
    return result


def _convolve(window_BTX: jax.Array, taps_XW: jax.Array, num_tokens: int) -> jax.Array:
    """Over whole rows, whose first W - 1 places are from before."""
    wide = taps_XW.dtype
    parts = (window_BTX[:, i : i + num_tokens].astype(wide) * taps_XW[:, i] for i in range(taps_XW.shape[1]))
    return functools.reduce(jnp.add, parts)


def _newest(window_BTX: jax.Array, is_live_BT: jax.Array, count: int) -> jax.Array:
    """The newest `count` inputs of each row, of which the first `count` of the window are from before."""
    num_live_B = jnp.sum(is_live_BT, axis=1, dtype=jnp.int32)
    return jax.vmap(lambda row, first: jax.lax.dynamic_slice_in_dim(row, first, count))(window_BTX, num_live_B)


# The rule


def gated_delta_rule(
    q_BTGK: jax.Array,
    k_BTGK: jax.Array,
    v_BTHV: jax.Array,
    g_BTH: jax.Array,
    beta_BTH: jax.Array,
    context: PathContext,
    state_BHKV: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """(outputs [B, T, H, V], the state after the last token [B, H, K, V]), all in one dtype of at least float32.

    The key heads [h * H / G, (h + 1) * H / G) ... share key head h. Padding has g 0 and beta 0. The formulas are in the
    module's docstring.
    """
    num_rows, num_tokens, num_key_heads, key_dim = k_BTGK.shape
    value_dim = v_BTHV.shape[-1]
    by_key = (num_key_heads, v_BTHV.shape[2] // num_key_heads)
    if state_BHKV is not None and num_tokens == 1:
        return _step(q_BTGK, k_BTGK, v_BTHV, g_BTH, beta_BTH, state_BHKV)
    chunk = min(CHUNK, num_tokens)

    def heads_first(x_BTH: jax.Array) -> jax.Array:
        """[B, T, H, ...] -> [N, B, G, J, C, ...]."""
        x = _chunked(x_BTH, chunk)
        x = x.reshape(*x.shape[:3], *by_key, *x.shape[4:])
        return jnp.moveaxis(x, (0, 1, 2, 3, 4), (1, 0, 4, 2, 3))

    q, k = (jnp.moveaxis(_chunked(x, chunk), (0, 1, 2, 3), (1, 0, 3, 2)) for x in (q_BTGK, k_BTGK))  # [N, B, G, C, K]
    v, beta, g = (heads_first(x) for x in (v_BTHV, beta_BTH, g_BTH))
    has_paths = context.sees_BNCC is not None
    if context.sees_BNCC is not None:
        sees = jnp.moveaxis(context.sees_BNCC, 1, 0)
        sums = _einsum("NBCS,NBGJS->NBGJC", sees.astype(g.dtype), g)
        sees = sees[:, :, None, None]
    else:
        sees, sums = jnp.tril(jnp.ones((chunk, chunk), bool)), jnp.cumsum(g, axis=-1)
    decay = jnp.where(sees, jnp.exp(jnp.where(sees, sums[..., :, None] - sums[..., None, :], 0)), 0)
    products = _einsum("NBGCK,NBGSK->NBGCS", k, k)[:, :, :, None]
    strict = jnp.tril(jnp.ones((chunk, chunk), bool), -1)
    inverse = _inverse(jnp.where(strict, beta[..., None] * decay * products, 0))
    read = decay * _einsum("NBGCK,NBGSK->NBGCS", q, k)[:, :, :, None]
    grown = jnp.exp(sums)  # the decay of the state from before

    def starts(mask_BNC: jax.Array | None) -> jax.Array:
        assert mask_BNC is not None
        return jnp.moveaxis(mask_BNC, 1, 0)[:, :, None, None].astype(g.dtype) * grown

    from_last = starts(context.from_last_BNC) if has_paths else grown
    xs: dict[str, Any] = {"q": q, "k": k, "v": beta[..., None] * v, "beta": beta, "inverse": inverse, "read": read}
    xs |= {"from_last": from_last, "to_last": decay[..., -1, :]}
    zero = jnp.zeros((num_rows, *by_key, key_dim, value_dim), g.dtype)
    if has_paths:
        end = jnp.moveaxis(context.is_prompt_end_BNC, 1, 0)[:, :, None, None].astype(g.dtype)  # pyright: ignore[reportArgumentType, reportCallIssue]
        xs |= {"from_prompt": starts(context.from_prompt_BNC), "end": end}
        xs |= {"to_prompt": jnp.sum(end[..., None] * decay, axis=-2)}
    carry = zero if state_BHKV is None else state_BHKV.reshape(zero.shape), zero
    step = jax.checkpoint(_chunk_step, prevent_cse=False)
    (last, _), out = jax.lax.scan(step, carry, xs)
    out = jnp.moveaxis(out, (0, 1, 2, 3, 4), (1, 0, 3, 4, 2)).reshape(num_rows, -1, v_BTHV.shape[2], value_dim)
    return out[:, :num_tokens], last.reshape(num_rows, -1, key_dim, value_dim)


def _chunk_step(carry: tuple[jax.Array, jax.Array], x: dict[str, Any]) -> tuple[tuple[jax.Array, jax.Array], jax.Array]:
    """One chunk of all rows and heads. Arrays are [B, G, J, C, ...]; queries and keys have no J."""
    last, prompt = carry

    def reads(name: str, vectors_BGCK: jax.Array) -> jax.Array:
        """What vectors read of the state that each token starts from, decayed up to the token."""
        found = x["from_last"][..., None] * _matmul(vectors_BGCK[:, :, None], last)
        if "from_prompt" in x:
            found += x["from_prompt"][..., None] * _matmul(vectors_BGCK[:, :, None], prompt)
        return found

    updates = _matmul(x["inverse"], x["v"] - x["beta"][..., None] * reads("k", x["k"]))
    out = reads("q", x["q"]) + _matmul(x["read"], updates)

    def state_at(of_last: jax.Array, of_prompt: jax.Array | None, weights_BGJC: jax.Array) -> jax.Array:
        added = _matmul(jnp.swapaxes(x["k"], -1, -2)[:, :, None], weights_BGJC[..., None] * updates)
        found = of_last[..., None, None] * last + added
        return found if of_prompt is None else found + of_prompt[..., None, None] * prompt

    if "from_prompt" not in x:
        return (state_at(x["from_last"][..., -1], None, x["to_last"]), prompt), out
    new_last = state_at(x["from_last"][..., -1], x["from_prompt"][..., -1], x["to_last"])
    at_end = [jnp.sum(x["end"] * x[name], axis=-1) for name in ("from_last", "from_prompt")]
    has_end = jnp.any(x["end"] > 0, axis=-1)[..., None, None]
    new_prompt = jnp.where(has_end, state_at(at_end[0], at_end[1], x["to_prompt"]), prompt)
    return (new_last, new_prompt), out


def _step(
    q_B1GK: jax.Array,
    k_B1GK: jax.Array,
    v_B1HV: jax.Array,
    g_B1H: jax.Array,
    beta_B1H: jax.Array,
    state_BHKV: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """One token of each row."""
    repeats = v_B1HV.shape[2] // k_B1GK.shape[2]
    q_BHK, k_BHK = (jnp.repeat(x[:, 0], repeats, axis=1) for x in (q_B1GK, k_B1GK))
    state_BHKV = state_BHKV * jnp.exp(g_B1H[:, 0])[..., None, None]
    update_BHV = beta_B1H[:, 0, :, None] * (v_B1HV[:, 0] - _einsum("BHKV,BHK->BHV", state_BHKV, k_BHK))
    state_BHKV = state_BHKV + k_BHK[..., None] * update_BHV[..., None, :]
    return _einsum("BHKV,BHK->BHV", state_BHKV, q_BHK)[:, None], state_BHKV


@jax.custom_vjp
def _inverse(lower: jax.Array) -> jax.Array:
    """(1 + lower)^-1 of strictly lower triangles [..., C, C], by forward substitution of blocks.

    Each block is computed from the inverses of the two on its diagonal. Powers of `lower` would grow without bound
    where keys are alike.
    """
    size = lower.shape[-1]
    if size <= _SMALL or size % 2:
        return _small_inverse(lower)
    half = size // 2
    diagonal = jnp.stack([lower[..., :half, :half], lower[..., half:, half:]])
    first, second = _inverse(diagonal)
    corner = -_matmul(_matmul(second, lower[..., half:, :half]), first)
    upper = jnp.concatenate([first, jnp.zeros_like(first)], axis=-1)
    return jnp.concatenate([upper, jnp.concatenate([corner, second], axis=-1)], axis=-2)


def _small_inverse(lower: jax.Array) -> jax.Array:
    """Row by row: the row i of the inverse is e_i minus the row i of `lower` times the rows before."""
    size = lower.shape[-1]
    rows = jnp.broadcast_to(jnp.eye(size, dtype=lower.dtype), lower.shape)
    for i in range(1, size):
        row = rows[..., i, :] - _einsum("...S,...SC->...C", lower[..., i, :i], rows[..., :i, :])
        rows = rows.at[..., i, :].set(row)
    return rows


def _inverse_forward(lower: jax.Array) -> tuple[jax.Array, jax.Array]:
    result = _inverse(lower)
    return result, result


def _inverse_backward(result: jax.Array, gradient: jax.Array) -> tuple[jax.Array]:
    transposed = jnp.swapaxes(result, -1, -2)
    return (-jnp.tril(_matmul(_matmul(transposed, gradient), transposed), -1),)


_inverse.defvjp(_inverse_forward, _inverse_backward)
