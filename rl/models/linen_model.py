"""The Linen twin: a decoder of `flax.linen` modules over the shared ops, with the tree of `parameter_specs`.

Legend: B sequences, T token positions, V vocab, D model, N query heads, K kv heads, H head dim, F mlp.
"""

import dataclasses
import functools
from typing import Any

import jax
from flax import linen as nn
from flax.core.scope import LazyRng
from jax.ad_checkpoint import checkpoint_name

from rl.devices.mesh import RowExchange
from rl.models import cache as kv
from rl.models import ops, scanned
from rl.models.block_attention import block_attention
from rl.models.config import LORA_A, LORA_B, ModelConfig
from rl.models.inputs import Inputs


class Projection(nn.Module):
    """x [..., *in_shape] -> [..., *out_shape]."""

    config: ModelConfig
    in_shape: tuple[int, ...]
    out_shape: tuple[int, ...]
    use_bias: bool

    def setup(self) -> None:
        self.kernel = _parameter(self, "kernel", (*self.in_shape, *self.out_shape))
        self.bias = _parameter(self, "bias", self.out_shape) if self.use_bias else None
        lora = self.config.lora
        self.adapter = None
        if lora is not None and lora.applies_to(self.path):
            lora_a = _parameter(self, LORA_A, (*self.in_shape, lora.rank))
            lora_b = _parameter(self, LORA_B, (lora.rank, *self.out_shape))
            self.adapter = ops.Adapter(lora_a, lora_b, lora.scale)

    def __call__(self, x: jax.Array, out_dtype=None) -> jax.Array:
        return ops.dense(x, self.kernel, self.bias, len(self.in_shape), out_dtype, self.adapter)


class RMSNorm(nn.Module):
    """Root mean square norm over the last dim."""

    config: ModelConfig
    size: int

    def setup(self) -> None:
        self.scale = _parameter(self, "scale", (self.size,))

    def __call__(self, x: jax.Array) -> jax.Array:
        return ops.rms_norm(x, self.scale, self.config)


class Embedding(nn.Module):
    """Token ids [B, T] -> [B, T, D]."""

    config: ModelConfig

    def setup(self) -> None:
        self.embedding = _parameter(self, "embedding", (self.config.vocab_size, self.config.hidden_size))

    def __call__(self, tokens_BT: jax.Array) -> jax.Array:
        return ops.embed(self.embedding, tokens_BT, self.config)

    def attend(self, hidden: jax.Array) -> jax.Array:
        """Logits [..., V] against the same table."""
        return ops.dense(hidden, self.embedding.T, out_dtype=ops.widen(hidden.dtype))


class Attention(nn.Module):
    """Grouped-query attention with rotary positions, over the tokens themselves or over a cache."""

    config: ModelConfig

    def setup(self) -> None:
        config = self.config
        hidden = (config.hidden_size,)
        queries = (config.num_heads, config.head_dim)
        keys = (config.num_kv_heads, config.head_dim)
        self.q_proj = Projection(config, hidden, queries, config.attention_bias)
        self.k_proj = Projection(config, hidden, keys, config.attention_bias)
        self.v_proj = Projection(config, hidden, keys, config.attention_bias)
        self.o_proj = Projection(config, queries, hidden, config.output_bias)
        if config.features.qk_norm:
            self.q_norm = RMSNorm(config, config.head_dim)
            self.k_norm = RMSNorm(config, config.head_dim)

    def __call__(
        self, x_BTD: jax.Array, context: ops.LayerContext, layer_cache: kv.LayerCache | None = None
    ) -> tuple[jax.Array, kv.LayerCache | None]:
        q_BTNH, k_BTKH, v_BTKH = self.q_proj(x_BTD), self.k_proj(x_BTD), self.v_proj(x_BTD)
        if self.config.features.qk_norm:
            q_BTNH, k_BTKH = self.q_norm(q_BTNH), self.k_norm(k_BTKH)
        q_BTNH = ops.apply_rope(q_BTNH, context.cos_BTH, context.sin_BTH)
        k_BTKH = ops.apply_rope(k_BTKH, context.cos_BTH, context.sin_BTH)
        scale = self.config.attention_scale
        if layer_cache is None:
            assert context.attend is not None
            output_BTNH = context.attend(q_BTNH, k_BTKH, v_BTKH, context.mask_BTS, scale)
        else:
            layer_cache = kv.append(layer_cache, k_BTKH, v_BTKH)
            output_BTNH = ops.attention_over_parts(q_BTNH, kv.attention_parts(layer_cache, context), scale)
        return checkpoint_name(self.o_proj(output_BTNH), ops.ATTENTION_OUTPUT), layer_cache


