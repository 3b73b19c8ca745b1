"""Rules for single values of a configuration: plain JSON, the range of every number, possible paths.

In: plain values, or a `Config` of the right types. Out: nothing, or a ValueError with key, rule, value and way out. Not
here: rules across keys (`rl.config.rules`).
"""

import dataclasses
import math
import os
import pathlib
import struct
from collections.abc import Iterator
from typing import Any

from rl.config.sections import LIST_ENTRIES, MAPPING_ENTRIES, Config, flatten, to_dict
from rl.files.json_file import shown

# Steps, sizes and ids become int32 on a device, numbers float32.
LARGEST_SEED = 2**32 - 1  # of which jax.random.key sees every bit
LARGEST_INT = 2**31 - 1
LARGEST_FLOAT = 3e38
SMALLEST_FLOAT = 1e-37  # what is closer to 0 is 0 on a device
LARGEST_GROUP = 2**16  # completions of a prompt
_LONGEST_NAME, _LONGEST_PATH = 255, 4095  # bytes, of Linux and macOS (1,023 there)

# Keys whose value may be a path. Some also take a name, which the same limits suit.
PATH_KEYS = (
    *("output_dir", "compiled_file", "model.source", "model.weights", "lora.adapter"),
    *("tokenizer.source", "tokenizer.chat_template"),
    *("data.source", "data.eval_source", "data.prepare", "data.sources.*.source", "data.sources.*.prepare"),
    *("data.few_shot", "data.sources.*.few_shot"),
    *("eval.sets.*.source", "eval.sets.*.prepare", "eval.sets.*.few_shot"),
    *("rollout.tools.*", "rollout.environment", "rollout.environment.*", "rollout.agent"),
    *("rewards.functions.*.function", "logging.compilation_cache", "logging.trackers.*"),
    *("grpo.loss_type", "grpo.advantage_estimator", "sampling.source", "checkpoint.staging"),
)


@dataclasses.dataclass(frozen=True)
class Range:
    """Where a number must lie.

    Attributes:
      low, high: the bounds; None: whatever a device can hold.
      above, below: whether low or high itself is left out.
      note: follows the rule in a message.
    """

    low: float | None = None
    high: float | None = None
    above: bool = False
    below: bool = False
    note: str = ""

    def contains(self, value: float) -> bool:
        """Whether the number lies in the range."""
        if self.low is not None and (value <= self.low if self.above else value < self.low):
            return False
        return self.high is None or (value < self.high if self.below else value <= self.high)

    def rule(self, value: float) -> str:
        """The rule that a number outside the range breaks: the whole range of a share, else the bound on that side."""
        if (self.low, self.high) == (0, 1):
            return f"in {'(' if self.above else '['}0, 1{')' if self.below else ']'}{self.note}"
        if self.low is not None and value <= self.low:
            return f"{'>' if self.above else '>='} {self.low}{self.note}"
        return f"{'<' if self.below else '<='} {self.high}{self.note}"


_ANY, _COUNT, _SIZE = Range(), Range(0), Range(1)
_NOT_NEGATIVE, _POSITIVE = Range(0), Range(0, above=True)
_SHARE, _BELOW_ONE = Range(0, 1), Range(0, 1, below=True)
_OFF = " or null (off)"

