"""Rules of drawing that differ from request to request: one compiled program draws each slot by its own.

`rl.sampler.token_draw` compiles the rules of a call into its programs, so that a rule that is off costs nothing. Here
temperature, top-k, top-p, min-p, penalties, the minimum length and whether an EOS ends a completion are numbers of a
slot, and other numbers need no other program. A request draws the same tokens and log-probs, bit for bit, as in a call
with `DrawRules.applied_to(sampling)`. Each step therefore rounds as the compiled one: XLA multiplies by the reciprocal
of a constant, and takes the logarithm of a constant when it compiles.

A group of rules runs in steps where some slot needs it. Its cost is then that of all slots: of the penalties one pass
over the logits, of top-k and of top-p one search for a threshold each, of as many passes as a float has bits. The same
for all requests of a call: EOS ids, bias, forbidden ids, the number of most likely tokens. Stop strings are a request's
own too; the host looks for them.
Legend: B slots, V vocabulary.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rl.models.drawn_from import bias_of, is_any_of
from rl.sampler.categorical import at_least_kth, in_nucleus, inverse_cdf, take
from rl.sampler.token_draw import Draw, SamplingParams, TokenCounts, check_vocabulary, most_likely

NO_TOP_K = 2**31 - 1
CACHED = 4096  # different rules whose values the host keeps


@dataclasses.dataclass(frozen=True)
class DrawRules:
    """The rules of one request, in place of those of the same names in `SamplingParams`.

    ends_at_eos: False: EOS ids are tokens like others: they end nothing, and the minimum length forbids none.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    min_completion_length: int = 0
    ends_at_eos: bool = True
    stop_strings: tuple[str, ...] = ()

    @functools.lru_cache(CACHED)  # noqa: B019 (a rule is small)
    def applied_to(self, sampling: SamplingParams) -> SamplingParams:
        """The parameters of a call that draws all its requests by these rules. ValueError for values out of range."""
        of_call = {field.name: getattr(sampling, field.name) for field in dataclasses.fields(SamplingParams)}
        own = {field.name: getattr(self, field.name) for field in dataclasses.fields(DrawRules)}
        if not own.pop("ends_at_eos"):
            own["eos_ids"] = ()
        return SamplingParams(**{**of_call, **own})


