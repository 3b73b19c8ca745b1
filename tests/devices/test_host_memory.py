"""What a process keeps of memory that was freed: measured in processes of their own."""

import ctypes
import os
import re
import subprocess
import sys
import threading

import pytest

from rl.devices.host_memory import _status_bytes, return_freed

ALLOCATE = """
import ctypes, os, sys, threading
from rl.devices.host_memory import limit_arenas

if sys.argv[1] != "0":
    limit_arenas(int(sys.argv[1]))
libc = ctypes.CDLL("libc.so.6")
libc.malloc.restype = ctypes.c_void_p
together = threading.Barrier(12)


def allocate():
    together.wait()
    for _ in range(2000):
        libc.malloc(1000)
    together.wait()


threads = [threading.Thread(target=allocate) for _ in range(12)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
libc.fdopen.restype = ctypes.c_void_p
file = ctypes.c_void_p(libc.fdopen(os.dup(1), b"w"))
libc.malloc_info(0, file)
libc.fflush(file)
"""


def num_arenas(limit: int, **environment: str) -> int:
    """Pools of memory that twelve threads made glibc open."""
    inherited = {name: value for name, value in os.environ.items() if name != "MALLOC_ARENA_MAX"}
    command = [sys.executable, "-c", ALLOCATE, str(limit)]
    told = subprocess.run(command, env=inherited | environment, capture_output=True, text=True, check=True).stdout
    return len(re.findall("<heap nr=", told))


@pytest.mark.skipif(sys.platform != "linux", reason="pools of memory are glibc's")
def test_threads_share_as_many_pools_of_memory_as_they_may():
    assert num_arenas(0) > 3
    assert num_arenas(2) == 2
    assert num_arenas(2, MALLOC_ARENA_MAX="3") == 3


@pytest.mark.skipif(sys.platform != "linux", reason="pools of memory are glibc's")
def test_what_threads_freed_goes_back_to_the_system():
    libc = ctypes.CDLL("libc.so.6")
    libc.malloc.restype, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
    last, size, count = [], 100_000, 400

    def allocate():
        blocks = [libc.malloc(size) for _ in range(count)]
        for block in blocks:
            ctypes.memset(block, 1, size)
        last.append(blocks.pop())  # in use behind the others, so that glibc keeps them
        for block in blocks:
            libc.free(block)

    thread = threading.Thread(target=allocate)
    thread.start()
    thread.join()
    before = _status_bytes("VmRSS")
    return_freed()
    assert before - _status_bytes("VmRSS") > 0.8 * size * count
    libc.free(last[0])
