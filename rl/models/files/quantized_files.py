"""Files of `grpo quantize` for models that are not the toolkit's own decoder, with the parameters' own names.

In: parameters one by one, or a folder. Out: tensors for a safetensors file, or the parameter tree on a mesh, quantised
as stored. Not here: which parameters are quantised and how (`rl.models.quantized`), the files of the toolkit's own
decoder (`rl.models.files.hf`).
"""

import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rl.models.config import ForeignConfig, Quantization, flatten_specs, leaf_at
from rl.models.files.finite import as_finite
from rl.models.files.folders import open_tensors, set_leaf
from rl.models.files.hf import FLOAT_TYPES, QUANTIZED_TYPES, SCALE, check_quantized, place, tensor_locations
from rl.models.ops import dtype_of
from rl.models.quantized import QuantizedArray, check_patterns, is_chosen, pack, scale_shape, unpack

Params = dict[str, Any]
Path = tuple[str, ...]


def stored_form(path: Path, value: Any) -> dict[str, np.ndarray]:
    """{name: tensor} for one parameter: NAME, and NAME_scale if it is quantised. int4 values are flat, two in
    a byte.
    """
    name, value = "/".join(path), jax.device_get(value)
    if not isinstance(value, QuantizedArray):
        return {name: np.ascontiguousarray(value)}
    values = np.asarray(value.values)
    if values.dtype == jnp.int4:
        values = np.pad(values.astype(np.int8).reshape(-1), (0, values.size % 2)).astype(jnp.int4)
    return {name: np.ascontiguousarray(pack(values)), name + SCALE: np.ascontiguousarray(value.scale)}


def check_weights(folder: pathlib.Path, config: ForeignConfig) -> dict[str, pathlib.Path]:
    """{tensor: file} of a folder, after a comparison of the files' headers with `config`. ValueError names what is
    missing, extra or of another form.
    """
    check_patterns(config)
    locations, wanted = tensor_locations(folder), _forms(config)
    problems = [f"missing {name}" for name in sorted(wanted.keys() - locations.keys())]
    problems += [f"unexpected {name}" for name in sorted(locations.keys() - wanted.keys())]
    for name in sorted(wanted.keys() & locations.keys()):
        shape, types = wanted[name]
        with open_tensors(locations[name]) as tensors:
            view = tensors.get_slice(name)
            got = (tuple(view.get_shape()), view.get_dtype())
        if got[0] != shape or got[1] not in types:
            problems.append(f"{name} must be {' or '.join(types)} {list(shape)}, got {got[1]} {list(got[0])}")
    if problems:
        raise ValueError(
            f"{folder} must hold the parameters that grpo quantize writes for this model.source: "
            f"{'; '.join(problems[:8])}"
        )
    return locations


def load_params(folder: pathlib.Path, config: ForeignConfig, shardings: Any, allow_nonfinite: bool = False) -> Params:
    """The parameter tree in a folder, placed by `shardings`. Quantised parameters stay so; others get
    `config.param_dtype`.

    ValueError as in `check_weights`, and, unless `allow_nonfinite`, for NaN and infinity.
    """
    assert config.quantization is not None
    locations, params = check_weights(folder, config), {}
    for path, spec in flatten_specs(config.specs):
        value, name = _read(locations, "/".join(path)), "/".join(path)
        name = f"{locations[name]}: tensor {name}"
        if is_chosen(config, config.quantization, path):
            values = unpack(value, config.quantization.dtype).reshape(-1)[: np.prod(spec.shape)].reshape(spec.shape)
            value = QuantizedArray(values, _read(locations, "/".join(path) + SCALE))  # pyright: ignore[reportArgumentType]
            check_quantized(value, name, allow_nonfinite)
        else:
            value = as_finite(value, dtype_of(config.param_dtype), name, allow_nonfinite)
        set_leaf(params, path, place(config, path, value, leaf_at(shardings, path)))  # pyright: ignore[reportArgumentType]
    return params


def _read(locations: Mapping[str, pathlib.Path], name: str) -> np.ndarray:
    with open_tensors(locations[name]) as tensors:
        return tensors.get_tensor(name)


def _forms(config: ForeignConfig) -> dict[str, tuple[tuple[int, ...], tuple[str, ...]]]:
    """Shape and allowed types of every tensor."""
    quantization, forms = config.quantization, {}
    assert isinstance(quantization, Quantization)
    for path, spec in flatten_specs(config.specs):
        name = "/".join(path)
        if not is_chosen(config, quantization, path):
            forms[name] = (spec.shape, FLOAT_TYPES)
            continue
        size = int(np.prod(spec.shape))
        forms[name] = (
            ((size + 1) // 2,) if quantization.dtype == "int4" else spec.shape,
            QUANTIZED_TYPES[quantization.dtype],
        )
        forms[name + SCALE] = (scale_shape(spec.shape, spec.contract_dims, quantization.group_size), ("F32",))
    return forms
