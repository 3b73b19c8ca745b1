"""Procedural question sources: pure Python, seeded, the same rows on every machine.

A source gives rows `{"prompt": ..., "answer": ...}` with distinct prompts. Nothing here knows about tokens or splits.
"""

import functools
import operator
import random
import string
import sys
from collections.abc import Callable, Mapping
from typing import Any

from rl.data.reasoning_tasks import reasoning_gym_rows
from rl.data.task_arguments import check_arguments, check_count

Row = dict[str, Any]

REASONING_GYM_PREFIX = "reasoning_gym:"

_OPERATIONS: dict[str, tuple[str, Callable[[int, int], int]]] = {
    "add": ("+", operator.add),
    "subtract": ("-", operator.sub),
    "multiply": ("*", operator.mul),
}
# The most questions that are all listed. Beyond it a run needs a sample, and memory would run out.
_MOST_ROWS = 1_000_000


def is_procedural(source: str) -> bool:
    """Whether `procedural_rows` knows this data.source."""
    return source == "arithmetic" or source.startswith(REASONING_GYM_PREFIX)


def procedural_rows(source: str, args: Mapping[str, Any], seed: int) -> list[Row]:
    """The rows of a procedural source.

    Args:
      source: `arithmetic` or `reasoning_gym:TASK`.
      args: the source's own arguments; `seed` in them wins over the run's seed.
      seed: the run's seed.

    Raises:
      ValueError: unknown task, unknown or missing argument, or a value that the task refuses.
    """
    arguments = {"seed": seed, **args}
    if source.startswith(REASONING_GYM_PREFIX):
        return reasoning_gym_rows(source.removeprefix(REASONING_GYM_PREFIX), arguments)
    check_arguments("data.args of arithmetic", arithmetic_rows, arguments)
    return arithmetic_rows(**arguments)


def arithmetic_rows(
    operation: str, digits: int, seed: int, terms: int = 2, size: int | None = None, template: str = "{expression}="
) -> list[Row]:
    """Questions in random order, such as `{"prompt": "47+38=", "answer": "85"}`.

    Terms run from 0 to 10**digits - 1, in every order, so one operation has 10**(digits * terms) distinct questions
    (10,000 for two terms of two digits) and `mixed` three times as many.

    Args:
      operation: add, subtract, multiply, or mixed (one of the three for each question); from left to right.
      digits: the most digits of a term.
      seed: decides the order, and with `size` the choice.
      terms: numbers in a question.
      size: the number of distinct questions; None: all.
      template: the text of a question, with the field {expression}.

    Raises:
      ValueError: a value is out of range, or the template does not hold exactly that field.
    """
    names = list(_OPERATIONS) if operation == "mixed" else [operation]
    if not set(names) <= set(_OPERATIONS):
        raise ValueError(f"data.args.operation must be one of {[*_OPERATIONS, 'mixed']}, got {operation!r}")
    check_count("data.args.digits", digits, 1)
    check_count("data.args.terms", terms, 2)
    check_count("data.args.seed", seed, 0)
    _check_template(template)
    numbers = 10**digits
    total = len(names) * numbers**terms
    if size is None and total > _MOST_ROWS:
        raise ValueError(
            f"data.args.size must be set when there are more than {_MOST_ROWS} questions, got {total} for "
            f"digits={digits}, terms={terms}; it draws that many distinct ones"
        )
    count = total if size is None else size
    check_count("data.args.size", count, 1)
    if count > total:
        raise ValueError(
            f"data.args.size must be <= {total}, the number of distinct questions, got {count}; raise data.args.digits"
        )

    rows = []
    for index in _distinct_numbers(total, count, random.Random(seed)):
        operands = []
        for _ in range(terms):
            index, operand = divmod(index, numbers)
            operands.append(operand)
        operands.reverse()
        sign, apply = _OPERATIONS[names[index]]
        expression = sign.join(map(str, operands))
        rows.append(
            {"prompt": template.format(expression=expression), "answer": str(functools.reduce(apply, operands))}
        )
    return rows


def _distinct_numbers(total: int, count: int, generator: random.Random) -> list[int]:
    """`count` different numbers below `total`, in random order."""
    if total <= sys.maxsize:
        return generator.sample(range(total), count)
    numbers: dict[int, None] = {}  # len() of a longer range overflows; in so large a range a repeated number is rare
    while len(numbers) < count:
        numbers.setdefault(generator.randrange(total))
    return list(numbers)


def _check_template(text: str) -> None:
    try:
        fields = [field for _, field, _, _ in string.Formatter().parse(text) if field is not None]
        text.format(expression="1+2")
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        raise ValueError(f"data.args.template must be a format string, got {text!r}: {error}") from error
    if fields != ["expression"]:
        raise ValueError(f"data.args.template must hold {{expression}} once and no other field, got {text!r}")
