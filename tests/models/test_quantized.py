"""Weights in 8 and 4 bits: how far they are from the weights, and that both twins compute with them as with those that
they stand for.
"""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax.errors import ScopeParamShapeError
from jax.sharding import PartitionSpec

from rl.config.load import load_config
from rl.devices.mesh import create_mesh, tree_shardings
from rl.models import ops
from rl.models.config import QUANTIZED_DTYPES, Quantization, logical_axes
from rl.models.flavours import LinenPolicy, NNXPolicy, create_policy
from rl.models.inputs import plain_inputs
from rl.models.quantized import (
    QuantizedArray,
    dequantize,
    pack,
    quantize,
    quantize_params,
    quantized_shardings,
    tile_of,
    unpack,
)
from tests.helpers.tiny_models import FAMILIES, VOCAB, init_cache, noisy_params, tiny_config


def batch_of(num_rows=2, num_tokens=6):
    tokens = jax.random.randint(jax.random.key(5), (num_rows, num_tokens), 0, VOCAB)
    return plain_inputs(tokens)


def is_quantized(leaf):
    return isinstance(leaf, QuantizedArray)


def whole(dtype):
    """Of the matrices of attention and MLP, and of the head: a type, and behind a slash a group size."""
    name, _, group = dtype.partition("/")
    return Quantization(name, int(group) if group else None, head=True)


def quantized_of(config, params, dtype):
    return jax.jit(lambda params: quantize_params(config, params, whole(dtype)))(params)


@jax.jit
def dequantize_tree(params):
    return jax.tree.map(lambda leaf: dequantize(leaf) if is_quantized(leaf) else leaf, params, is_leaf=is_quantized)


def quantized_paths(params):
    leaves = jax.tree_util.tree_leaves_with_path(params, is_leaf=is_quantized)
    return {"/".join(part.key for part in path) for path, leaf in leaves if is_quantized(leaf)}


def num_bytes(tree):
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def random_matrix(shape, seed=0):
    """Channels of very different size, one of them zero."""
    rng = np.random.default_rng(seed)
    matrix = rng.normal(size=shape) * 10.0 ** rng.uniform(-6, 3, size=shape[-1])
    matrix[..., 3] = 0.0
    return matrix.astype(np.float32)


# Compiled: one program for each shape and type, in place of one for each operation.
quantize_jit = jax.jit(quantize, static_argnums=(1, 2, 3))
dense_jit = jax.jit(ops.dense, static_argnames=("num_input_dims", "out_dtype"))


# One array


