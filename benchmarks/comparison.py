"""Whole trainers side by side: builds them on the same weights and batches, checks them, times them."""

import argparse
import contextlib
import dataclasses
import pathlib
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import shapes
from command import add_options, check_options
from machine import Probe, matmul_probe
from peer_trainers import PEER_TRAINERS
from rich.console import Console
from step_results import StepResult, model_operations, steps_table, summarize_steps
from trainers import Batch, Outcome, TandemTrainer, Trainer, check_same_outcome, is_installed, make_batches
from turns import Call, alternate, timed
from weights import Weights

from rl.devices.host_memory import return_memory
from rl.models.files import hf

TRAINERS = (TandemTrainer.name, *PEER_TRAINERS)
TOLERANCE = 1e-3  # of loss and gradient norm, as a share


def trainer_parser(docstring: str | None) -> argparse.ArgumentParser:
    """The options of both comparisons of trainers."""
    parser = argparse.ArgumentParser(description=(docstring or "").split("\n\n")[0])
    add_options(parser, "a,b,c (default: b)", "i,i-ragged,ii (default: all)", repeats=3)
    parser.add_argument(
        "--set",
        dest="settings",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="a setting of Tandem's configuration, such as grpo.max_tokens_per_microbatch=2048; may be given again",
    )
    parser.add_argument(
        "--apart",
        action="store_true",
        help="one trainer after the other instead of in turn: for shapes of which two do not fit into memory",
    )
    return parser


def check_trainer_options(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> None:
    """Fills in what was left open and refuses names that mean nothing."""
    arguments.shapes = arguments.shapes or ["b"]
    arguments.workloads = arguments.workloads or list(shapes.TRAIN_WORKLOADS)
    if arguments.engines is None:
        arguments.engines = [name for name in TRAINERS if is_installed(name)]
    known = {"shapes": shapes.CPU_SHAPES, "workloads": shapes.TRAIN_WORKLOADS, "engines": TRAINERS}
    check_options(parser, arguments, known, is_installed)


def compare_trainers(
    arguments: argparse.Namespace,
    console: Console,
    draw: bool,
    targets: Mapping[tuple[str, str], float],
) -> dict[str, Any]:
    """Measures every shape and workload asked for, and prints the table.

    Args:
      draw: whole steps with their rollout; otherwise updates with their reference pass, on completions that are given,
        and a reference that differs from the policy, so that there is a KL term to compare.
    """
    results: list[StepResult] = []
    all_peaks: list[float] = []
    probe = matmul_probe(256 if arguments.tiny else 2048)
    for shape in arguments.shapes:
        config = shapes.tiny_shape(shapes.CPU_SHAPES[shape]) if arguments.tiny else shapes.CPU_SHAPES[shape]
        with tempfile.TemporaryDirectory() as scratch:
            weights = Weights(config)
            sides = Sides(weights, weights if draw else Weights(config, seed=1), pathlib.Path(scratch))
            for name in arguments.workloads:
                console.print(f"{shape} ({config.num_parameters / 1e6:.1f}M parameters), {name} ...")
                workload = shapes.TRAIN_WORKLOADS[name]
                workload = shapes.tiny_workload(workload) if arguments.tiny else workload
                batches = make_batches(workload, config.vocab_size, 1 + arguments.repeats, with_completions=not draw)
                calls, peaks = _measure(arguments, sides, workload, batches, probe)
                added = summarize_steps(
                    shape,
                    name,
                    workload.num_rows,
                    calls,
                    None if draw else [model_operations(config, batch) for batch in batches[1:]],
                    statistics.median(peaks),
                    None if arguments.tiny else targets.get((shape, name)),
                )
                console.print("  " + ", ".join(f"{result.engine} {result.seconds:.4g} s" for result in added))
                results += added
                all_peaks += peaks
    peak = statistics.median(all_peaks)
    caption = "ratio: to the better peer's time; target: what it may be at most"
    if not draw:
        caption += f"; share: of the {peak / 1e9:.1f}e9 operations per second of float32 matrix products meanwhile"
    console.print(steps_table(results, caption))
    return {"peak_per_second": peak, "results": [dataclasses.asdict(result) for result in results]}


class Sides:
    """Policy and reference, as weights and as Hugging Face folders below `scratch`."""

    def __init__(self, policy: Weights, reference: Weights, scratch: pathlib.Path) -> None:
        self.policy, self.reference = policy, reference
        self.folders = (scratch / "policy", scratch / "reference")
        for folder, side in zip(self.folders, (policy, reference), strict=True):
            hf.save_folder(folder, policy.policy.config, side.params)


def _measure(
    arguments: argparse.Namespace, sides: Sides, workload: shapes.Workload, batches: Sequence[Batch], probe: Probe
) -> tuple[dict[str, list[Call]], list[float]]:
    """The timed calls by engine, and what `probe` measured between them; the first step of each is not timed."""
    first: dict[str, Outcome] = {}
    calls: dict[str, list[Call]] = {}
    peaks: list[float] = []
    for engines in [[engine] for engine in arguments.engines] if arguments.apart else [arguments.engines]:
        own_calls, own_peaks = _take_turns(engines, first, arguments, sides, workload, batches, probe)
        calls |= own_calls
        peaks += own_peaks
        # What a trainer's programs and loops hold would add up.
        jax.clear_caches()
        return_memory()
    return calls, peaks


def _take_turns(
    engines: Sequence[str],
    first: dict[str, Outcome],
    arguments: argparse.Namespace,
    sides: Sides,
    workload: shapes.Workload,
    batches: Sequence[Batch],
    probe: Probe,
) -> tuple[dict[str, list[Call]], list[float]]:
    """Those of `engines`, which are in memory together; adds their first outcomes to `first`."""
    with contextlib.ExitStack() as stack:
        trainers: list[Trainer] = []
        for engine in engines:
            if engine == TandemTrainer.name:
                trainer = TandemTrainer(sides.policy, sides.reference, workload, batches, arguments.settings)
            else:
                trainer = PEER_TRAINERS[engine](sides.policy.policy.config, *sides.folders, workload, batches)
            stack.callback(trainer.close)
            trainers.append(trainer)
        first.update((trainer.name, trainer.step()) for trainer in trainers)  # compiles
        if batches[0].completions is not None:
            check_same_outcome(first, TOLERANCE)
        return alternate(trainers, arguments.repeats, probe, _timed_step)


def _timed_step(trainer: Trainer, _: int) -> Call:
    return timed(lambda: trainer.step().num_tokens)