class MLP(nn.Module):
    """Gated feed-forward block."""

    config: ModelConfig

    def setup(self) -> None:
        config = self.config
        hidden, mlp = (config.hidden_size,), (config.intermediate_size,)
        self.gate_proj = Projection(config, hidden, mlp, config.mlp_bias)
        self.up_proj = Projection(config, hidden, mlp, config.mlp_bias)
        self.down_proj = Projection(config, mlp, hidden, config.mlp_bias)

    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        gated_BTF = ops.activation(self.gate_proj(x_BTD), self.config.activation) * self.up_proj(x_BTD)
        return checkpoint_name(self.down_proj(gated_BTF), ops.MLP_OUTPUT)


class Block(nn.Module):
    """Attention and MLP with residuals. With `post_norms` their outputs are normalised as well."""

    config: ModelConfig

    def setup(self) -> None:
        config = self.config
        self.input_layernorm = RMSNorm(config, config.hidden_size)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config, config.hidden_size)
        self.mlp = MLP(config)
        if config.features.post_norms:
            self.pre_feedforward_layernorm = RMSNorm(config, config.hidden_size)
            self.post_feedforward_layernorm = RMSNorm(config, config.hidden_size)

    def __call__(
        self, x_BTD: jax.Array, context: ops.LayerContext, layer_cache: kv.LayerCache | None = None
    ) -> tuple[jax.Array, kv.LayerCache | None]:
        attended_BTD, layer_cache = self.self_attn(self.input_layernorm(x_BTD), context, layer_cache)
        if self.config.features.post_norms:
            x_BTD = x_BTD + self.post_attention_layernorm(attended_BTD)
            mixed_BTD = self.mlp(self.pre_feedforward_layernorm(x_BTD))
            return x_BTD + self.post_feedforward_layernorm(mixed_BTD), layer_cache
        x_BTD = x_BTD + attended_BTD
        return x_BTD + self.mlp(self.post_attention_layernorm(x_BTD)), layer_cache


