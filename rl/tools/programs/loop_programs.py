"""Every program of a GRPO run, with abstract arguments: state init, prefill, decode chunk, log-probs, train step.

In: a configuration and devices, which need not be there. Out: what the trainer would call on them, ready to compile,
and what would lie in memory meanwhile. Shapes only. A pretrained model's config.json is read, and a user module's
shapes are traced. The tokenizer is read if there is one. No data is read: prompts count as long as
`data.max_prompt_length` allows.
"""

import dataclasses
import math
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jax.sharding import Mesh

from rl.config.load import Config
from rl.data.tokenizer import BYTE_SOURCE, Tokenizer, load_tokenizer
from rl.devices.mesh import check_sharded, create_mesh, device_memory, is_on_cpu, num_row_shards, shard_bytes
from rl.devices.programs import Program
from rl.models.block_attention import KEY_BLOCK_LOOP
from rl.models.config import ModelConfig
from rl.models.files.hf import SHAPE_PATTERNS, resolve_source
from rl.models.flavours import policy_from_config
from rl.models.logprobs import CHUNK_LOOP, chunk_length
from rl.models.lora import split
from rl.models.policy import Policy
from rl.rollout.reward_model import open_reward_models, weight_bytes
from rl.sampler.contract import DECODE, PREFILL, DrawPrograms
from rl.sampler.create import create_sampler, eos_ids, sampling_params
from rl.sampler.decoding import TOKEN_LOOP
from rl.state.optimizer import create_training_optimizer
from rl.state.origin import folder_source, model_shape
from rl.state.states import BASE, WEIGHTS, InitStateFn, get_abstract_state, init_program
from rl.training.shaped_inputs import ShapedInputs, get_shaped_inputs
from rl.training.token_advantages import TokenRewards
from rl.training.train_step import MICROBATCH_LOOP, SHORT_MICROBATCH_LOOP, TRAIN_STEP, update_arguments
from rl.training.update import (
    ENTROPIES,
    LOGPROBS,
    REFERENCE_LOGPROBS,
    TOKEN_ADVANTAGES,
    bare_batch,
    update_programs,
)

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json")


@dataclasses.dataclass(frozen=True)
class LoopProgram:
    """One program.

    Attributes:
      name: for messages. key: the trainer's name for it.
      make: the program and its abstract arguments.
      rounds: {name: how often the loop runs} for loops whose length is a number of the input.
      held: bytes on a device, beside its arguments, while it runs.
      is_reported: False for smaller shapes of a program that is reported.
    """

    name: str
    key: str
    make: Callable[[], tuple[Program, tuple[Any, ...]]]
    rounds: Mapping[str, int]
    held: int
    is_reported: bool = True


@dataclasses.dataclass(frozen=True)
class Resident:
    """Bytes on a device that a run holds all the time, and those of its key/value caches at their largest.

    reward_models: the weights of those that the rewards name, which are there from the first scores on.
    moments: those that stay on the device, see `optimizer.offload`. copy: the rollouts' own weights, quantised or
      sharded differently, which exist beside the trained ones during drawing. bytes_per_position: of keys and values; 0
      for a model with its own kind of cache. bytes_per_row: of the states of a row.
    """

    weights: int
    moments: int
    adapters: int
    reference: int
    reward_models: int
    copy: int
    cache: int
    bytes_per_position: int
    bytes_per_row: int

    @property
    def state(self) -> int:
        """Weights and moments."""
        return self.weights + self.moments


@dataclasses.dataclass(frozen=True)
class Loop:
    """A run's programs, with the configuration and devices that they are made for."""

    config: Config
    mesh: Mesh
    policy: Policy
    memory: int
    inputs: ShapedInputs
    resident: Resident
    programs: list[LoopProgram]


