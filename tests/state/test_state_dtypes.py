"""Dtypes of a training state: float32 unless told otherwise, each settable, equal in both flavours,
kept by updates.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rl.config.load import load_config
from rl.devices.mesh import create_mesh
from rl.models.flavours import create_policy
from rl.state.optimizer import create_training_optimizer
from rl.state.states import InitStateFn, get_abstract_state, setup_training_state
from tests.helpers.tiny_models import tiny_config

FLAVOURS = {"linen": False, "nnx": True}
KINDS = ("weights", "first", "second")
SECOND = (".nu[", ".v[", ".v_row[", ".v_col[")  # the last three are Adafactor's: whole, or means of rows and columns
ADAFACTOR = ("optimizer.name=adafactor", "optimizer.adafactor_min_dim=8")
EIGHT = ("mesh.data=2", "mesh.fsdp=2", "mesh.tensor=2")
ONE = ("mesh.data=1", "mesh.fsdp=1", "mesh.tensor=1", "mesh.num_devices=1")  # for hundreds of updates


def parts(flavour: str, *overrides: str):
    """What `setup_training_state` takes: configuration, mesh and initial state."""
    config = load_config(None, ["optimizer.b2=0.98", "optimizer.lr=0.01", *EIGHT, *overrides])
    shape = tiny_config(param_dtype=config.model.param_dtype, num_layers=1)
    policy = create_policy(shape, FLAVOURS[flavour])
    _, optimizer = create_training_optimizer(config, policy)
    return config, create_mesh(config.mesh), InitStateFn(policy, optimizer, 0)


def state_and_optimizer(flavour: str, *overrides: str):
    """A state on the mesh, its shardings, and its optimizer."""
    config, mesh, init_state_fn = parts(flavour, *overrides)
    state, abstract = setup_training_state(config, mesh, init_state_fn)
    return state, abstract.shardings, init_state_fn.optimizer


def updated(optimizer, state):
    gradient = jax.tree.map(lambda leaf: jnp.full_like(leaf, 0.1), state.params)
    updates, opt_state = optimizer.update(gradient, state.opt_state, state.params)
    return state._replace(params=optax.apply_updates(state.params, updates), opt_state=opt_state)


def dtypes(state) -> dict[str, str]:
    """The one dtype of weights, first and second moments; those that the optimizer does not keep are left out."""
    found = {kind: set() for kind in KINDS}
    for path, leaf in jax.tree_util.tree_leaves_with_path(state):
        name = jax.tree_util.keystr(path)
        moment = "first" if ".mu[" in name else "second" if any(key in name for key in SECOND) else None
        kind = {".params": "weights"}.get(name[:7], moment)
        if kind:
            found[kind].add(str(leaf.dtype))
    return {kind: names.pop() for kind, names in found.items() if len(names) == 1}


@pytest.mark.matrix
@pytest.mark.parametrize("flavour", FLAVOURS)
@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ((), ("float32", "float32", "float32")),
        (("model.param_dtype=bfloat16",), ("bfloat16", "float32", "float32")),
        (("optimizer.moment_dtype=bfloat16",), ("float32", "bfloat16", "float32")),
        (("optimizer.second_moment_dtype=bfloat16",), ("float32", "float32", "bfloat16")),
        (
            ("model.param_dtype=bfloat16", "optimizer.moment_dtype=bfloat16", "optimizer.second_moment_dtype=bfloat16"),
            ("bfloat16", "bfloat16", "bfloat16"),
        ),
        (("optimizer.name=muon", "optimizer.second_moment_dtype=bfloat16"), ("float32", "float32", "bfloat16")),
        ((*ADAFACTOR, "model.param_dtype=bfloat16"), ("bfloat16", None, "float32")),
    ],
    ids=["default", "weights", "first moment", "second moment", "all", "muon", "adafactor"],
)
def test_each_dtype_of_the_state_is_float32_unless_set_and_survives_updates(flavour, overrides, expected):
    config, mesh, init_state_fn = parts(flavour, *overrides)
    shapes = get_abstract_state(config, mesh, init_state_fn).shapes
    after = jax.eval_shape(functools.partial(updated, init_state_fn.optimizer), shapes)
    expected = {kind: dtype for kind, dtype in zip(KINDS, expected, strict=True) if dtype}
    assert dtypes(shapes) == dtypes(after) == expected


def test_a_state_on_devices_has_the_dtypes_that_are_set_and_keeps_them_in_an_update():
    settings = ("model.param_dtype=bfloat16", "optimizer.moment_dtype=bfloat16")
    state, shardings, optimizer = state_and_optimizer("linen", *settings)
    assert dtypes(state) == dict(zip(KINDS, ("bfloat16", "bfloat16", "float32"), strict=True))
    kernel = state.params["layers_0"]["mlp"]["up_proj"]["kernel"]
    assert (len(kernel.sharding.device_set), kernel.addressable_shards[0].data.size) == (8, kernel.size // 4)
    after = jax.jit(functools.partial(updated, optimizer), out_shardings=shardings)(state)
    describe = functools.partial(jax.tree.map, lambda leaf: (leaf.shape, leaf.dtype, leaf.sharding))
    assert describe(after) == describe(state)


def test_second_moment_of_adafactor_is_the_same_for_weights_in_bfloat16():
    """Of gradients that bfloat16 holds; at the end it takes in a hundredth of a gradient's square in an update."""
    settings, moments = (*ADAFACTOR, "optimizer.max_grad_norm=0", *ONE), []
    for dtype in ("float32", "bfloat16"):
        state, shardings, optimizer = state_and_optimizer("nnx", *settings, f"model.param_dtype={dtype}")

        def update(i, opt_state, optimizer=optimizer, params=state.params):
            gradient = jax.tree.map(lambda leaf: jnp.where(i < 200, 0.125, 0.5).astype(leaf.dtype) + 0 * leaf, params)
            return optimizer.update(gradient, opt_state, params)[1]

        steps = jax.jit(
            lambda s, update=update: jax.lax.fori_loop(0, 300, update, s), out_shardings=shardings.opt_state
        )
        moments.append(steps(state.opt_state))
    for wide, narrow in zip(*map(jax.tree.leaves, moments), strict=True):
        np.testing.assert_allclose(narrow, wide, rtol=1e-5)


def test_second_moment_in_bfloat16_follows_the_one_in_float32():
    """At the highest decay that is allowed, a steady gradient still brings it to within a quarter of its target."""
    settings = ("optimizer.b2=0.984", "optimizer.max_grad_norm=0", *ONE)
    results = {}
    for dtype in ("float32", "bfloat16"):
        state, shardings, optimizer = state_and_optimizer("nnx", *settings, f"optimizer.second_moment_dtype={dtype}")
        gradient = jax.tree.map(lambda leaf: jnp.full_like(leaf, 0.1), state.params)

        def update(_, opt_state, optimizer=optimizer, gradient=gradient, params=state.params):
            return optimizer.update(gradient, opt_state, params)[1]

        steps = jax.jit(
            lambda s, update=update: jax.lax.fori_loop(0, 1000, update, s), out_shardings=shardings.opt_state
        )
        opt_state = steps(state.opt_state)
        leaves = jax.tree_util.tree_leaves_with_path(opt_state)
        results[dtype] = next(leaf for path, leaf in leaves if ".nu[" in jax.tree_util.keystr(path))
    assert np.asarray(results["float32"]).ravel()[0] == pytest.approx(0.01, rel=0.03)
    ratio = np.asarray(results["bfloat16"], np.float32) / np.asarray(results["float32"])
    assert np.abs(ratio - 1).max() < 0.25