class CausalLM(nn.Module):
    """The decoder. `__call__` gives logits of every position; training and decoding use the three methods below it.

    Where there is no cache, `attention_fn` computes attention, and `exchange_fn` moves the looked-up embeddings.
    """

    config: ModelConfig
    attention_fn: ops.AttentionFn = block_attention
    exchange_fn: RowExchange | None = None

    def setup(self) -> None:
        config = self.config
        # Not while initialising: rematerialisation changes the backward pass only, and would change the rng paths.
        remat = config.remat != "none" and not self.is_initializing()
        block = nn.remat(Block, **ops.remat_options(config.remat)) if remat else Block
        self.embed_tokens = Embedding(config)
        self.layers = [block(config) for _ in range(config.num_layers)]
        self.norm = RMSNorm(config, config.hidden_size)
        if not config.tie_word_embeddings:
            self.lm_head = Projection(config, (config.hidden_size,), (config.vocab_size,), False)

    def __call__(self, inputs: Inputs) -> jax.Array:
        return self.unembed(self.hidden(inputs))

    def hidden(self, inputs: Inputs) -> jax.Array:
        """Final hidden states [B, T, D] of tokens that attend to one another."""
        contexts = ops.plain_contexts(self.config, inputs, self.attention_fn)
        x_BTD = self.embed_tokens(inputs.tokens_BT)
        x_BTD = x_BTD if self.exchange_fn is None else self.exchange_fn(x_BTD)
        return self._run(x_BTD, contexts, [None] * self.config.num_layers)[0]

    def extend(self, inputs: Inputs, cache: kv.KVCache) -> tuple[jax.Array, kv.KVCache]:
        """Final hidden states [B, T, D] of tokens appended to the cache, and the cache with them."""
        cache = kv.label_positions(cache, inputs)
        contexts = kv.cached_contexts(self.config, inputs, cache)
        hidden_BTD, layers = self._run(self.embed_tokens(inputs.tokens_BT), contexts, kv.layer_caches(cache))
        return hidden_BTD, kv.advance(cache, layers, inputs.tokens_BT.shape[1])

    def unembed(self, hidden: jax.Array) -> jax.Array:
        """Logits [..., V] in float32 or wider."""
        if self.config.tie_word_embeddings:
            return self.embed_tokens.attend(hidden)
        return self.lm_head(hidden, out_dtype=ops.widen(hidden.dtype))

    def _run(self, x_BTD, contexts, caches):
        is_scanned = scanned.is_scanned(self.config, x_BTD.shape[1]) and not self.is_initializing()
        x_BTD, caches = (self._scan if is_scanned else self._unrolled)(x_BTD, contexts, caches)
        return self.norm(x_BTD), caches

    def _unrolled(self, x_BTD, contexts, caches):
        new_caches = []
        for segment in ops.remat_segments(self.config):
            run_segment = functools.partial(_run_layers, segment)
            if self.config.remat == "full" and not self.is_initializing():
                run_segment = nn.remat(run_segment)
            own_contexts = [contexts[self.config.layer_types[i]] for i in segment]
            x_BTD, own_caches = run_segment(self, x_BTD, own_contexts, [caches[i] for i in segment])
            new_caches.extend(own_caches)
        return x_BTD, new_caches

    def _scan(self, x_BTD, contexts, caches):
        # A separate model applies one layer, named as the first of its run, to one slice of the stack.
        model = CausalLM(dataclasses.replace(self.config, remat="none"), parent=None)
        params, new_caches = self.variables["params"], []
        for run in scanned.layer_runs(self.config):

            def apply_layer(layer_params, *arguments, first=run[0]) -> Any:
                variables = {"params": {f"layers_{first}": layer_params}}
                return model.apply(variables, *arguments, method=lambda m, *args: m.layers[first](*args))

            layers, types = [params[f"layers_{i}"] for i in run], [self.config.layer_types[i] for i in run]
            x_BTD, own_caches = scanned.scan_layers(
                self.config, apply_layer, layers, types, contexts, [caches[i] for i in run], x_BTD
            )
            new_caches.extend(own_caches)
        return x_BTD, new_caches


def _run_layers(segment, model, x_BTD, contexts, caches):
    """The hidden states after these layers of the model, and their caches."""
    new_caches = []
    for i, context, layer_cache in zip(segment, contexts, caches, strict=True):
        x_BTD, layer_cache = model.layers[i](x_BTD, context, layer_cache)
        new_caches.append(layer_cache)
    return x_BTD, new_caches


def _parameter(module: nn.Module, name: str, shape: tuple[int, ...]) -> jax.Array:
    """Declares a parameter whose initial value depends on (root key, path) only, as in the NNX twin."""

    def initialize(key: jax.Array) -> jax.Array:
        if module.is_initializing():
            assert module.scope is not None
            key = LazyRng.create(module.scope.root.rngs["params"]).as_jax_rng()
        return ops.initial_value(module.config, key, (*module.path, name), shape)

    return module.param(name, initialize)