@pytest.mark.parametrize("dtype", ["int8", "int4"])
@pytest.mark.parametrize(
    ("shape", "contract_dims", "group_size", "tile"),
    [
        ((40, 24), (0,), None, (40, 1)),
        ((4, 8, 24), (0, 1), None, (4, 8, 1)),
        ((24, 40), (1,), None, (1, 40)),
        ((40, 24), (0,), 10, (10, 1)),
        ((40, 4, 6), (0,), 8, (8, 1, 1)),
        ((4, 8, 24), (0, 1), 4, (1, 4, 1)),
        ((4, 8, 24), (0, 1), 16, (2, 8, 1)),
        ((24, 40), (1,), 20, (1, 20)),
    ],
)
def test_integers_are_the_rounded_quotients_and_off_by_half_a_scale_at_most(
    shape, contract_dims, group_size, tile, dtype
):
    matrix = random_matrix(shape) if contract_dims != (1,) else random_matrix(shape[::-1]).T
    got = quantize_jit(matrix, contract_dims, dtype, group_size)
    assert tile_of(shape, contract_dims, group_size) == tile
    exact = matrix.astype(np.float64)
    split = [part for size, block in zip(shape, tile, strict=True) for part in (size // block, block)]
    axes = tuple(range(1, 2 * len(shape), 2))
    scale = np.abs(exact.reshape(split)).max(axes) / {"int8": 127.5, "int4": 7.5}[dtype]
    scale[scale == 0] = 1.0
    assert (got.values.dtype, got.values.shape, got.scale.dtype) == (jnp.dtype(dtype), shape, jnp.float32)
    np.testing.assert_allclose(got.scale, scale, rtol=1e-6)
    scale = np.kron(scale, np.ones(tile))
    values = np.asarray(got.values).astype(np.float64)
    assert (np.abs(values - exact / scale) <= 0.5 + 1e-4).all()
    assert (np.abs(np.asarray(dequantize(got), np.float64) - exact) <= 0.5001 * scale).all()
    empty = np.abs(exact).max(contract_dims) == 0
    assert 0 < empty.sum() < empty.size
    np.testing.assert_array_equal(np.abs(values).max(contract_dims) == 0, empty)


def test_integers_round_ties_to_even_and_stay_in_their_range():
    column = np.array([127.5, -127.5, 0.5, 1.5, 2.5, -0.5, -1.5, 0.49, 0.51], np.float32)
    got = quantize(jnp.asarray(column[:, None]), (0,), "int8")
    assert got.scale.tolist() == [[1.0]]
    assert got.values[:, 0].tolist() == [127, -128, 0, 2, 2, 0, -2, 0, 1]
    column = np.array([7.5, -7.5, 0.5, 1.5, -6.5], np.float32)
    got = quantize(jnp.asarray(column[:, None]), (0,), "int4")
    assert np.asarray(got.values[:, 0]).astype(int).tolist() == [7, -8, 0, 2, -6]


@pytest.mark.parametrize("dtype", QUANTIZED_DTYPES)
def test_values_come_back_from_the_bytes_of_a_file(dtype):
    values = np.asarray(quantize(jnp.asarray(random_matrix((6, 10))), (1,), dtype).values)
    stored = pack(values)
    assert stored.nbytes == values.size // (2 if dtype == "int4" else 1)
    assert stored.dtype in (np.int8, np.uint8)
    np.testing.assert_array_equal(unpack(stored, dtype).view(np.uint8), values.view(np.uint8))


@pytest.mark.parametrize(
    ("shape", "dims", "group_size", "inputs"),
    [((40, 24), (0,), 16, "40"), ((40, 24), (0,), 80, "40"), ((4, 6, 2), (0, 1), 4, "4 x 6"), ((4, 6), (0, 1), 18, "")],
)
def test_groups_that_do_not_divide_the_inputs_are_refused(shape, dims, group_size, inputs):
    with pytest.raises(ValueError, match=f"must divide the inputs of each matrix, got {group_size} for {inputs}"):
        quantize(jnp.ones(shape), dims, "int4", group_size)


def test_float8_values_are_those_of_ml_dtypes():
    matrix = random_matrix((64, 24))
    got = quantize_jit(matrix, (0,), "float8_e4m3fn")
    assert got.values.dtype == jnp.float8_e4m3fn
    scaled = matrix / np.asarray(got.scale)
    assert np.abs(scaled).max(0).round(3).tolist() == [448.0 if i != 3 else 0.0 for i in range(24)]
    expected = np.clip(scaled, -448, 448).astype(ml_dtypes.float8_e4m3fn)
    np.testing.assert_array_equal(np.asarray(got.values, np.float32), expected.astype(np.float32))
    # Three bits of mantissa: half a unit in the last place is 1/16 of a normal number, 2^-10 below 2^-6.
    error = np.abs(dequantize(got) - matrix)
    assert (error <= np.maximum(np.abs(matrix) / 16, 2.0**-10 * got.scale) * 1.001).all()


@pytest.mark.parametrize("dtype", QUANTIZED_DTYPES)
def test_channels_that_no_scale_can_hold(dtype):
    smallest_normal = float(np.finfo(np.float32).tiny)
    columns = jnp.asarray([[0.0, 10 * smallest_normal, jnp.nan, 1e38], [0.0, smallest_normal, 1.0, 3.4e38]])
    got = quantize(columns, (0,), dtype)
    assert got.scale[0, :2].tolist() == [1.0, 1.0]
    assert dequantize(got)[:, :2].tolist() == [[0.0, 0.0]] * 2
    assert np.isnan(dequantize(got)[:, 2]).all()
    assert (np.abs(dequantize(got)[:, 3] - columns[:, 3]) <= 0.5001 * got.scale[0, 3] + columns[:, 3] / 16).all()


@pytest.mark.parametrize("dtype", QUANTIZED_DTYPES)
def test_bfloat16_weights_are_quantised_as_their_float32_values(dtype):
    matrix = jnp.asarray(random_matrix((40, 24)), jnp.bfloat16)
    low, wide = (quantize_jit(x, (0,), dtype) for x in (matrix, matrix.astype(jnp.float32)))
    jax.tree.map(np.testing.assert_array_equal, low, wide)


def test_another_dtype_is_refused():
    with pytest.raises(ValueError, match="must be one of int8, int4, float8_e4m3fn, got 'int3'"):
        quantize(jnp.ones((2, 2)), (0,), "int3")


# The ops


@pytest.mark.parametrize(("dtype", "group_size"), [*((dtype, None) for dtype in QUANTIZED_DTYPES), ("int4", 20)])
@pytest.mark.parametrize(("shape", "num_input_dims"), [((40, 4, 6), 1), ((4, 10, 24), 2)])
def test_dense_with_a_quantised_kernel_is_dense_with_what_it_stands_for(dtype, group_size, shape, num_input_dims):
    rng = np.random.default_rng(1)
    matrix, dims = jnp.asarray(rng.normal(size=shape), jnp.float32), tuple(range(num_input_dims))
    kernel = quantize_jit(matrix, dims, dtype, group_size)
    x = jnp.asarray(rng.normal(size=(2, 3, *shape[:num_input_dims])), jnp.float32)
    bias = jnp.asarray(rng.normal(size=shape[num_input_dims:]), jnp.float32)
    expected = np.tensordot(
        np.asarray(x, np.float64), np.asarray(dequantize(kernel), np.float64), axes=num_input_dims
    ) + np.asarray(bias)
    got = dense_jit(x, kernel, bias, num_input_dims)
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)
    with jax.enable_x64(True):
        exact = dense_jit(np.asarray(x, np.float64), kernel, bias, num_input_dims)
        assert exact.dtype == jnp.float64
        np.testing.assert_allclose(exact, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", QUANTIZED_DTYPES)
@pytest.mark.parametrize("compute", ["bfloat16", "float16"])
def test_dense_in_16_bits_accumulates_and_scales_in_float32(dtype, compute):
    """Sums of 8-bit values beyond float16's 65504, and one rounding at the end only."""
    rng = np.random.default_rng(2)
    kernel = quantize_jit(jnp.asarray(1 + rng.random((2048, 5)), jnp.float32), (0,), dtype)
    x = jnp.asarray(1 + rng.random((3, 2048)), compute) / 64
    expected = np.asarray(x, np.float64) @ np.asarray(dequantize(kernel), np.float64)
    got, wide = dense_jit(x, kernel), dense_jit(x, kernel, out_dtype=jnp.float32)
    assert (got.dtype, wide.dtype) == (x.dtype, jnp.float32)
    np.testing.assert_allclose(wide, expected, rtol=1e-5)
    np.testing.assert_array_equal(got, wide.astype(compute))


@pytest.mark.parametrize("dtype", QUANTIZED_DTYPES)
def test_a_quantised_table_serves_look_up_and_head(dtype):
    config = tiny_config("gemma3_text")
    table = jnp.asarray(np.random.default_rng(3).normal(size=(VOCAB, 16)), jnp.float32)
    group_size = 4 if dtype == "int4" else None
    quantized = quantize(table, (1,), dtype, group_size)
    assert quantized.scale.shape == (VOCAB, 4 if group_size else 1)
    tokens = batch_of()[0]
    np.testing.assert_allclose(
        ops.embed(quantized, tokens, config), 4 * np.asarray(dequantize(quantized))[tokens], rtol=1e-6
    )
    hidden = jnp.asarray(np.random.default_rng(4).normal(size=(2, 16)), jnp.float32)
    expected = np.asarray(hidden, np.float64) @ np.asarray(dequantize(quantized), np.float64).T
    np.testing.assert_allclose(ops.dense(hidden, quantized.T), expected, rtol=1e-5, atol=1e-5)


# Whole models


@functools.cache
def model_of(family):
    """(configuration, policy, parameters) of a model of one layer, or of a Gemma of one layer of each kind."""
    gemma = {} if family == "gemma3_text" else {"num_layers": 1}
    config = tiny_config(family, tie_word_embeddings=family in ("llama", "gemma3_text"), **gemma)
    return config, NNXPolicy(config), noisy_params(config)


@functools.partial(jax.jit, static_argnums=0)
def outputs(policy, params):
    """What every entry point of a policy gives."""
    hidden = policy.hidden(params, batch_of())
    cached, _ = policy.extend(params, batch_of(), init_cache(policy.config, 2, 8))
    return hidden, cached, policy.unembed(params, hidden)


@pytest.mark.parametrize(
    ("family", "dtype"),
    [*itertools.product(FAMILIES, ("int8", "int4/4")), ("llama", "float8_e4m3fn"), ("qwen3", "int4")],
)
def test_models_compute_with_quantised_params_as_with_the_params_they_stand_for(family, dtype):
    config, policy, full = model_of(family)
    params = quantized_of(config, full, dtype)
    got, expected = outputs(policy, params), outputs(policy, dequantize_tree(params))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), got, expected)
    # What was computed with were not the weights before quantisation.
    assert float(jnp.abs(outputs(policy, full)[2] - got[2]).max()) > 1e-2
    if family == "qwen2":
        jax.tree.map(np.testing.assert_array_equal, outputs(LinenPolicy(config), params), got)


