"""GRPO-style losses over per-token log-probs: pure functions, (inputs) -> (loss, metrics).

In: log-probs of completion tokens (policy, old, reference, sampler), a mask, advantages, and denominators that were
counted over the whole minibatch of one update. Out: a scalar and sums from which the metrics are finished. A minibatch
may be cut into pieces (micro-batches of whole rows) in any way: the losses of the pieces add up to the loss of the
minibatch, gradients too, because nothing here divides by a count of the piece. Not here: log-probs from hidden states
(`logprobs`), advantages (`advantages`), gradients and accumulation (the training step).

Values are those of TRL 1.16 (https://github.com/huggingface/trl, trl/trainer/grpo_trainer.py), tested against numbers
computed with it. Papers:

- grpo: https://arxiv.org/abs/2402.03300 (DeepSeekMath)    - dr_grpo: https://arxiv.org/abs/2503.20783
- dapo: https://arxiv.org/abs/2503.14476                   - luspo: https://arxiv.org/abs/2602.05261
- cispo: https://arxiv.org/abs/2506.13585 (MiniMax-M1)     - sapo: https://arxiv.org/abs/2511.20347
- vespo: https://arxiv.org/abs/2602.10693                  - bnpo: grpo with the token mean of the minibatch
- sequence-level ratio (GSPO): https://arxiv.org/abs/2507.18071
- delta, the dual clip: https://arxiv.org/abs/2505.07291 (INTELLECT-2), after https://arxiv.org/abs/1912.09729
- entropy quantile: https://arxiv.org/abs/2506.01939       - off-policy mask and bias-corrected KL:
- KL estimators: http://joschu.net/blog/kl-approx.html       https://arxiv.org/abs/2512.02556 (DeepSeek-V3.2)
- adaptive entropy bonus: https://arxiv.org/abs/2505.22312 (Skywork-OR1)

On-policy with centred advantages the policy loss is 0 although its gradient is not: the ratio is 1 there.

Shapes: B sequences, T token positions; _B1 means one value for each sequence, _BX means [B, T] or [B, 1].
"""

import dataclasses
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.lax import stop_gradient

IMPORTANCE_SAMPLING_LEVELS = ("token", "sequence")
SAMPLER_IS_MODES = ("token_truncate", "token_mask", "sequence_truncate", "sequence_mask")
VESPO_LOG_FLOOR = math.log(1e-8)
VESPO_LOG_CEILING = 20.0
VESPO_MIN_LAMBDA = 1e-4


@dataclasses.dataclass(frozen=True, kw_only=True)
class LossConfig:
    """Everything that selects and shapes a loss. Hashable, so that it can be a static argument of jit."""

    loss_type: str  # a key of LOSS_TYPES
    importance_sampling_level: str  # "token" or "sequence": what one policy ratio belongs to
    beta: float  # weight of the KL term; 0 leaves it out
    kl_estimator: str  # a key of KL_ESTIMATORS
    use_bias_correction_kl: bool  # multiply the KL estimate by the policy ratio, gradient included
    epsilon: float  # lower clip: ratios are cut at 1 - epsilon
    epsilon_high: float | None  # upper clip: 1 + epsilon_high; for cispo the cap itself; None: same as epsilon
    delta: float | None  # cap of the unclipped ratio; None: no cap
    top_entropy_quantile: float  # share of tokens, highest entropy first, that carry the policy term; 1: all
    off_policy_mask_threshold: float | None  # drop sequences with A < 0 that drifted more than this; None: off
    sampler_is_correction: bool  # multiply by the ratio of old to sampler probabilities
    sampler_is_mode: str  # one of SAMPLER_IS_MODES
    sampler_is_clip_min: float | None  # None: no lower bound
    sampler_is_clip_max: float | None  # None: no upper bound
    entropy_coef: float  # weight of the entropy bonus (its first value, where it adapts)
    use_adaptive_entropy: bool  # steer the coefficient so that the entropy stays near entropy_target
    entropy_target: float  # nats per token
    entropy_coef_delta: float  # change of the coefficient per update
    entropy_coef_min: float
    entropy_coef_max: float
    sapo_temperature_pos: float
    sapo_temperature_neg: float
    vespo_k_pos: float
    vespo_lambda_pos: float
    vespo_k_neg: float
    vespo_lambda_neg: float
    max_completion_length: int  # constant divisor of dr_grpo, in tokens

    @property
    def has_entropy_bonus(self) -> bool:
        return self.entropy_coef != 0 or self.use_adaptive_entropy

    @property
    def selects_by_entropy(self) -> bool:
        return self.top_entropy_quantile < 1

    @property
    def upper_epsilon(self) -> float:
        return self.epsilon if self.epsilon_high is None else self.epsilon_high


