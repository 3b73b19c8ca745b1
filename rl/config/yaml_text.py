"""YAML of a configuration as plain values, and back: scalars by YAML 1.2; size, depth and aliases are bounded.

In: text that a user wrote. Out: None, booleans, numbers, strings, lists and dicts, or a ValueError that names file and
line. Not here: what the keys mean (`rl.config.load`). Scalars follow YAML 1.2's core schema
(https://yaml.org/spec/1.2.2/#103-core-schema), so 1:30, yes and 2024-01-01 are text and 1e-6 is a number. Two forms
that readers disagree on, 0o17 and 017, are text as well. Merge keys (<<) are read. Tags outside the core schema are
refused.
"""

import dataclasses
import re
from collections.abc import Iterator
from typing import Any

import yaml

MOST_CHARACTERS = 4_000_000
MOST_DEPTH = 50
MOST_VALUES = 500_000  # an alias counts as what it stands for
_MOST_DIGITS = 100

_TAG = "tag:yaml.org,2002:"
_INT = re.compile(r"[-+]?(?:0|[1-9][0-9]*)|0x[0-9a-fA-F]+")
_FLOAT = re.compile(
    r"[-+]?(?:\.[0-9]+|(?:0|[1-9][0-9]*)(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)"
)
_WORDS = {"": None, "~": None}
_WORDS |= {word: value for name, value in (("null", None), ("true", True), ("false", False)) for word in
           (name, name.capitalize(), name.upper())}  # fmt: skip


def read_yaml(text: str, name: str) -> Any:
    """The one document in `text`; None where it is empty. A key that is a whole number becomes its digits, as in JSON.

    Args:
      name: how messages call the text: a file's path, or an override.

    Raises:
      ValueError: the text is not YAML, a key is given twice, a key is neither text nor a whole number, a type is not
        one of JSON's, or a bound above is exceeded.
    """
    if len(text) > MOST_CHARACTERS:
        raise ValueError(f"{name} must have at most {MOST_CHARACTERS:,} characters, got {len(text):,}")
    return _Reader(_events(text, name), name).document()


def write_yaml(values: dict[str, Any]) -> str:
    """YAML that `read_yaml`, and a reader of YAML 1.1, read back to equal values."""
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)


class _Dumper(yaml.SafeDumper):
    """SafeDumper that also quotes text which YAML 1.2 would read as a number."""

    def ignore_aliases(self, data: Any) -> bool:  # pyright: ignore[reportIncompatibleMethodOverride]
        return True


_Dumper.add_implicit_resolver(_TAG + "float", re.compile(rf"(?:{_FLOAT.pattern})$"), list("-+0123456789."))


@dataclasses.dataclass(frozen=True)
class _Value:
    """A value and the number of values in it, itself included; `size` is None while it is still being read."""

    value: Any
    size: int | None


