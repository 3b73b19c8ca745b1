"""Rewards: programs that pass their tests (library `pydantic-monty`, extra `code`, or `sandbox: process`).

In: completions with Python in them, and tests. Out: 1 or 0, or the share of the tests that pass.

    unit_tests     asserts (MBPP), or check(candidate) (HumanEval)
    input_output   inputs with their outputs, for programs and for functions (APPS, LiveCodeBench)

The program and its tests run in interpreters of their own. Arguments and results cross as literals and nothing else
does, so a program can neither see what is expected nor decide whether it was right: stack walking, `exit`, prints,
changed builtins and classes that equal everything do no more than give a wrong answer.
"""

import ast
import contextlib
import json
import math
import re
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from decimal import Decimal, InvalidOperation
from typing import Any, Literal, NamedTuple

from rewards.code_child import NotLiteralError, error_of, literal
from rewards.code_process import NoSandboxError, ProcessSandbox
from rewards.code_sandbox import INSTALL, NO_LITERAL, GoneError, Interpreter, RaisedError, Sandbox, Span, monty
from rewards.code_tests import Tests, UnreadableTestsError, read_tests
from rewards.contract import checked_by, elementwise
from rewards.extras import import_extra
from rewards.importing import _Function
from rewards.settings import check_names
from rewards.text import after_thinking, completion_text

_FENCE = re.compile(r"^[ \t]*```[ \t]*([\w+-]*)[^\n]*\n(.*?)(?:^[ \t]*```|\Z)", re.DOTALL | re.MULTILINE)
_PYTHON = ("", "python", "py", "python3")
_CLASS = "Solution"  # of LeetCode's problems
_MAX_SOURCE = 1 << 17  # characters
_WAIT = 5.0  # seconds beyond the limit of processor time, which is what counts on a machine that is busy
# Errors of tests that cannot be run here, by the beginning of their names.
_NO_TEST = ("ImportError", "ModuleNotFound", "NameError", "NotImplemented", "SyntaxError")
_Log = Callable[[str, Any], None]


def check_kwargs(kwargs: Mapping[str, Any]) -> None:
    """Raises ValueError for settings that are wrong, and for a sandbox that cannot be had here."""
    check_names(kwargs, _Settings._fields)
    settings = _Settings(**kwargs)
    settings.check()
    if settings.sandbox == "monty":
        try:
            import_extra("pydantic_monty", INSTALL, "sandbox monty")
        except ModuleNotFoundError as error:
            raise ValueError(str(error)) from error
    else:
        try:
            with ProcessSandbox(256).open(Span(time.monotonic() + 60, 10)):
                pass  # it can be had here
        except NoSandboxError as error:
            raise ValueError(str(error)) from error


def _of_recipe(function: _Function) -> _Function:
    """Mark a function whose settings no column of the data set gives, as a decorator."""
    names = {"score", "sandbox", "timeout", "memory_mb", "rewards_timeout_seconds"}
    function.settings_of_recipe = names  # pyright: ignore[reportFunctionMemberAccess]
    return function


@elementwise
@_of_recipe
@checked_by(check_kwargs)
def unit_tests(
    prompts: Sequence[Any],
    completions: Sequence[Any],
    tests: Sequence[str | Sequence[str]],
    entry_point: Sequence[str | None] | None = None,
    starter: Sequence[str | None] | None = None,
    setup: Sequence[str | Sequence[str] | None] | None = None,
    score: Literal["all", "share"] = "all",
    sandbox: Literal["monty", "process"] = "monty",
    timeout: float = 10.0,
    memory_mb: float = 256.0,
    rewards_timeout_seconds: float | None = None,
    log_metric: _Log = lambda *_: None,
    log_extra: _Log = lambda *_: None,
    **columns: Any,
) -> list[float | None]:
    """1.0 where the program in the completion passes all tests of its row, else 0.0; or the share that it passes.

    The program is the last block between ```python and ```, or else the whole text, behind the last `</think>`. Where
    `starter`, or a prompt that is text, begins the program and the completion does not define `entry_point`, the
    completion goes on from it.

    tests: Python with asserts, or with check(candidate), or a list of such texts. entry_point: the name of the function
    under test; where it is missing, each name that the tests do not define is one. starter: the beginning of the
    program. setup: code before the tests, or a list of it.
    score: all, or share. sandbox: where code runs. timeout: seconds, see `_Times`. memory_mb: of each interpreter.
    rewards_timeout_seconds: after which the run gives up; a completion is judged before.

    A test counts if it calls the program, and fails if the program gives no literal. None for a row whose tests cannot
    be judged; `code_problem` in the sample says why. Metrics: `code_not_literal`, the share of completions that gave a
    value that is no literal. Raises ValueError for wrong settings; ModuleNotFoundError without the library, and
    NoSandboxError without namespaces.
    """
    rows = zip(prompts, tests, *_columns(len(completions), entry_point, starter, setup), strict=True)

    def judge(interpreters: Sandbox, times: _Times, text: str, row: tuple[Any, ...]) -> _Verdict:
        prompt, of_row, name, start, before = row
        if start is None and name is not None and isinstance(prompt, str) and _defines(prompt, name):
            start = prompt
        read = read_tests(of_row, name, start, before if isinstance(before, str) else "\n".join(before or ()))
        return _run_tests(interpreters, times, read, _program(text, name, start), score == "all")

    settings = _Settings(score, sandbox, timeout, memory_mb)
    return _judge_all(completions, rows, judge, settings, rewards_timeout_seconds, log_metric, log_extra)


