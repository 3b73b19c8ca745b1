"""The NNX twin: a decoder of `flax.nnx` modules over the shared ops. Its pure state has the tree of `parameter_specs`.

Matrices are read with `get_value()`, because they may be a `QuantizedArray`; `[...]` works for arrays only. Adapters
are `nnx.LoRAParam`s, a kind of `nnx.Param`.
Legend: B sequences, T token positions, V vocab, D model, N query heads, K kv heads, H head dim, F mlp.
"""

import functools
import math
from typing import Any

import jax
from flax import nnx
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

Path = tuple[str, ...]


class Projection(nnx.Module):
    """x [..., *in_shape] -> [..., *out_shape]."""

    def __init__(
        self,
        config: ModelConfig,
        in_shape: tuple[int, ...],
        out_shape: tuple[int, ...],
        use_bias: bool,
        key: jax.Array,
        path: Path,
    ) -> None:
        self.num_input_dims = len(in_shape)
        self.use_bias = use_bias
        self.kernel = _parameter(config, key, (*path, "kernel"), (*in_shape, *out_shape))
        if use_bias:
            self.bias = _parameter(config, key, (*path, "bias"), out_shape)
        self.lora = config.lora if config.lora is not None and config.lora.applies_to(path) else None
        if self.lora is not None:
            a_shape, b_shape = (*in_shape, self.lora.rank), (self.lora.rank, *out_shape)
            self.lora_a = nnx.LoRAParam(ops.initial_value(config, key, (*path, LORA_A), a_shape))
            self.lora_b = nnx.LoRAParam(ops.initial_value(config, key, (*path, LORA_B), b_shape))

    def __call__(self, x: jax.Array, out_dtype=None) -> jax.Array:
        bias = self.bias[...] if self.use_bias else None
        adapter = None
        if self.lora is not None:
            adapter = ops.Adapter(self.lora_a[...], self.lora_b[...], self.lora.scale)
        return ops.dense(x, self.kernel.get_value(), bias, self.num_input_dims, out_dtype, adapter)


class RMSNorm(nnx.Module):
    """Root mean square norm over the last dim."""

    def __init__(self, config: ModelConfig, size: int, key: jax.Array, path: Path) -> None:
        self.config = config
        self.scale = _parameter(config, key, (*path, "scale"), (size,))

    def __call__(self, x: jax.Array) -> jax.Array:
        return ops.rms_norm(x, self.scale[...], self.config)


class Embedding(nnx.Module):
    """Token ids [B, T] -> [B, T, D]."""

    def __init__(self, config: ModelConfig, key: jax.Array, path: Path) -> None:
        self.config = config
        self.embedding = _parameter(config, key, (*path, "embedding"), (config.vocab_size, config.hidden_size))

    def __call__(self, tokens_BT: jax.Array) -> jax.Array:
        return ops.embed(self.embedding.get_value(), tokens_BT, self.config)

    def attend(self, hidden: jax.Array) -> jax.Array:
        """Logits [..., V] against the same table."""
        return ops.dense(hidden, self.embedding.get_value().T, out_dtype=ops.widen(hidden.dtype))


class LayerEmbedding(nnx.Module):
    """Token ids [B, T] -> what they say to each layer [B, T, L * P]."""

    def __init__(self, config: ModelConfig, key: jax.Array, path: Path) -> None:
        self.config = config
        shape = (config.per_layer_vocab_size, config.num_layers * config.per_layer_input_size)
        self.embedding = _parameter(config, key, (*path, "embedding"), shape)

    def __call__(self, tokens_BT: jax.Array) -> jax.Array:
        return ops.embed_per_layer(self.embedding.get_value(), tokens_BT, self.config)


