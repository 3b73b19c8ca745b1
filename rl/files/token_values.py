"""One number for each token of a sample, in one byte: for files that keep many samples.

In: numbers. Out: a small JSON object with base64 text, and the numbers back. A code c from -127 to 127 stands for
sign(c) * (c / 127)^2 * largest, so small numbers keep more digits than large ones: the error is at most 1/126 of the
largest number for large ones, and falls with the square root of the number. -128 stands for "unknown" (NaN).
The page of `grpo report` decodes the same in JavaScript.
"""

import base64
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

STEPS = 127
UNKNOWN = -128


def encode(values: Sequence[float] | np.ndarray) -> dict[str, Any]:
    """{"largest": float, "codes": base64 of an int8 for each number}. Infinities become unknown, as NaN is."""
    numbers = np.asarray(values, np.float64).reshape(-1)
    known = np.isfinite(numbers)
    largest = float(np.max(np.abs(numbers[known]), initial=0.0))
    largest = float(f"{largest:.6g}") or 0.0
    shares = np.zeros(numbers.shape) if largest == 0 else np.clip(np.where(known, numbers, 0) / largest, -1, 1)
    codes = np.where(known, np.rint(np.sign(shares) * np.sqrt(np.abs(shares)) * STEPS), UNKNOWN).astype(np.int8)
    return {"largest": largest, "codes": base64.b64encode(codes.tobytes()).decode("ascii")}


def decode(entry: Mapping[str, Any]) -> np.ndarray:
    """float64 [tokens], NaN where the number is unknown. ValueError where the entry is not what `encode` makes."""
    try:
        codes = np.frombuffer(base64.b64decode(entry["codes"], validate=True), np.int8).astype(np.float64)
        largest = float(entry["largest"])
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"values of tokens must be {{largest, codes}}, got {str(entry)[:80]!r} ({error})") from error
    if not math.isfinite(largest):
        raise ValueError(f"largest of values of tokens must be finite, got {largest}")
    return np.where(codes == UNKNOWN, math.nan, np.sign(codes) * (codes / STEPS) ** 2 * largest)
