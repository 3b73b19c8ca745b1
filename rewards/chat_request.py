"""What a request for a chat says, in the words of OpenAI's API: messages, tools and which of them may be called.

In: the JSON of a request, which anybody may have written. Out: messages and schemas as chat templates take them, or a
ValueError that begins with the name of the field. Both `grpo serve` (`rl.serving.bodies`) and the address of agents
(`rewards.agent_server`) read with it. Not here: how an answer is drawn.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from rewards.environment import Message
from rewards.settings import shown

MOST_MESSAGES = 10_000
ROLES = ("system", "developer", "user", "assistant", "tool")
TOOL_CHOICES = ("none", "auto", "required")
# Of an assistant's message: what clients write back with it, and a chat template does not read.
_EMPTY = ("refusal", "audio", "function_call", "annotations", "reasoning_content", "reasoning")


def read_json(body: bytes) -> dict[str, Any]:
    """The object in a body. ValueError where it is none."""

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is no number of JSON")

    try:
        value = json.loads(body, parse_constant=refuse)
    except (ValueError, RecursionError) as error:  # also bytes that are no text, numbers of thousands of digits
        raise ValueError(f"the body must be JSON, got {type(error).__name__}: {str(error)[:200]}") from None
    if not isinstance(value, dict):
        raise ValueError(f"the body must be a JSON object, got {type(value).__name__}")
    return value


def read_messages(values: Mapping[str, Any]) -> list[Message]:
    """The field `messages`. ValueError where it is none."""
    given = values.get("messages")
    if not isinstance(given, list) or not all(isinstance(message, dict) for message in given):
        raise _wrong("messages", "a list of objects", given)
    if not 0 < len(given) <= MOST_MESSAGES:
        raise _wrong("messages", f"a list of 1 to {MOST_MESSAGES} messages", given)
    return [_message(message, f"messages[{place}].") for place, message in enumerate(given)]


def read_tools(values: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The field `tools`: JSON schemas of functions. ValueError where it is none."""
    given = values.get("tools") or []
    if not isinstance(given, list) or not all(isinstance(tool, dict) for tool in given):
        raise _wrong("tools", "a list of objects", given)
    names = []
    for place, tool in enumerate(given):
        name = f"tools[{place}]."
        _choice(tool, name, "type", ("function",))
        function = _object(tool, name, "function")
        names.append(_text(function, f"{name}function.", "name"))
        if not names[-1]:
            raise _wrong(f"{name}function.name", "text", names[-1])
        _text(function, f"{name}function.", "description", "")
        _object(function, f"{name}function.", "parameters", {})
    if len(set(names)) < len(names):
        raise _wrong("tools", "functions of different names", names)
    return [dict(tool) for tool in given]


def read_tool_choice(values: Mapping[str, Any], tools: Sequence[Mapping[str, Any]]) -> str | tuple[str]:
    """The field `tool_choice`: one of `TOOL_CHOICES`, or the name of one of the tools in a tuple of one. ValueError
    where it is neither.
    """
    given = values.get("tool_choice")
    if given is None:
        return "auto" if tools else "none"
    if isinstance(given, dict):
        _choice(given, "tool_choice.", "type", ("function",))
        function = _object(given, "tool_choice.", "function")
        names = [tool["function"]["name"] for tool in tools]
        return (_choice(function, "tool_choice.function.", "name", names),)
    choice = _choice(values, "", "tool_choice", TOOL_CHOICES)
    if choice in ("required", "auto") and not tools:
        raise _wrong("tool_choice", "none, or left out, without tools", choice)
    return choice


def told_call(name: str, arguments: Mapping[str, Any], call_id: str) -> dict[str, Any]:
    """A call of a tool as an answer tells it: with the arguments as text."""
    told = {"name": name, "arguments": json.dumps(arguments, ensure_ascii=False)}
    return {"id": call_id, "type": "function", "function": told}