class Attention(nnx.Module):
    """Grouped-query attention with rotary positions, over the tokens themselves or over a cache.

    Gives the output and what goes on from the layer, see `rl.models.cache.attend`.
    """

    def __init__(self, config: ModelConfig, shape: LayerShape, key: jax.Array, path: Path) -> None:
        self.config, self.shape = config, shape
        hidden = (config.hidden_size,)
        queries = (config.num_heads, shape.head_dim)
        keys = (shape.num_kv_heads, shape.head_dim)
        query_outputs = (config.num_heads, config.query_outputs(shape))
        self.q_proj = Projection(config, hidden, query_outputs, config.attention_bias, key, (*path, "q_proj"))
        if shape.has_keys:
            self.k_proj = Projection(config, hidden, keys, config.attention_bias, key, (*path, "k_proj"))
        if shape.has_values:
            self.v_proj = Projection(config, hidden, keys, config.attention_bias, key, (*path, "v_proj"))
        self.o_proj = Projection(config, queries, hidden, config.output_bias, key, (*path, "o_proj"))
        if config.features.qk_norm:
            sizes = map(math.prod, (queries, keys)) if config.features.qk_norm_of_all else [shape.head_dim] * 2
            query_size, key_size = sizes
            self.q_norm = RMSNorm(config, query_size, key, (*path, "q_norm"))
            if shape.has_keys:
                self.k_norm = RMSNorm(config, key_size, key, (*path, "k_norm"))

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


class Convolution(nnx.Module):
    """The taps of a convolution over each channel of `heads` heads."""

    def __init__(self, config: ModelConfig, heads: tuple[int, int], key: jax.Array, path: Path) -> None:
        self.taps = _parameter(config, key, (*path, TAPS), (*heads, config.linear_conv_kernel_dim))


class GatedNorm(nnx.Module):
    """x / rms(x) over the last dim, times a scale and silu(z)."""

    def __init__(self, config: ModelConfig, size: int, key: jax.Array, path: Path) -> None:
        self.config = config
        self.weight = _parameter(config, key, (*path, GATED_SCALE), (size,))

    def __call__(self, x: jax.Array, z: jax.Array) -> jax.Array:
        return delta_rule.gate_output(x, z, self.weight[...], self.config)


class LinearAttention(nnx.Module):
    """A gated delta rule, over the tokens themselves or from a state on, see `rl.models.delta_rule`.

    Gives the output and, where there was a state, the one after the tokens.
    """

    def __init__(self, config: ModelConfig, key: jax.Array, path: Path) -> None:
        self.config, hidden = config, (config.hidden_size,)
        keys = (config.linear_num_key_heads, config.linear_key_head_dim)
        values = (config.linear_num_value_heads, config.linear_value_head_dim)
        self.q_proj = Projection(config, hidden, keys, False, key, (*path, "q_proj"))
        self.k_proj = Projection(config, hidden, keys, False, key, (*path, "k_proj"))
        self.v_proj = Projection(config, hidden, values, False, key, (*path, "v_proj"))
        self.z_proj = Projection(config, hidden, values, False, key, (*path, "z_proj"))
        self.b_proj = Projection(config, hidden, values[:1], False, key, (*path, "b_proj"))
        self.a_proj = Projection(config, hidden, values[:1], False, key, (*path, "a_proj"))
        self.o_proj = Projection(config, values, hidden, False, key, (*path, "o_proj"))
        self.q_conv = Convolution(config, keys, key, (*path, "q_conv"))
        self.k_conv = Convolution(config, keys, key, (*path, "k_conv"))
        self.v_conv = Convolution(config, values, key, (*path, "v_conv"))
        self.A_log = _parameter(config, key, (*path, A_LOG), values[:1])
        self.dt_bias = _parameter(config, key, (*path, DT_BIAS), values[:1])
        self.norm = GatedNorm(config, values[1], key, (*path, "norm"))

    def __call__(
        self, x_BTD: jax.Array, context: delta_rule.PathContext, state: delta_rule.LayerState | None = None
    ) -> tuple[jax.Array, Any]:
        qkv = self.q_proj(x_BTD), self.k_proj(x_BTD), self.v_proj(x_BTD)
        taps = self.q_conv.taps[...], self.k_conv.taps[...], self.v_conv.taps[...]
        gates = delta_rule.Gates(self.A_log[...], self.dt_bias[...])
        mixed_BTHV, state = delta_rule.mix(qkv, self.a_proj(x_BTD), self.b_proj(x_BTD), taps, gates, context, state)
        output_BTD = self.o_proj(self.norm(mixed_BTHV, self.z_proj(x_BTD)))
        return checkpoint_name(output_BTD, ops.ATTENTION_OUTPUT), state


