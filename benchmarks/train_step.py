"""Seconds of an update, its reference pass included: Tandem next to the trainers of Tunix and TRL.

    python benchmarks/train_step.py [--shapes a,b,c] [--workloads i,i-ragged,ii] [--engines ...] [--apart] [--json FILE]
    python benchmarks/train_step.py --preset gpu [--shapes 0.6b,1.7b] [--workloads 4k,8k,16k] [--set model.remat=block]
    python benchmarks/train_step.py --memory [--platform tpu]

All trainers run in this process, in turn (`--apart`: one after the other), each in its own loop, from the same random
weights and on the same prompts, completions and rewards; loss and gradient norm of the first batch must agree before
anything is timed. Tandem's step is also compiled in both flavours, whose operations and bytes must be equal. `--preset
gpu` measures Tandem alone on the accelerator at hand (`accelerator.py`). `--memory` compiles steps with a large
vocabulary instead, and runs nothing. Shapes, workloads and targets are in `shapes.py`.
"""

from collections.abc import Sequence
from typing import Any

import shapes
from accelerator import check_accelerator_options, measure_updates
from command import run_and_report, set_environment
from comparison import check_trainer_options, compare_trainers, trainer_parser
from flavours import compare_flavours
from memory import compare_memory
from rich.console import Console
from trainers import TandemTrainer


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Measures, prints, and returns what `--json` writes."""
    parser = trainer_parser(__doc__)
    parser.add_argument(
        "--preset", choices=("cpu", "gpu"), default="cpu", help="gpu: shapes 0.6b,1.7b in rows of 4k,8k,16k tokens"
    )
    parser.add_argument("--memory", action="store_true", help="instead: temporary memory of compiled steps")
    parser.add_argument(
        "--platform", choices=("cpu", "tpu"), default="cpu", help="of --memory (default: cpu); tpu: v5e, through libtpu"
    )
    arguments = parser.parse_args(argv)
    check = check_accelerator_options if arguments.preset == "gpu" else check_trainer_options
    check(parser, arguments)
    set_environment()

    def run(console: Console) -> dict[str, Any]:
        if arguments.memory:
            return {"memory": compare_memory(console, arguments.platform, arguments.settings, arguments.tiny)}
        if arguments.preset == "gpu":
            return measure_updates(arguments, console)
        flavours = {}
        if TandemTrainer.name in arguments.engines:
            flavours = compare_flavours(console, arguments.shapes, arguments.settings, arguments.tiny)
        return flavours | compare_trainers(arguments, console, draw=False, targets=shapes.UPDATE_TARGETS)

    return run_and_report(arguments, run)


if __name__ == "__main__":
    main()
