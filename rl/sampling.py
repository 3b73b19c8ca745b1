"""How one token is drawn from logits: `SamplingParams` and `draw`. Pure functions of arrays; no model, no loop.

Order of the rules, as in transformers: EOS forbidden (minimum length), temperature, top-k, top-p, min-p. The draw is an
inverse CDF from one uniform number per row, because threefry over [B, V] costs more than everything else here.
Legend: B sequences, V vocabulary, K blocks of the vocabulary, L lanes of a block.
"""

import dataclasses
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

# Cumulative sums run over blocks of this many tokens, then inside one: XLA's cumsum over a whole vocabulary is slow.
BLOCK_LANES = 128
# Keeps biased logits finite in float32, after the division by any sensible temperature too.
LARGEST_BIAS = 1e30


@dataclasses.dataclass(frozen=True)
class SamplingParams:
    """How completions are drawn; hashable, so that it can be a static argument; the defaults change nothing.

    max_completion_length, min_completion_length: tokens; the end (EOS, stop string) comes after at least the minimum.
    eos_ids: tokens that end a completion. stop_strings: a completion ends with the token that completes one of them.
    temperature: 0 is greedy. top_k: 0 is off. top_p: 1 is off. min_p: 0 is off.
    repetition_penalty: for tokens of the prompt or the completion so far; > 1 makes them rarer, 1 is off.
    frequency_penalty, presence_penalty: logits that a token of the completion loses per occurrence, and once; 0 is off.
    logit_bias: (token id, logits to add) pairs. forbidden_ids: tokens that are never drawn.
    top_logprobs: how many of the most likely tokens are reported at each position.
    Raises ValueError for values out of range.
    """

    max_completion_length: int
    eos_ids: tuple[int, ...] = ()
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    min_completion_length: int = 0
    stop_strings: tuple[str, ...] = ()
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    forbidden_ids: tuple[int, ...] = ()
    top_logprobs: int = 0

    def __post_init__(self) -> None:
        _require(self.temperature >= 0, "temperature", ">= 0 (0 is greedy)", self.temperature)
        _require(self.top_k >= 0, "top_k", ">= 0 (0 is off)", self.top_k)
        _require(0 < self.top_p <= 1, "top_p", "in (0, 1] (1 is off)", self.top_p)
        _require(0 <= self.min_p < 1, "min_p", "in [0, 1) (0 is off)", self.min_p)
        _require(self.max_completion_length >= 1, "max_completion_length", ">= 1", self.max_completion_length)
        _require(
            0 <= self.min_completion_length <= self.max_completion_length,
            "min_completion_length",
            f"between 0 and max_completion_length ({self.max_completion_length})",
            self.min_completion_length,
        )
        _require(isinstance(self.stop_strings, tuple), "stop_strings", "a tuple of strings", self.stop_strings)
        _require(all(self.stop_strings), "stop_strings", "non-empty strings; leave empty ones out", self.stop_strings)
        for name in ("eos_ids", "forbidden_ids"):
            ids = getattr(self, name)
            _require(isinstance(ids, tuple), name, "a tuple of token ids", ids)
            _require(all(i >= 0 for i in ids), name, "token ids >= 0", ids)
        rule = "finite and > 0 (1 is off, > 1 makes repetition rarer)"
        _require(0 < self.repetition_penalty < math.inf, "repetition_penalty", rule, self.repetition_penalty)
        for name in ("frequency_penalty", "presence_penalty"):
            value = getattr(self, name)
            _require(math.isfinite(value), name, "finite (0 is off, > 0 makes repetition rarer)", value)
        pairs = isinstance(self.logit_bias, tuple) and all(
            isinstance(p, tuple) and len(p) == 2 for p in self.logit_bias
        )
        _require(pairs, "logit_bias", "a tuple of (token id, bias) tuples", self.logit_bias)
        _require(all(i >= 0 for i, _ in self.logit_bias), "logit_bias", "on token ids >= 0", self.logit_bias)
        rule = f"finite, at most {LARGEST_BIAS:g} in size; for a token that must never come use forbidden_ids"
        _require(all(abs(bias) <= LARGEST_BIAS for _, bias in self.logit_bias), "logit_bias", rule, self.logit_bias)
        num_ids = len({token for token, _ in self.logit_bias})
        _require(num_ids == len(self.logit_bias), "logit_bias", "one bias per token id", self.logit_bias)
        _require(self.top_logprobs >= 0, "top_logprobs", ">= 0 (0 reports none)", self.top_logprobs)

    @property
    def greedy(self) -> bool:
        """Whether every token is the argmax."""
        return self.temperature == 0

    @property
    def needs_counts(self) -> bool:
        """Whether a penalty is on, so that drawing needs the tokens that came before."""
        return self.repetition_penalty != 1 or self.frequency_penalty != 0 or self.presence_penalty != 0


class Draw(NamedTuple):
    """One drawn token per row.

    sampler_logprob_B is under the distribution really drawn from; policy_logprob_B under softmax(logits / temperature).
    """

    token_B: jax.Array
    sampler_logprob_B: jax.Array
    policy_logprob_B: jax.Array