class MLP(nnx.Module):
    """Gated feed-forward block."""

    def __init__(self, config: ModelConfig, size: int, key: jax.Array, path: Path) -> None:
        self.config = config
        hidden, mlp = (config.hidden_size,), (size,)
        self.gate_proj = Projection(config, hidden, mlp, config.mlp_bias, key, (*path, "gate_proj"))
        self.up_proj = Projection(config, hidden, mlp, config.mlp_bias, key, (*path, "up_proj"))
        self.down_proj = Projection(config, mlp, hidden, config.mlp_bias, key, (*path, "down_proj"))

    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        gated_BTF = ops.activation(self.gate_proj(x_BTD), self.config.activation) * self.up_proj(x_BTD)
        return checkpoint_name(self.down_proj(gated_BTF), ops.MLP_OUTPUT)


class Block(nnx.Module):
    """Attention and MLP with residuals, and, where layers have inputs of their own, a gate that adds this one.

    Gives the hidden states and what goes on from the layer, see `rl.models.cache.attend`.
    """

    def __init__(self, config: ModelConfig, shape: LayerShape, key: jax.Array, path: Path) -> None:
        self.config = config
        size, hidden = config.hidden_size, (config.hidden_size,)
        for name in filter(None, config.features.norms):
            setattr(self, name, RMSNorm(config, size, key, (*path, name)))
        self.shape = shape
        if shape.is_recurrent:
            self.linear_attn = LinearAttention(config, key, (*path, "linear_attn"))
        else:
            self.self_attn = Attention(config, shape, key, (*path, "self_attn"))
        self.mlp = MLP(config, shape.mlp_size, key, (*path, "mlp"))
        if config.per_layer_input_size:
            own = (config.per_layer_input_size,)
            self.per_layer_input_gate = Projection(config, hidden, own, False, key, (*path, "per_layer_input_gate"))
            self.per_layer_projection = Projection(config, own, hidden, False, key, (*path, "per_layer_projection"))
            self.post_per_layer_input_norm = RMSNorm(config, size, key, (*path, "post_per_layer_input_norm"))
        if config.features.layer_scalar:
            self.layer_scalar = _parameter(config, key, (*path, LAYER_SCALAR), (1,))

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
            x_BTD = x_BTD * jax.lax.stop_gradient(self.layer_scalar[...]).astype(x_BTD.dtype)
        return x_BTD, carried

    def _norm(self, name: str | None, x_BTD: jax.Array) -> jax.Array:
        return x_BTD if name is None else getattr(self, name)(x_BTD)


