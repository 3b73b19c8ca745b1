"""Low-rank adapters (LoRA, https://arxiv.org/abs/2106.09685) in the parameter tree: which leaves they are, how the
frozen weights are stored, and how adapters are merged into them.

In: parameter trees of a policy whose `ModelConfig` has `lora`. Out: the trainable and the frozen half of a tree, a base
in fewer bits (QLoRA, https://arxiv.org/abs/2305.14314), or plain weights. Not here: the product with an adapter
(`rl.models.ops.dense`), shapes and names (`rl.models.config`), files (`rl.models.files.peft`).
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rl.models.config import LORA_A, LORA_B, QUANTIZED_DTYPES, ModelConfig, Quantization, spec_at
from rl.models.ops import dtype_of
from rl.models.quantized import QuantizedArray, is_chosen, quantize

Params = dict[str, Any]
# (path of a module with an adapter, joined by slashes; its parameters; scale A B in float64; its merged kernel)
Visit = Callable[[str, Mapping[str, Any], np.ndarray, np.ndarray], None]


def split(config: ModelConfig, params: Any) -> tuple[Any, Any]:
    """(trained half, frozen half) of a tree like the parameters: adapters and base, or everything and nothing.

    Leaves may be of any kind. `join` puts the halves together again.
    """
    return (params, {}) if config.lora is None else (_pick(params, True), _pick(params, False))


def join(trained: Mapping[str, Any], frozen: Mapping[str, Any]) -> Params:
    """The whole tree of two halves."""
    joined = dict(frozen)
    for name, child in trained.items():
        both = name in frozen and isinstance(child, Mapping)
        joined[name] = join(child, frozen[name]) if both else child
    return joined


def _pick(tree: Mapping[str, Any], adapters: bool) -> Params:
    picked = {}
    for name, child in tree.items():
        if isinstance(child, Mapping):
            rest = _pick(child, adapters)
            if rest:
                picked[name] = rest
        elif (name in (LORA_A, LORA_B)) == adapters:
            picked[name] = child
    return picked


def quantization_of(config: ModelConfig) -> Quantization | None:
    """How a policy's weights are quantised: like the model's files, or like the base of its adapters; None:
    not at all.
    """
    lora = config.lora
    if config.quantization is not None or lora is None or lora.base_dtype not in QUANTIZED_DTYPES:
        return config.quantization
    return Quantization(lora.base_dtype, lora.base_group_size)


def freeze(config: ModelConfig, params: Params) -> Params:
    """The tree with its frozen weights in their stored type: that of a quantised model's files, or lora.base_dtype."""
    if quantization_of(config) is None and (config.lora is None or config.lora.base_dtype is None):
        return params

    def visit(path: tuple[Any, ...], leaf: jax.Array) -> Any:
        return freeze_leaf(config, tuple(part.key for part in path), leaf)

    return jax.tree_util.tree_map_with_path(visit, params)


def freeze_leaf(config: ModelConfig, path: tuple[str, ...], leaf: jax.Array) -> jax.Array | QuantizedArray:
    """One weight in its stored type while it is frozen; an adapter is returned unchanged.

    A quantised type applies to the matrices of attention and MLP, or to those that are quantised in a model's files,
    with a scale for each output channel or group (see `rl.models.quantized`). Embedding, head, norms and biases then
    keep their type, as in QLoRA. A `base_dtype` of bfloat16 applies to every weight that is not quantised.
    """
    quantization = quantization_of(config)
    if path[-1] in (LORA_A, LORA_B):
        return leaf
    if quantization is not None and is_chosen(config, quantization, path):
        return quantize(leaf, spec_at(config, path).contract_dims, quantization.dtype, quantization.group_size)
    base_dtype = None if config.lora is None else config.lora.base_dtype
    return leaf if base_dtype is None or base_dtype in QUANTIZED_DTYPES else leaf.astype(dtype_of(base_dtype))


def merge(config: ModelConfig, params: Mapping[str, Any], sign: int = 1) -> Params:
    """Weights without adapters that compute the same: W + scale A B in place of each adapted kernel.

    Quantised kernels are dequantised, each sum is formed in float64 on the host and rounded once to `param_dtype`. The
    result is W + scale A B to half a unit in the last place. `unmerge` gives W back to a unit in the last place of the
    larger of the two. `rl.models.files.lora_remainder` keeps what is missing to W bit for bit.

    Args:
      params: the tree of `config`, with adapters.
      sign: -1 takes the adapters away.

    Returns:
      The tree of `config` without `lora`, as numpy arrays. Without `lora`: `params`, unchanged.
    """
    return dict(params) if config.lora is None else merge_each(config, params, sign, lambda *_: None)


def merge_each(config: ModelConfig, params: Mapping[str, Any], sign: int, visit: Visit, path: str = "") -> Params:
    """`merge` of a tree with adapters, which calls `visit` for each merged matrix in the order of their paths."""
    assert config.lora is not None
    merged: Params = {}
    for name in sorted(params):
        child = params[name]
        if isinstance(child, Mapping):
            merged[name] = merge_each(config, child, sign, visit, f"{path}/{name}" if path else name)
        elif name not in (LORA_A, LORA_B):
            wide, dtype = to_float64(child), jnp.dtype(config.param_dtype)
            if name == "kernel" and LORA_A in params:
                product = low_rank_product(params[LORA_A], params[LORA_B], config.lora.scale)
                merged[name] = (wide + sign * product).astype(dtype)
                visit(path, params, product, merged[name])
            else:
                merged[name] = wide.astype(dtype)
    return {name: merged[name] for name in params if name in merged}


def unmerge(config: ModelConfig, merged: Mapping[str, Any], adapters: Mapping[str, Any]) -> Params:
    """The base (numpy) from the result of `merge` and the adapters; `merge` says how exact it is."""
    return merge(config, join(adapters, merged), sign=-1)


def low_rank_product(a: Any, b: Any, scale: float) -> np.ndarray:
    """scale A B [*inputs, *outputs] in float64, in which the products of float32 numbers are exact."""
    return scale * np.tensordot(to_float64(a), to_float64(b), axes=1)


def to_float64(leaf: Any) -> np.ndarray:
    """A weight or an adapter on the host, dequantised."""
    if isinstance(leaf, QuantizedArray):
        return to_float64(leaf.values) * to_float64(leaf.spread_scale())
    return np.asarray(jax.device_get(leaf)).astype(np.float64)