@pytest.mark.matrix
@pytest.mark.parametrize("dtype", [*QUANTIZED_DTYPES, "int4/4"])
@pytest.mark.parametrize("family", FAMILIES)
def test_twins_are_the_same_program_with_quantised_params(family, dtype):
    """Equal before compilation, so equal bit for bit after it, on any machine."""
    config, _, _ = model_of(family)
    shapes = jax.eval_shape(
        lambda key: quantize_params(config, ops.init_params(config, key), whole(dtype)), jax.random.key(0)
    )
    cache = init_cache(config, 2, 8)
    for method, arguments in (
        ("hidden", (batch_of(),)),
        ("extend", (batch_of(), cache)),
        ("unembed", (jnp.ones((2, 16)),)),
    ):
        linen, nnx_program = (
            jax.jit(getattr(policy, method)).lower(shapes, *arguments).as_text()
            for policy in (LinenPolicy(config), NNXPolicy(config))
        )
        assert linen == nnx_program
        assert {"int8": "xi8>", "int4": "xi4>", "float8_e4m3fn": "xf8E4M3FN>"}[dtype.partition("/")[0]] in linen


def test_rematerialised_layers_take_quantised_params():
    config, policy, params = model_of("qwen3")
    params = quantized_of(config, params, "int8")
    plain = jax.jit(policy.hidden)(params, batch_of())
    for policy_class in (LinenPolicy, NNXPolicy):
        policy = policy_class(dataclasses.replace(config, remat="block"))
        np.testing.assert_allclose(jax.jit(policy.hidden)(params, batch_of()), plain, rtol=1e-5, atol=1e-5)


