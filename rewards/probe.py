"""The rows with which the start-up check tries a batch function: what one call with all of them gives, against calls
with one of them each.

In: rows of the data set. Out: two groups of 8 completions, of two rows where there are two. Right and wrong answers,
long and short ones, equal ones, an empty one and a long one are among them, so that a function that compares
completions has something to compare.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

GROUP_SIZE = 8
_LONG = 2000  # characters


class Probe(NamedTuple):
    """Two groups of completions, as the arguments of `rewards.runner.RewardRunner.score`. The token ids are bytes."""

    prompts: list[Any]
    completions: list[Any]
    columns: dict[str, list[Any]]
    completion_ids: list[list[int]]


def probe(rows: Sequence[tuple[Any, Mapping[str, Any]]], columns: Sequence[str]) -> Probe:
    """rows: prompt and columns of at least one row of the data set; columns: the names of all of them."""
    first = rows[0]
    second = next((row for row in rows if row[0] != first[0]), first)
    answers = [_answer(row) for row in (first, second)]
    texts = _texts(*answers) + _texts(*reversed(answers))[::-1]
    row_of = [first] * GROUP_SIZE + [second] * GROUP_SIZE
    return Probe(
        prompts=[prompt for prompt, _ in row_of],
        completions=[
            text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]
            for (prompt, _), text in zip(row_of, texts, strict=True)
        ],
        columns={name: [values.get(name) for _, values in row_of] for name in columns},
        completion_ids=[list(text.encode()) for text in texts],
    )


def _answer(row: tuple[Any, Mapping[str, Any]]) -> str:
    answer = row[1].get("answer")
    text = str(answer) if answer is not None else str(row[0])
    return text.encode(errors="replace").decode()[:_LONG]


def _texts(answer: str, other: str) -> list[str]:
    reasoning = "Let us see. "
    return [
        answer,
        f"{reasoning}The answer is {answer}.",
        "",
        f"\\boxed{{{answer}}}",
        answer,
        f"{other} or 7 or x",
        reasoning * (_LONG // len(reasoning)) + answer,
        f"<think>{reasoning}It is {other}.</think>\n<answer>{answer}</answer>\n#### {answer}",
    ]
