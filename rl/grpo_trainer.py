"""GRPO training: `grpo train CONFIG [key=value ...]`, or `python -m rl.grpo_trainer`.

This page is a run from top to bottom: prompts, policy, plan of the two states, sampler, train step, run folder, states,
loop. Sampler and train step are built before any weights are read, so what cannot work is refused before the run folder
is touched. All randomness follows from (seed, step): a resumed run repeats an uninterrupted one bit for bit. Four ends
save the last step: the run is done, somebody asked it to stop, evaluations got no better, or a reward is down. After
any other end, a new start goes on from the newest checkpoint.

To change something, go to
    prompts                         `rl.data.prompts`
    drawing tokens                  `rl.sampler`; over several turns: `rl.rollout.episodes`, `rewards.environment`
    reward functions                `rewards`; when they are called: `rl.rollout.scoring`
    groups, evaluation              `rl.rollout.collector`, `rl.rollout.step_prompts`, `rl.rollout.groups`,
                                    `rl.rollout.evaluation`
    advantages, loss                `rl.algorithms.advantages`, `rl.algorithms.losses`, `rl.algorithms.loss_types`
    packing, train step, updates    `rl.training.packing`, `rl.training.train_step`, `rl.training.update`
    optimizer, reference            `rl.state.optimizer`, `rl.state.reference_sync`
    checkpoints, run folder         `rl.state.checkpoint`, `rl.run.output`, `rl.run_folder`
    metrics, health, stopping       `rl.run.log`, `rl.run.metrics`, `rl.run.checkup`, `rl.run.health`
    linen or nnx, trained weights   `rl.models.flavours`, `rl.models.trainable`
"""

import contextlib
import pathlib
from collections.abc import Sequence

