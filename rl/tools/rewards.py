"""`grpo rewards check`: what the reward functions of a recipe give to completions that are known to be right, wrong or
empty, before anything is trained.

In: a configuration, and if wanted a run whose samples are judged, too. Out: a table of mean rewards, with one line for
each sort of completion, the seconds and failures of each function, and a verdict: whether a right answer scores above
junk. The policy's weights are not read, and no accelerator is touched. The functions run in workers, as in training;
reward models run on the processor.
"""

import argparse
import dataclasses
import itertools
import json
import os
import pathlib
import sys
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh

from rewards.batch import RewardResult, added_effort
from rewards.environment_rewards import asks_for_environments
from rewards.runner import RewardRunner
from rl.config.load import Config, load_config, require
from rl.config.sections import reward_models
from rl.data.prompt_rows import PromptRow
from rl.data.prompts import load_prompts
from rl.data.tokenizer import Tokenizer
from rl.devices.mesh import create_mesh
from rl.files.output_file import check_writable
from rl.models.files.folders import write_json
from rl.rollout.reward_check import (
    LISTED,
    OTHER,
    MadeCompletion,
    SortScores,
    arguments_of,
    made_completions,
    scores_by_sort,
    verdict_of,
    way_out_of,
)
from rl.rollout.scoring import start_rewards
from rl.run.metrics import read_samples
from rl.run_folder.folder import check_trust
from rl.run_folder.trust import TO_JUDGE
from rl.state.origin import tokenizer_from_config

_MOST_SAMPLES = 256  # of a run, the newest


@dataclasses.dataclass(frozen=True)
class Checked:
    """What a check found.

    Attributes:
      sorts: {sort of completions: their rewards}, in the order of the table.
      weights: of each function.
      seconds: per completion, of each function. failures: {function: {kind: completions}}.
      problems: failures and findings in words.
      verdict: None: a right answer scores above junk; else why that is not so, or cannot be told.
      is_wrong: whether it is known not to be so.
    """

    sorts: dict[str, SortScores]
    weights: dict[str, float]
    seconds: dict[str, float]
    failures: dict[str, dict[str, int]]
    problems: list[str]
    verdict: str | None
    is_wrong: bool


def check(
    recipe: str | pathlib.Path,
    num_rows: int = 16,
    samples: str | None = None,
    overrides: Sequence[str] = (),
    trust: bool = False,
) -> Checked:
    """Runs the reward functions of a recipe on made-up completions of its first data rows.

    Args:
      recipe: a YAML file. num_rows: data rows at most, with different prompts.
      samples: a run folder whose newest recorded completions are judged, too; those of prompts that the data rows do
        not hold are left out.
      trust: see `rl.run_folder.folder.check_trust`.

    Raises:
      ValueError: `grpo train` would refuse the data or the functions, num_rows is below 1, or the run has no samples of
        these data.
    """
    if num_rows < 1:
        raise ValueError(f"--rows must be >= 1, got {num_rows}")
    config = load_config(recipe, overrides)
    check_trust(recipe, config, overrides, TO_JUDGE, trust)
    if config.rollout.environments and not config.rewards.functions:
        raise ValueError(
            "rewards.functions must name a function to check, got []; the reward is what the environment or the agent "
            "gives, which this command does not play: look at samples.jsonl of a short run"
        )
    require(config.rewards.functions, "rewards.functions", "[{function: rewards.number:exact_number_flexible}]")
    tokenizer = tokenizer_from_config(config)
    data = load_prompts(config, tokenizer)
    rows = list({_key(row.prompt): row for row in reversed(data.train)}.values())[::-1][:num_rows]
    recorded = [] if samples is None else _recorded(samples, [*data.train, *data.held_out])
    config, of_environments = _without_environments(config, data.train)
    with start_rewards(config, data.train, None, _mesh(config)) as runner:
        made = made_completions(rows, runner.specs, tokenizer, config.sampling.max_completion_length)
        results = [_score(runner, made, tokenizer, group_size=len({sort for sort, *_ in made}))]
        if recorded:
            results.append(_score(runner, recorded, tokenizer, group_size=1, names=runner.elementwise))
        weights = {spec.name: float(spec.weight) for spec in runner.specs}
    scored = [result.scored for result in results]
    problems = [line for result in scored for line in result.problems]
    if recorded and (alone := sorted({*weights} - {*runner.elementwise})):
        problems.append(f"samples of {samples} are judged one by one, without {', '.join(alone)}, which compare them")
    problems += of_environments
    sorts = {sort: judged for result in results for sort, judged in result.sorts.items()}
    effort = added_effort(result.effort for result in scored)
    verdict, is_wrong = verdict_of(sorts, way_out_of(runner, scored))
    return Checked(
        sorts=sorts,
        weights=weights,
        seconds={name: effort[name].mean for name in weights},
        failures={name: _added([result.counts.get(name, {}) for result in scored]) for name in weights},
        problems=[*dict.fromkeys(problems), *_findings(sorts, weights)],
        verdict=verdict,
        is_wrong=is_wrong,
    )


