"""The best evaluation of a run so far: which checkpoint is the best one, and when there was no better one for too long.

In: the metrics of each evaluation. Out: a `Best`, which checkpoints remember, so that a resumed run follows on exactly.
"""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from rl.config.load import Config
from rl.files.json_file import shown


class Best(NamedTuple):
    """The best evaluation so far.

    Attributes:
      step: after how many steps it was; None: there was none yet.
      value: of checkpoint.best.metric. num_since: evaluations since then.
    """

    step: int | None = None
    value: float | None = None
    num_since: int = 0


def follow_best(config: Config, best: Best, steps_done: int, metrics: Mapping[str, Any]) -> Best:
    """The best evaluation after one more step.

    A step that is not evaluated changes nothing, and neither does the evaluation before the first step, of which there
    is no checkpoint. A metric that is not a finite number is not better.

    Args:
      metrics: of the step's evaluation; empty where there was none.

    Raises:
      ValueError: the evaluation has no such metric.
    """
    section = config.checkpoint.best
    if section.metric is None or not metrics:
        return best
    if section.metric not in metrics:
        raise ValueError(
            f"checkpoint.best.metric must be a metric of the evaluations, got {shown(section.metric)}; they have "
            f"{', '.join(name for name in metrics if not name.endswith(('_low', '_high')))}"
        )
    if steps_done == 0:
        return best
    value = metrics[section.metric]
    if value is None or not math.isfinite(value):
        return best._replace(num_since=best.num_since + 1)
    if best.value is not None:
        gain = value - best.value if section.mode == "max" else best.value - value
        if gain <= config.eval.min_delta:
            return best._replace(num_since=best.num_since + 1)
    return Best(steps_done, float(value))


def is_over(config: Config, best: Best) -> bool:
    """Whether eval.patience evaluations in a row were not better than the best one."""
    return config.eval.patience is not None and best.num_since >= config.eval.patience


def end_of(config: Config, best: Best, steps_done: int) -> str:
    """Why the run ends, in words, for a run that `is_over`."""
    metric = config.checkpoint.best.metric
    was = "was never a number" if best.value is None else f"was best after step {best.step}, at {best.value:.4g}"
    kept = "" if best.step is None else " The best checkpoint is kept: --step best."
    return (
        f"stopped early after step {steps_done} of {config.grpo.steps}: {metric} {was}, and the {best.num_since} "
        f"evaluations since then were not better (eval.patience {config.eval.patience}).{kept} A larger eval.patience "
        "lets the same command go on"
    )


def refuse_best(config: Config, command: str) -> None:
    """ValueError for a command that evaluates at its end only, so that there is no best checkpoint to keep."""
    if config.checkpoint.best.metric is not None:
        raise ValueError(
            f"checkpoint.best.metric must be null for {command}, which evaluates at its end only, got "
            f"{shown(config.checkpoint.best.metric)}; add checkpoint.best.metric=null eval.patience=null"
        )
