"""Reward: a soft limit on the length of a completion."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from rewards.contract import elementwise
from rewards.settings import Settings, number, one_of
from rewards.text import completion_text


def _together(given: Mapping[str, Any]) -> None:
    if "limit" in given and "buffer" in given and given["buffer"] > given["limit"]:
        raise ValueError(f"buffer must be at most limit, got buffer={given['buffer']} and limit={given['limit']}")


_ABOVE_0 = number("> 0", lambda value: value > 0)
_SETTINGS = Settings(_together, limit=_ABOVE_0, buffer=_ABOVE_0, unit=one_of("tokens", "characters"))


@elementwise
@_SETTINGS.mark
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
    _SETTINGS.check(limit=limit, buffer=buffer, unit=unit)
    if unit == "tokens":
        if completion_ids is None:
            raise ValueError(
                'length_penalty in tokens needs completion_ids, got none; pass them or use unit="characters"'
            )
        lengths = [len(ids) for ids in completion_ids]
    else:
        lengths = [len(completion_text(completion)) for completion in completions]
    return [soft_overlong(length, limit, buffer) for length in lengths]


def soft_overlong(length: float, limit: float, buffer: float) -> float:
    """The punishment of one completion; see `length_penalty`."""
    if length > limit:
        return -1.0
    return min(0.0, (limit - buffer - length) / buffer)
