"""Chooses the groups of a minibatch that an update computes: all, or those that teach something.

In: the groups of a minibatch. Out: the groups to pack, and the numbers of the others for the denominators. A completion
with advantage 0 has a policy term of 0, whose gradient is 0 as well. Where nothing else in the loss reads its
log-probs, the loss and the gradient are the same without it, as long as every denominator still counts it.
"""

from collections.abc import Sequence
from typing import NamedTuple

from rl.algorithms.from_config import loss_config
from rl.algorithms.loss_types import loss_type_of
from rl.config.load import Config
from rl.training.packing import TrainGroup


class ComputedGroups(NamedTuple):
    """The groups of a minibatch that are computed.

    Attributes:
      groups: at least one with a trained token, if the minibatch has any.
      num_left_out_sequences, num_left_out_tokens: completions of the other groups, and the trained tokens in them.
      left_out_size: tokens of the other groups, prompts included. size: tokens of all groups.
    """

    groups: Sequence[TrainGroup]
    num_left_out_sequences: int
    num_left_out_tokens: int
    left_out_size: int
    size: int


def leaves_groups_out(config: Config) -> bool:
    """Whether updates leave out groups whose advantages are all 0.

    They are computed if a part of the loss reads them: the KL term (which also makes advantages, with
    `grpo.kl_in_reward`), the entropy bonus, the entropy quantile of the minibatch, or a policy term that may differ
    from 0 there. The NLL of positive examples reads only completions with A > 0.
    """
    loss = loss_config(config)
    is_read = config.grpo.beta or loss.has_entropy_bonus or loss.selects_by_entropy
    return config.grpo.skip_zero_advantage and not is_read and loss_type_of(loss).needs_advantage


def computed_groups(groups: Sequence[TrainGroup], leaves_out: bool) -> ComputedGroups:
    """All groups, or with `leaves_out` the groups with an advantage other than 0.

    If there is no such group, the first one with a trained token is computed, which shows whether sampler and trainer
    agree.
    """
    computed = [not leaves_out or any(c.has_advantage for c in group.completions) for group in groups]
    if not any(computed):
        first = next((place for place, group in enumerate(groups) if _num_trained(group)), 0)
        computed[first] = True
    left_out = [group for group, is_computed in zip(groups, computed, strict=True) if not is_computed]
    return ComputedGroups(
        [group for group, is_computed in zip(groups, computed, strict=True) if is_computed],
        sum(len(group.completions) for group in left_out),
        sum(map(_num_trained, left_out)),
        sum(map(_size, left_out)),
        sum(map(_size, groups)),
    )


def uncomputed_share(parts: Sequence[ComputedGroups]) -> float:
    """The share of a step's tokens, of prompts and completions, that no update computes."""
    return sum(part.left_out_size for part in parts) / max(sum(part.size for part in parts), 1)


def _num_trained(group: TrainGroup) -> int:
    return sum(completion.num_trained for completion in group.completions)


def _size(group: TrainGroup) -> int:
    """Tokens of prompt and completions; a group without completions is never computed."""
    if not group.completions:
        return 0
    further = [sequence for completion in group.completions for sequence in completion.further]
    own = sum(len(sequence.prompt_ids) + len(sequence.completion.token_ids) for sequence in further)
    return len(group.prompt_ids) + sum(len(completion.token_ids) for completion in group.completions) + own
