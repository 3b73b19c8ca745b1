"""A few lines at the bottom of a terminal that are drawn again and again, while everything else scrolls above them.

In: a function that gives the lines as they are now. Out: control codes and lines on rich's console. It differs from
`rich.live` where a terminal could be left broken: the cursor is never hidden, so a killed run leaves nothing to mend;
lines that a narrower window has wrapped are erased as the rows that they now are; and what other threads print comes
between two drawings, never amid one.
"""

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from types import FrameType
from typing import Any, TextIO, cast

import rich.console
import rich.control
import rich.file_proxy
import rich.segment
import rich.text

_SECONDS_BETWEEN_DRAWINGS = 0.5
_DRAWINGS_MISSED = 4  # from which on the process is taken to have been stopped
_NOT_HANDLED = object()
_LEAST_ROWS = 8  # of a terminal; a lower one shows the first line only


class LiveLines(rich.console.RenderHook):
    """The lines, from `start` to `stop`. Between drawings that the run asks for, a thread draws twice a second.

    Args:
      console: a terminal's.
      lines: gives the lines for a width, each at most as long (they are cut).
      stream: the terminal's stream. What Python code prints to it, or to stderr on the same terminal, goes above.
    """

    def __init__(self, console: rich.console.Console, lines: Callable[[int], Sequence[rich.text.Text]], stream: TextIO):
        self._console, self._lines, self._stream = console, lines, stream
        self._widths: list[int] = []  # columns of each line as it was drawn; empty: nothing stands there
        self._drawn_at = time.monotonic()
        self._proxied: dict[str, TextIO] = {}
        self._before: Any = _NOT_HANDLED  # what SIGCONT did before
        self._stop = threading.Event()
        self._ticker = threading.Thread(target=self._tick, name="live lines", daemon=True)

    def start(self) -> None:
        """Draws the lines for the first time. Raises OSError where the stream cannot be written, as `draw` does."""
        for name in ("stdout", "stderr"):
            file = getattr(sys, name)
            if file is self._stream or (file is not None and file.isatty() and self._stream.isatty()):
                self._proxied[name] = file
                setattr(sys, name, cast(TextIO, rich.file_proxy.FileProxy(self._console, file)))
        with contextlib.suppress(ValueError):  # not the main thread, in which alone signals are handled
            self._before = signal.signal(signal.SIGCONT, self._continued)
        self._console.push_render_hook(self)
        self.draw()
        self._ticker.start()

    def _continued(self, number: int, frame: FrameType | None) -> None:
        """After Ctrl-Z and `fg` the shell's lines stand below: the next drawing comes below them, erasing nothing. The
        thread may have drawn there already, for Python calls a handler late.
        """
        if time.monotonic() - self._drawn_at > 1.2 * _SECONDS_BETWEEN_DRAWINGS:
            self._widths = []
        if callable(self._before):
            self._before(number, frame)

    def draw(self) -> None:
        """Draws the lines as they are now."""
        self._console.print(rich.control.Control())

    def stop(self) -> None:
        """Draws the lines a last time and leaves them there; what follows comes below."""
        self._stop.set()
        if self._ticker.is_alive() and self._ticker is not threading.current_thread():
            self._ticker.join()
        if self._before is not _NOT_HANDLED:
            signal.signal(signal.SIGCONT, self._before)
        for name, file in self._proxied.items():
            proxy = getattr(sys, name)
            if isinstance(proxy, rich.file_proxy.FileProxy):
                proxy.flush()
                setattr(sys, name, file)
        try:
            self.draw()
        finally:
            self._console.pop_render_hook()
            self._widths = []
        self._console.print()

    def process_renderables(self, renderables: list[rich.console.ConsoleRenderable]) -> Any:
        """What is printed, between the erasing of the lines and their drawing; rich calls this for each print."""
        width, now = max(self._console.width, 2), time.monotonic()
        if now - self._drawn_at > _DRAWINGS_MISSED * _SECONDS_BETWEEN_DRAWINGS:
            self._widths = []  # the process was stopped: the shell may have written below
        self._drawn_at = now
        erase = _control(f"\r{_up(self._rows(width) - 1)}\x1b[0J") if self._widths else _control("\r\x1b[0J")
        lines = list(self._lines(width - 1))[: None if self._console.height >= _LEAST_ROWS else 1]
        for line in lines:
            line.truncate(width - 1, overflow="ellipsis")
        self._widths = [line.cell_len for line in lines]
        return [_Segments([erase]), *renderables, _Drawn(lines)]

    def _rows(self, width: int) -> int:
        """The rows that the lines take on the terminal as it is now."""
        if not _wraps_again():
            return len(self._widths)
        return sum(max(1, -(-drawn // width)) for drawn in self._widths)

    def _tick(self) -> None:
        while not self._stop.wait(_SECONDS_BETWEEN_DRAWINGS):
            try:
                self.draw()
            except (OSError, ValueError):  # the stream is gone or closed; the next print of the run handles that
                return


class _Segments:
    def __init__(self, segments: Sequence[rich.segment.Segment]):
        self._segments = segments

    def __rich_console__(self, console: rich.console.Console, options: rich.console.ConsoleOptions) -> Any:
        yield from self._segments


class _Drawn:
    """Lines without a line end behind the last."""

    def __init__(self, lines: Sequence[rich.text.Text]):
        self._lines = lines

    def __rich_console__(self, console: rich.console.Console, options: rich.console.ConsoleOptions) -> Any:
        for number, line in enumerate(self._lines):
            if number:
                yield rich.segment.Segment.line()
            yield from line.render(console, end="")


def _control(codes: str) -> rich.segment.Segment:
    return rich.segment.Segment(codes, None, [(rich.segment.ControlType.CARRIAGE_RETURN,)])


def _up(rows: int) -> str:
    return f"\x1b[{rows}A" if rows > 0 else ""


def _wraps_again() -> bool:
    """Whether the terminal wraps old lines anew when it gets narrower. Where it does not, to count as if it did would
    erase lines of others. xterm itself, the Linux console and GNU screen do not.
    """
    if "TMUX" in os.environ:
        return True
    return "XTERM_VERSION" not in os.environ and not os.environ.get("TERM", "").startswith(("linux", "screen"))
