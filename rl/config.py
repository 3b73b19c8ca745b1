"""Configuration: YAML recipes plus `dotted.key=value` overrides in, one validated, frozen `Config` out.
 `configs/base.yml` owns every default; the classes below hold names, types and nothing else. Layers, later ones
winning: base.yml, the preset named by `grpo.preset`, the recipe (and what it inherits), the command line. No ML library
is imported here, so that a mistake is reported at once. Checks that need devices, data or a tokenizer live where those
are loaded.
"""

import dataclasses
import difflib
import importlib.resources
import json
import os
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import pydantic
import yaml
from pydantic.dataclasses import dataclass

_STRICT = pydantic.ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)
_FREE_FORM = (
    "model.args",
    "data.args",
    "data.eval_args",
    "data.columns",
    "sampling.logit_bias",
    "mesh.axes",
    "mesh.dcn",
    "mesh.rules",
    "mesh.rollout_rules",
)

# Keys that may differ between the run that wrote a folder and the one that resumes it: they do not change what a step
# computes.
# (The number of steps does where the learning rate falls towards the last of them: see `differences`.)
RESUMABLE_KEYS = (
    "pure_nnx",
    "output_dir",
    "compiled_file",
    "grpo.steps",
    "grpo.max_tokens_per_microbatch",
    "grpo.logprob_chunk",
    "sft.steps",
    "model.remat",
    "model.scan_layers",
    "model.attention",
    "optimizer.offload",
    "rewards.num_workers",
    "rewards.check_on_gold",
    "sampling.slots",
    "sampling.kv_memory",
    "sampling.warm_up",
    "mesh",
    "distributed",
    "checkpoint",
    "eval",
    "health",
    "logging",
)

# Sections, and keys of others, that change no compiled program.
_NO_PROGRAM = (
    *("output_dir", "compiled_file", "tokenizer", "data", "rewards", "sft"),
    *("checkpoint", "eval", "health", "logging"),
)
_NO_PROGRAM_KEYS = (
    *("model.source", "lora.adapter", "sampling.warm_up", "grpo.preset", "grpo.advantage_estimator"),
    *("grpo.scale_rewards", "grpo.aggregation", "grpo.dynamic_sampling_rounds"),
)

_MERGE_TAG = "tag:yaml.org,2002:merge"  # of the key `<<`
_FLOAT = re.compile(
    r"^[-+]?(?:[0-9][0-9_]*\.[0-9_]*(?:[eE][-+]?[0-9]+)?|\.[0-9]+(?:[eE][-+]?[0-9]+)?|[0-9]+[eE][-+]?[0-9]+"
    r"|\.(?:inf|Inf|INF)|[-+]?\.(?:nan|NaN|NAN))$"
)

# The choices of keys that take a function from a file as well; the tables of `rl.loss_types` and `rl.advantages`.
OPEN_CHOICES = {
    "loss_type": (
        *("grpo", "bnpo", "dr_grpo", "dapo", "luspo", "cispo", "sapo", "vespo"),
        *("dppo_tv", "dppo_kl", "gmpo"),
    ),
    "advantage_estimator": ("grpo", "rloo", "maxrl", "reinforce++", "reinforce++_baseline"),
}

DType = Literal["float32", "bfloat16", "float64"]
TUNIX_PREFIX = "tunix:"  # of model.source, before the folder of a model that tunix.models computes


@dataclass(frozen=True, config=_STRICT)
class ArchConfig:
    """Shape of a fresh random model."""

    family: Literal["llama", "qwen2", "qwen3", "gemma3_text"]
    vocab_size: int | None
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rope_theta: float
    max_position_embeddings: int
    tie_word_embeddings: bool
    initializer_range: float


@dataclass(frozen=True, config=_STRICT)
class ModelSection:
    """Where the policy's weights come from and how they compute."""

    source: str | None
    args: dict[str, Any]
    weights: str | None
    param_dtype: DType
    dtype: DType
    remat: Literal["none", "dots", "outputs", "block", "full"]
    scan_layers: bool
    attention: Literal["auto", "xla", "splash", "cudnn"]
    arch: ArchConfig


@dataclass(frozen=True, config=_STRICT)
class LoRASection:
    """Low-rank adapters on a frozen base."""

    rank: int
    alpha: float
    targets: list[str]
    rank_stabilized: bool
    base_dtype: Literal["bfloat16", "int8", "int4", "float8_e4m3fn"] | None
    base_group_size: int | None
    adapter: str | None


