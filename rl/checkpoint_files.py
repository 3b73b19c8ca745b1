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
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import tensorstore

HASHES = "hashes.json"
_METADATA, _RECORD, _STEP_METADATA = "_METADATA", "metadata", "_CHECKPOINT_METADATA"
_UNFINISHED = ".orbax-checkpoint-tmp"  # part of the name of a step that is being written
_MARKS = ("commit_success.txt",)  # written after everything else
_NAMED_FILE = re.compile(r'local file "([^"]+[^/"])"')  # in the messages of tensorstore


class DamagedArrayError(ValueError):
    """An array cannot be read. `where`: the file that is to blame, or the item's folder where none is known."""

    def __init__(self, where: str, path: tuple[str, ...]):
        super().__init__(f"{where} must hold {'/'.join(path)}, but it cannot be read; it is damaged")
        self.where, self.path = where, path


class StoredArray(NamedTuple):
    """One array on disk.

    Attributes:
      path: names from the root of its item.
      folder: of its item. driver: tensorstore's name of its format.
    """

    path: tuple[str, ...]
    shape: tuple[int, ...]
    dtype: np.dtype
    folder: pathlib.Path
    driver: str

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


def stored_arrays(item: pathlib.Path, damaged: list[DamagedArrayError] | None = None) -> list[StoredArray]:
    """The arrays of an item in the order of their paths; reads no data.

    Args:
      damaged: takes the error of each array that cannot be opened, in place of raising it.

    Raises:
      ValueError: the item's own list of its arrays cannot be read.
      DamagedArrayError: an array cannot be opened.
    """
    metadata, item = _read_json(item / _METADATA), item.absolute()
    driver = "zarr3" if metadata.get("use_zarr3", False) else "zarr"
    paths = sorted(
        tuple(str(part["key"]) for part in entry["key_metadata"])
        for entry in metadata["tree_metadata"].values()
        # Empty containers are entries, too, and strings lie in a file of their own.
        if not entry["value_metadata"]["skip_deserialize"] and entry["value_metadata"]["value_type"] != "string"
    )
    arrays = []
    for path in paths:
        try:
            store = _open(item, path, driver)
        except DamagedArrayError as error:
            if damaged is None:
                raise
            damaged.append(error)
        else:
            arrays.append(StoredArray(path, tuple(store.shape), store.dtype.numpy_dtype, item, driver))
    return arrays


def read_array(array: StoredArray) -> np.ndarray:
    """The numbers of one array, in the type they are stored in.

    Raises:
      DamagedArrayError: they cannot be read.
    """
    store = _open(array.folder, array.path, array.driver)
    with _blaming_a_file(array.folder, array.path):
        return np.asarray(store.read().result())


def _open(item: pathlib.Path, path: tuple[str, ...], driver: str) -> Any:
    key = ".".join(path)
    if (item / "manifest.ocdbt").exists():
        store = {"driver": "ocdbt", "base": f"file://{item}/", "path": f"{key}/"}
    else:
        store = {"driver": "file", "path": f"{item}/{key}/"}
    with _blaming_a_file(item, path):
        return tensorstore.open({"driver": driver, "kvstore": store}, open=True, read=True).result()


@contextlib.contextmanager
def _blaming_a_file(item: pathlib.Path, path: tuple[str, ...]) -> Iterator[None]:
    try:
        yield
    except ValueError as error:  # what tensorstore raises
        named = [name for name in _NAMED_FILE.findall(str(error)) if pathlib.Path(name) != item]
        raise DamagedArrayError(named[-1] if named else str(item), path) from error


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
