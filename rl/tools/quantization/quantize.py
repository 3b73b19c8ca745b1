"""`grpo quantize MODEL OUT`: a model's folder with its matrices in int8, int4 or float8, made layer by layer.

In: a folder or hub id, of any size: weights are read one layer at a time, and written before the next layer is read.
Out: a folder that `model.source` takes for sampling, evaluation and QLoRA, which appears as a whole; the error of each
layer; with a text, the perplexity before and after, from the same pass through the layers. Rounding is
`rl.models.quantized`, tensors and names are `rl.models.files.hf`. Models that are not the toolkit's own decoder go to
`rl.tools.quantization.quantize_foreign`.
"""

import argparse
import functools
import math
import pathlib
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from rl.config.load import Config
from rl.config.sections import source_kind
from rl.data.tokenizer import Tokenizer, load_tokenizer
from rl.devices.host_memory import limit_arenas, peak_bytes, return_memory
from rl.errors import missing
from rl.files.json_file import read_object
from rl.models.config import (
    ATTENTION_AND_MLP,
    QUANTIZED_DTYPES,
    ModelConfig,
    ParameterSpec,
    Quantization,
    base_specs,
    flatten_specs,
)
from rl.models.files.folders import new_folder, save_tensors, write_json
from rl.models.files.hf import (
    check_weights,
    copy_others,
    read_config,
    read_weight,
    resolve_source,
    stored_form,
    write_index,
)
from rl.models.files.hf_config import quantization_json
from rl.models.quantized import QuantizedArray, chosen_matrices, is_chosen, tile_of
from rl.run.heartbeat import heartbeat
from rl.state.origin import tokenizer_from_config
from rl.state.param_folder import is_param_folder
from rl.tools.quantization import layerwise
from rl.tools.quantization.quantize_foreign import DEFAULT_PATTERNS, quantize_foreign
from rl.tools.quantization.quantize_report import (
    QuantizeReport,
    check_start,
    layer_report,
    print_report,
    quantize_and_compare,
    relative,
)
from rl.tools.trained import resolve_model

MALLOC_ARENAS = 2  # more arenas keep parts of earlier layers: up to a third of a model of 235 MB, two keep a sixteenth

Path = tuple[str, ...]


