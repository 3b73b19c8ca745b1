"""Models small enough to compile in a second, for the tests of everything that computes with one."""

import jax.numpy as jnp
import numpy as np

from rl.models.cache import KVCache, empty_part
from rl.models.config import ModelConfig, flatten_specs, parameter_specs

VOCAB = 97
# They stand for the families in tests of what does not ask for a family; tests/models/test_families.py has all of them.
FAMILIES = ("llama", "qwen2", "qwen3", "gemma3_text")


def tiny_config(family="llama", **changes):
    """Every weight is large enough to matter; a Gemma has one layer with a window and one without, a
    Qwen3.5 one with a state and one with attention.
    """
    gemma = family == "gemma3_text"
    arch = {
        "family": family,
        "vocab_size": VOCAB,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_layers": 2,
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_dim": 8,
        "initializer_range": 0.3,
        "sliding_window": 3 if gemma else None,
        "layer_types": ("sliding_attention", "full_attention") if gemma else None,
    }
    if family == "qwen3_5_text":
        heads = {"linear_num_key_heads": 2, "linear_num_value_heads": 4}
        arch |= heads | {"linear_key_head_dim": 4, "linear_value_head_dim": 6, "linear_conv_kernel_dim": 4}
        arch |= {"layer_types": ("linear_attention", "full_attention")}
    return ModelConfig.from_arch(**(arch | changes))


def noisy_params(config, seed=0):
    """Parameters whose biases and norms are away from their neutral initial values."""
    rng, params = np.random.default_rng(seed), {}
    for path, spec in flatten_specs(parameter_specs(config)):
        node = params
        for name in path[:-1]:
            node = node.setdefault(name, {})
        centre = 1.0 - config.features.norm_offset if path[-1] == "scale" else 0.0
        node[path[-1]] = jnp.asarray(centre + 0.3 * rng.normal(size=spec.shape), config.param_dtype)
    return params


def init_cache(config, num_rows, length, shared=(), kv_dtype=None):
    """An empty cache of `num_rows` own rows."""
    own = empty_part(config, num_rows, length, kv_dtype)
    return KVCache(own=own, cursors=jnp.zeros(num_rows, jnp.int32), shared=tuple(shared))