@dataclass(frozen=True, config=_STRICT)
class TokenizerSection:
    """Where the tokenizer comes from."""

    source: str | None
    chat_template: str | None


@dataclass(frozen=True, config=_STRICT)
class DataSection:
    """Prompts: source, columns, held-out split."""

    source: str | None
    args: dict[str, Any]
    columns: dict[str, str | None]
    eval_source: str | None
    eval_args: dict[str, Any]
    eval_size: int
    chat: bool
    system_prompt: str | None
    max_prompt_length: int


@dataclass(frozen=True, config=_STRICT)
class RewardFunction:
    """One reward function of the run."""

    function: str
    weight: float = 1.0  # the neutral element of a list entry, which base.yml cannot hold
    name: str | None = None
    kwargs: dict[str, Any] = dataclasses.field(default_factory=dict)


@dataclass(frozen=True, config=_STRICT)
class RewardsSection:
    """Reward functions and the worker processes that run them."""

    functions: list[RewardFunction]
    num_workers: int
    timeout_seconds: float
    check_on_gold: bool
    overlong_buffer: float
    overlong_factor: float


@dataclass(frozen=True, config=_STRICT)
class SamplingSection:
    """How completions are drawn."""

    temperature: float
    top_k: int
    top_p: float
    min_p: float
    repetition_penalty: float
    frequency_penalty: float
    presence_penalty: float
    logit_bias: dict[int, float]
    forbidden_ids: list[int]
    max_completion_length: int
    min_completion_length: int
    stop_strings: list[str]
    eos_ids: list[int] | None
    slots: int | None
    kv_memory: float
    warm_up: bool
    kv_dtype: Literal["int8"] | None
    weight_dtype: Literal["int8", "int4", "float8_e4m3fn"] | None
    weight_group_size: int | None


@dataclass(frozen=True, config=_STRICT)
class GRPOSection:
    """Batch sizes, the loss and the advantage."""

    preset: str | None
    steps: int
    prompts_per_step: int
    group_size: int
    minibatches: int
    epochs: int
    max_tokens_per_microbatch: int
    logprob_chunk: int
    beta: float
    kl_estimator: Literal["k1", "k2", "k3"]
    use_bias_correction_kl: bool
    advantage_estimator: str
    scale_rewards: Literal["group", "batch", "none"]
    aggregation: Literal["sum_then_normalize", "normalize_then_sum"]
    mask_truncated: bool
    dynamic_sampling_rounds: int
    loss_type: str
    importance_sampling_level: Literal["token", "sequence"]
    epsilon: float
    epsilon_high: float | None
    delta: float | None
    off_policy_mask_threshold: float | None
    top_entropy_quantile: float
    old_logprobs: Literal["recompute", "sampler"]
    sampler_is_correction: bool
    sampler_is_mode: Literal["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"]
    sampler_is_clip_min: float | None
    sampler_is_clip_max: float | None
    entropy_coef: float
    use_adaptive_entropy: bool
    entropy_target: float
    entropy_coef_delta: float
    entropy_coef_min: float
    entropy_coef_max: float
    positive_nll_coef: float
    sapo_temperature_pos: float
    sapo_temperature_neg: float
    vespo_k_pos: float
    vespo_lambda_pos: float
    vespo_k_neg: float
    vespo_lambda_neg: float


@dataclass(frozen=True, config=_STRICT)
class ReferenceSection:
    """When the reference of the KL term moves."""

    sync_every: int
    ema: float


@dataclass(frozen=True, config=_STRICT)
class SFTSection:
    """Supervised fine-tuning."""

    steps: int
    batch_size: int
    completion_column: str
    max_completion_length: int


@dataclass(frozen=True, config=_STRICT)
class LearningRateGroup:
    """Parameters whose updates are scaled."""

    pattern: str
    lr_scale: float


@dataclass(frozen=True, config=_STRICT)
class OptimizerSection:
    """Optimizer and learning-rate schedule."""

    name: Literal["adamw", "adafactor", "lion", "muon", "sgd"]
    lr: float
    lr_groups: list[LearningRateGroup]
    schedule: Literal["constant", "linear", "cosine", "wsd"]
    warmup_updates: int
    decay_updates: int | None
    final_lr_ratio: float
    b1: float
    b2: float
    eps: float
    adafactor_min_dim: int
    adafactor_parameter_scale: bool
    lion_b1: float
    lion_b2: float
    muon_momentum: float
    muon_rms: float | None
    sgd_momentum: float
    moment_dtype: Literal["float32", "bfloat16"] | None
    second_moment_dtype: Literal["float32", "bfloat16"] | None
    offload: bool
    weight_decay: float
    weight_decay_params: list[str]
    max_grad_norm: float