class LossInputs(NamedTuple):
    """Constants of the loss: no gradient flows into them. Values where the mask is 0 are arbitrary, NaN included."""

    old_logprobs_BT: jax.Array | None  # before the first update on these completions; None: the policy's own, now
    reference_logprobs_BT: jax.Array | None  # needed if beta != 0
    sampler_logprobs_BT: jax.Array | None  # when drawn; NaN where the sampler has no value
    mask_BT: jax.Array  # 1 (or True) for the tokens that are trained on
    advantages_B: jax.Array
    sequence_mask_B: jax.Array  # 1 for a real sequence, even an empty one; 0 for a row that only fills a bucket


class Denominators(NamedTuple):
    """Scalars of the whole minibatch of one update, equal for each of its pieces. See `denominators_for`."""

    num_sequences: jax.Array  # real rows
    num_tokens: jax.Array  # sum of the mask
    num_entropy_tokens: jax.Array  # tokens selected by the entropy quantile
    entropy_threshold: jax.Array  # nats; -inf where no quantile is taken
    num_items_in_batch: jax.Array  # tokens of the whole rollout batch, over all processes
    gradient_accumulation_steps: jax.Array
    steps_per_generation: jax.Array
    num_processes: jax.Array
    entropy_coef: jax.Array  # the coefficient in force during this update


class MetricSums(NamedTuple):
    """Metrics of a piece in a form that merges exactly: ratios as numerator and weight, totals, extremes."""

    numerators: dict[str, jax.Array]
    weights: dict[str, jax.Array]
    totals: dict[str, jax.Array]
    maxima: dict[str, jax.Array]
    minima: dict[str, jax.Array]


class _Rows(NamedTuple):
    """Inputs of one piece in one dtype, with every value where the mask is 0 replaced by a harmless one."""

    logprobs_BT: jax.Array  # carries the gradient
    old_BT: jax.Array
    log_ratio_BT: jax.Array
    ratio_BX: jax.Array
    advantages_B1: jax.Array
    mask_BT: jax.Array  # bool
    lengths_B1: jax.Array  # at least 1
    sampler_ratio_BX: jax.Array | None


def validate_loss_config(config: LossConfig) -> None:
    """Refuse values and combinations that have no meaning.

    Raises:
        ValueError: naming the field, the rule, the value and the way out.
    """
    choices = (
        ("loss_type", tuple(LOSS_TYPES)),
        ("importance_sampling_level", IMPORTANCE_SAMPLING_LEVELS),
        ("kl_estimator", tuple(KL_ESTIMATORS)),
        ("sampler_is_mode", SAMPLER_IS_MODES),
    )
    for name, allowed in choices:
        if getattr(config, name) not in allowed:
            raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {getattr(config, name)!r}")
    infinity = float("inf")
    ranges = (
        ("beta", 0, infinity, "0 turns the KL term off"),
        ("epsilon", 0, infinity, "0.2 is usual, 3e-4 at sequence level"),
        ("epsilon_high", 0, infinity, "null means the same as epsilon"),
        ("delta", 0, infinity, "null turns the cap off"),
        ("top_entropy_quantile", 0, 1, "1 keeps every token"),
        ("sampler_is_clip_min", 0, infinity, "null means no lower bound"),
        ("sampler_is_clip_max", 0, infinity, "null means no upper bound"),
        ("entropy_coef_delta", 0, infinity, "0 keeps the coefficient as it is"),
        ("max_completion_length", 1, infinity, "it is the constant divisor of dr_grpo"),
    )
    for name, low, high, hint in ranges:
        value = getattr(config, name)
        if value is not None and not low <= value <= high:
            raise ValueError(f"{name} must be in [{low}, {high}], got {value}; {hint}")
    for name in ("sapo_temperature_pos", "sapo_temperature_neg"):
        if not getattr(config, name) > 0:
            raise ValueError(f"{name} must be above 0, got {getattr(config, name)}; 1.0 is usual")
    for low, high in (("sampler_is_clip_min", "sampler_is_clip_max"), ("entropy_coef_min", "entropy_coef_max")):
        low_value, high_value = getattr(config, low), getattr(config, high)
        if low_value is not None and high_value is not None and low_value > high_value:
            raise ValueError(f"{low} must not be above {high}, got {low_value} > {high_value}; exchange them")
    if config.loss_type == "vespo" and config.sampler_is_correction and config.sampler_is_mode.startswith("sequence"):
        raise ValueError(
            f"sampler_is_mode must be token_truncate or token_mask with loss_type vespo, which builds its own "
            f"sequence weight from token ratios, got {config.sampler_is_mode}; or set sampler_is_correction to false"
        )
    if config.beta != 0 and config.kl_estimator == "k1" and not config.use_bias_correction_kl:
        raise ValueError(
            "kl_estimator must be k2 or k3 while use_bias_correction_kl is false, got k1: the expected gradient of k1 "
            "alone is zero, so it would regularise nothing; or set use_bias_correction_kl to true"
        )


