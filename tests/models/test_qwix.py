"""qwix's own adapters and quantised layers, in a plain model of flax's layers, as an oracle for the one `dense` op."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import qwix
from flax import linen, nnx

from rl.models.config import LORA_A, LORA_B, LoRAConfig
from rl.models.ops import Adapter, dense
from rl.models.quantized import quantize

# qwix 0.1.8 uses names that flax is about to drop.
pytestmark = pytest.mark.filterwarnings("ignore:.*'(VariableState|m.iter_modules|.value):DeprecationWarning")

ALPHA, SIZE, OUT = 7.5, 16, 10
SHAPES = {"q_proj": ((SIZE,), (4, 6)), "o_proj": ((4, 6), (OUT,))}  # inputs and outputs of each product


def drawn(key, shape, dtype=jnp.float32, *_):
    """Initial values of kernels, biases and adapters alike, the same in every model."""
    return jnp.asarray(np.random.default_rng(shape).normal(size=shape), dtype)


INITIAL = {"kernel_init": drawn, "bias_init": drawn}


class PlainLinen(linen.Module):
    """Two products with the dims that those of an attention block have."""

    @linen.compact
    def __call__(self, x):
        heads = linen.DenseGeneral((4, 6), name="q_proj", **INITIAL)(x)
        return linen.DenseGeneral(OUT, axis=(-2, -1), name="o_proj", **INITIAL)(jax.nn.silu(heads))


class PlainNNX(nnx.Module):
    """The same of NNX's layers."""

    def __init__(self):
        self.q_proj = nnx.LinearGeneral(SIZE, (4, 6), rngs=nnx.Rngs(0), **INITIAL)
        self.o_proj = nnx.LinearGeneral((4, 6), OUT, axis=(-2, -1), rngs=nnx.Rngs(0), **INITIAL)

    def __call__(self, x):
        return self.o_proj(jax.nn.silu(self.q_proj(x)))


def by_qwix(flavour, provider, x, weights):
    """(weights without qwix, weights and adapters with it, output, gradient of its weighted sum) of a plain model."""

    def weighted_sum(function, *args):
        return jnp.sum(weights * function(*args))

    if flavour == "linen":
        model = qwix.quantize_model(PlainLinen(), provider)
        before, after = (made.init(jax.random.key(0), x)["params"] for made in (PlainLinen(), model))
        apply = lambda params: model.apply({"params": params}, x)  # noqa: E731
        return before, after, apply(after), jax.grad(functools.partial(weighted_sum, apply), allow_int=True)(after)
    plain = PlainNNX()
    model = qwix.quantize_model(plain, provider, x, rngs=nnx.Rngs(0))
    gradient = nnx.grad(weighted_sum, argnums=nnx.DiffState(0, nnx.LoRAParam))(model, x)
    before, after, gradient = (nnx.to_pure_dict(tree) for tree in (nnx.state(plain), nnx.state(model), gradient))
    return before, after, model(x), gradient


def adapters_of(params):
    """{product: (A [*inputs, rank], B [rank, *outputs])} of what qwix keeps as matrices."""
    return {
        name: (
            params[name][f"kernel_{LORA_A}"].reshape(*inputs, -1),
            params[name][f"kernel_{LORA_B}"].reshape(-1, *outputs),
        )
        for name, (inputs, outputs) in SHAPES.items()
    }


@pytest.mark.parametrize(
    ("flavour", "rank", "base_dtype", "group_size"),
    [
        ("linen", 3, None, None),
        ("nnx", 3, None, None),
        ("linen", 3, "int8", None),
        ("nnx", 3, "int4", 8),
        ("linen", 3, "float8_e4m3fn", None),
        ("nnx", None, "int8", None),
    ],
)
def test_dense_computes_what_a_plain_model_does_that_qwix_adapts_and_quantises(flavour, rank, base_dtype, group_size):
    rng = np.random.default_rng(2)
    x, weights = (rng.normal(size=(2, 5, size)).astype(np.float32) for size in (SIZE, OUT))
    settings = {} if base_dtype is None else {"weight_qtype": getattr(jnp, base_dtype)}
    rule, provider = qwix.QuantizationRule, qwix.PtqProvider
    if rank is not None:
        rule, provider = qwix.LoraRule, qwix.LoraProvider
        settings |= {"rank": rank, "alpha": ALPHA, "lora_a_initializer": drawn, "lora_b_initializer": drawn}
    # Not of o_proj: of its two dims of inputs qwix cuts the second only, and all heads share the scales of its groups.
    group_sizes = {"q_proj": group_size, "o_proj": None}
    rules = [rule(module_path=name, tile_size=size, **settings) for name, size in group_sizes.items()]
    before, after, want, want_gradient = by_qwix(flavour, provider(rules), x, weights)

    kernels = {name: before[name]["kernel"] for name in SHAPES}
    if base_dtype is not None:
        kernels = {
            name: quantize(kernels[name], range(len(inputs)), base_dtype, group_sizes[name])
            for name, (inputs, _) in SHAPES.items()
        }
        for name, kernel in kernels.items():
            jax.tree.map(np.testing.assert_array_equal, jax.tree.leaves(kernel), jax.tree.leaves(after[name]["kernel"]))

    def project(adapters, name, x):
        adapter = None if rank is None else Adapter(*adapters[name], LoRAConfig(rank, ALPHA, ("*",)).scale)
        return dense(x, kernels[name], before[name]["bias"], len(SHAPES[name][0]), adapter=adapter)

    def ours(adapters):
        y = project(adapters, "o_proj", jax.nn.silu(project(adapters, "q_proj", x)))
        return jnp.sum(weights * y), y

    adapters = {} if rank is None else adapters_of(after)
    (_, got), gradient = jax.value_and_grad(ours, has_aux=True)(adapters)
    assert_close(got, want)
    if rank is not None:
        jax.tree.map(assert_close, gradient, adapters_of(want_gradient))


def assert_close(got, want):
    assert got.shape == want.shape
    largest = np.abs(want).max()
    assert largest > 0.1
    assert np.abs(got - want).max() <= 1e-6 * largest
