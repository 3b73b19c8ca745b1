"""The measurements of a run: metrics and samples on disk, seconds of each phase, compilations, peak memory.

In: one mapping of names to numbers for each step. Out: `metrics.jsonl`, `samples.jsonl` and `events.jsonl` in the run
folder, one JSON object for each line. An event is what is no number of a step: a start with its environment, a warning,
histograms. Not here: the console (`rl/run/console.py`), and the report (`rl/tools/report`). Only two functions import
jax, so reading a finished run is quick.
"""

import collections
import contextlib
import json
import math
import os
import pathlib
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from rl.devices import host_memory
from rl.errors import RUN, missing
from rl.files.local_files import write_file
from rl.files.output_file import writing
from rl.run.metric_table import RENAMED_FIELDS, current_name
from rl.run_folder.contents import CHANGED

METRICS_FILE = "metrics.jsonl"
SAMPLES_FILE = "samples.jsonl"
EVENTS_FILE = "events.jsonl"
_FILES = (METRICS_FILE, SAMPLES_FILE, EVENTS_FILE)


class MetricsWriter:
    """Appends to the files of a run folder. A kill at any moment leaves files that `read_metrics` can read.

    A line, with its line end, is on the disk before the call that wrote it returns. So a loop that writes a step's line
    before it saves the step's checkpoint never has a checkpoint without its lines.
    """

    def __init__(self, folder: str | os.PathLike | None, start_step: int):
        """Reads the files. The first write opens them for appending, and drops the lines of steps that are run again.

        Args:
          folder: the run folder, which the first write makes if missing. None: another process writes, and this one
            does not.
          start_step: the first step that this process will write. Lines of this step and later ones are dropped, and so
            is a last line that a kill cut short. Each file is replaced atomically. A process that writes nothing drops
            nothing.

        Raises:
          ValueError: a complete line in one of the files is not a JSON object with a `step`, or the disk is full. Every
            method that writes raises the latter.
        """
        self._folder = None if folder is None else pathlib.Path(folder)
        self.last_dropped: int | None = None
        self._files: dict[str, Any] = {}
        self._kept: dict[str, bytes] = {}  # {file: the lines that stay}, for files of which lines are dropped
        if self._folder is not None:
            for name in _FILES:
                kept = _steps_before(self._folder / name, start_step)
                if kept is not None and name == METRICS_FILE:
                    self.last_dropped = max((row["step"] for row in _read_existing(self._folder / name)), default=None)
                if kept is not None:
                    self._kept[name] = kept

    def write(self, metrics: Mapping[str, Any]) -> None:
        """Appends one line to metrics.jsonl: `step` first, then the other keys in the mapping's own order.

        Args:
          metrics: must have an integer `step`. Values are Python, numpy or zero-dimensional jax scalars, or strings;
            floats are written with every digit, numbers that JSON lacks (NaN and the infinities) as null.
        """
        self._append(METRICS_FILE, [_with_step_first(metrics)])

    def amend(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Adds keys to the line of a step in metrics.jsonl, which is replaced atomically."""
        if self._folder is None:
            return
        path = self._folder / METRICS_FILE
        content = self._kept.get(METRICS_FILE) or path.read_bytes()
        rows = [_parse(path, number, line) for number, line in enumerate(_complete_lines(content), 1)]
        lines = [json.dumps(row | _to_json(metrics) if row["step"] == step else row) + "\n" for row in rows]
        self.close()
        self._files.clear()
        self._kept[METRICS_FILE] = "".join(lines).encode("ascii")
        self._append(METRICS_FILE, [])

    def write_samples(self, step: int, samples: Iterable[Mapping[str, Any]]) -> None:
        """Appends a line for each sample to samples.jsonl, in one write: `step`, then the sample's own keys."""
        self._append(SAMPLES_FILE, [{"step": step, **sample} for sample in samples])

    def write_event(self, step: int, event: Mapping[str, Any]) -> None:
        """Appends a line to events.jsonl: `step`, then the event's own key, which says what it is: `start` (perhaps
        with `changed`), `warning` or `histograms`.
        """
        self._append(EVENTS_FILE, [{"step": step, **event}])

    def close(self) -> None:
        """Closes the files. A second call does nothing."""
        for file in self._files.values():
            with writing(file.name):
                file.close()

    def _append(self, name: str, rows: Iterable[Mapping[str, Any]]) -> None:
        if self._folder is None:
            return
        if not self._files:
            with writing(self._folder):
                self._folder.mkdir(parents=True, exist_ok=True)
            for each, kept in self._kept.items():
                write_file(self._folder / each, kept)
            self._kept.clear()
            for each in _FILES:
                # Open for the life of the run. Without a buffer, so that a write that a full disk refused is not tried
                # again.
                with writing(self._folder / each):
                    self._files[each] = open(self._folder / each, "ab", buffering=0)  # noqa: SIM115
        _append_lines(self._files[name], rows)

    def __enter__(self) -> "MetricsWriter":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def read_metrics(folder: str | os.PathLike) -> list[dict[str, Any]]:
    """The lines of a run folder's metrics.jsonl in file order, null as None, under today's names. A last line that a
    kill cut short is left out.

    Raises:
      ValueError: the folder has no metrics.jsonl, or a complete line is not a JSON object with a `step`.
    """
    rows = _read_existing(pathlib.Path(folder) / METRICS_FILE)
    now = {name: current_name(name) for name in dict.fromkeys(name for row in rows for name in row)}
    return [{now[name]: value for name, value in row.items()} for row in rows]


def read_samples(folder: str | os.PathLike) -> list[dict[str, Any]]:
    """Like `read_metrics`, for samples.jsonl."""
    rows = _read_existing(pathlib.Path(folder) / SAMPLES_FILE)
    return [{RENAMED_FIELDS.get(name, name): value for name, value in row.items()} for row in rows]


def read_events(folder: str | os.PathLike) -> list[dict[str, Any]]:
    """Like `read_metrics`, for events.jsonl; empty for a run of an older version, which wrote none."""
    path = pathlib.Path(folder) / EVENTS_FILE
    return _read_existing(path) if path.is_file() else []


def newest_changes(events: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """The keys that were not as in config.yml in the newest start of a run, with their values; from its events."""
    starts = [event for event in events if "start" in event]
    changed = starts[-1].get(CHANGED) if starts else None
    return changed if isinstance(changed, dict) else {}


class Stopwatch:
    """Seconds of each phase, summed until `lap` is called at the end of a step.

    A jax computation counts in the phase that waits for its result: block on it, or read a number from it, inside the
    phase.

    Args:
      around: gives a context to be in during each phase, from its name.
    """

    def __init__(self, around: Callable[[str], contextlib.AbstractContextManager] = contextlib.nullcontext) -> None:
        self._around = around
        self._seconds: dict[str, float] = collections.defaultdict(float)
        self._lap_start = time.perf_counter()

    @contextlib.contextmanager
    def timer(self, phase: str) -> Iterator[None]:
        """Adds the time spent in the `with` block to `phase`, also when the block raises."""
        start = time.perf_counter()
        try:
            with self._around(phase):
                yield
        finally:
            self._seconds[phase] += time.perf_counter() - start

    def lap(self) -> dict[str, float]:
        """{"seconds/<phase>": ..., "seconds/step": wall time since the last lap, "seconds/other": time outside of
        phases}. Then starts from zero again.
        """
        now = time.perf_counter()
        lap = {f"seconds/{phase}": seconds for phase, seconds in self._seconds.items()}
        lap["seconds/step"] = now - self._lap_start
        lap["seconds/other"] = lap["seconds/step"] - sum(self._seconds.values())
        self._seconds.clear()
        self._lap_start = now
        return lap


class CompileCounter:
    """Counts the programs that XLA compiles or loads from its persistent cache, from construction to `close`."""

    def __init__(self) -> None:
        import jax.monitoring

        self._lock = threading.Lock()
        self._count = 0
        self._lap_count = 0
        jax.monitoring.register_event_duration_secs_listener(self._on_duration)
        self._listening = True

    def _on_duration(self, event: str, duration_secs: float, **kwargs: Any) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            with self._lock:
                self._count += 1

    @property
    def count(self) -> int:
        """Programs since construction."""
        with self._lock:
            return self._count

    def lap(self) -> int:
        """Programs since the last call of `lap`, or since construction."""
        count = self.count
        new = count - self._lap_count
        self._lap_count = count
        return new

    def close(self) -> None:
        """Stops counting. A second call does nothing."""
        if self._listening:
            import jax.monitoring

            jax.monitoring.unregister_event_duration_listener(self._on_duration)
            self._listening = False

    def __enter__(self) -> "CompileCounter":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def peak_memory_bytes() -> int:
    """Peak bytes in use so far: of the fullest local device, or of this process where devices report none (CPU)."""
    import jax

    device_stats = [device.memory_stats() for device in jax.local_devices()]
    device_peaks = [stats["peak_bytes_in_use"] for stats in device_stats if stats and "peak_bytes_in_use" in stats]
    if device_peaks:
        return max(device_peaks)
    return host_memory.peak_bytes()


def _with_step_first(metrics: Mapping[str, Any]) -> dict[str, Any]:
    assert "step" in metrics, f"a line of metrics needs a step, got keys {list(metrics)}"
    return {"step": metrics["step"], **metrics}


def _append_lines(file: Any, rows: Iterable[Mapping[str, Any]]) -> None:
    content = "".join(json.dumps(_to_json(row), allow_nan=False) + "\n" for row in rows).encode("ascii")
    with writing(file.name):
        while content:
            content = content[file.write(content) :]
        os.fsync(file.fileno())


def _to_json(value: Any) -> Any:
    """A value made of plain Python types, with None for the floats that JSON cannot hold."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, Mapping):
        return {str(key): _to_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_to_json(item) for item in value]
    return _to_json(value.tolist())  # numpy and jax scalars and arrays


def _steps_before(path: pathlib.Path, start_step: int) -> bytes | None:
    """The complete lines of steps before this one; None where there are no other lines, or no file."""
    if not path.exists():
        return None
    content = path.read_bytes()
    lines = _complete_lines(content)
    kept = b"".join(line for number, line in enumerate(lines, 1) if _parse(path, number, line)["step"] < start_step)
    return None if kept == content else kept


def _read_existing(path: pathlib.Path) -> list[dict[str, Any]]:
    if not path.parent.exists():
        raise missing("RUN", RUN, path.parent)
    if path.parent.is_file():
        raise ValueError(
            f"RUN must be {RUN}, got {str(path.parent)!r}, a file; name the folder, {str(path.parent.parent)!r}"
        )
    if not path.is_file():
        raise ValueError(f"RUN must be {RUN}, got {str(path.parent)!r}, which has no {path.name}")
    return [_parse(path, number, line) for number, line in enumerate(_complete_lines(path.read_bytes()), 1)]


def _complete_lines(content: bytes) -> list[bytes]:
    """Lines with their line ends. Text after the last line end was cut short by a kill, even if it parses."""
    return content[: content.rfind(b"\n") + 1].splitlines(keepends=True)


def _parse(path: pathlib.Path, number: int, line: bytes) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except ValueError as error:  # malformed JSON, or bytes that are not UTF-8
        raise ValueError(f"{path}, line {number}, is not JSON ({error}); remove the line to go on") from error
    if not isinstance(row, dict) or not isinstance(row.get("step"), int):
        raise ValueError(f"{path}, line {number}, must be a JSON object with an integer step, got {line[:80]!r}")
    return row
