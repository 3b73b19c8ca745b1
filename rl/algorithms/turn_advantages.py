"""An advantage for each turn of an episode, from the rewards of its turns. numpy, on the host.

In: for each episode of a step one reward for each turn. Out: one advantage for each turn. A turn is answerable for what
came with it and after it, so what counts is its return, with the rewards r of an episode's n turns and a discount

    R_j = sum_{k = j}^{n} discount^(k - j) * r_k

Returns are made relative to others of the group, as GRPO makes rewards: the mean is subtracted, and the result divided
by a standard deviation. Normalised discounted returns as advantages of turns: GTPO, https://arxiv.org/abs/2511.14846.
Which returns a turn is compared with is a choice:

- "same_turn": those of the same turn in the group's other episodes, as MT-GRPO compares the rewards of a turn,
  https://arxiv.org/abs/2505.11821. Returns fall with each reward that has been given, and a group begins alike, so this
  is the nearer baseline. A turn that no other episode reached has nothing to be compared with: 0.
- "all_turns": those of all turns of the group's episodes. A turn that one episode alone reached is compared, too.

With one turn, or with "same_turn" in the first turn, without a discount, these are GRPO's advantages of whole episodes.
GRPO's own process supervision (section 4.1.3 of https://arxiv.org/abs/2402.03300) normalises rewards before it adds
them up, and so pays or charges an episode for each of its turns; with returns a turn without a reward changes nothing.

Shapes: B episodes (those of one group are consecutive), G episodes per group.
"""

from collections.abc import Sequence

import numpy as np

from rl.algorithms.advantages import STD_EPSILON

BASELINES = ("same_turn", "all_turns")


def turn_returns(rewards: np.ndarray, discount: float) -> np.ndarray:
    """The return of each turn of one episode, from the rewards of its turns; both float64 [turns]."""
    returns, following = np.zeros(len(rewards)), 0.0
    for turn in reversed(range(len(rewards))):
        following = returns[turn] = rewards[turn] + discount * following
    return returns


def turn_advantages(
    rewards_B: Sequence[np.ndarray], group_size: int, baseline: str, discount: float, scale_rewards: str
) -> list[np.ndarray]:
    """An advantage for each turn of each episode, float64 [B][turns].

    Args:
      rewards_B: of the turns of each episode; empty for an episode that was not judged, or has no turn, which then
        counts nowhere.
      baseline: one of `BASELINES`.
      scale_rewards: the divisor of centred returns: the standard deviation of the returns that a turn is compared with
        ("group"), of all returns of the step ("batch"), or "none". ddof 1, 1e-4 added.
    """
    assert baseline in BASELINES, baseline
    returns_B = [turn_returns(rewards, discount) for rewards in rewards_B]
    turns = np.concatenate([np.arange(len(returns)) for returns in returns_B])
    groups = np.repeat(np.arange(len(returns_B)) // group_size, list(map(len, returns_B)))
    returns = np.concatenate(returns_B)
    advantages = np.zeros_like(returns)
    labels = groups if baseline == "all_turns" else np.stack([groups, turns], axis=1)
    _, members = np.unique(labels, axis=0, return_inverse=True)
    for label in range(members.max(initial=-1) + 1):
        of_label = members.reshape(-1) == label
        own = returns[of_label]
        if own.min() == own.max():  # the rounded mean of equal numbers may differ from them; 0 must be exact
            continue
        scale = {"group": own, "batch": returns}.get(scale_rewards)
        divisor = 1.0 if scale is None else scale.std(ddof=1) + STD_EPSILON
        advantages[of_label] = (own - own.mean()) / divisor
    return np.split(advantages, np.cumsum(list(map(len, returns_B)))[:-1])
