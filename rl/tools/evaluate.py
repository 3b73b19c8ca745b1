"""`grpo eval MODEL [CONFIG]`: accuracy on the held-out rows, and every named set of `eval.sets`.

In: a run, a recipe, a Hugging Face folder or a hub id; perhaps the recipe that says what is asked. Out: each number
with its interval, the mean of every reward function, and with `--output` a JSON line for each sample. With `--against`
two models answer the same questions, or two such files are read (`rl.tools.against`). Not here: the evaluation itself
(`rl.rollout.evaluation`, `rl.rollout.eval_sets`).
"""

import argparse
import contextlib
import math
import os
import pathlib
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rewards.moment import Moment
from rl.config.load import Config, override_values, require
from rl.data.eval_sets import load_eval_sets
from rl.data.prompts import PromptData, evaluated_rows, fingerprint, held_out_fingerprint, load_pairs, load_prompts
from rl.data.tokenizer import Tokenizer
from rl.devices import hosts
from rl.devices.programs import use_compilation_cache
from rl.files.output_file import check_writable, writing
from rl.files.stores import written_file
from rl.rollout.environments import start_episodes
from rl.rollout.eval_sets import Write, check_functions, evaluate_set
from rl.rollout.evaluation import EvalResult, accuracy_function, evaluate, left_out_of_evaluation
from rl.rollout.reward_model import open_reward_models, weight_bytes
from rl.rollout.scoring import start_rewards
from rl.run.announce import header
from rl.run.console import Console
from rl.run.eval_files import record_line
from rl.run.heartbeat import heartbeat
from rl.run_folder.contents import HELD_OUT, Step
from rl.run_folder.folder import check_trust, read_run
from rl.run_folder.trust import MODEL, TO_EVALUATE
from rl.sampler.create import create_sampler, eos_ids, evaluation_sizes, prompts_at_a_time, sampling_params
from rl.state.origin import tokenizer_from_config
from rl.tools.against import check_files, compare, is_samples_file
from rl.tools.step_option import step_option
from rl.tools.trained import WeightSource, load_source, resolve_for, resolve_model

_RECIPES = (".yml", ".yaml")


