"""GRPO training: `grpo train CONFIG [key=value ...]`, or `python -m rl.grpo_trainer`.

Reads top to bottom in data-flow order:
    config -> tokenizer, prompts -> mesh -> policy (linen or nnx) -> optimizer
    -> init_state_fn of policy and reference -> sharded states -> restore -> sampler -> rewards
    -> jit_train_step(mesh=mesh)
    each step: prompts -> rollouts -> rewards -> advantages -> train step -> metrics, samples, checkpoint, evaluation

Step k in metrics and checkpoints means: k steps are done. Everything random is derived from (seed, step), so that a
resumed run repeats what an uninterrupted one does, bit for bit. Not here: the loss (`rl.algorithms.losses`), packing
(`rl.training.packing`), drawing (`rl.sampler.slot_sampler`).
"""

import contextlib
import functools
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import Mesh

from rl.algorithms.entropy_coef import EntropyCoefState
from rl.config.load import Config
from rl.data.prompts import PromptData, PromptRow, load_prompts
from rl.data.tokenizer import Tokenizer
from rl.devices import hosts
from rl.devices.mesh import check_sharded, create_mesh, no_implicit_transfers
from rl.devices.programs import use_compilation_cache
from rl.models.flavours import policy_from_config
from rl.models.foreign import files as foreign
from rl.models.policy import Policy
from rl.models.train_state import PureState
from rl.rollout.evaluation import evaluate, left_out_of_evaluation
from rl.rollout.groups import Judged, judge, minibatches, sample_records, to_rollout
from rl.rollout.scoring import sample_and_score, start_rewards, warn_about_rewards
from rl.rollout.step_prompts import check_calls, collect
from rl.run.announce import announce, warn_about_sampling
from rl.run.checks import check
from rl.run.console import Console
from rl.run.executables import CompiledPrograms, open_compiled
from rl.run.health import HealthState, check_progress, check_step
from rl.run.interrupt import StopRequest
from rl.run.loop import loop_record, run_identity, start_of_loop
from rl.run.metrics import CompileCounter, MetricsWriter, Stopwatch, timing
from rl.run.not_finite import cause_of_skips
from rl.run_folder.folder import RunFolder, check_trust, load_run_config
from rl.run_folder.mirror import Mirror
from rl.sampler.create import check_memory, create_sampler, eos_ids, greedy, sampling_params
from rl.sampler.slot_sampler import Sampler
from rl.sampler.token_draw import check_vocabulary
from rl.sampler.wave_sampler import WaveSampler
from rl.state.checkpoint import create_checkpoint_manager, would_do
from rl.state.optimizer import create_training_optimizer, last_lr, rounding_problems, updates_per_step
from rl.state.origin import find_origin, pretrained_params, tokenizer_of
from rl.state.reference_sync import ReferenceSync
from rl.state.states import (
    InitStateFn,
    frozen_base,
    frozen_reference,
    get_abstract_state,
    get_first_step,
    setup_decode_state,
    setup_training_state,
)
from rl.training.shaped_inputs import plan_for
from rl.training.update import Updater


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
        console = stack.enter_context(Console(config.grpo.steps, hosts.console_stream()))
        # -- tokenizer, prompts
        tokenizer = tokenizer_of(config)
        data = load_prompts(config, tokenizer)
        origin = find_origin(config, tokenizer)
        check(config, data, origin.model_config.max_position_embeddings)
        sampling = sampling_params(config, eos_ids(config, origin.model_config, tokenizer))
        check_vocabulary(sampling, origin.model_config.vocab_size)
        # -- mesh, policy, optimizer
        mesh = create_mesh(config.mesh)
        policy = policy_from_config(config, origin.model_config, mesh)
        schedule, optimizer = create_training_optimizer(config, policy)
        compiled = open_compiled(config, policy, mesh)
        longest = compiled.prompt_length or max(len(row.prompt_ids) for row in data.train)
        plan = plan_for(config, longest, policy, mesh)
        identity = run_identity(config, origin, data)
        hosts.check_same(config, identity)
        # -- init_state_fn: policy and reference are two, each from its own
        init_policy_fn = InitStateFn(policy, optimizer, config.seed)
        init_reference_fn = InitStateFn(policy, None, config.seed)
        abstract = get_abstract_state(config, mesh, init_policy_fn)
        check_sharded(abstract.shapes, abstract.shardings, config.mesh, mesh)
        shardings = abstract.shardings
        eval_rows = data.held_out[: config.eval.max_prompts] if config.eval.every else []
        calls = [(config.grpo.prompts_per_step, config.grpo.group_size, sampling)]
        calls += [(len(eval_rows), 1, greedy(sampling))] if eval_rows else []
        new_sampler = functools.partial(sampler_of, config, data, policy, mesh, shardings.params, tokenizer, compiled)
        with contextlib.closing(new_sampler()) as planned:
            for call in calls:
                check_memory(planned, *call)
        # -- run folder, rewards: whatever is wrong up to `begin` has touched nothing on disk
        mirror = stack.enter_context(Mirror(config, console.message, look_only=check_only))
        run = RunFolder(config, "grpo", identity, look_only=check_only, trust=trust)
        stack.callback(run.close)
        runner = stack.enter_context(
            start_rewards(config, data.train, None if check_only else run.path / "rewards.log")
        )
        check_calls(config, runner)
        if not check_only:
            run.begin()
            mirror.begin()
        # -- sharded states
        moves = bool(config.reference.sync_every)
        checkpoints = create_checkpoint_manager(
            config,
            mesh,
            init_policy_fn,
            read_only=check_only,
            with_reference=moves,
            abstract=abstract,
            mirror=mirror,
            warn=console.warning,
        )
        stack.callback(checkpoints.close)
        checkpoints.check_disk_space(counts_existing=run.resumed)
        announce(console, config, data, origin, policy, mesh, run, plan)
        warn_about_sampling(console, config, sampling)
        if check_only:
            console.message(would_do("grpo train", run.path, checkpoints if run.resumed else None, config.grpo.steps))
            return run.path
        reference = None
        if config.grpo.beta and policy.config.lora is None:
            is_saved = moves and checkpoints.latest_step is not None
            params = checkpoints.restore_reference() if is_saved else pretrained_params(origin, shardings.params)
            reference, _ = setup_decode_state(config, mesh, init_reference_fn, params, compiled.get)
        # -- restore, or start
        if checkpoints.latest_step is None:
            params = pretrained_params(origin, shardings.params)
            state, _ = setup_training_state(config, mesh, init_policy_fn, params, compiled.get)
            entropy, health, position = start_of_loop(config)
        else:
            state, loop = checkpoints.restore(base=frozen_base(config, mesh, init_policy_fn, origin))
            entropy, health = EntropyCoefState(**loop["entropy"]), HealthState(**loop["health"])
            position = loop["epoch"] * len(data.train) + loop["position"]  # prompts used up
            console.message(f"resumed at step {loop['step']} of {config.grpo.steps}")
            runner.adopt(loop.get("reward_calls", {}), loop.get("reward_doubts"))
            check_calls(config, runner)
        if config.grpo.beta and policy.config.lora is not None:
            reference = frozen_reference(policy, state)  # with adapters the frozen base: no second copy
        first_step = get_first_step(policy, state, updates_per_step(config))
        foreign.check_policy(policy, state.params, config.model.source)
        # -- sampler, train step
        sampler = stack.enter_context(contextlib.closing(new_sampler()))
        for call in calls if config.sampling.warm_up else ():
            sampler.warm_up(state.params, *call)
        sync_reference = ReferenceSync(config, shardings.params)
        updater = Updater(config, policy, optimizer, plan, shardings, mesh=mesh, stored=compiled.get)
        if first_step == 0 and config.rewards.check_on_gold:
            warn_about_rewards(console, runner, data.train[0])
        for note in runner.notes():
            console.message(note)
        if eval_rows and (problem := left_out_of_evaluation(runner, config.eval.reward)):
            console.warning(problem)
        # -- loop
        first_line = first_step + 1 if run.resumed and first_step else 0
        writer = stack.enter_context(MetricsWriter(run.path if hosts.is_first() else None, first_line))
        compiles, watch = stack.enter_context(CompileCounter()), Stopwatch()
        stop = stack.enter_context(StopRequest(console.stopping))

        def evaluation(step: int) -> dict[str, float | None]:
            if not eval_rows or (step % config.eval.every and step != config.grpo.steps):
                return {}
            with watch.timer("eval"):
                result = evaluate(sampler, state.params, eval_rows, runner, tokenizer, sampling, config.eval.reward)
            return result.metrics()

        def draw(state: PureState, step: int, rows: Sequence[PromptRow], indices: Sequence[int]) -> Judged:
            key = jax.random.fold_in(jax.random.wrap_key_data(state.rng), step)
            size, calls = config.grpo.group_size, runner.calls
            scored = sample_and_score(
                sampler, state.params, rows, size, sampling, key, runner, tokenizer, watch, indices
            )
            if runner.calls != calls:  # these completions showed that a function compares them
                check_calls(config, runner)
                if eval_rows and (problem := left_out_of_evaluation(runner, config.eval.reward)):
                    console.warning(problem)
            return judge(config, rows, scored, runner.specs)

        if first_step == 0 and (baseline := evaluation(0)):
            writer.write({"step": 0, **baseline})
            console.step_line({"step": 0, **baseline})
        num_sequences = config.grpo.prompts_per_step * config.grpo.group_size
        watch.lap()
        for step in range(first_step, config.grpo.steps):
            collected = collect(config, data.train, position, functools.partial(draw, state, step))
            rollout, position = to_rollout(config, collected.judged), collected.position
            sampler.release()
            with watch.timer("train"), no_implicit_transfers():
                groups = minibatches(rollout, config)
                state, entropy, trained = updater.step(state, reference, groups, entropy)
                reference = sync_reference(reference, state, step + 1)
            done = step + 1
            num_updates, cause = updates_per_step(config), None
            if trained["skipped_updates"] == num_updates:
                cause = cause_of_skips(trained, state.params, rollout.advantages_B)
            checkup = check_step(config.health, health, rollout.metrics | trained, num_updates, cause)
            health = checkup.state
            metrics = {
                "step": done,
                **rollout.metrics,
                **collected.metrics,
                **trained,
                "lr": last_lr(schedule, int(state.step), health.num_skipped),
            }
            metrics |= evaluation(done)
            metrics |= timing(watch, rollout.metrics, num_sequences, compiles)
            writer.write(metrics)
            num_samples = len(rollout.texts) if checkup.keep_samples else config.logging.samples_per_step
            writer.write_samples(done, sample_records(rollout, num_samples))
            console.step_line(metrics)
            problems = [*rollout.problems, *collected.problems, *rounding_problems(trained), *checkup.warnings]
            for problem in problems:
                console.warning(problem)
            check_progress(config.health, health, cause)
            mirror.check()
            is_last = hosts.any_process(stop.requested) or done == config.grpo.steps
            if done % config.checkpoint.every == 0 or is_last:
                loop = loop_record(done, position, len(data.train), policy, entropy, health)
                loop["reward_calls"], loop["reward_doubts"] = runner.calls, runner.doubts
                with watch.timer("checkpoint"):  # part of the next step's seconds
                    checkpoints.save(done, state, loop, reference)
            for message in run.recorded():
                console.message(message)
            if is_last:
                break
        checkpoints.wait()
        return run.path


