"""Updates on one accelerator in bfloat16, with rows of 4k to 16k packed tokens: time, MFU, peak memory. Tandem alone.

MFU is what an update with its reference pass needs at least (`step_results.model_operations`, so neither padding nor
what the backward pass computes again) over its time, as a share of the operations per second that the vendor states for
the device (`rl.tools.programs.topologies.CHIPS`). Peak memory is the device's own count for the process so far: of a
line that did not raise it is known only that it needs no more.
"""

import argparse
import dataclasses
import gc
import statistics
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
import shapes
from command import check_options
from rich.console import Console
from rich.table import Table
from step_results import model_operations
from trainers import Batch, TandemTrainer, make_batches
from turns import Call, timed
from weights import Weights

from rl.config.load import load_config
from rl.models.config import ModelConfig
from rl.tools.programs.topologies import CHIPS
from rl.training.packing import PackingPlan


@dataclasses.dataclass(frozen=True)
class UpdateResult:
    """One line of the table.

    attention: back end, and why it is not the best one of the platform where it is not.
    seconds: median over the calls. num_tokens: positions that an update computes.
    mfu: None where nothing is known of the device.
    peak_bytes: None where the device does not count (CPU). is_own_peak: whether this line raised it.
    """

    shape: str
    workload: str
    device: str
    attention: str
    seconds: float
    min_seconds: float
    max_seconds: float
    num_tokens: int
    tokens_per_second: float
    mfu: float | None
    peak_bytes: int | None
    is_own_peak: bool
    num_compiles: int
    calls: list[Call]


def check_accelerator_options(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> None:
    """Fills in what was left open and refuses names that mean nothing."""
    arguments.shapes = arguments.shapes or list(shapes.GPU_SHAPES)
    arguments.workloads = arguments.workloads or list(shapes.ROW_LENGTHS)
    arguments.engines = arguments.engines or [TandemTrainer.name]
    if arguments.memory or arguments.apart:
        parser.error("--preset gpu must be given without --memory and --apart")
    known = {"shapes": shapes.GPU_SHAPES, "workloads": shapes.ROW_LENGTHS, "engines": (TandemTrainer.name,)}
    check_options(parser, arguments, known, lambda name: True)


def measure_updates(arguments: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Measures every shape and workload asked for on the first device, and prints the table."""
    results = []
    for shape in arguments.shapes:
        config = shapes.tiny_shape(shapes.GPU_SHAPES[shape]) if arguments.tiny else shapes.GPU_SHAPES[shape]
        model = load_config(None, arguments.settings).model
        config = dataclasses.replace(config, remat=model.remat, scan_layers=model.scan_layers)
        sides = [Weights(config), Weights(config, seed=1)]
        host_params = [jax.device_get(side.params) for side in sides]
        for name in arguments.workloads:
            console.print(f"{shape} ({config.num_parameters / 1e6:.1f}M parameters), rows of {name} tokens ...")
            workload = shapes.row_workload(name, arguments.tiny)
            batches = make_batches(workload, config.vocab_size, 1 + arguments.repeats, with_completions=True)
            for side, params in zip(sides, host_params, strict=True):
                side.params = jax.device_put(params, side.shardings)
            trainer = TandemTrainer(
                *sides, workload, batches, arguments.settings, shapes.row_plan(name, arguments.tiny)
            )
            for side in sides:
                side.params = None  # of which a run has no second copy
            results.append(_measure(shape, name, trainer, config, batches[1:]))
            console.print(f"  {results[-1].seconds:.4g} s, {results[-1].attention}")
            del trainer
            gc.collect()
            jax.clear_caches()
    console.print(updates_table(results))
    return {"updates": [dataclasses.asdict(result) for result in results]}


def _measure(
    shape: str, workload: str, trainer: TandemTrainer, config: ModelConfig, batches: list[Batch]
) -> UpdateResult:
    """Times a trainer on the batches after its first one, which compiles."""
    device = jax.devices()[0]
    before = peak_bytes(device)
    first = trainer.step()
    if not np.isfinite([first.loss, first.grad_norm]).all():
        raise ValueError(f"loss and grad_norm must be finite, got {first.loss} and {first.grad_norm}")
    calls = [timed(lambda: trainer.step().num_tokens) for _ in batches]
    trainer.close()
    operations = [model_operations(config, batch) for batch in batches]
    setting = (shape, workload, device.device_kind, trainer.policy.kernel.title)
    return summarize_updates(setting, trainer.plan, calls, operations, (before, peak_bytes(device)))


def summarize_updates(
    setting: tuple[str, str, str, str],
    plan: PackingPlan,
    calls: Sequence[Call],
    operations: Sequence[float],
    peaks: tuple[int | None, int | None],
) -> UpdateResult:
    """One line of the table.

    Args:
      setting: shape, workload, kind of the device as jax calls it, and back end of attention.
      plan: of which every row is filled.
      operations: of the model per call.
      peaks: `peak_bytes` before the first call and after the last one.
    """
    chip, (before, after) = CHIPS.get(setting[2]), peaks
    seconds = statistics.median(call.seconds for call in calls)
    rate = statistics.median(count / call.seconds for count, call in zip(operations, calls, strict=True))
    num_tokens = plan.num_microbatches * plan.num_rows * plan.row_length
    return UpdateResult(
        *setting,
        seconds=seconds,
        min_seconds=min(call.seconds for call in calls),
        max_seconds=max(call.seconds for call in calls),
        num_tokens=num_tokens,
        tokens_per_second=num_tokens / seconds,
        mfu=None if chip is None else rate / chip.flops,
        peak_bytes=after,
        is_own_peak=after is not None and after > (before or 0),
        num_compiles=sum(call.num_compiles for call in calls),
        calls=list(calls),
    )


def peak_bytes(device: Any) -> int | None:
    """The most bytes of the device that were in use at one time so far; None where it does not count."""
    return (device.memory_stats() or {}).get("peak_bytes_in_use")


def updates_table(results: Sequence[UpdateResult]) -> Table:
    """The table that is printed."""
    table = Table(
        caption="MFU: of the dense bfloat16 operations per second that the vendor states", caption_justify="left"
    )
    for column in ("shape", "rows", "device"):
        table.add_column(column)
    for column in ("ms/update", "min-max", "tokens/s", "MFU", "peak GB", "compiles"):
        table.add_column(column, justify="right")
    for result in results:
        peak = (
            "n/a"
            if result.peak_bytes is None
            else f"{'' if result.is_own_peak else '<= '}{result.peak_bytes / 1e9:.1f}"
        )
        table.add_row(
            result.shape,
            result.workload,
            result.device,
            f"{1000 * result.seconds:.0f}",
            f"{1000 * result.min_seconds:.0f}-{1000 * result.max_seconds:.0f}",
            f"{result.tokens_per_second:.0f}",
            "n/a" if result.mfu is None else f"{result.mfu:.1%}",
            peak,
            str(result.num_compiles),
        )
    return table
