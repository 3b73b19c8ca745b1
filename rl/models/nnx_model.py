"""The NNX twin: a decoder of `flax.nnx` modules over the shared ops. Its pure state has the tree of `parameter_specs`.

Matrices are read with `get_value()`, because they may be a `QuantizedArray`; `[...]` works for arrays only. Adapters
are `nnx.LoRAParam`s, a kind of `nnx.Param`.
Legend: B sequences, T token positions, V vocab, D model, N query heads, K kv heads, H head dim, F mlp.
"""

import jax
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from rl.devices.mesh import RowExchange
from rl.models import cache as kv
from rl.models import ops, scanned
from rl.models.block_attention import block_attention
from rl.models.config import LORA_A, LORA_B, ModelConfig
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


class Attention(nnx.Module):
    """Grouped-query attention with rotary positions, over the tokens themselves or over a cache."""

    def __init__(self, config: ModelConfig, key: jax.Array, path: Path) -> None:
        self.config = config
        hidden = (config.hidden_size,)
        queries = (config.num_heads, config.head_dim)
        keys = (config.num_kv_heads, config.head_dim)
        self.q_proj = Projection(config, hidden, queries, config.attention_bias, key, (*path, "q_proj"))
        self.k_proj = Projection(config, hidden, keys, config.attention_bias, key, (*path, "k_proj"))
        self.v_proj = Projection(config, hidden, keys, config.attention_bias, key, (*path, "v_proj"))
        self.o_proj = Projection(config, queries, hidden, config.output_bias, key, (*path, "o_proj"))
        if config.features.qk_norm:
            self.q_norm = RMSNorm(config, config.head_dim, key, (*path, "q_norm"))
            self.k_norm = RMSNorm(config, config.head_dim, key, (*path, "k_norm"))

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


class MLP(nnx.Module):
    """Gated feed-forward block."""

    def __init__(self, config: ModelConfig, key: jax.Array, path: Path) -> None:
        self.config = config
        hidden, mlp = (config.hidden_size,), (config.intermediate_size,)
        self.gate_proj = Projection(config, hidden, mlp, config.mlp_bias, key, (*path, "gate_proj"))
        self.up_proj = Projection(config, hidden, mlp, config.mlp_bias, key, (*path, "up_proj"))
        self.down_proj = Projection(config, mlp, hidden, config.mlp_bias, key, (*path, "down_proj"))

    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        gated_BTF = ops.activation(self.gate_proj(x_BTD), self.config.activation) * self.up_proj(x_BTD)
        return checkpoint_name(self.down_proj(gated_BTF), ops.MLP_OUTPUT)


class Block(nnx.Module):
    """Attention and MLP with residuals. With `post_norms` their outputs are normalised as well."""

    def __init__(self, config: ModelConfig, key: jax.Array, path: Path) -> None:
        self.config = config
        size = config.hidden_size
        self.input_layernorm = RMSNorm(config, size, key, (*path, "input_layernorm"))
        self.self_attn = Attention(config, key, (*path, "self_attn"))
        self.post_attention_layernorm = RMSNorm(config, size, key, (*path, "post_attention_layernorm"))
        self.mlp = MLP(config, key, (*path, "mlp"))
        if config.features.post_norms:
            self.pre_feedforward_layernorm = RMSNorm(config, size, key, (*path, "pre_feedforward_layernorm"))
            self.post_feedforward_layernorm = RMSNorm(config, size, key, (*path, "post_feedforward_layernorm"))

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
        for name in self._layer_names():
            setattr(self, name, Block(config, key, (name,)))
        self.norm = RMSNorm(config, config.hidden_size, key, ("norm",))
        if not config.tie_word_embeddings:
            self.lm_head = Projection(config, (config.hidden_size,), (config.vocab_size,), False, key, ("lm_head",))

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

    def _layer_names(self) -> list[str]:
        # Attributes, not a list: the parameter tree has names, and a list's state has integer keys.
        return [f"layers_{i}" for i in range(self.config.num_layers)]

    def _run(self, x_BTD, contexts, caches):
        is_scanned = scanned.is_scanned(self.config, x_BTD.shape[1])
        x_BTD, caches = (self._scan if is_scanned else self._unrolled)(x_BTD, contexts, caches)
        return self.norm(x_BTD), caches

    def _unrolled(self, x_BTD, contexts, caches):
        new_caches = []
        run_segment = _rematerialised(_run_layers) if self.config.remat == "full" else _run_layers
        for segment in ops.remat_segments(self.config):
            layers = [getattr(self, self._layer_names()[i]) for i in segment]
            own_contexts = [contexts[self.config.layer_types[i]] for i in segment]
            x_BTD, own_caches = run_segment(layers, x_BTD, own_contexts, [caches[i] for i in segment])
            new_caches.extend(own_caches)
        return x_BTD, new_caches

    def _scan(self, x_BTD, contexts, caches):
        new_caches = []
        for run in scanned.layer_runs(self.config):
            graphdef, _ = nnx.split(getattr(self, self._layer_names()[run[0]]))
            layers = [nnx.to_pure_dict(nnx.state(getattr(self, self._layer_names()[i]))) for i in run]

            def apply_layer(layer_params, *arguments, graphdef=graphdef):
                return nnx.merge(graphdef, layer_params)(*arguments)

            types, own_caches = [self.config.layer_types[i] for i in run], [caches[i] for i in run]
            x_BTD, own_caches = scanned.scan_layers(
                self.config, apply_layer, layers, types, contexts, own_caches, x_BTD
            )
            new_caches.extend(own_caches)
        return x_BTD, new_caches


def _run_layers(layers, x_BTD, contexts, caches):
    """The hidden states after these layers, and their caches."""
    new_caches = []
    for layer, context, layer_cache in zip(layers, contexts, caches, strict=True):
        mode = layer.config.remat
        call = _call if mode == "none" else _rematerialised(_call, **ops.remat_options(mode))
        x_BTD, layer_cache = call(layer, x_BTD, context, layer_cache)
        new_caches.append(layer_cache)
    return x_BTD, new_caches


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
