"""Adapters in the format of PEFT (https://github.com/huggingface/peft): adapter_config.json, adapter_model.safetensors.

In: the adapters of a parameter tree, or such a folder. Out: the other of the two. Settings that are not computed here
(DoRA, ranks by module, trained biases, adapted embeddings) are refused by name. Not here: the base
(`rl.models.files.hf`).
"""

import dataclasses
import hashlib
import math
import pathlib
import re
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from rl.errors import missing
from rl.files.json_file import Fields, read_object, shown
from rl.files.untrusted import Untrusted, UntrustedError
from rl.models.config import (
    LARGEST,
    LORA_A,
    LORA_B,
    LoRAConfig,
    ModelConfig,
    adaptable_modules,
    flatten_specs,
    parameter_specs,
)
from rl.models.files.finite import as_finite, check_finite
from rl.models.files.folders import new_folder, open_tensors, put_shards, save_tensors, write_json
from rl.models.files.hf import FLOAT_TYPES, fused_part, tensor_name
from rl.models.lora import Params, split
from rl.models.ops import dtype_of

_LARGEST_ALPHA = 1e9
CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
_SUFFIXES = {LORA_A: "lora_A.weight", LORA_B: "lora_B.weight"}
_TENSOR = re.compile(r"^base_model\.model\.(?:model\.layers\.(\d+)\.(.+)|(lm_head))\.(lora_[AB])\.weight$")
# Settings that change what an adapter computes, with the values that are computed here.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none",),
    "fan_in_fan_out": (False,),
    "use_dora": (False,),
    "use_qalora": (False,),
    "lora_bias": (False,),
    "modules_to_save": ([], None),
    "exclude_modules": ([], None),
    "target_parameters": ([], None),
    "layers_pattern": ([], None, "layers", ["layers"]),
    "trainable_token_indices": (None,),
    "alora_invocation_tokens": (None,),
    "arrow_config": (None,),
    "rank_pattern": ({}, None),
    "alpha_pattern": ({}, None),
    "layer_replication": (None,),
    # Other ways to initialise an adapter take a part of the base away.
    "init_lora_weights": (True, False, "gaussian", "eva", "orthogonal"),
}
_ALL_LINEAR = "all-linear"  # as target_modules it means every matrix of the layers


def save_adapter(
    folder: str | pathlib.Path, config: ModelConfig, params: Params, base: str | None, tokenizer: Any = None
) -> None:
    """Writes the adapters of `params` as a folder that peft opens; it appears whole or not at all.

    Args:
      config: the policy's configuration, with `lora`.
      base: folder or hub id of the base model, a note for whoever opens the adapter.
      tokenizer: written beside the adapter with its chat template, which may not be the base's; None: none is.

    Raises:
      ValueError: the model has no adapters, an adapted matrix is part of another one in transformers' class, or the
        folder exists and is not empty.
    """
    lora = config.lora
    if lora is None:
        raise ValueError(
            "an adapter can be written of a model with adapters only, got one whose weights are all trained"
        )
    for module in adaptable_modules(config):
        part = fused_part(config, (*module.split("/"), "kernel"))
        if part is not None and lora.applies_to(module.split("/")):
            raise ValueError(
                f"an adapter's matrices must be those of transformers' class to be written, got {module}, which lies "
                f"in {part.name} in {config.family}; export the merged weights, without --adapter"
            )
    tensors, modules = {}, []
    for path, _ in flatten_specs(split(config, parameter_specs(config))[0]):
        value: Any = params
        for name in path:
            value = value[name]
        tensors[_stored_name(path)] = _to_stored(np.asarray(jax.device_get(value)), path[-1])
        modules.append("/".join(path[:-1]))
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "use_rslora": lora.rank_stabilized,
        "target_modules": _target_modules(config, set(modules)),
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
    with new_folder(folder) as draft:
        write_json(draft / CONFIG_FILE, settings)
        save_tensors(draft / WEIGHTS_FILE, tensors)
        if tokenizer is not None:
            tokenizer.save_pretrained(str(draft))


