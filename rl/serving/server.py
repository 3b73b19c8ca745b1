"""Serves the interface on a socket until a signal asks to stop, and then lets what has begun come to its end.

In: an application and its engine. Out: nothing; it returns when the server has ended. The first SIGTERM or SIGINT takes
no more requests in and waits for those that run; a second one ends them.
"""

import asyncio
import contextlib
import signal
import socket
from collections.abc import Callable, Iterator
from typing import Any

import uvicorn

from rl.serving.engine import Engine

KEEP_ALIVE_SECONDS = 60  # of a connection on which nothing is asked
MOST_CONNECTIONS = 900  # a process may open 1,024 files by default; further requests get 503


class Server(uvicorn.Server):
    """uvicorn, whose process goes on after a signal: the engine must end too."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        loop = asyncio.get_running_loop()
        numbers = (signal.SIGTERM, signal.SIGINT)
        try:
            for number in numbers:
                loop.add_signal_handler(number, self._stop)
        except ValueError:  # not in the main thread, whose business signals are
            numbers = ()
        try:
            yield
        finally:
            for number in numbers:
                loop.remove_signal_handler(number)

    def _stop(self) -> None:
        self.force_exit, self.should_exit = self.should_exit, True


def open_socket(host: str, port: int) -> socket.socket:
    """A socket that listens. port: 0: any free one. ValueError where it cannot be had."""
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        opened = socket.socket(family)
        try:
            opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            opened.bind(address)
        except OSError:
            opened.close()
            raise
    except OSError as error:
        raise ValueError(
            f"--host and --port must be an address of this machine that is free, got {host}:{port}: {error}"
        ) from None
    return opened


def serve(app: Any, engine: Engine, opened: socket.socket, drain_seconds: float, ready: Callable[[], None]) -> bool:
    """Serves until it is stopped. Returns whether all requests that had begun came to their end.

    Args:
      drain_seconds: for these requests after a signal.
      ready: called when connections are taken.
    """
    config = uvicorn.Config(
        app,
        log_config=None,  # what it warns of goes where the process has its warnings
        access_log=False,
        timeout_keep_alive=KEEP_ALIVE_SECONDS,
        limit_concurrency=MOST_CONNECTIONS,
        timeout_graceful_shutdown=max(round(drain_seconds), 1),
        server_header=False,
        lifespan="off",
    )
    server = Server(config)

    async def run() -> None:
        watch = asyncio.ensure_future(_watch(server, engine, ready))
        try:
            await server.serve([opened])
        finally:
            watch.cancel()

    asyncio.run(run())
    engine.close()
    return engine.drain(0.0)


async def _watch(server: Server, engine: Engine, ready: Callable[[], None]) -> None:
    """Says when the server is ready; takes no more jobs in once it is to stop; stops it when the engine has failed."""
    while not server.started:
        await asyncio.sleep(0.01)
    ready()
    while True:
        await asyncio.sleep(0.1)
        if server.should_exit:
            engine.close()
        elif not engine.is_running:
            server.should_exit = True
