"""How one token is drawn from logits: `SamplingParams`, `TokenCounts` and `draw`. Pure functions; no model, no loop.

Order of the rules: repetition penalty, frequency and presence penalty, logit bias, EOS forbidden (minimum length),
forbidden ids; then temperature, top-k, top-p, min-p. The last four come as in transformers
(https://huggingface.co/docs/transformers/internal/generation_utils). transformers and vLLM
(https://docs.vllm.ai/en/v0.22.1/api/vllm/v1/sample/sampler/) add a bias before the penalties. Here it comes after them,
so a bias of x always moves a logit by x. A rule that is off costs nothing.

The draw is an inverse CDF (`rl.sampler.categorical`) of one uniform number for each row, because threefry over [B, V]
would cost more than everything else here. Not here: how counts live through a decode loop, and stop strings
(`rl.sampler.slot_sampler`).
Legend: B sequences, V vocabulary, N most likely tokens, X words of `rl.models.drawn_from`.
"""

import dataclasses
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rl.models.drawn_from import MAX_ENDS, DrawnFrom, bias_of, bits_to_words, ids_to_words, is_any_of, marked
from rl.sampler.categorical import in_nucleus, inverse_cdf, take

# Keeps biased logits finite in float32, also after the division by any sensible temperature.
LARGEST_BIAS = 1e30
LEAST_TEMPERATURE = 1e-6


