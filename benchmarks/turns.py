"""Engines that take turns in one process, so that whatever else the machine does meets all of them; each call timed."""

import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Any

from machine import Probe

from rl.run.metrics import CompileCounter


@dataclasses.dataclass(frozen=True)
class Call:
    """One timed call.

    seconds: until its result is on the host. cpu_seconds: of all threads of this process meanwhile.
    num_tokens: of all completions, up to and including the EOS.
    num_compiles: programs compiled meanwhile, 0 after a good warm-up.
    """

    seconds: float
    cpu_seconds: float
    num_tokens: int
    num_compiles: int

    @property
    def rate(self) -> float:
        """Tokens per second."""
        return self.num_tokens / self.seconds


def timed(function: Callable[[], int]) -> Call:
    """One call of a function that returns the number of tokens it was about."""
    with CompileCounter() as compiles:
        start, cpu_start = time.perf_counter(), time.process_time()
        num_tokens = function()
        seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu_start
        return Call(seconds, cpu_seconds, num_tokens, compiles.count)


def alternate(
    engines: Sequence[Any], repeats: int, probe: Probe, call: Callable[[Any, int], Call]
) -> tuple[dict[str, list[Call]], list[float]]:
    """`call(engine, round)` of every engine in every round, another one first each time.

    Returns:
      The calls by engine name, and what the machine can do, measured between them.
    """
    calls: dict[str, list[Call]] = {engine.name: [] for engine in engines}
    peaks = []
    for repeat in range(repeats):
        first = repeat % len(engines)
        for engine in (*engines[first:], *engines[:first]):
            peaks.append(probe())
            calls[engine.name].append(call(engine, repeat))
    return calls, peaks
