"""`grpo quantize MODEL OUT`: a Hugging Face folder with its matrices in int8, int4 or float8, made layer by layer.

In: a folder or hub id, of any size: weights are read one layer at a time and written before the next is read. Out: a
folder that `model.source` takes for sampling, evaluation and QLoRA, there at once and whole; the error of each layer;
with a text, how well the model predicts it before and after, by the same passage through the layers. Rounding is
`rl.models.quantized`, tensors and names are `rl.models.hf`.
"""

import argparse
import dataclasses
import functools
import math
import pathlib
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rl.config_sections import source_kind
from rl.host_memory import limit_arenas, peak_bytes, return_memory
from rl.models.config import (
    ATTENTION_AND_MLP,
    QUANTIZED_DTYPES,
    ModelConfig,
    ParameterSpec,
    Quantization,
    base_specs,
    flatten_specs,
)
from rl.models.hf import (
    INDEX_FILE,
    check_weights,
    new_folder,
    read_config,
    read_weight,
    resolve_source,
    save_tensors,
    stored_form,
    write_index,
    write_json,
)
from rl.models.hf_config import quantization_json, read_json
from rl.models.quantized import QuantizedArray, chosen_matrices, dequantize, is_chosen, quantize, tile_of
from rl.tokenizer import load_tokenizer
from rl.tools import layerwise

MALLOC_ARENAS = 2  # more keep parts of earlier layers: up to a third of a model of 235 MB, with two a sixteenth

Path = tuple[str, ...]
_COPIED = ("*.json", "*.txt", "*.model", "*.jinja")  # besides the weights: tokenizer, chat template, generation config


@dataclasses.dataclass(frozen=True)
class LayerReport:
    """One layer, or what stands before or behind them.

    Attributes:
      error: |W - dequantised W| / |W| over all its quantised matrices (Frobenius norms); None without any.
      worst: the matrix with the largest error, and that error.
      hidden_error: the same of the hidden states that leave it, with a text; all errors of earlier layers are in it.
    """

    name: str
    error: float | None
    worst: tuple[str, float] | None
    hidden_error: float | None


@dataclasses.dataclass(frozen=True)
class Report:
    """What `quantize_folder` did.

    Attributes:
      num_matrices: how many were quantised. bytes_before, bytes_after: of all tensors.
      perplexity: of the text before and after, and num_tokens: how many tokens it is over; None and 0 without a text.
      peak_bytes: the most memory that this process has had on the host; start_bytes: the same before the first layer.
    """

    layers: list[LayerReport]
    num_matrices: int
    bytes_before: int
    bytes_after: int
    perplexity: tuple[float, ...] | None
    num_tokens: int
    start_bytes: int
    peak_bytes: int


def quantize_folder(
    source: str | pathlib.Path,
    out: str | pathlib.Path,
    quantization: Quantization,
    tokens: Sequence[int] | None = None,
    context: int = 512,
) -> Report:
    """Writes `source`, its chosen matrices quantised, to `out`.

    Args:
      tokens: of a text; None: no perplexity.
      context: tokens that the model sees of it at a time.

    Raises:
      ValueError: no such model, one that is quantised already, nothing to quantise, a group size that does not fit, or
        `out` holds something.
    """
    start_bytes = peak_bytes()
    kind = source_kind(str(source))
    if kind != "decoder":
        way_out = (
            "give its folder without 'tunix:'" if kind == "tunix" else "which dims a module sums over is not known"
        )
        raise ValueError(
            "MODEL must be a folder or hub id that the toolkit's own decoder reads, whose layers it takes one by one, "
            f"got {str(source)!r}; {way_out}"
        )
    folder = resolve_source(source)
    config = read_config(folder)
    if config.quantization is not None:
        raise ValueError(
            f"{folder} must hold plain weights, got {config.quantization.dtype} already; take what it was made from"
        )
    if tokens is not None and max(tokens) >= config.vocab_size:
        raise ValueError(f"tokens of the text must be below {config.vocab_size}, got {max(tokens)}; check --tokenizer")
    num_matrices = len(_check_matrices(config, quantization))
    locations = check_weights(folder, config)
    units = _units(config)
    program = jax.jit(_quantize_and_compare, static_argnums=(1, 2, 3))
    read = functools.partial(_read_unit, config, quantization, locations, units, program)
    passage = None if tokens is None else layerwise.Passage(config, tokens, context)
    layers, weight_map, bytes_before, bytes_after = [], {}, 0, 0
    with new_folder(out) as draft:
        for number, name in enumerate(units):
            unit = read(name)
            tensors: dict[str, np.ndarray] = {}
            for path, value in unit.stored.items():
                tensors |= stored_form(value, path)
            file = f"model-{number + 1:05d}-of-{len(units):05d}.safetensors"
            save_tensors(draft / file, tensors)
            weight_map |= dict.fromkeys(tensors, file)
            bytes_before += sum(value.nbytes for value in unit.plain.values())
            bytes_after += sum(tensor.nbytes for tensor in tensors.values())
            del tensors
            error = None if passage is None else _advance(passage, config, read, name, unit)
            layers.append(_layer_report(name, unit, error))
            del unit
            return_memory()  # before the next is read
        write_index(draft, weight_map, bytes_after)
        raw = read_json(folder / "config.json")
        write_json(draft / "config.json", raw | {"quantization_config": quantization_json(quantization)})
        _copy_others(folder, draft)
    return Report(
        layers=layers,
        num_matrices=num_matrices,
        bytes_before=bytes_before,
        bytes_after=bytes_after,
        perplexity=None if passage is None else passage.perplexities(),
        num_tokens=0 if passage is None else passage.num_tokens,
        start_bytes=start_bytes,
        peak_bytes=peak_bytes(),
    )