def quantize_folder(
    source: str | pathlib.Path,
    out: str | pathlib.Path,
    quantization: Quantization,
    tokens: Sequence[int] | None = None,
    context: int = 512,
    told: Callable[[str], object] = str,
) -> QuantizeReport:
    """Writes `source`, its chosen matrices quantised, to `out`.

    Args:
      tokens: token ids of a text; None: no perplexity.
      context: the number of tokens that the model sees at a time.
      told: called with how far it is, in words.

    Raises:
      ValueError: there is no such model, it is a parameter-only checkpoint or quantised already, there is nothing to
        quantise, the group size does not fit, or `out` holds something.
    """
    start_bytes = peak_bytes()
    folder = resolve_source(source, what="MODEL")
    if is_param_folder(folder):
        raise ValueError(
            f"MODEL must be a Hugging Face folder, got the parameter-only checkpoint {str(folder)!r}; `grpo export` "
            "without --format params writes one of the same run"
        )
    config = read_config(folder)
    check_start(folder, config, tokens)
    num_matrices = len(_check_matrices(config, quantization))
    locations = check_weights(folder, config)
    units = _units(config)
    program = jax.jit(quantize_and_compare, static_argnums=(1, 2, 3))
    read = functools.partial(_read_unit, config, quantization, locations, units, program)
    passage = None if tokens is None else layerwise.Passage(config, tokens, context)
    layers, weight_map, bytes_before, bytes_after = [], {}, 0, 0
    with new_folder(out) as draft:
        for number, name in enumerate(units):
            told(f"{number} of {len(units)} parts done")
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
            layers.append(layer_report(name, unit.squares, error))
            del unit
            return_memory()  # before the next is read
        write_index(draft, weight_map, bytes_after)
        raw = read_object(folder / "config.json")
        write_json(draft / "config.json", raw | {"quantization_config": quantization_json(quantization)})
        copy_others(folder, draft)
    return QuantizeReport(
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
    """The parameters of a layer by path, original and as stored, and for each quantised one two squared norms: of the
    difference, and of the original.
    """

    plain: dict[Path, Any]
    stored: dict[Path, Any]
    squares: dict[str, tuple[float, float]]


def _check_matrices(config: ModelConfig, quantization: Quantization) -> dict[str, ParameterSpec]:
    """The matrices to quantise. ValueError where there are none, or one cannot be quantised in this way."""
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


def _advance(
    passage: layerwise.Passage, config: ModelConfig, read: Callable[[str], _Unit], name: str, unit: _Unit
) -> float | None:
    """Takes the text through the next layer. Returns the relative error of its output; None at the end of the model."""
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
    return relative(float(np.sum((plain - quantized) ** 2)), float(np.sum(plain**2)))


def _nested(flat: Mapping[Path, Any]) -> dict[str, Any]:
    """The parameters of one layer as the nested dict that its module takes."""
    tree: dict[str, Any] = {}
    for path, value in flat.items():
        node = tree
        for name in path[1:-1]:
            node = node.setdefault(name, {})
        node[path[-1]] = value
    return tree


def main(argv: Sequence[str] | None = None) -> None:
    """`grpo quantize MODEL OUT [--dtype DTYPE] [--group-size N] [--only REGEX] [--head] [--text FILE] [key=value]`."""
    parser = argparse.ArgumentParser(prog="grpo quantize", description=__doc__)
    parser.add_argument("model", help="Hugging Face folder or hub id, tunix:FOLDER, path/to/file.py:build or a recipe")
    parser.add_argument("out", help="folder to write")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="of a recipe, Tunix model or own module")
    parser.add_argument("--dtype", choices=QUANTIZED_DTYPES, default="int8")
    parser.add_argument("--group-size", type=int, default=None, metavar="N", help="inputs that share a scale")
    parser.add_argument("--only", action="append", metavar="REGEX", help="matrices to quantise, by path")
    parser.add_argument("--head", action="store_true", help="also what gives the logits")
    parser.add_argument("--text", metavar="FILE", help="text whose perplexity is measured before and after")
    parser.add_argument("--max-tokens", type=int, default=8192, metavar="N", help="of the text that are read")
    parser.add_argument("--context", type=int, default=512, metavar="N", help="tokens the model sees at a time")
    parser.add_argument("--tokenizer", metavar="SOURCE", help="folder, hub id or byte; MODEL when left out")
    parser.add_argument(
        "--trust", action="store_true", help="take config.yml of a run folder, and code that it names, as they are"
    )
    arguments = parser.parse_intermixed_args(sys.argv[1:] if argv is None else list(argv))
    _check_patterns(arguments.only or ())
    config = _config_of(arguments.model, arguments.overrides, arguments.trust)
    kind = "decoder" if config is None else source_kind(config.model.source)
    patterns = tuple(arguments.only or [DEFAULT_PATTERNS.get(kind, ATTENTION_AND_MLP)])
    quantization = Quantization(arguments.dtype, arguments.group_size, patterns, arguments.head)
    tokens = None
    if arguments.text is not None:
        if config is None or arguments.tokenizer is not None:
            tokenizer = load_tokenizer(arguments.tokenizer or arguments.model)
        else:
            tokenizer = tokenizer_from_config(config)
        tokens = _read_text(arguments.text, tokenizer, arguments.max_tokens)
    if arguments.context < 2:
        raise ValueError(f"--context must be >= 2, got {arguments.context}")
    limit_arenas(MALLOC_ARENAS)
    far = ["0 parts done"]
    options = (arguments.out, quantization, tokens, arguments.context, lambda text: far.append(text))
    with heartbeat(_say, lambda: f"quantising {arguments.model}, {far[-1]}"):
        report = quantize_folder(arguments.model, *options) if config is None else quantize_foreign(config, *options)
    print_report(report, quantization)
    print(f"written to {arguments.out}")


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _check_patterns(patterns: Sequence[str]) -> None:
    for pattern in patterns:
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(
                f"--only must be a regular expression, got {pattern!r}: {error}; a backslash makes a character plain"
            ) from error


def _config_of(model: str, overrides: Sequence[str], trust: bool) -> Config | None:
    """The configuration of a model that is not the toolkit's own decoder; None for a folder or hub id of that
    decoder.
    """
    is_recipe = pathlib.Path(model).suffix in (".yml", ".yaml")
    if source_kind(model) == "decoder" and not is_recipe:
        if overrides:
            raise ValueError(f"MODEL {model!r} is read by its own config.json and takes no key=value, got {overrides}")
        return None
    config = resolve_model(model, overrides, trust=trust).config
    if source_kind(config.model.source) == "decoder":
        raise ValueError(
            f"model source must be a folder or hub id to quantise, a recipe only of a Tunix model or a module of your "
            f"own, got {model!r} with model.source {config.model.source!r}; give the folder itself"
        )
    return config


def _read_text(file: str, tokenizer: Tokenizer, max_tokens: int) -> list[int]:
    path = pathlib.Path(file)
    if not path.is_file():
        raise missing("--text", "a text file", file)
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"--text must be text in UTF-8, got {file!r}: {error}; convert it first") from error
    tokens = tokenizer.encode(text)[:max_tokens]
    if len(tokens) < 2:
        raise ValueError(
            f"--text must hold at least two tokens, got {len(tokens)} of {file!r} (--max-tokens {max_tokens})"
        )
    return tokens


if __name__ == "__main__":
    main()
