"""A text model of `tunix.models` as a policy: `model.source: tunix:FOLDER`.

In: a `ForeignConfig` of `rl.models.foreign.tunix_config`. Out: a policy over the model's own parameters. A defect of
Tunix 0.1.7 is corrected here: Llama 3, Qwen3 and Gemma rotate with a fixed theta, and ignore their configuration.
Weights are read and written by `rl.models.foreign.tunix_files`.
Legend: B sequences, T token positions, S cache positions, N heads, H head dim, D model.
"""

from collections.abc import Callable
from typing import Any, Self

import jax
import jax.numpy as jnp
from flax import nnx

from rl.models.config import ForeignConfig
from rl.models.foreign.own_policy import OWN_KERNEL, own_keys
from rl.models.foreign.tunix_config import TunixModel, with_globals
from rl.models.inputs import Inputs
from rl.models.ops import apply_rope, dtype_of, rope_tables, visible, widen
from rl.models.quantized import dequantize_params
from rl.models.train_state import TrainStateNNX, string_keys

Params = dict[str, Any]


class TunixPolicy:
    """The policy computed by a Tunix model, with Tunix's own cache."""

    flavour = "nnx"
    state_class = TrainStateNNX
    decodes_in_waves = True
    kernel = OWN_KERNEL

    def __init__(self, config: ForeignConfig) -> None:
        self.config: Any = config
        self._tunix: TunixModel = config.model
        abstract = nnx.eval_shape(lambda: self._tunix.make(jax.random.key(0)))
        _correct_rope(abstract, self._tunix)
        self.module = nnx.graphdef(abstract)
        self._template = nnx.to_pure_dict(nnx.state(abstract, nnx.Param))
        _take_head_off(abstract)
        self._headless = nnx.graphdef(abstract)

    @property
    def packs_rows(self) -> bool:
        return self._tunix.packs_rows

    def without_adapters(self) -> Self:
        return self

    def init(self, key: jax.Array) -> Params:
        params = nnx.to_pure_dict(nnx.state(self._tunix.make(key), nnx.Param))
        return string_keys(jax.tree.map(lambda leaf: leaf.astype(dtype_of(self.config.param_dtype)), params))

    def model(self, params: Params) -> Any:
        """The module with these parameters."""
        return nnx.merge(self.module, own_keys(self._template, params))

    def hidden(self, params: Params, inputs: Inputs) -> jax.Array:
        return self._run(params, inputs, None, visible(*inputs.labels, *inputs.labels))[0]

    def empty_cache(self, params: Params, num_rows: int, length: int) -> Any:
        model, dtype = self._tunix, dtype_of(self.config.dtype)
        shape = (num_rows, length, model.num_kv_heads, model.head_dim)
        layer = {name: jnp.zeros(shape, dtype) for name in ("k", "v")}
        return {f"layer_{i}": {**layer, "end_index": jnp.zeros(num_rows, jnp.int32)} for i in range(model.num_layers)}

    def extend(self, params: Params, inputs: Inputs, cache: Any) -> tuple[jax.Array, Any]:
        length = cache["layer_0"]["k"].shape[1]
        mask_BTS = jnp.arange(length) <= inputs.positions_BT[:, :, None]
        return self._run(params, inputs, cache, mask_BTS)

    def unembed(self, params: Params, hidden: jax.Array) -> jax.Array:
        model = self.model(self._plain(params))
        head = model.lm_head if hasattr(model, "lm_head") else model.embedder.decode
        logits = head(hidden.reshape(1, -1, hidden.shape[-1]))
        logits = logits.astype(widen(logits.dtype)).reshape(*hidden.shape[:-1], -1)
        cap = self._tunix.softcap
        return logits if cap is None else jnp.tanh(logits / cap) * cap

    def _plain(self, params: Params) -> Params:
        """The parameters for Tunix, with quantised ones widened at each call."""
        return dequantize_params(params, dtype_of(self.config.param_dtype))

    def _run(self, params: Params, inputs: Inputs, cache: Any, mask: jax.Array) -> tuple[jax.Array, Any]:
        model = nnx.merge(self._headless, own_keys(self._template, self._plain(params)))
        hidden_BTD, cache = model(inputs.tokens_BT, inputs.positions_BT, cache, mask)
        return hidden_BTD.astype(dtype_of(self.config.dtype)), cache


def _correct_rope(model: Any, description: TunixModel) -> None:
    """Gives every attention layer the frequencies of the checkpoint.

    Tunix calls the global `apply_rope` of its module without a theta. Here the layer's class is replaced by a subclass
    whose `block` is the same code with another `apply_rope`. Tunix itself is not changed.
    """
    frequencies = description.frequencies
    if frequencies is None:
        return

    def rotate(inputs_BTNH: jax.Array, positions_BT: jax.Array, **_: Any) -> jax.Array:
        cos_BTH, sin_BTH = rope_tables(positions_BT, frequencies, inputs_BTNH.dtype)
        return apply_rope(inputs_BTNH, cos_BTH, sin_BTH)

    attention = description.library.Attention
    corrected = _subclass(attention, block=with_globals(attention.block, apply_rope=rotate))
    for layer in model.layers:
        layer.attn.__class__ = corrected


def _take_head_off(model: Any) -> None:
    """Makes `model` return its final hidden states in place of logits. The parameters are not changed."""
    embedder = model.embedder
    embedder.__class__ = _subclass(type(embedder), decode=lambda self, x: x)
    if hasattr(model, "lm_head"):
        model.lm_head.__class__ = _subclass(type(model.lm_head), __call__=lambda self, x: x)
    if hasattr(model, "final_logits_softcap"):
        model.final_logits_softcap = None


def _subclass(base: type, **methods: Callable[..., Any]) -> type:
    return type(base.__name__, (base,), methods)
