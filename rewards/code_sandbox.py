"""Interpreters in which programs and their tests run, each in one of its own.

In: Python as text, and literals. Out: literals, or an error of this module. What runs in an interpreter reaches neither
this process nor another interpreter.
"""

import contextlib
import json
import string
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, Protocol

from rewards.code_child import MAX_BYTES, NotLiteralError, decode
from rewards.extras import import_extra

INSTALL = "tandem-grpo[code]"
MAX_OUTPUT = 1 << 20  # bytes that a program may print where somebody reads them
_MAX_CALLS = 100_000  # of the program, by its tests
_GRACE = 0.5  # seconds after which an interpreter is killed that does not end by itself
_MAX_TEXT = 200  # characters of an error's message
# Of the module `string`, which Monty does not have.
_STRING = [name for name in string.__all__ if isinstance(getattr(string, name), str)]


NO_LITERAL = "no literal: "
# Values leave Monty as text, the JSON of `rewards.code_child.encode`: its own way of handing over values makes text of
# functions and ranges, and builds sets and dicts in this process, without a limit. A program may change these
# functions, and then gives other text.
_ENCODE = f"""
from json import dumps as dumps__
def encode__(value, depth=100):
    kind = type(value)
    if value is None or kind in (bool, float, str):
        return value
    if kind is int:
        return value if -(1 << 63) < value < (1 << 63) else ["i", hex(value)]
    if kind is bytes:
        return ["b", value.hex()]
    if kind is complex:
        return ["c", value.real, value.imag]
    if depth == 0:
        raise TypeError("{NO_LITERAL}a value of more than 100 levels")
    if isinstance(value, dict):
        return ["d", list(zip(items__(value.keys(), depth), items__(value.values(), depth)))]
    if kind not in (list, tuple, set, frozenset):
        raise TypeError("{NO_LITERAL}a value of the type " + kind.__name__)
    return [kind.__name__[0], items__(value, depth)]
def items__(values, depth):
    values = list(values)
    kinds = set(map(type, values))
    if kinds <= {{float, str, bool, type(None)}}:
        return values
    if kinds == {{int}} and -(1 << 63) < min(values) and max(values) < (1 << 63):
        return values
    return [encode__(value, depth - 1) for value in values]
def text__(value):
    return dumps__(encode__(value))
"""
_INPUT = """
def input(prompt=""):
    print(prompt, end="")
    if not lines__:
        raise EOFError("EOF when reading a line")
    return lines__.pop()
"""
# A test's function that stands for one of the program.
_STUB = """
def {name}(*args, **kwargs):
    return call__({name!r}, text__(args), text__(kwargs))
"""
# Monty's built-ins cannot call a function that waits for the program. These can, for the tests.
_BUILTINS = """
sorted__, min__, max__, iter__ = sorted, min, max, iter
def map(function, *iterables):
    return (function(*items) for items in zip(*iterables))
def filter(function, items):
    return (item for item in items if (item if function is None else function(item)))
def sorted(items, *, key=None, reverse=False):
    if key is None:
        return sorted__(items, reverse=reverse)
    items = list(items)
    keys = [key(item) for item in items]
    return [items[place] for place in sorted__(range(len(items)), key=lambda place: keys[place], reverse=reverse)]
def extreme__(function, values, key, default):
    if key is None:
        return function(*values, **default)
    items = list(values[0]) if len(values) == 1 else list(values)
    if not items:
        return function(items, **default)
    keys = [key(item) for item in items]
    return items[function(range(len(items)), key=lambda place: keys[place])]
def min(*values, key=None, **default):
    return extreme__(min__, values, key, default)
def max(*values, key=None, **default):
    return extreme__(max__, values, key, default)
def iter(values, *sentinel):
    if not sentinel:
        return iter__(values)
    found = []
    while (value := values()) != sentinel[0]:
        found.append(value)
    return iter__(found)
"""
_CANNOT_WAIT = "cannot suspend in this synchronous context"
_NO_CALLBACK = "Monty cannot call the program from within a built-in such as list.sort(key=f); take sandbox: process"


class Span(NamedTuple):
    """How long an interpreter may work: until when it takes requests, by `time.monotonic`, and seconds of each."""

    until: float
    seconds: float

    @property
    def end(self) -> float:
        """When its last request has ended."""
        return self.until + self.seconds

    def check(self) -> None:
        """Raises GoneError when it is over."""
        if time.monotonic() > self.until:
            raise GoneError("its time is over")


class RaisedError(Exception):
    """Code in an interpreter raised: `kind`, the name of the error's class, and its message."""

    def __init__(self, kind: str, message: str):
        super().__init__(f"{kind}: {message[:_MAX_TEXT]}")
        self.kind, self.message = kind, message[:_MAX_TEXT]


class GoneError(Exception):
    """The interpreter ended, or was ended at a limit. It takes no more requests."""


