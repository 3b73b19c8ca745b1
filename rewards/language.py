"""Reward: is the completion in the right language (library `lingua`, extra `language`)."""

import functools
import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from rewards.contract import elementwise
from rewards.extras import import_extra, needs_library
from rewards.settings import Settings, one_of, words
from rewards.text import after_thinking, completion_text

_LONG_WORD = re.compile(r"(\w{50})\w+")


def _together(given: Mapping[str, Any]) -> None:
    among = given.get("languages")
    for code in among or ():
        check_code(code, "language")
    if (code := given.get("language")) is not None:
        check_code(code, "language")
        if among is not None and code.lower() not in [name.lower() for name in among]:
            raise ValueError(f"languages must hold language ({code!r}) and at least one other, got {list(among)}")


def _languages(value: Any) -> str | None:
    return None if value is None else words('["en", "de"]', least=2)(value)


_SETTINGS = Settings(
    _together,
    ("language",),
    language=lambda value: None if isinstance(value, str) else 'an ISO 639-1 code such as "en"',
    languages=_languages,
    measure=one_of("detected", "confidence"),
    part=one_of("all", "answer"),
)


@elementwise
@_SETTINGS.mark
@needs_library("lingua", "tandem-grpo[language]")
def language(
    prompts: Sequence[Any],
    completions: Sequence[Any],
    language: str | Sequence[str],
    languages: Sequence[str] | None = None,
    measure: Literal["detected", "confidence"] = "detected",
    part: Literal["all", "answer"] = "all",
    **kwargs: Any,
) -> list[float]:
    """1.0 where the completion is in `language`, 0.0 where not, or where no language can be told (no letters).

    lingua (https://github.com/pemistahl/lingua-py) compares the frequencies of one to five letters in a row with those
    of 75 languages. It reads 170 MB of tables, which the first call loads in part. Formulas and code count as text,
    and of a word its first 50 letters.

    language: an ISO 639-1 code such as "en", as a setting, or a column with one for each row. languages: the codes to
    choose among, at least two; None: all. measure: detected: the likeliest language is the right one; confidence:
    lingua's probability of it, in [0, 1]. part: answer: only text behind the last `</think>`.
    Raises ValueError for an unknown code, measure or part, ModuleNotFoundError without `lingua`.
    """
    _SETTINGS.check(languages=languages, measure=measure, part=part)
    codes = [language] * len(completions) if isinstance(language, str) else language
    among = None if languages is None else tuple(languages)
    judged = []
    for completion, code in zip(completions, codes, strict=True):
        text = completion_text(completion)
        judged.append(language_score(after_thinking(text) if part == "answer" else text, code, among, measure))
    return judged


def language_score(
    text: str, code: str, among: tuple[str, ...] | None = None, measure: str = "detected", reward: str = "language"
) -> float:
    """The score of one text, see `language`. reward: the name of the reward in messages."""
    check_code(code, reward)
    if among is not None:
        _together({"language": code, "languages": among})
    detector, wanted = _detector(among, reward), _known(reward)[code.lower()]
    # lingua takes seconds for a word of 50,000 letters, and no lone surrogates.
    text = _LONG_WORD.sub(r"\1 ", text.encode(errors="replace").decode())
    if measure == "confidence":
        detected = detector.detect_language_of(text)
        return 0.0 if detected is None else float(detector.compute_language_confidence(text, wanted))
    return 1.0 if detector.detect_language_of(text) == wanted else 0.0


def check_code(code: Any, reward: str) -> None:
    """ValueError unless lingua knows the code of a language. reward: the name of the reward in messages."""
    known = _known(reward)
    if not isinstance(code, str) or code.lower() not in known:
        raise ValueError(f"language must be one of the ISO 639-1 codes {sorted(known)}, got {code!r}")


@functools.lru_cache(maxsize=1)
def _known(reward: str) -> dict[str, Any]:
    """{ISO 639-1 code in lower case: lingua's language}."""
    lingua = import_extra("lingua", "tandem-grpo[language]", reward)
    return {found.iso_code_639_1.name.lower(): found for found in lingua.Language.all()}


@functools.lru_cache(maxsize=8)
def _detector(among: tuple[str, ...] | None, reward: str) -> Any:
    lingua = import_extra("lingua", "tandem-grpo[language]", reward)
    builder = lingua.LanguageDetectorBuilder
    if among is None:
        return builder.from_all_languages().build()
    return builder.from_languages(*(_known(reward)[name.lower()] for name in among)).build()
