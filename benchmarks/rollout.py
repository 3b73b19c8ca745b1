"""Rollout throughput of Tandem's sampler, next to Tunix' sampler and to transformers' generate as TRL calls it.

    python benchmarks/rollout.py [--shapes a,b,c] [--workloads dense,ragged] [--engines tandem,tunix,trl] [--json FILE]
    python benchmarks/rollout.py --preset gpu
    python benchmarks/rollout.py --steady-state

All engines run in this process on the same weights, in turn, so that whatever else the machine does meets all of them.
The models are random, so nothing is downloaded. Shapes, workloads and targets are in `shapes.py`.
"""

import argparse
import dataclasses
import json
import os
import pathlib
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from typing import Any

import shapes
from engines import PEERS, Engine, Tandem, Weights, build_engine, check_same_logits, is_installed, warm_up
from machine import Probe, copy_probe, matmul_probe
from results import Call, Result, bandwidth_share, compute_share, summarize, table_of
from rich.console import Console
from steady_state import MAX_GROWTH, measure_steady_state

from rl.metrics import CompileCounter
from rl.models import hf

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
    console = Console(width=None if sys.stdout.isatty() else 150)
    report: dict[str, Any] = {"arguments": vars(arguments), "load_at_start": os.getloadavg()}
    if arguments.steady_state:
        report["steady_state"] = run_steady_state(arguments, console)
    else:
        report |= run_comparison(arguments, console)
    report["load_at_end"] = os.getloadavg()
    console.print(
        f"load (1 min): {report['load_at_start'][0]:.1f} at the start, {report['load_at_end'][0]:.1f} at the end"
    )
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(report, indent=2, default=str) + "\n")
    return report


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line; lists are checked against the preset, and engines left open become those that are installed."""
    names = lambda text: text.split(",")  # noqa: E731
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--preset", choices=sorted(PRESETS), default="cpu", help="what to measure (default: cpu)")
    parser.add_argument("--shapes", type=names, help="cpu: a,b,c (default a,b); gpu: 0.6b,1.7b")
    parser.add_argument("--workloads", type=names, help="cpu: dense,ragged; gpu: rows64,rows128,rows256 (default: all)")
    parser.add_argument("--engines", type=names, help="tandem,tunix,trl (default: those that are installed)")
    parser.add_argument("--slots", type=int, help="completions that Tandem decodes at a time (default: all of a call)")
    parser.add_argument("--repeats", type=int, default=5, help="timed calls per engine (default: 5)")
    parser.add_argument(
        "--steady-state", action="store_true", help="instead: many calls of the first shape, Tandem only"
    )
    parser.add_argument("--steady-calls", type=int, default=200, help="calls of --steady-state (default: 200)")
    parser.add_argument("--tiny", action="store_true", help="shrink everything, to try the benchmark itself")
    parser.add_argument("--json", type=pathlib.Path, help="write the numbers to this file")
    arguments = parser.parse_args(argv)
    known_shapes, known_workloads, default_shapes = PRESETS[arguments.preset]
    if arguments.engines is None:
        arguments.engines = default_engines(arguments.preset, arguments.tiny)
    arguments.shapes = arguments.shapes or default_shapes
    arguments.workloads = arguments.workloads or list(known_workloads)
    for option, known in (("shapes", known_shapes), ("workloads", known_workloads), ("engines", ENGINES)):
        for name in getattr(arguments, option):
            if name not in known:
                parser.error(f"--{option} must name some of {', '.join(known)}, got {name!r}")
    missing = [name for name in arguments.engines if not is_installed(name)]
    if missing:
        parser.error(f"--engines must name engines that are installed, got {', '.join(missing)}, which are not")
    if arguments.repeats < 1:
        parser.error(f"--repeats must be >= 1, got {arguments.repeats}")
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


def set_environment() -> None:
    """Lets two libraries share one machine; what the caller has set stays."""
    # Threads of torch that spin while they wait lose several times their speed as soon as a core is wanted elsewhere.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    # jax would take most of a GPU's memory at its start, and leave torch none.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")


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
                calls, peaks = alternate(engines, workload, config.vocab_size, arguments.repeats, probe)
                kv_bytes = {engine.name: engine.kv_bytes() for engine in engines}
                peak = statistics.median(peaks)
                if arguments.preset == "cpu":
                    share = compute_share(config, peak)
                else:
                    share = bandwidth_share(config, workload, peak)
                target = None if arguments.tiny else shapes.TARGETS.get((shape, name))
                results += summarize(shape, name, workload, calls, kv_bytes, share, target)
                all_peaks += peaks
    peak = statistics.median(all_peaks)
    console.print(table_of(results, f"share: of what the machine can do, meanwhile {peak / 1e9:.1f}e9 {unit}"))
    return {"peak_per_second": peak, "results": [dataclasses.asdict(result) for result in results]}


def alternate(
    engines: Sequence[Engine], workload: shapes.Workload, vocab_size: int, repeats: int, probe: Probe
) -> tuple[dict[str, list[Call]], list[float]]:
    """Timed calls by engine, and what the machine can do, measured between them.

    In each round every engine gets the same prompts and seed, and another one goes first.
    """
    for engine in engines:
        warm_up(engine, workload, vocab_size)
    calls: dict[str, list[Call]] = {engine.name: [] for engine in engines}
    peaks = []
    for repeat in range(repeats):
        seed = 1000 + repeat
        prompts = workload.prompts(vocab_size, seed)
        first = repeat % len(engines)
        for engine in (*engines[first:], *engines[:first]):
            peaks.append(probe())
            calls[engine.name].append(timed_call(engine, prompts, seed))
    return calls, peaks


def timed_call(engine: Engine, prompts: Sequence[Sequence[int]], seed: int) -> Call:
    """One call, from prompts to token ids on the host."""
    with CompileCounter() as compiles:
        start, cpu_start = time.perf_counter(), time.process_time()
        completions = engine.generate(prompts, seed)
        seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu_start
        return Call(seconds, cpu_seconds, sum(map(len, completions)), compiles.count)


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


if __name__ == "__main__":
    main()