@elementwise
@_of_recipe
@checked_by(check_kwargs)
def input_output(
    prompts: Sequence[Any],
    completions: Sequence[Any],
    inputs: Sequence[Sequence[Any] | str],
    outputs: Sequence[Sequence[Any] | str],
    fn_name: Sequence[str | None] | None = None,
    starter: Sequence[str | None] | None = None,
    score: Literal["all", "share"] = "all",
    sandbox: Literal["monty", "process"] = "monty",
    timeout: float = 10.0,
    memory_mb: float = 256.0,
    rewards_timeout_seconds: float | None = None,
    log_metric: _Log = lambda *_: None,
    log_extra: _Log = lambda *_: None,
    **columns: Any,
) -> list[float | None]:
    """1.0 where the program gives all outputs of its row for its inputs, else 0.0; or the share of them.

    Without `fn_name` an input is what the program reads from its standard input, in a new interpreter for each, and an
    output is what it prints; lines are compared word by word without surrounding space, and numbers by their value.
    With it, the program defines a function of that name, or a class Solution with such a method. An input is then the
    list of its arguments, or a text with one JSON value a line (LiveCodeBench), and an output its value, also in a list
    of its own (APPS), or JSON of it. Tuples count as lists, as JSON has no others.

    inputs, outputs: lists of the same length, or JSON of them. Otherwise `unit_tests`.
    """
    rows = zip(inputs, outputs, *_columns(len(completions), fn_name, starter), strict=True)

    def judge(interpreters: Sandbox, times: _Times, text: str, row: tuple[Any, ...]) -> _Verdict:
        given, wanted, name, start = row
        pairs = _pairs(given, wanted, name)
        return _run_pairs(interpreters, times, pairs, _program(text, name, start), name, score == "all")

    settings = _Settings(score, sandbox, timeout, memory_mb)
    return _judge_all(completions, rows, judge, settings, rewards_timeout_seconds, log_metric, log_extra)


class _Verdict(NamedTuple):
    """reward: None where the tests cannot be judged. problem: the first. is_not_literal: whether a value was none."""

    reward: float | None
    problem: str | None = None
    is_not_literal: bool = False


class _Settings(NamedTuple):
    """How programs run and are scored, see `unit_tests`; of any type until `check`."""

    score: Any = "all"
    sandbox: Any = "monty"
    timeout: Any = 10
    memory_mb: Any = 256

    def check(self) -> None:
        if self.score not in ("all", "share"):
            raise ValueError(f'score must be "all" or "share", got {self.score!r}')
        if self.sandbox not in ("monty", "process"):
            raise ValueError(f'sandbox must be "monty" or "process", got {self.sandbox!r}')
        for name, value, least in (("timeout", self.timeout, 0.1), ("memory_mb", self.memory_mb, 32)):
            is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if not is_number or not least <= value < math.inf:
                raise ValueError(f"{name} must be a finite number >= {least}, got {value!r}")

    def open(self) -> contextlib.AbstractContextManager[Sandbox]:
        if self.sandbox == "monty":
            return monty(self.memory_mb)
        return contextlib.nullcontext(ProcessSandbox(self.memory_mb))


class _Times(NamedTuple):
    """When the judging of a completion must be where, so that a program that takes too long fails in time.

    start: by `time.monotonic`. timeout: the most seconds of a request to an interpreter. limit: of the run; None: none.
    """

    start: float
    timeout: float
    limit: float | None

    @property
    def program(self) -> Span:
        """Of the interpreters of the program, all together: it has ended by 7/10 of the limit."""
        most = math.inf if self.limit is None else self.limit
        return Span(self.start + min(self.timeout + _WAIT, 0.4 * most), min(self.timeout, 0.3 * most))

    @property
    def tests(self) -> Span:
        """Of the interpreter of the tests: it outlives the program's, and has ended by 9/10 of the limit."""
        most = math.inf if self.limit is None else self.limit
        return Span(self.program.end, min(self.timeout, 0.2 * most))


