"""Finished calls of the interface as a file of JSON lines: what was asked, and which tokens were drawn.

In: calls that came to their end (`rl.serving.calls.FinishedCall`). Out: a line for each, written as it ends. A file
that is there is gone on with. Not here: what is told to clients (`rl.serving.chat`, `rl.serving.completions`).
"""

import contextlib
import json
import os
import pathlib
import time
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any, Self

from rl.sampler.contract import Completion
from rl.serving.answers import number
from rl.serving.calls import FinishedCall


class CallFile:
    """Writes calls; a context manager, which closes the file.

    warn: is told once where the disk is full. Then nothing more is written, and the server goes on.

    Raises OSError where the file cannot be opened.
    """

    def __init__(self, path: str | os.PathLike[str], warn: Callable[[str], Any]) -> None:
        self._path, self._warn = pathlib.Path(path), warn
        self._file = self._path.open("a", encoding="utf-8")  # open for the life of the server

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with contextlib.suppress(OSError):
            self._file.close()

    def __call__(self, call: FinishedCall) -> None:
        """Writes a call."""
        if self._file.closed:
            return
        try:
            self._file.write(json.dumps(_told(call)) + "\n")
            self._file.flush()
        except OSError as error:
            self._warn(f"{self._path} could not be written: {error.strerror}; no further calls are recorded")
            with contextlib.suppress(OSError):
                self._file.close()


def _told(call: FinishedCall) -> dict[str, Any]:
    choices = map(_choice, call.prompt_ids, call.completions, call.answers)
    asked = {"key": call.key, "messages": list(call.messages), "tools": list(call.tools)}
    return {"time": round(time.time(), 3), **asked, "choices": list(choices)}


def _choice(prompt_ids: Sequence[int], completion: Completion, answer: Any) -> dict[str, Any]:
    assert completion.policy_logprobs is not None
    return {
        "prompt_ids": [int(token) for token in prompt_ids],
        "token_ids": completion.token_ids.tolist(),
        "logprobs": [number(value) for value in completion.policy_logprobs],
        "finish_reason": completion.finish_reason,
        "answer": answer,
    }
