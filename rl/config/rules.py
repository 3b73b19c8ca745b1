"""Ranges and cross-field rules of a configuration, checked before anything heavy starts.

In: a `Config` whose keys have the right types. Out: nothing, or a ValueError with key, rule, value and way out. Rules
that need devices, data, a tokenizer or the model live where those are loaded.
"""

import json
import re
from collections.abc import Iterable, Sequence
from typing import Any

from rewards.environment import is_ready_made
from rewards.worker_variables import check_memory_gb, check_names
from rl.config.ranges import LARGEST_GROUP, check_ranges
from rl.config.sections import (
    ENVIRONMENT,
    ESTIMATOR_NAMES,
    TRACKER_NAMES,
    TUNIX_PREFIX,
    Config,
    is_user_function,
    prepare_keys,
    reward_model_source,
    source_kind,
)
from rl.files.json_file import shown
from rl.files.stores import check_path

_SET_NAME = re.compile(r"[A-Za-z][\w.-]*", re.ASCII)
# Behind eval/ in the names of metrics of the held-out rows.
_NO_SET_NAMES = frozenset(
    [
        "reward",
        "accuracy",
        "accuracy_low",
        "accuracy_high",
        "prompts",
        "completion_length",
        "truncated_share",
        "turns",
        "tool_calls",
        "episodes",
        "observation_length",
        "environment",
    ]
)


def check_config(config: Config) -> None:
    """Ranges and cross-field rules that hold for every command."""
    check_ranges(config)
    _check_paths(config)
    grpo, sampling = config.grpo, config.sampling
    _check_model(config)
    _check_lora(config)
    _check_group_sizes(config)
    _check_source(config)
    _check_rollout(config)
    _check_logging(config)
    _check_optimizer(config)
    _check_mesh(config)
    _check_distributed(config)
    if grpo.group_size > LARGEST_GROUP:
        raise ValueError(
            f"grpo.group_size must be <= {LARGEST_GROUP}, because the host keeps a record of each completion, got "
            f"{grpo.group_size}"
        )
    if grpo.prompts_per_step % grpo.minibatches:
        fits = [n for n in range(1, min(grpo.prompts_per_step, 1000) + 1) if grpo.prompts_per_step % n == 0]
        raise ValueError(
            f"grpo.minibatches must divide grpo.prompts_per_step ({grpo.prompts_per_step}), got {grpo.minibatches}; "
            f"these fit: {fits}"
        )
    if sampling.min_completion_length > sampling.max_completion_length:
        raise ValueError(
            "sampling.min_completion_length must be <= sampling.max_completion_length "
            f"({sampling.max_completion_length}), got {sampling.min_completion_length}"
        )
    check_memory_gb(config.rewards.memory_gb)
    check_names(config.rewards.env)
    if any(token < 0 for token in sampling.logit_bias):
        raise ValueError(f"sampling.logit_bias must hold token ids >= 0, got {shown(sorted(sampling.logit_bias))}")
    estimator = grpo.advantage_estimator
    if estimator not in ESTIMATOR_NAMES and not is_user_function(estimator):
        raise ValueError(
            f"grpo.advantage_estimator: must be one of {list(ESTIMATOR_NAMES)} or path/to/file.py:function, got "
            f"{shown(estimator)}"
        )
    if grpo.old_logprobs == "sampler" and grpo.sampler_is_correction:
        raise ValueError(
            "grpo.sampler_is_correction must be false with grpo.old_logprobs=sampler, whose ratio of old to sampler is "
            "1, got true; set grpo.old_logprobs=recompute to correct for the difference"
        )
    low, high = grpo.sampler_is_clip_min, grpo.sampler_is_clip_max
    if low is not None and high is not None and low > high:
        raise ValueError(f"grpo.sampler_is_clip_min must be <= grpo.sampler_is_clip_max ({high}), got {low}")
    if grpo.entropy_coef_min > grpo.entropy_coef_max:
        raise ValueError(
            f"grpo.entropy_coef_min must be <= grpo.entropy_coef_max ({grpo.entropy_coef_max}), got "
            f"{grpo.entropy_coef_min}"
        )
    if grpo.kl_in_reward:
        _check_kl_in_reward(config)
    if grpo.turn_advantages is not None:
        _check_turn_advantages(config)
    elif grpo.turn_discount != 1:
        raise ValueError(
            f"grpo.turn_advantages must be same_turn or all_turns with grpo.turn_discount {grpo.turn_discount}, got "
            "null, with which turns have no rewards of their own"
        )
    if config.reference.sync_every and not grpo.beta:
        raise ValueError(
            f"grpo.beta must be > 0 with reference.sync_every {config.reference.sync_every}, got {grpo.beta}: without "
            "a KL term there is no reference; set reference.sync_every to 0"
        )
    if config.reference.ema != 1 and not config.reference.sync_every:
        raise ValueError(
            f"reference.sync_every must be > 0 with reference.ema {config.reference.ema}, got 0: it never moves"
        )
    names = [function.label for function in config.rewards.functions]
    if config.rewards.overlong_buffer and "overlong" in names:
        raise ValueError(
            "rewards.functions must not name a function 'overlong' while rewards.overlong_buffer is set, whose "
            f"punishment has this name, got {shown(names)}; give it another `name`"
        )
    for name, function in zip(names, config.rewards.functions, strict=True):
        is_said = function.kwargs or function.needs_group or function.elementwise is not None
        if reward_model_source(function.function) == "":
            raise ValueError(
                f"rewards.functions: {shown(name)} must name a folder or a hub id behind model:, got nothing"
            )
        if is_said and reward_model_source(function.function) is not None:
            raise ValueError(
                f"rewards.functions: {shown(name)} must have neither kwargs nor elementwise nor needs_group, because a "
                "reward model judges each completion by itself; leave them out"
            )
        if function.needs_group and function.elementwise is not None:
            raise ValueError(
                f"rewards.functions: {shown(name)} must not have both needs_group: true and elementwise: "
                f"{json.dumps(function.elementwise)}, which each say how it is called; drop one of them"
            )
    if len(set(names)) < len(names):
        raise ValueError(f"rewards.functions must have distinct names, got {shown(names)}; set `name` on each")
    counted = [*names, *([ENVIRONMENT] if config.rollout.environments else [])]
    if config.eval.reward is not None and config.rewards.functions and config.eval.reward not in counted:
        raise ValueError(
            f"eval.reward must name one of rewards.functions {shown(counted)}, got {shown(config.eval.reward)}"
        )
    _check_eval(config, counted)
    _check_chat(config)
    _check_data(config)
    for key, value in (("eval_size", config.data.eval_size), ("eval_share", config.data.eval_share)):
        if config.data.eval_source is not None and value:
            raise ValueError(f"data.{key} must be 0 when data.eval_source is set, got {value}")


