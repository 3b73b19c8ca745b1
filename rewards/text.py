"""Text of a completion, whatever form it comes in, and the part of it that holds the final answer."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

_BOX_OPENS = re.compile(r"\\boxed\s*\{")


def completion_text(completion: str | Sequence[Mapping[str, Any]]) -> str:
    """Text of a completion: a string as it is, or the last assistant message of a list of chat messages.

    Content in parts (`[{"type": "text", "text": ...}]`) is joined; parts of other types have no text. A list without an
    assistant message gives "". Raises ValueError for any other form.
    """
    if isinstance(completion, str):
        return completion
    if not isinstance(completion, Sequence) or not all(isinstance(message, Mapping) for message in completion):
        raise ValueError(f"a completion must be a string or a list of chat messages, got {type(completion).__name__}")
    return message_text(next((message for message in reversed(completion) if message.get("role") == "assistant"), {}))


def message_text(message: Mapping[str, Any]) -> str:
    """Text of a chat message of any role; of content in parts as in `completion_text`. "" without content."""
    content = message.get("content")
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    return "".join(part.get("text", "") for part in content if part.get("type") == "text")


def whole_texts(prompt: str | Sequence[Mapping[str, Any]], completion: Any) -> tuple[str, str]:
    """(prompt, prompt and completion) as text, where the tokens that the policy read are not known: contents of
    messages on lines of their own.
    """
    if isinstance(prompt, str):
        return prompt, prompt + completion_text(completion)
    asked = "".join(f"{message_text(message)}\n" for message in prompt)
    return asked, asked + completion_text(completion)


def after_thinking(text: str) -> str:
    """The text behind the last `</think>`; all of it when there is none. Scratch work is not an answer."""
    return text.rpartition("</think>")[2]


def tagged(text: str, name: str) -> list[str]:
    """Contents of each `<name>...</name>` in order; an opening tag inside another pair is a part of its content."""
    opening, closing = f"<{name}>", f"</{name}>"
    found: list[str] = []
    start = text.find(opening)
    while start >= 0:
        start += len(opening)
        end = text.find(closing, start)
        if end < 0:
            break
        found.append(text[start:end])
        start = text.find(opening, end)
    return found


def boxed(text: str) -> list[str | None]:
    r"""Contents of each outermost `\boxed{...}` in order, braces balanced; None for one that is never closed.

    `\boxed{\boxed{1}}` is one answer, whose content is `\boxed{1}`. Escaped braces (`\{`) do not count as braces.
    """
    found: list[str | None] = []
    start = _BOX_OPENS.search(text)
    while start:
        begin = position = start.end()
        depth = 1
        while position < len(text) and depth:
            if text[position] == "\\":
                position += 1  # the escaped character is never a brace of the structure
            elif text[position] == "{":
                depth += 1
            elif text[position] == "}":
                depth -= 1
            position += 1
        found.append(text[begin : position - 1] if depth == 0 else None)
        start = _BOX_OPENS.search(text, position)
    return found
