r"""Reward: mathematical equivalence, by the `math-verify` package (https://github.com/huggingface/Math-Verify).

Importing this module imports sympy (about a second), so it belongs in a reward worker. math-verify's own time limit
rests on `signal.alarm` and cannot interrupt C code: it is switched off here (0), and the runner's hard limit stands in
for it.
"""

from collections.abc import Sequence
from typing import Any

from math_verify import parse, verify

from rewards.contract import elementwise
from rewards.settings import Settings
from rewards.text import after_thinking, boxed, completion_text


@elementwise
@Settings().mark
def math_verified(
    prompts: Sequence[Any], completions: Sequence[Any], answer: Sequence[Any], **kwargs: Any
) -> list[float | None]:
    r"""1.0 where the answer of the completion is mathematically equal to `answer`, else 0.0; None for an unreadable
    `answer`.

    A completion states its answer in `\boxed{}`, or math-verify looks for one (LaTeX first, then plain expressions;
    the last one wins). Boxes that differ score 0: math-verify would join them into a set, and a policy must not learn
    to list guesses. Only text behind the last `</think>` counts.

    prompts, completions: strings or chat message lists. answer: strings, LaTeX with or without `$`, or numbers.
    """
    return [_verified(completion_text(completion), gold) for completion, gold in zip(completions, answer, strict=True)]


def _verified(text: str, answer: Any) -> float | None:
    gold = _parse_gold(answer)
    if not gold:
        return None
    text = after_thinking(text)
    boxes = boxed(text)
    if len(set(boxes)) > 1 or None in boxes:
        return 0.0
    found = parse(rf"\boxed{{{boxes[0]}}}" if boxes else text, parsing_timeout=0)
    return 1.0 if verify(gold, found, timeout_seconds=0) else 0.0


def _parse_gold(answer: Any) -> list[Any]:
    text = "" if answer is None else str(answer).rpartition("####")[2].strip()
    if not text:
        return []
    # Without a math environment math-verify reads "2\sqrt{3}" as 2.
    has_environment = "$" in text or r"\boxed" in text or r"\(" in text or r"\[" in text
    return parse(text if has_environment else rf"\boxed{{{text}}}", parsing_timeout=0)
