"""Calls of the user's code inside the worker's event loop, each in the random state of its episode.

A plain function is called as if no loop ran, so that it may use `asyncio.run`. Everything that an episode starts runs
in tasks of its own context: `random` and numpy's global state are that episode's whenever one of them runs, and are
kept for it when it waits. So an episode draws what it would draw alone. Its time limit does not count the time in which
others' code ran.
"""

import asyncio
import contextlib
import contextvars
import inspect
import random
import sys
import types
from collections.abc import Callable, Coroutine, Generator, Iterator
from time import monotonic  # by name, before a user's code can replace it
from types import TracebackType
from typing import Any, Self

_EPISODE: "contextvars.ContextVar[RandomState]" = contextvars.ContextVar("episode")


class Clock:
    """What the episodes of a process share. busy: seconds in which code of any of them ran. holder: whose the global
    state of `random` is.
    """

    def __init__(self) -> None:
        self.busy = 0.0
        self.holder: RandomState | None = None


class RandomState:
    """The global random states of an episode: Python's, and numpy's where it is imported. busy: seconds in which its
    code ran.
    """

    def __init__(self, seed: int, clock: Clock):
        self._seed, self.clock = seed, clock
        self.busy = self._entered = 0.0
        self._python: Any = None
        self._numpy: Any = None

    def enter(self) -> None:
        """To be called before code of the episode runs."""
        self._entered = monotonic()
        holder = self.clock.holder
        if holder is not self:
            if holder is not None:
                holder._python = random.getstate()
            if self._python is None:
                random.seed(self._seed)
            else:
                random.setstate(self._python)
            self.clock.holder = self
        if numpy := sys.modules.get("numpy"):
            if self._numpy is None:
                self._numpy = numpy.random.MT19937(self._seed)
            # Each time, because it drops half of a pair of normal numbers: otherwise it would be the others that decide
            # when that happens.
            numpy.random.set_bit_generator(self._numpy)

    def leave(self) -> None:
        """To be called after it."""
        ran = monotonic() - self._entered
        self.busy += ran
        self.clock.busy += ran


class TimeLimit:
    """A context in which code of an episode gets a TimeoutError at its next `await` after so many seconds, those apart
    in which other episodes' code ran. Inside a task of that episode.
    """

    def __init__(self, seconds: float, state: RandomState):
        self._seconds, self._state = seconds, state
        self._others, self._start = self._busy_of_others(), monotonic()
        self._is_over = False

    def __enter__(self) -> Self:
        task = asyncio.current_task()
        assert task is not None
        self._task = task
        self._check_later(self._seconds)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._timer.cancel()
        if self._is_over and self._task.uncancel() == 0 and isinstance(error, asyncio.CancelledError):
            raise TimeoutError from error

    @property
    def is_over(self) -> bool:
        """Whether the time was over before the end of the context."""
        return self._is_over

    @property
    def elapsed(self) -> float:
        """Seconds since this was made."""
        return monotonic() - self._start - (self._busy_of_others() - self._others)

    def _busy_of_others(self) -> float:
        return self._state.clock.busy - self._state.busy

    def _check_later(self, seconds: float) -> None:
        self._timer = asyncio.get_running_loop().call_later(seconds, self._check)

    def _check(self) -> None:
        left = self._seconds - self.elapsed
        if left > 0:
            self._check_later(left)
        else:
            self._is_over = True
            self._task.cancel()


def task_in(loop: asyncio.AbstractEventLoop, state: RandomState, coroutine: Coroutine[Any, Any, Any]) -> asyncio.Task:
    """A task of an episode. loop: one with `task_factory`."""
    context = contextvars.copy_context()
    context.run(_EPISODE.set, state)
    return loop.create_task(coroutine, context=context)


def task_factory(
    loop: asyncio.AbstractEventLoop, coroutine: Any, *, context: contextvars.Context | None = None, **options: Any
) -> asyncio.Task:
    """For `loop.set_task_factory`: tasks that swap in the random state of the episode that started them."""
    state = (contextvars.copy_context() if context is None else context).get(_EPISODE)
    if state is not None and asyncio.iscoroutine(coroutine):
        coroutine = _swapping(coroutine, state)
    return asyncio.Task(coroutine, loop=loop, context=context, **options)


async def call(function: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
    """What a function of the user returns, or what its coroutine comes to."""
    if inspect.iscoroutinefunction(function):
        return await function(*arguments, **named)
    with _without_loop():
        result = function(*arguments, **named)
    return await result if inspect.isawaitable(result) else result


@contextlib.contextmanager
def _without_loop() -> Iterator[None]:
    loop = asyncio.get_running_loop()
    asyncio._set_running_loop(None)
    try:
        yield
    finally:
        asyncio._set_running_loop(loop)


async def _swapping(coroutine: Coroutine[Any, Any, Any], state: RandomState) -> Any:
    return await _driven(coroutine, state)


@types.coroutine
def _driven(coroutine: Coroutine[Any, Any, Any], state: RandomState) -> Generator[Any, Any, Any]:
    """The coroutine, with the state swapped in while it runs and out while it waits."""
    value, error = None, None
    while True:
        state.enter()
        try:
            waited = coroutine.send(value) if error is None else coroutine.throw(error)
        except StopIteration as stop:
            return stop.value
        except (SystemExit, KeyboardInterrupt) as ending:  # asyncio would end the loop, with all other episodes
            told = RuntimeError(f"a task wanted to end the process, with {ending!r}")
            raise told.with_traceback(ending.__traceback__) from None
        finally:
            state.leave()
        value, error = None, None
        try:
            value = yield waited
        except GeneratorExit:
            coroutine.close()
            raise
        except BaseException as thrown:  # noqa: BLE001  it is thrown into the coroutine
            error = thrown