def _check_eval(config: Config, rewards: Sequence[str]) -> None:
    """The sets of evaluations, and what follows the best of them. rewards: names of the functions that judge."""
    section, best = config.eval, config.checkpoint.best
    for name, entry in section.sets.items():
        key = f"eval.sets.{name}"
        if not _SET_NAME.fullmatch(name) or name in _NO_SET_NAMES:
            raise ValueError(
                f"eval.sets must have names of letters, digits, '_', '.' and '-' that begin with a letter, other than "
                f"{', '.join(sorted(_NO_SET_NAMES))}, which are parts of the names of metrics, got {shown(name)}"
            )
        if name in config.data.source_names:
            raise ValueError(f"eval.sets must not have the name of a source of data.sources, got {shown(name)}")
        names = rewards if entry.functions is None else entry.functions
        if entry.functions == [] or (entry.functions and config.rewards.functions and {*entry.functions} - {*rewards}):
            raise ValueError(
                f"{key}.functions must name some of rewards.functions {shown([*rewards])}, got {shown(entry.functions)}"
            )
        if entry.reward is not None and config.rewards.functions and entry.reward not in names:
            raise ValueError(f"{key}.reward must name one of {shown([*names])}, got {shown(entry.reward)}")
        if entry.source is None and (entry.args or entry.columns or entry.prepare or entry.few_shot):
            raise ValueError(
                f"{key}.source must be set with args, columns, prepare or few_shot, got null, which stands for the "
                "held-out rows of `data`; name a source, or leave these out"
            )
        if entry.samples > 1 and entry.temperature == 0:
            raise ValueError(
                f"{key}.temperature must be > 0 with samples {entry.samples}, got 0, with which all samples of a "
                "prompt are one and the same; leave samples out for greedy decoding"
            )
        if entry.ks == [] or max(entry.counted_ks) > entry.samples:
            raise ValueError(f"{key}.ks must name numbers from 1 to samples ({entry.samples}), got {entry.ks}")
    if best.metric is not None:
        if not best.metric.startswith("eval/"):
            raise ValueError(
                f"checkpoint.best.metric must be a metric of an evaluation, such as eval/accuracy, got "
                f"{shown(best.metric)}"
            )
        if not section.every:
            raise ValueError(
                f"eval.every must be > 0 with checkpoint.best.metric {shown(best.metric)}, got 0, with which nothing "
                "is evaluated"
            )
    for key, value, off in (("patience", section.patience, None), ("min_delta", section.min_delta, 0)):
        if value != off and best.metric is None:
            raise ValueError(
                f"checkpoint.best.metric must be set with eval.{key} {value}, got null: it says which metric is "
                "followed; for example checkpoint.best.metric=eval/accuracy"
            )


