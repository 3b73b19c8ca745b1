"""Supervised fine-tuning: `grpo sft CONFIG [key=value ...]`. A cold policy has nothing to reinforce; this warms it up.
The same data flow, state, train step and checkpoints as `rl.grpo_trainer`, without rollouts. The loss is the mean
negative log-likelihood of the completion tokens, which is what CISPO (https://arxiv.org/abs/2506.13585) is for
completions of advantage 1 that are their own old policy: -log p per token, over the tokens of the update. One step is
one update. At the end the policy is written to output_dir/export as a Hugging Face folder.
"""

import contextlib
import dataclasses
import pathlib
import sys
from collections.abc import Sequence

import jax
import numpy as np

from rl.algorithms.from_config import loss_config
from rl.algorithms.loss_types import LossConfig
from rl.config.load import Config
from rl.data.prompts import PairRow, check_enough_rows, fingerprint, load_pairs, step_indices
from rl.devices import hosts
from rl.devices.mesh import check_sharded, create_mesh, no_implicit_transfers, replicated
from rl.devices.programs import use_compilation_cache
from rl.models.flavours import policy_from_config
from rl.models.foreign import files as foreign
from rl.rollout.evaluation import evaluate, left_out_of_evaluation
from rl.rollout.scoring import start_rewards
from rl.run.console import Console
from rl.run.health import HealthState, check_progress, check_step, healthy
from rl.run.interrupt import StopRequest
from rl.run.metrics import CompileCounter, MetricsWriter, Stopwatch, peak_memory_bytes
from rl.run.not_finite import cause_of_skips
from rl.run_folder.folder import RunFolder, check_trust, load_run_config
from rl.run_folder.mirror import Mirror
from rl.sampler.create import check_memory, create_sampler, eos_ids, greedy, sampling_params
from rl.sampler.token_draw import check_vocabulary
from rl.state.checkpoint import create_checkpoint_manager, would_do
from rl.state.export import write_folder
from rl.state.optimizer import create_training_optimizer, last_lr, rounding_problems
from rl.state.origin import find_origin, pretrained_params, tokenizer_of
from rl.state.states import InitStateFn, frozen_base, get_abstract_state, get_first_step, setup_training_state
from rl.training.packing import TrainCompletion, TrainGroup, pack, plan_packing
from rl.training.shaped_inputs import packing_options
from rl.training.train_step import Minibatch, batch_shardings, jit_train_step


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
        console = stack.enter_context(Console(config.sft.steps, hosts.console_stream()))
        # -- tokenizer, pairs
        tokenizer = tokenizer_of(config)
        pairs = load_pairs(config, tokenizer)
        check_enough_rows(len(pairs.rows), config.sft.batch_size, "sft.batch_size")
        held_out = pairs.held_out[: config.eval.max_prompts]
        origin = find_origin(config, tokenizer)
        # -- mesh, policy, optimizer
        mesh = create_mesh(config.mesh)
        policy = policy_from_config(config, origin.model_config, mesh)
        schedule, optimizer = create_training_optimizer(config, policy, num_updates=config.sft.steps)
        plan = plan_packing(
            num_groups=config.sft.batch_size,
            group_size=1,
            max_prompt_length=max(len(row.prompt_ids) for row in pairs.rows),
            max_completion_length=max(len(row.completion_ids) for row in pairs.rows),
            **packing_options(config, policy, mesh),
        )
        identity = {"policy": origin.identity, "data": fingerprint(pairs.rows)}
        hosts.check_same(config, identity)
        init_state_fn = InitStateFn(policy, optimizer, config.seed)
        abstract = get_abstract_state(config, mesh, init_state_fn)
        check_sharded(abstract.shapes, abstract.shardings, config.mesh, mesh)
        shardings = abstract.shardings
        # -- sampler, where there is something to judge the end by
        sampling = sampling_params(config, eos_ids(config, origin.model_config, tokenizer))
        sampler = None
        if held_out and config.rewards.functions:
            check_vocabulary(sampling, origin.model_config.vocab_size)
            sampler = create_sampler(config, policy, mesh, shardings.params, tokenizer)
            stack.callback(sampler.close)
            sampler.expect([row.prompt_ids for row in held_out])
            check_memory(sampler, len(held_out), 1, greedy(sampling))
            start_rewards(config, held_out, None).close()  # refuses now what would be refused at the end
        # -- run folder, state: whatever is wrong up to `begin` has touched nothing on disk
        mirror = stack.enter_context(Mirror(config, console.message, look_only=check_only))
        run = RunFolder(config, "sft", identity, look_only=check_only, trust=trust)
        stack.callback(run.close)
        if not check_only:
            run.begin()
            mirror.begin()
        checkpoints = create_checkpoint_manager(
            config, mesh, init_state_fn, read_only=check_only, abstract=abstract, mirror=mirror, warn=console.warning
        )
        stack.callback(checkpoints.close)
        checkpoints.check_disk_space(counts_existing=run.resumed)
        for message in (*pairs.messages, *foreign.notes(policy), *run.messages):
            console.message(message)
        computed = f"{policy.flavour}, {policy.kernel.title}"
        rows = {"run folder": run.path, "policy": computed, "pairs": len(pairs.rows), "held out": len(held_out)}
        console.table("grpo sft", {**rows, "parameters": f"{origin.model_config.num_parameters / 1e6:.1f}M"})
        if check_only:
            console.message(would_do("grpo sft", run.path, checkpoints if run.resumed else None, config.sft.steps))
            return run.path
        # -- restore, or start
        if checkpoints.latest_step is None:
            state, _ = setup_training_state(config, mesh, init_state_fn, pretrained_params(origin, shardings.params))
            health = healthy()
        else:
            state, loop = checkpoints.restore(base=frozen_base(config, mesh, init_state_fn, origin))
            health = HealthState(**loop["health"])
            console.message(f"resumed at step {loop['step']} of {config.sft.steps}")
        first_step = get_first_step(policy, state)
        foreign.check_policy(policy, state.params, config.model.source)
        # -- train step
        train_step = jit_train_step(
            policy,
            optimizer,
            negative_log_likelihood(config),
            shardings,
            mesh=mesh,
            rules=config.mesh.rules,
            temperature=1.0,
            chunk_size=config.grpo.logprob_chunk,
            minibatches_per_rollout=1,
            shorter_lengths=plan.shorter_lengths,
        )
        # -- loop
        writer = stack.enter_context(MetricsWriter(run.path if hosts.is_first() else None, first_step + 1))
        compiles, watch = stack.enter_context(CompileCounter()), Stopwatch()
        stop = stack.enter_context(StopRequest(console.stopping))
        for step in range(first_step, config.sft.steps):
            batch_rows = [
                pairs.rows[i] for i in step_indices(len(pairs.rows), config.seed, step, config.sft.batch_size)
            ]
            with watch.timer("train"), no_implicit_transfers():
                packed = hosts.put(pack(to_groups(batch_rows), plan), batch_shardings(mesh, config.mesh.rules))
                num_tokens = sum(len(row.completion_ids) for row in batch_rows)
                scalars = (np.int32(num_tokens), np.float32(0.0), np.bool_(False))
                count, entropy_coef, on_policy = hosts.put(scalars, replicated(mesh))
                state, update = train_step(state, Minibatch(packed, count, entropy_coef, on_policy=on_policy))
                update = jax.device_get(update)
            done = step + 1
            metrics = {
                "step": done,
                "loss": float(update.loss),
                "grad_norm": float(update.grad_norm),
                "skipped_updates": int(not update.is_applied),
            }
            cause = None if update.is_applied else cause_of_skips(metrics, state.params)
            checkup = check_step(config.health, health, metrics, cause_of_skips=cause)
            health = checkup.state
            metrics["lr"] = last_lr(schedule, done, health.num_skipped)
            if update.lost_share is not None:
                metrics["update/lost_share"] = float(update.lost_share)
            metrics |= {**watch.lap(), "compiles": compiles.lap(), "peak_memory_gb": peak_memory_bytes() / 1e9}
            metrics["tokens_per_second/train"] = num_tokens / metrics["seconds/train"]
            writer.write(metrics)
            console.step_line(metrics)
            for problem in [*rounding_problems(metrics), *checkup.warnings]:
                console.warning(problem)
            check_progress(config.health, health, cause)
            mirror.check()
            is_last = hosts.any_process(stop.requested) or done == config.sft.steps
            if done % config.checkpoint.every == 0 or is_last:
                with watch.timer("checkpoint"):  # part of the next step's seconds
                    checkpoints.save(done, state, {"step": done, "flavour": policy.flavour, "health": health._asdict()})
            for message in run.recorded():
                console.message(message)
            if is_last:
                break
        checkpoints.wait()
        if int(state.step) < config.sft.steps:
            return run.path
        # -- held-out accuracy, and the policy to take home
        if sampler is not None:
            with start_rewards(config, held_out, run.path / "rewards.log") as runner:
                if problem := left_out_of_evaluation(runner, config.eval.reward):
                    console.warning(problem)
                result = evaluate(sampler, state.params, held_out, runner, tokenizer, sampling, config.eval.reward)
            console.message(f"held-out greedy accuracy {result.accuracy:.1%} on {result.num_prompts} prompts")
        params = hosts.fetch(state.params)

        def write(folder: pathlib.Path) -> None:
            write_folder(folder, origin.model_config, params, tokenizer, None)

        for message in hosts.from_first(lambda: run.replace_export(write)):
            console.message(message)
        console.message(f"policy written to {run.path / 'export'}")
        return run.path


