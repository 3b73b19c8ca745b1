"""What is told of reward functions before a run: those that fail on a right answer, cannot judge it, or give it what
they give to anything else.

In: running functions and a row of the data set. Out: warnings in words. A function that gives a right answer more or
less than nothing at all is believed after two calls; others are tried with the completions of `rewards.probe`.
"""

from collections.abc import Mapping
from typing import Any

from rewards.batch import FAILURES, problems_of
from rewards.probe import Trial, probes
from rewards.replies import UNREACHABLE
from rewards.runner import RewardRunner

_GROUP = 8  # completions of the row, for a function that compares


def check_on_gold(
    runner: RewardRunner,
    prompt: Any,
    gold_completion: Any,
    columns: Mapping[str, Any],
    tries_others: bool = True,
) -> list[str]:
    """Scores one row whose completion is a right answer, and says which functions fail on it, cannot judge it, or give
    the same to whatever they are tried with. Functions that run in this process are models, of which nothing is told.

    Token ids are not known here: a function that takes them gets an empty list for a right answer, bytes for others. A
    function that is not called for one completion at a time gets a group in which all are the right answer.

    Args:
      gold_completion: text, or messages; None: the data set names none, and what looks like one in the row is taken.
      columns: one value (not a list) per dataset column.
      tries_others: whether a function that this does not clear is tried further. Where several processes call this
        together, one is enough.

    Returns:
      Warnings, none when every function gave a number that depends on the completion.
    """
    where = "on a gold row" if gold_completion is not None else "on the first row"
    probe = probes([(prompt, columns)], runner.columns)[0]
    gold = probe.completions[0] if gold_completion is None else gold_completion
    nothing = "" if isinstance(prompt, str) else [{"role": "assistant", "content": ""}]

    def score(completion: Any, names: list[str], size: int) -> Any:
        repeated = {name: [value] * size for name, value in columns.items()}
        arguments = [prompt] * size, [completion] * size, repeated, [[]] * size
        return runner.score(*arguments, group_size=size, names=names, is_trial=True)

    said: dict[str, list[str]] = {spec.name: [] for spec in runner.specs}
    doubtful: set[str] = set()  # functions that may fail on anything, or give the same for anything
    place = {spec.name: key for key, spec in enumerate(runner.specs)}
    alone = [name for name in runner.elementwise if name not in runner.in_process]
    together = [name for name in said if name not in runner.elementwise]
    for names, size in ((alone, 1), (together, _GROUP)):
        if not names:
            continue
        result = score(gold, names, size)
        for name in names:
            said[name] = [f"{where}, {problem}" for problem in problems_of(name, result.problems)]
            if result.counts[name]["none"] and gold_completion is not None:
                said[name].append(
                    f"on a gold row, reward {name!r} returned None: it cannot judge a right answer; check the answer "
                    "column"
                )
            failures = {kind for kind in FAILURES if result.counts[name][kind]}
            is_gone = any(
                message.startswith(": ".join(UNREACHABLE)) for message in result.failures.get(name, {}).values()
            )
            # After a hang, and where a server is not there, trying more takes too long.
            if failures and not failures & {"timeout", "crash"} and not is_gone:
                doubtful.add(name)
        known = [name for name in names if result.rewards[0][place[name]] is not None]
        if size > 1:  # of completions that are all the same nothing follows
            doubtful.update(known)
        elif known:
            other = score(nothing, known, 1).rewards[0]
            doubtful.update(name for name in known if other[place[name]] == result.rewards[0][place[name]])
    trials = runner.try_on(doubtful, prompt, columns) if tries_others else {}
    for name, trial in trials.items():
        if told := _told_of(runner, name, trial, where, is_chat=not isinstance(prompt, str)):
            said[name] = [told]
    return [text for texts in said.values() for text in texts]


def _told_of(runner: RewardRunner, name: str, trial: Trial, where: str, is_chat: bool) -> str | None:
    """What is to be said of a function that was tried; None: nothing. where: the row, in words."""
    count = f"{trial.num_completions} completions, answers in usual formats and an empty one"
    form = ""
    if runner.style(name) not in ("verl", "openrlhf"):  # which always get text
        form = (
            "; prompts are chats (data.chat), so a completion is a list of messages, not text: completion[0]['content']"
            if is_chat
            else "; prompts are text, so a completion is text, not a list of messages, which data.chat=true would give"
        )
    if trial.num_completions and trial.num_failed == trial.num_completions:
        form = form if "TypeError" in trial.failure or "AttributeError" in trial.failure else ""
        return f"{where}, reward {name!r} failed on all of {count}: {trial.failure}{form}"
    if len(trial.rewards) == 1 and not trial.num_failed:
        (reward,) = trial.rewards
        return (
            f"{where}, reward {name!r} gave {reward:g} to all of {count}: there would be nothing to learn from; "
            "check how it reads a completion, and the columns that it compares with (data.columns)"
            f"{form if is_chat else ''}"
        )
    return None
