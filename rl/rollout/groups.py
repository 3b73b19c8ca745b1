"""The host side of a step before training.

In: prompts with completions. Out: rewards, advantages and minibatches. A reward never becomes an advantage in place:
`Rollout` keeps both.

Legend: P prompts, G completions per prompt, B = P * G sequences, K reward functions.
"""

import dataclasses
import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np

from rewards.batch import COUNTS, FAILURES, Effort, added_effort
from rewards.contract import RewardSpec
from rewards.length import soft_overlong
from rewards.logged import Sums, add_sums, means
from rewards.rubric import summarize, weighted_sum
from rl.algorithms.advantages import compute_advantages
from rl.algorithms.from_config import estimator_of, label
from rl.algorithms.turn_advantages import turn_advantages
from rl.config.load import Config
from rl.config.sections import ENVIRONMENT
from rl.data.prompt_rows import PromptRow, answer_of
from rl.rollout.episode import (
    Episode,
    episode_metrics,
    failure_problems,
    record_of,
    row_of,
    shared_prompt,
    with_begun,
)
from rl.rollout.hacking import equal_completions, length_correlation, variance_shares
from rl.rollout.scoring import ScoredCompletions
from rl.run.hacking import VARIANCE
from rl.sampler.contract import Completion
from rl.training.packing import TrainCompletion, TrainGroup, TrainSequence

_EXECUTION = ("errors", "timeouts", "retries", "seconds_mean", "seconds_max")  # of each function
_KINDS = tuple(kind for kind in COUNTS if kind != "timeout")  # of failures, beside `timeouts`
OVERLONG = "overlong"  # name of the reward that is the punishment of https://arxiv.org/abs/2503.14476, eq. 13


@dataclasses.dataclass(frozen=True)
class Judged:
    """Groups of completions with their rewards.

    Attributes:
      rows: prompts [P]. completions: [P][G]. texts: decoded completions [B].
      rewards: [B][K], None where a function could not judge. names, weights: [K], of the functions and of the overlong
        punishment, if there is one.
      counts: the failures of each function, see `rewards.batch.RewardResult`. problems: what went wrong, in words. Both
        cover all judged completions, also those of replaced groups.
      weights_step: the step, from 0, whose weights drew the completions, see `Rollout`.
      position: the number of data rows used up so far, with those of replaced groups.
      metrics: of the choice of groups, see `rl.rollout.step_prompts`.
      logged: [B], what reward functions keep with each completion. sums: the metrics that they logged, also of replaced
        groups. effort: of each function, also on replaced groups. All three are as in `rewards.batch.RewardResult`.
      episodes: [B], of completions of several turns; else empty.
    """

    rows: list[PromptRow]
    completions: list[list[Completion]]
    texts: list[str]
    rewards: list[list[float | None]]
    names: list[str]
    weights: list[float]
    counts: dict[str, dict[str, int]]
    problems: list[str]
    weights_step: int = 0
    position: int = 0
    metrics: dict[str, float] = dataclasses.field(default_factory=dict)
    logged: list[dict[str, dict[str, Any]]] = dataclasses.field(default_factory=list)
    sums: dict[str, Sums] = dataclasses.field(default_factory=dict)
    effort: dict[str, Effort] = dataclasses.field(default_factory=dict)
    episodes: Sequence[Episode] = ()

    @property
    def group_size(self) -> int:
        """G."""
        return len(self.completions[0])

    def rewards_of(self, p: int) -> list[list[float | None]]:
        """[G][K] of group p."""
        return self.rewards[p * self.group_size : (p + 1) * self.group_size]

    def replace(self, places: dict[int, int], other: "Judged") -> "Judged":
        """These groups with group p replaced by group `places[p]` of `other`."""
        rows, completions = list(self.rows), list(self.completions)
        texts, rewards, logged, size = list(self.texts), list(self.rewards), list(self.logged), self.group_size
        episodes = list(self.episodes)
        for p, q in places.items():
            rows[p], completions[p] = other.rows[q], other.completions[q]
            texts[p * size : (p + 1) * size] = other.texts[q * size : (q + 1) * size]
            rewards[p * size : (p + 1) * size] = other.rewards_of(q)
            logged[p * size : (p + 1) * size] = other.logged[q * size : (q + 1) * size]
            episodes[p * size : (p + 1) * size] = other.episodes[q * size : (q + 1) * size]
        counts = {
            name: {kind: count + other.counts[name][kind] for kind, count in kinds.items()}
            for name, kinds in self.counts.items()
        }
        problems = list(dict.fromkeys([*self.problems, *other.problems]))
        sums = {name: dict(own) for name, own in self.sums.items()}
        for name, own in other.sums.items():
            add_sums(sums.setdefault(name, {}), own)
        return dataclasses.replace(
            self,
            rows=rows,
            completions=completions,
            texts=texts,
            rewards=rewards,
            counts=counts,
            problems=problems,
            logged=logged,
            sums=sums,
            effort=added_effort([self.effort, other.effort]),
            episodes=episodes,
        )


