"""The files of checkpoints on disk, whatever model and program wrote them.

In: a folder that Orbax wrote: one item (a tree of arrays), or a step with several items (`state`, `loop`, `reference`;
MaxText's is `items`). Out: the list of its arrays, their contents one by one, the loop record, and whether the files
are unchanged. Damage is a ValueError that names the file. Not here: what a run needs to find (`rl.state.checkpoint`).

Orbax keeps no checksum of the data of an array, and a changed byte often decodes to other numbers. So each step has a
`hashes.json`: the hash of each of its files, its number, the id of its run (`run.json`), and the sha256 of all this. It
is written before the step appears under its name. Steps of older versions have no such file, or one without the last
sha256 and with fewer files; a run whose run.json has an id has no such steps. `HashCheck` compares while files are
read: every restore by `rl.state.checkpoint`, and weights by `rl.state.param_folder`. `damaged_files` serves the tools.
"""

import concurrent.futures
import contextlib
import hashlib
import json
import os
import pathlib
import re
import shutil
from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple, Self

import numpy as np
import tensorstore
import xxhash

from rl.files.local_files import file_hash
from rl.run_folder.contents import CHECKPOINTS, HASHES, IDENTITY, RUN_KEY, run_id

_METADATA, _RECORD, _STEP_METADATA = "_METADATA", "metadata", "_CHECKPOINT_METADATA"
UNFINISHED = ".orbax-checkpoint-tmp"  # part of the name of a step that is being written
_DAMAGED = ".damaged"  # ends the name of a step that was set aside
_STEP = "step"  # key of the number of a step, in its loop record and in hashes.json
# How files are hashed, by the name in `hashes.json`. xxHash (https://xxhash.com) finds every accident in a sixth of
# sha256's time. Against intent neither helps: who can change a checkpoint can write a new list as well.
_ALGORITHM = "xxh3_128"
_FILE_HASHES = {_ALGORITHM: partial(file_hash, digest=xxhash.xxh3_128), "sha256": file_hash}  # older: sha256
_THREADS = 4  # that compute hashes; enough for any disk
_NAMED_FILE = re.compile(r'local file "([^"]+[^/"])"')  # in the messages of tensorstore


class DamagedArrayError(ValueError):
    """An array cannot be read. `where`: the damaged file, or the item's folder where the file is unknown."""

    def __init__(self, where: str, path: tuple[str, ...]):
        super().__init__(f"{where} must hold {'/'.join(path)}, but it cannot be read; it is damaged")
        self.where, self.path = where, path


class StoredArray(NamedTuple):
    """One array on disk.

    Attributes:
      path: the names from the root of its item.
      folder: the folder of its item. driver: tensorstore's name of its format.
    """

    path: tuple[str, ...]
    shape: tuple[int, ...]
    dtype: np.dtype
    folder: pathlib.Path
    driver: str

    @property
    def num_bytes(self) -> int:
        """The number of bytes of its uncompressed numbers."""
        return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize


def item_folders(folder: pathlib.Path) -> dict[str, pathlib.Path]:
    """{name: folder} of the trees of arrays in a checkpoint folder. A folder that is itself a tree has the name "".

    Raises:
      ValueError: there is no tree.
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
      damaged: a list to which the error of each unreadable array is added; None: the first one is raised.

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
    """The numbers of one array in their stored type.

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
    """Hex sha256 of type, shape and numbers. It does not depend on how the array was cut into files."""
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
    """Replaces the loop record of a step that nobody else uses."""
    (folder / "loop" / _RECORD).write_text(json.dumps(record))


def read_step_metadata(folder: pathlib.Path) -> dict[str, Any]:
    """Orbax's notes about a step: handlers, times in nanoseconds since 1970; {} where there are none."""
    path = folder / _STEP_METADATA
    return _read_json(path) if path.is_file() else {}


def write_hashes(folder: pathlib.Path, place: pathlib.Path | None = None) -> None:
    """Writes `hashes.json` of the present files of a step or item.

    Args:
      place: the final path of the step; None: its present path.
    """
    names = [path.relative_to(folder).as_posix() for path in sorted(folder.rglob("*")) if path.is_file()]
    names = [name for name in names if name != HASHES]
    with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
        hashes = pool.map(lambda name: _FILE_HASHES[_ALGORITHM](folder / name), names)
        body = {"algorithm": _ALGORITHM, "files": dict(zip(names, hashes, strict=True)), **_origin(place or folder)}
    text = json.dumps({**body, "digest": _digest(body)}, indent=1) + "\n"
    (folder / HASHES).write_text(text, encoding="utf-8")


