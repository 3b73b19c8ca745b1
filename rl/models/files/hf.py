"""Hugging Face folders: weights in and out, and where a folder comes from.

In: a folder or a hub id. Out: the parameter tree of `rl.models.config.base_specs`, or a ValueError that names the file
and the tensor. No weight is silently missing, extra, reshaped or left at an initial value. `rl.models.files.hf_config`
reads and writes `config.json`.
"""

import dataclasses
import functools
import hashlib
import math
import pathlib
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from rl.errors import missing
from rl.files.json_file import briefly, check_files, read_object, shown
from rl.files.stores import local_copy
from rl.models.config import (
    A_LOG,
    DT_BIAS,
    LAYER_SCALAR,
    TAPS,
    ModelConfig,
    ParameterSpec,
    base_specs,
    flatten_specs,
    leaf_at,
    spec_at,
)
from rl.models.files.finite import as_finite, check_finite
from rl.models.files.folders import new_folder, open_tensors, put_shards, save_tensors, set_leaf, write_json
from rl.models.files.hf_config import config_json, generation_json, read_config
from rl.models.lora import freeze_leaf
from rl.models.ops import dtype_of
from rl.models.quantized import QuantizedArray, check_patterns, is_chosen, pack, scale_shape, unpack

__all__ = ["load_params", "read_config", "resolve_source", "save_folder", "weights_hash"]

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
_FILE_NAME = re.compile(r"[\w.-]+\.safetensors")
SCALE = "_scale"  # added to a quantised tensor's name for the name of its scale
FLOAT_TYPES = ("F64", "F32", "F16", "BF16")
QUANTIZED_TYPES = {"int8": ("I8",), "int4": ("U8",), "float8_e4m3fn": ("U8",)}
SHAPE_PATTERNS = ("*.json", "*.model", "*.txt", "*.jinja")  # of a hub repository or a folder: all but weights
HUB_PATTERNS = (*SHAPE_PATTERNS, "*.safetensors")
_RULE = "a Hugging Face folder or a hub id that this machine can reach"
# {what: the tensors of a folder that the text model does not compute}, under the names of a text model.
_UNREAD = {
    "images": (
        r"(model\.)?(visual|vision_tower|vision_model|vision_encoder|multi_modal_projector|embed_vision|patch_merger)\..+"
    ),
    "audio": r"(model\.)?(audio_tower|embed_audio)\..+",
    "the prediction of several tokens": r"(model\.)?mtp\..+",
}
# How multimodal files begin the names of their text model: the newer and the older form.
_TEXT_PREFIXES = {"model.language_model.": "model.", "language_model.": ""}


class Locations(dict[str, pathlib.Path]):
    """{tensor: file} of a folder, under the names of a text model.

    Attributes:
      stored: {tensor: its name in the file}, where the two differ.
      skipped: {what: number of tensors} of those that the text model does not compute.
    """

    def __init__(self) -> None:
        super().__init__()
        self.stored: dict[str, str] = {}
        self.skipped: dict[str, int] = {}

    def stored_name(self, name: str) -> str:
        """The name in the file."""
        return self.stored.get(name, name)


# Where a folder comes from


def resolve_source(
    source: str | pathlib.Path, patterns: Sequence[str] = HUB_PATTERNS, what: str = "model.source"
) -> pathlib.Path:
    """The local folder of a model: `source` itself if it is a folder, else the hub repository of that name, whose files
    that match `patterns` are downloaded. what: names the source, for messages.

    Raises ValueError if the source is neither, if the hub cannot be reached and this machine has no copy, or if a pipe
    or a device lies in the folder.
    """
    path = local_copy(source)
    if path.is_dir():
        check_files(path)
        return path
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?", str(source)):
        raise missing(what, _RULE, source)
    import httpx
    import huggingface_hub
    from huggingface_hub import errors

    try:
        return pathlib.Path(huggingface_hub.snapshot_download(str(source), allow_patterns=list(patterns)))
    except (errors.HfHubHTTPError, errors.LocalEntryNotFoundError, httpx.HTTPError, OSError) as error:
        raise missing(what, _RULE, source, f"the hub says: {briefly(error)}") from error