class _Unit(NamedTuple):
    """The parameters of a layer by path, as they are and as they will be stored, and squared norms of each quantised
    one: of the difference, and of itself.
    """

    plain: dict[Path, Any]
    stored: dict[Path, Any]
    squares: dict[str, tuple[float, float]]


def _check_matrices(config: ModelConfig, quantization: Quantization) -> dict[str, ParameterSpec]:
    """The matrices to quantise; ValueError for none, and where one cannot be quantised so."""
    chosen = chosen_matrices(config, quantization)
    for name, spec in chosen.items():
        tile_of(spec.shape, spec.contract_dims, quantization.group_size)
        num_inputs = math.prod(spec.shape[dim] for dim in spec.contract_dims)
        if quantization.dtype == "int4" and num_inputs % 2:
            raise ValueError(f"int4 needs an even number of inputs, got {num_inputs} for {name}; take int8")
    return chosen


def _units(config: ModelConfig) -> dict[str, list[tuple[Path, ParameterSpec]]]:
    """The parameters in the order of computation: embed_tokens, layers_0, ..., and the rest as "head"."""
    units: dict[str, list[tuple[Path, ParameterSpec]]] = {}
    for path, spec in flatten_specs(base_specs(config)):
        units.setdefault("head" if path[0] in ("norm", "lm_head") else path[0], []).append((path, spec))
    return units


def _read_unit(
    config: ModelConfig,
    quantization: Quantization,
    locations: Mapping[str, pathlib.Path],
    units: Mapping[str, list[tuple[Path, ParameterSpec]]],
    program: Callable[..., tuple[QuantizedArray, jax.Array, jax.Array]],
    name: str,
) -> _Unit:
    """Reads and quantises one layer."""
    unit = _Unit({}, {}, {})
    for path, spec in units[name]:
        value = read_weight(locations, config, path, spec)
        assert isinstance(value, np.ndarray)
        unit.plain[path] = unit.stored[path] = value
        if is_chosen(config, quantization, path):
            arguments = (spec.contract_dims, quantization.dtype, quantization.group_size)
            unit.stored[path], difference, whole = program(value, *arguments)
            unit.squares["/".join(path[1:-1]) or name] = (float(difference), float(whole))
    return unit


def _quantize_and_compare(
    array: jax.Array, contract_dims: tuple[int, ...], dtype: str, group_size: int | None
) -> tuple[QuantizedArray, jax.Array, jax.Array]:
    """The quantised array, |array - quantised|^2 and |array|^2."""
    quantized, wide = quantize(array, contract_dims, dtype, group_size), array.astype(jnp.float32)
    return quantized, jnp.sum(jnp.square(wide - dequantize(quantized))), jnp.sum(jnp.square(wide))


def _layer_report(name: str, unit: _Unit, hidden_error: float | None) -> LayerReport:
    if not unit.squares:
        return LayerReport(name, None, None, hidden_error)
    errors = {matrix: _relative(*squares) for matrix, squares in unit.squares.items()}
    worst = max(errors, key=lambda matrix: errors[matrix])
    differences, wholes = zip(*unit.squares.values(), strict=True)
    return LayerReport(name, _relative(sum(differences), sum(wholes)), (worst, errors[worst]), hidden_error)


