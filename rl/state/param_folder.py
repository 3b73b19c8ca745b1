"""Parameter-only checkpoints: weights in Orbax's format without an optimizer, with a Hugging Face folder's other files.

A folder holds `params/` (one Orbax item, the tree of `rl.models.config.base_specs`), config.json,
generation_config.json and the tokenizer. The functions are those of `rl.models.files.hf` for safetensors, under the
same names. Weights are read one by one into any shardings, and checked by path, shape, dtype and, where
`params/hashes.json` exists, the hashes of the files.
"""

import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from rl.models.config import ModelConfig, base_specs, flatten_specs, leaf_at
from rl.models.files.finite import as_finite
from rl.models.files.folders import new_folder, same_bits, set_leaf
from rl.models.files.hf import check_tree, content_hash, place, write_model_files
from rl.models.ops import dtype_of
from rl.state.checkpoint_files import HashCheck, StoredArray, item_folders, read_array, stored_arrays, write_hashes

FOLDER = "params"


def is_param_folder(folder: str | pathlib.Path) -> bool:
    """Whether this is a parameter-only checkpoint."""
    return (pathlib.Path(folder) / FOLDER / "_METADATA").is_file()


def save_params(
    folder: str | pathlib.Path,
    config: ModelConfig,
    params: Mapping[str, Any],
    tokenizer: Any = None,
    dtype: str | None = None,
) -> None:
    """Writes a parameter-only checkpoint and reads it back. It appears whole or not at all.

    `dtype` is the stored type; None keeps `config.param_dtype`. Raises ValueError if the folder exists and is not
    empty, if `params` is not the tree of `config`, or if the folder reads back differently.
    """
    check_tree(config, params)
    dtype = config.param_dtype if dtype is None else dtype
    stored = jax.tree.map(lambda leaf: leaf.astype(dtype_of(dtype)), dict(params))
    with new_folder(folder) as draft:
        write_model_files(draft, config, dtype, tokenizer)
        with ocp.Checkpointer(ocp.StandardCheckpointHandler()) as checkpointer:
            checkpointer.save(draft.absolute() / FOLDER, args=ocp.args.StandardSave(stored))
        for path, array in _arrays(draft, config).items():
            if not same_bits(read_array(array), np.asarray(jax.device_get(leaf_at(stored, path)))):
                raise ValueError(f"{'/'.join(path)} was not read back as it was written to {folder}; check the disk")
        write_hashes(draft / FOLDER)


def check_weights(folder: str | pathlib.Path, config: ModelConfig) -> None:
    """ValueError where the arrays of a folder are missing, extra, misshapen or not floating point; reads no data."""
    _arrays(pathlib.Path(folder), config)


def load_params(
    folder: str | pathlib.Path, config: ModelConfig, shardings: Any = None, allow_nonfinite: bool = False
) -> dict[str, Any]:
    """The parameter tree of a folder in `config.param_dtype`, placed by `shardings`; see
    `rl.models.files.hf.load_params`.

    Raises:
      ValueError: as `check_weights`; numbers are not finite, or a file is damaged.
    """
    params: dict[str, Any] = {}
    with HashCheck(pathlib.Path(folder) / FOLDER) as check:  # in threads, beside the reading
        try:
            for path, array in _arrays(pathlib.Path(folder), config).items():
                name = f"{array.folder}: {'/'.join(path)}"
                value = as_finite(read_array(array), dtype_of(config.param_dtype), name, allow_nonfinite)
                set_leaf(params, path, place(config, path, value, leaf_at(shardings, path) if shardings else None))
        except ValueError:
            _check_whole(check)  # names the file, where it is one
            raise
        _check_whole(check)
    return params


def _check_whole(check: HashCheck) -> None:
    if problems := check.problems():
        raise ValueError(f"weights must be those that were written, and {problems[0]}; export them again")


def weights_hash(folder: str | pathlib.Path) -> str:
    """Hex sha256 over config.json and the files of the weights, as `rl.models.files.hf.weights_hash`."""
    folder = pathlib.Path(folder)
    return content_hash(folder, sorted(path for path in (folder / FOLDER).rglob("*") if path.is_file()))


def _arrays(folder: pathlib.Path, config: ModelConfig) -> dict[tuple[str, ...], StoredArray]:
    """The array of every parameter, checked against `config`."""
    item = item_folders(folder / FOLDER)[""]
    found = {array.path: array for array in stored_arrays(item)}
    specs = {path: spec.shape for path, spec in flatten_specs(base_specs(config))}
    for path in sorted(specs.keys() | found.keys()):
        name, shape = "/".join(path), specs.get(path)
        if path not in found:
            raise ValueError(f"{item}: {name} is missing; config.json says that this {config.family} has it")
        array = found[path]
        if array.shape != shape:
            wanted = f"must have shape {shape}" if shape else f"has no place in this {config.family}"
            raise ValueError(f"{item}: {name} {wanted}, got {array.shape}; check config.json")
        if not jnp.issubdtype(array.dtype, jnp.floating):
            raise ValueError(f"{item}: {name} must be floating point, got {array.dtype}")
    return {path: found[path] for path in specs}
