"""Reward: JSON that a schema allows (library `jsonschema`, extra `rewards`)."""

import functools
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from rewards.contract import elementwise
from rewards.extras import import_extra, needs_library
from rewards.settings import Settings, number
from rewards.text import after_thinking, completion_text

_FENCE = re.compile(r"```[ \t]*(?:json)?[ \t]*\n(.*?)```", re.DOTALL | re.IGNORECASE)
_UNREADABLE = object()
_REFERENCES = ("$ref", "$dynamicRef")
_NO_SCHEMAS = ("const", "enum", "default", "examples")  # keywords whose values are any JSON


def _together(given: Mapping[str, Any]) -> None:
    if "schema" in given:
        _validator(json.dumps(given["schema"]))


_SETTINGS = Settings(
    _together,
    ("schema",),
    schema=lambda value: None if isinstance(value, Mapping) else "a JSON schema, as a mapping",
    valid_json_score=number(">= 0 and < 1", lambda score: 0 <= score < 1),
)


@elementwise
@_SETTINGS.mark
@needs_library("jsonschema", "tandem-grpo[rewards]")
def json_schema(
    prompts: Sequence[Any],
    completions: Sequence[Any],
    schema: Mapping[str, Any] | Sequence[Mapping[str, Any] | str],
    valid_json_score: float = 0.0,
    **kwargs: Any,
) -> list[float]:
    """1.0 for JSON that `schema` allows, `valid_json_score` for other JSON, 0.0 for what is no JSON.

    The JSON is all of the text behind the last `</think>`, or its one block between ``` or ```json and ```. NaN and
    Infinity are no JSON, and neither is an object that names a key twice.

    schema: a JSON schema (https://json-schema.org) as a setting, or a column with one for each row, also as text. Its
    `$schema` decides the draft, 2020-12 where it has none; a `$ref` reaches only into the schema itself. Formats are
    not checked. Raises ValueError for what is no JSON schema, and unless 0 <= valid_json_score < 1;
    ModuleNotFoundError without `jsonschema`.
    """
    _SETTINGS.check(valid_json_score=valid_json_score)
    of_rows = [schema] * len(completions) if isinstance(schema, Mapping) else schema
    judged = []
    for completion, wanted in zip(completions, of_rows, strict=True):
        validator = _validator(wanted if isinstance(wanted, str) else json.dumps(wanted))
        value = _json_of(completion_text(completion))
        if value is _UNREADABLE:
            judged.append(0.0)
        else:
            judged.append(1.0 if _is_valid(validator, value) else float(valid_json_score))
    return judged


@functools.lru_cache(maxsize=64)
def _validator(schema: str) -> Any:
    jsonschema = import_extra("jsonschema", "tandem-grpo[rewards]", "json_schema")
    import referencing

    try:
        loaded = json.loads(schema)
        if not isinstance(loaded, Mapping):
            raise ValueError("it is no object")
        kind = jsonschema.validators.validator_for(loaded, default=jsonschema.Draft202012Validator)
        kind.check_schema(loaded)
        _check_references(loaded)
    except (ValueError, jsonschema.SchemaError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"schema must be a JSON schema, got {schema[:200]!r}: {reason}") from error
    return kind(loaded, registry=referencing.Registry())  # an empty one: nothing is fetched


def _check_references(schema: Mapping[str, Any]) -> None:
    """ValueError for a $ref that leaves the schema or leads nowhere in it. Schemas with `$id`, which gives references
    another base, are believed.
    """
    import referencing
    import referencing.exceptions
    import referencing.jsonschema

    found, named = [], False

    def walk(part: Any) -> None:
        nonlocal named
        if isinstance(part, Mapping):
            named |= "$id" in part
            found.extend(value for name, value in part.items() if name in _REFERENCES and isinstance(value, str))
            for name, value in part.items():
                if name not in _NO_SCHEMAS:
                    walk(value)
        elif isinstance(part, list):
            for value in part:
                walk(value)

    walk(schema)
    resource = referencing.Resource.from_contents(schema, referencing.jsonschema.DRAFT202012)
    resolver = referencing.Registry().resolver_with_root(resource)
    for reference in () if named else found:
        try:
            resolver.lookup(reference)
        except referencing.exceptions.Unresolvable as error:
            raise ValueError(f"$refs must lead into the schema itself, got {reference!r}") from error


def _is_valid(validator: Any, value: Any) -> bool:
    import referencing.exceptions

    try:
        return validator.is_valid(value)
    except referencing.exceptions.Unresolvable as error:
        raise ValueError(f"schema must have $refs into itself only, got {error}") from error
    except RecursionError:
        return False


def _json_of(text: str) -> Any:
    """The value of the JSON in a text, or _UNREADABLE."""
    text = after_thinking(text).strip()
    blocks = _FENCE.findall(text)
    try:
        return json.loads(
            blocks[0] if len(blocks) == 1 else text, parse_constant=_refuse, object_pairs_hook=_without_repeats
        )
    except (ValueError, RecursionError):
        return _UNREADABLE


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no JSON")


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len({key for key, _ in pairs}) < len(pairs):
        raise ValueError("a key is there twice")
    return dict(pairs)
