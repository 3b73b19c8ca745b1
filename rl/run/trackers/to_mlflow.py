"""MLflow: a run in an experiment of a local store or a server, found again by a tag with the run's id.

MLflow has neither histograms nor growing tables, so both are files of the run there, one for each step that has a
table.
"""

import csv
import dataclasses
import io
import json
import os
import re
import time
from collections.abc import Mapping
from typing import Any

import numpy as np

from rl.config.sections import flatten
from rl.run.trackers.contract import TrackedRun, TrackedStep, table_of
from rl.run.trackers.library import import_library

TAG = "tandem.run"  # holds the run's id
_EXPERIMENT = "tandem"
_MOST_PARAMS, _MOST_METRICS = 100, 1000  # in one call, by MLflow's own limits
_LONGEST_PARAM = 6000  # characters


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """`logging.tracker_args.mlflow`.

    Attributes:
      tracking_uri: the store, such as sqlite:////data/mlflow.db; None: the variable MLFLOW_TRACKING_URI, or MLflow's
        own default.
      experiment: None: the variable MLFLOW_EXPERIMENT_NAME, or "tandem".
      name: of the run; None: the run folder's.
      tags: of a new run.
    """

    tracking_uri: str | None = None
    experiment: str | None = None
    name: str | None = None
    tags: Mapping[str, str] | None = None


def check(settings: Settings) -> None:
    """ValueError where the library is missing."""
    import_library("mlflow", "mlflow")


def make(settings: Settings, run: TrackedRun) -> "_MLflow":
    """A tracker."""
    client = import_library("mlflow.tracking", "mlflow").MlflowClient(tracking_uri=settings.tracking_uri)
    experiment = settings.experiment or os.environ.get("MLFLOW_EXPERIMENT_NAME") or _EXPERIMENT
    found = client.get_experiment_by_name(experiment)
    experiment_id = client.create_experiment(experiment) if found is None else found.experiment_id
    earlier = client.search_runs([experiment_id], f"tags.`{TAG}` = '{run.id}'", max_results=1)
    if earlier:
        run_id = earlier[0].info.run_id
        client.update_run(run_id, status="RUNNING")
    else:
        all_tags = {**(settings.tags or {}), TAG: run.id, "tandem.kind": run.kind, "mlflow.source.name": "grpo"}
        run_id = client.create_run(experiment_id, tags=all_tags, run_name=settings.name or run.name).info.run_id
        _log_config(client, run_id, run.config)
    return _MLflow(client, run_id, f"run {run_id} of experiment {experiment}")


def _log_config(client: Any, run_id: str, config: Mapping[str, Any]) -> None:
    from mlflow.entities import Param  # pyright: ignore[reportMissingImports]

    params = [
        Param(_name(key), (value if isinstance(value, str) else json.dumps(value, default=str))[:_LONGEST_PARAM])
        for key, value in flatten(config).items()
    ]
    for start in range(0, len(params), _MOST_PARAMS):
        client.log_batch(run_id, params=params[start : start + _MOST_PARAMS])
    client.log_dict(run_id, dict(config), "config.json")


class _MLflow:
    def __init__(self, client: Any, run_id: str, place: str):
        self.place = place
        self._client, self._run_id = client, run_id

    def log(self, step: TrackedStep) -> None:
        from mlflow.entities import Metric  # pyright: ignore[reportMissingImports]

        now = int(time.time() * 1000)
        metrics = [Metric(_name(name), float(value), now, step.step) for name, value in step.metrics.items()]
        for start in range(0, len(metrics), _MOST_METRICS):
            self._client.log_batch(self._run_id, metrics=metrics[start : start + _MOST_METRICS])
        if not step.samples:
            return
        columns, rows = table_of(step.samples)
        text = io.StringIO()
        csv.writer(text).writerows([columns, *rows])
        self._client.log_text(self._run_id, text.getvalue(), f"samples/step_{step.step:08}.csv")
        histograms = {}
        for name, values in step.histograms.items():
            counts, edges = np.histogram(values, bins=30)
            histograms[name] = {"counts": counts.tolist(), "edges": edges.tolist()}
        if histograms:
            self._client.log_dict(self._run_id, histograms, f"histograms/step_{step.step:08}.json")

    def close(self, is_failed: bool) -> None:
        self._client.set_terminated(self._run_id, "FAILED" if is_failed else "FINISHED")


def _name(name: str) -> str:
    """A name of a metric or parameter as MLflow allows it."""
    return re.sub(r"[^\w\-./ :]", "_", name, flags=re.ASCII)[:250]
