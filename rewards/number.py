r"""Rewards: is the final answer the right number.

`exact_number_strict` wants the answer stated as one; `exact_number_flexible` takes the last number of the text.
Report both: the gap between them is form, not arithmetic. Numbers are compared exactly, as fractions:

    3.0 == 3    1,234 == 1234 == 1{,}234 == 1\,234    $12 == 12    -3    1e3 == 1000
    1 234 == 1~234 == 1234, where it is all of the stated answer
    3/4 == \frac{3}{4} == \frac34 == 0.75             1 1/2 == 1\frac{1}{2} == 1.5
    50% == 50   the sign is dropped, as in GSM8K, so that 50% is not 0.5

`12,34` is not a number, and neither is a number of more than 400 digits (parsing one could take unbounded time).
"""

import re
from collections.abc import Callable, Sequence
from decimal import Decimal
from fractions import Fraction
from typing import Any

from rewards.contract import EXTRACTED, LogExtra, elementwise
from rewards.settings import Settings, words
from rewards.text import after_thinking, boxed, completion_text

_MAX_DIGITS = 400
_MOST_WRAPPINGS = 8  # `\boxed{}`, `$...$` and the like around one number
_MATH = (("$", "$"), (r"\(", r"\)"), (r"\[", r"\]"))
# Spaces inside of a number: no-break and thin ones stand nowhere else, plain ones between numbers as well.
_FIXED_SPACES = re.compile(r"(?<=[0-9])[\u00a0\u2007\u2009\u202f](?=[0-9]{3}(?![0-9]))")
_SPACED = re.compile(r"[0-9]{1,3}(?:(?: |~|\\[ ;])[0-9]{3})+(?![0-9]|\s*/)")
_DIGITS = r"(?:[0-9]{1,3}(?:(?:,(?:\\!)?|\{,\}|\\,)[0-9]{3})+(?![0-9])|[0-9]+)"
_DECIMAL = rf"(?:{_DIGITS}(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][+-]?[0-9]{{1,3}}(?![0-9]))?"
_LATEX_FRACTION = (
    r"\\[dt]?frac(?:\s*(?P<top>\{\s*[+-]?[0-9]+\s*\})|\s?(?P<digit>[0-9]))\s*(?P<bottom>\{\s*[+-]?[0-9]+\s*\}|[0-9])"
)
_CURRENCY = r"(?:\\?\$|[\u20ac\xa3\xa5\u20b9])"  # dollar, euro, pound, yen, rupee
_MIXED = rf"(?:(?P<whole>[0-9]+)\s?)?{_LATEX_FRACTION}"
_PLAIN_MIXED = r"(?:(?P<count>[0-9]+) (?=[0-9]+/[0-9]))?"

_WHOLE = re.compile(
    rf"(?P<sign>[+-]?)\s*+(?:{_CURRENCY}\s*+)?(?P<inner>[+-]?)"
    rf"(?:{_MIXED}|{_PLAIN_MIXED}(?P<number>{_DECIMAL})(?:\s*/\s*(?P<divisor>[0-9]+))?)\s*(?:\\?%|{_CURRENCY})?"
)
# A minus directly behind a digit, a letter or a closing bracket subtracts: the last number of "10-3" is 3.
# A number does not start inside another one: right behind a digit, or a digit and a point.
_ANYWHERE = re.compile(
    rf"(?P<sign>(?<![\w)\]}}])-)?(?:{_CURRENCY}(?P<inner>-)?)?(?<![0-9])(?<![0-9]\.)"
    rf"(?:{_MIXED}|{_PLAIN_MIXED}(?P<number>{_DECIMAL})(?: ?/ ?(?P<divisor>[0-9]+))?)"
)
_BOX = re.compile(r"\\boxed\s*\{(.*)\}", re.DOTALL)
_HASH_ANSWER = re.compile(
    r"####[ \t]*+(?=[+-]?\s*(?:\\?\$|[\u20ac\xa3\xa5\u20b9])?\s*[+-]?(?:\.?[0-9]|\\boxed|\\[dt]?frac))([^\n]*)"
)

_SETTINGS = Settings(units=words('["dollars", "cm"]'))


@elementwise
@_SETTINGS.mark
def exact_number_strict(
    prompts: Sequence[Any],
    completions: Sequence[Any],
    answer: Sequence[Any],
    units: Sequence[str] = (),
    log_extra: LogExtra = lambda *_: None,
    **kwargs: Any,
) -> list[float | None]:
    r"""1.0 where the stated final answer equals `answer`, 0.0 where not, None where `answer` holds no number.

    The final answer is `#### n` as the last line, or one `\boxed{n}`, or a completion that is nothing but the number;
    it must be the number and nothing else ("12 dollars" is not, without `units`). More than one stated answer scores 0,
    the same one twice too: a policy must not learn to list guesses. Only text behind the last `</think>` counts.

    prompts, completions: strings or chat message lists. answer: numbers, or strings like "42" or "... #### 42".
    units: words that may stand behind a number, in any case, also in `\text{}`, such as `["dollars", "cm", "^\circ"]`;
    they are dropped from completion and answer, never converted. log_extra: keeps the number that was read with each
    sample, as `extracted`. Raises ValueError for units that are not words.
    """
    return _judged(strict_number, completions, answer, units, log_extra)