# Every key that holds a number, or numbers (*: each entry of a list or mapping).
RANGES = {
    "seed": Range(0, LARGEST_SEED),
    "model.arch.vocab_size": _SIZE,
    "model.arch.hidden_size": _SIZE,
    "model.arch.intermediate_size": _SIZE,
    "model.arch.num_layers": Range(1, 1000),
    "model.arch.num_heads": _SIZE,
    "model.arch.num_kv_heads": _SIZE,
    "model.arch.head_dim": _SIZE,
    "model.arch.rope_theta": _POSITIVE,
    "model.arch.max_position_embeddings": _SIZE,
    "model.arch.initializer_range": _POSITIVE,
    "lora.rank": _COUNT,
    "lora.alpha": _POSITIVE,
    "lora.base_group_size": Range(1, note=" or null"),
    "data.sources.*.weight": _POSITIVE,
    "data.sources.*.count": _SIZE,
    "data.sources.*.eval_size": _COUNT,
    "data.block_size": Range(1, 1e8),
    "data.mixture_temperature": Range(0, above=True, note=" or null"),
    "data.eval_size": _COUNT,
    "data.eval_share": _BELOW_ONE,
    "data.sources.*.eval_share": Range(0, 1, below=True, note=" or null"),
    "data.max_prompt_length": _SIZE,
    "data.curriculum.band.*": _ANY,
    "data.curriculum.floor": Range(0.01, 1, note=", a share; 0 would leave rows out for good"),
    "data.curriculum.memory": _BELOW_ONE,
    "rewards.functions.*.weight": _ANY,
    "rewards.num_workers": Range(1, 1000),
    "rewards.timeout_seconds": Range(0, 1e6, above=True),
    "rewards.retries": Range(0, 1000, note=", calls; 0 makes none again"),
    "rewards.max_failed_share": Range(0, 1, note=", a share of the completions; 1 never ends the run"),
    "rewards.model_tokens": _SIZE,
    "rewards.memory_gb": Range(0, 1e6, above=True, note=" or null (no limit)"),
    "rewards.overlong_buffer": Range(0, 1, note=", a share of sampling.max_completion_length; 0 turns it off"),
    "rewards.overlong_factor": _NOT_NEGATIVE,
    "sampling.temperature": _NOT_NEGATIVE,
    "sampling.top_k": _COUNT,
    "sampling.top_p": Range(0, 1, above=True),
    "sampling.min_p": _BELOW_ONE,
    "sampling.repetition_penalty": Range(0, above=True, note=" (1 is off)"),
    "sampling.frequency_penalty": _ANY,
    "sampling.presence_penalty": _ANY,
    "sampling.logit_bias.*": _ANY,
    "sampling.forbidden_ids.*": _COUNT,
    "sampling.max_completion_length": _SIZE,
    "sampling.min_completion_length": _COUNT,
    "sampling.eos_ids.*": _COUNT,
    "sampling.slots": _SIZE,
    "sampling.kv_memory": Range(0, 1, above=True, note=", a share of memory"),
    "sampling.weight_group_size": Range(1, note=" or null"),
    "rollout.environment_weight": _ANY,
    "rollout.max_turns": _SIZE,
    "rollout.max_sequences": _SIZE,
    "grpo.turn_discount": Range(0, 1),
    "rollout.max_turn_tokens": Range(1, note=" or null"),
    "rollout.max_episode_tokens": Range(1, note=" or null"),
    "rollout.num_workers": Range(1, 1000),
    "rollout.episodes_per_worker": Range(1, 1e6),
    "rollout.step_timeout_seconds": Range(0, 1e6, above=True),
    "rollout.episode_timeout_seconds": Range(0, 1e6, above=True),
    "rollout.memory_gb": Range(0, 1e6, above=True, note=" or null (no limit)"),
    "grpo.steps": _SIZE,
    "grpo.prompts_per_step": _SIZE,
    "grpo.group_size": Range(2, note=" for a group baseline"),
    "grpo.minibatches": _SIZE,
    "grpo.epochs": _SIZE,
    "grpo.max_tokens_per_microbatch": _SIZE,
    "grpo.logprob_chunk": _SIZE,
    "grpo.beta": _NOT_NEGATIVE,
    "grpo.dynamic_sampling_rounds": _COUNT,
    "grpo.epsilon": _NOT_NEGATIVE,
    "grpo.epsilon_high": _NOT_NEGATIVE,
    "grpo.delta": Range(0, above=True, note=_OFF),
    "grpo.off_policy_mask_threshold": Range(0, note=_OFF),
    "grpo.top_entropy_quantile": _SHARE,
    "grpo.sampler_is_clip_min": Range(0, note=_OFF),
    "grpo.sampler_is_clip_max": Range(0, above=True, note=_OFF),
    "grpo.entropy_coef": _NOT_NEGATIVE,
    "grpo.entropy_target": _NOT_NEGATIVE,
    "grpo.entropy_coef_delta": _NOT_NEGATIVE,
    "grpo.entropy_coef_min": _NOT_NEGATIVE,
    "grpo.entropy_coef_max": _NOT_NEGATIVE,
    "grpo.positive_nll_coef": _NOT_NEGATIVE,
    "grpo.sapo_temperature_pos": _POSITIVE,
    "grpo.sapo_temperature_neg": _POSITIVE,
    "grpo.vespo_k_pos": _NOT_NEGATIVE,
    "grpo.vespo_lambda_pos": _NOT_NEGATIVE,
    "grpo.vespo_k_neg": _NOT_NEGATIVE,
    "grpo.vespo_lambda_neg": _NOT_NEGATIVE,
    "reference.sync_every": _COUNT,
    "reference.ema": Range(0, 1, above=True, note="; 1 copies the policy"),
    "sft.steps": _SIZE,
    "sft.batch_size": _SIZE,
    "sft.max_completion_length": _SIZE,
    "optimizer.lr": _NOT_NEGATIVE,
    "optimizer.lr_groups.*.lr_scale": _NOT_NEGATIVE,
    "optimizer.warmup_updates": _COUNT,
    "optimizer.schedule_updates": _SIZE,
    "optimizer.decay_updates": _SIZE,
    "optimizer.final_lr_ratio": _SHARE,
    "optimizer.b1": _BELOW_ONE,
    "optimizer.b2": _BELOW_ONE,
    "optimizer.eps": _POSITIVE,
    "optimizer.adafactor_min_dim": _SIZE,
    "optimizer.lion_b1": _BELOW_ONE,
    "optimizer.lion_b2": _BELOW_ONE,
    "optimizer.muon_momentum": _BELOW_ONE,
    "optimizer.muon_rms": _POSITIVE,
    "optimizer.sgd_momentum": _BELOW_ONE,
    "optimizer.weight_decay": _NOT_NEGATIVE,
    "optimizer.max_grad_norm": _NOT_NEGATIVE,
    # Devices on an axis, -1 for the rest. `rl.devices.mesh`, which knows the devices, checks these.
    "mesh.num_devices": _SIZE,
    "mesh.data": _ANY,
    "mesh.fsdp": _ANY,
    "mesh.tensor": _ANY,
    "mesh.axes.*": _ANY,
    "mesh.dcn.*": _ANY,
    "mesh.max_unsharded_share": _NOT_NEGATIVE,
    "distributed.num_processes": _SIZE,
    "distributed.process_id": _COUNT,
    "distributed.heartbeat_timeout_seconds": Range(5, 10**6),
    "distributed.initialization_timeout_seconds": Range(1, 10**6),
    "checkpoint.every": _SIZE,
    "checkpoint.keep": _SIZE,
    "eval.every": _COUNT,
    "eval.max_prompts": _SIZE,
    "eval.sets.*.max_prompts": _SIZE,
    "eval.sets.*.samples": Range(1, LARGEST_GROUP),
    "eval.sets.*.temperature": _NOT_NEGATIVE,
    "eval.sets.*.top_k": _COUNT,
    "eval.sets.*.top_p": Range(0, 1, above=True),
    "eval.sets.*.seed": Range(0, LARGEST_SEED),
    "eval.sets.*.ks.*": _SIZE,
    "eval.block_size": _SIZE,
    "eval.resamples": Range(100, 10**6),
    "eval.keep_samples": _COUNT,
    "eval.patience": Range(1, note=" or null (off)"),
    "eval.min_delta": _NOT_NEGATIVE,
    "health.max_skipped_updates": _SIZE,
    "health.kl_spike": Range(0, above=True, note=_OFF),
    "health.grad_norm_spike": Range(0, above=True, note=_OFF),
    "health.spike_window": Range(10),
    "health.equal_rewards_share": Range(0, 1, above=True, note=_OFF),
    "health.entropy_floor": _NOT_NEGATIVE,
    "health.truncated_share": Range(0, 1, above=True, note=_OFF),
    "health.dominant_share": Range(0, 1, above=True, note=_OFF),
    "health.watch_trend": Range(0, above=True, note=_OFF),
    "health.length_correlation": Range(0, 1, above=True, note=_OFF),
    "health.equal_completions_share": Range(0, 1, above=True, note=_OFF),
    "health.trend_window": Range(10),
    "health.patience": _SIZE,
    "logging.samples_per_step": _COUNT,
    "logging.table_every": _COUNT,
    "logging.tracker_queue": Range(1, 1e6),
    "logging.tracker_wait_seconds": Range(0, 1e6, above=True),
    "profile.steps.*": _SIZE,
}