class HashCheck:
    """The comparison of a folder's files with its `hashes.json`, in threads, while somebody else reads them.

    Attributes:
      note: says what is not compared; None where everything is.
    """

    def __init__(self, folder: pathlib.Path, part: int = 0, num_parts: int = 1):
        """Begins the comparison.

        Args:
          part, num_parts: which of how many parts of the files to compare; each process of a run takes one part.
        """
        self.note: str | None = None
        self._problems: list[str] = []
        self._pool = concurrent.futures.ThreadPoolExecutor(_THREADS, "hash")
        self._compared: list[concurrent.futures.Future[str | None]] = []
        path = folder / HASHES
        if (moved := wrong_step(folder)) is not None:
            self._problems.append(moved)
        if (missing := _missing_hashes(folder)) is not None:
            self._problems.append(missing)
            return
        if not path.is_file():
            self.note = f"the files have no {HASHES}: a changed byte that still decodes to a number is not noticed"
            return
        listed = _read_hashes(path)
        if isinstance(listed, str):
            self._problems.append(listed)
            return
        algorithm, files, origin, is_complete = listed
        if (foreign := _foreign(folder, origin)) is not None and foreign not in self._problems:
            self._problems.append(foreign)
        if not is_complete:
            self.note = f"{HASHES} is of an older version: not all files are compared with it"
        for name, wanted in list(files.items())[part::num_parts]:
            self._compared.append(self._pool.submit(_compare, folder / name, wanted, algorithm))

    def problems(self) -> list[str]:
        """A line for each damaged file. Waits for the comparison to end."""
        problems = [future.result() for future in self._compared]
        return [*self._problems, *filter(None, problems)]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._pool.shutdown(cancel_futures=True)


def damaged_files(folder: pathlib.Path) -> list[str] | None:
    """A line for each file of a step that differs from `hashes.json`; None where there is no such file."""
    with HashCheck(folder) as check:
        problems = check.problems()
    return problems if problems or (folder / HASHES).exists() else None


def wrong_step(folder: pathlib.Path) -> str | None:
    """A message where the record of a step belongs to another step than its folder's name says; else None."""
    if not _is_step(folder):
        return None
    with contextlib.suppress(ValueError):  # the hashes name a record that cannot be read
        record = read_record(folder)
        if isinstance(record, dict) and record.get(_STEP, int(folder.name)) != int(folder.name):
            return _moved(folder, record[_STEP])
    return None


def _is_step(folder: pathlib.Path) -> bool:
    return folder.parent.name == CHECKPOINTS and folder.name.isdecimal()


def _moved(folder: pathlib.Path, step: object) -> str:
    return f"{folder} holds step {step}: it was renamed, or put in the place of another"


def _origin(folder: pathlib.Path) -> dict[str, Any]:
    """The number of a step and the id of its run, as for hashes.json; {} for a folder that is no step."""
    if not _is_step(folder):
        return {}
    run = _run_of(folder)
    return {_STEP: int(folder.name)} | ({} if run is None else {RUN_KEY: run})


def _run_of(folder: pathlib.Path) -> str | None:
    """The id of the run in whose folder a step lies; None outside a run folder, or where an older version began the
    run.
    """
    run = folder.parent.parent
    return run_id(run) if _is_step(folder) and (run / IDENTITY).is_file() else None


def _foreign(folder: pathlib.Path, origin: dict[str, Any]) -> str | None:
    """A message where the hashes of a step belong to another step or another run; else None."""
    if not _is_step(folder) or not (folder.parent.parent / IDENTITY).is_file():
        return None
    if origin.get(_STEP, int(folder.name)) != int(folder.name):
        return _moved(folder, origin[_STEP])
    own, wanted = origin.get(RUN_KEY), _run_of(folder)
    if own != wanted:
        return f"{folder} is of another run: its id is {own}, that of {IDENTITY} is {wanted}"
    return None


