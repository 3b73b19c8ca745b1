"""Event files for TensorBoard, in the run folder.

Scalars, histograms and tables of samples, by the functions of the package `tensorboard` that need no TensorFlow. What
was written after the step that a resumed run goes on from is hidden by an event that TensorBoard knows for this
(`SessionLog.START`, what other writers call `purge_step`).
"""

import dataclasses
import json
import os
import time
from types import ModuleType
from typing import Any

import numpy as np

from rl.run.trackers.contract import TrackedRun, TrackedStep, table_of
from rl.run.trackers.library import import_library

FOLDER = "tensorboard"  # in the run folder


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """`logging.tracker_args.tensorboard`.

    Attributes:
      folder: of the event files; None: tensorboard/ in the run folder.
    """

    folder: str | None = None


def check(settings: Settings) -> None:
    """ValueError where the library is missing."""
    _library("summary.writer.event_file_writer")


def make(settings: Settings, run: TrackedRun) -> "_TensorBoard":
    """A tracker."""
    folder = settings.folder
    return _TensorBoard(run, str(run.folder / FOLDER) if folder is None else os.path.expanduser(folder))


def _library(module: str) -> ModuleType:
    return import_library(f"tensorboard.{module}", "tensorboard")


class _TensorBoard:
    def __init__(self, run: TrackedRun, folder: str):
        self.place = folder
        self._writer = _library("summary.writer.event_file_writer").EventFileWriter(folder)
        self._event, self._summary = _library("compat.proto.event_pb2"), _library("compat.proto.summary_pb2")
        self._histogram_pb = _library("plugins.histogram.summary_v2").histogram_pb
        self._text_pb = _library("plugins.text.summary_v2").text_pb
        self._config: Any = run.config
        self._has_begun = False

    def log(self, step: TrackedStep) -> None:
        if not self._has_begun:
            self._add(step.step, session_log=self._event.SessionLog(status=self._event.SessionLog.START))
            text = json.dumps(self._config, indent=2, default=str)
            self._add(step.step, summary=self._text_pb("config", _verbatim(text)))
            self._has_begun = True
        value = self._summary.Summary.Value
        scalars = [value(tag=name, simple_value=number) for name, number in step.metrics.items()]
        self._add(step.step, summary=self._summary.Summary(value=scalars))
        for name, values in step.histograms.items():
            self._add(step.step, summary=self._histogram_pb(f"histogram/{name}", values))
        if step.samples:
            columns, rows = table_of(step.samples)
            cells = [columns, *([_verbatim(cell) for cell in row] for row in rows)]
            self._add(step.step, summary=self._text_pb("samples", np.array(cells, dtype=object)))
        self._writer.flush()

    def close(self, is_failed: bool) -> None:
        self._writer.close()

    def _add(self, step: int, **content: Any) -> None:
        self._writer.add_event(self._event.Event(step=step, wall_time=time.time(), **content))


def _verbatim(cell: Any) -> str:
    """Text as a block of code: TensorBoard renders Markdown, which completions should not be."""
    return "\n".join(f"    {line}" for line in str("" if cell is None else cell).splitlines())
