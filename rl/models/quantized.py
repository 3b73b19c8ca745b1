"""Weight-only quantisation: matrices of int8 or float8 with one float32 scale per output channel.

In: the parameter tree of a policy. Out: the same tree with a `QuantizedArray` in place of its large matrices, which the
shared ops and both twins take as they take an array; a quarter of float32's memory. It is plain jax, so it runs under
`jit` (a policy's weights are quantised on their devices) and `eval_shape`. Products widen the values where they are
used; XLA for CPU writes them out as a copy in the compute type first, kept for a whole decode loop, so there neither
time nor memory is saved. Not here: those products (`rl.models.ops.dense`, `embed`), quantised activations, calibration
on data, training.
"""

import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax.sharding import NamedSharding, PartitionSpec

from rl.models.config import ModelConfig, flatten_specs, parameter_specs

# The largest finite value of each type, to which the largest weight of a channel is mapped.
_LARGEST = {"int8": 127.0, "float8_e4m3fn": 448.0}
QUANTIZED_DTYPES = tuple(_LARGEST)
ATTENTION_AND_MLP = r"^layers_\d+/(self_attn|mlp)/\w+_proj/kernel$"


@struct.dataclass
class QuantizedArray:
    """The array values * scale.

    Attributes:
      values: int8 or float8_e4m3fn, the shape of the parameter. The first leaf, so that Linen, which compares the shape
        of a parameter's leaves with what the module declares, looks at this one.
      scale: float32, the same rank, with size 1 at the dims that a matrix product sums over.
    """

    values: jax.Array
    scale: jax.Array

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the parameter."""
        return self.values.shape

    @property
    def T(self) -> "QuantizedArray":
        """The transposed array."""
        return QuantizedArray(self.values.T, self.scale.T)


Weight = jax.Array | QuantizedArray


def quantize(array: jax.Array, contract_dims: Sequence[int], dtype: str) -> QuantizedArray:
    """Rounds an array to 8 bits, with one scale for everything that meets in one sum.

    scale = max |array| over `contract_dims` / the type's largest value (127 or 448); values = array / scale, rounded to
    nearest, ties to even. int8 is symmetric (-128 is not used) and off by at most scale / 2. A channel of zeros gets
    scale 1, and so does one whose scale would be below the smallest normal float32: its values are 0.

    Source: row-wise and column-wise absmax, Dettmers et al., "LLM.int8()", https://arxiv.org/abs/2208.07339, section 2;
    the float8 type: Micikevicius et al., "FP8 Formats for Deep Learning", https://arxiv.org/abs/2209.05433.

    Args:
      array: floating.
      contract_dims: the dims that a matrix product with this array sums over.
      dtype: one of `QUANTIZED_DTYPES`.

    Raises:
      ValueError: another dtype.
    """
    if dtype not in _LARGEST:
        raise ValueError(f"dtype of quantised weights must be one of {', '.join(QUANTIZED_DTYPES)}, got {dtype!r}")
    wide = array.astype(jnp.promote_types(array.dtype, jnp.float32))
    largest = jnp.max(jnp.abs(wide), axis=tuple(contract_dims), keepdims=True)
    scale = (largest / _LARGEST[dtype]).astype(jnp.float32)
    scale = jnp.where(scale < jnp.finfo(jnp.float32).tiny, 1.0, scale)
    scaled = wide / scale
    values = (jnp.round(scaled) if dtype == "int8" else scaled).astype(dtype)
    return QuantizedArray(values, scale)


def dequantize(array: QuantizedArray, dtype: Any = jnp.float32) -> jax.Array:
    """values * scale, computed in float32 or wider, as `dtype`."""
    wide = jnp.promote_types(dtype, jnp.float32)
    return (array.values.astype(wide) * array.scale.astype(wide)).astype(dtype)


def quantize_params(
    config: ModelConfig,
    params: dict[str, Any],
    dtype: str,
    patterns: Sequence[str] = (ATTENTION_AND_MLP,),
    head: bool = True,
) -> dict[str, Any]:
    """The parameter tree with a `QuantizedArray` in place of each chosen matrix; the other leaves as they are.

    Args:
      config: of the policy that the parameters belong to.
      params: floating, of any sharding.
      dtype: one of `QUANTIZED_DTYPES`.
      patterns: regular expressions; a kernel or embedding table whose path ("layers_0/mlp/up_proj/kernel") one of them
        finds is quantised. Norms and biases never are.
      head: also quantise what gives the logits: lm_head, or the embedding table where it is tied to the head (for the
        look-up of tokens as well). The table of an untied model needs the pattern "^embed_tokens/".

    Raises:
      ValueError: another dtype, or a pattern that finds no matrix.
    """
    return _map_chosen(config, params, patterns, head, lambda leaf, dims: quantize(leaf, dims, dtype))


def quantized_shardings(
    config: ModelConfig,
    shardings: dict[str, Any],
    patterns: Sequence[str] = (ATTENTION_AND_MLP,),
    head: bool = True,
) -> dict[str, Any]:
    """The `NamedSharding`s of `quantize_params(...)` from those of the parameters, for the same patterns and head.

    Values lie where their parameter lies, and each scale beside the channels that it belongs to.
    """

    def of_matrix(sharding: NamedSharding, contract_dims: tuple[int, ...]) -> QuantizedArray:
        axes = [None if dim in contract_dims else axis for dim, axis in enumerate(sharding.spec)]
        scale = NamedSharding(sharding.mesh, PartitionSpec(*axes), memory_kind=sharding.memory_kind)
        return QuantizedArray(sharding, scale)  # pyright: ignore[reportArgumentType]

    return _map_chosen(config, shardings, patterns, head, of_matrix)


def _map_chosen(
    config: ModelConfig,
    tree: dict[str, Any],
    patterns: Sequence[str],
    head: bool,
    function: Callable[[Any, tuple[int, ...]], QuantizedArray],
) -> dict[str, Any]:
    """The tree with function(leaf, contract_dims) at every chosen matrix."""
    chosen = _chosen_matrices(config, patterns, head)

    def visit(path: tuple[Any, ...], leaf: Any) -> Any:
        name = "/".join(part.key for part in path)
        return function(leaf, chosen[name]) if name in chosen else leaf

    return jax.tree_util.tree_map_with_path(visit, tree)


def _chosen_matrices(config: ModelConfig, patterns: Sequence[str], head: bool) -> dict[str, tuple[int, ...]]:
    """The dims to sum over of each matrix to quantise, by path."""
    specs = flatten_specs(parameter_specs(config))
    matrices = {"/".join(path): spec.contract_dims for path, spec in specs if spec.contract_dims}
    chosen = set()
    for pattern in patterns:
        found = {name for name in matrices if re.search(pattern, name)}
        if not found:
            raise ValueError(
                f"patterns of weights to quantise must each find a matrix, got {pattern!r}, which finds none of "
                f"{', '.join(sorted(matrices))}"
            )
        chosen |= found
    if head:
        chosen.add("embed_tokens/embedding" if config.tie_word_embeddings else "lm_head/kernel")
    return {name: matrices[name] for name in chosen}
