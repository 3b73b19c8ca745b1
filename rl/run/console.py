"""The console of a run: a live line on a terminal or in a notebook, one plain line for each step in a log.

In: the same mapping of metrics that goes to metrics.jsonl. Out: text on a stream. Not here: files
(`rl/run/metrics.py`). Where the stream cannot be written, on a full disk for instance, the run goes on without it. A
reader that has left (`| head`) ends the run, unless it was asked to stop and has to save.
"""

import collections
import contextlib
import math
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Self, TextIO

import rich.console
import rich.live
import rich.text

from rl.errors import silence

_STEPS_FOR_TIME_LEFT = 50  # enough steps to include evaluations and checkpoints
_BAR_WIDTH = 20  # characters
_NOTEBOOK_WIDTH = 120  # characters; notebooks wrap longer lines
# Metric, label, format: in the order of importance, for a narrow terminal shows the first ones only.
_WATCHED = (
    ("eval/accuracy", "eval", ".1%"),
    ("reward/mean", "reward", ".3f"),
    ("loss", "loss", ".4f"),
    ("kl", "kl", ".4f"),
    ("completion_length/mean", "length", ".1f"),
    ("entropy", "entropy", ".3f"),
)
_SPEEDS = (("tokens_per_second/rollout", "rollout"), ("tokens_per_second/train", "train"))


class _RichConsole(rich.console.Console):
    def on_broken_pipe(self) -> None:
        """Raises the error to the caller. By default rich would end the process with exit status 1."""
        raise  # this is called where the error is handled


class Console:
    """Prints the progress of a run of `total_steps` steps to `stream` (standard output when None).

    On a terminal `step_line` redraws one line, and evaluations, messages and warnings scroll above it. In a notebook it
    redraws one output of the cell. Elsewhere everything is a plain line.
    """

    def __init__(self, total_steps: int, stream: TextIO | None = None):
        output: TextIO = sys.stdout if stream is None else stream
        self._total_steps = total_steps
        # A Jupyter kernel's stream is recognised by its type, without importing IPython.
        is_notebook = type(output).__module__.startswith("ipykernel.")
        self._notebook = _NotebookLine() if is_notebook else None
        self._is_live = not is_notebook and output.isatty()
        self._stream, self._is_stopping = output, False
        self._console = _RichConsole(
            file=output,
            force_terminal=self._is_live,
            force_jupyter=False,
            highlight=False,
            markup=False,
            emoji=False,
            soft_wrap=True,
        )
        self._live: rich.live.Live | None = None
        self._step_seconds: collections.deque[float] = collections.deque(maxlen=_STEPS_FOR_TIME_LEFT)
        self._last_step_time: float | None = None

    def step_line(self, metrics: Mapping[str, Any]) -> None:
        """Shows one step: progress, time left, and the metrics a person watches.

        Args:
          metrics: `step` is required. Other metrics are shown if they are there and not None.
        """
        step = metrics["step"]
        time_left = f"left {self._time_left(step)}"
        counter = f"step {step:>{len(str(self._total_steps))}}/{self._total_steps}"
        fields = format_fields(metrics)
        if not self._is_live and self._notebook is None:
            self._print("  ".join([counter, *fields, time_left]))
            return
        if metrics.get("eval/accuracy") is not None:
            self.message("  ".join([counter, *fields]))
        bar = format_bar(step / self._total_steps, _BAR_WIDTH)
        width = self._console.width if self._notebook is None else _NOTEBOOK_WIDTH
        line = _join_what_fits([counter, bar, time_left, *fields], width)
        if self._notebook is None:
            self._draw(line)
        else:
            self._notebook.show(line)

    def message(self, text: str) -> None:
        """Prints `text` unchanged, on lines of its own."""
        self._print(text)

    def stopping(self, text: str) -> None:
        """Prints `text`. From here on, a reader of the output that has left no longer ends the run."""
        self._is_stopping = True
        self._print(text)

    def warning(self, text: str) -> None:
        """Prints `warning: text`, in yellow on a terminal."""
        self._print(f"warning: {text}", style="yellow")

    def table(self, title: str, rows: Mapping[str, Any]) -> None:
        """Prints a title, and under it names and values in two columns."""
        width = max(map(len, rows), default=0)
        self._print(title, style="bold")
        for name, value in rows.items():
            self._print(f"  {name:<{width}}  {value}")

    def close(self) -> None:
        """Leaves the live line and gives the terminal back. A second call does nothing."""
        if self._live is not None:
            with self._writing():
                self._live.stop()
            self._live = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _time_left(self, step: int) -> str:
        """The time left, from the mean of the last steps; empty on the first line, which has no step before it."""
        now = time.monotonic()
        if self._last_step_time is not None:
            self._step_seconds.append(now - self._last_step_time)
        self._last_step_time = now
        if not self._step_seconds:
            return "?"
        seconds_per_step = sum(self._step_seconds) / len(self._step_seconds)
        return format_seconds(seconds_per_step * max(self._total_steps - step, 0))

    def _draw(self, line: str) -> None:
        if self._live is None:
            # Once a step is often enough, and needs no thread beside jax.
            self._live = rich.live.Live(console=self._console, auto_refresh=False)
            with self._writing():
                self._live.start()
        with self._writing():
            self._live.update(rich.text.Text(line, no_wrap=True, overflow="ellipsis"), refresh=True)

    def _print(self, text: str, style: str | None = None) -> None:
        with self._writing():
            self._console.print(text, style=style)

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """A context for a write to the stream, which handles its failure."""
        try:
            yield
        except OSError as error:
            if isinstance(error, BrokenPipeError) and not self._is_stopping:
                raise
            silence(self._stream)
            with contextlib.suppress(OSError):  # stderr may be the same file
                print(
                    f"warning: standard output takes nothing any more ({error.strerror}); the run goes on without it, "
                    "and its files have every step",
                    file=sys.stderr,
                )


