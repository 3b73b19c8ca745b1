"""One worker process as the runner sees it: its pipes, its loaded functions, its task, and its end.

The worker is a child of its supervisor (`rewards.supervisor`) and takes over the supervisor's input and output. So
runner and worker speak to each other directly. `failure` finds a passed deadline; `rewards.runner` asks for it and
calls `restart`, which kills.
"""

import collections
import contextlib
import os
import secrets
import selectors
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rewards.batch import Task
from rewards.contract import RewardSpec
from rewards.protocol import encode, pack
from rewards.replies import MAX_FRAME, BrokenWorker, Reply, ReplyReader, read_load_reply, read_run_reply

_POLL_SECONDS = 0.1  # how often the runner looks whether a supervisor has died
_EXIT_SECONDS = 1.0  # from the end of a worker's output to its supervisor's report that nothing is left
_KILL_SECONDS = 5.0  # for a supervisor to end everything; only a process in the kernel's hands takes longer
_MAX_READ = 2 * MAX_FRAME  # bytes taken from a worker at a time, more than a pipe holds
_SUPERVISOR = Path(__file__).with_name("supervisor.py")


class WorkerProcess:
    """One worker process: its pipes, its loaded functions and its task."""

    def __init__(
        self,
        load_requests: Sequence[dict[str, Any]],
        start_timeout: float,
        log: int | None,
        environment: Mapping[str, str],
        memory_gb: float | None = None,
    ):
        self._load_requests, self._start_timeout = load_requests, start_timeout
        self._log = log  # the descriptor for printed text; None: this process's stderr
        self._environment, self._memory_gb = environment, memory_gb
        self._directory = os.getcwd()
        self.to_load: collections.deque[int] = collections.deque()
        self._start()

    def _start(self) -> None:
        limit = 0 if self._memory_gb is None else int(self._memory_gb * 1e9)
        # -P: a folder called `rewards` in the working directory must not hide this package.
        worker = [sys.executable, *(["-B"] if sys.dont_write_bytecode else []), "-P", "-m", "rewards.worker"]
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
        self._replies, self._nonce = ReplyReader(), ""
        self.closed = False
        self.loaded: set[int] = set()
        self.loading: int | None = None
        self.task: Task | None = None
        self.deadline = 0.0

    def load_next(self) -> None:
        """Ask for the next function of `to_load`, if there is one."""
        if self.to_load:
            self._load(self.to_load.popleft())

    def start_task(self, task: Task | None) -> None:
        """Give an idle worker a task. Its function is loaded first, if it is not loaded yet."""
        if task is None:
            return
        self.task, self._heard = task, time.monotonic()
        # A thread or timer of user code ended it while idle, or it sent something unasked.
        if self._has_ended() or self._has_output():
            self._kill()
            self._start()
            self.task = task
        if task.key in self.loaded:
            self.send_task(task)
        else:
            self._load(task.key)

    def send_task(self, task: Task) -> None:
        """Send the task itself; its clock starts now."""
        self._send(task.request)
        self.extend_deadline(task)

    def extend_deadline(self, task: Task) -> None:
        """The next reply may take one more limit from now on."""
        self._heard = time.monotonic()
        self.deadline = self._heard + task.limit

    def finish(self) -> float:
        """Forget the task; the seconds since it was sent or had its last reply."""
        self.task = None
        return time.monotonic() - self._heard

    def receive(self) -> Iterator[Reply]:
        """Replies that have arrived in full. BrokenWorker for anything that is no reply to the running request."""
        taken = 0
        while not self.closed and taken < _MAX_READ:  # a worker that never stops sending must not hold up the runner
            try:
                chunk = os.read(self.stdout.fileno(), _MAX_READ)
            except BlockingIOError:
                break
            self.closed, taken = not chunk, taken + len(chunk)
            self._replies.feed(chunk)
        for frame in self._replies.frames():
            if self.loading is not None:
                yield read_load_reply(frame, self._nonce, self._load_requests[self.loading]["columns"])
            elif self.task is not None:
                yield read_run_reply(frame, self._nonce, len(self.task.samples))
            else:
                raise BrokenWorker("a message without having been asked")

    def flush(self) -> None:
        """Write as much of the pending bytes as the pipe takes."""
        try:
            self.outgoing = self.outgoing[os.write(self.stdin.fileno(), self.outgoing) :]
        except BlockingIOError:
            return
        except BrokenPipeError:  # the worker is dead, which `failure` reports
            self.outgoing = memoryview(b"")

    def failure(self) -> tuple[str, str] | None:
        """(kind, message) when the worker is dead or past its deadline, else None."""
        if self.closed or self._has_ended():
            with contextlib.suppress(subprocess.TimeoutExpired):  # it is alive, or a process cannot be killed
                self._process.wait(_EXIT_SECONDS)
            return "crash", self._cause_of_death()
        if time.monotonic() > self.deadline:
            limit = self._start_timeout if self.loading is not None or self.task is None else self.task.limit
            return "timeout", f"no answer within {limit:g} s; the worker process was killed, its stack is in the log"
        return None

    def restart(self) -> None:
        """Kill the process with everything it started. A fresh one loads functions when it needs them."""
        self._kill(b"d")
        self._start()

    def renew(self) -> None:
        """Replace an idle process by a fresh one."""
        self._kill()
        self._start()

    def hang_up(self) -> None:
        """Close the worker's input, which ends it when it is idle."""
        self.stdin.close()

    def end(self, deadline: float) -> None:
        """Wait for an idle process until the deadline, then kill what is left of it."""
        if self.stdout.closed:  # it ended before, and its number may belong to another process now
            return
        if self.task is None and self.loading is None:
            with contextlib.suppress(subprocess.TimeoutExpired):  # killed next
                self._process.wait(max(0.0, deadline - time.monotonic()))
        self._kill()

    def _load(self, key: int) -> None:
        self.loading = key
        self._send(self._load_requests[key])
        self.deadline = time.monotonic() + self._start_timeout

    def _has_output(self) -> bool:
        """Whether an idle worker has sent something, or closed its pipe."""
        with contextlib.suppress(BlockingIOError):
            os.read(self.stdout.fileno(), 1)
            return True
        return False

    def _send(self, message: Mapping[str, Any]) -> None:
        # A reply names its request, so a late reply by a thread of user code does not count for the next request.
        self._nonce = secrets.token_hex(8)
        self.outgoing = memoryview(bytes(self.outgoing) + pack({**message, "nonce": self._nonce}))

    def _has_ended(self) -> bool:
        return self._process.poll() is not None or "exit" in self._reports()

    def _reports(self) -> dict[str, int]:
        """{first word: number} of the supervisor's messages about its worker so far."""
        with contextlib.suppress(BlockingIOError, ConnectionResetError):  # nothing new, or the supervisor was killed
            while chunk := self.control.recv(1 << 12):
                self._told += chunk
        lines = self._told.decode().split("\n")[:-1]  # the last one may be cut off
        return {word: int(number) for word, number in map(str.split, lines)}

    def _cause_of_death(self) -> str:
        reports = self._reports()
        if "memory" in reports:
            return (
                f"the worker's processes held {reports['memory'] / 1e9:.2f} GB of memory together, more than "
                f"rewards.memory_gb ({self._memory_gb:g}) allows; they were killed"
            )
        if "exit" in reports:
            return f"the worker process died {_how(reports['exit'])}"
        code = self._process.poll()
        if code is None:
            return "the worker process closed its connection"
        return f"the supervisor of the worker process died {_how(code)}, and the worker with it"

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


