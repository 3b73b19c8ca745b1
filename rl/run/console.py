"""The console of a run: a live display on a terminal, a line in a notebook, one plain line for each step in a log.

In: the same mapping of metrics that goes to metrics.jsonl. Out: text on a stream. Not here: files
(`rl/run/metrics.py`). Where the stream cannot be written, on a full disk for instance, the run goes on without it. A
reader that has left (`| head`) ends the run, unless it was asked to stop and has to save.
"""

import collections
import contextlib
import math
import os
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Self, TextIO

import rich.box
import rich.cells
import rich.console
import rich.padding
import rich.table
import rich.text

from rl.errors import silence
from rl.run.heartbeat import heartbeat
from rl.run.live_lines import LiveLines
from rl.run.step_values import Group
from rl.run.visible import prompt_text, shortened, visible

_STEPS_FOR_TIME_LEFT = 50  # enough steps to include evaluations and checkpoints
_BAR_WIDTH = 20  # characters
_SPARK_STEPS = 24
_PLAIN_WIDTH = 120  # columns of a table in a log
_MOST_MEMBERS = 8  # completions of a group in a table
_PROMPT_LENGTH, _COMPLETION_LENGTH = 300, 240  # characters in a table
_LEAST_COMPLETION_WIDTH = 30  # columns; with fewer, completions get lines of their own
_COLUMN_GAP, _INDENT = 3, 2  # columns of a table's gap, and before a completion on lines of its own
_NOTEBOOK_WIDTH = 120  # characters; notebooks wrap longer lines
# Metric, label, format: in the order of importance, for a narrow terminal shows the first ones only.
_WATCHED = (
    ("reward/mean", "reward", ".3f"),
    ("loss", "loss", ".4f"),
    ("kl", "kl", ".4f"),
    ("completion_length/mean", "length", ".1f"),
    ("entropy", "entropy", ".3f"),
)
_EVALUATION = re.compile(r"eval/(?:(?P<set>[^/]+)/)?(?:accuracy|avg_at_(?P<k>\d+))")
_MOST_EVALUATIONS = 4
_SPEEDS = (("tokens_per_second/rollout", "rollout"), ("tokens_per_second/train", "train"))


_KEPT_LINES = 10  # lines of a run's steps that a terminal keeps, beside those of evaluations


class _RichConsole(rich.console.Console):
    """A console on which one thread prints at a time, a whole print at once."""

    def __init__(self, **settings: Any):
        super().__init__(**settings)
        self._print_lock = threading.RLock()

    def print(self, *objects: Any, **settings: Any) -> None:
        with self._print_lock:
            super().print(*objects, **settings)

    @property
    def size(self) -> rich.console.ConsoleDimensions:
        """Columns and rows of the terminal that is written to. rich itself asks the standard streams."""
        if self._width is None and self.is_terminal:
            with contextlib.suppress(OSError, ValueError):  # no descriptor, or no terminal
                columns, rows = os.get_terminal_size(self.file.fileno())
                return rich.console.ConsoleDimensions(columns or 80, rows or 25)  # 0: nobody has set it
        return super().size

    def on_broken_pipe(self) -> None:
        """Raises the error to the caller. By default rich would end the process with exit status 1."""
        raise  # this is called where the error is handled


