"""The sampler of a configuration, its sampling parameters, and the EOS ids.

In: the configuration, a policy on a mesh, the tokenizer. Out: a `CompletionSource`, and `SamplingParams`. Only this
module knows which sources there are.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple, cast

from jax.sharding import Mesh

from rl.config.load import Config
from rl.config.sections import EvalSection, EvalSet
from rl.data.prompts import PromptData
from rl.data.tokenizer import Tokenizer
from rl.devices import hosts
from rl.devices.mesh import device_memory
from rl.models.config import ModelConfig, Quantization
from rl.models.policy import Policy, WavePolicy
from rl.sampler.contract import CompletionSource
from rl.sampler.slot_sampler import Sampler
from rl.sampler.token_draw import SamplingParams, check_vocabulary
from rl.sampler.user_source import CheckedSource
from rl.sampler.wave_sampler import WaveSampler
from rl.state.states import InitStateFn, get_abstract_state


def greedy(sampling: SamplingParams) -> SamplingParams:
    """The sampling parameters of an evaluation, see `rl.rollout.evaluation.evaluate`."""
    return dataclasses.replace(
        sampling,
        temperature=0.0,
        top_k=0,
        top_p=1.0,
        min_p=0.0,
        repetition_penalty=1.0,
        frequency_penalty=0.0,
        presence_penalty=0.0,
        reports_kept=False,
    )


def set_sampling(entry: EvalSet, sampling: SamplingParams) -> SamplingParams:
    """The sampling parameters of a set of an evaluation: what it says over plain greedy decoding.

    Without a temperature, one sample is greedy and several have the temperature of `sampling`.

    Raises:
      ValueError: several samples would all be greedy, or the temperature is too near 0.
    """
    is_greedy = entry.samples == 1 if entry.temperature is None else entry.temperature == 0
    if is_greedy:
        return greedy(sampling)
    temperature = sampling.temperature if entry.temperature is None else entry.temperature
    if temperature == 0:
        raise ValueError(
            f"sampling.temperature must be > 0 for a set of eval.sets with samples {entry.samples}, got 0; give the "
            "set a temperature of its own"
        )
    return dataclasses.replace(greedy(sampling), temperature=temperature, top_k=entry.top_k, top_p=entry.top_p)


def prompts_at_a_time(section: EvalSection, num_samples: int) -> int:
    """The number of prompts that an evaluation draws at a time, with so many samples of each."""
    return max(1, section.block_size // num_samples)


def create_sampler(
    config: Config,
    policy: Policy,
    mesh: Mesh,
    param_shardings: Any,
    tokenizer: Tokenizer,
    memory: int | None = None,
    beside: int = 0,
    shows_special: bool = False,
) -> CompletionSource:
    """The sampler of a run, for rollouts and evaluation alike: the user's source, if the configuration names one, else
    the sampler that the policy asks for.

    Args:
      memory: bytes of memory per device; None asks the device. beside: of these, what reward models take.
      shows_special: whether special tokens are text to stop strings, also where those of the configuration hold none.

    Raises:
      ValueError: reward models leave no memory.
    """
    if config.sampling.source is not None:
        return CheckedSource(config, tokenizer, policy.config)
    if policy.decodes_in_waves:
        rules, common = config.mesh.rules, _sampler_options(config, mesh, tokenizer, memory, beside, shows_special)
        return WaveSampler(cast(WavePolicy, policy), mesh, param_shardings, rules=rules, **common)
    return _slot_sampler(config, policy, mesh, param_shardings, tokenizer, memory, beside, shows_special)


class DrawSize(NamedTuple):
    """The size of a call of the sampler, on which its programs and its memory depend."""

    num_prompts: int
    num_samples: int
    sampling: SamplingParams


def plan_draws(
    sampler: CompletionSource,
    config: Config,
    data: PromptData,
    sampling: SamplingParams,
    prompt_length: int | None = None,
) -> None:
    """Plans a sampler's shapes for the prompts of a run.

    Args:
      prompt_length: the longest prompt in tokens, for shapes that were planned with it before; None: the data's
        prompts.

    Raises:
      ValueError: one of the calls cannot be: `sampling.kv_memory` is too small for it, or a user's source not made.
    """
    sizes = draw_sizes(config, data, sampling)
    step = sizes[0]
    if prompt_length is None and data.stream is not None:  # most of its prompts are not there yet
        prompt_length = config.data.max_prompt_length
    if config.rollout.has_turns:
        prompt_length = planned_prompt_length(config, data)
    if prompt_length is None:
        prompts = [row.prompt_ids for row in (*data.train, *data.evaluated_rows)]
        sampler.expect(prompts, step.num_prompts, step.num_samples)
    else:
        sampler.expect_length(prompt_length, step.num_prompts, step.num_samples)  # only its programs can be stored
    for size in sizes:
        if config.rollout.has_turns:
            sampler.check_turns(size.num_prompts, size.num_samples, config.longest_completion)
        else:
            sampler.check(*size)


def planned_prompt_length(config: Config, data: PromptData) -> int:
    """The longest prompt that a run plans for, in tokens: an environment may write longer ones than the data hold."""
    return config.data.max_prompt_length if config.rollout.has_turns else data.longest_prompt


def warm_up(sampler: CompletionSource, config: Config, data: PromptData, sampling: SamplingParams, params: Any) -> None:
    """Compiles all programs of the run's calls, where `sampling.warm_up` asks for it, after `plan_draws`."""
    for size in draw_sizes(config, data, sampling) if config.sampling.warm_up else ():
        if config.rollout.has_turns:
            sampler.warm_up_turns(params, *size, config.longest_completion)
        else:
            sampler.warm_up(params, *size)


