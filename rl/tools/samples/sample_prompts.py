"""Prompts to sample from, as `grpo sample` takes them: a JSON-lines file or texts in, token ids with their wishes out.

A row holds exactly one of `prompt` (text, or chat messages), `messages` (chat messages) and `prompt_ids` (token ids),
and may hold `n` (completions), `max_tokens`, `seed` and `id`. Every other column is passed through. Training's prompts
are `rl.data.prompt_rows`.
"""

import dataclasses
import json
import pathlib
from collections.abc import Sequence
from typing import Any

from rl.config.ranges import LARGEST_SEED
from rl.config.sections import DataSection
from rl.data.prompt_rows import Prompt, build_prompt, conversation_problem, encode_prompt, with_examples
from rl.data.sources import read_jsonl
from rl.data.tasks import Row
from rl.data.tokenizer import Tokenizer
from rl.errors import missing

KINDS = ("prompt", "messages", "prompt_ids")
WISHES = ("n", "max_tokens", "seed", "id")


@dataclasses.dataclass(frozen=True)
class SampleRow:
    """One prompt and what is asked of it.

    Attributes:
      where: for messages: its file and line.
      prompt: as the policy is asked: text or chat messages; None for token ids.
      prompt_ids: at least one. num_samples: >= 1. limit: tokens of a completion.
      seed: None, or what stands for the run's seed and the prompt's index in the randomness.
      row_id: the `id` of the row; None without one. columns: the columns passed through.
    """

    where: str
    prompt: Prompt | None
    prompt_ids: list[int]
    num_samples: int
    limit: int
    seed: int | None
    row_id: str | int | None
    columns: dict[str, Any]


def read_prompts(path: pathlib.Path) -> list[tuple[str, Row]]:
    """(place, row) for every line of a file.

    Raises:
      ValueError: no such file, no row, or a line that is no JSON object.
    """
    if not path.is_file():
        raise missing("--prompts", "a JSON-lines file", path)
    rows = [(f"{path}:{number}", row) for number, row in read_jsonl(path)]
    if not rows:
        raise ValueError(f"--prompts {str(path)!r} must hold at least one prompt, got none")
    return rows


def to_sample_rows(
    rows: Sequence[tuple[str, Row]], data: DataSection, tokenizer: Tokenizer, num_samples: int, limit: int
) -> list[SampleRow]:
    """Checks and tokenizes rows.

    Args:
      data: its `chat`, `few_shot`, `system_prompt` and `assistant_prefill` say how text becomes a prompt, as in
        training.
      num_samples, limit: for rows without `n` and `max_tokens`.

    Raises:
      ValueError: naming the row: a column of the wrong type, no prompt or more than one, an empty prompt.
    """
    data = with_examples(data, "data")
    return [_to_sample_row(where, row, data, tokenizer, num_samples, limit) for where, row in rows]


def _to_sample_row(
    where: str, row: Row, data: DataSection, tokenizer: Tokenizer, num_samples: int, limit: int
) -> SampleRow:
    kinds = [name for name in KINDS if row.get(name) is not None]
    if len(kinds) != 1:
        raise ValueError(f"{where} must hold exactly one of {', '.join(KINDS)}, got {kinds or sorted(row)}")
    (kind,) = kinds
    prompt, prompt_ids = None, row[kind]
    if kind == "prompt_ids":
        if not isinstance(prompt_ids, list) or not all(_is_int(token) and token >= 0 for token in prompt_ids):
            raise ValueError(f"{where}: prompt_ids must be a list of token ids, got {prompt_ids!r}")
    else:
        _check_prompt(kind, row[kind], where)
        # Messages say themselves that they are a chat.
        section = dataclasses.replace(data, chat=True) if isinstance(row[kind], list) else data
        prompt = build_prompt(row[kind], section, where)
        prompt_ids = encode_prompt(prompt, tokenizer, where)
    if not prompt_ids:
        raise ValueError(f"{where}: the prompt must hold at least one token, got {row[kind]!r}")
    row_id = row.get("id")
    if row_id is not None and not isinstance(row_id, str) and not _is_int(row_id):
        raise ValueError(f"{where}: id must be text or a whole number, got {row_id!r}")
    columns = {name: value for name, value in row.items() if name not in KINDS + WISHES}
    try:
        json.dumps([row_id, columns], allow_nan=False, ensure_ascii=False).encode("utf-8")
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: columns must hold what can be written as JSON again, got {error}") from error
    seed = _whole(row, "seed", 0, where)
    if seed is not None and seed > LARGEST_SEED:
        raise ValueError(f"{where}: seed must be at most {LARGEST_SEED}, got {seed}")
    return SampleRow(
        where=where,
        prompt=prompt,
        prompt_ids=prompt_ids,
        num_samples=_whole(row, "n", 1, where) or num_samples,
        limit=_whole(row, "max_tokens", 1, where) or limit,
        seed=seed,
        row_id=row_id,
        columns=columns,
    )


def _check_prompt(kind: str, prompt: object, where: str) -> None:
    if isinstance(prompt, str) and kind == "prompt":
        if not prompt.strip():
            raise ValueError(f"{where}: the prompt must hold text, got {prompt!r}")
    elif problem := conversation_problem(prompt):
        rule = "text or a list" if kind == "prompt" else "a list"
        raise ValueError(f"{where}: {kind} must be {rule} of messages with role and content, got {problem}")


def _whole(row: Row, name: str, least: int, where: str) -> int | None:
    value = row.get(name)
    if value is not None and (not _is_int(value) or value < least):
        raise ValueError(f"{where}: {name} must be a whole number >= {least}, got {value!r}")
    return value


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
