"""Frames between the runner and its workers: an 8-byte length, then JSON.

JSON and not pickle: what a worker sends, where a user's code runs, can never execute anything in the trainer. How the
runner reads what comes from there is in `rewards.replies`. Values that JSON lacks (bytes, dates, decimals) are tagged,
so that a reward function gets the type the dataset holds.
"""

import base64
import datetime
import decimal
import json
import struct
from collections.abc import Mapping
from typing import Any

HEADER = struct.Struct(">Q")
# Bound here, before any of a user's code runs: what that patches in `json` does not reach a worker's replies.
_dumps = json.JSONEncoder().encode

_TAG = "__tandem_type__"


def encode(value: Any, where: str) -> Any:
    """The JSON form of a value: tuples become lists, arrays and numpy scalars become lists and numbers.

    Raises ValueError, naming `where`, for a type that has no such form.
    """
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, (list, tuple)):
        return [encode(item, where) for item in value]
    if isinstance(value, Mapping):
        if not all(isinstance(key, str) for key in value):
            raise ValueError(
                f"{where}: keys of a mapping must be strings to reach a reward function; convert them in the dataset"
            )
        plain = {key: encode(item, where) for key, item in value.items()}
        # A cell of the data set may hold the tag itself: as pairs, it is no object that `decode` would take for tagged.
        return {_TAG: "mapping", "value": [[key, item] for key, item in plain.items()]} if _TAG in plain else plain
    if isinstance(value, bytes):
        return {_TAG: "bytes", "value": base64.b64encode(value).decode("ascii")}
    if isinstance(value, decimal.Decimal):
        return {_TAG: "decimal", "value": str(value)}
    if isinstance(value, datetime.datetime):
        return {_TAG: "datetime", "value": value.isoformat()}
    if isinstance(value, datetime.date):
        return {_TAG: "date", "value": value.isoformat()}
    if hasattr(value, "tolist"):  # numpy arrays and scalars, without importing numpy
        return encode(value.tolist(), where)
    raise ValueError(
        f"{where}: a value of type {type(value).__name__} cannot be handed to a reward function; "
        "use numbers, strings, lists or mappings, or leave that column out"
    )


def decode(value: dict[str, Any]) -> Any:
    """`json.loads` object hook: turns the tagged values of `encode` back."""
    kind = value.get(_TAG)
    if not isinstance(kind, str):  # a column may have that name, too; its values are a list
        return value
    text = value["value"]
    if kind == "mapping":
        return dict(text)
    if kind == "bytes":
        return base64.b64decode(text)
    if kind == "decimal":
        return decimal.Decimal(text)
    return (datetime.datetime if kind == "datetime" else datetime.date).fromisoformat(text)


def pack(message: Mapping[str, Any]) -> bytes:
    """One frame."""
    body = _dumps(message).encode("ascii")
    return HEADER.pack(len(body)) + body


def unpack(buffer: bytearray) -> list[dict[str, Any]]:
    """Take the complete requests off the front of `buffer` (which is shortened in place)."""
    messages = []
    start = 0
    while len(buffer) - start >= HEADER.size:
        end = start + HEADER.size + HEADER.unpack_from(buffer, start)[0]
        if len(buffer) < end:
            break
        messages.append(json.loads(bytes(buffer[start + HEADER.size : end]), object_hook=decode))
        start = end
    del buffer[:start]
    return messages
