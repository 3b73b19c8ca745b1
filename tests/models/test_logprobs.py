"""Chunked log-probs equal the plain computation, and no array of all logits exists."""

import functools
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rl.models.logprobs import token_logprobs

B, T, D, V = 3, 11, 4, 37
TEMPERATURE = 0.7


class Head:
    """An output projection with a bias: what a policy does with its last hidden states."""

    def unembed(self, params: Any, hidden: jax.Array) -> jax.Array:
        return hidden @ params["kernel"] + params["bias"]


class Problem(NamedTuple):
    params: dict[str, jax.Array]
    hidden_BTD: jax.Array
    targets_BT: jax.Array


def random_problem(dtype: Any, shape: tuple[int, int, int, int] = (B, T, D, V)) -> Problem:
    random = np.random.default_rng(0)
    num_rows, num_tokens, num_dims, num_words = shape
    params = {"kernel": random.normal(0, 1, (num_dims, num_words)), "bias": random.normal(0, 2, num_words)}
    hidden_BTD = random.normal(0, 1, (num_rows, num_tokens, num_dims))
    targets_BT = random.integers(0, num_words, (num_rows, num_tokens))
    return Problem(
        jax.tree.map(lambda x: jnp.asarray(x, dtype), params), jnp.asarray(hidden_BTD, dtype), jnp.asarray(targets_BT)
    )


