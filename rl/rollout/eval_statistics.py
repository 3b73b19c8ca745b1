"""The numbers of an evaluation: shares with intervals, pass@k, maj@k, and comparisons of two models.

In: what was right, question by question. Out: numbers. Pure functions of numpy and scipy; every random number follows
from a fixed seed, so that the same judgements give the same interval in every process.

Legend: Q questions, R resamples.
"""

import math
from collections.abc import Sequence

import numpy as np

Z_95 = 1.959964
_SEED = 20260901  # of all resamples
_MOST_AT_A_TIME = 1 << 22  # draws of a bootstrap that are in memory


def wilson_interval(successes: int, trials: int, z: float = Z_95) -> tuple[float, float]:
    """Wilson score interval of a share, 95 % by default; (0, 1) without trials.

    https://en.wikipedia.org/wiki/Binomial_proportion_confidence_interval
    """
    if trials == 0:
        return 0.0, 1.0
    share, square = successes / trials, z * z
    centre = (share + square / (2 * trials)) / (1 + square / trials)
    margin = z * math.sqrt(share * (1 - share) / trials + square / (4 * trials**2)) / (1 + square / trials)
    return max(centre - margin, 0.0), min(centre + margin, 1.0)


def pass_at_k(num_samples: int, num_right: int, k: int) -> float | None:
    """The unbiased estimate of the chance that one of k samples is right: 1 - C(n - c, k) / C(n, k).

    None for k > n. Chen et al. 2021 (https://arxiv.org/abs/2107.03374), equation 1.
    """
    if k > num_samples:
        return None
    return 1.0 - math.comb(num_samples - num_right, k) / math.comb(num_samples, k)


def majority(answers: Sequence[str | None]) -> int | None:
    """The place of the first sample that has the most frequent answer; None where no sample has an answer.

    Of answers that are equally frequent, the one that was given first is taken. A sample without an answer (None) has
    no vote.
    """
    counts: dict[str, int] = {}
    for answer in answers:
        if answer is not None:
            counts[answer] = counts.get(answer, 0) + 1
    if not counts:
        return None
    return answers.index(max(counts, key=lambda answer: counts[answer]))  # the first of equals: dicts keep their order


def maj_at_k(answers: Sequence[str | None], rights: Sequence[bool | None], k: int) -> float | None:
    """The share of majorities of k samples that are right, over the n // k blocks of k samples in order.

    rights: whether each sample is right; None: it was not judged, and has no vote. A block without an answer is wrong.
    None for k > n, and where no sample was judged.
    """
    blocks = range(0, len(answers) - k + 1, k)
    if not blocks or all(right is None for right in rights):
        return None
    found = []
    for start in blocks:
        own = rights[start : start + k]
        votes = [
            None if right is None else answer for answer, right in zip(answers[start : start + k], own, strict=True)
        ]
        place = majority(votes)
        found.append(place is not None and own[place] is True)
    return sum(found) / len(found)


def mean_interval(values_Q: Sequence[float], resamples: int) -> tuple[float, float]:
    """The 95 % percentile interval of a mean over questions, by resampling whole questions; (nan, nan) without any.

    values_Q: one number for each question. resamples: how many means are drawn.
    """
    if not len(values_Q):
        return math.nan, math.nan
    low, high = np.quantile(_resampled_means(np.asarray(values_Q, np.float64), resamples), [0.025, 0.975])
    return float(low), float(high)


def mcnemar(num_better: int, num_worse: int) -> float:
    """The exact two-sided p-value of McNemar's test: are questions that changed as often better as worse.

    It is the binomial test of the smaller number among both with chance 1/2; 1 where nothing changed.
    https://en.wikipedia.org/wiki/McNemar%27s_test#Variations
    """
    from scipy.stats import binomtest  # half a second, which other commands need not wait for

    changed = num_better + num_worse
    return float(binomtest(min(num_better, num_worse), changed, 0.5).pvalue) if changed else 1.0


def _resampled_means(values_Q: np.ndarray, resamples: int) -> np.ndarray:
    """[R] means of as many questions, drawn with replacement."""
    rng, size = np.random.default_rng(_SEED), len(values_Q)
    at_a_time = max(1, _MOST_AT_A_TIME // size)
    parts = []
    for start in range(0, resamples, at_a_time):
        count = min(at_a_time, resamples - start)
        parts.append(values_Q[rng.integers(size, size=(count, size))].mean(axis=1))
    return np.concatenate(parts)
