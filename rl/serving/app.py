"""The HTTP interface: OpenAI's chats and texts over an engine, as a starlette application.

In: an engine, a tokenizer, limits. Out: an ASGI application, which whoever has an event loop can serve. It knows
nothing of training, files or command lines. Not here: what a body may say (`rl.serving.bodies`), chats and texts
themselves (`rl.serving.chat`, `rl.serving.completions`), sockets (`rl.serving.server`).
"""

import asyncio
import dataclasses
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from functools import partial
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from rl.data.tokenizer import Tokenizer
from rl.serving.bodies import ApiError, read_chat, read_json, read_text, read_tokenize
from rl.serving.calls import Calls, FinishedCall
from rl.serving.chat import Chats, to_event
from rl.serving.completions import Texts
from rl.serving.conversations import Conversations
from rl.serving.engine import Engine
from rl.serving.metrics import Metrics

LOOPBACK = ("127.0.0.1", "localhost", "::1")
# What others serve at paths like ours, and this server does not.
REFUSED = {
    "embeddings": "the model gives no embeddings",
    "responses": "use /v1/chat/completions",
    "messages": "use /v1/chat/completions",
    "moderations": "the model judges nothing",
    "rerank": "the model judges nothing",
    "score": "use /v1/completions with echo and logprobs",
    "audio/speech": "there is text only",
    "audio/transcriptions": "there is text only",
    "images/generations": "there is text only",
    "files": "nothing is stored",
    "batches": "nothing is stored",
}


@dataclasses.dataclass(frozen=True)
class ServerLimits:
    """What a server bears from a client.

    max_body_bytes: of a request. request_seconds: from a request to its last token. body_seconds: until a body is
      there.
    """

    max_body_bytes: int = 4_000_000
    request_seconds: float = 600.0
    body_seconds: float = 30.0