class Console:
    """Prints the progress of a run of `total_steps` steps to `stream` (standard output when None).

    On a terminal a few lines at the bottom show the run as it is, from `begin_steps` or the first step on, and
    evaluations, every tenth of the steps, tables, messages and warnings scroll above them. In a notebook one output of
    the cell is redrawn. Elsewhere everything is a plain line. With `is_quiet`, warnings and last words alone are
    printed.
    """

    def __init__(self, total_steps: int, stream: TextIO | None = None, is_quiet: bool = False):
        output: TextIO = sys.stdout if stream is None else stream
        self._total_steps, self._is_quiet = total_steps, is_quiet
        # A Jupyter kernel's stream is recognised by its type, without importing IPython.
        is_notebook = type(output).__module__.startswith("ipykernel.")
        self._notebook = _NotebookLine() if is_notebook else None
        self._is_live = not is_notebook and output.isatty() and os.environ.get("TERM") != "dumb"
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
        self._live: LiveLines | None = None
        self._step_seconds: collections.deque[float] = collections.deque(maxlen=_STEPS_FOR_TIME_LEFT)
        self._last_step_time: float | None = None
        self._seen: dict[str, Any] = {}  # the newest value of each metric
        self._evaluated: list[str] = []  # of the newest evaluation, in words
        self._rewards: collections.deque[float] = collections.deque(maxlen=_SPARK_STEPS)
        self._steps_done = 0
        self._phase: tuple[str, float] | None = None  # what goes on, and since when
        self._thread = threading.local()  # `is_printing`: whether this thread is
        self._postponed: list[str] = []  # what a signal's handler said amid a print of the main thread

    def begin_steps(self, steps_done: int) -> None:
        """The steps begin: on a terminal the display stands from here on."""
        self._steps_done, self._last_step_time = steps_done, time.monotonic()
        self._phase = ("start", time.monotonic())
        if self._is_live and not self._is_quiet:
            self._draw()

    def step_line(self, metrics: Mapping[str, Any]) -> None:
        """Shows one step: progress, time left, and the metrics a person watches.

        Args:
          metrics: `step` is required. Other metrics are shown if they are there and not None.
        """
        if self._is_quiet:
            return
        step = metrics["step"]
        left = self._time_left(step)
        counter = self._counter(step)
        fields = format_fields(metrics)
        if not self._is_live and self._notebook is None:
            self._print("  ".join([counter, *fields, f"left {left}"]))
            return
        is_kept = self._is_live and self._total_steps >= 2 * _KEPT_LINES
        tenth = self._total_steps // _KEPT_LINES if is_kept else 0
        if (evaluations := format_evaluations(metrics)) or (tenth and step % tenth == 0):
            self.message("  ".join([counter, *fields]))
        if evaluations:
            self._evaluated = [*evaluations, f"at step {step}"]
        self._seen |= {name: value for name, value in metrics.items() if value is not None}
        self._steps_done, self._phase = step, None
        if isinstance(metrics.get("reward/mean"), (int, float)):
            self._rewards.append(float(metrics["reward/mean"]))
        if self._notebook is None:
            self._draw()
            return
        bar = format_bar(step / self._total_steps, _BAR_WIDTH)
        self._notebook.show(_join_what_fits([counter, bar, f"left {left}", *fields], _NOTEBOOK_WIDTH))

    def show_group(self, step: int, group: Group) -> None:
        """Prints a prompt with its completions, their rewards and advantages, as a table."""
        if self._is_quiet:
            return
        width = self._console.width if self._is_live else _PLAIN_WIDTH
        with self._writing():
            self._console.print(_group_title(step, group, self._encodable), soft_wrap=False, width=width)
            for part in _group_parts(group, self._encodable, width):
                self._console.print(part, soft_wrap=False, width=width)

    def message(self, text: str) -> None:
        """Prints `text` unchanged, on lines of its own."""
        if not self._is_quiet:
            self._print(text)

    def last_word(self, text: str) -> None:
        """The same for what is said at the end of a run, or in place of one, and so also where the run is quiet."""
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
        if self._is_quiet:
            return
        width = max(map(len, rows), default=0)
        self._print(title, style="bold")
        for name, value in rows.items():
            self._print(f"  {name:<{width}}  {value}")

    def alive(self, what: str) -> contextlib.AbstractContextManager[None]:
        """A context during which a line says from time to time that `what` goes on, unless a live display does."""
        if self._is_quiet or self._live is not None:
            return contextlib.nullcontext()
        return heartbeat(self.message, what)

    def close(self) -> None:
        """Leaves the live display and gives the terminal back. A second call does nothing."""
        if self._live is not None:
            live, self._live, self._phase = self._live, None, None
            with self._writing():
                live.stop()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    @contextlib.contextmanager
    def _in_phase(self, phase: str) -> Iterator[None]:
        """Shows, on a terminal, what goes on inside the block."""
        before, self._phase = self._phase, (phase, time.monotonic())
        try:
            yield
        finally:
            self._phase = before

    def _counter(self, step: int) -> str:
        return f"step {step:>{len(str(self._total_steps))}}/{self._total_steps}"

    def _time_left(self, step: int) -> str:
        """The time left, from the mean of the last steps; ? on the first line, which has no step before it."""
        now = time.monotonic()
        if self._last_step_time is not None and step:
            self._step_seconds.append(now - self._last_step_time)
        self._last_step_time = now
        return self._left(step)

    def _left(self, step: int) -> str:
        if not self._step_seconds:
            return "?"
        return format_seconds(self._seconds_per_step() * max(self._total_steps - step, 0))

    def _seconds_per_step(self) -> float:
        return sum(self._step_seconds) / len(self._step_seconds)

    def _draw(self) -> None:
        with self._writing():
            if self._live is None:
                self._live = LiveLines(self._console, self._live_text, self._stream)
                self._live.start()
            else:
                self._live.draw()

    def _live_text(self, width: int) -> list[rich.text.Text]:
        """The live display, three lines: how far the run is, what it learns, how fast it is. Each holds what fits."""
        seen, now = self._seen, time.monotonic()
        first = [self._counter(self._steps_done), format_bar(self._steps_done / self._total_steps, _BAR_WIDTH)]
        first += [f"left {self._left(self._steps_done)}"]
        if self._phase is not None:
            first.append(f"now {self._phase[0]} {format_seconds(now - self._phase[1])}")
        if self._step_seconds:
            first.append(f"{self._seconds_per_step():.3g} s a step")
        lines = [_join_what_fits(first, width)]
        fields = format_fields({name: seen.get(name) for name, _, _ in _WATCHED})
        if self._rewards:
            fields.insert(1, sparkline(self._rewards, self._encodable(_BLOCKS) == _BLOCKS))
        if self._evaluated:
            fields.append(" ".join(self._evaluated))
        if fields:
            lines.append(_join_what_fits(fields, width))
        last = format_fields({name: seen.get(name) for name, _ in _SPEEDS}) + format_phases(seen)
        if last:
            lines.append(_join_what_fits(last, width))
        styles = ("bold", "", "dim")
        return [rich.text.Text(line, style=style) for line, style in zip(lines, styles, strict=False)]

    def _encodable(self, text: str) -> str:
        """The text with escapes in place of what the stream cannot take."""
        encoding = getattr(self._stream, "encoding", None) or "utf-8"
        return text.encode(encoding, "backslashreplace").decode(encoding)

    def _print(self, text: str, style: str | None = None) -> None:
        if getattr(self._thread, "is_printing", False):  # this is a signal's handler amid a print of the same thread
            self._postponed.append(text)
            return
        with self._writing():
            self._console.print(text, style=style)

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """A context for a write to the stream, which handles its failure."""
        self._thread.is_printing = True
        try:
            yield
            while self._postponed:
                self._console.print(self._postponed.pop(0))
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
        finally:
            self._thread.is_printing = False


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
    fields = format_evaluations(metrics)
    fields += [
        f"{label} {format(float(metrics[name]), spec)}"
        for name, label, spec in _WATCHED
        if metrics.get(name) is not None
    ]
    speeds = [
        f"{label} {format_count(float(metrics[name]))}" for name, label in _SPEEDS if metrics.get(name) is not None
    ]
    return [*fields, f"{' '.join(speeds)} tok/s"] if speeds else fields


