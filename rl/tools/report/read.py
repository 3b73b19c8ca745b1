"""Reads the files of runs, wherever they are, for a report. Nothing is imported from a run and no jax is needed.

In: paths or URLs of run folders. Out: a `Run` for each.
"""

import dataclasses
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from rl.config.sections import flatten
from rl.config.yaml_text import read_yaml
from rl.run.metrics import newest_changes, read_events, read_metrics, read_samples
from rl.run_folder.contents import CONFIG, IDENTITY, METRICS, SAMPLES, read_json
from rl.run_folder.remote_steps import local_report


@dataclasses.dataclass(frozen=True)
class Run:
    """One run as its files tell it.

    Attributes:
      name: what it is called in the report. rows: the lines of metrics.jsonl in order.
      samples, events: the lines of these files. config: {dotted key: value}. All three are empty where a file is
        missing. kind: "grpo" or "sft", the first where nothing says it.
    """

    name: str
    rows: list[dict[str, Any]]
    samples: Sequence[Mapping[str, Any]] = ()
    events: Sequence[Mapping[str, Any]] = ()
    config: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    kind: str = "grpo"

    def series(self, metric: str) -> tuple[list[int], list[float]]:
        """Steps and values of `metric`, without the lines that lack it or hold null."""
        points = [(row["step"], float(row[metric])) for row in self.rows if row.get(metric) is not None]
        return [step for step, _ in points], [value for _, value in points]


def read_runs(folders: Sequence[str | os.PathLike], metrics_only: bool = False) -> list[Run]:
    """Reads run folders; each run is named by its folder, or by its whole path where two folders have one name.

    Args:
      metrics_only: leaves samples, events and configuration empty.

    Raises:
      ValueError: a folder has no metrics.jsonl, or one without a single complete line; a file cannot be read; a metric
        is no number.
    """
    names = [pathlib.Path(folder).resolve().name for folder in folders]
    runs = []
    for folder, name in zip(folders, names, strict=True):
        place = local_report(folder, metrics_only)
        rows = read_metrics(place)
        if not rows:
            raise ValueError(f"{folder} must hold at least one step, got an empty metrics.jsonl; run a step first")
        _check_numbers(rows, place / METRICS)
        rest: tuple[Any, ...] = ()
        if not metrics_only:
            events = read_events(place)
            rest = (_samples(place), events, read_config(place) | newest_changes(events), _kind(place))
        runs.append(Run(name if names.count(name) == 1 else os.fspath(folder), rows, *rest))
    return runs


def _check_numbers(rows: Sequence[Mapping[str, Any]], path: pathlib.Path) -> None:
    for number, row in enumerate(rows, 1):
        for name, value in row.items():
            if value is not None and not isinstance(value, int | float):
                raise ValueError(
                    f"{path}, line {number}: {name} must be a number or null, got {str(value)[:80]!r}; remove the line "
                    "to go on"
                )


def read_config(folder: pathlib.Path) -> dict[str, Any]:
    """{dotted key: value} of a run's config.yml, as it is written; empty without one.

    Raises:
      ValueError: it is no YAML, or no mapping.
    """
    path = folder / CONFIG
    if not path.is_file():
        return {}
    try:
        values = read_yaml(path.read_text(encoding="utf-8"), str(path))
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} must be text in UTF-8, got {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} must hold a mapping, got {type(values).__name__}")
    return flatten(values)


def _kind(folder: pathlib.Path) -> str:
    return str(read_json(folder / IDENTITY).get("kind", "grpo")) if (folder / IDENTITY).is_file() else "grpo"


def _samples(folder: pathlib.Path) -> list[dict[str, Any]]:
    return read_samples(folder) if (folder / SAMPLES).is_file() else []
