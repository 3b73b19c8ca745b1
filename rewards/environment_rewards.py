"""Reward functions that ask for `environments`: they run in the worker that holds the instance of their episode.

In: what a configuration names; at the end of an episode its instance, and what it said. Out: a number, None or a
failure for each function. Each is called for one episode, before its environment is closed or reset again, in its
random state and within the time limit of a call. Not here: other reward functions (`rewards.worker`).
"""

import ast
import dataclasses
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rewards.calling import call
from rewards.contract import ENVIRONMENTS, BoundReward, RewardSpec, bind, load_function
from rewards.logged import CallLog, means, number_of
from rewards.moment import Moment
from rewards.reward_call import call_one, judgement

_NOT_THERE = ("group", "log_extra", "state")  # of what other reward functions may ask for


def asks_for_environments(function: str, taken: Collection[str]) -> bool:
    """Whether `path/to/file.py:function` is a function of that file with a parameter `environments`. Runs nothing.

    taken: names of columns and kwargs, which win.
    """
    source, _, name = function.rpartition(":")
    if ENVIRONMENTS in taken or not source.endswith(".py"):
        return False
    try:
        tree = ast.parse(Path(source).expanduser().read_bytes())
    except (OSError, SyntaxError, ValueError):  # the worker that imports it says what is wrong
        return False
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and node.name == name:
            arguments = node.args
            names = [one.arg for one in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)]
            return ENVIRONMENTS in names
    return False


@dataclasses.dataclass(frozen=True)
class EpisodeFacts:
    """What reward functions get of an episode beside its row and its instance.

    prompt, completion: text, or messages. completion_ids: with those of observations. finish_reason: of the last turn,
      "length" where a limit of tokens has cut the episode. seed: of its own. moment: where the run stands.
    """

    prompt: Any
    completion: Any
    completion_ids: Sequence[int]
    finish_reason: str
    seed: int
    moment: Moment

    @classmethod
    def of_json(cls, fields: Mapping[str, Any]) -> "EpisodeFacts":
        """The facts whose `dataclasses.asdict` these are."""
        return cls(**{**fields, "moment": Moment(**fields["moment"])})


def load_rewards(specs: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> dict[str, BoundReward]:
    """The functions of `specs`, the fields of a `RewardSpec` each, by name.

    Raises ValueError for what does not import, asks for what is not there, or judges more than one episode at a time.
    """
    found = {}
    for fields in specs:
        spec = RewardSpec(**fields)
        bound = bind(load_function(spec), columns, spec.kwargs, spec.name, spec.calls, has_environments=True)
        label = f"reward {spec.name!r}"
        for name in _NOT_THERE:
            if name in bound.parameters and name not in (*columns, *spec.kwargs):
                raise ValueError(f"{label}: a function that asks for {ENVIRONMENTS} gets no {name!r}; drop one of them")
        if bound.style not in ("batch", "sample") or bound.calls in ("needs_group", "whole_batch"):
            raise ValueError(
                f"{label}: a function that asks for {ENVIRONMENTS} is called for one episode at a time, beside its "
                "environment; let it take prompts and completions, or prompt and completion, without needs_group and "
                "elementwise: false"
            )
        found[spec.name] = bound
    return found


class _Log(CallLog):
    """Metrics only: samples.jsonl keeps nothing of these functions."""

    def log_extra(self, column: str, values: Iterable[Any]) -> None:
        raise ValueError(f"log_extra({column!r}): nothing is kept of a function that asks for {ENVIRONMENTS}")

    def keep(self, values: Mapping[Any, Any]) -> None:
        for name, value in values.items():
            if number_of(value) is not None:
                self.log_metric(str(name), value)


async def judge(
    bound: BoundReward, instance: Any, row: Mapping[str, Any], facts: EpisodeFacts, limit: float
) -> tuple[float | None, dict[str, float]]:
    """(What a function gives for an episode, the means of what it logged). It raises what the function raises."""
    log = _Log(1)
    moment = facts.moment
    request = {
        "prompts": [facts.prompt],
        "completions": [facts.completion],
        "completion_ids": [list(facts.completion_ids)] if bound.takes_completion_ids else None,
        "columns": {name: [row.get(name)] for name in bound.columns},
        "finish_reasons": [facts.finish_reason],
        "seeds": [facts.seed],
        "groups": None,
        "texts": None,
        "limit": limit,
        "is_trial": False,
        "of_run": {"step": moment.step, "trainer_state": moment.trainer_state},
        ENVIRONMENTS: [instance],
    }
    result = await call(lambda: call_one(bound, request, 0, log))
    found = judgement(bound, result, log)
    return found.value, means(found.sums)
