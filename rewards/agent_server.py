"""The address at which the agents of a worker ask the policy: a part of OpenAI's interface, on loopback.

In: `POST /at/KEY/v1/chat/completions`, where KEY stands for an episode. Out: the policy's turn as a chat completion, in
one piece or as a stream of one. How turns are drawn is the recipe's business, so temperature, max_tokens and the like
are not read. What would need more than the text of a turn is refused by name.
"""

import asyncio
import contextlib
import json
import socket
import time
from collections.abc import AsyncIterator, Coroutine, Iterator, Mapping
from typing import Any, Protocol

from rewards.environment import Message
from rewards.environment_replies import MAX_DEPTH
from rewards.extras import import_extra
from rewards.logged import is_plain, shortened
from rewards.text import message_text

MAX_BODY = 1 << 20  # bytes of a request
EXTRA = "tandem-grpo[serve]"
_FIELDS = ("role", "content", "name", "tool_call_id", "tool_calls")  # of a message that a chat template may read


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

    async def ask(self, body: Mapping[str, Any]) -> Message: ...


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
            message = await _unless_gone(request, episode.ask(body))
            if message is None:
                return Response(status_code=499)  # nobody reads it
        except AskError as error:
            return JSONResponse(error.body, error.status)
        self._num_answers += 1
        calls = [_told_call(call) for call in message.get("tool_calls", ())]
        told = {"role": "assistant", "content": message["content"] or (None if calls else "")}
        if calls:
            told["tool_calls"] = calls
        whole = {"id": f"chatcmpl-{self._num_answers}", "created": int(time.time()), "model": "policy"}
        reason = "tool_calls" if calls else "stop"
        if body.get("stream"):
            return StreamingResponse(_stream(whole, told, reason), media_type="text/event-stream")
        choice = {"index": 0, "message": told, "finish_reason": reason, "logprobs": None}
        return JSONResponse({**whole, "object": "chat.completion", "choices": [choice]})

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
    messages = body.get("messages")
    if not isinstance(messages, list) or not messages:
        raise AskError(f"messages must be a list of messages, got {shortened(messages)}", "messages")
    tools = body.get("tools") or []
    is_list = isinstance(tools, list) and all(isinstance(tool, dict) and "function" in tool for tool in tools)
    if not is_list or not is_plain(tools, MAX_DEPTH):
        raise AskError(f"tools must be a list of functions, got {shortened(tools)}", "tools")
    read = [_message(message) for message in messages]
    if not is_plain(read, MAX_DEPTH + 2):
        raise AskError("messages must be plain JSON, without NaN or numbers beyond 64 bits", "messages")
    return read, tools, bool(tools) and body.get("tool_choice") != "none"


def told_of(message: Mapping[str, Any]) -> list[Any]:
    """What makes two messages the same, whoever wrote them: role, text, names and arguments of calls."""
    calls = [[call["function"]["name"], call["function"]["arguments"]] for call in message.get("tool_calls") or ()]
    return [message["role"], (message.get("content") or "").strip(), calls]


def _message(message: Any) -> Message:
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise AskError(f"a message must have a role, got {shortened(message)}", "messages")
    content = message.get("content")
    if isinstance(content, list) and not all(isinstance(part, dict) and part.get("type") == "text" for part in content):
        raise AskError("content of a message must be text, got parts of another type", "messages")
    if not isinstance(content, (str, list, type(None))):
        raise AskError(f"content of a message must be text, got {shortened(content)}", "messages")
    read = {name: message[name] for name in _FIELDS if message.get(name) is not None}
    read["content"] = message_text(message)
    if "tool_calls" in read:
        if not isinstance(read["tool_calls"], list):
            raise AskError(f"tool_calls of a message must be a list, got {shortened(read['tool_calls'])}", "messages")
        read["tool_calls"] = [_read_call(call) for call in read["tool_calls"]]
    return read


def _read_call(call: Any) -> dict[str, Any]:
    """A call with its arguments as an object, as chat templates want them."""
    try:
        name, arguments = call["function"]["name"], call["function"]["arguments"]
        arguments = json.loads(arguments) if isinstance(arguments, str) else arguments
    except (TypeError, KeyError, ValueError, RecursionError) as error:
        raise AskError(
            f"tool_calls of a message must be those of an answer, got {shortened(call)}", "messages"
        ) from error
    told = {"type": "function", "function": {"name": name, "arguments": arguments}}
    return told if call.get("id") is None else {**told, "id": call["id"]}


def _told_call(call: Mapping[str, Any]) -> dict[str, Any]:
    function = call["function"]
    arguments = json.dumps(function["arguments"], ensure_ascii=False)
    return {"id": call["id"], "type": "function", "function": {"name": function["name"], "arguments": arguments}}


async def _stream(whole: Mapping[str, Any], message: Mapping[str, Any], reason: str) -> AsyncIterator[str]:
    calls = [{**call, "index": place} for place, call in enumerate(message.get("tool_calls", ()))]
    delta = {**message, "tool_calls": calls} if calls else message
    for part, end in ((delta, None), ({}, reason)):
        choice = {"index": 0, "delta": part, "finish_reason": end, "logprobs": None}
        yield f"data: {json.dumps({**whole, 'object': 'chat.completion.chunk', 'choices': [choice]})}\n\n"
    yield "data: [DONE]\n\n"


async def _unless_gone(request: Any, answer: Coroutine[Any, Any, Message]) -> Message | None:
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
        body = json.loads(read)
    except (ValueError, RecursionError) as error:
        raise AskError(f"a request must be JSON, got {shortened(bytes(read[:100]))}", "json") from error
    if not isinstance(body, dict):
        raise AskError(f"a request must be a JSON object, got {shortened(body)}", "json")
    return body
