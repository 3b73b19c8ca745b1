"""The arguments of the compiled update without their numbers: `get_shaped_inputs`, the same call for both flavours.

In: the configuration, a mesh, an `init_state_fn`. Out: shapes, logical axes and shardings of the state and of one
minibatch. Neither weights nor data are read. Prompts count as long as `data.max_prompt_length` allows.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from rl.algorithms.from_config import loss_config
from rl.config.load import Config
from rl.devices.mesh import is_on_cpu, num_row_shards
from rl.models.policy import Policy
from rl.models.train_state import PureState
from rl.state.states import AbstractState, InitStateFn, get_abstract_state
from rl.training.packing import Batch, PackingPlan, batch_fields, plan_packing
from rl.training.train_step import Minibatch, minibatch_axes, minibatch_shardings
from rl.training.update import batch_dtype, drawn_from, needs_old_logprobs


class ShapedInputs(NamedTuple):
    """Shapes (`jax.ShapeDtypeStruct`), logical axes (a tuple of names for each leaf) and shardings of the train step's
    arguments. `plan` is the packing plan of the minibatch.
    """

    state: PureState
    state_annotations: PureState
    state_shardings: PureState
    minibatch: Minibatch
    minibatch_annotations: Minibatch
    minibatch_shardings: Minibatch
    plan: PackingPlan


def get_shaped_inputs(config: Config, mesh: Mesh, init_state_fn: InitStateFn) -> ShapedInputs:
    """Shapes and shardings of the state that `init_state_fn` builds, and of the minibatches of its run."""
    abstract: AbstractState = get_abstract_state(config, mesh, init_state_fn)
    policy = init_state_fn.policy
    plan = plan_minibatches(config, config.data.max_prompt_length, policy, mesh)
    shapes = minibatch_shapes(config, policy, plan)
    return ShapedInputs(
        state=abstract.shapes,
        state_annotations=abstract.annotations,
        state_shardings=abstract.shardings,
        minibatch=shapes,
        minibatch_annotations=_of_present_fields(minibatch_axes(), shapes),
        minibatch_shardings=_of_present_fields(minibatch_shardings(mesh, config.mesh.rules), shapes),
        plan=plan,
    )


def minibatch_shapes(config: Config, policy: Policy, plan: PackingPlan) -> Minibatch:
    """The shapes of every minibatch of a run, with the log-probs and entropies that its loss needs."""

    def shape(dims: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(dims, dtype)

    dtype = batch_dtype(policy)
    fields = {name: shape(dims, kind) for name, (dims, kind, _) in batch_fields(plan, dtype).items()}
    logprobs = shape(fields["slots_MRCL"].shape, jnp.promote_types(policy.config.dtype, jnp.float32))
    if config.grpo.kl_in_reward:
        fields["advantages_MRCL"] = logprobs
    batch = Batch(
        **fields,
        num_microbatches=shape((), np.int32),
        old_logprobs_MRCL=logprobs if needs_old_logprobs(config) else None,
        reference_logprobs_MRCL=logprobs if config.grpo.beta and not config.grpo.kl_in_reward else None,
    )
    entropies = logprobs if loss_config(config).selects_by_entropy else None
    count = shape((), np.int32)
    return Minibatch(batch, count, shape((), dtype), entropies, shape((), np.bool_), count, count)


def _of_present_fields(values: Minibatch, shapes: Minibatch) -> Minibatch:
    """`values` with None for the fields that are None in `shapes`."""
    absent = {name: None for name, shape in shapes.batch._asdict().items() if shape is None}
    batch = values.batch._replace(**absent)
    return values._replace(batch=batch, entropy_MRCL=None if shapes.entropy_MRCL is None else values.entropy_MRCL)


def plan_minibatches(config: Config, max_prompt_length: int, policy: Policy, mesh: Mesh) -> PackingPlan:
    """Static shapes that hold every minibatch of a run with prompts of at most `max_prompt_length` tokens."""
    rules = drawn_from(config)
    plan = plan_packing(
        num_groups=config.grpo.prompts_per_step // config.grpo.minibatches,
        group_size=config.grpo.group_size,
        max_prompt_length=max_prompt_length,
        max_completion_length=config.longest_completion,
        max_sequences=config.rollout.max_sequences if config.rollout.has_turns else 1,
        max_drawn=config.sampling.max_completion_length,
        **packing_options(config, policy, mesh),
    )
    return dataclasses.replace(
        plan,
        kept_words=0 if rules is None else rules.num_words(policy.config.vocab_size),
        token_advantages=config.grpo.turn_advantages is not None,
    )


def packing_options(config: Config, policy: Policy, mesh: Mesh) -> dict[str, Any]:
    """The arguments of `plan_packing` other than numbers and lengths of sequences."""
    return {
        "max_tokens_per_microbatch": config.grpo.max_tokens_per_microbatch,
        "num_row_shards": num_row_shards(mesh, config.mesh.rules),
        "preferred_row_length": policy.config.hidden_size,
        "packs_rows": policy.packs_rows,
        "skips_blocks": policy.kernel.skips_blocks,
        # Each length multiplies the time of compiling: seconds for a CPU, minutes for a TPU.
        "cuts_rows": is_on_cpu(mesh),
    }
