"""The log of the reward workers: what they print goes through a pipe into a file that never grows beyond a limit.

In: bytes that anything writes into `descriptor`, and tracebacks that workers send. Out: PATH, and earlier text in
PATH.1, each of at most `MAX_BYTES`. A thread moves the bytes, whatever else this process does, so nobody who prints
waits for long.
"""

import contextlib
import os
import selectors
import sys
import threading
from pathlib import Path

MAX_BYTES = 10_000_000  # of each of the two files
_CHUNK = 1 << 16
_TAIL_BYTES = 1 << 12
_LAST_BYTES = 1 << 20  # the most that is taken at the close, more than a pipe holds, in case something prints for ever


def _open_no_link(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NOFOLLOW, 0o666)


class RewardLog:
    """A log file with a pipe that leads into it; `close` writes what the pipe holds and ends it.

    The file is opened anew for each piece, so its folder may be moved or made meanwhile. Bytes that cannot be written
    are left out, and later the log says how many. A link is not followed, because its target is not this log's.
    """

    def __init__(self, path: str | os.PathLike[str]):
        self._path = Path(path).absolute()
        self.previous = self._path.with_name(f"{self._path.name}.1")
        self._num_cut = self._num_lost = 0  # bytes
        self._last, self._lock = bytearray(), threading.Lock()
        self._output, self.descriptor = os.pipe()
        self._woken, self._wakes = os.pipe()
        os.set_blocking(self._output, False)
        self._thread = threading.Thread(target=self._run, name="reward log", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Write what is left. Closing twice does nothing."""
        if self._wakes < 0:
            return
        os.close(self._wakes)
        self._wakes = -1
        self._thread.join()
        for descriptor in (self._output, self.descriptor, self._woken):
            os.close(descriptor)

    def _run(self) -> None:
        with selectors.DefaultSelector() as selector:
            selector.register(self._output, selectors.EVENT_READ)
            selector.register(self._woken, selectors.EVENT_READ)
            while all(key.fd != self._woken for key, _ in selector.select()):
                self._take()
        left = _LAST_BYTES
        while left > 0 and (taken := self._take()):
            left -= taken

    def write(self, text: str) -> None:
        """Write a text of this process, after what is in the pipe."""
        left = memoryview(text.encode(errors="backslashreplace"))
        while left:
            left = left[os.write(self.descriptor, left) :]

    def tail(self) -> str:
        """The last lines that were written, those included that are still in the pipe."""
        left = _LAST_BYTES
        while left > 0 and (taken := self._take()):
            left -= taken
        with self._lock:
            text = self._last.decode(errors="replace")
        return text if len(self._last) < _TAIL_BYTES else text.partition("\n")[2]

    def _take(self) -> int:
        """Move a piece from the pipe to the file; its length."""
        with self._lock, contextlib.suppress(BlockingIOError):
            data = os.read(self._output, _CHUNK)
            self._last = (self._last + data)[-_TAIL_BYTES:]
            self._write(data)
            return len(data)
        return 0

    def _write(self, data: bytes) -> None:
        try:
            size = self._path.lstat().st_size if self._path.exists() else 0
            note = f"[{self._num_lost} bytes of the log could not be written here]\n" if self._num_lost else ""
            if size + len(data) > MAX_BYTES:
                self._num_cut += self.previous.stat().st_size if self.previous.exists() else 0
                os.replace(self._path, self.previous)
                note += f"[this log goes on from {self.previous.name}; {self._num_cut} bytes before that were cut]\n"
            with open(self._path, "ab", opener=_open_no_link) as file:
                file.write(note.encode() + data)
            self._num_lost = 0
        except OSError:  # a full disk, for example, which must not hurt whoever prints
            self._num_lost += len(data)


class Tracebacks:
    """Tracebacks of reward functions: each sort is told once, whichever worker met it, and however often it was
    replaced. log: where they go; None: this process's stderr.
    """

    def __init__(self, log: RewardLog | None):
        self._log, self._told = log, set[str]()

    def tell(self, sort: str, trace: str) -> None:
        """Writes a traceback, if it is the first of its sort."""
        if sort in self._told:
            return
        self._told.add(sort)
        if self._log is None:
            print(trace, file=sys.stderr)
        else:
            self._log.write(f"{trace}\n")
