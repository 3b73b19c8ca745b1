"""Draws one completion of a training run again, alone, from the weights, the prompt and the random numbers of its step.

In: a run folder and the completion's numbers. Out: the completion, and whether it is the one that the run recorded.
Weights exist at checkpoints only; nothing is trained again.
"""

import contextlib
import dataclasses
import os
import pathlib
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import jax

from rl.config.load import Config, differences, load_config
from rl.data.order import order_of
from rl.data.prompt_rows import PromptRow
from rl.data.prompts import PromptData, load_prompts
from rl.data.tokenizer import Tokenizer
from rl.devices.programs import use_compilation_cache
from rl.run.metrics import read_metrics, read_samples
from rl.run.progress import ORDER_STEP
from rl.run_folder.folder import check_trust, checkpoint_folder, checkpoint_steps, read_run
from rl.run_folder.trust import TO_REPLAY
from rl.sampler.contract import Completion, Request
from rl.sampler.create import create_sampler, eos_ids, sampling_params
from rl.sampler.token_draw import SamplingParams
from rl.state.checkpoint_files import read_record
from rl.state.origin import tokenizer_from_config
from rl.tools.trained import load_checkpoint, load_start

NOT_HELD = "(logging.samples_per_step decides how many it holds)"


@dataclasses.dataclass(frozen=True)
class Replayed:
    """A completion of a step, drawn anew, with its prompt, its sampling rules and the run's tokenizer."""

    step: int
    row: PromptRow
    completion: Completion
    sampling: SamplingParams
    tokenizer: Tokenizer

    @property
    def text(self) -> str:
        """The completion's text without special tokens."""
        return self.tokenizer.decode(self.completion.token_ids)


def compare(run: str | os.PathLike, replayed: Replayed) -> tuple[bool, str]:
    """(whether samples.jsonl agrees with this completion or does not hold it, what it holds in words)."""
    completion = replayed.completion
    record = recorded(run, replayed.step, completion.prompt_index, completion.sample_index)
    if record is None:
        return True, f"samples.jsonl does not hold this completion {NOT_HELD}"
    token_ids = completion.token_ids.tolist()
    now = {"completion": replayed.text, "num_tokens": len(token_ids), "finish_reason": completion.finish_reason}
    differing = [
        f"{name} was {record[name]!r}, is {value!r}" for name, value in now.items() if record.get(name, value) != value
    ]
    # Special tokens are missing in the text, and all bytes that are no characters look alike.
    pairs = enumerate(zip(record.get("token_ids", []), token_ids, strict=False))
    differing += [f"token {number} was {then}, is {token}" for number, (then, token) in pairs if then != token][:1]
    if differing:
        return False, f"NOT equal to samples.jsonl: {'; '.join(differing)}"
    if "token_ids" in record:
        return True, "its tokens are equal to those in samples.jsonl"
    return True, "text, number of tokens and finish_reason are equal to those in samples.jsonl, which has no token ids"


def draw_again(
    run: str | os.PathLike, step: int, prompt: int, sample: int, overrides: Sequence[str] = (), trust: bool = False
) -> Replayed:
    """One completion of a run's rollouts.

    Args:
      run: a folder of `grpo train`.
      step: from 1, as in metrics.jsonl and samples.jsonl. prompt, sample: from 0, as in samples.jsonl. Prompts of
        dynamic sampling's refills come after the step's first ones.
      overrides: keys that do not change what a step computes, such as `mesh.num_devices`.
      trust: see `rl.run_folder.folder.check_trust`.

    Raises:
      ValueError: there is no such run, step or completion, there is no checkpoint of the step before, or data or
        weights have changed.
    """
    folder = pathlib.Path(run)
    config, identity = run_of_replay(folder, overrides, TO_REPLAY, trust)
    config.rollout.refuse_turns("a replay with the run's weights")
    use_compilation_cache(config)
    data, rows = rows_of_step(config, folder, identity, step, prompt, sample)
    trained = load_start(config) if step == 1 else load_checkpoint(config, folder, step - 1)
    if step == 1:
        _check_same("policy", trained.origin.identity, identity["policy"])
    sampling = sampling_params(
        config, eos_ids(config, trained.origin.model_config, trained.tokenizer), for_training=True
    )
    sampler = create_sampler(config, trained.policy, trained.mesh, trained.shardings, trained.tokenizer)
    if data.stream is None:
        sampler.expect([row.prompt_ids for row in (*data.train, *data.held_out)])
    else:
        sampler.expect_length(config.data.max_prompt_length)
    key = jax.random.fold_in(jax.random.wrap_key_data(trained.rng), step - 1)
    request = Request(prompt, prompt, sample, sampling.max_completion_length)
    prompts = [row.prompt_ids for row in rows]
    with contextlib.closing(sampler):
        ((_, completion),) = sampler.stream(trained.params, prompts, [request], sampling, key)
    return Replayed(step, rows[prompt], completion, sampling, trained.tokenizer)


