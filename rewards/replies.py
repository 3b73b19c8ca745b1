"""Reads a worker's replies without trusting them.

In: bytes from a worker's pipe, into which a user's code can write too, and the request. Out: typed replies. Anything
that is no reply to the request raises `BrokenWorker`. Nothing here takes more than a frame of `MAX_FRAME` bytes. Texts
are cut to one line of at most `MAX_TEXT` bytes. A well-formed reply to the request is taken: what a function does to
its own rewards inside its own worker cannot be seen from here.

    {"nonce": n, "op": "loaded", "style", "is_async", "calls", "columns", "replacing",
        "takes_completion_ids", "needs_completion_ids", "takes_group", "tries_rows"}
    {"nonce": n, "op": "refused", "error"}
    {"nonce": n, "op": "result", "index", "value", "kind", "message", "logged", "sums", "seconds", "retries",
        "trace"}
    {"nonce": n, "op": "done", "kind", "message", "seconds", "retries", "trace"}
"""

import dataclasses
import json
import math
from collections.abc import Collection, Iterator, Mapping
from typing import Any, Never, get_args

from rewards.contract import Calls, Style
from rewards.logged import Sums, read_logged, read_sums
from rewards.protocol import HEADER

MAX_FRAME = 1 << 20  # bytes
MAX_TEXT = 4096  # bytes of UTF-8
MAX_SECONDS, MAX_RETRIES = 1e9, 1 << 31  # of one call
MAX_REWARD = 1e6  # the largest size of a reward, so that squares and sums stay finite everywhere
UNREACHABLE = "exception", "Unreachable"  # kind and first word of the failure by `rewards.retrying.Unreachable`
FAILURES = ("exception", "timeout", "crash", "wrong_length", "not_a_number", "out_of_range")

Failure = tuple[str, str]  # one of FAILURES, message


class BrokenWorker(Exception):
    """A worker sent something that is no reply to its request."""


@dataclasses.dataclass(frozen=True)
class LoadedFunction:
    """A worker's description of a function that it loaded."""

    style: Style
    is_async: bool
    calls: Calls | None
    columns: tuple[str, ...]
    replacing: tuple[str, ...]
    takes_completion_ids: bool
    needs_completion_ids: bool
    takes_group: bool
    tries_rows: bool


@dataclasses.dataclass(frozen=True)
class Refused:
    """The function does not load."""

    error: str


@dataclasses.dataclass(frozen=True)
class Result:
    """The reward of one sample: a finite number within MAX_REWARD, None, or a failure.

    index: position among the samples of the task. logged: what the function keeps with the sample, see
      `rewards.logged`. sums: the metrics of the call; a call for several samples tells them with the first.
    seconds: what the call took, with its retries. retries: how often it was made again. A call for several samples
      tells both at its end. trace: the traceback of a failure, where it is the worker's first of its sort, or all were
      asked for.
    """

    index: int
    value: float | None
    failure: Failure | None
    logged: dict[str, Any] = dataclasses.field(default_factory=dict)
    sums: Sums = dataclasses.field(default_factory=dict)
    seconds: float = 0.0
    retries: int = 0
    trace: str = ""


@dataclasses.dataclass(frozen=True)
class Done:
    """The task is over; a call for several samples may have failed as a whole. seconds, retries, trace: of such a call,
    as in `Result`.
    """

    failure: Failure | None
    seconds: float = 0.0
    retries: int = 0
    trace: str = ""


Reply = LoadedFunction | Refused | Result | Done