@dataclasses.dataclass(frozen=True)
class Rollout:
    """One step's completions with their rewards and advantages. Groups are consecutive.

    Attributes:
      rows: prompts [P]. completions: [P][G]. texts: decoded completions [B].
      rewards_BK: a column for each function, NaN where it could not judge. names: of the functions [K].
      weighted_B: the weighted sum, NaN where no function judged.
      advantages_B: finite; 0 for completions that no function judged.
      kept_B: bool, completions that the loss sees (judged, and not masked as truncated).
      weights_step: the step, from 0, whose weights drew the completions: those before its first update. A rollout that
        is trained on in a later step is off-policy from its first update on, see `rl.training.update`.
      metrics: scalars for metrics.jsonl. problems: what went wrong in reward functions, in words.
      logged: see `Judged`; empty where nothing was kept. episodes: see `Judged`.
      turn_advantages_B: float64 [B][turns], those of the loss with `grpo.turn_advantages`; None otherwise.
    """

    rows: Sequence[PromptRow]
    completions: list[list[Completion]]
    texts: list[str]
    rewards_BK: np.ndarray
    names: list[str]
    weighted_B: np.ndarray
    advantages_B: np.ndarray
    kept_B: np.ndarray
    weights_step: int
    metrics: dict[str, float]
    problems: list[str]
    logged: list[dict[str, dict[str, Any]]] = dataclasses.field(default_factory=list)
    episodes: Sequence[Episode] = ()
    turn_advantages_B: Sequence[np.ndarray] | None = None

    @property
    def num_tokens(self) -> int:
        """The number of tokens that the policy drew, over all completions."""
        return sum(completion.num_trained for group in self.completions for completion in group)


def judge(config: Config, rows: Sequence[PromptRow], scored: ScoredCompletions, specs: Sequence[RewardSpec]) -> Judged:
    """Groups of completions with their rewards, one group for each data row."""
    completions, texts, result, episodes = scored
    rows = list(rows)
    if episodes:
        rows, completions = _with_own_prompts(rows, completions, episodes)
    flat = [completion for group in completions for completion in group]
    rewards = result.rewards
    names, weights = [spec.name for spec in specs], [spec.weight for spec in specs]
    if config.rewards.overlong_buffer:
        of_functions = weights
        names, weights = [*names, OVERLONG], [*weights, config.rewards.overlong_factor]
        limit = config.sampling.max_completion_length
        buffer = config.rewards.overlong_buffer * limit
        rewards = [
            # A completion that no function with a weight could judge must not count as judged because of its length.
            [*row, None if weighted_sum(row, of_functions) is None else soft_overlong(c.num_trained, limit, buffer)]
            for row, c in zip(rewards, flat, strict=True)
        ]
    problems, kept = list(result.problems), {"logged": result.logged, "sums": result.sums, "effort": result.effort}
    if ENVIRONMENT not in names:  # else the failures of environments are those of this function
        problems += failure_problems(episodes)
    return Judged(rows, completions, texts, rewards, names, weights, result.counts, problems, episodes=episodes, **kept)


def _with_own_prompts(
    rows: Sequence[PromptRow], completions: list[list[Completion]], episodes: Sequence[Episode]
) -> tuple[list[PromptRow], list[list[Completion]]]:
    """The rows with the prompts that their episodes had, and the completions behind what a group shares of these."""
    size = len(completions[0])
    own_rows, own_completions = [], []
    for p, (row, group) in enumerate(zip(rows, completions, strict=True)):
        of_group = episodes[p * size : (p + 1) * size]
        prompt_ids, begun = shared_prompt(of_group)
        own_rows.append(row_of(row, of_group, prompt_ids) if prompt_ids else row)
        own_completions.append([with_begun(done, own) for done, own in zip(group, begun, strict=True)])
    return own_rows, own_completions


