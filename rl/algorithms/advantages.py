"""Advantages from rewards, relative to the group of completions that answer the same prompt. numpy, on the host.

In: rewards [n, K] of n completions by K functions, NaN where a function could not judge. Out: one advantage for each
completion, and a few statistics. Not here: calling reward functions (`rewards`), losses (`losses`).

- grpo: https://arxiv.org/abs/2402.03300; no division by the standard deviation: https://arxiv.org/abs/2503.20783;
  division by the one of the batch: https://arxiv.org/abs/2508.08221
- rloo, leave one out: https://arxiv.org/abs/2402.14740
- maxrl, divided by the mean reward of the group: https://arxiv.org/abs/2602.02710
- reinforce++, whitened over the batch, and reinforce++_baseline, which first subtracts the mean of the group:
  https://arxiv.org/abs/2501.03262. Each completion counts once in mean and deviation, whatever its length. With
  `grpo.kl_in_reward`, training computes an advantage for each token from the rewards (`rl.training.token_advantages`).
- normalize_then_sum (GDPO): https://arxiv.org/abs/2601.05242

Standard deviations have ddof 1 and get 1e-4 added (outside the root), as in TRL 1.16.

Shapes: B completions (rows of one group are consecutive), P groups, G completions per group, K reward functions.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from rewards.importing import USER_ERRORS

SCALE_REWARDS = ("group", "batch", "none")
AGGREGATIONS = ("sum_then_normalize", "normalize_then_sum")
# The scale_rewards that each estimator is defined for.
ESTIMATORS = {
    "grpo": SCALE_REWARDS,
    "rloo": ("none",),
    "maxrl": ("none",),
    "reinforce++": ("batch",),
    "reinforce++_baseline": ("batch",),
}
STD_EPSILON = 1e-4
MEAN_EPSILON = 1e-6  # added to the mean that maxrl divides by, as in the authors' code
ZERO_STD = 1e-8  # a spread up to this counts as zero in frac_reward_zero_std


class Advantages(NamedTuple):
    """Result of `compute_advantages`.

    advantages_B: float64; exactly 0 for completions that no function judged.
    valid_B: bool; False for completions that no function judged. They must leave the loss: numerator, denominator and
      KL term.
    stats: reward and reward_std (of the weighted sum, over the batch), frac_reward_zero_std (share of completions
      without spread to learn from). NaN where nothing was judged.
    """

    advantages_B: np.ndarray
    valid_B: np.ndarray
    stats: dict[str, float]


def compute_advantages(
    rewards_BK: np.ndarray,
    weights_K: np.ndarray | None,
    group_size: int,
    scale_rewards: str,
    aggregation: str,
    estimator: str | Callable[..., Any],
    label: str = "the advantage estimator",
) -> Advantages:
    """Advantage of each completion within its group.

    Args:
        rewards_BK: float; NaN where a function returned None, which adds nothing to the completion's weighted sum. A
          completion that is NaN in every column stays out of every mean.
        weights_K: one weight for each function; None: all 1.
        group_size: G; B must be a multiple of it.
        scale_rewards: the divisor of centred rewards: the standard deviation of the "group", of the "batch", or "none".
          normalize_then_sum ignores it and takes the batch's.
        aggregation: "sum_then_normalize", or "normalize_then_sum", which normalises each function within the group,
            sums, and whitens over the batch.
        estimator: "grpo": the baseline is the mean of the group. "rloo": the mean of the others, unscaled. "maxrl":
          like "grpo", divided by the mean of the group; for rewards >= 0 (a group whose mean is not above 0 gets
          advantage 0). "reinforce++": the mean of the batch, divided by the standard deviation of the batch.
          "reinforce++_baseline": the mean of the group, divided by the standard deviation of what remains over the
          batch. A user's function, `(rewards_BK, weights_K, group_size) -> advantages_B`, replaces all this;
          scale_rewards and aggregation are then ignored.
        label: how messages name a user's estimator.

    Raises:
        ValueError: a shape does not fit, a reward is infinite, or a mode is unknown or has no meaning.
    """
    rewards_BK = np.asarray(rewards_BK, np.float64)
    weights_K = np.ones(rewards_BK.shape[-1]) if weights_K is None else np.asarray(weights_K, np.float64)
    if isinstance(estimator, str):
        check_modes(scale_rewards, aggregation, estimator)
    _validate(rewards_BK, weights_K, group_size)
    valid_B = ~np.all(np.isnan(rewards_BK), axis=1)
    sums_B = _weighted_sum(rewards_BK, weights_K, valid_B)
    group_spread_B = np.repeat(_std(sums_B.reshape(-1, group_size), axis=1), group_size)
    batch_spread_B = np.broadcast_to(_std(sums_B, axis=0), sums_B.shape)
    if not isinstance(estimator, str):
        advantages_B = _of_user(estimator, label, rewards_BK, weights_K, group_size, valid_B)
        spread_B = group_spread_B
    elif aggregation == "normalize_then_sum":
        scores_BK = _within_groups(rewards_BK, group_size, "group", estimator)
        scores_B = _weighted_sum(scores_BK, weights_K, valid_B)
        # Whitening over the batch is group normalisation with the batch as the only group.
        advantages_B = _within_groups(scores_B[:, None], len(scores_B), "group", estimator)[:, 0]
        spread_B = np.broadcast_to(_std(scores_B, axis=0), scores_B.shape)
    elif estimator == "maxrl":
        centred_B = _within_groups(sums_B[:, None], group_size, "none", estimator)[:, 0]
        mean_B = np.repeat(_mean(sums_B.reshape(-1, group_size), axis=1), group_size)
        has_success_B = mean_B > 0  # NaN compares as False
        advantages_B = np.where(has_success_B, centred_B / (np.where(has_success_B, mean_B, 1) + MEAN_EPSILON), 0.0)
        spread_B = np.where(has_success_B | np.isnan(mean_B), group_spread_B, 0.0)
    elif estimator == "reinforce++":
        advantages_B = _within_groups(sums_B[:, None], len(sums_B), "group", estimator)[:, 0]
        spread_B = batch_spread_B
    elif estimator == "reinforce++_baseline":
        # What remains has mean 0 already. Dividing alone keeps the zeros of a group without spread exact.
        centred_B = _within_groups(sums_B[:, None], group_size, "none", estimator)[:, 0]
        advantages_B = centred_B / (_std(centred_B, axis=0) + STD_EPSILON)
        spread_B = group_spread_B
    else:
        advantages_B = _within_groups(sums_B[:, None], group_size, scale_rewards, estimator)[:, 0]
        spread_B = batch_spread_B if scale_rewards == "batch" else group_spread_B
    stats = {
        "reward": float(_mean(sums_B, axis=0)),
        "reward_std": float(_std(sums_B, axis=0)),
        "frac_reward_zero_std": float(np.mean(spread_B <= ZERO_STD)),  # NaN compares as False: not counted
    }
    return Advantages(np.where(np.isnan(advantages_B), 0.0, advantages_B), valid_B, stats)


def check_modes(scale_rewards: str, aggregation: str, estimator: str) -> None:
    """ValueError for a mode that is unknown, or for which the estimator is not defined."""
    for name, value, allowed in (
        ("scale_rewards", scale_rewards, SCALE_REWARDS),
        ("aggregation", aggregation, AGGREGATIONS),
        ("estimator", estimator, tuple(ESTIMATORS)),
    ):
        if value not in allowed:
            raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {value!r}")
    if scale_rewards not in ESTIMATORS[estimator] or (estimator != "grpo" and aggregation != "sum_then_normalize"):
        raise ValueError(
            f"the {estimator} estimator has a scale of its own: scale_rewards must be {ESTIMATORS[estimator][0]} and "
            f"aggregation sum_then_normalize, got {scale_rewards} and {aggregation}; or use the grpo estimator"
        )


def _validate(rewards_BK: np.ndarray, weights_K: np.ndarray, group_size: int) -> None:
    if rewards_BK.ndim != 2 or rewards_BK.size == 0:
        raise ValueError(
            f"rewards must be a non-empty array [completions, functions], got shape {rewards_BK.shape}; "
            "give one row for each completion and one column for each reward function"
        )
    if weights_K.shape != rewards_BK.shape[1:]:
        raise ValueError(
            f"weights must hold one number for each of the {rewards_BK.shape[1]} reward functions, "
            f"got shape {weights_K.shape}; add or remove weights"
        )
    if np.any(np.isinf(rewards_BK)):
        row, column = np.argwhere(np.isinf(rewards_BK))[0]
        raise ValueError(
            f"rewards must be finite or NaN (not judged), got {rewards_BK[row, column]} in row {row}, column {column}; "
            "return None from the reward function instead"
        )
    if group_size < 1 or len(rewards_BK) % group_size:
        raise ValueError(
            f"the number of completions must be a multiple of group_size, got {len(rewards_BK)} completions and "
            f"group_size {group_size}; pad incomplete groups with rows of NaN"
        )


def _of_user(
    estimator: Callable[..., Any],
    label: str,
    rewards_BK: np.ndarray,
    weights_K: np.ndarray,
    group_size: int,
    valid_B: np.ndarray,
) -> np.ndarray:
    """The checked result of a user's estimator; NaN for completions that no function judged."""
    try:
        result = np.asarray(estimator(rewards_BK.copy(), weights_K.copy(), group_size), np.float64)
    except USER_ERRORS as error:
        raise ValueError(
            f"{label} failed on rewards of shape {rewards_BK.shape} and groups of {group_size}: "
            f"{type(error).__name__}: {error}"
        ) from error
    if result.shape != valid_B.shape:
        raise ValueError(
            f"{label} must return one advantage for each of {len(valid_B)} completions, got shape {result.shape}"
        )
    wrong = np.flatnonzero(valid_B & ~np.isfinite(result))
    if len(wrong):
        raise ValueError(
            f"{label} must return finite advantages for completions with a reward, got {result[wrong[0]]} for row "
            f"{wrong[0]} with rewards {rewards_BK[wrong[0]].tolist()}; NaN stands for a function that could not judge: "
            "use np.nanmean and the like"
        )
    return np.where(valid_B, result, np.nan)


