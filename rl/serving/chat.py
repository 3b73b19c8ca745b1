"""Chats: messages become a prompt by the chat template, and what is drawn becomes the assistant's message.

In: a `ChatBody`. Out: the answer as an object, or as a stream of events. A last message by the assistant is the
beginning of the answer. Calls of tools are read from the text, in the format that the chat template shows; where a call
is required, its beginning is put behind the prompt.
"""

import asyncio
import concurrent.futures
import dataclasses
import json
import secrets
import time
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

from rewards.tool_calls import Call, Format, format_of_template, parse_turn
from rl.data.tokenizer import Tokenizer
from rl.sampler.contract import Completion
from rl.serving.answers import FINISH_REASONS, TokenNames, chat_logprobs, tool_calls, usage
from rl.serving.bodies import ApiError, ChatBody
from rl.serving.calls import Calls, FinishedCall
from rl.serving.conversations import Conversations
from rl.serving.engine import Drawn, Ended
from rl.serving.text import TextStream, text_of

DONE = b"data: [DONE]\n\n"
OPENS = "<tool_call>"


@dataclasses.dataclass(frozen=True)
class PreparedChat:
    """A chat whose prompt is there. begun: text with which the answer begins, part of the prompt. call_format: of calls
    in the answer; None: none are looked for.
    """

    body: ChatBody
    key: str
    prompt_ids: list[int]
    limit: int
    begun: str
    call_format: Format | None


