"""Whether the sampler settles: after its warm-up, calls of varying lengths compile nothing and hold no more memory."""

import dataclasses

from engines import Tandem, warm_up
from shapes import Workload
from weights import Weights

from rl.devices.host_memory import resident_bytes
from rl.models.config import ModelConfig
from rl.run.metrics import CompileCounter

MAX_GROWTH = 0.02  # of resident memory


@dataclasses.dataclass(frozen=True)
class SteadyState:
    """num_compiles: programs compiled after the warm-up. early_bytes, late_bytes: resident memory after call
    `early_call` and after the last one. met: nothing was compiled, and memory grew by no more than `MAX_GROWTH`.
    """

    num_calls: int
    early_call: int
    num_compiles: int
    early_bytes: int
    late_bytes: int
    met: bool


def measure_steady_state(config: ModelConfig, workload: Workload, num_calls: int) -> SteadyState:
    """Calls Tandem's sampler `num_calls` times (at least 2) after its warm-up."""
    engine = Tandem(Weights(config), workload)
    warm_up(engine, workload, config.vocab_size)
    early_call, early_bytes = min(10, num_calls // 2), 0
    with CompileCounter() as compiles:
        for call in range(1, num_calls + 1):
            seed = 1000 + call
            engine.generate(workload.prompts(config.vocab_size, seed), seed)
            if call == early_call:
                early_bytes = resident_bytes()
        num_compiles, late_bytes = compiles.count, resident_bytes()
    met = num_compiles == 0 and late_bytes <= (1 + MAX_GROWTH) * early_bytes
    return SteadyState(num_calls, early_call, num_compiles, early_bytes, late_bytes, met)
