"""Interpreters as processes that have left the host, for `sandbox: process` (Linux).

In: as `rewards.code_sandbox`. Each interpreter is a process of its own in new namespaces for users, files, processes,
network and shared memory, with limits and without privileges, see `rewards.code_child`. One template serves a whole
process (a reward worker): each interpreter is a new fork of it, in which nothing ran before. Nothing of what an
interpreter sends is believed but that it is JSON of a literal.
"""

import contextlib
import functools
import json
import os
import select
import socket
import subprocess
import sys
import time
import weakref
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from rewards import code_child
from rewards.code_child import MAX_BYTES, NotLiteralError, decode, dumps, encode
from rewards.code_sandbox import MAX_OUTPUT, GoneError, Interpreter, RaisedError, Span

_START = 20.0  # seconds, for a start on a machine that is busy
_MAX_LINE = 2 * max(MAX_BYTES, 6 * MAX_OUTPUT)  # a byte may take six in JSON
_FRAME = 64  # bytes of an answer around its value
_KILL = 5.0  # seconds
_READ = 1 << 16


class NoSandboxError(Exception):
    """This machine does not let a process leave the host; the message says which step failed."""


class ProcessSandbox:
    """Interpreters as processes. memory_mb: of each.

    The seconds of a span are of processor time, rounded up, and the interpreter ends with the span.
    """

    def __init__(self, memory_mb: float):
        self._memory_mb = memory_mb

    @contextlib.contextmanager
    def open(self, span: Span) -> Iterator[Interpreter]:
        """A new interpreter. Raises NoSandboxError where namespaces cannot be had."""
        if sys.platform != "linux":
            raise NoSandboxError(f"sandbox process needs namespaces of Linux, got {sys.platform}; take sandbox monty")
        span.check()
        interpreter = self._start(span)
        try:
            yield interpreter
        finally:
            interpreter.close()

    def _start(self, span: Span) -> "_ProcessInterpreter":
        for is_last in (False, True):
            template = _template(os.getpid())
            try:
                interpreter = _ProcessInterpreter(*template.fork(self._memory_mb, span.seconds), span)
            except ConnectionError as error:
                _template.cache_clear()
                if is_last:
                    raise NoSandboxError(f"the template of sandbox process does not run ({error})") from error
                continue
            try:
                interpreter.expect_ready()
                return interpreter
            except NoSandboxError:
                interpreter.close()
                if is_last or template.is_running():
                    raise
                _template.cache_clear()  # something ended it
        raise AssertionError("unreachable")


class _Template:
    """The process that forks interpreters. It ends with this process, or when nobody holds this object."""

    def __init__(self) -> None:
        control, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        source = Path(code_child.__file__).read_text()
        with other:
            # -P, -s, -S and the environment: nothing of the user's is imported. The hashes of strings are always the
            # same.
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-s", "-S", "-B", "-c", source],
                stdin=other.fileno(),
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                env={"PYTHONHASHSEED": "0", "LC_ALL": "C.UTF-8"},
                cwd="/",
            )
        self._control = control
        weakref.finalize(self, _end_template, control, self._process)

    def is_running(self) -> bool:
        return self._process.poll() is None

    def fork(self, memory_mb: float, timeout: float) -> tuple[int, int]:
        """The files for requests to a new interpreter and for its answers.

        Raises ConnectionError where the template has ended.
        """
        child_in, requests = os.pipe()
        answers, child_out = os.pipe()
        try:
            socket.send_fds(self._control, [dumps([memory_mb, timeout])], [child_in, child_out])
        except OSError:
            os.close(requests)
            os.close(answers)
            raise
        finally:
            os.close(child_in)
            os.close(child_out)
        return requests, answers


def _end_template(control: socket.socket, process: subprocess.Popen[bytes]) -> None:
    control.close()  # it ends now
    try:
        process.wait(_KILL)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


@functools.lru_cache(maxsize=1)
def _template(pid: int) -> _Template:
    """The template of this process, whose id is `pid`: a fork of it starts its own."""
    return _Template()


