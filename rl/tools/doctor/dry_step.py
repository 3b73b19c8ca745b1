"""One step of a run in memory: completions are drawn and judged, an update is made, and nothing is kept.

In: a configuration that `grpo train --check` has found in order. Out: the step's metrics and what a run would warn of.
The step has the run's own sizes, so its memory is that of the run. It starts from the weights of model.source, also
where a run folder holds later ones. Not here: run folder, checkpoints, evaluation.
"""

import contextlib
import dataclasses
import time
from typing import NamedTuple

from rl.algorithms.from_config import loss_config
from rl.config.load import Config
from rl.data.prompts import load_prompts
from rl.devices.mesh import create_mesh, no_implicit_transfers
from rl.models.flavours import policy_from_config
from rl.models.trainable import Trainable
from rl.rollout.collector import Collector
from rl.rollout.environments import start_episodes
from rl.rollout.groups import minibatches, with_advantages
from rl.rollout.reward_model import open_reward_models, weight_bytes
from rl.rollout.scoring import start_rewards
from rl.run.checkup import Checkups
from rl.run.executables import use_compiled
from rl.run.log import RunLog
from rl.run.metrics import peak_memory_bytes
from rl.run.progress import Progress
from rl.sampler.create import checked_sampling, create_sampler, plan_draws, planned_prompt_length
from rl.state.optimizer import create_training_optimizer
from rl.state.origin import find_origin, pretrained_params, tokenizer_from_config
from rl.state.states import InitStateFn, frozen_reference, get_abstract_state, setup_decode_state, setup_training_state
from rl.training.shaped_inputs import plan_minibatches
from rl.training.train_step import jit_train_step
from rl.training.update import Updater, train_step_options


class DryStep(NamedTuple):
    """A step.

    Attributes:
      metrics: those of the step, and of its health.
      warnings: what a run would warn of, if the next steps were like it.
      seconds: with compilation. peak_bytes: of the fullest device, or of this process on CPU.
    """

    metrics: dict[str, float]
    warnings: list[str]
    seconds: float
    peak_bytes: int


def dry_step(config: Config) -> DryStep:
    """Makes one step of a run in memory. The console of the configuration says warnings alone.

    Raises:
      ValueError: as `rl.grpo_trainer.train`.
      jax.errors.JaxRuntimeError: the memory of a device is too small, or a device fails.
    """
    quiet = dataclasses.replace(config.logging, quiet=True, trackers=[])
    health = dataclasses.replace(config.health, patience=1)  # there is one step
    config = dataclasses.replace(config, logging=quiet, health=health)  # pyright: ignore[reportArgumentType]
    start = time.perf_counter()
    with contextlib.ExitStack() as stack:
        log = stack.enter_context(RunLog(config))
        tokenizer = tokenizer_from_config(config)
        data = load_prompts(config, tokenizer)
        origin = find_origin(config, tokenizer)
        sampling = checked_sampling(config, origin.model_config, tokenizer)
        mesh = create_mesh(config.mesh)
        policy = policy_from_config(config, origin.model_config, mesh)
        schedule, optimizer = create_training_optimizer(config, policy)
        compiled = stack.enter_context(use_compiled(config, policy, mesh))
        init_policy_fn = InitStateFn(policy, optimizer, config.seed)
        shardings = get_abstract_state(config, mesh, init_policy_fn).shardings
        judges = open_reward_models(config, mesh)
        memory, beside = compiled.device_memory, weight_bytes(judges)
        sampler = create_sampler(config, policy, mesh, shardings.params, tokenizer, memory, beside)
        stack.callback(sampler.close)
        plan_draws(sampler, config, data, sampling, compiled.prompt_length)
        packing = plan_minibatches(config, compiled.prompt_length or planned_prompt_length(config, data), policy, mesh)
        options = train_step_options(config, packing)
        train_step = jit_train_step(policy, optimizer, loss_config(config), shardings, mesh=mesh, **options)
        updater = Updater(train_step, config, policy, packing, shardings, mesh=mesh)
        episodes = stack.enter_context(start_episodes(config, tokenizer, sampling.eos_ids, data.judged_rows, None))
        rewards = stack.enter_context(start_rewards(config, data.judged_rows, None, mesh, judges, episodes))
        collector = Collector(config, data, sampler, rewards, sampling, tokenizer, log, episodes)
        params = pretrained_params(origin, shardings.params)
        state, _ = setup_training_state(config, mesh, init_policy_fn, params)
        reference = None
        if config.grpo.beta and Trainable(policy).has_frozen:
            reference = frozen_reference(policy, state)
        elif config.grpo.beta:
            init_reference_fn = InitStateFn(policy, None, config.seed)
            given = pretrained_params(origin, shardings.params)
            reference, _ = setup_decode_state(config, mesh, init_reference_fn, given)
        groups = collector.draw_and_judge(state, 0, 0)
        assert groups is not None, "nobody asked this step to stop"
        rollout = with_advantages(config, groups)
        progress = Progress.start(config)
        with no_implicit_transfers():
            batches = minibatches(config, rollout)
            state, _, metrics = updater.update(state, reference, batches, progress.entropy)
        checkups = Checkups(config.health, schedule, updater.num_updates, config.rewards.watched)
        checkup = checkups.examine(progress.health, rollout.metrics | metrics, state, rollout.advantages_B)
        warnings = [*dict.fromkeys([*rollout.problems, *checkup.warnings])]
        return DryStep(dict(checkup.metrics), warnings, time.perf_counter() - start, peak_memory_bytes())
