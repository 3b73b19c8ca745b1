"""A sign of life while something takes long: a line after five seconds, and from time to time after that.

In: a function that says a line, and what goes on, in words. Out: lines "WHAT: 5 s so far". Not here: the live display
of a terminal (`rl.run.console`).
"""

import contextlib
import threading
import time
from collections.abc import Callable, Iterator

EVERY = 5.0  # seconds between two lines in the first half minute
LATER = 30.0  # seconds after that: a log is not to fill with them


@contextlib.contextmanager
def heartbeat(say: Callable[[str], object], what: str | Callable[[], str], every: float = EVERY) -> Iterator[None]:
    """A context during which `say` is called with a line, from a thread of its own, as long as it lasts.

    Args:
      what: what goes on, or a function that says so at the time, with numbers for instance. It must be thread-safe.
      every: seconds until the first line, and between the next ones.
    """
    is_over, start = threading.Event(), time.monotonic()

    def speak() -> None:
        pause = every
        while not is_over.wait(pause):
            seconds = time.monotonic() - start
            with contextlib.suppress(OSError):  # the reader has left, which the command itself will notice
                say(f"{what() if callable(what) else what}: {seconds:.0f} s so far")
            pause = every if seconds < LATER - every else LATER / EVERY * every

    thread = threading.Thread(target=speak, daemon=True)
    thread.start()
    try:
        yield
    finally:
        is_over.set()
        thread.join()
