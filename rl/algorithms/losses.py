"""GRPO-style losses over per-token log-probs: pure functions, (inputs) -> (loss, metrics).

In: log-probs of completion tokens (policy, old, reference, sampler), a mask, advantages, and denominators that were
counted over the whole minibatch of one update. Out: a scalar and sums from which the metrics are finished. A minibatch
may be cut into pieces (micro-batches of whole sequences) in any way. Losses and gradients of the pieces add up to those
of the minibatch, because nothing here divides by a count of the piece. Not here: log-probs from hidden states
(`logprobs`), advantages (`advantages`), gradients and accumulation (the training step).

Values are those of TRL 1.16 (https://github.com/huggingface/trl, trl/trainer/grpo_trainer.py), tested against numbers
computed with it. dppo_tv, dppo_kl, gmpo and the NLL are not in TRL; they are tested against numbers worked out by hand.
Papers:

- grpo: https://arxiv.org/abs/2402.03300 (DeepSeekMath)    - dr_grpo: https://arxiv.org/abs/2503.20783
- dapo: https://arxiv.org/abs/2503.14476                   - luspo: https://arxiv.org/abs/2602.05261
- cispo: https://arxiv.org/abs/2506.13585 (MiniMax-M1)     - sapo: https://arxiv.org/abs/2511.20347
- vespo: https://arxiv.org/abs/2602.10693                  - bnpo: grpo with the token mean of the minibatch
- dppo_tv, dppo_kl: https://arxiv.org/abs/2602.04879       - gmpo: https://arxiv.org/abs/2507.20673
- NLL of positive examples: https://arxiv.org/abs/2504.05118 (VAPO)
- sequence-level ratio (GSPO): https://arxiv.org/abs/2507.18071
- delta, the dual clip: https://arxiv.org/abs/2505.07291 (INTELLECT-2), after https://arxiv.org/abs/1912.09729
- entropy quantile: https://arxiv.org/abs/2506.01939       - off-policy mask and bias-corrected KL:
- KL estimators: http://joschu.net/blog/kl-approx.html       https://arxiv.org/abs/2512.02556 (DeepSeek-V3.2)
- adaptive entropy bonus: https://arxiv.org/abs/2505.22312 (Skywork-OR1)

On-policy with centred advantages the policy loss is 0, because the ratio is 1. Its gradient is not 0.

Shapes: B sequences, T token positions; _B1 means one value for each sequence, _BX means [B, T] or [B, 1].
"""

import jax
import jax.numpy as jnp
from jax.lax import stop_gradient

from rl.algorithms.loss_metrics import MetricSums, metric_sums
from rl.algorithms.loss_types import (
    KL_ESTIMATORS,
    Denominators,
    LossConfig,
    LossInputs,
    Sequences,
    importance_ratio,
    lengths,
    loss_type_of,
    normalizers,
    sampler_difference,
    sampler_ratio,
)

# Metrics that are the share of clipped tokens or sequences. A loss has one of them at most.
CLIPS = ("clip_ratio/region_mean", "cispo/clip_ratio", "dppo/masked_share", "gmpo/clip_ratio")