def draw_sizes(config: Config, data: PromptData, sampling: SamplingParams) -> list[DrawSize]:
    """The sizes of the calls of a run: of a step first, then of its evaluations, if there are any."""
    step = DrawSize(config.grpo.prompts_per_step, config.grpo.group_size, sampling)
    return [step, *evaluation_sizes(config, len(data.evaluated(config.eval)), data.sets, sampling)]


def evaluation_sizes(
    config: Config, num_held_out: int, sets: Mapping[str, Sequence[Any]], sampling: SamplingParams
) -> list[DrawSize]:
    """The sizes of the calls of an evaluation of so many held-out prompts, and of the rows of each set."""
    sizes = [(num_held_out, 1, greedy(sampling))] if num_held_out else []
    for name, rows in sets.items():
        entry = config.eval.sets[name]
        sizes.append((len(rows), entry.samples, set_sampling(entry, sampling)))
    return [DrawSize(min(num, prompts_at_a_time(config.eval, each)), each, own) for num, each, own in sizes]


def _slot_sampler(
    config: Config,
    policy: Policy,
    mesh: Mesh,
    param_shardings: Any,
    tokenizer: Tokenizer,
    memory: int | None,
    beside: int,
    shows_special: bool,
) -> Sampler:
    """The sampler of the toolkit's own decoder; arguments as in `create_sampler`."""
    section, rules, decode_shardings = config.sampling, config.mesh.rules, None
    if config.mesh.rollout_rules:
        rules = {**rules, **config.mesh.rollout_rules}
        decoding = dataclasses.replace(config, mesh=dataclasses.replace(config.mesh, rules=rules))  # pyright: ignore[reportArgumentType]
        init_state_fn = InitStateFn(policy, None, config.seed)
        decode_shardings = get_abstract_state(decoding, mesh, init_state_fn, is_training=False).shardings.params
    weights = None
    if section.weight_dtype is not None:
        weights = Quantization(section.weight_dtype, section.weight_group_size, head=True)
    return Sampler(
        policy,
        mesh,
        param_shardings,
        rules=rules,
        decode_shardings=decode_shardings,
        kv_dtype=section.kv_dtype,
        weights=weights,
        **_sampler_options(config, mesh, tokenizer, memory, beside, shows_special),
    )


