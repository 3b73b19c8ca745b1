"""Learning-rate schedules in updates, and what the optax transformation does with gradients and weights."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rl.config import load_config
from rl.models.config import ModelConfig, parameter_specs
from rl.models.policy import policy_from_config
from rl.optimizer import create_training_optimizer, decay_mask, updates_per_step

SHAPE = ModelConfig.from_arch("qwen3", 12, 8, 16, 1, 2, 1, 4, tie_word_embeddings=False)
BIASED = ModelConfig.from_arch("qwen2", 12, 8, 16, 1, 2, 1, 4)


def create(*overrides, shape=SHAPE, num_updates=None):
    config = load_config(None, ["optimizer.lr=0.5", "optimizer.max_grad_norm=0", *overrides])
    return create_training_optimizer(config, policy_from_config(config, shape), num_updates)


def params_of(shape=SHAPE, dtype=jnp.float32):
    """Weights of a model's shapes, all different from 0 and from each other."""
    is_spec = lambda x: hasattr(x, "axes")  # noqa: E731
    shapes = jax.tree.map(lambda spec: spec.shape, parameter_specs(shape), is_leaf=is_spec)
    leaves, tree = jax.tree.flatten(shapes, is_leaf=lambda x: isinstance(x, tuple))
    return tree.unflatten(
        [jnp.sin(jnp.arange(1, math.prod(leaf) + 1, dtype=dtype) + i).reshape(leaf) for i, leaf in enumerate(leaves)]
    )


def rates(schedule, count):
    return [float(schedule(update)) for update in range(count)]


# Schedules


def test_a_constant_rate_stays():
    schedule, _ = create("grpo.steps=4")
    assert rates(schedule, 6) == [0.5] * 6


def test_a_linear_rate_falls_to_zero_after_the_last_update():
    schedule, _ = create("grpo.steps=4", "optimizer.schedule=linear")
    np.testing.assert_allclose(rates(schedule, 6), [0.5, 0.375, 0.25, 0.125, 0.0, 0.0], rtol=1e-6)


