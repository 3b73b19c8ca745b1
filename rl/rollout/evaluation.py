"""Greedy accuracy on held-out prompts: inside a run every `eval.every` steps, and on its own by `grpo eval`.

In: a sampler, weights, held-out rows, reward functions. Out: the share of prompts whose greedy completion gets a reward
of at least 1 from the function that counts (`eval.reward`), with a 95 % Wilson interval, and the mean of every reward
function. There is one completion for each prompt, so functions that compare completions are left out.
"""

import argparse
import contextlib
import dataclasses
import json
import math
import os
import pathlib
import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, cast

import jax
from jax.sharding import Mesh

from rewards.batch import RewardResult, Share
from rewards.contract import Calls, RewardSpec
from rewards.rubric import summarize
from rewards.runner import RewardRunner
from rl.config.load import Config, require
from rl.data.prompts import PromptRow, load_prompts
from rl.data.tokenizer import Tokenizer
from rl.devices import hosts
from rl.devices.mesh import device_memory
from rl.devices.programs import Stored, not_stored
from rl.files.output_file import check_writable, writing
from rl.files.stores import written_file
from rl.models.config import Quantization
from rl.models.policy import Policy, WavePolicy
from rl.rollout.groups import sample_and_score
from rl.run.metrics import Stopwatch
from rl.run_folder.folder import check_trust
from rl.run_folder.trust import TO_EVALUATE
from rl.sampler.request_queue import CompletionSource
from rl.sampler.slot_sampler import Sampler
from rl.sampler.token_draw import SamplingParams
from rl.sampler.wave_sampler import WaveSampler
from rl.state.origin import eos_ids, tokenizer_of, use_compilation_cache
from rl.state.states import InitStateFn, get_abstract_state
from rl.tools.trained import load_source, resolve_model

_ROWS_TO_TRY = 100  # in which two with different prompts are looked for


@dataclasses.dataclass(frozen=True)
class EvalResult:
    """What one evaluation found.

    Attributes:
      accuracy: share of judged prompts with a reward >= 1 from the function that counts; NaN when none was judged.
      interval: 95 % Wilson score interval of the accuracy
        (https://en.wikipedia.org/wiki/Binomial_proportion_confidence_interval).
      num_prompts: prompts evaluated. num_judged: those that the function that counts could judge.
      means: mean reward per function that was run; None where it judged nothing. left_out: names of the others, which
        compare completions with each other.
      completion_length: mean tokens. truncated_share: completions that hit the length limit.
      samples: one dict per prompt: prompt, completion, rewards, finish_reason.
    """

    accuracy: float
    interval: tuple[float, float]
    num_prompts: int
    num_judged: int
    means: dict[str, float | None]
    left_out: list[str]
    completion_length: float
    truncated_share: float
    samples: list[dict[str, Any]]

    def metrics(self) -> dict[str, float | None]:
        """As keys of metrics.jsonl."""
        low, high = self.interval
        scalars: dict[str, float | None] = {
            "accuracy": self.accuracy,
            "accuracy_low": low,
            "accuracy_high": high,
            "prompts": self.num_prompts,
        }
        scalars |= {"completion_length": self.completion_length, "truncated_share": self.truncated_share}
        scalars |= {f"reward/{name}": mean for name, mean in self.means.items()}
        return {f"eval/{name}": value for name, value in scalars.items()}


