"""Whether the numbers that were read from a file are numbers: NaN and infinity in weights are found while they load.

In: an array on the host, in the type that it will be used in. Out: the same array, or a ValueError that names what it
is. One pass that makes no copy. Imports no jax.
"""

from typing import Any

import numpy as np

# From these bits on, the sign aside, a number is infinite or NaN (float8_e4m3fn: NaN, it has no infinity).
_FIRST_NONFINITE = {
    "float64": 0x7FF0_0000_0000_0000,
    "float32": 0x7F80_0000,
    "float16": 0x7C00,
    "bfloat16": 0x7F80,
    "float8_e4m3fn": 0x7F,
}
_CHUNK = 1 << 17  # numbers


def as_finite(value: np.ndarray, dtype: Any, name: str, allow_nonfinite: bool) -> np.ndarray:
    """`value` in `dtype`, checked as of `check_finite` unless all numbers are allowed.

    Raises:
      ValueError: NaN or infinity, in the file or because `dtype` does not reach so far.
    """
    # A wider type takes every number as it is: there are fewer bytes to look at before.
    widens = np.dtype(dtype).itemsize > value.dtype.itemsize
    if widens and not allow_nonfinite:
        check_finite(value, name)
    with np.errstate(over="ignore", invalid="ignore"):  # said here, by name
        value = value.astype(dtype, copy=False)
    return value if widens or allow_nonfinite else check_finite(value, name)


def check_finite(value: np.ndarray, name: str) -> np.ndarray:
    """`value` itself.

    Args:
      value: of a type of `_FIRST_NONFINITE`, or of integers.
      name: of what it is and where it comes from, the subject of the message.

    Raises:
      ValueError: an entry is NaN or infinite.
    """
    if not is_finite(value):
        with np.errstate(invalid="ignore"):
            bad = ~np.isfinite(value.astype(np.float64))
        place = tuple(int(i) for i in np.argwhere(bad)[0])
        raise ValueError(
            f"{name} must hold finite numbers, got {int(bad.sum())} of {value.size} that are NaN or infinite, the "
            f"first at {list(place)}, read as {value.dtype}; fetch the weights again, or set model.allow_nonfinite=true"
        )
    return value


def is_finite(value: np.ndarray) -> bool:
    """Whether no entry is NaN or infinite."""
    first = _FIRST_NONFINITE.get(value.dtype.name)
    if first is None or not value.size:
        return True
    # The order of the bits as integers is that of the numbers, with and without the sign bit: two largest ones decide.
    bits = 8 * value.dtype.itemsize
    flat = value.reshape(-1, order="A")
    signed, unsigned = flat.view(f"int{bits}"), flat.view(f"uint{bits}")
    for start in range(0, flat.size, _CHUNK):  # what the first look takes from memory is near for the second
        part = slice(start, start + _CHUNK)
        if signed[part].max() >= first or unsigned[part].max() >= first + (1 << (bits - 1)):
            return False
    return True
