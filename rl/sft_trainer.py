"""Supervised fine-tuning: `grpo sft CONFIG [key=value ...]`. A cold policy has nothing to reinforce; this warms it up.

The same page as `rl.grpo_trainer`, without rollouts and reference: pairs of prompt and completion take the place of
what the policy draws, and one step is one update. At the end the policy is written to output_dir/export as a Hugging
Face folder. Not on this page: the loss and the minibatches of pairs (`rl.training.supervised`).
"""

import contextlib
import pathlib
from collections.abc import Sequence

import jax

from rl.config.load import Config
from rl.data.prompts import check_enough_rows, load_pairs, step_indices
from rl.devices import hosts
from rl.devices.mesh import check_sharded, create_mesh, no_implicit_transfers
from rl.models.flavours import policy_from_config
from rl.rollout.final_accuracy import FinalAccuracy
from rl.run.announce import announce_supervised
from rl.run.command import run_command
from rl.run.health import raise_if_stuck
from rl.run.log import RunLog
from rl.run.loop import restore_or_start, supervised_identity
from rl.run.not_finite import examine_step
from rl.run.output import RunOutput
from rl.state.optimizer import create_training_optimizer, last_lr, rounding_problems
from rl.state.origin import find_origin, tokenizer_of
from rl.state.states import InitStateFn, get_abstract_state, get_first_step
from rl.training.supervised import (
    metrics_of,
    minibatch_of,
    negative_log_likelihood,
    num_tokens_of,
    plan_for_pairs,
    supervised_options,
)
from rl.training.train_step import jit_train_step


def train(config: Config, check_only: bool = False, trust: bool = False) -> pathlib.Path:
    """Runs or resumes supervised fine-tuning; returns the run folder.

    Args:
      check_only: everything before the first compilation is done, what the run would do is said, and nothing on disk
        changes but caches of downloads and of `datasets`.
      trust: see `rl.run_folder.folder.RunFolder`.

    Raises:
      ValueError: whatever is wrong with the configuration, the data, the model or the run folder, before anything heavy
        starts.
    """
    if config.compiled_file is not None:
        raise ValueError(
            "compiled_file must be null in grpo sft, for it holds the programs of grpo train, got "
            f"{config.compiled_file!r}; leave it out"
        )
    with contextlib.ExitStack() as stack:
        log = stack.enter_context(RunLog(config.sft.steps, "sft.steps"))
        # pairs: what is imitated
        tokenizer = tokenizer_of(config)
        pairs = load_pairs(config, tokenizer)
        num_rows = len(pairs.rows)
        check_enough_rows(num_rows, config.sft.batch_size, "sft.batch_size")
        held_out = pairs.held_out[: config.eval.max_prompts]
        origin = find_origin(config, tokenizer)

        # policy: what imitates
        mesh = create_mesh(config.mesh)
        policy = policy_from_config(config, origin.model_config, mesh)
        schedule, optimizer = create_training_optimizer(config, policy, num_updates=config.sft.steps)
        packing = plan_for_pairs(config, pairs.rows, policy, mesh)
        identity = supervised_identity(origin, pairs)
        hosts.check_same(config, identity)

        # init_state_fn: builds the policy's state
        init_policy_fn = InitStateFn(policy, optimizer, config.seed)
        abstract = get_abstract_state(config, mesh, init_policy_fn)
        shardings = abstract.shardings
        check_sharded(abstract.shapes, shardings, config.mesh, mesh)

        # accuracy at the end: planned here, so that what cannot be measured is refused now
        accuracy = FinalAccuracy(config, policy, origin.model_config, mesh, shardings.params, tokenizer, held_out)
        stack.callback(accuracy.close)

        # run folder: whatever is wrong up to `begin` has touched nothing on disk
        run = stack.enter_context(RunOutput(config, "sft", identity, log, look_only=check_only, trust=trust))
        checkpoints = run.begin(mesh, init_policy_fn, abstract)
        announce_supervised(log, pairs, len(held_out), origin, tokenizer, policy, run)
        if check_only:
            log.message(run.would_do("grpo sft", config.sft.steps))
            return run.path

        # state: restored, or new
        state, loop = restore_or_start(config, mesh, init_policy_fn, origin, checkpoints, num_rows, log)
        first_step = get_first_step(policy, state)

        # train step
        loss, options = negative_log_likelihood(config), supervised_options(config, packing)
        train_step = jit_train_step(policy, optimizer, loss, shardings, mesh=mesh, **options)

        # loop
        stack.enter_context(log.recording(run.path, first_step))
        for step in range(first_step, config.sft.steps):
            # 1. the pairs of the step
            rows = [pairs.rows[i] for i in step_indices(num_rows, config.seed, step, config.sft.batch_size)]
            # 2. update the policy
            with log.timer("train"), no_implicit_transfers():
                state, update = train_step(state, minibatch_of(rows, packing, config, mesh))
                train_metrics = metrics_of(jax.device_get(update))
            # 3. look at its health, and remember where the loop stands
            checkup = examine_step(config.health, loop.health, train_metrics, 1, state.params)
            loop = loop._replace(step=step + 1, health=checkup.state)
            # 4. write, then save: the line of a step is on disk before its checkpoint
            metrics = {"step": loop.step, **train_metrics, "lr": last_lr(schedule, loop.step, loop.health.num_skipped)}
            metrics |= log.lap(num_tokens_of(rows), "train")
            log.step(metrics)
            log.warnings([*rounding_problems(train_metrics), *checkup.warnings])
            raise_if_stuck(config.health, checkup)
            run.check_lease()  # no two runs write to one store
            should_stop = log.should_stop(loop.step)  # after all steps, or earlier when asked to
            if should_stop or loop.step % config.checkpoint.every == 0:
                with log.timer("checkpoint"):  # counted to the next step: the line of this one is written
                    checkpoints.save(loop.step, state, loop.supervised_record(policy.flavour))
            run.step_recorded()
            if should_stop:
                break
        checkpoints.wait()
        log.saved(loop.step, run.path)
        if int(state.step) >= config.sft.steps:  # otherwise the run was asked to stop before its end
            accuracy.say(state.params, run.rewards_log, log)
            run.export(origin.model_config, state.params, tokenizer)
        return run.path


def main(argv: Sequence[str] | None = None) -> None:
    """`grpo sft CONFIG [--check] [--trust] [key=value ...]`."""
    run_command(train, "grpo sft", "examples/arithmetic/sft.yml", argv)


if __name__ == "__main__":
    main()