def read_adapter(folder: str | pathlib.Path) -> LoRAConfig:
    """Rank, alpha and targets (the names of the adapted modules, one by one) of a folder.

    Raises:
      ValueError: there is no such folder, its kind of adapter is not computed here, its tensors are no LoRA, or they
        are not those of its target_modules.
    """
    folder = pathlib.Path(folder)
    if not folder.exists():
        raise missing("an adapter", "a folder in PEFT's format", folder)
    fields = _settings(folder)
    for key, allowed in _NEUTRAL.items():
        value = fields.values.get(key, allowed[0])
        # The type must be equal, too: 0 is not false.
        if not any(type(value) is type(neutral) and value == neutral for neutral in allowed):
            raise fields.refuse(key, f"{allowed[0]!r}; anything else is not supported")
    rank = fields.whole("r", 1, LARGEST["hidden_size"])
    alpha = fields.number("lora_alpha", 0, _LARGEST_ALPHA)
    rank_stabilized = fields.flag("use_rslora", False)
    modules: dict[str, set[str]] = {}
    with open_tensors(folder / WEIGHTS_FILE) as tensors:
        for name in tensors.keys():  # noqa: SIM118 (not a mapping)
            match = _TENSOR.match(name)
            if match is None:
                raise ValueError(
                    f"{folder / WEIGHTS_FILE}: tensor {shown(name)} must be A or B of a matrix, and it is not"
                )
            layer, module, head, part = match.groups()
            modules.setdefault(head or f"layers_{layer}/{module.replace('.', '/')}", set()).add(part)
    for module, parts in modules.items():
        if len(parts) == 1:
            raise ValueError(
                f"{folder / WEIGHTS_FILE}: every matrix must have lora_A and lora_B, got {module} with {parts.pop()} "
                "alone; fetch or export the adapter again"
            )
    _check_targets(folder, fields, list(modules), set(modules))
    try:
        return LoRAConfig(rank, alpha, tuple(modules), rank_stabilized)
    except ValueError as error:
        raise ValueError(f"{folder / CONFIG_FILE}: {error}") from error


def _settings(folder: pathlib.Path) -> Fields:
    path = folder / CONFIG_FILE
    return Fields(read_object(path, "check the path of the adapter"), f"{path}: ")


def _check_targets(folder: pathlib.Path, fields: Fields, modules: list[str], stored: set[str]) -> None:
    """ValueError where target_modules names other `modules` than are stored.

    peft ignores a stored module that is not named, and leaves a named one that is not stored at its initial value.
    """
    names = [tensor_name((*module.split("/"), "kernel")).removesuffix(".weight") for module in modules]
    targets = fields.values.get("target_modules")
    if targets == _ALL_LINEAR:
        is_named = [name != "lm_head" for name in names]
    elif isinstance(targets, str):
        try:
            is_named = _match(targets, names)
        except UntrustedError as error:
            raise fields.refuse("target_modules", f"a list of names or a regular expression ({error})") from error
    else:
        targets = fields.texts("target_modules")
        ends = tuple(f".{target}" for target in targets)
        layers = fields.wholes("layers_to_transform", 0, LARGEST["num_layers"])
        is_named = [name in targets or (name.endswith(ends) and _is_of(name, layers)) for name in names]
    different = sorted({module for module, named in zip(modules, is_named, strict=True) if named} ^ stored)
    if different:
        raise ValueError(
            f"{folder / CONFIG_FILE}: target_modules must name the matrices in {WEIGHTS_FILE}, got "
            f"{shown(fields.values.get('target_modules'))}, which differs in {len(different)} of them: "
            f"{', '.join(different[:5])}; fetch or export the adapter again"
        )


def _is_of(name: str, layers: list[int]) -> bool:
    """Whether a module is in one of these layers; [] means all layers."""
    match = re.search(r"\.layers\.(\d+)\.", name)
    return not layers or (match is not None and int(match[1]) in layers)


def _match(pattern: str, names: list[str]) -> list[bool]:
    # A pattern that others wrote may take forever.
    untrusted = Untrusted()
    try:
        return untrusted.match(pattern, names)
    finally:
        untrusted.close()


def adapter_for(folder: str | pathlib.Path, config: ModelConfig) -> LoRAConfig:
    """The LoRA settings with which a model computes the adapter of a folder: rank, alpha, and targets as short
    patterns.

    Raises:
      ValueError: as `read_adapter`, and for an adapter of matrices that the model does not have.
    """
    found = read_adapter(folder)
    modules = adaptable_modules(config)
    foreign = sorted(set(found.targets) - set(modules))
    if foreign:
        raise ValueError(
            f"the adapter {folder} must fit the model, a {config.family} of {config.num_layers} layers, got "
            f"{len(foreign)} matrices that it does not have: {', '.join(foreign[:5])}; choose the adapter's own base"
        )
    _check_targets(pathlib.Path(folder), _settings(pathlib.Path(folder)), modules, set(found.targets))
    short = []
    for module, is_whole in _adapted(config, set(found.targets)):
        last = module.rpartition("/")[2]
        short.append(f"*/{last}" if is_whole and last != module else module)
    return dataclasses.replace(found, targets=tuple(dict.fromkeys(short)))


