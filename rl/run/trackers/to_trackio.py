"""trackio: a project on this machine, on a server, or in a Space of Hugging Face.

trackio finds a run by its name, so the name holds the beginning of the run's id, and a resumed run goes on in it.
"""

import dataclasses
import os
from typing import Any

from rl.config.sections import flatten
from rl.run.trackers.contract import TrackedRun, TrackedStep, table_of
from rl.run.trackers.library import import_library

_PROJECT = "tandem"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """`logging.tracker_args.trackio`.

    Attributes:
      project: None: the variable TRACKIO_PROJECT, or "tandem".
      name: of the run, to which the beginning of its id is added; None: the run folder's.
      group, space_id, server_url, private: as `trackio.init` takes them.
    """

    project: str | None = None
    name: str | None = None
    group: str | None = None
    space_id: str | None = None
    server_url: str | None = None
    private: bool | None = None


def check(settings: Settings) -> None:
    """ValueError where the library is missing."""
    import_library("trackio", "trackio")


def make(settings: Settings, run: TrackedRun) -> "_Trackio":
    """A tracker."""
    trackio = import_library("trackio", "trackio")
    inner = trackio.init(
        project=settings.project or os.environ.get("TRACKIO_PROJECT") or _PROJECT,
        name=f"{settings.name or run.name}-{run.id[:8]}",
        group=settings.group,
        space_id=settings.space_id,
        server_url=settings.server_url,
        private=settings.private,
        config={**flatten(run.config), "run": run.id, "kind": run.kind},
        resume="allow",
        embed=False,
    )
    return _Trackio(trackio, inner, f"run {inner.name} of project {inner.project}")


class _Trackio:
    def __init__(self, trackio: Any, inner: Any, place: str):
        self.place = place
        self._trackio, self._inner = trackio, inner

    def log(self, step: TrackedStep) -> None:
        row: dict[str, Any] = dict(step.metrics)
        row |= {f"histogram/{name}": self._trackio.Histogram(values) for name, values in step.histograms.items()}
        if step.samples:
            columns, rows = table_of(step.samples)
            row["samples"] = self._trackio.Table(columns=columns, data=rows)
        self._inner.log(row, step=step.step)

    def close(self, is_failed: bool) -> None:
        self._inner.finish()
