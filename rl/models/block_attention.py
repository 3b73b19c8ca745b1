"""Attention of packed rows in plain operations, which computes only blocks of scores in which a query sees a key.

In: queries, keys and values of packed rows, and the boolean mask of `ops.visible`. Out: the result of `ops.attention`.
A row costs what its prompts and completions cost, not its length squared. No array of all scores exists: a block of
queries meets its visible blocks of keys one after the other, with a running softmax, and the backward pass computes the
scores again. After Dao et al., "FlashAttention", https://arxiv.org/abs/2205.14135, algorithms 1 and 4, and Dao,
"FlashAttention-2", https://arxiv.org/abs/2307.08691.

Legend: B rows, T positions, I blocks of positions, P positions of a block, N query heads, K kv heads, J = N / K,
M = P * J queries of a block and kv head, S keys of a block, H head dim.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from rl.models.ops import attention, soft_cap, widen

BLOCK = 64  # positions; 96 to 192 skip less and were slower on CPUs
# On accelerators, where each round of a loop costs the start of its kernels (on a GPU also a wait for the host): a
# sixteenth of the rounds.
LARGE_BLOCK = 256

# The name, in compiled programs, of the loop over the key blocks that a block of queries sees.
KEY_BLOCK_LOOP = "visible key blocks"


class _Visible(NamedTuple):
    """Which blocks are computed.

    mask_BTT: bool, padded to whole blocks.
    order_II: int32, for each block of queries: first the blocks of keys in which a query sees a key, then the others.
    count_I: int32, for each block of queries: the number of blocks of keys in which a query sees a key.
    """

    mask_BTT: jax.Array
    order_II: jax.Array
    count_I: jax.Array


def block_attention(
    q_BTNH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    mask_BTT: jax.Array,
    scale: float,
    softcap: float | None = None,
    block: int = BLOCK,
) -> jax.Array:
    """`ops.attention` of packed rows [B, T, N, H], in which every query must see a key.

    Scores and sums are float32 or wider. A block is computed for all rows if a query of any row sees one of its keys.

    Args:
      softcap: scores x become softcap tanh(x / softcap); None: they stay.
      block: positions of a block.
    """
    (num_rows, num_tokens, num_heads, head_dim), num_kv_heads = q_BTNH.shape, k_BTKH.shape[2]
    if num_tokens <= block:
        return attention(q_BTNH, k_BTKH, v_BTKH, mask_BTT, scale, softcap)
    added = -num_tokens % block
    mask_BTT = jnp.pad(mask_BTT, ((0, 0), (0, added), (0, added)))
    num_blocks = (num_tokens + added) // block
    mask_BIPIS = jnp.reshape(mask_BTT, (num_rows, num_blocks, block, num_blocks, block))
    seen_II = jnp.any(mask_BIPIS, axis=(0, 2, 4))
    order_II = jnp.argsort(~seen_II, axis=1, stable=True).astype(jnp.int32)
    visible = _Visible(mask_BTT, order_II, jnp.sum(seen_II, axis=1, dtype=jnp.int32))

    def blocks(x_BTXH: jax.Array) -> jax.Array:
        """[I, B, K, P * X / K, H], so that the block of one product lies together."""
        x_BTXH = jnp.pad(x_BTXH, ((0, 0), (0, added), (0, 0), (0, 0)))
        x_BIPKJH = jnp.reshape(x_BTXH, (num_rows, num_blocks, block, num_kv_heads, -1, head_dim))
        return jnp.transpose(x_BIPKJH, (1, 0, 3, 2, 4, 5)).reshape(num_blocks, num_rows, num_kv_heads, -1, head_dim)

    output_IBKMH: Any = _attend(blocks(q_BTNH), blocks(k_BTKH), blocks(v_BTKH), visible, scale, softcap)
    output_IBKPJH = output_IBKMH.reshape(num_blocks, num_rows, num_kv_heads, block, -1, head_dim)
    output_BTNH = jnp.transpose(output_IBKPJH, (1, 0, 3, 2, 4, 5)).reshape(num_rows, -1, num_heads, head_dim)
    return output_BTNH[:, :num_tokens]


@partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _attend(
    q_IBKMH: jax.Array,
    k_IBKSH: jax.Array,
    v_IBKSH: jax.Array,
    visible: _Visible,
    scale: float,
    softcap: float | None,
) -> jax.Array:
    return _forward(q_IBKMH, k_IBKSH, v_IBKSH, visible, scale, softcap)[0]


def _forward(
    q_IBKMH: jax.Array,
    k_IBKSH: jax.Array,
    v_IBKSH: jax.Array,
    visible: _Visible,
    scale: float,
    softcap: float | None,
) -> tuple[jax.Array, tuple]:
    wide = widen(q_IBKMH.dtype)
    sums_BKM1 = jax.ShapeDtypeStruct((*q_IBKMH.shape[1:4], 1), wide)

    def query_block(i: jax.Array, outputs: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        q_BKMH = q_IBKMH[i]

        def key_block(n: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
            output_BKMH, total_BKM1, highest_BKM1 = carry
            j = visible.order_II[i, n]
            scores_BKMS, mask_BKMS = _scores(q_BKMH, k_IBKSH[j], visible, i, j, scale, softcap)
            new_highest_BKM1 = jnp.maximum(highest_BKM1, jnp.max(scores_BKMS, axis=-1, keepdims=True))
            weights_BKMS = jnp.where(mask_BKMS, jnp.exp(scores_BKMS - new_highest_BKM1), 0)
            kept_BKM1 = jnp.exp(highest_BKM1 - new_highest_BKM1)
            added_BKMH = _product("BKMS,BKSH->BKMH", weights_BKMS.astype(q_BKMH.dtype), v_IBKSH[j])
            total_BKM1 = total_BKM1 * kept_BKM1 + jnp.sum(weights_BKMS, axis=-1, keepdims=True)
            return output_BKMH * kept_BKM1 + added_BKMH, total_BKM1, new_highest_BKM1

        start = (
            jnp.zeros(q_BKMH.shape, wide),
            jnp.zeros(sums_BKM1.shape, wide),
            jnp.full(sums_BKM1.shape, jnp.finfo(wide).min, wide),
        )
        with jax.named_scope(KEY_BLOCK_LOOP):
            output_BKMH, total_BKM1, highest_BKM1 = jax.lax.fori_loop(0, visible.count_I[i], key_block, start)
        # Padding of the last block sees nothing.
        total_BKM1 = jnp.where(total_BKM1 > 0, total_BKM1, 1)
        written = (output_BKMH / total_BKM1, highest_BKM1 + jnp.log(total_BKM1))
        return jax.tree.map(lambda all_, one: all_.at[i].set(one.astype(all_.dtype)), outputs, written)

    num_blocks = q_IBKMH.shape[0]
    empty = (jnp.zeros_like(q_IBKMH), jnp.zeros((num_blocks, *sums_BKM1.shape), wide))
    output_IBKMH, log_total_IBKM1 = _over_blocks(num_blocks, query_block, empty)
    return output_IBKMH, (q_IBKMH, k_IBKSH, v_IBKSH, visible, output_IBKMH, log_total_IBKM1)


def _backward(
    scale: float, softcap: float | None, residuals: tuple, grad_IBKMH: jax.Array
) -> tuple[jax.Array | None, ...]:
    q_IBKMH, k_IBKSH, v_IBKSH, visible, output_IBKMH, log_total_IBKM1 = residuals
    dtype, wide = q_IBKMH.dtype, log_total_IBKM1.dtype
    drift_IBKM1 = jnp.sum(grad_IBKMH.astype(wide) * output_IBKMH.astype(wide), axis=-1, keepdims=True)

    def query_block(i: jax.Array, grads: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        q_BKMH, grad_BKMH = q_IBKMH[i], grad_IBKMH[i]

        def key_block(n: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
            grad_q_BKMH, grad_k_IBKSH, grad_v_IBKSH = carry
            j = visible.order_II[i, n]
            scores_BKMS, mask_BKMS = _scores(q_BKMH, k_IBKSH[j], visible, i, j, scale, softcap)
            weights_BKMS = jnp.where(mask_BKMS, jnp.exp(scores_BKMS - log_total_IBKM1[i]), 0)
            slopes_BKMS = _product("BKMH,BKSH->BKMS", grad_BKMH, v_IBKSH[j])
            slopes_BKMS = weights_BKMS * (slopes_BKMS - drift_IBKM1[i]) * scale
            if softcap is not None:  # d cap tanh(x / cap) / d x; masked scores have weight 0, and must stay finite
                slopes_BKMS *= 1 - jnp.square(jnp.where(mask_BKMS, scores_BKMS, 0) / softcap)
            slopes_BKMS = slopes_BKMS.astype(dtype)
            grad_q_BKMH += _product("BKMS,BKSH->BKMH", slopes_BKMS, k_IBKSH[j])
            grad_k_BKSH = _product("BKMS,BKMH->BKSH", slopes_BKMS, q_BKMH)
            grad_v_BKSH = _product("BKMS,BKMH->BKSH", weights_BKMS.astype(dtype), grad_BKMH)
            return grad_q_BKMH, grad_k_IBKSH.at[j].add(grad_k_BKSH), grad_v_IBKSH.at[j].add(grad_v_BKSH)

        grad_q_IBKMH, *of_keys = grads
        with jax.named_scope(KEY_BLOCK_LOOP):
            grad_q_BKMH, *of_keys = jax.lax.fori_loop(
                0, visible.count_I[i], key_block, (jnp.zeros(q_BKMH.shape, wide), *of_keys)
            )
        return grad_q_IBKMH.at[i].set(grad_q_BKMH.astype(dtype)), *of_keys

    start = (jnp.zeros_like(q_IBKMH), jnp.zeros(k_IBKSH.shape, wide), jnp.zeros(v_IBKSH.shape, wide))
    grad_q, grad_k, grad_v = _over_blocks(q_IBKMH.shape[0], query_block, start)
    return grad_q, grad_k.astype(dtype), grad_v.astype(dtype), None


def _over_blocks(num_blocks: int, body: Callable[[jax.Array, Any], Any], carry: Any) -> Any:
    """carry = body(i, carry) for every block. i is int32, in 64-bit mode too."""
    return jax.lax.fori_loop(0, num_blocks, lambda i, carry: body(i.astype(jnp.int32), carry), carry)


_attend.defvjp(_forward, _backward)


def _scores(
    q_BKMH: jax.Array,
    k_BKSH: jax.Array,
    visible: _Visible,
    i: jax.Array,
    j: jax.Array,
    scale: float,
    softcap: float | None,
) -> tuple[jax.Array, jax.Array]:
    """Scores [B, K, M, S] of a block of queries with a block of keys, and their mask. Where the mask is False, the
    score is the lowest number.
    """
    (num_rows, num_kv_heads, num_queries, _), block = q_BKMH.shape, k_BKSH.shape[2]
    mask_BPS = jax.lax.dynamic_slice(visible.mask_BTT, (jnp.int32(0), i * block, j * block), (num_rows, block, block))
    mask_BKMS = jnp.broadcast_to(
        mask_BPS[:, None, :, None], (num_rows, num_kv_heads, block, num_queries // block, block)
    ).reshape(num_rows, num_kv_heads, num_queries, block)
    scores_BKMS = soft_cap(_product("BKMH,BKSH->BKMS", q_BKMH, k_BKSH) * scale, softcap)
    return jnp.where(mask_BKMS, scores_BKMS, jnp.finfo(scores_BKMS.dtype).min), mask_BKMS


def _product(dims: str, x: jax.Array, y: jax.Array) -> jax.Array:
    return jnp.einsum(dims, x, y, preferred_element_type=widen(x.dtype))
