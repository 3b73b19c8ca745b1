"""The common part of quantising any model: refusals, the error of the matrices in each layer, and the report of `grpo
quantize`.

In: the matrices of a layer, one at a time. Out: each quantised, with its error; `QuantizeReport`, as text. Not
here: reading and writing of models.
"""

import dataclasses
import math
import pathlib
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp

from rl.models.config import ForeignConfig, ModelConfig, Quantization
from rl.models.quantized import QuantizedArray, dequantize, quantize


@dataclasses.dataclass(frozen=True)
class LayerReport:
    """The errors of one layer, or of the parts before or after the layers.

    Attributes:
      error: |W - dequantised W| / |W| over all its quantised matrices (Frobenius norms); None without any.
      worst: the matrix with the largest error, and that error.
      hidden_error: the relative error of the layer's output, with a text and the toolkit's own decoder. It includes the
        errors of earlier layers.
    """

    name: str
    error: float | None
    worst: tuple[str, float] | None
    hidden_error: float | None


@dataclasses.dataclass(frozen=True)
class QuantizeReport:
    """The result of quantising a model.

    Attributes:
      num_matrices: the number of quantised matrices. bytes_before, bytes_after: of all tensors.
      perplexity, num_tokens: perplexity of the text before and after, and its number of tokens; None and 0 without a
        text.
      peak_bytes, start_bytes: the most memory of this process on the host, in all and before the first layer.
    """

    layers: list[LayerReport]
    num_matrices: int
    bytes_before: int
    bytes_after: int
    perplexity: tuple[float, ...] | None
    num_tokens: int
    start_bytes: int
    peak_bytes: int


def check_start(folder: pathlib.Path, config: ModelConfig | ForeignConfig, tokens: Sequence[int] | None) -> None:
    """ValueError for weights that are quantised already, and for tokens outside of the vocabulary."""
    if config.quantization is not None:
        raise ValueError(
            f"{folder} must hold plain weights, got {config.quantization.dtype} already; take what it was made from"
        )
    if tokens is not None and getattr(config, "num_kv_shared_layers", 0) + getattr(config, "per_layer_input_size", 0):
        raise ValueError(
            f"--text must be left out for {config.family} with layers that have inputs of their own or read the keys "
            "and values of others: one layer at a time cannot be measured; grpo eval compares the two models"
        )
    if tokens is not None and max(tokens) >= config.vocab_size:
        raise ValueError(f"tokens of the text must be below {config.vocab_size}, got {max(tokens)}; check --tokenizer")


def quantize_and_compare(
    array: jax.Array, contract_dims: tuple[int, ...], dtype: str, group_size: int | None
) -> tuple[QuantizedArray, jax.Array, jax.Array]:
    """The quantised array, |array - quantised|^2 and |array|^2."""
    quantized, wide = quantize(array, contract_dims, dtype, group_size), array.astype(jnp.float32)
    return quantized, jnp.sum(jnp.square(wide - dequantize(quantized))), jnp.sum(jnp.square(wide))


def layer_report(
    name: str, squares: Mapping[str, tuple[float, float]], hidden_error: float | None = None
) -> LayerReport:
    """The report of one layer, from the last two results of `quantize_and_compare` for each matrix."""
    if not squares:
        return LayerReport(name, None, None, hidden_error)
    errors = {matrix: relative(*pair) for matrix, pair in squares.items()}
    worst = max(errors, key=lambda matrix: errors[matrix])
    differences, wholes = zip(*squares.values(), strict=True)
    return LayerReport(name, relative(sum(differences), sum(wholes)), (worst, errors[worst]), hidden_error)


def relative(difference: float, whole: float) -> float:
    """The root of a ratio of squared norms; 0 where both are 0."""
    return math.sqrt(difference / whole) if whole else 0.0


def print_report(report: QuantizeReport, quantization: Quantization) -> None:
    """Prints the report."""
    width = max(len(layer.name) for layer in report.layers)
    print(f"{'':<{width}}  {'error':>9}  {'hidden states':>13}  worst matrix")
    for layer in report.layers:
        error = "as it was" if layer.error is None else f"{layer.error:9.5f}"
        hidden = "" if layer.hidden_error is None else f"{layer.hidden_error:.5f}"
        worst = "" if layer.worst is None else f"{layer.worst[0]} {layer.worst[1]:.5f}"
        print(f"{layer.name:<{width}}  {error:>9}  {hidden:>13}  {worst}".rstrip())
    groups = (
        "a scale per output" if quantization.group_size is None else f"a scale per {quantization.group_size} inputs"
    )
    print(f"{report.num_matrices} matrices in {quantization.dtype}, {groups}")
    print(f"tensors: {report.bytes_before / 1e6:,.1f} MB before, {report.bytes_after / 1e6:,.1f} MB after")
    if report.perplexity is not None:
        before, after = report.perplexity
        print(f"perplexity on {report.num_tokens:,} tokens: {before:.4f} before, {after:.4f} after")
    peak, start = report.peak_bytes / 1e6, report.start_bytes / 1e6
    print(f"peak memory: {peak:,.0f} MB, of which {start:,.0f} MB before the first weight was read")
