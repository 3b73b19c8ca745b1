"""`grpo quantize` of a model that is not the toolkit's own decoder: a Tunix model, or a user's module in either
flavour.

In: a configuration whose `model` section names the model and its weights. Out: a folder with the parameters' own names
(`rl.models.files.quantized_files`), made layer by layer, which model.source (Tunix) or model.weights (a user's module)
takes. The computation between layers is not known here, so with a text the whole model is loaded, before and after.
"""

import dataclasses
import math
import pathlib
import re
from collections.abc import Callable, Sequence

import jax
import numpy as np

from rl.config.load import Config
from rl.devices.host_memory import peak_bytes, return_memory
from rl.files.json_file import read_object
from rl.models.config import ForeignConfig, ParameterSpec, Quantization, flatten_specs
from rl.models.files.folders import new_folder, save_tensors, write_json
from rl.models.files.hf import copy_others, write_index
from rl.models.files.hf_config import quantization_json
from rl.models.files.quantized_files import stored_form
from rl.models.foreign import files as foreign
from rl.models.ops import dtype_of
from rl.models.quantized import chosen_matrices, tile_of
from rl.sampler.prompt_logprobs import PromptScorer
from rl.state.origin import find_origin, tokenizer_from_config
from rl.tools.quantization.quantize_report import QuantizeReport, check_start, layer_report, quantize_and_compare
from rl.tools.trained import load_start

# The default choice: in Tunix models the matrices of attention and MLP, in other modules what flax calls a kernel.
# Embedding and norms are not quantised.
DEFAULT_PATTERNS = {"tunix": r"^layers/\d+/(attn|mlp)/", "own": r"(^|/)kernel$"}

Path = tuple[str, ...]


def quantize_foreign(
    config: Config,
    out: str | pathlib.Path,
    quantization: Quantization,
    tokens: Sequence[int] | None = None,
    context: int = 512,
    told: Callable[[str], object] = str,
) -> QuantizeReport:
    """Writes the model of `config` to `out`, with the chosen matrices quantised.

    Args:
      quantization: without `head`; a pattern can name a head like any matrix.
      tokens, context, told: see `rl.tools.quantization.quantize.quantize_folder`.

    Raises:
      ValueError: there are no weights, they are quantised already, there is nothing to quantise, the group size does
        not fit, or `out` holds something.
    """
    start_bytes = peak_bytes()
    origin = find_origin(config, tokenizer_from_config(config))
    model: ForeignConfig = origin.model_config  # pyright: ignore[reportAssignmentType]
    folder = _check(config, model, origin.folder, quantization, tokens)
    chosen = chosen_matrices(model, quantization)
    for spec in chosen.values():
        tile_of(spec.shape, spec.contract_dims, quantization.group_size)
    read = foreign.weight_reader(folder, model)
    program = jax.jit(quantize_and_compare, static_argnums=(1, 2, 3))
    units = _units(model)
    layers, weight_map, bytes_before, bytes_after = [], {}, 0, 0
    with new_folder(out) as draft:
        for number, (name, parameters) in enumerate(units.items()):
            told(f"{number} of {len(units)} parts done")
            tensors: dict[str, np.ndarray] = {}
            squares: dict[str, tuple[float, float]] = {}
            for path, spec in parameters:
                value = read(path).astype(dtype_of(model.param_dtype))
                bytes_before += value.nbytes
                if "/".join(path) in chosen:
                    arguments = (spec.contract_dims, quantization.dtype, quantization.group_size)
                    value, difference, whole = program(value, *arguments)
                    squares["/".join(path)] = (float(difference), float(whole))
                tensors |= stored_form(path, value)
                del value
            file = f"model-{number + 1:05d}-of-{len(units):05d}.safetensors"
            save_tensors(draft / file, tensors)
            weight_map |= dict.fromkeys(tensors, file)
            bytes_after += sum(tensor.nbytes for tensor in tensors.values())
            layers.append(layer_report(name, squares))
            del tensors
            return_memory()  # before the next is read
        write_index(draft, weight_map, bytes_after)
        files = foreign.files_of(model)
        raw = read_object(folder / "config.json") if files.COMES_IN_A_FOLDER else {}
        write_json(draft / "config.json", raw | {"quantization_config": quantization_json(quantization)})
        if files.COMES_IN_A_FOLDER:
            copy_others(folder, draft)
        perplexity = None
        if tokens is not None:
            after = dataclasses.replace(config, model=dataclasses.replace(config.model, **files.with_weights(draft)))
            perplexity = tuple(_perplexity(version, tokens, context) for version in (config, after))
    return QuantizeReport(
        layers=layers,
        num_matrices=len(chosen),
        bytes_before=bytes_before,
        bytes_after=bytes_after,
        perplexity=perplexity,
        num_tokens=0 if tokens is None else sum(len(piece) - 1 for piece in _pieces(tokens, context)),
        start_bytes=start_bytes,
        peak_bytes=peak_bytes(),
    )


def _check(
    config: Config,
    model: ForeignConfig,
    folder: pathlib.Path | None,
    quantization: Quantization,
    tokens: Sequence[int] | None,
) -> pathlib.Path:
    """The path of the weights. ValueError for a model that cannot be quantised."""
    if folder is None:
        raise ValueError(
            f"model.weights must name the weights of {config.model.source}, got null; grpo export writes such a file"
        )
    check_start(folder, model, tokens)
    if quantization.head:
        raise ValueError(
            f"--head must be left out with model.source {config.model.source!r}, whose head is not known by name; find "
            "it with --only"
        )
    return folder


def _units(model: ForeignConfig) -> dict[str, list[tuple[Path, ParameterSpec]]]:
    """{layer: its parameters}. A layer's name ends at the first number ("layers/0", "blocks_0"). A module without a
    number is a layer of its own.
    """
    units: dict[str, list[tuple[Path, ParameterSpec]]] = {}
    for path, spec in flatten_specs(model.specs):
        modules = path[:-1] or path
        numbered = next((i for i, name in enumerate(modules) if re.search(r"\d$", name)), 0)
        units.setdefault("/".join(modules[: numbered + 1]), []).append((path, spec))
    return units


def _perplexity(config: Config, tokens: Sequence[int], context: int) -> float:
    """exp(- mean log-likelihood of a token) of the text under the whole model. Each row starts afresh."""
    trained = load_start(config)
    scorer = PromptScorer(trained.policy, trained.mesh, trained.shardings, config.mesh.rules)
    scores = scorer.logprobs(trained.params, _pieces(tokens, context), 1.0, config.grpo.logprob_chunk)
    return math.exp(-sum(float(np.sum(score)) for score in scores) / sum(len(score) for score in scores))


def _pieces(tokens: Sequence[int], length: int) -> list[Sequence[int]]:
    return [tokens[start : start + length] for start in range(0, len(tokens), length)]
