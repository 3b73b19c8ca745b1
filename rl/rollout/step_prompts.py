"""The prompts of a step, and dynamic sampling (DAPO, https://arxiv.org/abs/2503.14476, section 3.2).

Groups whose rewards are all equal teach nothing, so dynamic sampling replaces them. In: the training data rows, their
order, the number of rows used up, and a function that draws and judges. Out: the groups of one step and the new number.
Groups are replaced by those of the next rows in the run's own order (`rl.data.order`), in at most
`grpo.dynamic_sampling_rounds` rounds. Groups that are still equal then are kept. Everything follows from the seed, the
step and the number of rows, so a resumed run refills like an uninterrupted one.

A refill is judged alone. A function of the whole batch would compare its completions with fewer than those of the first
draw, although both are trained on together. So a run with such a function does not start (`check_calls`).

Legend: P prompts of a step, G completions per prompt.
"""

import dataclasses
from collections.abc import Sequence
from typing import Protocol

from rewards.rubric import weighted_sum
from rewards.runner import RewardRunner
from rl.algorithms.advantages import ZERO_STD
from rl.config.load import Config
from rl.data.order import Order
from rl.data.prompt_rows import PromptRow
from rl.data.stream import PromptStream, StreamOrder
from rl.rollout.groups import Judged


class Draw(Protocol):
    """What has the groups of a step drawn and judged; `rl.rollout.collector.Collector` has the run's own.

    Whoever fills groups in another way, over several turns for instance, gives `collect` another one.
    """

    def __call__(self, rows: Sequence[PromptRow], prompt_indices: Sequence[int], /) -> Judged:
        """One group for each row, in their order, of `grpo.group_size` completions with the rewards of each.

        Called once for the first draw of a step and once for each round of refills, always with the same weights.

        Args:
          rows: what to ask. prompt_indices: the number that stands for each row in its randomness. No two rows of a
            step have the same, so all completions follow from the step, these and the number of each completion in its
            group: a resumed run draws them again.
        """
        ...


def check_calls(config: Config, runner: RewardRunner) -> None:
    """Raises ValueError where refills would be judged by a function that takes whole batches and has a weight."""
    rounds = config.grpo.dynamic_sampling_rounds
    for spec in runner.specs if rounds else ():
        if spec.weight and runner.calls[spec.name] == "whole_batch":
            raise ValueError(
                f"grpo.dynamic_sampling_rounds must be 0 with a reward function that is called with whole batches, got "
                f"{rounds} with {spec.name!r} ({runner.why_not_alone(spec.name)}): refilled groups are judged without "
                "those beside which they are trained on; say elementwise: true in its entry of rewards.functions if it "
                "judges each completion by itself, or needs_group: true if it compares those of one prompt, give it "
                "weight 0, or set grpo.dynamic_sampling_rounds=0"
            )


def collect(
    config: Config,
    rows: PromptStream | Sequence[PromptRow],
    order: Order | StreamOrder,
    position: int,
    weights_step: int,
    draw: Draw,
) -> Judged:
    """Draws and judges P groups from the rows at `position` of their order on, and replaces groups without a spread of
    rewards. `draw` draws with the weights of `weights_step`. Without dynamic sampling the groups have no metrics of
    their own.
    """
    num_prompts, max_rounds = config.grpo.prompts_per_step, config.grpo.dynamic_sampling_rounds
    taken, position = order.take(position, num_prompts)
    judged = draw([rows[i] for i in taken], range(num_prompts))
    if not max_rounds:
        return dataclasses.replace(judged, position=position, weights_step=weights_step)
    num_refilled = num_rounds = 0
    equal = [p for p in range(num_prompts) if not has_spread(judged, p)]
    while equal and num_rounds < max_rounds and len(taken) < len(rows):
        count = min(len(equal), len(rows) - len(taken))
        new, position = order.take(position, count, taken)
        if not new:  # a stream knows only now that it has no other rows
            break
        count = len(new)
        other = draw([rows[i] for i in new], range(len(taken), len(taken) + count))
        useful = [p for p in range(count) if has_spread(other, p)]
        judged = judged.replace(dict(zip(equal, useful, strict=False)), other)
        taken, equal = [*taken, *new], equal[len(useful) :]
        num_refilled, num_rounds = num_refilled + len(useful), num_rounds + 1
    problems = list(judged.problems)
    unjudged = [p for p in equal if not _known(judged, p)]
    count = f"of {num_prompts} groups still {{}} after {num_rounds} rounds and {len(taken)} prompts, and"
    if unjudged:
        problems.append(
            f"dynamic sampling: {len(unjudged)} {count.format('have no reward at all')} teach nothing; no function "
            "with a weight could judge them: look at what the reward functions report"
        )
    if len(equal) > len(unjudged):
        problems.append(
            f"dynamic sampling: {len(equal) - len(unjudged)} {count.format('have equal rewards')} are trained on as "
            "they are; prompts that are less easy or less hard, or a higher grpo.dynamic_sampling_rounds, would help"
        )
    metrics = {
        "dynamic_sampling/refilled": float(num_refilled),
        "dynamic_sampling/unfilled": float(len(equal)),
        "dynamic_sampling/rounds": float(num_rounds),
        "dynamic_sampling/prompts": float(len(taken)),
    }
    return dataclasses.replace(judged, position=position, weights_step=weights_step, metrics=metrics, problems=problems)


def has_spread(judged: Judged, p: int) -> bool:
    """Whether two completions of group p have different rewards."""
    known = _known(judged, p)
    return bool(known) and max(known) - min(known) > ZERO_STD


def _known(judged: Judged, p: int) -> list[float]:
    """The weighted rewards of the judged completions of group p."""
    sums = [weighted_sum(row, judged.weights) for row in judged.rewards_of(p)]
    return [value for value in sums if value is not None]
