"""A JSON-lines file that survives a stop: existing lines are kept, and missing ones can be appended.

In: a path, and the settings that decide the content of its lines. Out: what is there already, and a place to write
more. FILE.meta.json beside FILE holds the settings. A file with other settings is refused, never mixed. Of a completion
only `prompt_index` and `sample_index` are read here.
"""

import contextlib
import fcntl
import json
import os
import pathlib
from collections.abc import Callable
from typing import Any, Self

META_SUFFIX = ".meta.json"  # of the settings beside the file
MAX_NAMED_DIFFERENCES = 5


def _place(row: dict[str, Any]) -> tuple[Any, None]:
    """The key of a completion. KeyError, TypeError or ValueError where the row is none."""
    return (int(row["prompt_index"]), int(row["sample_index"])), None


class CompletionFile:
    """The file, open for appending and owned by this process until `close`.

    Attributes:
      done: the lines in the file by their keys: those of completions by (prompt_index, sample_index), without a value.
      cut: bytes of a half-written last line that were cut off.
    """

    def __init__(
        self,
        path: str | os.PathLike,
        settings: dict[str, Any],
        overwrite: bool = False,
        command: str = "grpo sample",
        read: Callable[[dict[str, Any]], tuple[Any, Any]] = _place,
    ):
        """Opens or creates the file.

        Args:
          settings: everything that decides the content of the lines; JSON-able and flat.
          overwrite: start again, whatever the file holds. The old content stays until the first new line is written.
          command: that writes the file, for messages.
          read: (key, value) of a line, for `done`. KeyError, TypeError or ValueError where a line is another one.

        Raises:
          ValueError: the file cannot be written, another process writes it, it was written with other settings or by
            another program, or a complete line is no completion.
        """
        self._path, self._command, self._read = pathlib.Path(path), command, read
        if not self._path.name:
            raise ValueError(f"--output must be a file that can be written, got {path}, which is a folder")
        self._meta = self._path.with_name(self._path.name + META_SUFFIX)
        self._new_meta = self._path.with_name(self._path.name + META_SUFFIX + ".tmp")
        settings = json.loads(json.dumps(settings))
        try:
            self._is_new = not self._path.exists()
            self._file = _open(self._path)
            self._begin(settings, overwrite)
        except OSError as error:
            raise ValueError(f"--output must be a file that can be written, got {path}: {error}") from error

    def _begin(self, settings: dict[str, Any], overwrite: bool) -> None:
        """Reads the file, and cuts off an incomplete last line."""
        self._starts_again = self._is_new
        try:
            content = b"" if overwrite else self._file.read()
            if content:
                self._check_settings(settings)
            whole = content[: content.rfind(b"\n") + 1]
            self.cut = len(content) - len(whole)
            self.done = dict(self._entry(number, line) for number, line in enumerate(whole.splitlines(), start=1))
            self._starts_again = not content
            if self._starts_again:
                self._new_meta.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
            else:
                self._file.truncate(len(whole))
                self._file.seek(len(whole))
        except BaseException:
            self.close()
            raise

    def write(self, line: str) -> None:
        """Appends one line with its line end, and hands it to the operating system."""
        if self._starts_again:
            # The file is emptied before the settings are replaced, so that a kill leaves no line under wrong settings.
            self._file.truncate(0)
            self._file.seek(0)
            os.replace(self._new_meta, self._meta)
            self._starts_again = False
        self._file.write(line.encode("utf-8"))
        self._file.flush()

    def close(self) -> None:
        """Closes the file. Without a new line, a new file is removed, and one to be overwritten stays as it was."""
        if self._file.closed:
            return
        if self._starts_again:
            with contextlib.suppress(OSError):  # a name that is too long was never there
                self._new_meta.unlink(missing_ok=True)
            if self._is_new:
                self._path.unlink(missing_ok=True)
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _check_settings(self, settings: dict[str, Any]) -> None:
        way_out = "choose another --output, or pass --overwrite to delete it"
        if not self._meta.is_file():
            raise ValueError(
                f"{self._path} must be a file of `{self._command}`, but {self._meta.name} is not beside it; {way_out}"
            )
        try:
            old = json.loads(self._meta.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{self._meta} must be JSON, got: {error}; {way_out}") from error
        keys = [key for key in {**old, **settings} if old.get(key) != settings.get(key)]
        if keys:
            named = [f"{key} was {old.get(key)!r}, is {settings.get(key)!r}" for key in keys[:MAX_NAMED_DIFFERENCES]]
            raise ValueError(
                f"{self._path} was written with other settings: {'; '.join(named)}; {way_out}, or restore the old ones "
                "to go on with it"
            )

    def _entry(self, number: int, line: bytes) -> tuple[Any, Any]:
        try:
            return self._read(json.loads(line))
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"{self._path}:{number} must be a line of `{self._command}`, got {line[:80]!r}; remove the line, or "
                "pass --overwrite"
            ) from error


def _open(path: pathlib.Path) -> Any:
    """The file, open for reading and writing, locked until it is closed."""
    if path.exists() and not path.is_file():
        kind = "folder" if path.is_dir() else "device or a pipe"
        raise ValueError(f"--output must be a file that can be written, got {path}, which is a {kind}")
    path.parent.mkdir(parents=True, exist_ok=True)
    file = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, 0o644), "r+b")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        file.close()
        raise ValueError(f"--output {path} is being written by another process; choose another one") from error
    return file