def _check_data(config: Config) -> None:
    """Keys of mixtures, and functions that prepare rows."""
    data = config.data
    for key, function in prepare_keys(config).items():
        if function is not None and not is_user_function(function):
            raise ValueError(f"{key} must be path/to/file.py:function, got {shown(function)}")
    band = data.curriculum.band
    if len(band) != 2 or band[0] > band[1]:
        raise ValueError(f"data.curriculum.band must be [lowest, highest], got {shown(band)}")
    if data.curriculum.by == "pass_rate" and data.curriculum.easy_values == "low":
        raise ValueError(
            "data.curriculum.easy_values must be high with data.curriculum.by=pass_rate, got 'low': a high pass rate "
            "is easy"
        )
    _check_streaming(config)
    if data.eval_size and data.eval_share:
        raise ValueError(
            f"data.eval_share must be 0 when data.eval_size is set, got {data.eval_share} and {data.eval_size}; set "
            "one of them to 0"
        )
    if not data.sources:
        if data.mixture_temperature is not None:
            raise ValueError(
                f"data.mixture_temperature must be null without data.sources, got {data.mixture_temperature}; it is "
                "for a mixture"
            )
        return
    for key, value, way_out in (
        ("source", data.source, "put it into the list"),
        (
            "args",
            {name: value for name, value in data.args.items() if value is not None},
            "put them into the entries of the list",
        ),
        ("eval_size", data.eval_size, "give an entry of the list its own eval_size"),
    ):
        if value:
            raise ValueError(f"data.{key} must be left out with data.sources, got {shown(value)}; {way_out}")
    shares = {
        "weight": sum(entry.weight is not None for entry in data.sources),
        "count": sum(entry.count is not None for entry in data.sources),
        "data.mixture_temperature": len(data.sources) if data.mixture_temperature is not None else 0,
    }
    given = {name: count for name, count in shares.items() if count}
    if len(given) > 1 or set(given.values()) - {len(data.sources)}:
        raise ValueError(
            "data.sources must say how much each source is drawn in one way, a weight on each, a count on each, or "
            f"data.mixture_temperature, got {shown(given)} for {len(data.sources)} sources"
        )
    names = [entry.label for entry in data.sources]
    if len(set(names)) < len(names):
        raise ValueError(f"data.sources must have distinct names, got {shown(names)}; set `name` on each")
    if "reward" in names:
        raise ValueError(
            "data.sources must not have the name 'reward', which is a part of the names of metrics; rename it"
        )
    if data.eval_source is not None and any(entry.eval_size or entry.eval_share for entry in data.sources):
        raise ValueError("data.sources: eval_size must be 0 when data.eval_source is set, got rows to hold out twice")
    for place, entry in enumerate(data.sources):
        share = data.eval_share if entry.eval_share is None else entry.eval_share
        if entry.eval_size and share:
            raise ValueError(
                f"data.sources.{place}: rows are held out by eval_size or by eval_share, got {entry.eval_size} and "
                f"{share}; set one of them to 0"
            )


