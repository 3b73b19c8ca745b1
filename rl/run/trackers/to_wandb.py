"""Weights & Biases: a run of its own, whose id is the run's, so that a resumed run goes on in it.

The library's own server process, files and uploads are its business. It prints nothing, and leaves stdout alone. Our
step is the x axis, because the library's own counter takes no step twice, and a resumed run may repeat steps.
"""

import dataclasses
import os
from collections.abc import Sequence
from typing import Any

from rl.files.json_file import shown
from rl.run.trackers.contract import TrackedRun, TrackedStep, table_of
from rl.run.trackers.library import import_library

_MODES = ("online", "offline", "disabled", "shared")
_UPLOAD_SECONDS = 25.0  # for which the library waits for uploads at the end; what is left can be sent by `wandb sync`


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """`logging.tracker_args.wandb`. What is None is the library's own, from its environment variables.

    Attributes:
      project, entity, group, tags, notes: where the run stands, and what is said of it there.
      name: of the run there; None: of the run folder.
      mode: online, offline, disabled or shared.
      folder: where the library's folder wandb/ goes; None: the run folder.
    """

    project: str | None = None
    entity: str | None = None
    name: str | None = None
    group: str | None = None
    tags: Sequence[str] = ()
    notes: str | None = None
    mode: str | None = None
    folder: str | None = None


def check(settings: Settings) -> None:
    """ValueError where the library is missing, the mode is unknown, or nobody is logged in who would have to be."""
    wandb = import_library("wandb", "wandb")
    mode = settings.mode
    if mode is not None and mode not in _MODES:
        raise ValueError(f"logging.tracker_args.wandb.mode must be one of {list(_MODES)} or null, got {shown(mode)}")
    needs_login = (mode or os.environ.get("WANDB_MODE") or "online") in ("online", "shared")
    has_key = any(os.environ.get(name) for name in ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE"))
    if needs_login and not has_key and not wandb.login(prompt=False, verify=False):
        raise ValueError(
            "logging.trackers wandb needs a login: set WANDB_API_KEY in the environment or run `wandb login`, or keep "
            "the run on this machine with logging.tracker_args.wandb.mode=offline"
        )


def make(settings: Settings, run: TrackedRun) -> "_WandB":
    """A tracker."""
    wandb = import_library("wandb", "wandb")
    inner = wandb.init(
        id=run.id,
        resume="allow",
        project=settings.project,
        entity=settings.entity,
        name=settings.name or run.name,
        group=settings.group,
        job_type=run.kind,
        tags=list(settings.tags) or None,
        notes=settings.notes,
        mode=settings.mode,
        dir=str(run.folder if settings.folder is None else os.path.expanduser(settings.folder)),
        config=dict(run.config),
        reinit="create_new",
        settings=wandb.Settings(silent=True, console="off", finish_timeout=_UPLOAD_SECONDS),
    )
    inner.define_metric("step", hidden=True)
    inner.define_metric("*", step_metric="step")
    return _WandB(wandb, inner)


def leave() -> None:
    """Has the end of the process not wait for the library, whose hook at the exit of Python may take two minutes where
    no server answers. The library has no switch for this; where its inside is another one, the hook stays.
    """
    connection = getattr(import_library("wandb", "wandb").setup(), "_connection", None)
    unregister = getattr(connection, "_cleanup", None)
    if unregister is not None:
        unregister()


class _WandB:
    def __init__(self, wandb: Any, inner: Any):
        self._wandb, self._inner = wandb, inner
        self.place = inner.settings.sync_dir if inner.offline else inner.url

    def log(self, step: TrackedStep) -> None:
        row: dict[str, Any] = {"step": step.step, **step.metrics}
        row |= {f"histogram/{name}": self._wandb.Histogram(values) for name, values in step.histograms.items()}
        if step.samples:
            columns, rows = table_of(step.samples)
            row["samples"] = self._wandb.Table(columns=columns, data=_one_type_a_column(rows))
        self._inner.log(row)

    def close(self, is_failed: bool) -> None:
        self._inner.finish(exit_code=int(is_failed))


def _one_type_a_column(rows: Sequence[Sequence[Any]]) -> list[list[Any]]:
    """The library wants one type in a column: numbers become floats, None stays."""
    return [
        [float(cell) if isinstance(cell, (int, float)) and not isinstance(cell, bool) else cell for cell in row]
        for row in rows
    ]