def _saturating_exp(x: jax.Array, function: Callable[[jax.Array], jax.Array] = jnp.exp) -> jax.Array:
    """exp (or expm1) that stays finite: exact up to about e^40 in float32 (e^350 in float64), constant above.

    An infinite ratio in the branch that a minimum does not choose would give 0 * inf = NaN in the gradient.
    """
    limit = (
        math.log(float(jnp.finfo(x.dtype).max)) / 2 - 4
    )  # the product of two saturated values, summed, is finite too
    return function(jnp.minimum(x, limit))


def importance_ratio(log_ratio_BT: jax.Array, mask_BT: jax.Array, level: str) -> jax.Array:
    """Ratio of policy to old probabilities: [B, T] for level "token", [B, 1] (length-normalised) for "sequence".

    The gradient flows through the masked mean at sequence level. Masked log-ratios must be finite.
    """
    if level == "token":
        return _saturating_exp(log_ratio_BT)
    total_B1 = jnp.sum(jnp.where(mask_BT, log_ratio_BT, 0), axis=1, keepdims=True)
    return _saturating_exp(total_B1 / _lengths(mask_BT, log_ratio_BT.dtype))


def sampler_ratio(
    old_logprobs_BT: jax.Array, sampler_logprobs_BT: jax.Array, mask_BT: jax.Array, config: LossConfig
) -> jax.Array:
    """Truncated importance ratio of old to sampler probabilities, [B, T] or [B, 1]: a constant.

    The sequence modes use the sum of the log-ratios, not their mean. Masked tokens and tokens that the sampler did not
    score (NaN) count as ratio 1. Source: https://fengyao.notion.site/off-policy-rl (TIS) and https://arxiv.org/abs/2510.18855.
    """
    difference_BX, _ = _sampler_difference(old_logprobs_BT, sampler_logprobs_BT, mask_BT)
    per_sequence = config.sampler_is_mode.startswith("sequence")
    if per_sequence:
        difference_BX = jnp.sum(difference_BX, axis=1, keepdims=True)
    ratio_BX = _saturating_exp(difference_BX)
    low, high = config.sampler_is_clip_min, config.sampler_is_clip_max
    if config.sampler_is_mode.endswith("truncate"):
        ratio_BX = ratio_BX if low is None else jnp.maximum(ratio_BX, low)
        ratio_BX = ratio_BX if high is None else jnp.minimum(ratio_BX, high)
    else:
        ratio_BX = ratio_BX if low is None else jnp.where(ratio_BX < low, 0, ratio_BX)
        ratio_BX = ratio_BX if high is None else jnp.where(ratio_BX > high, 0, ratio_BX)
    if not per_sequence:
        ratio_BX = jnp.where(mask_BT, ratio_BX, 1)
    return stop_gradient(ratio_BX)  # a weight of the sample, not a quantity to optimise


def _sampler_difference(old_BT: jax.Array, sampler_BT: jax.Array, mask_BT: jax.Array) -> tuple[jax.Array, jax.Array]:
    """old - sampler, 0 where masked or unscored; and which tokens are valid and scored."""
    scored_BT = mask_BT & ~jnp.isnan(sampler_BT)
    return stop_gradient(jnp.where(scored_BT, old_BT - jnp.where(scored_BT, sampler_BT, 0), 0)), scored_BT


def _lengths(mask_BT: jax.Array, dtype: jnp.dtype) -> jax.Array:
    return jnp.maximum(jnp.sum(mask_BT, axis=1, keepdims=True, dtype=jnp.int32), 1).astype(dtype)


# ---- Policy terms: (rows, config) -> (term [B, T] or [B, 1], metrics of the same shapes) ----


def _clipped_term(rows: _Rows, config: LossConfig) -> tuple[jax.Array, dict[str, jax.Array]]:
    low, high = 1 - config.epsilon, 1 + config.upper_epsilon
    ratio = rows.ratio_BX
    # Conditions instead of minimum and clip: at a tie those would hand half of the gradient to a constant.
    clipped = jnp.where(ratio < low, low, jnp.where(ratio > high, high, ratio))
    capped = ratio if config.delta is None else jnp.where(ratio > config.delta, config.delta, ratio)
    unclipped_gain, clipped_gain = capped * rows.advantages_B1, clipped * rows.advantages_B1
    term = -jnp.where(clipped_gain < unclipped_gain, clipped_gain, unclipped_gain)
    is_low = (capped < low) & (rows.advantages_B1 < 0)
    is_high = (capped > high) & (rows.advantages_B1 > 0)
    return term, {
        "clip_ratio_low_mean": is_low,
        "clip_ratio_high_mean": is_high,
        "clip_ratio_region_mean": is_low | is_high,
    }


