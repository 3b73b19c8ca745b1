"""The sections of a configuration: the name and type of every key.

No defaults (`configs/base.yml` owns them), no files (`rl.config.load`), no rules across keys (`rl.config.rules`).
"""

import dataclasses
import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal

import pydantic
from pydantic.dataclasses import dataclass

from rewards.environment import AGENT, OPENENV

_STRICT = pydantic.ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)
FREE_FORM = (
    "model.args",
    "data.args",
    "data.eval_args",
    "data.columns",
    "data.chat_template_kwargs",
    "grpo.loss_args",
    "sampling.source_args",
    "sampling.logit_bias",
    "rollout.environment",
    "logging.tracker_args",
    "eval.sets",
    "mesh.axes",
    "mesh.dcn",
    "mesh.rules",
    "mesh.rollout_rules",
)

# The trackers that logging.trackers takes by name; each is a module of `rl.run.trackers`.
TRACKER_NAMES = ("tensorboard", "wandb", "trackio", "mlflow")

ENVIRONMENT = "environment"  # the name of the reward that environments give
ONE_OR_MAPPING = ("rollout.environment",)  # of these, keys whose value may also be one text, or null

# The names that grpo.advantage_estimator takes: the table of `rl.algorithms.advantages`. The names of grpo.loss_type
# are not listed here: `rl.algorithms.from_config` reads them from the table of losses.
ESTIMATOR_NAMES = ("grpo", "rloo", "maxrl", "reinforce++", "reinforce++_baseline")

DType = Literal["float32", "bfloat16", "float64"]
REWARD_MODEL_PREFIX = "model:"  # of a reward function, before the folder of a reward model
TUNIX_PREFIX = "tunix:"  # of model.source, before the folder of a model that tunix.models computes


@dataclass(frozen=True, config=_STRICT)
class ArchConfig:
    """Shape of a fresh random model."""

    family: str  # a name of the table in `rl.models.families`
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
    allow_nonfinite: bool
    param_dtype: DType
    dtype: DType
    remat: Literal["none", "dots", "outputs", "block", "full"]
    scan_layers: bool
    attention: str  # auto, or a name of the table in `rl.models.attention_kernels`
    arch: ArchConfig


@dataclass(frozen=True, config=_STRICT)
class LoRASection:
    """What is trained in place of the weights."""

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
class DataSource:
    """One source of a mixture. What is null here is as in the section."""

    source: str
    name: str | None = None
    weight: float | None = None
    count: int | None = None
    args: dict[str, Any] = dataclasses.field(default_factory=dict)
    columns: dict[str, str | None] | None = None
    prepare: str | None = None
    answer_from_messages: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    few_shot: list[dict[str, Any]] | str | None = None
    system_prompt: str | None = None
    assistant_prefill: str | None = None
    eval_size: int = 0
    eval_share: float | None = None

    @property
    def label(self) -> str:
        """Its name in messages and in the column `data_source`."""
        return self.name or self.source


@dataclass(frozen=True, config=_STRICT)
class CurriculumSection:
    """Which rows come first, or more often."""

    by: str | None
    easy_values: Literal["high", "low"]
    mode: Literal["band", "easy_to_hard"]
    band: list[float]
    floor: float
    memory: float


@dataclass(frozen=True, config=_STRICT)
class DataSection:
    """Prompts: source, columns, held-out split."""

    source: str | None
    args: dict[str, Any]
    columns: dict[str, str | None]
    prepare: str | None
    # A source alone stands for an entry with nothing else.
    sources: list[Annotated[DataSource, pydantic.BeforeValidator(lambda e: {"source": e} if isinstance(e, str) else e)]]
    streaming: bool
    block_size: int
    mixture_temperature: float | None
    remove_empty_answers: bool
    remove_duplicates: bool
    remove_overlap: bool
    eval_source: str | None
    eval_args: dict[str, Any]
    eval_size: int
    eval_share: float
    chat: bool
    chat_template_kwargs: dict[str, Any]
    few_shot: list[dict[str, Any]] | str | None
    few_shot_separator: str
    system_prompt: str | None
    assistant_prefill: str | None
    answer_from_messages: bool
    max_prompt_length: int
    curriculum: CurriculumSection

    @property
    def source_names(self) -> list[str]:
        """The names of the sources of a mixture; empty without one."""
        return [entry.label for entry in self.sources]


@dataclass(frozen=True, config=_STRICT)
class RewardFunction:
    """One reward function of the run."""

    function: str
    weight: float = 1.0  # the neutral element of a list entry, which base.yml cannot hold
    name: str | None = None
    kwargs: dict[str, Any] = dataclasses.field(default_factory=dict)
    elementwise: bool | None = None
    needs_group: bool = False

    @property
    def label(self) -> str:
        """Its name in metrics and messages."""
        return self.name or self.function

    @property
    def calls(self) -> Literal["elementwise", "needs_group", "whole_batch"] | None:
        """How it says that it may be called; None: it does not say."""
        if self.needs_group:
            return "needs_group"
        return None if self.elementwise is None else "elementwise" if self.elementwise else "whole_batch"