class Chats:
    """Answers chats.

    Args:
      model: the name in answers. notify: gets each call that came to its end.
      conversations: chats that others may go on from; None: each chat is rendered by itself.
    """

    def __init__(
        self,
        calls: Calls,
        tokenizer: Tokenizer,
        model: str,
        notify: Callable[[FinishedCall], None],
        conversations: Conversations | None = None,
    ) -> None:
        self._calls, self._tokenizer, self._model, self._notify = calls, tokenizer, model, notify
        self._names = {ids_as_text: TokenNames(tokenizer, ids_as_text) for ids_as_text in (False, True)}
        # The template runs in a process that one thread may ask at a time.
        self._templates = concurrent.futures.ThreadPoolExecutor(1, "chat template")
        self._shows_tools: bool | None = None
        self._conversations = conversations

    async def encode(self, messages: list[dict[str, Any]], tools: list[dict[str, Any]], key: str = "") -> list[int]:
        """The token ids of a chat, up to where the assistant goes on. ApiError where the template refuses it."""
        try:
            return await asyncio.get_running_loop().run_in_executor(self._templates, self._encode, messages, tools, key)
        except ValueError as error:
            raise ApiError(400, str(error), param="messages") from None

    async def prepare(self, body: ChatBody, key: str) -> PreparedChat:
        """The prompt of a chat. ApiError for what cannot be drawn."""
        has_tools = bool(body.tools) and body.tool_choice != "none"
        call_format = self._format() if has_tools else None
        prompt_ids = await self.encode(body.messages, body.tools if has_tools else [], key)
        begun = _beginning(call_format, body.tool_choice) if call_format is not None else ""
        if begun:
            if body.messages[-1]["role"] == "assistant":
                raise ApiError(400, "tool_choice must be auto or none where the answer has begun", param="tool_choice")
            prompt_ids = [*prompt_ids, *self._tokenizer.encode(begun, add_bos=False)]
        limits = self._calls.engine.limits
        limit = limits.max_tokens if body.options.limit is None else body.options.limit
        return PreparedChat(body, key, prompt_ids, limit, begun, call_format)

    async def answer(self, chat: PreparedChat) -> dict[str, Any]:
        """The whole answer."""
        ends: dict[int, Ended] = {}
        jobs = self._jobs(chat, streams=False)
        async with self._calls.running(jobs) as running:
            async for job, news in running.news():
                ends[job.sample_index] = news
        ordered = [ends[job.sample_index] for job in jobs]
        told = [self._message(chat, end.completion) for end in ordered]
        choices = []
        for index, (end, (message, finish_reason)) in enumerate(zip(ordered, told, strict=True)):
            choice = {"index": index, "message": message, "finish_reason": finish_reason}
            choices.append({**choice, **self._details(chat, end.completion)})
        answer = {**self._head("chat.completion"), "choices": choices, "usage": self._usage(chat, ordered)}
        if chat.body.options.returns_ids:
            answer["prompt_token_ids"] = chat.prompt_ids
        self._tell(chat, ordered, [message for message, _ in told])
        return answer

    async def stream(self, chat: PreparedChat) -> AsyncIterator[bytes]:
        """The answer as events: the role first, then what is certain, the reason of the end, usage, and [DONE]."""
        options, head = chat.body.options, self._head("chat.completion.chunk")
        usage_field = {"usage": None} if options.includes_usage else {}
        names = self._names[options.ids_as_text]

        def event(index: int, delta: dict[str, Any], finish_reason: str | None = None, **more: Any) -> bytes:
            choice = {"index": index, "delta": delta, "finish_reason": finish_reason, "logprobs": None, **more}
            return to_event({**head, **usage_field, "choices": [choice]})

        def details(drawn: Drawn) -> dict[str, Any]:
            more: dict[str, Any] = {}
            if options.num_top is not None:
                columns = drawn.token_ids, drawn.logprobs, drawn.top_ids, drawn.top_logprobs
                more["logprobs"] = chat_logprobs(names, *columns, options.num_top)
            if options.returns_ids:
                more["token_ids"] = drawn.token_ids.tolist()
            return more

        jobs, ends = self._jobs(chat, streams=True), {}
        streams = [
            TextStream(self._tokenizer, options.rules.stop_strings, options.keeps_stop, options.keeps_special)
            for _ in jobs
        ]
        contents = [_Content(chat.call_format) for _ in jobs]
        messages: dict[int, dict[str, Any]] = {}
        async with self._calls.running(jobs) as running:
            for index in range(len(jobs)):
                first = {**head, **usage_field, "choices": [_first_choice(index)]}
                if options.returns_ids and not index:
                    first["prompt_token_ids"] = chat.prompt_ids
                yield to_event(first)
                if chat.begun and (text := contents[index].push(chat.begun)):
                    yield event(index, {"content": text})
            async for job, news in running.news():
                index = job.sample_index
                if isinstance(news, Drawn):
                    text, more = contents[index].push(streams[index].push(news.token_ids)), details(news)
                    if text or more:
                        yield event(index, {"content": text} if text else {}, **more)
                    continue
                ends[index], completion = news, news.completion
                rest = since(completion, job.num_told)
                text = contents[index].push(streams[index].finish(rest.token_ids, stop_of(completion)))
                messages[index], finish_reason = self._message(chat, completion)
                delta: dict[str, Any] = {}
                if text := text + contents[index].rest(messages[index]["content"]):
                    delta["content"] = text
                if calls := messages[index].get("tool_calls"):
                    delta["tool_calls"] = [{"index": place, **call} for place, call in enumerate(calls)]
                more = details(rest)
                if delta or len(rest.token_ids):
                    yield event(index, delta, **more)
                yield event(index, {}, finish_reason, stop_reason=stop_of(completion))
        ordered = [ends[job.sample_index] for job in jobs]
        if options.includes_usage:
            yield to_event({**head, "choices": [], "usage": self._usage(chat, ordered)})
        self._tell(chat, ordered, [messages[job.sample_index] for job in jobs])
        yield DONE

    def _encode(self, messages: list[dict[str, Any]], tools: list[dict[str, Any]], key: str) -> list[int]:
        if messages[-1]["role"] == "assistant":
            if "tool_calls" in messages[-1]:
                raise ValueError("the last message must not call tools: their results are missing")
            if len(messages) == 1:
                raise ValueError("messages must have one that is answered, got the beginning of an answer alone")
        if tools and self._shows_tools is None:
            asked = [{"role": "user", "content": "What now?"}]
            self._shows_tools = self._tokenizer.render(asked, tools) != self._tokenizer.render(asked)
        if tools and not self._shows_tools:
            raise ValueError(
                f"{self._tokenizer.template_name} does not show tools to the model; describe them in a message, or "
                "start the server with another tokenizer.chat_template"
            )
        found = None if self._conversations is None else self._conversations.prompt_ids(key, messages, tools)
        return self._tokenizer.encode_chat(messages, tools) if found is None else found

    def _format(self) -> Format:
        template = self._tokenizer.backend.get_chat_template() if self._tokenizer.has_chat_template else ""
        found = format_of_template(template)
        if found is None:
            raise ApiError(
                400,
                f"{self._tokenizer.template_name} shows calls of tools in no format that is read here; describe the "
                "tools in a message, and read the calls from the text",
                param="tools",
            )
        return found

    def _jobs(self, chat: PreparedChat, streams: bool) -> list[Any]:
        options = chat.body.options
        how = options.rules, chat.limit, options.num_choices, options.seed, streams
        return self._calls.jobs([chat.prompt_ids], *how)

    def _message(self, chat: PreparedChat, completion: Completion) -> tuple[dict[str, Any], str]:
        """The assistant's message, and why it ended."""
        options, finish_reason = chat.body.options, FINISH_REASONS[completion.finish_reason]
        stop = stop_of(completion)
        content: str | None = chat.begun + text_of(
            self._tokenizer, completion.token_ids.tolist(), stop, options.keeps_stop, options.keeps_special
        )
        message: dict[str, Any] = {"role": "assistant", "content": content, "refusal": None}
        if chat.call_format is not None:
            ids = completion.token_ids.tolist()[: -1 if completion.finish_reason == "eos" else None]
            turn = parse_turn(chat.begun + text_of(self._tokenizer, ids, stop, keeps_special=True), chat.call_format)
            calls: list[Call] = [call for call in turn.calls if call.problem is None]
            if calls:
                calls = calls if chat.body.is_parallel else calls[:1]
                told = tool_calls(calls, chat.prompt_ids, completion.token_ids.tolist())
                message |= {"content": turn.content or None, "tool_calls": told}
                finish_reason = "tool_calls" if finish_reason == "stop" else finish_reason
        return message, finish_reason

    def _details(self, chat: PreparedChat, completion: Completion) -> dict[str, Any]:
        options = chat.body.options
        details: dict[str, Any] = {"logprobs": None, "stop_reason": stop_of(completion)}
        if options.num_top is not None:
            names, drawn = self._names[options.ids_as_text], since(completion, 0)
            columns = drawn.token_ids, drawn.logprobs, drawn.top_ids, drawn.top_logprobs
            details["logprobs"] = chat_logprobs(names, *columns, options.num_top)
        if options.returns_ids:
            details["token_ids"] = completion.token_ids.tolist()
        return details

    def _head(self, kind: str) -> dict[str, Any]:
        return {
            "id": f"chatcmpl-{secrets.token_hex(12)}",
            "object": kind,
            "created": int(time.time()),
            "model": self._model,
            "system_fingerprint": None,
        }

    def _usage(self, chat: PreparedChat, ends: Sequence[Ended]) -> dict[str, Any]:
        num_drawn = sum(len(end.completion.token_ids) for end in ends)
        return usage(len(chat.prompt_ids), num_drawn, max(end.num_reused for end in ends))

    def _tell(self, chat: PreparedChat, ends: Sequence[Ended], messages: Sequence[dict[str, Any]]) -> None:
        completions = [end.completion for end in ends]
        prompt_ids = [chat.prompt_ids] * len(ends)
        tools = chat.body.tools if chat.body.tool_choice != "none" else []
        call = FinishedCall(chat.key, chat.body.messages, tools, prompt_ids, completions, messages)
        if self._conversations is not None:
            self._conversations.add(call)
        self._notify(call)


