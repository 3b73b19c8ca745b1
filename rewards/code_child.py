"""What runs in an interpreter of `sandbox: process`, and the literals that cross between interpreters.

In: requests, one JSON line each. Out: one JSON line each. The parent (`rewards.code_process`) believes nothing of what
comes back but that it is a literal: the program under test lives in the same interpreter as this module, and may write
any answer it likes, which can only be its own answer.

The process that the parent starts is the template: it has imported what an interpreter needs, runs nobody's code, and
forks for each interpreter, which saves the start of Python (three quarters of an interpreter's processor time). The
fork keeps two pipes to the parent and none to the template. It leaves its namespaces behind and starts a process, the
first of a pid namespace, which drops what it may still do and serves. The fork waits, and kills that process when the
parent closes the pipe.

This file is given to `python -c` as text, so it imports nothing but the standard library.
"""

import builtins
import contextlib
import ctypes
import gc
import glob
import io
import json
import math
import os
import resource
import select
import signal
import socket
import sys
import types
from collections.abc import Callable
from typing import Any

_MARKS = {list: "l", tuple: "t", set: "s", frozenset: "f"}
_KINDS = {mark: kind for kind, mark in _MARKS.items()}
_MAX_DEPTH = 100
MAX_BYTES = 1 << 22  # of a literal in JSON
_MAX_ALIKE = 64  # items of a set or a dict with one hash: {2.0**k} has 61 hashes
# Errors that end an iteration without a word.
_ENDS_ITERATION = ("StopIteration", "StopAsyncIteration")


class NotLiteralError(Exception):
    """A value that is no literal, so that it cannot leave its interpreter."""


def literal(value: Any, depth: int = _MAX_DEPTH) -> Any:
    """A copy of a value made of None, bool, int, float, complex, str, bytes, list, tuple, set, frozenset and dict.

    Subclasses of these are no literals, but for a named tuple and the mappings that `collections` derives from dict,
    which equal a plain one. Raises NotLiteralError for anything else, for more than 4 MB, and below 100 levels.
    """
    form = encode(value, depth)
    if len(dumps(form)) > MAX_BYTES:
        raise NotLiteralError("a value of more than 4 MB")
    return decode(form)


def encode(value: Any, depth: int = _MAX_DEPTH) -> Any:
    """The JSON form of a literal. Raises NotLiteralError as `literal` does."""
    kind = type(value)
    if value is None or kind in (bool, float, str):
        return value
    if kind is int:
        return value if value.bit_length() < 64 else ["i", hex(value)]
    if kind is bytes:
        return ["b", value.hex()]
    if kind is complex:
        return ["c", value.real, value.imag]
    if depth == 0:
        raise NotLiteralError("a value of more than 100 levels")
    if kind in _MARKS:
        return [_MARKS[kind], [encode(item, depth - 1) for item in value]]
    if isinstance(value, tuple) and hasattr(kind, "_fields"):
        return ["t", [encode(item, depth - 1) for item in tuple(value)]]
    if isinstance(value, dict) and (kind is dict or kind.__module__ == "collections"):
        pairs = dict.items(value)
        return ["d", [[encode(key, depth - 1), encode(item, depth - 1)] for key, item in pairs]]
    raise NotLiteralError(f"a value of the type {kind.__name__[:50]!r}")


def decode(form: Any, depth: int = _MAX_DEPTH) -> Any:
    """The literal of a JSON form.

    Raises NotLiteralError for what `encode` does not give, below 100 levels too, and for sets and dicts with more than
    64 items of one hash: building them takes the square of their number, which may be hours.
    """
    if not isinstance(form, list):
        if form is None or type(form) in (bool, int, float, str):
            return form
        raise NotLiteralError("a broken answer")
    try:
        match form:
            case ["i", text]:
                return int(text, 16)
            case ["b", text]:
                return bytes.fromhex(text)
            case ["c", real, imag]:
                return complex(real, imag)
            case _ if depth == 0:
                raise NotLiteralError("a value of more than 100 levels")
            case ["d", pairs]:
                given = [(decode(key, depth - 1), decode(item, depth - 1)) for key, item in pairs]
                _check_hashes([key for key, _ in given])
                return dict(given)
            case [str(mark), items] if mark in _KINDS:
                decoded = [decode(item, depth - 1) for item in items]
                if mark in ("s", "f"):
                    _check_hashes(decoded)
                return _KINDS[mark](decoded)
    except (TypeError, ValueError) as error:
        raise NotLiteralError("a broken answer") from error
    raise NotLiteralError("a broken answer")


