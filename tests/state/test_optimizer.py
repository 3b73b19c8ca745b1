"""Learning-rate schedules in updates, and what the optax transformation does with gradients and weights.

Legend: D model, N query heads, H head dim, F mlp.
"""

import dataclasses
import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rl import grpo_trainer, sft_trainer
from rl.config.load import load_config
from rl.devices.mesh import create_mesh
from rl.models.config import ModelConfig, parameter_specs
from rl.models.flavours import policy_from_config
from rl.models.train_state import PureState
from rl.run.metrics import read_metrics
from rl.run_folder.folder import read_run
from rl.state.checkpoint import create_checkpoint_manager
from rl.state.optimizer import create_training_optimizer, decay_mask, rounding_loss, rounding_problems, updates_per_step
from rl.state.states import InitStateFn, create_sharded_state, get_abstract_state
from rl.tools.trained import load_checkpoint
from tests.helpers.places import REWARDS

SHAPE = ModelConfig.from_arch("qwen3", 12, 8, 16, 1, 2, 1, 4, tie_word_embeddings=False)
BIASED = ModelConfig.from_arch("qwen2", 12, 8, 16, 1, 2, 1, 4)
MATRICES = ["*/kernel", "*/embedding"]  # what base.yml decays
LR = 0.5
# Each optimizer with the settings under which all of it is at work on arrays as small as the ones here.
OPTIMIZERS = {
    "adamw": ("optimizer.moment_dtype=float32",),
    "adafactor": ("optimizer.adafactor_min_dim=4",),
    "lion": (),
    "muon": (),
    "sgd": ("optimizer.sgd_momentum=0.9",),
}


def create(*overrides, shape=SHAPE, num_updates=None):
    config = load_config(None, [f"optimizer.lr={LR}", "optimizer.max_grad_norm=0", *overrides])
    return create_training_optimizer(config, policy_from_config(config, shape), num_updates)


def params_of(shape=SHAPE, dtype=jnp.float32):
    """Weights of a model's shapes, all different from 0 and from each other."""
    is_spec = lambda x: hasattr(x, "axes")  # noqa: E731
    shapes = jax.tree.map(lambda spec: spec.shape, parameter_specs(shape), is_leaf=is_spec)
    leaves, tree = jax.tree.flatten(shapes, is_leaf=lambda x: isinstance(x, tuple))
    values = [np.sin(np.arange(1, math.prod(leaf) + 1) + i).reshape(leaf) for i, leaf in enumerate(leaves)]
    return tree.unflatten([jnp.asarray(value.astype(dtype)) for value in values])


def by_name(tree):
    """{"layers_0/mlp/up_proj/kernel": leaf}"""
    return {"/".join(key.key for key in path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def gradient(params, number):
    """Gradients that differ from weight to weight and from update to update, and depend on the first weights only."""
    return jax.tree.map(lambda leaf: jnp.asarray(np.cos(40 * np.asarray(leaf) + number).astype(leaf.dtype)), params)


def updates_of(optimizer, start, count=3):
    """The parameters after each of `count` updates."""

    @jax.jit
    def update(grads, state, params):
        steps, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, steps), state

    params, state, history = start, optimizer.init(start), []
    for number in range(count):
        params, state = update(gradient(start, number), state, params)
        history.append(params)
    return history


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
    state, ones, jitted = optimizer.init(params), jax.tree.map(jnp.ones_like, params), jax.jit(optimizer.update)
    for update in range(6):
        steps, state = jitted(ones, state, params)
        for leaf in jax.tree.leaves(steps):
            np.testing.assert_allclose(leaf, -float(schedule(update)), rtol=1e-6)


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        # 10 updates: 2 of warm-up, 5 stable, 3 of decay.
        ((), [0.25, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5, 1 / 3, 1 / 6, 0.0, 0.0]),
        (("optimizer.final_lr_ratio=0.4",), [0.25, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5, 0.4, 0.3, 0.2, 0.2]),
        (("optimizer.warmup_updates=0", "optimizer.decay_updates=10"), [0.5 - 0.05 * n for n in range(10)] + [0.0] * 2),
        (("optimizer.decay_updates=1",), [0.25] + [0.5] * 9 + [0.0, 0.0]),
        # No stable part at all.
        (("optimizer.decay_updates=8",), [0.25] + [0.5 - 0.0625 * max(n - 2, 0) for n in range(1, 10)] + [0.0] * 2),
    ],
)
def test_wsd_warms_up_stays_and_falls_over_the_last_updates(overrides, expected):
    settings = ("grpo.steps=10", "optimizer.schedule=wsd", "optimizer.warmup_updates=2", "optimizer.decay_updates=3")
    schedule, _ = create(*settings, *overrides)
    np.testing.assert_allclose(rates(schedule, 12), expected, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("linear", [0.5, 0.4, 0.3, 0.2, 0.1, 0.1]),
        ("cosine", [0.1 + 0.4 * x for x in (1.0, (1 + 0.5**0.5) / 2, 0.5, (1 - 0.5**0.5) / 2, 0.0, 0.0)]),
        ("constant", [0.5] * 6),
    ],
)
def test_a_falling_rate_stops_at_the_share_of_the_peak_that_is_asked_for(schedule, expected):
    schedule, _ = create("grpo.steps=4", f"optimizer.schedule={schedule}", "optimizer.final_lr_ratio=0.2")
    np.testing.assert_allclose(rates(schedule, 6), expected, rtol=1e-6)


