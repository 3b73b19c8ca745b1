"""The completions of a step, and dynamic sampling (DAPO, section 3.2 of https://arxiv.org/abs/2503.14476): groups whose
rewards are all equal teach nothing, so others take their place.

In: the training rows, how many of them the run has used up, and a function that draws and judges. Out: groups for one
step and the new count. The places are refilled from the rows that come next in the run's own order, in rounds, at most
`grpo.dynamic_sampling_rounds`; what is still equal then is trained on as it is. All of it follows from the seed, the
step and the count of rows, so a resumed run refills as the uninterrupted one did.

Legend: P prompts of a step, G completions per prompt.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

from rewards.rubric import weighted_sum
from rl.advantages import ZERO_STD
from rl.config import Config
from rl.data import PromptRow, next_indices
from rl.rollout import Judged

# (rows, the number that stands for each in its randomness) -> their groups with rewards
DrawFn = Callable[[Sequence[PromptRow], Sequence[int]], Judged]


class Collected(NamedTuple):
    """What `collect` found.

    Attributes:
      judged: P groups.
      position: rows of the run's order used up so far, those of the groups that were replaced included.
      metrics: empty without dynamic sampling.
      problems: what to warn of, in words.
    """

    judged: Judged
    position: int
    metrics: dict[str, float]
    problems: list[str]


def collect(config: Config, rows: Sequence[PromptRow], position: int, draw: DrawFn) -> Collected:
    """Draws and judges P groups from the rows at `position` on, and refills those without a spread of rewards."""
    num_prompts, max_rounds = config.grpo.prompts_per_step, config.grpo.dynamic_sampling_rounds
    taken, position = next_indices(len(rows), config.seed, position, num_prompts, num_prompts)
    judged = draw([rows[i] for i in taken], range(num_prompts))
    if not max_rounds:
        return Collected(judged, position, {}, [])
    num_refilled = num_rounds = 0
    equal = [p for p in range(num_prompts) if not has_spread(judged, p)]
    while equal and num_rounds < max_rounds and len(taken) < len(rows):
        count = min(len(equal), len(rows) - len(taken))
        new, position = next_indices(len(rows), config.seed, position, count, num_prompts, taken)
        other = draw([rows[i] for i in new], range(len(taken), len(taken) + count))
        useful = [p for p in range(count) if has_spread(other, p)]
        judged = judged.replace(dict(zip(equal, useful, strict=False)), other)
        taken, equal = [*taken, *new], equal[len(useful) :]
        num_refilled, num_rounds = num_refilled + len(useful), num_rounds + 1
    problems = []
    if equal:
        problems.append(
            f"dynamic sampling: {len(equal)} of {num_prompts} groups still have equal rewards after {num_rounds} "
            f"rounds and {len(taken)} prompts, and are trained on as they are; prompts that are less easy or less "
            "hard, or a higher grpo.dynamic_sampling_rounds, would help"
        )
    metrics = {"refilled": num_refilled, "unfilled": len(equal), "rounds": num_rounds, "prompts": len(taken)}
    return Collected(judged, position, {f"dynamic_sampling/{k}": float(v) for k, v in metrics.items()}, problems)


def has_spread(judged: Judged, p: int) -> bool:
    """Whether two completions of group p have different rewards."""
    sums = [weighted_sum(row, judged.weights) for row in judged.rewards_of(p)]
    known = [value for value in sums if value is not None]
    return bool(known) and max(known) - min(known) > ZERO_STD