def entropy_threshold(entropy_BT: jax.Array, mask_BT: jax.Array, top_entropy_quantile: float) -> jax.Array:
    """The (1 - top_entropy_quantile) quantile of the entropies at mask 1, linearly interpolated; a scalar in nats.

    +inf if no token is valid (nothing is selected), -inf for a quantile of 1 (everything is selected). It must be taken
    over the whole minibatch, never over a piece.
    """
    entropy_BT = stop_gradient(jnp.asarray(entropy_BT))  # a selection, not a quantity to optimise
    if top_entropy_quantile >= 1:
        return jnp.array(-jnp.inf, entropy_BT.dtype)
    mask_BT = jnp.asarray(mask_BT).astype(bool)
    sorted_entropies = jnp.sort(jnp.where(mask_BT, entropy_BT, jnp.inf), axis=None)
    last = jnp.maximum(jnp.sum(mask_BT, dtype=jnp.int32) - 1, 0)
    rank = (1 - top_entropy_quantile) * last.astype(entropy_BT.dtype)
    # In floating point 1 - 0.7 is not 0.3: without this a rank that should be whole could drop the token that it names.
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
    advantages_B: jax.Array | None = None,
    num_items_in_batch: jax.Array | int | None = None,
    gradient_accumulation_steps: jax.Array | int = 1,
    steps_per_generation: jax.Array | int = 1,
    num_processes: jax.Array | int = 1,
) -> Denominators:
    """Counts over the whole minibatch of one update. jax or numpy arrays; works under jit.

    Args:
        mask_BT: all tokens of the minibatch.
        sequence_mask_B: the real sequences of the minibatch.
        entropy_BT: nats; needed if top_entropy_quantile < 1, ignored otherwise.
        config: the loss.
        entropy_coef: the coefficient of this update, see `rl.algorithms.entropy_coef.applied_entropy_coef`.
        advantages_B: needed if positive_nll_coef != 0, ignored otherwise.
        num_items_in_batch: tokens of the rollout batch of which this is a minibatch; None: tokens of the minibatch.
        gradient_accumulation_steps: minibatches whose gradients are summed before one optimizer step.
        steps_per_generation: minibatches of one rollout batch. In evaluation pass 1 for both.
        num_processes: the number of processes over which gradients are averaged.

    Raises:
        ValueError: the config needs entropies or advantages, and they are None.
    """
    mask_BT = jnp.asarray(mask_BT).astype(bool) & jnp.asarray(sequence_mask_B).astype(bool)[:, None]
    threshold = jnp.array(-jnp.inf)
    if config.selects_by_entropy and entropy_BT is not None:
        threshold = entropy_threshold(entropy_BT, mask_BT, config.top_entropy_quantile)
    num_tokens = jnp.sum(mask_BT, dtype=jnp.int32)
    num_positive = jnp.zeros((), jnp.int32)
    if config.positive_nll_coef:
        if advantages_B is None:
            raise ValueError(
                f"advantages are needed for positive_nll_coef = {config.positive_nll_coef}, got None; pass them, "
                "or set positive_nll_coef to 0"
            )
        num_positive = jnp.sum(mask_BT & (jnp.asarray(advantages_B) > 0)[:, None], dtype=jnp.int32)
    return Denominators(
        num_sequences=jnp.sum(jnp.asarray(sequence_mask_B).astype(bool), dtype=jnp.int32),
        num_tokens=num_tokens,
        num_positive_tokens=num_positive,
        num_entropy_tokens=jnp.sum(_selected(entropy_BT, mask_BT, threshold, config), dtype=jnp.int32),
        entropy_threshold=threshold,
        num_items_in_batch=num_tokens if num_items_in_batch is None else jnp.asarray(num_items_in_batch),
        gradient_accumulation_steps=jnp.asarray(gradient_accumulation_steps),
        steps_per_generation=jnp.asarray(steps_per_generation),
        num_processes=jnp.asarray(num_processes),
        entropy_coef=jnp.asarray(entropy_coef),
    )


def prepare(policy_logprobs_BT: jax.Array, inputs: LossInputs, config: LossConfig) -> Sequences:
    """The inputs of a policy term for one piece."""
    dtype = jnp.promote_types(policy_logprobs_BT.dtype, jnp.float32)
    real_B1 = inputs.sequence_mask_B.astype(bool)[:, None]
    mask_BT = inputs.mask_BT.astype(bool) & real_B1
    # Masked before any exp, so that garbage reaches neither the value nor (as 0 * inf) the gradient.
    logprobs_BT = jnp.where(mask_BT, policy_logprobs_BT, 0).astype(dtype)
    # Old log-probs are data of the rollout. Where they are the policy's own, only the ratio's numerator gets a
    # gradient.
    old_BT = logprobs_BT if inputs.old_logprobs_BT is None else jnp.where(mask_BT, inputs.old_logprobs_BT, 0)
    old_BT = stop_gradient(old_BT).astype(dtype)
    log_ratio_BT = logprobs_BT - old_BT
    drawn_BT, ratio_of_sampler_BX = old_BT, None
    if inputs.sampler_logprobs_BT is not None:
        scored_BT = mask_BT & ~jnp.isnan(inputs.sampler_logprobs_BT)
        drawn_BT = stop_gradient(jnp.where(scored_BT, inputs.sampler_logprobs_BT, old_BT)).astype(dtype)  # data, too
    if config.sampler_is_correction and inputs.sampler_logprobs_BT is not None:
        ratio_of_sampler_BX = sampler_ratio(old_BT, inputs.sampler_logprobs_BT.astype(dtype), mask_BT, config)
    advantages_BX, where_BX = inputs.advantages_B[:, None], real_B1
    if inputs.advantages_BT is not None:
        advantages_BX, where_BX = inputs.advantages_BT, mask_BT
    return Sequences(
        logprobs_BT=logprobs_BT,
        old_BT=old_BT,
        drawn_BT=drawn_BT,
        log_ratio_BT=log_ratio_BT,
        ratio_BX=importance_ratio(log_ratio_BT, mask_BT, config.importance_sampling_level),
        advantages_BX=jnp.where(where_BX, stop_gradient(advantages_BX), 0).astype(dtype),
        mask_BT=mask_BT,
        lengths_B1=lengths(mask_BT, dtype),
        sampler_ratio_BX=ratio_of_sampler_BX,
    )


def _kept_on_policy(sequences: Sequences, sampler_logprobs_BT: jax.Array | None, threshold: float) -> jax.Array:
    """[B, 1] bool: sequences with A >= 0, or whose mean log-prob fell by at most `threshold` nats since the draw."""
    drawn_BT = sequences.old_BT if sampler_logprobs_BT is None else sampler_logprobs_BT
    fall_BT, _ = sampler_difference(sequences.logprobs_BT, drawn_BT, sequences.mask_BT)
    fall_B1 = -jnp.sum(fall_BT, axis=1, keepdims=True) / sequences.lengths_B1
    return (sequences.advantages_BX >= 0) | (fall_B1 <= threshold)


