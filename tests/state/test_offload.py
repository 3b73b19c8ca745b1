"""Moments in the hosts' memory: the same training, moments elsewhere, checkpoints and errors as ever."""

import functools

import jax
import numpy as np
import optax
import pytest

from rl.config.load import load_config
from rl.devices import mesh as meshes
from rl.devices.mesh import create_mesh, from_host_memory
from rl.models.flavours import create_policy
from rl.state.checkpoint import create_checkpoint_manager
from rl.state.optimizer import create_training_optimizer
from rl.state.states import InitStateFn, get_abstract_state, setup_training_state
from tests.helpers.tiny_models import tiny_config

FLAVOURS = {"linen": False, "nnx": True}
SETTINGS = ("mesh.num_devices=4", "optimizer.lr=0.01", "optimizer.b2=0.98")


def kinds_of(opt_state):
    """Kinds of memory of the moments and of the scalars."""
    leaves = jax.tree.leaves(opt_state)
    return tuple(
        {leaf.sharding.memory_kind for leaf in leaves if (leaf.ndim > 0) == moments} for moments in (True, False)
    )


@functools.cache
def trained(flavour, *overrides, num_updates=2):
    """The state after some updates with the gradient -1, and what it was made from."""
    config = load_config(None, [*SETTINGS, *overrides])
    mesh = create_mesh(config.mesh)
    policy = create_policy(tiny_config(num_layers=1), FLAVOURS[flavour])
    _, optimizer = create_training_optimizer(config, policy)
    init_state_fn = InitStateFn(policy, optimizer, 0)
    state, abstract = setup_training_state(config, mesh, init_state_fn)

    def update(state):
        opt_state = from_host_memory(state.opt_state, abstract.shardings.opt_state)
        gradient = jax.tree.map(lambda leaf: -jax.numpy.ones_like(leaf), state.params)
        updates, opt_state = optimizer.update(gradient, opt_state, state.params)
        return state._replace(params=optax.apply_updates(state.params, updates), opt_state=opt_state)

    step = jax.jit(update, in_shardings=(abstract.shardings,), out_shardings=abstract.shardings, donate_argnums=0)
    for _ in range(num_updates):
        state = step(state)
    return config, mesh, init_state_fn, state


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_moments_in_host_memory_stay_there_and_are_the_same_moments(flavour):
    *_, expected = trained("nnx")
    *_, state = trained(flavour, "optimizer.offload=true")
    assert kinds_of(expected.opt_state) == ({"device"}, {"device"})
    assert kinds_of(state.opt_state) == ({"pinned_host"}, {"device"})
    assert {leaf.sharding.memory_kind for leaf in jax.tree.leaves(state.params)} == {"device"}
    jax.tree.map(np.testing.assert_array_equal, state, expected)


@pytest.mark.parametrize("offload", ["true", "false"])
def test_a_checkpoint_of_moments_in_host_memory_is_restored_there_or_to_the_devices(offload, tmp_path):
    _, mesh, init_state_fn, state = trained("nnx", "optimizer.offload=true")
    config = load_config(None, [*SETTINGS, f"output_dir={tmp_path}", "optimizer.offload=true"])
    checkpoints = create_checkpoint_manager(config, mesh, init_state_fn)
    checkpoints.save(1, state, {"step": 1})
    checkpoints.close()
    config = load_config(None, [*SETTINGS, f"output_dir={tmp_path}", f"optimizer.offload={offload}"])
    checkpoints = create_checkpoint_manager(config, mesh, init_state_fn)
    restored, _ = checkpoints.restore()
    checkpoints.close()
    assert kinds_of(restored.opt_state)[0] == ({"pinned_host"} if offload == "true" else {"device"})
    jax.tree.map(np.testing.assert_array_equal, restored, state)


def test_devices_without_host_memory_are_refused(monkeypatch):
    config = load_config(None, [*SETTINGS, "optimizer.offload=true"])
    mesh = create_mesh(config.mesh)
    policy = create_policy(tiny_config(num_layers=1), True)
    _, optimizer = create_training_optimizer(config, policy)
    monkeypatch.setattr(meshes, "_HOST", "a kind that no device has")
    with pytest.raises(ValueError, match=r"optimizer\.offload must be false on cpu, got true; it has no memory a kind"):
        get_abstract_state(config, mesh, InitStateFn(policy, optimizer, 0))