def run_of_replay(
    folder: pathlib.Path, overrides: Sequence[str], kinds: Collection[str], trust: bool
) -> tuple[Config, dict[str, Any]]:
    """Configuration and identity of a run of which something is replayed. kinds: of the code that this runs.

    Raises:
      ValueError: it is no run of `grpo train`, an override changes it, or its code is not shown to be the user's.
    """
    own, identity = read_run(folder)
    config = load_config(folder / "config.yml", overrides)
    if identity["kind"] != "grpo":
        raise ValueError(f"--replay needs a run of `grpo train`, {str(folder)!r} is one of kind {identity['kind']!r}")
    changed = differences(own, config)
    if changed:
        raise ValueError(f"--replay must keep the run's own settings, got other values for {sorted(changed)}")
    check_trust(folder, config, overrides, kinds, trust)
    return config, identity


def rows_of_step(
    config: Config, folder: pathlib.Path, identity: Mapping[str, Any], step: int, prompt: int, sample: int
) -> tuple[PromptData, list[PromptRow]]:
    """The run's data, and the rows of a step by the index of their prompt.

    Raises:
      ValueError: there is no such completion, no checkpoint of the step before, or the data have changed.
    """
    _check_replayable(folder, step)
    num_prompts = _num_prompts(config, folder, step)
    for name, number, count in (("PROMPT", prompt, num_prompts), ("SAMPLE", sample, config.grpo.group_size)):
        if number >= count:
            raise ValueError(f"--replay: {name} must be from 0 to {count - 1}, got {number}")
    data = load_prompts(config, tokenizer_from_config(config))
    _check_same("data", data.fingerprint(), identity["data"])
    # Refills take the next prompts, so the number used up before a step gives all its prompts.
    position = _position(folder, step, data.num_positions)
    order = order_of(config.data, data, config.seed, config.grpo.prompts_per_step)
    record = (read_record(checkpoint_folder(folder, step - 1)) or {}) if step > 1 else {}
    order = order.laid_out_for(record.get(ORDER_STEP, order.prompts_per_step))
    if order.curriculum is not None:
        order.curriculum.restore(record.get("curriculum", {}))
    indices, _ = order.take(position, num_prompts)
    return data, [data.rows[i] for i in indices]


def recorded(run: str | os.PathLike, step: int, prompt: int, sample: int) -> dict[str, Any] | None:
    """The line of samples.jsonl with this completion; None where it is not there."""
    place = step, prompt, sample
    rows = [row for row in read_samples(run) if (row["step"], row["prompt_index"], row["sample_index"]) == place]
    return rows[-1] if rows else None


def _check_replayable(folder: pathlib.Path, step: int) -> None:
    num_done = max((line["step"] for line in read_metrics(folder)), default=0)
    steps = sorted({1, *(saved + 1 for saved in checkpoint_steps(folder))})
    steps = [number for number in steps if number <= num_done]
    if step in steps:
        return
    rule = f"--replay: STEP must be one of {steps}, got {step}"
    if 1 <= step <= num_done:
        rule += (
            f"; the weights before step {step} were not kept: checkpoint.every and checkpoint.keep decide which are, "
            "step 1 needs none"
        )
    else:
        rule += f"; the run has done {num_done} steps"
    raise ValueError(rule)


def _num_prompts(config: Config, folder: pathlib.Path, step: int) -> int:
    """The number of prompts of the step, including those that dynamic sampling replaced."""
    (line,) = [line for line in read_metrics(folder) if line["step"] == step]
    return int(line.get("dynamic_sampling/prompts", config.grpo.prompts_per_step))


def _position(folder: pathlib.Path, step: int, num_rows: int) -> int:
    """The number of prompts that earlier steps used up, with `num_rows` in an epoch."""
    if step == 1:
        return 0
    loop = read_record(checkpoint_folder(folder, step - 1))
    if loop is None:
        raise ValueError(f"--replay: checkpoint {step - 1} of {folder} must hold a loop record, and it does not")
    return loop["epoch"] * num_rows + loop["position"]


def _check_same(what: str, now: object, then: object) -> None:
    if now != then:
        raise ValueError(f"--replay: the run's {what} must be what it was, {then}, got {now}; put the old files back")