@dataclasses.dataclass(frozen=True)
class SlotSampling(SamplingParams):
    """As `SamplingParams`, for a call or a session whose requests may have rules of their own. The rules here are those
    of requests without. `reports_kept` must be False.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.reports_kept:
            raise ValueError(
                "sampling.reports_kept must be False where requests have rules of their own, got True; the ids that "
                "could be drawn are reported by the rules of a whole call"
            )

    @classmethod
    def of(cls, sampling: SamplingParams) -> "SlotSampling":
        """These parameters, with rules by slot."""
        return cls(**{field.name: getattr(sampling, field.name) for field in dataclasses.fields(SamplingParams)})

    @property
    def is_by_slot(self) -> bool:
        return True

    @property
    def needs_counts(self) -> bool:
        return True

    @property
    def compiled(self) -> SamplingParams:
        off = {field.name: field.default for field in dataclasses.fields(DrawRules) if field.name != "ends_at_eos"}
        return dataclasses.replace(self, **off)


class RuleArrays(NamedTuple):
    """Rules as the device reads them, of requests or of slots: arrays of one shape, int32, bool or the logits' dtype.

    is_greedy: the most likely token is taken. scales: 1 / temperature; 1 where greedy. top_ks: a large number: off.
    top_ps: inf: off. log_min_ps: -inf: off. repetitions, repetition_inverses: the penalty and 1 / the penalty.
    min_lengths: tokens of a turn before an EOS; 0 where none ends the completion.
    reshapes: whether a rule changes the distribution, see `SamplingParams.reshaping_rules`; true where greedy.
    """

    is_greedy: Any
    scales: Any
    top_ks: Any
    top_ps: Any
    log_min_ps: Any
    repetitions: Any
    repetition_inverses: Any
    frequencies: Any
    presences: Any
    min_lengths: Any
    ends_at_eos: Any
    reshapes: Any


_INTEGERS, _BOOLS = ("top_ks", "min_lengths"), ("is_greedy", "ends_at_eos", "reshapes")


def rule_arrays(make: Callable[[Any], Any], dtype: Any) -> RuleArrays:
    """The arrays that `make` makes of a dtype; dtype: of the logits."""
    dtypes = dict.fromkeys(RuleArrays._fields, dtype)
    dtypes |= dict.fromkeys(_INTEGERS, np.dtype(np.int32)) | dict.fromkeys(_BOOLS, np.dtype(bool))
    return RuleArrays(**{name: make(one) for name, one in dtypes.items()})


@functools.lru_cache(CACHED)
def device_rules(sampling: SamplingParams, dtype: Any) -> RuleArrays:
    """The values of one slot. sampling: the rules of its request, see `DrawRules.applied_to`."""

    def number(value: float) -> Any:
        return np.asarray(value, dtype)

    one = number(1)
    greedy, truncates = sampling.greedy, not sampling.greedy
    return RuleArrays(
        is_greedy=greedy,
        scales=one if greedy else one / number(sampling.temperature),
        top_ks=np.int32(min(sampling.top_k, NO_TOP_K) if truncates and sampling.top_k else NO_TOP_K),
        top_ps=number(sampling.top_p if truncates and sampling.top_p < 1 else math.inf),
        log_min_ps=number(math.log(number(sampling.min_p)) if truncates and sampling.min_p > 0 else -math.inf),
        repetitions=number(sampling.repetition_penalty),
        repetition_inverses=one / number(sampling.repetition_penalty),
        frequencies=number(sampling.frequency_penalty),
        presences=number(sampling.presence_penalty),
        min_lengths=np.int32(sampling.min_completion_length if sampling.eos_ids else 0),
        ends_at_eos=bool(sampling.eos_ids),
        reshapes=greedy or bool(sampling.reshaping_rules),
    )


def neutral_rules(num_slots: int, dtype: Any) -> RuleArrays:
    """Rules of slots that draw nothing yet."""
    off = device_rules(SamplingParams(max_completion_length=1), np.dtype(dtype))
    return RuleArrays(*(jnp.full(num_slots, value) for value in off))


def draw_by_slot(
    logits_BV: jax.Array,
    uniform_B: jax.Array,
    sampling: SamplingParams,
    rules: RuleArrays,
    positions_B: jax.Array,
    live_B: jax.Array,
    counts: TokenCounts,
) -> Draw:
    """As `rl.sampler.token_draw.draw`, by the rules of each slot.

    Args:
      sampling: what is the same for all; its rules are not read. static under jit.
      rules: each [B]. positions_B: tokens that the turn has so far. live_B: the rows whose result is read.
    """
    vocab_size = logits_BV.shape[-1]
    check_vocabulary(sampling, vocab_size)
    penalises_B = (rules.repetitions != 1) | (rules.frequencies != 0) | (rules.presences != 0)
    penalises = jnp.any(penalises_B & live_B)
    adjusted_BV = jax.lax.cond(penalises, _penalize, lambda logits, *_: logits, logits_BV, rules, counts)
    if sampling.logit_bias:
        adjusted_BV = adjusted_BV + bias_of(sampling.logit_bias, vocab_size, logits_BV.dtype)
    if sampling.eos_ids:
        forbids_B1 = (positions_B < rules.min_lengths)[:, None]
        adjusted_BV = jnp.where(forbids_B1 & is_any_of(sampling.eos_ids, vocab_size), -jnp.inf, adjusted_BV)
    if sampling.forbidden_ids:
        adjusted_BV = jnp.where(is_any_of(sampling.forbidden_ids, vocab_size), -jnp.inf, adjusted_BV)
    scores_BV = _truncate(adjusted_BV * rules.scales[:, None], rules, live_B)
    token_B, sampler_total_B = inverse_cdf(scores_BV, uniform_B)
    best_B = jax.lax.cond(jnp.any(rules.is_greedy & live_B), _argmax, lambda scores: jnp.zeros_like(token_B), scores_BV)
    token_B = jnp.where(rules.is_greedy, best_B, token_B)
    scaled_BV = logits_BV * rules.scales[:, None]
    policy_total_B = jnp.where(rules.reshapes, jax.nn.logsumexp(scaled_BV, axis=-1), sampler_total_B)
    sampler_logprob_B = jnp.where(rules.is_greedy, 0, take(scores_BV, token_B) - sampler_total_B)
    policy_logprob_B = take(scaled_BV, token_B) - policy_total_B
    top_ids_BN, top_scores_BN = most_likely(scaled_BV, sampling.top_logprobs)
    top_logprobs_BN = top_scores_BN - policy_total_B[:, None] if sampling.top_logprobs else top_scores_BN
    return Draw(token_B, sampler_logprob_B, policy_logprob_B, top_ids_BN, top_logprobs_BN)


def _penalize(logits_BV: jax.Array, rules: RuleArrays, counts: TokenCounts) -> jax.Array:
    """As in `rl.sampler.token_draw.adjust`; a penalty that is off changes no bit."""
    drawn_BV = counts.completion_BV > 0
    divided_BV, multiplied_BV = logits_BV * rules.repetition_inverses[:, None], logits_BV * rules.repetitions[:, None]
    rarer_BV = jnp.where(logits_BV > 0, divided_BV, multiplied_BV)
    logits_BV = jnp.where(drawn_BV | counts.prompt_BV, rarer_BV, logits_BV)
    logits_BV = logits_BV - rules.frequencies[:, None] * counts.completion_BV.astype(logits_BV.dtype)
    return logits_BV - rules.presences[:, None] * drawn_BV.astype(logits_BV.dtype)


def _truncate(scores_BV: jax.Array, rules: RuleArrays, live_B: jax.Array) -> jax.Array:
    """As `rl.sampler.token_draw.truncate`."""

    def where_on(is_on_B: jax.Array, rule: Callable[[jax.Array], jax.Array], scores_BV: jax.Array) -> jax.Array:
        def cut(scores_BV: jax.Array) -> jax.Array:
            return jnp.where(rule(scores_BV), scores_BV, -jnp.inf)

        return jax.lax.cond(jnp.any(is_on_B & live_B), cut, lambda scores: scores, scores_BV)

    def reaches_floor(scores_BV: jax.Array) -> jax.Array:
        return scores_BV >= jnp.max(scores_BV, axis=-1, keepdims=True) + rules.log_min_ps[:, None]

    vocab_size = scores_BV.shape[-1]
    top_ks = jnp.minimum(rules.top_ks, vocab_size)
    scores_BV = where_on(top_ks < vocab_size, lambda scores: at_least_kth(scores, top_ks), scores_BV)
    scores_BV = where_on(rules.top_ps < 1, lambda scores: in_nucleus(scores, rules.top_ps), scores_BV)
    return where_on(rules.log_min_ps > -jnp.inf, reaches_floor, scores_BV)


def _argmax(scores_BV: jax.Array) -> jax.Array:
    return jnp.argmax(scores_BV, axis=-1).astype(jnp.int32)
