"""What a person may want to see of a step beside its metrics and samples: the spread of values, and one group."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np


class Member(NamedTuple):
    """A completion of a group.

    Attributes:
      text: the completion. num_tokens: those that the policy drew.
      rewards: one for each function, None where it could not judge. reward: their weighted sum, or None.
      advantage: what it is trained with.
      finish_reason: why it ended.
    """

    text: str
    num_tokens: int
    rewards: Sequence[float | None]
    reward: float | None
    advantage: float
    finish_reason: str


class Group(NamedTuple):
    """A prompt with its completions. prompt: text or messages. names: of the reward functions. answer: the right one,
    None where the data has none.
    """

    prompt: Any
    answer: Any
    names: Sequence[str]
    members: Sequence[Member]


@dataclasses.dataclass(frozen=True)
class StepValues:
    """Values of one step.

    Attributes:
      histograms: {name: finite values, one for each completion that has one}.
      group: one of the step's groups; None where there are none.
    """

    histograms: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)
    group: Group | None = None


NO_VALUES = StepValues()
