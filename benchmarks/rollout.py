"""Rollout throughput of Tandem's sampler, next to Tunix' sampler and to transformers' generate as TRL calls it.

    python benchmarks/rollout.py [--shapes a,b,c] [--workloads dense,ragged] [--engines tandem,tunix,trl] [--json FILE]
    python benchmarks/rollout.py --preset gpu
    python benchmarks/rollout.py --steady-state

All engines run in this process on the same weights, in turn, so that whatever else the machine does meets all of them.
The models are random, so nothing is downloaded. Shapes, workloads and targets are in `shapes.py`.
"""

import argparse
import dataclasses
import pathlib
import statistics
import tempfile
from collections.abc import Sequence
from typing import Any

import shapes
from command import add_options, check_options, run_and_report, set_environment
from engines import PEERS, Engine, Tandem, build_engine, check_same_logits, is_installed, warm_up
from floor import products_probe
from machine import copy_probe, matmul_probe
from results import Result, bandwidth_share, compute_share, summarize, table_of
from rich.console import Console
from steady_state import MAX_GROWTH, measure_steady_state
from turns import Call, alternate, timed
from weights import Weights

from rl.models.files import hf

LOGIT_TOLERANCE = {"float32": 1e-3, "bfloat16": 0.25}
ENGINES = (Tandem.name, *PEERS)
PRESETS = {
    "cpu": (shapes.CPU_SHAPES, shapes.CPU_WORKLOADS, ["a", "b"]),  # c takes an hour
    "gpu": (shapes.GPU_SHAPES, shapes.GPU_WORKLOADS, list(shapes.GPU_SHAPES)),
}


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Measures, prints, and returns what `--json` writes."""
    arguments = parse_arguments(argv)
    set_environment()

    def run(console: Console) -> dict[str, Any]:
        if arguments.steady_state:
            return {"steady_state": run_steady_state(arguments, console)}
        return run_comparison(arguments, console)

    return run_and_report(arguments, run)


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line; lists are checked against the preset, and engines left open become those that are installed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--preset", choices=sorted(PRESETS), default="cpu", help="what to measure (default: cpu)")
    shape_help = "cpu: a,b,c (default a,b); gpu: 0.6b,1.7b"
    add_options(parser, shape_help, "cpu: dense,ragged; gpu: rows64,rows128,rows256 (default: all)", repeats=5)
    parser.add_argument("--slots", type=int, help="completions that Tandem decodes at a time (default: all of a call)")
    parser.add_argument(
        "--steady-state", action="store_true", help="instead: many calls of the first shape, Tandem only"
    )
    parser.add_argument("--steady-calls", type=int, default=200, help="calls of --steady-state (default: 200)")
    arguments = parser.parse_args(argv)
    known_shapes, known_workloads, default_shapes = PRESETS[arguments.preset]
    if arguments.engines is None:
        arguments.engines = default_engines(arguments.preset, arguments.tiny)
    arguments.shapes = arguments.shapes or default_shapes
    arguments.workloads = arguments.workloads or list(known_workloads)
    known = {"shapes": known_shapes, "workloads": known_workloads, "engines": ENGINES}
    check_options(parser, arguments, known, is_installed)
    if arguments.steady_calls < 2:
        parser.error(f"--steady-calls must be >= 2, got {arguments.steady_calls}")
    return arguments


def default_engines(preset: str, tiny: bool) -> list[str]:
    """The engines that are installed; on a GPU without Tunix, and with transformers only if torch sees the GPU."""
    if preset == "cpu":
        return [name for name in ENGINES if is_installed(name)]
    if not is_installed("trl"):
        return [Tandem.name]
    import torch

    return [Tandem.name, "trl"] if tiny or torch.cuda.is_available() else [Tandem.name]


def run_comparison(arguments: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Measures every shape and workload asked for, and prints the table."""
    known_shapes, known_workloads, _ = PRESETS[arguments.preset]
    results: list[Result] = []
    all_peaks: list[float] = []
    if arguments.preset == "cpu":
        probe, unit = matmul_probe(256 if arguments.tiny else 2048), "operations per second in float32 matrix products"
    else:
        probe, unit = copy_probe(1 << (20 if arguments.tiny else 30)), "bytes per second in copies"
    for shape in arguments.shapes:
        config = shapes.tiny_shape(known_shapes[shape]) if arguments.tiny else known_shapes[shape]
        with tempfile.TemporaryDirectory() as scratch:
            weights, folder = Weights(config), pathlib.Path(scratch) / "model"
            if set(arguments.engines) & set(PEERS):
                hf.save_folder(folder, config, weights.params)
            for name in arguments.workloads:
                workload = shapes.tiny_workload(known_workloads[name]) if arguments.tiny else known_workloads[name]
                console.print(f"{shape} ({config.num_parameters / 1e6:.1f}M parameters), {name} ...")
                engines = [
                    build_engine(engine, weights, folder, workload, arguments.slots) for engine in arguments.engines
                ]
                check_same_logits(engines, config.vocab_size, LOGIT_TOLERANCE[config.dtype])
                for engine in engines:
                    warm_up(engine, workload, config.vocab_size)

                # In each round every engine gets the same prompts and seed.
                def call(engine: Engine, repeat: int, workload=workload, vocab_size=config.vocab_size) -> Call:
                    prompts = workload.prompts(vocab_size, 1000 + repeat)
                    return timed(lambda: sum(map(len, engine.generate(prompts, 1000 + repeat))))

                calls, peaks = alternate(engines, arguments.repeats, probe, call)
                kv_bytes = {engine.name: engine.kv_bytes() for engine in engines}
                peak = statistics.median(peaks)
                if arguments.preset == "cpu":
                    share = compute_share(config, peak)
                else:
                    share = bandwidth_share(config, workload, peak)
                target = None if arguments.tiny else shapes.TARGETS.get((shape, name))
                kv_target = None if arguments.tiny else shapes.KV_TARGETS.get(name)
                share_target = None if arguments.tiny else shapes.SHARE_TARGETS.get(shape)
                bars = target, kv_target, share_target
                results += summarize(shape, name, workload, calls, kv_bytes, share, *bars)
                all_peaks += peaks
                if arguments.preset == "cpu" and workload.mean_share is None:
                    print_floors(console, weights, workload, results[-len(engines) :])
    peak = statistics.median(all_peaks)
    console.print(table_of(results, f"share: of what the machine can do, meanwhile {peak / 1e9:.1f}e9 {unit}"))
    return {"peak_per_second": peak, "results": [dataclasses.asdict(result) for result in results]}


