"""The order in which a run takes its training rows.

In: the numbers of rows, the seed, and what the configuration says of a mixture. Out: the rows of a step. The order is a
pure function of (seed, epoch, place in the epoch), so a resumed run goes on where it stopped. A curriculum
(`rl.data.curriculum`) changes it by what is known of the rows.

Without a mixture, or with one that draws each row once an epoch, each epoch takes the rows in a fresh random order
(`rl.data.shuffle.epoch_order`). Steps run across the border between epochs, so every row is taken equally often. An
epoch of a mixture has a fixed number of draws of each source, spread evenly: draw j of n falls at a random time between
j/n and (j + 1)/n of the epoch. Each source is taken in its own order, which runs on from epoch to epoch, so all rows of
a source are drawn equally often, up to one.

Legend: L draws of an epoch, K sources, P prompts of a step.
"""

import heapq
import math
from collections.abc import Sequence
from typing import Any, overload

import numpy as np

from rl.config.sections import DataSection
from rl.data.curriculum import Curriculum
from rl.data.prompts import PairData, PromptData, check_enough_rows
from rl.data.shuffle import epoch_order, permutation, uniform
from rl.data.stream import StreamOrder


class Order:
    """The order of the rows of one run.

    Args:
      sizes: the number of rows of each source [K]; the rows of all stand in a list, in this order.
      prompts_per_step: P, for which no step gets a row twice: epochs begin with rows that the step over their border
        has not. A run that goes on with steps of another size keeps the order of the size that it began with.
      draws: how many draws each source has in an epoch [K]; None: one of each row, in one shuffled order of all.
      curriculum: changes the order by how easy the rows are, if there is one.
    """

    def __init__(
        self,
        sizes: Sequence[int],
        seed: int,
        prompts_per_step: int,
        draws: Sequence[int] | None = None,
        curriculum: Curriculum | None = None,
    ) -> None:
        self.curriculum = curriculum
        self.prompts_per_step = prompts_per_step
        self._sizes, self._seed, self._draws = tuple(sizes), seed, draws
        self._made: tuple[int, np.ndarray] | None = None  # the epoch made last, which the next step mostly needs again

    @property
    def epoch_length(self) -> int:
        """L, the number of draws of an epoch."""
        return sum(self._sizes if self._draws is None else self._draws)

    def epochs(self, position: int) -> float:
        """How often the rows were used up at a position."""
        return position / self.epoch_length

    def laid_out_for(self, prompts_per_step: int) -> "Order":
        """The order of a run that began with steps of another size, of the same rows and with the same curriculum."""
        return Order(self._sizes, self._seed, prompts_per_step, self._draws, self.curriculum)

    def step(self, step: int) -> list[int]:
        """The rows of step `step` (from 0) of a run that refills no group and has no curriculum: P distinct numbers."""
        return self.take(step * self.prompts_per_step, self.prompts_per_step)[0]

    def take(self, position: int, count: int, taken: Sequence[int] = ()) -> tuple[list[int], int]:
        """The next `count` rows, and the position after them.

        Args:
          position: the number of draws used up so far.
          taken: rows that are skipped, as are rows that this call has chosen.

        Raises:
          ValueError: there are fewer rows than a step takes.
        """
        check_enough_rows(sum(self._sizes), self.prompts_per_step)
        assert count <= sum(self._sizes) - len(taken), (count, self._sizes, len(taken))
        chosen: list[int] = []
        seen = set(taken)
        while len(chosen) < count:
            epoch, offset = divmod(position, self.epoch_length)
            rows, is_drawn = self._epoch(epoch), None
            if self.curriculum is not None:
                rows = self.curriculum.arrange(epoch, rows)
                is_drawn = self.curriculum.is_drawn(epoch, rows)
            for place in range(offset, len(rows)):
                position += 1
                row = int(rows[place])
                if row not in seen and (is_drawn is None or is_drawn[place]):
                    chosen.append(row)
                    seen.add(row)
                    if len(chosen) == count:
                        break
        return chosen, position

    def _epoch(self, epoch: int) -> np.ndarray:
        """The rows of an epoch, without the curriculum, int64 [L]."""
        if self._made is not None and self._made[0] == epoch:
            return self._made[1]
        order = self._shuffled_epoch(epoch)
        self._made = epoch, order
        return order

    def _shuffled_epoch(self, epoch: int) -> np.ndarray:
        if self._draws is None:
            return epoch_order(sum(self._sizes), self._seed, epoch, self.prompts_per_step)
        times, rows, start = [], [], 0
        for k, (size, draws) in enumerate(zip(self._sizes, self._draws, strict=True)):
            jitter = uniform(draws, self._seed, epoch, k + 1, 1)
            times.append((np.arange(draws) + jitter) / draws)
            rows.append(start + self._of_source(k, epoch * draws, draws))
            start += size
        return np.concatenate(rows)[np.argsort(np.concatenate(times), kind="stable")]

    def _of_source(self, k: int, first: int, count: int) -> np.ndarray:
        """Rows `first` to `first` + `count` of source k's own order, numbered inside of the source."""
        size = self._sizes[k]
        passes = range(first // size, (first + count - 1) // size + 1)
        whole = np.concatenate([self._pass(k, number) for number in passes])
        return whole[first - passes[0] * size :][:count]

    def _pass(self, k: int, number: int) -> np.ndarray:
        """A permutation of source k. No P draws in a row hold a row twice where it meets the pass before.

        A source of fewer than 2 P rows repeats one permutation. Otherwise a row that is i-th from the end of the pass
        before may stand at place P - i + 1 (from 1) at the earliest. The first P rows can always be put so: at most
        P - j of them must stand behind place j, since no two have the same i.
        """
        size, window = self._sizes[k], self.prompts_per_step
        if size < 2 * window:
            return permutation(size, self._seed, 0, k + 1)
        order = permutation(size, self._seed, number, k + 1)
        if number == 0:
            return order
        tail = permutation(size, self._seed, number - 1, k + 1)[size - window :]  # the repair leaves a tail as it is
        earliest = {int(row): place + 1 for place, row in enumerate(tail)}  # the last of the tail: place P
        waiting: dict[int, list[tuple[int, int]]] = {}
        for place, row in enumerate(order[:window].tolist()):
            waiting.setdefault(earliest.get(row, 1), []).append((place, row))
        ready: list[tuple[int, int]] = []
        head = []
        for place in range(1, window + 1):
            for entry in waiting.get(place, []):
                heapq.heappush(ready, entry)
            head.append(heapq.heappop(ready)[1])
        return np.concatenate([np.asarray(head, np.int64), order[window:]])


@overload
def order_of(
    section: DataSection, data: PairData, seed: int, prompts_per_step: int, key: str = "grpo.prompts_per_step"
) -> Order: ...


@overload
def order_of(
    section: DataSection, data: PromptData, seed: int, prompts_per_step: int, key: str = "grpo.prompts_per_step"
) -> Order | StreamOrder: ...


def order_of(
    section: DataSection,
    data: PromptData | PairData,
    seed: int,
    prompts_per_step: int,
    key: str = "grpo.prompts_per_step",
) -> Order | StreamOrder:
    """The order of the training rows that a configuration asks for. `key` names the number of rows of a step.

    Raises:
      ValueError: a source of a mixture has fewer rows than a step may draw of it, or a curriculum lacks its column.
    """
    if isinstance(data, PromptData) and data.stream is not None:
        return StreamOrder(data.stream, seed, prompts_per_step)
    num_rows = len(data.train if isinstance(data, PromptData) else data.rows)
    sizes = data.sizes or [num_rows]
    draws = draws_per_epoch(section, sizes)
    if draws is not None:
        length = sum(draws)
        for entry, size, count in zip(section.sources, sizes, draws, strict=True):
            # In any part of an epoch the times of n draws give up to 2 more or fewer than their share.
            most = min(prompts_per_step, math.floor((prompts_per_step + 4 * len(sizes)) * count / length) + 4)
            if size < most:
                raise ValueError(
                    f"data.sources: {entry.label!r} must hold at least {most} rows to train on, which a "
                    f"step may draw of it, got {size}; lower its share or {key}, or add rows"
                )
    curriculum = None
    if section.curriculum.by is not None:
        if not isinstance(data, PromptData):
            raise ValueError(
                f"data.curriculum.by must be null for supervised fine-tuning, got {section.curriculum.by!r}; it is for "
                "grpo train"
            )
        curriculum = Curriculum(section.curriculum, data.train, seed)
    return Order(sizes, seed, prompts_per_step, draws, curriculum)


def draws_per_epoch(section: DataSection, sizes: Sequence[int]) -> list[int] | None:
    """How many draws each source of a mixture has in an epoch; None where each row is drawn once.

    Counts are taken as they are. By weights, or by rows ** (1 / T) with a temperature T (https://arxiv.org/abs/1907.05019,
    section 3), an epoch has as many draws as there are rows, at least one of each source.
    """
    if section.mixture_temperature is not None:
        # Of the largest 1, because a small T makes numbers that no float holds.
        weights = [(size / max(sizes)) ** (1 / section.mixture_temperature) for size in sizes]
    elif section.sources and section.sources[0].count is not None:
        return [_given(entry.count) for entry in section.sources]
    elif section.sources and section.sources[0].weight is not None:
        weights = [_given(entry.weight) for entry in section.sources]
    else:
        return None
    shares = [sum(sizes) * weight / sum(weights) for weight in weights]
    draws = [math.floor(share) for share in shares]
    by_rest = sorted(range(len(shares)), key=lambda k: draws[k] - shares[k])
    for k in by_rest[: sum(sizes) - sum(draws)]:
        draws[k] += 1
    return [max(1, count) for count in draws]


def _given(value: Any) -> Any:
    assert value is not None  # `rl.config.rules`: on each or on none
    return value
