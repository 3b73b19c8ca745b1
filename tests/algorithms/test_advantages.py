"""Group advantages against numbers computed with TRL 1.16 (tests/files/grpo_losses.json), and what must always hold."""

import json
import math
from typing import Any

import numpy as np
import pytest

from rl.algorithms.advantages import Advantages, compute_advantages
from tests.helpers.places import FILES

DATA = json.loads((FILES / "grpo_losses.json").read_text())
CASES = {case["name"]: case for case in DATA["advantage_cases"]}


def rewards_array(rows: list[list[float | None]]) -> np.ndarray:
    return np.array([[math.nan if value is None else value for value in row] for row in rows], np.float64)


def advantages_of(rows: Any, group_size: int, **changes: Any) -> Advantages:
    options = {
        "weights_K": None,
        "scale_rewards": "group",
        "aggregation": "sum_then_normalize",
        "estimator": "grpo",
    }
    return compute_advantages(rewards_array(rows), group_size=group_size, **(options | changes))


def test_golden_data_is_complete() -> None:
    assert len(CASES) == len(DATA["advantage_cases"]) == 66


@pytest.mark.parametrize("name", CASES)
def test_golden_case_has_the_advantages_and_statistics_of_trl(name: str) -> None:
    case = CASES[name]
    result = advantages_of(
        case["rewards"],
        case["group_size"],
        weights_K=case["weights"],
        scale_rewards=case["scale_rewards"],
        aggregation=case["aggregation"],
    )
    expected_B = np.array(case["expected_advantages"])
    scale = np.abs(expected_B).max() or 1.0
    np.testing.assert_allclose(result.advantages_B, expected_B, rtol=0, atol=1e-12 * scale)
    assert result.advantages_B.dtype == np.float64
    expected = dict(case["expected_metrics"])
    # TRL averages the share in float32.
    assert result.stats.pop("frac_reward_zero_std") == pytest.approx(expected.pop("frac_reward_zero_std"), abs=1e-6)
    assert result.stats == pytest.approx(expected, rel=1e-12, abs=1e-12)
    judged_B = [any(value is not None for value in row) for row in case["rewards"]]
    assert result.valid_B.tolist() == judged_B


@pytest.mark.parametrize("scale_rewards", ["group", "batch", "none"])
def test_group_without_variance_has_advantage_exactly_zero(scale_rewards: str) -> None:
    rows = [[0.1], [0.1], [0.1], [0.3], [0.7], [None]]
    result = advantages_of(rows, 3, scale_rewards=scale_rewards)
    assert np.sum([0.1, 0.1, 0.1]) / 3 != 0.1  # so the plain difference would not be zero
    assert result.advantages_B[:3].tolist() == [0.0, 0.0, 0.0]
    assert np.all(result.advantages_B[3:5] != 0)


@pytest.mark.parametrize("aggregation", ["sum_then_normalize", "normalize_then_sum"])
def test_rows_that_no_function_judged_change_nothing_for_the_others(aggregation: str) -> None:
    rows = [[1.0, 0.5], [0.0, None], [2.0, 0.25], [0.5, 1.0], [0.0, 0.0], [1.0, 3.0]]
    with_holes = [[None, None], *rows[:3], rows[3], rows[4], [None, None], rows[5]]
    expected = advantages_of(rows, 3, aggregation=aggregation)
    result = advantages_of(with_holes, 4, aggregation=aggregation)
    assert result.valid_B.tolist() == [False, True, True, True, True, True, False, True]
    assert result.advantages_B[[0, 6]].tolist() == [0.0, 0.0]
    np.testing.assert_allclose(result.advantages_B[result.valid_B], expected.advantages_B, rtol=0, atol=1e-14)


