"""The seam between Linen and NNX: the `Policy` protocol, its two implementations, and the one reader of `pure_nnx`.

In: a `ModelConfig`. Out: an object of pure functions over one parameter tree (`rl.models.config.parameter_specs`), the
same in both flavours. Nothing after this module knows the flavour; the optimizer and the train state are not here.
Legend: B sequences, T token positions, V vocab, D model.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from flax import nnx
from flax.core import unfreeze
from jax.sharding import Mesh

from rl.models import linen_model, nnx_model
from rl.models.attention_kernels import XLA, AttentionKernel, choose_kernel
from rl.models.cache import KVCache
from rl.models.config import ModelConfig, parameter_specs
from rl.models.train_state import TrainState, TrainStateNNX

Params = dict[str, Any]


class Policy(Protocol):
    """A decoder as pure functions of its parameters.

    Tokens, positions, group and branch ids are int [B, T]: a token sees the earlier positions of its own group that are
    in branch 0 (the prompt) or in its own branch; padding has group -1. A `rl.models.quantized.QuantizedArray` may
    stand in the place of any matrix. `flavour` is for messages only.
    """

    @property
    def config(self) -> ModelConfig: ...

    @property
    def flavour(self) -> str: ...

    @property
    def kernel(self) -> AttentionKernel:
        """What computes attention in `hidden`."""
        ...

    @property
    def module(self) -> Any:
        """The Linen module, or the NNX graph definition."""
        ...

    @property
    def state_class(self) -> type[TrainState] | type[TrainStateNNX]:
        """The flavour's training state; `state_class.build(policy, params, tx, rng)` makes one."""
        ...

    def init(self, key: jax.Array) -> Params:
        """Fresh parameters in `config.param_dtype`; the same numbers in both flavours."""
        ...

    def hidden(
        self,
        params: Params,
        tokens_BT: jax.Array,
        positions_BT: jax.Array,
        group_ids_BT: jax.Array,
        branch_ids_BT: jax.Array,
    ) -> jax.Array:
        """Hidden states after the final norm [B, T, D], in `config.dtype`."""
        ...

    def extend(
        self,
        params: Params,
        tokens_BT: jax.Array,
        positions_BT: jax.Array,
        group_ids_BT: jax.Array,
        branch_ids_BT: jax.Array,
        cache: KVCache,
    ) -> tuple[jax.Array, KVCache]:
        """The same for tokens appended at each row's cursor (the cache must have room for T), and the new cache."""
        ...

    def unembed(self, params: Params, hidden: jax.Array) -> jax.Array:
        """Logits [..., V] of hidden states [..., D], in float32 or wider."""
        ...


class LinenPolicy:
    """The policy computed by `rl.models.linen_model.CausalLM`."""

    flavour = "linen"
    state_class = TrainState

    def __init__(self, config: ModelConfig, kernel: AttentionKernel = XLA) -> None:
        self.config = config
        self.kernel = kernel
        self.module = linen_model.CausalLM(config, kernel.attend)

    def init(self, key: jax.Array) -> Params:
        labels = jnp.zeros((1, 1), jnp.int32)
        return unfreeze(self.module.init({"params": key}, labels, labels, labels, labels))["params"]

    def hidden(
        self,
        params: Params,
        tokens_BT: jax.Array,
        positions_BT: jax.Array,
        group_ids_BT: jax.Array,
        branch_ids_BT: jax.Array,
    ) -> jax.Array:
        return self._apply(params, "hidden", tokens_BT, positions_BT, group_ids_BT, branch_ids_BT)

    def extend(
        self,
        params: Params,
        tokens_BT: jax.Array,
        positions_BT: jax.Array,
        group_ids_BT: jax.Array,
        branch_ids_BT: jax.Array,
        cache: KVCache,
    ) -> tuple[jax.Array, KVCache]:
        return self._apply(params, "extend", tokens_BT, positions_BT, group_ids_BT, branch_ids_BT, cache)

    def unembed(self, params: Params, hidden: jax.Array) -> jax.Array:
        return self._apply(params, "unembed", hidden)

    def _apply(self, params: Params, method: str, *arguments: Any) -> Any:
        _check_tree(parameter_specs(self.config), params)
        return self.module.apply({"params": params}, *arguments, method=method)


class NNXPolicy:
    """The policy computed by `rl.models.nnx_model.CausalLM`."""

    flavour = "nnx"
    state_class = TrainStateNNX

    def __init__(self, config: ModelConfig, kernel: AttentionKernel = XLA) -> None:
        self.config = config
        self.kernel = kernel
        self.module = nnx.graphdef(nnx.eval_shape(lambda: nnx_model.CausalLM(config, nnx.Rngs(0), kernel.attend)))

    def init(self, key: jax.Array) -> Params:
        return nnx.to_pure_dict(nnx.state(nnx_model.CausalLM(self.config, nnx.Rngs(params=key))))

    def hidden(
        self,
        params: Params,
        tokens_BT: jax.Array,
        positions_BT: jax.Array,
        group_ids_BT: jax.Array,
        branch_ids_BT: jax.Array,
    ) -> jax.Array:
        return self._model(params).hidden(tokens_BT, positions_BT, group_ids_BT, branch_ids_BT)

    def extend(
        self,
        params: Params,
        tokens_BT: jax.Array,
        positions_BT: jax.Array,
        group_ids_BT: jax.Array,
        branch_ids_BT: jax.Array,
        cache: KVCache,
    ) -> tuple[jax.Array, KVCache]:
        return self._model(params).extend(tokens_BT, positions_BT, group_ids_BT, branch_ids_BT, cache)

    def unembed(self, params: Params, hidden: jax.Array) -> jax.Array:
        return self._model(params).unembed(hidden)

    def _model(self, params: Params) -> nnx_model.CausalLM:
        _check_tree(parameter_specs(self.config), params)
        return nnx.merge(self.module, params)


def create_policy(model_config: ModelConfig, pure_nnx: bool, kernel: AttentionKernel = XLA) -> Policy:
    """The NNX policy if `pure_nnx`, else the Linen one."""
    return NNXPolicy(model_config, kernel) if pure_nnx else LinenPolicy(model_config, kernel)


def without_adapters(policy: Policy) -> Policy:
    """The policy of the same flavour that computes with the base alone."""
    config = dataclasses.replace(policy.config, lora=None)
    return type(policy)(config, policy.kernel)  # pyright: ignore[reportCallIssue]


def policy_from_config(config: Any, model_config: ModelConfig, mesh: Mesh | None = None) -> Policy:
    """The policy of a run, from the run's typed configuration.

    Args:
      mesh: where it is trained, which decides on the attention kernel; None: it only decodes, without one.
    """
    kernel = XLA if mesh is None else choose_kernel(config.model.attention, model_config, mesh, config.mesh.rules)
    return create_policy(model_config, config.pure_nnx, kernel)


def _check_tree(expected: Mapping[str, Any], params: Any, path: str = "") -> None:
    """Raises ValueError at the first parameter that is missing or has no place in the model."""
    got = set(params) if isinstance(params, Mapping) else set()
    for name in sorted(set(expected) ^ got):
        problem = "is missing" if name in expected else "has no place in this model"
        raise ValueError(f"parameter {path}{name} {problem}; these parameters belong to another architecture")
    for name, child in expected.items():
        if isinstance(child, Mapping):
            _check_tree(child, params[name], f"{path}{name}/")
