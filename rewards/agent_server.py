"""The address at which the agents of a worker ask the policy: a part of OpenAI's interface, on loopback.

In: `POST /at/KEY/v1/chat/completions`, where KEY stands for an episode. Out: the policy's turn as a chat completion, in
one piece or as a stream of one. How turns are drawn is the recipe's business, so temperature, max_tokens and the like
are not read. What would need more than the text of a turn is refused by name. Not here: what messages and tools may
be (`rewards.chat_request`).
"""

import asyncio
import contextlib
import dataclasses
import json
import socket
import time
from collections.abc import AsyncIterator, Coroutine, Iterator, Mapping
from typing import Any, Protocol

from rewards.chat_request import read_json, read_messages, read_tool_choice, read_tools, told_call
from rewards.environment import Message, TurnTokens
from rewards.environment_replies import MAX_DEPTH
from rewards.extras import import_extra
from rewards.logged import is_plain, shortened

MAX_BODY = 1 << 20  # bytes of a request
EXTRA = "tandem-grpo[serve]"


class AskError(Exception):
    """A request that gets no answer. code: as in OpenAI's error bodies."""

    def __init__(self, message: str, code: str, status: int = 400):
        super().__init__(message)
        self.code, self.status = code, status

    @property
    def body(self) -> dict[str, Any]:
        """The body of the response."""
        return {"error": {"message": str(self), "type": "invalid_request_error", "param": None, "code": self.code}}


class Answering(Protocol):
    """An episode whose agent asks."""

    async def ask(self, body: Mapping[str, Any]) -> "Answer": ...


