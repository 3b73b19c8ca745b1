"""The first failure of a reward function, in full, for runs that stop there (`rewards.on_error: raise`).

In: what the bookkeeping of a batch knows of it. Out: an error that says it. Not here: failures that stop nothing, which
are most (`rewards.batch`).
"""

import dataclasses
import json
import textwrap
from typing import Any, Literal

OnError = Literal["none", "raise"]
_LONGEST = 4000  # characters of a prompt or completion


@dataclasses.dataclass(frozen=True)
class FirstFailure:
    """The failure of a call that a batch met first.

    name: of the function. sample: place in the batch of the first completion of the call; call: what the call was for.
    kind, message: see `rewards.replies`. prompt, completion: of that sample, in their JSON form. trace: the traceback
      of the function's own code; where its process was ended, the last lines of the log, which hold the stack; empty
      where neither is known. steps_done: of the run.
    """

    name: str
    sample: int
    call: str
    kind: str
    message: str
    prompt: Any
    completion: Any
    trace: str = ""
    steps_done: int = 0


class RewardFailedError(ValueError):
    """A reward function failed in a run that stops at that."""

    def __init__(self, failure: FirstFailure):
        what = f"{failure.name!r} failed after {failure.steps_done} steps on {failure.call}"
        rule = "rewards.on_error=raise ends the run here; with none it goes on without that reward"
        parts = [f"reward {what}: {failure.kind}: {failure.message}; {rule}"]
        parts += [_part("prompt", failure.prompt), _part("completion", failure.completion)]
        if failure.trace:
            is_killed = failure.kind in ("timeout", "crash")
            parts.append(_part("end of the log" if is_killed else "traceback", failure.trace))
        parts.append("Checkpoints are as before: the same command goes on from the newest, with the function mended.")
        super().__init__("\n".join(parts))


def _part(title: str, value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, indent=1)
    if title != "traceback" and len(text) > _LONGEST:
        text = f"{text[:_LONGEST]}... ({len(text) - _LONGEST} more characters were cut)"
    return f"{title}:\n{textwrap.indent(text.rstrip(), '    ')}"
