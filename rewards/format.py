"""Reward: does the completion have the required form."""

import re
from collections.abc import Sequence
from typing import Any

from rewards.contract import elementwise
from rewards.text import completion_text


@elementwise
def format_regex(
    prompts: Sequence[Any], completions: Sequence[Any], pattern: str, full_match: bool = True, **kwargs: Any
) -> list[float]:
    r"""1.0 for a completion that matches `pattern`, else 0.0.

    pattern: regular expression of Python's `re`; `.` matches a newline too. full_match: the whole text has to match;
    False looks for the pattern anywhere. Example: `<think>.*?</think>\s*\S.*`. Raises ValueError for a pattern that
    does not compile. A pattern that backtracks without end is stopped by the runner's time limit.
    """
    try:
        compiled = re.compile(pattern, re.DOTALL)
    except re.error as error:
        raise ValueError(f"pattern must be a regular expression, got {pattern!r}: {error}") from error
    match = compiled.fullmatch if full_match else compiled.search
    return [1.0 if match(completion_text(completion)) else 0.0 for completion in completions]
