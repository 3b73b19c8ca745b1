"""Finds NaN and infinity in weights while they load.

In: an array on the host, in the type in which it will be used. Out: the same array, or a ValueError that names it. One
pass, without a copy. Imports no jax.
"""

from typing import Any

import numpy as np

# A number whose bits, without the sign, are at least these is infinite or NaN (float8_e4m3fn has no infinity).
_FIRST_NONFINITE = {
    "float64": 0x7FF0_0000_0000_0000,
    "float32": 0x7F80_0000,
    "float16": 0x7C00,
    "bfloat16": 0x7F80,
    "float8_e4m3fn": 0x7F,
}
_CHUNK = 1 << 17  # numbers


def as_finite(value: np.ndarray, dtype: Any, name: str, allow_nonfinite: bool) -> np.ndarray:
    """`value` in `dtype`, checked as in `check_finite` unless `allow_nonfinite`.

    Raises:
      ValueError: NaN or infinity, in the file or because the number is too large for `dtype`.
    """
    # A wider type keeps every number, so the check runs before the conversion, on fewer bytes.
    widens = np.dtype(dtype).itemsize > value.dtype.itemsize
    if widens and not allow_nonfinite:
        check_finite(value, name)
    with np.errstate(over="ignore", invalid="ignore"):  # the check below names it
        value = value.astype(dtype, copy=False)
    return value if widens or allow_nonfinite else check_finite(value, name)


def check_finite(value: np.ndarray, name: str) -> np.ndarray:
    """Returns `value`, if all its entries are finite.

    Args:
      value: of a type in `_FIRST_NONFINITE`, or integers.
      name: what the array is and where it comes from, the subject of the message.

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
    # Bits as integers are ordered as the numbers are, with and without the sign bit, so the two largest ones decide.
    bits = 8 * value.dtype.itemsize
    flat = value.reshape(-1, order="A")
    signed, unsigned = flat.view(f"int{bits}"), flat.view(f"uint{bits}")
    for start in range(0, flat.size, _CHUNK):  # a chunk stays in the processor's cache for the second look
        part = slice(start, start + _CHUNK)
        if signed[part].max() >= first or unsigned[part].max() >= first + (1 << (bits - 1)):
            return False
    return True
