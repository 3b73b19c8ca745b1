"""Calls of the user's code inside the worker's event loop, each in the random state of its episode.

A plain function is called as if no loop ran, so that it may use `asyncio.run`. Everything that an episode starts runs
in tasks of its own context: `random` and numpy's global state are that episode's whenever one of them runs, and are
kept for it when it waits. So an episode draws what it would draw alone.
"""

import asyncio
import contextlib
import contextvars
import inspect
import random
import sys
import types
from collections.abc import Callable, Coroutine, Generator, Iterator
from typing import Any

_EPISODE: "contextvars.ContextVar[RandomState]" = contextvars.ContextVar("episode")


class RandomState:
    """The global random states of an episode: Python's, and numpy's where it is imported."""

    def __init__(self, seed: int):
        self._seed = seed
        self._python = random.Random(seed).getstate()
        self._numpy: Any = None

    def enter(self) -> None:
        """To be called before code of the episode runs."""
        random.setstate(self._python)
        if numpy := sys.modules.get("numpy"):
            if self._numpy is None:
                numpy.random.seed(self._seed % (1 << 32))
            else:
                numpy.random.set_state(self._numpy)

    def leave(self) -> None:
        """To be called after it."""
        self._python = random.getstate()
        if numpy := sys.modules.get("numpy"):
            self._numpy = numpy.random.get_state(legacy=False)


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