def test_a_schedule_of_its_own_length_stays_at_its_last_rate_in_a_longer_run():
    settings = ("optimizer.schedule=linear", "optimizer.final_lr_ratio=0.2")
    short, _ = create("grpo.steps=4", *settings)
    longer, _ = create("grpo.steps=9", "optimizer.schedule_updates=4", *settings)
    np.testing.assert_array_equal(rates(longer, 9), rates(short, 9))
    with pytest.raises(ValueError, match=r"schedule_updates must be >= 9, the updates of the run, .* got 4"):
        create("grpo.steps=9", "optimizer.schedule=linear", "optimizer.schedule_updates=4")
    with pytest.raises(ValueError, match=r"schedule_updates must be null with optimizer\.schedule constant"):
        create("optimizer.schedule_updates=4")


def test_a_decay_that_does_not_fit_the_run_is_refused():
    settings = ("grpo.steps=3", "grpo.epochs=2", "optimizer.schedule=wsd", "optimizer.warmup_updates=2")
    message = r"decay_updates must be at most 4, what the warm-up leaves of the run's 6 updates, got 5; lower it or"
    with pytest.raises(ValueError, match=message):
        create(*settings, "optimizer.decay_updates=5")
    create(*settings, "optimizer.decay_updates=4")
    with pytest.raises(ValueError, match=r"decay_updates must be set with optimizer\.schedule wsd, got null; about"):
        create(*settings)


# What is decayed, clipped, applied


@pytest.mark.parametrize("shape", [SHAPE, BIASED])
def test_matrices_are_decayed_and_norms_and_biases_are_not(shape):
    assert load_config(None).optimizer.weight_decay_params == MATRICES
    mask = by_name(decay_mask(params_of(shape), MATRICES))
    assert {name for name, value in mask.items() if value} == {
        name for name in mask if name.endswith(("/kernel", "/embedding"))
    }
    left_out = [name for name, value in mask.items() if not value]
    assert left_out
    assert all(name.endswith(("/scale", "/bias")) for name in left_out)
    if shape is BIASED:
        assert sum(name.endswith("/bias") for name in left_out) == 3


@functools.cache
def first_update(name):
    """(gradient, weights) -> the first update with weight decay, compiled once for all who ask."""
    _, optimizer = create(f"optimizer.name={name}", *OPTIMIZERS[name], "optimizer.weight_decay=0.1", shape=BIASED)
    update = jax.jit(optimizer.update)
    return lambda grads, params: update(grads, optimizer.init(params), params)[0]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_weight_decay_alone_shrinks_matrices_by_rate_times_decay(name):
    params = params_of(BIASED)
    zeros = jax.tree.map(jnp.zeros_like, params)
    moved = optax.apply_updates(params, first_update(name)(zeros, params))
    for (path, old), new in zip(jax.tree_util.tree_leaves_with_path(params), jax.tree.leaves(moved), strict=True):
        decayed = jax.tree_util.keystr(path).endswith(("['kernel']", "['embedding']"))
        np.testing.assert_allclose(new, old * (0.95 if decayed else 1.0), rtol=1e-6)


