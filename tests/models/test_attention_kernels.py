"""Every back end of attention computes what plain operations do, on the masks of packed rows with shared prompts."""

import dataclasses
import os
import pathlib
import re
import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from rl.config.load import load_config
from rl.devices.mesh import create_mesh
from rl.models import attention_kernels, ops
from rl.models.block_attention import BLOCK, block_attention
from rl.models.flavours import create_policy, policy_from_config
from rl.models.inputs import Inputs
from rl.tools.programs.topologies import find_devices
from tests.helpers.places import ROOT
from tests.helpers.tiny_models import VOCAB, noisy_params, tiny_config

RULES = load_config(None).mesh.rules
DEV = pathlib.Path("/dev")


def mesh_of(**sizes):
    num_devices = int(np.prod(list(sizes.values())))
    section = load_config(None, ["mesh.fsdp=1", f"mesh.num_devices={num_devices}"]).mesh
    return create_mesh(dataclasses.replace(section, **sizes))


def packed_labels(num_rows, num_tokens, seed=0):
    """Rows of groups with a shared prompt and ragged completions, padding at the end: positions, groups, branches."""
    rng, rows = np.random.default_rng(seed), []
    for _ in range(num_rows):
        row = []
        for group in range(3):
            prompt = int(rng.integers(3, 20))
            row += [(position, group, 0) for position in range(prompt)]
            for branch in range(1, 4):
                row += [(prompt + i, group, branch) for i in range(int(rng.integers(1, 20)))]
        row = row[: num_tokens - 5]
        rows.append(row + [(0, -1, 0)] * (num_tokens - len(row)))
    return tuple(jnp.asarray(x, jnp.int32) for x in np.moveaxis(np.array(rows), 2, 0))


def attention_inputs(num_rows, num_tokens, num_heads, num_kv_heads, head_dim, window=None):
    labels = packed_labels(num_rows, num_tokens)
    keys = jax.random.split(jax.random.key(1), 3)
    shapes = [(num_rows, num_tokens, heads, head_dim) for heads in (num_heads, num_kv_heads, num_kv_heads)]
    qkv = tuple(jax.random.normal(key, shape) for key, shape in zip(keys, shapes, strict=True))
    return qkv, ops.visible(*labels, *labels, window=window), labels[1] >= 0


def value_and_gradients(attend, qkv, mask, is_real, scale=0.3):
    weights = jax.random.normal(jax.random.key(2), qkv[0].shape) * is_real[:, :, None, None]

    def loss(qkv):
        output = attend(*qkv, mask, scale)
        return jnp.sum(weights * output), jnp.where(is_real[:, :, None, None], output, 0)

    (_, output), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(qkv)
    return output, *gradients


def assert_close(got, expected, tolerance=2e-5):
    for one, other in zip(got, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=tolerance * float(jnp.abs(other).max()))


@pytest.mark.parametrize(
    ("sizes", "kv_heads", "num_tokens", "window"),
    [
        ({"data": 1}, 2, 250, None),
        ({"data": 2, "fsdp": 1, "tensor": 2}, 2, 130, 7),
        ({"data": 2, "tensor": 2}, 1, 128, None),  # kv heads that tensor does not divide
    ],
)
def test_splash_attention_gives_the_values_and_gradients_of_plain_operations(sizes, kv_heads, num_tokens, window):
    config = tiny_config(num_heads=4, num_kv_heads=kv_heads)
    kernel = attention_kernels.choose_kernel("splash", config, mesh_of(**sizes), RULES, interpret=True)
    inputs = attention_inputs(2, num_tokens, 4, kv_heads, 8, window)
    assert_close(value_and_gradients(kernel.attend, *inputs), value_and_gradients(ops.attention, *inputs))


@pytest.mark.matrix
@pytest.mark.parametrize("window", [None, 7])
@pytest.mark.parametrize(
    ("num_tokens", "kernel"),
    [(n, attention_kernels.XLA) for n in (50, 64, 65, 130, 600)] + [(600, attention_kernels.XLA_ON_ACCELERATORS)],
)
def test_visible_blocks_give_the_values_and_gradients_of_whole_rows(num_tokens, kernel, window):
    inputs = attention_inputs(2, num_tokens, 4, 2, 8, window)
    assert_close(value_and_gradients(kernel.attend, *inputs), value_and_gradients(ops.attention, *inputs))


def test_visible_blocks_in_float64_are_exact():
    with jax.enable_x64(True):
        (qkv, mask, is_real), scale = attention_inputs(1, 200, 4, 2, 8), 0.3
        qkv = tuple(x.astype(jnp.float64) for x in qkv)
        got, expected = (value_and_gradients(f, qkv, mask, is_real, scale) for f in (block_attention, ops.attention))
        assert got[0].dtype == jnp.float64
        assert_close(got, expected, 1e-13)


