"""The layers of a decoder as a loop: one compiled layer that runs over stacked parameters, for both twins.

In: the parameters of consecutive layers, each a tree of its own, and a function that applies one layer. Out: the hidden
states after the last of them. Parameters, moments, caches and checkpoints have a tree for each layer, scanned or not.
They are stacked inside the compiled function, matrices in the compute dtype, which costs one more copy of the layers
while it runs.

In return, the time and memory of compiling do not grow with the number of layers, and rematerialisation works on every
backend (XLA for CPU merges the second forward pass of unrolled layers with the first). Training and prefill are scanned
(`is_scanned`). Decoding is not, because stacking would copy the weights for every token.
"""

import dataclasses
import itertools
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from rl.models import ops
from rl.models.cache import LayerCache
from rl.models.config import LayerShape, ModelConfig, parameter_specs
from rl.models.delta_rule import LayerState
from rl.models.quantized import chosen_matrices, is_quantized

# (parameters of a layer, x [B, T, D], its context, its cache or None) -> (x [B, T, D], what goes on from the layer)
ApplyLayer = Callable[[Any, jax.Array, Any, LayerCache | LayerState | None], tuple[jax.Array, Any]]


def is_scanned(config: ModelConfig, num_tokens: int) -> bool:
    """Whether the layers run as a loop for `num_tokens` positions of each row. One position is a decode step:
    no loop.
    """
    return config.scan_layers and num_tokens > 1


def layer_runs(config: ModelConfig) -> list[range]:
    """Consecutive layers whose parameters have the same names and shapes, so that they can be stacked.

    A decoder is one run, unless only some of its layers have adapters or quantised matrices, or layers differ in size,
    or in which keys and values they read. Attention types may differ.
    """
    specs = parameter_specs(config)
    quantized = set() if config.quantization is None else set(chosen_matrices(config, config.quantization))

    def kind(index: int) -> tuple[Any, frozenset[str], LayerShape]:
        prefix = f"layers_{index}/"
        names = frozenset(name.removeprefix(prefix) for name in quantized if name.startswith(prefix))
        return specs[f"layers_{index}"], names, config.layer_shape(index)

    runs = itertools.groupby(range(config.num_layers), key=kind)
    return [range(layers[0], layers[-1] + 1) for layers in (list(run) for _, run in runs)]


def stack_runs(config: Any, tree: Mapping[str, Any]) -> dict[str, Any]:
    """`tree` with each run of layers as one child, named after its first layer. The leaves of the child have the layers
    on a new first axis. Where layers are not scanned, `tree` itself.

    Args:
      config: the configuration of a policy of any kind.
      tree: a tree like the parameters, or like the trained ones.
    """
    stacked = dict(tree)
    for first, *others in _scanned_names(config, tree):
        layers = [stacked.pop(name) for name in (first, *others)]
        stacked[first] = jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers)
    return stacked


def unstack_runs(config: Any, stacked: Mapping[str, Any]) -> dict[str, Any]:
    """The tree from which `stack_runs` made `stacked`."""
    tree = dict(stacked)
    for names in _scanned_names(config, stacked):
        layers = tree.pop(names[0])
        tree |= {name: jax.tree.map(operator.itemgetter(i), layers) for i, name in enumerate(names)}
    return tree


def _scanned_names(config: Any, tree: Mapping[str, Any]) -> list[list[str]]:
    """The names of the layers of each run that is a loop, without runs that `tree` does not hold."""
    runs = layer_runs(config) if config.scan_layers else []
    names = [[f"layers_{i}" for i in run] for run in runs]
    return [run for run in names if run[0] in tree]


