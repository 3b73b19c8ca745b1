"""Which rows a run takes first, or more often, by how easy they are: `data.curriculum`.

In: a number for each training row, from a column of the data or measured in the run, and the rows of an epoch in the
run's order. Out: these rows from easy to hard, or which of them are drawn. A measured number is a pass rate: the mean
over a group of the reward that counts, cut to 0..1. A group whose rewards are all equal teaches nothing, so rows with
pass rates in a band are worth more (https://arxiv.org/abs/2503.14476, section 3.2, drops the others after drawing).

Everything follows from the seed, the epoch and the numbers, and the measured ones are in the checkpoint.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from rl.config.sections import CurriculumSection
from rl.data.prompt_rows import PromptRow
from rl.data.shuffle import uniform
from rl.data.sources import list_columns
from rl.files.json_file import shown

PASS_RATE = "pass_rate"  # value of data.curriculum.by: measured, beginning with the column of that name if there is one
_UNKNOWN = 0.5  # how easy a row is taken to be that was never measured
_COIN = 7  # of the words that seed the numbers that decide about rows outside of the band


class Curriculum:
    """What is known of each training row, and what follows from it.

    Args:
      rows: the training rows [N].

    Raises:
      ValueError: the column is missing, or holds what is no number, or a pass rate that is no share.
    """

    def __init__(self, section: CurriculumSection, rows: Sequence[PromptRow], seed: int) -> None:
        self._section, self._seed, self._is_measured = section, seed, section.by == PASS_RATE
        self._values = np.array([_value(row, str(section.by), self._is_measured) for row in rows], np.float64)
        self._noted: dict[int, float] = {}
        self._epoch, self._at_start = -1, self._values

    def notes(self) -> list[str]:
        """What the start of a run is to say: that no row is in the band."""
        if self._section.mode != "band" or self._in_band().any():
            return []
        low, high = self._section.band
        values = f"{self._values.min():g} to {self._values.max():g}"
        text = (
            f"data.curriculum.band holds no row: column {self._section.by!r} has {values}, and the band is {low:g} to "
        )
        return [f"{text}{high:g}; every row is drawn by data.curriculum.floor alone"]

    def arrange(self, epoch: int, rows: np.ndarray) -> np.ndarray:
        """The rows of an epoch in the order in which they have their turn. Easy to hard is by what was known when the
        epoch began; rows that are equally easy keep the run's order.
        """
        if self._section.mode != "easy_to_hard":
            return rows
        if epoch > self._epoch:
            self._epoch, self._at_start = epoch, self._values.copy()
        values = np.where(np.isnan(self._at_start), _UNKNOWN, self._at_start)[rows]
        return rows[np.argsort(values if self._section.easy_values == "low" else -values, kind="stable")]

    def is_drawn(self, epoch: int, rows: np.ndarray) -> np.ndarray:
        """Whether each turn of an epoch is used, bool, by the chance of its row, the seed, the epoch and the turn's
        place.
        """
        if self._section.mode != "band":
            return np.ones(len(rows), bool)
        return uniform(len(rows), self._seed, epoch, 0, _COIN) < self._chances()[rows]

    def note(self, rates: Mapping[int, float]) -> None:
        """Takes pass rates, {row: rate}, that count from `end_step` on, so that refills of a step see no change."""
        if self._is_measured:
            self._noted |= rates

    def end_step(self) -> None:
        """Takes over what was noted. A row that was measured before keeps the share `memory` of its number."""
        memory = self._section.memory
        for row, rate in self._noted.items():
            before = self._values[row]
            self._values[row] = rate if math.isnan(before) else memory * before + (1 - memory) * rate
        self._noted = {}

    def metrics(self) -> dict[str, float]:
        """Shares of all training rows: with a number, and inside of the band."""
        known = ~np.isnan(self._values)
        inside = {"curriculum/in_band": float((self._in_band() & known).mean())} if self._section.mode == "band" else {}
        return {"curriculum/known": float(known.mean()), **inside}

    @property
    def state(self) -> dict[str, Any]:
        """What was measured, as JSON values for `restore`; empty where nothing is measured."""
        if not self._is_measured:
            return {}
        state: dict[str, Any] = {"rates": _known(self._values)}
        if self._section.mode == "easy_to_hard":
            state |= {"epoch": self._epoch, "rates_at_start": _known(self._at_start)}
        return state

    def restore(self, state: Mapping[str, Any]) -> None:
        """Goes on from the `state` of an earlier part of the run (empty: from its start)."""
        if not state:
            return
        self._values = _array(state["rates"], len(self._values))
        if "epoch" in state:
            self._epoch, self._at_start = state["epoch"], _array(state["rates_at_start"], len(self._values))

    def _chances(self) -> np.ndarray:
        """The chance of each row to be used in its turn: 1 in the band, else the floor. Of pass rates it falls to the
        floor in a straight line, from the band to 0 and to 1: a prompt that is right nine times of ten still gives a
        spread in most groups of eight.
        """
        low, high = self._section.band
        chances = np.where(self._in_band(), 1.0, 0.0)
        if self._is_measured:
            below, above = (self._values < low) & (low > 0), (self._values > high) & (high < 1)
            chances[below] = self._values[below] / low
            chances[above] = (1 - self._values[above]) / (1 - high)
        return self._section.floor + (1 - self._section.floor) * chances

    def _in_band(self) -> np.ndarray:
        """Rows whose number is in the band, or that have none yet."""
        low, high = self._section.band
        return np.isnan(self._values) | ((self._values >= low) & (self._values <= high))


def _value(row: PromptRow, column: str, may_miss: bool) -> float:
    """The number in a column; NaN for a row without one."""
    if column not in row.columns and not may_miss:
        raise ValueError(
            f"data.curriculum.by must be {PASS_RATE} or a column of the data, got {column!r}"
            f"{list_columns(column, row.columns)}"
        )
    value = row.columns.get(column)
    if value is None and may_miss:
        return math.nan
    try:
        number = math.nan if isinstance(value, bool) or value is None else float(value)  # a cell of a CSV file is text
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        raise ValueError(
            f"{row.where}: column {column!r} must hold a number, by which data.curriculum orders rows, got "
            f"{shown(value)}; data.curriculum.by=null does without"
        )
    if may_miss and not 0 <= number <= 1:
        raise ValueError(
            f"{row.where}: column {column!r} must hold a share from 0 to 1, got {shown(value)}; divide percentages by "
            "100, or give the column another name, which data.curriculum.by takes for any numbers"
        )
    return number


def _known(values: np.ndarray) -> dict[str, float]:
    return {str(row): float(values[row]) for row in np.flatnonzero(~np.isnan(values)).tolist()}


def _array(rates: Mapping[str, float], size: int) -> np.ndarray:
    values = np.full(size, np.nan)
    for row, rate in rates.items():
        values[int(row)] = rate
    return values