def same_message(message: Mapping[str, Any]) -> list[Any]:
    """What makes two messages the same, whoever wrote them: role, text, name, and names and arguments of calls. White
    space around what the assistant said is left out, because clients strip it.
    """
    calls = []
    for call in message.get("tool_calls") or ():
        arguments = call["function"]["arguments"]
        calls.append([call["function"]["name"], json.loads(arguments) if isinstance(arguments, str) else arguments])
    content = message.get("content") or ""
    if message["role"] == "assistant":
        content = content.strip()
    return [message["role"], content, message.get("name"), calls]


def _message(given: Mapping[str, Any], name: str) -> Message:
    """A message as chat templates take it: the content is text, and the arguments of calls are objects."""
    role = _choice(given, name, "role", ROLES)
    told: Message = {"role": "system" if role == "developer" else role, "content": _content(given, name)}
    known = {"role", "content", "name"}
    if role == "tool":
        known.add("tool_call_id")
        told |= {key: _text(given, name, key) for key in ("name", "tool_call_id") if given.get(key) is not None}
    if role == "assistant":
        known |= {"tool_calls", *_EMPTY}
        for key in _EMPTY:
            if given.get(key):
                raise _wrong(f"{name}{key}", "left out or null, because it is not supported", given[key])
        if calls := given.get("tool_calls"):
            if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
                raise _wrong(f"{name}tool_calls", "a list of objects", calls)
            told["tool_calls"] = [_call(call, f"{name}tool_calls[{place}].") for place, call in enumerate(calls)]
    for key, value in given.items():
        if key not in known and value is not None:
            raise _wrong(f"{name}{key[:100]}", "left out: it is no field of such a message", value)
    if given.get("content") is None and "tool_calls" not in told:
        raise _wrong(f"{name}content", "text, or a list of parts of text", None)
    return told


def _content(given: Mapping[str, Any], name: str) -> str:
    content = given.get("content")
    if isinstance(content, list):
        parts = []
        for place, part in enumerate(content):
            where = f"{name}content[{place}]."
            if not isinstance(part, dict):
                raise _wrong(f"{name}content", "a list of objects", content)
            _choice(part, where, "type", ("text",))
            parts.append(_text(part, where, "text"))
        content = "".join(parts)
    else:
        content = _text(given, name, "content", "")
    check_unicode(f"{name}content", content)
    return content


def _call(given: Mapping[str, Any], name: str) -> dict[str, Any]:
    """A call with its arguments as an object, as chat templates want them."""
    _choice(given, name, "type", ("function",), "function")
    function = _object(given, name, "function")
    called, arguments = (
        _text(function, f"{name}function.", "name"),
        _text(function, f"{name}function.", "arguments", "{}"),
    )
    try:
        value = json.loads(arguments or "{}")
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise _wrong(f"{name}function.arguments", "a JSON object in text", arguments)
    told = {"type": "function", "function": {"name": called, "arguments": value}}
    return {"id": _text(given, name, "id"), **told} if given.get("id") is not None else told


def check_unicode(name: str, text: str) -> None:
    """ValueError for half of a character, which no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise _wrong(name, "valid Unicode", text) from None


def _choice(given: Mapping[str, Any], name: str, key: str, choices: Sequence[str], default: str | None = None) -> Any:
    value = default if given.get(key) is None else given[key]
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"{name}{key} must be one of {', '.join(choices)}, got {shown(value)}, which is not supported")
    return value


def _text(given: Mapping[str, Any], name: str, key: str, default: str | None = None) -> str:
    value = default if given.get(key) is None else given[key]
    if not isinstance(value, str):
        raise _wrong(f"{name}{key}", "text", value)
    return value


def _object(
    given: Mapping[str, Any], name: str, key: str, default: Mapping[str, Any] | None = None
) -> Mapping[str, Any]:
    value = default if given.get(key) is None else given[key]
    if not isinstance(value, dict):
        raise _wrong(f"{name}{key}", "an object", value)
    return value


def _wrong(name: str, rule: str, value: object) -> ValueError:
    return ValueError(f"{name} must be {rule}, got {shown(value)}")
