"""What a tracker is given, and what it has to have.

In: a run, then its steps. Out: whatever the tracker makes of them. A tracker of the toolkit is a module `to_NAME` with
a function `check(**settings)`, which refuses what cannot work before anything heavy starts, and a function
`make(run, **settings)`. A tracker of a user's is a function of a file, called as `make` is. Both return a `Tracker`.
Not here: the thread in which a tracker runs (`rl.run.trackers.delivery`).
"""

import dataclasses
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np


@dataclasses.dataclass(frozen=True)
class TrackedRun:
    """The run that a tracker is made for.

    Attributes:
      id: of the run, 32 hexadecimal digits; a run that is resumed keeps it.
      name: of its folder.
      kind: "grpo" or "sft".
      folder: its folder on this machine.
      config: the resolved configuration, nested as in a recipe.
      is_resumed: whether the folder held the run already.
    """

    id: str
    name: str
    kind: str
    folder: pathlib.Path
    config: Mapping[str, Any]
    is_resumed: bool


@dataclasses.dataclass(frozen=True)
class TrackedStep:
    """A step as a tracker gets it. Nothing in it may be changed: other trackers get the same object.

    Attributes:
      step: how many steps are done. After a resume from a checkpoint, steps may come that came before.
      metrics: the finite numbers of the step's line in metrics.jsonl.
      histograms: {name: values [N] of the step, finite}: "reward", "completion_length" and "advantage" of each
        completion.
      samples: every `logging.table_every` steps the records of samples.jsonl; else empty.
    """

    step: int
    metrics: Mapping[str, float]
    histograms: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)
    samples: Sequence[Mapping[str, Any]] = ()


class Tracker(Protocol):
    """Takes the steps of one run. All calls come from one thread, which is not the one that trains.

    It may have an attribute `place`: text that says where the run is to be seen, for the console.
    """

    def log(self, step: TrackedStep) -> None:
        """Takes a step. An error costs this step, and is warned about once."""
        ...

    def close(self, is_failed: bool) -> None:
        """The run ends; is_failed: with an error."""
        ...


def table_of(samples: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[list[Any]]]:
    """Columns and rows of a table of samples: texts, the rewards of each function, the advantage."""
    names = list(dict.fromkeys(name for sample in samples for name in sample.get("rewards", {})))
    plain = [
        *("prompt_index", "sample_index", "prompt", "completion"),
        *(name for name in ("answer", "reward") if any(name in sample for sample in samples)),
    ]
    last = ["advantage", "finish_reason"]
    columns = [*plain, *(f"reward/{name}" for name in names), *last]
    rows = [
        [
            *(_cell(sample.get(name)) for name in plain),
            *(sample.get("rewards", {}).get(name) for name in names),
            *(sample.get(name) for name in last),
        ]
        for sample in samples
    ]
    return columns, rows


def _cell(value: Any) -> Any:
    """Text or a number; a chat as the JSON of its messages."""
    return value if value is None or isinstance(value, (str, int, float)) else json.dumps(value, ensure_ascii=False)