def evaluate_source(
    model: str | os.PathLike,
    overrides: Sequence[str] = (),
    adapter: str | None = None,
    output: str | None = None,
    trust: bool = False,
    recipe: str | os.PathLike | None = None,
    step: Step | None = None,
    keep_samples: bool = True,
) -> tuple[EvalResult, str]:
    """Evaluates a checkpoint of a run, or the weights of a recipe, Hugging Face folder or hub id, on held-out rows and
    on the sets of `eval.sets`.

    Args:
      adapter: folder of an adapter in PEFT's format to put beside the weights.
      output: file to which the first process writes the record of each sample as it is judged.
      trust: see `rl.run_folder.folder.check_trust`.
      recipe: the configuration that says what is asked and how it is judged; None: MODEL's own, with the overrides.
      step: of a run's checkpoint, or "best"; None: the newest.
      keep_samples: whether the result holds the samples of the held-out rows, where there is no output.

    Returns:
      The result, and the origin of the weights in words.

    Raises:
      ValueError: there is no reward function, there is nothing to ask, some held-out rows may have been trained on, or
        something is wrong with the configuration, the data or the checkpoint.
    """
    source, config = _resolved(model, overrides, step, adapter, recipe)
    with hosts.joined(config.distributed):
        check_trust(model if recipe is None else recipe, config, overrides, TO_EVALUATE, trust)
        check_trust(source.run or model, config, overrides, TO_EVALUATE if recipe is None else (MODEL,), trust)
        hosts.from_first(lambda: check_writable(output, "--output"))
        use_compilation_cache(config)
        tokenizer = tokenizer_from_config(config)  # first: a folder that is not there has no rewards either
        if not config.rollout.environments:
            require(config.rewards.functions, "rewards.functions", "[{function: rewards.number:exact_number_flexible}]")
        data = _data(config, tokenizer)
        own_run = source.run if recipe is None else None
        changed = own_run and changed_rows(own_run, config, overrides, data, tokenizer)
        rows = evaluated_rows(data.held_out, config.eval.max_prompts)
        messages: list[str] = []
        sets = load_eval_sets(config, tokenizer, data.held_out, messages, data.train)
        for problem in filter(None, (changed, tokenizer.template_kwargs_problem(), *messages, rounding_note(config))):
            if hosts.is_first():
                print(f"warning: {problem}", file=sys.stderr)
        if not rows and not sets:
            raise ValueError(
                "evaluation needs held-out rows, got none; set data.eval_size, data.eval_share or data.eval_source, "
                "or name sets in eval.sets"
            )
        asked = [*rows, *(row for own in sets.values() for row in own)]
        trained = load_source(source)
        if hosts.is_first():
            of_model = header(source.run, trained.origin, trained.policy, trained.mesh, is_trained=False)
            of_sets = [f"{len(own)} in {name}" for name, own in sets.items()]
            prompts = ", ".join([f"{len(rows)} held out", *of_sets])
            Console(0, sys.stderr).table("grpo eval", {**of_model, "prompts": prompts})
        sampling = sampling_params(config, eos_ids(config, trained.origin.model_config, trained.tokenizer))
        sizes = evaluation_sizes(config, len(rows), sets, sampling)
        judges = open_reward_models(config, trained.mesh)
        where = trained.policy, trained.mesh, trained.shardings, trained.tokenizer
        sampler = create_sampler(config, *where, beside=weight_bytes(judges))
        with contextlib.ExitStack() as stack:
            stack.enter_context(contextlib.closing(sampler))
            stack.enter_context(heartbeat(_say, f"evaluating {len(asked)} prompts"))
            episodes = stack.enter_context(start_episodes(config, trained.tokenizer, sampling.eos_ids, asked, None))
            runner = stack.enter_context(start_rewards(config, asked, None, trained.mesh, judges, episodes))
            problem = left_out_of_evaluation(runner, config.eval.reward) if rows else None
            if problem and accuracy_function(runner, config.eval.reward) is None:
                raise ValueError(problem)
            check_functions(config, sets, runner)
            if episodes is None:
                largest = max(sizes, key=lambda size: size.num_prompts * size.num_samples)
                sampler.expect([row.prompt_ids for row in asked], largest.num_prompts, largest.num_samples)
            else:
                sampler.expect_length(config.data.max_prompt_length)
            write = stack.enter_context(_written(output, keep_samples))
            moment = Moment(trained.step or 0, config.grpo.steps)
            params, reads, result = trained.params, trained.tokenizer, _nothing()
            if rows:
                result = evaluate(
                    sampler,
                    params,
                    rows,
                    runner,
                    reads,
                    sampling,
                    config.eval.reward,
                    moment,
                    config.data.source_names,
                    episodes,
                    prompts_at_a_time(config.eval, 1),
                    write,
                )
            for name, own in sets.items():
                result.sets[name] = evaluate_set(
                    name, config.eval, sampler, params, own, runner, reads, sampling, moment, episodes, write
                )
        return result, "model.source" if trained.step is None else f"step {trained.step}"


def _resolved(
    model: str | os.PathLike,
    overrides: Sequence[str],
    step: Step | None,
    adapter: str | None,
    recipe: str | os.PathLike | None,
) -> tuple[WeightSource, Config]:
    """The weights of MODEL, not loaded, and the configuration that says what is asked. ValueError: there are none."""
    if recipe is not None:
        return resolve_for(model, recipe, overrides, step, adapter)
    source = resolve_model(model, overrides, step, adapter, alone=False)
    return source, source.config


def _data(config: Config, tokenizer: Tokenizer) -> PromptData:
    """The rows of `data`; none where there are only sets."""
    if config.eval.sets and not (config.data.source or config.data.sources or config.is_without_data):
        return PromptData([], [], 0, 0, [])
    return load_prompts(config, tokenizer)


