"""Draws from categorical distributions given as rows of scores: an inverse CDF, and the nucleus of top-p.

In: scores (logarithms of weights up to a constant; -inf for weight 0), and one uniform number for each row. Out: token
ids, the logarithm of the total weight, masks. Built for vocabularies of 10^5 tokens: nothing is sorted. Not here: which
rules change the scores (`rl.sampler.token_draw`).
Legend: B rows, V vocabulary, K blocks of the vocabulary, L lanes of a block, N entries of any kind.
"""

import jax
import jax.numpy as jnp

# Cumulative sums run over blocks of this many tokens, then inside one block, because XLA's cumsum over a whole
# vocabulary is slow.
BLOCK_LANES = 128


def in_nucleus(scores_BV: jax.Array, top_p: float | jax.Array) -> jax.Array:
    """The smallest set of most likely tokens whose probability is at least top_p (https://arxiv.org/abs/1904.09751).
    top_p may be [B], one for each row; inf keeps all.

    Bisects the threshold over the ordered bit patterns of floats. This is exact after as many steps as a float has
    bits, and on CPU about ten times faster than sorting a vocabulary.
    """
    num_bits = jnp.finfo(scores_BV.dtype).bits
    probs_BV = jax.nn.softmax(scores_BV, axis=-1)
    order_BV = _ordered_bits(scores_BV)

    def halve(_: int, bounds: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        low_B, high_B = bounds
        middle_B = (low_B & high_B) + ((low_B ^ high_B) >> 1)  # the average, without overflow
        mass_B = jnp.sum(jnp.where(order_BV >= middle_B[:, None], probs_BV, 0), axis=-1)
        enough_B = mass_B >= top_p
        return jnp.where(enough_B, middle_B, low_B), jnp.where(enough_B, high_B, middle_B)

    # low: tokens at least this likely have probability top_p or more together (or low is the least likely token). high:
    # they have less.
    bounds = jnp.min(order_BV, axis=-1), jnp.max(order_BV, axis=-1) + 1
    low_B, _ = jax.lax.fori_loop(0, num_bits, halve, bounds)
    return order_BV >= low_B[:, None]


def at_least_kth(scores_BV: jax.Array, k_B: jax.Array) -> jax.Array:
    """Which scores are at least the k-th highest one of their row; k_B: int32 in [1, V].

    The threshold is bisected as in `in_nucleus`, so rows may have different numbers.
    """
    num_bits = jnp.finfo(scores_BV.dtype).bits
    order_BV = _ordered_bits(scores_BV)

    def halve(_: int, bounds: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        low_B, high_B = bounds
        middle_B = (low_B & high_B) + ((low_B ^ high_B) >> 1)
        enough_B = jnp.sum(order_BV >= middle_B[:, None], axis=-1, dtype=jnp.int32) >= k_B
        return jnp.where(enough_B, middle_B, low_B), jnp.where(enough_B, high_B, middle_B)

    bounds = jnp.min(order_BV, axis=-1), jnp.max(order_BV, axis=-1) + 1
    low_B, _ = jax.lax.fori_loop(0, num_bits, halve, bounds)
    bits_B = jnp.where(low_B >= 0, low_B, low_B ^ jnp.iinfo(low_B.dtype).max)
    return scores_BV >= jax.lax.bitcast_convert_type(bits_B, scores_BV.dtype)[:, None]  # -0 reaches 0


def _ordered_bits(x: jax.Array) -> jax.Array:
    """Signed integers in the order of the floats."""
    integer = jnp.dtype(f"int{jnp.finfo(x.dtype).bits}")
    bits = jax.lax.bitcast_convert_type(x, integer)
    return jnp.where(bits >= 0, bits, bits ^ jnp.iinfo(integer).max)


def inverse_cdf(scores_BV: jax.Array, uniform_B: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The token at which the running sum of exp(scores) passes uniform * total, and log(total).

    Two levels: first the block, then the lane. Weights are summed but never stored. Scores without a distribution (NaN
    or inf) still give a token of the vocabulary.
    """
    padding = -scores_BV.shape[-1] % BLOCK_LANES
    padded_BV = jnp.pad(scores_BV, ((0, 0), (0, padding)), constant_values=-jnp.inf)
    scores_BKL = padded_BV.reshape(scores_BV.shape[0], -1, BLOCK_LANES)
    highest_B = jnp.max(scores_BV, axis=-1)
    block_weights_BK = jnp.sum(jnp.exp(scores_BKL - highest_B[:, None, None]), axis=-1)
    cumulative_BK = jnp.cumsum(block_weights_BK, axis=-1)
    total_B = cumulative_BK[:, -1]
    target_B = uniform_B * total_B
    block_B = _first_above(block_weights_BK, cumulative_BK, target_B)
    before_B = take(cumulative_BK - block_weights_BK, block_B)
    lane_scores_BL = jnp.take_along_axis(scores_BKL, block_B[:, None, None], axis=1)[:, 0]
    weights_BL = jnp.exp(lane_scores_BL - highest_B[:, None])
    lane_B = _first_above(weights_BL, jnp.cumsum(weights_BL, axis=-1), target_B - before_B)
    # Without a positive weight the lane is the last one, which may be padding.
    token_B = jnp.minimum(block_B * BLOCK_LANES + lane_B, scores_BV.shape[-1] - 1)
    return token_B, highest_B + jnp.log(total_B)


def _first_above(weights_BN: jax.Array, cumulative_BN: jax.Array, target_B: jax.Array) -> jax.Array:
    """The first index with positive weight whose running sum passes the target. The last positive weight if rounding
    keeps every sum below it.
    """
    positive_BN = weights_BN > 0
    hit_BN = positive_BN & (cumulative_BN > target_B[:, None])
    last_B = weights_BN.shape[-1] - 1 - jnp.argmax(positive_BN[:, ::-1], axis=-1)
    return jnp.where(jnp.any(hit_BN, axis=-1), jnp.argmax(hit_BN, axis=-1), last_B).astype(jnp.int32)


def take(values_BN: jax.Array, index_B: jax.Array) -> jax.Array:
    """The value of each row at its own index."""
    return jnp.take_along_axis(values_BN, index_B[:, None], axis=-1)[:, 0]
