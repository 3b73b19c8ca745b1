"""What the watch for hacked rewards reads of a step (`rl.run.hacking`).

In: rewards, lengths and completions, which are the same in all processes. Out: metrics. Everything about rewards is
taken within groups, because only differences within a group are learned.

Legend: P prompts, G completions per prompt, B = P * G sequences, N some of them, K reward functions.
"""

import collections
from collections.abc import Sequence

import numpy as np

from rl.data.prompt_rows import PromptRow
from rl.run.hacking import DOMINANT, EQUAL, LENGTH, VARIANCE
from rl.sampler.contract import Completion

_MOST = 0.9  # share of completions with the highest reward, from which on a function has given what it can


def variance_shares(
    rewards_BK: np.ndarray, weights: Sequence[float], names: Sequence[str], group_size: int
) -> dict[str, float]:
    """{reward/FUNCTION/variance_share: share} of the functions with a weight, and the largest as `DOMINANT`.

    The share of function k is sum(c_k s) / sum(s s), where c_k is its weighted reward minus the group's mean, and s the
    sum of all c_k: shares add up to 1, and one is negative where a function works against the others. The largest is
    left out where every other function gave its highest reward, above 0, to nine tenths of the completions: it has
    nothing more to teach. Completions that some function with a weight could not judge do not count. Empty with fewer
    than two functions with a weight, and without a spread.

    Args:
      rewards_BK: NaN where a function could not judge. Groups are consecutive.
    """
    columns = [k for k, weight in enumerate(weights) if weight]
    weighted_BK = rewards_BK[:, columns] * np.array([weights[k] for k in columns])
    known_B = np.isfinite(weighted_BK).all(1)
    if len(columns) < 2 or not known_B.any():
        return {}
    parts_BK = _centred(weighted_BK, known_B, group_size)
    sum_B = parts_BK.sum(1)
    if not (total := float(sum_B @ sum_B)):
        return {}
    shares_K = sum_B @ parts_BK / total
    found = {f"reward/{names[k]}/{VARIANCE}": float(share) for k, share in zip(columns, shares_K, strict=True)}
    judged_BK, largest = weighted_BK[known_B], int(np.argmax(shares_K))
    highest_K = judged_BK.max(0)
    has_given_K = (np.mean(judged_BK == highest_K, axis=0) >= _MOST) & (highest_K > 0)
    if not np.delete(has_given_K, largest).all():
        found[DOMINANT] = float(shares_K[largest])
    return found


def length_correlation(weighted_B: np.ndarray, lengths_B: np.ndarray, group_size: int) -> dict[str, float]:
    """{`LENGTH`: correlation of reward and length within groups}: sum(r l) / sqrt(sum(r r) sum(l l)), where r and l are
    reward and length minus the group's mean, over groups whose rewards differ. Empty where there is no spread.

    Args:
      weighted_B: NaN for completions that were not judged.
    """
    known_B = np.isfinite(weighted_B)
    both_B2 = _centred(np.stack([weighted_B, lengths_B], 1).astype(np.float64), known_B, group_size)
    both_PG2 = both_B2.reshape(-1, group_size, 2)
    rewards_N, spread_N = both_PG2[both_PG2[..., 0].any(1)].reshape(-1, 2).T
    scale = float(np.sqrt((rewards_N @ rewards_N) * (spread_N @ spread_N)))
    return {LENGTH: float(rewards_N @ spread_N) / scale} if scale else {}


def equal_completions(rows: Sequence[PromptRow], completions: Sequence[Sequence[Completion]]) -> dict[str, float]:
    """{`EQUAL`: share of all completions that are the most frequent one of those that answer different prompts}.

    Completions are equal if their token ids are, of all sequences. Those without a token, of episodes that were lost
    before the policy drew any, do not count. Empty where all prompts are the same.
    """
    prompts = [np.asarray(row.prompt_ids).tobytes() for row in rows]
    if len({*prompts}) < 2:
        return {}
    counts: collections.Counter[tuple[int, ...]] = collections.Counter()
    asked: dict[tuple[int, ...], set[bytes]] = {}
    for prompt, group in zip(prompts, completions, strict=True):
        for completion in group:
            sequences = [completion, *(further.completion for further in completion.further)]
            ids = tuple(token for sequence in sequences for token in (*sequence.token_ids.tolist(), -1))[:-1]
            if not ids:
                continue
            counts[ids] += 1
            asked.setdefault(ids, set()).add(prompt)
    most = max((count for ids, count in counts.items() if len(asked[ids]) > 1), default=0)
    return {EQUAL: most / counts.total()} if counts else {}


def _centred(values_BN: np.ndarray, known_B: np.ndarray, group_size: int) -> np.ndarray:
    """Values minus the mean of those of their group that are known; 0 where they are not."""
    known_PG1 = known_B.reshape(-1, group_size, 1)
    values_PGN = np.where(known_PG1, values_BN.reshape(*known_PG1.shape[:2], -1), 0.0)
    counts_P11 = np.maximum(known_PG1.sum(1, keepdims=True), 1)
    means_P1N = values_PGN.sum(1, keepdims=True) / counts_P11
    return np.where(known_PG1, values_PGN - means_P1N, 0.0).reshape(values_BN.shape)