def check_plain(values: Any, key: str = "") -> None:
    """Refuses numbers that are not finite or do not fit 64 bits, and text that is not Unicode, at any depth."""
    if isinstance(values, dict):
        for name, value in values.items():
            dotted = f"{key}.{name}" if key else str(name)
            _check_text(dotted[:80], str(name))
            check_plain(value, dotted)
    elif isinstance(values, list):
        for index, value in enumerate(values):
            check_plain(value, f"{key}.{index}")
    elif isinstance(values, str):
        _check_text(key, values)
    elif isinstance(values, float) and not math.isfinite(values):
        raise ValueError(f"{key} must be a finite number, got {shown(values)}")
    elif isinstance(values, int) and not -(2**63) <= values < 2**63:
        raise ValueError(f"{key} must be a number of at most 64 bits, got {shown(values)}")


def check_ranges(config: Config) -> None:
    """Checks every number of the configuration, and every path."""
    for key, pattern, value in _entries(config):
        if pattern in RANGES and value is not None:
            _check_number(key, RANGES[pattern], value)
        if pattern in PATH_KEYS and isinstance(value, str):
            check_possible_path(key, value)


def check_possible_path(key: str, value: str) -> None:
    """Refuses a name that no file or folder can have. Whether the path exists is not looked at."""
    if not value:  # as a path it would be the working directory
        raise ValueError(f"{key} must be a name or path, got ''; name one, or leave it out")
    if "\0" in value:
        raise ValueError(f"{key} must be without NUL characters, got {shown(value)}")
    longest = max(len(os.fsencode(part)) for part in value.split("/"))
    if longest > _LONGEST_NAME or len(os.fsencode(value)) > _LONGEST_PATH:
        raise ValueError(
            f"{key} must have at most {_LONGEST_NAME} bytes between slashes and {_LONGEST_PATH} in all, got {longest} "
            f"and {len(value)} in {shown(value)}; name a shorter path"
        )
    if value.startswith("~"):
        try:
            pathlib.Path(value).expanduser()
        except RuntimeError as error:
            raise ValueError(
                f"{key} must be below a home folder that exists, got {shown(value)}; write the path in full"
            ) from error


