"""Which errors of a user's code come from the network and may be gone when it is called again, and how long to wait.

In: an exception. Out: whether it is such an error. The libraries that raise them are not imported: an error is known by
the names of its classes. Not here: calling again (`rewards.worker`).
"""

import os
from typing import Any

# {package: classes of errors without an answer from the server}, subclasses included.
_NO_ANSWER = {
    "aiohttp": ("ClientConnectionError", "ClientPayloadError"),
    "anthropic": ("APIConnectionError",),
    "http": ("IncompleteRead", "BadStatusLine"),
    "httpcore": ("NetworkError", "TimeoutException", "RemoteProtocolError"),
    "httpx": ("NetworkError", "TimeoutException", "RemoteProtocolError"),
    "openai": ("APIConnectionError",),
    "requests": ("ConnectionError", "Timeout", "ChunkedEncodingError"),
    "socket": ("gaierror",),
    "ssl": ("SSLEOFError", "SSLZeroReturnError"),
    "urllib3": ("NewConnectionError", "ProtocolError", "TimeoutError", "MaxRetryError"),
}
# Packages whose errors carry the status of a server's answer, and where it may stand.
_OF_SERVERS = {"aiohttp", "anthropic", "httpx", "huggingface_hub", "openai", "requests", "urllib"}
_STATUS_NAMES = ("status_code", "status", "code")
_PASSING = (408, 409, 429)  # statuses below 500 that may be another one soon
_FIRST_PAUSE, _LONGEST_PAUSE = 0.5, 30.0  # seconds
_DEPTH = 5  # of groups of errors, and of the reasons of errors


class Unreachable(ConnectionError):
    """There is no connection to a server that a function needs. The message says all: no traceback is shown."""


def is_network_error(error: Any, depth: int = _DEPTH) -> bool:
    """Whether an exception says that a connection failed or took too long, or that a server was busy or broken (status
    408, 409, 429 or 5xx). A group of exceptions is such an error where all of its members are.
    """
    if isinstance(error, (ConnectionError, TimeoutError)):
        return True
    if depth and isinstance(error, BaseExceptionGroup):
        return all(is_network_error(member, depth - 1) for member in error.exceptions)
    classes = [(kind.__module__.partition(".")[0], kind.__name__) for kind in type(error).__mro__]
    if any(package in _OF_SERVERS for package, _ in classes) and (status := _status(error)) is not None:
        return status in _PASSING or 500 <= status < 600
    if ("urllib", "URLError") in classes:
        return bool(depth) and is_network_error(getattr(error, "reason", None), depth - 1)
    return any(name in _NO_ANSWER.get(package, ()) for package, name in classes)


def pause(num_retries: int) -> float:
    """Seconds to wait before a call is made again that was made again `num_retries` times: 0.5, 1, 2, ... up to 30, and
    of that a random share between one half and all, so that many calls do not come back together.
    """
    share = 0.5 + int.from_bytes(os.urandom(4)) / (1 << 33)  # of its own: a user's code may have seeded `random`
    return min(_FIRST_PAUSE * 2.0**num_retries, _LONGEST_PAUSE) * share


def _status(error: Any) -> int | None:
    """The HTTP status that an error carries, or its `response` does; None without one."""
    for holder in (error, getattr(error, "response", None)):
        for name in _STATUS_NAMES:
            value = getattr(holder, name, None)
            if isinstance(value, int) and 100 <= value < 600:
                return value
    return None
