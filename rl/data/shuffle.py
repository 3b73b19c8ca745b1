"""Shuffled orders as pure functions of whole numbers, such as a seed and an epoch: the same on every machine and under
every version of numpy.
"""

import math

import numpy as np


def epoch_order(num_rows: int, seed: int, epoch: int, prompts_per_step: int) -> np.ndarray:
    """A permutation of the rows, int64 [num_rows]. Its head repeats no row that the same step took from the epoch
    before.

    To repair a head, the order of the epoch before is needed, and so on back to an epoch that begins with a step. A
    repair moves only the first prompts_per_step entries. So with rows for two steps no tail is moved, and one epoch
    back is enough.
    """
    period = prompts_per_step // math.gcd(num_rows, prompts_per_step)
    chain = epoch % period if num_rows < 2 * prompts_per_step else min(epoch % period, 1)
    order = permutation(num_rows, seed, epoch - chain)
    for current in range(epoch - chain + 1, epoch + 1):
        num_taken = current * num_rows % prompts_per_step
        taken = order[num_rows - num_taken :]
        order = permutation(num_rows, seed, current)
        untaken = np.flatnonzero(~np.isin(order[:prompts_per_step], taken))[: prompts_per_step - num_taken]
        order = np.concatenate([order[untaken], np.delete(order, untaken)])
    return order


def permutation(size: int, *words: int) -> np.ndarray:
    """A permutation that follows from the words, int64 [size]; by sorting raw bits, see `random_bits`."""
    return np.argsort(random_bits(size, *words), kind="stable")


def uniform(count: int, *words: int) -> np.ndarray:
    """Numbers in [0, 1) that follow from the words, float64 [count]."""
    return (random_bits(count, *words) >> np.uint64(11)) * 2.0**-53


def random_bits(count: int, *words: int) -> np.ndarray:
    """uint64 [count]. Raw bits, because numpy promises a stable stream only for those."""
    return np.random.Philox(np.random.SeedSequence(words)).random_raw(count)
