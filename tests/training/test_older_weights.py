"""A rollout that weights of an earlier step drew: the ratio is taken to the policy that drew it.

Two steps by hand in float64, plain gradient descent: weights 0 draw two rollouts; the first is trained on at once, the
second after it. Legend: B sequences, L tokens of a completion.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rl.algorithms.entropy_coef import EntropyCoefState
from rl.config.load import load_config
from rl.training.train_step import TRAIN_STEP
from rl.training.update import Updater
from tests.training.test_train_step import (
    DESCENT,
    EPSILON,
    LEARNING_RATE,
    Problem,
    Trainer,
    make_trainer,
    make_updater,
    noisy_params,
    plain_logprobs,
    random_problem,
)

CAP, EPOCHS = 1.2, 2
PLAIN = ("grpo.beta=0", f"grpo.epsilon={EPSILON}", "sampling.temperature=0.8")
CORRECTED = ("grpo.sampler_is_correction=true", f"grpo.sampler_is_clip_max={CAP}")


class Hand(NamedTuple):
    """What the two steps start from and lead to, worked out by hand.

    rollout: the second one, whose `rollout_BL` are those of weights 0, one of them unknown, and whose `sampler_BL` are
    a little off. after_first: weights 1. ends: weights 2 by the way the ratio is taken.
    """

    first: Problem
    rollout: Problem
    after_first: dict
    ends: dict


@pytest.fixture(scope="module", autouse=True)
def x64():
    with jax.enable_x64(True):
        yield


@pytest.fixture(scope="module")
def packed() -> Trainer:
    return make_trainer("nnx", "float64", optimizer=DESCENT)


@pytest.fixture(scope="module")
def hand(packed) -> Hand:
    problem = random_problem()
    logprobs = plain_logprobs(packed.policy, problem)

    @jax.jit
    def gradient_of(params, old_BL, weights_BL):
        def loss(params):
            now_BL = logprobs(params)[0]
            ratio_BL = jnp.exp(now_BL - jax.lax.stop_gradient(jnp.where(jnp.isnan(old_BL), now_BL, old_BL)))
            gain_BL, clipped_BL = ratio_BL, jnp.clip(ratio_BL, 1 - EPSILON, 1 + EPSILON)
            advantages_B1 = problem.advantages_B[:, None]
            term_BL = -jnp.minimum(gain_BL * advantages_B1, clipped_BL * advantages_B1) * weights_BL * problem.mask_BL
            return jnp.mean(jnp.sum(term_BL, axis=1) / jnp.sum(problem.mask_BL, axis=1))

        return jax.grad(loss)(params)

    def trained(params, old_BL, weights_BL, epochs):
        for _ in range(epochs):
            step = gradient_of(params, old_BL, weights_BL)
            params = jax.tree.map(lambda x, g: x - LEARNING_RATE * g, params, step)
        return params

    start, ones_BL = noisy_params(packed.policy.config), np.ones_like(problem.mask_BL)
    logprobs_of = jax.jit(lambda params: logprobs(params)[0])
    drawn_BL = np.asarray(logprobs_of(start))
    after_first = trained(start, drawn_BL, ones_BL, EPOCHS)
    now_BL = np.asarray(logprobs_of(after_first))
    sampler_BL = drawn_BL + 0.1 * np.random.default_rng(0).normal(size=drawn_BL.shape)
    known_BL = np.array(drawn_BL)
    known_BL[1, 3] = np.nan
    to_drawn_BL = np.where(np.isnan(known_BL), now_BL, known_BL)
    weights_BL = np.minimum(np.exp(now_BL - sampler_BL), CAP)
    ends = {
        "to the weights that drew": trained(after_first, to_drawn_BL, ones_BL, EPOCHS),
        "to the weights that drew, once": trained(after_first, to_drawn_BL, ones_BL, 1),
        "in two factors": trained(after_first, now_BL, weights_BL, EPOCHS),
        "as if on-policy": trained(after_first, now_BL, ones_BL, EPOCHS),
    }
    first = problem._replace(rollout_BL=drawn_BL, sampler_BL=drawn_BL)
    rollout = problem._replace(rollout_BL=known_BL, sampler_BL=sampler_BL)
    return Hand(first, rollout, *jax.device_get((after_first, ends)))


@pytest.fixture(scope="module")
def updater_of(packed):
    """Updaters of several configurations; programs that are the same in all of them are compiled once."""
    programs = {}

    def make(*settings: str) -> Updater:
        config = load_config(None, [*PLAIN, *settings])
        loss = config.grpo.sampler_is_correction

        def stored(name, program):
            return programs.setdefault((name, loss if name == TRAIN_STEP else None), program.jit())

        return make_updater(config, packed, stored)

    return make


def step(updater: Updater, state, problem: Problem, age: int):
    groups = [problem.train_groups(range(len(problem.groups)))]
    state, _, metrics = updater.update(state, None, groups, EntropyCoefState(0.0, float("inf")), age=age)
    return state, metrics


def distance(got, want, start) -> float:
    """Largest difference of two trees, as a share of how far the second one is from `start`."""
    pairs = list(zip(*map(jax.tree.leaves, (jax.device_get(got), want, start)), strict=True))
    return max(np.abs(a - b).max() for a, b, _ in pairs) / max(np.abs(b - c).max() for _, b, c in pairs)


def test_without_a_correction_the_old_policy_is_the_one_that_drew(packed, hand, updater_of):
    updater = updater_of(f"grpo.epochs={EPOCHS}")
    state, metrics = step(updater, packed.fresh_state(), hand.first, age=0)
    assert distance(state.params, hand.after_first, noisy_params(packed.policy.config)) < 1e-9
    assert metrics["logprob_difference/max"] < 1e-12
    assert "rollout_age" not in metrics
    state, metrics = step(updater, state, hand.rollout, age=1)
    assert distance(state.params, hand.ends["to the weights that drew"], hand.after_first) < 1e-9
    assert distance(state.params, hand.ends["as if on-policy"], hand.after_first) > 1e-3
    assert (metrics["rollout_age"], "logprob_difference/mean" in metrics) == (1, False)
    assert metrics["logprob_drift/max"] > 0.01


def test_a_single_update_asks_for_no_pass_and_takes_the_ratio_too(packed, hand, updater_of):
    params = jax.device_put(hand.after_first, packed.abstract.shardings.params)
    start = packed.fresh_state()._replace(params=params)
    state, _ = step(updater_of("grpo.epochs=1"), start, hand.rollout, age=1)
    assert distance(state.params, hand.ends["to the weights that drew, once"], hand.after_first) < 1e-9


def test_a_correction_takes_the_ratio_in_two_factors(packed, hand, updater_of):
    params = jax.device_put(hand.after_first, packed.abstract.shardings.params)
    start = packed.fresh_state()._replace(params=params)
    state, metrics = step(updater_of(f"grpo.epochs={EPOCHS}", *CORRECTED), start, hand.rollout, age=1)
    assert distance(state.params, hand.ends["in two factors"], hand.after_first) < 1e-9
    assert metrics["sampler_ratio/max"] == pytest.approx(CAP)
