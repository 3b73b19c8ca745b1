"""Functions that run in the process of the run itself, beside those in workers: models on its devices.

They are code of the toolkit, never a user's, and judge each completion by itself. In: a whole batch. Out: its result
with their values put in. Where several processes judge a batch, each calls them with the whole batch, in the same order
of batches, and all get the same values.
"""

import dataclasses
import math
import time
from collections.abc import Sequence
from typing import Any, Protocol

from rewards.batch import COUNTS, Effort, RewardResult, failure_lines
from rewards.failed import FirstFailure
from rewards.replies import MAX_REWARD, Failure, LoadedFunction

# As what such a function appears among those of workers.
DESCRIPTION = LoadedFunction("sample", False, "elementwise", (), (), False, False, False, False)


class InProcess(Protocol):
    """A function of a whole batch that judges each completion by itself."""

    def __call__(self, prompts: Sequence[Any], completions: Sequence[Any], /) -> Sequence[float | Failure | None]:
        """A number, None where it cannot judge, or a failure, for each completion.

        Args:
          prompts, completions: text, or messages, in their JSON form.
        """
        ...


def with_values(
    result: RewardResult,
    key: int,
    name: str,
    function: InProcess,
    prompts: Sequence[Any],
    completions: Sequence[Any],
    steps_done: int = 0,
) -> RewardResult:
    """`result` with the values of the function at place `key` of the specs, after `steps_done` steps."""
    start = time.monotonic()
    values = [_checked(value) for value in function(prompts, completions)] if prompts else []
    seconds = time.monotonic() - start
    effort = result.effort | {name: Effort.of_call(seconds, len(values)) if values else Effort()}
    failed = [(sample, value) for sample, value in enumerate(values) if isinstance(value, tuple)]
    kinds = [kind for _, (kind, _) in failed] + ["none"] * values.count(None)
    problems, failures = failure_lines(name, failed)
    return dataclasses.replace(
        result,
        rewards=[
            [*row[:key], None if isinstance(value, tuple) else value, *row[key + 1 :]]
            for row, value in zip(result.rewards, values, strict=True)
        ],
        counts=result.counts | {name: {kind: kinds.count(kind) for kind in COUNTS}},
        problems=[*result.problems, *problems],
        effort=effort,
        failures=result.failures | ({name: failures} if failures else {}),
        first_failure=result.first_failure or _first(name, failed, prompts, completions, steps_done),
    )


def _first(
    name: str,
    failed: Sequence[tuple[int, Failure]],
    prompts: Sequence[Any],
    completions: Sequence[Any],
    steps_done: int,
) -> FirstFailure | None:
    for sample, (kind, message) in failed:
        call = f"sample {sample} of its batch"
        return FirstFailure(
            name, sample, call, kind, message, prompts[sample], completions[sample], steps_done=steps_done
        )
    return None


def _checked(value: float | Failure | None) -> float | Failure | None:
    """The value, or the failure that it is no reward, as for functions in workers."""
    if value is None or isinstance(value, tuple):
        return value
    if not math.isfinite(value):
        return "not_a_number", f"gave {value}"
    if abs(value) > MAX_REWARD:
        return "out_of_range", f"gave {value:g}, a reward must be within {MAX_REWARD:g} of 0"
    return value