def run_steady_state(arguments: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Measures the first shape and prints what was found."""
    shape, workload = arguments.shapes[0], shapes.STEADY_WORKLOAD
    config = PRESETS[arguments.preset][0][shape]
    if arguments.tiny:
        config, workload = shapes.tiny_shape(config), shapes.tiny_workload(workload)
    steady = measure_steady_state(config, workload, arguments.steady_calls)
    early, late = steady.early_bytes / 1e6, steady.late_bytes / 1e6
    console.print(
        f"{shape}: {steady.num_calls} calls after the warm-up compiled {steady.num_compiles} programs (must be 0); "
        f"resident memory {early:.0f} MB after {steady.early_call} calls, {late:.0f} MB after the last "
        f"(may grow by {MAX_GROWTH:.0%}): {'met' if steady.met else 'missed'}"
    )
    return {"shape": shape, **dataclasses.asdict(steady)}


def print_floors(console: Console, weights: Weights, workload: shapes.Workload, results: Sequence[Result]) -> None:
    """How fast the matrix products alone would let a dense engine be, measured after the calls, and how it compares."""
    probes = {
        "matrix products with weights alone": products_probe(weights, workload),
        "and those of attention": products_probe(weights, workload, with_attention=True),
    }
    peers = [result.tokens_per_second for result in results if result.engine != Tandem.name]
    seconds: dict[str, list[float]] = {name: [] for name in probes}
    for _ in range(5):
        for name, measure in probes.items():
            seconds[name].append(measure())
    for name, measured in seconds.items():
        rate = workload.num_rows / statistics.median(measured)
        line = f"{name}: {1000 * statistics.median(measured):.2f} ms a step, at most {rate:.0f} tokens/s"
        console.print(f"{line}, {rate / max(peers):.2f}x the better peer" if peers else line)


if __name__ == "__main__":
    main()
