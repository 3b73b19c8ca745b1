"""GRPO training: `grpo train CONFIG [key=value ...]`, or `python -m rl.grpo_trainer`.

This page is a run from top to bottom: prompts, policy, two states, sampler, train step, run folder, loop. Sampler and
train step are functions of weights, made before there are any: what cannot work is refused before the run folder is
touched. Step k in metrics and checkpoints means that k steps are done. All randomness follows from (seed, step), so a
resumed run repeats what an uninterrupted one does, bit for bit. Names end in what an array holds an entry for: `_B` is
one for each sequence.

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
from rl.state.optimizer import create_training_optimizer, last_lr
from rl.state.origin import find_origin, tokenizer_from_config
from rl.state.reference_sync import ReferenceSync, restore_reference
from rl.state.states import InitStateFn, get_abstract_state
from rl.training.shaped_inputs import plan_minibatches
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
        tokenizer = tokenizer_from_config(config)
        data = load_prompts(config, tokenizer)
        origin = find_origin(config, tokenizer)  # where the weights come from; they are read later, into their state
        sampling = checked_sampling(config, origin.model_config, tokenizer)
        check_recipe(config, data, sampling, origin.model_config.max_position_embeddings)

        # policy: what answers; pure functions without weights, which are in the state
        mesh = create_mesh(config.mesh)
        policy = policy_from_config(config, origin.model_config, mesh)
        schedule, optimizer = create_training_optimizer(config, policy)
        saved = open_compiled(config, policy, mesh)  # programs of `grpo compile`, where the configuration names some
        identity = run_identity(config, origin, data)  # the same in every process

        # two states on one mesh, policy and reference, each built by its own init_state_fn; here only what is planned
        init_policy_fn = InitStateFn(policy, optimizer, config.seed)
        init_reference_fn = InitStateFn(policy, None, config.seed)  # not trained: no optimizer
        abstract = get_abstract_state(config, mesh, init_policy_fn)
        shardings = abstract.shardings
        check_sharded(abstract.shapes, shardings, config.mesh, mesh)

        # sampler: draws with the weights that it is handed; a call too large for the memory is refused here
        sampler = create_sampler(config, policy, mesh, shardings.params, tokenizer, saved.device_memory, saved.get)
        stack.callback(sampler.close)
        draw_sizes = plan_draws(sampler, config, data, sampling, saved.prompt_length)

        # train step: one update of a minibatch; the updater makes all updates of a step with it
        packing = plan_minibatches(config, saved.prompt_length or data.longest_prompt, policy, mesh)
        loss, options = loss_config(config), train_step_options(config, packing)
        train_step = jit_train_step(policy, optimizer, loss, shardings, mesh=mesh, stored=saved.get, **options)
        updater = Updater(train_step, config, policy, packing, shardings, mesh=mesh, stored=saved.get)
        sync_reference = ReferenceSync(config, shardings.params)

        # run folder: whatever is wrong up to `begin` has touched nothing on disk; to look only, `begin` reads
        run = stack.enter_context(RunOutput(config, "grpo", identity, log, look_only=check_only, trust=trust))
        rewards = stack.enter_context(start_rewards(config, data.train, run.rewards_log))
        collector = Collector(config, data, sampler, rewards, sampling, tokenizer, log)
        checkpoints = run.begin(mesh, init_policy_fn, abstract, with_reference=bool(config.reference.sync_every))
        announce(log, config, data, origin, tokenizer, policy, mesh, run, packing, sampling)
        if check_only:
            collector.announce(is_new=True)
            log.message(run.would_do("grpo train", config.grpo.steps))
            return run.path

        # states: restored, or new
        num_rows = len(data.train)
        state, loop = restore_or_start(config, mesh, init_policy_fn, origin, checkpoints, num_rows, log, saved.get)
        reference = restore_reference(config, mesh, init_reference_fn, origin, checkpoints, state, saved.get)
        collector.restore(loop.reward_state)
        collector.announce(is_new=loop.step == 0)
        if config.sampling.warm_up:
            for size in draw_sizes:
                sampler.warm_up(state.params, *size)

        # loop
        stack.enter_context(log.recording(run.path, loop.step))
        if loop.step == 0:
            log.baseline(collector.evaluate(state, step=0))
        for step in range(loop.step, config.grpo.steps):
            # 1. draw completions and judge them
            drawn = collector.draw_and_judge(state, step, loop.position)
            # 2. rewards to advantages
            rollout = with_advantages(config, drawn.judged, drawn.weights_step)
            # 3. update the policy; move the reference where it moves
            with log.timer("train"), no_implicit_transfers():
                batches, age = minibatches(config, rollout), step - rollout.weights_step
                state, entropy, train_metrics = updater.step(state, reference, batches, loop.entropy, age=age)
                reference = sync_reference(reference, state, step + 1)
            # 4. look at the step's health, and remember where the loop stands
            metrics = rollout.metrics | drawn.metrics | train_metrics
            checkup = examine_step(
                config.health, loop.health, metrics, updater.num_updates, state.params, rollout.advantages_B
            )
            loop = LoopState(
                step=step + 1,
                health=checkup.state,
                position=drawn.position,
                entropy=entropy,
                reward_state=collector.reward_state,
            )
            # 5. evaluate; write the step's line and samples
            metrics |= collector.evaluate(state, loop.step)
            metrics["lr"] = last_lr(schedule, num_updates=int(state.step), num_skipped=loop.health.num_skipped)
            samples = sample_records(rollout, None if checkup.keep_samples else config.logging.samples_per_step)
            log.step(loop.step, metrics, rollout.num_tokens, samples)
            log.warnings([*rollout.problems, *drawn.problems, *checkup.warnings])
            raise_if_stuck(config.health, checkup)  # after the line and the samples, which show why
            # 6. save: every so many steps, after the last one, and when the run is to end earlier
            is_last = log.should_stop(loop.step) or collector.reward_is_down
            run.save(loop.step, state, loop.record(policy.flavour, num_rows), reference, is_last=is_last)
            if is_last:
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
