"""Weights of a Tunix model from and to a Hugging Face folder, through the table of Tunix's own loader.

In: the `ForeignConfig` of `rl.models.foreign.tunix_config`, and a folder or parameters. Out: parameters under Tunix's
names, or files like those that they came from. Two defects of Tunix 0.1.7 are corrected. Its loader reads a file of
several dtypes as if it had one, and puts a norm of Gemma 1 in the place that it has in Gemma 2.
"""

import importlib
import pathlib
import re
import shutil
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from rl.config.sections import TUNIX_PREFIX
from rl.files.json_file import read_object
from rl.models.config import ForeignConfig, flatten_specs, leaf_at, spec_at
from rl.models.files.folders import open_tensors, save_tensors, write_json
from rl.models.files.hf import FLOAT_TYPES
from rl.models.foreign.own_files import place_weights
from rl.models.foreign.tunix_config import TunixModel

Params = dict[str, Any]
COMES_IN_A_FOLDER: bool = True  # with configuration and tokenizer


def load_weights(folder: pathlib.Path, config: ForeignConfig, shardings: Any, allow_nonfinite: bool = False) -> Params:
    """The weights in `folder` in `config.param_dtype`, placed by `shardings`; one parameter at a time is read.

    Tunix's own function is not used: it puts all weights on the first device of all processes, which the other
    processes cannot reach.

    Raises:
      ValueError: as `weight_reader`; NaN or infinity, unless `allow_nonfinite`.
    """
    return place_weights(weight_reader(folder, config), config, shardings, str(folder), allow_nonfinite)


def weight_reader(folder: pathlib.Path, config: ForeignConfig) -> Callable[[tuple[str, ...]], np.ndarray]:
    """A function that reads one parameter by Tunix's name, in its stored type and the form that the loader gives it. No
    other parameter is in memory.

    Raises:
      ValueError: the loader would leave a weight out; at a read, the weight is not floating point.
    """
    table = _table(config.model)
    find = importlib.import_module("tunix.utils.torch_utils").torch_key_to_jax_key
    parts: dict[tuple[str, ...], list[tuple[_Part, pathlib.Path, str, Any]]] = {}
    for file in sorted(folder.glob("*.safetensors")):
        for name in config.model.tensor_names & _shapes(file).keys():
            key, transform = find(table, name)
            part = _part_of(config.specs, key)
            parts.setdefault(part.path, []).append((part, file, name, transform))
    left_out = ["/".join(path) for path, _ in flatten_specs(config.specs) if path not in parts]
    if left_out:
        raise ValueError(f"{folder}: Tunix's loader must fill every weight, and leaves {', '.join(left_out[:8])} out")

    def read(path: tuple[str, ...]) -> np.ndarray:
        values = []
        for part, file, name, transform in sorted(parts[path], key=lambda found: found[0].index or 0):
            permuted, reshaped = transform or (None, None)
            with open_tensors(file) as tensors:
                kind = tensors.get_slice(name).get_dtype()
                if kind not in FLOAT_TYPES:
                    raise ValueError(f"{file}: tensor {name} must be one of {', '.join(FLOAT_TYPES)}, got {kind}")
                value = tensors.get_tensor(name)
            value = value.transpose(permuted) if permuted else value
            value = value.reshape(reshaped) if reshaped else value
            values.append(value.transpose(1, 0, 2) if part.is_swapped else value)
        return np.stack(values).reshape(spec_at(config, path).shape)

    return read


def write_folder(folder: pathlib.Path, config: ForeignConfig, params: Params, tokenizer: Any) -> None:
    """Writes a Hugging Face folder like the one that the model came from."""
    write_weights(folder, config, params)
    tokenizer.save_pretrained(str(folder))


def with_weights(folder: pathlib.Path) -> dict[str, str]:
    """The keys of the model section that name weights in `folder`."""
    return {"source": f"{TUNIX_PREFIX}{folder}"}


def write_weights(out: pathlib.Path, config: ForeignConfig, params: Params) -> None:
    """Writes the content of the model's own folder to `out`, with `params` as weights in `config.param_dtype`."""
    model: TunixModel = config.model
    table = _table(model)
    raw = read_object(model.folder / "config.json")
    for key in {"dtype", "torch_dtype"} & set(raw):
        raw[key] = config.param_dtype
    write_json(out / "config.json", raw)
    for name in ("generation_config.json", "model.safetensors.index.json"):
        if (model.folder / name).exists():
            shutil.copyfile(model.folder / name, out / name)
    for file in sorted(model.folder.glob("*.safetensors")):
        tensors = {name: _stored(params, table, name, shape) for name, shape in _shapes(file).items()}
        save_tensors(out / file.name, tensors)


def _table(model: TunixModel) -> dict[str, Any]:
    """{pattern of a tensor's name: (its parameter, (permutation of the axes, then new shape))}."""
    return {**model.loader._get_key_and_transform_mapping(model.config), **model.key_changes}


def _stored(params: Params, table: Mapping[str, Any], name: str, shape: tuple[int, ...]) -> np.ndarray:
    """The tensor called `name`, of `shape`, for a checkpoint: the reverse of what the loader does."""
    find = importlib.import_module("tunix.utils.torch_utils").torch_key_to_jax_key
    key, transform = find(table, name)
    if name == "lm_head.weight" and "lm_head" not in params:
        key, transform = "embedder.input_embedding", None
    value = _value(params, key)
    permuted, reshaped = transform or (None, None)
    if permuted and reshaped:
        value = value.reshape([shape[axis] for axis in permuted])
    if permuted:
        value = value.transpose(np.argsort(permuted))
    assert value.shape == shape, (name, value.shape, shape)
    return np.ascontiguousarray(value)


class _Part(NamedTuple):
    """The part of a parameter that a key of the loader's table means. Parameters merge q, k, v and stack experts.

    Attributes:
      path, index: the parameter, and the entry of its first dim; None: the whole parameter.
      is_swapped: whether the part's first two dims are swapped in the parameter.
    """

    path: tuple[str, ...]
    index: int | None = None
    is_swapped: bool = False


def _part_of(tree: Mapping[str, Any], key: str) -> _Part:
    """The part that `key` means in `tree`, a model's parameters or specs."""
    if match := re.fullmatch(r"tmp\.layers\.(\d+)\.attn\.([qkv])", key):
        attention, part = ("layers", match[1], "attn"), "qkv".index(match[2])
        if "qkv_einsum" in leaf_at(tree, attention):
            return _Part((*attention, "qkv_einsum", "w"), part, True)
        if part == 0:
            return _Part((*attention, "q_einsum", "w"), None, True)
        return _Part((*attention, "kv_einsum", "w"), part - 1, True)
    if match := re.fullmatch(r"layers\.(\d+)\.mlp\.experts\.(\d+)\.(\w+)\.kernel", key):
        return _Part(("layers", match[1], "mlp", match[3]), int(match[2]))
    return _Part(tuple(key.split(".")))


def _value(params: Params, key: str) -> np.ndarray:
    """The value of the part that `key` means."""
    part = _part_of(params, key)
    value = leaf_at(params, part.path)
    value = np.asarray(jax.device_get(value if part.index is None else value[part.index]))
    return value.transpose(1, 0, 2) if part.is_swapped else value


def _shapes(file: pathlib.Path) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor in a safetensors file."""
    with open_tensors(file) as tensors:
        return {name: tuple(tensors.get_slice(name).get_shape()) for name in tensors.keys()}  # noqa: SIM118 (not a mapping)
