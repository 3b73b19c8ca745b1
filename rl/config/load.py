"""Configuration: YAML recipes plus `dotted.key=value` overrides in, one validated, frozen `Config` out.

`configs/base.yml` owns every default, `rl.config.sections` names and types, `rl.config.rules` what must hold across
keys. Layers, later ones winning: base.yml, the preset named by `grpo.preset`, the recipe (and what it inherits), the
command line. No ML library is imported here, so that a mistake is reported at once.
"""

import dataclasses
import difflib
import functools
import json
import os
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

import pydantic

from rl.config.peer_keys import advice
from rl.config.ranges import check_plain, check_possible_path
from rl.config.rules import check_config
from rl.config.sections import (
    FREE_FORM,
    LIST_ENTRIES,
    MAPPING_ENTRIES,
    ONE_OR_MAPPING,
    Config,
    flatten,
    to_dict,
)
from rl.config.yaml_text import MOST_DEPTH, read_yaml, write_yaml
from rl.errors import RECIPE, missing
from rl.files.json_file import shown

CONFIG = "CONFIG"  # the argument of commands

# Keys that may change when a run is resumed, because they do not change what a step computes. The number of steps does,
# where it moves the end of the learning rate's schedule: see `differences`. The size of a step does, too: the run goes
# on at its place in the data, in the order that it began with (`rl.data.order`).
RESUMABLE_KEYS = (
    "pure_nnx",
    "output_dir",
    "compiled_file",
    "grpo.steps",
    "grpo.prompts_per_step",
    "grpo.max_tokens_per_microbatch",
    "grpo.logprob_chunk",
    "grpo.skip_zero_advantage",
    "sft.steps",
    "model.remat",
    "model.scan_layers",
    "model.attention",
    "optimizer.offload",
    "rewards.num_workers",
    "rewards.memory_gb",
    "rewards.max_failed_share",
    "rewards.retries",
    "rewards.on_error",
    "rewards.model_tokens",
    "rewards.env",
    "rewards.check_on_gold",
    "sampling.slots",
    "sampling.kv_memory",
    "sampling.warm_up",
    "rollout.num_workers",
    "rollout.episodes_per_worker",
    "rollout.memory_gb",
    "mesh",
    "distributed",
    "checkpoint",
    "eval",
    "health",
    "logging",
    "profile",
)

HORIZON = "optimizer.schedule_updates"
# Keys that may change in a branch (`grpo train RUN --branch FOLDER`), which goes on with the weights, the moments and
# the place in the data of a run. They change what a step computes, and not what a checkpoint holds.
BRANCH_KEYS = (
    *("optimizer.lr", "optimizer.schedule", HORIZON, "optimizer.warmup_updates", "optimizer.decay_updates"),
    *("optimizer.final_lr_ratio", "optimizer.weight_decay", "grpo.steps", "sft.steps", "grpo.epsilon"),
    *("grpo.epsilon_high", "grpo.mask_truncated", "grpo.dynamic_sampling_rounds", "sampling.temperature"),
)

# Sections, and keys of other sections, that change no compiled program.
_NO_PROGRAM = (
    *("output_dir", "compiled_file", "tokenizer", "data", "rewards", "sft"),
    *("distributed", "checkpoint", "eval", "health", "logging", "profile"),
)
_NO_PROGRAM_KEYS = (
    *("model.source", "lora.adapter", "sampling.warm_up", "grpo.preset", "grpo.advantage_estimator"),
    *("grpo.scale_rewards", "grpo.aggregation", "grpo.dynamic_sampling_rounds", "grpo.skip_zero_advantage"),
)

# What to say where text stands in place of another type: {first word of pydantic's error type: way out}.
_WAYS_OUT = {
    "int": "; write plain digits, such as 1000, without quotes",
    "float": "; write a plain number, such as 0.5 or 1e-6, without quotes",
    "bool": "; write true or false, without quotes",
}