def evaluate(
    sampler: CompletionSource,
    params: Any,
    rows: Sequence[PromptRow],
    runner: RewardRunner,
    tokenizer: Tokenizer,
    sampling: SamplingParams,
    accuracy_reward: str | None,
) -> EvalResult:
    """Decodes every row greedily and scores it.

    Args:
      sampling: the run's; its temperature, truncations and penalties are replaced by plain greedy decoding. Lengths,
        stop strings, logit bias and forbidden ids stay.
      accuracy_reward: name of the reward function that counts; None: the first that judges each completion by itself.
        Where that is none, nothing is judged.
    """
    plain, key = greedy(sampling), jax.random.key(0)
    names = runner.elementwise
    groups, texts, result = sample_and_score(
        sampler, params, rows, 1, plain, key, runner, tokenizer, Stopwatch(), names=names
    )
    completions = [group[0] for group in groups]
    all_names = [spec.name for spec in runner.specs]
    rewards = [[row[all_names.index(name)] for name in names] for row in result.rewards]
    counts = accuracy_function(runner, accuracy_reward)
    judged = [] if counts is None else [row[names.index(counts)] for row in rewards]
    judged = [value for value in judged if value is not None]
    correct = sum(value >= 1.0 for value in judged)
    samples = [
        {
            "prompt": row.prompt,
            "completion": text,
            "rewards": dict(zip(names, values, strict=True)),
            "finish_reason": done.finish_reason,
        }
        for row, text, values, done in zip(rows, texts, rewards, completions, strict=True)
    ]
    return EvalResult(
        accuracy=correct / len(judged) if judged else math.nan,
        interval=wilson_interval(correct, len(judged)),
        num_prompts=len(rows),
        num_judged=len(judged),
        means={name: summary.mean for name, summary in summarize(rewards, names).items()},
        left_out=[name for name in all_names if name not in names],
        completion_length=sum(len(done.token_ids) for done in completions) / len(rows),
        truncated_share=sum(done.finish_reason == "length" for done in completions) / len(rows),
        samples=samples,
    )


def accuracy_function(runner: RewardRunner, wanted: str | None) -> str | None:
    """The name of the reward function that counts as accuracy; None where that one compares completions, or all do.

    wanted: `eval.reward`.
    """
    names = runner.elementwise
    if wanted is not None:
        return wanted if wanted in names else None
    return names[0] if names else None


def left_out_of_evaluation(runner: RewardRunner, accuracy_reward: str | None) -> str | None:
    """What an evaluation, with its one completion for each prompt, does not measure, in words."""
    names = [name for name in runner.calls if name not in runner.elementwise]
    if not names:
        return None
    has_accuracy = accuracy_function(runner, accuracy_reward) is not None
    lost = "" if has_accuracy else ", and there is no accuracy without a function that does for eval.reward"
    reasons = "; ".join(f"{name}: {runner.why_not_alone(name)}" for name in names)
    return (
        f"evaluation leaves out {', '.join(names)}: it draws one completion for each prompt, and these functions are "
        f"not called for one at a time ({reasons}); elementwise: true, in an entry of rewards.functions, says that a "
        f"function judges each by itself{lost}"
    )


def greedy(sampling: SamplingParams) -> SamplingParams:
    """How an evaluation draws, see `evaluate`."""
    return dataclasses.replace(
        sampling,
        temperature=0.0,
        top_k=0,
        top_p=1.0,
        min_p=0.0,
        repetition_penalty=1.0,
        frequency_penalty=0.0,
        presence_penalty=0.0,
    )


def create_sampler(
    config: Config,
    policy: Policy,
    mesh: Mesh,
    param_shardings: Any,
    tokenizer: Tokenizer,
    memory: int | None = None,
    stored: Stored = not_stored,
) -> Sampler | WaveSampler:
    """The sampler of a run, for rollouts and evaluation alike: the one that the policy asks for.

    Args:
      memory: bytes of a device of the mesh; None: as it says itself.
      stored: where compiled programs are taken from, if they are there.
    """
    if policy.decodes_in_waves:
        rules, common = config.mesh.rules, _sampler_options(config, mesh, tokenizer, memory)
        return WaveSampler(cast(WavePolicy, policy), mesh, param_shardings, rules=rules, **common)
    return _slot_sampler(config, policy, mesh, param_shardings, tokenizer, memory, stored)


def check_memory(sampler: Sampler | WaveSampler, num_prompts: int, num_samples: int, sampling: SamplingParams) -> None:
    """ValueError where `sampling.kv_memory` is too small for a call of this size with expected prompts."""
    plan = sampler.rollout_plan if isinstance(sampler, WaveSampler) else sampler.shapes
    plan(num_prompts, num_samples, sampling)


