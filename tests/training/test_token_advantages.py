"""Advantages of tokens, worked out by hand, and what must not matter to them; the settings that contradict them.

Legend: M micro-batches, R rows, C completions of a row, L tokens of a completion.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rl.config.load import load_config
from rl.devices.mesh import create_mesh
from rl.training.token_advantages import TokenRewards, token_advantages, token_advantages_program

# Log-ratios of old to reference, for completions with the rewards 1, 0 and 4.
LOG_RATIOS = ([0.5, -1.0, 2.0], [1.0, 0.0], [0.25])
REWARDS = (1.0, 0.0, 4.0)


def minibatch(log_ratios, rewards, shape=(1, 1, 2, 3), fill=math.nan) -> TokenRewards:
    """Completions in the first places of a minibatch of this shape, the rest filled with what must not matter."""
    mask, old, reference = np.zeros(shape), np.full(shape, fill), np.full(shape, fill)
    rewards_MRC = np.full(shape[:3], 99.0)
    for place, log_ratio, reward in zip(np.ndindex(shape[:3]), log_ratios, rewards, strict=False):
        count = len(log_ratio)
        mask[place][:count], old[place][:count] = 1, -1.0
        reference[place][:count] = -1.0 - np.array(log_ratio)
        rewards_MRC[place] = reward
    return TokenRewards(*map(jnp.asarray, (mask, rewards_MRC, old, reference)))


def test_each_token_has_the_reward_less_the_kl_from_there_on_whitened_over_all_tokens_of_the_step():
    with jax.enable_x64(True):
        two = minibatch(LOG_RATIOS[:2], REWARDS[:2]), minibatch(LOG_RATIOS[2:], REWARDS[2:])
        (first, second), kl = token_advantages(two, 0.5, "k1")
    # Sums from each token on: 1.5, 1, 2; 1, 0; 0.25. Half of that is taken from 1, 0 and 4.
    returns = [0.25, 0.5, 0.0, -0.5, 0.0, 3.875]
    mean = 4.125 / 6
    spread = math.sqrt(sum((value - mean) ** 2 for value in returns) / 5) + 1e-4
    want = [(value - mean) / spread for value in returns]
    np.testing.assert_allclose(first[0, 0], [want[:3], [*want[3:5], 0.0]], rtol=1e-13)
    np.testing.assert_allclose(second[0, 0], [[want[5], 0.0, 0.0], [0.0, 0.0, 0.0]], rtol=1e-13)
    assert float(kl) == pytest.approx((0.5 - 1 + 2 + 1 + 0 + 0.25) / 6, rel=1e-13)


def test_the_estimator_may_be_another():
    with jax.enable_x64(True):
        (values,), kl = token_advantages([minibatch([[2.0], [-1.0]], [0.0, 0.0])], 1.0, "k2")
    assert float(kl) == pytest.approx((2.0 + 0.5) / 2)
    np.testing.assert_allclose(values[0, 0, :, 0], np.array([-0.75, 0.75]) / (0.75 * math.sqrt(2) + 1e-4), rtol=1e-13)


def test_equal_rewards_at_the_reference_teach_nothing_and_one_token_or_none_is_finite():
    for log_ratios, rewards in (([[0.0, 0.0], [0.0]], [0.1, 0.1]), ([[0.7]], [3.0]), ([], [])):
        (values,), kl = token_advantages([minibatch(log_ratios, rewards)], 0.5, "k1")
        assert np.abs(values).max() < 1e-3
        assert np.isfinite(kl)


def test_cutting_the_step_in_any_way_on_any_number_of_devices_changes_nothing():
    rng = np.random.default_rng(0)
    log_ratios = [rng.normal(size=count) for count in (3, 1, 5, 2, 4, 5, 1, 2)]
    rewards = rng.normal(size=8)
    mesh = create_mesh(load_config(None, ["mesh.data=2", "mesh.fsdp=4"]).mesh)
    rules = load_config(None).mesh.rules
    with jax.enable_x64(True):
        (whole,), kl = token_advantages([minibatch(log_ratios, rewards, (1, 1, 8, 5))], 0.3, "k1")
        halves = tuple(minibatch(log_ratios[i::2], rewards[i::2], (2, 8, 1, 5), fill=math.inf) for i in range(2))
        program = token_advantages_program(2, 0.3, "k1", mesh=mesh, rules=rules)
        parts, kl_of_parts = program.jit()(halves)
    assert float(kl) == pytest.approx(float(kl_of_parts), rel=1e-13)
    for i, part in enumerate(parts):
        assert len(part.sharding.device_set) == 8
        assert part.sharding.shard_shape(part.shape) == (2, 1, 1, 5)
        np.testing.assert_allclose(np.asarray(part).reshape(16, 5)[:4], whole[0, 0, i::2], rtol=0, atol=1e-13)
        assert not np.any(np.asarray(part).reshape(16, 5)[4:])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "grpo.advantage_estimator=grpo",
            r'advantage_estimator must be "reinforce\+\+" with .*kl_in_reward, .* got "grpo"',
        ),
        ("grpo.importance_sampling_level=sequence", "importance_sampling_level must be .token. .* got .sequence."),
        (
            "grpo.use_bias_correction_kl=true",
            "use_bias_correction_kl must be false .* got true; or set grpo.kl_in_reward",
        ),
        ("grpo.old_logprobs=sampler", 'old_logprobs must be "recompute" .* got "sampler"'),
        ("grpo.off_policy_mask_threshold=0.1", "off_policy_mask_threshold must be null .* whole completions, got 0.1"),
        ("grpo.positive_nll_coef=0.1", r"positive_nll_coef must be 0\.0 .* got 0\.1"),
        ("grpo.beta=0", r"grpo\.beta must be > 0 with grpo\.kl_in_reward, got 0"),
    ],
)
def test_settings_that_contradict_advantages_of_tokens_are_refused(override, message):
    with pytest.raises(ValueError, match=message):
        load_config(None, ["grpo.preset=reinforce++", override])