@dataclasses.dataclass(frozen=True)
class SamplingParams:
    """How completions are drawn; hashable, so that it can be a static argument; the defaults change nothing.

    max_completion_length, min_completion_length: tokens; the end (EOS, stop string) comes after at least the minimum.
    eos_ids: tokens that end a completion. stop_strings: a completion ends with the token that completes one of them.
    temperature: 0 is greedy, else at least 1e-6. top_k: 0 is off. top_p: 1 is off. min_p: 0 is off.
    repetition_penalty: for tokens of the prompt or the completion so far; > 1 makes them rarer, 1 is off.
    frequency_penalty, presence_penalty: subtracted from a token's logit for each time the completion holds it, and
      once; 0 is off.
    logit_bias: pairs of a token id and the number added to its logit. forbidden_ids: tokens that are never drawn.
    top_logprobs: the number of most likely tokens that are reported at each position.
    reports_kept: report which ids could be drawn at each position, see `rl.models.drawn_from`; of ids that tie with the
      last one that top-k keeps, the lowest then stay, so that there are at most top_k. Not with penalties, nor greedy.
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
    reports_kept: bool = False

    def __post_init__(self) -> None:
        _require(self.temperature >= 0, "temperature", ">= 0 (0 is greedy)", self.temperature)
        rule = f"0 (greedy) or >= {LEAST_TEMPERATURE:g}, below which scores overflow"
        _require(self.temperature == 0 or self.temperature >= LEAST_TEMPERATURE, "temperature", rule, self.temperature)
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
        entries = self.logit_bias if isinstance(self.logit_bias, tuple) else (None,)
        are_pairs = all(isinstance(entry, tuple) and len(entry) == 2 for entry in entries)
        _require(are_pairs, "logit_bias", "a tuple of (token id, bias) tuples", self.logit_bias)
        _require(all(i >= 0 for i, _ in self.logit_bias), "logit_bias", "on token ids >= 0", self.logit_bias)
        rule = f"finite, at most {LARGEST_BIAS:g} in size; for a token that must never come use forbidden_ids"
        _require(all(abs(bias) <= LARGEST_BIAS for _, bias in self.logit_bias), "logit_bias", rule, self.logit_bias)
        num_ids = len({token for token, _ in self.logit_bias})
        _require(num_ids == len(self.logit_bias), "logit_bias", "one bias per token id", self.logit_bias)
        _require(self.top_logprobs >= 0, "top_logprobs", ">= 0 (0 reports none)", self.top_logprobs)
        if self.reports_kept:
            self._check_reports_kept()

    def _check_reports_kept(self) -> None:
        way_out = "with grpo.policy_distribution=sampled"
        _require(not self.greedy, "temperature", f"> 0 {way_out}", self.temperature)
        for name, off in (("repetition_penalty", 1.0), ("frequency_penalty", 0.0), ("presence_penalty", 0.0)):
            rule = f"{off} {way_out}, which does not compute penalties again from the tokens before (or set it to full)"
            _require(getattr(self, name) == off, name, rule, getattr(self, name))
        rule = (
            f"at most {MAX_ENDS} ids {way_out} and a sampling.min_completion_length, unless top_k, top_p or min_p is on"
        )
        _require(not self.drawn_from.holds_ends or len(self.eos_ids) <= MAX_ENDS, "eos_ids", rule, self.eos_ids)

    @property
    def greedy(self) -> bool:
        """Whether every token is the argmax."""
        return self.temperature == 0

    @property
    def needs_counts(self) -> bool:
        """Whether a penalty is on, so that drawing needs the tokens that came before."""
        return self.repetition_penalty != 1 or self.frequency_penalty != 0 or self.presence_penalty != 0

    @property
    def is_by_slot(self) -> bool:
        """Whether requests may have rules of their own, see `rl.sampler.slot_rules`."""
        return False

    @property
    def compiled(self) -> "SamplingParams":
        """What programs depend on."""
        return self

    @property
    def drawn_from(self) -> DrawnFrom:
        """The rules besides penalties and temperature, as `rl.models.drawn_from` takes them."""
        return DrawnFrom.of(self, _may_forbid_eos(self))

    def num_kept_words(self, vocab_size: int) -> int:
        """X, words of each token that say which ids could be drawn; 0 where none are reported, or needed."""
        return self.drawn_from.num_words(vocab_size) if self.reports_kept else 0

    @property
    def reshaping_rules(self) -> tuple[str, ...]:
        """Names of the active rules that change the distribution from softmax(logits / temperature)."""
        on = {
            "repetition_penalty": self.repetition_penalty != 1,
            "frequency_penalty": self.frequency_penalty != 0,
            "presence_penalty": self.presence_penalty != 0,
            "logit_bias": bool(self.logit_bias),
            "min_completion_length": _may_forbid_eos(self),
            "forbidden_ids": bool(self.forbidden_ids),
            "top_k": self.top_k > 0,
            "top_p": self.top_p < 1,
            "min_p": self.min_p > 0,
        }
        return tuple(name for name, is_on in on.items() if is_on)


class TokenCounts(NamedTuple):
    """The earlier tokens of each row, for the penalties.

    completion_BV: int32, how often each token was drawn so far. prompt_BV: bool, whether the prompt holds it.
    """

    completion_BV: jax.Array
    prompt_BV: jax.Array


class Draw(NamedTuple):
    """One drawn token for each row, and the `sampling.top_logprobs` most likely tokens, the most likely first.

    sampler_logprob_B is under the distribution that was drawn from. policy_logprob_B and top_logprobs_BN are under
    softmax(logits / temperature) of the unchanged logits (temperature 1 when greedy). Ids are int32.
    kept_words_BX: uint32, which ids could be drawn; None where `SamplingParams.num_kept_words` is 0.
    """

    token_B: jax.Array
    sampler_logprob_B: jax.Array
    policy_logprob_B: jax.Array
    top_ids_BN: jax.Array
    top_logprobs_BN: jax.Array
    kept_words_BX: jax.Array | None = None


def draw(
    logits_BV: jax.Array,
    uniform_B: jax.Array,
    sampling: SamplingParams,
    forbid_eos_B: jax.Array,
    counts: TokenCounts | None = None,
) -> Draw:
    """Draws one token for each row.

    Args:
      logits_BV: finite logits, float32 or wider; log-probs have this dtype. Logits that are not finite give some token
        of the vocabulary with a policy_logprob that is not finite.
      uniform_B: numbers in [0, 1), one for each row; unused when greedy.
      sampling: the rules; static under jit.
      forbid_eos_B: bool; rows in which no token of `sampling.eos_ids` may be drawn.
      counts: the earlier tokens; read only when `sampling.needs_counts`.

    Returns:
      Tokens and log-probs. Greedy: the argmax after penalties, bias and forbidden ids, with sampler_logprob 0 (a
      certain choice). A token outside the truncated distribution, or with probability 0, is never drawn.

    Raises:
      ValueError: at trace time: counts are missing; an id of the bias or of forbidden_ids is not in the vocabulary; no
        token is left; top_logprobs is larger than the vocabulary.
    """
    check_vocabulary(sampling, logits_BV.shape[-1])
    adjusted_BV = _forbid(adjust(logits_BV, sampling, counts), sampling, forbid_eos_B)
    kept_words_BX = None
    if sampling.greedy:
        scaled_BV = logits_BV
        token_B = jnp.argmax(adjusted_BV, axis=-1).astype(jnp.int32)
        policy_total_B = jax.nn.logsumexp(logits_BV, axis=-1)
        policy_logprob_B = take(logits_BV, token_B) - policy_total_B
        sampler_logprob_B = jnp.zeros_like(policy_logprob_B)
    else:
        scores_BV = adjusted_BV / sampling.temperature
        if sampling.num_kept_words(logits_BV.shape[-1]):
            scores_BV, kept_words_BX = _truncate_and_report(scores_BV, sampling, forbid_eos_B)
        else:
            scores_BV = truncate(scores_BV, sampling)
        token_B, sampler_total_B = inverse_cdf(scores_BV, uniform_B)
        scaled_BV = logits_BV / sampling.temperature
        # Where both distributions are the same, this saves the second pass over the vocabulary.
        moves_logits = sampling.needs_counts or bool(sampling.logit_bias)
        policy_total_B = jax.nn.logsumexp(scaled_BV, axis=-1) if sampling.reshaping_rules else sampler_total_B
        policy_score_B = take(scaled_BV, token_B)
        sampler_score_B = take(scores_BV, token_B) if moves_logits else policy_score_B
        sampler_logprob_B = sampler_score_B - sampler_total_B
        policy_logprob_B = policy_score_B - policy_total_B
    top_ids_BN, top_scores_BN = most_likely(scaled_BV, sampling.top_logprobs)
    top_logprobs_BN = top_scores_BN - policy_total_B[:, None] if sampling.top_logprobs else top_scores_BN
    return Draw(token_B, sampler_logprob_B, policy_logprob_B, top_ids_BN, top_logprobs_BN, kept_words_BX)


def check_vocabulary(sampling: SamplingParams, vocab_size: int) -> None:
    """ValueError for rules that a vocabulary of this size cannot have, see `draw`."""
    _require(
        sampling.top_logprobs <= vocab_size, "top_logprobs", f"<= vocabulary ({vocab_size})", sampling.top_logprobs
    )
    for name, ids in (
        ("forbidden_ids", sampling.forbidden_ids),
        ("logit_bias", [token for token, _ in sampling.logit_bias]),
    ):
        outside = sorted({token for token in ids if token >= vocab_size})
        _require(not outside, name, f"on token ids below the vocabulary's size ({vocab_size})", outside)
    never = {*sampling.forbidden_ids, *(sampling.eos_ids if _may_forbid_eos(sampling) else ())}
    num_never = sum(token < vocab_size for token in never)
    rule = f"fewer, with the EOS ids that a minimum length forbids, than the {vocab_size} tokens of the vocabulary"
    _require(num_never < vocab_size, "forbidden_ids", rule, num_never)


def add_token(counts: TokenCounts, token_B: jax.Array, live_B: jax.Array) -> TokenCounts:
    """Counts one more drawn token in every row where live_B (bool) is true."""

    def add(count_V: jax.Array, token: jax.Array, live: jax.Array) -> jax.Array:
        return count_V.at[token].add(live.astype(count_V.dtype))

    return counts._replace(completion_BV=jax.vmap(add)(counts.completion_BV, token_B, live_B))


def reset_rows(
    counts: TokenCounts, rows_B: jax.Array, prompt_BV: jax.Array, completion_BV: jax.Array | int = 0
) -> TokenCounts:
    """Resets the rows where rows_B (bool) is true: the tokens of prompt_BV (bool) in the prompt, completion_BV (int32)
    of each token in the completion.
    """
    reset_B1 = rows_B[:, None]
    return TokenCounts(
        completion_BV=jnp.where(reset_B1, completion_BV, counts.completion_BV),
        prompt_BV=jnp.where(reset_B1, prompt_BV, counts.prompt_BV),
    )


def adjust(logits_BV: jax.Array, sampling: SamplingParams, counts: TokenCounts | None) -> jax.Array:
    """Logits after the penalties and the bias, in this order, in the same dtype. No token is removed yet.

    The repetition penalty divides positive logits and multiplies the others, once for a token however often it occurred
    (https://arxiv.org/abs/1909.05858, section 4.1, with the sign rule of transformers). The frequency and presence
    penalties look at the completion only: logit - count * frequency - [count > 0] * presence
    (https://platform.openai.com/docs/guides/text-generation).

    Raises:
      ValueError: a penalty is on and counts are None.
    """
    if sampling.needs_counts:
        if counts is None:
            raise ValueError("draw must be given counts (TokenCounts) when a penalty is on, got None")
        logits_BV = _penalize(logits_BV, sampling, counts)
    if sampling.logit_bias:
        logits_BV = logits_BV + bias_of(sampling.logit_bias, logits_BV.shape[-1], logits_BV.dtype)
    return logits_BV


def truncate(scores_BV: jax.Array, sampling: SamplingParams) -> jax.Array:
    """Scores (logits / temperature) with -inf for the tokens that top-k, top-p and min-p remove, in this order.

    Each rule sees the renormalised distribution that the rule before left. Tokens that tie with the last kept one are
    kept, so the result does not depend on an order among equals. The most likely token is always kept.
    """
    if 0 < sampling.top_k < scores_BV.shape[-1]:
        kth_B1 = jax.lax.top_k(scores_BV, sampling.top_k)[0][:, -1:]
        scores_BV = jnp.where(scores_BV >= kth_B1, scores_BV, -jnp.inf)
    if sampling.top_p < 1:
        scores_BV = jnp.where(in_nucleus(scores_BV, sampling.top_p), scores_BV, -jnp.inf)
    if sampling.min_p > 0:
        floor_B1 = jnp.max(scores_BV, axis=-1, keepdims=True) + jnp.log(jnp.asarray(sampling.min_p, scores_BV.dtype))
        scores_BV = jnp.where(scores_BV >= floor_B1, scores_BV, -jnp.inf)
    return scores_BV


def _truncate_and_report(
    scores_BV: jax.Array, sampling: SamplingParams, forbid_eos_B: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """`truncate`, and the words that say which ids are left."""
    drawn_from, vocab_size = sampling.drawn_from, scores_BV.shape[-1]
    if drawn_from.holds_ends:
        ends = [token for token in sampling.eos_ids if token < vocab_size]
        ends_K = jnp.asarray(ends + [-1] * (MAX_ENDS - len(ends)), jnp.int32)
        return scores_BV, ids_to_words(ends_K, forbid_eos_B[:, None] & (ends_K >= 0))
    if drawn_from.holds_ids(vocab_size):
        _, ids_BK = jax.lax.top_k(scores_BV, sampling.top_k)  # among equals the lowest id comes first
        everywhere_BK = jnp.ones_like(ids_BK, bool)
        scores_BV = jnp.where(marked(ids_to_words(ids_BK, everywhere_BK), vocab_size), scores_BV, -jnp.inf)
        scores_BV = truncate(scores_BV, dataclasses.replace(sampling, top_k=0, reports_kept=False))
        return scores_BV, ids_to_words(ids_BK, jnp.take_along_axis(scores_BV, ids_BK, axis=-1) > -jnp.inf)
    scores_BV = truncate(scores_BV, sampling)
    return scores_BV, bits_to_words(scores_BV > -jnp.inf)


def _penalize(logits_BV: jax.Array, sampling: SamplingParams, counts: TokenCounts) -> jax.Array:
    drawn_BV = counts.completion_BV > 0
    if sampling.repetition_penalty != 1:
        penalty = sampling.repetition_penalty
        rarer_BV = jnp.where(logits_BV > 0, logits_BV / penalty, logits_BV * penalty)
        logits_BV = jnp.where(drawn_BV | counts.prompt_BV, rarer_BV, logits_BV)
    if sampling.frequency_penalty != 0:
        logits_BV = logits_BV - sampling.frequency_penalty * counts.completion_BV.astype(logits_BV.dtype)
    if sampling.presence_penalty != 0:
        logits_BV = logits_BV - sampling.presence_penalty * drawn_BV.astype(logits_BV.dtype)
    return logits_BV


def _may_forbid_eos(sampling: SamplingParams) -> bool:
    return sampling.min_completion_length > 0 and bool(sampling.eos_ids)


def _forbid(logits_BV: jax.Array, sampling: SamplingParams, forbid_eos_B: jax.Array) -> jax.Array:
    """-inf for EOS in rows where forbid_eos_B is true, and for the forbidden ids in all rows."""
    if _may_forbid_eos(sampling):
        is_eos_V = jnp.isin(jnp.arange(logits_BV.shape[-1]), jnp.asarray(sampling.eos_ids))
        logits_BV = jnp.where(forbid_eos_B[:, None] & is_eos_V, -jnp.inf, logits_BV)
    if sampling.forbidden_ids:
        logits_BV = jnp.where(is_any_of(sampling.forbidden_ids, logits_BV.shape[-1]), -jnp.inf, logits_BV)
    return logits_BV


def most_likely(scores_BV: jax.Array, num_tokens: int) -> tuple[jax.Array, jax.Array]:
    """Ids and scores of the highest scores, in falling order. Among equals the lowest id comes first."""
    if num_tokens == 0:
        empty = np.zeros((scores_BV.shape[0], 0))  # a constant, so that nothing is computed
        return jnp.asarray(empty, jnp.int32), jnp.asarray(empty, scores_BV.dtype)
    top_scores_BN, top_ids_BN = jax.lax.top_k(scores_BV, num_tokens)
    return top_ids_BN, top_scores_BN


def _require(holds: bool, name: str, rule: str, value: object) -> None:
    if not holds:
        raise ValueError(f"sampling.{name} must be {rule}, got {value!r}")