def poll(workers: Sequence[WorkerProcess]) -> None:
    """Wait until a worker has sent something or takes input, a worker is overdue, or a moment has passed."""
    if any(worker.closed for worker in workers):  # it is dead or dying, which `failure` waits for
        return
    now = time.monotonic()
    with selectors.DefaultSelector() as selector:
        for worker in workers:
            selector.register(worker.stdout, selectors.EVENT_READ)
            if worker.outgoing:
                selector.register(worker.stdin, selectors.EVENT_WRITE, worker)
        wait = min([_POLL_SECONDS, *(max(0.0, worker.deadline - now) for worker in workers)])
        for ready, _ in selector.select(wait):
            if ready.data is not None:
                ready.data.flush()


def load_request(key: int, spec: RewardSpec, columns: Sequence[str]) -> dict[str, Any]:
    """The request to load a function. Raises ValueError for kwargs that JSON cannot hold."""
    fields = {"name": spec.name, "function": spec.function, "weight": spec.weight, "calls": spec.calls}
    fields["pickled"] = encode(spec.pickled, "pickled")
    kwargs = encode(spec.kwargs, f"reward {spec.name!r}: kwargs")
    # The worker imports what this process can import. -P left out the working directory, where a user's modules are
    # expected.
    path = [entry or os.getcwd() for entry in sys.path] + [os.getcwd()]
    return {"op": "load", "key": key, "spec": {**fields, "kwargs": kwargs}, "columns": list(columns), "path": path}


def _how(code: int) -> str:
    return f"by signal {-code} ({signal.strsignal(-code)})" if code < 0 else f"with exit code {code}"
