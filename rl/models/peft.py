"""Adapters in the format of PEFT (https://github.com/huggingface/peft): adapter_config.json, adapter_model.safetensors.

In: the adapters of a parameter tree, or such a folder. Out: the other of the two; what this model cannot compute (DoRA,
ranks by module, trained biases, adapted embeddings) is refused by name. The base is not here: see `rl.models.hf`.
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

from rl.json_file import read_object
from rl.models.config import LORA_A, LORA_B, LoRAConfig, ModelConfig, adaptable_modules, flatten_specs, parameter_specs
from rl.models.hf import new_folder, open_tensors, put_shards, save_tensors, tensor_name, write_json
from rl.models.lora import Params, split
from rl.models.ops import dtype_of

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
_SUFFIXES = {LORA_A: "lora_A.weight", LORA_B: "lora_B.weight"}
_TENSOR = re.compile(r"^base_model\.model\.(?:model\.layers\.(\d+)\.(.+)|(lm_head))\.(lora_[AB])\.weight$")
# Settings that change what an adapter computes, with the values under which it computes what is done here.
_NEUTRAL = {
    "peft_type": ("LORA",),
    "bias": ("none",),
    "fan_in_fan_out": (False,),
    "use_dora": (False,),
    "modules_to_save": ((), None),
    "trainable_token_indices": (None,),
    "rank_pattern": ({}, None),
    "alpha_pattern": ({}, None),
    "layer_replication": (None,),
    # The other ways of starting an adapter take a part of the base away.
    "init_lora_weights": (True, False, "gaussian", "eva", "orthogonal"),
    "lora_bias": (False,),
}


def save_adapter(folder: str | pathlib.Path, config: ModelConfig, params: Params, base: str | None) -> None:
    """Writes the adapters of `params` as a folder that peft opens; it appears whole or not at all.

    Args:
      config: of the policy, with `lora`.
      base: folder or hub id of the base model, for whoever opens the adapter.

    Raises:
      ValueError: no adapters, or the folder exists and is not empty.
    """
    lora = config.lora
    if lora is None:
        raise ValueError(
            "an adapter can be written of a model with adapters only, got one whose weights are all trained"
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


def read_adapter(folder: str | pathlib.Path) -> LoRAConfig:
    """Rank, alpha and targets (the names of the adapted modules, one by one) of a folder.

    Raises:
      ValueError: no such folder, a kind of adapter that is not computed here, or tensors that are no LoRA.
    """
    folder = pathlib.Path(folder)
    settings = read_object(folder / CONFIG_FILE)
    for key, allowed in _NEUTRAL.items():
        value = settings.get(key, allowed[0])
        value = tuple(value) if isinstance(value, list) else value
        if value not in allowed:
            raise ValueError(
                f"{folder / CONFIG_FILE}: {key} must be {allowed[0]!r}, got {value!r}; it is not supported"
            )
    for key, kind in (("r", int), ("lora_alpha", int | float)):
        if not isinstance(settings.get(key), kind):
            raise ValueError(f"{folder / CONFIG_FILE}: {key} must be a number, got {settings.get(key)!r}")
    modules: dict[str, set[str]] = {}
    with open_tensors(folder / WEIGHTS_FILE) as tensors:
        for name in tensors.keys():  # noqa: SIM118 (not a mapping)
            match = _TENSOR.match(name)
            if match is None:
                raise ValueError(f"{folder / WEIGHTS_FILE}: tensor {name} must be A or B of a matrix, and it is not")
            layer, module, head, part = match.groups()
            modules.setdefault(head or f"layers_{layer}/{module.replace('.', '/')}", set()).add(part)
    for module, parts in modules.items():
        if len(parts) == 1:
            raise ValueError(
                f"{folder / WEIGHTS_FILE}: every matrix must have lora_A and lora_B, got {module} with {parts.pop()} "
                "alone; fetch or export the adapter again"
            )
    return LoRAConfig(
        settings["r"], float(settings["lora_alpha"]), tuple(modules), bool(settings.get("use_rslora", False))
    )


def adapter_for(folder: str | pathlib.Path, config: ModelConfig) -> LoRAConfig:
    """What a model needs to compute with the adapter of a folder: its rank and alpha, its targets as short patterns.

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
    short = []
    for module, is_whole in _adapted(config, set(found.targets)):
        last = module.rpartition("/")[2]
        short.append(f"*/{last}" if is_whole and last != module else module)
    return dataclasses.replace(found, targets=tuple(dict.fromkeys(short)))


def check_adapter(folder: str | pathlib.Path, config: ModelConfig) -> None:
    """ValueError where the folder's rank, alpha, modules or shapes are not those of `config`; reads no data."""
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
            got = tuple(tensors.get_slice(name).get_shape()) if name in stored else "no such tensor"
            if got != shape:
                raise ValueError(f"{folder / WEIGHTS_FILE}: tensor {name} must have shape {shape}, got {got}")


def load_adapter(folder: str | pathlib.Path, config: ModelConfig, shardings: Any = None) -> Params:
    """The adapters of a folder in `config.param_dtype`, placed by `shardings` (a tree like the parameters; None: the
    default device). Raises ValueError as `check_adapter` does.
    """
    check_adapter(folder, config)
    adapters: Params = {}
    with open_tensors(pathlib.Path(folder) / WEIGHTS_FILE) as tensors:
        for path, spec in flatten_specs(split(config, parameter_specs(config))[0]):
            stored = tensors.get_tensor(_stored_name(path)).astype(dtype_of(config.param_dtype))
            value, node, places = np.ascontiguousarray(stored.T).reshape(spec.shape), adapters, shardings or {}
            for name in path[:-1]:
                node, places = node.setdefault(name, {}), places.get(name, {})
            node[path[-1]] = put_shards(value, places.get(path[-1]))
    return adapters


def stored_matrices(folder: str | pathlib.Path) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    """(module, A [rank, inputs], B [outputs, rank]) of each adapted matrix, as they are stored, one after the other.

    Raises ValueError as `read_adapter` does.
    """
    with open_tensors(pathlib.Path(folder) / WEIGHTS_FILE) as tensors:
        for module in read_adapter(folder).targets:
            names = [_stored_name((*module.split("/"), name)) for name in (LORA_A, LORA_B)]
            a, b = (tensors.get_tensor(name) for name in names)
            yield module, a, b


def base_name(folder: str | pathlib.Path) -> str | None:
    """What the adapter calls the model that it was trained beside."""
    return read_object(pathlib.Path(folder) / CONFIG_FILE).get("base_model_name_or_path")


def adapter_hash(folder: str | pathlib.Path) -> str:
    """Hex sha256 over the two files of an adapter."""
    folder = pathlib.Path(folder)
    digest = hashlib.sha256((folder / CONFIG_FILE).read_bytes())
    digest.update((folder / WEIGHTS_FILE).read_bytes())
    return digest.hexdigest()


def _target_modules(config: ModelConfig, modules: set[str]) -> list[str]:
    """Last parts of module names ("q_proj") where every module so called has an adapter, else names in full."""
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