def loop_programs(config: Config, devices: Sequence[Any], memory: int | None = None) -> Loop:
    """The programs of a run of this configuration on these devices.

    Args:
      memory: bytes of memory per device; None asks the device.

    Raises:
      ValueError: the configuration or the model's shape is wrong, or training refuses the mesh.
    """
    mesh = create_mesh(config.mesh, devices)
    memory = device_memory(mesh) if memory is None else memory
    tokenizer, model_config = read_shape(config)
    policy = policy_from_config(config, model_config, mesh)
    _, optimizer = create_training_optimizer(config, policy)
    init_policy_fn = InitStateFn(policy, optimizer, config.seed)
    inputs = get_shaped_inputs(config, mesh, init_policy_fn)
    check_sharded(inputs.state, inputs.state_shardings, config.mesh, mesh)
    has_reference = bool(config.grpo.beta) and policy.config.lora is None
    sampling = sampling_params(config, eos_ids(config, model_config, tokenizer), for_training=True)
    call_size = config.grpo.prompts_per_step, config.grpo.group_size
    judges = weight_bytes(open_reward_models(config, mesh))
    sampler = create_sampler(config, policy, mesh, inputs.state_shardings.params, tokenizer, memory, judges)
    sampler.expect_length(config.data.max_prompt_length, *call_size)
    rollout = sampler.programs(inputs.state.params, *call_size, sampling)
    weights = shard_bytes(inputs.state.params, inputs.state_shardings.params)
    trained = update_arguments(policy, inputs.state, inputs.minibatch)[0].params
    trained_shardings = update_arguments(policy, inputs.state_shardings, inputs.minibatch_shardings)[0].params
    resident = Resident(
        weights=weights,
        moments=shard_bytes(inputs.state.opt_state, inputs.state_shardings.opt_state),
        adapters=shard_bytes(trained, trained_shardings) if policy.config.lora else 0,
        reference=weights if has_reference else 0,
        reward_models=judges,
        copy=_copy_bytes(config, rollout),
        cache=rollout.cache_bytes,
        bytes_per_position=rollout.bytes_per_position,
        bytes_per_row=rollout.bytes_per_row,
    )
    beside_weights = resident.moments + resident.reference + resident.reward_models
    # During drawing, where rollouts have their own weights beside the trained ones.
    beside_rollout = beside_weights + (weights if resident.copy else 0)
    programs = _init_programs(config, mesh, policy, init_policy_fn, has_reference, resident)
    for program in rollout.programs:
        held = beside_rollout + (resident.cache if program.name == PREFILL else 0)
        rounds = {TOKEN_LOOP: program.num_steps} if program.name == DECODE else {}
        programs.append(LoopProgram(program.name, program.key, program.make, rounds, held, program.is_largest))
    bare = bare_batch(inputs.minibatch.batch)
    arguments = {
        LOGPROBS: (inputs.state.params, bare),
        REFERENCE_LOGPROBS: (split(policy.config, inputs.state.params)[1], bare),
        ENTROPIES: (inputs.state.params, bare),
        TRAIN_STEP: update_arguments(policy, inputs.state, inputs.minibatch),
    }
    if config.grpo.kl_in_reward:
        scored = bare._replace(
            old_logprobs_MRCL=inputs.minibatch.batch.old_logprobs_MRCL,
            reference_logprobs_MRCL=inputs.minibatch.batch.old_logprobs_MRCL,
        )
        arguments[TOKEN_ADVANTAGES] = ((TokenRewards.of(scored),) * config.grpo.minibatches,)
    held = {
        LOGPROBS: beside_weights,
        ENTROPIES: beside_weights,
        REFERENCE_LOGPROBS: resident.moments + resident.adapters + resident.reward_models,
        TOKEN_ADVANTAGES: resident.weights + beside_weights,
        TRAIN_STEP: resident.reference + resident.reward_models,
    }
    # Every row is full. Its last query sees the longest prompt and the longest completion, which need not start a
    # block.
    sequence = config.data.max_prompt_length + config.sampling.max_completion_length
    block = policy.kernel.block
    key_blocks = math.ceil(min(sequence + block, inputs.plan.row_length) / block)
    rounds = {
        MICROBATCH_LOOP: inputs.plan.num_microbatches,
        SHORT_MICROBATCH_LOOP: 0,
        KEY_BLOCK_LOOP: key_blocks,
        CHUNK_LOOP: _logit_chunks(config, inputs, mesh),
    }
    for name, program in update_programs(config, policy, optimizer, inputs.state_shardings, inputs.plan, mesh).items():
        programs.append(LoopProgram(name, name, _made(program, arguments[name]), rounds, held[name]))
    return Loop(config, mesh, policy, memory, inputs, resident, programs)