def _nothing() -> EvalResult:
    """The result without held-out rows."""
    return EvalResult(math.nan, (0.0, 1.0), 0, 0, {}, [], 0.0, 0.0, [])


def rounding_note(config: Config) -> str | None:
    """A message where the tokens may depend on what is computed beside them."""
    rounded = {
        "model.dtype": config.model.dtype if config.model.dtype == "bfloat16" else None,
        "sampling.kv_dtype": config.sampling.kv_dtype,
        "sampling.weight_dtype": config.sampling.weight_dtype,
    }
    found = ", ".join(f"{key} {value}" for key, value in rounded.items() if value is not None)
    if not found:
        return None
    return (
        f"with {found}, logits that are (nearly) equal may be ordered otherwise on other devices, or with other "
        "sampling.slots or eval.block_size, so that a few completions differ there; float32 and float64 do not depend "
        "on these"
    )


@contextlib.contextmanager
def _written(output: str | None, keep_samples: bool) -> Iterator[Write | None]:
    """What takes the records of samples: the output, nothing, or None for a result that is to hold them."""
    if output is None:
        yield None if keep_samples else lambda record: None
    elif not hosts.is_first():
        yield lambda record: None
    else:
        with writing(output), written_file(output) as path, path.open("w", encoding="utf-8") as stream:

            def write(record: Mapping[str, Any]) -> None:
                stream.write(record_line(record))

            yield write


def _say(text: str) -> None:
    if hosts.is_first():
        print(text, file=sys.stderr, flush=True)


def changed_rows(
    run: pathlib.Path, config: Config, overrides: Sequence[str], data: PromptData, tokenizer: Tokenizer
) -> str | None:
    """A message about the difference between the held-out rows and those of the run.

    None where there is no difference, an older version began the run, or the command line names other data.

    Raises:
      ValueError: the training rows differ as well, so held-out questions may have been trained on.
    """
    identity = read_run(run)[1]
    if any(key.startswith("data.") for key in override_values(overrides)) or HELD_OUT not in identity:
        return None
    then, now = identity[HELD_OUT], held_out_fingerprint(data.held_out)
    if now == then:
        return None
    if now["questions"] == then["questions"]:
        what = "the questions are the same; answers, other columns, the order of the rows, or token ids are not"
    else:
        what = f"they are {now['rows']} rows with other questions, and were {then['rows']}"
        is_grpo = identity["kind"] == "grpo"
        if (data.fingerprint() if is_grpo else fingerprint(load_pairs(config, tokenizer).rows)) != identity["data"]:
            raise ValueError(
                f"the held-out rows must be those of the run {run}, or none that it was trained on, but {what}, and "
                "the training rows have changed, too; put the data back, or name the rows with data.source=... or "
                "data.eval_source=..."
            )
    return f"the held-out rows are not those that the run {run} began with: {what}"


def report(result: EvalResult, where: str) -> list[str]:
    """The result in words, a line each."""
    lines = [where] if not result.num_prompts else []
    if result.num_prompts:
        low, high = result.interval
        lines.append(
            f"{where}: accuracy {result.accuracy:.1%} (95% interval {low:.1%} to {high:.1%}) on {result.num_judged} "
            "prompts"
        )
        lines += [f"  {name}: mean {_rounded(mean)}" for name, mean in result.means.items()]
        for name, own in result.sources.items():
            means = ", ".join(f"{key} {_rounded(mean)}" for key, mean in own.means.items())
            lines.append(f"  source {name}: accuracy {own.accuracy:.1%} on {own.num_judged} prompts; means: {means}")
        if result.left_out:
            lines.append(
                f"  left out, for they are not called for one completion at a time: {', '.join(result.left_out)}"
            )
        lines.append(
            f"  completion length {result.completion_length:.1f} tokens, {result.truncated_share:.1%} truncated"
        )
    return lines + [line for own in result.sets.values() for line in own.lines()]


def _rounded(mean: float | None) -> float | None:
    return mean if mean is None else round(mean, 4)