def weights_hash(folder: str | pathlib.Path, full_bytes: int = 4 << 30) -> str:
    """Hex sha256 over config.json and the safetensors files, by which a checkpoint identifies a model.

    Up to `full_bytes` in total, files are read whole. Above that, the hash covers each file's name, size, first MiB
    (the header) and 64 evenly spaced MiB.
    """
    folder = pathlib.Path(folder)
    return content_hash(folder, _weight_files(folder), full_bytes)


def content_hash(folder: pathlib.Path, files: list[pathlib.Path], full_bytes: int = 4 << 30) -> str:
    """`weights_hash` over the config.json of a folder and the given files with weights."""
    whole = sum(file.stat().st_size for file in files) <= full_bytes
    digest = hashlib.sha256((folder / "config.json").read_bytes())
    for file in files:
        size = file.stat().st_size
        digest.update(f"{file.name}:{size}".encode())
        chunk = 1 << 20
        spaced = range(0, size, chunk) if whole else sorted({i * max(size - chunk, 0) // 64 for i in range(65)})
        with file.open("rb") as stream:
            for start in spaced:
                stream.seek(start)
                digest.update(stream.read(chunk))
    return digest.hexdigest()


# Weights in


def load_params(
    folder: str | pathlib.Path,
    config: ModelConfig,
    shardings: Any = None,
    allow_nonfinite: bool = False,
    head: Mapping[str, tuple[int, ...]] | None = None,
) -> dict[str, Any]:
    """The parameter tree of a folder as jax arrays in `config.param_dtype`, read tensor by tensor.

    For a model with adapters it is the base, and each weight takes the stored type of `config.lora` as soon as it is
    read. Quantised weights stay as they are stored.

    `shardings`: a tree like the parameters with a `jax.sharding.Sharding` at each leaf, or None for the default device.
    `head`: see `check_weights`; its tensors are not read. Raises ValueError for missing, extra or misshapen tensors,
    for types that are not floating point, for files that are missing or cut short, and, unless `allow_nonfinite`, for
    NaN and infinity, naming file and tensor.
    """
    param_dtype = dtype_of(config.param_dtype)
    locations = check_weights(folder, config, head)
    params: dict[str, Any] = {}
    for path, spec in flatten_specs(base_specs(config)):
        value, name = read_weight(locations, config, path, spec), tensor_name(path)
        if name not in locations and (part := fused_part(config, path)) is not None:
            name = part.name
        name = f"{locations[name]}: tensor {locations.stored_name(name)}"
        if isinstance(value, QuantizedArray):
            check_quantized(value, name, allow_nonfinite)
        else:
            value = as_finite(value, param_dtype, name, allow_nonfinite)
        set_leaf(params, path, place(config, path, value, leaf_at(shardings, path) if shardings else None))
    if head is None and config.tie_word_embeddings and "lm_head.weight" in locations:
        _check_tied(locations)
    return params


def check_weights(
    folder: str | pathlib.Path, config: ModelConfig, head: Mapping[str, tuple[int, ...]] | None = None
) -> Locations:
    """The file of every tensor in a folder, after checking against `config` what the files' headers say; reads no data.

    `head`: {tensor: shape} of a head that a model has in place of the one that gives logits. Raises ValueError for
    missing, extra or misshapen tensors, for types that are not floating point, and for files that are missing or cut
    short, naming file and tensor.
    """
    folder = pathlib.Path(folder)
    locations = _of_text(tensor_locations(folder), config)
    try:
        check_patterns(config)
        names = _stored_tensors(config, locations)
        names |= {name: (shape, FLOAT_TYPES) for name, shape in (head or {}).items()}
    except ValueError as error:  # a pattern that takes too long, or a group size that does not fit
        raise ValueError(f"{folder / 'config.json'}: {error}") from error
    _check_tensor_names(folder, names, locations, config)
    for file in sorted({locations[name] for name in names}):
        with open_tensors(file) as tensors:
            for name in sorted(name for name in names if locations[name] == file):
                stored = locations.stored_name(name)
                _check_tensor(tensors.get_slice(stored), file, stored, *names[name])
    return locations


def skipped_messages(folder: pathlib.Path, locations: Mapping[str, pathlib.Path]) -> list[str]:
    """What to say about tensors of a folder that the text model does not compute. `locations`: from
    `check_weights`.
    """
    skipped = locations.skipped if isinstance(locations, Locations) else {}
    return [f"{folder}: {count} tensors are not read: weights of {what}" for what, count in skipped.items()]


def _of_text(found: Mapping[str, pathlib.Path], config: ModelConfig) -> Locations:
    """The tensors under the names of a text model, without those that it does not compute."""
    shared = [i for i in range(config.num_layers) if config.kv_source(i) is not None]
    unread = dict(_UNREAD)
    if shared:
        layers = "|".join(map(str, shared))
        unread["keys and values in layers that read those of others"] = (
            rf"model\.layers\.({layers})\.self_attn\.(k_proj|v_proj|k_norm|v_norm)\..+"
        )
    patterns = {what: re.compile(pattern) for what, pattern in unread.items()}
    locations = Locations()
    for stored, file in found.items():
        name = next(
            (own + stored.removeprefix(prefix) for prefix, own in _TEXT_PREFIXES.items() if stored.startswith(prefix)),
            stored,
        )
        what = next((what for what, pattern in patterns.items() if pattern.fullmatch(name)), None)
        if what is not None:
            locations.skipped[what] = locations.skipped.get(what, 0) + 1
            continue
        if name in locations:
            raise ValueError(f"{file}: tensor {stored} must be stored once, {locations.stored_name(name)} is the same")
        locations[name] = file
        if name != stored:
            locations.stored[name] = stored
    return locations


def read_weight(
    locations: Mapping[str, pathlib.Path], config: ModelConfig, path: tuple[str, ...], spec: ParameterSpec
) -> np.ndarray | QuantizedArray:
    """One parameter of a folder, on the host and in its stored type. `locations` comes from `check_weights`."""
    name, quantization = tensor_name(path), config.quantization
    if name not in locations and (part := fused_part(config, path)) is not None:
        return _from_stored(_read(locations, part.name, slice(part.start, part.start + part.size)), path, spec.shape)
    value = _read(locations, name)
    if quantization is None or not is_chosen(config, quantization, path):
        return _from_stored(value, path, spec.shape)
    sizes = scale_shape(spec.shape, spec.contract_dims, quantization.group_size)
    values = _from_stored(unpack(value, quantization.dtype), path, spec.shape)
    scale = _from_stored(_read(locations, name + SCALE), path, sizes)
    return QuantizedArray(values, scale)  # pyright: ignore[reportArgumentType]


def _read(locations: Mapping[str, pathlib.Path], name: str, rows: slice | None = None) -> np.ndarray:
    stored = locations.stored_name(name) if isinstance(locations, Locations) else name
    # Opened anew for each tensor, because mapped parts of an open file count as memory.
    with open_tensors(locations[name]) as tensors:
        return tensors.get_tensor(stored) if rows is None else tensors.get_slice(stored)[rows]


class FusedPart(NamedTuple):
    """The rows [start, start + size) of a tensor that holds several matrices; `total` rows are all of it."""

    name: str
    start: int
    size: int
    total: int


def fused_part(config: ModelConfig, path: tuple[str, ...]) -> FusedPart | None:
    """Where a matrix lies in the files of its family's class; None: it is a tensor of its own."""
    module = ".".join(path[1:-1])
    for fused, modules in config.features.fused.items() if path[-1] in ("kernel", TAPS) else ():
        if module in modules:
            sizes = [
                _stored_shape((*other, path[-1]), spec_at(config, (*other, path[-1])).shape)[0]
                for other in ((path[0], *name.split(".")) for name in modules)
            ]
            i = modules.index(module)
            name = tensor_name((path[0], *fused.split("."), "kernel"))
            return FusedPart(name, sum(sizes[:i]), sizes[i], sum(sizes))
    return None


def _stored_tensors(
    config: ModelConfig, locations: Mapping[str, Any]
) -> dict[str, tuple[tuple[int, ...], tuple[str, ...]]]:
    """Shape and allowed types of every tensor of a folder. A quantised matrix is two tensors: values and scale.
    Matrices that the family's class stores as one may lie in the folder by themselves.
    """
    tensors = {}
    quantization = config.quantization
    for path, spec in flatten_specs(base_specs(config)):
        name, shape = tensor_name(path), _stored_shape(path, spec.shape)
        if name not in locations and quantization is None and (part := fused_part(config, path)) is not None:
            tensors[part.name] = ((part.total, *shape[1:]), FLOAT_TYPES)
            continue
        if quantization is None or not is_chosen(config, quantization, path):
            tensors[name] = (shape, FLOAT_TYPES)
            continue
        sizes = scale_shape(spec.shape, spec.contract_dims, quantization.group_size)
        packed = (*shape[:-1], shape[-1] // 2) if quantization.dtype == "int4" else shape
        tensors[name] = (packed, QUANTIZED_TYPES[quantization.dtype])
        tensors[name + SCALE] = (_stored_shape(path, sizes), ("F32",))
    return tensors


def check_quantized(value: QuantizedArray, name: str, allow_nonfinite: bool) -> None:
    """ValueError where a quantised weight (numpy) or its scale has NaN or infinity. `name` is the message's subject."""
    if not allow_nonfinite:
        for part, end in ((value.values, ""), (value.scale, SCALE)):
            check_finite(part, f"{name}{end}")  # pyright: ignore[reportArgumentType]


def place(config: ModelConfig, path: tuple[str, ...], value: np.ndarray | QuantizedArray, sharding: Any) -> Any:
    """Puts one weight on its devices (None: the default device), in the stored type of `config.lora`."""
    if isinstance(value, QuantizedArray):
        places = QuantizedArray(None, None) if sharding is None else sharding  # pyright: ignore[reportArgumentType]
        return QuantizedArray(put_shards(value.values, places.values), put_shards(value.scale, places.scale))
    if sharding is None:
        return freeze_leaf(config, path, jax.device_put(value))
    array = put_shards(value, sharding.values if isinstance(sharding, QuantizedArray) else sharding)
    if config.lora is None or config.lora.base_dtype is None:
        return array
    return jax.jit(functools.partial(freeze_leaf, config, path), out_shardings=sharding)(array)


def tensor_name(path: tuple[str, ...]) -> str:
    """The Hugging Face name of the parameter at `path`."""
    *modules, leaf = path
    modules = [re.sub(r"^layers_(\d+)$", r"layers.\1", module) for module in modules]
    suffix = leaf if leaf in ("bias", LAYER_SCALAR, A_LOG, DT_BIAS) else "weight"
    prefix = [] if modules[0] == "lm_head" else ["model"]
    return ".".join([*prefix, *modules, suffix])


def _stored_shape(path: tuple[str, ...], shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape in the file: matrices are [out, in], heads are flat."""
    if path[-1] == "kernel":
        num_input_dims = len(shape) - 1 if path[-2] == "o_proj" else 1
        return (math.prod(shape[num_input_dims:]), math.prod(shape[:num_input_dims]))
    if path[-1] == TAPS:
        return (math.prod(shape[:-1]), 1, shape[-1])
    return shape if path[-1] == "embedding" else (math.prod(shape),)


def _from_stored(value: np.ndarray, path: tuple[str, ...], shape: tuple[int, ...]) -> np.ndarray:
    return np.ascontiguousarray((value.T if path[-1] == "kernel" else value).reshape(shape))


def stored_form(value: Any, path: tuple[str, ...]) -> dict[str, np.ndarray]:
    """{name: tensor} for one parameter in a file: the parameter itself, or the values and the scale of a quantised one.

    Raises ValueError for int4 with an odd number of inputs, which do not fill whole bytes.
    """
    name, value = tensor_name(path), jax.device_get(value)
    if not isinstance(value, QuantizedArray):
        return {name: _to_stored(np.asarray(value), path)}
    values = _to_stored(np.asarray(value.values), path)
    if values.dtype == jnp.int4 and values.shape[-1] % 2:
        raise ValueError(f"int4 needs an even number of inputs, got {values.shape[-1]} for {'/'.join(path)}; take int8")
    return {name: pack(values), name + SCALE: _to_stored(np.asarray(value.scale), path)}


def _to_stored(value: np.ndarray, path: tuple[str, ...]) -> np.ndarray:
    stored = _stored_shape(path, value.shape)
    return np.ascontiguousarray(value.reshape(stored[::-1]).T if path[-1] == "kernel" else value.reshape(stored))


def _weight_files(folder: pathlib.Path) -> list[pathlib.Path]:
    """The safetensors files of a folder: the single file, or the files of its index."""
    if (folder / SINGLE_FILE).exists():
        return [folder / SINGLE_FILE]
    if not (folder / INDEX_FILE).exists():
        raise ValueError(
            f"{folder} must hold {SINGLE_FILE} or {INDEX_FILE}, but it has neither; "
            "convert other formats to safetensors"
        )
    return [folder / name for name in sorted(set(_weight_map(folder).values()))]


def _weight_map(folder: pathlib.Path) -> dict[str, str]:
    path = folder / INDEX_FILE
    weight_map = read_object(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{path} must hold a weight_map from tensor to file, got {shown(weight_map)}")
    for name, file in weight_map.items():
        # The entry must be a name, not a path: a file in the folder must not make us read outside of it.
        if not isinstance(file, str) or not _FILE_NAME.fullmatch(file):
            raise ValueError(
                f"{path}: weight_map must name a safetensors file in the same folder for each tensor, got "
                f"{shown(file)} for {shown(name)}"
            )
    return weight_map


def tensor_locations(folder: pathlib.Path) -> dict[str, pathlib.Path]:
    """{tensor: file}, from the files themselves. The index, if there is one, must agree."""
    locations: dict[str, pathlib.Path] = {}
    for file in _weight_files(folder):
        with open_tensors(file) as tensors:
            for name in tensors.keys():  # noqa: SIM118 (not a mapping)
                if name in locations:
                    raise ValueError(f"{file}: tensor {name} must be stored once, it is in {locations[name].name} too")
                locations[name] = file
    if not (folder / SINGLE_FILE).exists():
        for name, file_name in _weight_map(folder).items():
            if locations.get(name) != folder / file_name:
                raise ValueError(
                    f"{folder / file_name}: tensor {name} is missing, although {INDEX_FILE} lists it there"
                )
    return locations


def _check_tensor_names(
    folder: pathlib.Path,
    names: Mapping[str, Any],
    locations: Mapping[str, pathlib.Path],
    config: ModelConfig,
) -> None:
    ignorable = {name for name in locations if name.endswith("rotary_emb.inv_freq")}
    if config.tie_word_embeddings:
        ignorable.add("lm_head.weight")
    missing = sorted(set(names) - set(locations))
    extra = sorted(set(locations) - set(names) - ignorable)
    if missing:
        layers = {name.split(".")[2] for name in locations if re.match(r"model\.layers\.\d+\.", name)}
        raise ValueError(
            f"{folder}: {len(missing)} tensors of {config.family} are missing: {_some(missing)}; config.json says "
            f"{config.num_layers} layers, the files hold {len(layers)}"
        )
    if extra:
        raise ValueError(
            f"{folder}: {len(extra)} tensors have no place in this {config.family}: {_some(extra)}; check config.json"
        )


def _some(names: list[str]) -> str:
    return briefly(", ".join(names[:5]) + (", ..." if len(names) > 5 else ""))


def _check_tensor(
    view: Any, file: pathlib.Path, name: str, stored_shape: tuple[int, ...], types: tuple[str, ...]
) -> None:
    if tuple(view.get_shape()) != stored_shape:
        raise ValueError(
            f"{file}: tensor {name} must have shape {stored_shape}, got {tuple(view.get_shape())}; check config.json"
        )
    if view.get_dtype() not in types:
        raise ValueError(f"{file}: tensor {name} must be one of {', '.join(types)}, got {view.get_dtype()}")


def _check_tied(locations: Mapping[str, pathlib.Path]) -> None:
    names = ("model.embed_tokens.weight", "lm_head.weight")
    values = []
    for name in names:
        with open_tensors(locations[name]) as tensors:
            values.append(tensors.get_tensor(name))
    if values[0].shape != values[1].shape or not np.array_equal(*values):
        raise ValueError(
            f"{locations['lm_head.weight']}: lm_head.weight must equal model.embed_tokens.weight when "
            "tie_word_embeddings is true, but it differs; set tie_word_embeddings to false in config.json"
        )


# Weights out


def save_folder(
    folder: str | pathlib.Path,
    config: ModelConfig,
    params: Mapping[str, Any],
    tokenizer: Any = None,
    dtype: str | None = None,
    max_shard_bytes: float = 5e9,
    write_more: Callable[[pathlib.Path], None] | None = None,
) -> None:
    """Writes a folder that transformers, TRL and vLLM open, and reads it back: config, weights, and a given tokenizer.

    `dtype` is the stored type; None keeps `config.param_dtype`. Weights of more than `max_shard_bytes` go into several
    files with an index. `write_more` adds further files. The folder appears as a whole, or not at all. Raises
    ValueError if it exists and is not empty, if `params` is not the tree of `config`, or if the folder reads back
    differently.
    """
    config = dataclasses.replace(config, quantization=None)  # plain weights, however their base was stored
    check_tree(config, params)
    dtype = config.param_dtype if dtype is None else dtype
    with new_folder(folder) as draft:
        write_model_files(draft, config, dtype, tokenizer)
        _write_weights(draft, config, params, dtype, max_shard_bytes)
        check_weights(draft, config)
        if write_more is not None:
            write_more(draft)


def write_model_files(folder: pathlib.Path, config: ModelConfig, dtype: str, tokenizer: Any) -> None:
    """Writes a model's folder except the weights: the configuration, the special ids and a given tokenizer."""
    write_json(folder / "config.json", config_json(config, dtype))
    write_json(folder / "generation_config.json", generation_json(config))
    if tokenizer is not None:
        tokenizer.save_pretrained(str(folder))


def copy_others(folder: pathlib.Path, out: pathlib.Path) -> None:
    """Copies a model's folder except weights and config.json: tokenizer, chat template, and so on."""
    for pattern in SHAPE_PATTERNS:
        for file in sorted(folder.glob(pattern)):
            if file.name not in ("config.json", INDEX_FILE):
                shutil.copyfile(file, out / file.name)


def check_tree(config: ModelConfig, params: Mapping[str, Any]) -> None:
    """ValueError at the first parameter that is missing, has no place in the model, or has another shape."""
    expected = {path: spec.shape for path, spec in flatten_specs(base_specs(config))}
    got = {tuple(path): tuple(value.shape) for path, value in _leaves(params)}
    for path in sorted(expected.keys() | got.keys()):
        if expected.get(path) != got.get(path):
            raise ValueError(
                f"parameter {'/'.join(path)} must have shape {expected.get(path, 'none: it is not in the model')}, "
                f"got {got.get(path, 'no such parameter')}"
            )


def _write_weights(
    folder: pathlib.Path, config: ModelConfig, params: Mapping[str, Any], dtype: str, max_shard_bytes: float
) -> None:
    stored_dtype = np.dtype(ml_dtypes.bfloat16) if dtype == "bfloat16" else np.dtype(dtype)
    shards: list[list[tuple[str, ...]]] = [[]]
    shard_bytes = total_bytes = 0
    for path, spec in flatten_specs(base_specs(config)):
        part = fused_part(config, path)
        num_bytes = math.prod(spec.shape) * stored_dtype.itemsize
        # Parts of one tensor stay together.
        if shards[-1] and shard_bytes + num_bytes > max_shard_bytes and (part is None or not part.start):
            shards.append([])
            shard_bytes = 0
        shards[-1].append(path)
        shard_bytes, total_bytes = shard_bytes + num_bytes, total_bytes + num_bytes
    weight_map = {}
    for i, paths in enumerate(shards):
        name = SINGLE_FILE if len(shards) == 1 else f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        tensors: dict[str, np.ndarray] = {}
        for path in paths:
            value = np.asarray(jax.device_get(leaf_at(params, path))).astype(stored_dtype)
            if (part := fused_part(config, path)) is None:
                tensors |= stored_form(value, path)
                continue
            (rows,) = stored_form(value, path).values()
            whole = tensors.setdefault(part.name, np.empty((part.total, *rows.shape[1:]), rows.dtype))
            whole[part.start : part.start + part.size] = rows
        save_tensors(folder / name, tensors)
        weight_map |= dict.fromkeys(tensors, name)
    if len(shards) > 1:
        write_index(folder, weight_map, total_bytes)


def write_index(folder: pathlib.Path, weight_map: Mapping[str, str], total_bytes: int) -> None:
    """Writes the index: which tensor is in which file."""
    write_json(folder / INDEX_FILE, {"metadata": {"total_size": total_bytes}, "weight_map": dict(weight_map)})


# Nested dicts by path


def _leaves(tree: Mapping[str, Any], prefix: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    for name, child in tree.items():
        if isinstance(child, Mapping):
            yield from _leaves(child, (*prefix, name))
        else:
            yield (*prefix, name), child