def create_app(
    engine: Engine,
    tokenizer: Tokenizer,
    model: str,
    limits: ServerLimits = ServerLimits(),
    api_key: str | None = None,
    hosts: tuple[str, ...] | None = None,
    on_call: Callable[[FinishedCall], None] | None = None,
    most_conversations: int = 0,
) -> Starlette:
    """The application.

    Args:
      model: the name that clients ask for.
      api_key: what the header `Authorization: Bearer KEY` must say, but for /health; None: nothing.
      hosts: names in the header `Host` that are answered; None: any. A server without a key that listens to this
        machine alone should name it: a page in a browser can have a name of its own lead here.
      on_call: called in the loop's thread with each call that came to its end; it must return soon.
      most_conversations: chats that are remembered, so that those that go on from them keep the very tokens that were
        drawn (`rl.serving.conversations`).

    All paths are there under /at/KEY too, for any KEY of letters, digits, - and _, which `FinishedCall` tells.
    """
    metrics, calls, created = Metrics(engine), Calls(engine, limits.request_seconds), int(time.time())
    notify = on_call or (lambda call: None)
    conversations = None
    if most_conversations:
        conversations = Conversations(tokenizer, engine.sampling.eos_ids, most_conversations)
    chats = Chats(calls, tokenizer, model, notify, conversations)
    texts = Texts(calls, tokenizer, model, notify)
    most_top = engine.sampling.top_logprobs

    def check_model(name: str | None) -> None:
        if name is not None and name != model:
            raise ApiError(404, f"the model here is {model!r}, got {name[:200]!r}", "model", "model_not_found")

    async def values_of(request: Request) -> dict[str, Any]:
        if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
            raise ApiError(415, "the header Content-Type must be application/json")
        try:
            async with asyncio.timeout(limits.body_seconds):
                body = await _read_body(request, limits.max_body_bytes)
        except TimeoutError:
            raise ApiError(408, f"the body must be there within {limits.body_seconds:g} seconds") from None
        return read_json(body)

    async def complete(read: Callable[[dict[str, Any], int], Any], kind: Any, request: Request) -> Response:
        body = read(await values_of(request), most_top)
        check_model(body.options.model)
        prepared = await kind.prepare(body, _key(request))
        if body.options.streams:
            return await _stream(request, kind.stream(prepared))
        return JSONResponse(await _unless_gone(request, kind.answer(prepared)))

    async def tokenize(request: Request) -> Response:
        body = read_tokenize(await values_of(request))
        check_model(body.model)
        if body.text is not None:
            ids = await texts.encode(body.text, body.adds_special)
        else:
            ids = await chats.encode(body.messages, body.tools)
        return JSONResponse({"count": len(ids), "max_model_len": most_tokens, "tokens": ids})

    most_tokens = engine.limits.max_prompt_tokens + engine.limits.max_tokens
    card = {"id": model, "object": "model", "created": created, "owned_by": "tandem", "max_model_len": most_tokens}

    async def models(request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [card]})

    async def one_model(request: Request) -> Response:
        check_model(request.path_params["name"])
        return JSONResponse(card)

    async def health(request: Request) -> Response:
        return JSONResponse(
            {"status": "ok"} if engine.is_running else {"status": "closing"}, 200 if engine.is_running else 503
        )

    async def tell_metrics(request: Request) -> Response:
        return Response(metrics.text(), media_type=metrics.content_type)

    async def refused(request: Request) -> Response:
        name = request.url.path.partition("/v1/")[2]
        raise ApiError(404, f"{request.url.path} is not supported: {REFUSED[name]}", code="not_supported")

    def checked(path: str, endpoint: Callable[[Request], Awaitable[Response]]) -> Callable[[Request], Any]:
        async def answer(request: Request) -> Response:
            start = time.monotonic()
            try:
                _check_client(request, api_key, hosts, is_open=path == "/health")
                response = await endpoint(request)
            except ApiError as error:
                response = _error(error)
            except ClientDisconnect:
                response = Response(status_code=499)  # nobody reads it
            except Exception:
                metrics.note(path, 500, time.monotonic() - start)
                raise
            response.headers["x-request-id"] = f"req_{secrets.token_hex(12)}"  # which clients tell of what went wrong
            if not isinstance(response, _Streamed):
                metrics.note(path, response.status_code, time.monotonic() - start)
            else:
                response.at_end = lambda: metrics.note(path, 200, time.monotonic() - start)
            return response

        return answer

    endpoints: list[tuple[str, str, Callable[[Request], Awaitable[Response]]]] = [
        ("POST", "/v1/chat/completions", partial(complete, read_chat, chats)),
        ("POST", "/v1/completions", partial(complete, read_text, texts)),
        ("GET", "/v1/models", models),
        ("GET", "/v1/models/{name:path}", one_model),
        ("POST", "/tokenize", tokenize),
        ("POST", "/v1/tokenize", tokenize),
        ("GET", "/health", health),
        ("GET", "/metrics", tell_metrics),
    ]
    routes = []
    for prefix in ("", "/at/{key}"):
        routes += [Route(prefix + path, checked(path, endpoint), methods=[verb]) for verb, path, endpoint in endpoints]
        methods = ["GET", "POST", "DELETE"]
        routes += [Route(f"{prefix}/v1/{name}", checked("refused", refused), methods=methods) for name in REFUSED]

    async def http_error(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        where, there = (
            f"{request.method} {request.url.path[:200]}",
            "/v1/chat/completions and /v1/completions are there",
        )
        text = f"{where}: {error.detail}; {there}"
        metrics.note("other", error.status_code, 0.0)
        code = "method_not_allowed" if error.status_code == 405 else "not_found"
        return _error(ApiError(error.status_code, text, code=code))

    async def fault(request: Request, error: Exception) -> Response:
        return _error(ApiError(500, f"a fault of the server: {type(error).__name__}", code="fault"))

    return Starlette(routes=routes, exception_handlers={HTTPException: http_error, Exception: fault})


class _Streamed(StreamingResponse):
    """A stream of events that says when it is over."""

    at_end: Callable[[], None] = staticmethod(lambda: None)

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self.at_end()


async def _stream(request: Request, events: AsyncIterator[bytes]) -> Response:
    """The response of a stream. What is wrong before its first event is an error with a status of its own."""
    first = await _unless_gone(request, anext(events))

    async def all_events() -> AsyncIterator[bytes]:
        try:
            yield first
            async for event in events:
                yield event
        except ApiError as error:  # the status has been told
            yield to_event(error.body())
        finally:
            await events.aclose()  # pyright: ignore[reportAttributeAccessIssue]

    headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
    return _Streamed(all_events(), media_type="text/event-stream", headers=headers)


async def _unless_gone(request: Request, answer: Any) -> Any:
    """The answer, unless the client goes away before: then it is cancelled, and so are its jobs."""
    work = asyncio.ensure_future(answer)
    gone = asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait((work, gone), return_when=asyncio.FIRST_COMPLETED)
        if work.done():
            return work.result()
        raise ClientDisconnect
    finally:
        for task in (work, gone):
            task.cancel()
        await asyncio.gather(work, gone, return_exceptions=True)


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _read_body(request: Request, most: int) -> bytes:
    parts, size = [], 0
    async for part in request.stream():
        size += len(part)
        if size > most:
            raise ApiError(413, f"a body may have at most {most} bytes, got more", code="body_too_large")
        parts.append(part)
    return b"".join(parts)


def _check_client(request: Request, api_key: str | None, hosts: tuple[str, ...] | None, is_open: bool) -> None:
    if hosts is not None:
        host = request.headers.get("host", "").lower()
        name = host[1:].partition("]")[0] if host.startswith("[") else host.partition(":")[0]
        if name not in hosts:
            raise ApiError(403, f"the header Host must name this server, got {host[:200]!r}")
    if api_key is not None and not is_open:
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        is_right = secrets.compare_digest(given.strip().encode(), api_key.encode())
        if scheme.lower() != "bearer" or not is_right:
            raise ApiError(401, "the API key is missing or wrong", code="invalid_api_key", kind="authentication_error")


def _key(request: Request) -> str:
    key = request.path_params.get("key", "")
    if not all(letter.isascii() and (letter.isalnum() or letter in "-_") for letter in key) or len(key) > 200:
        raise ApiError(404, "KEY in /at/KEY must be at most 200 letters, digits, - and _")
    return key


def _error(error: ApiError) -> JSONResponse:
    headers = {"Retry-After": "1"} if error.status in (429, 503) else {}
    if error.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return JSONResponse(error.body(), error.status, headers)
