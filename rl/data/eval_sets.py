"""The rows of the named sets of an evaluation, `eval.sets`.

In: a configuration, a tokenizer, and the held-out rows. Out: the tokenized rows of each set. What an entry does not say
is as in the section `data`. Rows that are in training data too are named, and nothing is left out: sets may change
while a run goes on, and the rows that it trains on may not.
"""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence

from rl.config.load import Config
from rl.config.sections import EvalSet
from rl.data.prompt_rows import PromptRow, load_source, question_key, tokenize, with_examples
from rl.data.prompts import PromptData, evaluated_rows
from rl.data.tokenizer import Tokenizer
from rl.errors import MissingError

MOST_CATEGORIES = 200
_OF_ENTRY = ("columns", "prepare", "few_shot", "system_prompt")


def load_eval_sets(
    config: Config,
    tokenizer: Tokenizer,
    held_out: Sequence[PromptRow],
    messages: list[str],
    trained: Iterable[PromptRow] = (),
) -> dict[str, list[PromptRow]]:
    """{name: rows} of every set, in the order of the configuration.

    Args:
      held_out: the rows of sets without a source.
      messages: gets what was left out, in words, and how many rows are trained on.
      trained: the training rows, which a set with its own source is compared with.

    Raises:
      ValueError: a source cannot be read or has no rows, there are no held-out rows for a set without a source, or a
        row lacks the column of the categories.
    """
    sets: dict[str, list[PromptRow]] = {}
    for name, entry in config.eval.sets.items():
        if entry.source is None and not held_out:
            raise ValueError(
                f"eval.sets.{name}.source must be set where no rows are held out, got null; name a source, or set "
                "data.eval_size, data.eval_share or data.eval_source"
            )
        rows = [*held_out] if entry.source is None else _read(config, tokenizer, name, entry, messages)
        rows = evaluated_rows(rows, entry.max_prompts)
        if not rows:
            raise ValueError(f"eval.sets.{name}.source must have rows, got none; name another one")
        _check_categories(name, entry, rows)
        sets[name] = rows
    own = {name: rows for name, rows in sets.items() if config.eval.sets[name].source is not None}
    messages += _seen(own, trained) if own else []
    return sets


def with_eval_sets(data: PromptData, config: Config, tokenizer: Tokenizer) -> PromptData:
    """The data of a run with the rows of `eval.sets`, where it evaluates at all. ValueError as in `load_eval_sets`."""
    if not config.eval.sets or not config.eval.every:
        return data
    messages = [*data.messages]
    trained = () if data.are_made_up else data.train
    sets = load_eval_sets(config, tokenizer, data.held_out, messages, trained)
    return dataclasses.replace(data, sets=sets, messages=messages)


def category_of(entry: EvalSet, row: PromptRow) -> str | None:
    """The category of a row; None where the set has none."""
    return None if entry.category is None else str(row.columns[entry.category])


def _read(config: Config, tokenizer: Tokenizer, name: str, entry: EvalSet, messages: list[str]) -> list[PromptRow]:
    key = f"eval.sets.{name}.source"
    said = {field: value for field in _OF_ENTRY if (value := getattr(entry, field)) is not None}
    section = dataclasses.replace(config.data, source=entry.source, args=entry.args, **said)
    section = with_examples(section, f"eval.sets.{name}")
    try:
        read = load_source(section, config, key, messages)
    except MissingError as error:
        raise MissingError(f"{key}: {error}") from error
    return tokenize(read, section, tokenizer, key, messages, source=-1)


def _check_categories(name: str, entry: EvalSet, rows: Sequence[PromptRow]) -> None:
    if entry.category is None:
        return
    for row in rows:
        if row.columns.get(entry.category) is None:
            there = sorted(column for column, value in row.columns.items() if value is not None)
            raise ValueError(
                f"{row.where}: eval.sets.{name}.category must name a column that every row has, got "
                f"{entry.category!r}; the row has {there}"
            )
    found = {category_of(entry, row) for row in rows}
    if len(found) > MOST_CATEGORIES:
        raise ValueError(
            f"eval.sets.{name}.category must name a column with at most {MOST_CATEGORIES} values, got {len(found)} in "
            f"{entry.category!r}"
        )


def _seen(sets: Mapping[str, Sequence[PromptRow]], trained: Iterable[PromptRow]) -> list[str]:
    """A message for each set that has questions of training rows."""
    asked = {question_key(row.asked) for row in trained if row.asked is not None}
    lines = []
    for name, rows in sets.items():
        count = sum(row.asked is not None and question_key(row.asked) in asked for row in rows)
        if count:
            lines.append(
                f"{count} of {len(rows)} questions of eval.sets.{name} are trained on, so its numbers are no measure "
                "of what was learned"
            )
    return lines
