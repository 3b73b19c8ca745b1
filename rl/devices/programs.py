"""What is compiled: a function with its shardings (`Program`), and compiled programs by key (`Programs`).

A program is compiled when it is first asked for, or earlier by a thread in the background. Where compiled programs were
handed over (`stored_programs`), they are called in place of new ones. `use_compilation_cache` says where XLA keeps what
it compiled. Not here: compiled programs in files (`rl.run.executables`).
"""

import contextlib
import dataclasses
import os
import pathlib
import sys
import tempfile
import threading
from collections.abc import Callable, Hashable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp

from rl.config.load import Config
from rl.devices.libtpu import quiet_libtpu
from rl.files.local_files import UNFINISHED

Build = Callable[[], Any]


@dataclasses.dataclass(frozen=True)
class Program:
    """A pure function and everything that decides how it is compiled, except the shapes of its arguments.

    Attributes:
      function: of positional arguments.
      in_shardings: for each argument a tree of shardings, or one sharding for the whole argument.
      out_shardings: the same for the result.
      donate: indices of the arguments whose memory the result may take.
      compiler_options: options for XLA; None: its defaults.
    """

    function: Callable[..., Any]
    in_shardings: tuple[Any, ...]
    out_shardings: Any
    donate: tuple[int, ...] = ()
    compiler_options: dict[str, Any] | None = None

    def jit(self) -> Any:
        """The function under `jax.jit`. Arguments that it does not read stay parameters of the executable."""
        return jax.jit(
            self.function,
            in_shardings=self.in_shardings,
            out_shardings=self.out_shardings,
            donate_argnums=self.donate,
            keep_unused=True,
            compiler_options=self.compiler_options,
        )

    def compile(self, arguments: tuple[Any, ...]) -> jax.stages.Compiled:
        """Compiled for arguments (arrays or `jax.ShapeDtypeStruct`s) of these shapes; nothing runs."""
        return self.jit().lower(*arguments).compile()

    def prepare(self, arguments: tuple[Any, ...]) -> Callable[..., Any]:
        """The function to call with arguments of these shapes. It is compiled now, unless an argument has 4-bit
        numbers: XLA for CPU lays those out differently from what jax makes a compiled program ask for, so it compiles
        at the first call.
        """
        if any(leaf.dtype == jnp.int4 for leaf in jax.tree.leaves(arguments)):
            return self.jit()
        return self.compile(arguments)


# Looks up a program that was compiled before: (name, program) -> the function to call, or None.
Stored = Callable[[str, Program], Callable[..., Any] | None]
_stored: list[Stored] = []  # the innermost last


@contextlib.contextmanager
def stored_programs(look_up: Stored) -> Iterator[None]:
    """A context in which `callable_of`, in every thread of the process, calls the programs that `look_up` has."""
    _stored.append(look_up)
    try:
        yield
    finally:
        _stored.remove(look_up)


def stored_program(name: str, program: Program) -> Callable[..., Any] | None:
    """The program `name`, compiled before; None outside of `stored_programs`, and where that has no such program."""
    return _stored[-1](name, program) if _stored else None


def callable_of(name: str, program: Program) -> Callable[..., Any]:
    """The function to call for the program `name`: compiled before, or else at its first call."""
    return stored_program(name, program) or program.jit()


class Programs:
    """Builds each program once. `get` waits for the program that it asks for and for no other."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._futures: dict[Hashable, Future] = {}
        self._executor: ThreadPoolExecutor | None = None

    def __len__(self) -> int:
        """The number of programs that are built or being built."""
        return len(self._futures)

    def __iter__(self) -> Iterator[Any]:
        """The keys of these programs."""
        return iter(list(self._futures))

    def get(self, key: Hashable, build: Build) -> Any:
        """The program called `key`. It is built here, unless it is built or being built already."""
        with self._lock:
            future = self._futures.get(key)
            if future is None or future.cancel():  # cancelled while it waited in the background
                future = self._futures[key] = Future()
                future.set_running_or_notify_cancel()
                mine = True
            else:
                mine = False
        if mine:
            try:
                future.set_result(build())
            except BaseException as error:
                with self._lock:
                    del self._futures[key]
                future.set_exception(error)
                raise
        return future.result()

    def prepare(self, key: Hashable, build: Build) -> None:
        """Builds the program in the background. An error is raised when the program is asked for."""
        with self._lock:
            if key in self._futures:
                return
            if self._executor is None:
                self._executor = ThreadPoolExecutor(1, thread_name_prefix="compile")
            self._futures[key] = self._executor.submit(build)

    def wait(self) -> None:
        """Returns when everything asked for is built; raises what a build raised."""
        for future in list(self._futures.values()):
            if not future.cancelled():
                future.result()

    def close(self) -> None:
        """Drops the builds that still wait in the background."""
        if self._executor is not None:
            self._executor.shutdown(wait=True, cancel_futures=True)


def use_compilation_cache(config: Config, check_only: bool = False) -> None:
    """Points XLA's persistent compilation cache at logging.compilation_cache: "auto" is ~/.cache/tandem/programs, null
    leaves it as jax has it. Call before the first compilation, which makes the folder.

    Args:
      check_only: whether to keep nothing that this process compiles.

    Raises:
      ValueError: the folder cannot be written. With "auto" a warning on stderr says so instead, and nothing is kept.
    """
    quiet_libtpu()
    folder = config.logging.compilation_cache
    if check_only:
        jax.config.update("jax_enable_compilation_cache", False)
    if folder == "auto":
        if "JAX_COMPILATION_CACHE_DIR" in os.environ:  # which jax follows by itself; empty: no cache
            return
        folder = os.path.join(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "tandem", "programs")
        if problem := _cache_problem(folder):
            print(f"warning: compiled programs are not kept for the next start: {problem}", file=sys.stderr)
            return
    elif folder is not None and (problem := _cache_problem(folder)):
        raise ValueError(
            f"logging.compilation_cache must be a folder that can be written, got {folder!r}: {problem}; choose "
            "another one, or null for none"
        )
    if folder is not None:
        jax.config.update("jax_compilation_cache_dir", os.path.expanduser(folder))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)  # a run has dozens of small programs


def _cache_problem(folder: str) -> str | None:
    """The reason why no file can be written below a folder, which need not exist yet; None where it can be."""
    path = pathlib.Path(os.path.expanduser(folder)).absolute()
    nearest = next(parent for parent in (path, *path.parents) if parent.exists())
    if not nearest.is_dir():
        return f"{nearest} is no folder"
    try:  # permissions alone do not tell: nobody can make a folder in /proc
        with tempfile.TemporaryDirectory(dir=nearest, prefix=UNFINISHED):
            return None
    except OSError as error:
        return f"{nearest} cannot be written: {error.strerror}"
