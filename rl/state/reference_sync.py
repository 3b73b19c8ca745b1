"""The reference of the KL term: fixed, or moved after the policy (TR-DPO, https://arxiv.org/abs/2404.09656).

A fixed reference is kept as source and hash in `run.json` and read again at every start. One that moves is an item of
its own in the checkpoints. With alpha = `reference.ema`, every `reference.sync_every` steps

    reference <- alpha * policy + (1 - alpha) * reference

on the devices where both are, in float32 or wider, in the memory of the old reference. 1 copies the policy.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from rl.config.load import Config
from rl.models.train_state import PureState


class ReferenceSync:
    """Moves the reference at the steps that the configuration names."""

    def __init__(self, config: Config, shardings: Any):
        """`shardings`: of the weights, in which reference and policy are alike."""
        self._every = config.reference.sync_every
        self._mix = _jit_mix(config.reference.ema, shardings) if self._every else None

    def __call__(self, reference: PureState | None, policy: PureState, step: int) -> PureState | None:
        """The reference after `step` steps. The one that is passed in is donated: do not use it again."""
        if self._mix is None or reference is None or step % self._every:
            return reference
        return reference._replace(params=self._mix(reference.params, policy.params))


def _jit_mix(alpha: float, shardings: Any) -> Callable[[Any, Any], Any]:
    def mix(reference: jax.Array, policy: jax.Array) -> jax.Array:
        if alpha == 1:
            return jnp.copy(policy)  # a copy of its own: the policy's memory is donated to its next update
        dtype = jnp.promote_types(reference.dtype, jnp.float32)
        return (alpha * policy.astype(dtype) + (1 - alpha) * reference.astype(dtype)).astype(reference.dtype)

    return jax.jit(
        lambda reference, policy: jax.tree.map(mix, reference, policy),
        in_shardings=(shardings, shardings),
        out_shardings=shardings,
        donate_argnums=0,
        keep_unused=True,  # so that the old reference's memory is taken even by a copy
    )