def test_layers_run_as_a_loop_where_only_some_are_quantised():
    quantization = Quantization("int4", 4, ("layers_[12]/mlp/",))
    config = dataclasses.replace(tiny_config("qwen3", num_layers=4), quantization=quantization)
    params = quantize_params(config, noisy_params(config), quantization)
    plain = jax.jit(NNXPolicy(config).hidden)(params, batch_of())
    for policy_class in (LinenPolicy, NNXPolicy):
        policy = policy_class(dataclasses.replace(config, scan_layers=True))
        np.testing.assert_allclose(jax.jit(policy.hidden)(params, batch_of()), plain, rtol=1e-5, atol=1e-5)


def quantized_shapes(config):
    return jax.eval_shape(lambda: quantize_params(config, ops.init_params(config, jax.random.key(0)), whole("int8")))


@pytest.mark.parametrize("flavour", [False, True])
def test_a_quantised_tree_of_another_model_is_refused(flavour):
    policy = create_policy(tiny_config(num_layers=3), flavour)
    fewer, other = tiny_config(num_layers=2), tiny_config("qwen2", num_layers=3)
    with pytest.raises(ValueError, match="parameter layers_2 is missing"):
        jax.eval_shape(policy.hidden, quantized_shapes(fewer), batch_of())
    with pytest.raises(ValueError, match="parameter layers_0/self_attn/q_proj/bias has no place"):
        jax.eval_shape(policy.hidden, quantized_shapes(other), batch_of())


def test_linen_refuses_quantised_values_of_another_shape():
    wider = tiny_config(intermediate_size=32)
    with pytest.raises(ScopeParamShapeError, match="gate_proj"):
        jax.eval_shape(LinenPolicy(wider).hidden, quantized_shapes(tiny_config()), batch_of())


# The tree


