"""Optimizer and learning-rate schedule from the config. Schedules count optimizer updates, never steps or
micro-batches.
"""

from typing import Any

import jax
import optax

from rl.config import Config
from rl.models.policy import Policy

_DECAYED = ("kernel", "embedding")  # matrices; norms ("scale") and "bias" are never decayed


def create_training_optimizer(
    config: Config, policy: Policy, num_updates: int | None = None
) -> tuple[optax.Schedule, optax.GradientTransformation]:
    """The schedule (update count -> learning rate) and the optax transformation of a run.

    Args:
      config: its `optimizer` section is read.
      policy: gives the dtype of the moments (that of the weights).
      num_updates: optimizer updates of the whole run; None: those of a GRPO run, steps * minibatches * epochs.

    Raises:
      ValueError: a warm-up that is not shorter than the run.
    """
    section = config.optimizer
    if num_updates is None:
        num_updates = config.grpo.steps * updates_per_step(config)
    if section.warmup_updates and section.warmup_updates >= num_updates:
        raise ValueError(
            f"optimizer.warmup_updates must be below the run's number of updates ({num_updates}), "
            f"got {section.warmup_updates}"
        )
    schedule = _schedule(section.schedule, section.lr, section.warmup_updates, num_updates)
    if section.name == "adamw":
        update = optax.adamw(
            schedule,
            b1=section.b1,
            b2=section.b2,
            eps=section.eps,
            weight_decay=section.weight_decay,
            mask=decay_mask,
            mu_dtype=policy.config.param_dtype,
        )
    else:
        update = optax.chain(optax.add_decayed_weights(section.weight_decay, mask=decay_mask), optax.sgd(schedule))
    clip = [optax.clip_by_global_norm(section.max_grad_norm)] if section.max_grad_norm else []
    return schedule, optax.chain(*clip, update)


def updates_per_step(config: Config) -> int:
    """Optimizer updates of one GRPO step."""
    return config.grpo.minibatches * config.grpo.epochs


def decay_mask(params: Any) -> Any:
    """True for the leaves that weight decay applies to: matrices, by name."""
    return jax.tree_util.tree_map_with_path(
        lambda path, _: any(str(getattr(part, "key", "")) in _DECAYED for part in path), params
    )


def _schedule(name: str, lr: float, warmup_updates: int, num_updates: int) -> optax.Schedule:
    remaining = max(num_updates - warmup_updates, 1)
    after = {
        "constant": lambda: optax.constant_schedule(lr),
        "linear": lambda: optax.linear_schedule(lr, 0.0, remaining),
        "cosine": lambda: optax.cosine_decay_schedule(lr, remaining),
    }[name]()
    if not warmup_updates:
        return after
    # Update number 0 already moves: the ramp runs from lr / warmup_updates to lr.
    ramp = optax.linear_schedule(lr / warmup_updates, lr, max(warmup_updates - 1, 1))
    return optax.join_schedules([ramp, after], [warmup_updates])
