"""The quickstart: warm-starts a small policy on sums of four digits, trains it with GRPO, and shows what changed.

    python examples/arithmetic/run.py [key=value ...]        # for example pure_nnx=false; overrides reach both stages

Writes runs/arithmetic-sft and runs/arithmetic. Stopped and started again, it goes on where it was.
"""

import pathlib
import sys
import time

from rl import grpo_trainer, sft_trainer
from rl.config.load import load_config
from rl.devices.programs import use_compilation_cache
from rl.tools.evaluate import evaluate_source
from rl.tools.report import report

HERE = pathlib.Path(__file__).resolve().parent


def main(overrides: list[str]) -> None:
    """Both stages, then the comparison."""
    start = time.perf_counter()
    warm_up = load_config(HERE / "sft.yml", overrides)
    use_compilation_cache(warm_up)
    if not (pathlib.Path(warm_up.output_dir or "") / "export").is_dir():
        sft_trainer.train(warm_up)
    run = grpo_trainer.train(load_config(HERE / "grpo.yml", overrides))
    before, _ = evaluate_source(HERE / "grpo.yml", overrides)
    after, where = evaluate_source(run)
    print(f"\nheld-out greedy accuracy on {after.num_prompts} sums:")
    print(f"{before.accuracy:.1%} before GRPO, {after.accuracy:.1%} at {where}")
    print(f"{'prompt':>10}  {'before':>8}  {'after':>8}")
    for old, new in list(zip(before.samples, after.samples, strict=True))[:6]:
        print(f"{new['prompt']:>10}  {old['completion']:>8}  {new['completion']:>8}")
    picture = run / "reward.png"
    report.main([str(run), "--output", str(picture)])
    print(f"{time.perf_counter() - start:.0f} s in all; reward curve: {picture}")


if __name__ == "__main__":
    main(sys.argv[1:])
