"""Whether a function that the start-up check found to judge each completion by itself does so in the run as well.

The check's completions need not reach the part of a function that compares. So batches of the run are called whole,
too, each time that rewards show up of which no compared batch had two in one group: for a function with a few
possible rewards that is one call for each of them. In: rewards of a batch. Out: decisions, which are the same in all
processes that judge it together. No processes here.
"""

import dataclasses
import math
from collections.abc import Sequence

_COMPARISONS = 8  # of one function in one run: rewards that rise for ever must not mean calls for ever
_ROUNDING = 1e-6  # relative: sums in another order are no comparison of completions
_ZERO = 1e-9


@dataclasses.dataclass
class Doubt:
    """What is not known yet of one function.

    left: comparisons that may still be made. highest: the highest reward that two completions of one group had in a
    batch that agreed; None: no batch has.
    """

    left: int = _COMPARISONS
    highest: float | None = None

    def is_raised_by(self, rewards: Sequence[float | None], group_size: int) -> bool:
        """Whether a batch with these rewards, each judged by itself, should be called whole, too."""
        second = second_best(rewards, group_size)
        return self.left > 0 and second is not None and (self.highest is None or second > self.highest)


def second_best(rewards: Sequence[float | None], group_size: int) -> float | None:
    """The highest reward that two completions of one group reach; None where no group has two that were judged.

    One that is alone in its reward wins among all as it does by itself, which shows nothing.
    """
    groups = (rewards[start : start + group_size] for start in range(0, len(rewards), group_size))
    known = (sorted(reward for reward in group if reward is not None) for group in groups)
    return max((group[-2] for group in known if len(group) > 1), default=None)


def agree(alone: Sequence[float | None], whole: Sequence[float | None], *, some_failed: bool) -> bool:
    """Whether calls with one completion gave what one call with all did, but for rounding.

    some_failed: calls with one failed; their None says nothing.
    """
    return all(
        some_failed
        if one is None
        else of_all is not None and math.isclose(one, of_all, rel_tol=_ROUNDING, abs_tol=_ZERO)
        for one, of_all in zip(alone, whole, strict=True)
        if one is not None or of_all is not None
    )