def counted_function(config: Config, specs: Sequence[RewardSpec]) -> str:
    """The name of the function whose rewards make pass rates: eval.reward, else the first with a weight."""
    return config.eval.reward or next(spec.name for spec in specs if spec.weight)


def pass_rates(judged: Judged, name: str) -> list[tuple[PromptRow, float, int]]:
    """The mean of one function's rewards over each group, cut to 0..1, with the group's row and the number of rewards.
    Groups that it could not judge are left out.
    """
    column, found = judged.names.index(name), []
    for p, row in enumerate(judged.rows):
        rewards = [values[column] for values in judged.rewards_of(p)]
        known = [min(max(value, 0.0), 1.0) for value in rewards if value is not None]
        if known:
            found.append((row, sum(known) / len(known), len(known)))
    return found


def with_advantages(config: Config, judged: Judged) -> Rollout:
    """Computes advantages from rewards, and metrics of both."""
    group_size, weights = config.grpo.group_size, judged.weights
    flat = [completion for group in judged.completions for completion in group]
    rewards_BK = np.array(
        [[math.nan if value is None else value for value in row] for row in judged.rewards], np.float64
    )
    weighted = [weighted_sum(row, weights) for row in judged.rewards]
    weighted_B = np.array([math.nan if value is None else value for value in weighted], np.float64)
    advantages = compute_advantages(
        # A function of weight 0 is a metric only, and must not make a completion count as judged.
        rewards_BK[:, [weight != 0 for weight in weights]],
        np.array([weight for weight in weights if weight != 0]),
        group_size,
        config.grpo.scale_rewards,
        config.grpo.aggregation,
        estimator_of(config),
        label(config),
    )
    truncated_B = np.array([completion.finish_reason == "length" for completion in flat])
    kept_B = advantages.valid_B & ~truncated_B if config.grpo.mask_truncated else advantages.valid_B
    lengths_B = np.array([completion.num_trained for completion in flat])
    judged_B = weighted_B[advantages.valid_B]
    # Groups without a judged completion teach nothing either.
    zero_variance = advantages.stats["frac_reward_zero_std"] if judged_B.size else 1.0
    metrics = {
        "reward/mean": float(np.mean(judged_B)) if judged_B.size else math.nan,
        "reward/std": float(np.std(judged_B)) if judged_B.size else math.nan,
        "advantage/mean": float(np.mean(advantages.advantages_B)),
        "advantage/std": float(np.std(advantages.advantages_B)),
        "zero_variance_share": zero_variance,
        "unjudged_share": float(1.0 - advantages.valid_B.mean()),
        "completion_length/mean": float(lengths_B.mean()),
        "completion_length/max": float(lengths_B.max()),
        "truncated_share": float(truncated_B.mean()),
        "masked_share": float(1.0 - kept_B.mean()),
    }
    if config.sampling.source is not None:
        unknown = [np.isnan(done.sampler_logprobs) & (True if done.trained is None else done.trained) for done in flat]
        metrics["unscored_tokens"] = float(sum(map(np.sum, unknown)))
    for name, summary in summarize(judged.rewards, judged.names).items():
        metrics[f"reward/{name}/mean"] = math.nan if summary.mean is None else summary.mean
        metrics[f"reward/{name}/std"] = math.nan if summary.std is None else summary.std
        counts = judged.counts.get(name, {})
        metrics |= {f"reward/{name}/{kind}": counts[kind] for kind in _KINDS if counts.get(kind)}
    metrics |= _execution(judged)
    if config.grpo.aggregation == "sum_then_normalize":  # else every function has the same spread
        metrics |= variance_shares(rewards_BK, weights, judged.names, group_size)
    metrics |= length_correlation(weighted_B, lengths_B, group_size)
    metrics |= equal_completions(judged.rows, judged.completions)
    metrics |= logged_metrics(judged.sums, metrics)
    if judged.episodes:
        metrics |= episode_metrics(judged.episodes, _environment_names(config, judged))
    turn_advantages_B = None
    if config.grpo.turn_advantages is not None:
        turn_advantages_B = _turn_advantages(config, judged, weighted_B)
        metrics |= _turn_advantage_metrics(turn_advantages_B, group_size)
    return Rollout(
        judged.rows,
        judged.completions,
        judged.texts,
        rewards_BK,
        judged.names,
        weighted_B,
        advantages.advantages_B,
        kept_B,
        judged.weights_step,
        metrics | judged.metrics,
        judged.problems,
        judged.logged,
        judged.episodes,
        turn_advantages_B,
    )


