"""Text of a model on a terminal: short, on one line, and without anything that a terminal would obey."""

import unicodedata
from typing import Any

_UNSEEN = {
    "Cc",
    "Cf",
    "Cs",
    "Co",
    "Cn",
    "Zl",
    "Zp",
}  # categories of Unicode; controls and marks of direction among them


def visible(text: str) -> str:
    r"""The text with what cannot be seen, or moves a cursor, as escapes: "\n", "\x1b", "\u202e"."""
    return "".join(
        char.encode("unicode_escape").decode() if unicodedata.category(char) in _UNSEEN else char for char in text
    )


def shortened(text: str, length: int) -> str:
    """The text, or its beginning and its end, where answers tend to be, in at most so many characters."""
    if len(text) <= length:
        return text
    last = (length - 5) // 2
    return f"{text[: length - 5 - last]} ... {text[len(text) - last :]}"


def prompt_text(prompt: Any) -> str:
    """A prompt or an answer as text: a chat as its messages, one behind the other."""
    if not isinstance(prompt, list):
        return str(prompt)
    return "\n".join(f"{message.get('role')}: {message.get('content')}" for message in prompt)