def _slot_sampler(
    config: Config,
    policy: Policy,
    mesh: Mesh,
    param_shardings: Any,
    tokenizer: Tokenizer,
    memory: int | None,
    stored: Stored,
) -> Sampler:
    """The sampler of the toolkit's own decoder; arguments as in `create_sampler`."""
    section, rules, decode_shardings = config.sampling, config.mesh.rules, None
    if config.mesh.rollout_rules:
        rules = {**rules, **config.mesh.rollout_rules}
        decoding = dataclasses.replace(config, mesh=dataclasses.replace(config.mesh, rules=rules))  # pyright: ignore[reportArgumentType]
        init_state_fn = InitStateFn(policy, None, config.seed)
        decode_shardings = get_abstract_state(decoding, mesh, init_state_fn, is_training=False).shardings.params
    weights = None
    if section.weight_dtype is not None:
        weights = Quantization(section.weight_dtype, section.weight_group_size, head=True)
    return Sampler(
        policy,
        mesh,
        param_shardings,
        rules=rules,
        decode_shardings=decode_shardings,
        kv_dtype=section.kv_dtype,
        weights=weights,
        stored=stored,
        **_sampler_options(config, mesh, tokenizer, memory),
    )


def _sampler_options(config: Config, mesh: Mesh, tokenizer: Tokenizer, memory: int | None) -> dict[str, Any]:
    slots, kv_bytes = config.sampling.slots, None
    if slots is None:
        # The least memory of all processes: they must come to the same number of slots.
        available = min(hosts.gather(device_memory(mesh))) if memory is None else memory
        kv_bytes = int(config.sampling.kv_memory * available)
    return {"slots": slots, "kv_bytes": kv_bytes, "decode_text": stop_text(config, tokenizer)}


def stop_text(config: Config, tokenizer: Tokenizer) -> Callable[[Sequence[int]], str]:
    """The text of token ids in which stop strings are looked for: with the special tokens in it where one of the stop
    strings is, or holds, a special token.
    """
    special = any(token in stop for stop in config.sampling.stop_strings for token in tokenizer.special_tokens)
    return partial(tokenizer.decode, skip_special_tokens=not special)


def sampling_params(config: Config, eos: tuple[int, ...]) -> SamplingParams:
    """The `sampling` section as the sampler takes it; nothing else, not a model's own defaults, sets a rule."""
    section = config.sampling
    return SamplingParams(
        temperature=section.temperature,
        top_k=section.top_k,
        top_p=section.top_p,
        min_p=section.min_p,
        repetition_penalty=section.repetition_penalty,
        frequency_penalty=section.frequency_penalty,
        presence_penalty=section.presence_penalty,
        logit_bias=tuple(sorted(section.logit_bias.items())),
        forbidden_ids=tuple(section.forbidden_ids),
        max_completion_length=section.max_completion_length,
        min_completion_length=section.min_completion_length,
        stop_strings=tuple(section.stop_strings),
        eos_ids=eos,
    )


def start_rewards(config: Config, rows: Sequence[PromptRow], log_path: pathlib.Path | None) -> RewardRunner:
    """The worker processes with the run's reward functions; every column of the rows is offered to them.

    Each process of the run has its own, which judge its share of the completions. How the functions are called is
    settled with some of the rows.
    """
    said: dict[bool | None, Calls | None] = {None: None, True: "elementwise", False: "whole_batch"}
    specs = [
        RewardSpec(
            f.name or f.function,
            f.function,
            f.weight,
            f.kwargs,
            "needs_group" if f.needs_group else said[f.elementwise],
        )
        for f in config.rewards.functions
    ]
    columns = sorted({name for row in rows for name in row.columns})
    section = config.rewards

    def gather(result: RewardResult) -> list[RewardResult]:
        return [RewardResult(**part) for part in hosts.gather(dataclasses.asdict(result))]

    share = None if jax.process_count() == 1 else Share(jax.process_index(), jax.process_count(), gather)
    runner = RewardRunner(
        specs,
        columns,
        section.num_workers,
        section.timeout_seconds,
        log_path=log_path,
        env=section.env,
        memory_gb=section.memory_gb,
        rows=[(row.prompt, row.columns) for row in rows[:_ROWS_TO_TRY]],
        share=share,
    )
    for calls in hosts.gather(runner.calls):
        runner.adopt(calls)
    return runner