@elementwise
@_SETTINGS.mark
def exact_number_flexible(
    prompts: Sequence[Any],
    completions: Sequence[Any],
    answer: Sequence[Any],
    units: Sequence[str] = (),
    log_extra: LogExtra = lambda *_: None,
    **kwargs: Any,
) -> list[float | None]:
    """1.0 where the last number of the completion equals `answer`, 0.0 where not, None where `answer` holds no number.

    What `exact_number_strict` takes for the final answer is taken before the last number, so that this is never less.
    Only text behind the last `</think>` counts. Arguments as in `exact_number_strict`; `units` matter here where they
    hold a digit (`m^2`), or where the answers have them.
    """
    return _judged(flexible_number, completions, answer, units, log_extra)


def _judged(
    read: Callable[[str], Fraction | None],
    completions: Sequence[Any],
    answer: Sequence[Any],
    units: Sequence[str],
    log_extra: LogExtra,
) -> list[float | None]:
    strip = _unit_pattern(units)
    found = [read(_without_units(completion_text(completion), strip)) for completion in completions]
    log_extra(EXTRACTED, [None if number is None else str(number) for number in found])
    return [
        _equals(number, gold_number(_without_units(gold, strip))) for number, gold in zip(found, answer, strict=True)
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


def flexible_number(text: str) -> Fraction | None:
    """The number that a completion states as its one final answer, or else its last number; None for none."""
    stated = strict_number(text)
    return last_number(text) if stated is None else stated


def last_number(text: str) -> Fraction | None:
    """The last number in a text, or None."""
    matches = list(_ANYWHERE.finditer(_plain(after_thinking(text))))
    return _value(matches[-1]) if matches else None


def parse_number(text: str) -> Fraction | None:
    r"""The number that the whole text is, or None. A `\boxed{}`, `$...$`, `\(...\)` or `\[...\]` around all of it is
    taken off.
    """
    text = _plain(text).replace("\N{EN DASH}", "-").strip()
    for _ in range(_MOST_WRAPPINGS):
        box = _BOX.fullmatch(text)
        if box and boxed(text) == [box[1]]:
            text = box[1].strip()
            continue
        around = next(
            (p for p in _MATH if len(text) > len("".join(p)) and text.startswith(p[0]) and text.endswith(p[1])), None
        )
        if around is None:
            break
        text = text.removeprefix(around[0]).removesuffix(around[1]).strip()
    match = _WHOLE.fullmatch(_SPACED.sub(lambda spaced: re.sub(r"[^0-9]", "", spaced[0]), text, count=1))
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


def _unit_pattern(units: Sequence[str]) -> re.Pattern[str] | None:
    """What a unit behind a number looks like; None where there are none."""
    _SETTINGS.check(units=units)
    if not units:
        return None
    words = "|".join(re.escape(unit.strip()) for unit in sorted(units, key=len, reverse=True))
    wrapped = rf"\\(?:text|textrm|mathrm|mbox|rm)\s*\{{\s*(?:{words})\s*\}}"
    return re.compile(rf"(?<=[0-9.}}%])\s*+(?:\\[,; ]\s*+)?(?:{wrapped}|(?:{words})(?![\w^]))", re.IGNORECASE)


def _without_units(value: Any, pattern: re.Pattern[str] | None) -> Any:
    return pattern.sub("", value) if pattern is not None and isinstance(value, str) else value


def _plain(text: str) -> str:
    """A text with a plain minus, and without the fixed spaces inside of numbers."""
    return _FIXED_SPACES.sub("", text.replace("\N{MINUS SIGN}", "-"))


def _value(match: re.Match[str]) -> Fraction | None:
    part = {name: text.strip("{} ") for name, text in match.groupdict().items() if text is not None}
    if sum(map(len, part.values())) > _MAX_DIGITS:
        return None
    if "bottom" in part:
        top, bottom = part.get("top") or part["digit"], part["bottom"]
    else:
        top, bottom = re.sub(r"[,{}\\!]", "", part["number"]), part.get("divisor", "1")
    if int(bottom) == 0 or (part.get("sign") and part.get("inner")):
        return None
    value = Fraction(top.removesuffix(".").replace(".e", "e").replace(".E", "E")) / int(bottom)
    whole = part.get("whole") or part.get("count")
    if whole is not None:
        if not 0 < value < 1:  # "3 7/2" is no mixed number
            return value if match.re is _ANYWHERE and "count" in part else None
        value += int(whole)
    return -value if "-" in (part.get("sign"), part.get("inner")) else value