def test_rloo_advantage_is_the_reward_minus_the_mean_of_the_others() -> None:
    result = advantages_of([[3.0], [1.0], [5.0], [0.0], [None], [1.0]], 3, estimator="rloo", scale_rewards="none")
    np.testing.assert_allclose(result.advantages_B, [3.0 - 3.0, 1.0 - 4.0, 5.0 - 2.0, -1.0, 0.0, 1.0], atol=1e-15)


def test_rloo_without_others_or_without_variance_is_exactly_zero() -> None:
    rows = [[0.7], [None], [None], [0.1], [0.1], [0.1]]
    result = advantages_of(rows, 3, estimator="rloo", scale_rewards="none")
    assert result.advantages_B.tolist() == [0.0] * 6


def test_rloo_of_two_is_twice_the_centred_reward() -> None:
    rows = [[0.0], [1.0], [0.25], [0.5]]
    rloo = advantages_of(rows, 2, estimator="rloo", scale_rewards="none")
    centred = advantages_of(rows, 2, scale_rewards="none")
    np.testing.assert_array_equal(rloo.advantages_B, 2 * centred.advantages_B)


def test_maxrl_advantage_is_the_centred_reward_over_the_mean_reward_of_the_group() -> None:
    # Group 1: one of four succeeds, mean 1/4: 0.75 / 0.25 = 3 and -0.25 / 0.25 = -1. Group 2: mean 3/4.
    rows = [[1.0], [0.0], [0.0], [0.0], [1.0], [1.0], [0.0], [1.0]]
    result = advantages_of(rows, 4, estimator="maxrl", scale_rewards="none")
    expected = np.array([3.0, -1.0, -1.0, -1.0, 1 / 3, 1 / 3, -1.0, 1 / 3])
    np.testing.assert_allclose(result.advantages_B, expected, rtol=5e-6)  # 1e-6 is added to the mean
    np.testing.assert_allclose(result.advantages_B[0], 0.75 / (0.25 + 1e-6), rtol=1e-15)


def test_maxrl_group_without_success_or_without_variance_is_exactly_zero() -> None:
    rows = [[0.0], [0.0], [1.0], [1.0], [-1.0], [0.5], [None], [None], [None], [0.5]]
    result = advantages_of(rows, 2, estimator="maxrl", scale_rewards="none")
    assert result.advantages_B.tolist() == [0.0] * 10
    # The groups of 0 and 0, of 1 and 1, and the one whose mean is negative; unknown ones do not count.
    assert result.stats["frac_reward_zero_std"] == pytest.approx(6 / 10)


def test_reinforce_plus_plus_whitens_over_the_batch() -> None:
    # Mean 2; squares 4 + 4 + 0 + 0, over 3: the deviation is sqrt(8 / 3). A group without spread still pulls.
    result = advantages_of([[0.0], [0.0], [4.0], [4.0]], 2, estimator="reinforce++", scale_rewards="batch")
    std = math.sqrt(16 / 3)
    np.testing.assert_allclose(result.advantages_B, np.array([-2.0, -2.0, 2.0, 2.0]) / (std + 1e-4), rtol=1e-14)
    assert result.stats["frac_reward_zero_std"] == 0


def test_reinforce_plus_plus_with_baseline_scales_by_what_the_baseline_leaves() -> None:
    # Centred in the groups: -1, 1, 0, 0, -3, 3 with squares 1 + 1 + 9 + 9 over 5: the deviation is 2.
    rows = [[0.0], [2.0], [5.0], [5.0], [1.0], [7.0]]
    result = advantages_of(rows, 2, estimator="reinforce++_baseline", scale_rewards="batch")
    np.testing.assert_allclose(result.advantages_B, np.array([-1, 1, 0, 0, -3, 3]) / (2 + 1e-4), rtol=1e-14)
    assert result.advantages_B[2:4].tolist() == [0.0, 0.0]
    assert result.stats["frac_reward_zero_std"] == pytest.approx(2 / 6)


