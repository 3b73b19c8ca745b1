"""Greedy accuracy on held-out prompts: inside a run every `eval.every` steps, and on its own (`rl.tools.evaluate`).

In: a sampler, weights, held-out data rows, reward functions. Out: the share of prompts whose greedy completion gets a
reward of at least 1 from the function that counts (`eval.reward`), with a 95 % Wilson interval, and the mean of every
reward function; of a mixture also for each source by itself. Each prompt has one completion, so functions that compare
completions are left out.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax

from rewards.contract import RewardSpec
from rewards.logged import Sums, add_sums
from rewards.moment import Moment
from rewards.rubric import summarize, weighted_sum
from rewards.runner import RewardRunner
from rl.data.prompt_rows import PromptRow, answer_of
from rl.data.tokenizer import Tokenizer
from rl.rollout.episode import episode_metrics, record_of
from rl.rollout.episodes import EpisodeSource
from rl.rollout.eval_statistics import wilson_interval
from rl.rollout.groups import logged_metrics
from rl.rollout.scoring import ScoredCompletions, sample_and_score
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
      samples: what `sample_record` gives, for each prompt; empty where it was written elsewhere.
      logged: {reward/FUNCTION/METRIC: mean} of the metrics that reward functions logged; of episodes also what they
        were like, see `rl.rollout.episode.episode_metrics`.
      sources: {name: result} of the sources of a mixture, where more than one has prompts here; else empty.
      sets: {name: `rl.rollout.eval_sets.SetResult`} of the named sets, where `rl.tools.evaluate` evaluates these too.
    """

    left_out: list[str]
    completion_length: float
    truncated_share: float
    samples: list[dict[str, Any]] = dataclasses.field(repr=False)
    logged: dict[str, float] = dataclasses.field(default_factory=dict)
    sources: dict[str, SourceResult] = dataclasses.field(default_factory=dict)
    sets: dict[str, Any] = dataclasses.field(default_factory=dict)

    def metrics(self) -> dict[str, float | None]:
        """The result as keys of metrics.jsonl. Those of a source begin with its name."""
        lengths = {"completion_length/mean": self.completion_length, "truncated_share": self.truncated_share}
        scalars = super().metrics() | lengths | self.logged
        for source, result in self.sources.items():
            scalars |= {f"{source}/{name}": value for name, value in result.metrics().items()}
        return {f"eval/{name}": value for name, value in scalars.items()}


class Block(NamedTuple):
    """Some prompts of an evaluation with what was drawn for them.

    Attributes:
      rows: the prompts. start: the number of the first one among all.
    """

    rows: Sequence[PromptRow]
    start: int
    scored: ScoredCompletions


def drawn_blocks(
    sampler: CompletionSource,
    params: Any,
    rows: Sequence[PromptRow],
    num_samples: int,
    sampling: SamplingParams,
    key: jax.Array,
    runner: RewardRunner,
    tokenizer: Tokenizer,
    names: Sequence[str],
    moment: Moment | None,
    episodes: EpisodeSource | None,
    size: int,
    stops: Callable[[bool], bool] | None = None,
) -> Iterator[Block]:
    """Draws and judges samples of every row, `size` prompts at a time. What is drawn depends neither on that size nor
    on what is drawn beside it. stops: whether episodes are left, see `EpisodeSource.draw`.
    """
    for start in range(0, len(rows), size):
        own = rows[start : start + size]
        scored = sample_and_score(
            sampler,
            params,
            own,
            num_samples,
            sampling,
            key,
            runner,
            tokenizer,
            Stopwatch(),
            range(start, start + len(own)),
            names=names,
            moment=moment,
            source=episodes,
            episode_step=-1,  # the same environments in every evaluation, and no step trains on their seeds
            stops=stops,
        )
        yield Block(own, start, scored)


