"""Checks in the run whether a function really judges each completion by itself, as the start-up check found.

The check's completions may not reach the part of a function that compares. So a batch of the run is also called whole
when two completions of a group reach a reward that no compared batch had twice in a group. For a function with few
possible rewards that is one call for each reward. In: rewards of a batch. Out: decisions, equal in all processes that
judge it together. No processes here.
"""

import dataclasses
import math
from collections.abc import Sequence

_COMPARISONS = 8  # of one function in one run, so that ever rising rewards do not mean endless calls
_ROUNDING = 1e-6  # relative; sums in another order do not count as a difference
_ZERO = 1e-9


@dataclasses.dataclass
class Doubt:
    """The doubt about one function.

    left: the number of comparisons that may still be made. highest: the highest reward that two completions of one
      group had in a batch that agreed; None: no batch has agreed yet.
    """

    left: int = _COMPARISONS
    highest: float | None = None

    def is_raised_by(self, rewards: Sequence[float | None], group_size: int) -> bool:
        """Whether a batch with these rewards, each judged by itself, should be called whole, too."""
        second = second_best(rewards, group_size)
        return self.left > 0 and second is not None and (self.highest is None or second > self.highest)


def second_best(rewards: Sequence[float | None], group_size: int) -> float | None:
    """The highest reward that two completions of one group reach; None where no group has two judged completions.

    A single best completion shows nothing, because it wins both alone and among all.
    """
    groups = (rewards[start : start + group_size] for start in range(0, len(rewards), group_size))
    known = (sorted(reward for reward in group if reward is not None) for group in groups)
    return max((group[-2] for group in known if len(group) > 1), default=None)


def agree(alone: Sequence[float | None], whole: Sequence[float | None], *, some_failed: bool) -> bool:
    """Whether calls with one completion each and one call with all gave equal rewards, up to rounding.

    some_failed: whether some calls with one completion failed; their None is then ignored.
    """
    return all(
        some_failed
        if one is None
        else of_all is not None and math.isclose(one, of_all, rel_tol=_ROUNDING, abs_tol=_ZERO)
        for one, of_all in zip(alone, whole, strict=True)
        if one is not None or of_all is not None
    )