def _check_number(key: str, limits: Range, value: float) -> None:
    if isinstance(value, int):
        holds = limits.contains(value)
        if holds and limits.high is None and abs(value) > LARGEST_INT:
            raise ValueError(f"{key} must be at most {LARGEST_INT} (32 bits), got {value}")
    else:
        holds = limits.contains(value) and limits.contains(_float32(value) if abs(value) > SMALLEST_FLOAT else value)
        if holds and (abs(value) > LARGEST_FLOAT or 0 < abs(value) < SMALLEST_FLOAT):
            raise ValueError(
                f"{key} must be 0 or between {SMALLEST_FLOAT} and {LARGEST_FLOAT}, what float32 can hold, got {value}"
            )
    if not holds:
        raise ValueError(f"{key} must be {limits.rule(value)}, got {value}")


def _float32(value: float) -> float:
    """The number as a device holds it: 0.99999999 is 1 there."""
    return struct.unpack("f", struct.pack("f", value))[0] if abs(value) < LARGEST_FLOAT else value


def _check_text(key: str, text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{key} must be text in Unicode, got {shown(text)} with half of a surrogate pair; save it as UTF-8"
        ) from error


def _entries(config: Config) -> Iterator[tuple[str, str, Any]]:
    """(key, key with * in place of a user's names and indices, value) for every value but mappings and lists."""
    for key, value in flatten(to_dict(config)).items():
        if key in MAPPING_ENTRIES:
            for name, entry in value.items():
                for field, part in entry.items():
                    parts = enumerate(part) if isinstance(part, list) else [(None, part)]
                    for place, one in parts:
                        end, pattern = ("", "") if place is None else (f".{place}", ".*")
                        yield f"{key}.{name}.{field}{end}", f"{key}.*.{field}{pattern}", one
        elif isinstance(value, dict):
            yield from ((f"{key}.{name}", f"{key}.*", entry) for name, entry in value.items())
        elif key in LIST_ENTRIES:
            for index, entry in enumerate(value):
                yield from ((f"{key}.{index}.{name}", f"{key}.*.{name}", part) for name, part in entry.items())
        elif isinstance(value, list):
            yield from ((f"{key}.{index}", f"{key}.*", entry) for index, entry in enumerate(value))
        else:
            yield key, key, value