def _without_environments(config: Config, rows: Sequence[PromptRow]) -> tuple[Config, list[str]]:
    """The configuration without reward functions that ask for environments, and a line about those. ValueError where
    there is no other.
    """
    columns = {name for row in rows for name in row.columns}
    functions = config.rewards.functions if config.rollout.environments else []
    asking = [entry for entry in functions if asks_for_environments(entry.function, {*columns, *entry.kwargs})]
    if not asking:
        return config, []
    names = ", ".join(entry.label for entry in asking)
    others = [entry for entry in functions if entry not in asking]
    if not others:
        raise ValueError(
            f"rewards.functions: {names} ask for environments, which this command does not play, and there is no other "
            "function to check; look at samples.jsonl of a short run"
        )
    rewards = dataclasses.replace(config.rewards, functions=others)
    return dataclasses.replace(config, rewards=rewards), [f"{names}: left out, because no environment is played here"]


def _mesh(config: Config) -> Mesh | None:
    """A mesh of one device with the axes of the run's own, for reward models; None without one."""
    if not reward_models(config):
        return None
    axes = dict.fromkeys(config.mesh.axes, 1)
    section = dataclasses.replace(config.mesh, num_devices=1, data=1, fsdp=1, tensor=1, axes=axes, dcn={})  # pyright: ignore[reportArgumentType]
    return create_mesh(section)


class _Result(NamedTuple):
    """The rewards of some completions."""

    sorts: dict[str, SortScores]
    scored: RewardResult


def _recorded(run: str, rows: Sequence[PromptRow]) -> list[MadeCompletion]:
    """The newest completions in a run's samples.jsonl whose prompt is that of a row."""
    of_prompt = {_key(row.prompt): row for row in rows}
    records = [record for record in read_samples(run) if _key(record["prompt"]) in of_prompt][-_MOST_SAMPLES:]
    if not records:
        raise ValueError(f"--samples must be a run with samples of prompts in data.source, got none in {run!r}")
    return [
        MadeCompletion(
            f"samples of {pathlib.Path(run).name}",
            of_prompt[_key(record["prompt"])],
            record["completion"],
            record.get("token_ids", []),
            record["finish_reason"],
        )
        for record in records
    ]


def _score(
    runner: RewardRunner,
    completions: Sequence[MadeCompletion],
    tokenizer: Tokenizer,
    group_size: int,
    names: Sequence[str] | None = None,
) -> _Result:
    arguments = arguments_of(runner, completions, tokenizer)
    scored = runner.score(**arguments, group_size=group_size, names=names, is_trial=True)
    return _Result(scores_by_sort(runner, completions, scored), scored)


