"""Combines the rewards of several functions into one number, and computes their statistics for the log.

`None` means "cannot judge": it is never 0, and it never enters a mean.
"""

import dataclasses
import math
from collections.abc import Sequence


@dataclasses.dataclass(frozen=True)
class RewardSummary:
    """One function over one batch: `mean` and population `std` of the judged samples (None if there are none)."""

    mean: float | None
    std: float | None
    judged: int
    none: int


def weighted_sum(rewards_row: Sequence[float | None], weights: Sequence[float]) -> float | None:
    """Sum of weight times reward over the functions that judged the sample.

    A None adds nothing. A function of weight 0 is a metric: it adds nothing and judges nothing, so that a row that is
    None in every function of non-zero weight is None. Raises ValueError when the lengths differ.
    """
    if len(rewards_row) != len(weights):
        raise ValueError(f"a row of rewards must have one entry per weight ({len(weights)}), got {len(rewards_row)}")
    terms = [
        weight * reward
        for reward, weight in zip(rewards_row, weights, strict=True)
        if reward is not None and weight != 0
    ]
    return math.fsum(terms) if terms else None


def summarize(rewards: Sequence[Sequence[float | None]], names: Sequence[str]) -> dict[str, RewardSummary]:
    """Statistics per function of a batch of rewards (one row per sample, one column per name)."""
    for row in rewards:
        if len(row) != len(names):
            raise ValueError(f"a row of rewards must have one entry per function ({len(names)}), got {len(row)}")
    return {name: _summary([row[column] for row in rewards]) for column, name in enumerate(names)}


def _summary(values: Sequence[float | None]) -> RewardSummary:
    judged = [value for value in values if value is not None]
    if not judged:
        return RewardSummary(mean=None, std=None, judged=0, none=len(values))
    mean = math.fsum(judged) / len(judged)
    std = math.sqrt(math.fsum((value - mean) ** 2 for value in judged) / len(judged))
    return RewardSummary(mean=mean, std=std, judged=len(judged), none=len(values) - len(judged))