class CausalLM(nnx.Module):
    """The decoder. `__call__` gives logits of every position; training and decoding use the three methods below it.
    Where there is no cache, `attention_fn` computes attention, and `exchange_fn` moves the looked-up embeddings.

    Initial values depend on the key of the `params` stream of `rngs` and on each parameter's path, not on the order of
    construction: both twins draw the same numbers.
    """

    def __init__(
        self,
        config: ModelConfig,
        rngs: nnx.Rngs,
        attention_fn: ops.AttentionFn = block_attention,
        exchange_fn: RowExchange | None = None,
    ) -> None:
        self.config = config
        self.attention_fn, self.exchange_fn = attention_fn, exchange_fn
        key = rngs.params.key[...]
        self.embed_tokens = Embedding(config, key, ("embed_tokens",))
        if config.per_layer_input_size:
            hidden, own = (config.hidden_size,), (config.num_layers * config.per_layer_input_size,)
            name, norm = "per_layer_model_projection", "per_layer_projection_norm"
            self.embed_tokens_per_layer = LayerEmbedding(config, key, ("embed_tokens_per_layer",))
            self.per_layer_model_projection = Projection(config, hidden, own, False, key, (name,))
            self.per_layer_projection_norm = RMSNorm(config, config.per_layer_input_size, key, (norm,))
        for i, name in enumerate(self._layer_names()):
            setattr(self, name, Block(config, config.layer_shape(i), key, (name,)))
        self.norm = RMSNorm(config, config.hidden_size, key, ("norm",))
        if not config.tie_word_embeddings:
            self.lm_head = Projection(config, (config.hidden_size,), (config.vocab_size,), False, key, ("lm_head",))

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

    def _layer_names(self) -> list[str]:
        # Attributes, not a list: the parameter tree has names, and a list's state has integer keys.
        return [f"layers_{i}" for i in range(self.config.num_layers)]

    def _run(self, x_BTD, contexts, caches, layer_inputs):
        is_scanned = scanned.is_scanned(self.config, x_BTD.shape[1])
        x_BTD, caches = (self._scan if is_scanned else self._unrolled)(x_BTD, contexts, caches, layer_inputs)
        return self.norm(x_BTD), caches

    def _unrolled(self, x_BTD, contexts, caches, layer_inputs):
        new_caches, read = [], {}
        for segment in ops.remat_segments(self.config):
            run_segment = functools.partial(_run_layers, self.config, segment)
            run_segment = _rematerialised(run_segment) if self.config.remat == "full" else run_segment
            layers = [getattr(self, self._layer_names()[i]) for i in segment]
            own_contexts = [ops.layer_context(self.config, contexts, layer_inputs, i) for i in segment]
            x_BTD, own_caches, read = run_segment(layers, x_BTD, own_contexts, [caches[i] for i in segment], read)
            new_caches.extend(own_caches)
        return x_BTD, new_caches

    def _scan(self, x_BTD, contexts, caches, layer_inputs):
        new_caches, read = [], {}
        for run in scanned.layer_runs(self.config):
            graphdef, _ = nnx.split(getattr(self, self._layer_names()[run[0]]))
            layers = [nnx.to_pure_dict(nnx.state(getattr(self, self._layer_names()[i]))) for i in run]

            def apply_layer(layer_params, *arguments, graphdef=graphdef):
                return nnx.merge(graphdef, layer_params)(*arguments)

            own_caches = [caches[i] for i in run]
            x_BTD, own_caches, read = scanned.scan_layers(
                self.config, run, apply_layer, layers, contexts, own_caches, x_BTD, layer_inputs, read
            )
            new_caches.extend(own_caches)
        return x_BTD, new_caches


def _run_layers(config, segment, layers, x_BTD, contexts, caches, read):
    """The hidden states after these layers, their caches, and `read` of `ops.with_source` after them."""
    new_caches = []
    call = _call if config.remat == "none" else _rematerialised(_call, **ops.remat_options(config.remat))
    for i, layer, context, layer_cache in zip(segment, layers, contexts, caches, strict=True):
        context = ops.with_source(config, i, context, read)
        x_BTD, carried = call(layer, x_BTD, context, layer_cache)
        new_caches.append(None if layer_cache is None else carried)
        if config.layer_shape(i).is_read:
            read = {**read, config.layer_types[i]: carried}
    return x_BTD, new_caches, read


def _call(layer, *arguments):
    return layer(*arguments)


def _rematerialised(function, **options):
    """`function` of (modules, *arguments), rematerialised: the backward pass keeps its inputs and what
    `options` name.
    """

    def call(modules, *arguments):
        graphdef, state = nnx.split(modules)
        pure = jax.checkpoint(lambda state, *arguments: function(nnx.merge(graphdef, state), *arguments), **options)
        return pure(state, *arguments)

    return call


def _parameter(config: ModelConfig, key: jax.Array, path: Path, shape: tuple[int, ...]) -> nnx.Param:
    return nnx.Param(ops.initial_value(config, key, path, shape))