@dataclass(frozen=True, config=_STRICT)
class RewardsSection:
    """Reward functions and the worker processes that run them."""

    # A name alone stands for an entry with nothing else.
    functions: list[
        Annotated[RewardFunction, pydantic.BeforeValidator(lambda e: {"function": e} if isinstance(e, str) else e)]
    ]
    num_workers: int
    timeout_seconds: float
    retries: int
    on_error: Literal["none", "raise"]
    max_failed_share: float
    model_tokens: int
    memory_gb: float | None
    env: list[str]
    check_on_gold: bool
    overlong_buffer: float
    overlong_factor: float

    @property
    def watched(self) -> list[str]:
        """Names of the functions of weight 0, which are metrics only."""
        return [function.label for function in self.functions if not function.weight]


@dataclass(frozen=True, config=_STRICT)
class SamplingSection:
    """How completions are drawn."""

    source: str | None
    source_args: dict[str, Any]
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
class RolloutSection:
    """Environments, tools and the limits of episodes."""

    tools: list[str]
    environment: str | dict[str, str | None] | None  # `openenv:` without a URL is a mapping to nothing in YAML
    agent: str | None
    environment_weight: float
    max_turns: int
    max_turn_tokens: int | None
    max_episode_tokens: int | None
    max_sequences: int
    tool_role: Literal["tool", "user"]
    tool_format: Literal["auto", "hermes", "llama_json", "llama_pythonic"]
    in_order: bool
    num_workers: int
    episodes_per_worker: int
    step_timeout_seconds: float
    episode_timeout_seconds: float
    memory_gb: float | None

    @property
    def environments(self) -> dict[str, str]:
        """{name: path/to/file.py:Class} of the environments; one without a name has that of its class, a game of
        textarena its own, a server of OpenEnv `openenv`, and an agent `agent`.
        """
        if self.agent is not None:
            return {"agent": AGENT + self.agent}
        if isinstance(self.environment, str):
            is_server = self.environment.startswith(OPENENV)
            return {"openenv" if is_server else self.environment.rpartition(":")[2]: self.environment}
        return {name: value or "" for name, value in (self.environment or {}).items()}

    def refuse_turns(self, command: str) -> None:
        """ValueError for a command that draws single turns."""
        if self.has_turns:
            raise ValueError(
                f"rollout.tools, rollout.environment and rollout.agent must be empty for {command}, which draws single "
                "turns; add rollout.tools=[] rollout.environment=null rollout.agent=null"
            )

    @property
    def has_turns(self) -> bool:
        """Whether a completion is an episode, with an environment, an agent or tools."""
        return bool(self.tools or self.environments)


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
    logprob_chunk: int | None
    beta: float
    kl_estimator: Literal["k1", "k2", "k3"]
    use_bias_correction_kl: bool
    kl_in_reward: bool
    advantage_estimator: str
    scale_rewards: Literal["group", "batch", "none"]
    aggregation: Literal["sum_then_normalize", "normalize_then_sum"]
    turn_advantages: Literal["same_turn", "all_turns"] | None
    turn_discount: float
    mask_truncated: bool
    dynamic_sampling_rounds: int
    loss_type: str
    loss_args: dict[str, Any]
    skip_zero_advantage: bool
    importance_sampling_level: Literal["token", "sequence"]
    epsilon: float
    epsilon_high: float | None
    delta: float | None
    off_policy_mask_threshold: float | None
    top_entropy_quantile: float
    policy_distribution: Literal["full", "sampled"]
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
    schedule_updates: int | None
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
    rules: dict[str, list[Any]]  # of names, or of lists of names: `rl.config.rules`
    rollout_rules: dict[str, list[Any]]


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
class BestSection:
    """Which metric says that a checkpoint is the best one."""

    metric: str | None
    mode: Literal["max", "min"]


@dataclass(frozen=True, config=_STRICT)
class CheckpointSection:
    """When checkpoints are written, how many stay, and whether reading one checks it."""

    every: int
    keep: int
    best: BestSection
    verify: bool
    overwrite: bool
    staging: str | None


