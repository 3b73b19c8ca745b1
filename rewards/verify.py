r"""Reward: mathematical equivalence, by the `math-verify` package (https://github.com/huggingface/Math-Verify).

Importing this module imports sympy (about a second), so it belongs in a reward worker. math-verify's own time limit
rests on `signal.alarm` and cannot interrupt C code: it is switched off here (0), and the runner's hard limit stands in
for it.
"""

import re
from collections.abc import Sequence
from typing import Any

from math_verify import parse, verify

from rewards.contract import EXTRACTED, LogExtra, elementwise
from rewards.number import gold_number, parse_number
from rewards.settings import Settings
from rewards.text import after_thinking, boxed, completion_text, tagged

_MARKED = re.compile(r"####([^\n]+)\Z")


@elementwise
@Settings().mark
def math_verified(
    prompts: Sequence[Any],
    completions: Sequence[Any],
    answer: Sequence[Any],
    log_extra: LogExtra = lambda *_: None,
    **kwargs: Any,
) -> list[float | None]:
    r"""1.0 where the answer of the completion is mathematically equal to `answer`, else 0.0; None for an unreadable
    `answer`.

    A completion states its answer in `\boxed{}`, or else in `<answer>` tags, or behind `####` in its last line, or
    math-verify looks for one (LaTeX first, then plain expressions; the last one wins). Boxes that differ score 0, and
    so do tags: math-verify would join them into a set, and a policy must not learn to list guesses. The text
    of `answer` itself is right, and so is an equal number as `rewards.number` reads it: math-verify knows neither `1e3`
    nor `1 1/2`. Only text behind the last `</think>` counts.

    prompts, completions: strings or chat message lists. answer: strings, LaTeX with or without `$`, or numbers.
    log_extra: keeps the answer that was read with each sample, as `extracted`, in the words of the completion.
    """
    texts = [completion_text(completion) for completion in completions]
    found = [_verified(text, gold) for text, gold in zip(texts, answer, strict=True)]
    log_extra(EXTRACTED, [extracted for _, extracted in found])
    return [reward for reward, _ in found]


def _verified(text: str, answer: Any) -> tuple[float | None, str | None]:
    """The reward, and the answer that the text states."""
    gold = _parse_gold(answer)
    if not gold:
        return None, None
    text = after_thinking(text).replace("\N{MINUS SIGN}", "-").strip()
    boxes = boxed(text)
    stated = boxes or [tag.strip() for tag in tagged(text, "answer")]
    if not stated and (marked := _MARKED.search(text)):
        stated = [marked[1].strip()]
    if len(set(stated)) > 1 or None in stated:
        return 0.0, None
    answered = text if not stated else str(stated[0])
    number = gold_number(answer)
    if answered == str(answer).strip() or (number is not None and parse_number(answered) == number):
        return 1.0, answered.strip()
    in_box = rf"\boxed{{{answered}}}"
    tried = [text] if not stated else [in_box] if boxes else [answered, in_box]
    read = None if not stated else answered.strip()
    is_right = False
    for form in tried:
        parsed = parse(form, parsing_timeout=0)
        read = str(parsed[-1]) if read is None and parsed else read
        if verify(gold, parsed, timeout_seconds=0):
            is_right = True
            break
    return float(is_right), read


def _parse_gold(answer: Any) -> list[Any]:
    text = "" if answer is None else str(answer).rpartition("####")[2].replace("\N{MINUS SIGN}", "-").strip()
    if not text:
        return []
    # Without a math environment math-verify reads "2\sqrt{3}" as 2.
    has_environment = "$" in text or r"\boxed" in text or r"\(" in text or r"\[" in text
    return parse(text if has_environment else rf"\boxed{{{text}}}", parsing_timeout=0)
