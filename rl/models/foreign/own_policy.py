"""A module of the user's own as a policy, in either flavour.

In: the `ForeignConfig` of `rl.models.foreign.own_config`. Out: a policy that calls the module itself, over the
module's own parameters.
Legend: B sequences, T token positions, S cache positions, D model.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Self

import flax.linen
import jax
import jax.numpy as jnp
from flax import nnx
from flax.core import unfreeze

from rl.models import ops
from rl.models.attention_kernels import AttentionKernel
from rl.models.config import ForeignConfig
from rl.models.inputs import Inputs, plain_inputs
from rl.models.ops import dtype_of, visible, widen
from rl.models.quantized import dequantize_params
from rl.models.train_state import TrainState, TrainStateNNX, string_keys

OWN_KERNEL = AttentionKernel(
    "its own", ops.attention, skips_blocks=False
)  # of `hidden`, which calls no function of ours
INPUTS = ("tokens", "positions", "attention_mask")
Params = dict[str, Any]


@dataclasses.dataclass(frozen=True, eq=False)
class OwnModule:
    """The parts of a policy over a user's module (`ForeignConfig.model`).

    Attributes:
      make: nnx.Rngs -> a new module; a Linen module ignores the argument.
      module: the Linen module, or the NNX graph definition.
      template: an NNX module's parameter tree with its own keys (numbers for the entries of a list); {} for Linen.
      inputs: the names in `INPUTS` that `__call__` takes.
      extend_inputs: which of tokens, positions and cache `extend` takes; () without a cache.
    """

    make: Callable[[nnx.Rngs], Any]
    module: Any
    template: Mapping[Any, Any]
    inputs: tuple[str, ...]
    extend_inputs: tuple[str, ...]


class _ModulePolicy:
    """The part that both flavours share: the choice of a module's arguments, and decoding without a cache."""

    decodes_in_waves = True
    kernel = OWN_KERNEL
    _apply: Callable[..., Any]  # (plain parameters, name of a method, arguments by name) -> what the method returns

    def __init__(self, config: ForeignConfig) -> None:
        self.config: Any = config
        self._own: OwnModule = config.model
        self.module = self._own.module

    @property
    def packs_rows(self) -> bool:
        return "attention_mask" in self._own.inputs

    def without_adapters(self) -> Self:
        return self

    def _call(self, params: Params, method: str, **arguments: Any) -> Any:
        # The module takes plain arrays only, so quantised ones are widened at each call.
        return self._apply(dequantize_params(params, dtype_of(self.config.param_dtype)), method, **arguments)

    def hidden(self, params: Params, inputs: Inputs) -> jax.Array:
        arguments = {"tokens": inputs.tokens_BT, "positions": inputs.positions_BT}
        if self.packs_rows:
            arguments["attention_mask"] = visible(*inputs.labels, *inputs.labels)
        return self._call(params, "__call__", **{name: arguments[name] for name in self._own.inputs})

    def unembed(self, params: Params, hidden: jax.Array) -> jax.Array:
        logits = self._call(params, "unembed", hidden=hidden)
        return logits.astype(widen(logits.dtype))

    def empty_cache(self, params: Params, num_rows: int, length: int) -> Any:
        if self._own.extend_inputs:
            return self._call(params, "init_cache", num_rows=num_rows, length=length)
        return jnp.zeros((num_rows, length), jnp.int32)

    def extend(self, params: Params, inputs: Inputs, cache: Any) -> tuple[jax.Array, Any]:
        if self._own.extend_inputs:
            arguments = {"tokens": inputs.tokens_BT, "positions": inputs.positions_BT, "cache": cache}
            return self._call(params, "extend", **{name: arguments[name] for name in self._own.extend_inputs})
        # The cache is the tokens so far. Later entries have no influence, because a policy is causal.
        start, num_tokens = inputs.positions_BT[0, 0], inputs.tokens_BT.shape[1]
        cache_BS = jax.lax.dynamic_update_slice(cache, inputs.tokens_BT, (jnp.zeros_like(start), start))
        hidden_BSD = self.hidden(params, plain_inputs(cache_BS))
        return jax.lax.dynamic_slice_in_dim(hidden_BSD, start, num_tokens, axis=1), cache_BS


class LinenModulePolicy(_ModulePolicy):
    """The policy computed by a user's `linen.Module`."""

    flavour = "linen"
    state_class = TrainState

    def init(self, key: jax.Array) -> Params:
        variables = self.module.init({"params": key}, **sample_inputs(self._own.inputs), method=all_of_it)
        return unfreeze(flax.linen.meta.unbox(variables["params"]))

    def _apply(self, params: Params, method: str, **arguments: Any) -> Any:
        return self.module.apply({"params": params}, **arguments, method=method)


class NNXModulePolicy(_ModulePolicy):
    """The policy computed by a user's `nnx.Module`."""

    flavour = "nnx"
    state_class = TrainStateNNX

    def init(self, key: jax.Array) -> Params:
        with nnx.use_eager_sharding(False):
            return string_keys(nnx.to_pure_dict(nnx.state(self._own.make(nnx.Rngs(key)), nnx.Param)))

    def model(self, params: Params) -> Any:
        """The module with these parameters."""
        return nnx.merge(self.module, own_keys(self._own.template, params))

    def _apply(self, params: Params, method: str, **arguments: Any) -> Any:
        return getattr(self.model(params), method)(**arguments)


def own_keys(template: Any, params: Any) -> Any:
    """`params` with the keys of `template` in place of their texts; the opposite of `train_state.string_keys`."""
    if not isinstance(template, Mapping):
        return params
    names = {str(key) for key in template}
    if names != set(params):
        raise ValueError(f"parameters must be {sorted(names)}, got {sorted(params)}; they belong to another model")
    return {key: own_keys(child, params[str(key)]) for key, child in template.items()}


def sample_inputs(names: tuple[str, ...], num_rows: int = 1, length: int = 2) -> dict[str, jax.Array]:
    labels = jnp.zeros((num_rows, length), jnp.int32)
    every = {"tokens": labels, "positions": labels, "attention_mask": jnp.ones((num_rows, length, length), bool)}
    return {name: every[name] for name in names}


def all_of_it(module: Any, **inputs: Any) -> Any:
    """Touches every parameter of a Linen module."""
    return module.unembed(module(**inputs))
