"""The layers of a decoder as a loop: one compiled layer that runs over stacked parameters, for both twins.

In: the parameters of consecutive layers, each a tree of its own, and a function that applies one layer. Out: the hidden
states after the last of them. Parameters, moments and checkpoints keep a tree per layer, whether layers are scanned or
not: they are stacked inside the compiled function, in the compute dtype, which costs one more copy of the layers while
it runs. What it gives: the time and memory to compile do not grow with the number of layers, and rematerialisation
holds on every backend (XLA for CPU merges the second forward pass of unrolled layers with the first).
Layers with a cache (prefill, decoding) are not scanned: stacking would copy the weights for every token.
"""

import itertools
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from rl.models import ops
from rl.models.config import ModelConfig, parameter_specs
from rl.models.quantized import QuantizedArray, chosen_matrices

ApplyLayer = Callable[[Any, jax.Array, ops.LayerContext], jax.Array]


def layer_runs(config: ModelConfig) -> list[range]:
    """Consecutive layers whose parameters have the same names and shapes, so that they can be stacked.

    A decoder without adapters is one run; adapters on some of the layers cut it, and so do quantised matrices in some.
    Attention types need not be equal.
    """
    specs = parameter_specs(config)
    quantized = set() if config.quantization is None else set(chosen_matrices(config, config.quantization))

    def kind(index: int) -> tuple[Any, frozenset[str]]:
        prefix = f"layers_{index}/"
        names = frozenset(name.removeprefix(prefix) for name in quantized if name.startswith(prefix))
        return specs[f"layers_{index}"], names

    runs = itertools.groupby(range(config.num_layers), key=kind)
    return [range(layers[0], layers[-1] + 1) for layers in (list(run) for _, run in runs)]


def stack_runs(config: Any, tree: Mapping[str, Any]) -> dict[str, Any]:
    """`tree` with the layers of each run as one child, named after the first of them, whose leaves have the layers on a
    new first axis. It is the tree itself where layers are not scanned.

    Args:
      config: of the policy, whatever its kind.
      tree: like the parameters, or those of them that are trained.
    """
    stacked = dict(tree)
    for first, *others in _scanned_names(config, tree):
        layers = [stacked.pop(name) for name in (first, *others)]
        stacked[first] = jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers)
    return stacked


def unstack_runs(config: Any, stacked: Mapping[str, Any]) -> dict[str, Any]:
    """The tree that `stack_runs` made `stacked` of."""
    tree = dict(stacked)
    for names in _scanned_names(config, stacked):
        layers = tree.pop(names[0])
        tree |= {name: jax.tree.map(operator.itemgetter(i), layers) for i, name in enumerate(names)}
    return tree


def _scanned_names(config: Any, tree: Mapping[str, Any]) -> list[list[str]]:
    """The layers' names in each run that is a loop, without runs of which nothing is in `tree`."""
    runs = layer_runs(config) if config.kind == "decoder" and config.scan_layers else []
    names = [[f"layers_{i}" for i in run] for run in runs]
    return [run for run in names if run[0] in tree]


def scan_layers(
    config: ModelConfig,
    apply_layer: ApplyLayer,
    layers: Sequence[Any],
    layer_types: Sequence[str],
    contexts: Mapping[str, ops.LayerContext],
    x_BTD: jax.Array,
) -> jax.Array:
    """Hidden states [B, T, D] after `layers`, whose trees have the same structure.

    Args:
      apply_layer: (parameters of one layer, x_BTD, its context) -> x_BTD, without rematerialisation of its own.
      layer_types: the attention type of each layer; `contexts` has a context for each.
    """
    used = [name for name in contexts if name in layer_types]
    stacked_contexts = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(contexts[name] for name in used))
    types_L = jnp.asarray([used.index(name) for name in layer_types], jnp.int32)

    def step(x_BTD: jax.Array, layer: tuple[Any, jax.Array]) -> tuple[jax.Array, None]:
        params, layer_type = layer
        # One type needs no choice, which would keep its masks once per layer.
        context = contexts[used[0]] if len(used) == 1 else jax.tree.map(lambda x: x[layer_type], stacked_contexts)
        return apply_layer(params, x_BTD, context), None

    if config.remat != "none":
        # Inside a loop nothing can be merged with the first computation, so the barrier of prevent_cse is not needed.
        step = jax.checkpoint(step, prevent_cse=False, **ops.remat_options(config.remat))

    def run(x_BTD: jax.Array, stacked: Any) -> jax.Array:
        return jax.lax.scan(step, x_BTD, stacked)[0]

    stacked = (jax.tree.map(lambda *leaves: _stack(config, leaves), *layers, is_leaf=_is_quantized), types_L)
    if config.remat != "full":
        return run(x_BTD, stacked)
    size = len(ops.remat_segments(config)[0])
    num_whole = len(layers) // size * size
    segments = jax.tree.map(lambda leaf: leaf[:num_whole].reshape(-1, size, *leaf.shape[1:]), stacked)
    segment = jax.checkpoint(lambda x_BTD, stacked: (run(x_BTD, stacked), None), prevent_cse=False)
    x_BTD, _ = jax.lax.scan(segment, x_BTD, segments)
    if num_whole == len(layers):
        return x_BTD
    return segment(x_BTD, jax.tree.map(lambda leaf: leaf[num_whole:], stacked))[0]


def _stack(config: ModelConfig, leaves: Sequence[Any]) -> Any:
    """The leaves on a new first axis; matrices in the compute dtype, to which each product casts them anyway."""
    if _is_quantized(leaves[0]):
        return jax.tree.map(lambda *parts: jnp.stack(parts), *leaves)
    if leaves[0].ndim > 1:
        leaves = [leaf.astype(ops.dtype_of(config.dtype)) for leaf in leaves]
    return jnp.stack(leaves)


def _is_quantized(leaf: Any) -> bool:
    return isinstance(leaf, QuantizedArray)
