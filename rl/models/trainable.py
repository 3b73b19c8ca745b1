"""Which part of a policy's parameters is trained: all of them, or adapters beside a frozen base.

Whoever trains, or asks for a reference, asks this module and need not know what the parts are. Not here: which leaves
are adapters, and how they are merged (`rl.models.lora`).
"""

import functools
from typing import Any

from rl.models import lora
from rl.models.policy import Params, Policy


class Trainable:
    """The trained and the frozen part of trees like the parameters of `policy`.

    Attributes:
      has_frozen: whether anything is frozen. The frozen part is then the reference, without a second copy.
      reference_policy: computes the reference's log-probs: with the frozen part alone, or with a copy of everything.
    """

    def __init__(self, policy: Policy) -> None:
        self._policy, self._config = policy, policy.config
        self.has_frozen = policy.config.lora is not None

    @functools.cached_property
    def reference_policy(self) -> Policy:
        """See above; made where it is asked for, because that builds a module, and every step asks for the parts."""
        return self._policy.without_adapters()

    def split(self, tree: Any) -> tuple[Any, Any]:
        """(trained part, frozen part) of arrays, shapes or shardings; the second is {} where all is trained."""
        return lora.split(self._config, tree)

    def join(self, trained: Params, frozen: Params) -> Params:
        """The tree of two parts."""
        return lora.join(trained, frozen)

    def reference_part(self, tree: Any) -> Any:
        """What `reference_policy` takes of a tree like the parameters."""
        return self.split(tree)[1] if self.has_frozen else tree
