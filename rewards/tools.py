"""Tools: functions that a policy may call in its turns.

In: functions by name, and the calls of a turn (`rewards.tool_calls`). Out: JSON schemas for the chat template, and
messages that answer the calls in their order. What a tool raises is an answer that the policy reads.
"""

import asyncio
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rewards.calling import call
from rewards.environment import Message
from rewards.importing import import_function
from rewards.text import message_text
from rewards.tool_calls import Call

Functions = Mapping[str, Callable[..., Any]]
_UNKNOWN = "unknown"  # the name of an answer to a call without one, as in TRL


def load_tools(names: Sequence[str], label: str) -> dict[str, Callable[..., Any]]:
    """The functions by the names under which the policy calls them.

    Raises ValueError for what does not import, and for two of the same name.
    """
    functions: dict[str, Callable[..., Any]] = {}
    for reference in names:
        function = import_function(reference, f"{label} {reference!r}")
        name = getattr(function, "__name__", "")
        if not name:
            raise ValueError(f"{label} {reference!r}: it must be a function with a name, got {type(function).__name__}")
        add_tool(functions, name, function, f"{label} {reference!r}")
    return functions


def add_tool(functions: dict[str, Callable[..., Any]], name: str, function: Callable[..., Any], label: str) -> None:
    """Adds a tool. Raises ValueError for a name that is there already."""
    if name in functions:
        raise ValueError(f"{label}: there is another tool named {name!r}; names of tools must differ, rename one")
    functions[name] = function


def schema_of(function: Callable[..., Any], label: str) -> dict[str, Any]:
    """The JSON schema of a tool, from its type hints and its docstring, as transformers reads them.

    Raises ValueError where these do not say enough, or transformers is missing.
    """
    try:
        from transformers.utils.chat_template_utils import get_json_schema
    except ImportError as error:
        raise ValueError(
            f"{label}: schemas of tools are read by transformers, which does not import ({error}); install it"
        ) from error
    name = getattr(function, "__name__", type(function).__name__)
    try:
        return get_json_schema(function)
    except Exception as error:
        raise ValueError(
            f"{label}: the tool {name!r} has no schema: {type(error).__name__}: {error}; give each argument a type "
            "hint, and a line under 'Args:' in its docstring"
        ) from error


def is_async(function: Callable[..., Any]) -> bool:
    """Whether a function has to be awaited."""
    return inspect.iscoroutinefunction(function)


async def answers(calls: Sequence[Call], ids: Sequence[str], functions: Functions) -> tuple[list[Message], int]:
    """(A message for each call, in their order; how many of them tell of an error). Async tools run at the same time.

    ids: of the calls.
    """
    results: list[Any] = [None] * len(calls)
    waiting = []
    for place, one in enumerate(calls):
        problem = one.problem
        if problem is None and one.name not in functions:
            problem = f"there is no tool {one.name!r}; tools are {', '.join(functions) or 'none'}"
        if problem is not None:
            results[place] = _Error(problem)
        elif is_async(functions[one.name]):
            waiting.append((place, asyncio.ensure_future(_run(functions[one.name], one))))
        else:
            results[place] = await _run(functions[one.name], one)
    if waiting:
        await asyncio.gather(*(task for _, task in waiting))
    for place, task in waiting:
        results[place] = task.result()
    messages = [
        {"role": "tool", "name": one.name or _UNKNOWN, "tool_call_id": call_id, "content": _content(result)}
        for one, call_id, result in zip(calls, ids, results, strict=True)
    ]
    return messages, sum(isinstance(result, _Error) for result in results)


class _Error(Exception):
    """What went wrong with a call."""


async def _run(function: Callable[..., Any], one: Call) -> Any:
    try:
        return await call(function, **one.arguments)
    except Exception as error:  # noqa: BLE001  whatever it is, the policy reads it
        return _Error(str(error) or type(error).__name__)


def _content(result: Any) -> str:
    if isinstance(result, _Error):
        return str({"error": str(result)})
    if isinstance(result, list) and result and all(isinstance(part, dict) and "type" in part for part in result):
        return message_text({"content": result})
    return str(result)