def draw(logits_BV: jax.Array, uniform_B: jax.Array, sampling: SamplingParams, forbid_eos_B: jax.Array) -> Draw:
    """Draws one token per row.

    Args:
      logits_BV: finite logits, float32 or wider; log-probs come back in this dtype.
      uniform_B: numbers in [0, 1), one per row; unused when greedy.
      sampling: the rules; static under jit.
      forbid_eos_B: bool; rows where no token of `sampling.eos_ids` may come.

    Returns:
      int32 tokens and two log-probs. Greedy: policy_logprob at temperature 1, sampler_logprob 0 (a certain choice).
      A token outside the truncated distribution, or of probability 0, never comes, whatever the uniform number.
    """
    allowed_BV = _forbid_eos(logits_BV, sampling, forbid_eos_B)
    if sampling.greedy:
        token_B = jnp.argmax(allowed_BV, axis=-1).astype(jnp.int32)
        policy_logprob_B = _take(logits_BV, token_B) - jax.nn.logsumexp(logits_BV, axis=-1)
        return Draw(token_B, jnp.zeros_like(policy_logprob_B), policy_logprob_B)
    scores_BV = truncate(allowed_BV / sampling.temperature, sampling)
    token_B, log_total_B = _inverse_cdf(scores_BV, uniform_B)
    scaled_BV = logits_BV / sampling.temperature
    # Without a rule that removes tokens both distributions are one, and the second pass over the vocabulary is saved.
    removes_tokens = sampling.top_k > 0 or sampling.top_p < 1 or sampling.min_p > 0 or _may_forbid_eos(sampling)
    policy_total_B = jax.nn.logsumexp(scaled_BV, axis=-1) if removes_tokens else log_total_B
    score_B = _take(scaled_BV, token_B)
    return Draw(token_B, score_B - log_total_B, score_B - policy_total_B)


def truncate(scores_BV: jax.Array, sampling: SamplingParams) -> jax.Array:
    """Scores (logits / temperature) with -inf for the tokens that top-k, top-p and min-p remove, in this order.

    Each rule sees the distribution that the one before left, renormalised. Tokens that tie with the last one kept stay,
    so the result does not depend on an order among equals. The most likely token always stays.
    """
    if 0 < sampling.top_k < scores_BV.shape[-1]:
        kth_B1 = jax.lax.top_k(scores_BV, sampling.top_k)[0][:, -1:]
        scores_BV = jnp.where(scores_BV >= kth_B1, scores_BV, -jnp.inf)
    if sampling.top_p < 1:
        scores_BV = jnp.where(_in_nucleus(scores_BV, sampling.top_p), scores_BV, -jnp.inf)
    if sampling.min_p > 0:
        floor_B1 = jnp.max(scores_BV, axis=-1, keepdims=True) + jnp.log(jnp.asarray(sampling.min_p, scores_BV.dtype))
        scores_BV = jnp.where(scores_BV >= floor_B1, scores_BV, -jnp.inf)
    return scores_BV


def _in_nucleus(scores_BV: jax.Array, top_p: float) -> jax.Array:
    """The smallest set of most likely tokens whose probability is at least top_p (https://arxiv.org/abs/1904.09751).

    Bisects the threshold over the ordered bit patterns of the floats, which is exact after as many steps as a float has
    bits; on CPU about ten times faster than sorting a vocabulary.
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

    # low: tokens at least this likely carry top_p (or it is the least likely token); high: they do not.
    bounds = jnp.min(order_BV, axis=-1), jnp.max(order_BV, axis=-1) + 1
    low_B, _ = jax.lax.fori_loop(0, num_bits, halve, bounds)
    return order_BV >= low_B[:, None]


def _ordered_bits(x: jax.Array) -> jax.Array:
    """Signed integers that compare as the floats do."""
    integer = jnp.dtype(f"int{jnp.finfo(x.dtype).bits}")
    bits = jax.lax.bitcast_convert_type(x, integer)
    return jnp.where(bits >= 0, bits, bits ^ jnp.iinfo(integer).max)


def _inverse_cdf(scores_BV: jax.Array, uniform_B: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The token at which the running sum of exp(scores) passes uniform * total, and log(total).

    Two levels: first the block, then the lane. Weights of the vocabulary are summed but never stored.
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
    before_B = _take(cumulative_BK, block_B) - _take(block_weights_BK, block_B)
    lane_scores_BL = jnp.take_along_axis(scores_BKL, block_B[:, None, None], axis=1)[:, 0]
    weights_BL = jnp.exp(lane_scores_BL - highest_B[:, None])
    lane_B = _first_above(weights_BL, jnp.cumsum(weights_BL, axis=-1), target_B - before_B)
    return block_B * BLOCK_LANES + lane_B, highest_B + jnp.log(total_B)


def _first_above(weights_BN: jax.Array, cumulative_BN: jax.Array, target_B: jax.Array) -> jax.Array:
    """First index of positive weight whose running sum passes the target; the last such weight if rounding hides it."""
    positive_BN = weights_BN > 0
    hit_BN = positive_BN & (cumulative_BN > target_B[:, None])
    last_B = weights_BN.shape[-1] - 1 - jnp.argmax(positive_BN[:, ::-1], axis=-1)
    return jnp.where(jnp.any(hit_BN, axis=-1), jnp.argmax(hit_BN, axis=-1), last_B).astype(jnp.int32)


def _may_forbid_eos(sampling: SamplingParams) -> bool:
    return sampling.min_completion_length > 0 and bool(sampling.eos_ids)


def _forbid_eos(logits_BV: jax.Array, sampling: SamplingParams, forbid_eos_B: jax.Array) -> jax.Array:
    if not _may_forbid_eos(sampling):
        return logits_BV
    is_eos_V = jnp.isin(jnp.arange(logits_BV.shape[-1]), jnp.asarray(sampling.eos_ids))
    return jnp.where(forbid_eos_B[:, None] & is_eos_V, -jnp.inf, logits_BV)


def _take(values_BN: jax.Array, index_B: jax.Array) -> jax.Array:
    return jnp.take_along_axis(values_BN, index_B[:, None], axis=-1)[:, 0]


def _require(holds: bool, name: str, rule: str, value: object) -> None:
    if not holds:
        raise ValueError(f"sampling.{name} must be {rule}, got {value!r}")