class _Reader:
    """Turns the parser's events into values."""

    def __init__(self, events: Iterator[yaml.Event], name: str):
        self._events, self._name = events, name
        self._anchors: dict[str, _Value] = {}
        self._num_values, self._depth = 0, 0

    def document(self) -> Any:
        next(self._events)  # the stream's start
        if isinstance(next(self._events), yaml.StreamEndEvent):
            return None
        value = self._value(next(self._events))
        next(self._events)  # the document's end
        event = next(self._events)
        if not isinstance(event, yaml.StreamEndEvent):
            raise self._problem(event, "there must be one document, got a second one; remove what follows ---")
        return value

    def _value(self, event: yaml.Event) -> Any:
        if isinstance(event, yaml.AliasEvent):
            return self._alias(event)
        self._count(event, 1)
        anchor = getattr(event, "anchor", None)
        if anchor is not None:
            if anchor in self._anchors:
                raise self._problem(event, f"the anchor &{anchor} is given twice")
            self._anchors[anchor] = _Value(None, None)
        before = self._num_values
        if isinstance(event, yaml.ScalarEvent):
            value = self._scalar(event)
        else:
            self._depth += 1
            if self._depth > MOST_DEPTH:
                raise self._problem(event, f"values must be nested at most {MOST_DEPTH} deep")
            if isinstance(event, yaml.SequenceStartEvent):
                value = self._list(event)
            else:
                assert isinstance(event, yaml.MappingStartEvent), event
                value = self._dict(event)
            self._depth -= 1
        if anchor is not None:
            self._anchors[anchor] = _Value(value, self._num_values - before + 1)
        return value

    def _alias(self, event: yaml.AliasEvent) -> Any:
        found = self._anchors.get(event.anchor)
        if found is None:
            raise self._problem(event, f"the alias *{event.anchor} must stand for an anchor above it, got none")
        if found.size is None:
            raise self._problem(event, f"the alias *{event.anchor} must not stand within what it stands for")
        self._count(event, found.size)
        return found.value

    def _list(self, event: yaml.SequenceStartEvent) -> list[Any]:
        self._check_tag(event, "seq")
        values = []
        while not isinstance(entry := next(self._events), yaml.SequenceEndEvent):
            values.append(self._value(entry))
        return values

    def _dict(self, event: yaml.MappingStartEvent) -> dict[str, Any]:
        self._check_tag(event, "map")
        own: dict[str, Any] = {}
        merged: dict[str, Any] = {}
        while not isinstance(entry := next(self._events), yaml.MappingEndEvent):
            is_merge = isinstance(entry, yaml.ScalarEvent) and entry.value == "<<" and entry.implicit[0]
            key = self._value(entry)
            value = self._value(next(self._events))
            if is_merge:
                for part in value if isinstance(value, list) else [value]:
                    if not isinstance(part, dict):
                        raise self._problem(entry, "the merge key << must stand before a mapping, or a list of them")
                    merged = {**part, **merged}
                continue
            if isinstance(key, bool) or not isinstance(key, str | int):
                raise self._problem(entry, f"a key must be text or a whole number, got {str(key)[:80]!r}")
            key = str(key)  # as JSON has it: 1 and "1" are one key
            if key in own:
                raise self._problem(entry, f"key {key!r} is given twice")
            own[key] = value
        return {**merged, **own}

    def _scalar(self, event: yaml.ScalarEvent) -> Any:
        text, tag = event.value, event.tag
        if tag in (None, "!"):
            return self._plain(event) if event.implicit[0] and tag is None else text
        if tag == _TAG + "str":
            return text
        kinds = {"null": type(None), "bool": bool, "int": int, "float": float}
        kind = kinds.get(tag.removeprefix(_TAG))
        value = self._plain(event)
        if kind is float and type(value) is int:
            value = float(value) if abs(value) < 2**1000 else float("inf")
        if kind is None or type(value) is not kind:
            raise self._problem(event, f"a value must be of a type that JSON has, got {text[:80]!r} as {tag}")
        return value

    def _plain(self, event: yaml.ScalarEvent) -> Any:
        text = event.value
        if text in _WORDS:
            return _WORDS[text]
        if _INT.fullmatch(text):
            if len(text) > _MOST_DIGITS:
                raise self._problem(event, f"a number must have at most {_MOST_DIGITS} digits, got {len(text)}")
            return int(text, 16 if text.startswith("0x") else 10)
        if _FLOAT.fullmatch(text):
            return float(re.sub(r"\.(?=inf|nan)", "", text.lower()))
        return text

    def _check_tag(self, event: yaml.CollectionStartEvent, kind: str) -> None:
        if event.tag not in (None, "!", _TAG + kind):
            raise self._problem(event, f"a value must be of a type that JSON has, got {event.tag}")

    def _count(self, event: yaml.Event, number: int) -> None:
        self._num_values += number
        if self._num_values > MOST_VALUES:
            raise self._problem(event, f"there must be at most {MOST_VALUES:,} values, aliases counted in full")

    def _problem(self, event: yaml.Event, problem: str) -> ValueError:
        assert event.start_mark is not None
        return ValueError(f"{self._name}, line {event.start_mark.line + 1}: {problem}")


def _events(text: str, name: str) -> Iterator[yaml.Event]:
    """The parser's events, one by one, so that parsing stops where a bound is exceeded."""
    try:
        yield from yaml.parse(text, Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        problem = ", ".join(part for part in (error.context, error.problem) if part)
        raise ValueError(f"{name} is not valid YAML: {where}{problem}") from error
    except yaml.reader.ReaderError as error:
        raise ValueError(f"{name} is not valid YAML: character {error.position + 1}: {error.reason}") from error
    except (OverflowError, ValueError) as error:  # an escape beyond Unicode, a version of 5,000 digits
        raise ValueError(f"{name} is not valid YAML: {str(error)[:160]}") from error
