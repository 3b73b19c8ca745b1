"""Rewards: does the completion have the required form."""

import re
import unicodedata
from collections.abc import Sequence
from typing import Any

from rewards.contract import elementwise
from rewards.settings import Settings, flag, pattern, whole_number, words
from rewards.text import completion_text

_THINKING = re.compile(r"<think>(?!.*<think>)(.*?)</think>.*", re.DOTALL)
# Fillers and blanks that Unicode counts as letters or signs.
_EMPTY = frozenset("\u034f\u115f\u1160\u17b4\u17b5\u2800\u3164\uffa0")
_NAME = re.compile(r"[A-Za-z_][\w.-]*")

_FORMAT = Settings(pattern=pattern, full_match=flag)
_MATCH = Settings(regex_pattern=pattern, group_select=whole_number(), ignore_case=flag, ignore_punctuation=flag)
_TAGS = words('["think", "answer"]', lambda name: _NAME.fullmatch(name) is not None, least=1)
_TAG_FORMAT, _TAG_COUNT = Settings(tags=_TAGS, newlines=flag), Settings(tags=_TAGS)


@elementwise
@_FORMAT.mark
def format_regex(
    prompts: Sequence[Any], completions: Sequence[Any], pattern: str, full_match: bool = True, **kwargs: Any
) -> list[float]:
    r"""1.0 for a completion that matches `pattern`, else 0.0.

    pattern: regular expression of Python's `re`; `.` matches a newline too. full_match: the whole text has to match;
    False looks for the pattern anywhere. Example: `<think>.*?</think>\s*\S.*`. Raises ValueError for a pattern that
    does not compile. A pattern that backtracks without end is stopped by the runner's time limit.
    """
    _FORMAT.check(pattern=pattern, full_match=full_match)
    compiled = re.compile(pattern, re.DOTALL)
    match = compiled.fullmatch if full_match else compiled.search
    return [1.0 if match(completion_text(completion)) else 0.0 for completion in completions]


@elementwise
@_MATCH.mark
def regex_match(
    prompts: Sequence[Any],
    completions: Sequence[Any],
    answer: Sequence[Any],
    regex_pattern: str,
    group_select: int = 0,
    ignore_case: bool = False,
    ignore_punctuation: bool = False,
    **kwargs: Any,
) -> list[float | None]:
    r"""1.0 where what `regex_pattern` finds in the completion is `answer`, 0.0 where not, None for an empty `answer`.

    The filter `regex` and the metric `exact_match` of lm-evaluation-harness, with their names: `.` matches no newline,
    `group_select` says which of several matches counts (0: the first, -1: the last), and the pattern's first group that
    took part is compared, or the whole match where it has none. White space at both ends does not count.

    answer: compared as text. ignore_case, ignore_punctuation: on both sides. Raises ValueError for a pattern that does
    not compile. A pattern that backtracks without end is stopped by the runner's time limit.
    """
    _MATCH.check(
        regex_pattern=regex_pattern,
        group_select=group_select,
        ignore_case=ignore_case,
        ignore_punctuation=ignore_punctuation,
    )
    compiled = re.compile(regex_pattern)

    def normal(text: str) -> str:
        text = text.casefold() if ignore_case else text
        return (re.sub(r"[^\w\s]", "", text) if ignore_punctuation else text).strip()

    judged: list[float | None] = []
    for completion, gold in zip(completions, answer, strict=True):
        wanted = "" if gold is None else normal(str(gold))
        found = list(compiled.finditer(completion_text(completion)))
        if not wanted:
            judged.append(None)
        elif not -len(found) <= group_select < len(found):
            judged.append(0.0)
        else:
            match = found[group_select]
            taken = next((part for part in match.groups() if part is not None), match[0])
            judged.append(1.0 if normal(taken) == wanted else 0.0)
    return judged


@elementwise
@Settings().mark
def think_format(prompts: Sequence[Any], completions: Sequence[Any], **kwargs: Any) -> list[float]:
    """1.0 for `<think>...</think>...` from the first character on with one `<think>`, else 0.0, as TRL's
    `think_format_reward`.

    It does not ask for an answer behind the tag: weigh it below the reward of the answer.
    """
    return [1.0 if _THINKING.match(completion_text(completion)) else 0.0 for completion in completions]


@elementwise
@_TAG_FORMAT.mark
def tag_format(
    prompts: Sequence[Any],
    completions: Sequence[Any],
    tags: Sequence[str] = ("think", "answer"),
    newlines: bool = False,
    **kwargs: Any,
) -> list[float]:
    """1.0 for a completion that is `<think>...</think>`, white space, `<answer>...</answer>` and nothing else, with
    each tag once and text inside each pair; else 0.0. Characters that show nothing, such as zero-width spaces, are no
    text.

    tags: the names in order. newlines: each tag stands on lines of its own, as in open-r1's `format_reward`.
    Raises ValueError for tags that are not different names.
    """
    _TAG_FORMAT.check(tags=tags, newlines=newlines)
    return [float(_has_form(completion_text(completion), tags, newlines)) for completion in completions]


@elementwise
@_TAG_COUNT.mark
def tag_count(
    prompts: Sequence[Any], completions: Sequence[Any], tags: Sequence[str] = ("think", "answer"), **kwargs: Any
) -> list[float]:
    """The share of the opening and closing tags that occur exactly once, in [0, 1]: 0.25 for each of the four, as
    open-r1's `tag_count_reward`, without its newlines.

    tags: the names. Raises ValueError for tags that are not different names.
    """
    _TAG_COUNT.check(tags=tags)
    return [_counted(completion_text(completion), tags) for completion in completions]


def _counted(text: str, tags: Sequence[str]) -> float:
    """The share of the tags that occur exactly once."""
    wanted = [f"<{slash}{tag}>" for tag in tags for slash in ("", "/")]
    return sum(text.count(tag) == 1 for tag in wanted) / len(wanted)


def _shows(text: str) -> bool:
    """Whether a text has a character that can be seen."""
    return any(not (c.isspace() or c in _EMPTY or unicodedata.category(c) in ("Cc", "Cf")) for c in text)


def _has_form(text: str, tags: Sequence[str], newlines: bool) -> bool:
    """Whether a text is its tags in order, see `tag_format`."""
    rest = text.strip()
    if _counted(rest, tags) < 1:
        return False
    for place, tag in enumerate(tags):
        if newlines and place:
            if not rest.startswith("\n"):
                return False
            rest = rest[1:]
        inside, closed, behind = rest.partition(f"</{tag}>")
        opened, inside = inside.startswith(f"<{tag}>"), inside.removeprefix(f"<{tag}>")
        if not (opened and closed and _shows(inside)):
            return False
        if newlines and not (inside.startswith("\n") and inside.endswith("\n")):
            return False
        rest = behind if newlines else behind.strip()
    return not rest