def _check_streaming(config: Config) -> None:
    """Keys that need all rows at once, with data.streaming."""
    data = config.data
    if not data.streaming:
        return
    for key, value, way_out in (
        ("sources", data.source_names, "mix the sources into one file, or leave data.streaming out"),
        ("eval_size", data.eval_size, "data.eval_share or data.eval_source hold rows out"),
        ("remove_duplicates", data.remove_duplicates, "write the file without them"),
        ("curriculum.by", data.curriculum.by, "blocks come in the order of the source, so sort it"),
    ):
        if value:
            raise ValueError(
                f"data.{key} must be left out with data.streaming, which never has all rows at once, got "
                f"{shown(value)}; {way_out}"
            )
    if data.block_size < config.grpo.prompts_per_step:
        raise ValueError(
            f"data.block_size must be >= grpo.prompts_per_step ({config.grpo.prompts_per_step}), got "
            f"{data.block_size}; raise it, for rows are shuffled inside of a block only"
        )


def _check_chat(config: Config) -> None:
    """Keys that belong to chat prompts, and names that a chat template gets from elsewhere."""
    data = config.data
    of_sources = [
        (f"sources.{i}.{key}", getattr(entry, key))
        for i, entry in enumerate(data.sources)
        for key in ("assistant_prefill", "answer_from_messages", "chat_template_kwargs")
    ]
    for key, value in (
        ("chat_template_kwargs", data.chat_template_kwargs),
        ("assistant_prefill", data.assistant_prefill),
        ("answer_from_messages", data.answer_from_messages),
        *of_sources,
    ):
        if value and not data.chat:
            raise ValueError(
                f"data.chat must be true with data.{key}, which is for chat prompts, got false and {shown(value)}; set "
                f"data.chat=true or leave data.{key} out"
            )
    given = [("", data.chat_template_kwargs)]
    given += [(f"sources.{i}.", entry.chat_template_kwargs or {}) for i, entry in enumerate(data.sources)]
    for place, variables in given:
        for name in ("messages", "add_generation_prompt"):
            if name in variables:
                raise ValueError(
                    f"data.{place}chat_template_kwargs must not hold {name!r}, which each prompt gives, got "
                    f"{shown(variables[name])}; leave it out"
                )


def _few_shot_of(config: Config) -> list[tuple[str, Any]]:
    entries = enumerate(config.data.sources)
    of_sources = [(f"data.sources.{i}.few_shot", entry.few_shot) for i, entry in entries]
    return [("data.few_shot", config.data.few_shot), *of_sources]


def _check_paths(config: Config) -> None:
    """Refuses URLs in keys that cannot be URLs. An unknown scheme would otherwise become a folder of that name."""
    model = config.model.source
    reward_functions = {
        f"rewards.functions.{i}.function": entry.function for i, entry in enumerate(config.rewards.functions)
    }
    for key, value in (
        ("output_dir", config.output_dir),
        ("model.source", None if model is None else model.removeprefix(TUNIX_PREFIX)),
        ("model.weights", config.model.weights),
        ("lora.adapter", config.lora.adapter),
        ("tokenizer.source", config.tokenizer.source),
        ("tokenizer.chat_template", config.tokenizer.chat_template),
        ("data.source", config.data.source),
        ("data.eval_source", config.data.eval_source),
        *((f"data.sources.{i}.source", entry.source) for i, entry in enumerate(config.data.sources)),
        *((f"eval.sets.{name}.source", entry.source) for name, entry in config.eval.sets.items()),
        *((key, value) for key, value in _few_shot_of(config) if isinstance(value, str)),
    ):
        check_path(value, key, may_be_remote=not (value and is_user_function(value)))
    for key, value in (
        ("compiled_file", config.compiled_file),
        ("checkpoint.staging", config.checkpoint.staging),
        ("logging.compilation_cache", config.logging.compilation_cache),
        ("grpo.loss_type", config.grpo.loss_type),
        ("grpo.advantage_estimator", config.grpo.advantage_estimator),
        ("sampling.source", config.sampling.source),
        *prepare_keys(config).items(),
        *((key, value) for key, value in reward_functions.items() if reward_model_source(value) is None),
    ):
        check_path(value, key, may_be_remote=False)
    for key, value in reward_functions.items():
        check_path(reward_model_source(value), key, may_be_remote=True)