class _NotebookLine:
    """One output of a notebook's cell, which each new line replaces."""

    def __init__(self) -> None:
        self._output: Any = None

    def show(self, line: str) -> None:
        """Shows a line."""
        from IPython.display import display  # pyright: ignore[reportMissingImports]  a kernel has it

        content = {"text/plain": line}
        if self._output is None:
            self._output = display(content, raw=True, display_id=True)
        else:
            self._output.update(content, raw=True)


def format_fields(metrics: Mapping[str, Any]) -> list[str]:
    """The most important metrics as short texts in a fixed order. Missing ones and None are left out."""
    fields = [
        f"{label} {format(float(metrics[name]), spec)}"
        for name, label, spec in _WATCHED
        if metrics.get(name) is not None
    ]
    speeds = [
        f"{label} {format_count(float(metrics[name]))}" for name, label in _SPEEDS if metrics.get(name) is not None
    ]
    return [*fields, f"{' '.join(speeds)} tok/s"] if speeds else fields


def format_bar(share: float, width: int) -> str:
    """[#####---------------]"""
    filled = round(width * min(max(share, 0.0), 1.0))
    return f"[{'#' * filled}{'-' * (width - filled)}]"


def format_count(count: float) -> str:
    """Two or three digits: 950, 1.2k, 34k, 5.6M."""
    if not math.isfinite(count):
        return str(count)
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if count >= size:
            return f"{count / size:.{1 if count < 10 * size else 0}f}{letter}"
    return f"{count:.0f}"


def format_seconds(seconds: float) -> str:
    """45s, 3m05s, 2h07m, 1d04h."""
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds}s"
    if seconds < 3600:
        return f"{seconds // 60}m{seconds % 60:02}s"
    if seconds < 86400:
        return f"{seconds // 3600}h{seconds % 3600 // 60:02}m"
    return f"{seconds // 86400}d{seconds % 86400 // 3600:02}h"


def _join_what_fits(parts: Sequence[str], width: int) -> str:
    line = parts[0]
    for part in parts[1:]:
        if len(line) + 2 + len(part) > width:
            break
        line += "  " + part
    return line
