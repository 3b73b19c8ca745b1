"""Weight-only quantisation: matrices of int8, int4 or float8, with float32 scales for output channels or groups of
inputs.

In: the parameter tree of a policy. Out: the same tree with a `QuantizedArray` in place of its large matrices, in a
quarter or an eighth of float32's memory. The shared ops and both twins take one like an array. Rounding is qwix's
(https://github.com/google/qwix), plain jax, so it runs under `jit` and `eval_shape`, on the devices of the weights.

Products widen the values where they are used. XLA for CPU first writes a widened copy, which it keeps for a whole
decode loop, so on CPU neither time nor memory is saved. Not here: the products (`rl.models.ops.dense`, `embed`; other
models take the whole tree widened by `dequantize_params`), quantised activations, calibration on data, training.
"""

import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import qwix
from flax import struct
from jax.sharding import NamedSharding, PartitionSpec

from rl.files.json_file import shown
from rl.files.untrusted import Untrusted, UntrustedError
from rl.models.config import (
    ATTENTION_AND_MLP,
    QUANTIZED_DTYPES,
    ForeignConfig,
    ModelConfig,
    ParameterSpec,
    Quantization,
    flatten_specs,
    parameter_specs,
    spec_at,
)


@struct.dataclass
class QuantizedArray:
    """The array values * scale.

    Attributes:
      values: int8, int4 or float8_e4m3fn, the shape of the parameter. It is the first leaf, because Linen compares the
        first leaf's shape with the shape that the module declares.
      scale: float32, the same rank. Along the dims that a matrix product sums over, its size is the number of groups,
        or 1 where all inputs of an output share a scale.
    """

    values: jax.Array
    scale: jax.Array

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the parameter."""
        return self.values.shape

    def spread_scale(self) -> jax.Array:
        """The scale, repeated to the shape of the values along dims with groups."""
        scale = self.scale
        for dim, (part, size) in enumerate(zip(scale.shape, self.values.shape, strict=True)):
            if 1 < part < size:
                scale = scale.repeat(size // part, axis=dim)
        return scale

    @property
    def T(self) -> "QuantizedArray":
        """The transposed array."""
        return QuantizedArray(self.values.T, self.scale.T)


Weight = jax.Array | QuantizedArray


def quantize(
    array: jax.Array, contract_dims: Sequence[int], dtype: str, group_size: int | None = None
) -> QuantizedArray:
    """Rounds an array to 8 or 4 bits. Entries that meet in one sum share a scale, all of them or `group_size`.

    scale = max |array| over these entries / the end of the type's range (127.5, 7.5 or 448); values = array / scale,
    rounded to nearest, ties to even, and cut to the range (-128 to 127, -8 to 7). Integers are off by at most scale /
    2. Where the scale would be below 1e-19, or all entries are 0, the scale is 1 and the values are 0.

    Source: row-wise and column-wise absmax, Dettmers et al., "LLM.int8()", https://arxiv.org/abs/2208.07339, section 2;
    groups: Yao et al., "ZeroQuant", https://arxiv.org/abs/2206.01861, section 4.1; the float8 type: Micikevicius et
    al., "FP8 Formats for Deep Learning", https://arxiv.org/abs/2209.05433.

    Args:
      array: floating point.
      contract_dims: the dims that a matrix product with this array sums over.
      dtype: one of `QUANTIZED_DTYPES`.
      group_size: inputs that share a scale, see `tile_of`; None for one scale per output.

    Raises:
      ValueError: the dtype is another one, or the group size does not divide the inputs.
    """
    if dtype not in QUANTIZED_DTYPES:
        raise ValueError(f"dtype of quantised weights must be one of {', '.join(QUANTIZED_DTYPES)}, got {dtype!r}")
    tile = tile_of(array.shape, contract_dims, group_size)
    rounded = qwix.quantize(
        array.astype(jnp.promote_types(array.dtype, jnp.float32)),
        getattr(jnp, dtype),
        channelwise_axes=[dim for dim, size in enumerate(tile) if size == 1],
        tiled_axes={dim: size for dim, size in enumerate(tile) if 1 < size < array.shape[dim]},
        scale_dtype=jnp.float32,
    )
    return QuantizedArray(rounded.qvalue, rounded.scale)


def tile_of(shape: Sequence[int], contract_dims: Sequence[int], group_size: int | None) -> tuple[int, ...]:
    """The block of an array, by dim, whose entries share a scale: `group_size` consecutive inputs, or all (None).

    Where inputs have two dims, as the heads of o_proj, a group lies within one head or holds several whole heads.

    Raises:
      ValueError: the inputs cannot be cut into such groups.
    """
    tile, left, fits = [1] * len(shape), group_size, True
    for dim in reversed(contract_dims):
        tile[dim] = shape[dim] if left is None else min(left, shape[dim])
        if left is not None:
            fits = fits and shape[dim] % tile[dim] == 0 and left % tile[dim] == 0
            left //= tile[dim]
    if not fits or left not in (None, 1):
        inputs = " x ".join(str(shape[dim]) for dim in contract_dims)
        raise ValueError(
            f"group size of quantised weights must divide the inputs of each matrix, got {group_size} for {inputs} "
            "inputs; take another one, or leave it out for one scale per output"
        )
    return tuple(tile)


def scale_shape(shape: Sequence[int], contract_dims: Sequence[int], group_size: int | None) -> tuple[int, ...]:
    """The shape of the scale of an array that is quantised in such groups."""
    tile = tile_of(shape, contract_dims, group_size)
    return tuple(size // part for size, part in zip(shape, tile, strict=True))


def dequantize(array: QuantizedArray, dtype: Any = jnp.float32) -> jax.Array:
    """values * scale, computed in float32 or wider, as `dtype`."""
    wide = jnp.promote_types(dtype, jnp.float32)
    return (array.values.astype(wide) * array.spread_scale().astype(wide)).astype(dtype)


def dequantize_params(params: Any, dtype: Any) -> Any:
    """A tree of parameters with a plain array of `dtype` in place of each quantised one; others are not changed."""
    widen = lambda leaf: dequantize(leaf, dtype) if is_quantized(leaf) else leaf  # noqa: E731
    return jax.tree.map(widen, params, is_leaf=is_quantized)


def is_quantized(leaf: Any) -> bool:
    """Whether a node of a tree of parameters is a `QuantizedArray`."""
    return isinstance(leaf, QuantizedArray)


def pack(values: np.ndarray) -> np.ndarray:
    """Quantised values in a file's form: int8 unchanged, float8 as bytes, int4 two in a byte [..., n / 2] with the
    first in the low half.
    """
    if values.dtype == jnp.int4:
        low, high = (values[..., half::2].astype(np.int8) & 15 for half in (0, 1))
        return (low | high << 4).astype(np.uint8)
    return values if values.dtype == np.int8 else values.view(np.uint8)


def unpack(stored: np.ndarray, dtype: str) -> np.ndarray:
    """The values from `pack`."""
    if dtype == "int4":
        halves = np.stack([stored & 15, stored >> 4], axis=-1).astype(np.int8)
        return ((halves ^ 8) - 8).reshape(*stored.shape[:-1], -1).astype(jnp.int4)
    return stored.view(jnp.dtype(dtype))


def is_chosen(config: ModelConfig | ForeignConfig, quantization: Quantization, path: Sequence[str]) -> bool:
    """Whether the parameter at this path is quantised.

    In the toolkit's own decoder only kernels and embedding tables can be; in another model, parameters with
    `contract_dims`.
    """
    name = "/".join(path)
    found = any(re.search(pattern, name) for pattern in quantization.patterns)
    if isinstance(config, ForeignConfig):
        return found and bool(spec_at(config, path).contract_dims)
    is_head = name == ("embed_tokens/embedding" if config.tie_word_embeddings else "lm_head/kernel")
    is_matrix = path[-1] in ("kernel", "embedding")
    return is_matrix and (found or (quantization.head and is_head))


def check_patterns(config: ModelConfig | ForeignConfig) -> None:
    """ValueError where matching a pattern of a model's own files takes too long. To be called before `is_chosen`."""
    patterns = () if config.quantization is None else config.quantization.patterns
    names = ["/".join(path) for path, _ in flatten_specs(config.specs)]
    for pattern in patterns:
        if pattern == ATTENTION_AND_MLP:  # our own
            continue
        untrusted = Untrusted()
        try:
            untrusted.match(pattern, names, whole=False)
        except UntrustedError as error:
            raise ValueError(
                f"patterns of quantised weights must be looked for in {len(names)} names of parameters quickly, got "
                f"{shown(pattern)}: {error}; quantise the model again"
            ) from error
        finally:
            untrusted.close()