def _cispo_term(rows: _Rows, config: LossConfig) -> tuple[jax.Array, dict[str, jax.Array]]:
    # The weight is a constant by definition: every token keeps the REINFORCE gradient, at a capped strength.
    weight = stop_gradient(jnp.minimum(rows.ratio_BX, config.upper_epsilon))
    is_capped = (rows.ratio_BX > config.upper_epsilon) & (rows.advantages_B1 > 0)
    return -weight * rows.advantages_B1 * rows.logprobs_BT, {"cispo_clip_ratio": is_capped}


def _sapo_term(rows: _Rows, config: LossConfig) -> tuple[jax.Array, dict[str, jax.Array]]:
    temperature = jnp.where(rows.advantages_B1 > 0, config.sapo_temperature_pos, config.sapo_temperature_neg)
    temperature = temperature.astype(rows.logprobs_BT.dtype)
    gate = jax.nn.sigmoid(temperature * (rows.ratio_BX - 1)) * 4 / temperature
    return -gate * rows.advantages_B1, {}


def _vespo_term(rows: _Rows, config: LossConfig) -> tuple[jax.Array, dict[str, jax.Array]]:
    dtype = rows.logprobs_BT.dtype
    log_weight_BT = jnp.clip(rows.log_ratio_BT, -VESPO_LOG_CEILING, VESPO_LOG_CEILING)
    if rows.sampler_ratio_BX is not None:
        log_weight_BT += jnp.clip(jnp.log(rows.sampler_ratio_BX), VESPO_LOG_FLOOR, VESPO_LOG_CEILING)
    log_weight_B1 = jnp.sum(jnp.where(rows.mask_BT, log_weight_BT, 0), axis=1, keepdims=True)
    log_weight_B1 = jnp.clip(log_weight_B1, VESPO_LOG_FLOOR, VESPO_LOG_CEILING)
    is_positive = rows.advantages_B1 >= 0
    exponent = jnp.where(is_positive, config.vespo_k_pos, config.vespo_k_neg).astype(dtype)
    decay = jnp.where(is_positive, config.vespo_lambda_pos, config.vespo_lambda_neg).astype(dtype)
    decay = jnp.maximum(decay, VESPO_MIN_LAMBDA)
    phi_B1 = jnp.exp(decay + exponent * log_weight_B1 - decay * jnp.exp(log_weight_B1))
    # A constant by definition (as in cispo): it weights the REINFORCE gradient of the whole sequence.
    phi_B1 = stop_gradient(jnp.where(jnp.isfinite(phi_B1), phi_B1, 0))
    return -phi_B1 * rows.advantages_B1 * rows.logprobs_BT, {"vespo_phi_mean": phi_B1}


# ---- Normalisers: what the sum over the minibatch is divided by, before gradient accumulation ----


def _num_sequences(denominators: Denominators, config: LossConfig) -> jax.Array:
    return jnp.maximum(denominators.num_sequences, 1)


def _num_tokens(denominators: Denominators, config: LossConfig) -> jax.Array:
    return jnp.maximum(denominators.num_tokens, 1)


def _num_token_slots(denominators: Denominators, config: LossConfig) -> jax.Array:
    return jnp.maximum(denominators.num_sequences, 1) * config.max_completion_length


class LossType(NamedTuple):
    """How one loss_type differs from the others."""

    policy_term: Callable[[_Rows, LossConfig], tuple[jax.Array, dict[str, jax.Array]]]
    normalizer: Callable[[Denominators, LossConfig], jax.Array] | None  # None: share of num_items_in_batch
    averages_within_sequence: bool  # divide each sequence by its own length first


LOSS_TYPES: dict[str, LossType] = {
    "grpo": LossType(_clipped_term, _num_sequences, averages_within_sequence=True),
    "bnpo": LossType(_clipped_term, _num_tokens, averages_within_sequence=False),
    "dr_grpo": LossType(_clipped_term, _num_token_slots, averages_within_sequence=False),
    "dapo": LossType(_clipped_term, None, averages_within_sequence=False),
    "luspo": LossType(_clipped_term, _num_sequences, averages_within_sequence=False),
    "cispo": LossType(_cispo_term, None, averages_within_sequence=False),
    "sapo": LossType(_sapo_term, _num_sequences, averages_within_sequence=True),
    "vespo": LossType(_vespo_term, None, averages_within_sequence=False),
}


def _kl_k1(log_ratio: jax.Array) -> jax.Array:
    return -log_ratio


def _kl_k2(log_ratio: jax.Array) -> jax.Array:
    return jnp.square(log_ratio) / 2


def _kl_k3(log_ratio: jax.Array) -> jax.Array:
    return _saturating_exp(log_ratio, jnp.expm1) - log_ratio


