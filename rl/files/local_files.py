"""Files on a local disk: written whole, hashed, and locked by one process at a time.

In: paths. Out: files that are written whole or left as they were, hashes of contents, locks. Not here: which files a
run has (`rl.run_folder.contents`), objects of a store (`rl.files.stores`).
"""

import contextlib
import fcntl
import hashlib
import os
import pathlib
from typing import Any

from rl.files.output_file import writing

UNFINISHED = ".tandem-"  # begins the name of a file that is being written, and is nothing without its end


def write_file(path: pathlib.Path, content: bytes) -> None:
    """Writes a file whole, or leaves it as it was. ValueError where the disk is full or broken."""
    draft = path.with_name(UNFINISHED + path.name)
    with writing(path):
        draft.unlink(missing_ok=True)  # left by a start that was stopped; a link must not be followed
        with draft.open("xb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(draft, path)


def file_hash(path: pathlib.Path, digest: Any = hashlib.sha256) -> str:
    """The hash of a file in hex. The file is read piece by piece."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, digest).hexdigest()


def lock_file(path: pathlib.Path, in_use: str) -> int:
    """The descriptor of a lock file, which is made if missing. The lock ends when the descriptor is closed or the
    process ends.

    Args:
      in_use: the message where another process holds the lock.

    Raises:
      ValueError: another process holds the lock. OSError: the file cannot be made.
    """
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(handle)
            raise ValueError(in_use) from error
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(handle), os.stat(path)):
                return handle
        os.close(handle)  # its holder has removed it meanwhile
