"""A supervised worker process as its runner sees it: its pipes, the bytes both ways, and its end.

The worker is a child of its supervisor (`rewards.supervisor`) and takes over the supervisor's input and output. So
runner and worker speak to each other directly. Not here: what they say (`rewards.process`, of reward functions, and
`rewards.environment_runner`).
"""

import contextlib
import os
import selectors
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal

from rewards.replies import MAX_FRAME, ReplyReader

_POLL_SECONDS = 0.1  # how often the runner looks whether a supervisor has died
_EXIT_SECONDS = 1.0  # from the end of a worker's output to its supervisor's report that nothing is left
_KILL_SECONDS = 5.0  # for a supervisor to end everything; only a process in the kernel's hands takes longer
_MAX_READ = 2 * MAX_FRAME  # bytes taken from a worker at a time, more than a pipe holds
_SUPERVISOR = Path(__file__).with_name("supervisor.py")


class SupervisedProcess:
    """A worker process, started when this is made.

    module: what the worker runs, by `python -m`. log: the descriptor for printed text; None: this process's stderr.
    environment: its environment variables. memory_gb: the most resident memory of it and all that it starts.
    section: of the configuration, for messages about its limits.

    Once the worker has closed its output, `closed` is true.
    """

    def __init__(
        self, module: str, log: int | None, environment: Mapping[str, str], memory_gb: float | None, section: str
    ):
        self._module, self._log, self._environment = module, log, environment
        self._memory_gb, self._section = memory_gb, section
        self._directory = os.getcwd()
        self.deadline = 0.0  # of what the worker is asked now, by time.monotonic
        self._start()

    def _start(self) -> None:
        limit = 0 if self._memory_gb is None else int(self._memory_gb * 1e9)
        # -P: a folder called `rewards` in the working directory must not hide this package.
        worker = [sys.executable, *(["-B"] if sys.dont_write_bytecode else []), "-P", "-m", self._module]
        self.control, theirs = socket.socketpair()
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-I", "-S", str(_SUPERVISOR), str(theirs.fileno()), str(limit), *worker],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._log,
                bufsize=0,
                cwd=self._directory,
                env=self._environment,
                start_new_session=True,  # out of reach of a terminal's Ctrl-C
                pass_fds=[theirs.fileno()],
            )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self.stdin, self.stdout = self._process.stdin, self._process.stdout
        os.set_blocking(self.stdin.fileno(), False)
        os.set_blocking(self.stdout.fileno(), False)
        self.control.setblocking(False)
        self._told = bytearray()  # the supervisor's messages so far
        self.outgoing = memoryview(b"")
        self._replies, self.closed = ReplyReader(), False

    def send(self, frame: bytes) -> None:
        """Send a frame, after what was sent before; `flush` writes what the pipe does not take at once."""
        self.outgoing = memoryview(bytes(self.outgoing) + frame)

    def frames(self) -> Iterator[bytes]:
        """Frames that have arrived in full. BrokenWorker for what is no frame."""
        taken = 0
        while not self.closed and taken < _MAX_READ:  # a worker that never stops sending must not hold up the runner
            try:
                chunk = os.read(self.stdout.fileno(), _MAX_READ)
            except BlockingIOError:
                break
            self.closed, taken = not chunk, taken + len(chunk)
            self._replies.feed(chunk)
        yield from self._replies.frames()

    def flush(self) -> None:
        """Write as much of the pending bytes as the pipe takes."""
        try:
            self.outgoing = self.outgoing[os.write(self.stdin.fileno(), self.outgoing) :]
        except BlockingIOError:
            return
        except BrokenPipeError:  # the worker is dead, which `failure` reports
            self.outgoing = memoryview(b"")

    def death(self) -> tuple[Literal["memory", "died"], str] | None:
        """Why the worker is dead, in a word and a sentence; None: it lives."""
        if not self.closed and not self.has_ended():
            return None
        with contextlib.suppress(subprocess.TimeoutExpired):  # it is alive, or a process cannot be killed
            self._process.wait(_EXIT_SECONDS)
        reports = self._reports()
        if "memory" in reports:
            return "memory", (
                f"the worker's processes held {reports['memory'] / 1e9:.2f} GB of memory together, more than "
                f"{self._section}.memory_gb ({self._memory_gb:g}) allows; they were killed"
            )
        if "exit" in reports:
            return "died", f"the worker process died {_how(reports['exit'])}"
        code = self._process.poll()
        if code is None:
            return "died", "the worker process closed its connection"
        return "died", f"the supervisor of the worker process died {_how(code)}, and the worker with it"

    def restart(self) -> None:
        """Kill the process with everything it started."""
        self._kill(b"d")
        self._start()

    def renew(self) -> None:
        """Replace an idle process by a fresh one."""
        self._kill()
        self._start()

    def hang_up(self) -> None:
        """Close the worker's input, which ends it when it is idle."""
        self.stdin.close()

    def end(self, deadline: float, *, is_idle: bool) -> None:
        """Wait for an idle process until the deadline, then kill what is left of it."""
        if self.stdout.closed:  # it ended before, and its number may belong to another process now
            return
        if is_idle:
            with contextlib.suppress(subprocess.TimeoutExpired):  # killed next
                self._process.wait(max(0.0, deadline - time.monotonic()))
        self._kill()

    def has_output(self) -> bool:
        """Whether an idle worker has sent something, or closed its pipe."""
        with contextlib.suppress(BlockingIOError):
            os.read(self.stdout.fileno(), 1)
            return True
        return False

    def has_ended(self) -> bool:
        """Whether the worker or its supervisor has ended."""
        return self._process.poll() is not None or "exit" in self._reports()

    def _reports(self) -> dict[str, int]:
        """{first word: number} of the supervisor's messages about its worker so far."""
        with contextlib.suppress(BlockingIOError, ConnectionResetError):  # nothing new, or the supervisor was killed
            while chunk := self.control.recv(1 << 12):
                self._told += chunk
        lines = self._told.decode().split("\n")[:-1]  # the last one may be cut off
        return {word: int(number) for word, number in map(str.split, lines)}

    def _kill(self, order: bytes = b"k") -> None:
        """End everything. order: see `rewards.supervisor`."""
        with contextlib.suppress(ProcessLookupError):
            self._process.send_signal(signal.SIGCONT)  # user code can stop what it may signal
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # it has ended
            self.control.send(order)
        with contextlib.suppress(subprocess.TimeoutExpired):  # killed next
            self._process.wait(_KILL_SECONDS)
        reports = self._reports()
        if "exit" not in reports:  # it was killed, or cannot do it
            self._process.kill()
            self._process.wait()
            if "worker" in reports:
                with contextlib.suppress(ProcessLookupError):  # it left nothing behind
                    os.killpg(reports["worker"], signal.SIGKILL)
        self.control.close()
        self.stdin.close()
        self.stdout.close()


def poll(workers: Sequence[SupervisedProcess], seconds: float = _POLL_SECONDS) -> None:
    """Wait until a worker has sent something or takes input, a worker is overdue, or a moment has passed, of at most
    `seconds`.
    """
    if any(worker.closed for worker in workers):  # it is dead or dying, which `failure` waits for
        return
    now = time.monotonic()
    with selectors.DefaultSelector() as selector:
        for worker in workers:
            selector.register(worker.stdout, selectors.EVENT_READ)
            if worker.outgoing:
                selector.register(worker.stdin, selectors.EVENT_WRITE, worker)
        wait = min([seconds, _POLL_SECONDS, *(max(0.0, worker.deadline - now) for worker in workers)])
        for ready, _ in selector.select(wait):
            if ready.data is not None:
                ready.data.flush()


def import_path() -> list[str]:
    """The folders from which a worker imports: those of this process, and the working directory, where a user's modules
    are expected (a worker is started with -P, without it).
    """
    return [entry or os.getcwd() for entry in sys.path] + [os.getcwd()]


def _how(code: int) -> str:
    return f"by signal {-code} ({signal.strsignal(-code)})" if code < 0 else f"with exit code {code}"
