"""Histograms of a step's numbers, small enough to keep for every step.

In: numbers. Out: pairs [value, count] in rising order. Up to `MOST_BINS` different values are kept as they are, so
that rewards of 0 and 1 stay exact. More values are counted in that many bins of equal width, and a pair has the
bin's middle.
"""

import math
from collections import Counter
from collections.abc import Iterable

MOST_BINS = 32


def histogram(values: Iterable[float]) -> list[list[float]]:
    """[[value, count], ...] of the finite values; empty without any."""
    known = sorted(float(value) for value in values if math.isfinite(value))
    counts = Counter(known)
    if len(counts) <= MOST_BINS:
        return [[_short(value), count] for value, count in counts.items()]
    low, width = known[0], (known[-1] - known[0]) / MOST_BINS
    bins = Counter(min(int((value - low) / width), MOST_BINS - 1) for value in known)
    return [[_short(low + (place + 0.5) * width), bins[place]] for place in sorted(bins)]


def _short(value: float) -> float:
    return float(f"{value:.6g}")