# Of log(reference / policy). In a loss, the gradient of k2 is the one of the reverse KL on-policy; that of k3 is not,
# and that of k1 averages to zero, unless use_bias_correction_kl multiplies the estimate by the policy ratio.
KL_ESTIMATORS: dict[str, Callable[[jax.Array], jax.Array]] = {"k1": _kl_k1, "k2": _kl_k2, "k3": _kl_k3}


def entropy_threshold(entropy_BT: jax.Array, mask_BT: jax.Array, top_entropy_quantile: float) -> jax.Array:
    """The (1 - top_entropy_quantile) quantile of the entropies at mask 1, linearly interpolated; a scalar in nats.

    +inf if no token is valid (then nothing is selected), -inf for a quantile of 1 (everything is). Take it over the
    whole minibatch, never over a piece.
    """
    entropy_BT = stop_gradient(jnp.asarray(entropy_BT))  # a selection, not a quantity to optimise
    if top_entropy_quantile >= 1:
        return jnp.array(-jnp.inf, entropy_BT.dtype)
    mask_BT = jnp.asarray(mask_BT).astype(bool)
    sorted_entropies = jnp.sort(jnp.where(mask_BT, entropy_BT, jnp.inf), axis=None)
    last = jnp.maximum(jnp.sum(mask_BT, dtype=jnp.int32) - 1, 0)
    rank = (1 - top_entropy_quantile) * last.astype(entropy_BT.dtype)
    # 1 - 0.7 is not 0.3: without this a rank meant to be whole could drop the very token it names.
    is_whole = jnp.abs(rank - jnp.round(rank)) <= 4 * jnp.finfo(rank.dtype).eps * jnp.maximum(rank, 1)
    rank = jnp.where(is_whole, jnp.round(rank), rank)
    lower_index = jnp.floor(rank).astype(jnp.int32)
    lower = sorted_entropies[lower_index]
    upper = sorted_entropies[jnp.minimum(lower_index + 1, last)]
    return jnp.where(rank > lower_index, lower + (rank - lower_index) * (upper - lower), lower)


def _selected(entropy_BT: jax.Array | None, mask_BT: jax.Array, threshold: jax.Array, config: LossConfig) -> jax.Array:
    if not config.selects_by_entropy:
        return mask_BT
    if entropy_BT is None:
        raise ValueError(
            f"the entropy of each token is needed for top_entropy_quantile = {config.top_entropy_quantile}, got None; "
            "pass it, or set top_entropy_quantile to 1"
        )
    return mask_BT & (entropy_BT >= threshold)


def denominators_for(
    mask_BT: jax.Array,
    sequence_mask_B: jax.Array,
    entropy_BT: jax.Array | None,
    config: LossConfig,
    *,
    entropy_coef: jax.Array | float,
    num_items_in_batch: jax.Array | int | None = None,
    gradient_accumulation_steps: jax.Array | int = 1,
    steps_per_generation: jax.Array | int = 1,
    num_processes: jax.Array | int = 1,
) -> Denominators:
    """Count over the whole minibatch of one update. jax or numpy arrays; works under jit.

    Args:
        mask_BT: all tokens of the minibatch.
        sequence_mask_B: its real sequences.
        entropy_BT: nats; needed if top_entropy_quantile < 1, ignored otherwise.
        config: the loss.
        entropy_coef: the coefficient in force, see `applied_entropy_coef`.
        num_items_in_batch: tokens of the rollout batch that this minibatch is a part of; None: those of the minibatch.
        gradient_accumulation_steps: minibatches whose gradients are summed before one optimizer step.
        steps_per_generation: minibatches that one rollout batch is cut into. In evaluation pass 1 for both.
        num_processes: over which gradients are averaged.

    Raises:
        ValueError: entropies are needed and not given.
    """
    mask_BT = jnp.asarray(mask_BT).astype(bool) & jnp.asarray(sequence_mask_B).astype(bool)[:, None]
    threshold = jnp.array(-jnp.inf)
    if config.selects_by_entropy and entropy_BT is not None:
        threshold = entropy_threshold(entropy_BT, mask_BT, config.top_entropy_quantile)
    num_tokens = jnp.sum(mask_BT, dtype=jnp.int32)
    return Denominators(
        num_sequences=jnp.sum(jnp.asarray(sequence_mask_B).astype(bool), dtype=jnp.int32),
        num_tokens=num_tokens,
        num_entropy_tokens=jnp.sum(_selected(entropy_BT, mask_BT, threshold, config), dtype=jnp.int32),
        entropy_threshold=threshold,
        num_items_in_batch=num_tokens if num_items_in_batch is None else jnp.asarray(num_items_in_batch),
        gradient_accumulation_steps=jnp.asarray(gradient_accumulation_steps),
        steps_per_generation=jnp.asarray(steps_per_generation),
        num_processes=jnp.asarray(num_processes),
        entropy_coef=jnp.asarray(entropy_coef),
    )