def negative_log_likelihood(config: Config) -> LossConfig:
    """The loss settings under which the train step computes the token mean of -log p."""
    neutral = {
        "custom_term": None,
        "loss_args": (),
        "beta": 0.0,
        "top_entropy_quantile": 1.0,
        "off_policy_mask_threshold": None,
        "sampler_is_correction": False,
    }
    neutral |= {
        "entropy_coef": 0.0,
        "positive_nll_coef": 0.0,
        "use_adaptive_entropy": False,
        "importance_sampling_level": "token",
    }
    return dataclasses.replace(loss_config(config), loss_type="cispo", epsilon_high=1.0, **neutral)


def to_groups(rows: Sequence[PairRow]) -> list[TrainGroup]:
    """Each pair as a group of one completion with advantage 1."""
    return [TrainGroup(row.prompt_ids, [TrainCompletion(row.completion_ids, advantage=1.0)]) for row in rows]


def main(argv: Sequence[str] | None = None) -> None:
    """`grpo sft CONFIG [--check] [--trust] [key=value ...]`."""
    argv = sys.argv[1:] if argv is None else list(argv)
    check_only, trust = "--check" in argv, "--trust" in argv
    argv = [argument for argument in argv if argument not in ("--check", "--trust")]
    if not argv:
        raise ValueError("grpo sft needs a config file, for example: grpo sft examples/arithmetic/sft.yml")
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
