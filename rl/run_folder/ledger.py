"""The list of what a run has uploaded to a store: an object, `uploads.json`, with the run's id and the names.

In: a store. Out: `Ledger`. A name is listed before its object is written, and dropped after its object is removed, so
after a kill the list still covers every object of the run. An object that is not listed is somebody else's: it is never
replaced or removed, and belongs to no step.
"""

import json
from collections.abc import Iterable

from rl.files.stores import Store, check_name

LEDGER = "uploads.json"


class Ledger:
    """The names that a run may write in a store.

    Attributes:
      run: id of the run.
      files: the names. is_new: whether the store has no ledger yet. The first `claim` writes it.
    """

    def __init__(self, store: Store, run: str, files: Iterable[str] = (), version: str | None = None):
        self.run, self.files = run, frozenset(files)
        self._store, self._version = store, version

    @property
    def is_new(self) -> bool:
        return self._version is None

    def claim(self, names: Iterable[str]) -> None:
        """Adds names that the run is about to write.

        Raises:
          ValueError: an object that the run did not write has one of these names, or another process changed the
            ledger.
        """
        new = frozenset(names) - self.files
        if not new:
            return
        if strange := sorted(new & self._store.stats().keys()):
            raise ValueError(
                f"{self._store.url}/{strange[0]} must be free for an upload of this run, and there is an object that "
                "no upload of it wrote; move that away, then start the same command again"
            )
        self._write(self.files | new)

    def forget(self, names: Iterable[str]) -> None:
        """Drops names whose objects were removed. ValueError where another process changed the ledger."""
        left = self.files - frozenset(names)
        if left != self.files:
            self._write(left)

    def _write(self, files: frozenset[str]) -> None:
        data = f"{json.dumps({'run': self.run, 'files': sorted(files)}, indent=1)}\n".encode()
        version = self._store.write_if(LEDGER, data, self._version)
        if version is None:
            # A write whose answer was lost, and that was repeated, has been made all the same.
            version = self._store.version(LEDGER)
            if self._store.read(LEDGER) != data:
                raise ValueError(
                    f"{self._store.url}/{LEDGER} was changed by another process, so this run stops before two write to "
                    "one folder; see that no other run has this output_dir, then start the same command again"
                )
        self._version, self.files = version, files


def read_ledger(store: Store) -> Ledger | None:
    """The ledger in a store; None where there is none. ValueError where the object is no ledger."""
    version = store.version(LEDGER)  # read before the content, so that a change in between is not overwritten
    content = store.read(LEDGER)
    if version is None or content is None:
        return None
    try:
        fields = json.loads(content)
        run, files = fields["run"], fields["files"]
        if not isinstance(run, str) or not isinstance(files, list) or not all(isinstance(file, str) for file in files):
            raise TypeError("a run's id and names are texts")
        for file in files:
            check_name(file, store.url)
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(
            f"{store.url}/{LEDGER} must list what a run uploaded, got {content[:80]!r}; choose another output_dir"
        ) from error
    return Ledger(store, run, files, version)
