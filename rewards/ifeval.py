"""Reward: instructions that a program can check, with the names and arguments of IFEval
(Zhou et al. 2023, https://arxiv.org/abs/2311.07911; data set google/IFEval).

Each check follows its description in the data set and gives what the checker of IFEval gives, except that

    a wrong or missing argument is an error, where IFEval draws a random one
    keywords are text, where IFEval takes them for regular expressions
    languages are told by lingua, not by langdetect; a text in which no language can be told follows no such instruction
    capital words may hold points, apostrophes, slashes and hyphens, so DON'T is one; IFEval cuts words with nltk

Not here: `length_constraints:number_sentences`, which needs nltk's trained list of abbreviations.
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from rewards.contract import elementwise
from rewards.language import check_code, language_score
from rewards.settings import Settings, one_of
from rewards.text import after_thinking, completion_text

_NOT_CHECKED = frozenset({"length_constraints:number_sentences"})
_CONSTRAINED = ("My answer is yes.", "My answer is no.", "My answer is maybe.")
_POSTSCRIPTS = {"P.P.S": r"p\.\s?p\.\s?s", "P.S.": r"p\.\s?s\."}

_SETTINGS = Settings(mode=one_of("strict", "loose"), score=one_of("all", "share"))


@elementwise
@_SETTINGS.mark
def ifeval(
    prompts: Sequence[Any],
    completions: Sequence[Any],
    instruction_id_list: Sequence[Sequence[str]],
    kwargs: Sequence[Sequence[Mapping[str, Any]] | str],
    mode: Literal["strict", "loose"] = "strict",
    score: Literal["all", "share"] = "all",
    **columns: Any,
) -> list[float | None]:
    """1.0 where the completion follows all instructions of its row, else 0.0 (IFEval's prompt-level accuracy); or the
    share of the instructions that it follows (instruction-level). None for a row with an instruction that is not
    checked here. An empty completion follows none. Only text behind the last `</think>` counts.

    instruction_id_list, kwargs: the data set's columns: names such as "punctuation:no_comma", and for each a mapping of
    its arguments, in which null stands for none; kwargs may be JSON. mode: loose: as in IFEval's loose accuracy, the
    text without its first line, its last line, both, and each of these without asterisks, is tried, too.
    Raises ValueError for an unknown instruction, for an argument that is missing or of the wrong kind, for another mode
    or score; ModuleNotFoundError for an instruction about languages without `lingua`.
    """
    _SETTINGS.check(mode=mode, score=score)
    judged: list[float | None] = []
    for completion, names, given in zip(completions, instruction_id_list, kwargs, strict=True):
        checks = _checks_of(names, _arguments_of(given))
        if checks is None:
            judged.append(None)
            continue
        text = after_thinking(completion_text(completion))
        texts = [text] if mode == "strict" else _loose(text)
        followed = [any(tried.strip() and check(tried) for tried in texts) for check in checks]
        judged.append(float(all(followed)) if score == "all" else sum(followed) / len(followed))
    return judged


def _arguments_of(given: Any) -> Any:
    """The value of the column `kwargs`, which may be JSON."""
    try:
        return json.loads(given) if isinstance(given, str) else given
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"column kwargs must be a list of mappings, or JSON of it, got {given[:120]!r}: {error}"
        ) from error


def _checks_of(names: Any, arguments: Any) -> list[Callable[[str], bool]] | None:
    """A function for each instruction; None where one is not checked here."""
    is_list = isinstance(names, Sequence) and not isinstance(names, str) and isinstance(arguments, Sequence)
    if not is_list or not names or len(names) != len(arguments):
        raise ValueError(
            "instruction_id_list and kwargs must be lists of the same length, with at least one instruction, got "
            f"{names!r} and {arguments!r}"
        )
    checks: list[Callable[[str], bool]] = []
    for name, given in zip(names, arguments, strict=True):
        if name in _NOT_CHECKED:
            return None
        if name not in INSTRUCTIONS:
            raise ValueError(
                f"instruction_id_list must name instructions of IFEval, got {name!r}; {sorted(INSTRUCTIONS)}"
            )
        checks.append(INSTRUCTIONS[name](_Arguments(name, given or {})))
    return checks


def _loose(text: str) -> list[str]:
    lines = text.split("\n")
    cut = ["\n".join(part).strip() for part in (lines[1:], lines[:-1], lines[1:-1])]
    return [version for whole in (text, *cut) for version in (whole, whole.replace("*", ""))]


class _Arguments:
    """The arguments of one instruction; each is asked for by name and kind."""

    def __init__(self, instruction: str, given: Mapping[str, Any]):
        self._instruction, self._given = instruction, given

    def number(self, name: str) -> int:
        value = self._given.get(name)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not float(value).is_integer() or value < 0:
            raise ValueError(self._wrong(name, "a whole number >= 0"))
        return int(value)

    def text(self, name: str) -> str:
        value = self._given.get(name)
        if not isinstance(value, str) or not value.strip():
            raise ValueError(self._wrong(name, "text"))
        return value.strip()

    def texts(self, name: str) -> list[str]:
        value = self._given.get(name)
        if isinstance(value, str) or not value or not all(isinstance(part, str) and part for part in value):
            raise ValueError(self._wrong(name, "a list of texts"))
        return list(value)

    def compare(self, name: str, threshold: str) -> Callable[[int], bool]:
        """Whether a count is as the relation `name` wants it."""
        relation, bound = self._given.get(name), self.number(threshold)
        if relation not in ("less than", "at least"):
            raise ValueError(self._wrong(name, '"less than" or "at least"'))
        return (lambda count: count < bound) if relation == "less than" else (lambda count: count >= bound)

    def _wrong(self, name: str, rule: str) -> str:
        return f"kwargs: {name} of {self._instruction} must be {rule}, got {self._given.get(name)!r}"


def _existence(given: _Arguments) -> Callable[[str], bool]:
    keywords = [word.lower() for word in given.texts("keywords")]
    return lambda text: all(word in text.lower() for word in keywords)


def _frequency(given: _Arguments) -> Callable[[str], bool]:
    keyword, is_right = given.text("keyword").lower(), given.compare("relation", "frequency")
    return lambda text: is_right(text.lower().count(keyword))


def _forbidden_words(given: _Arguments) -> Callable[[str], bool]:
    words = "|".join(map(re.escape, given.texts("forbidden_words")))
    return lambda text: not re.search(rf"\b(?:{words})\b", text, re.IGNORECASE)


def _letter_frequency(given: _Arguments) -> Callable[[str], bool]:
    letter, is_right = given.text("letter").lower(), given.compare("let_relation", "let_frequency")
    return lambda text: is_right(text.lower().count(letter))


def _response_language(given: _Arguments) -> Callable[[str], bool]:
    code = given.text("language")
    check_code(code, "ifeval")
    return lambda text: _is_in(text, code)


def _number_words(given: _Arguments) -> Callable[[str], bool]:
    is_right = given.compare("relation", "num_words")
    return lambda text: is_right(len(re.findall(r"\w+", text)))


def _number_paragraphs(given: _Arguments) -> Callable[[str], bool]:
    number = given.number("num_paragraphs")

    def check(text: str) -> bool:
        """Paragraphs are divided by ***; only the first and the last may be empty, and do not count then."""
        filled = [bool(part.strip()) for part in re.split(r"\s?\*\*\*\s?", text)]
        return all(filled[1:-1]) and sum(filled) == number

    return check


def _nth_paragraph_first_word(given: _Arguments) -> Callable[[str], bool]:
    number, place, word = (
        given.number("num_paragraphs"),
        given.number("nth_paragraph"),
        given.text("first_word").lower(),
    )

    def check(text: str) -> bool:
        """Paragraphs are divided by two newlines; empty ones do not count, but have their place."""
        paragraphs = [paragraph.strip() for paragraph in text.split("\n\n")]
        filled = sum(map(bool, paragraphs))
        if not 1 <= place <= filled or filled != number or not paragraphs[place - 1]:
            return False
        first = paragraphs[place - 1].split()[0].lstrip("'").lstrip('"')
        return re.split(r"[.,?!'\"]", first)[0].lower() == word

    return check


def _number_placeholders(given: _Arguments) -> Callable[[str], bool]:
    number = given.number("num_placeholders")
    return lambda text: (
        sum(len(re.findall(r"\[[^\]]*\]", line[: line.rfind("]") + 1])) for line in text.split("\n")) >= number
    )


def _postscript(given: _Arguments) -> Callable[[str], bool]:
    marker = given.text("postscript_marker")
    pattern = _POSTSCRIPTS.get(marker, re.escape(marker.lower()))
    return lambda text: re.search(pattern, text.lower()) is not None


def _number_bullet_lists(given: _Arguments) -> Callable[[str], bool]:
    number = given.number("num_bullets")

    def check(text: str) -> bool:
        """Bullets are - and *, without ** and without what stands in the line below a lone *."""
        lines = [line.lstrip() for line in text.split("\n")]
        stars = place = 0
        while place < len(lines):
            if lines[place] == "*":
                stars += place + 1 < len(lines)
                place += 1
            elif lines[place].startswith("*") and lines[place][1] != "*":
                stars += 1
            place += 1
        return stars + sum(line.startswith("-") for line in lines) == number

    return check


def _number_highlighted_sections(given: _Arguments) -> Callable[[str], bool]:
    number = given.number("num_highlights")

    def check(text: str) -> bool:
        one = [part.strip("*") for part in re.findall(r"\*[^\n*]*\*", text)]
        two = [part[2:-2] for part in re.findall(r"\*\*[^\n*]*\*\*", text)]
        return sum(bool(part.strip()) for part in one + two) >= number

    return check


def _multiple_sections(given: _Arguments) -> Callable[[str], bool]:
    splitter, number = re.escape(given.text("section_spliter")), given.number("num_sections")
    return lambda text: len(re.findall(rf"\s?{splitter}\s?\d+\s?", text)) >= number


def _is_json(text: str) -> bool:
    text = text.strip()
    for fence in ("```json", "```Json", "```JSON", "```"):
        text = text.removeprefix(fence)
    try:
        json.loads(text.removesuffix("```"))
    except (ValueError, RecursionError):
        return False
    return True


def _has_title(text: str) -> bool:
    """A title stands between the first << and the last >> of a line."""
    for line in text.split("\n"):
        start, end = line.find("<<"), line.rfind(">>")
        if 0 <= start < end - 2 and line[start:end].lstrip("<").rstrip(">").strip():
            return True
    return False


def _are_two_responses(text: str) -> bool:
    parts = [part.strip() for part in text.split("******")]
    filled = [part for part in parts if part]
    return all(parts[1:-1]) and len(filled) == 2 and filled[0] != filled[1]


def _repeat_prompt(given: _Arguments) -> Callable[[str], bool]:
    prompt = given.text("prompt_to_repeat").lower()
    return lambda text: text.strip().lower().startswith(prompt)


def _end_checker(given: _Arguments) -> Callable[[str], bool]:
    phrase = given.text("end_phrase").lower()
    return lambda text: text.strip().strip('"').lower().endswith(phrase)


def _capital_word_frequency(given: _Arguments) -> Callable[[str], bool]:
    is_right = given.compare("capital_relation", "capital_frequency")
    return lambda text: is_right(sum(word.isupper() for word in re.findall(r"\w+(?:[.'/-]+\w+)*", text)))


def _is_in(text: str, code: str) -> bool:
    return language_score(text, code, reward="ifeval") == 1.0


def _is_quoted(text: str) -> bool:
    text = text.strip()
    return len(text) > 1 and text[0] == text[-1] == '"'


def _plain(check: Callable[[str], bool]) -> Callable[[_Arguments], Callable[[str], bool]]:
    """An instruction without arguments."""
    return lambda given: check


INSTRUCTIONS: dict[str, Callable[[_Arguments], Callable[[str], bool]]] = {
    "keywords:existence": _existence,
    "keywords:frequency": _frequency,
    "keywords:forbidden_words": _forbidden_words,
    "keywords:letter_frequency": _letter_frequency,
    "language:response_language": _response_language,
    "length_constraints:number_paragraphs": _number_paragraphs,
    "length_constraints:number_words": _number_words,
    "length_constraints:nth_paragraph_first_word": _nth_paragraph_first_word,
    "detectable_content:number_placeholders": _number_placeholders,
    "detectable_content:postscript": _postscript,
    "detectable_format:number_bullet_lists": _number_bullet_lists,
    "detectable_format:constrained_response": _plain(lambda text: any(answer in text for answer in _CONSTRAINED)),
    "detectable_format:number_highlighted_sections": _number_highlighted_sections,
    "detectable_format:multiple_sections": _multiple_sections,
    "detectable_format:json_format": _plain(_is_json),
    "detectable_format:title": _plain(_has_title),
    "combination:two_responses": _plain(_are_two_responses),
    "combination:repeat_prompt": _repeat_prompt,
    "startend:end_checker": _end_checker,
    "startend:quotation": _plain(_is_quoted),
    "change_case:capital_word_frequency": _capital_word_frequency,
    "change_case:english_capital": _plain(lambda text: text.isupper() and _is_in(text, "en")),
    "change_case:english_lowercase": _plain(lambda text: text.islower() and _is_in(text, "en")),
    "punctuation:no_comma": _plain(lambda text: "," not in text),
}
