"""Hands the steps of a run to one tracker, in a thread of its own, so that no tracker holds a step up.

In: a function that makes the tracker, and steps. Out: calls of the tracker; a count of the steps that did not reach it,
and what went wrong, once. At most `num_waiting` steps wait; a step that comes when so many wait is dropped. A tracker
that cannot be made is tried again with the next step. Nobody waits for a tracker but the end of the run, for a limited
time.
"""

import queue
import threading
import traceback
from collections.abc import Callable

from rewards.importing import USER_ERRORS
from rl.run.trackers.contract import TrackedStep, Tracker

_Item = TrackedStep | None  # None: the run ends


class Delivery:
    """The thread of one tracker.

    Args:
      label: names the tracker in messages and metrics.
      make: makes the tracker; called in the thread.
      num_waiting: steps that may wait.

    Attributes:
      label: as given.
      made: set when `make` was called for the first time, with or without success.
      first_error: what `make` then raised.
    """

    def __init__(self, label: str, make: Callable[[], Tracker], num_waiting: int):
        self.label, self._make, self._num_waiting = label, make, num_waiting
        self._queue: queue.SimpleQueue[_Item] = queue.SimpleQueue()
        self._problems: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._places: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._tracker: Tracker | None = None
        self._num_refused = self._num_taken = 0  # counted by the run's thread alone
        self._num_failed = self._num_handled = 0  # counted by the own one alone
        self._is_failed = self._is_left = False
        self._said: set[str] = set()
        self.made = threading.Event()
        self.first_error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name=f"tracker {label}", daemon=True)
        self._thread.start()

    @property
    def num_dropped(self) -> int:
        """The steps so far that did not reach the tracker: the queue was full, or it raised."""
        return self._num_refused + self._num_failed

    def put(self, step: TrackedStep) -> None:
        """Hands over a step, and returns at once."""
        if self._queue.qsize() >= self._num_waiting:
            self._num_refused += 1
            self._say(
                "full", f"{self._num_waiting} steps wait for it (logging.tracker_queue), so further ones are dropped"
            )
            return
        self._num_taken += 1
        self._queue.put(step)

    def problems(self) -> list[str]:
        """What went wrong since the last call, each kind of it once in a run."""
        return _taken(self._problems)

    def places(self) -> list[str]:
        """Where the tracker keeps the run, if that was not told yet."""
        return [f"tracker {self.label}: {place}" for place in _taken(self._places)]

    def end(self, is_failed: bool) -> None:
        """Tells the tracker that no step will follow; returns at once. is_failed: whether the run ended in an error."""
        self._is_failed = is_failed
        self._queue.put(None)

    def wait(self, seconds: float) -> bool:
        """Waits until the tracker is closed. False where it is not after so long."""
        self._thread.join(max(seconds, 0))
        return not self._thread.is_alive()

    def leave(self) -> None:
        """Lets the tracker be: it is asked for nothing more."""
        self._is_left = True

    @property
    def num_undelivered(self) -> int:
        """The steps that are still with the thread or in the queue."""
        return self._num_taken - self._num_handled

    def _run(self) -> None:
        self._try_to_make()
        while (step := self._queue.get()) is not None and not self._is_left:
            if self._tracker is None:
                self._try_to_make()
            if self._tracker is None:
                self._num_failed += 1
            else:
                try:
                    self._tracker.log(step)
                except USER_ERRORS as error:
                    self._num_failed += 1
                    self._say("log", f"a step did not reach it: {described(error)}")
            self._num_handled += 1
        if self._tracker is not None and not self._is_left:
            try:
                self._tracker.close(self._is_failed)
            except USER_ERRORS as error:
                self._say("close", f"it did not end well: {described(error)}")

    def _try_to_make(self) -> None:
        try:
            self._tracker = self._make()
            if (place := getattr(self._tracker, "place", None)) is not None:
                self._places.put(str(place))
        except USER_ERRORS as error:
            if not self.made.is_set():
                self.first_error = error
            self._say("make", f"it cannot be reached, and is tried again with each step: {described(error)}")
        self.made.set()

    def _say(self, kind: str, problem: str) -> None:
        if kind not in self._said:
            self._said.add(kind)
            self._problems.put(f"tracker {self.label}: {problem}; metrics.jsonl has every step")


def _taken(texts: "queue.SimpleQueue[str]") -> list[str]:
    found = []
    while not texts.empty():
        found.append(texts.get())
    return found


def described(error: BaseException) -> str:
    """An error in one line, with the last line of the code that raised it."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename != __file__]
    place = f" ({frames[-1].filename}:{frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:500]}{place}"
