"""Evaluates the named sets of `eval.sets`: during a run, and alone.

In: a sampler, weights, the rows of a set, reward functions. Out: `SetResult`. Prompts are drawn block by block; a
block's records are handed on as they come, and only numbers are kept. A sample depends on the weights, the set's seed,
the number of its prompt and its own, so that neither the size of blocks nor slots or devices matter.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

import jax

from rewards.moment import Moment
from rewards.runner import RewardRunner
from rl.config.load import Config
from rl.config.sections import EvalSection, EvalSet
from rl.data.eval_sets import category_of
from rl.data.prompt_rows import PromptRow
from rl.data.prompts import PromptData
from rl.data.tokenizer import Tokenizer
from rl.rollout.episodes import EpisodeSource
from rl.rollout.eval_scores import Score, SetScores, measure_names
from rl.rollout.evaluation import Gathered, accuracy_function, drawn_blocks, sample_record
from rl.sampler.contract import CompletionSource
from rl.sampler.create import prompts_at_a_time, set_sampling
from rl.sampler.token_draw import SamplingParams

Write = Callable[[Mapping[str, Any]], None]
_STREAM = 6  # keeps the draws apart from those of a run with the same seed


@dataclasses.dataclass(frozen=True)
class SetResult:
    """The result of one set.

    Attributes:
      name: of the set. entry: what the configuration says of it. sampling: how its samples were drawn.
      scores: by every function. logged: as in `rl.rollout.evaluation.EvalResult`.
      left_out: names of functions that compare completions, or that the set does not name.
    """

    name: str
    entry: EvalSet
    sampling: SamplingParams
    scores: SetScores
    logged: dict[str, float]
    left_out: list[str]

    def metrics(self) -> dict[str, float | None]:
        """The result as keys of metrics.jsonl."""
        scores = self.scores
        found: dict[str, float | None] = {"prompts": scores.num_prompts, **_plain(scores.main)}
        for function in scores.functions:
            found[f"reward/{function}/mean"] = scores.means[function]
            found |= {f"reward/{function}/{name}": s.value for name, s in scores.of_function(function).items()}
        for category, own in scores.categories.items():
            found |= {f"category/{category}/{name}": value for name, value in _plain(own).items()}
            found[f"category/{category}/prompts"] = max(score.count for score in own.values())
        found |= {"completion_length/mean": scores.completion_length, "truncated_share": scores.truncated_share}
        return {f"eval/{self.name}/{name}": value for name, value in (found | self.logged).items()}

    def brief(self) -> str:
        """The numbers of the function that counts, in a line."""
        return f"{self.name}: {_words(self.scores.main)}"

    def lines(self) -> list[str]:
        """The result in words, a line each."""
        scores, entry = self.scores, self.entry
        how = "greedy" if self.sampling.temperature == 0 else f"temperature {self.sampling.temperature:g}"
        of_each = "" if entry.samples == 1 else f", {entry.samples} samples each"
        lines = [f"set {self.name}: {scores.num_prompts} prompts{of_each}, {how}"]
        for function in scores.functions:
            own = scores.of_function(function)
            counted = " (counts)" if function == scores.counts and len(scores.functions) > 1 else ""
            mean = scores.means[function]
            shown = "nothing judged" if mean is None else f"mean {mean:.4f}; {_words(own)}"
            lines.append(f"  {function}{counted}: {shown}")
        lines += [f"  {entry.category} {name}: {_words(own, counts=True)}" for name, own in scores.categories.items()]
        if self.left_out:
            lines.append(f"  left out: {', '.join(self.left_out)}")
        return [
            *lines,
            f"  completion length {scores.completion_length:.1f} tokens, {scores.truncated_share:.1%} truncated",
        ]


def evaluate_set(
    name: str,
    section: EvalSection,
    sampler: CompletionSource,
    params: Any,
    rows: Sequence[PromptRow],
    runner: RewardRunner,
    tokenizer: Tokenizer,
    sampling: SamplingParams,
    moment: Moment | None = None,
    episodes: EpisodeSource | None = None,
    write: Write | None = None,
    stops: Callable[[bool], bool] | None = None,
) -> SetResult:
    """Draws and judges the samples of one set.

    Args:
      sampling: the run's; what the set does not say of it is as in a greedy evaluation.
      episodes: draws completions of several turns; None: of one.
      write: takes the record of each sample, in the order of prompts and samples.
      stops: whether episodes are left, by `rl.rollout.episodes.LeftStep`.

    A set without a function that judges completions one by one has no numbers; `check_functions` refuses it before a
    run.
    """
    entry = section.sets[name]
    own = set_sampling(entry, sampling)
    functions = functions_of(entry, runner)
    counts = accuracy_function(runner, entry.reward or section.reward, functions)
    scores = SetScores(functions, counts, entry.samples, entry.counted_ks, section.resamples)
    gathered = Gathered()
    key = jax.random.fold_in(jax.random.key(entry.seed), _STREAM)
    size = prompts_at_a_time(section, entry.samples)
    blocks = drawn_blocks(
        sampler, params, rows, entry.samples, own, key, runner, tokenizer, functions, moment, episodes, size, stops
    )
    for block in blocks:
        gathered.add(block.scored)
        for p, row in enumerate(block.rows):
            of_row = [sample_record(block, p, g, runner.specs, functions) for g in range(entry.samples)]
            category = category_of(entry, row)
            more = {"set": name, "temperature": own.temperature, "ks": entry.counted_ks}
            more |= {} if category is None else {"category": category}
            records = [more | record for record in of_row]
            scores.add(records, sum(done.num_trained for done in block.scored.completions[p]))
            if write is not None:
                for record in records:
                    write(record)
    left_out = [spec.name for spec in runner.specs if spec.name not in functions]
    return SetResult(name, entry, own, scores, gathered.metrics(), left_out)


def check_followed(config: Config, data: PromptData, functions: Sequence[str] = (), has_episodes: bool = False) -> None:
    """Refuses a checkpoint.best.metric that no evaluation of this run can have.

    What functions log is not known yet: any name below a function's own passes here.

    Args:
      functions: the names of the reward functions.
      has_episodes: whether completions have several turns, whose environments give metrics of any name.

    Raises:
      ValueError: there is nothing to evaluate, or the metric is of a set, a function or a measure that does not exist.
    """
    metric = config.checkpoint.best.metric
    if metric is None:
        return
    is_held_out = bool(data.evaluated(config.eval))
    if not (is_held_out or data.sets):
        raise ValueError(
            f"checkpoint.best.metric {metric!r} needs held-out rows or eval.sets, got none; set data.eval_size, "
            "data.eval_share or data.eval_source, or name sets in eval.sets"
        )
    rest = metric.removeprefix("eval/")
    name = max((name for name in data.sets if rest.startswith(f"{name}/")), key=len, default=None)
    if name is None:
        if not is_held_out:
            first, entry = next(iter((name, config.eval.sets[name]) for name in data.sets))
            measure = measure_names(entry.samples, entry.counted_ks, has_answers=False)[0]
            raise ValueError(
                f"checkpoint.best.metric must be a metric of one of the sets {[*data.sets]}, got {metric!r}; for "
                f"example eval/{first}/{measure}"
            )
        known = _of_rows(("accuracy",), functions)
        of_sources = {f"{source}/{each}" for source in config.data.source_names for each in known}
        _check_known(metric, rest, "", known, of_sources, functions, has_episodes)
        return
    entry, last = config.eval.sets[name], metric.rpartition("/")[2]
    measures = measure_names(entry.samples, entry.counted_ks, has_answers=True)
    ends = [f"{measure}_{end}" for measure in measures for end in ("low", "high")]
    if re.fullmatch(r"accuracy.*|(avg|pass|maj)_at_.*", last) and last not in (*measures, *ends):
        raise ValueError(
            f"checkpoint.best.metric must be a measure of eval.sets.{name}, {', '.join(measures)}, got {metric!r}"
        )
    categories = {category_of(entry, row) for row in data.sets[name]} - {None}
    of_categories = {f"category/{own}/{each}" for own in categories for each in (*measures, *ends, "prompts")}
    known, own = _of_rows(measures, functions), rest.removeprefix(f"{name}/")
    _check_known(metric, own, f"{name}/", known, of_categories, functions, has_episodes)


def _of_rows(measures: Sequence[str], functions: Sequence[str]) -> list[str]:
    """Names of the metrics of evaluated rows, without what functions log."""
    ends = [f"{measure}_{end}" for measure in measures for end in ("low", "high")]
    of_functions = [f"reward/{name}/mean" for name in functions]
    return [*measures, *of_functions, "completion_length/mean", "truncated_share", "prompts", *ends]


def _check_known(
    metric: str,
    rest: str,
    prefix: str,
    known: Sequence[str],
    more: Collection[str],
    functions: Sequence[str],
    has_episodes: bool,
) -> None:
    """ValueError where a metric, of which `rest` comes after eval/ and `prefix`, is not known and cannot be logged."""
    is_logged = any(rest.startswith(f"reward/{name}/") for name in functions)
    if metric != f"eval/{prefix}{rest}" or not (rest in known or rest in more or is_logged or has_episodes):
        shown = ", ".join(f"eval/{prefix}{each}" for each in known if not each.endswith(("_low", "_high")))
        raise ValueError(
            f"checkpoint.best.metric must be a metric of the evaluations, got {metric!r}; they have {shown}"
        )


def functions_of(entry: EvalSet, runner: RewardRunner) -> list[str]:
    """The functions that judge a set: of those that it names, or all, the ones that judge completions one by one."""
    return [name for name in runner.elementwise if entry.functions is None or name in entry.functions]


def check_functions(config: Config, names: Iterable[str], runner: RewardRunner) -> None:
    """ValueError for a set without a function that judges completions one by one, of those with these names."""
    for name in names:
        entry = config.eval.sets[name]
        if not functions_of(entry, runner):
            wanted = [each for each in runner.calls if entry.functions is None or each in entry.functions]
            reasons = "; ".join(f"{each}: {runner.why_not_alone(each)}" for each in wanted)
            raise ValueError(
                f"eval.sets.{name} must have a function that judges completions one by one, got {wanted} ({reasons})"
            )


def _plain(scores: Mapping[str, Score]) -> dict[str, float]:
    found: dict[str, float] = {}
    for name, score in scores.items():
        found |= {name: score.value, f"{name}_low": score.low, f"{name}_high": score.high}
    return found


def _words(scores: Mapping[str, Score], counts: bool = False) -> str:
    parts = [
        f"{shown_measure(name)} {score.value:.1%} ({_interval(score)}"
        + (f", {score.count} prompts)" if counts else ")")
        for name, score in scores.items()
        if score.count
    ]
    return ", ".join(parts) or "nothing judged"


def _interval(score: Score) -> str:
    if not score.is_wilson and math.isclose(score.low, score.high, abs_tol=1e-12):
        return "no interval: all questions agree"
    return f"95% interval {score.low:.1%} to {score.high:.1%}"


def shown_measure(name: str) -> str:
    """A measure as people write it: pass@10."""
    return name.replace("_at_", "@")
