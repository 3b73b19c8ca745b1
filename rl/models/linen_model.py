"""The Linen twin: a decoder of `flax.linen` modules over the shared ops, with the tree of `parameter_specs`.

Legend: B sequences, T token positions, V vocab, D model, N query heads, K kv heads, H head dim, F mlp.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
from flax import linen as nn
from flax.core.scope import LazyRng
from jax.ad_checkpoint import checkpoint_name

from rl.devices.mesh import RowExchange
from rl.models import cache as kv
from rl.models import delta_rule, ops, scanned
from rl.models.block_attention import block_attention
from rl.models.config import (
    A_LOG,
    DT_BIAS,
    GATED_SCALE,
    LAYER_SCALAR,
    LORA_A,
    LORA_B,
    TAPS,
    LayerShape,
    ModelConfig,
)
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


class LayerEmbedding(nn.Module):
    """Token ids [B, T] -> what they say to each layer [B, T, L * P]."""

    config: ModelConfig

    def setup(self) -> None:
        config = self.config
        shape = (config.per_layer_vocab_size, config.num_layers * config.per_layer_input_size)
        self.embedding = _parameter(self, "embedding", shape)

    def __call__(self, tokens_BT: jax.Array) -> jax.Array:
        return ops.embed_per_layer(self.embedding, tokens_BT, self.config)


class Attention(nn.Module):
    """Grouped-query attention with rotary positions, over the tokens themselves or over a cache.

    Gives the output and what goes on from the layer, see `rl.models.cache.attend`.
    """

    config: ModelConfig
    shape: LayerShape

    def setup(self) -> None:
        config, shape = self.config, self.shape
        hidden = (config.hidden_size,)
        queries = (config.num_heads, shape.head_dim)
        keys = (shape.num_kv_heads, shape.head_dim)
        query_outputs = (config.num_heads, config.query_outputs(shape))
        self.q_proj = Projection(config, hidden, query_outputs, config.attention_bias)
        if shape.has_keys:
            self.k_proj = Projection(config, hidden, keys, config.attention_bias)
        if shape.has_values:
            self.v_proj = Projection(config, hidden, keys, config.attention_bias)
        self.o_proj = Projection(config, queries, hidden, config.output_bias)
        if config.features.qk_norm:
            sizes = map(math.prod, (queries, keys)) if config.features.qk_norm_of_all else [shape.head_dim] * 2
            query_size, key_size = sizes
            self.q_norm = RMSNorm(config, query_size)
            if shape.has_keys:
                self.k_norm = RMSNorm(config, key_size)

    def __call__(
        self, x_BTD: jax.Array, context: ops.LayerContext, layer_cache: kv.LayerCache | None = None
    ) -> tuple[jax.Array, Any]:
        config, features, shape = self.config, self.config.features, self.shape
        q_BTNH, gate_BTNH = ops.split_gate(self.q_proj(x_BTD), config)
        k_BTKH = self.k_proj(x_BTD) if shape.has_keys else None
        v_BTKH = self.v_proj(x_BTD) if shape.has_values else k_BTKH
        if features.qk_norm:
            q_BTNH = ops.norm_heads(q_BTNH, self.q_norm, config)
        q_BTNH = ops.apply_rope(q_BTNH, context.cos_BTH, context.sin_BTH, features.interleaved_rotary)
        q_BTNH = ops.scale_queries(q_BTNH, context)
        kv_BTKH = None
        if k_BTKH is not None and v_BTKH is not None:
            if features.qk_norm:
                k_BTKH = ops.norm_heads(k_BTKH, self.k_norm, config)
            if features.value_norm:
                v_BTKH = ops.rms_norm(v_BTKH, None, config)
            k_BTKH = ops.apply_rope(k_BTKH, context.cos_BTH, context.sin_BTH, features.interleaved_rotary)
            kv_BTKH = (k_BTKH, v_BTKH)
        output_BTNH, carried = kv.attend(config, q_BTNH, kv_BTKH, context, layer_cache, shape.is_read)
        output_BTNH = ops.gate_heads(output_BTNH, gate_BTNH)
        return checkpoint_name(self.o_proj(output_BTNH), ops.ATTENTION_OUTPUT), carried


class Convolution(nn.Module):
    """The taps of a convolution over each channel of `heads` heads."""

    config: ModelConfig
    heads: tuple[int, int]

    def setup(self) -> None:
        self.taps = _parameter(self, TAPS, (*self.heads, self.config.linear_conv_kernel_dim))


class GatedNorm(nn.Module):
    """x / rms(x) over the last dim, times a scale and silu(z)."""

    config: ModelConfig
    size: int

    def setup(self) -> None:
        self.weight = _parameter(self, GATED_SCALE, (self.size,))

    def __call__(self, x: jax.Array, z: jax.Array) -> jax.Array:
        return delta_rule.gate_output(x, z, self.weight, self.config)


class LinearAttention(nn.Module):
    """A gated delta rule, over the tokens themselves or from a state on, see `rl.models.delta_rule`.

    Gives the output and, where there was a state, the one after the tokens.
    """

    config: ModelConfig

    def setup(self) -> None:
        config, hidden = self.config, (self.config.hidden_size,)
        keys = (config.linear_num_key_heads, config.linear_key_head_dim)
        values = (config.linear_num_value_heads, config.linear_value_head_dim)
        self.q_proj, self.k_proj = (Projection(config, hidden, keys, False) for _ in range(2))
        self.v_proj, self.z_proj = (Projection(config, hidden, values, False) for _ in range(2))
        self.b_proj, self.a_proj = (Projection(config, hidden, values[:1], False) for _ in range(2))
        self.o_proj = Projection(config, values, hidden, False)
        self.q_conv, self.k_conv, self.v_conv = (Convolution(config, heads) for heads in (keys, keys, values))
        self.A_log = _parameter(self, A_LOG, values[:1])
        self.dt_bias = _parameter(self, DT_BIAS, values[:1])
        self.norm = GatedNorm(config, values[1])

    def __call__(
        self, x_BTD: jax.Array, context: delta_rule.PathContext, state: delta_rule.LayerState | None = None
    ) -> tuple[jax.Array, Any]:
        qkv = self.q_proj(x_BTD), self.k_proj(x_BTD), self.v_proj(x_BTD)
        taps = self.q_conv.taps, self.k_conv.taps, self.v_conv.taps
        gates = delta_rule.Gates(self.A_log, self.dt_bias)
        mixed_BTHV, state = delta_rule.mix(qkv, self.a_proj(x_BTD), self.b_proj(x_BTD), taps, gates, context, state)
        output_BTD = self.o_proj(self.norm(mixed_BTHV, self.z_proj(x_BTD)))
        return checkpoint_name(output_BTD, ops.ATTENTION_OUTPUT), state


class MLP(nn.Module):
    """Gated feed-forward block."""

    config: ModelConfig
    size: int

    def setup(self) -> None:
        config = self.config
        hidden, mlp = (config.hidden_size,), (self.size,)
        self.gate_proj = Projection(config, hidden, mlp, config.mlp_bias)
        self.up_proj = Projection(config, hidden, mlp, config.mlp_bias)
        self.down_proj = Projection(config, mlp, hidden, config.mlp_bias)

    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        gated_BTF = ops.activation(self.gate_proj(x_BTD), self.config.activation) * self.up_proj(x_BTD)
        return checkpoint_name(self.down_proj(gated_BTF), ops.MLP_OUTPUT)


class Block(nn.Module):
    """Attention and MLP with residuals, and, where layers have inputs of their own, a gate that adds this one.

    Gives the hidden states and what goes on from the layer, see `rl.models.cache.attend`.
    """

    config: ModelConfig
    shape: LayerShape

    def setup(self) -> None:
        config, hidden = self.config, (self.config.hidden_size,)
        for name in filter(None, config.features.norms):
            setattr(self, name, RMSNorm(config, config.hidden_size))
        if self.shape.is_recurrent:
            self.linear_attn = LinearAttention(config)
        else:
            self.self_attn = Attention(config, self.shape)
        self.mlp = MLP(config, self.shape.mlp_size)
        if config.per_layer_input_size:
            own = (config.per_layer_input_size,)
            self.per_layer_input_gate = Projection(config, hidden, own, False)
            self.per_layer_projection = Projection(config, own, hidden, False)
            self.post_per_layer_input_norm = RMSNorm(config, config.hidden_size)
        if config.features.layer_scalar:
            self.layer_scalar = _parameter(self, LAYER_SCALAR, (1,))

    def __call__(self, x_BTD: jax.Array, context: Any, layer_cache: Any = None) -> tuple[jax.Array, Any]:
        config, names = self.config, self.config.features.norms
        mixer = self.linear_attn if self.shape.is_recurrent else self.self_attn
        attended_BTD, carried = mixer(self._norm(names.before_attention, x_BTD), context, layer_cache)
        x_BTD = ops.add_residual(x_BTD, self._norm(names.after_attention, attended_BTD), config)
        mixed_BTD = self.mlp(self._norm(names.before_mlp, x_BTD))
        x_BTD = ops.add_residual(x_BTD, self._norm(names.after_mlp, mixed_BTD), config)
        if config.per_layer_input_size:
            own_BTP = ops.gate_layer_input(self.per_layer_input_gate(x_BTD), context, config)
            added_BTD = self.per_layer_projection(own_BTP)
            x_BTD = x_BTD + self.post_per_layer_input_norm(added_BTD)
        if config.features.layer_scalar:
            x_BTD = x_BTD * jax.lax.stop_gradient(self.layer_scalar).astype(x_BTD.dtype)
        return x_BTD, carried

    def _norm(self, name: str | None, x_BTD: jax.Array) -> jax.Array:
        return x_BTD if name is None else getattr(self, name)(x_BTD)


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
        if config.per_layer_input_size:
            own = config.num_layers * config.per_layer_input_size
            self.embed_tokens_per_layer = LayerEmbedding(config)
            self.per_layer_model_projection = Projection(config, (config.hidden_size,), (own,), False)
            self.per_layer_projection_norm = RMSNorm(config, config.per_layer_input_size)
        self.layers = [block(config, config.layer_shape(i)) for i in range(config.num_layers)]
        self.norm = RMSNorm(config, config.hidden_size)
        if not config.tie_word_embeddings:
            self.lm_head = Projection(config, (config.hidden_size,), (config.vocab_size,), False)

    def __call__(self, inputs: Inputs) -> jax.Array:
        return self.unembed(self.hidden(inputs))

    def hidden(self, inputs: Inputs) -> jax.Array:
        """Final hidden states [B, T, D] of tokens that attend to one another."""
        contexts = {
            **ops.plain_contexts(self.config, inputs, self.attention_fn),
            **delta_rule.plain_context(self.config, inputs),
        }
        x_BTD = self.embed_tokens(inputs.tokens_BT)
        x_BTD = x_BTD if self.exchange_fn is None else self.exchange_fn(x_BTD)
        layer_inputs = self._layer_inputs(x_BTD, inputs.tokens_BT)
        return self._run(x_BTD, contexts, [None] * self.config.num_layers, layer_inputs)[0]

    def extend(self, inputs: Inputs, cache: kv.KVCache) -> tuple[jax.Array, kv.KVCache]:
        """Final hidden states [B, T, D] of tokens appended to the cache, and the cache with them."""
        cache = kv.label_positions(cache, inputs)
        contexts = kv.cached_contexts(self.config, inputs, cache)
        x_BTD = self.embed_tokens(inputs.tokens_BT)
        layer_inputs = self._layer_inputs(x_BTD, inputs.tokens_BT)
        hidden_BTD, layers = self._run(x_BTD, contexts, kv.layer_caches(self.config, cache), layer_inputs)
        return hidden_BTD, kv.advance(cache, layers, inputs.tokens_BT.shape[1])

    def unembed(self, hidden: jax.Array) -> jax.Array:
        """Logits [..., V] in float32 or wider."""
        if self.config.tie_word_embeddings:
            return ops.finish_logits(self.embed_tokens.attend(hidden), self.config)
        return ops.finish_logits(self.lm_head(hidden, out_dtype=ops.widen(hidden.dtype)), self.config)

    def _layer_inputs(self, x_BTD: jax.Array, tokens_BT: jax.Array) -> jax.Array | None:
        """[L, B, T, P], see `ops.layer_inputs`; None where layers have no inputs of their own."""
        if not self.config.per_layer_input_size:
            return None
        of_tokens_BTE = self.embed_tokens_per_layer(tokens_BT)
        of_tokens_BTE = of_tokens_BTE if self.exchange_fn is None else self.exchange_fn(of_tokens_BTE)
        project, norm = self.per_layer_model_projection, self.per_layer_projection_norm
        return ops.layer_inputs(x_BTD, of_tokens_BTE, project, norm, self.config)

    def _run(self, x_BTD, contexts, caches, layer_inputs):
        is_scanned = scanned.is_scanned(self.config, x_BTD.shape[1]) and not self.is_initializing()
        x_BTD, caches = (self._scan if is_scanned else self._unrolled)(x_BTD, contexts, caches, layer_inputs)
        return self.norm(x_BTD), caches

    def _unrolled(self, x_BTD, contexts, caches, layer_inputs):
        new_caches, read = [], {}
        for segment in ops.remat_segments(self.config):
            run_segment = functools.partial(_run_layers, segment)
            if self.config.remat == "full" and not self.is_initializing():
                run_segment = nn.remat(run_segment)
            own_contexts = [ops.layer_context(self.config, contexts, layer_inputs, i) for i in segment]
            x_BTD, own_caches, read = run_segment(self, x_BTD, own_contexts, [caches[i] for i in segment], read)
            new_caches.extend(own_caches)
        return x_BTD, new_caches

    def _scan(self, x_BTD, contexts, caches, layer_inputs):
        # A separate model applies one layer, named as the first of its run, to one slice of the stack.
        model = CausalLM(dataclasses.replace(self.config, remat="none"), parent=None)
        params, new_caches, read = self.variables["params"], [], {}
        for run in scanned.layer_runs(self.config):

            def apply_layer(layer_params, *arguments, first=run[0]) -> Any:
                variables = {"params": {f"layers_{first}": layer_params}}
                return model.apply(variables, *arguments, method=lambda m, *args: m.layers[first](*args))

            layers, own_caches = [params[f"layers_{i}"] for i in run], [caches[i] for i in run]
            x_BTD, own_caches, read = scanned.scan_layers(
                self.config, run, apply_layer, layers, contexts, own_caches, x_BTD, layer_inputs, read
            )
            new_caches.extend(own_caches)
        return x_BTD, new_caches


def _run_layers(segment, model, x_BTD, contexts, caches, read):
    """The hidden states after these layers of the model, their caches, and `read` of `ops.with_source` after them."""
    new_caches = []
    for i, context, layer_cache in zip(segment, contexts, caches, strict=True):
        context = ops.with_source(model.config, i, context, read)
        x_BTD, carried = model.layers[i](x_BTD, context, layer_cache)
        new_caches.append(None if layer_cache is None else carried)
        if model.config.layer_shape(i).is_read:
            read = {**read, model.config.layer_types[i]: carried}
    return x_BTD, new_caches, read


def _parameter(module: nn.Module, name: str, shape: tuple[int, ...]) -> jax.Array:
    """Declares a parameter whose initial value depends on (root key, path) only, as in the NNX twin."""

    def initialize(key: jax.Array) -> jax.Array:
        if module.is_initializing():
            assert module.scope is not None
            key = LazyRng.create(module.scope.root.rngs["params"]).as_jax_rng()
        return ops.initial_value(module.config, key, (*module.path, name), shape)

    return module.param(name, initialize)
