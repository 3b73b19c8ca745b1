"""Advantages of tokens for REINFORCE++: the KL estimate is a part of each token's reward, not a term of the loss.

In: the minibatches of a step with one reward for each completion, and old and reference log-probs. Out: an advantage
for each token. Eq. 8 to 10 of https://arxiv.org/abs/2501.03262: with the reward R of a completion of L tokens

    A_t = R - beta * sum_{i = t}^{L} KL_i,        KL_i = log(old_i / reference_i) with the estimator k1

Then the mean is subtracted, and the result divided by the standard deviation (ddof 1, 1e-4 added, as in
`rl.algorithms.advantages`). Mean and deviation are over all trained tokens of the step.

Legend: M pieces, R rows, C completions of a row, L tokens of a completion.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from rl.algorithms.advantages import STD_EPSILON
from rl.algorithms.loss_types import KL_ESTIMATORS
from rl.devices.mesh import replicated
from rl.devices.programs import Program
from rl.training.packing import Batch
from rl.training.train_step import batch_shardings


class TokenRewards(NamedTuple):
    """The inputs for the advantages of one minibatch, named as in `Batch`. `advantages_MRC` holds rewards."""

    mask_MRCL: Any
    advantages_MRC: Any
    old_logprobs_MRCL: Any
    reference_logprobs_MRCL: Any

    @classmethod
    def of(cls, batch: Batch) -> "TokenRewards":
        """The fields of a batch, whose leaves may be arrays, shapes or shardings."""
        return cls(*(getattr(batch, name) for name in cls._fields))


def token_advantages(
    minibatches: Sequence[TokenRewards], beta: float, kl_estimator: str
) -> tuple[tuple[jax.Array, ...], jax.Array]:
    """Advantages [M, R, C, L] of each minibatch, 0 on padding, and the mean KL estimate over all tokens."""
    masks, kls, returns = [], [], []
    for minibatch in minibatches:
        mask_MRCL = minibatch.mask_MRCL > 0
        # Masked first, because a log-prob may be anything where nothing was drawn.
        log_ratio_MRCL = jnp.where(mask_MRCL, minibatch.reference_logprobs_MRCL - minibatch.old_logprobs_MRCL, 0)
        kl_MRCL = KL_ESTIMATORS[kl_estimator](log_ratio_MRCL)
        kl_to_go_MRCL = jnp.flip(jnp.cumsum(jnp.flip(kl_MRCL, -1), -1), -1)
        masks.append(mask_MRCL)
        kls.append(kl_MRCL)
        returns.append(minibatch.advantages_MRC[..., None] - beta * kl_to_go_MRCL)

    def total(values: list[jax.Array]) -> Any:
        """The sum over the tokens of all minibatches."""
        return sum(jnp.sum(jnp.where(mask, x, 0)) for mask, x in zip(masks, values, strict=True))

    count = total(masks)
    centre = total(returns) / jnp.maximum(count, 1)
    variance = total([jnp.square(x - centre) for x in returns]) / jnp.maximum(count - 1, 1)
    scale = jnp.sqrt(variance) + STD_EPSILON
    advantages = (jnp.where(mask, (x - centre) / scale, 0) for mask, x in zip(masks, returns, strict=True))
    return tuple(advantages), total(kls) / jnp.maximum(count, 1)


def token_advantages_program(
    num_minibatches: int, beta: float, kl_estimator: str, *, mesh: Mesh, rules: Mapping[str, Sequence[str]]
) -> Program:
    """`token_advantages` on the devices: (a `TokenRewards` for each minibatch,) -> (advantages of each, mean KL)."""
    rows = batch_shardings(mesh, rules)
    each = (TokenRewards.of(rows),) * num_minibatches
    return Program(
        lambda minibatches: token_advantages(minibatches, beta, kl_estimator),
        (each,),
        ((rows.mask_MRCL,) * num_minibatches, replicated(mesh)),
    )