def test_only_blocks_in_which_a_query_sees_a_key_are_computed():
    """Rows of a prompt of 70 positions and completions of 40, 100 and 64, two such groups: what happens to keys and
    values of a block that nobody sees cannot be found in the result.
    """
    labels = []
    for group in range(2):
        labels += [(position, group, 0) for position in range(70)]
        for branch, length in enumerate((40, 100, 64), start=1):
            labels += [(70 + i, group, branch) for i in range(length)]
    labels = tuple(jnp.asarray([x], jnp.int32) for x in zip(*labels, strict=True))
    mask = ops.visible(*labels, *labels)
    num_tokens = mask.shape[1]
    seen = {(i, j) for _, q, k in np.argwhere(mask).tolist() for i, j in [(q // BLOCK, k // BLOCK)]}
    num_blocks = -(-num_tokens // BLOCK)
    assert len(seen) < 0.8 * num_blocks * (num_blocks + 1) / 2
    qkv = [jax.random.normal(jax.random.key(n), (1, num_tokens, heads, 8)) for n, heads in enumerate((4, 2, 2))]
    attend = jax.jit(lambda v: block_attention(qkv[0], qkv[1], v, mask, 0.3))
    for j in range(num_blocks):
        # 0 times NaN is NaN: every query whose block was multiplied with this block of values shows it.
        poisoned = qkv[2].at[:, j * BLOCK : (j + 1) * BLOCK].set(np.nan)
        touched = {int(t) // BLOCK for _, t, *_ in np.argwhere(np.isnan(attend(poisoned)))}
        assert touched == {i for i, block in seen if block == j}


def test_the_arguments_for_cudnn_mean_what_plain_operations_mean():
    attend = attention_kernels.CudnnAttention(implementation="xla")
    inputs = attention_inputs(2, 61, 4, 2, 8)
    assert_close(value_and_gradients(attend, *inputs), value_and_gradients(ops.attention, *inputs))


@pytest.mark.matrix
@pytest.mark.parametrize("pure_nnx", [True, False])
@pytest.mark.parametrize("scan_layers", [True, False])
def test_a_policy_with_another_kernel_gives_the_same_hidden_states(pure_nnx, scan_layers):
    config = dataclasses.replace(tiny_config("gemma3_text"), scan_layers=scan_layers)
    kernel = attention_kernels.choose_kernel("splash", config, mesh_of(data=2), RULES, interpret=True)
    params, labels = noisy_params(config), packed_labels(2, 96)
    inputs = Inputs(jax.random.randint(jax.random.key(3), labels[0].shape, 0, VOCAB), *labels)
    plain, fast = (create_policy(config, pure_nnx, k) for k in (attention_kernels.XLA, kernel))
    expected, got = (jax.jit(policy.hidden)(params, inputs) for policy in (plain, fast))
    assert "pallas" in str(jax.make_jaxpr(fast.hidden)(params, inputs))
    is_real = (labels[1] >= 0)[:, :, None]
    assert_close([jnp.where(is_real, got, 0)], [jnp.where(is_real, expected, 0)])


def test_a_platform_gets_what_it_has():
    config, mesh = tiny_config(), mesh_of(data=1)
    assert attention_kernels.choose_kernel("auto", config, mesh, RULES) is attention_kernels.XLA
    assert attention_kernels.choose_kernel("auto", config, mesh, RULES).title == "xla attention"
    for name, home in (("splash", "tpu"), ("cudnn", "gpu")):
        with pytest.raises(
            ValueError, match=f"model.attention must be xla or auto on cpu, got {name}, which runs on {home}"
        ):
            attention_kernels.choose_kernel(name, config, mesh, RULES)
    wide = dataclasses.replace(config, dtype="float64")
    with pytest.raises(ValueError, match=r"model.attention=splash needs model.dtype float32 or narrower, got float64"):
        attention_kernels.choose_kernel("splash", wide, mesh, RULES, interpret=True)
    run = load_config(None, ["model.attention=xla", "pure_nnx=false"])
    assert policy_from_config(run, config, mesh).kernel is attention_kernels.XLA


def mesh_of_gpus(kind, capability):
    """What is read of a mesh on such GPUs; jax reports the capability of ROCm's by name."""
    device = types.SimpleNamespace(platform="gpu", device_kind=kind, compute_capability=capability)
    return types.SimpleNamespace(devices=np.array([device, device]))


AMPERE, HOPPER = ("NVIDIA A100-SXM4-80GB", "8.0"), ("NVIDIA H100 80GB HBM3", "9.0")
TURING, BLACKWELL, ROCM = ("Tesla T4", "7.5"), ("NVIDIA B200", "10.0"), ("AMD Instinct MI300X", "gfx942")


@pytest.mark.parametrize(
    ("gpu", "dtype", "head_dim", "problem"),
    [
        (AMPERE, "bfloat16", 128, None),
        (AMPERE, "float16", 64, None),
        (HOPPER, "bfloat16", 256, None),
        (BLACKWELL, "bfloat16", 128, None),
        (
            AMPERE,
            "bfloat16",
            256,
            "needs heads of at most 128 on NVIDIA A100-SXM4-80GB and a multiple of 8, got head_dim",
        ),
        (BLACKWELL, "bfloat16", 256, "needs heads of at most 128 on NVIDIA B200 and a multiple of 8, got head_dim 256"),
        (HOPPER, "bfloat16", 264, "needs heads of at most 256 on NVIDIA H100 80GB HBM3 and a multiple of 8"),
        (HOPPER, "bfloat16", 100, "a multiple of 8, got head_dim 100"),
        (HOPPER, "float32", 64, "needs model.dtype bfloat16 or float16, got float32"),
        (TURING, "float16", 64, "needs compute capability 8.0 or higher, got 7.5 of Tesla T4"),
        (ROCM, "bfloat16", 64, "needs an NVIDIA GPU, got AMD Instinct MI300X"),
    ],
)
def test_a_gpu_gets_cudnn_where_it_has_the_kernel_and_says_why_where_not(gpu, dtype, head_dim, problem):
    config, mesh = tiny_config(dtype=dtype, head_dim=head_dim), mesh_of_gpus(*gpu)
    chosen = attention_kernels.choose_kernel("auto", config, mesh, RULES)
    if problem is None:
        assert (chosen.name, chosen.title, chosen.skips_blocks) == ("cudnn", "cudnn attention", False)
        assert attention_kernels.choose_kernel("cudnn", config, mesh, RULES) == chosen
        return
    assert chosen == attention_kernels.XLA_ON_ACCELERATORS
    assert chosen.title.startswith("xla attention (cudnn needs ")
    assert problem in chosen.title
    with pytest.raises(ValueError, match=f"model.attention=cudnn .*{problem}.*; set model.attention to xla or auto"):
        attention_kernels.choose_kernel("cudnn", config, mesh, RULES)


def compare_on_accelerator(name="auto"):
    """Prints the platform and the back end that it gets, after comparing values and gradients in bfloat16 with plain
    operations in float32, of a model with two kv heads of 64, in rows of 600 positions.
    """
    config = tiny_config(num_heads=4, num_kv_heads=2, head_dim=64, dtype="bfloat16")
    kernel = attention_kernels.choose_kernel(name, config, mesh_of(data=1), RULES)
    for window in (None, 7):
        qkv, mask, is_real = attention_inputs(2, 600, 4, 2, 64, window)
        rounded = tuple(x.astype(jnp.bfloat16) for x in qkv)
        got = value_and_gradients(kernel.attend, rounded, mask, is_real, 0.125)
        with jax.default_matmul_precision("highest"):
            exact = tuple(x.astype(jnp.float32) for x in rounded)
            expected = value_and_gradients(ops.attention, exact, mask, is_real, 0.125)
        assert_close([x.astype(jnp.float32) for x in got], expected, 2e-2)
    print(f"{jax.devices()[0].platform} {kernel.title}")


def test_the_back_end_of_an_accelerator_gives_the_values_and_gradients_of_plain_operations():
    """In a process of its own, because this one has virtual CPU devices only."""
    found = [path for pattern in ("nvidia[0-9]*", "kfd", "accel[0-9]*", "vfio/[0-9]*") for path in DEV.glob(pattern)]
    if not found:
        pytest.skip("no GPU or TPU in /dev")
    kept = {name: value for name, value in os.environ.items() if name not in ("JAX_PLATFORMS", "XLA_FLAGS")}
    command = "from tests.models.test_attention_kernels import compare_on_accelerator as compare; compare()"
    root = ROOT
    ended = subprocess.run([sys.executable, "-c", command], cwd=root, env=kept, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    if ended.stdout.startswith("cpu "):
        pytest.skip("this jax does not see the accelerator")
    assert re.fullmatch(
        r"gpu cudnn attention|gpu xla attention \(cudnn .*\)|tpu splash attention", ended.stdout.strip()
    )


@pytest.mark.parametrize(("dtype", "head_dim"), [("bfloat16", 128), ("float32", 64)])
def test_splash_attention_compiles_for_a_tpu_forward_and_backward(dtype, head_dim):
    pytest.importorskip("libtpu")
    section = load_config(None, ["mesh.data=2", "mesh.fsdp=1", "mesh.tensor=2"]).mesh
    mesh = create_mesh(section, find_devices("v5e:2x2", 1, None))
    config = tiny_config(num_heads=4, num_kv_heads=2, head_dim=head_dim, dtype=dtype)
    kernel = attention_kernels.choose_kernel("auto", config, mesh, RULES)
    assert kernel.name == "splash"
    heads = NamedSharding(mesh, PartitionSpec(("data",), None, "tensor", None))

    def loss(q, k, v, mask):
        return jnp.sum(kernel.attend(q, k, v, mask, 0.1).astype(jnp.float32) ** 2)

    shapes = [jax.ShapeDtypeStruct((4, 512, n, head_dim), dtype, sharding=heads) for n in (4, 2, 2)]
    mask = jax.ShapeDtypeStruct((4, 512, 512), bool, sharding=NamedSharding(mesh, PartitionSpec(("data",))))
    compiled = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(*shapes, mask).compile()
    # No array [heads, T, T] of scores, forward or backward.
    assert compiled.memory_analysis().temp_size_in_bytes < 2 * 2 * 512 * 512 * 4
