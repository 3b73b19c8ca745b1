"""Weights of a user's own module: one safetensors file under the parameters' own names.

In: a file, or parameters. Out: parameters placed by their shardings, or the file. ValueError where a name, a shape or a
dtype does not fit.
"""

import pathlib
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from rl.models.config import ForeignConfig, flatten_specs
from rl.models.files.finite import as_finite
from rl.models.files.folders import open_tensors, put_shards, save_tensors
from rl.models.files.hf import FLOAT_TYPES, SINGLE_FILE
from rl.models.foreign.own_config import _leaves
from rl.models.foreign.own_policy import Params
from rl.models.ops import dtype_of

COMES_IN_A_FOLDER: bool = False  # with configuration and tokenizer


def save_weights(file: pathlib.Path, params: Any) -> None:
    """Writes every parameter under its name ("blocks/0/kernel") to a safetensors file, and reads the file back."""
    save_tensors(file, {name: np.asarray(jax.device_get(leaf)) for name, leaf in _leaves(params)})


def write_folder(folder: pathlib.Path, config: ForeignConfig, params: Any, tokenizer: Any) -> None:
    """Writes the weights alone: the module is in the user's file, the tokenizer where it was."""
    save_weights(folder / SINGLE_FILE, params)


def with_weights(folder: pathlib.Path) -> dict[str, str]:
    """The keys of the model section that name weights in `folder`."""
    return {"weights": str(folder)}


def load_weights(file: pathlib.Path, config: ForeignConfig, shardings: Any, allow_nonfinite: bool = False) -> Params:
    """The parameters in a file that `save_weights` wrote, placed by `shardings`.

    Raises:
      ValueError: weights are missing, extra or of another shape (the message names each); NaN or infinity, unless
        `allow_nonfinite`.
    """
    return place_weights(weight_reader(file, config), config, shardings, str(file), allow_nonfinite)


def place_weights(
    read: Callable[[tuple[str, ...]], np.ndarray],
    config: ForeignConfig,
    shardings: Any,
    source: str,
    allow_nonfinite: bool,
) -> Params:
    """Reads the parameter at each path of `shardings`, one at a time, and places it in `config.param_dtype`.

    `source` names the origin in messages. ValueError for NaN and infinity, unless `allow_nonfinite`.
    """

    def place(keys: tuple, sharding: Any) -> jax.Array:
        path = tuple(part.key for part in keys)
        name = f"{source}: {'/'.join(path)}"
        return put_shards(as_finite(read(path), dtype_of(config.param_dtype), name, allow_nonfinite), sharding)

    return jax.tree_util.tree_map_with_path(place, shardings)


def weight_reader(file: pathlib.Path, config: ForeignConfig) -> Callable[[tuple[str, ...]], np.ndarray]:
    """A function that reads one parameter of such a file. The file is checked at once; ValueError as in
    `load_weights`.
    """
    specs = {"/".join(path): spec for path, spec in flatten_specs(config.specs)}
    with open_tensors(file) as tensors:
        views = {name: tensors.get_slice(name) for name in tensors.keys()}  # noqa: SIM118 (not a mapping)
        shapes = {name: tuple(view.get_shape()) for name, view in views.items()}
        types = {name: view.get_dtype() for name, view in views.items()}
    problems = [f"missing {name}" for name in specs if name not in shapes]
    problems += [f"unexpected {name}" for name in shapes if name not in specs]
    problems += [
        f"{name} must be {list(specs[name].shape)}, got {list(shape)}"
        for name, shape in shapes.items()
        if name in specs and shape != specs[name].shape
    ]
    problems += [
        f"{name} must be one of {', '.join(FLOAT_TYPES)}, got {kind}"
        for name, kind in types.items()
        if name in specs and kind not in FLOAT_TYPES
    ]
    if problems:
        raise ValueError(f"model.weights {file} must hold the parameters of the module: {'; '.join(problems[:8])}")

    def read(path: tuple[str, ...]) -> np.ndarray:
        with open_tensors(file) as tensors:
            return tensors.get_tensor("/".join(path))

    return read
