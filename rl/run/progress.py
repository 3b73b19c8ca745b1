"""The identity of a run, and the state of its loop from one step to the next.

In: the run's configuration and sources, or a checkpoint. Out: the identity for `run.json`; the training state with its
`Progress`, restored or new.
"""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from jax.sharding import Mesh

from rl.algorithms.entropy_coef import EntropyCoefState
from rl.config.load import Config
from rl.config.objects import function_hashes
from rl.config.user_files import file_hashes, prepare_hashes
from rl.data.prompts import PairData, PromptData, fingerprint, held_out_fingerprint
from rl.data.tokenizer import Tokenizer
from rl.devices import hosts
from rl.models.foreign import files as foreign
from rl.models.train_state import PureState
from rl.run.best import Best
from rl.run.health import HealthState, healthy
from rl.run.log import RunLog
from rl.run_folder.clock import CLOCK
from rl.run_folder.contents import BEST, HELD_OUT
from rl.state.checkpoint import Checkpoints
from rl.state.origin import Origin, pretrained_params, reward_model_identity
from rl.state.states import InitStateFn, frozen_base, setup_training_state

# Of a `rl.rollout.collector.Collector`; a checkpoint of an older version lacks the later ones.
ORDER_STEP = "order_prompts_per_step"  # the size of a step with which the run, and so its order of prompts, began
_LEFT = "evaluation_left"
REWARD_STATE = ("reward_calls", "reward_doubts", "reward_steps_down", ORDER_STEP, "curriculum")


def run_identity(
    config: Config, origin: Origin, data: PromptData, reward_tokenizers: Mapping[str, Tokenizer] | None = None
) -> dict[str, Any]:
    """The identity of a run in `run.json`: sources and hashes of policy, reference, prompts, a user's files, reward
    models, and reward functions that are given as objects. ValueError where two processes would start different runs.

    reward_tokenizers: of the reward models, by name, where they are read already.
    """
    reference = origin.identity if config.grpo.beta else None
    hashes = {"data": data.fingerprint(), HELD_OUT: held_out_fingerprint(data.held_out)}
    hashes |= file_hashes(config) | prepare_hashes(config) | reward_model_identity(config, reward_tokenizers)
    clock = {} if origin.clock is None else {CLOCK: origin.clock}
    found = {"policy": origin.identity, "reference": reference, **hashes, **clock, **function_hashes(config)}
    return _same(found, config)


def supervised_identity(config: Config, origin: Origin, pairs: PairData) -> dict[str, Any]:
    """The identity of supervised fine-tuning in `run.json`: source and hash of the policy and of the data rows.
    ValueError as in `run_identity`.
    """
    held_out = held_out_fingerprint(pairs.held_out)
    hashes = {"data": fingerprint(pairs.rows), HELD_OUT: held_out, **prepare_hashes(config)}
    hashes |= {} if origin.clock is None else {CLOCK: origin.clock}
    return _same({"policy": origin.identity, **hashes}, config)


def _same(identity: dict[str, Any], config: Config) -> dict[str, Any]:
    hosts.check_same(config, identity)
    return identity


class Progress(NamedTuple):
    """The state of the loop in a checkpoint. Supervised fine-tuning uses `steps_done` and `health` only.

    Attributes:
      steps_done: the number of steps that are done.
      health: see `rl.run.health`.
      position: where the next prompts are in the run's order: the number used up, or what a stream says of it.
      entropy: the state of the adaptive entropy bonus.
      reward_state: findings about reward functions and prompts, as JSON values by the names in `REWARD_STATE`.
      best: the best evaluation so far.
      has_left: the evaluation after this step was due, and left when the run was asked to stop.
    """

    steps_done: int
    health: HealthState
    position: int
    entropy: EntropyCoefState
    reward_state: Mapping[str, Any] = {}
    best: Best = Best()
    has_left: bool = False

    @classmethod
    def start(cls, config: Config) -> "Progress":
        """The state before the first step."""
        return cls(0, healthy(), 0, EntropyCoefState(config.grpo.entropy_coef, math.inf))

    @classmethod
    def restored(cls, record: Mapping[str, Any], config: Config, num_rows: int) -> "Progress":
        """The state from a checkpoint's record, which `record` made. `num_rows`: `PromptData.num_positions`."""
        loop = cls.start(config)._replace(steps_done=record["step"], health=HealthState(**record["health"]))
        if "position" not in record:
            return loop
        return loop._replace(
            position=record["epoch"] * num_rows + record["position"],
            entropy=EntropyCoefState(**record["entropy"]),
            reward_state={name: record[name] for name in REWARD_STATE if name in record},
            best=Best(**record.get(BEST, {})),
            has_left=record.get(_LEFT, False),
        )

    def record(self, flavour: str, num_rows: int) -> dict[str, Any]:
        """The state as JSON values. The position is split into epochs, see `PromptData.num_positions`."""
        epoch, offset = divmod(self.position, num_rows)
        record = {"step": self.steps_done, "epoch": epoch, "position": offset, "flavour": flavour}
        record |= {"entropy": self.entropy._asdict(), "health": self.health._asdict()}
        followed = {BEST: self.best._asdict()} if self.best != Best() else {}
        followed |= {_LEFT: True} if self.has_left else {}
        return {**record, **self.reward_state, **followed}

    def supervised_record(self, flavour: str) -> dict[str, Any]:
        """The state of supervised fine-tuning as JSON values. The step alone gives the position in the data."""
        return {"step": self.steps_done, "flavour": flavour, "health": self.health._asdict()}


def restore_or_start(
    config: Config,
    mesh: Mesh,
    init_state_fn: InitStateFn,
    origin: Origin,
    checkpoints: Checkpoints,
    num_rows: int,
    log: RunLog,
) -> tuple[PureState, Progress]:
    """The training state and the loop's state, from the newest whole checkpoint or new.

    Args:
      checkpoints: those of the run folder.
      num_rows: by how much the position grows in an epoch.

    Raises:
      ValueError: the checkpoint is of another model or optimizer, no checkpoint is whole, pretrained weights do not
        fit, or a user's module breaks the rules of a policy.
    """
    if checkpoints.latest_step is None:
        params = pretrained_params(origin, checkpoints.abstract.shardings.params)
        state, _ = setup_training_state(config, mesh, init_state_fn, params)
        loop = Progress.start(config)
    else:
        state, record = checkpoints.restore(base=frozen_base(config, mesh, init_state_fn, origin))
        loop = Progress.restored(record, config, num_rows)
        log.resumed(loop.steps_done, loop.has_left)
    foreign.check_policy(init_state_fn.policy, state.params, config.model.source)
    return state, loop
