"""A training loop that somebody else wrote, run one step at a time."""

import concurrent.futures
import threading
from collections.abc import Callable


class SteppedLoop:
    """Runs `run(pause)` in a thread of its own, which stands still in `pause` between two steps.

    `run` must get `pause` called, in whatever thread, right before each of its steps. The time of `step` is then that
    of a step with all that the loop does around it. An error in the loop is raised where `step` is called.
    """

    def __init__(self, run: Callable[[Callable[[], None]], None]) -> None:
        self._go, self._stands = threading.Semaphore(0), threading.Semaphore(0)
        self._closed = False
        self._executor = concurrent.futures.ThreadPoolExecutor(max_workers=1)
        self._future = self._executor.submit(run, self._pause)
        self._future.add_done_callback(lambda _: self._stands.release())
        self._wait()

    def step(self) -> None:
        """One step: from the pause in which the loop is to the next one."""
        self._go.release()
        self._wait()

    def close(self) -> None:
        """Leaves the loop where it is: its `pause` raises, and nothing after it runs."""
        self._closed = True
        self._go.release()
        self._executor.shutdown()

    def _pause(self) -> None:
        self._stands.release()
        self._go.acquire()
        if self._closed:
            raise concurrent.futures.CancelledError

    def _wait(self) -> None:
        self._stands.acquire()
        if self._future.done():
            self._future.result()
            raise ValueError("the training loop has ended; it must be given one batch more than steps are asked for")
