"""Metrics of a loss in a form that merges exactly: sums of a piece, sums of the minibatch, then scalars by name.

Not here: the metrics of a policy term (`rl.algorithms.loss_types`).

Shapes: B sequences, T token positions; _B1 means one value for each sequence, _BX means [B, T] or [B, 1].
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from rl.algorithms.loss_types import (
    LossConfig,
    LossInputs,
    Sequences,
    beyond_bounds,
    loss_type_of,
    raw_sampler_ratio,
    sampler_difference,
)

# Metrics of every loss that are means over something else than the policy ratio belongs to. `LossType.belongs_to` holds
# those of one loss.
BELONGS_TO = {"kl": "token", "off_policy/kept_share": "sequence"}


class MetricSums(NamedTuple):
    """Metrics of a piece in a form that merges exactly: ratios as numerator and weight, totals, extremes."""

    numerators: dict[str, jax.Array]
    weights: dict[str, jax.Array]
    totals: dict[str, jax.Array]
    maxima: dict[str, jax.Array]
    minima: dict[str, jax.Array]


def metric_sums(
    sequences: Sequences,
    means: dict[str, jax.Array],
    entropy_BT: jax.Array | None,
    inputs: LossInputs,
    config: LossConfig,
) -> MetricSums:
    """Sums of every metric of a piece. `means` holds arrays that belong to tokens [B, T] or to sequences [B, 1]."""
    dtype, mask_BT = sequences.logprobs_BT.dtype, sequences.mask_BT
    real_B1 = inputs.sequence_mask_B.astype(bool)[:, None]
    by_sequence = config.importance_sampling_level == "sequence"
    ratio_where = real_B1 if by_sequence else mask_BT
    belongs_to = {**BELONGS_TO, **loss_type_of(config).belongs_to}
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
    add_mean("ratio/mean", sequences.ratio_BX, ratio_where)
    add_max("ratio/max", sequences.ratio_BX, ratio_where)
    for name, values_BX in means.items():
        if config.custom_term is not None and name not in belongs_to:
            where_BX = mask_BT if values_BX.shape == mask_BT.shape else real_B1
        else:
            where_BX = {"token": mask_BT, "sequence": real_B1}.get(belongs_to.get(name, ""), ratio_where)
        add_mean(name, values_BX, where_BX)
    if "clip_ratio/low_mean" in means:
        # The extremes are over the means of the sequences. A sequence without tokens has a mean only at sequence level.
        row_where_B1 = real_B1 if by_sequence else jnp.any(mask_BT, axis=1, keepdims=True)
        width_B1 = jnp.ones_like(sequences.lengths_B1) if by_sequence else sequences.lengths_B1

        def row_means(name: str) -> jax.Array:
            return jnp.sum(jnp.where(ratio_where, means[name], 0), axis=1, keepdims=True, dtype=dtype) / width_B1

        add_min("clip_ratio/low_min", row_means("clip_ratio/low_mean"), row_where_B1)
        add_max("clip_ratio/high_max", row_means("clip_ratio/high_mean"), row_where_B1)
    if inputs.sampler_logprobs_BT is not None:
        difference_BT, scored_BT = sampler_difference(
            sequences.old_BT, inputs.sampler_logprobs_BT.astype(dtype), mask_BT
        )
        add_mean("drawn_difference/mean", jnp.abs(difference_BT), scored_BT)
        add_max("drawn_difference/max", jnp.abs(difference_BT), scored_BT)
    if sequences.sampler_ratio_BX is not None:
        assert inputs.sampler_logprobs_BT is not None
        sampler_where = real_B1 if config.sampler_is_mode.startswith("sequence") else mask_BT
        add_min("sampler_ratio/min", sequences.sampler_ratio_BX, sampler_where)
        add_mean("sampler_ratio/mean", sequences.sampler_ratio_BX, sampler_where)
        add_max("sampler_ratio/max", sequences.sampler_ratio_BX, sampler_where)
        raw_BX = raw_sampler_ratio(sequences.old_BT, inputs.sampler_logprobs_BT.astype(dtype), mask_BT, config)
        is_below_BX, is_above_BX = beyond_bounds(raw_BX, config)
        add_mean("sampler_ratio/raw_mean", raw_BX, sampler_where)
        add_mean("sampler_ratio/cut_share", is_below_BX | is_above_BX, mask_BT)
    return sums


def zero_sums(like: MetricSums) -> MetricSums:
    """The neutral element of `combine_sums`. `like`: sums, or their shapes from `jax.eval_shape`."""

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
    """The sums of two pieces together. Both must have the same metrics."""
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

    - policy_loss: the loss without entropy bonus and positive NLL, before division by the accumulation steps;
    - kl: the estimate in use, times the policy ratio if use_bias_correction_kl;
    - entropy, selected_entropy: nats per token, over all tokens and over those of the entropy quantile;
    - ratio/mean, ratio/max: of policy to old probabilities;
    - clip_ratio/{low,high,region}_mean: share where the clip holds the gradient back; low_min, high_max: of sequences;
    - cispo/clip_ratio, vespo/phi_mean, off_policy/kept_share: of the option they are named after;
    - dppo/masked_share, gmpo/clip_ratio: share of tokens outside the trust region, or clipped;
    - loss_term/NAME: what a user's loss calls its metrics;
    - positive_nll: nats per token of the completions with A > 0;
    - drawn_difference/{mean,max}: absolute, old log-probs against those in the distribution that was drawn from, in
      nats;
    - sampler_ratio/{min,mean,max}: as the loss takes it, cut at its bounds or 0 beyond them;
    - sampler_ratio/raw_mean: before that; far from 1 means that sampler and trainer do not agree;
    - sampler_ratio/cut_share: share of tokens whose ratio, or whose sequence's ratio, was beyond its bounds.
    """
    means = {name: value / jnp.maximum(sums.weights[name], 1) for name, value in sums.numerators.items()}
    extremes = {
        name: jnp.where(jnp.isfinite(value), value, jnp.nan) for name, value in (sums.maxima | sums.minima).items()
    }
    return sums.totals | means | extremes
