"""JSON files that others wrote, read field by field. A value of a wrong type or range is refused by its name.

In: a file, or an object of one. Out: plain values of the type that was asked for, or a ValueError that names the file
and the field. Nothing is converted: a number in quotes is text, true is no number, and NaN is none either.
"""

import json
import math
import pathlib
import stat
from collections.abc import Collection, Mapping
from typing import Any

MAX_FILE_BYTES = 100_000_000
_SHOWN = 120  # characters of a value in a message
_SHOWN_ERROR = 400  # of what a library says
_MISSING: Any = object()
_KINDS = {
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def read_object(path: pathlib.Path, missing: str = "check the path") -> dict[str, Any]:
    """The object in a JSON file.

    Args:
      missing: what to do when there is no such file.

    Raises:
      ValueError: the file is missing, larger than `MAX_FILE_BYTES`, or not JSON.
    """
    try:
        check_is_file(path)
        size = path.stat().st_size
        if size > MAX_FILE_BYTES:
            raise ValueError(
                f"{path} must be a JSON file of at most {MAX_FILE_BYTES} bytes, got {size}; fetch it again"
            )
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ValueError(f"{path} must exist, but it does not; {missing}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(
            f"{path} must be a JSON file, but it cannot be read: {briefly(error)}; fetch it again"
        ) from error
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:  # numbers of thousands of digits, lists in lists in lists
        raise ValueError(f"{path} must be valid JSON: {briefly(error)}; fetch it again") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} must hold a JSON object, got {type(value).__name__}")
    return value


def check_is_file(path: pathlib.Path) -> None:
    """Refuses a pipe, a socket or a device, because reading one may never end. A missing path is not refused here.

    Raises:
      ValueError: the path is neither a file nor a folder; links are followed.
    """
    try:
        mode = path.stat().st_mode
    except OSError:
        return
    if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
        raise ValueError(f"{path} must be a file, got {_KINDS.get(stat.S_IFMT(mode), 'something else')}; remove it")


def check_files(folder: pathlib.Path) -> None:
    """Calls `check_is_file` for every entry of a folder, before any of them is read.

    Raises:
      ValueError: an entry is neither a file nor a folder.
    """
    for path in sorted(folder.iterdir()):
        check_is_file(path)


def shown(value: object) -> str:
    """A value as text for a message; a long one is cut."""
    text = repr(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}... ({len(text)} characters)"


def briefly(error: object) -> str:
    """An error of a library as text for a message. Some repeat all of their input, so a long text is cut."""
    text = str(error)
    return text if len(text) <= _SHOWN_ERROR else f"{text[:_SHOWN_ERROR]}... ({len(text)} characters)"


class Fields:
    """The fields of a JSON object. A missing key and a null one both give the default, if there is one.

    Attributes:
      values: the object.
      prefix: stands before the names of its fields in messages, "rope_scaling." for instance.
    """

    def __init__(self, values: Mapping[str, Any], prefix: str = "") -> None:
        self.values = values
        self.prefix = prefix

    def has(self, key: str) -> bool:
        """Whether the key is there and not null."""
        return self.values.get(key) is not None

    def whole(self, key: str, least: int, most: int, default: Any = _MISSING) -> Any:
        """A whole number from `least` to `most`."""
        value = self._value(key, default)
        if value is default:
            return value
        if not _is_whole(value) or not least <= value <= most:
            raise self._error(key, f"a whole number from {least} to {most}", value)
        return value

    def number(self, key: str, least: float, most: float, default: Any = _MISSING) -> Any:
        """A finite number from `least` to `most`, as a float."""
        value = self._value(key, default)
        if value is default:
            return value
        if not _is_number(value) or not least <= value <= most:
            raise self._error(key, f"a number from {least:g} to {most:g}", value)
        return float(value)

    def flag(self, key: str, default: Any = _MISSING) -> Any:
        """True or false."""
        value = self._value(key, default)
        if not isinstance(value, bool):
            raise self._error(key, "true or false", value)
        return value

    def text(self, key: str, default: Any = _MISSING) -> Any:
        """Text."""
        value = self._value(key, default)
        if value is not default and not isinstance(value, str):
            raise self._error(key, "text", value)
        return value

    def choice(self, key: str, choices: Collection[str], default: Any = _MISSING) -> Any:
        """One of some texts."""
        value = self._value(key, default)
        if not isinstance(value, str) or value not in choices:
            raise self._error(key, f"one of {', '.join(choices)}", value, ", which is not supported")
        return value

    def texts(self, key: str, default: Any = _MISSING) -> Any:
        """A list of texts."""
        value = self._value(key, default)
        if value is not default and (not isinstance(value, list) or not all(isinstance(item, str) for item in value)):
            raise self._error(key, "a list of texts", value)
        return value

    def wholes(self, key: str, least: int, most: int) -> list[int]:
        """A list of whole numbers, or one of them; [] without the key."""
        value = self._value(key, [])
        values = value if isinstance(value, list) else [value]
        if not all(_is_whole(item) and least <= item <= most for item in values):
            raise self._error(key, f"a whole number from {least} to {most} or a list of such", value)
        return values

    def section(self, key: str) -> "Fields":
        """An object, {} without the key."""
        value = self._value(key, {})
        if not isinstance(value, dict):
            raise self._error(key, "an object", value)
        return Fields(value, f"{self.prefix}{key}.")

    def sections(self, key: str) -> list["Fields"]:
        """A list of objects, [] without the key."""
        value = self._value(key, [])
        if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
            raise self._error(key, "a list of objects", value)
        return [Fields(item, f"{self.prefix}{key}[{i}].") for i, item in enumerate(value)]

    def refuse(self, key: str, rule: str) -> ValueError:
        """The error for a value that breaks a rule of the caller."""
        return self._error(key, rule, self.values.get(key))

    def _value(self, key: str, default: Any) -> Any:
        value = self.values.get(key)
        return default if value is None and default is not _MISSING else value

    def _error(self, key: str, rule: str, value: object, end: str = "") -> ValueError:
        return ValueError(f"{self.prefix}{key} must be {rule}, got {shown(value)}{end}")


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # a whole number beyond what a float holds
        return False