def _check_hashes(items: list[Any]) -> None:
    if len(items) <= _MAX_ALIKE:
        return
    numbers: dict[int, int] = {}
    for item in items:
        value = hash(item)
        numbers[value] = numbers.get(value, 0) + 1
        if numbers[value] > _MAX_ALIKE:
            raise NotLiteralError(f"a set or dict with more than {_MAX_ALIKE} items of one hash")


def dumps(form: Any) -> bytes:
    """A JSON line."""
    return json.dumps(form).encode() + b"\n"


# Leaving the host

_NEW_NS, _NEW_UTS, _NEW_IPC, _NEW_USER, _NEW_PID, _NEW_NET = 1 << 17, 1 << 26, 1 << 27, 1 << 28, 1 << 29, 1 << 30
_BIND, _REC, _PRIVATE, _DETACH = 1 << 12, 1 << 14, 1 << 18, 2  # of mount(2) and umount(2)
_MOUNT_SETATTR, _AT_FDCWD, _AT_RECURSIVE = 442, -100, 0x8000
_READ_ONLY_NO_SUID_NO_DEV = 7
_SET_DUMPABLE, _SET_NO_NEW_PRIVS = 4, 38  # of prctl(2)
_NOBODY = 65534
_FILE_MB, _FILES = 4, 32
_ROOT = "/proc"  # where the new root is built: a folder that is there, and of which nothing is needed any more
_LIBRARIES = ("/lib", "/lib64", "/usr/lib", "/usr/lib64")


class _Libc:
    """Calls of the C library, which raise OSError with the call's name."""

    def __init__(self) -> None:
        self._library = ctypes.CDLL(None, use_errno=True)

    def __call__(self, name: str, *arguments: Any) -> int:
        result = getattr(self._library, name)(*(ctypes.c_long(a) if isinstance(a, int) else a for a in arguments))
        if result == -1:
            number = ctypes.get_errno()
            raise OSError(number, f"{name}: {os.strerror(number)}")
        return result

    def mount(self, source: str, target: str, kind: str, flags: int, data: str = "") -> None:
        self("mount", source.encode(), target.encode(), kind.encode(), flags, data.encode())


def leave_host(memory_mb: float, timeout: float, refuse: Callable[[str], None]) -> None:
    """Returns in a new process that has left the host, or ends the calling one.

    What it keeps: the libraries of the system and of Python, which it may read, and an empty folder /tmp of 16 MB.
    What it has not: users' files, site-packages, /proc, /dev, a network, other processes, new processes and threads.
    refuse: is called with the reason where that cannot be had.
    """
    libc = _Libc()
    is_root = os.getuid() == 0
    apart = _NEW_NS | _NEW_UTS | _NEW_IPC | _NEW_PID | _NEW_NET
    try:
        user, group = os.getuid(), os.getgid()
        libc("unshare", apart if is_root else apart | _NEW_USER)
        if not is_root:
            _map_user(os.open("/proc", os.O_PATH), 0, user, 0, group)
        child = os.fork()
        if child == 0:
            _leave(libc, is_root, memory_mb, timeout)
            return
    except OSError as error:
        refuse(str(error))
        os._exit(1)
    _wait(child)


def _wait(child: int) -> None:
    """Waits for the child's end, or kills it when nobody is left who could send it requests."""
    poll = select.poll()
    poll.register(0, 0)  # POLLHUP alone
    poll.register(os.pidfd_open(child), select.POLLIN)
    poll.poll()
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    os._exit(0)


def _map_user(processes: int, user: int, outer_user: int, group: int, outer_group: int) -> None:
    """One user and one group of the new user namespace. processes: the folder /proc."""
    _write(processes, "self/setgroups", "deny")
    _write(processes, "self/uid_map", f"{user} {outer_user} 1")
    _write(processes, "self/gid_map", f"{group} {outer_group} 1")