def test_adamw_is_the_formula_of_the_paper():
    """https://arxiv.org/abs/1711.05101, algorithm 2, with the bias correction of Adam."""
    overrides = ("optimizer.b1=0.8", "optimizer.b2=0.9", "optimizer.eps=1e-3", "optimizer.weight_decay=0.1")
    _, optimizer = create(*overrides, "grpo.steps=4", "optimizer.schedule=linear")
    layer = {"kernel": jnp.array([1.0, -2.0, 0.5]), "scale": jnp.array([1.0, -2.0, 0.5])}
    state, values = optimizer.init({"a": layer}), {name: np.asarray(leaf, np.float64) for name, leaf in layer.items()}
    mean, square = np.zeros(3), np.zeros(3)
    for update in range(1, 4):
        grad = np.array([0.3, -0.1, 0.02]) * update
        grads = {"a": dict.fromkeys(layer, jnp.asarray(grad, jnp.float32))}
        steps, state = optimizer.update(grads, state, {"a": layer})
        layer = optax.apply_updates(layer, steps["a"])
        mean, square = 0.8 * mean + 0.2 * grad, 0.9 * square + 0.1 * grad**2
        direction = mean / (1 - 0.8**update) / (np.sqrt(square / (1 - 0.9**update)) + 1e-3)
        rate = 0.5 * (1 - (update - 1) / 4)
        values["kernel"] -= rate * (direction + 0.1 * values["kernel"])
        values["scale"] -= rate * direction
        for name, want in values.items():
            np.testing.assert_allclose(layer[name], want, atol=1e-6)


@pytest.mark.parametrize(("limit", "factor"), [("0", 1.0), ("100", 1.0), ("2.5", 0.5)])
def test_gradients_are_clipped_by_their_global_norm(limit, factor):
    _, optimizer = create("optimizer.name=sgd", f"optimizer.max_grad_norm={limit}", "optimizer.lr=1.0")
    grads = {"a": jnp.array([3.0, 0.0]), "b": jnp.array([0.0, -4.0])}  # norm 5
    steps, _ = optimizer.update(grads, optimizer.init(grads), grads)
    told, _ = optimizer.update(grads, optimizer.init(grads), grads, grad_norm=jnp.float32(200))
    for name, grad in grads.items():
        np.testing.assert_allclose(steps[name], -factor * grad, rtol=1e-6)
        np.testing.assert_allclose(told[name], -min(float(limit) / 200 or 1.0, 1.0) * grad, rtol=1e-6)


def test_weight_decay_applies_to_the_names_that_match_and_to_no_others():
    settings = ("optimizer.name=sgd", "optimizer.weight_decay=0.1")
    patterns = "optimizer.weight_decay_params=['layers_*/self_attn/*/bias', norm/scale]"
    _, optimizer = create(*settings, patterns, shape=BIASED)
    params = params_of(BIASED)
    zeros = jax.tree.map(jnp.zeros_like, params)
    steps, _ = jax.jit(optimizer.update)(zeros, optimizer.init(params), params)
    moved = {name for name, step in by_name(steps).items() if np.any(step)}
    assert moved == {*(f"layers_0/self_attn/{name}_proj/bias" for name in "qkv"), "norm/scale"}


def assert_same_updates(got, want):
    for number, params in enumerate(got):
        for path, leaf in by_name(params).items():
            np.testing.assert_allclose(leaf, want[number][path], rtol=1e-5, atol=1e-6, err_msg=f"{path} {number}")