def _findings(sorts: Mapping[str, SortScores], weights: Mapping[str, float]) -> list[str]:
    """What is odd without being wrong for sure."""
    right = {sort: judged for sort, judged in sorts.items() if sort.startswith("right answer")}
    totals = [judged.total for judged in right.values() if judged.total is not None]
    found = []
    for sort in (OTHER, LISTED, "the prompt", "cut off") if totals else ():
        if sort in sorts and (total := sorts[sort].total) is not None and total >= max(totals):
            found.append(f"{sort} scores {total:.4g}, no less than the right answer's {max(totals):.4g}")
    for name in weights:
        means = {mean for judged in sorts.values() if (mean := judged.means[name]) is not None}
        if len(means) == 1 and all(judged.means[name] is not None for judged in sorts.values()):
            found.append(f"reward {name!r} gives {means.pop():.4g} to every sort of completion")
    return found


def _added(counts: Sequence[Mapping[str, int]]) -> dict[str, int]:
    kinds = dict.fromkeys(itertools.chain.from_iterable(counts))
    return {kind: total for kind in kinds if (total := sum(count.get(kind, 0) for count in counts))}


def _key(prompt: Any) -> str:
    """A prompt, text or messages, as a key."""
    return json.dumps(prompt, sort_keys=True)


def report(checked: Checked) -> list[str]:
    """The result in words, with the table."""

    def shown(value: float | None) -> str:
        return "-" if value is None else f"{value:.3f}"

    names = list(checked.weights)
    head = ["", "number", "total", *(f"{name} (x {checked.weights[name]:g})" for name in names)]
    lines = [
        [sort, str(judged.num), shown(judged.total), *(shown(judged.means[name]) for name in names)]
        for sort, judged in checked.sorts.items()
    ]
    lines.append(["seconds each", "", "", *(f"{checked.seconds[name]:.4f}" for name in names)])
    failed = [", ".join(f"{count} {kind}" for kind, count in checked.failures[name].items()) for name in names]
    lines.append(["not judged", "", "", *(text or "-" for text in failed)])
    widths = [max(len(line[place]) for line in (head, *lines)) for place in range(len(head))]
    table = [
        "  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]).rstrip() for line in (head, *lines)
    ]
    verdict = f"{'error' if checked.is_wrong else 'note'}: {checked.verdict}" if checked.verdict else None
    return [
        *table,
        *(f"warning: {problem}" for problem in checked.problems),
        verdict or "a right answer scores above junk",
    ]


def main(argv: Sequence[str] | None = None) -> int:
    """`grpo rewards check CONFIG [--rows N] [--samples RUN] [--json FILE] [--trust] [key=value ...]`.

    Returns 1 where a right answer does not score above junk, else 0.
    """
    name, *rest = (sys.argv[1:] if argv is None else list(argv)) or [""]
    if name != "check":
        raise ValueError(f"grpo rewards needs check, got {name!r}")
    parser = argparse.ArgumentParser(prog="grpo rewards check", description=__doc__)
    parser.add_argument("config", help="YAML recipe")
    parser.add_argument("--rows", type=int, default=16, help="data rows at most")
    parser.add_argument("--samples", default=None, metavar="RUN", help="judge the newest samples of this run, too")
    parser.add_argument("--json", default=None, metavar="FILE", help="write the same numbers")
    parser.add_argument(
        "--trust", action="store_true", help="take config.yml of a run folder, and code that it names, as they are"
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="overrides with dotted keys")
    arguments = parser.parse_intermixed_args(rest)
    check_writable(arguments.json, "--json")
    if not os.environ.get("JAX_PLATFORMS"):
        jax.config.update("jax_platforms", "cpu")  # no device of this machine is needed
    checked = check(arguments.config, arguments.rows, arguments.samples, arguments.overrides, arguments.trust)
    print("\n".join(report(checked)))
    if arguments.json is not None:
        write_json(pathlib.Path(arguments.json), dataclasses.asdict(checked))
    return int(checked.is_wrong)


if __name__ == "__main__":
    sys.exit(main())