def _relative(difference: float, whole: float) -> float:
    return math.sqrt(difference / whole) if whole else 0.0


def _advance(
    passage: layerwise.Passage, config: ModelConfig, read: Callable[[str], _Unit], name: str, unit: _Unit
) -> float | None:
    """Takes the text through the next layer; the relative error of what leaves it. At the end of the model, None."""
    both = (unit.plain, unit.stored)
    if name == "embed_tokens":
        passage.embed([tree["embed_tokens", "embedding"] for tree in both])
    elif name != "head":
        passage.layer(int(name.removeprefix("layers_")), [_nested(tree) for tree in both])
    else:
        tied = config.tie_word_embeddings
        heads, path = (read("embed_tokens"), ("embed_tokens", "embedding")) if tied else (unit, ("lm_head", "kernel"))
        passage.finish(unit.plain["norm", "scale"], [tree[path] for tree in (heads.plain, heads.stored)])
        return None
    plain, quantized = passage.hidden
    return _relative(float(np.sum((plain - quantized) ** 2)), float(np.sum(plain**2)))


def _nested(flat: Mapping[Path, Any]) -> dict[str, Any]:
    """The parameters of one layer as the nested dict that its module takes."""
    tree: dict[str, Any] = {}
    for path, value in flat.items():
        node = tree
        for name in path[1:-1]:
            node = node.setdefault(name, {})
        node[path[-1]] = value
    return tree


def _copy_others(folder: pathlib.Path, draft: pathlib.Path) -> None:
    for pattern in _COPIED:
        for file in sorted(folder.glob(pattern)):
            if file.name not in ("config.json", INDEX_FILE):
                shutil.copyfile(file, draft / file.name)


def _print_report(report: Report, quantization: Quantization) -> None:
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


def main(argv: Sequence[str] | None = None) -> None:
    """`grpo quantize MODEL OUT [--dtype DTYPE] [--group-size N] [--only REGEX] [--head] [--text FILE]`."""
    parser = argparse.ArgumentParser(prog="grpo quantize", description=__doc__)
    parser.add_argument("model", help="Hugging Face folder or hub id")
    parser.add_argument("out", help="folder to write")
    parser.add_argument("--dtype", choices=QUANTIZED_DTYPES, default="int8")
    parser.add_argument("--group-size", type=int, default=None, metavar="N", help="inputs that share a scale")
    parser.add_argument("--only", action="append", metavar="REGEX", help="matrices to quantise, by path")
    parser.add_argument("--head", action="store_true", help="also what gives the logits")
    parser.add_argument("--text", metavar="FILE", help="text whose perplexity is measured before and after")
    parser.add_argument("--max-tokens", type=int, default=8192, metavar="N", help="of the text that are read")
    parser.add_argument("--context", type=int, default=512, metavar="N", help="tokens the model sees at a time")
    parser.add_argument("--tokenizer", metavar="SOURCE", help="folder, hub id or byte; MODEL when left out")
    arguments = parser.parse_args(sys.argv[1:] if argv is None else list(argv))
    patterns = tuple(arguments.only) if arguments.only else (ATTENTION_AND_MLP,)
    quantization = Quantization(arguments.dtype, arguments.group_size, patterns, arguments.head)
    tokens = None
    if arguments.text is not None:
        tokens = _read_text(arguments.text, arguments.tokenizer or arguments.model, arguments.max_tokens)
    if arguments.context < 2:
        raise ValueError(f"--context must be >= 2, got {arguments.context}")
    limit_arenas(MALLOC_ARENAS)
    report = quantize_folder(arguments.model, arguments.out, quantization, tokens, arguments.context)
    _print_report(report, quantization)
    print(f"written to {arguments.out}")


def _read_text(file: str, tokenizer: str, max_tokens: int) -> list[int]:
    path = pathlib.Path(file)
    if not path.is_file():
        raise ValueError(f"--text must be an existing file, got {file!r}")
    tokens = load_tokenizer(tokenizer).encode(path.read_text(encoding="utf-8"))[:max_tokens]
    if len(tokens) < 2:
        raise ValueError(
            f"--text must hold at least two tokens, got {len(tokens)} of {file!r} (--max-tokens {max_tokens})"
        )
    return tokens


if __name__ == "__main__":
    main()