@pytest.mark.parametrize("name", ["adamw", "adafactor", "lion", "sgd"])
def test_updates_are_those_of_plain_optax_on_a_flat_dict(name):
    overrides = (*OPTIMIZERS[name], "optimizer.weight_decay=0.1", "optimizer.max_grad_norm=2.0", "optimizer.eps=1e-6")
    _, optimizer = create(f"optimizer.name={name}", *overrides, shape=BIASED)
    flat = by_name(params_of(BIASED))
    is_matrix = {path: path.endswith(("kernel", "embedding")) for path in flat}
    plain = {
        "adamw": lambda: optax.adamw(LR, b1=0.9, b2=0.999, eps=1e-6, weight_decay=0.1, mask=is_matrix),
        "adafactor": lambda: optax.adafactor(
            LR,
            min_dim_size_to_factor=4,
            multiply_by_parameter_scale=False,
            weight_decay_rate=LR * 0.1,  # optax does not multiply this one by the learning rate
            weight_decay_mask=is_matrix,
        ),
        "lion": lambda: optax.lion(LR, b1=0.9, b2=0.99, weight_decay=0.1, mask=is_matrix),
        "sgd": lambda: optax.chain(optax.trace(0.9), optax.add_decayed_weights(0.1, mask=is_matrix), optax.scale(-LR)),
    }[name]()
    assert optax.tree.norm(gradient(flat, 0)) > 2.0  # clipped
    want = updates_of(optax.chain(optax.clip_by_global_norm(2.0), plain), flat)
    assert_same_updates(updates_of(optimizer, params_of(BIASED)), want)


def test_updates_of_muon_are_those_of_plain_optax_on_a_flat_dict():
    """The matrices of a layer are Muon's, the embedding and all else AdamW's."""
    _, optimizer = create("optimizer.name=muon", "optimizer.weight_decay=0.1", "optimizer.eps=1e-6", shape=BIASED)
    flat = by_name(params_of(BIASED))
    inputs_outputs = {"q_proj": (0, (1, 2)), "k_proj": (0, (1, 2)), "v_proj": (0, (1, 2)), "o_proj": ((0, 1), 2)}
    dims = {
        path: optax.contrib.MuonDimensionNumbers(*inputs_outputs.get(path.split("/")[-2], (0, 1)))
        for path in flat
        if path.startswith("layers_") and path.endswith("kernel")
    }
    matrices = {path: flat.pop(path) for path in dims}
    muon = optax.contrib.muon(LR, weight_decay=0.1, consistent_rms=0.2, muon_weight_dimension_numbers=dims)
    is_matrix = {path: path.endswith("embedding") for path in flat}
    adamw = optax.adamw(LR, b1=0.9, b2=0.999, eps=1e-6, weight_decay=0.1, mask=is_matrix)
    want = [left | right for left, right in zip(updates_of(muon, matrices), updates_of(adamw, flat), strict=True)]
    assert len(matrices) == 7
    assert any(is_matrix.values())
    assert_same_updates(updates_of(optimizer, params_of(BIASED)), want)


def test_adafactor_steps_may_be_relative_to_the_size_of_each_array():
    settings = ("optimizer.name=adafactor", "optimizer.adafactor_min_dim=4", "optimizer.adafactor_parameter_scale=true")
    params = jax.tree.map(lambda leaf: 7 * leaf, params_of())
    optimizers = [create(*settings[:2])[1], create(*settings)[1]]
    steps = [
        by_name(jax.jit(optimizer.update)(gradient(params, 0), optimizer.init(params), params)[0])
        for optimizer in optimizers
    ]
    for path, leaf in by_name(params).items():
        size = np.sqrt(np.mean(np.square(np.asarray(leaf, np.float64))))
        assert size > 3
        np.testing.assert_allclose(steps[1][path], steps[0][path] * size, rtol=1e-5, err_msg=path)


# Muon


def newton_schulz(matrix):
    """https://kellerjordan.github.io/posts/muon: five steps of a quintic iteration, on a matrix of norm 1."""
    x = matrix / (np.linalg.norm(matrix) + 1e-8)
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x


def as_matrix(path, kernel):
    """Inputs x outputs: q, k, v [D, N, H] read D, o [N, H, D] reads N and H."""
    kernel = np.asarray(kernel, np.float64)
    return kernel.reshape(-1, kernel.shape[-1]) if "o_proj" in path else kernel.reshape(kernel.shape[0], -1)