class AgentServer:
    """Serves in the running event loop, from `start` to `stop`. url: of the server."""

    def __init__(self) -> None:
        self.url = ""
        self._open: dict[str, Answering] = {}
        self._num_answers = 0
        self._task: asyncio.Task[Any] | None = None

    async def start(self) -> None:
        """Listens on a free port, unless it does already. ModuleNotFoundError, with the way out, where starlette or
        uvicorn is missing.
        """
        if self._task is not None:
            return
        uvicorn = import_extra("uvicorn", EXTRA, "rollout.agent")
        import_extra("starlette", EXTRA, "rollout.agent")
        from starlette.applications import Starlette
        from starlette.routing import Route

        class Server(uvicorn.Server):
            @contextlib.contextmanager
            def capture_signals(self) -> Iterator[None]:  # they are the worker's business
                yield

        listener = socket.socket()
        listener.bind(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        routes = [
            Route("/at/{key}/v1/chat/completions", self._complete, methods=["POST"]),
            Route("/at/{key}/v1/models", self._models),
            Route("/{rest:path}", self._unknown, methods=["GET", "POST"]),
        ]
        config = uvicorn.Config(
            Starlette(routes=routes),
            log_config=None,
            access_log=False,
            server_header=False,
            lifespan="off",
            timeout_graceful_shutdown=1,
        )
        self._server = Server(config)
        self._task = asyncio.ensure_future(self._server.serve([listener]))
        while not self._server.started:
            await asyncio.sleep(0.005)

    async def stop(self) -> None:
        """Ends the server."""
        if self._task is not None:
            self._server.should_exit = self._server.force_exit = True
            await self._task

    def open(self, key: str, episode: Answering) -> None:
        """Has an episode answer what is asked under a key."""
        self._open[key] = episode

    def close(self, key: str) -> None:
        """Nothing more is answered under a key."""
        self._open.pop(key, None)

    async def _complete(self, request: Any) -> Any:
        from starlette.responses import JSONResponse, Response, StreamingResponse

        try:
            episode = self._open.get(request.path_params["key"])
            if episode is None:
                raise AskError("the episode is over, or there never was one at this address", "episode_over", 404)
            body = await _read(request)
            answer = await _unless_gone(request, episode.ask(body))
            if answer is None:
                return Response(status_code=499)  # nobody reads it
        except AskError as error:
            return JSONResponse(error.body, error.status)
        self._num_answers += 1
        told, reason, usage = answer.told()
        whole = {"id": f"chatcmpl-{self._num_answers}", "created": int(time.time()), "model": "policy"}
        if body.get("stream"):
            options = body.get("stream_options")
            with_usage = isinstance(options, dict) and bool(options.get("include_usage"))
            events = _stream(whole, told, reason, usage if with_usage else None)
            return StreamingResponse(events, media_type="text/event-stream")
        choice = {"index": 0, "message": told, "finish_reason": reason, "logprobs": None}
        return JSONResponse({**whole, "object": "chat.completion", "choices": [choice], "usage": usage})

    async def _models(self, request: Any) -> Any:
        from starlette.responses import JSONResponse

        model = {"id": "policy", "object": "model", "created": 0, "owned_by": "tandem"}
        return JSONResponse({"object": "list", "data": [model]})

    async def _unknown(self, request: Any) -> Any:
        from starlette.responses import JSONResponse

        rule = f"an agent may ask /v1/chat/completions and /v1/models below its base_url, got {request.url.path}"
        return JSONResponse(AskError(rule, "not_found").body, 404)


def asked_of(body: Mapping[str, Any]) -> tuple[list[Message], list[dict[str, Any]], bool]:
    """The messages and tools of a request as a chat template reads them, and whether the answer may call the tools.

    Raises `AskError` for what is no request, or asks for more than there is.
    """
    for field, plain in (("n", (None, 1)), ("logprobs", (None, False)), ("tool_choice", (None, "auto", "none"))):
        if body.get(field) not in plain:
            options = " or ".join(json.dumps(value) for value in plain)
            raise AskError(f"{field} must be {options} where an agent is trained, got {shortened(body[field])}", field)
    response = body.get("response_format")
    if response not in (None, {"type": "text"}):
        raise AskError(
            f"response_format must be text where an agent is trained, got {shortened(response)}", "unsupported"
        )
    try:
        messages, tools = read_messages(body), read_tools(body)
        parses = read_tool_choice(body, tools) != "none"
    except ValueError as error:
        raise AskError(str(error), str(error).partition("[")[0].partition(" ")[0]) from None
    for name, value, depth in (("messages", messages, MAX_DEPTH + 2), ("tools", tools, MAX_DEPTH)):
        if not is_plain(value, depth):
            raise AskError(f"{name} must be plain JSON, without NaN or numbers beyond 64 bits", name)
    return messages, tools, parses


@dataclasses.dataclass(frozen=True)
class Answer:
    """The policy's turn, as a message, and what it took; None: it is not known."""

    message: Message
    tokens: TurnTokens | None

    def told(self) -> tuple[dict[str, Any], str, dict[str, int] | None]:
        """(The message as an answer tells it, its finish_reason, its usage)."""
        calls = [
            told_call(call["function"]["name"], call["function"]["arguments"], call["id"])
            for call in self.message.get("tool_calls", ())
        ]
        told: dict[str, Any] = {"role": "assistant", "content": self.message["content"] or (None if calls else "")}
        if calls:
            told["tool_calls"] = calls
        if self.tokens is None:
            return told, "tool_calls" if calls else "stop", None
        reason = "length" if self.tokens.is_cut else "tool_calls" if calls else "stop"
        counts = {"prompt_tokens": self.tokens.prompt, "completion_tokens": self.tokens.drawn}
        return told, reason, {**counts, "total_tokens": self.tokens.prompt + self.tokens.drawn}


async def _stream(
    whole: Mapping[str, Any], message: Mapping[str, Any], reason: str, usage: Mapping[str, int] | None
) -> AsyncIterator[str]:
    calls = [{**call, "index": place} for place, call in enumerate(message.get("tool_calls", ()))]
    delta = {**message, "tool_calls": calls} if calls else message
    for part, end in ((delta, None), ({}, reason)):
        choice = {"index": 0, "delta": part, "finish_reason": end, "logprobs": None}
        yield _event(whole, choices=[choice])
    if usage is not None:
        yield _event(whole, choices=[], usage=usage)
    yield "data: [DONE]\n\n"


def _event(whole: Mapping[str, Any], **more: Any) -> str:
    return f"data: {json.dumps({**whole, 'object': 'chat.completion.chunk', **more})}\n\n"


async def _unless_gone(request: Any, answer: Coroutine[Any, Any, Answer]) -> Answer | None:
    """The answer, or None where the client goes away before; then it is cancelled."""

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    work, left = asyncio.ensure_future(answer), asyncio.ensure_future(gone())
    try:
        await asyncio.wait((work, left), return_when=asyncio.FIRST_COMPLETED)
        return work.result() if work.done() else None
    finally:
        for task in (work, left):
            task.cancel()
        await asyncio.gather(work, left, return_exceptions=True)


async def _read(request: Any) -> dict[str, Any]:
    read = bytearray()
    async for chunk in request.stream():
        read += chunk
        if len(read) > MAX_BODY:
            raise AskError(f"a request must have at most {MAX_BODY} bytes", "too_large", 413)
    try:
        return read_json(bytes(read))
    except ValueError as error:
        raise AskError(str(error), "json") from None
