"""Objects of a Python session where a configuration otherwise names files: reward functions and rows.

The configuration says `<object NAME>`. The objects themselves are given for the time of a `with`, so a run sees its own
objects and none of an earlier run. No file holds them: whoever loads such a configuration later must give them again.
"""

import contextlib
import contextvars
import dataclasses
import re
from collections.abc import Iterator, Mapping
from typing import Any

from rl.config.sections import Config


@dataclasses.dataclass(frozen=True)
class GivenFunction:
    """A reward function: the bytes that a worker loads, and the hash that identifies it; see `rewards.objects`."""

    pickled: bytes = dataclasses.field(repr=False)
    identity: str


@dataclasses.dataclass(frozen=True)
class Objects:
    """The given objects, by the text that stands for each in the configuration."""

    functions: Mapping[str, GivenFunction] = dataclasses.field(default_factory=dict)
    rows: Mapping[str, list[dict[str, Any]]] = dataclasses.field(default_factory=dict)


_GIVEN: contextvars.ContextVar[Objects] = contextvars.ContextVar("given objects")


def object_text(name: str) -> str:
    """The text that stands for an object in a configuration."""
    return f"<object {name}>"


def is_object(value: str | None) -> bool:
    """Whether a value of a configuration stands for an object."""
    return value is not None and re.fullmatch(r"<object .+>", value, re.DOTALL) is not None


@contextlib.contextmanager
def given(objects: Objects) -> Iterator[None]:
    """A context in which configurations may stand for these objects."""
    token = _GIVEN.set(objects)
    try:
        yield
    finally:
        _GIVEN.reset(token)


def function_of(text: str) -> GivenFunction | None:
    """The given reward function that an entry of `rewards.functions` stands for; None for one in a file or module.

    Raises:
      ValueError: it is an object that is not given.
    """
    if not is_object(text):
        return None
    function = _GIVEN.get(Objects()).functions.get(text)
    if function is None:
        raise ValueError(
            f"rewards.functions holds {text!r}, a function of the Python session that wrote this configuration, which "
            "no file holds; give it again, rl.load(RUN, rewards=[FUNCTION]) or rl.train(..., rewards=[FUNCTION]), or "
            "name one in a file, rewards.functions=[{function: my_rewards.py:FUNCTION}]"
        )
    return function


def rows_of(source: str, key: str = "data.source") -> list[dict[str, Any]] | None:
    """The given rows that a source stands for; None for a source with a name.

    Raises:
      ValueError: they are an object that is not given.
    """
    if not is_object(source):
        return None
    rows = _GIVEN.get(Objects()).rows.get(source)
    if rows is None:
        raise ValueError(
            f"{key} is {source!r}, rows of the Python session that wrote this configuration, which no file holds; give "
            f"them again, rl.load(RUN, data=ROWS) or rl.train(..., data=ROWS), or name a file, {key}=ROWS.jsonl"
        )
    return rows


def check_given(config: Config) -> None:
    """ValueError where the configuration stands for objects that are not given."""
    for entry in config.rewards.functions:
        function_of(entry.function)
    for key in ("source", "eval_source"):
        rows_of(getattr(config.data, key) or "", f"data.{key}")
    for place, entry in enumerate(config.data.sources):
        rows_of(entry.source, f"data.sources.{place}.source")


def function_hashes(config: Config) -> dict[str, dict[str, str]]:
    """The hashes, by name, of the reward functions that are given as objects; empty without such functions. They are
    part of the run's identity.
    """
    found = {entry.label: function_of(entry.function) for entry in config.rewards.functions}
    hashes = {name: function.identity for name, function in found.items() if function is not None}
    return {"reward_functions": hashes} if hashes else {}
