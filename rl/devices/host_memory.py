"""The memory of this process on its host: keeping little of what is freed, and the largest size since a moment."""

import contextlib
import ctypes
import gc
import os
import pathlib
import resource
import sys

_M_ARENA_MAX = -8  # of malloc.h
_STATUS, _CLEAR_REFS = pathlib.Path("/proc/self/status"), pathlib.Path("/proc/self/clear_refs")


def return_memory() -> None:
    """Gives what Python and glibc keep of memory that was freed back to the system."""
    gc.collect()
    with contextlib.suppress(AttributeError, OSError):  # another C library
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def limit_arenas(number: int) -> None:
    """Lets glibc hand out memory from so many pools at most, if no more are in use yet. Each holds on to what others
    have freed; threads wait for one another at a pool. MALLOC_ARENA_MAX in the environment has the last word.
    """
    if "MALLOC_ARENA_MAX" not in os.environ:
        with contextlib.suppress(AttributeError, OSError):
            ctypes.CDLL("libc.so.6").mallopt(_M_ARENA_MAX, number)


def resident_bytes() -> int:
    """Memory of this process that is in RAM, as Linux tells it, without what glibc keeps of memory that was freed."""
    return_memory()
    return _status_bytes("VmRSS")


def start_peak() -> None:
    """Lets `peak_bytes` count from now on where the system can (Linux)."""
    return_memory()
    with contextlib.suppress(OSError):
        _CLEAR_REFS.write_text("5")  # see proc_pid_clear_refs(5)


def peak_bytes() -> int:
    """The largest size of this process in RAM since `start_peak`, or since it began."""
    with contextlib.suppress(OSError, LookupError):
        return _status_bytes("VmHWM")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # macOS counts bytes, other systems KiB


def _status_bytes(name: str) -> int:
    """LookupError where the system has a status file without it, as gVisor has for VmHWM."""
    sizes = dict(line.split(":", 1) for line in _STATUS.read_text().splitlines() if ":" in line)
    return 1024 * int(sizes[name].split()[0])