def load_config(path: str | os.PathLike | None, overrides: Sequence[str] = ()) -> Config:
    """Reads a recipe and applies overrides.

    Args:
      path: a YAML recipe; a bare name such as `base.yml` also finds a recipe shipped in the `configs` package. None:
        defaults only.
      overrides: `dotted.key=value` strings, values in YAML syntax. A number names an entry of a list of the recipe:
        `rewards.functions.0.weight=2`.

    Raises:
      ValueError: file missing or not YAML, unknown key (with the nearest name), wrong type, or keys that contradict
        each other.
    """
    base = _base()
    recipe = _read_recipe(pathlib.Path(path)) if path is not None else {}
    command_line = _parse_overrides(overrides)
    known = set(flatten(base))
    command_line = _with_entries(command_line, recipe)
    for layer in (recipe, command_line):
        _check_keys(layer, known)
    explicit = _merge(recipe, command_line)
    preset = (explicit.get("grpo") or {}).get("preset")
    layers = [base, read_preset(preset) if preset else {}, explicit]
    merged: dict = {}
    for layer in layers:
        merged = _merge(merged, layer)
    for key in ("output_dir", "compiled_file"):
        if isinstance(merged[key], str):
            merged[key] = os.path.expanduser(merged[key])
    for key in MAPPING_ENTRIES:  # null takes an entry of the recipe out
        section, name = key.split(".")
        merged[section] |= {name: {each: entry for each, entry in merged[section][name].items() if entry is not None}}
    config = _build(merged)
    check_config(config)
    return config


def override_values(overrides: Sequence[str]) -> dict[str, Any]:
    """The values that the command line sets: {dotted key: value}. A section given as a mapping counts key by key.

    Raises ValueError for an override that cannot be read.
    """
    return flatten(_parse_overrides(overrides))


def read_preset(name: str) -> dict[str, Any]:
    """The values that a preset sets, by section. Keys of `grpo` stand at the top of its file, other sections by name.

    Raises ValueError for a name that has no file in configs/presets.
    """
    folder = _packaged("presets")
    names = sorted(entry.name.removesuffix(".yml") for entry in folder.iterdir() if entry.name.endswith(".yml"))
    if name not in names:
        raise ValueError(f"grpo.preset must be one of {names}, got {shown(name)}")
    keys = _read_yaml(folder / f"{name}.yml")
    sections = {key: value for key, value in keys.items() if isinstance(value, dict)}
    return {"grpo": {key: value for key, value in keys.items() if key not in sections}, **sections}


def preset_values(config: Config) -> dict[str, Any]:
    """{key: its value in this run} for every key of the run's preset; keys outside `grpo` have their section's name."""
    if config.grpo.preset is None:
        return {}
    keys = flatten(read_preset(config.grpo.preset))
    values = flatten(to_dict(config))
    return {key.removeprefix("grpo."): values[key] for key in keys}


def dump_config(config: Config) -> str:
    """The resolved configuration as YAML that `load_config` reads back to an equal object."""
    return write_yaml(to_dict(config))


def differences(old: Config, new: Config, kind: str = "grpo") -> dict[str, tuple[Any, Any]]:
    """The keys that differ and change what a step computes: {dotted key: (old, new)}. When empty, `new` may resume the
    run of `old`. kind: "grpo" or "sft".
    """
    old_flat, new_flat = flatten(to_dict(old)), flatten(to_dict(new))
    fixed = [key for key in new_flat if not any(key == free or key.startswith(free + ".") for free in RESUMABLE_KEYS)]
    fixed.remove(HORIZON)
    if new.optimizer.schedule != "constant" and horizon(old, kind) != horizon(new, kind):
        fixed += [f"{kind}.steps", HORIZON]
    return {key: (old_flat.get(key), new_flat[key]) for key in fixed if old_flat.get(key) != new_flat[key]}


def horizon(config: Config, kind: str) -> int:
    """The number of updates over which the schedule of the learning rate runs."""
    of_grpo = config.grpo.steps * config.grpo.minibatches * config.grpo.epochs
    return config.optimizer.schedule_updates or (config.sft.steps if kind == "sft" else of_grpo)


def cannot_branch(old: Config, new: Config, kind: str) -> dict[str, tuple[Any, Any]]:
    """`differences` that a branch of the run of `old` may not have either."""
    return {key: pair for key, pair in differences(old, new, kind).items() if key not in BRANCH_KEYS}


def program_keys(config: Config) -> dict[str, Any]:
    """The keys that decide which programs a GRPO run compiles: {dotted key: value}."""
    flat = flatten(to_dict(config))
    free = [key for key in flat if key.split(".")[0] in _NO_PROGRAM and key != "data.max_prompt_length"]
    is_free = config.optimizer.schedule == "constant" or config.optimizer.schedule_updates is not None
    free += ["grpo.steps"] if is_free else []
    return {key: value for key, value in flat.items() if key not in free and key not in _NO_PROGRAM_KEYS}


