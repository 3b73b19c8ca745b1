"""GRPO training: `grpo train CONFIG [key=value ...]`, or `python -m rl.grpo_trainer`.

This page is a run from top to bottom: what is asked, what answers, the two states on one mesh, the compiled train step,
and the loop. Everything is refused before the run folder is touched that can be. Step k in metrics and checkpoints
means that k steps are done. Everything random follows from (seed, step), so that a resumed run repeats what an
uninterrupted one does, bit for bit.

Not on this page:
    drawing and judging    `rl.rollout.judge`, `rl.sampler.slot_sampler`
    advantages             `rl.algorithms.advantages`
    loss                   `rl.algorithms.losses`
    one update             `rl.training.train_step`; all updates of a step, and their packing: `rl.training.update`
    linen or nnx           `rl.models.flavours`
    adapters               `rl.models.lora`, `rl.state.reference_sync`
"""

import contextlib
import pathlib
from collections.abc import Sequence

from rl.algorithms.from_config import loss_config
from rl.config.load import Config
from rl.data.prompts import load_prompts
from rl.devices import hosts
from rl.devices.mesh import check_sharded, create_mesh, no_implicit_transfers
from rl.models.flavours import policy_from_config
from rl.rollout.groups import minibatches, sample_records, to_rollout
from rl.rollout.judge import Judge
from rl.rollout.scoring import start_rewards
from rl.run.announce import announce
from rl.run.checks import check_recipe
from rl.run.command import run_command
from rl.run.executables import open_compiled
from rl.run.health import examine, raise_if_stuck
from rl.run.log import RunLog
from rl.run.loop import LoopState, restore_or_start, run_identity
from rl.run.not_finite import cause_if_all_skipped
from rl.run.output import RunOutput
from rl.sampler.create import checked_sampling, create_sampler, plan_draws
from rl.state.optimizer import create_training_optimizer, last_lr, rounding_problems, updates_per_step
from rl.state.origin import find_origin, tokenizer_of
from rl.state.reference_sync import ReferenceSync, reference_of
from rl.state.states import InitStateFn, get_abstract_state, get_first_step
from rl.training.shaped_inputs import plan_for
from rl.training.train_step import jit_train_step
from rl.training.update import Updater, train_step_options