def _columns(size: int, *columns: Sequence[Any] | None) -> list[Sequence[Any]]:
    """Columns, where a missing one has no value in any row."""
    return [[None] * size if column is None else column for column in columns]


def _judge_all(
    completions: Sequence[Any],
    rows: Iterable[tuple[Any, ...]],
    judge: Callable[[Sandbox, _Times, str, tuple[Any, ...]], _Verdict],
    settings: _Settings,
    limit: float | None,
    log_metric: _Log,
    log_extra: _Log,
) -> list[float | None]:
    settings.check()
    verdicts, start = [], time.monotonic()
    with settings.open() as interpreters:
        for completion, row in zip(completions, rows, strict=True):
            try:
                times = _Times(start, settings.timeout, limit)
                verdicts.append(judge(interpreters, times, completion_text(completion), row))
            except UnreadableTestsError as error:
                verdicts.append(_Verdict(None, str(error)))
            log_metric("code_not_literal", float(verdicts[-1].is_not_literal))
            start = time.monotonic()
    log_extra("code_problem", [verdict.problem for verdict in verdicts])
    return [verdict.reward for verdict in verdicts]


# The program of a completion


def _program(text: str, name: str | None, starter: str | None) -> str:
    """The program that a completion stands for; "" where there is none, or one that is too long."""
    text = after_thinking(text)
    blocks = [code for language, code in _FENCE.findall(text) if language.lower() in _PYTHON]
    code = blocks[-1] if blocks else text
    if len(code) > _MAX_SOURCE or not code.strip():
        return ""
    if not starter:
        return code
    if name is not None and not _defines(code, name) and not _defines(code, _CLASS):
        return f"{starter}{code}"
    return f"{starter}\n{code}" if _is_python(starter) else code


def _defines(code: str, name: str) -> bool:
    return re.search(rf"^(?:def|class)\s+{re.escape(name)}\b|^{re.escape(name)}\s*=", code, re.MULTILINE) is not None


def _is_python(starter: str) -> bool:
    try:
        ast.parse(starter)
    except (SyntaxError, ValueError, RecursionError):
        return False
    return True


# Tests in an interpreter of their own


class _Calls:
    """Calls of the program by its tests."""

    def __init__(self, program: Interpreter):
        self._program = program
        self.number = 0
        self.is_raised = False  # whether the program raised
        self.failure: str | None = None  # of the program: no answer, or none that is a literal
        self.is_not_literal = False
        self.problem: str | None = None  # of the tests

    def stub(self, name: str) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            self.number += 1
            try:
                args, kwargs = literal(args), literal(kwargs)
            except NotLiteralError as error:
                self.problem = f"a test hands over {error}"
                raise RuntimeError("no literal") from None
            try:
                return self._program.call(name, args, kwargs)
            except RaisedError as error:
                self.is_raised = True
                raise error_of(error.kind, error.message) from None
            except NotLiteralError as error:
                self.is_not_literal, self.failure = True, f"{name} gave {error}"
            except GoneError as error:
                self.failure = str(error)
            raise RuntimeError("the program gave no answer")

        return call


def _run_tests(sandbox: Sandbox, times: _Times, tests: Tests, source: str, is_all: bool) -> _Verdict:
    with sandbox.open(times.tests) as judge, sandbox.open(times.program) as program:
        try:
            judge.run(tests.preamble, {})
        except (RaisedError, GoneError) as error:
            return _Verdict(None, f"the code before the tests fails: {error}")
        if (problem := _load(program, source)) is not None:
            return _Verdict(0.0, problem)
        passed, counted, problem, is_not_literal = 0, 0, None, False
        for number, unit in enumerate(tests.units, 1):
            calls = _Calls(program)
            failure, left = None, 0
            try:
                judge.run(unit, {name: calls.stub(target) for name, target in tests.stubs.items()})
            except RaisedError as error:
                failure = str(error)
                is_of_tests = error.kind.startswith(_NO_TEST) or error.message.startswith(NO_LITERAL)
                if is_of_tests and not calls.is_raised and calls.failure is None:
                    calls.problem = calls.problem or failure
            except GoneError as error:
                failure = f"the tests were ended: {error}"
                if calls.number == counted == 0:
                    calls.problem = failure
                left = len(tests.units) - number  # they fail as well
            failure = calls.failure or failure
            if calls.problem is not None:
                return _Verdict(None, calls.problem)
            is_not_literal |= calls.is_not_literal
            if calls.number == 0 and failure is None:
                continue  # it says nothing about the program
            counted += 1 + left
            passed += failure is None
            problem = problem or failure
            if left or (failure is not None and is_all):
                break
    if counted == 0:
        return _Verdict(None, "no test calls the program")
    return _Verdict(float(passed == counted) if is_all else passed / counted, problem, is_not_literal)


