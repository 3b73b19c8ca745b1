"""The process behind `rl.files.untrusted`: renders templates and matches patterns that others wrote. Imports nothing of
rl.

In: JSON lines on the standard input. Out: one JSON line for each. A request that raises is answered with the error, and
the process ends. The system ends the process where a request takes too much processor time, and limits its memory where
it can.
"""

import contextlib
import functools
import json
import re
import resource
import signal
import sys
from datetime import datetime
from typing import Any

import jinja2
import jinja2.ext
import jinja2.meta
import jinja2.nodes
import jinja2.sandbox

MEMORY_BYTES = 1 << 30
_MESSAGE = 500  # characters of an error that are passed on
_TEMPLATE_FILE = "<template>"  # what jinja2 calls it in tracebacks


def main() -> None:
    """Answers requests until the standard input ends."""
    for limit, value in ((resource.RLIMIT_AS, MEMORY_BYTES), (resource.RLIMIT_CORE, 0), (resource.RLIMIT_FSIZE, 0)):
        with contextlib.suppress(OSError, ValueError):  # macOS knows no limit of the address space
            resource.setrlimit(limit, (value, value))
    sys.excepthook = _report
    for number in (
        signal.SIGPROF,
        signal.SIGALRM,
    ):  # the trainer's libraries may ignore or block them, which is inherited
        signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, (signal.SIGPROF, signal.SIGALRM))
    for line in sys.stdin.buffer:
        request = json.loads(line)
        _limit(request.pop("seconds"), request.pop("clock_seconds"))
        answer = _KINDS[request.pop("kind")](**request)
        _limit(0, 0)
        _write({"answer": answer})


def _limit(seconds: float, clock_seconds: float) -> None:
    """Has the system end this process after so many seconds of processor time, or by the clock; 0 takes that back."""
    signal.setitimer(signal.ITIMER_PROF, seconds)
    signal.setitimer(signal.ITIMER_REAL, clock_seconds)


def render(template: str, variables: dict[str, Any], most: int, now: str | None = None) -> str:
    """The text of a template, of at most `most` characters, written at the time `now` (ISO 8601; None: the present)."""
    if now is not None:
        variables = {**variables, "strftime_now": datetime.fromisoformat(now).strftime}
    pieces, size = [], 0
    for piece in _compile(template).generate(**variables):
        size += len(piece)
        if size > most:
            raise ValueError(f"its text is longer than {most} characters")
        pieces.append(piece)
    return "".join(pieces)


def variables(template: str) -> list[str]:
    """The names that a template looks up among its variables."""
    environment = _environment()
    return sorted(jinja2.meta.find_undeclared_variables(environment.parse(template)))


def match(pattern: str, texts: list[str], whole: bool) -> list[bool]:
    """For each text, whether the regular expression matches all of it, or, without `whole`, any part of it."""
    compiled = re.compile(pattern)
    find = compiled.fullmatch if whole else compiled.search
    return [find(text) is not None for text in texts]


@functools.lru_cache(maxsize=1)
def _compile(template: str) -> jinja2.Template:
    return _environment().from_string(template)


def _environment() -> jinja2.Environment:
    """The environment in which transformers compiles chat templates (`transformers.utils.chat_template_utils`)."""
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment


class _Generation(jinja2.ext.Extension):
    """{% generation %} marks what an assistant wrote; the text within is written as it is."""

    tags = {"generation"}  # noqa: RUF012 (jinja2 reads it of the class)

    def parse(self, parser: Any) -> Any:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_text"), [], [], body).set_lineno(line)

    def _text(self, caller: Any) -> str:
        return caller()


def _tojson(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _report(kind: type[BaseException], error: BaseException, traceback: Any) -> None:
    """Writes an error as one JSON line, in place of a traceback."""
    line = getattr(error, "lineno", None)
    while traceback is not None:
        if traceback.tb_frame.f_code.co_filename == _TEMPLATE_FILE:
            line = traceback.tb_lineno
        traceback = traceback.tb_next
    where = f" in line {line}" if line else ""
    _write({"error": f"{kind.__name__}{where}: {str(error)[:_MESSAGE]}"})


def _write(message: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(message) + "\n")
    sys.stdout.flush()


_KINDS = {"render": render, "variables": variables, "match": match}

if __name__ == "__main__":
    main()
