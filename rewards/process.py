"""One worker process of reward functions as the runner sees it: its loaded functions, its task, and its end.

`failure` finds a passed deadline; `rewards.runner` asks for it and calls `restart`, which kills. How a worker is
started and ended is in `rewards.supervised`.
"""

import collections
import secrets
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rewards.batch import Task
from rewards.contract import RewardSpec
from rewards.protocol import encode, pack
from rewards.replies import BrokenWorker, Reply, read_load_reply, read_run_reply
from rewards.supervised import SupervisedProcess, import_path


class WorkerProcess(SupervisedProcess):
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
        self.to_load: collections.deque[int] = collections.deque()
        super().__init__("rewards.worker", log, environment, memory_gb, "rewards")

    def _start(self) -> None:
        super()._start()
        self._nonce = ""
        self.loaded: set[int] = set()
        self.loading: int | None = None
        self.task: Task | None = None

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
        if self.has_ended() or self.has_output():
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
        for frame in self.frames():
            if self.loading is not None:
                yield read_load_reply(frame, self._nonce, self._load_requests[self.loading]["columns"])
            elif self.task is not None:
                yield read_run_reply(frame, self._nonce, len(self.task.samples))
            else:
                raise BrokenWorker("a message without having been asked")

    def failure(self) -> tuple[str, str] | None:
        """(kind, message) when the worker is dead or past its deadline, else None."""
        if death := self.death():
            return "crash", death[1]
        if time.monotonic() > self.deadline:
            limit = self._start_timeout if self.loading is not None or self.task is None else self.task.limit
            return "timeout", f"no answer within {limit:g} s; the worker process was killed, its stack is in the log"
        return None

    def end_by(self, deadline: float) -> None:
        """Wait for an idle process until the deadline, then kill what is left of it."""
        self.end(deadline, is_idle=self.task is None and self.loading is None)

    def _load(self, key: int) -> None:
        self.loading = key
        self._send(self._load_requests[key])
        self.deadline = time.monotonic() + self._start_timeout

    def _send(self, message: Mapping[str, Any]) -> None:
        # A reply names its request, so a late reply by a thread of user code does not count for the next request.
        self._nonce = secrets.token_hex(8)
        self.send(pack({**message, "nonce": self._nonce}))


def load_request(key: int, spec: RewardSpec, columns: Sequence[str]) -> dict[str, Any]:
    """The request to load a function. Raises ValueError for kwargs that JSON cannot hold."""
    fields = {"name": spec.name, "function": spec.function, "weight": spec.weight, "calls": spec.calls}
    fields["pickled"] = encode(spec.pickled, "pickled")
    kwargs = encode(spec.kwargs, f"reward {spec.name!r}: kwargs")
    spec_fields = {**fields, "kwargs": kwargs}
    return {"op": "load", "key": key, "spec": spec_fields, "columns": list(columns), "path": import_path()}