class _ProcessInterpreter:
    def __init__(self, requests: int, answers: int, span: Span):
        self._requests, self._answers, self._span = requests, answers, span
        os.set_blocking(requests, False)
        os.set_blocking(answers, False)
        self._end = min(span.end, time.monotonic() + _START)
        self._buffer = bytearray()
        self._is_gone = False

    def expect_ready(self) -> None:
        try:
            answer = self._receive()
        except GoneError as error:
            raise NoSandboxError(f"an interpreter of sandbox process does not start ({error})") from error
        if answer != ["ready"]:
            raise NoSandboxError(
                f"sandbox process needs namespaces, which this machine does not give ({answer[-1]}); take sandbox monty"
            )
        self._end = self._span.end

    def run(self, source: str, stubs: Mapping[str, Callable[..., Any]] | None = None) -> None:
        answer = self._ask(["run", source, sorted(stubs or {})])
        while stubs:
            match answer:
                case ["call", str(name), args, kwargs] if name in stubs:
                    answer = self._ask(_answer(stubs[name], args, kwargs))
                case _:
                    break
        if answer != ["done"]:
            raise _problem(answer)

    def call(self, expression: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        self._span.check()
        answer = self._ask(["call", expression, encode(list(args)), encode(dict(kwargs))], MAX_BYTES + _FRAME)
        match answer:
            case ["value", form]:
                return decode(form)
        raise _problem(answer)

    def program(self, source: str, given: str) -> str:
        answer = self._ask(["program", source, given, MAX_OUTPUT])
        match answer:
            case ["printed", str(text)]:
                return text
        raise _problem(answer)

    def close(self) -> None:
        """Ends the interpreter, and waits until none of its processes is left."""
        os.close(self._requests)  # the process that waits for it kills it now
        poll = select.poll()
        poll.register(self._answers, 0)  # POLLHUP alone: nobody holds the other end
        poll.poll(_KILL * 1000)
        os.close(self._answers)

    def _ask(self, request: Any, most: int = _MAX_LINE) -> list[Any]:
        """The answer to a request. Raises NotLiteralError for one of more than `most` bytes, without a look at it."""
        if self._is_gone:
            raise GoneError("it was ended before")
        self._send(dumps(request))
        return self._receive(most)

    def _send(self, data: bytes) -> None:
        left = memoryview(data)
        while left:
            self._wait(self._requests, select.POLLOUT)
            try:
                left = left[os.write(self._requests, left) :]
            except BlockingIOError:
                continue
            except BrokenPipeError as error:
                raise self._gone("it ended") from error

    def _receive(self, most: int = _MAX_LINE) -> list[Any]:
        while (end := self._buffer.find(b"\n")) < 0:
            if len(self._buffer) > _MAX_LINE:
                raise self._gone("it sent too much")
            self._wait(self._answers, select.POLLIN)
            try:
                data = os.read(self._answers, _READ)
            except BlockingIOError:
                continue
            if not data:
                raise self._gone("it ended")
            self._buffer += data
        line = bytes(self._buffer[:end])
        del self._buffer[: end + 1]
        if len(line) > most:
            raise NotLiteralError("a value of more than 4 MB")
        try:
            answer = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise self._gone("it sent no answer") from error
        if not isinstance(answer, list) or not answer:
            raise self._gone("it sent no answer")
        return answer

    def _wait(self, file: int, event: int) -> None:
        poll = select.poll()
        poll.register(file, event)
        if not poll.poll(max(0.0, self._end - time.monotonic()) * 1000):
            raise self._gone("its time is over")

    def _gone(self, reason: str) -> GoneError:
        self._is_gone = True
        return GoneError(reason)


def _answer(stub: Callable[..., Any], args: Any, kwargs: Any) -> list[Any]:
    """What the tests get for a call of the program."""
    try:
        return ["value", encode(stub(*decode(args), **decode(kwargs)))]
    except Exception as error:  # noqa: BLE001, of the program, which the tests get
        return ["raised", type(error).__name__, str(error)]


def _problem(answer: list[Any]) -> Exception:
    match answer:
        case ["raised", str(kind), str(message)]:
            return RaisedError(kind, message)
        case ["no_literal", str(message)]:
            return NotLiteralError(message[:200])
    return GoneError("it sent no answer")
