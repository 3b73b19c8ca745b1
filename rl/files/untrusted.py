"""Runs what others wrote, chat templates and patterns of adapters, in a process that can be stopped.

In: a template and its variables, or a regular expression and texts. Out: the text, or which texts match. A template or
pattern that raises, takes more than `SECONDS` of processor time or writes too much gives an `UntrustedError`. The work
is done in a process of its own, `rl.files.untrusted_worker`, which sees none of this process's secrets.
"""

import contextlib
import json
import os
import pathlib
import signal
import subprocess
import sys
import weakref
from typing import Any

SECONDS = 1.0  # of processor time
CLOCK_SECONDS = 60.0  # the limit by the clock, for a busy machine
MAX_TEXT = 1_000_000  # characters that a template may write, besides those that it was given
_ENDING_SECONDS = 10.0  # from the end of the worker's output to its exit, on a busy machine
_WORKER = pathlib.Path(__file__).with_name("untrusted_worker.py")
_VARIABLES = ("PATH", "PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV", "LD_LIBRARY_PATH", "HOME", "LANG", "LC_ALL", "TZ")


class UntrustedError(Exception):
    """What went wrong, in words."""


class Untrusted:
    """The worker process. It starts with the first request, and again after one that ended it. For one thread at a
    time.
    """

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None

    def render(self, template: str, variables: dict[str, Any], now: str | None = None) -> str:
        """The text of a Jinja template, in the environment of transformers' chat templates.

        Args:
          variables: JSON; other values arrive as text.
          now: the time that `strftime_now` tells, in ISO 8601; None: the present.

        Raises:
          UntrustedError: the template raises, or takes or writes too much.
        """
        given = json.dumps(variables, default=str)
        most = MAX_TEXT + 2 * len(given)
        request = {"kind": "render", "template": template, "variables": json.loads(given), "most": most, "now": now}
        answer = self._ask(request, 12 * most)  # of JSON for one character: two escapes of six
        if not isinstance(answer, str):
            raise UntrustedError(f"it gave {type(answer).__name__} in place of text")
        return answer

    def variables(self, template: str) -> set[str]:
        """The names that a Jinja template looks up among its variables.

        Raises:
          UntrustedError: it is none, or takes too long.
        """
        answer = self._ask({"kind": "variables", "template": template}, 12 * len(template))
        if not isinstance(answer, list) or not all(isinstance(name, str) for name in answer):
            raise UntrustedError("it gave something else than a list of names")
        return set(answer)

    def match(self, pattern: str, texts: list[str], whole: bool = True) -> list[bool]:
        """For each text, whether the regular expression matches all of it, or, without `whole`, any part of it.

        Raises:
          UntrustedError: the pattern is no regular expression, or takes too long.
        """
        answer = self._ask({"kind": "match", "pattern": pattern, "texts": texts, "whole": whole}, 10 * len(texts))
        if not isinstance(answer, list) or [type(item) for item in answer] != [bool] * len(texts):
            raise UntrustedError("it gave something else than an answer for each text")
        return answer

    def close(self) -> None:
        """Ends the process, if there is one."""
        if self._process is not None:
            self._end()

    def _ask(self, request: dict[str, Any], most: int) -> Any:
        if self._process is None:
            self._process = _start()
            self._end = weakref.finalize(self, _end, self._process)
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        limits, line = {"seconds": SECONDS, "clock_seconds": CLOCK_SECONDS}, b""
        try:
            self._process.stdin.write(json.dumps({**request, **limits}).encode() + b"\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline(most + 1000)
            message = json.loads(line)
        except (BrokenPipeError, ValueError):  # the process has ended, or its answer is no JSON
            message = None
        if isinstance(message, dict) and message.keys() == {"answer"}:
            return message["answer"]
        if not line:  # the process is ending, and its exit status says why
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(_ENDING_SECONDS)
        self._end()
        code, self._process = self._process.returncode, None
        if isinstance(message, dict) and isinstance(message.get("error"), str):
            raise UntrustedError(message["error"])
        if code == -signal.SIGPROF:
            raise UntrustedError(f"it took more than {SECONDS:g} s of processor time")
        if code == -signal.SIGALRM:
            raise UntrustedError(f"it took more than {CLOCK_SECONDS:g} s")
        raise UntrustedError(f"its process ended with {code} and said {line[:80]!r}")


def _start() -> subprocess.Popen[bytes]:
    environment = {name: os.environ[name] for name in _VARIABLES if name in os.environ}
    return subprocess.Popen(
        [sys.executable, "-P", str(_WORKER)],  # -P: the folder of this package hides no module of others
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=environment,
        start_new_session=True,  # Ctrl-C is for the trainer
    )


def _end(process: subprocess.Popen[bytes]) -> None:
    assert process.stdin is not None
    assert process.stdout is not None
    with contextlib.suppress(BrokenPipeError):
        process.stdin.close()
    try:
        process.wait(0.1)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    process.stdout.close()