@dataclass(frozen=True, config=_STRICT)
class MeshSection:
    """Devices per mesh axis, which axes go over the slow network, and logical axis -> mesh axes."""

    num_devices: int | None
    data: int
    fsdp: int
    tensor: int
    axes: dict[str, int]
    dcn: dict[str, int]
    slice_is: Literal["slice", "process"]
    max_unsharded_share: float
    rules: dict[str, list[str]]
    rollout_rules: dict[str, list[str]]


@dataclass(frozen=True, config=_STRICT)
class DistributedSection:
    """How the processes of a run find each other, and when one counts as dead."""

    auto: bool
    coordinator_address: str | None
    num_processes: int | None
    process_id: int | None
    heartbeat_timeout_seconds: int
    initialization_timeout_seconds: int


@dataclass(frozen=True, config=_STRICT)
class CheckpointSection:
    """When checkpoints are written and how many stay."""

    every: int
    keep: int
    overwrite: bool


@dataclass(frozen=True, config=_STRICT)
class EvalSection:
    """Held-out evaluation."""

    every: int
    reward: str | None
    max_prompts: int | None


@dataclass(frozen=True, config=_STRICT)
class HealthSection:
    """What is warned about, and when a run ends because it does not get anywhere; None: off."""

    max_skipped_updates: int | None
    kl_spike: float | None
    grad_norm_spike: float | None
    spike_window: int
    equal_rewards_share: float | None
    entropy_floor: float | None
    truncated_share: float | None
    patience: int


@dataclass(frozen=True, config=_STRICT)
class LoggingSection:
    """What is written beside the metrics."""

    samples_per_step: int
    compilation_cache: str | None


@dataclass(frozen=True, config=_STRICT)
class Config:
    """A whole resolved configuration; the section classes mirror `configs/base.yml`."""

    pure_nnx: bool
    seed: int
    output_dir: str | None
    compiled_file: str | None
    model: ModelSection
    lora: LoRASection
    tokenizer: TokenizerSection
    data: DataSection
    rewards: RewardsSection
    sampling: SamplingSection
    grpo: GRPOSection
    reference: ReferenceSection
    sft: SFTSection
    optimizer: OptimizerSection
    mesh: MeshSection
    distributed: DistributedSection
    checkpoint: CheckpointSection
    eval: EvalSection
    health: HealthSection
    logging: LoggingSection


_LIST_ENTRIES = {"rewards.functions": RewardFunction, "optimizer.lr_groups": LearningRateGroup}