def _turn_advantages(config: Config, judged: Judged, weighted_B: np.ndarray) -> list[np.ndarray]:
    """The advantages of the turns of each episode. What other functions than the environment say counts in the last."""
    weight_of = dict(zip(judged.names, judged.weights, strict=True)).get(ENVIRONMENT, 0.0)
    of_others = [
        0.0 if name == ENVIRONMENT else weight for name, weight in zip(judged.names, judged.weights, strict=True)
    ]
    rewards_B = []
    for episode, row, total in zip(judged.episodes, judged.rewards, weighted_B, strict=True):
        of_turns = np.zeros(0 if math.isnan(total) else episode.num_turns)
        if of_turns.size:
            of_turns[: len(episode.rewards)] = [weight_of * (reward or 0.0) for reward in episode.rewards]
            of_turns[-1] += weighted_sum(row, of_others) or 0.0
        rewards_B.append(of_turns)
    grpo = config.grpo
    assert grpo.turn_advantages is not None
    return turn_advantages(rewards_B, grpo.group_size, grpo.turn_advantages, grpo.turn_discount, grpo.scale_rewards)


def _turn_advantage_metrics(turn_advantages_B: Sequence[np.ndarray], group_size: int) -> dict[str, float]:
    """The metrics of advantages, where these are of turns: over all turns, and the share of groups without any."""
    flat = np.concatenate(turn_advantages_B)
    teaches_B = np.array([np.any(own) for own in turn_advantages_B])
    return {
        "advantage/mean": float(flat.mean()) if flat.size else 0.0,
        "advantage/std": float(flat.std()) if flat.size else 0.0,
        "zero_variance_share": float(1.0 - teaches_B.reshape(-1, group_size).any(axis=1).mean()),
    }


def _environment_names(config: Config, judged: Judged) -> list[str]:
    """The name of the environment of each episode [B]."""
    names = list(config.rollout.environments) or ["tools"]
    return [
        str(row.columns.get("environment", names[0])) if len(names) > 1 else names[0]
        for row in judged.rows
        for _ in range(judged.group_size)
    ]


def _execution(judged: Judged) -> dict[str, float]:
    """How each function that was called ran: completions that it lost by errors and by its time limit, calls that were
    made again, seconds of a completion.
    """
    found = {}
    for name, effort in judged.effort.items():
        lost = judged.counts[name]
        errors = sum(lost[kind] for kind in FAILURES) - lost["timeout"]
        values = (errors, lost["timeout"], effort.retries, effort.mean, effort.slowest)
        found |= {f"reward/{name}/{key}": value for key, value in zip(_EXECUTION, values, strict=True)}
    return found


def logged_metrics(sums: Mapping[str, Sums], taken: Collection[str]) -> dict[str, float]:
    """Means of what reward functions logged as {reward/FUNCTION/METRIC: mean}. One that has the name of a metric of the
    run is called reward/FUNCTION/logged_METRIC.

    Args:
      taken: further names that the run's own metrics have.
    """
    found = {}
    for function, own in sums.items():
        for name, mean in means(own).items():
            key = f"reward/{function}/{name}"
            # In every step, whether it is there or not.
            is_taken = key in taken or name in ("mean", "std", *_KINDS, *_EXECUTION, VARIANCE)
            found[f"reward/{function}/logged_{name}" if is_taken else key] = mean
    return found


def minibatches(config: Config, rollout: Rollout) -> list[list[TrainGroup]]:
    """The rollout's groups, cut into minibatches of whole prompts in order; completions that the loss must not see are
    left out. With `grpo.kl_in_reward` they carry their rewards: the advantages follow when the KL is known.
    """
    values_B = rollout.weighted_B if config.grpo.kl_in_reward else rollout.advantages_B
    num_prompts, group_size = len(rollout.rows), len(rollout.completions[0])
    groups = []
    for p, row in enumerate(rollout.rows):
        kept = [
            _to_train(config, completion, float(values_B[b]), *_of_turns(rollout, b))
            for b, completion in enumerate(rollout.completions[p], start=p * group_size)
            if rollout.kept_B[b]
        ]
        groups.append(TrainGroup(np.asarray(row.prompt_ids, np.int32), kept))
    size = num_prompts // config.grpo.minibatches
    return [groups[i : i + size] for i in range(0, num_prompts, size)]