class Interpreter(Protocol):
    def run(self, source: str, stubs: Mapping[str, Callable[..., Any]] | None = None) -> None:
        """Runs code. stubs: of tests, functions of this process that the code may call with literals, by name.

        Raises RaisedError and GoneError.
        """
        ...

    def call(self, expression: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """What a function gives, as a literal. expression: its name, or `Class().name`.

        Raises RaisedError, GoneError and NotLiteralError.
        """
        ...

    def program(self, source: str, given: str) -> str:
        """What a program prints that reads `given` from its standard input. For a new interpreter.

        Raises RaisedError and GoneError.
        """
        ...


class Sandbox(Protocol):
    def open(self, span: Span) -> contextlib.AbstractContextManager[Interpreter]:
        """A new interpreter. Raises GoneError where the span is over."""
        ...


@contextlib.contextmanager
def monty(memory_mb: float) -> Iterator[Sandbox]:
    """Interpreters by Monty, which has neither files, network nor processes (https://github.com/pydantic/monty).

    memory_mb: of each. Raises ModuleNotFoundError without the library.
    """
    library = import_extra("pydantic_monty", INSTALL, "code")
    # One for the program and one for its tests, kept for the next program.
    with library.Monty(min_processes=1, max_processes=2, feed_duration_limit_grace=_GRACE) as pool:
        yield _MontySandbox(library, pool, memory_mb)


class _MontySandbox:
    def __init__(self, library: Any, pool: Any, memory_mb: float):
        self._library, self._pool, self._memory_mb = library, pool, memory_mb

    @contextlib.contextmanager
    def open(self, span: Span) -> Iterator[Interpreter]:
        span.check()
        constants = {name: getattr(string, name) for name in _STRING}
        stubs = "".join(f"{name}: str\n" for name in _STRING)
        limits = {
            "max_feed_duration_secs": span.seconds,
            "max_memory": int(self._memory_mb * (1 << 20)),
            "max_suspensions": _MAX_CALLS,
            "max_total_sleep_secs": span.seconds,
        }
        with self._pool.checkout(
            limits=limits,
            os_policy={"sleep": "zero", "random_start": {"seed": 0}},
            external_modules={"string": self._library.ExternalModule(constants, stubs=stubs)},
        ) as session:
            yield _MontyInterpreter(self._library, session, span)


class _MontyInterpreter:
    def __init__(self, library: Any, session: Any, span: Span):
        self._library, self._session, self._span = library, session, span
        self._is_gone = False
        self._is_of_tests = self._has_stubs = False
        self._feed(_ENCODE)

    def run(self, source: str, stubs: Mapping[str, Callable[..., Any]] | None = None) -> None:
        if stubs is not None and not self._is_of_tests:
            self._feed(_BUILTINS)
            self._is_of_tests = True
        stubs = dict(stubs or {})
        if stubs and not self._has_stubs:
            self._feed("".join(_STUB.format(name=name) for name in stubs))
            self._has_stubs = True
        lookup = {"call__": lambda name, args, kwargs: stubs[name](*_value(args), **_value(kwargs))}
        # Its value is not of interest: a last line may be an expression, whose value need be no literal.
        self._feed(f"{source}\nNone", external_lookup=lookup if stubs else {}, print_callback=_discard)

    def call(self, expression: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        inputs = {"args__": list(args), "kwargs__": dict(kwargs)}
        # Always text, whatever the program makes of the names in it.
        source = f'f"{{text__({expression}(*args__, **kwargs__))}}"'
        try:
            return _value(self._feed(source, inputs=inputs, print_callback=_discard))
        except RaisedError as error:
            if error.message.startswith(NO_LITERAL):
                raise NotLiteralError(error.message.removeprefix(NO_LITERAL)) from error
            raise

    def program(self, source: str, given: str) -> str:
        printed = self._library.CollectString(max_bytes=MAX_OUTPUT)
        self._feed(_INPUT, inputs={"lines__": given.splitlines()[::-1]})
        self._feed(f"{source}\nNone", print_callback=printed)
        return printed.output

    def _feed(self, source: str, **settings: Any) -> Any:
        if self._is_gone:
            raise GoneError("it was ended before")
        self._span.check()
        try:
            return self._session.feed_run(source, **settings)
        except self._library.MontyRuntimeError as error:
            inner = error.exception()
            if isinstance(inner, (TimeoutError, MemoryError)):
                self._is_gone = True
                raise GoneError(f"{type(inner).__name__}: {str(inner)[:_MAX_TEXT]}") from error
            message = _NO_CALLBACK if _CANNOT_WAIT in str(inner) else str(inner)
            raise RaisedError(type(inner).__name__, message) from error
        except self._library.MontySyntaxError as error:
            raise RaisedError("SyntaxError", str(error)) from error
        except self._library.MontyError as error:
            self._is_gone = True
            raise GoneError(f"it crashed: {str(error)[:_MAX_TEXT]}") from error
        except (ValueError, TypeError, OverflowError, RecursionError) as error:
            raise NotLiteralError(f"a value that cannot leave ({str(error)[:_MAX_TEXT]})") from error


def _value(text: str) -> Any:
    """The literal of a text that `_ENCODE` makes. Raises NotLiteralError."""
    if len(text) > MAX_BYTES:
        raise NotLiteralError("a value of more than 4 MB")
    try:
        return decode(json.loads(text))
    except ValueError as error:
        raise NotLiteralError("a broken answer") from error
    except RecursionError as error:
        raise NotLiteralError("a value that is too deep") from error


def _discard(stream: str, text: str) -> None:
    del stream, text