def quantize_params(config: ModelConfig, params: dict[str, Any], quantization: Quantization) -> dict[str, Any]:
    """The parameter tree with a `QuantizedArray` in place of each chosen matrix; other leaves are not changed.

    Args:
      config: the configuration of the policy.
      params: floating point, of any sharding.
      quantization: which matrices, and how. With `head` a tied embedding table is quantised, also for the look-up of
        tokens. The table of an untied model needs the pattern "^embed_tokens/".

    Raises:
      ValueError: a pattern matches no matrix, or a group size does not divide the inputs.
    """

    def of_matrix(leaf: Any, spec: ParameterSpec) -> QuantizedArray:
        return quantize(leaf, spec.contract_dims, quantization.dtype, quantization.group_size)

    return _map_chosen(config, params, quantization, of_matrix)


def quantized_shardings(config: ModelConfig, shardings: dict[str, Any], quantization: Quantization) -> dict[str, Any]:
    """The `NamedSharding`s of `quantize_params(...)` from those of the parameters.

    Values lie where their parameter lies. A scale is cut like its entries where its groups divide in the same way.
    """

    def of_matrix(sharding: NamedSharding, spec: ParameterSpec) -> QuantizedArray:
        sizes = scale_shape(spec.shape, spec.contract_dims, quantization.group_size)
        axes = [
            None if size == 1 or size % _num_shards(sharding, axis) else axis
            for size, axis in zip(sizes, (*sharding.spec, *[None] * (len(sizes) - len(sharding.spec))), strict=True)
        ]
        scale = NamedSharding(sharding.mesh, PartitionSpec(*axes), memory_kind=sharding.memory_kind)
        return QuantizedArray(sharding, scale)  # pyright: ignore[reportArgumentType]

    return _map_chosen(config, shardings, quantization, of_matrix)