class _Content:
    """What of a text can be told as content before it is known whether calls of tools are in it.

    call_format: None: all of it.
    """

    def __init__(self, call_format: Format | None) -> None:
        self._format, self._text, self._num_told = call_format, "", 0

    def push(self, text: str) -> str:
        """The content that more text makes certain."""
        self._text += text
        told = self._text[self._num_told : self._certain()]
        self._num_told += len(told)
        return told

    def rest(self, content: str | None) -> str:
        """What is left of the whole content."""
        told = self._text[: self._num_told]
        return content[len(told) :] if content is not None and content.startswith(told) else ""

    def _certain(self) -> int:
        text = self._text
        if self._format is None:
            return len(text)
        if self._format == "hermes":
            start = text.find(OPENS)
            if start >= 0:
                return max(len(text[:start].rstrip()), self._num_told)
            held = next((n for n in range(len(OPENS) - 1, 0, -1) if text.endswith(OPENS[:n])), 0)
            # White space may stand before a call, and is then no part of the content.
            return max(len(text[: len(text) - held].rstrip()), self._num_told)
        return self._num_told  # a call may begin anywhere


def _beginning(call_format: Format, tool_choice: str | tuple[str]) -> str:
    """The text with which an answer begins that calls a tool, a certain one or any."""
    if tool_choice == "auto":
        return ""
    name = None if isinstance(tool_choice, str) else json.dumps(tool_choice[0], ensure_ascii=False)
    if call_format == "llama_pythonic":
        return "[" if isinstance(tool_choice, str) else f"[{tool_choice[0]}("
    opens = f'{OPENS}\n{{"name": ' if call_format == "hermes" else '{"name": '
    arguments = "arguments" if call_format == "hermes" else "parameters"
    return f'{opens}"' if name is None else f'{opens}{name}, "{arguments}": '


def _first_choice(index: int) -> dict[str, Any]:
    delta = {"role": "assistant", "content": ""}
    return {"index": index, "delta": delta, "finish_reason": None, "logprobs": None}


def since(completion: Completion, num_told: int) -> Drawn:
    """What a completion has drawn after its first tokens."""
    assert completion.policy_logprobs is not None
    columns = completion.token_ids, completion.policy_logprobs, completion.top_ids, completion.top_logprobs
    return Drawn(*(column[num_told:] for column in columns))


def stop_of(completion: Completion) -> str | None:
    """The stop string that ended a completion."""
    return completion.stop_reason if isinstance(completion.stop_reason, str) else None


def to_event(value: dict[str, Any]) -> bytes:
    """A server-sent event."""
    return b"data: " + json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode() + b"\n\n"