def require(value: Any, key: str, example: str) -> Any:
    """Returns `value`; ValueError when a key without a usable default was not set."""
    if value in (None, [], ""):
        raise ValueError(f"{key} must be set, got {shown(value)}; for example {key}={example}")
    return value


@functools.cache
def _base() -> dict:
    """The defaults. The dict is shared: callers must not change it."""
    return _read_yaml(_packaged("base.yml"))


def base_text() -> str:
    """The text of configs/base.yml."""
    return _packaged("base.yml").read_text()


def _packaged(name: str) -> pathlib.Path:
    """A file of configs/, which lies beside `rl` in a checkout and inside it in a wheel."""
    package = pathlib.Path(__file__).parents[1]
    inside = package / "configs"
    return (inside if inside.is_dir() else package.parent / "configs") / name


def _read_recipe(path: pathlib.Path, seen: tuple[pathlib.Path, ...] = (), what: str = CONFIG) -> dict:
    """A recipe merged over the recipes that it inherits from. The caller lays the result over base.yml. what: names the
    recipe, for messages.
    """
    check_possible_path("a config", str(path))
    if not path.is_file():
        packaged = _packaged(path.name)
        if len(path.parts) == 1 and packaged.is_file():
            path = packaged
        elif path.is_dir():
            inside = path / "config.yml"  # of a run
            way_out = f"name {str(inside)!r}" if inside.is_file() else "name a file"
            raise ValueError(f"a config must be a YAML recipe, got the folder {str(path)!r}; {way_out}")
        else:
            raise missing(what, RECIPE if what != CONFIG else f"{RECIPE} or a run folder", path)
    path = path.resolve()
    if path == _packaged("base.yml").resolve():
        return {}  # its values are the defaults; as a recipe's own they would win over a preset
    if path in seen:
        raise ValueError(f"config file {path} inherits from itself")
    if len(seen) >= MOST_DEPTH:
        raise ValueError(f"config files must inherit over at most {MOST_DEPTH} others, got {path} as one more")
    recipe = _read_yaml(path)
    parent = recipe.pop("inherit", "base.yml")
    if not isinstance(parent, str):
        raise ValueError(f"{path}: inherit must be the path of one recipe, got {shown(parent)}")
    if parent == "base.yml":
        return recipe
    check_possible_path(f"{path}: inherit", parent)
    beside = path.parent / parent
    inherited = beside if beside.is_file() else pathlib.Path(parent)
    return _merge(_read_recipe(inherited, (*seen, path), f"{path}: inherit"), recipe)


def _read_yaml(path) -> dict:
    try:
        content = read_yaml(path.read_text(encoding="utf-8"), str(path))
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not valid YAML: {error}") from error
    except OSError as error:
        raise ValueError(f"config file {path} cannot be read: {error.strerror}; choose another one") from error
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a mapping of keys, got {type(content).__name__}")
    return content


def _parse_overrides(overrides: Sequence[str]) -> dict:
    result: dict = {}
    for text in overrides:
        key, equals, value = text.partition("=")
        if not equals or not key:
            raise ValueError(f"an override must look like dotted.key=value, got {shown(text)}")
        if key.count(".") > MOST_DEPTH:
            raise ValueError(f"an override must be nested at most {MOST_DEPTH} deep, got {shown(text)}")
        nested: Any = read_yaml(value, f"the value of override {shown(text)}")
        for part in reversed(key.split(".")):
            nested = {part: nested}
        result = _merge(result, nested)
    return result


def _with_entries(command_line: Mapping, recipe: Mapping) -> dict:
    """The overrides with whole lists in place of changes to their entries by number: rewards.functions.0.weight=2."""
    result = dict(command_line)
    for key, entry_type in LIST_ENTRIES.items():
        section, name = key.split(".")
        layer = result.get(section)
        changes = layer.get(name) if isinstance(layer, Mapping) else None
        if not isinstance(layer, Mapping) or not isinstance(changes, Mapping) or not changes:
            continue
        entries = list((recipe.get(section) or {}).get(name) or [])
        for number, change in changes.items():
            if not str(number).isdecimal() or int(number) >= len(entries):
                raise ValueError(
                    f"{key}.{number} must be the number of an entry of the recipe's list, from 0, which has "
                    f"{len(entries)}; give the whole list, {key}=[...]"
                )
            entry = entries[int(number)]
            if not isinstance(entry, Mapping):  # a name alone
                entry = {dataclasses.fields(entry_type)[0].name: entry}
            entries[int(number)] = _merge(entry, change) if isinstance(change, Mapping) else change
        result[section] = {**layer, name: entries}
    return result


