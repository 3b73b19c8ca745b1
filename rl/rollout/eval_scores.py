"""What the samples of one evaluated set add up to: shares, means, intervals, for every reward function side by side.

In: the records of a set's samples, question by question, as `rl.rollout.evaluation.sample_record` makes them and files
hold them. Out: `SetScores`. Of a question only a few numbers are kept, so that a set of any size needs little memory.

A sample is right where a function gives it at least 1. A function that kept `extracted` with a sample (`log_extra`)
says by it which answer it read there; maj@k counts these. Not here: the formulas (`rl.rollout.eval_statistics`).

Legend: Q questions, k samples.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from rewards.contract import EXTRACTED
from rl.rollout.eval_statistics import maj_at_k, mean_interval, pass_at_k, wilson_interval


class Score(NamedTuple):
    """A number with its 95 % interval.

    Attributes:
      value: the mean over questions; NaN without any. count: the number of these questions.
      is_wilson: whether the interval is Wilson's, of one draw for each question; else by bootstrap over questions.
    """

    value: float
    low: float
    high: float
    count: int
    is_wilson: bool


def measure_names(num_samples: int, ks: Sequence[int], has_answers: bool) -> list[str]:
    """The names of the measures of a set, the first of which is the one to look at."""
    if num_samples == 1:
        return ["accuracy"]
    passes = [f"pass_at_{k}" for k in ks]
    return [f"avg_at_{num_samples}", *passes, *(f"maj_at_{k}" for k in ks if k > 1 and has_answers)]


def question_values(
    records: Sequence[Mapping[str, Any]], function: str, num_samples: int, ks: Sequence[int]
) -> dict[str, float]:
    """{measure: the value of one question} by one function; without what its samples do not give.

    records: the samples of the question, in order.
    """
    rewards = [record["rewards"].get(function) for record in records]
    rights = [None if reward is None else reward >= 1.0 for reward in rewards]
    judged = [right for right in rights if right is not None]
    if not judged:
        return {}
    share = sum(judged) / len(judged)
    if num_samples == 1:
        return {"accuracy": share}
    found = {f"avg_at_{num_samples}": share}
    found |= {f"pass_at_{k}": pass_at_k(len(judged), sum(judged), k) for k in ks}
    logged = [(record.get("logged") or {}).get(function) or {} for record in records]
    if any(EXTRACTED in own for own in logged):
        answers = [None if own.get(EXTRACTED) is None else str(own[EXTRACTED]) for own in logged]
        found |= {f"maj_at_{k}": maj_at_k(answers, rights, k) for k in ks if k > 1}
    return {name: value for name, value in found.items() if value is not None}


def is_binary(measure: str, num_samples: int) -> bool:
    """Whether a question has 0 or 1 in this measure: one draw, or one majority of all samples."""
    return measure in ("accuracy", f"maj_at_{num_samples}")


@dataclasses.dataclass
class SetScores:
    """The scores of a set, which `add` completes question by question.

    Attributes:
      functions: the names of the functions that judged.
      counts: the one that counts. num_samples: samples of each question. ks: see `EvalSet.counted_ks`.
      resamples: of intervals.
    """

    functions: Sequence[str]
    counts: str | None
    num_samples: int
    ks: Sequence[int]
    resamples: int
    num_prompts: int = 0
    num_completions: int = 0
    num_tokens: int = 0
    num_truncated: int = 0

    def __post_init__(self) -> None:
        self._values: dict[str, dict[str, list[float]]] = {name: {} for name in self.functions}
        self._rewards: dict[str, list[float]] = {name: [0.0, 0] for name in self.functions}
        self._categories: dict[str, dict[str, list[float]]] = {}

    def add(self, records: Sequence[Mapping[str, Any]], num_drawn: int) -> None:
        """Counts the samples of one question, in order. num_drawn: tokens that the policy drew for all of them."""
        self.num_prompts += 1
        self.num_completions += len(records)
        self.num_tokens += num_drawn
        self.num_truncated += sum(record["finish_reason"] == "length" for record in records)
        for function in self.functions:
            rewards = [record["rewards"].get(function) for record in records]
            judged = [reward for reward in rewards if reward is not None]
            self._rewards[function][0] += sum(judged)
            self._rewards[function][1] += len(judged)
            values = question_values(records, function, self.num_samples, self.ks)
            places = [self._values[function]]
            category = records[0].get("category")
            if function == self.counts and category is not None:
                places.append(self._categories.setdefault(category, {}))
            for place in places:
                for name, value in values.items():
                    place.setdefault(name, []).append(value)

    def of_function(self, function: str) -> dict[str, Score]:
        """{measure: score} by one function."""
        return self._scores(self._values[function])

    @property
    def main(self) -> dict[str, Score]:
        """{measure: score} by the function that counts; empty without one."""
        return {} if self.counts is None else self.of_function(self.counts)

    @property
    def categories(self) -> dict[str, dict[str, Score]]:
        """{category: {measure: score}} by the function that counts, in the order of the names."""
        return {name: self._scores(values) for name, values in sorted(self._categories.items())}

    @property
    def means(self) -> dict[str, float | None]:
        """{function: mean reward of all samples}; None where it judged none."""
        return {name: total / count if count else None for name, (total, count) in self._rewards.items()}

    @property
    def completion_length(self) -> float:
        """The mean number of tokens that the policy drew for a completion."""
        return self.num_tokens / max(self.num_completions, 1)

    @property
    def truncated_share(self) -> float:
        """The share of completions that hit the length limit."""
        return self.num_truncated / max(self.num_completions, 1)

    def _scores(self, values: Mapping[str, Sequence[float]]) -> dict[str, Score]:
        names = measure_names(self.num_samples, self.ks, has_answers=any("maj_at_" in name for name in values))
        return {name: self._score(name, values.get(name, [])) for name in names}

    def _score(self, name: str, values: Sequence[float]) -> Score:
        wilson = is_binary(name, self.num_samples)
        mean = sum(values) / len(values) if values else math.nan
        low, high = (
            wilson_interval(round(sum(values)), len(values)) if wilson else mean_interval(values, self.resamples)
        )
        return Score(mean, low, high, len(values), wilson)
