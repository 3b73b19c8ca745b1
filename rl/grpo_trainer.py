"""GRPO training: `grpo train CONFIG [key=value ...]`, or `python -m rl.grpo_trainer`.

This page is a run from top to bottom: prompts, policy, two states, sampler, run folder, states restored or new, train
step, loop. Whatever can be refused is refused before the run folder is touched, so much is made early that is used
late. Step k in metrics and checkpoints means that k steps are done. All randomness follows from (seed, step), so a
resumed run repeats what an uninterrupted one does, bit for bit.

To change something, go to
    prompts                     `rl.data.prompts`
    drawing tokens              `rl.sampler`
    reward functions            `rewards`; when they are called: `rl.rollout.scoring`
    groups, evaluation          `rl.rollout.collector`, `rl.rollout.step_prompts`, `rl.rollout.evaluation`
    advantages, loss            `rl.algorithms.advantages`, `rl.algorithms.losses`, `rl.algorithms.loss_types`
    packing, one update         `rl.training.packing`, `rl.training.train_step`; the updates of a step: `.update`
    optimizer, checkpoints      `rl.state.optimizer`, `rl.state.checkpoint`
    reference, trained part     `rl.state.reference_sync`, `rl.models.trainable`
    linen or nnx                `rl.models.flavours`
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
from rl.rollout.collector import Collector
from rl.rollout.groups import minibatches, sample_records, with_advantages
from rl.rollout.scoring import start_rewards
from rl.run.announce import announce
from rl.run.checks import check_recipe
from rl.run.command import run_command
from rl.run.executables import open_compiled
from rl.run.health import raise_if_stuck
from rl.run.log import RunLog
from rl.run.loop import LoopState, restore_or_start, run_identity
from rl.run.not_finite import examine_step
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
        # prompts
        tokenizer = tokenizer_of(config)
        data = load_prompts(config, tokenizer)
        held_out = data.held_out[: config.eval.max_prompts] if config.eval.every else []
        origin = find_origin(config, tokenizer)
        sampling = checked_sampling(config, origin.model_config, tokenizer)
        check_recipe(config, data, sampling, origin.model_config.max_position_embeddings)

        # policy: pure functions, no weights; the weights are in its state
        mesh = create_mesh(config.mesh)
        policy = policy_from_config(config, origin.model_config, mesh)
        schedule, optimizer = create_training_optimizer(config, policy)
        saved = open_compiled(config, policy, mesh)  # programs of `grpo compile`, which fix the length of prompts
        packing = plan_for(config, saved.prompt_length or data.longest_prompt, policy, mesh)
        identity = run_identity(config, origin, data)
        hosts.check_same(config, identity)  # every process must start the same run

        # two states, policy and reference, each built by its own init_state_fn; here only shapes and shardings
        init_policy_fn = InitStateFn(policy, optimizer, config.seed)
        init_reference_fn = InitStateFn(policy, None, config.seed)  # not trained: no optimizer
        abstract = get_abstract_state(config, mesh, init_policy_fn)
        shardings = abstract.shardings
        check_sharded(abstract.shapes, shardings, config.mesh, mesh)

        # sampler: holds no weights; planned here, so that a call too large for the memory is refused now
        sampler = create_sampler(config, policy, mesh, shardings.params, tokenizer, saved.device_memory, saved.get)
        stack.callback(sampler.close)
        draw_sizes = plan_draws(sampler, config, data, sampling, len(held_out), saved.prompt_length)

        # run folder: whatever is wrong up to `begin` has touched nothing on disk; with look_only `begin` only reads
        run = stack.enter_context(RunOutput(config, "grpo", identity, log, look_only=check_only, trust=trust))
        rewards = stack.enter_context(start_rewards(config, data.train, run.rewards_log))
        collector = Collector(config, sampler, rewards, sampling, tokenizer, held_out, log)
        checkpoints = run.begin(mesh, init_policy_fn, abstract, with_reference=bool(config.reference.sync_every))
        announce(log, config, data, origin, tokenizer, policy, mesh, run, packing, sampling)
        if check_only:
            collector.announce(gold=data.train[0])
            log.message(run.would_do("grpo train", config.grpo.steps))
            return run.path

        # states: restored, or new
        num_rows = len(data.train)
        state, loop = restore_or_start(config, mesh, init_policy_fn, origin, checkpoints, num_rows, log, saved.get)
        collector.restore(loop.reward_state)
        reference = reference_of(config, mesh, init_reference_fn, origin, checkpoints, state, saved.get)
        if config.sampling.warm_up:
            for size in draw_sizes:
                sampler.warm_up(state.params, *size)

        # train step
        loss = loss_config(config)
        options = train_step_options(config, packing)
        train_step = jit_train_step(policy, optimizer, loss, shardings, mesh=mesh, stored=saved.get, **options)
        updater = Updater(train_step, config, policy, packing, shardings, mesh=mesh, stored=saved.get)
        sync_reference = ReferenceSync(config, shardings.params)
        num_updates = updates_per_step(config)

        # loop
        first_step = get_first_step(policy, state, num_updates)
        collector.announce(gold=None if first_step else data.train[0])
        stack.enter_context(log.recording(run.path, first_step))
        if first_step == 0 and (baseline := collector.evaluate(state, step=0)):
            log.step({"step": 0, **baseline})
        log.stopwatch.lap()  # the seconds of the first step begin here
        for step in range(first_step, config.grpo.steps):
            # 1. draw completions and judge them
            collected = collector.draw_and_judge(state, step, data.train, loop.position)
            # 2. rewards to advantages
            rollout = with_advantages(config, collected.judged, collected.weights_step)
            # 3. update the policy; move the reference if it moves
            with log.timer("train"), no_implicit_transfers():
                batches = minibatches(config, rollout)
                age = step - rollout.weights_step  # 0: the weights at hand drew it
                state, entropy, train_metrics = updater.step(state, reference, batches, loop.entropy, age)
                reference = sync_reference(reference, state, step + 1)
            # 4. look at its health, and remember where the loop stands
            measured = rollout.metrics | train_metrics
            checkup = examine_step(
                config.health, loop.health, measured, num_updates, state.params, rollout.advantages_B
            )
            loop = LoopState(
                step=step + 1,
                health=checkup.state,
                position=collected.position,
                entropy=entropy,
                reward_state=collector.reward_state,
            )
            # 5. evaluate and write: the line of a step is on disk before its checkpoint
            metrics = {"step": loop.step, **rollout.metrics, **collected.metrics, **train_metrics}
            metrics["lr"] = last_lr(schedule, int(state.step), loop.health.num_skipped)  # state.step counts updates
            metrics |= collector.evaluate(state, loop.step)
            metrics |= log.lap(rollout.num_tokens, "rollout", "train", "step")
            num_samples = len(rollout.texts) if checkup.keep_samples else config.logging.samples_per_step
            log.step(metrics, sample_records(rollout, num_samples))
            log.warnings([*rollout.problems, *collected.problems, *rounding_problems(train_metrics), *checkup.warnings])
            raise_if_stuck(config.health, checkup)  # after the line and the samples, which show why
            # 6. save
            run.check_lease()  # no two runs write to one store
            should_stop = log.should_stop(loop.step) or collector.reward_is_down  # after all steps, or earlier
            if should_stop or loop.step % config.checkpoint.every == 0:
                with log.timer("checkpoint"):  # counted to the next step: the line of this one is written
                    checkpoints.save(loop.step, state, loop.record(policy.flavour, num_rows), reference)
            run.step_recorded()
            if should_stop:
                break
        checkpoints.wait()
        collector.raise_if_reward_is_down()
        log.saved(loop.step, run.path)
        return run.path


def main(argv: Sequence[str] | None = None) -> None:
    """`grpo train CONFIG [--check] [--trust] [key=value ...]`."""
    run_command(train, "grpo train", "examples/arithmetic/grpo.yml", argv)


if __name__ == "__main__":
    main()
