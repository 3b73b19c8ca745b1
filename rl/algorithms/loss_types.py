"""How losses differ from one another: settings, policy term, and the divisor of the sum over the term.

In: the tokens of a piece as `Sequences`, and a `LossConfig`. Out: terms [B, T] or [B, 1] that `rl.algorithms.losses`
masks, modifies and sums. A new loss_type is one function and one entry of `LOSS_TYPES`: other modules ask this table
alone for its name, its arguments and what its metrics belong to. `rl.algorithms.losses` lists the papers. Its golden
case goes to tests/algorithms/test_losses.py.

Shapes: B sequences, T token positions; _B1 means one value for each sequence, _BX means [B, T] or [B, 1].
"""

import dataclasses
import functools
import inspect
import math
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.lax import stop_gradient

IMPORTANCE_SAMPLING_LEVELS = ("token", "sequence")
SAMPLER_IS_MODES = ("token_truncate", "token_mask", "sequence_truncate", "sequence_mask")
VESPO_LOG_FLOOR = math.log(1e-8)
VESPO_LOG_CEILING = 20.0
VESPO_MIN_LAMBDA = 1e-4
DPPO_MIN_REST = 1e-8  # least probability of "another token", so that its logarithm is finite


@dataclasses.dataclass(frozen=True, kw_only=True)
class LossConfig:
    """Everything that selects and shapes a loss. Hashable, so that it can be a static argument of jit."""

    loss_type: str  # a key of LOSS_TYPES, or the `path/to/file.py:function` of custom_term
    custom_term: Callable | None  # the policy term of a user's file; None: the term of loss_type
    # Keyword arguments of the policy term as (name, value); one with a default may be missing.
    loss_args: tuple[tuple[str, float | str | bool | None], ...]
    importance_sampling_level: str  # "token" or "sequence": one policy ratio for each of these
    beta: float  # weight of the KL term; 0 leaves it out
    kl_estimator: str  # a key of KL_ESTIMATORS
    use_bias_correction_kl: bool  # multiply the KL estimate by the policy ratio, gradient included
    # Lower clip: ratios are cut at 1 - epsilon (gmpo: exp(-epsilon)). For dppo it is the divergence allowed if A <= 0.
    epsilon: float
    # Upper clip: 1 + epsilon_high (gmpo: exp(epsilon_high)). For cispo it is the cap itself, for dppo the divergence
    # allowed if A > 0. None: the same as epsilon.
    epsilon_high: float | None
    delta: float | None  # cap of the unclipped ratio (dppo: of the weight); None: no cap
    top_entropy_quantile: float  # share of tokens, highest entropy first, that carry the policy term; 1: all
    off_policy_mask_threshold: float | None  # drop sequences with A < 0 that drifted more than this; None: off
    sampler_is_correction: bool  # multiply by the ratio of old to sampler probabilities
    sampler_is_mode: str  # one of SAMPLER_IS_MODES
    sampler_is_clip_min: float | None  # None: no lower bound
    sampler_is_clip_max: float | None  # None: no upper bound
    entropy_coef: float  # weight of the entropy bonus; the first value where it adapts
    use_adaptive_entropy: bool  # steer the coefficient so that the entropy stays near entropy_target
    entropy_target: float  # nats per token
    entropy_coef_delta: float  # change of the coefficient per update
    entropy_coef_min: float
    entropy_coef_max: float
    positive_nll_coef: float  # weight of the mean -log p of the tokens of completions with A > 0; 0 leaves it out
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
    """Inputs of the loss that get no gradient. Values where the mask is 0 are arbitrary, NaN included."""

    old_logprobs_BT: jax.Array | None  # from before the first update on these completions; None: the policy's own
    reference_logprobs_BT: jax.Array | None  # needed if beta != 0
    sampler_logprobs_BT: jax.Array | None  # from when the token was drawn; NaN where the sampler has no value
    mask_BT: jax.Array  # 1 (or True) for the tokens that are trained on
    advantages_B: jax.Array
    sequence_mask_B: jax.Array  # 1 for a real sequence, even an empty one; 0 for padding
    advantages_BT: jax.Array | None = None  # one for each token, in place of advantages_B


