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
import math
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import Mesh

from rewards.runner import RewardRunner, check_on_gold
from rl.algorithms.entropy_coef import EntropyCoefState
from rl.algorithms.from_config import check_estimator, check_loss, file_hashes
from rl.config.load import Config, preset_values, require
from rl.data.prompts import PromptData, PromptRow, check_enough_rows, fingerprint, load_prompts
from rl.data.tokenizer import Tokenizer
from rl.devices import hosts
from rl.devices.mesh import check_sharded, create_mesh, no_implicit_transfers
from rl.models.foreign import files as foreign
from rl.models.lora import quantization_of
from rl.models.policy import Policy, policy_from_config
from rl.models.train_state import PureState
from rl.rollout.evaluation import (
    check_memory,
    create_sampler,
    evaluate,
    greedy,
    left_out_of_evaluation,
    sampling_params,
    start_rewards,
)
from rl.rollout.groups import Judged, completion_form, judge, minibatches, sample_and_score, sample_records, to_rollout
from rl.rollout.step_prompts import check_calls, collect
from rl.run.console import Console
from rl.run.executables import CompiledPrograms, open_compiled
from rl.run.health import HealthState, check_progress, check_step, healthy
from rl.run.interrupt import StopRequest
from rl.run.metrics import CompileCounter, MetricsWriter, Stopwatch, peak_memory_bytes
from rl.run.not_finite import cause_of_skips
from rl.run_folder.folder import RunFolder, check_trust, load_run_config
from rl.run_folder.mirror import Mirror
from rl.sampler.slot_sampler import Sampler
from rl.sampler.token_draw import SamplingParams, check_vocabulary
from rl.sampler.wave_sampler import WaveSampler
from rl.state.checkpoint import create_checkpoint_manager, would_do
from rl.state.optimizer import create_training_optimizer, last_lr, rounding_problems, updates_per_step
from rl.state.origin import Origin, eos_ids, find_origin, pretrained_params, tokenizer_of, use_compilation_cache
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
from rl.training.packing import PackingPlan
from rl.training.shaped_inputs import plan_for
from rl.training.update import Updater, loss_config


def train(config: Config, check_only: bool = False) -> pathlib.Path:
    """Runs or resumes the training run that `config` describes; returns its folder.

    Args:
      check_only: everything before the first compilation is done, what the run would do is said, and nothing on disk
        changes but caches of downloads and of `datasets`.

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
        run = RunFolder(config, "grpo", identity, look_only=check_only)
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
            runner.adopt(loop.get("reward_calls", {}))
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
            size = config.grpo.group_size
            scored = sample_and_score(
                sampler, state.params, rows, size, sampling, key, runner, tokenizer, watch, indices
            )
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
                loop["reward_calls"] = runner.calls
                with watch.timer("checkpoint"):  # part of the next step's seconds
                    checkpoints.save(done, state, loop, reference)
            for message in run.recorded():
                console.message(message)
            if is_last:
                break
        checkpoints.wait()
        return run.path


def check(config: Config, data: PromptData, max_positions: int) -> None:
    """Rules that need the data and the model's shape; ValueError when one is broken."""
    require(config.rewards.functions, "rewards.functions", "[{function: rewards.number:exact_number_flexible}]")
    if not any(function.weight for function in config.rewards.functions):
        raise ValueError(
            "rewards.functions must hold a weight other than 0, got only metrics; there is nothing to learn from"
        )
    check_enough_rows(len(data.train), config.grpo.prompts_per_step)
    if not config.sampling.temperature > 0:
        raise ValueError(
            f"sampling.temperature must be > 0 for training, got {config.sampling.temperature}; "
            "evaluation is greedy anyway"
        )
    longest = max(len(row.prompt_ids) for row in [*data.train, *data.held_out]) + config.sampling.max_completion_length
    if longest > max_positions:
        raise ValueError(
            f"prompt and completion must fit the model's {max_positions} positions, got up to {longest}; lower "
            "data.max_prompt_length or sampling.max_completion_length"
        )
    check_loss(loss_config(config))
    check_estimator(config)


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


def run_identity(config: Config, origin: Origin, data: PromptData) -> dict[str, Any]:
    """What `run.json` keeps of a run: the sources and hashes of policy, reference, prompts and a user's own files."""
    reference = origin.identity if config.grpo.beta else None
    hashes = {"data": fingerprint(data.train), **file_hashes(config)}
    return {"policy": origin.identity, "reference": reference, **hashes}


