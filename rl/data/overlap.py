"""Training rows that share a long passage with a held-out row, though the questions are not equal.

In: the questions of training and held-out rows. Out: the pairs that share 13 words in a row, the length of
https://arxiv.org/abs/2005.14165, appendix C. Words are compared without case and without punctuation at their ends. A
passage that more than `MOST_ROWS` training rows hold is a phrase of the task, such as its instructions, and counts for
nothing. Shorter questions are compared as a whole where rows are split (`rl.data.prompts`).
"""

import string
from collections.abc import Iterator, Sequence
from typing import NamedTuple

WORDS = 13
MOST_ROWS = 10


class Overlap(NamedTuple):
    """Training row number `train` shares `passage` with held-out row number `held_out`."""

    train: int
    held_out: int
    passage: str


def find_overlaps(train: Sequence[str], held_out: Sequence[str]) -> list[Overlap]:
    """One overlap for each training question that shares a passage with a held-out one, in the order of training."""
    holders: dict[tuple[str, ...], int] = {}
    for number, question in enumerate(held_out):
        for passage in _passages(question):
            holders.setdefault(passage, number)
    rows_with: dict[tuple[str, ...], list[int]] = {}
    for number, question in enumerate(train) if holders else ():
        for passage in _passages(question):
            if passage in holders:
                rows = rows_with.setdefault(passage, [])
                if len(rows) <= MOST_ROWS and number not in rows[-1:]:
                    rows.append(number)
    found: dict[int, Overlap] = {}
    for passage, rows in rows_with.items():
        if len(rows) <= MOST_ROWS:
            for number in rows:
                found.setdefault(number, Overlap(number, holders[passage], " ".join(passage)))
    return [found[number] for number in sorted(found)]


def _passages(question: str) -> Iterator[tuple[str, ...]]:
    words = [bare for word in question.casefold().split() if (bare := word.strip(string.punctuation))]
    return zip(*(words[start:] for start in range(WORDS)), strict=False)