def scan_layers(
    config: ModelConfig,
    run: Sequence[int],
    apply_layer: ApplyLayer,
    layers: Sequence[Any],
    contexts: Mapping[str, Any],
    caches: Sequence[LayerCache | LayerState | None],
    x_BTD: jax.Array,
    inputs_LBTP: jax.Array | None,
    read: Mapping[str, Any],
) -> tuple[jax.Array, list[LayerCache | LayerState | None], dict[str, Any]]:
    """Hidden states [B, T, D] after the layers of a run, the layers' caches, and `read` after them.

    Args:
      run: the numbers of the layers, from `layer_runs`.
      apply_layer: applies one layer, without rematerialisation of its own.
      layers: the parameters of each layer.
      contexts: a context for each attention type.
      caches: the cache of each layer; None for every layer where tokens attend to one another, as in training.
      inputs_LBTP: the input of its own of every layer of the model, where layers have one.
      read: see `ops.with_source`.
    """
    layer_types = [config.layer_types[i] for i in run]
    used = [name for name in contexts if name in layer_types]
    first = {name: run[layer_types.index(name)] for name in used}
    contexts = {name: ops.with_source(config, first[name], contexts[name], read) for name in used}
    stacked_contexts = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(contexts[name] for name in used))
    types_L = jnp.asarray([used.index(name) for name in layer_types], jnp.int32)
    is_read = any(config.layer_shape(i).is_read for i in run)

    def step(x_BTD: jax.Array, layer: tuple[Any, ...]) -> tuple[jax.Array, Any]:
        params, layer_type, cache, input_BTP = layer
        # With one type there is no choice, which would keep the masks once for each layer.
        context = contexts[used[0]] if len(used) == 1 else jax.tree.map(lambda x: x[layer_type], stacked_contexts)
        context = context if input_BTP is None else dataclasses.replace(context, layer_input_BTP=input_BTP)
        x_BTD, carried = apply_layer(params, x_BTD, context, cache)
        return x_BTD, carried.own if isinstance(cache, LayerCache) else carried

    remat = "none" if caches[0] is not None else config.remat  # with a cache there is no backward pass
    if remat != "none":
        # Inside a loop XLA cannot merge the second computation with the first, so the barrier of prevent_cse is not
        # needed.
        step = jax.checkpoint(step, prevent_cse=False, **ops.remat_options(remat))

    stacked_params = jax.tree.map(lambda *leaves: _stack(config, leaves), *layers, is_leaf=is_quantized)
    own_inputs = None if inputs_LBTP is None else inputs_LBTP[run[0] : run[-1] + 1]
    stacked = (stacked_params, types_L, jax.tree.map(lambda *leaves: jnp.stack(leaves), *caches), own_inputs)
    if remat != "full" or is_read:
        x_BTD, own = jax.lax.scan(step, x_BTD, stacked)
        new_caches = [_with_own(cache, own, i) for i, cache in enumerate(caches)]
        for i, layer in enumerate(run) if is_read else ():
            carried = jax.tree.map(operator.itemgetter(i), own) if new_caches[i] is None else new_caches[i]
            read = {**read, config.layer_types[layer]: carried}
        return x_BTD, new_caches, dict(read)

    def run_segment(x_BTD: jax.Array, stacked: Any) -> tuple[jax.Array, None]:
        return jax.lax.scan(step, x_BTD, stacked)[0], None

    size = len(ops.remat_segments(config)[0])
    num_whole = len(layers) // size * size
    segments = jax.tree.map(lambda leaf: leaf[:num_whole].reshape(-1, size, *leaf.shape[1:]), stacked)
    segment = jax.checkpoint(run_segment, prevent_cse=False)
    x_BTD, _ = jax.lax.scan(segment, x_BTD, segments)
    if num_whole < len(layers):
        x_BTD, _ = segment(x_BTD, jax.tree.map(lambda leaf: leaf[num_whole:], stacked))
    return x_BTD, list(caches), dict(read)


def _with_own(cache: LayerCache | LayerState | None, own: Any, index: int) -> LayerCache | LayerState | None:
    """The cache of layer `index` with its slice of the stacked keys and values, or states."""
    if cache is None:
        return None
    own = jax.tree.map(operator.itemgetter(index), own)
    return cache._replace(own=own) if isinstance(cache, LayerCache) else own


def _stack(config: ModelConfig, leaves: Sequence[Any]) -> Any:
    """The leaves on a new first axis. Matrices are cast to the compute dtype, as each product does anyway."""
    if is_quantized(leaves[0]):
        return jax.tree.map(lambda *parts: jnp.stack(parts), *leaves)
    if leaves[0].ndim > 1:
        leaves = [leaf.astype(ops.dtype_of(config.dtype)) for leaf in leaves]
    return jnp.stack(leaves)
