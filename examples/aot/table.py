"""Runs `grpo compile` on the recipes beside this file for several topologies, and prints one Markdown table.

    python examples/aot/table.py [--only 70b,lora] [--jobs 2] [--folder DIR]

Every case is a process of its own. With --folder its report stays there as NAME.json and NAME.txt, and a case whose
report is there already is not run again.
"""

import argparse
import concurrent.futures
import json
import math
import os
import pathlib
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from typing import Any, NamedTuple

HERE = pathlib.Path(__file__).parent
ONE_ROW = 1536  # tokens of the longest prompt with the longest completion
LORA = ("lora.rank=16", "lora.base_dtype=bfloat16")


class Case(NamedTuple):
    """A recipe on a topology.

    rows: longest sequences whose tokens a piece has on each device that holds rows of its own.
    """

    recipe: str
    topology: str
    tensor: int
    settings: tuple[str, ...] = ()
    slices: int = 1
    rows: int = 2

    @property
    def trained(self) -> str:
        """What is trained: adapters, or all weights."""
        return "LoRA" if self.settings[: len(LORA)] == LORA else "full"

    @property
    def name(self) -> str:
        slices = f"_{self.slices}slices" if self.slices > 1 else ""
        return f"{self.recipe}_{self.trained.lower()}_{self.topology.replace(':', '_')}{slices}"

    @property
    def num_devices(self) -> int:
        return self.slices * math.prod(map(int, self.topology.split(":")[1].split("x")))

    def command(self, json_file: pathlib.Path) -> list[str]:
        """The `grpo compile` of this case."""
        budget = self.rows * ONE_ROW * self.num_devices // self.tensor
        slices = ["--slices", str(self.slices)] if self.slices > 1 else []
        return [
            *("grpo", "compile", str(HERE / f"{self.recipe}.yml"), "--topology", self.topology, *slices),
            *("--json", str(json_file), f"mesh.tensor={self.tensor}", f"grpo.max_tokens_per_microbatch={budget}"),
            *self.settings,
        ]


CASES = (
    Case("qwen3_0.6b", "v5e:2x2", 1, rows=4),
    Case("qwen3_0.6b", "v6e:2x2", 1, LORA, rows=4),
    Case("qwen3_8b", "v5e:8x8", 4),
    Case("qwen3_8b", "v6e:2x4", 4, LORA),
    Case("qwen3_32b", "v5p:4x4x4", 4),
    Case("qwen3_32b", "v6e:4x4", 4, LORA),
    Case("llama3.1_70b", "v5e:16x16", 8),
    Case("llama3.1_70b", "v5e:16x16", 8, slices=2),
    Case("llama3.1_70b", "v6e:4x8", 8, LORA),
    Case("llama3.1_70b", "v5p:4x4x8", 8),
    Case("llama3.1_70b", "v5p:8x16x16", 8, ("grpo.prompts_per_step=512", "mesh.data=16", "mesh.fsdp=16")),
)


def run(case: Case, folder: pathlib.Path) -> dict[str, Any] | str:
    """The case's report, or the last lines of what the command said instead."""
    report = folder / f"{case.name}.json"
    if not report.exists():
        environment = {"JAX_PLATFORMS": "cpu", **os.environ}
        said = folder / f"{case.name}.txt"
        with said.open("w") as file:
            subprocess.run(case.command(report), stdout=file, stderr=subprocess.STDOUT, env=environment)
        if not report.exists():
            return "\n".join(said.read_text().splitlines()[-3:])
    return json.loads(report.read_text())


def line(case: Case, report: dict[str, Any]) -> str:
    """A row of the table."""
    programs = {program["name"]: program for program in report["programs"]}
    worst = max(programs.values(), key=lambda program: program["needed"])
    step = programs["train step"]
    slowest = max(programs.values(), key=lambda program: program["seconds"])
    gib = 2**30
    cells = [
        case.recipe.replace("_", "-"),
        case.trained,
        f"{case.topology}{f' x {case.slices}' if case.slices > 1 else ''} ({report['devices']})",
        " ".join(f"{axis}={size}" for axis, size in report["mesh"].items() if size > 1),
        f"{step['peak'] / gib:.1f}",
        f"{report['kv_budget'] / gib:.1f}",
        f"{worst['name']} {worst['needed'] / gib:.1f} of {report['memory'] / gib:.1f}",
        "fits" if report["fits"] else "does not fit",
        f"{step['flops'] / 1e12:.3g}" if "flops" in step else "-",
        f"{step['roofline_seconds']:.2g}" if "roofline_seconds" in step else "-",
        f"{slowest['seconds']:.0f} ({slowest['name']})",
        f"{max(program['host_bytes'] for program in programs.values()) / gib:.1f}",
    ]
    return f"| {' | '.join(cells)} |"


HEADER = (
    "model",
    "trained",
    "topology (chips)",
    "mesh",
    "train step GiB",
    "left for keys and values GiB",
    "largest need GiB",
    "",
    "TFLOP a chip and update",
    "at least s",
    "longest compile s",
    "host GiB",
)


def main(argv: Sequence[str] | None = None) -> None:
    """Compiles, and prints the table as far as it went."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--only", default="", help="cases whose names contain all of these words, joined by commas")
    parser.add_argument("--jobs", type=int, default=1, help="cases at the same time (default: 1)")
    parser.add_argument("--folder", type=pathlib.Path, help="keep reports here")
    arguments = parser.parse_args(argv)
    words = [word for word in arguments.only.split(",") if word]
    cases = [case for case in CASES if all(word in case.name for word in words)]
    if not cases:
        parser.error(f"--only must be words of {', '.join(case.name for case in CASES)}, got {arguments.only!r}")
    with tempfile.TemporaryDirectory() as scratch, concurrent.futures.ThreadPoolExecutor(arguments.jobs) as pool:
        folder = arguments.folder or pathlib.Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        print(f"| {' | '.join(HEADER)} |\n|{'---|' * len(HEADER)}")
        for case, report in zip(cases, pool.map(lambda case: run(case, folder), cases), strict=True):
            if isinstance(report, str):
                print(f"{case.name} failed: {report}", file=sys.stderr)
            else:
                print(line(case, report), flush=True)


if __name__ == "__main__":
    main()