def _write(processes: int, name: str, text: str) -> None:
    file = os.open(name, os.O_WRONLY, dir_fd=processes)
    try:
        os.write(file, text.encode())
    finally:
        os.close(file)


def _leave(libc: _Libc, is_root: bool, memory_mb: float, timeout: float) -> None:
    with open("/proc/sys/kernel/shmmni", "w") as file:
        file.write("0")  # no shared memory, which no limit of a process counts
    processes = os.open("/proc", os.O_PATH)
    _build_root(libc)
    if is_root:
        os.setgroups([])
        os.setresgid(_NOBODY, _NOBODY, _NOBODY)
        os.setresuid(_NOBODY, _NOBODY, _NOBODY)
        libc("prctl", _SET_DUMPABLE, 1, 0, 0, 0)  # so that it may write its own maps
    user, group = os.getuid(), os.getgid()
    libc("unshare", _NEW_USER)
    _map_user(processes, _NOBODY, user, _NOBODY, group)
    # Of this namespace: none inside of it, in which it might mount more memory.
    _write(processes, "sys/user/max_user_namespaces", "0")
    os.close(processes)
    libc("prctl", _SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)
    libc("capset", header, (ctypes.c_uint32 * 6)())
    for name, most in (
        (resource.RLIMIT_AS, int(memory_mb * (1 << 20))),
        (resource.RLIMIT_CPU, math.ceil(timeout)),
        (resource.RLIMIT_NPROC, 1),
        (resource.RLIMIT_NOFILE, _FILES),
        (resource.RLIMIT_FSIZE, _FILE_MB << 20),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_MSGQUEUE, 0),
    ):
        resource.setrlimit(name, (most, most))


def _build_root(libc: _Libc) -> None:
    libc.mount("none", "/", "", _REC | _PRIVATE)
    null = os.open("/dev/null", os.O_RDWR)
    libc.mount("none", _ROOT, "tmpfs", 0, "size=64k,mode=755")
    made: list[str] = []
    for folder in (*_LIBRARIES, *sorted(os.path.realpath(entry) for entry in sys.path)):
        if os.path.islink(folder):
            os.makedirs(os.path.dirname(_ROOT + folder), exist_ok=True)
            os.symlink(os.readlink(folder), _ROOT + folder)
        elif os.path.isdir(folder) and not any(folder.startswith(f"{other}/") for other in (*made, _ROOT)):
            os.makedirs(_ROOT + folder)
            libc.mount(folder, _ROOT + folder, "", _BIND | _REC)
            made.append(folder)
    for folder in made:  # installed packages may hold data sets
        for pattern in ("", "/*"):
            for name in ("site-packages", "dist-packages"):
                for found in glob.glob(f"{glob.escape(_ROOT + folder)}{pattern}/{name}"):
                    libc.mount("none", found, "tmpfs", 0, "size=4k")
    os.mkdir(f"{_ROOT}/tmp")
    settings = (ctypes.c_uint64 * 4)(_READ_ONLY_NO_SUID_NO_DEV, 0, 0, 0)
    libc("syscall", _MOUNT_SETATTR, _AT_FDCWD, _ROOT.encode(), _AT_RECURSIVE, settings, ctypes.sizeof(settings))
    libc.mount("none", f"{_ROOT}/tmp", "tmpfs", 14, "size=16m,nr_inodes=1k,mode=1777")
    os.chdir(_ROOT)
    libc("syscall", _PIVOT_ROOT[os.uname().machine], b".", b".")
    libc("umount2", b".", _DETACH)
    os.chdir("/tmp")
    for standard in (0, 1, 2):
        os.dup2(null, standard)
    os.close(null)


_PIVOT_ROOT = {"x86_64": 155, "aarch64": 41}


# Serving


class _Channel:
    """The pipes to the parent, on files of their own: standard input and output lead nowhere."""

    def __init__(self, incoming: int, outgoing: int):
        self._lines = os.fdopen(incoming, "rb")
        self._outgoing = outgoing

    def receive(self) -> Any:
        line = self._lines.readline()
        if not line:
            os._exit(0)
        return json.loads(line)

    def send(self, form: Any) -> None:
        data = memoryview(dumps(form))
        while data:
            data = data[os.write(self._outgoing, data) :]