def _check_kl_in_reward(config: Config) -> None:
    """With kl_in_reward each token has its own advantage, and the KL estimate belongs to the old policy."""
    grpo, way_out = config.grpo, "or set grpo.kl_in_reward to false"
    needed = (
        ("advantage_estimator", "reinforce++", "whose advantages are whitened over tokens"),
        ("use_bias_correction_kl", False, "which is for a KL term of the loss"),
        ("old_logprobs", "recompute", "of which the KL estimate is made"),
        *_OF_TOKENS,
    )
    _check_grpo(config, "grpo.kl_in_reward", needed, way_out)
    if not grpo.beta:
        raise ValueError(f"grpo.beta must be > 0 with grpo.kl_in_reward, got {grpo.beta}; {way_out}")


_OF_TOKENS = (  # key, value and reason, where each token has its own advantage
    ("importance_sampling_level", "token", "to which advantages belong"),
    ("off_policy_mask_threshold", None, "which is for whole completions"),
    ("positive_nll_coef", 0.0, "which is for whole completions"),
)


def _check_grpo(config: Config, setting: str, needed: Iterable[tuple[str, Any, str]], way_out: str) -> None:
    for key, wanted, why in needed:
        value = getattr(config.grpo, key)
        if value != wanted:
            must = f"grpo.{key} must be {json.dumps(wanted)} with {setting}"
            raise ValueError(f"{must}, {why}, got {json.dumps(value)}; {way_out}")


def _check_turn_advantages(config: Config) -> None:
    """Each turn has its own advantage: what has no turns, and what is of whole episodes, cannot be with that."""
    way_out = "or set grpo.turn_advantages to null"
    if not config.rollout.has_turns:
        raise ValueError(
            "grpo.turn_advantages must be null without rollout.environment and rollout.tools, because completions have "
            f"one turn, got {config.grpo.turn_advantages!r}"
        )
    if config.rollout.max_sequences > 1:
        raise ValueError(
            "rollout.max_sequences must be 1 with grpo.turn_advantages, because turns of several sequences have no "
            f"order, got {config.rollout.max_sequences}; {way_out}"
        )
    needed = (
        ("kl_in_reward", False, "whose advantages are another thing"),
        ("advantage_estimator", "grpo", "with whose baseline returns are compared"),
        ("aggregation", "sum_then_normalize", "because the environment alone judges turns"),
        *_OF_TOKENS,
    )
    _check_grpo(config, "grpo.turn_advantages", needed, way_out)


def decoder_keys(config: Config) -> dict[str, tuple[Any, Any]]:
    """Keys that only the toolkit's own decoder reads: {key: (value, the value that a run with another model needs)}.
    Empty for a run with that decoder.
    """
    section, kind = config.model, source_kind(config.model.source)
    if kind == "decoder":
        return {}
    keys: dict[str, tuple[Any, Any]] = {
        "lora.rank": (config.lora.rank, 0),
        "lora.adapter": (config.lora.adapter, None),
        "sampling.kv_dtype": (config.sampling.kv_dtype, None),
        "sampling.weight_dtype": (config.sampling.weight_dtype, None),
        "model.scan_layers": (section.scan_layers, False),
        "model.attention": (section.attention, "auto"),
        "mesh.rollout_rules": (config.mesh.rollout_rules, {}),
        "compiled_file": (config.compiled_file, None),
    }
    if kind == "own":
        keys["model.remat"] = (section.remat, "none")
    return keys


def _check_mesh(config: Config) -> None:
    """The form of the rules. `rl.devices.mesh`, which knows the axes, checks their names."""
    for key, rules in (("rules", config.mesh.rules), ("rollout_rules", config.mesh.rollout_rules)):
        for logical, rule in rules.items():
            is_flat = all(isinstance(axis, str) for axis in rule)
            lists = [axes for axes in rule if isinstance(axes, list) and all(isinstance(axis, str) for axis in axes)]
            if not is_flat and len(lists) < len(rule):
                raise ValueError(
                    f"mesh.{key}.{logical} must be a list of mesh axes, like [fsdp, tensor], or of such lists, like "
                    f"[[fsdp, tensor], [fsdp]], where the first that fits counts, got {shown(rule)}"
                )