def _missing_hashes(folder: pathlib.Path) -> str | None:
    """A message where a step lacks the list of hashes that it must have; else None.

    A run with an id wrote a list into each step. A run of an older version may have begun to write lists at some step,
    and has one in every later step.
    """
    path = folder / HASHES
    if path.is_file():
        return None
    if os.path.lexists(path):
        return f"{path} is damaged: it is no file"
    if _run_of(folder) is not None:
        return f"{path} is missing, which every step of this run has"
    if not folder.name.isdecimal():
        return None
    earlier = (entry for entry in folder.parent.iterdir() if entry.name.isdecimal())
    if any(int(entry.name) < int(folder.name) and (entry / HASHES).is_file() for entry in earlier):
        return f"{path} is missing, which an earlier step has"
    return None


def _compare(path: pathlib.Path, wanted: str, algorithm: str) -> str | None:
    try:
        found = _FILE_HASHES[algorithm](path)
    except FileNotFoundError:
        return f"{path} is missing"
    except OSError as error:
        return f"{path} cannot be read: {error.strerror}"
    return None if found == wanted else f"{path} is damaged: it is not what was written"


def _read_hashes(path: pathlib.Path) -> tuple[str, dict[str, str], dict[str, Any], bool] | str:
    """The name of the hash, the hashes by file, whose step they are of (as `_origin`), and whether they are of all
    files; or what is wrong with the list itself.

    Raises:
      ValueError: it is whole, and this version does not know its algorithm.
    """
    damage = f"{path} is damaged: it is not what was written"
    try:
        listed = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return damage
    # Keys are compared too: a changed key must not make the list look like an older version's.
    if not isinstance(listed, dict) or set(listed) - {"digest", _STEP, RUN_KEY} != {"algorithm", "files"}:
        return damage
    if not isinstance(listed["files"], dict):
        return damage
    digest = listed.pop("digest", None)
    if digest is not None and digest != _digest(listed):
        return damage
    if digest is None and (listed["algorithm"] != "sha256" or len(listed) > 2):
        return damage
    if listed["algorithm"] not in _FILE_HASHES:
        known = " or ".join(_FILE_HASHES)
        raise ValueError(f"{path} must have hashes by {known}, got {listed['algorithm']!r}; use a newer version")
    origin = {name: listed[name] for name in (_STEP, RUN_KEY) if name in listed}
    return listed["algorithm"], listed["files"], origin, digest is not None


def give_to(folder: pathlib.Path, run: str) -> None:
    """Says in the hashes of a copied step that it is of another run, by its id. A step without them stays as it is."""
    path = folder / HASHES
    if not path.is_file():
        return
    listed = json.loads(path.read_bytes())
    listed.pop("digest", None)
    listed[RUN_KEY] = run
    path.write_text(json.dumps({**listed, "digest": _digest(listed)}), encoding="utf-8")


def _digest(body: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def set_aside(folder: pathlib.Path) -> pathlib.Path:
    """Renames a damaged step so that no reader takes it for a step. Deletes nothing. Returns the new path."""
    number, path = 1, folder.with_name(folder.name + _DAMAGED)
    while path.exists():
        number += 1
        path = folder.with_name(f"{folder.name}{_DAMAGED}.{number}")
    return folder.rename(path)


def remove_unfinished(checkpoints: pathlib.Path) -> None:
    """Removes the steps that were being written when a run ended. For the process that writes there only."""
    for folder in checkpoints.glob(f"*{UNFINISHED}*"):
        shutil.rmtree(folder)


def folder_size(folder: os.PathLike | str) -> int:
    """Bytes on disk of all files below a folder. Files that are removed meanwhile do not count."""
    total = 0
    for path, _, names in os.walk(folder):  # os.walk passes over folders that vanish
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                status = os.stat(os.path.join(path, name))
                # Whole blocks, because some file systems report too few blocks of a new file at first.
                total += max(status.st_size, status.st_blocks * 512)
    return total


def size_text(num_bytes: float) -> str:
    """A number of bytes as text for messages."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if num_bytes >= factor:
            return f"{num_bytes / factor:.2f} {unit}"
    return f"{num_bytes:.0f} bytes"


def _read_json(path: pathlib.Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} must be a JSON file, but it cannot be read: {error}") from error
