"""The losses that TRL's trainer has not, on small numbers worked out by hand, in float64: value, gradient and metrics.

Shapes: B sequences, T token positions.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rl.algorithms.from_config import loss_config
from rl.algorithms.loss_metrics import finish_metrics
from rl.algorithms.loss_types import LossInputs
from rl.algorithms.losses import denominators_for, grpo_loss
from rl.config.load import load_config

NAN = math.nan


def evaluate(
    logprobs: Any, advantages: Any, mask: Any, *, overrides: Sequence[str] = (), old: Any = None, sampler: Any = None
) -> tuple[float, np.ndarray, dict[str, float]]:
    """(loss, gradient [B, T], metrics) under the configuration that the overrides make, without a KL term."""
    config = loss_config(load_config(None, ["grpo.beta=0", *overrides]))
    with jax.enable_x64(True):
        logprobs_BT, advantages_B, mask_BT = (jnp.asarray(x, jnp.float64) for x in (logprobs, advantages, mask))
        old_BT, sampler_BT = (None if x is None else jnp.asarray(x, jnp.float64) for x in (old, sampler))
        ones_B = jnp.ones(len(advantages_B))
        inputs = LossInputs(old_BT, None, sampler_BT, mask_BT, advantages_B, ones_B)
        denominators = denominators_for(mask_BT, ones_B, None, config, entropy_coef=0.0, advantages_B=advantages_B)
        (loss, sums), grad_BT = jax.value_and_grad(grpo_loss, has_aux=True)(
            logprobs_BT, None, inputs, denominators, config
        )
        metrics = {name: float(value) for name, value in finish_metrics(sums).items()}
    return float(loss), np.asarray(grad_BT), metrics


# Five tokens drawn with the probabilities MU, which now have the probabilities P. The sampler did not score the last
# one, whose old probability counts; the others' old probabilities (0.1) must not.
P = [[0.75, 0.6, 0.2], [0.35, 0.9, 0.5]]
MU = [[0.5, 0.5, 0.5], [0.5, NAN, 0.5]]
OLD = [[0.1, 0.1, 0.1], [0.1, 0.4, 0.1]]
DPPO = {
    "logprobs": np.log(P),
    "advantages": [1.5, -2.0],
    "mask": [[1, 1, 1], [1, 1, 0]],
    "old": np.log(OLD),
    "sampler": np.log(MU),
}


def test_dppo_tv_masks_the_tokens_that_leave_the_trust_region():
    # A > 0, at most 0.2: 0.75 is 0.25 above 0.5, masked; 0.6 is 0.1 above, kept with weight 1.2; 0.2 is further away,
    # but the gradient would bring it back: kept with weight 0.4.
    # A < 0, at most 0.1: 0.35 is 0.15 below, masked; 0.9 is far above and brought back: 0.9 / 0.4, capped at 2.
    loss, grad_BT, metrics = evaluate(
        **DPPO, overrides=["grpo.loss_type=dppo_tv", "grpo.epsilon=0.1", "grpo.epsilon_high=0.2", "grpo.delta=2"]
    )
    # Five tokens; -w A log p each, with the gradient -w A: also where the weight is capped.
    expected = -(1.2 * 1.5 * math.log(0.6) + 0.4 * 1.5 * math.log(0.2) + 2 * -2 * math.log(0.9)) / 5
    assert loss == pytest.approx(expected, rel=1e-14)
    np.testing.assert_allclose(grad_BT, [[0, -1.8 / 5, -0.6 / 5], [0, 4 / 5, 0]], rtol=1e-14)
    assert metrics["dppo/masked_share"] == pytest.approx(2 / 5)


def test_dppo_kl_masks_by_the_binary_divergence():
    # KL(mu || p) = mu log(mu / p) + (1 - mu) log((1 - mu) / (1 - p)), for mu = 0.5:
    #   p = 0.75: log(4 / 3) / 2 = 0.1438, masked; p = 0.6: log(25 / 24) / 2 = 0.0204, kept; p = 0.2: brought back;
    #   p = 0.35: log(0.25 / 0.2275) / 2 = 0.0472, kept at 0.05 with weight 0.7, masked at 0.04.
    settings = ("grpo.loss_type=dppo_kl", "grpo.epsilon_high=0.05")
    loss, grad_BT, metrics = evaluate(**DPPO, overrides=[*settings, "grpo.epsilon=0.05"])
    terms = (1.2 * 1.5 * math.log(0.6), 0.4 * 1.5 * math.log(0.2), 0.7 * -2 * math.log(0.35))
    expected = -(sum(terms) + 2.25 * -2 * math.log(0.9)) / 5
    assert loss == pytest.approx(expected, rel=1e-14)
    np.testing.assert_allclose(grad_BT, [[0, -1.8 / 5, -0.6 / 5], [1.4 / 5, 4.5 / 5, 0]], rtol=1e-14)
    assert metrics["dppo/masked_share"] == pytest.approx(1 / 5)
    _, grad_BT, metrics = evaluate(**DPPO, overrides=[*settings, "grpo.epsilon=0.04"])
    assert grad_BT[1].tolist() == [0, pytest.approx(4.5 / 5), 0]
    assert metrics["dppo/masked_share"] == pytest.approx(2 / 5)


@pytest.mark.parametrize("loss_type", ["dppo_tv", "dppo_kl"])
def test_dppo_on_policy_is_reinforce_and_certain_tokens_are_finite(loss_type):
    # Probability 1, then and now: log(1 - p) has no value, and there is nothing to mask.
    logprobs = np.log([[1.0, 0.5]])
    loss, grad_BT, metrics = evaluate(
        logprobs, [1.0], [[1, 1]], old=logprobs, overrides=[f"grpo.loss_type={loss_type}", "grpo.epsilon=0.05"]
    )
    assert loss == pytest.approx(-math.log(0.5) / 2)
    assert grad_BT.tolist() == [[-0.5, -0.5]]
    assert metrics["dppo/masked_share"] == 0


def test_gmpo_takes_the_geometric_mean_of_the_ratios_clipped_in_log_space():
    # Log-ratios; A > 0 is cut above 0.4: (0.4, -0.2, 0.1), mean 0.1; A < 0 below -0.4: (-0.4, 0.5), mean 0.05.
    log_ratio = np.array([[0.6, -0.2, 0.1], [-0.9, 0.5, 9.0]])
    old = np.full((2, 3), -2.0)
    loss, grad_BT, metrics = evaluate(
        old + log_ratio,
        [3.0, -1.0],
        [[1, 1, 1], [1, 1, 0]],
        old=old,
        overrides=["grpo.loss_type=gmpo", "grpo.epsilon=0.4"],
    )
    assert loss == pytest.approx((-3 * math.exp(0.1) + math.exp(0.05)) / 2, rel=1e-14)
    # A clipped token has no gradient; each other one has a share of 1 / length of -A ratio / 2.
    up, down = -3 * math.exp(0.1) / 3 / 2, math.exp(0.05) / 2 / 2
    np.testing.assert_allclose(grad_BT, [[0, up, up], [0, down, 0]], rtol=1e-14)
    assert metrics["gmpo/clip_ratio"] == pytest.approx(2 / 5)


def test_positive_nll_is_the_token_mean_over_completions_with_a_positive_advantage():
    # Rows 0 and 2 have A > 0 and three tokens between them: -(-1 - 2 - 4) / 3 nats.
    logprobs = [[-1.0, -2.0], [-3.0, -5.0], [-4.0, NAN]]
    mask = [[1, 1], [1, 1], [1, 0]]
    advantages = [1.0, -0.5, 0.25]
    plain_loss, plain_grad_BT, _ = evaluate(logprobs, advantages, mask)
    loss, grad_BT, metrics = evaluate(logprobs, advantages, mask, overrides=["grpo.positive_nll_coef=0.3"])
    assert plain_loss == pytest.approx(-0.75 / 3)
    assert loss == pytest.approx(-0.75 / 3 + 0.3 * 7 / 3, rel=1e-14)
    np.testing.assert_allclose(grad_BT - plain_grad_BT, [[-0.1, -0.1], [0, 0], [-0.1, 0]], atol=1e-15)
    assert metrics["positive_nll"] == pytest.approx(7 / 3)


def test_positive_nll_of_nothing_positive_is_zero():
    settings = ["grpo.positive_nll_coef=0.3"]
    loss, grad_BT, metrics = evaluate([[-1.0]], [-1.0], [[1]], overrides=settings)
    assert (loss, grad_BT.tolist(), metrics["positive_nll"]) == (1.0, [[1.0]], 0.0)


def test_positive_nll_without_advantages_is_refused():
    config = loss_config(load_config(None, ["grpo.positive_nll_coef=0.3"]))
    with pytest.raises(ValueError, match=r"advantages are needed for positive_nll_coef = 0.3, got None"):
        denominators_for(jnp.ones((1, 1)), jnp.ones(1), None, config, entropy_coef=0.0)
    off = dataclasses.replace(config, positive_nll_coef=0.0)
    assert int(denominators_for(jnp.ones((1, 1)), jnp.ones(1), None, off, entropy_coef=0.0).num_positive_tokens) == 0
