"""What a curriculum saves on a task of mixed difficulty: `python benchmarks/curriculum.py [--seeds 0,1,2,3,4]`.

The task is examples/mixture_curriculum: sums that a small policy has learned from examples, sums that it answers right
now and then, and products that it never gets right. For each seed one warm start goes on with GRPO in three ways, with
the same rows, steps and seed:

  uniform   each row once an epoch
  measured  data.curriculum.by=pass_rate: pass rates are measured in the run, whose first epoch chooses nothing
  passrate  the same, with the pass rates of `grpo data passrate` beforehand

Out: the share of drawn groups with a spread of rewards, over the whole run; and how many prompts it takes to the same
held-out accuracy, where the draws of `grpo data passrate` count. A prompt is a group of completions. Runs are compared
in pairs, each with the uniform one of its seed. Two CPU cores are enough.
"""

import argparse
import contextlib
import dataclasses
import json
import math
import pathlib
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from command import run_and_report
from rich.console import Console
from rich.table import Table

from rl.config.load import load_config
from rl.grpo_trainer import train
from rl.run.metrics import read_metrics
from rl.sft_trainer import train as train_on_pairs
from rl.tools.passrate import passrate

ARMS = ("uniform", "measured", "passrate")
RECIPES = pathlib.Path(__file__).resolve().parents[1] / "examples" / "mixture_curriculum"
DRAWS = 4  # of `grpo data passrate` for each prompt, as in the README of the recipe
SMOOTHED = 3  # evaluations in a row whose mean is taken for the accuracy in the middle of them


class Curve(NamedTuple):
    """One run.

    Attributes:
      spread: share of its groups whose rewards are not all equal.
      prompts, accuracy: held-out accuracy after so many prompts, with those of `grpo data passrate`.
    """

    spread: float
    prompts: list[float]
    accuracy: list[float]

    @property
    def last(self) -> float:
        """The accuracy at the end."""
        return _smoothed(self.accuracy)[-1]

    def prompts_to(self, accuracy: float) -> float:
        """The prompts after which the run has this accuracy for the first time, between evaluations by a straight line;
        infinite if it never has.
        """
        smoothed, before = _smoothed(self.accuracy), None
        for place in zip(self.prompts, smoothed, strict=True):
            if place[1] >= accuracy:
                if before is None:
                    return place[0]
                (x, y), (x_after, y_after) = before, place
                return x + (x_after - x) * (accuracy - y) / (y_after - y)
            before = place
        return math.inf


def curve_of(metrics: Sequence[Mapping[str, Any]], prompts_per_step: int, drawn_before: float) -> Curve:
    """The curve of a run's metrics. drawn_before: prompts that were drawn before it began."""
    spreads = [1 - line["zero_variance_share"] for line in metrics if "zero_variance_share" in line]
    evaluated = [(line["step"], line["eval/accuracy"]) for line in metrics if "eval/accuracy" in line]
    prompts = [drawn_before + step * prompts_per_step for step, _ in evaluated]
    return Curve(statistics.fmean(spreads), prompts, [accuracy for _, accuracy in evaluated])


def compare(uniform: Curve, other: Curve) -> dict[str, float]:
    """A pair: both spreads and their ratio, the accuracy that both reach in the end, and the prompts of each to it and
    to the middle of the way there.
    """
    start, reached = uniform.accuracy[0], min(uniform.last, other.last)
    prompts = uniform.prompts_to(reached), other.prompts_to(reached)
    half = (start + reached) / 2
    halves = uniform.prompts_to(half), other.prompts_to(half)
    return {
        "spread_uniform": uniform.spread,
        "spread": other.spread,
        "spread_ratio": other.spread / uniform.spread,
        "accuracy": reached,
        "last_uniform": uniform.last,
        "last": other.last,
        "prompts_uniform": prompts[0],
        "prompts": prompts[1],
        "prompts_ratio": _ratio(*prompts),
        "half_uniform": halves[0],
        "half": halves[1],
        "half_ratio": _ratio(*halves),
    }


def sign_test(ratios: Sequence[float]) -> float:
    """The chance of at least so many ratios above 1, if above and below were equally likely (ties left out)."""
    wins, trials = sum(ratio > 1 for ratio in ratios), sum(ratio != 1 for ratio in ratios)
    return sum(math.comb(trials, count) for count in range(wins, trials + 1)) / 2**trials


def run_seed(seed: int, arms: Sequence[str], is_tiny: bool, folder: pathlib.Path) -> dict[str, Curve]:
    """The curves of these ways, from one warm start. What the folder holds already is not done again."""
    warm = folder / "warm"
    common = [f"seed={seed}", f"logging.compilation_cache={folder.parent / 'cache'}"]
    if not (warm / "export").is_dir():
        short = ["sft.steps=2"] if is_tiny else []
        train_on_pairs(load_config(RECIPES / "sft.yml", [*common, *short, f"output_dir={warm}"]))
    if not (warm / "export").is_dir():
        raise KeyboardInterrupt  # it was told to stop, and has saved
    recipe = RECIPES / "plain.yml"
    sources = [dataclasses.asdict(entry) for entry in load_config(recipe).data.sources]
    if is_tiny:
        common += ["grpo.steps=2", "eval.every=1"]
        for entry in sources:
            entry["args"]["size"] = 40
    common.append(f"model.source={warm / 'export'}")
    plain = f"data.sources={json.dumps(sources)}"
    config = load_config(recipe, [*common, plain])
    rates = folder / "rates"
    files = [rates / f"{entry['name']}.jsonl" for entry in sources]
    if not all(file.is_file() for file in files):
        rates.mkdir(parents=True, exist_ok=True)
        names = str(recipe), str(recipe), str(rates / "{source}.jsonl")
        passrate(*names, DRAWS, overwrite=True, overrides=[*common, plain])
    measured = [{"source": str(file), "name": entry["name"]} for file, entry in zip(files, sources, strict=True)]
    num_draws = sum(json.loads(line)["pass_rate_draws"] for file in files for line in file.open())
    by_arm = {
        "uniform": ("plain.yml", plain, 0.0),
        "measured": ("grpo.yml", plain, 0.0),
        "passrate": ("grpo.yml", f"data.sources={json.dumps(measured)}", num_draws / config.grpo.group_size),
    }
    curves = {}
    for arm in arms:
        name, rows, drawn_before = by_arm[arm]
        run = folder / arm
        if not (run / "metrics.jsonl").is_file() or read_metrics(run)[-1]["step"] < config.grpo.steps:
            train(load_config(RECIPES / name, [*common, rows, f"output_dir={run}"]))
        curves[arm] = curve_of(read_metrics(run), config.grpo.prompts_per_step, drawn_before)
    return curves


