"""What runs in an interpreter of `sandbox: process`, and the literals that cross between interpreters.

In: requests, one JSON line each. Out: one JSON line each. The parent (`rewards.code_sandbox`) believes nothing of what
comes back but that it is a literal: the program under test lives in the same interpreter as this module, and may write
any answer it likes, which can only be its own answer.

This file is given to `python -c` as text, so it imports nothing but the standard library.
"""

import json
from typing import Any

_MARKS = {list: "l", tuple: "t", set: "s", frozenset: "f"}
_KINDS = {mark: kind for kind, mark in _MARKS.items()}
_MAX_DEPTH = 100
MAX_BYTES = 1 << 22  # of a literal in JSON


class NotLiteralError(Exception):
    """A value that is no literal, so that it cannot leave its interpreter."""


def literal(value: Any, depth: int = _MAX_DEPTH) -> Any:
    """A copy of a value made of None, bool, int, float, complex, str, bytes, list, tuple, set, frozenset and dict.

    Subclasses of these are no literals, but for a named tuple and the mappings that `collections` derives from dict,
    which equal a plain one. Raises NotLiteralError for anything else, for more than 4 MB, and below 100 levels.
    """
    form = encode(value, depth)
    if len(dumps(form)) > MAX_BYTES:
        raise NotLiteralError("a value of more than 4 MB")
    return decode(form)


def encode(value: Any, depth: int = _MAX_DEPTH) -> Any:
    """The JSON form of a literal. Raises NotLiteralError as `literal` does."""
    kind = type(value)
    if value is None or kind in (bool, float, str):
        return value
    if kind is int:
        return value if value.bit_length() < 64 else ["i", hex(value)]
    if kind is bytes:
        return ["b", value.hex()]
    if kind is complex:
        return ["c", value.real, value.imag]
    if depth == 0:
        raise NotLiteralError("a value of more than 100 levels")
    if kind in _MARKS:
        return [_MARKS[kind], [encode(item, depth - 1) for item in value]]
    if isinstance(value, tuple) and hasattr(kind, "_fields"):
        return ["t", [encode(item, depth - 1) for item in tuple(value)]]
    if isinstance(value, dict) and (kind is dict or kind.__module__ == "collections"):
        pairs = dict.items(value)
        return ["d", [[encode(key, depth - 1), encode(item, depth - 1)] for key, item in pairs]]
    raise NotLiteralError(f"a value of the type {kind.__name__[:50]!r}")


def decode(form: Any) -> Any:
    """The literal of a JSON form. Raises NotLiteralError for what `encode` does not give."""
    if not isinstance(form, list):
        if form is None or type(form) in (bool, int, float, str):
            return form
        raise NotLiteralError("a broken answer")
    try:
        match form:
            case ["i", text]:
                return int(text, 16)
            case ["b", text]:
                return bytes.fromhex(text)
            case ["c", real, imag]:
                return complex(real, imag)
            case ["d", pairs]:
                return {decode(key): decode(item) for key, item in pairs}
            case [str(mark), items] if mark in _KINDS:
                return _KINDS[mark]([decode(item) for item in items])
    except (TypeError, ValueError) as error:
        raise NotLiteralError("a broken answer") from error
    raise NotLiteralError("a broken answer")


def dumps(form: Any) -> bytes:
    """A JSON line."""
    return json.dumps(form).encode() + b"\n"
