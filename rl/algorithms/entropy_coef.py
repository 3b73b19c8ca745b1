"""Adaptive entropy bonus: plain numbers on the host, carried from update to update by the caller."""

from typing import NamedTuple

from rl.algorithms.loss_types import LossConfig


class EntropyCoefState(NamedTuple):
    """State of the adaptive entropy bonus, carried from update to update and through checkpoints.

    Attributes:
      coef: coefficient after the last update.
      last_entropy: nats per selected token, measured in the last update; +inf before the first update.
    """

    coef: float
    last_entropy: float


def applied_entropy_coef(coef: float, last_entropy: float, config: LossConfig) -> float:
    """The coefficient of an update: 0 while an adaptive bonus has nothing to correct.

    Args:
        coef: `config.entropy_coef` before the first update, then the result of `next_entropy_coef`.
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