def naive(params: Any, hidden_BTD: jax.Array, targets_BT: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Everything at once, with the library's own log_softmax and its automatic gradient."""
    log_probabilities_BTV = jax.nn.log_softmax(Head().unembed(params, hidden_BTD) / TEMPERATURE)
    logprobs_BT = jnp.take_along_axis(log_probabilities_BTV, targets_BT[..., None], axis=-1)[..., 0]
    return logprobs_BT, -jnp.sum(jnp.exp(log_probabilities_BTV) * log_probabilities_BTV, axis=-1)


def chunked(chunk_size: int | None, with_entropy: bool = True) -> Any:
    def values(*problem: Any, **more: Any) -> Any:
        return token_logprobs(Head(), *problem, TEMPERATURE, chunk_size, with_entropy, **more)

    return values


def weighted(function: Any) -> Any:
    """A scalar in which every token has its own weight, in log-prob and entropy, with a non-linear part."""

    def scalar(params: Any, hidden_BTD: jax.Array, targets_BT: jax.Array) -> jax.Array:
        values = function(params, hidden_BTD, targets_BT)
        weights_BT = jnp.cos(jnp.arange(targets_BT.size)).reshape(targets_BT.shape)
        total = jnp.sum(weights_BT * jnp.exp(values[0]))
        return total if values[1] is None else total + jnp.sum(jnp.flip(weights_BT) * values[1] ** 2)

    return scalar


@pytest.mark.parametrize("chunk_size", [1, 4, 10, 64])
@pytest.mark.parametrize(("dtype", "tolerance"), [(np.float64, 1e-12), (np.float32, 2e-6)])
def test_any_chunk_size_equals_the_plain_computation_in_value_and_gradient(
    dtype: Any, tolerance: float, chunk_size: int
) -> None:
    with jax.enable_x64(dtype is np.float64):
        problem = random_problem(dtype)
        logprobs_BT, entropy_BT = jax.jit(chunked(chunk_size))(*problem)
        assert logprobs_BT.dtype == entropy_BT.dtype == dtype
        expected = jax.jit(naive)(*problem)
        np.testing.assert_allclose(logprobs_BT, expected[0], rtol=tolerance, atol=tolerance)
        np.testing.assert_allclose(entropy_BT, expected[1], rtol=tolerance, atol=tolerance)
        grads = jax.jit(jax.grad(weighted(chunked(chunk_size)), argnums=(0, 1)))(*problem)
        expected_grads = jax.jit(jax.grad(weighted(naive), argnums=(0, 1)))(*problem)
        for leaf, expected_leaf in zip(jax.tree.leaves(grads), jax.tree.leaves(expected_grads), strict=True):
            scale = np.abs(expected_leaf).max()
            assert scale > 0.01
            np.testing.assert_allclose(leaf, expected_leaf, rtol=0, atol=tolerance * scale)


@pytest.mark.parametrize("with_entropy", [False, True])
@pytest.mark.parametrize("chunk_size", [3, 64])
def test_value_is_bit_identical_with_and_without_gradient_and_entropy(chunk_size: int, with_entropy: bool) -> None:
    problem = random_problem(np.float32, (4, 24, 32, 500))

    def scalar(*problem: Any) -> tuple[jax.Array, Any]:
        values = chunked(chunk_size, with_entropy)(*problem)
        return weighted(lambda *_: values)(*problem), values[0]

    plain_BT, _ = jax.jit(chunked(chunk_size, with_entropy=False))(*problem)
    (_, differentiated_BT), _ = jax.jit(jax.value_and_grad(scalar, argnums=(0, 1), has_aux=True))(*problem)
    np.testing.assert_array_equal(differentiated_BT, plain_BT)


def test_entropy_is_not_computed_unless_asked_for() -> None:
    problem = random_problem(np.float32)
    logprobs_BT, entropy_BT = chunked(4, with_entropy=False)(*problem)
    assert entropy_BT is None
    np.testing.assert_allclose(logprobs_BT, naive(*problem)[0], rtol=2e-6, atol=2e-6)

    def count(with_entropy: bool) -> int:
        jaxpr = jax.make_jaxpr(chunked(4, with_entropy))(*problem)
        return sum(equation.primitive.name == "exp" for equation in equations(jaxpr.jaxpr))

    assert count(with_entropy=False) == 1
    assert count(with_entropy=True) == 2


@pytest.mark.parametrize(
    ("num_rows", "num_shards", "on_cpu", "num_positions"),
    [
        (2, 1, False, 256),
        (3, 1, False, 160),
        (12, 4, False, 160),
        (12, 4, True, 80),
        (16, 1, False, 32),
        (100, 1, True, 16),
    ],
)
def test_a_chunk_of_open_size_holds_512_positions_of_the_rows_of_a_device_or_256_on_a_cpu(
    num_rows: int, num_shards: int, on_cpu: bool, num_positions: int
) -> None:
    """Whatever the vocabulary: 256 of each of two rows, 160 of three, in tiles of 16."""
    for num_words in (37, 151936):
        params = {"kernel": jnp.zeros((1, num_words)), "bias": jnp.zeros(num_words)}
        problem = Problem(params, jnp.zeros((num_rows, 1700, 1)), jnp.zeros((num_rows, 1700), jnp.int32))
        function = functools.partial(chunked(None), num_shards=num_shards, on_cpu=on_cpu)
        assert chunk_sizes(function, problem) == {num_positions}


@pytest.mark.parametrize(("num_words", "num_products"), [(4096, 3), (4097, 4)])
def test_logits_are_kept_where_all_of_them_are_few_and_computed_again_otherwise(
    num_words: int, num_products: int
) -> None:
    """2^24 logits are few; products with the head: forward, its gradient, that of hidden states, and forward again."""
    problem = random_problem(np.float32, (8, 512, 4, num_words))
    gradient = jax.jit(jax.grad(weighted(chunked(None)), argnums=(0, 1))).lower(*problem).compile()
    assert gradient.as_text().count(" dot(") == num_products
    expected = jax.jit(jax.grad(weighted(naive), argnums=(0, 1)))(*problem)
    for leaf, expected_leaf in zip(jax.tree.leaves(gradient(*problem)), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(leaf, expected_leaf, rtol=0, atol=1e-5 * np.abs(expected_leaf).max())


@pytest.mark.parametrize(("lengths", "num_chunks"), [((64, 3), 4), ((33, 20), 3), ((16, 0), 1), ((0, 0), 0)])
def test_chunks_behind_the_last_position_that_counts_are_not_computed(
    lengths: tuple[int, int], num_chunks: int
) -> None:
    """Forward and backward, of four chunks of 16; what is left out has no value and no gradient."""
    seen: list[int] = []

    class Watched(Head):
        def unembed(self, params: Any, hidden: jax.Array) -> jax.Array:
            jax.debug.callback(lambda: seen.append(hidden.shape[1]))
            return super().unembed(params, hidden)

    problem = random_problem(np.float32, (2, 64, D, V))
    mask_BT = jnp.arange(64) < jnp.asarray(lengths)[:, None]

    def masked(policy: Any, chunk_size: int) -> Any:
        return lambda *problem: token_logprobs(policy, *problem, TEMPERATURE, chunk_size, True, mask_BT)

    gradient = jax.jit(jax.value_and_grad(weighted(masked(Watched(), 16)), argnums=(0, 1)))
    actual = gradient(*problem)
    jax.effects_barrier()
    assert seen == [16] * 2 * num_chunks
    expected = jax.value_and_grad(weighted(masked(Head(), 64)), argnums=(0, 1))(*problem)
    for leaf, expected_leaf in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(leaf, expected_leaf, rtol=0, atol=1e-5 * max(np.abs(expected_leaf).max(), 1e-3))


def test_parameters_that_do_not_move_cost_no_gradient() -> None:
    """Those of a frozen head: one product less, that of its gradient."""
    problem = random_problem(np.float32, (8, 512, 4, 4097))

    def gradient_of(arguments: tuple[int, ...]) -> str:
        return jax.jit(jax.grad(weighted(chunked(None)), argnums=arguments)).lower(*problem).compile().as_text()

    assert [gradient_of(arguments).count(" dot(") for arguments in ((0, 1), (1,))] == [4, 3]


@pytest.mark.parametrize(("chunk_size", "num_positions"), [(512, 496), (350, 350), (40, 40)])
def test_chunks_end_where_tiles_of_16_do_unless_that_makes_them_larger_than_asked_for(
    chunk_size: int, num_positions: int
) -> None:
    """Of 3,458 positions seven chunks of 494, of which TPUs move every number within its tile, would be even."""
    problem = random_problem(np.float32, (3, 3458, D, V))
    assert chunk_sizes(chunked(chunk_size), problem) == {num_positions}
    if num_positions == 496:
        for actual, plain in zip(jax.jit(chunked(chunk_size))(*problem), jax.jit(naive)(*problem), strict=True):
            np.testing.assert_allclose(actual, plain, rtol=2e-6, atol=2e-6)


def chunk_sizes(function: Any, problem: Problem) -> set[int]:
    """How many positions of a row have logits at one time."""
    rows, num_words = len(problem.targets_BT), len(problem.params["bias"])
    jaxpr = jax.make_jaxpr(function)(*problem)
    shapes = [v.aval.shape for e in equations(jaxpr.jaxpr) for v in e.outvars if hasattr(v.aval, "shape")]
    return {shape[1] for shape in shapes if len(shape) == 3 and shape[::2] == (rows, num_words)}


@pytest.mark.parametrize("chunk_size", [4, 64])
@pytest.mark.parametrize("garbage", [math.nan, math.inf])
def test_masked_positions_are_zero_and_reach_no_gradient(garbage: float, chunk_size: int) -> None:
    params, hidden_BTD, targets_BT = random_problem(np.float32)
    mask_BT = jnp.arange(T) < jnp.asarray([[11], [0], [6]])
    dirty_BTD = jnp.where(mask_BT[..., None], hidden_BTD, garbage)
    dirty_targets_BT = jnp.where(mask_BT, targets_BT, -1)
    masked = functools.partial(chunked(chunk_size), mask_BT=mask_BT)
    for values_BT in masked(params, dirty_BTD, dirty_targets_BT):
        assert not np.any(values_BT[~mask_BT])
        assert np.all(values_BT[mask_BT] != 0)
    gradient = jax.jit(jax.grad(weighted(masked), argnums=(0, 1)))
    expected = gradient(params, hidden_BTD, targets_BT)
    actual = gradient(params, dirty_BTD, dirty_targets_BT)
    for left, right in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(left, right)
    assert not np.any(actual[1][~mask_BT])


def test_forbidden_tokens_keep_values_and_gradients_finite() -> None:
    params, hidden_BTD, targets_BT = random_problem(np.float32)
    allowed_V = jnp.arange(V) % 2 == 0
    params["bias"] = jnp.where(allowed_V, params["bias"], -jnp.inf)
    targets_BT = targets_BT // 2 * 2
    few = {"kernel": params["kernel"][:, ::2], "bias": params["bias"][::2]}
    values = jax.jit(chunked(4))(params, hidden_BTD, targets_BT)
    for actual, expected in zip(values, naive(few, hidden_BTD, targets_BT // 2), strict=True):
        np.testing.assert_allclose(actual, expected, rtol=2e-6, atol=2e-6)
    grads = jax.jit(jax.grad(weighted(chunked(4)), argnums=(0, 1)))(params, hidden_BTD, targets_BT)
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(grads))


def test_adding_a_large_number_to_all_logits_changes_nothing_but_their_rounding() -> None:
    params, hidden_BTD, targets_BT = random_problem(np.float32)
    expected = naive(params, hidden_BTD, targets_BT)
    params["bias"] = params["bias"] + 1e4  # numbers near 1e4 are 1e-3 apart in float32
    for actual, plain in zip(jax.jit(chunked(4))(params, hidden_BTD, targets_BT), expected, strict=True):
        np.testing.assert_allclose(actual, plain, rtol=0, atol=1e-2)


def test_bfloat16_logits_give_float32_logprobs() -> None:
    problem = random_problem(jnp.bfloat16)
    logprobs_BT, _ = chunked(4)(*problem)
    assert logprobs_BT.dtype == jnp.float32


def equations(jaxpr: Any) -> Iterator[Any]:
    """All equations of a jaxpr, those of its inner jaxprs included."""
    for equation in jaxpr.eqns:
        yield equation
        for value in equation.params.values():
            for inner in jax.tree.leaves(value, is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr")):
                if hasattr(inner, "jaxpr"):
                    inner = inner.jaxpr
                if hasattr(inner, "eqns"):
                    yield from equations(inner)


def largest_array(function: Any, *arguments: Any) -> int:
    jaxpr = jax.make_jaxpr(function)(*arguments)
    return max(
        math.prod(v.aval.shape)
        for e in equations(jaxpr.jaxpr)
        for v in (*e.invars, *e.outvars)
        if hasattr(v.aval, "shape")
    )


def test_no_array_of_all_logits_exists_forward_or_backward() -> None:
    num_rows, num_tokens, num_dims, num_words, chunk_size = 2, 64, 4, 1000, 8
    problem = random_problem(np.float32, (num_rows, num_tokens, num_dims, num_words))
    all_logits = num_rows * num_tokens * num_words

    def differentiated(function: Any) -> Any:
        return jax.value_and_grad(weighted(function), argnums=(0, 1))

    assert largest_array(differentiated(naive), *problem) == all_logits  # the check can see one
    assert largest_array(chunked(chunk_size), *problem) == num_rows * chunk_size * num_words
    assert largest_array(differentiated(chunked(chunk_size)), *problem) == num_rows * chunk_size * num_words


def test_compiled_memory_grows_with_the_chunk_and_not_with_the_sequence() -> None:
    def temporary_bytes(num_tokens: int, function: Any) -> int:
        problem = random_problem(np.float32, (2, num_tokens, 4, 1000))
        step = jax.jit(jax.value_and_grad(weighted(function), argnums=(0, 1)))
        return step.lower(*problem).compile().memory_analysis().temp_size_in_bytes

    one_array_of_all_logits = 4 * 2 * 256 * 1000
    assert temporary_bytes(256, naive) >= one_array_of_all_logits
    assert temporary_bytes(256, chunked(8)) < one_array_of_all_logits / 4
    assert temporary_bytes(256, chunked(8)) < 1.5 * temporary_bytes(64, chunked(8))


@pytest.mark.parametrize("chunk_size", [0, -1])
def test_chunk_size_below_one_is_refused(chunk_size: int) -> None:
    with pytest.raises(ValueError, match=f"chunk_size must be >= 1, got {chunk_size}"):
        chunked(chunk_size)(*random_problem(np.float32))


def test_hidden_states_that_do_not_fit_the_targets_are_refused() -> None:
    params, hidden_BTD, targets_BT = random_problem(np.float32)
    with pytest.raises(ValueError, match=r"same B and T, got \(3, 11, 4\) and \(3, 10\)"):
        chunked(4)(params, hidden_BTD, targets_BT[:, 1:])
