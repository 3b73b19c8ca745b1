"""Reward: a penalty for repeated n-grams."""

from collections.abc import Sequence
from typing import Any, Literal

from rewards.contract import elementwise
from rewards.settings import Settings, number, one_of, whole_number
from rewards.text import completion_text

_SETTINGS = Settings(
    ngram_size=whole_number(1), max_penalty=number("<= 0", lambda value: value <= 0), unit=one_of("tokens", "words")
)


@elementwise
@_SETTINGS.mark
def repetition_penalty(
    prompts: Sequence[Any],
    completions: Sequence[Any],
    ngram_size: int = 3,
    max_penalty: float = -1.0,
    completion_ids: Sequence[Sequence[int]] | None = None,
    unit: Literal["tokens", "words"] = "tokens",
    **kwargs: Any,
) -> list[float]:
    """(1 - different n-grams / n-grams) * max_penalty: 0 where no n-gram is repeated, towards max_penalty where all are
    (appendix C.2 of https://arxiv.org/abs/2502.03373). A completion with fewer than `ngram_size` units gets 0.

    unit: tokens, as TRL's `get_repetition_penalty_reward`; words in lower case, split at white space, as open-r1's.
    Tokens need `completion_ids` (the runner and TRL pass them; Tunix does not: use unit="words" there).
    Raises ValueError unless ngram_size >= 1 and max_penalty <= 0, for an unknown unit, and when tokens are asked for
    and not given.
    """
    _SETTINGS.check(ngram_size=ngram_size, max_penalty=max_penalty, unit=unit)
    if unit == "words":
        sequences: Sequence[Sequence[Any]] = [completion_text(completion).lower().split() for completion in completions]
    elif completion_ids is None:
        raise ValueError('repetition_penalty in tokens needs completion_ids, got none; pass them or use unit="words"')
    else:
        sequences = completion_ids
    return [max_penalty * repeated_share(sequence, ngram_size) or 0.0 for sequence in sequences]


def repeated_share(sequence: Sequence[Any], size: int) -> float:
    """1 - different n-grams / n-grams, in [0, 1); 0 for a sequence without an n-gram."""
    ngrams = list(zip(*(sequence[start:] for start in range(size)), strict=False))
    return 1 - len(set(ngrams)) / len(ngrams) if ngrams else 0.0