@pytest.mark.parametrize(("rms", "scale"), [("0.3", None), ("null", "width")])
def test_muon_is_the_newton_schulz_iteration_of_the_momentum_as_a_matrix(rms, scale):
    """Nesterov's momentum with bias corrections, as `optax.contrib.scale_by_muon` documents it."""
    settings = ("optimizer.name=muon", f"optimizer.muon_rms={rms}", "optimizer.muon_momentum=0.8", "optimizer.lr=0.25")
    shape = ModelConfig.from_arch("qwen2", 12, 8, 16, 1, 2, 1, 4, param_dtype="float64", dtype="float64")
    with jax.enable_x64(True):
        _, optimizer = create(*settings, shape=shape)
        params = params_of(shape, jnp.float64)
        history = [params, *updates_of(optimizer, params)]
        history = [{path: np.asarray(leaf) for path, leaf in by_name(tree).items()} for tree in history]
    kernels = [path for path in history[0] if path.startswith("layers_") and path.endswith("kernel")]
    assert len(kernels) == 7
    for path in kernels:
        moment = 0.0
        for number, (before, after) in enumerate(itertools.pairwise(history)):
            grad = as_matrix(path, np.cos(40 * history[0][path] + number))
            moment = 0.8 * moment + 0.2 * grad
            ahead = 0.8 * moment / (1 - 0.8 ** (number + 2)) + 0.2 * grad / (1 - 0.8 ** (number + 1))
            rows, columns = grad.shape
            size = math.sqrt(max(1, columns / rows)) if scale == "width" else 0.3 * math.sqrt(max(rows, columns))
            step = as_matrix(path, after[path]) - as_matrix(path, before[path])
            np.testing.assert_allclose(step, -0.25 * size * newton_schulz(ahead), rtol=0, atol=1e-8, err_msg=path)


def test_a_step_of_muon_moves_all_directions_of_a_matrix_about_equally_and_as_far_as_adamw():
    shape = ModelConfig.from_arch("qwen3", 24, 32, 48, 1, 4, 2, 16)
    _, optimizer = create("optimizer.name=muon", "optimizer.lr=1.0", shape=shape)
    params = params_of(shape)
    rng = np.random.default_rng(0)
    grads = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(np.float32), params)
    steps = by_name(jax.jit(optimizer.update)(grads, optimizer.init(params), params)[0])
    for path in (path for path in steps if path.startswith("layers_") and path.endswith("kernel")):
        matrix = as_matrix(path, steps[path])
        values = np.linalg.svd(matrix, compute_uv=False) / (0.2 * math.sqrt(max(matrix.shape)))
        assert 0.3 < values.min() < values.max() < 1.3, path
        assert 0.1 < np.sqrt(np.mean(matrix**2)) < 0.3
    for path in ("embed_tokens/embedding", "norm/scale", "layers_0/self_attn/q_norm/scale"):
        np.testing.assert_allclose(np.abs(steps[path]), 1.0, rtol=1e-3)  # AdamW's first step: the sign


# Groups


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_group_scales_the_whole_update_and_the_first_match_decides(name):
    groups = (
        "optimizer.lr_groups=[{pattern: '*/q_proj/bias', lr_scale: 0}, {pattern: '*/bias', lr_scale: 0.25},"
        "{pattern: 'layers_*/mlp/*', lr_scale: 3}]"
    )
    settings = (f"optimizer.name={name}", *OPTIMIZERS[name], "optimizer.weight_decay=0.1")
    params = params_of(BIASED)
    _, optimizer = create(*settings, groups, shape=BIASED)
    plain = by_name(first_update(name)(gradient(params, 0), params))
    grouped = by_name(jax.jit(optimizer.update)(gradient(params, 0), optimizer.init(params), params)[0])
    factors = {}
    for path, step in plain.items():
        ends = {"q_proj/bias": 0.0, "k_proj/bias": 0.25, "v_proj/bias": 0.25}
        factors[path] = 3.0 if "/mlp/" in path else ends.get("/".join(path.split("/")[-2:]), 1.0)
        np.testing.assert_allclose(grouped[path], factors[path] * step, rtol=1e-6, err_msg=path)
    assert sorted(set(factors.values())) == [0.0, 0.25, 1.0, 3.0]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "optimizer.lr_groups=[{pattern: '*/kernel', lr_scale: 2}, {pattern: 'layers/*', lr_scale: 1}]",
            r"lr_groups\.1\.pattern must match the name .*, got 'layers/\*'; .*layers_\*/self_attn/q_proj/bias.*, norm",
        ),
        (
            "optimizer.lr_groups=[{pattern: '*/bias', lr_scale: 2}, {pattern: '*/q_proj/bias', lr_scale: 1}]",
            r"lr_groups\.1\.pattern must match a parameter that no earlier entry matches, got '\*/q_proj/bias'; the ",
        ),
        (
            "optimizer.weight_decay_params=['*/kernel', '*/weight']",
            r"weight_decay_params must match the name of a parameter .*, got '\*/weight'; the names are embed_tokens/",
        ),
    ],
)
def test_a_pattern_that_decides_about_no_parameter_is_refused(override, message):
    with pytest.raises(ValueError, match=message) as error:
        create(override, shape=ModelConfig.from_arch("qwen2", 12, 8, 16, 3, 2, 1, 4))
    assert "layers_1" not in str(error.value)  # each name once, however many layers there are