def _prepare(policy_logprobs_BT: jax.Array, inputs: LossInputs, config: LossConfig) -> _Rows:
    dtype = jnp.promote_types(policy_logprobs_BT.dtype, jnp.float32)
    real_B1 = inputs.sequence_mask_B.astype(bool)[:, None]
    mask_BT = inputs.mask_BT.astype(bool) & real_B1
    # Masked before any exp, so that garbage reaches neither the value nor, as 0 * inf, the gradient.
    logprobs_BT = jnp.where(mask_BT, policy_logprobs_BT, 0).astype(dtype)
    # Old log-probs are data of the rollout; where they are the policy's own, only the ratio's numerator may move.
    old_BT = logprobs_BT if inputs.old_logprobs_BT is None else jnp.where(mask_BT, inputs.old_logprobs_BT, 0)
    old_BT = stop_gradient(old_BT).astype(dtype)
    log_ratio_BT = logprobs_BT - old_BT
    ratio_of_sampler_BX = None
    if config.sampler_is_correction and inputs.sampler_logprobs_BT is not None:
        ratio_of_sampler_BX = sampler_ratio(old_BT, inputs.sampler_logprobs_BT.astype(dtype), mask_BT, config)
    return _Rows(
        logprobs_BT=logprobs_BT,
        old_BT=old_BT,
        log_ratio_BT=log_ratio_BT,
        ratio_BX=importance_ratio(log_ratio_BT, mask_BT, config.importance_sampling_level),
        advantages_B1=jnp.where(real_B1, stop_gradient(inputs.advantages_B)[:, None], 0).astype(dtype),
        mask_BT=mask_BT,
        lengths_B1=_lengths(mask_BT, dtype),
        sampler_ratio_BX=ratio_of_sampler_BX,
    )


def _kept_on_policy(rows: _Rows, sampler_logprobs_BT: jax.Array | None, threshold: float) -> jax.Array:
    """[B, 1] bool: sequences with A >= 0, or whose mean log-prob fell by at most `threshold` nats since drawn."""
    drawn_BT = rows.old_BT if sampler_logprobs_BT is None else sampler_logprobs_BT
    fall_BT, _ = _sampler_difference(rows.logprobs_BT, drawn_BT, rows.mask_BT)
    fall_B1 = -jnp.sum(fall_BT, axis=1, keepdims=True) / rows.lengths_B1
    return (rows.advantages_B1 >= 0) | (fall_B1 <= threshold)


def grpo_loss(
    policy_logprobs_BT: jax.Array,
    entropy_BT: jax.Array | None,
    inputs: LossInputs,
    denominators: Denominators,
    config: LossConfig,
) -> tuple[jax.Array, MetricSums]:
    """Loss of one piece of a minibatch; summed over the pieces it is the loss of the minibatch.

    Differentiable in `policy_logprobs_BT` and, through the entropy bonus only, in `entropy_BT`.

    Args:
        policy_logprobs_BT: float32 or wider; the result has its dtype.
        entropy_BT: nats per token; needed for the entropy bonus and the entropy quantile, otherwise a metric only.
        inputs: constants, see `LossInputs`.
        denominators: of the whole minibatch, see `denominators_for`.
        config: validated by `validate_loss_config`.

    Returns:
        The scalar loss, and sums for `combine_sums` and `finish_metrics`.

    Raises:
        ValueError: the config needs the entropy or the reference log-probs and they are None.
    """
    rows = _prepare(policy_logprobs_BT, inputs, config)
    dtype, mask_BT = rows.logprobs_BT.dtype, rows.mask_BT
    loss_type = LOSS_TYPES[config.loss_type]
    if entropy_BT is not None:
        entropy_BT = jnp.where(mask_BT, entropy_BT, 0).astype(dtype)
    elif config.has_entropy_bonus:
        raise ValueError(
            "the entropy of each token is needed for the entropy bonus, got None; or set entropy_coef to 0"
        )

    term, means = loss_type.policy_term(rows, config)
    if config.off_policy_mask_threshold is not None:
        kept_B1 = _kept_on_policy(rows, inputs.sampler_logprobs_BT, config.off_policy_mask_threshold)
        term = term * kept_B1
        means["off_policy_kept"] = kept_B1
    selected_BT = _selected(entropy_BT, mask_BT, denominators.entropy_threshold, config)
    if config.selects_by_entropy:
        term = term * selected_BT
    if rows.sampler_ratio_BX is not None and config.loss_type != "vespo":
        term = term * rows.sampler_ratio_BX
    if config.beta != 0:
        means["kl"] = _kl_term(rows, inputs.reference_logprobs_BT, config)
        term = term + config.beta * means["kl"]

    term_BT = jnp.where(mask_BT, term, 0)
    if loss_type.averages_within_sequence:
        term_BT = term_BT / rows.lengths_B1
    normalizer, accumulation = _normalizers(denominators, config, dtype)
    policy_loss = jnp.sum(term_BT) / normalizer
    loss = policy_loss / accumulation
    sums = _metric_sums(rows, means, entropy_BT, inputs, config)
    sums.totals["policy_loss"] = policy_loss
    if config.has_entropy_bonus:
        assert entropy_BT is not None
        selected_entropy = jnp.sum(jnp.where(selected_BT, entropy_BT, 0))
        bonus = selected_entropy / jnp.maximum(denominators.num_entropy_tokens, 1).astype(dtype)
        loss -= denominators.entropy_coef.astype(dtype) * bonus / denominators.gradient_accumulation_steps.astype(dtype)
        sums.numerators["selected_entropy"] = selected_entropy
        sums.weights["selected_entropy"] = jnp.sum(selected_BT, dtype=dtype)
    return loss, stop_gradient(sums)  # metrics observe; nothing may be trained through them