class Denominators(NamedTuple):
    """Scalars of the whole minibatch of one update, equal for each of its pieces. See `denominators_for`."""

    num_sequences: jax.Array  # real sequences
    num_tokens: jax.Array  # sum of the mask
    num_positive_tokens: jax.Array  # of completions with A > 0; 0 where positive_nll_coef is 0
    num_entropy_tokens: jax.Array  # tokens selected by the entropy quantile
    entropy_threshold: jax.Array  # nats; -inf where no quantile is taken
    num_items_in_batch: jax.Array  # tokens of the whole rollout batch, over all processes
    gradient_accumulation_steps: jax.Array
    steps_per_generation: jax.Array
    num_processes: jax.Array
    entropy_coef: jax.Array  # the coefficient in force during this update


class Sequences(NamedTuple):
    """Inputs of one piece in one dtype. Values where the mask is 0 are replaced by harmless ones."""

    logprobs_BT: jax.Array  # carries the gradient
    old_BT: jax.Array
    drawn_BT: jax.Array  # the sampler's log-probs where it scored the token, else the old ones
    log_ratio_BT: jax.Array
    ratio_BX: jax.Array
    advantages_BX: jax.Array  # [B, 1]; [B, T] where each token has its own
    mask_BT: jax.Array  # bool
    lengths_B1: jax.Array  # at least 1
    sampler_ratio_BX: jax.Array | None