# Moments


def test_moments_are_float32_though_the_weights_are_not():
    shape = ModelConfig.from_arch("qwen3", 12, 8, 16, 1, 2, 1, 4, param_dtype="bfloat16")
    _, optimizer = create(shape=shape)
    state = optimizer.init(params_of(dtype=jnp.bfloat16))
    assert {leaf.dtype for leaf in jax.tree.leaves(state) if leaf.ndim} == {jnp.dtype("float32")}
    _, optimizer = create("optimizer.name=sgd")
    assert [leaf.shape for leaf in jax.tree.leaves(optimizer.init(params_of()))] == [()]  # only the update count


@pytest.mark.matrix
@pytest.mark.parametrize("name", ["adamw", "lion", "muon", "sgd"])
@pytest.mark.parametrize(("weights", "moment"), [("float32", "bfloat16"), ("bfloat16", "float32")])
def test_the_first_moment_may_have_a_dtype_of_its_own(name, weights, moment):
    shape = ModelConfig.from_arch("qwen3", 12, 8, 16, 1, 2, 1, 4, param_dtype=weights)
    settings = (f"optimizer.name={name}", *OPTIMIZERS[name], f"optimizer.moment_dtype={moment}")
    _, optimizer = create(*settings, shape=shape)
    params = params_of(dtype=jnp.dtype(weights))
    state, update = optimizer.init(params), jax.jit(optimizer.update)
    for _ in range(2):
        moments = {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(state)}
        first = {leaf.dtype for path, leaf in moments.items() if ".mu[" in path or ".trace[" in path}
        second = {leaf.dtype for path, leaf in moments.items() if ".nu[" in path}
        assert first == {jnp.dtype(moment)}
        assert second == ({jnp.dtype("float32")} if name in ("adamw", "muon") else set())
        steps, state = update(gradient(params, 0), state, params)
        assert all(np.any(step) for step in jax.tree.leaves(steps))


# Rounding


def test_the_share_of_lost_updates_counts_those_that_leave_a_bfloat16_weight_as_it_is():
    """From 1 the next bfloat16 numbers are 1 + 2^-7 and 1 - 2^-8; half way, the even one is taken, which is 1."""
    updates = {
        "up": [2.0**-7, 2.0**-8, 1.01 * 2.0**-8, 0.0],
        "down": [[-(2.0**-8)], [-(2.0**-9)], [-1e-30]],
        "none": 0.0,
    }
    lost = {"up": [False, True, False, False], "down": [[False], [True], [True]], "none": False}
    updates = {name: jnp.asarray(value, jnp.bfloat16) for name, value in updates.items()}
    params = {name: jnp.ones_like(value) for name, value in updates.items()}
    num_lost = sum(np.sum(value) for value in lost.values())
    assert num_lost == 3
    for function in (rounding_loss, jax.jit(rounding_loss)):
        share = function(params, updates)
        assert (share.dtype, share.shape) == (jnp.float32, ())
        assert float(share) == pytest.approx(num_lost / 6)
        assert float(function(params, jax.tree.map(jnp.zeros_like, updates))) == 0.0


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("size", [1e-6, 1e-3, 1e-1])
def test_the_share_of_lost_updates_is_that_of_numpy(dtype, size):
    rng = np.random.default_rng(0)
    params = {"a": rng.normal(size=(40, 30)), "b": rng.normal(size=50)}
    updates = {
        name: size * rng.normal(size=leaf.shape) * (rng.random(leaf.shape) < 0.7) for name, leaf in params.items()
    }
    params = {name: leaf.astype(jnp.dtype(dtype)) for name, leaf in params.items()}
    updates = {name: leaf.astype(np.float32) for name, leaf in updates.items()}
    num_lost = num_updates = 0
    for name, leaf in params.items():
        moved = (leaf.astype(np.float32) + updates[name]).astype(leaf.dtype)
        num_updates += np.sum(updates[name] != 0)
        num_lost += np.sum((moved == leaf) & (updates[name] != 0))
    share = float(jax.jit(rounding_loss)(*jax.tree.map(jnp.asarray, (params, updates))))
    assert share == pytest.approx(num_lost / num_updates, rel=1e-6)
    assert (share > 0.9) == (size == 1e-6)
    assert share > 0