def sampler_of(
    config: Config,
    data: PromptData,
    policy: Policy,
    mesh: Mesh,
    param_shardings: Any,
    tokenizer: Tokenizer,
    compiled: CompiledPrograms,
) -> Sampler | WaveSampler:
    """The sampler of a run, which knows what prompts to expect."""
    memory, call_size = compiled.device_memory, (config.grpo.prompts_per_step, config.grpo.group_size)
    sampler = create_sampler(config, policy, mesh, param_shardings, tokenizer, memory, compiled.get)
    if compiled.prompt_length is None:
        sampler.expect([row.prompt_ids for row in (*data.train, *data.held_out)], *call_size)
    else:
        sampler.expect_length(compiled.prompt_length, *call_size)  # only its programs can be stored
    return sampler


def main(argv: Sequence[str] | None = None) -> None:
    """`grpo train CONFIG [--check] [--trust] [key=value ...]`."""
    argv = sys.argv[1:] if argv is None else list(argv)
    check_only, trust = "--check" in argv, "--trust" in argv
    argv = [argument for argument in argv if argument not in ("--check", "--trust")]
    if not argv:
        raise ValueError("grpo train needs a config file, for example: grpo train examples/arithmetic/grpo.yml")
    if check_only:
        sys.dont_write_bytecode = True  # of a user's modules
    path, *overrides = argv
    config = load_run_config(path, overrides)
    with hosts.joined(config.distributed):
        check_trust(path, config, overrides, trust=trust)
        use_compilation_cache(config, check_only)
        train(config, check_only, trust)


if __name__ == "__main__":
    main()
