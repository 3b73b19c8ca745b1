"""One command for an accelerator that is at hand for a short while: the benchmarks that exist, in order of their worth.

    python benchmarks/on_device.py --budget 480 [--out FOLDER] [--parts update,decode,...] [--tiny]

Each part is a process of its own, which ends with the budget (seconds of all together). After each part FOLDER has its
JSON, and `on_device.json` and `on_device.md`, the numbers of all so far, as a table, with what did not run and why.
"""

import argparse
import json
import os
import pathlib
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import yaml

HERE = pathlib.Path(__file__).resolve().parent
LEAST_SECONDS = 5  # a part that has less than this left is not begun
KERNELS = ("xla", "cudnn")
ARCHITECTURE = {  # Qwen3-0.6B; the byte tokenizer uses few of its ids
    "family": "qwen3",
    "vocab_size": 151936,
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_layers": 28,
    "num_heads": 16,
    "num_kv_heads": 8,
    "head_dim": 128,
}
TINY_ARCHITECTURE = {"family": "qwen3", "hidden_size": 32, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2}

Row = tuple[str, str]  # what was measured, the number with its unit


class Part(NamedTuple):
    """One measurement.

    Attributes:
      name: for `--parts` and files.
      command: (folder of the results, whether to shrink everything) -> the arguments after `python`.
      rows: (folder of the results) -> lines of the table.
    """

    name: str
    command: Callable[[pathlib.Path, bool], list[str]]
    rows: Callable[[pathlib.Path], list[Row]]


def updates(name: str, arguments: Sequence[str]) -> Part:
    """A part of `train_step.py --preset gpu`."""

    def command(folder: pathlib.Path, tiny: bool) -> list[str]:
        shrunk = ["--tiny", "--repeats", "1", "--workloads", "4k", "--shapes", "0.6b"] if tiny else []
        file = str(folder / f"{name}.json")
        return [str(HERE / "train_step.py"), "--preset", "gpu", *arguments, *shrunk, "--json", file]

    def rows(folder: pathlib.Path) -> list[Row]:
        found = []
        for result in _read(folder / f"{name}.json")["updates"]:
            what = f"update, {result['shape']}, {result['workload']}, {result['attention']}"
            share = "" if result["mfu"] is None else f", MFU {result['mfu']:.1%}"
            memory = "" if result["peak_bytes"] is None else f", peak {result['peak_bytes'] / 1e9:.1f} GB"
            found.append((what, f"{result['tokens_per_second']:.0f} tokens/s{share}{memory}"))
        return found

    return Part(name, command, rows)


def _decode_command(folder: pathlib.Path, tiny: bool) -> list[str]:
    shrunk = ["--tiny", "--repeats", "1", "--workloads", "rows64", "--shapes", "0.6b"] if tiny else []
    file = str(folder / "decode.json")
    full = ["--preset", "gpu", "--engines", "tandem", "--workloads", "rows64,rows256", "--repeats", "3"]
    return [str(HERE / "rollout.py"), *full, *shrunk, "--json", file]


def _decode_rows(folder: pathlib.Path) -> list[Row]:
    return [
        (
            f"decode, {result['shape']}, {result['workload']}",
            f"{result['tokens_per_second']:.0f} tokens/s, {result['share']:.1%} of the memory bandwidth",
        )
        for result in _read(folder / "decode.json")["results"]
    ]


def _step_command(folder: pathlib.Path, tiny: bool) -> list[str]:
    recipe = {
        "output_dir": str(folder / "step"),
        "model": {"dtype": "bfloat16", "remat": "block", "arch": TINY_ARCHITECTURE if tiny else ARCHITECTURE},
        "data": {"source": "arithmetic", "args": {"operation": "add", "digits": 2}, "max_prompt_length": 64},
        "rewards": {"functions": ["rewards.number:exact_number_strict"]},
        "sampling": {"max_completion_length": 8 if tiny else 256},
        "grpo": {"steps": 2 if tiny else 5, "prompts_per_step": 2 if tiny else 32, "max_tokens_per_microbatch": 16384},
        "checkpoint": {"overwrite": True},
        "eval": {"every": 0},
    }
    file = folder / "step.yml"
    file.write_text(yaml.safe_dump(recipe))
    return ["-m", "rl.cli", "train", str(file)]


def _step_rows(folder: pathlib.Path) -> list[Row]:
    """The last step: the first ones compile."""
    last = json.loads((folder / "step" / "metrics.jsonl").read_text().splitlines()[-1])
    (folder / "step.json").write_text(json.dumps(last, indent=2) + "\n")
    return [
        ("whole GRPO step", f"{last['seconds/step']:.2f} s"),
        ("log-probs, sampler against trainer, bfloat16, mean", f"{last['logprob_difference/mean']:.2e} nats"),
        ("log-probs, sampler against trainer, bfloat16, max", f"{last['logprob_difference/max']:.2e} nats"),
        ("peak memory of the run", f"{last['peak_memory_gb']:.1f} GB"),
    ]