def test_ones_are_counted_beyond_what_a_sum_of_floats_can_hold():
    """A running float32 sum of ones stands still at 2^24."""
    weights = jnp.ones((2**12 + 1, 2**12), jnp.bfloat16)
    updates = jnp.full_like(weights, 2.0**-20).at[:, 0].set(2.0**-3)
    assert float(jax.jit(rounding_loss)({"a": weights}, {"a": updates})) == pytest.approx(1 - 2.0**-12, rel=1e-6)


def test_a_person_is_told_when_most_of_an_update_is_lost():
    assert rounding_problems({"loss": 1.0}) == rounding_problems({"update/lost_share": 0.5}) == []
    (problem,) = rounding_problems({"update/lost_share": 0.987})
    assert problem.startswith("98.7% of the weight updates were lost to rounding; set model.param_dtype to float32 ")


# Whole runs

LOST = "weight updates were lost to rounding; set model.param_dtype"
RECIPE = f"""
model:
  arch:
    {{family: llama, hidden_size: 32, intermediate_size: 64, num_layers: 1,
     num_heads: 2, num_kv_heads: 1, head_dim: 16}}
data: {{source: arithmetic, args: {{operation: add, digits: 1}}, max_prompt_length: 8}}
rewards: {{functions: [{{function: "{REWARDS}:digit_share"}}]}}
sampling: {{max_completion_length: 8}}
sft: {{steps: 3, batch_size: 16, max_completion_length: 4}}
grpo: {{steps: 2, prompts_per_step: 4, group_size: 4, max_tokens_per_microbatch: 128}}
eval: {{every: 0}}
mesh: {{num_devices: 1}}
"""


def run(train, folder, *overrides):
    folder.mkdir(exist_ok=True)
    recipe = folder / "recipe.yml"
    recipe.write_text(RECIPE)
    return train(load_config(recipe, [f"output_dir={folder / 'run'}", *overrides]))


@pytest.mark.parametrize(
    ("train", "overrides", "is_lost"),
    [
        (sft_trainer.train, ("optimizer.lr=1e-6", "pure_nnx=false", "sft.steps=2"), True),
        (grpo_trainer.train, ("optimizer.lr=0.1", "grpo.epochs=2"), False),
    ],
)
def test_a_run_measures_and_tells_what_the_rounding_of_its_weights_loses(train, overrides, is_lost, tmp_path, capsys):
    lines = read_metrics(run(train, tmp_path, "model.param_dtype=bfloat16", *overrides))
    shares = [line["update/lost_share"] for line in lines]
    assert all(0.9 < share < 1 if is_lost else 0 <= share < 0.5 for share in shares)
    assert capsys.readouterr().out.count(LOST) == (len(lines) if is_lost else 0)


def test_the_weights_of_a_finished_run_are_read_whatever_its_schedule_and_optimizer(tmp_path, capsys):
    """They are float32, of which the run says nothing about rounding."""
    settings = ("optimizer.name=muon", "optimizer.schedule=wsd", "optimizer.decay_updates=2", "optimizer.lr=1e-2")
    folder = run(sft_trainer.train, tmp_path, *settings)
    lines = read_metrics(folder)
    assert not any("update/lost_share" in line for line in lines)
    assert LOST not in capsys.readouterr().out
    np.testing.assert_allclose([line["lr"] for line in lines], [1e-2, 1e-2, 5e-3], rtol=1e-6)
    assert lines[-1]["loss"] < lines[0]["loss"]
    assert load_checkpoint(read_run(folder)[0], folder).step == 3


