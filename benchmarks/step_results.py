"""From timed steps to numbers: seconds, ratios to the better peer, the share of the machine's arithmetic, the table."""

import dataclasses
import math
import statistics
from collections.abc import Mapping, Sequence

from rich.table import Table
from trainers import Batch, TandemTrainer
from turns import Call

from rl.models.config import ModelConfig, flatten_specs, parameter_specs


@dataclasses.dataclass(frozen=True)
class StepResult:
    """One line of the table.

    seconds, cores: medians over the calls; cores is CPU time over time.
    mean_length: tokens per completion.
    ratio: seconds over those of the fastest peer; None without a peer.
    target: what `ratio` may be at most; None for the peers and where none is set. met: whether it is.
    share: of the machine's matrix-product rate, see `model_operations`; None where it is not asked for.
    """

    shape: str
    workload: str
    engine: str
    seconds: float
    min_seconds: float
    max_seconds: float
    mean_length: float
    cores: float
    share: float | None
    ratio: float | None
    target: float | None
    met: bool | None
    num_compiles: int
    calls: list[Call]


def summarize_steps(
    shape: str,
    workload: str,
    num_rows: int,
    calls: Mapping[str, Sequence[Call]],
    operations: Sequence[float] | None,
    peak: float,
    target: float | None,
) -> list[StepResult]:
    """One result per engine, all measured on the same batches.

    Args:
      num_rows: completions of a step.
      calls: by engine.
      operations: of the model per call; None: no shares.
      peak: operations per second of the machine.
      target: what Tandem's ratio may be at most, None if nothing is set.
    """
    seconds = {engine: statistics.median(call.seconds for call in calls[engine]) for engine in calls}
    fastest_peer = min((time for engine, time in seconds.items() if engine != TandemTrainer.name), default=None)
    results = []
    for engine, own in calls.items():
        ratio = None if fastest_peer is None else seconds[engine] / fastest_peer
        goal = target if engine == TandemTrainer.name else None
        share = None
        if operations is not None:
            rates = [count / call.seconds for count, call in zip(operations, own, strict=True)]
            share = statistics.median(rates) / peak
        results.append(
            StepResult(
                shape=shape,
                workload=workload,
                engine=engine,
                seconds=seconds[engine],
                min_seconds=min(call.seconds for call in own),
                max_seconds=max(call.seconds for call in own),
                mean_length=statistics.mean(call.num_tokens for call in own) / num_rows,
                cores=statistics.median(call.cpu_seconds / call.seconds for call in own),
                share=share,
                ratio=ratio,
                target=goal,
                met=None if ratio is None or goal is None else ratio <= goal,
                num_compiles=sum(call.num_compiles for call in own),
                calls=list(own),
            )
        )
    return results


def model_operations(config: ModelConfig, batch: Batch) -> float:
    """Operations that an update with a reference pass needs at least: forward, twice that backward, reference forward.

    A product of matrices [m, k] and [k, n] counts 2 m k n. Every real token goes through the layers once, those of a
    prompt once for its whole group; it attends to what it sees and no more; the head is for completion tokens.
    """
    assert batch.completions is not None
    specs = flatten_specs(parameter_specs(config))
    layers = sum(math.prod(spec.shape) for path, spec in specs if path[0].startswith("layers") and len(spec.shape) > 1)
    group_size = len(batch.completions) // len(batch.prompts)
    lengths = [len(completion) for completion in batch.completions]
    num_tokens = sum(map(len, batch.prompts)) + sum(lengths)
    seen = sum(_triangle(len(prompt)) for prompt in batch.prompts)
    for b, length in enumerate(lengths):
        seen += length * len(batch.prompts[b // group_size]) + _triangle(length)
    attention = 4 * config.num_layers * config.num_heads * config.head_dim * seen
    head = 2 * config.vocab_size * config.hidden_size * sum(lengths)
    return 4.0 * (2 * layers * num_tokens + attention + head)


def steps_table(results: Sequence[StepResult], caption: str) -> Table:
    """The table that the benchmarks print."""
    table = Table(caption=caption, caption_justify="left")
    for column in ("shape", "workload", "engine"):
        table.add_column(column)
    for column in ("ms/step", "min-max", "length", "cores", "share", "ratio", "target", "compiles"):
        table.add_column(column, justify="right")
    for result in results:
        table.add_row(
            result.shape,
            result.workload,
            result.engine,
            f"{1000 * result.seconds:.0f}",
            f"{1000 * result.min_seconds:.0f}-{1000 * result.max_seconds:.0f}",
            f"{result.mean_length:.1f}",
            f"{result.cores:.1f}",
            "" if result.share is None else f"{result.share:.1%}",
            "n/a" if result.ratio is None else f"{result.ratio:.2f}x",
            "" if result.met is None else f"{result.target:.2f}x {'met' if result.met else 'missed'}",
            str(result.num_compiles),
        )
    return table


def _triangle(n: int) -> int:
    return n * (n + 1) // 2