from rl.algorithms.from_config import loss_config
from rl.config.load import Config
from rl.data.eval_sets import with_eval_sets
from rl.data.prompts import load_prompts
from rl.data.token_texts import TokenTexts
from rl.devices.mesh import check_sharded, create_mesh, no_implicit_transfers
from rl.models.flavours import policy_from_config
from rl.rollout.collector import Collector
from rl.rollout.environments import start_episodes
from rl.rollout.groups import minibatches, with_advantages
from rl.rollout.kept import kept_samples, step_values
from rl.rollout.reward_model import open_reward_models, weight_bytes
from rl.rollout.scoring import start_rewards
from rl.run.announce import (
    announce,
    tell_of_loss,
    warn_about_learning_rate,
    warn_about_prompts,
    warn_about_sampling,
    what_next,
)
from rl.run.best import end_of, follow_best, is_over
from rl.run.checks import check_recipe
from rl.run.checkup import Checkups
from rl.run.command import run_command
from rl.run.executables import use_compiled
from rl.run.log import RunLog
from rl.run.output import RunOutput
from rl.run.progress import Progress, restore_or_start, run_identity
from rl.sampler.create import checked_sampling, create_sampler, plan_draws, planned_prompt_length, warm_up
from rl.state.optimizer import create_training_optimizer
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
      trust: accepts a config.yml that has changed since the run wrote it (docs/security.md).

    Raises:
      ValueError: whatever is wrong with the configuration, the data, the model or the run folder, before anything heavy
        starts.
    """
    with contextlib.ExitStack() as stack:
        log = stack.enter_context(RunLog(config))

        # prompts: what is asked
        tokenizer = tokenizer_from_config(config)
        data = with_eval_sets(load_prompts(config, tokenizer), config, tokenizer)
        origin = find_origin(config, tokenizer)  # where the weights come from; none is read yet
        sampling = checked_sampling(config, origin.model_config, tokenizer)
        check_recipe(config, data, sampling, origin.model_config.max_position_embeddings)

        # policy: what answers; functions of weights, which are in the state
        mesh = create_mesh(config.mesh)
        policy = policy_from_config(config, origin.model_config, mesh)
        schedule, optimizer = create_training_optimizer(config, policy)
        compiled = stack.enter_context(use_compiled(config, policy, mesh))  # what `grpo compile` saved, if anything

        # plan of the two states, policy and reference: both on one mesh, each built by its own init_state_fn
        init_policy_fn = InitStateFn(policy, optimizer, config.seed)
        init_reference_fn = InitStateFn(policy, None, config.seed)  # no optimizer: it is not trained
        abstract_state = get_abstract_state(config, mesh, init_policy_fn)
        shardings = abstract_state.shardings
        check_sharded(abstract_state.shapes, shardings, config.mesh, mesh)

        # sampler: draws with the weights that it is handed; what does not fit the memory is refused here
        judges = open_reward_models(config, mesh)  # models that reward; their weights will lie beside the policy's
        memory, beside = compiled.device_memory, weight_bytes(judges)
        sampler = create_sampler(config, policy, mesh, shardings.params, tokenizer, memory, beside)
        stack.callback(sampler.close)
        plan_draws(sampler, config, data, sampling, compiled.prompt_length)

        # train step: loss, gradient and optimizer for one minibatch; the updater takes it through a step's minibatches
        longest_prompt = compiled.prompt_length or planned_prompt_length(config, data)
        packing = plan_minibatches(config, longest_prompt, policy, mesh)
        loss = loss_config(config)
        options = train_step_options(config, packing)
        train_step = jit_train_step(policy, optimizer, loss, shardings, mesh=mesh, **options)
        updater = Updater(train_step, config, policy, packing, shardings, mesh=mesh)
        sync_reference = ReferenceSync(config, shardings.params)
        checkups = Checkups(config.health, schedule, updater.num_updates, config.rewards.watched)

        # run folder: so far nothing on disk has changed; with check_only, `begin` only reads
        identity = run_identity(config, origin, data, {name: judge.tokenizer for name, judge in judges.items()})
        run = stack.enter_context(RunOutput(config, "grpo", identity, log, check_only=check_only, trust=trust))
        episodes = stack.enter_context(
            start_episodes(config, tokenizer, sampling.eos_ids, data.judged_rows, run.rewards_log)
        )
        rewards = stack.enter_context(start_rewards(config, data.judged_rows, run.rewards_log, mesh, judges, episodes))
        collector = Collector(config, data, sampler, rewards, sampling, tokenizer, log, episodes)
        checkpoints = run.begin(mesh, init_policy_fn, abstract_state, with_reference=bool(config.reference.sync_every))
        announce(log, config, run, data, origin, policy, mesh, packing)
        warn_about_sampling(log, config, sampling)
        warn_about_prompts(log, config, origin, tokenizer)
        warn_about_learning_rate(log, config, policy)
        if check_only:  # ends here
            collector.report_rewards(is_new=True)
            log.last_word(run.would_do("grpo train", config.grpo.steps))
            return run.path

        # states: from the newest checkpoint, or new
        state, progress = restore_or_start(
            config, mesh, init_policy_fn, origin, checkpoints, num_rows=data.num_positions, log=log
        )
        reference = restore_reference(config, mesh, init_reference_fn, origin, checkpoints, state)
        collector.restore(progress.reward_state)
        collector.report_rewards(is_new=progress.steps_done == 0)
        warm_up(sampler, config, data, sampling, state.params)

        # loop
        stack.enter_context(log.recording(run.path, progress.steps_done))  # from here on metrics go to files
        stack.enter_context(collector.journal(run.path))  # and episodes, until a checkpoint has their step
        texts = TokenTexts(tokenizer)  # of the tokens of samples
        if progress.steps_done == 0 or progress.has_left:  # before the first step, or left by the start before
            evaluated = collector.evaluate_late(state, progress, run.path)
            best = follow_best(config, progress.best, progress.steps_done, evaluated)  # its metric must be there
            progress = progress._replace(best=best)
            log.baseline(progress.steps_done, evaluated)
        for step in range(progress.steps_done, 0 if is_over(config, progress.best) else config.grpo.steps):
            steps_done = step + 1
            # 1. draw completions; each is judged while others are still drawn
            groups = collector.draw_and_judge(state, step, progress.position)
            if groups is None:  # asked to stop; the journal has what was drawn
                if step:
                    record = progress.record(policy.flavour, data.num_positions)
                    run.save_if_due(step, state, record, reference, True, progress.best.step)
                break
            # 2. rewards to advantages, within each group
            rollout = with_advantages(config, groups)
            # 3. update the policy, minibatch by minibatch (the updater scores them: old and reference log-probs)
            with log.timer("train"), no_implicit_transfers():
                batches = minibatches(config, rollout)
                age = step - rollout.weights_step  # 0: drawn with the weights that are updated now
                state, entropy, train_metrics = updater.update(state, reference, batches, progress.entropy, age=age)
                reference = sync_reference(reference, state, steps_done)  # in every reference.sync_every-th step
            # 4. look at the step's health; evaluate where it is due
            checkup = checkups.examine(progress.health, rollout.metrics | train_metrics, state, rollout.advantages_B)
            evaluated = collector.evaluate_if_due(state, steps_done, run.path)
            best = follow_best(config, progress.best, steps_done, evaluated)
            metrics = {**checkup.metrics, **evaluated}
            # 5. write the step's line and samples
            num_samples = len(rollout.texts) if checkup.keep_samples else config.logging.samples_per_step
            token_values = updater.token_values() if num_samples else []
            samples = kept_samples(rollout, num_samples, texts, token_values)
            log.step(steps_done, metrics, rollout.num_tokens, samples, step_values(rollout))
            log.warnings([*rollout.problems, *checkup.warnings])
            tell_of_loss(log, steps_done, metrics["loss"])
            checkups.raise_if_stuck(checkup)  # this step is not saved; its line and its samples show why
            # 6. remember where the loop stands; save where it is due
            progress = Progress(
                steps_done=steps_done,
                health=checkup.health,
                position=groups.position,
                entropy=entropy,
                reward_state=collector.reward_state,
                best=best,
                has_left=collector.evaluation_is_left,
            )
            is_last = steps_done == config.grpo.steps or log.stop_is_requested() or collector.reward_is_down
            is_last = is_last or is_over(config, best)
            record = progress.record(policy.flavour, data.num_positions)
            run.save_if_due(steps_done, state, record, reference, is_last, best.step)
            if is_last:
                break
        run.wait_for_saves()
        collector.raise_if_reward_is_down()
        early = end_of(config, progress.best, progress.steps_done) if is_over(config, progress.best) else ""
        log.ended(progress.steps_done, run.path, what_next("grpo", config.output_dir), early)
        return run.path


def main(argv: Sequence[str] | None = None) -> None:
    """`grpo train CONFIG [--check] [--trust] [--branch FOLDER] [key=value ...]`."""
    run_command(train, "grpo train", "examples/arithmetic/grpo.yml", argv)


if __name__ == "__main__":
    main()
