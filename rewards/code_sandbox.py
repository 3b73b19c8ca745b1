"""Interpreters in which programs and their tests run, each in one of its own.

In: Python as text, and literals. Out: literals, or an error of this module. What runs in an interpreter reaches neither
this process nor another interpreter.
"""

import contextlib
import string
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

from rewards.code_child import NotLiteralError, literal
from rewards.extras import import_extra

INSTALL = "tandem-grpo[code]"
MAX_OUTPUT = 1 << 20  # bytes that a program may print where somebody reads them
_MAX_CALLS = 100_000  # of the program, by its tests
_GRACE = 5.0  # seconds
_MAX_TEXT = 200  # characters of an error's message
# Of the module `string`, which Monty does not have.
_STRING = [name for name in string.__all__ if isinstance(getattr(string, name), str)]


# Monty gives functions, ranges and the like to this process as text, so they are found in the interpreter.
NO_LITERAL = "no literal: a value of the type "
_LITERAL = f"""
def literal__(value):
    kind = type(value)
    if kind in (list, tuple, set, frozenset):
        for item in value:
            literal__(item)
    elif isinstance(value, dict):
        for key, item in value.items():
            literal__(key)
            literal__(item)
    elif value is not None and kind not in (bool, int, float, complex, str, bytes):
        raise TypeError("{NO_LITERAL}" + kind.__name__)
    return value
"""
_INPUT = """
def input(prompt=""):
    print(prompt, end="")
    return read_line__()
"""
# A test's function that stands for one of the program.
_STUB = """
def {name}(*args, **kwargs):
    return call__({name!r}, literal__(args), literal__(kwargs))
"""


class RaisedError(Exception):
    """Code in an interpreter raised: `kind`, the name of the error's class, and its message."""

    def __init__(self, kind: str, message: str):
        super().__init__(f"{kind}: {message[:_MAX_TEXT]}")
        self.kind, self.message = kind, message[:_MAX_TEXT]


class GoneError(Exception):
    """The interpreter ended, or was ended at a limit. It takes no more requests."""


class Interpreter(Protocol):
    def run(self, source: str, stubs: Mapping[str, Callable[..., Any]] | None = None) -> None:
        """Runs code. stubs: functions of this process that the code may call with literals, by name.

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
    def open(self) -> contextlib.AbstractContextManager[Interpreter]:
        """A new interpreter."""
        ...


@contextlib.contextmanager
def monty(timeout: float, memory_mb: float) -> Iterator[Sandbox]:
    """Interpreters by Monty, which has neither files, network nor processes (https://github.com/pydantic/monty).

    timeout: seconds that an interpreter may compute. memory_mb: of each.
    Raises ModuleNotFoundError without the library.
    """
    library = import_extra("pydantic_monty", INSTALL, "code")
    # One for the program and one for its tests, kept for the next program.
    with library.Monty(min_processes=1, max_processes=2, request_timeout=timeout + _GRACE) as pool:
        yield _MontySandbox(library, pool, timeout, memory_mb)


class _MontySandbox:
    def __init__(self, library: Any, pool: Any, timeout: float, memory_mb: float):
        self._library, self._pool, self._timeout = library, pool, timeout
        self._limits = {
            "max_feed_duration_secs": timeout,
            "max_memory": int(memory_mb * (1 << 20)),
            "max_suspensions": _MAX_CALLS,
            "max_total_sleep_secs": timeout,
        }

    @contextlib.contextmanager
    def open(self) -> Iterator[Interpreter]:
        constants = {name: getattr(string, name) for name in _STRING}
        stubs = "".join(f"{name}: str\n" for name in _STRING)
        with self._pool.checkout(
            limits=self._limits,
            os_policy={"sleep": "zero", "random_start": {"seed": 0}},
            external_modules={"string": self._library.ExternalModule(constants, stubs=stubs)},
        ) as session:
            yield _MontyInterpreter(self._library, session, self._timeout)


class _MontyInterpreter:
    def __init__(self, library: Any, session: Any, timeout: float):
        self._library, self._session, self._timeout = library, session, timeout
        self._spent = 0.0  # seconds, of calls
        self._is_gone = False
        self._has_stubs = False
        self._feed(_LITERAL)

    def run(self, source: str, stubs: Mapping[str, Callable[..., Any]] | None = None) -> None:
        stubs = dict(stubs or {})
        if stubs and not self._has_stubs:
            self._feed("".join(_STUB.format(name=name) for name in stubs))
            self._has_stubs = True
        lookup = {"call__": lambda name, args, kwargs: stubs[name](*args, **kwargs)}
        # Its value is not of interest: a last line may be an expression, whose value need be no literal.
        self._feed(f"{source}\nNone", external_lookup=lookup if stubs else {}, print_callback=_discard)

    def call(self, expression: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        if self._spent > self._timeout:
            raise GoneError("its time is over")
        inputs = {"args__": list(args), "kwargs__": dict(kwargs)}
        try:
            # A program may change `literal__`, and gives then what Monty makes of its own values.
            source = f"literal__({expression}(*args__, **kwargs__))"
            start = time.monotonic()
            value = self._feed(source, inputs=inputs, print_callback=_discard)
            self._spent += time.monotonic() - start
            return literal(value)
        except RaisedError as error:
            if error.message.startswith(NO_LITERAL):
                raise NotLiteralError(error.message.removeprefix("no literal: ")) from error
            raise
        except RecursionError as error:
            raise NotLiteralError("a value that is too deep") from error

    def program(self, source: str, given: str) -> str:
        lines = iter(given.splitlines())

        def read_line() -> str:
            try:
                return next(lines)
            except StopIteration:
                raise EOFError("EOF when reading a line") from None

        printed = self._library.CollectString(max_bytes=MAX_OUTPUT)
        self._feed(_INPUT)
        self._feed(f"{source}\nNone", external_lookup={"read_line__": read_line}, print_callback=printed)
        return printed.output

    def _feed(self, source: str, **settings: Any) -> Any:
        if self._is_gone:
            raise GoneError("it was ended before")
        try:
            return self._session.feed_run(source, **settings)
        except self._library.MontyRuntimeError as error:
            inner = error.exception()
            if isinstance(inner, (TimeoutError, MemoryError)):
                self._is_gone = True
                raise GoneError(f"{type(inner).__name__}: {str(inner)[:_MAX_TEXT]}") from error
            raise RaisedError(type(inner).__name__, str(inner)) from error
        except self._library.MontySyntaxError as error:
            raise RaisedError("SyntaxError", str(error)) from error
        except self._library.MontyError as error:
            self._is_gone = True
            raise GoneError(f"it crashed: {str(error)[:_MAX_TEXT]}") from error
        except (ValueError, TypeError, OverflowError, RecursionError) as error:
            raise NotLiteralError(f"a value that cannot leave ({str(error)[:_MAX_TEXT]})") from error


def _discard(stream: str, text: str) -> None:
    del stream, text
