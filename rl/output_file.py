"""A file that a command writes when its work is done, checked before that work begins.

In: a path, and the option that names it. Out: nothing, or a ValueError. Not here: writing it; nor files that are open
from the start (`rl.completion_file`), nor folders (`rl.models.hf.new_folder`).
"""

import os
import pathlib


def check_writable(path: str | os.PathLike | None, option: str, makes_folders: bool = False) -> None:
    """Refuses a file that could not be written later; writes nothing.

    Args:
      path: None where the option was left out, which is always right.
      option: what the user typed, "--json".
      makes_folders: whether the writer makes the folders above the file that are missing.

    Raises:
      ValueError: a folder, a file in a folder that is missing, or no permission.
    """
    if path is None:
        return
    path = pathlib.Path(path)
    if path.is_dir():
        raise ValueError(f"{option} must be a file to write, got the folder {str(path)!r}; name a file in it")
    folder = next(parent for parent in path.parents if parent.exists()) if makes_folders else path.parent
    if not folder.is_dir():
        raise ValueError(
            f"{option} must be a file in a folder that exists, got {str(path)!r}, where {str(folder)!r} is none; make "
            "it first, or choose another one"
        )
    if not os.access(path if path.exists() else folder, os.W_OK):
        raise ValueError(
            f"{option} must be a file that can be written, got {str(path)!r}, for which this user lacks permission or "
            "the disk is read-only; choose another one"
        )
