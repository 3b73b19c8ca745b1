"""Greedy accuracy on held-out prompts: inside a run every `eval.every` steps, and on its own (`rl.tools.evaluate`).

In: a sampler, weights, held-out data rows, reward functions. Out: the share of prompts whose greedy completion gets a
reward of at least 1 from the function that counts (`eval.reward`), with a 95 % Wilson interval, and the mean of every
reward function; of a mixture also for each source by itself. Each prompt has one completion, so functions that compare
completions are left out.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from rewards.moment import Moment
from rewards.rubric import summarize, weighted_sum
from rewards.runner import RewardRunner
from rl.data.prompt_rows import PromptRow, answer_of
from rl.data.tokenizer import Tokenizer
from rl.rollout.episode import episode_metrics, record_of
from rl.rollout.episodes import EpisodeSource
from rl.rollout.groups import logged_metrics
from rl.rollout.scoring import sample_and_score
from rl.run.metrics import Stopwatch
from rl.sampler.contract import CompletionSource
from rl.sampler.create import greedy
from rl.sampler.token_draw import SamplingParams


@dataclasses.dataclass(frozen=True)
class SourceResult:
    """The part of an evaluation that one source of a mixture has; attributes as in `EvalResult`."""

    accuracy: float
    interval: tuple[float, float]
    num_prompts: int
    num_judged: int
    means: dict[str, float | None]

    def metrics(self) -> dict[str, float | None]:
        """The result as parts of keys of metrics.jsonl."""
        low, high = self.interval
        scalars = {"accuracy": self.accuracy, "accuracy_low": low, "accuracy_high": high, "prompts": self.num_prompts}
        return scalars | {f"reward/{name}/mean": mean for name, mean in self.means.items()}


@dataclasses.dataclass(frozen=True)
class EvalResult(SourceResult):
    """The result of one evaluation.

    Attributes:
      accuracy: share of judged prompts with a reward >= 1 from the function that counts; NaN when none was judged.
      interval: 95 % Wilson score interval of the accuracy
        (https://en.wikipedia.org/wiki/Binomial_proportion_confidence_interval).
      num_prompts: evaluated prompts. num_judged: prompts that the function that counts could judge.
      means: {function: mean reward}; None where it judged nothing. left_out: names of functions that compare
        completions, which were not run.
      completion_length: mean number of tokens. truncated_share: the share of completions that hit the length limit.
      samples: a record of each completion with the fields of samples.jsonl, see `rl.rollout.groups.sample_records`.
        Without advantages; `reward` is the weighted sum of the functions that were run.
      logged: {reward/FUNCTION/METRIC: mean} of the metrics that reward functions logged; of episodes also what they
        were like, see `rl.rollout.episode.episode_metrics`.
      sources: {name: result} of the sources of a mixture, where more than one has prompts here; else empty.
    """

    left_out: list[str]
    completion_length: float
    truncated_share: float
    samples: list[dict[str, Any]] = dataclasses.field(repr=False)
    logged: dict[str, float] = dataclasses.field(default_factory=dict)
    sources: dict[str, SourceResult] = dataclasses.field(default_factory=dict)

    def metrics(self) -> dict[str, float | None]:
        """The result as keys of metrics.jsonl. Those of a source begin with its name."""
        lengths = {"completion_length/mean": self.completion_length, "truncated_share": self.truncated_share}
        scalars = super().metrics() | lengths | self.logged
        for source, result in self.sources.items():
            scalars |= {f"{source}/{name}": value for name, value in result.metrics().items()}
        return {f"eval/{name}": value for name, value in scalars.items()}


def evaluate(
    sampler: CompletionSource,
    params: Any,
    rows: Sequence[PromptRow],
    runner: RewardRunner,
    tokenizer: Tokenizer,
    sampling: SamplingParams,
    accuracy_reward: str | None,
    moment: Moment | None = None,
    sources: Sequence[str] = (),
    episodes: EpisodeSource | None = None,
) -> EvalResult:
    """Decodes every row greedily and scores it.

    Args:
      sampling: the run's sampling parameters. Plain greedy decoding replaces temperature, truncations and penalties;
        lengths, stop strings, logit bias and forbidden ids stay.
      accuracy_reward: the name of the reward function that counts; None: the first that judges each completion by
        itself. If there is none, nothing is judged.
      moment: where the run stands, for reward functions; None: at its start.
      sources: the names of the sources of a mixture, by the numbers in the rows.
      episodes: draws completions of several turns; None: of one.
    """
    plain, key = greedy(sampling), jax.random.key(0)
    names = runner.elementwise
    scored = sample_and_score(
        sampler,
        params,
        rows,
        1,
        plain,
        key,
        runner,
        tokenizer,
        Stopwatch(),
        names=names,
        moment=moment,
        source=episodes,
        episode_step=-1,  # the same environments in every evaluation, and no step trains on their seeds
    )
    texts, result = scored.texts, scored.result
    completions = [group[0] for group in scored.completions]
    all_names = [spec.name for spec in runner.specs]
    weights = [spec.weight for spec in runner.specs if spec.name in names]
    rewards = [[row[all_names.index(name)] for name in names] for row in result.rewards]
    counts = accuracy_function(runner, accuracy_reward)
    of_sources = _by_source(rows, rewards, sources)
    samples = [
        {
            "prompt_index": b,
            "sample_index": 0,
            "prompt": row.prompt,
            "completion": text,
            **answer_of(row),
            "rewards": dict(zip(names, values, strict=True)),
            "reward": weighted_sum(values, weights),
            "num_tokens": len(done.token_ids),
            "token_ids": done.token_ids.tolist(),
            "finish_reason": done.finish_reason,
            **({"logged": logged} if logged else {}),
            **(record_of(scored.episodes[b]) if scored.episodes else {}),
        }
        for b, (row, text, values, done, logged) in enumerate(
            zip(rows, texts, rewards, completions, result.logged, strict=True)
        )
    ]
    return EvalResult(
        **vars(_counted(rewards, names, counts)),
        left_out=[name for name in all_names if name not in names],
        completion_length=sum(done.num_trained for done in completions) / len(rows),
        truncated_share=sum(done.finish_reason == "length" for done in completions) / len(rows),
        samples=samples,
        logged=logged_metrics(result.sums, ()) | (episode_metrics(scored.episodes) if scored.episodes else {}),
        sources={name: _counted(own, names, counts) for name, own in of_sources.items()},
    )


def _counted(rewards: list[list[float | None]], names: Sequence[str], counts: str | None) -> SourceResult:
    """The accuracy and means of rewards [prompts][functions]. `counts`: the function that counts, if there is one."""
    judged = [] if counts is None else [row[names.index(counts)] for row in rewards]
    judged = [value for value in judged if value is not None]
    correct = sum(value >= 1.0 for value in judged)
    return SourceResult(
        accuracy=correct / len(judged) if judged else math.nan,
        interval=wilson_interval(correct, len(judged)),
        num_prompts=len(rewards),
        num_judged=len(judged),
        means={name: summary.mean for name, summary in summarize(rewards, names).items()},
    )


def _by_source(
    rows: Sequence[PromptRow], rewards: list[list[float | None]], sources: Sequence[str]
) -> Mapping[str, list[list[float | None]]]:
    """The rewards of each source in the order of `sources`; empty where fewer than two have rows."""
    found: dict[str, list[list[float | None]]] = {}
    for number, name in enumerate(sources):
        own = [values for row, values in zip(rows, rewards, strict=True) if row.source == number]
        if own:
            found[name] = own
    return found if len(found) > 1 else {}


def accuracy_function(runner: RewardRunner, wanted: str | None) -> str | None:
    """The name of the reward function that counts as accuracy; None if it compares completions, or all functions do.

    wanted: `eval.reward`.
    """
    names = runner.elementwise
    if wanted is not None:
        return wanted if wanted in names else None
    return names[0] if names else None


def left_out_of_evaluation(runner: RewardRunner, accuracy_reward: str | None) -> str | None:
    """A message about functions that an evaluation, with one completion for each prompt, does not measure; None without
    any.
    """
    names = [name for name in runner.calls if name not in runner.elementwise]
    if not names:
        return None
    has_accuracy = accuracy_function(runner, accuracy_reward) is not None
    lost = "" if has_accuracy else ", and there is no accuracy without a function that does for eval.reward"
    reasons = "; ".join(f"{name}: {runner.why_not_alone(name)}" for name in names)
    return (
        f"evaluation leaves out {', '.join(names)}: it draws one completion for each prompt, and these functions are "
        f"not called for one at a time ({reasons}); elementwise: true, in an entry of rewards.functions, says that a "
        f"function judges each by itself{lost}"
    )


def wilson_interval(successes: int, trials: int, z: float = 1.959964) -> tuple[float, float]:
    """Wilson score interval of a share, 95 % by default; (0, 1) without trials."""
    if trials == 0:
        return 0.0, 1.0
    share, square = successes / trials, z * z
    centre = (share + square / (2 * trials)) / (1 + square / trials)
    margin = z * math.sqrt(share * (1 - share) / trials + square / (4 * trials**2)) / (1 + square / trials)
    return max(centre - margin, 0.0), min(centre + margin, 1.0)
