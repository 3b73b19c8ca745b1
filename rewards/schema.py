"""Reward: JSON that a schema allows (library `jsonschema`, extra `rewards`)."""

import functools
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from rewards.contract import elementwise
from rewards.extras import import_extra, needs_library
from rewards.text import after_thinking, completion_text

_FENCE = re.compile(r"```[ \t]*(?:json)?[ \t]*\n(.*?)```", re.DOTALL | re.IGNORECASE)
_UNREADABLE = object()


@elementwise
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
    if not 0 <= valid_json_score < 1:
        raise ValueError(f"valid_json_score must be >= 0 and < 1, got {valid_json_score!r}")
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
    except (ValueError, jsonschema.SchemaError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"schema must be a JSON schema, got {schema[:200]!r}: {reason}") from error
    return kind(loaded, registry=referencing.Registry())  # an empty one: nothing is fetched


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
