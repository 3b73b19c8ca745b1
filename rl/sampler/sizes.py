"""The sizes that the slots and caches of an engine may have.

In: the most slots and tokens that are needed. Out: a short list of sizes. Every size is a program to compile, so there
are few. Arithmetic only.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

MIN_SLOTS = 8  # per shard: fewer rows than this make no step faster
MAX_HALVINGS = 3  # of the slots: each is a program to compile
MIN_LENGTH = 64  # of the own cache, where completions may be longer
LENGTH_UNIT = 16
MIN_TABLE_LENGTH = 16


def size_at_least(n: int, steps: int = 2) -> int:
    """The smallest size >= n, with `steps` sizes per doubling (2: 1, 2, 3, 4, 6, 8, 12, ...; 4: 8, 10, 12, ...)."""
    unit = max((1 << (n - 1).bit_length() - 1) // steps, 1) if n > 2 else 1
    return math.ceil(max(n, 1) / unit) * unit


def size_at_most(n: int, steps: int = 2) -> int:
    """The largest of the same sizes that is <= n, for n >= 1."""
    unit = max((1 << n.bit_length() - 1) // steps, 1)
    return n // unit * unit


class CacheSize(NamedTuple):
    """Slots per shard, and positions that the own cache has for each."""

    slots: int
    length: int


def cache_sizes(most_slots: int, limit: int) -> list[CacheSize]:
    """The sizes that the own cache may have while completions of at most `limit` tokens are drawn.

    Slots are up to three times halved and lengths double until the limit. Three quarters of the slots go with one and a
    half of the lengths, and where memory is at its highest there are steps between these: five eighths and five
    sixteenths of the slots with the lengths from the second on, half of the slots with five quarters of these. Where
    completions end at a steady rate, growing from size to size then takes no more than a quarter above the
    first size, not even in a call whose completions happen to end late (99 of 100 at a mean of 0.4 times the limit).
    """
    halved = [most_slots]
    while halved[-1] > MIN_SLOTS and len(halved) <= MAX_HALVINGS:
        halved.append(max(math.ceil(halved[-1] / 2), MIN_SLOTS))
    last = LENGTH_UNIT * math.ceil(limit / LENGTH_UNIT)
    doubled = [MIN_LENGTH << k for k in range(limit.bit_length()) if MIN_LENGTH << k < last]
    quarters = [count for slots in halved if (count := slots * 3 // 4) >= MIN_SLOTS]
    eighths = [count for slots in halved[:2] if (count := slots * 5 // 8) >= MIN_SLOTS]

    def sizes(slots: Sequence[int], lengths: Sequence[int]) -> list[CacheSize]:
        return [CacheSize(count, length) for length in lengths for count in slots]

    if not doubled:
        return sizes(halved, [last])
    between = sizes(quarters, [*(length * 3 // 2 for length in doubled if length * 3 // 2 < last), last])
    between += sizes(eighths, [*doubled[1:], last])
    between += sizes(halved[1:2], [length * 5 // 4 for length in doubled[1:] if length * 5 // 4 < last])
    return sizes(halved, [*doubled, last]) + between


def next_cache_size(sizes: Sequence[CacheSize], now: CacheSize, needed: int, filled: int) -> CacheSize:
    """The size to go on with: the smallest that is longer once the cache is full; before that, fewer slots once half
    can go.

    Args:
      sizes: from `cache_sizes`.
      needed: slots that must stay.
      filled: positions of the busiest slot.
    """
    enough = [size for size in sizes if needed <= size.slots <= now.slots]
    if filled >= now.length:
        return min((size for size in enough if size.length > filled), key=lambda size: (math.prod(size), size.length))
    smallest = min(size for size in enough if size.length == now.length)
    return smallest if smallest.slots <= math.ceil(now.slots / 2) else now


def later_cache_sizes(sizes: Sequence[CacheSize], now: CacheSize) -> list[CacheSize]:
    """All that `next_cache_size` can answer, other than `now`, in an order that does not change."""
    fills = [0] if now.length == max(size.length for size in sizes) else [0, now.length]
    needs = sorted({size.slots for size in sizes if size.slots <= now.slots})
    later = (next_cache_size(sizes, now, needed, filled) for filled in fills for needed in needs)
    return [size for size in dict.fromkeys(later) if size != now]