def _kl_term(rows: _Rows, reference_logprobs_BT: jax.Array | None, config: LossConfig) -> jax.Array:
    if reference_logprobs_BT is None:
        raise ValueError(f"reference log-probs are needed for beta = {config.beta}, got None; or set beta to 0")
    reference_BT = jnp.where(rows.mask_BT, reference_logprobs_BT, 0).astype(rows.logprobs_BT.dtype)
    reference_BT = stop_gradient(reference_BT)  # the reference never moves
    kl_BT = KL_ESTIMATORS[config.kl_estimator](reference_BT - rows.logprobs_BT)
    return kl_BT * rows.ratio_BX if config.use_bias_correction_kl else kl_BT


def _normalizers(denominators: Denominators, config: LossConfig, dtype: jnp.dtype) -> tuple[jax.Array, jax.Array]:
    """(divisor of the policy loss, further divisor for gradient accumulation)."""
    accumulation = denominators.gradient_accumulation_steps.astype(dtype)
    count = LOSS_TYPES[config.loss_type].normalizer
    if count is not None:
        return count(denominators, config).astype(dtype), accumulation
    num_items = jnp.maximum(denominators.num_items_in_batch, 1).astype(dtype)
    share = accumulation / denominators.steps_per_generation.astype(dtype)
    return num_items / denominators.num_processes.astype(dtype) * share, jnp.ones((), dtype)


# ---- Metrics ----


def _metric_sums(
    rows: _Rows, means: dict[str, jax.Array], entropy_BT: jax.Array | None, inputs: LossInputs, config: LossConfig
) -> MetricSums:
    """Sums of every metric of a piece. `means` holds arrays that belong to tokens [B, T] or to sequences [B, 1]."""
    dtype, mask_BT = rows.logprobs_BT.dtype, rows.mask_BT
    real_B1 = inputs.sequence_mask_B.astype(bool)[:, None]
    by_sequence = config.importance_sampling_level == "sequence"
    ratio_where = real_B1 if by_sequence else mask_BT
    sums = MetricSums({}, {}, {}, {}, {})

    def add_mean(name: str, values_BX: jax.Array, where_BX: jax.Array) -> None:
        sums.numerators[name] = jnp.sum(jnp.where(where_BX, values_BX, 0), dtype=dtype)
        sums.weights[name] = jnp.sum(where_BX, dtype=dtype)

    def add_max(name: str, values_BX: jax.Array, where_BX: jax.Array) -> None:
        sums.maxima[name] = jnp.max(values_BX, initial=-jnp.inf, where=where_BX).astype(dtype)

    def add_min(name: str, values_BX: jax.Array, where_BX: jax.Array) -> None:
        sums.minima[name] = jnp.min(values_BX, initial=jnp.inf, where=where_BX).astype(dtype)

    if entropy_BT is not None:
        add_mean("entropy", entropy_BT, mask_BT)
    add_mean("ratio_mean", rows.ratio_BX, ratio_where)
    add_max("ratio_max", rows.ratio_BX, ratio_where)
    for name, values_BX in means.items():
        where_BX = {"kl": mask_BT, "vespo_phi_mean": real_B1, "off_policy_kept": real_B1}.get(name, ratio_where)
        add_mean(name, values_BX, where_BX)
    if "clip_ratio_low_mean" in means:
        # The extremes are over the means of the rows; a row without tokens has a mean only at sequence level.
        row_where_B1 = real_B1 if by_sequence else jnp.any(mask_BT, axis=1, keepdims=True)
        width_B1 = jnp.ones_like(rows.lengths_B1) if by_sequence else rows.lengths_B1

        def row_means(name: str) -> jax.Array:
            return jnp.sum(jnp.where(ratio_where, means[name], 0), axis=1, keepdims=True, dtype=dtype) / width_B1

        add_min("clip_ratio_low_min", row_means("clip_ratio_low_mean"), row_where_B1)
        add_max("clip_ratio_high_max", row_means("clip_ratio_high_mean"), row_where_B1)
    if inputs.sampler_logprobs_BT is not None:
        difference_BT, scored_BT = _sampler_difference(rows.old_BT, inputs.sampler_logprobs_BT.astype(dtype), mask_BT)
        add_mean("sampler_logprob_difference_mean", jnp.abs(difference_BT), scored_BT)
        add_max("sampler_logprob_difference_max", jnp.abs(difference_BT), scored_BT)
    if rows.sampler_ratio_BX is not None:
        sampler_where = real_B1 if config.sampler_is_mode.startswith("sequence") else mask_BT
        add_min("sampler_ratio_min", rows.sampler_ratio_BX, sampler_where)
        add_mean("sampler_ratio_mean", rows.sampler_ratio_BX, sampler_where)
        add_max("sampler_ratio_max", rows.sampler_ratio_BX, sampler_where)
    return sums