def main(argv: Sequence[str] | None = None) -> None:
    """`grpo eval MODEL [CONFIG] [key=value ...] [--step N|best] [--adapter FOLDER] [--output FILE] [--against B]
    [--trust]`.
    """
    parser = argparse.ArgumentParser(prog="grpo eval", description="accuracy on held-out rows and named sets")
    parser.add_argument(
        "model",
        help="run folder (its newest checkpoint), or YAML recipe, Hugging Face folder or hub id; with --against also "
        "a .jsonl file that --output wrote",
    )
    parser.add_argument("overrides", nargs="*", metavar="CONFIG key=value", help="YAML recipe that says what is asked")
    parser.add_argument("--step", type=step_option, metavar="N", help="the checkpoint of a run, or best")
    parser.add_argument("--adapter", default=None, metavar="FOLDER", help="an adapter in PEFT's format")
    parser.add_argument("--output", default=None, metavar="FILE", help="JSON lines file for every sample")
    parser.add_argument("--against", default=None, metavar="B", help="another model, or another .jsonl file")
    parser.add_argument("--against-step", type=step_option, metavar="N", help="the checkpoint of that run, or best")
    parser.add_argument(
        "--trust", action="store_true", help="take config.yml of a run folder, and code that it names, as they are"
    )
    given = parser.parse_intermixed_args(sys.argv[1:] if argv is None else list(argv))
    recipe = given.overrides[0] if given.overrides and given.overrides[0].endswith(_RECIPES) else None
    overrides = given.overrides[recipe is not None :]
    if given.against is None:
        if given.against_step is not None:
            raise ValueError(f"--against-step needs --against, got {given.against_step}; --step is MODEL's own")
        result, where = evaluate_source(
            given.model, overrides, given.adapter, given.output, given.trust, recipe, given.step, keep_samples=False
        )
        if hosts.is_first():
            print("\n".join(report(result, where)))
        return
    _against(given, recipe, overrides)


def _against(given: argparse.Namespace, recipe: str | None, overrides: Sequence[str]) -> None:
    """`--against`: evaluates what is no file of samples, and compares the files."""
    sides = [(given.model, given.step), (given.against, given.against_step)]
    models = [side for side, _ in sides if not is_samples_file(side)]
    check_files([side for side, _ in sides if is_samples_file(side)])
    if not models and (recipe or overrides or given.adapter or given.step or given.against_step):
        raise ValueError("CONFIG, key=value, --adapter and --step are for models, got them with two files of samples")
    check_writable(given.output, "--output")
    asked = recipe
    if recipe is None and models:  # the second model is asked what the first one's own configuration says
        first = pathlib.Path(models[0])
        own = first / "config.yml" if (first / "config.yml").is_file() else first
        asked = str(own) if own.suffix in _RECIPES else None
    hows, adapters = (recipe, asked), (given.adapter, None)
    for (side, step), how, adapter in zip(sides, hows, adapters, strict=True):  # before the first is evaluated
        if not is_samples_file(side):
            _resolved(side, overrides, step, adapter, how)
    with tempfile.TemporaryDirectory(prefix="tandem-eval-") as scratch:
        files, names, resamples = [], [], 2000
        for number, (side, step) in enumerate(sides):
            if is_samples_file(side):
                files.append(pathlib.Path(side))
                names.append(side)
                continue
            place = pathlib.Path(scratch) / f"{number}.jsonl"
            names.append(f"{'AB'[number]} ({side})")
            if given.output is not None:
                named = pathlib.Path(given.output)
                place = named.with_name(f"{named.stem}.{'ab'[number]}.jsonl")
                names[-1] = str(place)
            result, where = evaluate_source(
                side, overrides, adapters[number], str(place), given.trust, hows[number], step
            )
            resamples = next((own.scores.resamples for own in result.sets.values()), resamples)
            if hosts.is_first():
                print("\n".join(report(result, f"{'AB'[number]}, {side}, {where}")))
            files.append(place)
        if hosts.is_first():
            print("\n".join(compare(files[0], files[1], resamples, given.output, (names[0], names[1]))))


if __name__ == "__main__":
    main()