# On a mesh and on disk

FLOAT64 = ModelConfig.from_arch("qwen2", 24, 16, 32, 1, 4, 2, 8, param_dtype="float64", dtype="float64")


class OnMesh:
    """What a run trains with: its first state, its update, compiled, and its checkpoints in a folder."""

    def __init__(self, name, pure_nnx, num_devices, *mesh):
        settings = (f"pure_nnx={pure_nnx}", f"optimizer.name={name}", "optimizer.lr=1e-2", "optimizer.weight_decay=0.1")
        groups = "optimizer.lr_groups=[{pattern: '*/bias', lr_scale: 2}]"
        self.config = load_config(None, [*settings, *OPTIMIZERS[name], groups, *mesh])
        policy = policy_from_config(self.config, FLOAT64)
        optimizer = create_training_optimizer(self.config, policy)[1]
        self.mesh = create_mesh(self.config.mesh, jax.devices()[:num_devices])
        self.init_state_fn = InitStateFn(policy, optimizer, 3)
        self.abstract = get_abstract_state(self.config, self.mesh, self.init_state_fn)

        def step(state):
            grads = jax.tree.map(lambda leaf: jnp.cos(40 * leaf + state.step), state.params)
            steps, opt_state = optimizer.update(grads, state.opt_state, state.params)
            return PureState(state.step + 1, optax.apply_updates(state.params, steps), opt_state, state.rng)

        where = self.abstract.shardings
        self.update = jax.jit(step, in_shardings=(where,), out_shardings=where)

    def start(self):
        params = jax.device_put(params_of(FLOAT64, jnp.float64), self.abstract.shardings.params)
        return create_sharded_state(self.init_state_fn, self.mesh, self.abstract, params)

    def states(self, start):
        """Those after 0 to 3 updates."""
        state = jax.device_put(start, self.abstract.shardings)
        states = [state, *(state := self.update(state) for _ in range(3))]
        assert all(jax.tree.map(lambda leaf: leaf.sharding, state) == self.abstract.shardings for state in states)
        return states

    def checkpoints(self, folder):
        config = dataclasses.replace(self.config, output_dir=str(folder))
        return create_checkpoint_manager(config, self.mesh, self.init_state_fn, abstract=self.abstract)


@pytest.mark.matrix
@pytest.mark.parametrize(("written_by", "read_by"), [("true", "false"), ("false", "true")], ids=["nnx", "linen"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_sharded_updates_are_those_of_one_device_and_go_on_after_a_restore_in_the_other_flavour(
    name, written_by, read_by, tmp_path
):
    with jax.enable_x64(True):
        writer, reader = (
            OnMesh(name, pure_nnx, 8, "mesh.fsdp=4", "mesh.tensor=2") for pure_nnx in (written_by, read_by)
        )
        states = writer.states(writer.start())
        single = OnMesh(name, read_by, 1).states(jax.device_get(states[0]))
        for state, alone in zip(states, single, strict=True):
            assert_same(state, alone, rtol=1e-8)
        checkpoints = writer.checkpoints(tmp_path)
        checkpoints.save(2, states[2], {})
        checkpoints.close()
        checkpoints = reader.checkpoints(tmp_path)
        restored, _ = checkpoints.restore()
        checkpoints.close()
        assert_same(restored, states[2])
        assert_same(reader.update(restored), states[3])
    for old, new in itertools.pairwise(single):
        for (path, leaf), moved in zip(by_name(old.params).items(), jax.tree.leaves(new.params), strict=True):
            assert np.any(np.asarray(leaf) != np.asarray(moved)), path


def assert_same(left, right, rtol=0.0):
    """Equal, bit for bit unless told otherwise, wherever they are."""
    assert jax.tree.structure(left) == jax.tree.structure(right)
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(left), jax.tree.leaves(right), strict=True):
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        np.testing.assert_allclose(
            np.asarray(a), np.asarray(b), rtol=rtol, atol=rtol * 1e-3, err_msg=jax.tree_util.keystr(path)
        )