def _merge(low: Mapping, high: Mapping) -> dict:
    """`high` over `low`, mappings merged key by key, everything else (lists too) replaced."""
    result = dict(low)
    for key, value in high.items():
        if isinstance(value, Mapping) and isinstance(result.get(key), Mapping):
            result[key] = _merge(result[key], value)
        else:
            result[key] = value
    return result


def _check_keys(layer: Mapping, known: set[str]) -> None:
    sections = {key[: match.start()] for key in known for match in re.finditer(r"\.", key)}
    for key, value in (flatten(layer) | _empty_mappings(layer)).items():
        is_mapping = key in FREE_FORM and key not in ONE_OR_MAPPING
        if (key in sections and value != {}) or (is_mapping and not isinstance(value, Mapping)):
            raise ValueError(f"{key} must be a mapping of keys, got {shown(value)}")
        if key not in known and key not in sections:
            near = _nearest(key, sorted(known)) if len(key) < 100 else None  # comparing takes the square of its length
            is_name_of_ours = any(name.rpartition(".")[2] == key.rpartition(".")[2] for name in known)
            said = advice(key, is_name_of_ours) or (f"did you mean {near!r}?" if near else None)
            hint = f"; {said}" if said else ""
            raise ValueError(f"unknown config key {shown(key)}{hint} (configs/base.yml lists every key)")


def _empty_mappings(layer: Mapping, prefix: str = "") -> dict[str, Mapping]:
    """{dotted key: {}} for each empty mapping, which `flatten` leaves out."""
    found: dict[str, Mapping] = {}
    for name, value in layer.items():
        if isinstance(value, Mapping) and f"{prefix}{name}" not in FREE_FORM:
            found |= _empty_mappings(value, f"{prefix}{name}.") if value else {f"{prefix}{name}": value}
    return found


def _nearest(key: str, known: Sequence[str]) -> str | None:
    """The known key that was probably meant: the same name in another section, else a similar key or name."""
    leaves = {name: name.rpartition(".")[2] for name in known}
    leaf = key.rpartition(".")[2]
    near = difflib.get_close_matches(key, [name for name in known if leaves[name] == leaf], n=1, cutoff=0.0)
    near = near or difflib.get_close_matches(key, known, n=1)
    if not near:
        similar = difflib.get_close_matches(leaf, leaves.values(), n=1)
        near = [name for name in known if leaves[name] in similar]
    return near[0] if near else None


def _build(merged: dict) -> Config:
    check_plain(merged)
    try:
        # Through JSON, because pydantic's strict mode takes mappings for dataclasses only there.
        config = pydantic.TypeAdapter(Config).validate_json(json.dumps(merged))
    except pydantic.ValidationError as error:
        raise ValueError("invalid configuration: " + "; ".join(map(_problem, error.errors()))) from error
    if len(config.sampling.logit_bias) < len(merged["sampling"]["logit_bias"]):  # 7 and "07" are one id
        raise ValueError(
            f"sampling.logit_bias must name each token id once, got {shown(list(merged['sampling']['logit_bias']))}"
        )
    return config


def _problem(item: Mapping[str, Any]) -> str:
    key, value = ".".join(map(str, item["loc"])), item["input"]
    if item["type"] == "unexpected_keyword_argument":  # in a list entry; other keys are compared with base.yml before
        entries = ".".join(map(str, item["loc"][:2]))
        names = [field.name for field in dataclasses.fields((LIST_ENTRIES | MAPPING_ENTRIES)[entries])]
        return f"unknown config key {shown(key)}; an entry of {entries} has {names}"
    kind = item["type"].partition("_")[0]
    way_out = _WAYS_OUT.get(kind, "") if isinstance(value, str) else ""
    return f"{key}: {item['msg']}, got {shown(value)}{way_out}"
