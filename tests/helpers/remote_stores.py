"""A store in memory for tests: the real `Store` over fsspec's memory file system, with its operations counted, and one
of them failing on demand, as a kill would leave things: what comes after it does not happen.
"""

import threading
from typing import Any

import fsspec.implementations.memory

from rl.files.stores import Store

_LOCK = threading.Lock()
_OPERATIONS = ("stats", "read", "write", "upload", "download", "remove", "version", "write_if")


class _MemoryVersions:
    """Each write of an object gives it a new time of creation, which is its version here."""

    def __init__(self, fs: Any):
        self._fs = fs

    def version(self, path: str) -> str | None:
        return str(self._fs.info(path)["created"])

    def write_if(self, path: str, data: bytes, version: str | None) -> str | None:
        with _LOCK:
            now = self.version(path) if self._fs.exists(path) else None
            if now != version:
                return None
            self._fs.pipe_file(path, data)
            return self.version(path)


class CountingStore(Store):
    """A store that lists its operations in `log`, and ends at the one that `fail_at` names, and at all after it."""

    def __init__(self, *arguments: Any):
        super().__init__(*arguments)
        self.log: list[str] = []
        self.uploaded: list[str] = []
        self._last: int | None = None
        self._counting = threading.Lock()

    def fail_at(self, number: int | None) -> None:
        """The operation, counted from 1 from now on, before which everything stops; None: none."""
        self.log.clear()
        self._last = number

    def count(self, operation: str) -> int:
        return self.log.count(operation)

    def before(self, operation: str) -> None:
        with self._counting:
            self.log.append(operation)
            if self._last is not None and len(self.log) >= self._last:
                raise OSError(f"killed at operation {len(self.log)}, {operation}")


def _counted(operation: str):
    def call(self: CountingStore, *arguments: Any, **options: Any) -> Any:
        if operation == "remove":  # an object at a time, with a kill in between
            for name in arguments[0]:
                self.before(operation)
                Store.remove(self, [name])
            return None
        self.before(operation)
        if operation == "upload":
            self.uploaded.append(arguments[1])
        return getattr(Store, operation)(self, *arguments, **options)

    return call


for _operation in _OPERATIONS:
    setattr(CountingStore, _operation, _counted(_operation))


def memory_store(name: str) -> CountingStore:
    """The objects below memory://bucket/NAME, which `clear` empties."""
    fs = fsspec.implementations.memory.MemoryFileSystem(skip_instance_cache=True)
    return CountingStore(f"memory://bucket/{name}", fs, _MemoryVersions(fs))


def clear() -> None:
    """Removes all objects of all stores in memory."""
    fsspec.implementations.memory.MemoryFileSystem.store.clear()
    fsspec.implementations.memory.MemoryFileSystem.pseudo_dirs[:] = [""]
