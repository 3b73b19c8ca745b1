"""Rewards: does the completion have the required form."""

import re
from collections.abc import Sequence
from typing import Any

from rewards.contract import elementwise
from rewards.text import completion_text

_THINKING = re.compile(r"<think>(?!.*<think>)(.*?)</think>.*", re.DOTALL)
_NAME = re.compile(r"[A-Za-z_][\w.-]*")


@elementwise
def format_regex(
    prompts: Sequence[Any], completions: Sequence[Any], pattern: str, full_match: bool = True, **kwargs: Any
) -> list[float]:
    r"""1.0 for a completion that matches `pattern`, else 0.0.

    pattern: regular expression of Python's `re`; `.` matches a newline too. full_match: the whole text has to match;
    False looks for the pattern anywhere. Example: `<think>.*?</think>\s*\S.*`. Raises ValueError for a pattern that
    does not compile. A pattern that backtracks without end is stopped by the runner's time limit.
    """
    compiled = _compiled(pattern)
    match = compiled.fullmatch if full_match else compiled.search
    return [1.0 if match(completion_text(completion)) else 0.0 for completion in completions]


@elementwise
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
    compiled = _compiled(regex_pattern, flags=0)

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
def think_format(prompts: Sequence[Any], completions: Sequence[Any], **kwargs: Any) -> list[float]:
    """1.0 for `<think>...</think>...` from the first character on with one `<think>`, else 0.0, as TRL's
    `think_format_reward`.

    It does not ask for an answer behind the tag: weigh it below the reward of the answer.
    """
    return [1.0 if _THINKING.match(completion_text(completion)) else 0.0 for completion in completions]


@elementwise
def tag_format(
    prompts: Sequence[Any],
    completions: Sequence[Any],
    tags: Sequence[str] = ("think", "answer"),
    newlines: bool = False,
    **kwargs: Any,
) -> list[float]:
    """1.0 for a completion that is `<think>...</think>`, white space, `<answer>...</answer>` and nothing else, with
    each tag once and text inside each pair; else 0.0.

    tags: the names in order. newlines: each tag stands on lines of its own, as in open-r1's `format_reward`.
    Raises ValueError for tags that are not different names.
    """
    _check_tags(tags)
    return [float(_has_form(completion_text(completion), tags, newlines)) for completion in completions]


@elementwise
def tag_count(
    prompts: Sequence[Any], completions: Sequence[Any], tags: Sequence[str] = ("think", "answer"), **kwargs: Any
) -> list[float]:
    """The share of the opening and closing tags that occur exactly once, in [0, 1]: 0.25 for each of the four, as
    open-r1's `tag_count_reward`, without its newlines.

    tags: the names. Raises ValueError for tags that are not different names.
    """
    _check_tags(tags)
    return [_counted(completion_text(completion), tags) for completion in completions]


def _counted(text: str, tags: Sequence[str]) -> float:
    """The share of the tags that occur exactly once."""
    wanted = [f"<{slash}{tag}>" for tag in tags for slash in ("", "/")]
    return sum(text.count(tag) == 1 for tag in wanted) / len(wanted)


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
        if not (opened and closed and inside.strip()):
            return False
        if newlines and not (inside.startswith("\n") and inside.endswith("\n")):
            return False
        rest = behind if newlines else behind.strip()
    return not rest


def _check_tags(tags: Sequence[str]) -> None:
    is_list = not isinstance(tags, str) and bool(tags)
    if not is_list or not all(isinstance(t, str) and _NAME.fullmatch(t) for t in tags) or len({*tags}) < len(tags):
        raise ValueError(f'tags must be a list of different names such as ["think", "answer"], got {tags!r}')


def _compiled(pattern: str, flags: int = re.DOTALL) -> re.Pattern[str]:
    try:
        return re.compile(pattern, flags)
    except re.error as error:
        raise ValueError(f"pattern must be a regular expression, got {pattern!r}: {error}") from error
