"""What the updates of a step measured of single tokens, for the samples that a run keeps.

In: the packed minibatches of a step with their log-probs, on the devices. Out: for each completion, the values of the
tokens that the policy drew, in order. Nothing is computed here on devices, and nothing is fetched before it is asked
for.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from rl.devices import hosts
from rl.training.packing import Batch, TrainGroup
from rl.training.train_step import TokenMeasures

_MOST = 80.0  # nats, whose exponential float32 still holds
# Of log(reference / policy): `rl.algorithms.loss_types.KL_ESTIMATORS` in numpy.
_KL = {"k1": lambda x: -x, "k2": lambda x: x**2 / 2, "k3": lambda x: np.expm1(np.minimum(x, _MOST)) - x}


class TokenValues(NamedTuple):
    """Values of the tokens of one completion that the policy drew, of all its sequences in order: float [drawn].

    Attributes:
      logprob: of the policy that is trained, before the first update of the step, as the trainer computes it; of a
        minibatch whose old log-probs nobody needs, before its own first update.
      difference: what the sampler computed for it, minus `logprob`; NaN where the sampler has no value.
      kl: the estimate of `grpo.kl_estimator` to the reference; None without one.
      clipped: 1 where the clip held the gradient back in an update of the step; None where nothing can be clipped.
      advantage: None where all tokens of a completion have the same.
    """

    logprob: np.ndarray
    difference: np.ndarray
    kl: np.ndarray | None
    clipped: np.ndarray | None
    advantage: np.ndarray | None


class MeasuredTokens(NamedTuple):
    """One minibatch after its updates.

    Attributes:
      groups: all its groups, and `computed` those that were packed.
      packed: the minibatch on the host.
      logprobs, reference, advantages: [M, R, C, L] on the devices, the last two None where there are none.
      clipped: the same as bool, of each update.
    """

    groups: Sequence[TrainGroup]
    computed: Sequence[TrainGroup]
    packed: Batch
    logprobs: Any
    reference: Any
    advantages: Any
    clipped: Sequence[Any]

    def with_update(self, tokens: TokenMeasures) -> "MeasuredTokens":
        """With what an update on the minibatch measured. The first one gives log-probs where there are none."""
        clipped = self.clipped if tokens.clipped_MRCL is None else [*self.clipped, tokens.clipped_MRCL]
        logprobs = tokens.logprobs_MRCL if self.logprobs is None else self.logprobs
        return self._replace(logprobs=logprobs, clipped=clipped)

    def by_completion(self, kl_estimator: str) -> list[TokenValues | None]:
        """The values of every completion of `groups` in order; None for those that were not computed.

        All processes must call it; only the first gets values, the others an empty list.
        """
        arrays = hosts.fetch((self.logprobs, self.reference, self.advantages, list(self.clipped)))
        if not hosts.is_first():
            return []
        logprobs, reference, advantages, clipped = arrays
        was_clipped = np.any(clipped, axis=0) if clipped else None
        rows = {
            int(number): np.unravel_index(place, self.packed.sequence_ids_MRC.shape)
            for place, number in enumerate(self.packed.sequence_ids_MRC.reshape(-1))
            if number >= 0
        }

        def of(place: tuple[Any, ...]) -> TokenValues:
            drawn = self.packed.mask_MRCL[place] > 0

            def pick(array: Any) -> np.ndarray | None:
                return None if array is None else np.asarray(array[place][drawn], np.float64)

            logprob, sampler = pick(logprobs), pick(self.packed.rollout_logprobs_MRCL)
            assert logprob is not None
            assert sampler is not None
            of_reference = pick(reference)
            kl = None if of_reference is None else _KL[kl_estimator](of_reference - logprob)
            return TokenValues(logprob, sampler - logprob, kl, pick(was_clipped), pick(advantages))

        computed, found, number = {id(group) for group in self.computed}, [], 0
        for group in self.groups:
            for _ in group.completions:
                found.append(of(rows[number]) if id(group) in computed else None)
                number += id(group) in computed
        return found