def test_a_cosine_rate_falls_to_zero_after_the_last_update():
    schedule, _ = create("grpo.steps=4", "optimizer.schedule=cosine")
    expected = [0.25 * (1 + math.cos(math.pi * update / 4)) for update in range(5)]
    np.testing.assert_allclose(rates(schedule, 5), expected, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("warmup", [1, 2, 5])
@pytest.mark.parametrize("after", ["constant", "linear", "cosine"])
def test_a_warm_up_of_n_updates_reaches_the_peak_with_the_nth(warmup, after):
    schedule, _ = create("grpo.steps=20", f"optimizer.schedule={after}", f"optimizer.warmup_updates={warmup}")
    got = rates(schedule, 20)
    np.testing.assert_allclose(got[:warmup], [0.5 * (update + 1) / warmup for update in range(warmup)], rtol=1e-6)
    assert got[warmup] == pytest.approx(0.5)
    assert min(got) > 0  # neither the first nor the last update is wasted
    if after != "constant":
        assert float(schedule(20)) == pytest.approx(0, abs=1e-8)
        assert all(a > b for a, b in zip(got[warmup:], got[warmup + 1 :], strict=False))


def test_schedules_count_updates_not_steps():
    overrides = ("grpo.steps=5", "grpo.minibatches=2", "grpo.epochs=3", "optimizer.schedule=linear")
    config = load_config(None, overrides)
    assert updates_per_step(config) == 6
    schedule, _ = create(*overrides)
    np.testing.assert_allclose(rates(schedule, 31), [0.5 * (1 - update / 30) for update in range(31)], atol=1e-6)
    schedule, _ = create(*overrides, num_updates=7)
    assert float(schedule(7)) == 0.0


def test_a_warm_up_that_is_not_shorter_than_the_run_is_refused():
    with pytest.raises(ValueError, match=r"warmup_updates must be below the run's number of updates \(6\), got 6"):
        create("grpo.steps=3", "grpo.epochs=2", "optimizer.warmup_updates=6")
    create("grpo.steps=3", "grpo.epochs=2", "optimizer.warmup_updates=5")


def test_the_rate_that_is_reported_is_the_one_that_is_applied():
    schedule, optimizer = create(
        "grpo.steps=6", "optimizer.name=sgd", "optimizer.schedule=linear", "optimizer.warmup_updates=2"
    )
    params = params_of()
    state, ones = optimizer.init(params), jax.tree.map(jnp.ones_like, params)
    for update in range(6):
        steps, state = optimizer.update(ones, state, params)
        for leaf in jax.tree.leaves(steps):
            np.testing.assert_allclose(leaf, -float(schedule(update)), rtol=1e-6)


# What is decayed, clipped, applied


@pytest.mark.parametrize("shape", [SHAPE, BIASED])
def test_matrices_are_decayed_and_norms_and_biases_are_not(shape):
    mask = {
        jax.tree_util.keystr(path): value
        for path, value in jax.tree_util.tree_leaves_with_path(decay_mask(params_of(shape)))
    }
    assert {path: value for path, value in mask.items() if value} == {
        path: True for path in mask if path.endswith(("['kernel']", "['embedding']"))
    }
    left_out = [path for path, value in mask.items() if not value]
    assert left_out
    assert all(path.endswith(("['scale']", "['bias']")) for path in left_out)
    if shape is BIASED:
        assert sum(path.endswith("['bias']") for path in left_out) == 3


@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_weight_decay_alone_shrinks_matrices_by_rate_times_decay(name):
    _, optimizer = create(f"optimizer.name={name}", "optimizer.weight_decay=0.1", shape=BIASED)
    params = params_of(BIASED)
    zeros = jax.tree.map(jnp.zeros_like, params)
    steps, _ = optimizer.update(zeros, optimizer.init(params), params)
    moved = optax.apply_updates(params, steps)
    for (path, old), new in zip(jax.tree_util.tree_leaves_with_path(params), jax.tree.leaves(moved), strict=True):
        decayed = jax.tree_util.keystr(path).endswith(("['kernel']", "['embedding']"))
        np.testing.assert_allclose(new, old * (0.95 if decayed else 1.0), rtol=1e-6)


def test_adamw_is_the_formula_of_the_paper():
    """https://arxiv.org/abs/1711.05101, algorithm 2, with the bias correction of Adam."""
    overrides = ("optimizer.b1=0.8", "optimizer.b2=0.9", "optimizer.eps=1e-3", "optimizer.weight_decay=0.1")
    _, optimizer = create(*overrides, "grpo.steps=4", "optimizer.schedule=linear")
    tree = {"kernel": jnp.array([1.0, -2.0, 0.5]), "scale": jnp.array([1.0, -2.0, 0.5])}
    state, values = optimizer.init(tree), {name: np.asarray(leaf, np.float64) for name, leaf in tree.items()}
    mean, square = np.zeros(3), np.zeros(3)
    for update in range(1, 4):
        grad = np.array([0.3, -0.1, 0.02]) * update
        steps, state = optimizer.update(dict.fromkeys(tree, jnp.asarray(grad, jnp.float32)), state, tree)
        tree = optax.apply_updates(tree, steps)
        mean, square = 0.8 * mean + 0.2 * grad, 0.9 * square + 0.1 * grad**2
        direction = mean / (1 - 0.8**update) / (np.sqrt(square / (1 - 0.9**update)) + 1e-3)
        rate = 0.5 * (1 - (update - 1) / 4)
        values["kernel"] -= rate * (direction + 0.1 * values["kernel"])
        values["scale"] -= rate * direction
        for name, want in values.items():
            np.testing.assert_allclose(tree[name], want, atol=1e-6)


@pytest.mark.parametrize(("limit", "factor"), [("0", 1.0), ("100", 1.0), ("2.5", 0.5)])
def test_gradients_are_clipped_by_their_global_norm(limit, factor):
    _, optimizer = create("optimizer.name=sgd", f"optimizer.max_grad_norm={limit}", "optimizer.lr=1.0")
    grads = {"kernel": jnp.array([3.0, 0.0]), "scale": jnp.array([0.0, -4.0])}  # norm 5
    steps, _ = optimizer.update(grads, optimizer.init(grads), grads)
    for name, grad in grads.items():
        np.testing.assert_allclose(steps[name], -factor * grad, rtol=1e-6)


def test_moments_have_the_dtype_of_the_weights():
    shape = ModelConfig.from_arch("qwen3", 12, 8, 16, 1, 2, 1, 4, param_dtype="bfloat16")
    _, optimizer = create(shape=shape)
    state = optimizer.init(params_of(dtype=jnp.bfloat16))
    assert {leaf.dtype for leaf in jax.tree.leaves(state) if leaf.ndim} == {jnp.dtype("bfloat16")}
    _, optimizer = create("optimizer.name=sgd")
    assert [leaf.shape for leaf in jax.tree.leaves(optimizer.init(params_of()))] == [()]  # only the update count
