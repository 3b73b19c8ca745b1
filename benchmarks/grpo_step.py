"""Seconds of a whole GRPO step (rollout, rewards, reference, update): Tandem next to the trainers of Tunix and TRL.

    python benchmarks/grpo_step.py [--shapes a,b,c] [--workloads i,i-ragged,ii] [--engines ...] [--json FILE]

All trainers run in this process, in turn, each in its own loop, from the same random weights and on the same prompts;
each draws its own completions, whose lengths follow from EOS ids spread over the vocabulary. Shapes, workloads and
targets are in `shapes.py`.
"""

from collections.abc import Sequence
from typing import Any

import shapes
from command import run_and_report, set_environment
from comparison import check_trainer_options, compare_trainers, trainer_parser


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Measures, prints, and returns what `--json` writes."""
    parser = trainer_parser(__doc__)
    arguments = parser.parse_args(argv)
    check_trainer_options(parser, arguments)
    set_environment()
    return run_and_report(
        arguments, lambda console: compare_trainers(arguments, console, draw=True, targets=shapes.STEP_TARGETS)
    )


if __name__ == "__main__":
    main()
