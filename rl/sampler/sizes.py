"""The sizes of slots and caches in an engine.

In: the largest numbers of slots and tokens. Out: a short list of sizes, because every size is a program to compile.
Arithmetic only.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

MIN_SLOTS = 8  # of a shard; fewer rows than this make no step faster
MAX_HALVINGS = 3  # of the slots: each is a program to compile
MIN_LENGTH = 64  # of the own cache, unless the longest completion is shorter
LENGTH_UNIT = 16
MIN_TABLE_LENGTH = 16


def size_at_least(n: int, steps: int = 2) -> int:
    """The smallest size >= n. There are `steps` sizes in each doubling (2: 1, 2, 3, 4, 6, 8, 12, ...; 4: 8, 10, 12,
    ...).
    """
    unit = max((1 << (n - 1).bit_length() - 1) // steps, 1) if n > 2 else 1
    return math.ceil(max(n, 1) / unit) * unit


def size_at_most(n: int, steps: int = 2) -> int:
    """The largest such size <= n, for n >= 1."""
    unit = max((1 << n.bit_length() - 1) // steps, 1)
    return n // unit * unit


class CacheSize(NamedTuple):
    """The slots of a shard, and the positions of the own cache for each slot."""

    slots: int
    length: int


def slot_sizes(most_slots: int) -> list[int]:
    """Numbers of slots of a shard: all of them, halved up to three times."""
    halved = [most_slots]
    while halved[-1] > MIN_SLOTS and len(halved) <= MAX_HALVINGS:
        halved.append(max(math.ceil(halved[-1] / 2), MIN_SLOTS))
    return halved


def cache_sizes(most_slots: int, limit: int) -> list[CacheSize]:
    """The sizes of the own cache for completions of at most `limit` tokens.

    Slots are halved up to three times, and lengths double up to the limit. Between these sizes are others: 3/4 of each
    number of slots with 3/2 of each length; and, where memory is at its highest, 5/8 of the two largest numbers of
    slots with every length from the second on, and 1/2 of the slots with 5/4 of these lengths.

    Where completions end at a steady rate, the cache then never takes more than a quarter above its first size. This
    holds even for a call whose completions end late (99 of 100 calls at a mean of 0.4 times the limit).
    """
    halved = slot_sizes(most_slots)
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


def session_sizes(most_slots: int, limit: int) -> list[CacheSize]:
    """The sizes of the own cache in a session, whose slots are at their longest for most of it: lengths double up to
    the limit, with 3/2 of the two largest ones between. All slots go with each length. Half of them and fewer, which
    come at the end, go with every second length, the longest one among them.
    """
    last = LENGTH_UNIT * math.ceil(limit / LENGTH_UNIT)
    doubled = [MIN_LENGTH << k for k in range(limit.bit_length()) if MIN_LENGTH << k < last]
    between = [length * 3 // 2 for length in doubled[1:][-2:] if length * 3 // 2 < last]
    lengths = sorted([*doubled, *between, last])
    most, *fewer = slot_sizes(most_slots)
    return [
        *(CacheSize(most, length) for length in lengths),
        *(CacheSize(slots, length) for slots in fewer for length in lengths[::-2]),
    ]


def next_session_size(sizes: Sequence[CacheSize], now: CacheSize, needed: int, filled: int) -> CacheSize:
    """As `next_cache_size`, from `session_sizes`: fewer slots may come with a longer cache, where that is less."""
    enough = [size for size in sizes if needed <= size.slots <= now.slots and size.length >= now.length]
    if filled >= now.length:
        return min((size for size in enough if size.length > filled), key=lambda size: (math.prod(size), size.length))
    half = [size for size in enough if size.slots <= math.ceil(now.slots / 2)]
    smallest = min(half, key=lambda size: (math.prod(size), size.length), default=now)
    return smallest if math.prod(smallest) < math.prod(now) else now


def next_cache_size(sizes: Sequence[CacheSize], now: CacheSize, needed: int, filled: int) -> CacheSize:
    """The next size: once the cache is full, the smallest longer one; before that, fewer slots once half can go.

    Args:
      sizes: from `cache_sizes`.
      needed: the number of slots that must stay.
      filled: the positions that the fullest slot has written.
    """
    enough = [size for size in sizes if needed <= size.slots <= now.slots]
    if filled >= now.length:
        return min((size for size in enough if size.length > filled), key=lambda size: (math.prod(size), size.length))
    smallest = min(size for size in enough if size.length == now.length)
    return smallest if smallest.slots <= math.ceil(now.slots / 2) else now


def later_session_sizes(sizes: Sequence[CacheSize], now: CacheSize) -> list[CacheSize]:
    """All sizes other than `now` that `next_session_size` can return, in a fixed order."""
    fills = [0, *sorted({size.length - 1 for size in sizes if size.length > now.length})]
    needs = sorted({size.slots for size in sizes if size.slots <= now.slots})
    later = (next_session_size(sizes, now, needed, filled) for filled in fills for needed in needs)
    return [size for size in dict.fromkeys(later) if size != now]


def later_cache_sizes(sizes: Sequence[CacheSize], now: CacheSize) -> list[CacheSize]:
    """All sizes other than `now` that `next_cache_size` can return, in a fixed order."""
    fills = [0] if now.length == max(size.length for size in sizes) else [0, now.length]
    needs = sorted({size.slots for size in sizes if size.slots <= now.slots})
    later = (next_cache_size(sizes, now, needed, filled) for filled in fills for needed in needs)
    return [size for size in dict.fromkeys(later) if size != now]
