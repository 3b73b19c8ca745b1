"""Serves the page of a report on this machine, and follows the runs while they go on.

In: run folders. Out: an HTTP server on loopback with two answers: the page, and its data. The page asks for data again
and again, and says which version it has. Requests that were made for another host are refused, so that no website can
reach the server under a name of its own (DNS rebinding). Nothing is written.
"""

import hashlib
import http
import http.server
import math
import os
import pathlib
import threading
import time
from collections.abc import Callable, Sequence
from urllib.parse import parse_qs, urlsplit

from rl.run_folder.contents import CONFIG, EVENTS, METRICS, SAMPLES
from rl.tools.report.data import page_data
from rl.tools.report.page import content_policy, packed, page_html
from rl.tools.report.read import read_runs

_ADDRESS = "127.0.0.1"
_HEADERS = {
    "Cache-Control": "no-store",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
}


_MOST_OF_A_CORE = 0.1  # for packing data, which a run beside it may need more


class LiveData:
    """The packed data of runs, made again when one of their files has changed, and a while has passed.

    clock: seconds, from any start.
    """

    def __init__(
        self, folders: Sequence[str], most_samples: int, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        self._folders, self._most_samples, self._clock = folders, most_samples, clock
        self._rests_until = -math.inf
        self._lock = threading.Lock()
        self._stamp: tuple[object, ...] | None = None
        self._version, self._data = "", b""

    def get(self) -> tuple[str, bytes]:
        """(version, gzip of JSON). ValueError where a run cannot be read."""
        with self._lock:
            stamp = tuple(_stamp(pathlib.Path(run) / name) for run in self._folders for name in _FILES)
            start = self._clock()
            if stamp != self._stamp and start >= self._rests_until:
                data = packed(page_data(read_runs(self._folders), self._most_samples))
                self._version, self._data = hashlib.sha256(data).hexdigest()[:16], data
                self._stamp, end = stamp, self._clock()
                self._rests_until = end + (end - start) / _MOST_OF_A_CORE
            return self._version, self._data


_FILES = (METRICS, SAMPLES, EVENTS, CONFIG)


def _stamp(path: pathlib.Path) -> tuple[int, int] | None:
    try:
        stat = path.stat()
    except OSError:
        return None
    return stat.st_size, stat.st_mtime_ns


def create_server(
    folders: Sequence[str | os.PathLike], port: int, most_samples: int
) -> http.server.ThreadingHTTPServer:
    """A server that is bound and does not answer yet: `serve_forever` does.

    Raises:
      ValueError: the port is taken, or none.
    """
    runs = [os.fspath(folder) for folder in folders]
    data = LiveData(runs, most_samples)
    title = " and ".join(pathlib.Path(run).resolve().name for run in runs)
    page = page_html(title, "", live=True).encode("utf-8")
    try:
        return http.server.ThreadingHTTPServer((_ADDRESS, port), _handler(page, data.get))
    except (OSError, OverflowError) as error:
        raise ValueError(f"--port must be a free port, got {port}: {error}; leave it out for any") from error


def serve(folders: Sequence[str | os.PathLike], port: int, most_samples: int) -> None:
    """Prints the address and answers until Ctrl-C."""
    with create_server(folders, port, most_samples) as server:
        print(f"report: http://{_ADDRESS}:{server.server_port}/ (Ctrl-C ends it)", flush=True)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            print()


def _handler(page: bytes, data: Callable[[], tuple[str, bytes]]) -> type[http.server.BaseHTTPRequestHandler]:
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            url = urlsplit(self.path)
            if not self._is_for_us():
                self._answer(http.HTTPStatus.MISDIRECTED_REQUEST, b"this server answers for this machine only\n")
            elif url.path == "/":
                self._answer(http.HTTPStatus.OK, page, "text/html; charset=utf-8")
            elif url.path == "/data":
                self._data(parse_qs(url.query).get("version", [""])[0])
            else:
                self._answer(http.HTTPStatus.NOT_FOUND, b"there is / and /data\n")

        def _is_for_us(self) -> bool:
            _, port = self.connection.getsockname()
            hosts = self.headers.get_all("Host") or []
            return len(hosts) == 1 and hosts[0].lower() in (f"{_ADDRESS}:{port}", f"localhost:{port}")

        def _data(self, known: str) -> None:
            try:
                version, content = data()
            except ValueError as error:
                self._answer(http.HTTPStatus.SERVICE_UNAVAILABLE, f"{error}\n".encode("utf-8", "backslashreplace"))
                return
            except Exception as error:  # of files that are damaged in a way that nobody thought of
                problem = f"the runs cannot be shown: {type(error).__name__}: {str(error)[:200]}\n"
                self._answer(http.HTTPStatus.INTERNAL_SERVER_ERROR, problem.encode("utf-8", "backslashreplace"))
                raise
            if known == version:
                self._answer(http.HTTPStatus.NO_CONTENT, b"")
            else:
                self._answer(http.HTTPStatus.OK, content, "application/octet-stream", {"X-Version": version})

        def _answer(
            self,
            status: http.HTTPStatus,
            content: bytes,
            kind: str = "text/plain; charset=utf-8",
            more: dict[str, str] | None = None,
        ) -> None:
            self.send_response(status)
            policy = {"Content-Security-Policy": content_policy(live=True)}
            sized = {"Content-Type": kind, "Content-Length": str(len(content))}
            for name, value in (_HEADERS | policy | sized | (more or {})).items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002  the name is that of the base class
            """Says nothing: a request every few seconds is no news."""

    return Handler
