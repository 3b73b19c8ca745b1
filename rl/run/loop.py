"""What a run remembers of its loop from one step to the next, and what it is known by."""

import math
from typing import Any

from rl.algorithms.entropy_coef import EntropyCoefState
from rl.algorithms.from_config import file_hashes
from rl.config.load import Config
from rl.data.prompts import PromptData, fingerprint
from rl.models.policy import Policy
from rl.run.health import HealthState, healthy
from rl.state.origin import Origin


def run_identity(config: Config, origin: Origin, data: PromptData) -> dict[str, Any]:
    """What `run.json` keeps of a run: the sources and hashes of policy, reference, prompts and a user's own files."""
    reference = origin.identity if config.grpo.beta else None
    hashes = {"data": fingerprint(data.train), **file_hashes(config)}
    return {"policy": origin.identity, "reference": reference, **hashes}


def loop_record(
    step: int, position: int, num_rows: int, policy: Policy, entropy: EntropyCoefState, health: HealthState
) -> dict[str, Any]:
    """What a checkpoint keeps of the loop after `step` steps, which used up `position` prompts of `num_rows` rows."""
    epoch, offset = divmod(position, num_rows)
    record = {"step": step, "epoch": epoch, "position": offset, "flavour": policy.flavour}
    return record | {"entropy": entropy._asdict(), "health": health._asdict()}


def start_of_loop(config: Config) -> tuple[EntropyCoefState, HealthState, int]:
    """Entropy coefficient, health and position before the first step."""
    return EntropyCoefState(config.grpo.entropy_coef, math.inf), healthy(), 0