def zero_sums(like: MetricSums) -> MetricSums:
    """The neutral element of `combine_sums`. `like`: sums, or their shapes as `jax.eval_shape` gives them."""

    def filled(tree: dict[str, jax.Array], value: float) -> dict[str, jax.Array]:
        return {name: jnp.full(leaf.shape, value, leaf.dtype) for name, leaf in tree.items()}

    return MetricSums(
        numerators=filled(like.numerators, 0),
        weights=filled(like.weights, 0),
        totals=filled(like.totals, 0),
        maxima=filled(like.maxima, -jnp.inf),
        minima=filled(like.minima, jnp.inf),
    )


def combine_sums(left: MetricSums, right: MetricSums) -> MetricSums:
    """Sums of two pieces together. The same metrics must be present in both."""
    return MetricSums(
        numerators=jax.tree.map(jnp.add, left.numerators, right.numerators),
        weights=jax.tree.map(jnp.add, left.weights, right.weights),
        totals=jax.tree.map(jnp.add, left.totals, right.totals),
        maxima=jax.tree.map(jnp.maximum, left.maxima, right.maxima),
        minima=jax.tree.map(jnp.minimum, left.minima, right.minima),
    )


def finish_metrics(sums: MetricSums) -> dict[str, jax.Array]:
    """Scalars by name, from the sums over all pieces of a minibatch.

    Means are over the trained tokens, or over the sequences where a quantity belongs to a sequence (ratio and clip
    metrics at importance_sampling_level "sequence"); 0 over nothing. Extremes over nothing are NaN.

    - policy_loss: the loss without entropy bonus, before division by the accumulation steps;
    - kl: of the estimator in use, times the policy ratio if use_bias_correction_kl;
    - entropy, selected_entropy: nats per token, over all tokens and over those of the entropy quantile;
    - ratio_mean, ratio_max: of policy to old probabilities;
    - clip_ratio_{low,high,region}_mean: share where the clip holds the gradient back; low_min, high_max: of rows;
    - cispo_clip_ratio, vespo_phi_mean, off_policy_kept: of the option they are named after;
    - sampler_logprob_difference_{mean,max}: absolute, old against sampler, in nats;
    - sampler_ratio_{min,mean,max}: after truncation.
    """
    means = {name: value / jnp.maximum(sums.weights[name], 1) for name, value in sums.numerators.items()}
    extremes = {
        name: jnp.where(jnp.isfinite(value), value, jnp.nan) for name, value in (sums.maxima | sums.minima).items()
    }
    return sums.totals | means | extremes


# ---- Adaptive entropy bonus: plain numbers on the host, carried from update to update by the caller ----


def applied_entropy_coef(coef: float, last_entropy: float, config: LossConfig) -> float:
    """The coefficient in force during an update: 0 while an adaptive bonus has nothing to correct.

    Args:
        coef: `config.entropy_coef` before the first update, then what `next_entropy_coef` gave.
        last_entropy: nats per token measured in the previous update (metric selected_entropy); +inf before the first.
        config: the loss.
    """
    return coef if not config.use_adaptive_entropy or last_entropy <= config.entropy_target else 0.0


def next_entropy_coef(coef: float, measured_entropy: float, config: LossConfig) -> float:
    """The coefficient after an update that measured `measured_entropy` nats per selected token.

    Source: https://arxiv.org/abs/2505.22312, section 4 (Skywork-OR1).
    """
    if not config.use_adaptive_entropy:
        return coef
    if measured_entropy <= config.entropy_target:
        return min(coef + config.entropy_coef_delta, config.entropy_coef_max)
    return max(coef - config.entropy_coef_delta, config.entropy_coef_min)
