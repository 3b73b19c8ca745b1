"""Reports failures of reward functions, and decides when a function is down, so that training would learn nothing.

In: the result of each draw's judging, and the end of each step. Out: problems in words, each sort of failure in full
once, and that it goes on when the number of steps with failures has doubled; for each function the number of steps in a
row that it was down, which checkpoints remember; an error. A call fails by an exception, a time limit, a crash, or a
value that is no reward. None, "cannot judge", is an answer and no failure. Not here: the completions of a failed call
(`rewards.batch`), and steps without any reward (`rl.run.health`).
"""

import collections
import dataclasses
from collections.abc import Mapping, Sequence

from rewards.batch import FAILURES, TOO_MANY, RewardResult, problems_of
from rewards.contract import RewardSpec


class FailureWatch:
    """Counts the failed calls of functions with a weight. A function of weight 0 is a metric, and may fail.

    Args:
      max_share: the largest share of a step's completions on which a function may fail; 1: it is never down.
      patience: steps in a row that it must have been down for an error.

    Attributes:
      steps_down: {function that was down in the last step: number of such steps in a row}, JSON values.
      error: the reason why the run should end; None: it should go on.
    """

    def __init__(self, specs: Sequence[RewardSpec], max_share: float, patience: int):
        self.steps_down: dict[str, int] = {}
        self.error: str | None = None
        self._max_share, self._patience = max_share, patience
        self._names = [spec.name for spec in specs if spec.weight]
        self._said: dict[str, set[str]] = {spec.name: set() for spec in specs}  # sorts of failures
        self._said_once: set[str] = set()  # lines
        self._steps_failed: collections.Counter[str] = collections.Counter()  # steps in which a function failed
        self._failed_now: set[str] = set()  # functions, in this step
        self._last: dict[str, str] = {}  # failure of each function
        self._num_failed: collections.Counter[str] = collections.Counter()  # completions of this step
        self._num_judged = 0

    def restore(self, steps_down: Mapping[str, int]) -> None:
        """Takes over the `steps_down` of an earlier part of the run."""
        self.steps_down = {name: steps_down[name] for name in self._names if name in steps_down}

    def add(self, result: RewardResult) -> RewardResult:
        """Counts one draw of the step, of which there may be several.

        Returns:
          The result. If a function failed only in ways that were reported before, its problems are one line with
          counts, in the second step in which it fails, the fourth, the eighth and so on, and no line otherwise.
        """
        size, problems = len(result.rewards), [line for line in result.problems if line not in self._said_once]
        self._said_once.update(line for line in problems if line.endswith(TOO_MANY))
        self._num_judged += size
        for name, sorts in result.failures.items():
            kinds = {kind: result.counts[name][kind] for kind in FAILURES if result.counts[name][kind]}
            self._num_failed[name] += sum(kinds.values())
            self._last[name] = [*sorts.values()][-1]
            is_first = name not in self._failed_now  # of this step
            self._failed_now.add(name)
            num_steps = self._steps_failed[name] = self._steps_failed[name] + is_first
            if self._said[name].issuperset(sorts):
                told = problems_of(name, problems)
                counts = ", ".join(f"{kind} {count}" for kind, count in kinds.items())
                problems = [line for line in problems if line not in told]
                if is_first and num_steps.bit_count() == 1:
                    how = f"failed as before on {sum(kinds.values())} of {size} ({counts})"
                    problems.append(f"reward {name!r} {how}, in {num_steps} steps so far")
            self._said[name].update(sorts)
        return dataclasses.replace(result, problems=problems)

    def end_step(self) -> None:
        """To be called at the end of a step's draws: updates `steps_down` and `error`."""
        shares = {name: self._num_failed[name] / self._num_judged for name in self._names}
        down = [name for name in self._names if shares[name] > self._max_share]
        self.steps_down = {name: self.steps_down.get(name, 0) + 1 for name in down}
        for name, num_steps in self.steps_down.items():
            if num_steps >= self._patience:
                self.error = (
                    "rewards.max_failed_share must be at least the share of completions on which a reward function "
                    f"fails, got {self._max_share:g}, while {name!r} failed on more in {num_steps} step(s) in a row, "
                    f"on {shares[name]:.0%} in the last ({self._last[name]}). The run is saved: mend the function, "
                    "and the same command goes on; rewards.max_failed_share=1 goes on without it"
                )
        self._num_failed.clear()
        self._failed_now.clear()
        self._num_judged = 0
