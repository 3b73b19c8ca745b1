r"""Rewards: is the final answer the right number.

`exact_number_strict` wants the answer stated as one; `exact_number_flexible` takes the last number of the text.
Report both: the gap between them is form, not arithmetic. Numbers are compared exactly, as fractions:

    3.0 == 3    1,234 == 1234 == 1{,}234    $12 == 12    -3    3/4 == \frac{3}{4} == 0.75    1e3 == 1000
    50% == 50   the sign is dropped, as in GSM8K, so that 50% is not 0.5

`12,34` is not a number, and neither is a number of more than 400 digits (parsing one could take unbounded time).
"""

import re
from collections.abc import Sequence
from decimal import Decimal
from fractions import Fraction
from typing import Any

from rewards.contract import elementwise
from rewards.text import after_thinking, boxed, completion_text

_MAX_DIGITS = 400
_DIGITS = r"(?:[0-9]{1,3}(?:(?:,|\{,\})[0-9]{3})+(?![0-9])|[0-9]+)"
_DECIMAL = rf"(?:{_DIGITS}(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][+-]?[0-9]{{1,3}}(?![0-9]))?"
_LATEX_FRACTION = r"\\[dt]?frac\s*\{\s*(?P<top>[+-]?[0-9]+)\s*\}\s*\{\s*(?P<bottom>[0-9]+)\s*\}"
_CURRENCY = r"(?:\\?\$)"

_WHOLE = re.compile(
    rf"(?P<sign>[+-]?)\s*{_CURRENCY}?\s*(?P<inner>[+-]?)"
    rf"(?:{_LATEX_FRACTION}|(?P<number>{_DECIMAL})(?:\s*/\s*(?P<divisor>[0-9]+))?)\s*(?:\\?%)?"
)
# A minus directly behind a digit, a letter or a closing bracket subtracts: the last number of "10-3" is 3.
# A number does not start inside another one: right behind a digit, or a digit and a point.
_ANYWHERE = re.compile(
    rf"(?P<sign>(?<![\w)\]}}])-)?(?:{_CURRENCY}(?P<inner>-)?)?(?<![0-9])(?<![0-9]\.)"
    rf"(?:{_LATEX_FRACTION}|(?P<number>{_DECIMAL})(?:/(?P<divisor>[0-9]+))?)"
)
_BOX = re.compile(r"\\boxed\s*\{(.*)\}", re.DOTALL)
_HASH_ANSWER = re.compile(r"####[ \t]*(?=[+-]?\s*(?:\\?\$)?\s*[+-]?(?:\.?[0-9]|\\boxed|\\[dt]?frac))([^\n]*)")


@elementwise
def exact_number_strict(
    prompts: Sequence[Any], completions: Sequence[Any], answer: Sequence[Any], **kwargs: Any
) -> list[float | None]:
    r"""1.0 where the stated final answer equals `answer`, 0.0 where not, None where `answer` holds no number.

    The final answer is `#### n` as the last line, or one `\boxed{n}`, or a completion that is nothing but the number;
    it must be the number and nothing else ("12 dollars" is not). More than one stated answer scores 0, the same one
    twice too: a policy must not learn to list guesses. Only text behind the last `</think>` counts.

    prompts, completions: strings or chat message lists. answer: numbers, or strings like "42" or "... #### 42".
    """
    return [
        _equals(strict_number(completion_text(c)), gold_number(gold))
        for c, gold in zip(completions, answer, strict=True)
    ]


@elementwise
def exact_number_flexible(
    prompts: Sequence[Any], completions: Sequence[Any], answer: Sequence[Any], **kwargs: Any
) -> list[float | None]:
    """1.0 where the last number of the completion equals `answer`, 0.0 where not, None where `answer` holds no number.

    Only text behind the last `</think>` counts. Arguments as in `exact_number_strict`.
    """
    return [
        _equals(last_number(completion_text(c)), gold_number(gold)) for c, gold in zip(completions, answer, strict=True)
    ]


def strict_number(text: str) -> Fraction | None:
    """The number that a completion states as its one final answer; None for none, several, or something else."""
    text = after_thinking(text).strip()
    stated = list(_HASH_ANSWER.finditer(text))
    boxes = boxed(_HASH_ANSWER.sub("", text))
    if len(stated) + len(boxes) > 1:
        return None
    if stated:
        return parse_number(stated[0][1]) if stated[0].end() == len(text) else None
    if boxes:
        return None if boxes[0] is None else parse_number(boxes[0])
    return parse_number(text)


def last_number(text: str) -> Fraction | None:
    """The last number in a text, or None."""
    matches = list(_ANYWHERE.finditer(_plain_minus(after_thinking(text))))
    return _value(matches[-1]) if matches else None


def parse_number(text: str) -> Fraction | None:
    r"""The number that the whole text is, or None. A `\boxed{}` or `$...$` around all of it is taken off."""
    text = _plain_minus(text).strip()
    box = _BOX.fullmatch(text)
    if box and boxed(text) == [box[1]]:
        return parse_number(box[1])
    if len(text) > 2 and text[0] == text[-1] == "$":
        return parse_number(text[1:-1])
    match = _WHOLE.fullmatch(text)
    return _value(match) if match else None


def gold_number(answer: Any) -> Fraction | None:
    """The number of a dataset's answer: a number, or a string that is one or ends in `#### n`; None for anything else.

    A float counts with the digits that it prints: 0.1 is 1/10.
    """
    if isinstance(answer, bool) or answer is None:
        return None
    if isinstance(answer, str):
        return parse_number(answer.rpartition("####")[2])
    if isinstance(answer, (int, Fraction)):
        return Fraction(answer)
    if isinstance(answer, (float, Decimal)) or hasattr(answer, "__float__"):
        return parse_number(str(answer))
    return None


def _equals(found: Fraction | None, gold: Fraction | None) -> float | None:
    if gold is None:
        return None
    return 1.0 if found == gold else 0.0


def _plain_minus(text: str) -> str:
    return text.replace("\N{MINUS SIGN}", "-")


def _value(match: re.Match[str]) -> Fraction | None:
    top, bottom, number, divisor = match.group("top", "bottom", "number", "divisor")
    if sum(len(part or "") for part in (top, bottom, number, divisor)) > _MAX_DIGITS:
        return None
    if top is None:
        top, bottom = number.replace("{,}", "").replace(",", ""), divisor or "1"
    if int(bottom) == 0 or (match["sign"] and match["inner"]):
        return None
    value = Fraction(top.removesuffix(".").replace(".e", "e").replace(".E", "E")) / int(bottom)
    return -value if "-" in (match["sign"], match["inner"]) else value