def test_matrices_of_attention_mlp_and_head_are_quantised_and_nothing_else():
    for tied, head in ((True, "embed_tokens/embedding"), (False, "lm_head/kernel")):
        config = tiny_config("qwen2", num_layers=2, tie_word_embeddings=tied)
        params = noisy_params(config)
        quantized = quantize_params(config, params, whole("int8"))
        matrices = {
            f"layers_{i}/{name}_proj/kernel"
            for i in range(2)
            for name in ("self_attn/q", "self_attn/k", "self_attn/v", "self_attn/o", "mlp/gate", "mlp/up", "mlp/down")
        }
        assert quantized_paths(quantized) == matrices | {head}
        assert quantized_paths(quantize_params(config, params, Quantization("int8"))) == matrices
        assert quantized["norm"]["scale"] is params["norm"]["scale"]
        assert quantized["layers_0"]["self_attn"]["q_proj"]["bias"] is params["layers_0"]["self_attn"]["q_proj"]["bias"]
        attention = quantized["layers_1"]["self_attn"]
        assert attention["q_proj"]["kernel"].scale.shape == (1, 4, 8)
        assert attention["o_proj"]["kernel"].scale.shape == (1, 1, 16)


def test_patterns_choose_matrices_and_one_that_finds_none_is_refused():
    config = tiny_config("qwen2", num_layers=2, tie_word_embeddings=False)
    params = noisy_params(config)
    chosen = quantize_params(config, params, Quantization("int8", None, ("layers_1/mlp/", "^embed_tokens/")))
    mlp = {f"layers_1/mlp/{name}_proj/kernel" for name in ("gate", "up", "down")}
    assert quantized_paths(chosen) == mlp | {"embed_tokens/embedding"}
    for pattern in ("layers_7/", "bias", "norm"):
        with pytest.raises(ValueError, match=f"each find a matrix, got '{pattern}'"):
            quantize_params(config, params, Quantization("int8", None, ("mlp", pattern)))


@pytest.mark.parametrize("dtype", QUANTIZED_DTYPES)
def test_a_quantised_tree_takes_little_more_than_a_quarter_of_the_bytes(dtype):
    config = tiny_config(vocab_size=2048, hidden_size=128, intermediate_size=512, num_heads=8, head_dim=16)
    params = jax.eval_shape(lambda: ops.init_params(config, jax.random.key(0)))
    quantized = jax.eval_shape(lambda params: quantize_params(config, params, whole(dtype)), params)
    assert num_bytes(quantized) <= 0.3 * num_bytes(params)
    kernel = quantized["layers_0"]["mlp"]["down_proj"]["kernel"]
    assert (kernel.shape, str(kernel.values.dtype), kernel.scale.shape) == ((512, 128), dtype, (1, 128))


# On a mesh


@pytest.mark.parametrize("dtype", ["int8", "float8_e4m3fn", "int4/8", "int4/16"])
def test_sharded_params_are_quantised_in_place_and_compute_as_on_one_device(dtype):
    config = tiny_config("qwen3", hidden_size=32, intermediate_size=64, num_layers=1)
    run_config = load_config(None, ["mesh.fsdp=4", "mesh.tensor=2", "mesh.num_devices=8"])
    mesh = create_mesh(run_config.mesh)
    params = noisy_params(config)
    shardings = tree_shardings(params, logical_axes(config), mesh, run_config.mesh.rules)
    placed = jax.device_put(params, shardings)
    expected_shardings = quantized_shardings(config, shardings, whole(dtype))
    quantized = jax.jit(
        lambda params: quantize_params(config, params, whole(dtype)),
        in_shardings=(shardings,),
        out_shardings=expected_shardings,
    )(placed)
    alone = quantized_of(config, params, dtype)
    jax.tree.map(np.testing.assert_array_equal, quantized, alone)
    attention = quantized["layers_0"]["self_attn"]
    assert attention["q_proj"]["kernel"].values.sharding.spec == PartitionSpec("fsdp", "tensor", None)
    # Of 32 inputs on four devices, groups of 8 go along, and groups of 16 cannot.
    along = "fsdp" if dtype == "int4/8" else None
    assert attention["q_proj"]["kernel"].scale.sharding.spec == PartitionSpec(along, "tensor", None)
    assert attention["o_proj"]["kernel"].scale.sharding.spec[2] == "fsdp"
    assert quantized["layers_0"]["mlp"]["up_proj"]["kernel"].values.addressable_shards[0].data.shape == (8, 32)
    policy, batch = NNXPolicy(config), batch_of()
    logits = jax.jit(lambda params: policy.unembed(params, policy.hidden(params, batch)))
    np.testing.assert_allclose(logits(quantized), logits(alone), rtol=1e-4, atol=1e-4)
