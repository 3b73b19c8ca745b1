"""What the command lines of the benchmarks have in common: options, their checks, the environment, the report."""

import argparse
import json
import os
import pathlib
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from rich.console import Console


def add_options(parser: argparse.ArgumentParser, shapes: str, workloads: str, repeats: int) -> None:
    """The options of every comparison: `shapes` and `workloads` say what may be named, `repeats` is the default."""
    parser.add_argument("--shapes", type=_names, help=shapes)
    parser.add_argument("--workloads", type=_names, help=workloads)
    parser.add_argument("--engines", type=_names, help="tandem,tunix,trl (default: those that are installed)")
    parser.add_argument("--repeats", type=int, default=repeats, help=f"timed calls per engine (default: {repeats})")
    parser.add_argument("--tiny", action="store_true", help="shrink everything, to try the benchmark itself")
    parser.add_argument("--json", type=pathlib.Path, help="write the numbers to this file")


def check_options(
    parser: argparse.ArgumentParser,
    arguments: argparse.Namespace,
    known: Mapping[str, Collection[str]],
    is_installed: Callable[[str], bool],
) -> None:
    """Ends the program with a message when a list names something that is not in `known`, or an engine is missing."""
    for option, names in known.items():
        for name in getattr(arguments, option):
            if name not in names:
                parser.error(f"--{option} must name some of {', '.join(names)}, got {name!r}")
    missing = [name for name in arguments.engines if not is_installed(name)]
    if missing:
        parser.error(f"--engines must name engines that are installed, got {', '.join(missing)}, which are not")
    if arguments.repeats < 1:
        parser.error(f"--repeats must be >= 1, got {arguments.repeats}")


def set_environment() -> None:
    """Lets two libraries share one machine; what the caller has set stays."""
    # Threads of torch that spin while they wait lose several times their speed as soon as a core is wanted elsewhere.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    # jax would take most of a GPU's memory at its start, and leave torch none.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")


def run_and_report(arguments: argparse.Namespace, run: Callable[[Console], Mapping[str, Any]]) -> dict[str, Any]:
    """Runs, prints the load of the machine before and after, and returns what `--json` writes."""
    console = Console(width=None if sys.stdout.isatty() else 170)
    report: dict[str, Any] = {"arguments": vars(arguments), "load_at_start": os.getloadavg(), **run(console)}
    report["load_at_end"] = os.getloadavg()
    console.print(
        f"load (1 min): {report['load_at_start'][0]:.1f} at the start, {report['load_at_end'][0]:.1f} at the end"
    )
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(report, indent=2, default=str) + "\n")
    return report


def _names(text: str) -> Sequence[str]:
    return text.split(",")
