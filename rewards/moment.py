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

    @property
    def trainer_state(self) -> "TrainerState":
        """The moment under the names that TRL gives it."""
        return TrainerState(self.step, self.max_steps, self.epoch)


@dataclasses.dataclass(frozen=True)
class TrainerState:
    """What TRL's trainers hand over as `trainer_state` (of transformers), as far as there is the like here."""

    global_step: int
    max_steps: int
    epoch: float


def sample_seed(seed: int, step: int, prompt_index: int, sample_index: int) -> int:
    """A number in [0, 2**31) for the randomness of a judge: the same for the same arguments, in any process."""
    text = f"{seed} {step} {prompt_index} {sample_index}"
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=4).digest(), "big") >> 1
