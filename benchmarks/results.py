"""From timed calls to numbers: rates, ratios to the better peer, shares of what the machine can do, and the table."""

import dataclasses
import statistics
from collections.abc import Mapping, Sequence

import jax.numpy as jnp
from engines import Tandem
from rich.table import Table
from shapes import Workload
from turns import Call

from rl.models.config import ModelConfig


@dataclasses.dataclass(frozen=True)
class Result:
    """One line of the table.

    tokens_per_second, seconds, cores: medians over the calls; cores is CPU time over time, and low where the engine
      waits for something: for a GPU, or for a core that another process has.
    ratio: tokens_per_second over that of the fastest peer; None without a peer.
    target: what `ratio` should reach; None for the peers and where none is set. met: whether it does.
    kv_ratio: kv_bytes over those of the peer that takes least; None where that is not known.
    kv_target: what `kv_ratio` may be at most; None as for `target`. kv_met: whether it is.
    share: of what the machine can do, see `compute_share` and `bandwidth_share`.
    share_target: what `share` should reach; None as for `target`. share_met: whether it does.
    """

    shape: str
    workload: str
    engine: str
    tokens_per_second: float
    min_tokens_per_second: float
    max_tokens_per_second: float
    mean_length: float
    seconds: float
    cores: float
    kv_bytes: int | None
    kv_ratio: float | None
    kv_target: float | None
    kv_met: bool | None
    ratio: float | None
    target: float | None
    met: bool | None
    share: float
    share_target: float | None
    share_met: bool | None
    num_compiles: int
    calls: list[Call]


def summarize(
    shape: str,
    workload_name: str,
    workload: Workload,
    calls: Mapping[str, Sequence[Call]],
    kv_bytes: Mapping[str, int | None],
    share_per_rate: float,
    target: float | None,
    kv_target: float | None,
    share_target: float | None,
) -> list[Result]:
    """One result per engine, all measured on the same shape and workload.

    Args:
      calls, kv_bytes: by engine.
      share_per_rate: share of what the machine can do, per token per second.
      target: what Tandem's ratio should reach, None if nothing is set.
      kv_target: what Tandem's `kv_ratio` may be at most, None if nothing is set.
      share_target: what Tandem's share should reach, None if nothing is set.
    """
    rates = {engine: statistics.median(call.rate for call in calls[engine]) for engine in calls}
    fastest_peer = max((rate for engine, rate in rates.items() if engine != Tandem.name), default=None)
    of_peers = [size for engine, size in kv_bytes.items() if engine in calls and engine != Tandem.name and size]
    results = []
    for engine, rate in rates.items():
        ratio = None if fastest_peer is None else rate / fastest_peer
        bars = (target, kv_target, share_target) if engine == Tandem.name else (None, None, None)
        goal, kv_goal, share_goal = bars
        size, share = kv_bytes[engine], rate * share_per_rate
        kv_ratio = None if size is None or not of_peers else size / min(of_peers)
        results.append(
            Result(
                shape=shape,
                workload=workload_name,
                engine=engine,
                tokens_per_second=rate,
                min_tokens_per_second=min(call.rate for call in calls[engine]),
                max_tokens_per_second=max(call.rate for call in calls[engine]),
                mean_length=statistics.mean(call.num_tokens for call in calls[engine]) / workload.num_rows,
                seconds=statistics.median(call.seconds for call in calls[engine]),
                cores=statistics.median(call.cpu_seconds / call.seconds for call in calls[engine]),
                kv_bytes=size,
                kv_ratio=kv_ratio,
                kv_target=kv_goal,
                kv_met=None if kv_ratio is None or kv_goal is None else kv_ratio <= kv_goal,
                ratio=ratio,
                target=goal,
                met=None if ratio is None or goal is None else ratio >= goal,
                share=share,
                share_target=share_goal,
                share_met=None if share_goal is None else share >= share_goal,
                num_compiles=sum(call.num_compiles for call in calls[engine]),
                calls=list(calls[engine]),
            )
        )
    return results


def compute_share(config: ModelConfig, operations_per_second: float) -> float:
    """Share of the machine's matrix-product rate, per token per second.

    Counts 2 operations per parameter and generated token, the head included, the embedding look-up not; neither
    attention over the cache nor prompts, so this is a lower bound of the work done.
    """
    embedding = 0 if config.tie_word_embeddings else config.vocab_size * config.hidden_size
    return 2 * (config.num_parameters - embedding) / operations_per_second


def bandwidth_share(config: ModelConfig, workload: Workload, bytes_per_second: float) -> float:
    """Share of the machine's copy bandwidth, per token per second, where every completion has `cap` tokens.

    Counts what every step has to read: all weights, the keys and values of each prompt once per group and those of each
    completion. An engine that keeps a prompt once per row reads more than that, and gets no credit for it.
    """
    weights = config.num_parameters * jnp.dtype(config.param_dtype).itemsize
    per_position = config.num_layers * 2 * config.num_kv_heads * config.head_dim * jnp.dtype(config.dtype).itemsize
    mean_positions = workload.num_prompts * workload.prompt_lengths[1] + workload.num_rows * workload.cap / 2
    return (weights + mean_positions * per_position) / workload.num_rows / bytes_per_second


def table_of(results: Sequence[Result], caption: str) -> Table:
    """The table that the benchmark prints."""
    table = Table(caption=caption, caption_justify="left")
    for column in ("shape", "workload", "engine"):
        table.add_column(column)
    for column in (
        "tokens/s",
        "min-max",
        "length",
        "ms/call",
        "cores",
        "KV MB",
        "KV ratio",
        "KV target",
        "share",
        "share target",
        "ratio",
        "target",
        "compiles",
    ):
        table.add_column(column, justify="right")
    for result in results:
        table.add_row(
            result.shape,
            result.workload,
            result.engine,
            f"{result.tokens_per_second:.0f}",
            f"{result.min_tokens_per_second:.0f}-{result.max_tokens_per_second:.0f}",
            f"{result.mean_length:.1f}",
            f"{1000 * result.seconds:.0f}",
            f"{result.cores:.1f}",
            "n/a" if result.kv_bytes is None else f"{result.kv_bytes / 1e6:.1f}",
            "n/a" if result.kv_ratio is None else f"{result.kv_ratio:.3f}x",
            "" if result.kv_met is None else f"{result.kv_target}x {'met' if result.kv_met else 'missed'}",
            f"{result.share:.1%}",
            "" if result.share_met is None else f"{result.share_target:.0%} {'met' if result.share_met else 'missed'}",
            "n/a" if result.ratio is None else f"{result.ratio:.2f}x",
            "" if result.met is None else f"{result.target}x {'met' if result.met else 'missed'}",
            str(result.num_compiles),
        )
    return table
