"""Reward: Countdown, an equation that makes a target of given numbers (https://github.com/Jiayi-Pan/TinyZero)."""

import ast
import re
from collections import Counter
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

from rewards.contract import elementwise
from rewards.settings import Settings, flag, number
from rewards.text import after_thinking, boxed, completion_text, tagged

_EXPRESSION = re.compile(r"[0-9+\-*/() \t]+")
_RESULT = re.compile(r"-?[0-9]+(?:\.[0-9]+)?")
_MAX_CHARACTERS = 400  # of an expression, before its nesting could matter
_SIGNS = {r"\times": "*", r"\cdot": "*", r"\div": "/", "\N{MULTIPLICATION SIGN}": "*", "\N{DIVISION SIGN}": "/"}

_SETTINGS = Settings(format_score=number(">= 0 and < 1", lambda score: 0 <= score < 1), all_numbers=flag)


@elementwise
@_SETTINGS.mark
def countdown(
    prompts: Sequence[Any],
    completions: Sequence[Any],
    target: Sequence[Any],
    nums: Sequence[Sequence[int]],
    format_score: float = 0.0,
    all_numbers: bool = True,
    **kwargs: Any,
) -> list[float]:
    r"""1.0 where the expression of the completion equals `target` and takes each of `nums` once; `format_score` where
    there is an expression that does not; 0.0 where there is none.

    The rule and the columns are those of TinyZero and of Jiayi-Pan/Countdown-Tasks-3to4 (format_score is 0.1 there).
    The expression stands in the last `<answer>...</answer>`, or in one `\boxed{}`, or is all of the text behind the
    last `</think>`. It consists of whole numbers, + - * / and brackets; `= 24` may follow it, or `24 =` stand before;
    another number there is a wrong equation. It is computed exactly, as fractions, and never run as code.

    target: numbers. nums: the whole numbers of each row. all_numbers: False: some may be left out (reasoning-gym's
    rule). Raises ValueError unless 0 <= format_score < 1, and for a row without a target or without whole numbers.
    """
    _SETTINGS.check(format_score=format_score, all_numbers=all_numbers)
    judged = []
    for completion, goal, numbers in zip(completions, target, nums, strict=True):
        wanted, given = _target(goal), _given(numbers)
        expression, result = _equation(completion_text(completion))
        computed = _computed(expression)
        if computed is None:
            judged.append(0.0)
            continue
        value, used = computed
        is_right = value == wanted and result in (None, wanted) and (used == given if all_numbers else used <= given)
        judged.append(1.0 if is_right else float(format_score))
    return judged


def _target(value: Any) -> Fraction:
    try:
        if isinstance(value, bool) or value is None:
            raise ValueError
        return Fraction(str(value))
    except (ValueError, ZeroDivisionError):
        raise ValueError(f"target must be a number in each row, got {value!r}") from None


def _given(numbers: Any) -> Counter[int]:
    """The numbers of a row, which may be text."""
    try:
        if isinstance(numbers, str) or not numbers or any(isinstance(number, bool) for number in numbers):
            raise ValueError
        exact = [Fraction(str(number)) for number in numbers]
        if any(number.denominator != 1 for number in exact):
            raise ValueError
        return Counter(int(number) for number in exact)
    except (TypeError, ValueError, ZeroDivisionError):
        raise ValueError(f"nums must be a list of whole numbers in each row, got {numbers!r}") from None


def _equation(text: str) -> tuple[str, Fraction | None]:
    """The expression, and the result that is stated beside it, if any. What has two signs `=` is no expression."""
    text = after_thinking(text)
    tags = tagged(text, "answer")
    boxes = boxed(text)
    found = tags[-1] if tags else boxes[0] if len(boxes) == 1 and boxes[0] is not None else text
    for sign, plain in _SIGNS.items():
        found = found.replace(sign, plain)
    sides = [side.strip().strip("$.").strip() for side in found.split("=")]
    if len(sides) == 2:
        # The number is the result; of two numbers the first.
        expression, result = (sides[1], sides[0]) if _RESULT.fullmatch(sides[0]) else (sides[0], sides[1])
        return (expression, Fraction(result)) if _RESULT.fullmatch(result) else ("", None)
    return (sides[0] if len(sides) == 1 else "", None)


def _computed(expression: str) -> tuple[Fraction, Counter[int]] | None:
    """The value of an expression and the numbers in it; None for anything else."""
    if len(expression) > _MAX_CHARACTERS or not _EXPRESSION.fullmatch(expression):
        return None
    used: Counter[int] = Counter()

    def value(node: ast.expr) -> Fraction:
        if isinstance(node, ast.Constant) and type(node.value) is int:
            used[node.value] += 1
            return Fraction(node.value)
        if isinstance(node, ast.BinOp):
            left, right = value(node.left), value(node.right)
            if isinstance(node.op, ast.Add):
                return left + right
            if isinstance(node.op, ast.Sub):
                return left - right
            if isinstance(node.op, ast.Mult):
                return left * right
            if isinstance(node.op, ast.Div):
                return left / right
        raise ValueError(f"no part of a Countdown expression: {type(node).__name__}")  # such as ** or //

    try:
        return value(ast.parse(expression, mode="eval").body), used
    except (SyntaxError, ValueError, ZeroDivisionError, RecursionError, MemoryError):
        return None