def wilson_interval(successes: int, trials: int, z: float = 1.959964) -> tuple[float, float]:
    """Wilson score interval of a share, 95 % by default; (0, 1) without trials."""
    if trials == 0:
        return 0.0, 1.0
    share, square = successes / trials, z * z
    centre = (share + square / (2 * trials)) / (1 + square / trials)
    margin = z * math.sqrt(share * (1 - share) / trials + square / (4 * trials**2)) / (1 + square / trials)
    return max(centre - margin, 0.0), min(centre + margin, 1.0)


def evaluate_source(
    model: str | os.PathLike,
    overrides: Sequence[str] = (),
    adapter: str | None = None,
    output: str | None = None,
    trust: bool = False,
) -> tuple[EvalResult, str]:
    """Evaluates a run (its newest checkpoint) or the weights of a recipe, Hugging Face folder or hub id on the held-out
    rows, with an adapter in PEFT's format beside the weights where one is given.

    Args:
      output: file that the caller's first process will write; whether it can is checked before anything is loaded.
      trust: see `rl.run_folder.folder.check_trust`.

    Returns:
      The result, and where the weights came from, in words.

    Raises:
      ValueError: no reward function, no held-out rows, or whatever is wrong with the configuration, the data or the
        checkpoint.
    """
    source = resolve_model(model, overrides, adapter=adapter, alone=False)
    config = source.config
    with hosts.joined(config.distributed):
        check_trust(source.run or model, config, overrides, TO_EVALUATE, trust)
        hosts.from_first(lambda: check_writable(output, "--output"))
        use_compilation_cache(config)
        require(config.rewards.functions, "rewards.functions", "[{function: rewards.number:exact_number_flexible}]")
        rows = load_prompts(config, tokenizer_of(config)).held_out[: config.eval.max_prompts]
        if not rows:
            raise ValueError("evaluation needs held-out rows, got none; set data.eval_size or data.eval_source")
        trained = load_source(source)
        sampling = sampling_params(config, eos_ids(config, trained.origin.model_config, trained.tokenizer))
        sampler = create_sampler(config, trained.policy, trained.mesh, trained.shardings, trained.tokenizer)
        with contextlib.closing(sampler), start_rewards(config, rows, None) as runner:
            problem = left_out_of_evaluation(runner, config.eval.reward)
            if problem and accuracy_function(runner, config.eval.reward) is None:
                raise ValueError(problem)
            sampler.expect([row.prompt_ids for row in rows])
            result = evaluate(sampler, trained.params, rows, runner, trained.tokenizer, sampling, config.eval.reward)
        return result, "model.source" if trained.step is None else f"step {trained.step}"


def main(argv: Sequence[str] | None = None) -> None:
    """`grpo eval MODEL [key=value ...] [--adapter FOLDER] [--output FILE] [--trust]`."""
    parser = argparse.ArgumentParser(prog="grpo eval", description="greedy accuracy on the held-out rows")
    parser.add_argument(
        "model", help="run folder (its newest checkpoint), or YAML recipe, Hugging Face folder or hub id"
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="overrides with dotted keys")
    parser.add_argument("--adapter", default=None, metavar="FOLDER", help="an adapter in PEFT's format")
    parser.add_argument("--output", default=None, help="JSON lines file for every prompt, completion and reward")
    parser.add_argument("--trust", action="store_true", help="run code that a run folder names, whoever wrote it")
    arguments = parser.parse_intermixed_args(sys.argv[1:] if argv is None else list(argv))
    result, where = evaluate_source(
        arguments.model, arguments.overrides, arguments.adapter, arguments.output, arguments.trust
    )
    if not hosts.is_first():
        return
    if arguments.output is not None:
        lines = "".join(json.dumps(sample, ensure_ascii=False, default=str) + "\n" for sample in result.samples)
        with writing(arguments.output), written_file(arguments.output) as path:
            path.write_text(lines, encoding="utf-8")
    low, high = result.interval
    print(
        f"{where}: accuracy {result.accuracy:.1%} (95% interval {low:.1%} to {high:.1%}) on {result.num_judged} prompts"
    )
    for name, mean in result.means.items():
        print(f"  {name}: mean {mean if mean is None else round(mean, 4)}")
    if result.left_out:
        print(f"  left out, for they are not called for one completion at a time: {', '.join(result.left_out)}")
    print(f"  completion length {result.completion_length:.1f} tokens, {result.truncated_share:.1%} truncated")


if __name__ == "__main__":
    main()