def _weighted_sum(values_BK: np.ndarray, weights_K: np.ndarray, valid_B: np.ndarray) -> np.ndarray:
    """The weighted sum [B]. In a valid row NaN counts as 0; a row that is not valid gives NaN."""
    sums_B = np.sum(np.where(np.isnan(values_BK), 0.0, values_BK) * weights_K, axis=1)
    return np.where(valid_B, sums_B, np.nan)


def _within_groups(values_BK: np.ndarray, group_size: int, scale: str, estimator: str) -> np.ndarray:
    """Each column relative to its group and scaled; NaN stays NaN and counts in no mean."""
    values_PGK = values_BK.reshape(-1, group_size, values_BK.shape[1])
    centred_PGK = values_PGK - _mean(values_PGK, axis=1, keepdims=True)
    if estimator == "rloo":
        # R_i - mean of the others = (R_i - mean of all) * n / (n - 1); without others there is no baseline.
        count_P1K = np.sum(~np.isnan(values_PGK), axis=1, keepdims=True)
        centred_PGK = centred_PGK * np.where(count_P1K > 1, count_P1K / np.maximum(count_P1K - 1, 1), 0.0)
    # The rounded mean of equal numbers can differ from them in the last bit; the advantage must be exactly 0.
    lowest_P1K = np.min(values_PGK, axis=1, keepdims=True, initial=np.inf, where=~np.isnan(values_PGK))
    highest_P1K = np.max(values_PGK, axis=1, keepdims=True, initial=-np.inf, where=~np.isnan(values_PGK))
    centred_PGK = np.where((lowest_P1K == highest_P1K) & ~np.isnan(values_PGK), 0.0, centred_PGK)
    if scale == "group":
        centred_PGK = centred_PGK / (_std(values_PGK, axis=1, keepdims=True) + STD_EPSILON)
    elif scale == "batch":
        centred_PGK = centred_PGK / (_std(values_BK, axis=0) + STD_EPSILON)
    return centred_PGK.reshape(values_BK.shape)


def _mean(values: np.ndarray, axis: int, keepdims: bool = False) -> np.ndarray:
    """Mean over the numbers that are not NaN; NaN where there is none."""
    is_number = ~np.isnan(values)
    count = np.sum(is_number, axis=axis, keepdims=keepdims)
    total = np.sum(np.where(is_number, values, 0.0), axis=axis, keepdims=keepdims)
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)


def _std(values: np.ndarray, axis: int, keepdims: bool = False) -> np.ndarray:
    """Standard deviation (ddof 1) over the numbers that are not NaN; NaN for fewer than two of them.

    Along an axis of length 1 it is 0: a single completion has no spread, which is not the same as an unknown one.
    """
    is_number = ~np.isnan(values)
    count = np.sum(is_number, axis=axis, keepdims=keepdims)
    deviations = np.where(is_number, values - _mean(values, axis, keepdims=True), 0.0)
    squares = np.sum(np.square(deviations), axis=axis, keepdims=keepdims)
    undefined = 0.0 if values.shape[axis] == 1 else np.nan
    return np.where(count > 1, np.sqrt(squares / np.maximum(count - 1, 1)), undefined)