def chosen_matrices(config: ModelConfig | ForeignConfig, quantization: Quantization) -> dict[str, ParameterSpec]:
    """The matrices to quantise, by path ("layers_0/mlp/up_proj/kernel").

    Raises:
      ValueError: a pattern matches no matrix, or there is nothing to quantise.
    """
    specs = flatten_specs(parameter_specs(config))
    matrices = {"/".join(path): spec for path, spec in specs if spec.contract_dims}
    for pattern in quantization.patterns:
        if not any(re.search(pattern, name) for name in matrices):
            raise ValueError(
                f"patterns of weights to quantise must each find a matrix, got {pattern!r}, which finds none of "
                f"{', '.join(sorted(matrices))}"
            )
    chosen = {name: spec for name, spec in matrices.items() if is_chosen(config, quantization, name.split("/"))}
    if not chosen:
        raise ValueError("a quantised model must have a matrix to quantise, got no pattern and not the head")
    return chosen


def _num_shards(sharding: NamedSharding, axis: str | tuple[str, ...] | None) -> int:
    axes = () if axis is None else (axis,) if isinstance(axis, str) else axis
    return math.prod(sharding.mesh.shape[name] for name in axes)


def _map_chosen(
    config: ModelConfig,
    tree: dict[str, Any],
    quantization: Quantization,
    function: Callable[[Any, ParameterSpec], QuantizedArray],
) -> dict[str, Any]:
    """The tree with function(leaf, spec) at every chosen matrix."""
    chosen = chosen_matrices(config, quantization)

    def visit(path: tuple[Any, ...], leaf: Any) -> Any:
        name = "/".join(part.key for part in path)
        return function(leaf, chosen[name]) if name in chosen else leaf

    return jax.tree_util.tree_map_with_path(visit, tree)