class Gathered:
    """What reward functions log in the blocks of an evaluation, and what episodes are like."""

    def __init__(self) -> None:
        self._sums: dict[str, Sums] = {}
        self._episodes: list[tuple[int, dict[str, float]]] = []

    def add(self, scored: ScoredCompletions) -> None:
        """Counts a block."""
        for function, sums in scored.result.sums.items():
            add_sums(self._sums.setdefault(function, {}), sums)
        if scored.episodes:
            self._episodes.append((len(scored.episodes), episode_metrics(scored.episodes)))

    def metrics(self) -> dict[str, float]:
        """Metrics as in `EvalResult.logged`, over all blocks."""
        found = logged_metrics(self._sums, ())
        total = sum(size for size, _ in self._episodes)
        for name in self._episodes[0][1] if self._episodes else ():
            values = [own[name] for _, own in self._episodes]
            if name == "turns/max":
                found[name] = max(values)
            elif name == "tool_calls/bad":  # a number of calls
                found[name] = sum(values)
            elif len(values) == 1:
                found[name] = values[0]
            else:
                found[name] = sum(size * own[name] for size, own in self._episodes) / total
        return found


def sample_record(
    block: Block, p: int, g: int, specs: Sequence[RewardSpec], functions: Sequence[str]
) -> dict[str, Any]:
    """A record of sample g of the block's prompt p, with the fields of samples.jsonl
    (`rl.rollout.groups.sample_records`) but for advantages.

    specs: all reward functions, in the runner's order. functions: names of those that judged here, of which `reward` is
    the weighted sum.
    """
    row, done = block.rows[p], block.scored.completions[p][g]
    b = p * len(block.scored.completions[p]) + g
    rewards, logged = block.scored.result.rewards[b], block.scored.result.logged[b]
    judged = [(spec, value) for spec, value in zip(specs, rewards, strict=True) if spec.name in functions]
    return {
        "prompt_index": block.start + p,
        "sample_index": g,
        "prompt": row.prompt,
        "completion": block.scored.texts[b],
        **answer_of(row),
        "rewards": {spec.name: value for spec, value in judged},
        "reward": weighted_sum([value for _, value in judged], [spec.weight for spec, _ in judged]),
        "num_tokens": len(done.token_ids),
        "token_ids": done.token_ids.tolist(),
        "finish_reason": done.finish_reason,
        **({"logged": logged} if logged else {}),
        **(record_of(block.scored.episodes[b]) if block.scored.episodes else {}),
    }


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
    size: int | None = None,
    write: Callable[[Mapping[str, Any]], None] | None = None,
    stops: Callable[[bool], bool] | None = None,
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
      size: prompts that are drawn at a time; None: all.
      write: takes the record of each sample in order, which the result then does not hold.
      stops: whether episodes are left, by `rl.rollout.episodes.LeftStep`.
    """
    plain, key = greedy(sampling), jax.random.key(0)
    names = runner.elementwise
    all_names = [spec.name for spec in runner.specs]
    values: list[list[float | None]] = []
    samples: list[dict[str, Any]] = []
    gathered, num_tokens, num_truncated = Gathered(), 0, 0
    blocks = drawn_blocks(
        sampler, params, rows, 1, plain, key, runner, tokenizer, names, moment, episodes, size or len(rows), stops
    )
    for block in blocks:
        gathered.add(block.scored)
        for p in range(len(block.rows)):
            record = sample_record(block, p, 0, runner.specs, names)
            values.append([*record["rewards"].values()])
            num_tokens += block.scored.completions[p][0].num_trained
            num_truncated += record["finish_reason"] == "length"
            if write is None:
                samples.append(record)
            else:
                write(record)
    counts = accuracy_function(runner, accuracy_reward)
    of_sources = _by_source(rows, values, sources)
    return EvalResult(
        **vars(_counted(values, names, counts)),
        left_out=[name for name in all_names if name not in names],
        completion_length=num_tokens / len(rows),
        truncated_share=num_truncated / len(rows),
        samples=samples,
        logged=gathered.metrics(),
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


def accuracy_function(runner: RewardRunner, wanted: str | None, names: Sequence[str] | None = None) -> str | None:
    """The name of the reward function that counts as accuracy; None if it compares completions, or all functions do.

    wanted: `eval.reward`. names: the functions among which it is; None: all that judge completions one by one.
    """
    names = runner.elementwise if names is None else names
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