def _of_turns(rollout: Rollout, b: int) -> tuple[np.ndarray, ...]:
    """The advantages of the drawn tokens of an episode, where turns have their own; else nothing."""
    if rollout.turn_advantages_B is None:
        return ()
    return (np.repeat(rollout.turn_advantages_B[b], [len(turn.token_ids) for turn in rollout.episodes[b].turns]),)


def _to_train(
    config: Config, completion: Completion, value: float, of_drawn: np.ndarray | None = None
) -> TrainCompletion:
    """A completion with its advantage, or its reward; of_drawn: the advantages of its drawn tokens, if these differ."""
    advantages = None
    if of_drawn is not None:
        advantages = np.zeros(len(completion.token_ids))
        advantages[slice(None) if completion.trained is None else completion.trained] = of_drawn
    is_sampled = config.grpo.policy_distribution == "sampled"
    return TrainCompletion(
        completion.token_ids,
        value,
        completion.sampler_logprobs,
        completion.sampler_logprobs if is_sampled else completion.policy_logprobs,
        completion.trained,
        completion.kept_words,
        advantages,
        [TrainSequence(prompt_ids, _to_train(config, own, value)) for prompt_ids, own in completion.further],
    )


def sample_records(rollout: Rollout, count: int | None = None) -> list[dict[str, Any]]:
    """The first `count` completions (None: all) of as many different prompts as possible, for samples.jsonl.

    `answer` is that of the data row; it is left out where the row has none. `reward` is the weighted sum of `rewards`,
    None where no function judged. `num_tokens` counts `token_ids`.
    `trained` is 1 for tokens that the policy drew; it is left out where that is all of them. `further` has the prompt's
    and own tokens of each further sequence of an episode. `logged` has by function what it keeps with the completion;
    it is left out where that is nothing.
    """
    num_prompts, group_size = len(rollout.rows), len(rollout.completions[0])
    picks = [(p, g) for g in range(group_size) for p in range(num_prompts)][:count]
    records = []
    for p, g in picks:
        b = p * group_size + g
        completion = rollout.completions[p][g]
        rewards = {
            name: None if math.isnan(value) else value
            for name, value in zip(rollout.names, rollout.rewards_BK[b], strict=True)
        }
        records.append(
            {
                "prompt_index": completion.prompt_index,
                "sample_index": completion.sample_index,
                "prompt": rollout.rows[p].prompt,
                "completion": rollout.texts[b],
                **answer_of(rollout.rows[p]),
                "rewards": rewards,
                "reward": None if math.isnan(rollout.weighted_B[b]) else float(rollout.weighted_B[b]),
                "advantage": float(rollout.advantages_B[b]),
                "num_tokens": len(completion.token_ids),
                "token_ids": completion.token_ids.tolist(),
                "finish_reason": completion.finish_reason,
            }
        )
        if rollout.turn_advantages_B is not None:
            records[-1]["turn_advantages"] = rollout.turn_advantages_B[b].tolist()
        if rollout.logged and rollout.logged[b]:
            records[-1]["logged"] = rollout.logged[b]
        records[-1] |= _trained_of(completion)
        if completion.further:
            prompts = [sequence.prompt for sequence in rollout.episodes[b].sequences[1:]]
            records[-1]["further"] = [
                {"prompt": prompt, "prompt_ids": prompt_ids.tolist(), "token_ids": own.token_ids.tolist()}
                | _trained_of(own)
                for prompt, (prompt_ids, own) in zip(prompts, completion.further, strict=True)
            ]
        if rollout.episodes:
            records[-1] |= record_of(rollout.episodes[b])
    return records


def _trained_of(completion: Completion) -> dict[str, list[int]]:
    """`trained` of a record; empty where the policy drew all tokens."""
    if completion.trained is None or completion.trained.all():
        return {}
    return {"trained": np.asarray(completion.trained, int).tolist()}
