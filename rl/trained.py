"""The policy of a finished or running run, for evaluation and export: run folder in, weights on a mesh out."""

import dataclasses
import os
import pathlib
from typing import Any

from jax.sharding import Mesh

from rl.checkpoint import create_checkpoint_manager
from rl.config import Config
from rl.mesh import create_mesh
from rl.models.policy import Policy, policy_from_config
from rl.optimizer import create_training_optimizer, shortest_run
from rl.states import InitStateFn, frozen_base, get_abstract_state, setup_decode_state
from rl.tokenizer import Tokenizer
from rl.weights import Origin, find_origin, pretrained_params, tokenizer_of


@dataclasses.dataclass(frozen=True)
class TrainedPolicy:
    """A policy with weights.

    Attributes:
      params, shardings: weights and where they are; the same tree.
      rng: uint32 key data of the run's base key, see `rl.models.train_state.PureState`.
      step: of the checkpoint they come from; None when they are those of model.source.
    """

    policy: Policy
    params: Any
    shardings: Any
    mesh: Mesh
    tokenizer: Tokenizer
    origin: Origin
    rng: Any
    step: int | None


def load_start(config: Config) -> TrainedPolicy:
    """The weights that a run with this configuration would start from."""
    tokenizer = tokenizer_of(config)
    origin = find_origin(config, tokenizer)
    mesh = create_mesh(config.mesh)
    policy = policy_from_config(config, origin.model_config)
    init_state_fn = InitStateFn(policy, None, config.seed)
    shardings = get_abstract_state(config, mesh, init_state_fn, is_training=False).shardings.params
    state, _ = setup_decode_state(config, mesh, init_state_fn, pretrained_params(origin, shardings))
    return TrainedPolicy(policy, state.params, shardings, mesh, tokenizer, origin, state.rng, None)


def training_setup(config: Config, origin: Origin) -> tuple[Mesh, InitStateFn]:
    """The mesh, and the `init_state_fn` of the state that a run with this configuration trains."""
    policy = policy_from_config(config, origin.model_config)
    # The number of updates shapes the schedule only, never the optimizer's state.
    _, optimizer = create_training_optimizer(config, policy, num_updates=shortest_run(config.optimizer))
    return create_mesh(config.mesh), InitStateFn(policy, optimizer, config.seed)


def load_checkpoint(config: Config, folder: str | os.PathLike, step: int | None = None) -> TrainedPolicy:
    """The weights of a run's checkpoint; None: the newest. `config` is the run's own (see `rl.run_folder.read_run`).

    Raises:
      ValueError: the run has no such checkpoint.
    """
    tokenizer = tokenizer_of(config)
    origin = find_origin(config, tokenizer)
    mesh, init_state_fn = training_setup(config, origin)
    config = dataclasses.replace(config, output_dir=str(pathlib.Path(folder)))
    checkpoints = create_checkpoint_manager(config, mesh, init_state_fn, read_only=True)
    try:
        step = checkpoints.latest_step if step is None else step
        if step is None:
            raise ValueError(
                f"run folder {str(folder)!r} must hold a checkpoint, and it has none; let the run reach "
                "checkpoint.every"
            )
        state, _ = checkpoints.restore(step, frozen_base(config, mesh, init_state_fn, origin))
    finally:
        checkpoints.close()
    shardings = checkpoints.abstract.shardings.params
    return TrainedPolicy(init_state_fn.policy, state.params, shardings, mesh, tokenizer, origin, state.rng, step)
