"""Tests of a program, as data sets write them, cut into tests that are judged one by one.

In: the text of the tests, or a list of texts. Out: `Tests`. The texts are parsed here and run elsewhere. Two forms are
known: asserts (MBPP's `test_list`, or a text with asserts on its first level), and a function `check(candidate)` as in
HumanEval (https://github.com/openai/human-eval).
"""

import ast
import builtins
import dataclasses
from collections.abc import Sequence

_CHECK = "check"


class UnreadableTestsError(Exception):
    """Tests that are of no known form."""


@dataclasses.dataclass(frozen=True)
class Tests:
    """Tests of one program.

    preamble: what runs before the tests: imports, helpers. units: the text of each test. stubs: the names in the tests
    that stand for functions of the program, with the names that the program gives them.
    """

    preamble: str
    units: tuple[str, ...]
    stubs: dict[str, str]


def read_tests(tests: str | Sequence[str], entry_point: str | None, starter: str | None, setup: str) -> Tests:
    """The tests of a row.

    entry_point: the name of the program's function; None: each name that the tests use and nobody defines. starter: the
    beginning of the program, whose helpers the tests may use, too. setup: code before the tests.
    Raises UnreadableTestsError with the reason.
    """
    before = [*_helpers(starter, entry_point), *_parse(setup)]
    if isinstance(tests, str):
        first, units, parameter = _units_of(_parse(tests))
    else:
        first, units, parameter = [], [_parse(text) for text in tests], None
    before += first
    stubs = {entry_point: entry_point} if entry_point else _undefined([*before, *(s for unit in units for s in unit)])
    if parameter is not None:
        if entry_point is None:
            raise UnreadableTestsError(f"{_CHECK}({parameter}) needs the column entry_point")
        stubs[parameter] = entry_point
    texts = tuple(text for unit in units if (text := _text(unit)))
    if not texts or not stubs:
        raise UnreadableTestsError("no test calls a function of the program")
    return Tests(_text(before), texts, stubs)


def _units_of(body: list[ast.stmt]) -> tuple[list[ast.stmt], list[list[ast.stmt]], str | None]:
    """What comes before the tests, the tests, and the parameter of `check` if there is one."""
    check = next((node for node in body if isinstance(node, ast.FunctionDef) and node.name == _CHECK), None)
    if check is None:
        return *_asserts(body, [body]), None
    if len(check.args.args) != 1:
        raise UnreadableTestsError(f"{_CHECK} must take one argument, the function of the program")
    parameter = check.args.args[0].arg
    others = [node for node in body if node is not check and not _calls_check(node)]
    whole = [check, *ast.parse(f"{_CHECK}({parameter})").body]
    first, units = _asserts(check.body, [whole])
    return [*others, *first], units, parameter


def _asserts(body: list[ast.stmt], whole: list[list[ast.stmt]]) -> tuple[list[ast.stmt], list[list[ast.stmt]]]:
    """(what comes first, one test for each assert) where each assert stands for itself, else (nothing, `whole`).

    An assert without a call, `assert True`, is no test.
    """
    first = [node for node in body if not isinstance(node, ast.Assert)]
    asserts = [node for node in body if isinstance(node, ast.Assert) and _has(node.test, ast.Name)]
    is_plain = all(
        isinstance(node, (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef))
        or (isinstance(node, (ast.Expr, ast.Assign)) and not _has(node.value, ast.Call))
        for node in first
    )
    if not asserts or not is_plain or not all(_has(node.test, ast.Call) for node in asserts):
        return [], whole
    return first, [[node] for node in asserts]


def _helpers(starter: str | None, entry_point: str | None) -> list[ast.stmt]:
    """The starter without the function that the program has to define."""
    if not starter:
        return []
    try:
        body = ast.parse(starter).body
    except (SyntaxError, ValueError, RecursionError):
        return []  # the beginning of a function, say: it has no whole helper
    return [node for node in body if getattr(node, "name", None) != entry_point]


def _undefined(body: list[ast.stmt]) -> dict[str, str]:
    used, made = set(), set(dir(builtins))
    for node in ast.walk(ast.Module(body, [])):
        if isinstance(node, ast.Name):
            (used if isinstance(node.ctx, ast.Load) else made).add(node.id)
        elif isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            made.add(node.name)
        elif isinstance(node, ast.arg):
            made.add(node.arg)
        elif isinstance(node, ast.alias):
            made.add((node.asname or node.name).partition(".")[0])
        elif isinstance(node, ast.ExceptHandler) and node.name:
            made.add(node.name)
    return {name: name for name in sorted(used - made)}


def _calls_check(node: ast.stmt) -> bool:
    return (
        isinstance(node, ast.Expr)
        and isinstance(node.value, ast.Call)
        and isinstance(node.value.func, ast.Name)
        and node.value.func.id == _CHECK
    )


def _has(node: ast.AST, kind: type[ast.AST]) -> bool:
    return any(isinstance(inner, kind) for inner in ast.walk(node))


def _parse(text: str) -> list[ast.stmt]:
    try:
        return ast.parse(text).body
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise UnreadableTestsError(f"the tests are no Python ({error})") from error


def _text(body: list[ast.stmt]) -> str:
    return ast.unparse(ast.Module(body, []))
