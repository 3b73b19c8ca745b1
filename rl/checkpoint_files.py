"""The files of checkpoints as they lie on disk, whatever model and program wrote them.

In: a folder that Orbax wrote: one item (a tree of arrays), or a step with several (`state`, `loop`, `reference`;
MaxText's is `items`). Out: the arrays that it names and their contents one by one, the record of the loop, and whether
the files are still those that were written. Damage is a ValueError that names the file. Not here: what a run wants to
find (see `rl.checkpoint`).

Orbax keeps no checksum of the data of an array, and a changed byte often decodes to other numbers, so a step has the
sha256 of each of its files in `hashes.json`, written before the step appears under its name.
"""

import contextlib
import hashlib
import json
import os
import pathlib
import re
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore

HASHES = "hashes.json"
_METADATA, _RECORD, _STEP_METADATA = "_METADATA", "metadata", "_CHECKPOINT_METADATA"
_UNFINISHED = ".orbax-checkpoint-tmp"  # part of the name of a step that is being written
_MARKS = ("commit_success.txt",)  # written after everything else
_NAMED_FILE = re.compile(r'local file "([^"]+[^/"])"')  # in the messages of tensorstore


class DamagedArrayError(ValueError):
    """An array cannot be read. `where`: the file that is to blame, or the folder where none is known."""

    def __init__(self, where: str, message: str):
        super().__init__(message)
        self.where = where


class StoredArray(NamedTuple):
    """One array on disk.

    Attributes:
      path: names from the root of its item.
      folder: of its item. key: its name in there.
    """

    path: tuple[str, ...]
    shape: tuple[int, ...]
    dtype: np.dtype
    folder: pathlib.Path
    key: str

    @property
    def num_bytes(self) -> int:
        """Bytes of its numbers, uncompressed."""
        return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize


def item_folders(folder: pathlib.Path) -> dict[str, pathlib.Path]:
    """The trees of arrays in a checkpoint folder by name; a folder that is itself one has the name "".

    Raises:
      ValueError: there is none.
    """
    if (folder / _METADATA).is_file():
        return {"": folder}
    items = {path.parent.name: path.parent for path in sorted(folder.glob(f"*/{_METADATA}"))}
    if not items:
        raise ValueError(f"{folder} must be a checkpoint that Orbax wrote, and it holds no {_METADATA} of one")
    return items


def stored_arrays(item: pathlib.Path) -> list[StoredArray]:
    """The arrays of an item in the order of their paths; reads no data.

    Raises:
      ValueError: its metadata cannot be read.
    """
    try:
        tree = ocp.PyTreeCheckpointHandler().metadata(item.absolute()).tree  # pyright: ignore[reportArgumentType]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{item / _METADATA} must describe arrays, but it cannot be read: {error}") from error
    leaves = jax.tree_util.tree_flatten_with_path(tree, is_leaf=lambda node: hasattr(node, "dtype"))[0]
    return [
        StoredArray(
            tuple(str(getattr(part, "key", getattr(part, "idx", part))) for part in path),
            tuple(leaf.shape),
            np.dtype(leaf.dtype),
            item.absolute(),
            leaf.name,
        )
        for path, leaf in leaves
        if hasattr(leaf, "shape")
    ]


def read_array(array: StoredArray) -> np.ndarray:
    """The numbers of one array, in the type they are stored in.

    Raises:
      DamagedArrayError: they cannot be read.
    """
    root, key = f"{array.folder}/", f"{array.key}/"
    if (array.folder / "manifest.ocdbt").exists():
        store = {"driver": "ocdbt", "base": f"file://{root}", "path": key}
    else:
        store = {"driver": "file", "path": root + key}
    is_zarr3 = json.loads((array.folder / _METADATA).read_text()).get("use_zarr3", False)
    spec = {"driver": "zarr3" if is_zarr3 else "zarr", "kvstore": store}
    try:
        return np.asarray(tensorstore.open(spec, open=True, read=True).result().read().result())
    except ValueError as error:
        message = str(error)
        named = [name for name in _NAMED_FILE.findall(message) if pathlib.Path(name) != array.folder]
        where = named[-1] if named else str(array.folder)
        raise DamagedArrayError(
            where, f"{where} must hold {'/'.join(array.path)}, but it cannot be read: {message.split(' [', 1)[0]}"
        ) from error


def array_hash(value: np.ndarray) -> str:
    """Hex sha256 of type, shape and numbers: the same however the array was cut into files."""
    digest = hashlib.sha256(f"{value.dtype.name}{list(value.shape)}".encode())
    digest.update(memoryview(np.ascontiguousarray(value).reshape(-1).view(np.uint8)))  # pyright: ignore[reportArgumentType]
    return digest.hexdigest()


def read_record(folder: pathlib.Path) -> dict[str, Any] | None:
    """The loop record of a step; None where there is none. ValueError when it cannot be read."""
    path = folder / "loop" / _RECORD
    if not path.parent.is_dir():
        return None
    return _read_json(path)


def write_record(folder: pathlib.Path, record: dict[str, Any]) -> None:
    """Puts another loop record into a step that nobody else uses."""
    (folder / "loop" / _RECORD).write_text(json.dumps(record))


def read_step_metadata(folder: pathlib.Path) -> dict[str, Any]:
    """What Orbax noted about a step: handlers, times in nanoseconds since 1970; {} where it noted nothing."""
    path = folder / _STEP_METADATA
    return _read_json(path) if path.is_file() else {}


def hash_unfinished(checkpoints: pathlib.Path) -> None:
    """Writes `hashes.json` into the step that is being written below `checkpoints`, when all else is on disk."""
    for folder in checkpoints.glob(f"*{_UNFINISHED}*"):
        write_hashes(folder)


def write_hashes(folder: pathlib.Path) -> None:
    """Writes `hashes.json` of a step as it is now."""
    files = {name: file_hash(folder / name) for name in _hashed_files(folder)}
    (folder / HASHES).write_text(json.dumps({"algorithm": "sha256", "files": files}, indent=1) + "\n")


def damaged_files(folder: pathlib.Path) -> list[str] | None:
    """What is wrong with the files of a step by its `hashes.json`, in words, a line per file; None without one.

    Raises:
      ValueError: `hashes.json` itself cannot be read.
    """
    if not (folder / HASHES).is_file():
        return None
    problems = []
    for name, wanted in _read_json(folder / HASHES)["files"].items():
        path = folder / name
        if not path.is_file():
            problems.append(f"{path} is missing")
        elif file_hash(path) != wanted:
            problems.append(f"{path} is damaged: it is not what was written")
    return problems


def file_hash(path: pathlib.Path) -> str:
    """Hex sha256 of a file."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def folder_size(folder: os.PathLike | str) -> int:
    """Bytes of all files below a folder; those that are taken away meanwhile do not count."""
    total = 0
    for path, _, names in os.walk(folder):  # os.walk passes over folders that vanish
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                total += os.stat(os.path.join(path, name)).st_size
    return total


def _hashed_files(folder: pathlib.Path) -> list[str]:
    """The files of the items; those beside them are Orbax's own notes on its progress."""
    files = [path for path in sorted(folder.glob("*/**/*")) if path.is_file() and path.name not in _MARKS]
    return [path.relative_to(folder).as_posix() for path in files]


def _read_json(path: pathlib.Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} must be a JSON file, but it cannot be read: {error}") from error
