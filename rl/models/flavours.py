"""The two flavours of a policy, and the one reader of `pure_nnx`.

In: a model configuration and the flag. Out: a `LinenPolicy` or an `NNXPolicy`: pure functions over one parameter tree
(`rl.models.config.parameter_specs`), the same in both. Nothing after this module knows the flavour. Models that are not
the toolkit's own decoder come from `rl.models.foreign`.
Legend: B rows, T token positions, V vocab, D model.
"""

import dataclasses
import math
import pathlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
from flax import nnx
from jax.sharding import Mesh

from rl.config.sections import Config
from rl.devices.mesh import RowExchange, embedding_exchange
from rl.models import linen_model, nnx_model, ops
from rl.models.attention_kernels import XLA, AttentionKernel, choose_kernel
from rl.models.cache import KVCache
from rl.models.config import ForeignConfig, ModelConfig, parameter_specs
from rl.models.foreign import own_config
from rl.models.foreign.own_policy import LinenModulePolicy, NNXModulePolicy
from rl.models.inputs import Inputs
from rl.models.policy import Params, Policy
from rl.models.train_state import TrainState, TrainStateNNX


class LinenPolicy:
    """The policy computed by `rl.models.linen_model.CausalLM`."""

    flavour = "linen"
    state_class = TrainState
    packs_rows = True
    decodes_in_waves = False

    def __init__(
        self, config: ModelConfig, kernel: AttentionKernel = XLA, exchange_fn: RowExchange | None = None
    ) -> None:
        self.config = config
        self.kernel, self.exchange_fn = kernel, exchange_fn
        self.module = linen_model.CausalLM(config, kernel.attend, exchange_fn)

    def without_adapters(self) -> "LinenPolicy":
        if self.config.lora is None:
            return self
        return LinenPolicy(dataclasses.replace(self.config, lora=None), self.kernel, self.exchange_fn)

    def init(self, key: jax.Array) -> Params:
        return ops.init_params(self.config, key)

    def hidden(self, params: Params, inputs: Inputs) -> jax.Array:
        return self._apply(params, "hidden", inputs)

    def extend(self, params: Params, inputs: Inputs, cache: KVCache) -> tuple[jax.Array, KVCache]:
        return self._apply(params, "extend", inputs, cache)

    def unembed(self, params: Params, hidden: jax.Array) -> jax.Array:
        return self._apply(params, "unembed", hidden)

    def _apply(self, params: Params, method: str, *arguments: Any) -> Any:
        _check_tree(parameter_specs(self.config), params)
        return self.module.apply({"params": params}, *arguments, method=method)


class NNXPolicy:
    """The policy computed by `rl.models.nnx_model.CausalLM`."""

    flavour = "nnx"
    state_class = TrainStateNNX
    packs_rows = True
    decodes_in_waves = False

    def __init__(
        self, config: ModelConfig, kernel: AttentionKernel = XLA, exchange_fn: RowExchange | None = None
    ) -> None:
        self.config = config
        self.kernel, self.exchange_fn = kernel, exchange_fn
        parts = kernel.attend, exchange_fn
        self.module = nnx.graphdef(nnx.eval_shape(lambda: nnx_model.CausalLM(config, nnx.Rngs(0), *parts)))

    def without_adapters(self) -> "NNXPolicy":
        if self.config.lora is None:
            return self
        return NNXPolicy(dataclasses.replace(self.config, lora=None), self.kernel, self.exchange_fn)

    def init(self, key: jax.Array) -> Params:
        return ops.init_params(self.config, key)

    def hidden(self, params: Params, inputs: Inputs) -> jax.Array:
        return self.model(params).hidden(inputs)

    def extend(self, params: Params, inputs: Inputs, cache: KVCache) -> tuple[jax.Array, KVCache]:
        return self.model(params).extend(inputs, cache)

    def unembed(self, params: Params, hidden: jax.Array) -> jax.Array:
        return self.model(params).unembed(hidden)

    def model(self, params: Params) -> nnx_model.CausalLM:
        """The module with these parameters."""
        _check_tree(parameter_specs(self.config), params)
        return nnx.merge(self.module, params)


def _tunix_policy(model_config: ForeignConfig, *_: Any) -> Policy:
    from rl.models.foreign.tunix_policy import TunixPolicy  # only where it is asked for: it imports tunix

    return TunixPolicy(model_config)