def check_adapter(folder: str | pathlib.Path, config: ModelConfig) -> None:
    """ValueError where the folder's rank, alpha, modules or shapes differ from those of `config`. Reads
    headers only.
    """
    folder, lora = pathlib.Path(folder), config.lora
    assert lora is not None
    found = read_adapter(folder)
    for key in ("rank", "alpha", "rank_stabilized"):
        if getattr(found, key) != getattr(lora, key):
            raise ValueError(
                f"lora.{key} must be that of the adapter {folder}, {getattr(found, key)}, got {getattr(lora, key)}; "
                "lora.rank=0 takes rank, alpha and targets from the adapter"
            )
    wanted = {module for module in adaptable_modules(config) if lora.applies_to(module.split("/"))}
    if set(found.targets) != wanted:
        difference = sorted(set(found.targets) ^ wanted)
        raise ValueError(
            f"lora.targets must match the matrices of the adapter {folder}, got {list(lora.targets)}, which differs in "
            f"{len(difference)} of them: {', '.join(difference[:5])}"
        )
    with open_tensors(folder / WEIGHTS_FILE) as tensors:
        stored = set(tensors.keys())
        for path, spec in flatten_specs(split(config, parameter_specs(config))[0]):
            name, shape = _stored_name(path), _stored_shape(spec.shape, path[-1])
            view = tensors.get_slice(name) if name in stored else None
            got = "no such tensor" if view is None else tuple(view.get_shape())
            if got != shape:
                raise ValueError(f"{folder / WEIGHTS_FILE}: tensor {name} must have shape {shape}, got {got}")
            if view is not None and view.get_dtype() not in FLOAT_TYPES:
                raise ValueError(
                    f"{folder / WEIGHTS_FILE}: tensor {name} must be one of {', '.join(FLOAT_TYPES)}, got "
                    f"{view.get_dtype()}"
                )


def load_adapter(
    folder: str | pathlib.Path, config: ModelConfig, shardings: Any = None, allow_nonfinite: bool = False
) -> Params:
    """The adapters of a folder in `config.param_dtype`, placed by `shardings` (a tree like the parameters; None: the
    default device). Raises ValueError as `check_adapter` does, and for NaN and infinity, unless `allow_nonfinite`.
    """
    check_adapter(folder, config)
    adapters: Params = {}
    with open_tensors(pathlib.Path(folder) / WEIGHTS_FILE) as tensors:
        for path, spec in flatten_specs(split(config, parameter_specs(config))[0]):
            stored, name = tensors.get_tensor(_stored_name(path)), f"{folder}: tensor {_stored_name(path)}"
            stored = as_finite(stored, dtype_of(config.param_dtype), name, allow_nonfinite)
            value, node, places = np.ascontiguousarray(stored.T).reshape(spec.shape), adapters, shardings or {}
            for name in path[:-1]:
                node, places = node.setdefault(name, {}), places.get(name, {})
            node[path[-1]] = put_shards(value, places.get(path[-1]))
    return adapters


def stored_matrices(folder: str | pathlib.Path) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    """(module, A [rank, inputs], B [outputs, rank]) of each adapted matrix in the stored type, one after the other.

    Raises ValueError as `read_adapter` does.
    """
    with open_tensors(pathlib.Path(folder) / WEIGHTS_FILE) as tensors:
        for module in read_adapter(folder).targets:
            names = [_stored_name((*module.split("/"), name)) for name in (LORA_A, LORA_B)]
            a, b = (check_finite(tensors.get_tensor(name), f"{folder}: tensor {name}") for name in names)
            yield module, a, b


def base_name(folder: str | pathlib.Path) -> str | None:
    """The adapter's name for its base model."""
    return _settings(pathlib.Path(folder)).text("base_model_name_or_path", None)


def adapter_hash(folder: str | pathlib.Path) -> str:
    """Hex sha256 over the two files of an adapter."""
    folder = pathlib.Path(folder)
    digest = hashlib.sha256((folder / CONFIG_FILE).read_bytes())
    digest.update((folder / WEIGHTS_FILE).read_bytes())
    return digest.hexdigest()


def _target_modules(config: ModelConfig, modules: set[str]) -> list[str]:
    """Last parts of module names ("q_proj") if every module with that name has an adapter, else full names."""
    names = []
    for module, is_whole in _adapted(config, modules):
        full = tensor_name((*module.split("/"), "kernel")).removesuffix(".weight")
        names.append(module.rpartition("/")[2] if is_whole else full)
    return list(dict.fromkeys(names))


def _adapted(config: ModelConfig, modules: set[str]) -> list[tuple[str, bool]]:
    """(module, whether every module with the same last name has an adapter) of the adapted modules, in model order."""
    alike: dict[str, set[str]] = {}
    for module in adaptable_modules(config):
        alike.setdefault(module.rpartition("/")[2], set()).add(module)
    return [
        (module, alike[module.rpartition("/")[2]] <= modules)
        for module in adaptable_modules(config)
        if module in modules
    ]


def _stored_name(path: tuple[str, ...]) -> str:
    module = tensor_name((*path[:-1], "kernel")).removesuffix("weight")
    return f"base_model.model.{module}{_SUFFIXES[path[-1]]}"


def _stored_shape(shape: tuple[int, ...], name: str) -> tuple[int, int]:
    """[rank, inputs] of A, [outputs, rank] of B."""
    return (shape[-1], math.prod(shape[:-1])) if name == LORA_A else (math.prod(shape[1:]), shape[0])


def _to_stored(value: np.ndarray, name: str) -> np.ndarray:
    return np.ascontiguousarray(value.reshape(_stored_shape(value.shape, name)[::-1]).T)
