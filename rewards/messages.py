"""Messages and metrics of environments: what they may be, and their JSON form.

In: values that code of the user returned, in a worker. Out: plain JSON, or `Rejected` with what is wrong. The runner
asks `is_message` and `is_metrics` again, because it does not believe a worker.
"""

from collections.abc import Mapping, Sequence
from math import isfinite  # by name, before a user's code can replace it
from typing import Any

from rewards.environment import Message
from rewards.in_worker import Rejected, short
from rewards.logged import MAX_INT, MAX_NAME, MAX_NAMES, is_plain, number_of

ROLES = ("user", "tool", "system")  # of observations
_MAX_DEPTH = 40  # of nesting in a message; arguments of calls are nested at most 32 deep


def checked_prompt(value: Any, method: str = "reset") -> str | list[Message]:
    """The prompt that `reset` returned, or that a step gave."""
    if isinstance(value, str):
        return clean(value)
    if not isinstance(value, Sequence) or not value:
        how = "reset returned" if method == "reset" else f"{method} gave the prompt"
        raise Rejected("not_a_step", f"{how} {short(value)}, a prompt must be a text or messages")
    return [_message(message, method, None) for message in value]


def checked_observations(value: Any) -> list[Message]:
    """The messages of a step."""
    if isinstance(value, str) or not isinstance(value, Sequence):
        raise Rejected("not_a_step", f"step gave the messages {short(value)}, must give a list of them")
    return [_message(message, "step", ROLES) for message in value]


def checked_metrics(value: Any) -> dict[str, float]:
    """The metrics of a step, at most `MAX_NAMES`. Numbers that are not finite are left out."""
    if not isinstance(value, Mapping):
        raise Rejected("not_a_step", f"step gave the metrics {short(value)}, must give a dict of numbers")
    metrics = {}
    for name, number in value.items():
        found = number_of(number)
        if not isinstance(name, str) or found is None:
            raise Rejected("not_a_step", f"a metric must be a name and a number, got {short(name)} and {short(number)}")
        shown = "".join(character if character.isprintable() else "?" for character in clean(name))[:MAX_NAME] or "_"
        if isfinite(found) and len(metrics) < MAX_NAMES:
            metrics[shown] = found
    return metrics


def clean(text: str) -> str:
    """A text without lone surrogates, which no tokenizer takes."""
    return text.encode("utf-8", "replace").decode()


def is_message(value: Any, roles: Sequence[str] | None = None) -> bool:
    """Whether a JSON value is a message that this module lets through. roles: that it may have; None: any."""
    if not isinstance(value, dict) or not isinstance(value.get("role"), str):
        return False
    if roles is not None and (value["role"] not in roles or not isinstance(value.get("content"), str)):
        return False
    return is_plain(value, _MAX_DEPTH + 2, _is_text)


def is_metrics(value: Any) -> bool:
    """Whether a JSON value is what `checked_metrics` gives."""
    if not isinstance(value, dict) or len(value) > MAX_NAMES:
        return False
    return all(
        0 < len(name) <= MAX_NAME and name.isprintable() and type(number) is float and isfinite(number)
        for name, number in value.items()
    )


def _message(value: Any, method: str, roles: Sequence[str] | None) -> Message:
    if not isinstance(value, Mapping) or not isinstance(value.get("role"), str):
        raise Rejected("not_a_step", f"{method} gave {short(value)}, a message must be a dict with role and content")
    if roles is not None and value["role"] not in roles:
        raise Rejected("not_a_step", f"{method} gave the role {value['role']!r}, it must be one of {', '.join(roles)}")
    if roles is not None and not isinstance(value.get("content"), str):
        raise Rejected("not_a_step", f"{method} gave the content {short(value.get('content'))}, it must be a text")
    return _plain(value, method, _MAX_DEPTH)


def _plain(value: Any, method: str, depth: int) -> Any:
    if isinstance(value, str):
        return clean(value)
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, int) and abs(value) < MAX_INT:
        return int(value)
    if isinstance(value, float) and isfinite(value):
        return float(value)
    if depth and isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
        return {clean(key): _plain(item, method, depth - 1) for key, item in value.items()}
    if depth and isinstance(value, (list, tuple)):
        return [_plain(item, method, depth - 1) for item in value]
    raise Rejected("not_a_step", f"{method} gave {short(value)} in a message, which must be plain JSON")


def _is_text(value: str) -> bool:
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True