def main() -> None:
    """Forks an interpreter for each message until the parent closes the socket, which is standard input.

    A message is JSON of [megabytes, seconds], with the ends of two pipes, for requests and answers.
    """
    control = socket.socket(fileno=0)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for an interpreter's end
    gc.freeze()
    while True:
        message, files, _, _ = socket.recv_fds(control, 1 << 10, 2)
        if not message:
            os._exit(0)
        if os.fork() == 0:
            break
        for file in files:
            os.close(file)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    control.detach()
    for standard, file in enumerate(files):  # the first takes the place of the socket
        os.dup2(file, standard)
        os.close(file)
    serve(*json.loads(message))


def serve(memory_mb: float, timeout: float) -> None:
    """Serves requests in a process that has left the host, until the parent closes the pipe."""
    channel = _Channel(os.dup(0), os.dup(1))
    leave_host(memory_mb, timeout, lambda reason: channel.send(["refused", reason]))
    channel.send(["ready"])
    module = types.ModuleType("program")
    sys.modules["program"] = module
    while True:
        match channel.receive():
            case ["run", source, names]:
                module.__dict__.update({name: _stub(channel, name) for name in names})
                answer = _tried(lambda source=source: _run(source, module))
            case ["call", expression, args, kwargs]:
                answer = _tried(lambda e=expression, a=args, k=kwargs: _call(e, decode(a), decode(k), module))
            case ["program", source, given, most]:
                answer = _tried(lambda source=source, given=given, most=most: _print(source, given, most))
            case _:
                os._exit(1)
        channel.send(answer)


def _tried(action: Callable[[], list[Any]]) -> list[Any]:
    try:
        return action()
    except NotLiteralError as error:
        return ["no_literal", str(error)]
    except BaseException as error:  # noqa: BLE001, of any code, which must not end the answers
        return ["raised", type(error).__name__, _message(error)]


def _message(error: BaseException) -> str:
    try:
        return str(error)[:200]
    except BaseException:  # noqa: BLE001, of a __str__ of any code
        return ""


def _run(source: str, module: types.ModuleType) -> list[Any]:
    exec(compile(source, "<program>", "exec"), module.__dict__)
    return ["done"]


def _call(expression: str, args: list[Any], kwargs: dict[str, Any], module: types.ModuleType) -> list[Any]:
    return ["value", encode(eval(expression, module.__dict__)(*args, **kwargs))]


def _print(source: str, given: str, most: int) -> list[Any]:
    printed = _Printed(most)
    sys.stdin = io.TextIOWrapper(io.BytesIO(given.encode()), encoding="utf-8")
    sys.stdout = printed.text
    with contextlib.suppress(SystemExit):  # as programs end
        exec(compile(source, "<program>", "exec"), {"__name__": "__main__"})
    printed.text.flush()
    return ["printed", printed.getvalue().decode(errors="replace")]


class _Printed(io.BytesIO):
    """What a program prints, up to `most` bytes. Raises MemoryError beyond."""

    def __init__(self, most: int):
        super().__init__()
        self._most = most
        self.text = io.TextIOWrapper(self, encoding="utf-8", write_through=True)

    def write(self, data: Any) -> int:
        if self.tell() + len(data) > self._most:
            raise MemoryError("too much output")
        return super().write(data)


def _stub(channel: _Channel, name: str) -> Callable[..., Any]:
    """A function of the tests that stands for one of the program."""

    def call(*args: Any, **kwargs: Any) -> Any:
        channel.send(["call", name, encode(list(args)), encode(kwargs)])
        match channel.receive():
            case ["value", form]:
                return decode(form)
            case ["raised", kind, message]:
                raise error_of(kind, message)
        raise RuntimeError("the program gave no answer")

    return call


def error_of(kind: str, message: str) -> Exception:
    """The error that stands in another interpreter for one that a program raised.

    One that would end an iteration of the tests, as in `all(map(f, inputs))`, and so pass them, is a RuntimeError, as
    for generators (PEP 479).
    """
    if kind in _ENDS_ITERATION:
        return RuntimeError(f"the program raised {kind}: {message}")
    found = getattr(builtins, kind, None)
    if isinstance(found, type) and issubclass(found, Exception) and not issubclass(found, UnicodeError):
        return found(message)
    return Exception(f"{kind}: {message}")


if __name__ == "__main__":
    main()
