"""The rounding loss of merged adapters, kept in a file beside the merged weights.

In: a base, adapters, and the weights that `rl.models.lora.merge` made of them. Out: the base again, bit for bit.

Merging rounds W + scale A B once to the stored dtype. Subtracting scale A B and rounding again gives W in most places,
and a neighbour of it in the others. The remainder lists those others, with the value of W. It also lists places where
another machine's float64 products might change the rounding, so the result does not depend on the machine. A digest of
the base shows whether the file belongs to these weights and this adapter.
"""

import hashlib
import json
import pathlib
import zipfile
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rl.models.config import LORA_A, LORA_B, ModelConfig, leaf_at
from rl.models.lora import Params, join, merge_each, to_float64, unmerge

REMAINDER_FILE = "lora_remainder.npz"
_FORMAT = 1


class Remainder(NamedTuple):
    """The places where `unmerge` does not give the base, and the base's values there.

    Attributes:
      dtype: of the merged weights and the base: float32, bfloat16 or float16.
      places: {kernel's path, joined by slashes: positions in the flattened kernel, uint32 or int64 [N]}.
      bits: {kernel: the base's values there, as unsigned integers [N] of the dtype's size}.
      digest: SHA-256 of all adapted kernels of the base, in `dtype` and in the order of their names.
    """

    dtype: str
    places: dict[str, np.ndarray]
    bits: dict[str, np.ndarray]
    digest: str


def merge_with_remainder(config: ModelConfig, params: Mapping[str, Any], dtype: str) -> tuple[Params, Remainder]:
    """The merged weights of base and adapters `params`, and the remainder for `restore_base`.

    Args:
      dtype: the stored type of the merged weights and of the restored base.
    """
    lora, digest = config.lora, hashlib.sha256()
    assert lora is not None
    places: dict[str, np.ndarray] = {}
    bits: dict[str, np.ndarray] = {}

    def visit(name: str, module: Mapping[str, Any], product: np.ndarray, kernel: np.ndarray) -> None:
        a, b, scale = to_float64(module[LORA_A]), to_float64(module[LORA_B]), lora.scale
        base = _as_bits(_stored(config, to_float64(module["kernel"]), dtype))
        difference = to_float64(_stored(config, kernel, dtype)) - product
        # Two orders of the same sum of R products differ by less than R units of its largest partial sum.
        rank = a.shape[-1]
        slack = abs(scale) * rank**2 * np.finfo(np.float64).eps * np.max(np.abs(a)) * np.max(np.abs(b))
        differs = np.zeros(base.shape, bool)
        for nearby in (difference - slack, difference + slack):
            differs |= _as_bits(_stored(config, nearby, dtype)) != base
        found = np.flatnonzero(differs)
        places[name] = found.astype(np.uint32) if base.size <= 1 << 32 else found
        bits[name] = base[found]
        digest.update(base.data)

    merged = merge_each(config, params, 1, visit)
    return merged, Remainder(dtype, places, bits, digest.hexdigest())


def restore_base(
    config: ModelConfig, merged: Mapping[str, Any], adapters: Mapping[str, Any], remainder: Remainder
) -> Params:
    """The base (numpy) from which `merged` was made, bit for bit in the remainder's dtype.

    Raises:
      ValueError: the remainder belongs to other weights or another adapter.
    """
    base, digest = unmerge(config, merged, adapters), hashlib.sha256()
    names = [name for name, _ in _adapted_modules(join(adapters, merged))]
    fits = names == sorted(remainder.places)
    for name in names if fits else ():
        module = leaf_at(base, tuple(name.split("/")))
        stored = _stored(config, module["kernel"], remainder.dtype)
        bits, places = _as_bits(stored).copy(), remainder.places[name]
        fits = fits and (not places.size or int(places.max()) < bits.size)
        if fits:
            bits[places] = remainder.bits[name]
        digest.update(bits.data)
        module["kernel"] = bits.view(stored.dtype).reshape(stored.shape)
    if not fits or digest.hexdigest() != remainder.digest:
        raise ValueError(
            f"{REMAINDER_FILE} must be of these weights and this adapter, got one of others (weights were changed "
            "after merging, or another adapter was merged); remove it to subtract without it, to a unit in the last "
            "place"
        )
    return base


def write_remainder(remainder: Remainder, folder: pathlib.Path) -> None:
    """Writes the file into a folder."""
    header = {"format": _FORMAT, "dtype": remainder.dtype, "digest": remainder.digest}
    arrays = {f"{name}:places": array for name, array in remainder.places.items()}
    arrays |= {f"{name}:bits": array for name, array in remainder.bits.items()}
    arrays["header"] = np.array(json.dumps(header))
    np.savez(folder / REMAINDER_FILE, **arrays)  # pyright: ignore[reportArgumentType] (no array is "allow_pickle")


def read_remainder(folder: str | pathlib.Path) -> Remainder | None:
    """The remainder in a folder, None if there is none; ValueError if its file is damaged."""
    file = pathlib.Path(folder) / REMAINDER_FILE
    if not file.exists():
        return None
    try:
        with file.open("rb") as stream, np.load(stream, allow_pickle=False) as arrays:
            header = json.loads(str(arrays["header"]))
            if header["format"] != _FORMAT:
                raise ValueError(f"format must be {_FORMAT}, got {header['format']!r}")
            names = [name.removesuffix(":places") for name in arrays.files if name.endswith(":places")]
            places, bits = ({name: arrays[f"{name}:{kind}"] for name in names} for kind in ("places", "bits"))
            return Remainder(header["dtype"], places, bits, header["digest"])
    except (ValueError, KeyError, EOFError, OSError, zipfile.BadZipFile) as error:
        raise ValueError(
            f"{file} cannot be read ({error}); remove it to subtract without it, to a unit in the last place"
        ) from error


def _adapted_modules(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Mapping[str, Any]]]:
    """(path, module) of all modules with adapters, in the order of their paths."""
    for name in sorted(tree):
        child = tree[name]
        if isinstance(child, Mapping):
            if LORA_A in child:
                yield prefix + name, child
            yield from _adapted_modules(child, f"{prefix}{name}/")


def _stored(config: ModelConfig, value: Any, dtype: str) -> np.ndarray:
    """The value after it was written from `config.param_dtype` to a folder of `dtype` and read back."""
    return np.asarray(jax.device_get(value)).astype(jnp.dtype(config.param_dtype)).astype(jnp.dtype(dtype))


def _as_bits(array: np.ndarray) -> np.ndarray:
    """The flattened array as unsigned integers with the size of its dtype."""
    return np.ascontiguousarray(array).reshape(-1).view(f"u{array.itemsize}")