@pytest.mark.parametrize("estimator", ["reinforce++", "reinforce++_baseline", "maxrl"])
def test_rows_that_no_function_judged_stay_out_of_every_estimator(estimator: str) -> None:
    scale = "none" if estimator == "maxrl" else "batch"
    rows = [[1.0], [0.0], [2.0], [0.5], [0.25], [1.0]]
    expected = advantages_of(rows, 3, estimator=estimator, scale_rewards=scale)
    result = advantages_of([[None], *rows[:3], *rows[3:], [None]], 4, estimator=estimator, scale_rewards=scale)
    np.testing.assert_allclose(result.advantages_B[1:-1], expected.advantages_B, rtol=0, atol=1e-14)
    assert result.advantages_B[[0, -1]].tolist() == [0.0, 0.0]


def test_gdpo_normalises_each_function_in_its_group_then_the_weighted_sum_over_the_batch() -> None:
    # Groups of two: (r - mean) / std is -+ 1 / sqrt(2) for any two different rewards, whatever their scale, but for the
    # 1e-4 added to the deviation. Weights 1 and 0.5; the second function does not tell the second group apart.
    rows = [[0.0, 100.0], [1.0, 300.0], [0.0, 5.0], [1.0, 5.0]]
    result = advantages_of(rows, 2, weights_K=[1.0, 0.5], aggregation="normalize_then_sum")
    one, other = 0.5 / (math.sqrt(0.5) + 1e-4), 100 / (math.sqrt(2e4) + 1e-4)
    scores = np.array([-one - other / 2, one + other / 2, -one, one])
    std = math.sqrt(np.sum(scores**2) / 3)
    np.testing.assert_allclose(result.advantages_B, scores / (std + 1e-4), rtol=1e-13)


def test_function_of_weight_zero_is_a_metric_only() -> None:
    rows = [[1.0, 7.0], [0.0, -3.0], [0.5, 2.0], [0.25, 2.0]]
    result = advantages_of(rows, 2, weights_K=[1.0, 0.0])
    np.testing.assert_array_equal(result.advantages_B, advantages_of([row[:1] for row in rows], 2).advantages_B)


def test_nothing_judged_gives_zero_advantages_and_unknown_statistics() -> None:
    result = advantages_of([[None]] * 4, 2)
    assert result.advantages_B.tolist() == [0.0] * 4
    assert not result.valid_B.any()
    assert math.isnan(result.stats["reward"])
    assert math.isnan(result.stats["reward_std"])
    assert result.stats["frac_reward_zero_std"] == 0.0


@pytest.mark.parametrize(
    ("rows", "group_size", "changes", "message"),
    [
        ([[1.0]] * 5, 2, {}, "multiple of group_size, got 5 completions and group_size 2"),
        ([[1.0]] * 4, 0, {}, "group_size 0"),
        ([[1.0, 2.0]] * 4, 2, {"weights_K": [1.0]}, r"one number for each of the 2 reward functions, got shape \(1,\)"),
        ([[1.0], [math.inf]], 2, {}, "finite or NaN .* got inf in row 1, column 0"),
        ([[1.0]] * 4, 2, {"scale_rewards": "std"}, "scale_rewards must be one of group, batch, none, got 'std'"),
        ([[1.0]] * 4, 2, {"aggregation": "mean"}, "aggregation must be one of"),
        ([[1.0]] * 4, 2, {"estimator": "ppo"}, "estimator must be one of grpo, rloo, .* got 'ppo'"),
        (
            [[1.0]] * 4,
            2,
            {"estimator": "rloo"},
            "rloo estimator has a scale of its own: scale_rewards must be none .* got group and",
        ),
    ],
)
def test_bad_arguments_are_refused(rows: Any, group_size: int, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        advantages_of(rows, group_size, **changes)


def test_empty_batch_is_refused() -> None:
    with pytest.raises(ValueError, match="non-empty array"):
        compute_advantages(np.zeros((0, 1)), None, 2, "group", "sum_then_normalize", "grpo")
