"""`grpo eval MODEL`: greedy accuracy on the held-out rows.

In: a run, a recipe, a Hugging Face folder or a hub id. Out: the accuracy with its interval, the mean of every reward
function, and with `--output` a JSON line for each prompt. Not here: the evaluation itself (`rl.rollout.evaluation`).
"""

import argparse
import contextlib
import json
import os
import pathlib
import sys
from collections.abc import Sequence

from rewards.moment import Moment
from rl.config.load import Config, override_values, require
from rl.data.prompts import PromptData, evaluated_rows, fingerprint, held_out_fingerprint, load_pairs, load_prompts
from rl.data.tokenizer import Tokenizer
from rl.devices import hosts
from rl.devices.programs import use_compilation_cache
from rl.files.output_file import check_writable, writing
from rl.files.stores import written_file
from rl.rollout.environments import start_episodes
from rl.rollout.evaluation import EvalResult, accuracy_function, evaluate, left_out_of_evaluation
from rl.rollout.reward_model import open_reward_models, weight_bytes
from rl.rollout.scoring import start_rewards
from rl.run_folder.contents import HELD_OUT
from rl.run_folder.folder import check_trust, read_run
from rl.run_folder.trust import TO_EVALUATE
from rl.sampler.create import create_sampler, eos_ids, sampling_params
from rl.state.origin import tokenizer_from_config
from rl.tools.trained import load_source, resolve_model


def evaluate_source(
    model: str | os.PathLike,
    overrides: Sequence[str] = (),
    adapter: str | None = None,
    output: str | None = None,
    trust: bool = False,
) -> tuple[EvalResult, str]:
    """Evaluates a run (its newest checkpoint), or the weights of a recipe, Hugging Face folder or hub id, on held-out
    rows.

    Args:
      adapter: folder of an adapter in PEFT's format to put beside the weights.
      output: file that the caller's first process will write; it is checked before anything is loaded.
      trust: see `rl.run_folder.folder.check_trust`.

    Returns:
      The result, and the origin of the weights in words.

    Raises:
      ValueError: there is no reward function, there are no held-out rows, some of them may have been trained on, or
        something is wrong with the configuration, the data or the checkpoint.
    """
    source = resolve_model(model, overrides, adapter=adapter, alone=False)
    config = source.config
    with hosts.joined(config.distributed):
        check_trust(source.run or model, config, overrides, TO_EVALUATE, trust)
        hosts.from_first(lambda: check_writable(output, "--output"))
        use_compilation_cache(config)
        tokenizer = tokenizer_from_config(config)  # first: a folder that is not there has no rewards either
        if not config.rollout.environments:
            require(config.rewards.functions, "rewards.functions", "[{function: rewards.number:exact_number_flexible}]")
        data = load_prompts(config, tokenizer)
        changed = source.run and changed_rows(source.run, config, overrides, data, tokenizer)
        for problem in filter(None, (changed, tokenizer.template_kwargs_problem())):
            if hosts.is_first():
                print(f"warning: {problem}", file=sys.stderr)
        rows = evaluated_rows(data.held_out, config.eval.max_prompts)
        if not rows:
            raise ValueError(
                "evaluation needs held-out rows, got none; set data.eval_size, data.eval_share or data.eval_source"
            )
        trained = load_source(source)
        sampling = sampling_params(config, eos_ids(config, trained.origin.model_config, trained.tokenizer))
        judges = open_reward_models(config, trained.mesh)
        where = trained.policy, trained.mesh, trained.shardings, trained.tokenizer
        sampler = create_sampler(config, *where, beside=weight_bytes(judges))
        with contextlib.ExitStack() as stack:
            stack.enter_context(contextlib.closing(sampler))
            episodes = stack.enter_context(start_episodes(config, trained.tokenizer, sampling.eos_ids, rows, None))
            runner = stack.enter_context(start_rewards(config, rows, None, trained.mesh, judges, episodes))
            problem = left_out_of_evaluation(runner, config.eval.reward)
            if problem and accuracy_function(runner, config.eval.reward) is None:
                raise ValueError(problem)
            if episodes is None:
                sampler.expect([row.prompt_ids for row in rows])
            else:
                sampler.expect_length(config.data.max_prompt_length)
            moment = Moment(trained.step or 0, config.grpo.steps)
            result = evaluate(
                sampler,
                trained.params,
                rows,
                runner,
                trained.tokenizer,
                sampling,
                config.eval.reward,
                moment,
                config.data.source_names,
                episodes,
            )
        return result, "model.source" if trained.step is None else f"step {trained.step}"


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


def main(argv: Sequence[str] | None = None) -> None:
    """`grpo eval MODEL [key=value ...] [--adapter FOLDER] [--output FILE] [--trust]`."""
    parser = argparse.ArgumentParser(prog="grpo eval", description="greedy accuracy on the held-out rows")
    parser.add_argument(
        "model", help="run folder (its newest checkpoint), or YAML recipe, Hugging Face folder or hub id"
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="overrides with dotted keys")
    parser.add_argument("--adapter", default=None, metavar="FOLDER", help="an adapter in PEFT's format")
    parser.add_argument("--output", default=None, help="JSON lines file for every prompt, completion and reward")
    parser.add_argument(
        "--trust", action="store_true", help="take config.yml of a run folder, and code that it names, as they are"
    )
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
    for name, own in result.sources.items():
        means = ", ".join(f"{key} {mean if mean is None else round(mean, 4)}" for key, mean in own.means.items())
        print(f"  source {name}: accuracy {own.accuracy:.1%} on {own.num_judged} prompts; means: {means}")
    if result.left_out:
        print(f"  left out, for they are not called for one completion at a time: {', '.join(result.left_out)}")
    print(f"  completion length {result.completion_length:.1f} tokens, {result.truncated_share:.1%} truncated")


if __name__ == "__main__":
    main()
