"""An attention kernel is one entry of `KERNELS`: a run takes it by its name, and "auto" where the platform has it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rl.config.load import load_config
from rl.devices.mesh import create_mesh
from rl.models import ops
from rl.models.attention_kernels import KERNELS, XLA, AttentionKernel, KernelSpec
from rl.models.flavours import create_policy, policy_from_config
from rl.models.inputs import plain_inputs
from tests.helpers.tiny_models import tiny_config

RUN = ["mesh.num_devices=1"]


def mirrored_attention(q_BTNH, k_BSKH, v_BSKH, mask_BTS, scale):
    """The keys in the opposite order, which no sum over them depends on but for rounding."""
    k_BSKH, v_BSKH, mask_BTS = (jnp.flip(x, axis) for x, axis in ((k_BSKH, 1), (v_BSKH, 1), (mask_BTS, 2)))
    return ops.attention(q_BTNH, k_BSKH, v_BSKH, mask_BTS, scale)


@pytest.fixture
def kernels(monkeypatch):
    def problem(place):
        return None if place.config.head_dim == 8 else f"needs heads of 8, got head_dim {place.config.head_dim}"

    def make(place):
        return AttentionKernel("mirrored", mirrored_attention, skips_blocks=False)

    monkeypatch.setitem(KERNELS, "mirrored", KernelSpec("cpu", problem, make))
    monkeypatch.setitem(KERNELS, "anywhere", KernelSpec(None, problem, make))
    monkeypatch.setitem(KERNELS, "elsewhere", KernelSpec("npu", problem, make))


def chosen(name, **changes):
    config = load_config(None, [*RUN, f"model.attention={name}"])
    return policy_from_config(config, tiny_config(**changes), create_mesh(config.mesh))


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("pure_nnx", [True, False])
def test_a_run_takes_a_new_kernel_and_computes_with_it(pure_nnx):
    policy = chosen("auto")
    assert (policy.kernel.name, policy.kernel.title) == ("mirrored", "mirrored attention")
    assert chosen("anywhere").kernel == chosen("mirrored").kernel == policy.kernel
    config = tiny_config()
    params = ops.init_params(config, jax.random.key(0))
    inputs = plain_inputs(jax.random.randint(jax.random.key(1), (1, 12), 0, config.vocab_size))
    fast, plain = (create_policy(config, pure_nnx, kernel) for kernel in (policy.kernel, XLA))
    assert "rev" in str(jax.make_jaxpr(functools.partial(fast.hidden, params))(inputs))
    got, expected = (policy.hidden(params, inputs) for policy in (fast, plain))
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-5)


@pytest.mark.usefixtures("kernels")
def test_what_a_new_kernel_cannot_do_is_said_in_its_words():
    assert chosen("auto", head_dim=4).kernel.title == "xla attention (mirrored needs heads of 8, got head_dim 4)"
    for name, message in (
        (
            "mirrored",
            r"model\.attention=mirrored needs heads of 8, got head_dim 4; set model\.attention to xla or auto",
        ),
        ("elsewhere", r"must be xla or auto on cpu, got elsewhere, which runs on npu only"),
        ("flash", r"must be auto or one of xla, splash, cudnn, mirrored, anywhere, elsewhere, got 'flash'"),
    ):
        with pytest.raises(ValueError, match=message):
            chosen(name, head_dim=4)
