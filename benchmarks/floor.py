"""How fast decoding could be at most: the matrix products of a decode step alone, as XLA computes them.

In: weights and a number of rows. Out: seconds of the products of one step, with nothing between them but what keeps the
numbers finite: no attention, no cache, no draw. An engine in XLA that runs dense rows cannot pass it.
"""

import time
from typing import Any

import jax
import jax.numpy as jnp
from machine import Probe
from weights import Weights

NUM_STEPS = 32  # in one compiled loop, as an engine runs them


def products_probe(weights: Weights, num_rows: int) -> Probe:
    """Measures seconds of the matrix products of one decode step of `num_rows` rows."""
    config, params = weights.policy.config, weights.params

    def matrix(kernel: jax.Array, num_inputs: int) -> jax.Array:
        return kernel.reshape(num_inputs, -1)

    def layer(x_BD: jax.Array, layer: Any) -> jax.Array:
        attention, mlp = layer["self_attn"], layer["mlp"]
        q, k, v = (x_BD @ matrix(attention[name]["kernel"], x_BD.shape[1]) for name in ("q_proj", "k_proj", "v_proj"))
        q = q + jnp.sum(k * v, axis=1, keepdims=True)
        x_BD = x_BD + q @ matrix(attention["o_proj"]["kernel"], q.shape[1])
        gated = (x_BD @ mlp["gate_proj"]["kernel"]) * (x_BD @ mlp["up_proj"]["kernel"])
        x_BD = x_BD + gated @ mlp["down_proj"]["kernel"]
        return x_BD * jax.lax.rsqrt(jnp.mean(jnp.square(x_BD), axis=1, keepdims=True))

    def step(_: Any, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        x_BD, total = carry
        for i in range(config.num_layers):
            x_BD = layer(x_BD, params[f"layers_{i}"])
        tied = config.tie_word_embeddings
        head = params["embed_tokens"]["embedding"].T if tied else params["lm_head"]["kernel"]
        return x_BD, total + jnp.max(x_BD @ head, axis=1)

    start = (jax.random.normal(jax.random.key(0), (num_rows, config.hidden_size)), jnp.zeros(num_rows))
    loop = jax.jit(lambda carry: jax.lax.fori_loop(0, NUM_STEPS, step, carry))
    jax.block_until_ready(loop(start))  # compiles

    def measure() -> float:
        begin = time.perf_counter()
        jax.block_until_ready(loop(start))
        return (time.perf_counter() - begin) / NUM_STEPS

    return measure