def _check_distributed(config: Config) -> None:
    """Each key by itself. `rl.devices.hosts` checks that the three keys are set together."""
    section = config.distributed
    process_id, num_processes, address = section.process_id, section.num_processes, section.coordinator_address
    if process_id is not None and num_processes is not None and process_id >= num_processes:
        raise ValueError(
            f"distributed.process_id must be < distributed.num_processes ({num_processes}), got {process_id}; "
            "processes are numbered from 0"
        )
    if address is not None:
        match = re.fullmatch(r"(?:[^\s:]+|\[[^\s\]]+\]):([0-9]{1,5})", address)
        if match is None or not 0 < int(match[1]) < 65536:
            raise ValueError(
                f"distributed.coordinator_address must be host:port, a port from 1 to 65535, got {shown(address)}; for "
                "example 10.0.0.1:1234"
            )


def _check_model(config: Config) -> None:
    """Keys that only some kinds of model have."""
    section, kind = config.model, source_kind(config.model.source)
    if kind != "own":
        for key, value in (("args", section.args), ("weights", section.weights)):
            if value:
                raise ValueError(
                    f"model.{key} belongs to a module of your own (model.source: path/to/file.py:build), got "
                    f"{shown(value)} with model.source {shown(section.source)}; leave it out"
                )
    if kind == "decoder":
        return
    if config.optimizer.name == "muon":
        raise ValueError(
            f"optimizer.name must not be muon with model.source {shown(section.source)}: the inputs and "
            "outputs of its matrices are not known; use adamw"
        )
    for key, (value, needed) in decoder_keys(config).items():
        if value != needed:
            raise ValueError(
                f"{key} must be {json.dumps(needed)} with model.source {shown(section.source)}, got "
                f"{shown(value)}: it is a part of the toolkit's own decoder; leave it out"
            )


