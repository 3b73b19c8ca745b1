"""Where a run stands when its completions are judged, and the seed of each completion."""

import dataclasses
import hashlib


@dataclasses.dataclass(frozen=True)
class Moment:
    """A moment of a run.

    step: training steps done. max_steps: those of the whole run. epoch: how often the data was used up so far, with
      the part of the last time.
    """

    step: int = 0
    max_steps: int = 1
    epoch: float = 0.0


def sample_seed(seed: int, step: int, prompt_index: int, sample_index: int) -> int:
    """A number in [0, 2**31) for the randomness of a judge: the same for the same arguments, in any process."""
    text = f"{seed} {step} {prompt_index} {sample_index}"
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=4).digest(), "big") >> 1
