"""Ctrl-C and SIGTERM: the run finishes its step, saves, and ends cleanly."""

import os
import signal
from collections.abc import Callable
from types import FrameType

_STDERR = 2  # the file descriptor: a write to it needs no lock and no buffer


class StopRequest:
    """A context in which the first SIGINT or SIGTERM only sets `requested`; a second SIGINT raises KeyboardInterrupt.

    Outside the main thread Python handles no signals, so nothing is installed there.
    """

    def __init__(self, say: Callable[[str], None]):
        self.requested = False
        self.plan = "finishing this step, then saving"  # what the run does about a request
        self._say = say
        self._previous: dict[int, object] = {}

    def __enter__(self) -> "StopRequest":
        for number in (signal.SIGINT, signal.SIGTERM):
            try:
                # None: a handler that is unknown to Python, such as that of jax's preemption service.
                self._previous[number] = signal.signal(number, self._handle) or signal.SIG_DFL
            except ValueError:  # not the main thread
                break
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # pyright: ignore[reportArgumentType]

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.requested = True
        text = f"{signal.Signals(number).name}: {self.plan} (Ctrl-C again to stop at once)"
        try:
            self._say(text)
        except (OSError, RuntimeError):
            # The reader of the output (`| tee`) may have got the same signal, which must not cost the step. Or the
            # signal came during a write to the same stream, which cannot be entered again.
            os.write(_STDERR, f"{text}\n".encode())
