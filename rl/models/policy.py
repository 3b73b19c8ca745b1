"""The seam between a model and everything that trains or samples it: the `Policy` protocol.

A policy is an object of pure functions over one parameter tree. The classes that keep the protocol are in
`rl.models.flavours` and `rl.models.foreign`. Not here: the optimizer and the train state.
Legend: B rows, T token positions, V vocab, D model.
"""

from typing import Any, Protocol

import jax

from rl.models.attention_kernels import AttentionKernel
from rl.models.cache import KVCache
from rl.models.config import ModelConfig
from rl.models.inputs import Inputs
from rl.models.train_state import TrainState, TrainStateNNX

Params = dict[str, Any]


class Policy(Protocol):
    """A decoder as pure functions of its parameters.

    A token sees the earlier positions of its own group that are in branch 0 (the prompt) or in its own branch. Callers
    keep the order that `rl.models.inputs.Inputs` promises: each segment (a prompt, or a branch) stands in one piece in
    its row, the prompt first, positions without gaps. So no token sees a later place of its row, and a layer with a
    state (a recurrence) may compute a row from its start to its end. In the toolkit's own decoder any matrix may be a
    `rl.models.quantized.QuantizedArray`. `flavour` is for messages only.
    """

    @property
    def config(self) -> ModelConfig:
        """The architecture; a `ForeignConfig` for a model that is not the toolkit's own decoder."""
        ...

    @property
    def flavour(self) -> str: ...

    @property
    def kernel(self) -> AttentionKernel:
        """The kernel that computes attention in `hidden`."""
        ...

    @property
    def module(self) -> Any:
        """The Linen module, or the NNX graph definition."""
        ...

    @property
    def state_class(self) -> type[TrainState] | type[TrainStateNNX]:
        """The flavour's training state; `state_class.build(policy, params, tx, rng)` makes one."""
        ...

    @property
    def packs_rows(self) -> bool:
        """Whether a row may hold several sequences, which group and branch ids tell apart. Otherwise a row holds one
        sequence, followed by padding.
        """
        ...

    @property
    def decodes_in_waves(self) -> bool:
        """Whether `extend` takes the policy's own kind of cache in place of a `KVCache`; see `WavePolicy`."""
        ...

    def without_adapters(self) -> "Policy":
        """The policy of the same flavour that computes with the base alone; this policy where there are no adapters."""
        ...

    def init(self, key: jax.Array) -> Params:
        """Fresh parameters in `config.param_dtype`; the same numbers in both flavours of the toolkit's own decoder."""
        ...

    def hidden(self, params: Params, inputs: Inputs) -> jax.Array:
        """Hidden states after the final norm [B, T, D], in `config.dtype`."""
        ...

    def extend(self, params: Params, inputs: Inputs, cache: KVCache) -> tuple[jax.Array, KVCache]:
        """The hidden states [B, T, D] of tokens appended at each row's cursor, and the new cache. The cache must have
        room for T more tokens.
        """
        ...

    def unembed(self, params: Params, hidden: jax.Array) -> jax.Array:
        """Logits [..., V] of hidden states [..., D], in float32 or wider."""
        ...


class WavePolicy(Policy, Protocol):
    """A policy with its own kind of cache, in which all rows are at the same position (`decodes_in_waves`).

    Its `extend` takes tokens at positions s, s + 1, ..., the same in every row. The cache must have been given all
    tokens before s. Group and branch ids have no meaning there.
    """

    def empty_cache(self, params: Params, num_rows: int, length: int) -> Any:
        """A cache with room for `length` positions; the first dim of each of its arrays is the row, scalars aside."""
        ...