def _sampler_options(
    config: Config, mesh: Mesh, tokenizer: Tokenizer, memory: int | None, beside: int, shows_special: bool
) -> dict[str, Any]:
    slots, kv_bytes = config.sampling.slots, None
    if slots is None or beside:
        # The least memory of all processes, because they must plan the same number of slots.
        available = min(hosts.gather(device_memory(mesh))) if memory is None else memory
        if beside >= available:
            raise ValueError(
                f"the reward models of rewards.functions must fit a device beside the policy, and their weights take "
                f"{beside:,} of its {available:,} bytes; cut them over more devices (mesh.fsdp, mesh.tensor), or take "
                "smaller ones"
            )
        kv_bytes = int(config.sampling.kv_memory * (available - beside)) if slots is None else None
    return {"slots": slots, "kv_bytes": kv_bytes, "decode_text": stop_text(config, tokenizer, shows_special)}


def stop_text(config: Config, tokenizer: Tokenizer, shows_special: bool = False) -> Callable[[Sequence[int]], str]:
    """A function that gives the text of token ids in which stop strings are searched. The text has special tokens if a
    stop string holds one.
    """
    holds = any(token in stop for stop in config.sampling.stop_strings for token in tokenizer.special_tokens)
    special = shows_special or holds
    return partial(tokenizer.decode, skip_special_tokens=not special)


def sampling_params(config: Config, eos: tuple[int, ...], for_training: bool = False) -> SamplingParams:
    """The `sampling` section as `SamplingParams`. Nothing else sets a rule, not even a model's own defaults.

    Args:
      for_training: report what `grpo.policy_distribution` needs.

    Raises:
      ValueError: values out of range, or rules that `grpo.policy_distribution` cannot compute again.
    """
    section = config.sampling
    return SamplingParams(
        temperature=section.temperature,
        top_k=section.top_k,
        top_p=section.top_p,
        min_p=section.min_p,
        repetition_penalty=section.repetition_penalty,
        frequency_penalty=section.frequency_penalty,
        presence_penalty=section.presence_penalty,
        logit_bias=tuple(sorted(section.logit_bias.items())),
        forbidden_ids=tuple(section.forbidden_ids),
        max_completion_length=section.max_completion_length,
        min_completion_length=section.min_completion_length,
        stop_strings=tuple(section.stop_strings),
        eos_ids=eos,
        reports_kept=for_training and config.grpo.policy_distribution == "sampled",
    )


def checked_sampling(config: Config, model_config: ModelConfig, tokenizer: Tokenizer) -> SamplingParams:
    """`sampling_params` of a run's rollouts, with the EOS ids of model and tokenizer; ValueError where an id is outside
    the vocabulary.
    """
    sampling = sampling_params(config, eos_ids(config, model_config, tokenizer), for_training=True)
    check_vocabulary(sampling, model_config.vocab_size)
    return sampling


def eos_ids(config: Config, model_config: ModelConfig, tokenizer: Tokenizer) -> tuple[int, ...]:
    """sampling.eos_ids, else every EOS of the model and the tokenizer.

    Raises:
      ValueError: an id is outside the vocabulary, or there is no EOS.
    """
    ids = config.sampling.eos_ids
    if ids is None:
        ids = [*model_config.eos_token_ids, *tokenizer.eos_ids]
    outside = [i for i in ids if not 0 <= i < model_config.vocab_size]
    if outside:
        raise ValueError(f"sampling.eos_ids must be token ids below {model_config.vocab_size}, got {outside}")
    if not ids:
        raise ValueError(
            "a completion must be able to end: the model and the tokenizer name no EOS token; set sampling.eos_ids"
        )
    return tuple(sorted(set(ids)))