_BLOCKS = "\u2581\u2582\u2583\u2584\u2585\u2586\u2587\u2588"  # an eighth to eight eighths of a character, from below
_PLAIN_BLOCKS = "_.-=+*#@"


def sparkline(values: Sequence[float] | collections.deque[float], has_blocks: bool = True) -> str:
    """A character for each value, from the lowest to the highest of them; a space for one that is not finite."""
    blocks = _BLOCKS if has_blocks else _PLAIN_BLOCKS
    finite = [value for value in values if math.isfinite(value)]
    low = min(finite, default=0.0)
    spread = max(finite, default=0.0) - low

    def block(value: float) -> str:
        if not math.isfinite(value):
            return " "
        return blocks[min(int((value - low) / spread * len(blocks)), len(blocks) - 1) if spread else len(blocks) // 2]

    return "".join(map(block, values))


def format_phases(metrics: Mapping[str, Any]) -> list[str]:
    """The phases of a step by their share of its time, the longest first, as one text; none below a hundredth."""
    total = metrics.get("seconds/step")
    if not total:
        return []
    shares = {
        name.partition("/")[2]: float(value) / total
        for name, value in metrics.items()
        if name.startswith("seconds/") and name != "seconds/step"
    }
    longest = sorted(shares.items(), key=lambda item: -item[1])
    text = " ".join(f"{name} {share:.0%}" for name, share in longest if share >= 0.01)
    return [text] if text else []


def _group_title(step: int, group: Group, encodable: Callable[[str], str]) -> rich.text.Text:
    answer = "" if group.answer is None else f"  answer: {shortened(visible(prompt_text(group.answer)), 80)}"
    prompt = shortened(visible(prompt_text(group.prompt)), _PROMPT_LENGTH)
    return rich.text.Text(encodable(f"step {step}, a prompt with its group: {prompt}{answer}"), style="bold")


def _group_parts(
    group: Group, encodable: Callable[[str], str], width: int
) -> list[rich.table.Table | rich.text.Text | rich.padding.Padding]:
    """The completions of a group, the best first; of a large group the best and the worst ones. A table with a row for
    each, or on a terminal too narrow for it each completion under a line with its numbers.
    """
    names = [encodable(visible(name)) for name in group.names] if len(group.names) > 1 else []
    titles = ["reward", *names, "advantage", "tokens", "end"]
    best_first = sorted(group.members, key=lambda member: math.inf if member.reward is None else -member.reward)
    left_out = len(best_first) - _MOST_MEMBERS
    shown = best_first if left_out <= 0 else [*best_first[: _MOST_MEMBERS // 2], *best_first[-_MOST_MEMBERS // 2 :]]
    rows: list[tuple[list[str], str]] = []
    for number, member in enumerate(shown):
        if left_out > 0 and number == _MOST_MEMBERS // 2:
            rows.append(([""] * len(titles), f"({left_out} between these)"))
        numbers = [member.reward, *(member.rewards if names else ()), member.advantage]
        cells = ["-" if number is None else f"{number:.3g}" for number in numbers]
        completion = encodable(shortened(visible(member.text), _COMPLETION_LENGTH))
        rows.append(([*cells, str(member.num_tokens), member.finish_reason], completion))
    columns = zip(titles, *(cells for cells, _ in rows), strict=True)
    taken = sum(max(map(rich.cells.cell_len, column)) + _COLUMN_GAP for column in columns)
    if width - taken >= _LEAST_COMPLETION_WIDTH:
        return [_group_table(titles, rows)]
    parts: list[rich.table.Table | rich.text.Text | rich.padding.Padding] = []
    for cells, completion in rows:
        fields = "  ".join(f"{title} {cell}" for title, cell in zip(titles, cells, strict=True) if cell)
        if fields:
            parts.append(rich.text.Text(fields, style="bold"))
        indent = _INDENT if width > 2 * _INDENT else 0
        parts.append(rich.padding.Padding(rich.text.Text(completion, overflow="fold"), (0, 0, 0, indent)))
    return parts


def _group_table(titles: Sequence[str], rows: Sequence[tuple[list[str], str]]) -> rich.table.Table:
    """A row for each completion, which gets the columns that the others leave."""
    table = rich.table.Table(box=rich.box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for title in titles:
        is_number = title != titles[-1]
        table.add_column(rich.text.Text(title), justify="right" if is_number else "left", no_wrap=True)
    table.add_column("completion", overflow="fold")
    for cells, completion in rows:
        table.add_row(*map(rich.text.Text, cells), rich.text.Text(completion))
    return table


def format_evaluations(metrics: Mapping[str, Any]) -> list[str]:
    """The evaluations of a step as short texts: "eval 61.0%" of the one set without a name, else "eval NAME 61.0%", or
    with samples "eval NAME avg@4 61.0%"; at most four. What is not a finite number is left out.
    """
    found = []
    for name, value in metrics.items():
        known = _EVALUATION.fullmatch(name)
        if known is not None and value is not None and math.isfinite(float(value)):
            samples = f" avg@{known['k']}" if known["k"] else ""
            found.append(f"eval {known['set'] or ''}".rstrip() + f"{samples} {float(value):.1%}")
    return found[:_MOST_EVALUATIONS]


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
