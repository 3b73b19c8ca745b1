"""Rewards: how close a completion is to a reference text (libraries `rouge-score` and `rapidfuzz`, extra `rewards`)."""

import functools
from collections.abc import Sequence
from typing import Any, Literal

from rewards.contract import elementwise
from rewards.extras import import_extra, needs_library
from rewards.settings import Settings, flag, one_of
from rewards.text import after_thinking, completion_text

_DISTANCES = {"levenshtein": "Levenshtein", "indel": "Indel"}  # {its name here: its module in rapidfuzz.distance}

_ROUGE = Settings(
    rouge_type=one_of(*(f"rouge{size}" for size in range(1, 10)), "rougeL", "rougeLsum"),
    measure=one_of("fmeasure", "precision", "recall"),
    use_stemmer=flag,
)
_EDIT = Settings(distance=one_of(*_DISTANCES), unit=one_of("characters", "words"))


@elementwise
@_ROUGE.mark
@needs_library("rouge_score.rouge_scorer", "tandem-grpo[rewards]")
def rouge(
    prompts: Sequence[Any],
    completions: Sequence[Any],
    answer: Sequence[Any],
    rouge_type: str = "rougeL",
    measure: Literal["precision", "recall", "fmeasure"] = "fmeasure",
    use_stemmer: bool = False,
    **kwargs: Any,
) -> list[float | None]:
    """ROUGE of the completion against `answer`, in [0, 1]; None for an empty `answer`.

    ROUGE-N counts the n-grams that both have, ROUGE-L takes the longest common subsequence of words, ROUGE-Lsum that of
    each line (Lin 2004, https://aclanthology.org/W04-1013), as computed by Google's rouge-score: words are runs of a-z
    and 0-9 in lower case, so this is for English. Only text behind the last `</think>` counts.

    answer: the reference texts. rouge_type: rouge1 to rouge9, rougeL or rougeLsum. measure: precision, recall or their
    harmonic mean. use_stemmer: compare Porter stems. Raises ValueError for another type or measure,
    ModuleNotFoundError without `rouge-score`.
    """
    _ROUGE.check(rouge_type=rouge_type, measure=measure, use_stemmer=use_stemmer)
    scorer = _rouge_scorer(rouge_type, use_stemmer)
    judged: list[float | None] = []
    for completion, gold in zip(completions, answer, strict=True):
        reference = _text(gold)
        text = after_thinking(completion_text(completion))
        judged.append(float(getattr(scorer.score(reference, text)[rouge_type], measure)) if reference else None)
    return judged


@elementwise
@_EDIT.mark
@needs_library("rapidfuzz.distance", "tandem-grpo[rewards]")
def edit_distance(
    prompts: Sequence[Any],
    completions: Sequence[Any],
    answer: Sequence[Any],
    distance: Literal["levenshtein", "indel"] = "levenshtein",
    unit: Literal["characters", "words"] = "characters",
    **kwargs: Any,
) -> list[float | None]:
    """1 - distance / the largest distance that texts of these lengths can have, in [0, 1]: 1 for equal texts, 0 for
    texts that share nothing; None for an empty `answer`.

    levenshtein: the fewest insertions, deletions and replacements, out of max(m, n). indel: without replacements, out
    of m + n; its similarity is 2 LCS / (m + n), with the longest common subsequence. Computed by rapidfuzz. Only text
    behind the last `</think>` counts, without white space at its ends.

    answer: the reference texts. unit: what is inserted and deleted. Raises ValueError for another distance or unit,
    ModuleNotFoundError without `rapidfuzz`.
    """
    _EDIT.check(distance=distance, unit=unit)
    similarity = getattr(
        import_extra("rapidfuzz.distance", "tandem-grpo[rewards]", "edit_distance"), _DISTANCES[distance]
    ).normalized_similarity
    judged: list[float | None] = []
    for completion, gold in zip(completions, answer, strict=True):
        reference = _text(gold)
        texts: list[Any] = [reference, after_thinking(completion_text(completion)).strip()]
        if unit == "words":
            texts = [text.split() for text in texts]
        judged.append(float(similarity(*texts)) if reference else None)
    return judged


def _text(gold: Any) -> str:
    return "" if gold is None else str(gold).strip()


@functools.lru_cache(maxsize=8)
def _rouge_scorer(rouge_type: str, use_stemmer: bool) -> Any:
    module = import_extra("rouge_score.rouge_scorer", "tandem-grpo[rewards]", "rouge")
    return module.RougeScorer([rouge_type], use_stemmer=use_stemmer)
