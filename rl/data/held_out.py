"""Held-out rows: which questions they are, and which training rows come too close to them.

In: questions, or tokenized rows. Out: the questions that are held out, by a hash of (seed, question); the rows of
data.eval_source; training rows without those that share a passage with a held-out row.
"""

import dataclasses
import hashlib
from collections.abc import Sequence
from typing import NamedTuple

from rl.config.load import Config
from rl.data.overlap import WORDS, find_overlaps
from rl.data.prompt_rows import PromptRow, load_source, question_key, tokenize, with_examples
from rl.data.tokenizer import Tokenizer
from rl.files.json_file import shown


class EvalRows(NamedTuple):
    """The rows of data.eval_source that fit, and the questions of all of its rows, by `PromptRow.index`."""

    rows: list[PromptRow]
    questions: list[str]


def load_eval_source(config: Config, tokenizer: Tokenizer, messages: list[str]) -> EvalRows:
    """Reads data.eval_source. Messages about rows that are left out are added to `messages`."""
    data = config.data
    section = with_examples(dataclasses.replace(data, source=data.eval_source, args=data.eval_args), "data")
    read = load_source(section, config, "data.eval_source", messages)
    rows = tokenize(read, section, tokenizer, "data.eval_source", messages, source=-1)
    return EvalRows(rows, [question_key(row["prompt"]) for row in read.rows])


def smallest_hashes(questions: set[str], seed: int, size: int, key: str) -> set[str]:
    """The `size` questions with the smallest hash of (seed, question). `key` names the size."""
    if size >= len(questions):
        raise ValueError(
            f"{key} must be < {len(questions)}, the number of distinct questions, got {size}; the rest is for training"
        )

    return set(sorted(questions, key=lambda question: _hash(question, seed))[:size])


def share_of(questions: set[str], seed: int, share: float, key: str) -> set[str]:
    """The questions whose hash of (seed, question) is below `share` of all hashes. `key` names the share."""
    held_out = {question for question in questions if is_held_out(question, seed, share)}
    if not 0 < len(held_out) < len(questions):
        found = "all of them" if held_out else "none"
        way_out = "lower it" if held_out else "raise it"
        raise ValueError(
            f"{key} must hold out some of {len(questions)} distinct questions, and leave others to train on, got "
            f"{share}, which holds out {found}; {way_out}"
        )
    return held_out


def is_held_out(question: str, seed: int, share: float) -> bool:
    """Whether data.eval_share holds a question out, which depends on nothing else."""
    return int.from_bytes(_hash(question, seed)[:8]) < share * 2.0**64


def _hash(question: str, seed: int) -> bytes:
    return hashlib.sha256(f"{seed}\n{question}".encode("utf-8", "surrogatepass")).digest()


def without_overlap(
    train: list[PromptRow],
    held_out: list[PromptRow],
    asked: Sequence[str],
    asked_held_out: Sequence[str],
    remove: bool,
    messages: list[str],
    may_be_empty: bool = False,
) -> list[PromptRow]:
    """The training rows, without those that share a passage with a held-out row if they are to be removed.

    Args:
      asked, asked_held_out: the questions of the training rows and of the held-out rows. messages: is added to.
      may_be_empty: whether all training rows may go.
    """
    found = find_overlaps(asked, asked_held_out)
    if not found:
        return train
    first = found[0]
    what = (
        f"{len(found)} of {len(train)} training rows that share {WORDS} words in a row with a held-out row, such as "
        f"{train[first.train].where} with {held_out[first.held_out].where}: {shown(first.passage)}"
    )
    if not remove:
        messages.append(f"kept {what}; data.remove_overlap=true leaves them out")
        return train
    if len(found) == len(train) and not may_be_empty:
        raise ValueError(f"data.remove_overlap must leave a training row, got {what}; set data.remove_overlap=false")
    messages.append(f"removed {what}")
    gone = {overlap.train for overlap in found}
    return [row for index, row in enumerate(train) if index not in gone]
