"""The checkup of each step: its health, why updates were skipped, what rounding loses, and its learning rate.

In: a step's metrics, the state after it, and the health so far. Out: a `Checkup`. Not here: what is unusual
(`rl.run.health`), and the search for what is not finite (`rl.run.not_finite`).
"""

from collections.abc import Collection, Mapping

import numpy as np
import optax

from rl.config.sections import HealthSection
from rl.models.train_state import PureState
from rl.run.health import Checkup, HealthState, examine, raise_if_stuck
from rl.run.not_finite import cause_of_skips
from rl.state.optimizer import last_lr, rounding_problems


class Checkups:
    """Examines the steps of a run.

    Args:
      section: thresholds and limits.
      schedule: update count -> learning rate.
      num_updates: updates of a step.
      watched: names of the reward functions of weight 0.
    """

    def __init__(
        self, section: HealthSection, schedule: optax.Schedule, num_updates: int = 1, watched: Collection[str] = ()
    ) -> None:
        self._section, self._schedule, self._num_updates, self._watched = section, schedule, num_updates, watched

    def examine(
        self,
        health: HealthState,
        metrics: Mapping[str, float],
        state: PureState,
        advantages_B: np.ndarray | None = None,
    ) -> Checkup:
        """`rl.run.health.examine` of a step. It says why, where every update was skipped. It warns where updates
        vanish in the weights' rounding. The metrics gain the learning rate of the last update.

        Args:
          health: that of the steps before.
          state: after the step's updates.
          advantages_B: of the step's completions; None in supervised training.
        """
        is_lost = metrics["skipped_updates"] == self._num_updates
        cause = cause_of_skips(metrics, state.params, advantages_B) if is_lost else None
        checkup = examine(self._section, health, metrics, self._num_updates, cause, self._watched)
        lr = last_lr(self._schedule, num_updates=int(state.step), num_skipped=checkup.health.num_skipped)
        warnings = [*rounding_problems(metrics), *checkup.warnings]
        return checkup._replace(metrics={**metrics, "lr": lr}, warnings=warnings)

    def raise_if_stuck(self, checkup: Checkup) -> None:
        """See `rl.run.health.raise_if_stuck`."""
        raise_if_stuck(self._section, checkup)