class Flavour(NamedTuple):
    """One value of `pure_nnx`.

    Attributes:
      name: for messages.
      policies: by kind of model: (configuration, kernel, exchange_fn) -> policy. A foreign model has its own kernel.
    """

    name: str
    policies: Mapping[str, Callable[..., Policy]]


FLAVOURS = {
    False: Flavour("linen", {"decoder": LinenPolicy, "own": lambda config, *_: LinenModulePolicy(config)}),
    True: Flavour(
        "nnx", {"decoder": NNXPolicy, "own": lambda config, *_: NNXModulePolicy(config), "tunix": _tunix_policy}
    ),
}


def flavour_of(config: Config) -> Flavour:
    """The flavour that a run's typed configuration asks for: this module alone reads its `pure_nnx`."""
    return FLAVOURS[config.pure_nnx]


def create_policy(
    model_config: ModelConfig | ForeignConfig,
    pure_nnx: bool,
    kernel: AttentionKernel = XLA,
    exchange_fn: RowExchange | None = None,
) -> Policy:
    """The NNX policy if `pure_nnx`, else the Linen one. `model_config.kind` names the implementation.

    Args:
      model_config: a `ModelConfig` or a `ForeignConfig`.
      kernel, exchange_fn: for the toolkit's own decoder only.
    """
    return FLAVOURS[pure_nnx].policies[model_config.kind](model_config, kernel, exchange_fn)


def foreign_config(config: Config, folder: pathlib.Path | None, **tokens: Any) -> ForeignConfig:
    """The description of the model in model.source, where that is not the toolkit's own decoder.

    Args:
      config: the run's typed configuration.
      folder: the folder of a Tunix model.
      tokens: the tokenizer's vocab_size, eos_token_ids, bos_token_id and pad_token_id.

    Raises:
      ValueError: the module is of the other flavour, or breaks the contract of docs/models.md; a Tunix model is asked
        for in Linen, or has options that Tunix does not compute.
    """
    flavour = flavour_of(config)
    if folder is None:
        try:
            return own_config.describe(config.model, flavour.name, **tokens)
        except own_config.OtherFlavourError as error:
            way_out = f"; set pure_nnx={str(error.kinds == ['nnx']).lower()}" if error.kinds else ""
            raise ValueError(
                f"model.source {error.source} must return a flax.{flavour.name}.Module with "
                f"pure_nnx={str(flavour.name == 'nnx').lower()}, got {error.found}{way_out}"
            ) from error
    if "tunix" not in flavour.policies:
        raise ValueError(
            f"pure_nnx must be true with model.source {config.model.source!r}, got false: tunix.models are NNX "
            "modules; give the folder without 'tunix:' to compute it with the toolkit's own Linen decoder"
        )
    from rl.models.foreign.tunix_config import describe

    return describe(config.model, folder)


def policy_from_config(config: Config, model_config: ModelConfig, mesh: Mesh | None = None) -> Policy:
    """The policy of a run, from the run's typed configuration.

    Args:
      mesh: the mesh of training, which decides on the attention kernel and the exchange of rows between devices; None
        for a policy that only decodes, which needs neither.
    """
    if mesh is None or model_config.has_own_kernel:
        return create_policy(model_config, config.pure_nnx)
    kernel = choose_kernel(config.model.attention, model_config, mesh, config.mesh.rules)
    columns = math.gcd(model_config.hidden_size, model_config.num_layers * model_config.per_layer_input_size)
    exchange_fn = embedding_exchange(mesh, config.mesh.rules, columns)
    return create_policy(model_config, config.pure_nnx, kernel, exchange_fn)


def _check_tree(expected: Mapping[str, Any], params: Any, path: str = "") -> None:
    """Raises ValueError at the first parameter that is missing or has no place in the model."""
    got = set(params) if isinstance(params, Mapping) else set()
    for name in sorted(set(expected) ^ got):
        problem = "is missing" if name in expected else "has no place in this model"
        raise ValueError(f"parameter {path}{name} {problem}; these parameters belong to another architecture")
    for name, child in expected.items():
        if isinstance(child, Mapping):
            _check_tree(child, params[name], f"{path}{name}/")
