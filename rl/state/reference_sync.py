"""The reference of the KL term: built or restored, and fixed or moved towards the policy.

A fixed reference is kept as source and hash in `run.json`, and read again at every start. A reference that moves is an
item of its own in the checkpoints. With alpha = `reference.ema`, every `reference.sync_every` steps

    reference <- alpha * policy + (1 - alpha) * reference      (TR-DPO, https://arxiv.org/abs/2404.09656)

on the devices of both, in float32 or wider, in the memory of the old reference. alpha = 1 copies the policy.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from rl.config.load import Config
from rl.models.train_state import PureState
from rl.models.trainable import Trainable
from rl.state.checkpoint import Checkpoints
from rl.state.origin import Origin, pretrained_params
from rl.state.states import InitStateFn, frozen_reference, setup_decode_state


def restore_reference(
    config: Config,
    mesh: Mesh,
    init_reference_fn: InitStateFn,
    origin: Origin,
    checkpoints: Checkpoints,
    state: PureState,
) -> PureState | None:
    """The reference of a run that starts or resumes, a state of its own; None where the loss has no KL term.

    Where a part of the weights is frozen it is that part, whose arrays `state` already holds. A reference that moves is
    read from the checkpoint from which `state` was restored. Otherwise it is the run's origin.

    Args:
      init_reference_fn: builds the reference, without an optimizer.
      state: the policy's state, restored or new.
    """
    policy = init_reference_fn.policy
    if not config.grpo.beta:
        return None
    if Trainable(policy).has_frozen:
        return frozen_reference(policy, state)
    if config.reference.sync_every and checkpoints.latest_step is not None:
        params = checkpoints.restore_reference()
    else:
        params = pretrained_params(origin, checkpoints.abstract.shardings.params)
    return setup_decode_state(config, mesh, init_reference_fn, params)[0]


class ReferenceSync:
    """Moves the reference at the steps that the configuration names."""

    def __init__(self, config: Config, shardings: Any):
        """`shardings`: the shardings of the weights, equal for reference and policy."""
        self._every = config.reference.sync_every
        self._mix = _jit_mix(config.reference.ema, shardings) if self._every else None

    def __call__(self, reference: PureState | None, policy: PureState, step: int) -> PureState | None:
        """The reference after `step` steps. The argument is donated: do not use it again."""
        if self._mix is None or reference is None or step % self._every:
            return reference
        return reference._replace(params=self._mix(reference.params, policy.params))


def _jit_mix(alpha: float, shardings: Any) -> Callable[[Any, Any], Any]:
    def mix(reference: jax.Array, policy: jax.Array) -> jax.Array:
        if alpha == 1:
            return jnp.copy(policy)  # a copy, because the policy's memory is donated to its next update
        dtype = jnp.promote_types(reference.dtype, jnp.float32)
        return (alpha * policy.astype(dtype) + (1 - alpha) * reference.astype(dtype)).astype(reference.dtype)

    return jax.jit(
        lambda reference, policy: jax.tree.map(mix, reference, policy),
        in_shardings=(shardings, shardings),
        out_shardings=shardings,
        donate_argnums=0,
        keep_unused=True,  # so that even a copy takes the old reference's memory
    )
