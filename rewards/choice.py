r"""Reward: multiple choice, the letter of the right option."""

import re
import string
from collections.abc import Sequence
from typing import Any, Literal

from rewards.contract import EXTRACTED, LogExtra, elementwise
from rewards.settings import Settings, one_of
from rewards.text import after_thinking, boxed, completion_text, tagged

_WRAPPED = re.compile(r"\\(?:text|textbf|mathrm|mathbf)\s*\{([^{}]*)\}")
_HEAD = re.compile(r"(?i)\banswer(?:\s+is)?\s*:|\banswer\s+is\b(?!\s*:)")
# What stands between two heads of one statement ("Final answer: the answer is B"), or in front of a box or a tag.
_NO_STATEMENT = re.compile(r"(?i)\s*(?:so|thus|therefore|hence)?,?\s*(?:the)?\s*(?:final|correct|right|best)?\s*")
_REASON = re.compile(r"(?:because|since|as|for)\b|[-\u2013\u2014]\s")
# Words with which a writer takes back, or adds to, the option that was named, and those that stand behind them.
_TAKEN_BACK = (
    r"(?:wait|maybe|perhaps|possibly|probably|actually|rather|instead|alternatively|otherwise|sorry|hmm|correction)\b"
    r"|no\b(?=\s*[,.:;!?\u2013\u2014-]|\s+wait)|or\b"
)
_FILLING = r"[\s,.:;!?()\[\u2013\u2014-]|(?:it|that|this|is|be|the|answer|option|choice|could|should|might|may|must)\b"
_OPTION = r"(?i:(?:therefore|thus|hence|clearly)\b,?\s*)?(?i:(?:the\s+)?(?:option|choice|letter)\b:?\s*)?"
_QUOTES = re.compile('[*`"\u201c\u201d]')


def _letters(value: Any) -> str | None:
    is_right = (
        isinstance(value, str) and value and {*value} <= {*string.ascii_uppercase} and len({*value}) == len(value)
    )
    return None if is_right else 'different capital letters such as "ABCD"'


LETTERS = "ABCDEFGHIJ"
_SETTINGS = Settings(letters=_letters, method=one_of("strict", "flexible"))


@elementwise
@_SETTINGS.mark
def multiple_choice(
    prompts: Sequence[Any],
    completions: Sequence[Any],
    answer: Sequence[Any],
    letters: str = LETTERS,
    method: Literal["strict", "flexible"] = "strict",
    log_extra: LogExtra = lambda *_: None,
    **kwargs: Any,
) -> list[float | None]:
    r"""1.0 where the option that the completion chooses is `answer`, 0.0 where not, None for an `answer` that is none.

    strict: the choice has to be stated: `Answer: B` (GPQA and MMLU-Pro in simple-evals), `the answer is (B)` (MMLU in
    lm-evaluation-harness), `\boxed{B}`, `<answer>B</answer>`, or a completion that is nothing but the letter, or one
    line with one option, `B) Paris`. Text may follow a letter that has a bracket, point, colon or dash behind it:
    `Answer: B) Paris`. Statements of different options score 0, and so do `A or B` and, in one line, `B, no wait, C`
    and `B. Or maybe C`: a policy must not learn to list guesses. Reasons may name others: `B, because C is too large`.
    flexible: where nothing is stated, the last letter that stands alone, as a capital, counts too, but for "A" and "I"
    in front of a word. Only text behind the last `</think>` counts.

    answer: letters ("B", "(B)", "b"), or positions from 0 (as in cais/mmlu). letters: the options' letters in order.
    log_extra: keeps the letter that was read with each sample, as `extracted`.
    Raises ValueError for letters that are not different letters, and for an unknown method.
    """
    _SETTINGS.check(letters=letters, method=method)
    chosen = [chosen_letter(completion_text(completion), letters, method == "flexible") for completion in completions]
    log_extra(EXTRACTED, chosen)
    rights = [right_letter(gold, letters) for gold in answer]
    return [None if right is None else float(own == right) for own, right in zip(chosen, rights, strict=True)]


def chosen_letter(text: str, letters: str, is_flexible: bool = False) -> str | None:
    """The option that a text chooses; None for none or several. See `multiple_choice`."""
    text = _QUOTES.sub("", _WRAPPED.sub(r"\1", after_thinking(text))).strip()
    text = re.sub(r"[^\S\n]+", " ", text)
    if whole := re.fullmatch(rf"[$(\[]*([{letters}{letters.lower()}])[)\].:$]*", text):
        return whole[1].upper()
    # One option as prompts list them, "B) Paris".
    marked = rf"(?:\(([{letters}])\)|([{letters}])[).:])\s"
    if "\n" not in text and (whole := re.match(marked, text)) and not re.search(marked, text[whole.end() :]):
        return _letter_of(text, letters)
    stated = [content or "" for content in boxed(text)] + tagged(text, "answer")
    # Of a statement, its line counts; the next one where nothing more stands in the line.
    for part in _HEAD.split(text)[1:]:
        line = part.strip().partition("\n")[0].strip()
        if not line.startswith(("\\boxed", "$\\boxed", "<answer>")) and not _NO_STATEMENT.fullmatch(line):
            stated.append(line)
    if stated:
        found = {_letter_of(part, letters) for part in stated}
        return found.pop() if len(found) == 1 else None
    if not is_flexible:
        return None
    # "A" and "I" in front of a word are words themselves.
    alone = re.findall(rf"(?<![\w'])(?![AI]\s+[a-z])([{letters}])(?![\w'])", text)
    return alone[-1] if alone else None


def _letter_of(stated: str, letters: str) -> str | None:
    """The one option that a statement names."""
    letter = f"[{letters}{letters.lower()}]"
    match = re.match(rf"\s*{_OPTION}[$(\[]*({letter})([)\].:;,$]*)(.*)", stated, re.DOTALL)
    if match is None:
        return None
    behind = match[3].strip()
    if re.match(
        rf"(?:[,;/&|\u2013\u2014-]|or\b|and\b)?\s*+(?:or\b)?\s*+(?![AIai]\s+[a-z])[(\[]*{letter}(?!\w)", behind
    ):
        return None
    taken_back = re.compile(
        rf"(?<![{letters}] )(?<![{letters}][,)] )(?<!\w)(?i:{_TAKEN_BACK})(?i:{_FILLING}|{_TAKEN_BACK}){{0,12}}"
        rf"([{letters}])(?=\s*(?:[.,;:!?)\]]|$)|\s+is\b)"
    )
    if any(named[1] != match[1].upper() for named in taken_back.finditer(behind)):
        return None
    is_marked = bool(set(match[2]) & set(")].:;,")) or bool(_REASON.match(behind))
    if behind and not (is_marked and (match[1].isupper() or ")" in match[2])):
        return None
    return match[1].upper()


def right_letter(gold: Any, letters: str) -> str | None:
    """The letter of the right option, which `gold` names by letter or by its position from 0; None for neither."""
    if isinstance(gold, bool) or gold is None:
        return None
    if isinstance(gold, int) or (isinstance(gold, str) and gold.strip().isdecimal()):
        return letters[int(gold)] if 0 <= int(gold) < len(letters) else None
    return chosen_letter(gold, letters) if isinstance(gold, str) else None
