"""What reward functions give to completions that are made up: right ones in usual formats, and junk.

In: running functions and data rows. Out: rewards by sort of completion, and a verdict, whether a right answer scores
above junk. `grpo rewards check` shows all of it for several rows; the start of a run makes the short form of one row.
Not here: whether a function fails or is constant (`rewards.gold`), and the table (`rl.tools.rewards`).
"""

from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

from rewards.batch import FAILURES, RewardResult
from rewards.contract import RewardSpec
from rewards.gold import check_on_gold
from rewards.probe import answer_forms, long_text, prompt_text
from rewards.rubric import weighted_sum
from rewards.runner import RewardRunner
from rl.data.prompt_rows import Prompt, PromptRow
from rl.data.tokenizer import Tokenizer, split_prefill
from rl.devices import hosts
from rl.rollout.scoring import completion_form, prompt_form, read_texts, right_text
from rl.run.console import Console

ANSWER = "answer"  # the column whose text is a right completion
JUNK = {"empty": "", "junk": "I do not know.", "noise": "la la la la la la la la"}
OTHER = "another row's answer"
LISTED = "a list of answers"  # the right one among those of other rows, and not the last
_MOST_LISTED = 8
_NOT_IN_SHORT = (OTHER, "noise", "the prompt")


class SortScores(NamedTuple):
    """The rewards of one sort of completions.

    num: completions. total: mean of the weighted sums; None where no completion could be judged. means: by function,
    over the completions that it judged.
    """

    num: int
    total: float | None
    means: dict[str, float | None]


class MadeCompletion(NamedTuple):
    """A completion to judge: its sort, its data row, text, token ids with the EOS that ended it, and how it ended."""

    sort: str
    row: PromptRow
    text: str
    token_ids: list[int]
    finish_reason: str