def loop_record(
    step: int, position: int, num_rows: int, policy: Policy, entropy: EntropyCoefState, health: HealthState
) -> dict[str, Any]:
    """What a checkpoint keeps of the loop after `step` steps, which used up `position` prompts of `num_rows` rows."""
    epoch, offset = divmod(position, num_rows)
    record = {"step": step, "epoch": epoch, "position": offset, "flavour": policy.flavour}
    return record | {"entropy": entropy._asdict(), "health": health._asdict()}


def start_of_loop(config: Config) -> tuple[EntropyCoefState, HealthState, int]:
    """Entropy coefficient, health and position before the first step."""
    return EntropyCoefState(config.grpo.entropy_coef, math.inf), healthy(), 0


def warn_about_rewards(console: Console, runner: RewardRunner, row: PromptRow) -> None:
    """Scores one row's own answer, so that a reward function that cannot work is seen before the first step."""
    gold = row.columns.get("answer")
    if gold is None:
        return
    for warning in check_on_gold(runner, row.prompt, completion_form(row.prompt, str(gold)), row.columns):
        console.warning(warning)


def warn_about_sampling(console: Console, config: Config, sampling: SamplingParams) -> None:
    """Says when completions come from another distribution than the policy's and the loss does not correct for it."""
    section = config.sampling
    rounding = [name for name in ("kv_dtype", "weight_dtype") if getattr(section, name) is not None]
    if (sampling.reshaping_rules or rounding) and not config.grpo.sampler_is_correction:
        rules = ", ".join(f"sampling.{name}" for name in (*sampling.reshaping_rules, *rounding))
        console.warning(
            f"{rules}: completions come from another distribution than the policy's, and the loss takes them for the "
            "policy's own; set grpo.sampler_is_correction=true, or turn these rules off"
        )


def announce(
    console: Console,
    config: Config,
    data: PromptData,
    origin: Origin,
    policy: Policy,
    mesh: Mesh,
    run: RunFolder,
    plan: PackingPlan,
) -> None:
    """Start-up information: what runs where, on what, and what a preset stands for."""
    for message in (*data.messages, *foreign.notes(policy), *run.messages):
        console.message(message)
    if problem := foreign.unsharded(policy, mesh.size):
        console.warning(problem)
    grpo = config.grpo
    num_sequences = grpo.prompts_per_step * grpo.group_size
    per_step = f"{grpo.prompts_per_step} prompts x {grpo.group_size} completions = {num_sequences} sequences"
    size = f"{origin.model_config.num_parameters / 1e6:.1f}M parameters"
    axes = " ".join(f"{axis}={count}" for axis, count in mesh.shape.items())
    rows = {
        "run folder": run.path,
        "model": f"{origin.identity['source'] or 'fresh'}, {origin.model_config.family}, {size}",
        "policy": f"{policy.flavour}, {origin.model_config.dtype}, {policy.kernel.title}",
        "devices": f"{mesh.size} x {mesh.devices.flat[0].device_kind}, {axes}",
        "prompts": f"{len(data.train)} train, {len(data.held_out)} held out",
        "step": f"{per_step}, {updates_per_step(config)} update(s)",
        "packing": f"{plan.num_rows} rows x {plan.row_length} tokens a piece",
    }
    if lora := policy.config.lora:
        quantization = quantization_of(policy.config)
        base = quantization.dtype if quantization else lora.base_dtype or policy.config.param_dtype
        rows["adapters"] = f"rank {lora.rank}, scale {lora.scale:g}, on {' '.join(lora.targets)}; frozen base in {base}"
    if grpo.preset:
        rows["preset " + grpo.preset] = " ".join(f"{key}={value}" for key, value in preset_values(config).items())
    console.table("grpo train", rows)


def timing(
    watch: Stopwatch, metrics: dict[str, float], num_sequences: int, compiles: CompileCounter
) -> dict[str, float]:
    """Seconds and tokens per second by phase, compilations of the step, peak memory so far."""
    seconds = watch.lap()
    tokens = metrics["completion_length/mean"] * num_sequences
    speeds = {
        f"tokens_per_second/{phase}": tokens / seconds[f"seconds/{phase}"] for phase in ("rollout", "train", "step")
    }
    return {**seconds, **speeds, "compiles": compiles.lap(), "peak_memory_gb": peak_memory_bytes() / 1e9}


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
        train(config, check_only)


if __name__ == "__main__":
    main()
