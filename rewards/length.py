"""Reward: a soft limit on the length of a completion."""

from collections.abc import Sequence
from typing import Any, Literal

from rewards.contract import elementwise
from rewards.text import completion_text


@elementwise
def length_penalty(
    prompts: Sequence[Any],
    completions: Sequence[Any],
    limit: int,
    buffer: int,
    completion_ids: Sequence[Sequence[int]] | None = None,
    unit: Literal["tokens", "characters"] = "tokens",
    **kwargs: Any,
) -> list[float]:
    """Soft overlong punishment (DAPO, section 3.4 of https://arxiv.org/abs/2503.14476): one number in [-1, 0] each.

        0                                   length <= limit - buffer
        (limit - buffer - length) / buffer  limit - buffer < length <= limit
        -1                                  length > limit

    limit: L_max of the paper; buffer: L_cache, the width of the ramp; both in `unit`. A length in tokens needs
    `completion_ids` (the runner and TRL pass them; Tunix does not: use unit="characters" there).
    Raises ValueError unless 0 < buffer <= limit, for an unknown unit, and when tokens are asked for and not given.
    """
    if not 0 < buffer <= limit:
        raise ValueError(f"length_penalty needs 0 < buffer <= limit, got buffer={buffer}, limit={limit}")
    if unit == "tokens":
        if completion_ids is None:
            raise ValueError(
                'length_penalty in tokens needs completion_ids, got none; pass them or use unit="characters"'
            )
        lengths = [len(ids) for ids in completion_ids]
    elif unit == "characters":
        lengths = [len(completion_text(completion)) for completion in completions]
    else:
        raise ValueError(f'length_penalty unit must be "tokens" or "characters", got {unit!r}')
    return [soft_overlong(length, limit, buffer) for length in lengths]


def soft_overlong(length: float, limit: float, buffer: float) -> float:
    """The punishment of one completion; see `length_penalty`."""
    if length > limit:
        return -1.0
    return min(0.0, (limit - buffer - length) / buffer)
