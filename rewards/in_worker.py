"""What every worker process does, whatever it is for: its pipes, and the care for code of the user.

In: the pipes of this process, and what code of the user returns or raises. Out: requests, replies, rewards that are
numbers, and failures in a line of text. Not here: what is asked and answered (`rewards.worker`,
`rewards.environment_worker`).
"""

import faulthandler
import os
import signal
import sys
import sysconfig
import traceback
from collections.abc import Callable, Collection
from math import isfinite  # by name, before a user's code can replace it
from time import monotonic, sleep  # likewise
from typing import Any, BinaryIO

from rewards.logged import number_of, shortened
from rewards.protocol import HEADER, unpack
from rewards.replies import MAX_TEXT, UNREACHABLE, Failure, one_line
from rewards.retrying import Unreachable
from rewards.worker_variables import missing_variable

# How long a hung worker may outlive its time limit, or a busy one its parent, before it ends itself.
_ORPHAN_SECONDS = 5.0
_SHARED_SECONDS = 1.0  # in which calls may begin that share one watchdog

_MAX_TRACEBACK = 1 << 14  # characters in the log
_LIBRARIES = tuple(
    {sysconfig.get_path(name) + os.sep for name in ("stdlib", "platstdlib", "purelib", "platlib")}
    | {os.path.dirname(os.__file__) + os.sep}
)


class Rejected(Exception):
    """A function returned something that is not what it must."""

    def __init__(self, kind: str, message: str):
        super().__init__(message)
        self.kind = kind


def as_reward(value: Any) -> float | None:
    """The reward that a function's return value stands for: None, or a finite float.

    Anything with `__float__` counts (bool, int, numpy and torch scalars, Decimal). Text, complex numbers and containers
    do not, also where numpy gives them a `__float__`. How large it may be is the runner's rule.
    """
    if value is None:
        return None
    number = number_of(value)
    if number is None:
        raise Rejected("not_a_number", f"returned {short(value)}, a reward must be a number or None")
    if not isfinite(number):
        raise Rejected("not_a_number", f"returned {number}, a reward must be finite")
    return number


def claim_pipes() -> tuple[BinaryIO, BinaryIO]:
    """Keep the pipes for the protocol, and leave user code an empty stdin and a stdout that goes to the log."""
    requests = os.fdopen(os.dup(0), "rb", buffering=0)
    replies = os.fdopen(os.dup(1), "wb", buffering=0)
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.close(null)
    os.dup2(2, 1)
    sys.stdout = os.fdopen(1, "w", buffering=1, closefd=False, errors="backslashreplace")
    return requests, replies


def survive_signals() -> None:
    """Leave it to the runner when this worker ends, and show the stack where it asks for it."""
    # Ctrl-C in a terminal reaches the whole process group; the runner decides when a worker ends.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    faulthandler.enable()
    # The runner sends this signal before it kills a hung worker: the log then shows where it hung, in C code too.
    faulthandler.register(signal.SIGUSR1, all_threads=False)


def read_requests(requests: BinaryIO, take: Callable[[dict[str, Any] | None], Any]) -> None:
    """Hand on requests until there will be no more, then None. What is busy then has `_ORPHAN_SECONDS` left."""
    buffer = bytearray()
    try:
        while chunk := os.read(requests.fileno(), 1 << 20):
            buffer += chunk
            if len(buffer) >= HEADER.size:
                for message in unpack(buffer):
                    take(message)
    finally:
        # The parent closed the pipe, or is gone; or a request cannot be read. No request will come any more: a worker
        # that ends is noticed and replaced, one that waited for ever would cost the time limit of every call.
        take(None)
    sleep(_ORPHAN_SECONDS)
    _end_process_group()


def _end_process_group() -> None:
    """End this process and what user code started, where the runner gave it a process group of its own."""
    if os.getpgrp() == os.getpid():
        os.killpg(os.getpid(), signal.SIGKILL)
    os._exit(1)


class Errors:
    """What is told of errors of the user's code: a traceback once per kind of error and place.

    callers: the files of this package that call the user's code. called: those that the user's code calls. No place
      of an error is in either.

    Attributes:
      trace: of the last error. is_new: whether it is the first of its kind and place.
    """

    def __init__(self, callers: Collection[str], called: Collection[str] = ()):
        self._callers, self._own_files = callers, {*callers, *called}
        self._seen: set[tuple[str, str]] = set()
        self.trace, self.is_new = "", False

    def failure(self, error: BaseException) -> Failure:
        """Kind and one-line message of a failure."""
        self.trace, self.is_new = "", False
        if isinstance(error, Rejected):
            return error.kind, str(error)
        if isinstance(error, Unreachable):
            return UNREACHABLE[0], f"{UNREACHABLE[1]}: {one_line(str(error), MAX_TEXT // 2)}"
        last_line = traceback.format_exception_only(error)[-1].strip()
        place, trace = self._place(error), self._own_trace(error)
        self.is_new = (type(error).__name__, place) not in self._seen
        self._seen.add((type(error).__name__, place))
        self.trace = trace
        return "exception", f"{one_line(last_line, MAX_TEXT // 2)} ({place}){missing_variable(error)}"

    def _place(self, error: BaseException) -> str:
        """File and line of an error: the last that is not in a library, so that it is the function's own where that
        calls one; for a function that is in a library itself, the last at all.
        """
        frames = traceback.extract_tb(error.__traceback__)
        in_python = [f for f in frames if not f.filename.startswith("<frozen ") and f.filename not in self._own_files]
        of_user = [f for f in in_python if not f.filename.startswith(_LIBRARIES)]
        last = (of_user or in_python or frames)[-1]
        return f"{os.path.basename(last.filename)}:{last.lineno}"

    def _own_trace(self, error: BaseException) -> str:
        """The traceback of an error from the first line of the user's own code on, cut to `_MAX_TRACEBACK`."""
        frame = own = error.__traceback__
        while frame is not None:
            if frame.tb_frame.f_code.co_filename in self._callers:
                own = frame.tb_next
            frame = frame.tb_next
        trace = "".join(traceback.format_exception(type(error), error, own))
        more = len(trace) - _MAX_TRACEBACK
        return trace if more <= 0 else f"{trace[:_MAX_TRACEBACK]}... ({more} more characters were cut)\n"


class Watchdog:
    """Ends this process if a call takes much longer than the runner allows.

    The runner kills a hung worker in time; this is for a worker whose runner is gone. It needs no interpreter lock,
    so that a hang in C code ends too. Setting it starts a thread, which takes longer than most calls do, so calls that
    follow each other closely share one.
    """

    def __init__(self) -> None:
        self._limit, self._set_at = 0.0, 0.0

    def watch(self, limit: float) -> None:
        """For a call of at most `limit` seconds that begins now."""
        now = monotonic()
        if limit != self._limit or now - self._set_at > _SHARED_SECONDS:
            faulthandler.dump_traceback_later(limit + _SHARED_SECONDS + _ORPHAN_SECONDS, exit=True)
            self._limit, self._set_at = limit, now

    def rest(self) -> None:
        """Nothing is called any more."""
        faulthandler.cancel_dump_traceback_later()
        self._limit = 0.0


def write_frame(replies: BinaryIO, frame: bytes) -> None:
    """Write all of a frame, however little the pipe takes at a time."""
    left = memoryview(frame)
    while left:
        left = left[os.write(replies.fileno(), left) :]


def short(value: Any) -> str:
    """Type and beginning of a value, for messages."""
    return f"{type(value).__name__} {shortened(value)}"