def train(config: Config, check_only: bool = False, trust: bool = False) -> pathlib.Path:
    """Runs or resumes the training run that `config` describes; returns its folder.

    Args:
      check_only: everything before the first compilation is done, what the run would do is said, and nothing on disk
        changes but caches of downloads and of `datasets`.
      trust: see `rl.run_folder.folder.RunFolder`.

    Raises:
      ValueError: whatever is wrong with the configuration, the data, the model or the run folder, before anything heavy
        starts.
    """
    with contextlib.ExitStack() as stack:
        log = stack.enter_context(RunLog(config.grpo.steps))
        # prompts: what is asked
        tokenizer = tokenizer_of(config)
        data = load_prompts(config, tokenizer)
        held_out = data.held_out[: config.eval.max_prompts] if config.eval.every else []
        origin = find_origin(config, tokenizer)
        check_recipe(config, data, origin.model_config.max_position_embeddings)
        sampling = checked_sampling(config, origin.model_config, tokenizer)

        # policy: what answers
        mesh = create_mesh(config.mesh)
        policy = policy_from_config(config, origin.model_config, mesh)
        schedule, optimizer = create_training_optimizer(config, policy)
        compiled = open_compiled(config, policy, mesh)
        packing = plan_for(config, compiled.prompt_length or data.longest_prompt, policy, mesh)
        identity = run_identity(config, origin, data)
        hosts.check_same(config, identity)

        # init_state_fn: policy and reference are two states, each built by its own
        init_policy_fn = InitStateFn(policy, optimizer, config.seed)
        init_reference_fn = InitStateFn(policy, None, config.seed)
        abstract = get_abstract_state(config, mesh, init_policy_fn)
        shardings = abstract.shardings
        check_sharded(abstract.shapes, shardings, config.mesh, mesh)

        # sampler: holds no weights; planned here, so that a call too large for the memory is refused now
        memory, stored = compiled.device_memory, compiled.get
        sampler = create_sampler(config, policy, mesh, shardings.params, tokenizer, memory, stored)
        stack.callback(sampler.close)
        draw_sizes = plan_draws(sampler, config, data, sampling, len(held_out), compiled.prompt_length)

        # run folder: whatever is wrong up to `begin` has touched nothing on disk
        run = stack.enter_context(RunOutput(config, "grpo", identity, log, look_only=check_only, trust=trust))
        rewards = stack.enter_context(start_rewards(config, data.train, run.rewards_log))
        judge = Judge(config, sampler, rewards, sampling, tokenizer, held_out, log)
        checkpoints = run.begin(mesh, init_policy_fn, abstract, with_reference=bool(config.reference.sync_every))
        announce(log, config, data, origin, policy, mesh, run, packing, sampling)
        if check_only:
            log.message(run.would_do("grpo train", config.grpo.steps))
            return run.path

        # states: restored, or new
        num_rows = len(data.train)
        state, loop = restore_or_start(config, mesh, init_policy_fn, origin, checkpoints, num_rows, log, stored)
        judge.adopt(loop.rewards)
        reference = reference_of(config, mesh, init_reference_fn, origin, checkpoints, state, stored)
        sync_reference = ReferenceSync(config, shardings.params)
        num_updates = updates_per_step(config)
        first_step = get_first_step(policy, state, num_updates)
        for size in draw_sizes if config.sampling.warm_up else ():
            sampler.warm_up(state.params, *size)

        # train step
        loss, options = loss_config(config), train_step_options(config, packing)
        train_step = jit_train_step(policy, optimizer, loss, shardings, mesh=mesh, stored=stored, **options)
        updater = Updater(train_step, config, policy, packing, shardings, mesh=mesh, stored=stored)

        # loop
        judge.say_how_it_judges(gold=None if first_step else data.train[0])
        stack.enter_context(log.recording(run.path, first_step))
        if first_step == 0 and (baseline := judge.evaluation(state, 0)):
            log.step({"step": 0, **baseline})
        log.stopwatch.lap()  # the seconds of the first step begin here
        for step in range(first_step, config.grpo.steps):
            # 1. draw completions and judge them
            collected = judge.groups_of_step(state, step, data.train, loop.position)
            # 2. rewards to advantages
            rollout = to_rollout(config, collected.judged)
            # 3. update the policy; move the reference if it moves
            with log.timer("train"), no_implicit_transfers():
                groups = minibatches(rollout, config)
                state, entropy, trained = updater.step(state, reference, groups, loop.entropy)
                reference = sync_reference(reference, state, step + 1)
            # 4. look, write, save
            cause = cause_if_all_skipped(trained, num_updates, state.params, rollout.advantages_B)
            checkup = examine(config.health, loop.health, rollout.metrics | trained, num_updates, cause)
            loop = LoopState(step + 1, checkup.state, collected.position, entropy, judge.found)
            metrics = {"step": loop.step, **rollout.metrics, **collected.metrics, **trained}
            metrics["lr"] = last_lr(schedule, int(state.step), loop.health.num_skipped)
            metrics |= judge.evaluation(state, loop.step)
            metrics |= log.lap(rollout.num_tokens, "rollout", "train", "step")
            num_samples = len(rollout.texts) if checkup.keep_samples else config.logging.samples_per_step
            log.step(metrics, sample_records(rollout, num_samples))
            log.warnings([*rollout.problems, *collected.problems, *rounding_problems(trained), *checkup.warnings])
            raise_if_stuck(config.health, checkup)
            run.check_lease()
            is_last = log.is_last(loop.step)
            if loop.step % config.checkpoint.every == 0 or is_last:
                with log.timer("checkpoint"):  # part of the next step's seconds
                    checkpoints.save(loop.step, state, loop.record(policy.flavour, num_rows), reference)
            run.step_recorded()
            if is_last:
                break
        checkpoints.wait()
        return run.path


def main(argv: Sequence[str] | None = None) -> None:
    """`grpo train CONFIG [--check] [--trust] [key=value ...]`."""
    run_command(train, "grpo train", "examples/arithmetic/grpo.yml", argv)


if __name__ == "__main__":
    main()