def made_completions(
    rows: Sequence[PromptRow],
    specs: Sequence[RewardSpec],
    tokenizer: Tokenizer,
    max_length: int,
    without: Collection[str] = (),
    others: Sequence[PromptRow] = (),
) -> list[MadeCompletion]:
    """The same sorts of completions for each row, in the same order.

    Args:
      max_length: tokens of the one that is cut off. without: sorts to leave out.
      others: further rows, whose answers are wrong for these.
    """
    cut = tokenizer.encode(long_text(4 * max_length), add_bos=False)[:max_length]
    made = []
    for place, row in enumerate(rows):
        texts: dict[str, str] = {}
        if (answer := row.columns.get(ANSWER)) is not None:
            forms = answer_forms(right_text(answer, specs))
            texts |= {f"right answer, {form}": _continued(row.prompt, text) for form, text in forms.items()}
            right = right_text(answer, specs)
            of_others = [other.columns.get(ANSWER) for other in (*rows[place + 1 :], *rows[:place], *others)]
            wrong = [right_text(other, specs) for other in of_others if other not in (None, answer)]
            wrong = [text for text in dict.fromkeys(wrong) if text != right][: _MOST_LISTED - 1]
            texts[OTHER] = _continued(row.prompt, wrong[0]) if wrong else ""
            listed = [*wrong[: len(wrong) // 2], right, *wrong[len(wrong) // 2 :]]
            texts[LISTED] = _continued(row.prompt, ", ".join(listed)) if wrong else ""
        texts |= JUNK | {"the prompt": prompt_text(prompt_form(row.prompt))}
        for sort, text in texts.items():
            ids = [*tokenizer.encode(text, add_bos=False), *tokenizer.eos_ids[:1]]
            made.append(MadeCompletion(sort, row, text, ids, "eos"))
        made.append(MadeCompletion("cut off", row, tokenizer.decode(cut), cut, "length"))
    return [completion for completion in made if completion.sort not in without]


def _continued(prompt: Prompt, answer: str) -> str:
    """A right answer as what follows the beginning that the prompt gives. One that opens <think> is closed first."""
    given = "" if isinstance(prompt, str) else split_prefill(prompt)[1]
    if "</think>" in given.rpartition("<think>")[2] or "<think>" not in given:
        return answer
    if "</think>" in answer:
        return answer.removeprefix("<think>").lstrip("\n")
    return f"{long_text(1)}\n</think>\n{answer}"


def arguments_of(runner: RewardRunner, completions: Sequence[MadeCompletion], tokenizer: Tokenizer) -> dict[str, Any]:
    """What `RewardRunner.score` takes of these completions, by name."""
    rows = [completion.row for completion in completions]
    texts = [read_texts(completion.row, completion.token_ids, tokenizer) for completion in completions]
    return {"texts": texts if runner.wants_texts else None} | {
        "prompts": [prompt_form(row.prompt) for row in rows],
        "completions": [completion_form(completion.row.prompt, completion.text) for completion in completions],
        "columns": {name: [row.columns.get(name) for row in rows] for name in runner.columns},
        "completion_ids": [completion.token_ids for completion in completions],
        "finish_reasons": [completion.finish_reason for completion in completions],
    }


def scores_by_sort(
    runner: RewardRunner, completions: Sequence[MadeCompletion], scored: RewardResult
) -> dict[str, SortScores]:
    """The rewards of each sort of completions."""
    names, weights = [spec.name for spec in runner.specs], [spec.weight for spec in runner.specs]
    sorts = {}
    for sort in dict.fromkeys(completion.sort for completion in completions):
        rewards = [row for row, done in zip(scored.rewards, completions, strict=True) if done.sort == sort]
        totals = [weighted_sum(row, weights) for row in rewards]
        means = {name: _mean([row[key] for row in rewards]) for key, name in enumerate(names)}
        sorts[sort] = SortScores(len(rewards), _mean(totals), means)
    return sorts


def way_out_of(runner: RewardRunner, results: Sequence[RewardResult]) -> str:
    """What to do where no function with a weight could judge a right answer."""
    names = [spec.name for spec in runner.specs if spec.weight]
    if not names:
        return "give a function a weight"
    has_failed = any(result.counts.get(name, {}).get(kind) for result in results for name in names for kind in FAILURES)
    return "mend the function that failed" if has_failed else f"check the column `{ANSWER}`"


def verdict_of(sorts: Mapping[str, SortScores], way_out: str) -> tuple[str | None, bool]:
    """(why a right answer is not known to score above junk, whether it is known not to).

    way_out: see `way_out_of`.
    """
    if not any(sort.startswith("right answer") for sort in sorts):
        reason = f"the data set has no column `{ANSWER}` (data.columns names one)"
        return f"what is right is not known, because {reason}; only failures were looked for", False
    known = _right(sorts)
    if not known:
        return f"no function with a weight could judge a right answer; {way_out}", True
    best = max(known, key=lambda sort: known[sort])
    for sort, total in _junk(sorts).items():
        if known[best] <= total:
            what = f"{known[best]:.4g} ({best}) and {total:.4g} ({sort})"
            way_out = "check the formats that the functions look for, and their weights"
            return f"a right answer must score above junk, got {what}; {way_out}", True
    return None, False


def tell_of_rewards(
    console: Console,
    runner: RewardRunner,
    row: PromptRow,
    tokenizer: Tokenizer,
    max_length: int,
    others: Sequence[PromptRow] = (),
) -> None:
    """Scores a row's own answer, and others, so that functions that cannot work are seen before the first step: each by
    itself (`rewards.gold`), then their sum. One line where all is well. All processes of a run call this together.
    others: further rows, whose answers are wrong for this one.
    """
    answer = row.columns.get(ANSWER)
    gold = None if answer is None else completion_form(row.prompt, right_text(answer, runner.specs))
    columns = {**dict.fromkeys(runner.columns), **row.columns}  # rows of other sources may have more
    warnings = check_on_gold(runner, prompt_form(row.prompt), gold, columns, hosts.is_first())
    for warning in warnings:
        console.warning(warning)
    # Of functions that are known not to work the sum tells nothing, and one that hangs would hang again.
    is_hung = any(f": {kind}: " in warning for warning in warnings for kind in ("timeout", "crash"))
    names = [spec.name for spec in runner.specs if spec.weight]
    if is_hung or all(any(f"reward {name!r}" in warning for warning in warnings) for name in names):
        return
    if hosts.is_first():
        text, is_warning = check_shortly(runner, row, tokenizer, max_length, others)
        if text is not None:
            (console.warning if is_warning else console.message)(text)


def check_shortly(
    runner: RewardRunner, row: PromptRow, tokenizer: Tokenizer, max_length: int, others: Sequence[PromptRow] = ()
) -> tuple[str | None, bool]:
    """The verdict on a right answer of one row against an empty and a junk completion, in this process alone, one that
    is cut off, and a list of answers with the right one in the middle: (what there is to say, whether it is a warning).
    (None, False) where the functions take longer than ten seconds, a reward model has a weight, or the row has no
    answer.
    """
    if ANSWER not in row.columns or any(spec.weight for spec in runner.specs if spec.name in runner.in_process):
        return None, False
    # Functions that read the first or the last word of two options see the right one at an end of the list.
    wrong = {str(other.columns.get(ANSWER)) for other in others} - {str(row.columns[ANSWER]), str(None)}
    without = _NOT_IN_SHORT if len(wrong) > 1 else (*_NOT_IN_SHORT, LISTED)
    made = made_completions([row], runner.specs, tokenizer, max_length, without, others)
    scored = runner.try_group(**arguments_of(runner, made, tokenizer))
    if scored is None:
        return None, False
    sorts = scores_by_sort(runner, made, scored)
    problem, is_wrong = verdict_of(sorts, way_out_of(runner, [scored]))
    if problem is not None:
        return f"{problem}; `grpo rewards check` shows more" if is_wrong else None, is_wrong
    best = max(_right(sorts).values())
    # Equal and no more: what rises with the length, say, gives a list another score.
    if LISTED in sorts and sorts[LISTED].total == best:
        rule = "a right answer must score above a list of answers that holds it"
        way_out = "let the functions read a marked place, or the end, of a completion"
        return f"{rule}, got {best:.4g} for both; {way_out}; `grpo rewards check` shows more", True
    rest = {"an empty or junk one": max(_junk(sorts).values(), default=None), "a cut one": sorts["cut off"].total}
    shown = " and ".join(f"{what} {total:.3g}" for what, total in rest.items() if total is not None)
    return f"rewards of the first row: a right answer scores {best:.3g}, {shown or 'others nothing'}", False


def _right(sorts: Mapping[str, SortScores]) -> dict[str, float]:
    """The totals of right answers that were judged."""
    return {
        sort: judged.total
        for sort, judged in sorts.items()
        if sort.startswith("right answer") and judged.total is not None
    }


def _junk(sorts: Mapping[str, SortScores]) -> dict[str, float]:
    """The totals of junk that was judged."""
    return {sort: total for sort in JUNK if sort in sorts and (total := sorts[sort].total) is not None}


def _mean(values: Sequence[float | None]) -> float | None:
    judged = [value for value in values if value is not None]
    return sum(judged) / len(judged) if judged else None