def grpo_loss(
    policy_logprobs_BT: jax.Array,
    entropy_BT: jax.Array | None,
    inputs: LossInputs,
    denominators: Denominators,
    config: LossConfig,
) -> tuple[jax.Array, MetricSums]:
    """The loss of one piece of a minibatch. The sum over the pieces is the loss of the minibatch.

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
    sequences = prepare(policy_logprobs_BT, inputs, config)
    dtype, mask_BT = sequences.logprobs_BT.dtype, sequences.mask_BT
    loss_type = loss_type_of(config)
    if entropy_BT is not None:
        entropy_BT = jnp.where(mask_BT, entropy_BT, 0).astype(dtype)
    elif config.has_entropy_bonus:
        raise ValueError(
            "the entropy of each token is needed for the entropy bonus, got None; or set entropy_coef to 0"
        )

    term, means = loss_type.policy_term(sequences, config)
    if config.custom_term is not None:  # a name of the user's must not be one of ours
        means = {f"loss_term/{name}": values for name, values in means.items()}
    if config.off_policy_mask_threshold is not None:
        kept_B1 = _kept_on_policy(sequences, inputs.sampler_logprobs_BT, config.off_policy_mask_threshold)
        term = term * kept_B1
        means["off_policy/kept_share"] = kept_B1
    selected_BT = _selected(entropy_BT, mask_BT, denominators.entropy_threshold, config)
    if config.selects_by_entropy:
        term = term * selected_BT
    if sequences.sampler_ratio_BX is not None and not loss_type.builds_in_sampler_ratio:
        term = term * sequences.sampler_ratio_BX
    if config.beta != 0:
        means["kl"] = _kl_term(sequences, inputs.reference_logprobs_BT, config)
        term = term + config.beta * means["kl"]

    term_BT = jnp.where(mask_BT, term, 0)
    if loss_type.averages_within_sequence:
        term_BT = term_BT / sequences.lengths_B1
    normalizer, accumulation = normalizers(denominators, config, dtype)
    policy_loss = jnp.sum(term_BT) / normalizer
    loss = policy_loss / accumulation
    sums = metric_sums(sequences, means, entropy_BT, inputs, config)
    sums.totals["policy_loss"] = policy_loss
    if config.has_entropy_bonus:
        assert entropy_BT is not None
        selected_entropy = jnp.sum(jnp.where(selected_BT, entropy_BT, 0))
        bonus = selected_entropy / jnp.maximum(denominators.num_entropy_tokens, 1).astype(dtype)
        loss -= denominators.entropy_coef.astype(dtype) * bonus / denominators.gradient_accumulation_steps.astype(dtype)
        sums.numerators["selected_entropy"] = selected_entropy
        sums.weights["selected_entropy"] = jnp.sum(selected_BT, dtype=dtype)
    if config.positive_nll_coef:
        positive_BT = mask_BT & (sequences.advantages_BX > 0)
        nll = -jnp.sum(jnp.where(positive_BT, sequences.logprobs_BT, 0))
        mean_nll = nll / jnp.maximum(denominators.num_positive_tokens, 1).astype(dtype)
        loss += config.positive_nll_coef * mean_nll / denominators.gradient_accumulation_steps.astype(dtype)
        sums.numerators["positive_nll"] = nll
        sums.weights["positive_nll"] = jnp.sum(positive_BT, dtype=dtype)
    return loss, stop_gradient(sums)  # metrics must not train anything


def clipped_tokens(policy_logprobs_BT: jax.Array, inputs: LossInputs, config: LossConfig) -> jax.Array | None:
    """bool [B, T]: the tokens at which the clip of the loss holds the gradient back, or at whose sequences it does.
    None for a loss without a clip.

    It calls the policy term again, which the compiler computes once.
    """
    sequences = prepare(policy_logprobs_BT, inputs, config)
    _, means = loss_type_of(config).policy_term(sequences, config)
    found = [means[name] for name in CLIPS if name in means]
    return jnp.broadcast_to(found[0] != 0, sequences.mask_BT.shape) & sequences.mask_BT if found else None


def _kl_term(sequences: Sequences, reference_logprobs_BT: jax.Array | None, config: LossConfig) -> jax.Array:
    if reference_logprobs_BT is None:
        raise ValueError(f"reference log-probs are needed for beta = {config.beta}, got None; or set beta to 0")
    reference_BT = jnp.where(sequences.mask_BT, reference_logprobs_BT, 0).astype(sequences.logprobs_BT.dtype)
    reference_BT = stop_gradient(reference_BT)  # no gradient reaches the reference
    kl_BT = KL_ESTIMATORS[config.kl_estimator](reference_BT - sequences.logprobs_BT)
    return kl_BT * sequences.ratio_BX if config.use_bias_correction_kl else kl_BT