@dataclass(frozen=True, config=_STRICT)
class EvalSet:
    """One set of eval.sets. What is null here is as in the section `data`, or as docs/evaluation.md says."""

    source: str | None = None
    args: dict[str, Any] = dataclasses.field(default_factory=dict)
    columns: dict[str, str | None] | None = None
    prepare: str | None = None
    few_shot: list[dict[str, Any]] | str | None = None
    system_prompt: str | None = None
    max_prompts: int | None = None
    functions: list[str] | None = None
    reward: str | None = None
    category: str | None = None
    samples: int = 1
    temperature: float | None = None
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    ks: list[int] | None = None

    @property
    def counted_ks(self) -> list[int]:
        """The numbers of samples for pass@k and maj@k, in rising order."""
        return [self.samples] if self.ks is None else sorted({*self.ks})


@dataclass(frozen=True, config=_STRICT)
class EvalSection:
    """Held-out evaluation."""

    every: int
    reward: str | None
    max_prompts: int | None
    sets: dict[str, EvalSet]
    block_size: int
    resamples: int
    keep_samples: int
    patience: int | None
    min_delta: float


@dataclass(frozen=True, config=_STRICT)
class HealthSection:
    """What is warned about, and when a run that makes no progress ends; None switches a line off."""

    max_skipped_updates: int | None
    kl_spike: float | None
    grad_norm_spike: float | None
    spike_window: int
    equal_rewards_share: float | None
    entropy_floor: float | None
    truncated_share: float | None
    dominant_share: float | None
    watch_trend: float | None
    length_correlation: float | None
    equal_completions_share: float | None
    trend_window: int
    patience: int


@dataclass(frozen=True, config=_STRICT)
class LoggingSection:
    """What is written beside the metrics."""

    samples_per_step: int
    compilation_cache: str | None
    table_every: int
    quiet: bool
    trackers: list[str]
    tracker_args: dict[str, Any]
    tracker_queue: int
    tracker_wait_seconds: float


@dataclass(frozen=True, config=_STRICT)
class ProfileSection:
    """Which steps are traced."""

    steps: list[int]
    memory: bool


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
    rollout: RolloutSection
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
    profile: ProfileSection

    @property
    def is_without_data(self) -> bool:
        """Whether there is no data set, because the environment makes its prompts."""
        return bool(self.rollout.environment) and self.data.source is None and not self.data.sources

    @property
    def longest_completion(self) -> int:
        """Tokens that a completion may have: those that the policy draws, and in an episode all observations."""
        drawn = self.sampling.max_completion_length
        if not self.rollout.has_turns:
            return drawn
        longest = self.rollout.max_episode_tokens
        return 4 * drawn if longest is None else longest


LIST_ENTRIES = {
    "data.sources": DataSource,
    "rewards.functions": RewardFunction,
    "optimizer.lr_groups": LearningRateGroup,
}
MAPPING_ENTRIES = {"eval.sets": EvalSet}  # the same of mappings, whose names are a user's


def to_dict(config: Config) -> dict[str, Any]:
    """The configuration as nested plain dicts, in the order of base.yml."""
    return dataclasses.asdict(config)  # pyright: ignore[reportArgumentType]


def flatten(tree: Mapping, prefix: str = "") -> dict[str, Any]:
    """{dotted key: value}; free-form mappings are values."""
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        key = f"{prefix}{name}"
        if isinstance(value, Mapping) and key not in FREE_FORM:
            flat.update(flatten(value, key + "."))
        else:
            flat[key] = value
    return flat


def prepare_keys(config: Config) -> dict[str, str | None]:
    """{key: its value} of every function that prepares data rows: of the section, of the sources of a mixture, and of
    the sets of evaluations.
    """
    of_sources = {f"data.sources.{i}.prepare": entry.prepare for i, entry in enumerate(config.data.sources)}
    of_sets = {f"eval.sets.{name}.prepare": entry.prepare for name, entry in config.eval.sets.items()}
    return {"data.prepare": config.data.prepare, **of_sources, **of_sets}


def is_user_function(value: str) -> bool:
    """Whether a value names a function in a file, `path/to/file.py:function`."""
    return bool(re.search(r"\.py:\w+$", value))


def reward_model_source(function: str) -> str | None:
    """The folder or hub id of a reward function `model:FOLDER`; None for another function."""
    return function.removeprefix(REWARD_MODEL_PREFIX) if function.startswith(REWARD_MODEL_PREFIX) else None


def reward_models(config: Config) -> dict[str, str]:
    """{name: folder or hub id} of the reward models of a run."""
    found = {entry.label: reward_model_source(entry.function) for entry in config.rewards.functions}
    return {name: source for name, source in found.items() if source is not None}


def source_kind(source: str | None) -> Literal["decoder", "own", "tunix"]:
    """The kind of model behind model.source: the toolkit's decoder (pretrained or fresh), a user's module, a Tunix
    model.
    """
    if source is not None and is_user_function(source):
        return "own"
    return "tunix" if source is not None and source.startswith(TUNIX_PREFIX) else "decoder"