class _Loader(yaml.SafeLoader):
    """SafeLoader that reads 1e-6 as a float (YAML 1.1 wants a dot) and refuses duplicate keys."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value if key.tag != _MERGE_TAG]
        for key in keys:
            if keys.count(key) > 1:
                raise ValueError(f"{node.start_mark.name}: key {key!r} is given twice, line {node.start_mark.line + 1}")
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """SafeDumper that quotes the strings which `_Loader` would read as numbers."""


_Loader.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+0123456789."))
_Dumper.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+0123456789."))


def load_config(path: str | os.PathLike | None, overrides: Sequence[str] = ()) -> Config:
    """Reads a recipe and applies overrides.

    Args:
      path: a YAML recipe; a bare name such as `base.yml` also finds a recipe shipped in the `configs` package. None:
        defaults only.
      overrides: `dotted.key=value` strings, values in YAML syntax.

    Raises:
      ValueError: file missing or not YAML, unknown key (with the nearest name), wrong type, or keys that contradict
        each other.
    """
    base = _read_yaml(_packaged("base.yml"))
    recipe = _read_recipe(pathlib.Path(path)) if path is not None else {}
    command_line = _parse_overrides(overrides)
    known = set(_flatten(base))
    for layer in (recipe, command_line):
        _check_keys(layer, known)
    explicit = _merge(recipe, command_line)
    preset = (explicit.get("grpo") or {}).get("preset")
    layers = [base, read_preset(preset) if preset else {}, explicit]
    merged: dict = {}
    for layer in layers:
        merged = _merge(merged, layer)
    config = _build(merged)
    _check(config)
    return config


def read_preset(name: str) -> dict[str, Any]:
    """What a preset sets, by section. Its file holds keys of `grpo`, and those of another section below its name.

    Raises ValueError for a name that has no file in configs/presets.
    """
    folder = _packaged("presets")
    names = sorted(entry.name.removesuffix(".yml") for entry in folder.iterdir() if entry.name.endswith(".yml"))
    if name not in names:
        raise ValueError(f"grpo.preset must be one of {names}, got {name!r}")
    keys = _read_yaml(folder / f"{name}.yml")
    sections = {key: value for key, value in keys.items() if isinstance(value, dict)}
    return {"grpo": {key: value for key, value in keys.items() if key not in sections}, **sections}


def preset_values(config: Config) -> dict[str, Any]:
    """The keys of the run's preset as they are now; other sections' with the name of the section."""
    if config.grpo.preset is None:
        return {}
    keys = _flatten(read_preset(config.grpo.preset))
    values = _flatten(to_dict(config))
    return {key.removeprefix("grpo."): values[key] for key in keys}


def to_dict(config: Config) -> dict[str, Any]:
    """The configuration as nested plain dicts, in the order of base.yml."""
    return dataclasses.asdict(config)  # pyright: ignore[reportArgumentType]


def dump_config(config: Config) -> str:
    """The resolved configuration as YAML that `load_config` reads back to an equal object."""
    return yaml.dump(to_dict(config), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)


def differences(old: Config, new: Config) -> dict[str, tuple[Any, Any]]:
    """Keys that decide what a step computes and differ: {dotted key: (old, new)}. Empty: `new` may resume `old`'s
    run.
    """
    old_flat, new_flat = _flatten(to_dict(old)), _flatten(to_dict(new))
    fixed = [key for key in new_flat if not any(key == free or key.startswith(free + ".") for free in RESUMABLE_KEYS)]
    if new.optimizer.schedule != "constant":
        fixed += ["grpo.steps", "sft.steps"]
    return {key: (old_flat.get(key), new_flat[key]) for key in fixed if old_flat.get(key) != new_flat[key]}


def program_keys(config: Config) -> dict[str, Any]:
    """The keys that decide which programs a GRPO run compiles: {dotted key: value}."""
    flat = _flatten(to_dict(config))
    free = [key for key in flat if key.split(".")[0] in _NO_PROGRAM and key != "data.max_prompt_length"]
    free += ["grpo.steps"] if config.optimizer.schedule == "constant" else []
    return {key: value for key, value in flat.items() if key not in free and key not in _NO_PROGRAM_KEYS}


def require(value: Any, key: str, example: str) -> Any:
    """Returns `value`; ValueError when a key without a usable default was not set."""
    if value in (None, [], ""):
        raise ValueError(f"{key} must be set, got {value!r}; for example {key}={example}")
    return value


def is_user_function(value: str) -> bool:
    """Whether the value of a key in `OPEN_CHOICES` names a function in a file."""
    return bool(re.search(r"\.py:\w+$", value))


def source_kind(source: str | None) -> Literal["decoder", "own", "tunix"]:
    """What model.source stands for: the toolkit's decoder (pretrained or fresh), a user's module, a Tunix model."""
    if source is not None and is_user_function(source):
        return "own"
    return "tunix" if source is not None and source.startswith(TUNIX_PREFIX) else "decoder"


def _packaged(name: str):
    return importlib.resources.files("configs") / name


def _read_recipe(path: pathlib.Path, seen: tuple[pathlib.Path, ...] = ()) -> dict:
    """A recipe with what it inherits merged in; base.yml itself is layered below by the caller."""
    if not path.is_file():
        packaged = _packaged(path.name)
        if len(path.parts) == 1 and packaged.is_file():
            path = pathlib.Path(str(packaged))
        else:
            raise ValueError(f"config file {str(path)!r} does not exist (working directory {os.getcwd()})")
    path = path.resolve()
    if path == pathlib.Path(str(_packaged("base.yml"))).resolve():
        return {}  # its values are the defaults; as a recipe's own they would win over a preset
    if path in seen:
        raise ValueError(f"config file {path} inherits from itself")
    recipe = _read_yaml(path)
    parent = recipe.pop("inherit", "base.yml")
    if not isinstance(parent, str):
        raise ValueError(f"{path}: inherit must be the path of one recipe, got {parent!r}")
    if parent == "base.yml":
        return recipe
    beside = path.parent / parent
    return _merge(_read_recipe(beside if beside.is_file() else pathlib.Path(parent), (*seen, path)), recipe)


def _read_yaml(path) -> dict:
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid YAML: {error}") from error
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
            raise ValueError(f"an override must look like dotted.key=value, got {text!r}")
        try:
            parsed = yaml.load(value, Loader=_Loader) if value else None
        except yaml.YAMLError as error:
            raise ValueError(f"the value of override {text!r} is not valid YAML: {error}") from error
        nested: Any = parsed
        for part in reversed(key.split(".")):
            nested = {part: nested}
        result = _merge(result, nested)
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


def _flatten(tree: Mapping, prefix: str = "") -> dict[str, Any]:
    """{dotted key: value}; free-form mappings are values."""
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        key = f"{prefix}{name}"
        if isinstance(value, Mapping) and key not in _FREE_FORM:
            flat.update(_flatten(value, key + "."))
        else:
            flat[key] = value
    return flat


def _check_keys(layer: Mapping, known: set[str]) -> None:
    sections = {key[: match.start()] for key in known for match in re.finditer(r"\.", key)}
    for key, value in _flatten(layer).items():
        if key in sections or (key in _FREE_FORM and not isinstance(value, Mapping)):
            raise ValueError(f"{key} must be a mapping of keys, got {value!r}")
        if key not in known:
            near = _nearest(key, sorted(known))
            hint = f"; did you mean {near!r}?" if near else ""
            raise ValueError(f"unknown config key {key!r}{hint} (configs/base.yml lists every key)")


def _nearest(key: str, known: Sequence[str]) -> str | None:
    """The known key that was probably meant: its name in another section, else a similar key, else a similar name."""
    leaves = {name: name.rpartition(".")[2] for name in known}
    leaf = key.rpartition(".")[2]
    near = difflib.get_close_matches(key, [name for name in known if leaves[name] == leaf], n=1, cutoff=0.0)
    near = near or difflib.get_close_matches(key, known, n=1)
    if not near:
        similar = difflib.get_close_matches(leaf, leaves.values(), n=1)
        near = [name for name in known if leaves[name] in similar]
    return near[0] if near else None


def _build(merged: dict) -> Config:
    try:
        # Through JSON, because pydantic's strict mode takes mappings for dataclasses only there.
        return pydantic.TypeAdapter(Config).validate_json(json.dumps(merged))
    except TypeError as error:
        raise ValueError(
            f"invalid configuration: {error}; values are numbers, strings, booleans, null, lists and mappings"
        ) from error
    except pydantic.ValidationError as error:
        raise ValueError("invalid configuration: " + "; ".join(map(_problem, error.errors()))) from error


def _problem(item: Mapping[str, Any]) -> str:
    key = ".".join(map(str, item["loc"]))
    if item["type"] == "unexpected_keyword_argument":  # in a list entry; other keys are compared with base.yml before
        entries = ".".join(map(str, item["loc"][:2]))
        names = [field.name for field in dataclasses.fields(_LIST_ENTRIES[entries])]
        return f"unknown config key {key!r}; an entry of {entries} has {names}"
    return f"{key}: {item['msg']}, got {item['input']!r}"


def _at_least(config: Config, minimum: int | float, *keys: str) -> None:
    flat = _flatten(to_dict(config))
    for key in keys:
        if flat[key] is not None and not flat[key] >= minimum:
            raise ValueError(f"{key} must be >= {minimum}, got {flat[key]}")


def _check(config: Config) -> None:
    """Ranges and cross-field rules that hold for every command."""
    grpo, sampling = config.grpo, config.sampling
    if grpo.group_size < 2:
        raise ValueError(f"grpo.group_size must be >= 2 for a group baseline, got {grpo.group_size}")
    _at_least(config, 1, "grpo.steps", "grpo.prompts_per_step", "grpo.minibatches", "grpo.epochs", "grpo.logprob_chunk")
    _at_least(config, 1, "grpo.max_tokens_per_microbatch", "sampling.max_completion_length")
    _at_least(config, 1, "sft.steps", "sft.batch_size", "sft.max_completion_length", "data.max_prompt_length")
    _at_least(config, 1, "rewards.num_workers", "checkpoint.every", "checkpoint.keep", "eval.max_prompts")
    _at_least(config, 1, "mesh.num_devices", "sampling.slots")
    _at_least(config, 1, "distributed.num_processes", "distributed.initialization_timeout_seconds")
    _at_least(config, 5, "distributed.heartbeat_timeout_seconds")
    _at_least(config, 0, "distributed.process_id", "mesh.max_unsharded_share")
    if not 0 < sampling.kv_memory <= 1:
        raise ValueError(f"sampling.kv_memory must be a share of memory in (0, 1], got {sampling.kv_memory}")
    _at_least(
        config,
        0,
        "eval.every",
        "grpo.dynamic_sampling_rounds",
        "rewards.overlong_buffer",
        "rewards.overlong_factor",
        "reference.sync_every",
        "data.eval_size",
        "logging.samples_per_step",
        "grpo.beta",
        "grpo.epsilon",
    )
    _at_least(config, 0, "sampling.top_k", "sampling.temperature", "sampling.min_p", "sampling.min_completion_length")
    _at_least(config, 0, "seed")
    _check_model(config)
    _check_lora(config)
    _check_group_sizes(config)
    _check_optimizer(config)
    _check_health(config)
    if grpo.prompts_per_step % grpo.minibatches:
        fits = [n for n in range(1, grpo.prompts_per_step + 1) if grpo.prompts_per_step % n == 0]
        raise ValueError(
            f"grpo.minibatches must divide grpo.prompts_per_step ({grpo.prompts_per_step}), got {grpo.minibatches}; "
            f"these fit: {fits}"
        )
    if sampling.min_completion_length > sampling.max_completion_length:
        raise ValueError(
            "sampling.min_completion_length must be <= sampling.max_completion_length "
            f"({sampling.max_completion_length}), got {sampling.min_completion_length}"
        )
    for key, value, low in (
        ("sampling.top_p", sampling.top_p, 0.0),
        ("grpo.top_entropy_quantile", grpo.top_entropy_quantile, -1e-9),
    ):
        if not low < value <= 1.0:
            raise ValueError(f"{key} must be in (0, 1], got {value}")
    if not sampling.min_p < 1.0:
        raise ValueError(f"sampling.min_p must be in [0, 1), got {sampling.min_p}")
    if not sampling.repetition_penalty > 0:
        raise ValueError(f"sampling.repetition_penalty must be > 0 (1 is off), got {sampling.repetition_penalty}")
    for key, ids in (("logit_bias", sampling.logit_bias), ("forbidden_ids", sampling.forbidden_ids)):
        if any(token < 0 for token in ids):
            raise ValueError(f"sampling.{key} must hold token ids >= 0, got {sorted(ids)}")
    if not config.rewards.timeout_seconds > 0:
        raise ValueError(f"rewards.timeout_seconds must be > 0, got {config.rewards.timeout_seconds}")
    for key, choices in OPEN_CHOICES.items():
        value = getattr(grpo, key)
        if value not in choices and not is_user_function(value):
            raise ValueError(f"grpo.{key}: must be one of {list(choices)} or path/to/file.py:function, got {value!r}")
    if grpo.loss_type == "cispo" and grpo.epsilon_high is None:
        raise ValueError(
            "grpo.epsilon_high must be set with loss_type cispo, where it is the cap of the ratio itself and not a "
            "distance from 1, got null; for example grpo.epsilon_high=5.0"
        )
    if grpo.old_logprobs == "sampler" and grpo.sampler_is_correction:
        raise ValueError(
            "grpo.sampler_is_correction must be false with grpo.old_logprobs=sampler, whose ratio of old to sampler is "
            "1, got true; set grpo.old_logprobs=recompute to correct for the difference"
        )
    if grpo.loss_type == "vespo" and grpo.sampler_is_correction and not grpo.sampler_is_mode.startswith("token_"):
        raise ValueError(
            "grpo.sampler_is_mode must be token_truncate or token_mask with loss_type vespo, "
            f"got {grpo.sampler_is_mode!r}"
        )
    if config.reference.sync_every and not grpo.beta:
        raise ValueError(
            f"grpo.beta must be > 0 with reference.sync_every {config.reference.sync_every}, got {grpo.beta}: without "
            "a KL term there is no reference; set reference.sync_every to 0"
        )
    if not 0 < config.reference.ema <= 1:
        raise ValueError(f"reference.ema must be in (0, 1], got {config.reference.ema}; 1 copies the policy")
    if config.reference.ema != 1 and not config.reference.sync_every:
        raise ValueError(
            f"reference.sync_every must be > 0 with reference.ema {config.reference.ema}, got 0: it never moves"
        )
    if config.rewards.overlong_buffer > 1:
        raise ValueError(
            "rewards.overlong_buffer must be a share of sampling.max_completion_length in [0, 1], got "
            f"{config.rewards.overlong_buffer}; 0 turns the punishment off"
        )
    names = [function.name or function.function for function in config.rewards.functions]
    if config.rewards.overlong_buffer and "overlong" in names:
        raise ValueError(
            "rewards.functions must not name a function 'overlong' while rewards.overlong_buffer is set, whose "
            f"punishment has this name, got {names}; give it another `name`"
        )
    if len(set(names)) < len(names):
        raise ValueError(f"rewards.functions must have distinct names, got {names}; set `name` on each")
    if config.eval.reward is not None and config.rewards.functions and config.eval.reward not in names:
        raise ValueError(f"eval.reward must name one of rewards.functions {names}, got {config.eval.reward!r}")
    if config.data.eval_source is not None and config.data.eval_size:
        raise ValueError(f"data.eval_size must be 0 when data.eval_source is set, got {config.data.eval_size}")


def _check_health(config: Config) -> None:
    section = config.health
    _at_least(config, 1, "health.max_skipped_updates", "health.patience")
    _at_least(config, 10, "health.spike_window")
    _at_least(config, 0, "health.entropy_floor")
    for name in ("kl_spike", "grad_norm_spike"):
        value = getattr(section, name)
        if value is not None and not value > 0:
            raise ValueError(f"health.{name} must be > 0 or null (off), got {value}")
    for name in ("equal_rewards_share", "truncated_share"):
        value = getattr(section, name)
        if value is not None and not 0 < value <= 1:
            raise ValueError(f"health.{name} must be a share in (0, 1] or null (off), got {value}")


def _check_model(config: Config) -> None:
    """Keys that only some kinds of model have."""
    section, kind = config.model, source_kind(config.model.source)
    if kind != "own":
        for key, value in (("args", section.args), ("weights", section.weights)):
            if value:
                raise ValueError(
                    f"model.{key} belongs to a module of your own (model.source: path/to/file.py:build), got {value!r} "
                    f"with model.source {section.source!r}; leave it out"
                )
    if kind == "decoder":
        return
    rules = {
        "lora.rank": (config.lora.rank, 0),
        "sampling.kv_dtype": (config.sampling.kv_dtype, None),
        "sampling.weight_dtype": (config.sampling.weight_dtype, None),
        "model.scan_layers": (section.scan_layers, False),
        "model.attention": (section.attention, "auto"),
        "mesh.rollout_rules": (config.mesh.rollout_rules, {}),
        "compiled_file": (config.compiled_file, None),
    }
    if kind == "own":
        rules["model.remat"] = (section.remat, "none")
    if config.optimizer.name == "muon":
        raise ValueError(
            f"optimizer.name must not be muon with model.source {section.source!r}, whose matrices it cannot tell "
            "inputs and outputs of; use adamw"
        )
    for key, (value, needed) in rules.items():
        if value != needed:
            raise ValueError(
                f"{key} must be {json.dumps(needed)} with model.source {section.source!r}, got "
                f"{value!r}: it is a part of the toolkit's own decoder; leave it out"
            )


def _check_lora(config: Config) -> None:
    """Ranges, and keys that contradict a frozen base. Whether a target matches is known with the model only."""
    section = config.lora
    _at_least(config, 0, "lora.rank")
    if not section.rank and section.adapter is None:
        for key in ("base_dtype", "base_group_size"):
            value = getattr(section, key)
            if value is not None:
                raise ValueError(
                    f"lora.{key} must be null without adapters (lora.rank 0, no lora.adapter), got {value!r}; "
                    "set lora.rank"
                )
        return
    if not section.alpha > 0:
        raise ValueError(f"lora.alpha must be > 0, got {section.alpha}")
    if not section.targets:
        raise ValueError('lora.targets must hold a pattern, got []; "*_proj" is every matrix of attention and mlp')
    if section.adapter is not None and config.model.source is None:
        raise ValueError(
            f"lora.adapter needs the model that it belongs to, got {section.adapter!r} with model.source null; "
            "set model.source"
        )
    if config.reference.sync_every:
        raise ValueError(
            f"reference.sync_every must be 0 with adapters, whose reference is the frozen base, got "
            f"{config.reference.sync_every}"
        )
    if section.base_dtype == config.model.param_dtype:
        raise ValueError(
            f"lora.base_dtype must be another than model.param_dtype, got {section.base_dtype!r} for both; leave it out"
        )
    if section.base_dtype not in (None, "bfloat16") and config.sampling.weight_dtype is not None:
        raise ValueError(
            f"sampling.weight_dtype must be null with lora.base_dtype {section.base_dtype}, which is read in decoding "
            f"as well, got {config.sampling.weight_dtype!r}"
        )


def _check_group_sizes(config: Config) -> None:
    """Groups are of quantised weights only. Whether they divide a matrix is known with the model only."""
    for section, size_key, dtype_key in (
        ("lora", "base_group_size", "base_dtype"),
        ("sampling", "weight_group_size", "weight_dtype"),
    ):
        values = getattr(config, section)
        size, dtype = getattr(values, size_key), getattr(values, dtype_key)
        if size is None:
            continue
        if size < 1:
            raise ValueError(f"{section}.{size_key} must be >= 1 or null, got {size}")
        if dtype in (None, "bfloat16"):
            raise ValueError(
                f"{section}.{size_key} must be null where no weights are quantised, got {size} with "
                f"{section}.{dtype_key} {dtype!r}"
            )


def _check_optimizer(config: Config) -> None:
    """Ranges, and settings that the chosen optimizer or schedule needs or cannot have."""
    section = config.optimizer
    _at_least(
        config, 0, "optimizer.lr", "optimizer.warmup_updates", "optimizer.weight_decay", "optimizer.max_grad_norm"
    )
    _at_least(config, 1, "optimizer.decay_updates", "optimizer.adafactor_min_dim")
    for name in ("b1", "b2", "lion_b1", "lion_b2", "muon_momentum", "sgd_momentum"):
        value = getattr(section, name)
        if not 0.0 <= value < 1.0:
            raise ValueError(f"optimizer.{name} must be in [0, 1), got {value}")
    for name, value in (("eps", section.eps), ("muon_rms", section.muon_rms)):
        if value is not None and not value > 0:
            raise ValueError(f"optimizer.{name} must be > 0, got {value}")
    if not 0.0 <= section.final_lr_ratio <= 1.0:
        raise ValueError(f"optimizer.final_lr_ratio must be in [0, 1], got {section.final_lr_ratio}")
    for index, group in enumerate(section.lr_groups):
        if not group.lr_scale >= 0:
            raise ValueError(f"optimizer.lr_groups.{index}.lr_scale must be >= 0, got {group.lr_scale}")
    if section.schedule == "wsd" and section.decay_updates is None:
        raise ValueError(
            "optimizer.decay_updates must be set with optimizer.schedule wsd, got null; about a tenth of the run's "
            "updates is usual"
        )
    if section.second_moment_dtype is not None and section.name not in ("adamw", "muon"):
        raise ValueError(
            f"optimizer.second_moment_dtype must be null with optimizer.name {section.name}, which has no full second "
            f"moment, got {section.second_moment_dtype!r}; leave it out"
        )
    # A change below half of the last of 8 bits is lost: the moment stands still a share of 2^-8 / (1 - b2) from its
    # target, here at most a quarter.
    if section.second_moment_dtype == "bfloat16" and 1 - section.b2 < 2**-6:
        raise ValueError(
            f"optimizer.b2 must be <= {1 - 2**-6:.3f} with optimizer.second_moment_dtype bfloat16, got {section.b2}: "
            "the moment's changes would be lost to rounding; lower b2, 0.98 for instance, or keep it in float32"
        )
    no_moment = section.name == "adafactor" or (section.name == "sgd" and not section.sgd_momentum)
    if section.moment_dtype is not None and no_moment:
        way_out = "set optimizer.sgd_momentum or leave it out" if section.name == "sgd" else "leave it out"
        raise ValueError(
            f"optimizer.moment_dtype must be null with optimizer.name {section.name}, which keeps no first moment "
            f"here, got {section.moment_dtype!r}; {way_out}"
        )