def _quickstart_command(folder: pathlib.Path, tiny: bool) -> list[str]:
    stages = [f"output_dir={folder / 'quickstart'}"]
    if tiny:  # both stages would be minutes: the second one alone, from nothing, for two steps
        arch = json.dumps(TINY_ARCHITECTURE)
        small = [
            "grpo.steps=2",
            "optimizer.warmup_updates=0",
            "grpo.prompts_per_step=2",
            "data.eval_size=2",
            f"model.arch={arch}",
            "eval.every=0",
        ]
        recipe = str(HERE.parent / "examples/arithmetic/grpo.yml")
        return ["-m", "rl.cli", "train", recipe, *stages, *small, "model.source=null", "sampling.slots=null"]
    return [str(HERE.parent / "examples/arithmetic/run.py")]


def _quickstart_rows(folder: pathlib.Path) -> list[Row]:
    said = (folder / "quickstart.log").read_text().splitlines()
    return [("quickstart", line.strip()) for line in said if "before GRPO" in line or " s in all" in line]


PARTS = (
    updates("update", ["--shapes", "0.6b,1.7b"]),
    Part("decode", _decode_command, _decode_rows),
    Part("step", _step_command, _step_rows),
    *(
        updates(kernel, ["--shapes", "0.6b", "--workloads", "8k", "--set", f"model.attention={kernel}"])
        for kernel in KERNELS
    ),
    Part("quickstart", _quickstart_command, _quickstart_rows),
)


def _read(file: pathlib.Path) -> dict[str, Any]:
    return json.loads(file.read_text())


def run_part(part: Part, folder: pathlib.Path, tiny: bool, seconds: float) -> dict[str, Any]:
    """Runs a part for at most so many seconds; its result holds `rows`, or `not_run` with the reason."""
    if seconds < LEAST_SECONDS:
        return {"not_run": f"{max(seconds, 0):.0f} s were left of the budget"}
    paths = [str(HERE.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    log = folder / f"{part.name}.log"
    start = time.perf_counter()
    with log.open("w") as file:
        try:
            done = subprocess.run(
                [sys.executable, *part.command(folder, tiny)],
                stdout=file,
                stderr=subprocess.STDOUT,
                timeout=seconds,
                cwd=folder,
                env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
            )
        except subprocess.TimeoutExpired:
            return {
                "not_run": f"it was not done in the {seconds:.0f} s that were left; {log.name} says how far it came"
            }
    taken = round(time.perf_counter() - start, 1)
    if done.returncode:
        lines = log.read_text().strip().splitlines() or ["nothing"]
        return {"not_run": f"exit status {done.returncode}: {lines[-1]}", "seconds": taken}
    try:
        return {"rows": part.rows(folder), "seconds": taken}
    except (OSError, KeyError, ValueError) as error:  # the parts after it still have their time
        return {"not_run": f"its results cannot be read: {type(error).__name__}: {error}", "seconds": taken}


def table(results: dict[str, dict[str, Any]]) -> str:
    """The results so far as Markdown."""
    lines = ["| measured | result |", "|---|---|"]
    lines += [f"| {what} | {value} |" for result in results.values() for what, value in result.get("rows", ())]
    left = [f"- {name}: {result['not_run']}" for name, result in results.items() if "not_run" in result]
    return "\n".join([*lines, *(["", "Did not run:", "", *left] if left else [])]) + "\n"


def main(argv: Sequence[str] | None = None) -> dict[str, dict[str, Any]]:
    """Runs the parts, writes the files after each, and returns what on_device.json holds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [part.name for part in PARTS]
    parser.add_argument("--budget", type=float, default=480, help="seconds for all parts together (default: 480)")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("on_device"), help="folder of the results")
    parser.add_argument("--parts", default=",".join(names), help=f"some of {','.join(names)} (default: all)")
    parser.add_argument("--tiny", action="store_true", help="shrink everything, to try the command itself")
    arguments = parser.parse_args(argv)
    wanted = arguments.parts.split(",")
    if unknown := [name for name in wanted if name not in names]:
        parser.error(f"--parts must name some of {', '.join(names)}, got {', '.join(unknown)}")
    folder = arguments.out.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    end = time.perf_counter() + arguments.budget
    results: dict[str, dict[str, Any]] = {}
    for part in PARTS:
        if part.name in wanted:
            results[part.name] = run_part(part, folder, arguments.tiny, end - time.perf_counter())
            (folder / "on_device.json").write_text(json.dumps(results, indent=2) + "\n")
            (folder / "on_device.md").write_text(table(results))
            print(f"{part.name}: {results[part.name].get('not_run', 'done')}", flush=True)
    print(table(results))
    return results


if __name__ == "__main__":
    main()
