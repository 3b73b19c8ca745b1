"""The memory of this process on its host: giving freed memory back, and measuring the current and the peak size."""

import contextlib
import ctypes
import gc
import os
import pathlib
import resource
import sys

_M_ARENA_MAX = -8  # of malloc.h
_MEMINFO = pathlib.Path("/proc/meminfo")
_STATUS, _CLEAR_REFS = pathlib.Path("/proc/self/status"), pathlib.Path("/proc/self/clear_refs")


def return_memory() -> None:
    """Gives freed memory that Python and glibc hold on to back to the system."""
    gc.collect()
    return_freed()


def return_freed() -> None:
    """Gives freed memory that glibc holds on to back to the system. It has pools for threads, eight times as many as
    cores, and each keeps what its threads freed. Takes milliseconds.
    """
    with contextlib.suppress(AttributeError, OSError):  # another C library
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def limit_arenas(number: int) -> None:
    """Limits glibc to `number` memory pools, unless more are in use already. Fewer pools keep less freed memory, but
    threads wait for one another at a pool. MALLOC_ARENA_MAX in the environment wins.
    """
    if "MALLOC_ARENA_MAX" not in os.environ:
        with contextlib.suppress(AttributeError, OSError):
            ctypes.CDLL("libc.so.6").mallopt(_M_ARENA_MAX, number)


def resident_bytes() -> int:
    """Bytes of this process in RAM (Linux), without freed memory that glibc holds on to."""
    return_memory()
    return _status_bytes("VmRSS")


def available_bytes() -> int:
    """Bytes of RAM that programs could have now (Linux); 0 where that is not known."""
    with contextlib.suppress(OSError, LookupError, ValueError):
        return _field_bytes(_MEMINFO, "MemAvailable")
    return 0


def start_peak() -> None:
    """Restarts the count of `peak_bytes`, where the system can (Linux)."""
    return_memory()
    with contextlib.suppress(OSError):
        _CLEAR_REFS.write_text("5")  # see proc_pid_clear_refs(5)


def peak_bytes() -> int:
    """The largest number of bytes of this process in RAM since `start_peak`, or since the process began."""
    with contextlib.suppress(OSError, LookupError):
        return _status_bytes("VmHWM")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # macOS counts bytes, other systems KiB


def _status_bytes(name: str) -> int:
    """The bytes of a field of the status file. LookupError where the field is missing, as VmHWM is under gVisor."""
    return _field_bytes(_STATUS, name)


def _field_bytes(path: pathlib.Path, name: str) -> int:
    sizes = dict(line.split(":", 1) for line in path.read_text().splitlines() if ":" in line)
    return 1024 * int(sizes[name].split()[0])