def _check_lora(config: Config) -> None:
    """Ranges, and keys that contradict a frozen base. Whether a target matches is checked with the model."""
    section = config.lora
    if not section.rank and section.adapter is None:
        for key in ("base_dtype", "base_group_size"):
            value = getattr(section, key)
            if value is not None:
                raise ValueError(
                    f"lora.{key} must be null without adapters (lora.rank 0, no lora.adapter), got {shown(value)}; "
                    "set lora.rank"
                )
        return
    if not section.targets:
        raise ValueError('lora.targets must hold a pattern, got []; "*_proj" is every matrix of attention and mlp')
    if section.adapter is not None and config.model.source is None:
        raise ValueError(
            f"lora.adapter needs the model that it belongs to, got {shown(section.adapter)} with model.source null; "
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
    """Only quantised weights have groups. Whether a group size divides a matrix is checked with the model."""
    for section, size_key, dtype_key in (
        ("lora", "base_group_size", "base_dtype"),
        ("sampling", "weight_group_size", "weight_dtype"),
    ):
        values = getattr(config, section)
        size, dtype = getattr(values, size_key), getattr(values, dtype_key)
        if size is None:
            continue
        if dtype in (None, "bfloat16"):
            raise ValueError(
                f"{section}.{size_key} must be null where no weights are quantised, got {size} with "
                f"{section}.{dtype_key} {dtype!r}"
            )


def _check_source(config: Config) -> None:
    """Keys of the policy's own sampler, which a source of the user's does not have."""
    section = config.sampling
    if section.source is None:
        if section.source_args:
            raise ValueError(
                f"sampling.source_args must be {{}} without sampling.source, got {shown(section.source_args)}; set "
                "sampling.source to path/to/file.py:make_source"
            )
        return
    if not is_user_function(section.source):
        raise ValueError(f"sampling.source must be path/to/file.py:make_source or null, got {shown(section.source)}")
    for key, value, needed in (
        ("sampling.slots", section.slots, None),
        ("sampling.warm_up", section.warm_up, False),
        ("sampling.kv_dtype", section.kv_dtype, None),
        ("sampling.weight_dtype", section.weight_dtype, None),
        ("mesh.rollout_rules", config.mesh.rollout_rules, {}),
        ("grpo.policy_distribution", config.grpo.policy_distribution, "full"),
        ("compiled_file", config.compiled_file, None),
    ):
        if value != needed:
            raise ValueError(
                f"{key} must be {json.dumps(needed)} with sampling.source, which draws in the place of the sampler "
                f"that it belongs to, got {shown(value)}; leave it out"
            )


def _check_logging(config: Config) -> None:
    """Trackers with their arguments, and the steps of a profile."""
    names, args = config.logging.trackers, config.logging.tracker_args
    known = f"one of {shown(list(TRACKER_NAMES))} or path/to/file.py:make_tracker"
    for name in names:
        if name not in TRACKER_NAMES and not is_user_function(name):
            raise ValueError(f"logging.trackers must hold {known}, got {shown(name)}")
    if len(set(names)) < len(names):
        raise ValueError(f"logging.trackers must name each tracker once, got {shown(names)}")
    for name, settings in args.items():
        if name not in (*names, *TRACKER_NAMES):
            raise ValueError(
                f"logging.tracker_args must be for {shown(names)} (logging.trackers) or another of "
                f"{shown(list(TRACKER_NAMES))}, got {shown(name)}"
            )
        if not isinstance(settings, dict):
            raise ValueError(f"logging.tracker_args.{name} must be a mapping, got {shown(settings)}")
        for key, value in settings.items():
            if name in TRACKER_NAMES and (_is_secret_name(str(key)) or _has_password(value)):
                raise ValueError(
                    f"logging.tracker_args.{name} must hold no passwords or keys, which config.yml would show, got "
                    f"{key!r}; set them in the environment (docs/trackers.md)"
                )
    steps = config.profile.steps
    if steps and (len(steps) != 2 or steps[0] > steps[1]):
        raise ValueError(f"profile.steps must be [first, last] or [], got {shown(steps)}")
    if config.profile.memory and not steps:
        raise ValueError("profile.steps must name [first, last] with profile.memory, got []; for example [10, 12]")


def _is_secret_name(key: str) -> bool:
    return re.search(r"(^|_)(key|token|password|passwd|secret|credentials?)$", key.lower()) is not None


def _has_password(value: Any) -> bool:
    """Whether a setting is a URL with a password, or with a token in its query."""
    return isinstance(value, str) and re.search(r"://[^/@\s]+:[^/@\s]+@|[?&]\w*(token|key)=", value) is not None


def _check_rollout(config: Config) -> None:
    """Environments and tools, and what cannot be with them."""
    section = config.rollout
    named: dict[str, str | None] = {f"rollout.tools.{i}": tool for i, tool in enumerate(section.tools)}
    if isinstance(section.environment, str):
        named["rollout.environment"] = section.environment
    else:
        for name, value in (section.environment or {}).items():
            is_kind = value is None and is_ready_made(f"{name}:")
            named["rollout.environment" if is_kind else f"rollout.environment.{name}"] = (
                f"{name}:" if is_kind else value
            )
    if section.agent is not None:
        named["rollout.agent"] = section.agent
        for key, value in (("rollout.environment", section.environment), ("rollout.tools", section.tools or None)):
            if value is not None:
                raise ValueError(f"{key} must be empty with rollout.agent, which brings its own, got {shown(value)}")
        if not config.data.chat:
            raise ValueError(
                "data.chat must be true with rollout.agent, because an agent asks with messages, got false"
            )
    for key, value in named.items():
        is_tool = key.startswith(("rollout.tools", "rollout.agent"))
        if not is_tool and value and is_ready_made(value) and not value.partition(":")[2].strip():
            raise ValueError(
                f"{key} must name a server behind openenv: or a game behind textarena:, got {shown(value)}; for "
                "example openenv:http://127.0.0.1:8000, or textarena:GuessTheNumber-v0"
            )
        if value is None or (not is_user_function(value) and (is_tool or not is_ready_made(value))):
            others = "" if is_tool else ", openenv:URL or textarena:NAME"
            raise ValueError(f"{key} must be path/to/file.py:name{others}, got {shown(value)}")
    if not section.has_turns:
        return
    if ENVIRONMENT in [function.label for function in config.rewards.functions]:
        raise ValueError(
            "rewards.functions must not name a function 'environment' beside rollout.environment, whose reward has "
            "this name; give it another `name`"
        )
    if config.is_without_data:
        _check_without_data(config)
    check_memory_gb(section.memory_gb, "rollout")
    places = section.num_workers * section.episodes_per_worker
    if places < config.grpo.group_size:
        raise ValueError(
            "rollout.num_workers * rollout.episodes_per_worker must be >= grpo.group_size "
            f"({config.grpo.group_size}), because the episodes of a group begin together, got {places}"
        )
    drawn, longest = config.sampling.max_completion_length, config.longest_completion
    if longest < drawn:
        raise ValueError(
            f"rollout.max_episode_tokens must be >= sampling.max_completion_length ({drawn}), because it counts all "
            f"tokens of an episode, got {longest}"
        )
    least, turn = config.sampling.min_completion_length, section.max_turn_tokens
    if turn is not None and turn < least:
        raise ValueError(
            f"rollout.max_turn_tokens must be >= sampling.min_completion_length ({least}), before which no turn ends, "
            f"got {turn}"
        )
    for key, value, needed, why in (
        ("sampling.source", config.sampling.source, None, "a source of your own draws single turns"),
        ("data.assistant_prefill", config.data.assistant_prefill, None, "a turn has no beginning that is given"),
        ("data.few_shot", config.data.few_shot, None, "an environment writes the prompt"),
        ("compiled_file", config.compiled_file, None, "programs of turns are not in it"),
    ):
        if value != needed:
            must = f"{key} must be {json.dumps(needed)} with rollout.tools or rollout.environment"
            raise ValueError(f"{must}: {why}; got {shown(value)}")


def _check_without_data(config: Config) -> None:
    """An environment makes its prompts, and what is about rows of data has nothing to be about."""
    data, environments = config.data, config.rollout.environments
    if len(environments) > 1:
        raise ValueError(
            "data.source must be set with several environments, of which the column `environment` of a row names one, "
            f"got null and {shown(sorted(environments))}"
        )
    for key, value, off in (
        ("args", data.args, {}),
        ("prepare", data.prepare, None),
        ("streaming", data.streaming, False),
        ("remove_empty_answers", data.remove_empty_answers, False),
        ("remove_duplicates", data.remove_duplicates, False),
        ("remove_overlap", data.remove_overlap, False),
        ("eval_source", data.eval_source, None),
        ("eval_share", data.eval_share, 0.0),
        ("answer_from_messages", data.answer_from_messages, False),
        ("curriculum.by", data.curriculum.by, None),
    ):
        if value != off:
            raise ValueError(
                f"data.{key} must be {json.dumps(off)} without data.source, where the environment makes the prompts, "
                f"got {shown(value)}; set data.source, or leave it out"
            )


def _check_optimizer(config: Config) -> None:
    """Ranges, and settings that the chosen optimizer or schedule needs or cannot have."""
    section = config.optimizer
    if section.schedule == "constant" and section.schedule_updates is not None:
        raise ValueError(
            "optimizer.schedule_updates must be null with optimizer.schedule constant, which never falls, got "
            f"{section.schedule_updates}; leave it out"
        )
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
    # bfloat16 has 8 bits, so a change below half of the last one is lost: the moment stops at a relative distance of
    # 2^-8 / (1 - b2) from its target, here at most a quarter.
    if section.second_moment_dtype == "bfloat16" and 1 - section.b2 < 2**-6:
        raise ValueError(
            f"optimizer.b2 must be <= {1 - 2**-6:.3f} with optimizer.second_moment_dtype bfloat16, got {section.b2}: "
            "the moment's changes would be lost to rounding; lower b2, 0.98 for instance, or keep it in float32"
        )
    no_moment = section.name == "adafactor" or (section.name == "sgd" and not section.sgd_momentum)
    if section.offload and section.name == "sgd" and not section.sgd_momentum:
        raise ValueError(
            "optimizer.offload must be false with optimizer.name sgd and optimizer.sgd_momentum 0, which keep no "
            "moments, got true; leave it out"
        )
    if section.moment_dtype is not None and no_moment:
        way_out = "set optimizer.sgd_momentum or leave it out" if section.name == "sgd" else "leave it out"
        raise ValueError(
            f"optimizer.moment_dtype must be null with optimizer.name {section.name}, which keeps no first moment "
            f"here, got {section.moment_dtype!r}; {way_out}"
        )
