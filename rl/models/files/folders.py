"""Folders of weights: written whole or not at all; tensors are read and placed one by one.

In: a path, host arrays, shardings. Out: files that appear when they are complete, and arrays on their devices. A file
that is missing or cut short, or has too large a header, is a ValueError. Not here: which tensors a model has
(`rl.models.files.hf`).
"""

import contextlib
import json
import os
import pathlib
import tempfile
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import safetensors.numpy

from rl.files.json_file import briefly, check_is_file
from rl.files.output_file import writing
from rl.files.stores import is_remote, open_store, uploaded_folder

MAX_HEADER_BYTES = 100_000_000  # the limit of safetensors' own reader


def put_shards(value: Any, sharding: Any) -> jax.Array:
    """Puts a host array, the same in every process, on the devices of `sharding` (None: the default device)."""
    if sharding is None:
        return jax.device_put(value)
    # By callback, so that each process hands over its own shards only.
    return jax.make_array_from_callback(value.shape, sharding, lambda index: value[index])


def open_tensors(file: pathlib.Path) -> Any:
    """Opens a safetensors file for reading. ValueError where it is missing or cut short, or its header is too large."""
    check_is_file(file)
    try:
        with file.open("rb") as stream:
            header_bytes = int.from_bytes(stream.read(8), "little")
        if header_bytes > MAX_HEADER_BYTES:
            raise ValueError(
                f"{file} must have a header of at most {MAX_HEADER_BYTES} bytes, got {header_bytes}; it is no "
                "safetensors file, or a damaged one: fetch the model again"
            )
        return safetensors.safe_open(file, framework="np")
    except FileNotFoundError:
        raise ValueError(f"{file} must exist, but it does not; fetch the model again") from None
    except (safetensors.SafetensorError, OSError) as error:
        raise ValueError(
            f"{file} must be a whole safetensors file, got {briefly(error)}; fetch the model again"
        ) from error


@contextlib.contextmanager
def new_folder(folder: str | pathlib.Path) -> Iterator[pathlib.Path]:
    """A folder to write into that appears at its place whole, or not at all. ValueError if something is there.

    The folder of a URL appears file by file, config.json last.
    """
    if is_remote(folder):
        with uploaded_folder(open_store(str(folder))) as draft:
            yield draft
        return
    folder = pathlib.Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"export folder must be new or empty, got {folder}; choose another one or remove it")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as scratch:
        draft = pathlib.Path(scratch) / folder.name
        with writing(folder):
            draft.mkdir()
            yield draft
            os.replace(draft, folder)


def save_tensors(file: pathlib.Path, tensors: dict[str, np.ndarray]) -> None:
    """Writes a safetensors file and reads it back. ValueError where the two differ."""
    # transformers refuses a file whose metadata has no format.
    safetensors.numpy.save_file(tensors, file, metadata={"format": "pt"})
    with open_tensors(file) as written:
        for name, value in tensors.items():
            if not same_bits(written.get_tensor(name), value):
                raise ValueError(f"{name} was not read back as it was written to {file}; check the disk")


def same_bits(left: np.ndarray, right: np.ndarray) -> bool:
    """Whether two arrays are equal in type, shape and every bit, NaN included."""
    if (left.dtype, left.shape) != (right.dtype, right.shape):
        return False
    left, right = (np.ascontiguousarray(value).reshape(-1).view(np.uint8) for value in (left, right))
    return np.array_equal(left, right)


def write_json(path: pathlib.Path, value: Any) -> None:
    """Writes a JSON file with sorted keys."""
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def set_leaf(tree: dict[str, Any], path: tuple[str, ...], value: Any) -> None:
    """Puts a value at a path, making the dicts on the way."""
    for name in path[:-1]:
        tree = tree.setdefault(name, {})
    tree[path[-1]] = value
