"""Advantages of turns, worked out by hand; and the settings that contradict them."""

import math

import numpy as np
import pytest

from rl.algorithms.advantages import compute_advantages
from rl.algorithms.from_config import loss_config
from rl.algorithms.turn_advantages import turn_advantages, turn_returns
from rl.config.load import load_config

# Two groups of three episodes. The second group has an episode that was not judged.
REWARDS = [np.array(own, float) for own in ([1, 0, 4], [2, 2], [0], [1, 1], [], [1, 1])]
# With the discount 0.5: (1 + 0 + 1, 0 + 2, 4), (2 + 1, 2), 0; (1.5, 1) twice.
FIRST, SECOND, THIRD = [2.0, 3.0, 0.0], [2.0, 2.0], [4.0]


def spread(values) -> float:
    mean = sum(values) / len(values)
    return math.sqrt(sum((value - mean) ** 2 for value in values) / (len(values) - 1)) + 1e-4


def test_the_return_of_a_turn_is_what_came_with_it_and_after_it_discounted():
    assert turn_returns(REWARDS[0], 0.5).tolist() == [2.0, 2.0, 4.0]
    assert turn_returns(REWARDS[1], 1.0).tolist() == [4.0, 2.0]
    assert turn_returns(REWARDS[4], 1.0).tolist() == []


def test_a_turn_is_compared_with_the_same_turn_of_the_other_episodes():
    got = turn_advantages(REWARDS, 3, "same_turn", 0.5, "group")
    mean, divisor = sum(FIRST) / 3, spread(FIRST)
    np.testing.assert_allclose(got[0], [(2 - mean) / divisor, 0, 0], rtol=1e-14)  # equal returns; nobody else
    np.testing.assert_allclose(got[1], [(3 - mean) / divisor, 0], rtol=1e-14)
    np.testing.assert_allclose(got[2], [(0 - mean) / divisor], rtol=1e-14)
    assert [own.tolist() for own in got[3:]] == [[0, 0], [], [0, 0]]


def test_or_with_all_turns_of_the_group():
    returns = [2, 2, 4, 3, 2, 0]
    mean = sum(returns) / 6
    for scale, divisor in {
        "group": spread(returns),
        "batch": spread([*returns, 1.5, 1, 1.5, 1]),
        "none": 1.0,
    }.items():
        got = turn_advantages(REWARDS, 3, "all_turns", 0.5, scale)
        want = [(value - mean) / divisor for value in returns]
        np.testing.assert_allclose(np.concatenate(got[:3]), want, rtol=1e-14)
    np.testing.assert_allclose(got[3], [0.25, -0.25], rtol=1e-14)


@pytest.mark.parametrize("baseline", ["same_turn", "all_turns"])
def test_with_one_turn_it_is_grpo_and_the_last_reward_alone_is_that_of_all_turns(baseline):
    rewards = np.array([0.25, 1, 0.5, 2, 2, 0])
    want = compute_advantages(rewards[:, None], None, 3, "group", "sum_then_normalize", "grpo").advantages_B
    got = turn_advantages([np.array([value]) for value in rewards], 3, baseline, 0.9, "group")
    np.testing.assert_allclose(np.concatenate(got), want, rtol=1e-14)
    if baseline == "same_turn":
        got = turn_advantages([np.array([0, 0, value]) for value in rewards], 3, baseline, 1.0, "group")
        np.testing.assert_allclose(np.stack(got), np.repeat(want[:, None], 3, axis=1), rtol=1e-14)


def test_a_step_of_which_nothing_was_judged_teaches_nothing():
    assert [own.tolist() for own in turn_advantages([np.zeros(0)] * 4, 2, "same_turn", 1.0, "group")] == [[]] * 4


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["rollout.environment=null"], "must be null without rollout.environment and rollout.tools"),
        (["rollout.max_sequences=2"], "rollout.max_sequences must be 1 with grpo.turn_advantages"),
        (["grpo.preset=rloo"], 'advantage_estimator must be "grpo" with grpo.turn_advantages'),
        (["grpo.preset=gspo"], 'importance_sampling_level must be "token" with grpo.turn_advantages'),
        (["grpo.aggregation=normalize_then_sum"], 'aggregation must be "sum_then_normalize"'),
        (["grpo.off_policy_mask_threshold=1.0"], "off_policy_mask_threshold must be null"),
        (
            ["grpo.positive_nll_coef=0.1"],
            "positive_nll_coef must be 0.0 .* got 0.1; or set grpo.turn_advantages to null",
        ),
        (["grpo.preset=gmpo"], r"loss_type must be none of gmpo, vespo with grpo\.turn_advantages"),
        (["grpo.turn_advantages=null", "grpo.turn_discount=0.5"], "must be same_turn or all_turns with .*discount 0.5"),
        (["grpo.turn_discount=1.5"], "grpo.turn_discount"),
    ],
)
def test_what_cannot_be_with_advantages_of_turns_is_refused(overrides, message):
    with pytest.raises(ValueError, match=message):
        loss_config(
            load_config(None, ["rollout.environment=game.py:Game", "grpo.turn_advantages=same_turn", *overrides])
        )
