"""Train steps that are compiled and not run: what XLA says of their memory, operations and bytes.

Tandem's in either flavour, and Tunix' of the same shape. All states are abstract, so a step may be far larger than this
machine, and the devices may be those of another one (`topology_mesh`).
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from peer_trainers import Numbers, tunix_learner, tunix_optimizer
from shapes import Workload, tiny_shape
from trainers import tandem_config
from weights import tunix_architecture

from rl.algorithms.from_config import loss_config
from rl.config.load import load_config
from rl.devices.mesh import create_mesh
from rl.models.config import ModelConfig
from rl.models.flavours import policy_from_config
from rl.state.optimizer import create_training_optimizer
from rl.state.states import InitStateFn, get_abstract_state
from rl.training.packing import PackingPlan, pack
from rl.training.shaped_inputs import plan_minibatches
from rl.training.train_step import Minibatch, jit_train_step


class Step(NamedTuple):
    """Tandem's compiled update and the abstract arguments it was compiled for."""

    compiled: Any
    state: Any
    minibatch: Any


def topology_mesh(devices: list[Any] | None = None) -> Mesh:
    """Tandem's mesh over these devices, parameters sharded; None: the first device here."""
    return create_mesh(load_config(None).mesh, jax.devices()[:1] if devices is None else devices)


def compile_tandem(
    model_config: ModelConfig,
    workload: Workload,
    plan: PackingPlan | None,
    settings: list[str],
    mesh: Mesh,
    pure_nnx: bool,
) -> Step:
    """The update that `rl.training.update` runs, with reference log-probs in the batch.

    Args:
      plan: the shapes of the packed batch; None: those of a run with this workload.
      settings: `key=value` of the configuration.
    """
    config = tandem_config(workload, [f"pure_nnx={pure_nnx}".lower(), *settings])
    policy = policy_from_config(config, model_config, mesh)
    _, optimizer = create_training_optimizer(config, policy)
    abstract = get_abstract_state(config, mesh, InitStateFn(policy, optimizer, 0))
    plan = plan_minibatches(config, workload.prompt_lengths[1], policy, mesh) if plan is None else plan
    train_step = jit_train_step(
        policy,
        optimizer,
        loss_config(config),
        abstract.shardings,
        mesh=mesh,
        rules=config.mesh.rules,
        temperature=config.sampling.temperature,
        chunk_size=config.grpo.logprob_chunk,
        minibatches_per_rollout=1,
        shorter_lengths=plan.shorter_lengths,
    )
    batch = pack([], plan)
    batch = batch._replace(reference_logprobs_MRCL=batch.mask_MRCL)
    minibatch = Minibatch(batch, np.int32(1), np.float32(0), on_policy=np.bool_(True))
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(np.shape(x), x.dtype), minibatch)
    return Step(train_step.lower(abstract.shapes, shapes).compile(), abstract.shapes, shapes)


def compile_tunix(model_config: ModelConfig, num_rows: int, prompt_length: int, cap: int, mesh: Mesh) -> Any:
    """Tunix' train step on a padded batch with reference log-probs, every decoder layer rematerialised.

    Args:
      mesh: with the axes "fsdp" and "tp".
    """
    from tunix.models.qwen3 import model
    from tunix.rl import common
    from tunix.rl.rollout import base_rollout

    model_class, tunix_config, _ = tunix_architecture(model_config, remat_config=model.RematConfig.DECODER)

    def build() -> tuple[Any, Any]:
        actor = model_class(tunix_config, rngs=nnx.Rngs(params=0))
        return actor, nnx.Optimizer(actor, tunix_optimizer(), wrt=nnx.Param)

    graphdef, shapes = nnx.split(nnx.eval_shape(build))
    trainer = _tiny_tunix_trainer(model_config, base_rollout.RolloutConfig(temperature=1.0))
    rows = NamedSharding(mesh, PartitionSpec("fsdp"))

    def array(shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=rows)

    example = common.TrainExample(
        prompt_ids=array((num_rows, prompt_length), jnp.int32),
        prompt_mask=array((num_rows, prompt_length), bool),
        completion_ids=array((num_rows, cap), jnp.int32),
        completion_mask=array((num_rows, cap), bool),
        advantages=array((num_rows,), jnp.float32),
        ref_per_token_logps=array((num_rows, cap), jnp.float32),
        old_per_token_logps=None,
    )

    def train_step(state: Any, example: Any) -> Any:
        actor, optimizer = nnx.merge(graphdef, state)
        outputs = trainer._train_step(actor, optimizer, example)
        return nnx.state((actor, optimizer)), outputs

    with mesh:
        shardings = nnx.get_named_sharding(shapes, mesh)
        lowered = jax.jit(train_step, in_shardings=(shardings, None), out_shardings=(shardings, None), donate_argnums=0)
        return lowered.lower(shapes, example).compile()


def _tiny_tunix_trainer(model_config: ModelConfig, rollout_config: Any) -> Any:
    """Tunix' trainer with the loss of its GRPO learner; the model that it trains is passed to its step."""
    model_class, config, _ = tunix_architecture(tiny_shape(model_config))
    mesh = Mesh(np.array(jax.devices()[:1]).reshape(1, 1), ("fsdp", "tp"))
    actor, reference = (model_class(config, rngs=nnx.Rngs(params=0)) for _ in range(2))
    learner = tunix_learner(
        actor=actor,
        reference=reference,
        tokenizer=Numbers(model_config.vocab_size),
        mesh=mesh,
        rollout_config=rollout_config,
        num_generations=2,
        reward_fn=lambda prompts, completions, **_: [0.0] * len(completions),
    )
    return learner.rl_cluster.actor_trainer