def benchmark(
    seeds: Sequence[int], arms: Sequence[str], is_tiny: bool, folder: pathlib.Path, console: Console
) -> dict[str, Any]:
    """Runs every seed and prints the comparison. Returns the curves and the pairs."""
    curves: dict[int, dict[str, Curve]] = {}
    for seed in seeds:
        with (folder / f"seed{seed}.log").open("a") as log, contextlib.redirect_stdout(log):
            curves[seed] = run_seed(seed, arms, is_tiny, folder / f"seed{seed}")
    report: dict[str, Any] = {
        "curves": {seed: {arm: curve._asdict() for arm, curve in of.items()} for seed, of in curves.items()}
    }
    for arm in arms[1:]:
        pairs = {seed: compare(of["uniform"], of[arm]) for seed, of in curves.items()}
        ratios = [pair["prompts_ratio"] for pair in pairs.values()]
        report[arm] = {
            "pairs": pairs,
            "spread_ratio": statistics.median(pair["spread_ratio"] for pair in pairs.values()),
            "prompts_ratio": statistics.median(ratios),
            "half_ratio": statistics.median(pair["half_ratio"] for pair in pairs.values()),
            "sign_test": sign_test(ratios),
        }
        console.print(_table(arm, pairs))
        found = report[arm]
        console.print(
            f"{arm}, medians: {found['spread_ratio']:.2f}x the groups with a spread, prompts to equal accuracy "
            f"uniform/{arm} {found['prompts_ratio']:.2f} (half of the way {found['half_ratio']:.2f}); more than 1 in "
            f"{sum(ratio > 1 for ratio in ratios)} of {len(ratios)} pairs (sign test p = {found['sign_test']:.3f})"
        )
    return report


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """The command; returns what `--json` writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", default="0,1,2,3,4", help="one pair of runs for each (default: 0,1,2,3,4)")
    parser.add_argument("--arms", default=",".join(ARMS), help="uniform, and what is compared with it (default: all)")
    parser.add_argument("--folder", type=pathlib.Path, help="keep the runs there, and go on with those it holds")
    parser.add_argument("--tiny", action="store_true", help="shrink everything, to try the benchmark itself")
    parser.add_argument("--json", type=pathlib.Path, help="write the numbers to this file")
    arguments = parser.parse_args(argv)
    if not all(text.isdecimal() for text in arguments.seeds.split(",")):
        parser.error(f"--seeds must be whole numbers with commas between them, got {arguments.seeds!r}")
    arms = arguments.arms.split(",")
    if arms[0] != "uniform" or not set(arms) <= set(ARMS):
        parser.error(f"--arms must begin with uniform and name some of {', '.join(ARMS)}, got {arguments.arms!r}")
    seeds = [int(text) for text in arguments.seeds.split(",")]
    with tempfile.TemporaryDirectory() as scratch:
        folder = pathlib.Path(scratch) if arguments.folder is None else arguments.folder.resolve()
        folder.mkdir(parents=True, exist_ok=True)
        return run_and_report(arguments, lambda console: benchmark(seeds, arms, arguments.tiny, folder, console))


def _table(arm: str, pairs: Mapping[int, Mapping[str, float]]) -> Table:
    table = Table(title=f"{arm} against uniform")
    for name in (
        "seed",
        "spread",
        "ratio",
        "last accuracy",
        "equal accuracy",
        "prompts",
        "ratio",
        "to half of it",
        "ratio",
    ):
        table.add_column(name, justify="right")
    for seed, pair in pairs.items():
        table.add_row(
            str(seed),
            f"{pair['spread']:.1%} / {pair['spread_uniform']:.1%}",
            f"{pair['spread_ratio']:.2f}",
            f"{pair['last']:.1%} / {pair['last_uniform']:.1%}",
            f"{pair['accuracy']:.1%}",
            f"{pair['prompts']:,.0f} / {pair['prompts_uniform']:,.0f}",
            f"{pair['prompts_ratio']:.2f}",
            f"{pair['half']:,.0f} / {pair['half_uniform']:,.0f}",
            f"{pair['half_ratio']:.2f}",
        )
    return table


def _ratio(uniform: float, other: float) -> float:
    return uniform / other if other else math.nan


def _smoothed(values: Sequence[float]) -> list[float]:
    """Each value as the mean of up to `SMOOTHED` values around it; the first, which all runs share, as it is."""
    reach = SMOOTHED // 2
    return [values[0], *(statistics.fmean(values[i - reach : i + reach + 1]) for i in range(1, len(values)))]


if __name__ == "__main__":
    main()
