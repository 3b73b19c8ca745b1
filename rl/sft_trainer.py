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
from rl.data.order import order_of
from rl.data.prompts import check_enough_rows, evaluated_rows, load_pairs
from rl.devices.mesh import check_sharded, create_mesh, no_implicit_transfers
from rl.models.flavours import policy_from_config
from rl.rollout.final_accuracy import FinalAccuracy
from rl.run.announce import announce_supervised, what_next
from rl.run.best import refuse_best
from rl.run.checkup import Checkups
from rl.run.command import run_command
from rl.run.log import RunLog
from rl.run.output import RunOutput
from rl.run.progress import restore_or_start, supervised_identity
from rl.state.optimizer import create_training_optimizer
from rl.state.origin import find_origin, tokenizer_from_config
from rl.state.states import InitStateFn, get_abstract_state
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
      trust: accepts a config.yml that has changed since the run wrote it (docs/security.md).

    Raises:
      ValueError: whatever is wrong with the configuration, the data, the model or the run folder, before anything heavy
        starts.
    """
    if config.compiled_file is not None:
        raise ValueError(
            "compiled_file must be null in grpo sft, for it holds the programs of grpo train, got "
            f"{config.compiled_file!r}; leave it out"
        )
    refuse_best(config, "grpo sft")
    with contextlib.ExitStack() as stack:
        log = stack.enter_context(RunLog(config, "sft.steps"))
        # pairs: what is imitated
        tokenizer = tokenizer_from_config(config)
        pairs = load_pairs(config, tokenizer)
        num_rows = len(pairs.rows)
        check_enough_rows(num_rows, config.sft.batch_size, "sft.batch_size")
        order = order_of(config.data, pairs, config.seed, config.sft.batch_size, "sft.batch_size")
        held_out = evaluated_rows(pairs.held_out, config.eval.max_prompts)
        origin = find_origin(config, tokenizer)

        # policy: what imitates
        mesh = create_mesh(config.mesh)
        policy = policy_from_config(config, origin.model_config, mesh)
        schedule, optimizer = create_training_optimizer(config, policy, num_updates=config.sft.steps)

        # the policy's state, built by its init_state_fn; here only its plan
        init_policy_fn = InitStateFn(policy, optimizer, config.seed)
        abstract_state = get_abstract_state(config, mesh, init_policy_fn)
        shardings = abstract_state.shardings
        check_sharded(abstract_state.shapes, shardings, config.mesh, mesh)

        # train step
        packing = plan_for_pairs(config, pairs.rows, policy, mesh)
        loss = negative_log_likelihood(config)
        options = supervised_options(config, packing)
        train_step = jit_train_step(policy, optimizer, loss, shardings, mesh=mesh, **options)
        checkups = Checkups(config.health, schedule)

        # accuracy at the end: planned here, so that what cannot be measured is refused now
        accuracy = FinalAccuracy(config, policy, origin.model_config, mesh, shardings.params, tokenizer, held_out)
        stack.callback(accuracy.close)

        # run folder: so far nothing on disk has changed; with check_only, `begin` only reads
        identity = supervised_identity(config, origin, pairs)
        run = stack.enter_context(RunOutput(config, "sft", identity, log, check_only=check_only, trust=trust))
        checkpoints = run.begin(mesh, init_policy_fn, abstract_state)
        announce_supervised(log, config, pairs, len(held_out), origin, tokenizer, policy, mesh, packing, run)
        if check_only:
            log.last_word(run.would_do("grpo sft", config.sft.steps))
            return run.path

        # state: from the newest checkpoint, or new
        state, progress = restore_or_start(
            config, mesh, init_policy_fn, origin, checkpoints, num_rows=num_rows, log=log
        )

        # loop
        stack.enter_context(log.recording(run.path, progress.steps_done))  # from here on metrics go to files
        for step in range(progress.steps_done, config.sft.steps):
            steps_done = step + 1
            # 1. the pairs of the step
            rows = [pairs.rows[i] for i in order.step(step)]
            # 2. update the policy
            with log.timer("train"), no_implicit_transfers():
                state, update = train_step(state, minibatch_of(rows, packing, config, mesh))
                metrics = metrics_of(jax.device_get(update))
            # 3. look at the step's health
            checkup = checkups.examine(progress.health, metrics, state)
            # 4. write the step's line
            log.step(steps_done, checkup.metrics, num_tokens_of(rows))
            log.warnings(checkup.warnings)
            checkups.raise_if_stuck(checkup)  # this step is not saved; its line shows why
            # 5. remember where the loop stands; save where it is due
            progress = progress._replace(steps_done=steps_done, health=checkup.health)
            is_last = steps_done == config.sft.steps or log.stop_is_requested()
            run.save_if_due(steps_done, state, progress.supervised_record(policy.flavour), is_last=is_last)
            if is_last:
                break
        run.wait_for_saves()
        if int(state.step) >= config.sft.steps:  # otherwise the run was asked to stop before its end
            accuracy.say(state.params, run.rewards_log, log)
            run.export(origin.model_config, state.params, tokenizer)
        log.ended(progress.steps_done, run.path, what_next("sft", config.output_dir))
        return run.path


def main(argv: Sequence[str] | None = None) -> None:
    """`grpo sft CONFIG [--check] [--trust] [--branch FOLDER] [key=value ...]`."""
    run_command(train, "grpo sft", "examples/arithmetic/sft.yml", argv)


if __name__ == "__main__":
    main()