class ReplyReader:
    """Splits the bytes of one worker into frames."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes) -> None:
        """Adds bytes that have arrived."""
        self._buffer += data

    def frames(self) -> Iterator[bytes]:
        """Complete frames, without their lengths; BrokenWorker for one that claims to be longer than MAX_FRAME."""
        while len(self._buffer) >= HEADER.size:
            (length,) = HEADER.unpack_from(self._buffer)
            if length > MAX_FRAME:
                raise BrokenWorker(f"a message of {length} bytes, over the limit of {MAX_FRAME}")
            if len(self._buffer) < HEADER.size + length:
                return
            frame = bytes(self._buffer[HEADER.size : HEADER.size + length])
            del self._buffer[: HEADER.size + length]
            yield frame


def read_load_reply(frame: bytes, nonce: str, columns: Collection[str]) -> LoadedFunction | Refused:
    """The reply to a request to load a function of a data set with these columns; else BrokenWorker."""
    fields = _fields(frame, nonce)
    if fields["op"] == "refused":
        check_fields(fields, {"error": str})
        return Refused(one_line(fields["error"]))
    if fields["op"] != "loaded":
        raise BrokenWorker(f"the operation {shown(fields['op'])} where a function was to be loaded")
    lists = ("columns", "replacing")
    flags = ("is_async", "takes_completion_ids", "needs_completion_ids", "takes_group", "tries_rows")
    check_fields(
        fields, {**dict.fromkeys(flags, bool), "style": str, "calls": (str, type(None)), **dict.fromkeys(lists, list)}
    )
    if fields["style"] not in get_args(Style):
        raise BrokenWorker(f"the style {shown(fields['style'])}")
    if fields["calls"] not in (*get_args(Calls), None):
        raise BrokenWorker(f"the way to be called {shown(fields['calls'])}")
    for read in (fields[name] for name in lists):
        if not all(isinstance(name, str) and name in columns for name in read) or len({*read}) < len(read):
            raise BrokenWorker(f"columns that are not the data set's: {shown(read)}")
    told: dict[str, Any] = {name: fields[name] for name in ("style", "calls", *flags)}
    told |= {name: tuple(fields[name]) for name in lists}
    return LoadedFunction(**told)


def read_run_reply(frame: bytes, nonce: str, size: int) -> Result | Done:
    """A reply to a request to run a function on `size` samples; else BrokenWorker."""
    fields = _fields(frame, nonce)
    if fields["op"] == "done":
        return Done(_failure(fields, _EFFORT), *_effort(fields))
    if fields["op"] != "result":
        raise BrokenWorker(f"the operation {shown(fields['op'])} where a function was run")
    failure = _failure(fields, {"index": int, "value": (float, type(None)), "logged": dict, "sums": dict, **_EFFORT})
    index, value, logged, sums = (
        fields["index"],
        fields["value"],
        read_logged(fields["logged"]),
        read_sums(fields["sums"]),
    )
    if not 0 <= index < size:
        raise BrokenWorker(f"a reward for sample {index} of {size}")
    if logged is None or sums is None:
        raise BrokenWorker(f"logged values that are none: {shown(fields['logged'])}, {shown(fields['sums'])}")
    if value is not None and (failure is not None or not math.isfinite(value)):
        raise BrokenWorker(f"the reward {value} with the failure {failure}")
    if value is not None and abs(value) > MAX_REWARD:
        rule = f"a reward must be within {MAX_REWARD:g} of 0; scale it down, and raise the function's weight instead"
        return Result(index, None, ("out_of_range", f"returned {value:g}, {rule}"), logged, sums, *_effort(fields))
    return Result(index, value, failure, logged, sums, *_effort(fields))


def one_line(text: str, limit: int = MAX_TEXT) -> str:
    """A text that is safe to show: on one line, without control characters, cut to `limit` bytes, saying so."""
    kept, size, used = [], 0, 0
    for character in text:
        written = character if character.isprintable() else character.encode("unicode_escape").decode("ascii")
        size += len(written.encode())
        if size > limit - _CUT_NOTE:
            break
        kept.append(written)
        used += 1
    if used == len(text):
        return "".join(kept)
    return f"{''.join(kept)}... ({len(text) - used} more characters were cut)"


_CUT_NOTE = 64  # bytes
_EFFORT = {"seconds": float, "retries": int, "trace": str}


def _fields(frame: bytes, nonce: str) -> dict[str, Any]:
    """The fields of a reply to the request with this nonce."""
    fields = read_fields(frame)
    if fields.get("nonce") != nonce:
        raise BrokenWorker(f"a reply to something else than it was asked: {shown(frame)}")
    return fields


def read_fields(frame: bytes) -> dict[str, Any]:
    """The fields of a message with an operation; else BrokenWorker."""
    try:
        fields = _read_json(frame.decode("ascii"))
    except (ValueError, RecursionError) as error:
        raise BrokenWorker(f"what is no JSON ({type(error).__name__}: {error}): {shown(frame)}") from error
    if not isinstance(fields, dict) or not isinstance(fields.get("op"), str):
        raise BrokenWorker(f"what is no message: {shown(frame)}")
    return fields


def _effort(fields: dict[str, Any]) -> tuple[float, int, str]:
    """Seconds, retries and traceback of a call; BrokenWorker for numbers that no call can have."""
    seconds, retries = fields["seconds"], fields["retries"]
    if not 0 <= seconds <= MAX_SECONDS or not 0 <= retries <= MAX_RETRIES:
        raise BrokenWorker(f"a call of {shown(seconds)} seconds that was made again {shown(retries)} times")
    return seconds, retries, "\n".join(one_line(line) for line in fields["trace"].splitlines())


def _no_constant(name: str) -> Never:
    raise ValueError(f"{name} is no number")


_read_json = json.JSONDecoder(parse_constant=_no_constant).decode  # one decoder: making one takes longer than a reply


def check_fields(fields: dict[str, Any], types: Mapping[str, type | tuple[type, ...]]) -> None:
    """Raises BrokenWorker unless the fields are these, and nonce and op, of exactly these types (a bool is no int)."""
    if fields.keys() != {*types, "nonce", "op"}:
        raise BrokenWorker(f"a message with the fields {shown(sorted(fields))}")
    for name, wanted in types.items():
        if type(fields[name]) not in (wanted if isinstance(wanted, tuple) else (wanted,)):
            raise BrokenWorker(f"a message whose field {name} is {shown(fields[name])}")


def _failure(fields: dict[str, Any], others: Mapping[str, type | tuple[type, ...]] | None = None) -> Failure | None:
    text = (str, type(None))
    check_fields(fields, {"kind": text, "message": text, **(others or {})})
    kind, message = fields["kind"], fields["message"]
    if kind is None and message is None:
        return None
    if kind not in FAILURES or message is None:
        raise BrokenWorker(f"a failure of the kind {shown(kind)}")
    return kind, one_line(message)


def shown(value: Any) -> str:
    """A value from a worker as it is safe to show: short, and on one line."""
    text = repr(value)
    return one_line(text if len(text) <= 80 else f"{text[:77]}...")