def logit_chunk(config: Config, inputs: ShapedInputs, mesh: Mesh) -> int:
    """Positions of each row of a piece whose logits exist at one time."""
    num_rows, num_positions = inputs.minibatch.batch.targets_MRN.shape[1:]
    num_rows //= num_row_shards(mesh, config.mesh.rules)
    return chunk_length(num_rows, num_positions, config.grpo.logprob_chunk, is_on_cpu(mesh))


def _logit_chunks(config: Config, inputs: ShapedInputs, mesh: Mesh) -> int:
    """Chunks of logits of a piece of the longest prompts and completions."""
    row_length, num_positions = inputs.plan.row_length, inputs.minibatch.batch.targets_MRN.shape[-1]
    length, group_size = config.sampling.max_completion_length, config.grpo.group_size
    group = config.data.max_prompt_length + group_size * (length - 1)
    alone = (row_length - config.data.max_prompt_length) // (length - 1) if length > 1 else group_size
    num_targets = min((row_length // group * group_size or min(alone, group_size)) * length, num_positions)
    return math.ceil(num_targets / logit_chunk(config, inputs, mesh))


def read_shape(config: Config) -> tuple[Tokenizer, ModelConfig]:
    """The tokenizer (of bytes where the model has none at hand) and the model's configuration. Reads no weights."""
    source = folder_source(config)
    folder = None if source is None else pathlib.Path(resolve_source(source, SHAPE_PATTERNS))
    name = config.tokenizer.source
    if name is None and folder is not None and any((folder / file).is_file() for file in _TOKENIZER_FILES):
        name = str(folder)
    tokenizer = load_tokenizer(name or BYTE_SOURCE, config.tokenizer.chat_template)
    return tokenizer, model_shape(config, tokenizer, folder)


def _copy_bytes(config: Config, rollout: DrawPrograms) -> int:
    """Bytes of the weights that decoding reads, where they are not the trained ones."""
    if config.sampling.weight_dtype is None and not config.mesh.rollout_rules:
        return 0
    program, (params, *_) = rollout.programs[0].make()
    return shard_bytes(params, program.in_shardings[0])


def _init_programs(
    config: Config,
    mesh: Mesh,
    policy: Policy,
    init_policy_fn: InitStateFn,
    has_reference: bool,
    resident: Resident,
) -> list[LoopProgram]:
    """The programs that make the state, and a reference with drawn weights. Pretrained weights need no program."""
    given = None
    if folder_source(config) is not None or config.model.weights is not None:
        given = BASE if policy.config.lora is not None and config.lora.adapter is None else WEIGHTS
    abstract = get_abstract_state(config, mesh, init_policy_fn)
    held = resident.reference + (0 if given is None else resident.weights - resident.adapters)
    name, program = init_program(init_policy_fn, abstract, given)
    programs = [LoopProgram(name, name, _made(program, ()), {}, held)]
    if has_reference and given is None:
        init_reference_fn = InitStateFn(policy, None, config.seed)
        abstract = get_abstract_state(config, mesh, init_reference_fn, is_training=False)
        name, program = init_program(init_reference_fn, abstract)
        programs.append(LoopProgram(name, name, _made(program, ()), {}, 0))
    return programs


def _made(program: Program, arguments: tuple[Any, ...]) -> Callable[[], tuple[Program, tuple[Any, ...]]]:
    return lambda: (program, arguments)