def validate_loss_config(config: LossConfig) -> None:
    """Refuses values and combinations that have no meaning.

    Raises:
        ValueError: the message names the field, the rule, the value and the way out.
    """
    choices = (
        *((("loss_type", tuple(LOSS_TYPES)),) if config.custom_term is None else ()),
        ("importance_sampling_level", IMPORTANCE_SAMPLING_LEVELS),
        ("kl_estimator", tuple(KL_ESTIMATORS)),
        ("sampler_is_mode", SAMPLER_IS_MODES),
    )
    for name, allowed in choices:
        if getattr(config, name) not in allowed:
            raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {getattr(config, name)!r}")
    _validate_args(config)
    infinity = float("inf")
    ranges = (
        ("beta", 0, infinity, "0 turns the KL term off"),
        ("epsilon", 0, infinity, "0.2 is usual, 3e-4 at sequence level"),
        ("epsilon_high", 0, infinity, "null means the same as epsilon"),
        ("delta", 0, infinity, "null turns the cap off"),
        ("top_entropy_quantile", 0, 1, "1 keeps every token"),
        ("sampler_is_clip_min", 0, infinity, "null means no lower bound"),
        ("sampler_is_clip_max", 0, infinity, "null means no upper bound"),
        ("positive_nll_coef", 0, infinity, "0 turns the term off"),
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
    _validate_sampler_is(config)
    if config.beta != 0 and config.kl_estimator == "k1" and not config.use_bias_correction_kl:
        raise ValueError(
            "kl_estimator must be k2 or k3 while use_bias_correction_kl is false, got k1: the expected gradient of k1 "
            "alone is zero, so it would regularise nothing; or set use_bias_correction_kl to true"
        )


def _validate_args(config: LossConfig) -> None:
    """`loss_args` must be arguments of the policy term after `sequences` and `config`. A term with **kwargs takes
    any.
    """
    parameters = list(inspect.signature(_term_of(config)).parameters.values())
    kinds = [parameter.kind for parameter in parameters]
    named = [p for p in parameters[2:] if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    names, given = [parameter.name for parameter in named], [name for name, _ in config.loss_args]
    takes = f"({', '.join(names)})" if names else "(none)"
    if inspect.Parameter.VAR_KEYWORD not in kinds:
        for name in given:
            if name not in names:
                raise ValueError(
                    f"loss_args must name arguments of loss_type {config.loss_type} {takes}, got {name!r}; leave it out"
                )
    for name, value in config.loss_args:
        if not isinstance(value, int | float | str | bool | None):
            raise ValueError(f"loss_args.{name} must be a number, a text, true, false or null, got {value!r}")
    for parameter in named:
        if parameter.default is parameter.empty and parameter.name not in given:
            raise ValueError(
                f"loss_args must hold {parameter.name!r}, an argument of loss_type {config.loss_type} without a "
                f"default, got {given}; set it"
            )


def _validate_sampler_is(config: LossConfig) -> None:
    modes = loss_type_of(config).sampler_is_modes
    if not config.sampler_is_correction or config.sampler_is_mode in modes:
        return
    if not modes:
        raise ValueError(
            f"sampler_is_correction must be false with loss_type {config.loss_type}, whose ratio is that of policy to "
            "sampler already, got true"
        )
    raise ValueError(
        f"sampler_is_mode must be {' or '.join(modes)} with loss_type {config.loss_type}, which builds its own "
        f"sequence weight, got {config.sampler_is_mode}; or set sampler_is_correction to false"
    )


def saturating_exp(x: jax.Array, function: Callable[[jax.Array], jax.Array] = jnp.exp) -> jax.Array:
    """exp (or expm1) that stays finite: exact up to about e^40 in float32 (e^350 in float64), constant above.

    An infinite ratio in the branch that a minimum does not choose would give 0 * inf = NaN in the gradient.
    """
    limit = math.log(float(jnp.finfo(x.dtype).max)) / 2 - 4  # so that sums of products of two such values are finite
    return function(jnp.minimum(x, limit))


def importance_ratio(log_ratio_BT: jax.Array, mask_BT: jax.Array, level: str) -> jax.Array:
    """Ratio of policy to old probabilities: [B, T] for level "token", [B, 1] (length-normalised) for "sequence".

    The gradient flows through the masked mean at sequence level. Masked log-ratios must be finite.
    """
    if level == "token":
        return saturating_exp(log_ratio_BT)
    total_B1 = jnp.sum(jnp.where(mask_BT, log_ratio_BT, 0), axis=1, keepdims=True)
    return saturating_exp(total_B1 / lengths(mask_BT, log_ratio_BT.dtype))


def raw_sampler_ratio(
    old_logprobs_BT: jax.Array, sampler_logprobs_BT: jax.Array, mask_BT: jax.Array, config: LossConfig
) -> jax.Array:
    """Importance ratio of old to sampler probabilities before any bound, [B, T] or [B, 1]: a constant.

    The sequence modes use the sum of the log-ratios, not their mean. Masked tokens and tokens that the sampler did not
    score (NaN) count as ratio 1.
    """
    difference_BX, _ = sampler_difference(old_logprobs_BT, sampler_logprobs_BT, mask_BT)
    if config.sampler_is_mode.startswith("sequence"):
        difference_BX = jnp.sum(difference_BX, axis=1, keepdims=True)
    return stop_gradient(saturating_exp(difference_BX))  # a weight of the sample, not a quantity to optimise


def beyond_bounds(raw_BX: jax.Array, config: LossConfig) -> tuple[jax.Array, jax.Array]:
    """Where the raw ratio is below `sampler_is_clip_min`, and where above `sampler_is_clip_max`; bool, like it."""
    low, high = config.sampler_is_clip_min, config.sampler_is_clip_max
    nowhere_BX = jnp.zeros_like(raw_BX, bool)
    return nowhere_BX if low is None else raw_BX < low, nowhere_BX if high is None else raw_BX > high


def sampler_ratio(
    old_logprobs_BT: jax.Array, sampler_logprobs_BT: jax.Array, mask_BT: jax.Array, config: LossConfig
) -> jax.Array:
    """`raw_sampler_ratio`, cut at its bounds or 0 beyond them, as the mode says.

    Source: https://fengyao.notion.site/off-policy-rl (TIS) and https://arxiv.org/abs/2510.18855.
    """
    ratio_BX = raw_sampler_ratio(old_logprobs_BT, sampler_logprobs_BT, mask_BT, config)
    is_below_BX, is_above_BX = beyond_bounds(ratio_BX, config)
    low, high = config.sampler_is_clip_min, config.sampler_is_clip_max
    if not config.sampler_is_mode.endswith("truncate"):
        low = high = 0
    ratio_BX = ratio_BX if low is None else jnp.where(is_below_BX, low, ratio_BX)
    ratio_BX = ratio_BX if high is None else jnp.where(is_above_BX, high, ratio_BX)
    if not config.sampler_is_mode.startswith("sequence"):
        ratio_BX = jnp.where(mask_BT, ratio_BX, 1)
    return ratio_BX


def sampler_difference(old_BT: jax.Array, sampler_BT: jax.Array, mask_BT: jax.Array) -> tuple[jax.Array, jax.Array]:
    """old - sampler, 0 where masked or unscored; and which tokens are valid and scored."""
    scored_BT = mask_BT & ~jnp.isnan(sampler_BT)
    return stop_gradient(jnp.where(scored_BT, old_BT - jnp.where(scored_BT, sampler_BT, 0), 0)), scored_BT


def lengths(mask_BT: jax.Array, dtype: jnp.dtype) -> jax.Array:
    return jnp.maximum(jnp.sum(mask_BT, axis=1, keepdims=True, dtype=jnp.int32), 1).astype(dtype)


# ---- Policy terms: (sequences, config) -> (term [B, T] or [B, 1], metrics of the same shapes) ----


def _clipped_term(sequences: Sequences, config: LossConfig) -> tuple[jax.Array, dict[str, jax.Array]]:
    low, high = 1 - config.epsilon, 1 + config.upper_epsilon
    ratio = sequences.ratio_BX
    # Conditions, because at a tie minimum and clip would give half of the gradient to a constant.
    clipped = jnp.where(ratio < low, low, jnp.where(ratio > high, high, ratio))
    capped = ratio if config.delta is None else jnp.where(ratio > config.delta, config.delta, ratio)
    unclipped_gain, clipped_gain = capped * sequences.advantages_BX, clipped * sequences.advantages_BX
    term = -jnp.where(clipped_gain < unclipped_gain, clipped_gain, unclipped_gain)
    is_low = (capped < low) & (sequences.advantages_BX < 0)
    is_high = (capped > high) & (sequences.advantages_BX > 0)
    return term, {
        "clip_ratio/low_mean": is_low,
        "clip_ratio/high_mean": is_high,
        "clip_ratio/region_mean": is_low | is_high,
    }


def _cispo_term(sequences: Sequences, config: LossConfig) -> tuple[jax.Array, dict[str, jax.Array]]:
    # The weight is a constant by definition: every token keeps the REINFORCE gradient, at a capped strength.
    weight = stop_gradient(jnp.minimum(sequences.ratio_BX, config.upper_epsilon))
    is_capped = (sequences.ratio_BX > config.upper_epsilon) & (sequences.advantages_BX > 0)
    return -weight * sequences.advantages_BX * sequences.logprobs_BT, {"cispo/clip_ratio": is_capped}


def _sapo_term(sequences: Sequences, config: LossConfig) -> tuple[jax.Array, dict[str, jax.Array]]:
    temperature = jnp.where(sequences.advantages_BX > 0, config.sapo_temperature_pos, config.sapo_temperature_neg)
    temperature = temperature.astype(sequences.logprobs_BT.dtype)
    gate = jax.nn.sigmoid(temperature * (sequences.ratio_BX - 1)) * 4 / temperature
    return -gate * sequences.advantages_BX, {}


def _vespo_term(sequences: Sequences, config: LossConfig) -> tuple[jax.Array, dict[str, jax.Array]]:
    dtype = sequences.logprobs_BT.dtype
    log_weight_BT = jnp.clip(sequences.log_ratio_BT, -VESPO_LOG_CEILING, VESPO_LOG_CEILING)
    if sequences.sampler_ratio_BX is not None:
        log_weight_BT += jnp.clip(jnp.log(sequences.sampler_ratio_BX), VESPO_LOG_FLOOR, VESPO_LOG_CEILING)
    log_weight_B1 = jnp.sum(jnp.where(sequences.mask_BT, log_weight_BT, 0), axis=1, keepdims=True)
    log_weight_B1 = jnp.clip(log_weight_B1, VESPO_LOG_FLOOR, VESPO_LOG_CEILING)
    is_positive = sequences.advantages_BX >= 0
    exponent = jnp.where(is_positive, config.vespo_k_pos, config.vespo_k_neg).astype(dtype)
    decay = jnp.where(is_positive, config.vespo_lambda_pos, config.vespo_lambda_neg).astype(dtype)
    decay = jnp.maximum(decay, VESPO_MIN_LAMBDA)
    phi_B1 = jnp.exp(decay + exponent * log_weight_B1 - decay * jnp.exp(log_weight_B1))
    # A constant by definition (as in cispo): it weights the REINFORCE gradient of the whole sequence.
    phi_B1 = stop_gradient(jnp.where(jnp.isfinite(phi_B1), phi_B1, 0))
    return -phi_B1 * sequences.advantages_BX * sequences.logprobs_BT, {"vespo/phi_mean": phi_B1}


def _dppo_tv_term(sequences: Sequences, config: LossConfig) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Masks by |p - mu|, the total variation between the Bernoulli distributions "this token or another"."""
    return _dppo_term(sequences, config, jnp.abs(jnp.exp(sequences.logprobs_BT) - jnp.exp(sequences.drawn_BT)))


def _dppo_kl_term(sequences: Sequences, config: LossConfig) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Masks by KL(mu || p) between the Bernoulli distributions "this token or another"."""

    def log_rest(logprobs_BT: jax.Array) -> jax.Array:
        return jnp.log(jnp.maximum(-jnp.expm1(logprobs_BT), DPPO_MIN_REST))

    log_p_BT, log_mu_BT = jnp.minimum(sequences.logprobs_BT, 0), jnp.minimum(sequences.drawn_BT, 0)
    mu_BT = jnp.exp(log_mu_BT)
    divergence_BT = mu_BT * (log_mu_BT - log_p_BT) + (1 - mu_BT) * (log_rest(log_mu_BT) - log_rest(log_p_BT))
    return _dppo_term(sequences, config, divergence_BT)


def _dppo_term(
    sequences: Sequences, config: LossConfig, divergence_BT: jax.Array
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """REINFORCE, weighted by the ratio to the sampler's probability mu, without tokens that leave the trust region.

    A token leaves it when it is further from mu than allowed and the gradient would move it further away.
    """
    is_positive = sequences.advantages_BX > 0
    away_BT = jnp.where(
        is_positive, sequences.logprobs_BT > sequences.drawn_BT, sequences.logprobs_BT < sequences.drawn_BT
    )
    masked_BT = away_BT & (divergence_BT > jnp.where(is_positive, config.upper_epsilon, config.epsilon))
    weight_BT = saturating_exp(sequences.logprobs_BT - sequences.drawn_BT)
    if config.delta is not None:
        weight_BT = jnp.minimum(weight_BT, config.delta)
    # weight * gradient of log p is the gradient of the ratio. A capped ratio itself would have no gradient.
    weight_BT = stop_gradient(jnp.where(masked_BT, 0, weight_BT))
    return -weight_BT * sequences.advantages_BX * sequences.logprobs_BT, {"dppo/masked_share": masked_BT}


def _gmpo_term(sequences: Sequences, config: LossConfig) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The geometric mean of the token ratios. Each is clipped in log space on the side to which its advantage pulls."""
    is_low = (sequences.advantages_BX < 0) & (sequences.log_ratio_BT < -config.epsilon)
    is_high = (sequences.advantages_BX > 0) & (sequences.log_ratio_BT > config.upper_epsilon)
    clipped_BT = jnp.where(is_low, -config.epsilon, jnp.where(is_high, config.upper_epsilon, sequences.log_ratio_BT))
    ratio_B1 = importance_ratio(clipped_BT, sequences.mask_BT, "sequence")
    return -ratio_B1 * sequences.advantages_BX, {"gmpo/clip_ratio": is_low | is_high}


# ---- Normalisers: the divisor of the sum over the minibatch, before gradient accumulation ----


def _num_sequences(denominators: Denominators, config: LossConfig) -> jax.Array:
    return jnp.maximum(denominators.num_sequences, 1)


def _num_tokens(denominators: Denominators, config: LossConfig) -> jax.Array:
    return jnp.maximum(denominators.num_tokens, 1)


def _num_token_slots(denominators: Denominators, config: LossConfig) -> jax.Array:
    return jnp.maximum(denominators.num_sequences, 1) * config.max_completion_length


class LossType(NamedTuple):
    """How one loss_type differs from the others.

    `grpo.loss_args` sets the keyword arguments of `policy_term` after sequences and config. Those without a
    default must be set.
    """

    policy_term: Callable[..., tuple[jax.Array, dict[str, jax.Array]]]  # (sequences, config, *, arguments of its own)
    normalizer: Callable[[Denominators, LossConfig], jax.Array] | None  # None: share of num_items_in_batch
    averages_within_sequence: bool  # whether each sequence is first divided by its own length
    sampler_is_modes: tuple[str, ...] = SAMPLER_IS_MODES  # the modes that the term allows
    builds_in_sampler_ratio: bool = False  # the term holds the sampler's ratio already
    is_of_sequences: bool = False  # weighs whole completions, so it cannot take an advantage for each token
    epsilon_high_is_cap: bool = False  # epsilon_high caps the ratio itself and has no default
    needs_advantage: bool = False  # where the advantage is 0, so are the term and its gradient
    # {metric: "token" or "sequence"}: metrics of the term that are means over something else than the policy ratio is
    # of.
    belongs_to: Mapping[str, str] = MappingProxyType({})


LOSS_TYPES: dict[str, LossType] = {
    "grpo": LossType(_clipped_term, _num_sequences, averages_within_sequence=True, needs_advantage=True),
    "bnpo": LossType(_clipped_term, _num_tokens, averages_within_sequence=False, needs_advantage=True),
    "dr_grpo": LossType(_clipped_term, _num_token_slots, averages_within_sequence=False, needs_advantage=True),
    "dapo": LossType(_clipped_term, None, averages_within_sequence=False, needs_advantage=True),
    "luspo": LossType(_clipped_term, _num_sequences, averages_within_sequence=False, needs_advantage=True),
    "cispo": LossType(
        _cispo_term, None, averages_within_sequence=False, needs_advantage=True, epsilon_high_is_cap=True
    ),
    "sapo": LossType(_sapo_term, _num_sequences, averages_within_sequence=True, needs_advantage=True),
    "vespo": LossType(
        _vespo_term,
        None,
        averages_within_sequence=False,
        needs_advantage=True,
        sampler_is_modes=("token_truncate", "token_mask"),
        builds_in_sampler_ratio=True,
        is_of_sequences=True,
        belongs_to={"vespo/phi_mean": "sequence"},
    ),
    "dppo_tv": LossType(
        _dppo_tv_term,
        None,
        averages_within_sequence=False,
        needs_advantage=True,
        sampler_is_modes=(),
        belongs_to={"dppo/masked_share": "token"},
    ),
    "dppo_kl": LossType(
        _dppo_kl_term,
        None,
        averages_within_sequence=False,
        needs_advantage=True,
        sampler_is_modes=(),
        belongs_to={"dppo/masked_share": "token"},
    ),
    "gmpo": LossType(
        _gmpo_term,
        _num_sequences,
        averages_within_sequence=True,
        needs_advantage=True,
        sampler_is_modes=("sequence_truncate", "sequence_mask"),
        is_of_sequences=True,
        belongs_to={"gmpo/clip_ratio": "token"},
    ),
}


def loss_type_of(config: LossConfig) -> LossType:
    """The entry of the table, with `loss_args` bound to its term. A user's term is normalised as dapo's is, and may be
    other than 0 without an advantage.
    """
    is_custom = config.custom_term is not None
    entry = LOSS_TYPES["dapo"]._replace(needs_advantage=False) if is_custom else LOSS_TYPES[config.loss_type]
    term = _term_of(config)
    return entry._replace(policy_term=functools.partial(term, **dict(config.loss_args)) if config.loss_args else term)


def _term_of(config: LossConfig) -> Callable[..., tuple[jax.Array, dict[str, jax.Array]]]:
    return LOSS_TYPES[config.loss_type].policy_term if config.custom_term is None else config.custom_term


def _kl_k1(log_ratio: jax.Array) -> jax.Array:
    return -log_ratio


def _kl_k2(log_ratio: jax.Array) -> jax.Array:
    return jnp.square(log_ratio) / 2


def _kl_k3(log_ratio: jax.Array) -> jax.Array:
    return saturating_exp(log_ratio, jnp.expm1) - log_ratio


# Functions of log(reference / policy). In a loss on-policy, k2 has the gradient of the reverse KL. k3 has another one,
# and the gradient of k1 averages to zero, unless use_bias_correction_kl multiplies the estimate by the policy ratio.
KL_ESTIMATORS: dict[str, Callable[[jax.Array], jax.Array]] = {"k1": _kl_k1, "k2": _kl_k2, "k3": _kl_k3}


def normalizers(denominators: Denominators, config: LossConfig, dtype: jnp.dtype) -> tuple[jax.Array, jax.Array]:
    """(divisor of the policy loss, further divisor for gradient accumulation)."""
    accumulation = denominators.gradient_accumulation_steps.astype(dtype)
    count = loss_type_of(config).normalizer
    if count is not None:
        return count(denominators, config).astype(dtype), accumulation
    num_items = jnp.maximum(denominators.num_items_in_batch, 1).astype(dtype)
    share = accumulation / denominators.steps_per_generation.astype(dtype)
    return num_items / denominators.num_processes.astype(dtype) * share, jnp.ones((), dtype)