def _load(program: Interpreter, source: str) -> str | None:
    """Runs the program itself. Returns what is wrong with it."""
    if not source:
        return "no program"
    try:
        program.run(source)
    except (RaisedError, GoneError) as error:
        return str(error)
    return None


# Inputs and outputs


def _pairs(inputs: Any, outputs: Any, name: str | None) -> list[tuple[Any, Any]]:
    given, wanted = _list_of(inputs, "inputs"), _list_of(outputs, "outputs")
    if not given or len(given) != len(wanted):
        raise UnreadableTestsError(
            f"inputs and outputs must be lists of one length, got {len(given)} and {len(wanted)}"
        )
    if name is None:
        return [(_lines_of(one), _lines_of(other)) for one, other in zip(given, wanted, strict=True)]
    if not name.isidentifier():
        raise UnreadableTestsError(f"fn_name must be a name, got {name[:50]!r}")
    try:
        return [
            (
                [json.loads(line) for line in one.split("\n") if line.strip()] if isinstance(one, str) else list(one),
                json.loads(other) if isinstance(one, str) and isinstance(other, str) else _as_json(other),
            )
            for one, other in zip(given, wanted, strict=True)
        ]
    except (ValueError, TypeError, RecursionError) as error:
        raise UnreadableTestsError(f"inputs of {name} must be lists of arguments, or JSON ({error})") from error


def _list_of(value: Any, name: str) -> list[Any]:
    try:
        value = json.loads(value) if isinstance(value, str) else value
    except (ValueError, RecursionError) as error:
        raise UnreadableTestsError(f"{name} must be a list, or JSON of one ({error})") from error
    if not isinstance(value, (list, tuple)):
        raise UnreadableTestsError(f"{name} must be a list, got {type(value).__name__}")
    return list(value)


def _lines_of(value: Any) -> str:
    return value if isinstance(value, str) else "\n".join(map(str, value))


def _run_pairs(
    sandbox: Sandbox, times: _Times, pairs: Sequence[tuple[Any, Any]], source: str, name: str | None, is_all: bool
) -> _Verdict:
    passed, problem, is_not_literal = 0, None, False
    if not source:
        return _Verdict(0.0, "no program")
    with contextlib.ExitStack() as stack:
        program = None
        if name is not None:
            program = stack.enter_context(sandbox.open(times.program))
            if (problem := _load(program, source)) is not None:
                return _Verdict(0.0, problem)
        for given, wanted in pairs:
            failure = None
            try:
                if program is None:
                    with sandbox.open(times.program) as fresh:
                        is_right = _same_lines(fresh.program(source, given), wanted)
                else:
                    expression = f"{_CLASS}().{name}" if _defines(source, _CLASS) else str(name)
                    value = _as_json(program.call(expression, tuple(given), {}))
                    is_right = value == wanted or (isinstance(wanted, list) and len(wanted) == 1 and value == wanted[0])
                failure = None if is_right else "a wrong output"
            except NotLiteralError as error:
                is_not_literal, failure = True, f"{name} gave {error}"
            except (RaisedError, GoneError) as error:
                failure = str(error)
            passed += failure is None
            problem = problem or failure
            if failure is not None and is_all:
                break
    return _Verdict(float(passed == len(pairs)) if is_all else passed / len(pairs), problem, is_not_literal)


def _as_json(value: Any) -> Any:
    """A literal with lists in place of tuples."""
    if isinstance(value, (list, tuple)):
        return [_as_json(item) for item in value]
    return {key: _as_json(item) for key, item in value.items()} if isinstance(value, dict) else value


def _same_lines(printed: str, wanted: str) -> bool:
    one, other = ([line.split() for line in text.strip().splitlines()] for text in (printed, wanted))
    return len(one) == len(other) and all(
        len(words) == len(others) and all(map(_same_word, words, others))
        for words, others in zip(one, other, strict=True)
    )


def _same_word(word: str, other: str) -> bool:
    try:
        return word == other or Decimal(word) == Decimal(other)
    except InvalidOperation:
        return False
