"""Output files of a command, checked before its work begins, and errors of a full or broken disk as a user's error.

In: a path and the option that names it, or an error of the system or of a library that writes. Out: nothing, or a
ValueError. Not here: the writing itself, files that are open from the start (`rl.tools.samples.completion_file`),
folders (`rl.models.files.folders.new_folder`).
"""

import contextlib
import errno
import os
import pathlib
import re
from collections.abc import Iterator

from rl.files.stores import check_path, is_remote

_OF_THE_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EFBIG, errno.EROFS)
_NUMBER = re.compile(r"os_error_code='(\d+)'|\(os error (\d+)\)")  # in the messages of tensorstore and of safetensors


@contextlib.contextmanager
def writing(path: str | os.PathLike) -> Iterator[None]:
    """A context in which `path` is written.

    Raises:
      ValueError: the disk is full or broken. Other errors pass.
    """
    try:
        yield
    except Exception as error:
        reason = disk_trouble(error)
        if reason is None:
            raise
        raise ValueError(
            f"{path} could not be written: {reason}; make room or choose another disk, then start the same command "
            "again"
        ) from error


def disk_trouble(error: Exception) -> str | None:
    """The system's own words for an error of a full or broken disk; None for every other error."""
    number = error.errno if isinstance(error, OSError) else None
    if number is None and (found := _NUMBER.search(str(error))):
        number = int(found[1] or found[2])
    return os.strerror(number) if number in _OF_THE_DISK else None


def check_writable(path: str | os.PathLike | None, option: str, makes_folders: bool = False) -> None:
    """Refuses a file that could not be written later; writes nothing.

    Args:
      path: None where the option was left out; nothing is checked then.
      option: what the user typed, "--json".
      makes_folders: whether the writer makes missing folders above the file.

    Raises:
      ValueError: the path is a folder, its folder is missing, or there is no permission to write.
    """
    if path is None:
        return
    check_path(os.fspath(path), option, may_be_remote=True)
    if is_remote(path):
        return  # whether it can be written is seen when it is
    path = pathlib.Path(path)
    if path.is_dir():
        raise ValueError(f"{option} must be a file to write, got the folder {str(path)!r}; name a file in it")
    folder = next(parent for parent in path.parents if parent.exists()) if makes_folders else path.parent
    if not folder.is_dir():
        raise ValueError(
            f"{option} must be a file in a folder that exists, got {str(path)!r}, and {str(folder)!r} is no folder; "
            "make it first, or choose another one"
        )
    if not os.access(path if path.exists() else folder, os.W_OK):
        raise ValueError(
            f"{option} must be a file that can be written, got {str(path)!r}, for which this user lacks permission or "
            "the disk is read-only; choose another one"
        )
