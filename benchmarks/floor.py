"""How fast dense decoding could be at most: the matrix products of a decode step alone, as XLA computes them.

In: weights and a workload. Out: seconds of the products of one step, with nothing between them but what keeps the
numbers finite: no softmax, no mask, no rotation, no writing of the cache, no draw. An engine in XLA that runs dense
rows cannot pass it.
"""

import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from machine import Probe
from shapes import Workload
from weights import Weights

NUM_STEPS = 32  # in one compiled loop, as an engine runs them


class KeysValues(NamedTuple):
    """What attention of one layer reads: keys [rows, kv heads, head dim, positions], values with these two turned."""

    own_keys: jax.Array
    own_values: jax.Array
    prompt_keys: jax.Array
    prompt_values: jax.Array


def products_probe(weights: Weights, workload: Workload, with_attention: bool = False) -> Probe:
    """Measures seconds of the matrix products of one decode step of all completions.

    with_attention: those of attention too, over as many own positions as a completion has filled on average, and over
      prompts each of which lies there once.
    """
    config, params, num_rows = weights.policy.config, weights.params, workload.num_rows
    heads = (config.num_kv_heads, config.num_heads // config.num_kv_heads, config.head_dim)

    def matrix(kernel: jax.Array, num_inputs: int) -> jax.Array:
        return kernel.reshape(num_inputs, -1)

    def attend(q: jax.Array, cached: KeysValues) -> jax.Array:
        q_RKJH = q.reshape(num_rows, *heads)
        own = jnp.einsum("RKJH,RKHS->RKJS", q_RKJH, cached.own_keys) / workload.cap
        own = jnp.einsum("RKJS,RKSH->RKJH", own, cached.own_values)
        q_PQKJH = q.reshape(workload.num_prompts, workload.num_samples, *heads)
        shared = jnp.einsum("PQKJH,PKHT->PQKJT", q_PQKJH, cached.prompt_keys) / workload.cap
        shared = jnp.einsum("PQKJT,PKTH->PQKJH", shared, cached.prompt_values)
        return q + own.reshape(q.shape) + shared.reshape(q.shape)

    def layer(x_BD: jax.Array, layer: Any, cached: KeysValues | None) -> jax.Array:
        attention, mlp = layer["self_attn"], layer["mlp"]
        q, k, v = (x_BD @ matrix(attention[name]["kernel"], x_BD.shape[1]) for name in ("q_proj", "k_proj", "v_proj"))
        q = q + jnp.sum(k * v, axis=1, keepdims=True)
        if cached is not None:
            q = attend(q, cached)
        x_BD = x_BD + q @ matrix(attention["o_proj"]["kernel"], q.shape[1])
        gated = (x_BD @ mlp["gate_proj"]["kernel"]) * (x_BD @ mlp["up_proj"]["kernel"])
        x_BD = x_BD + gated @ mlp["down_proj"]["kernel"]
        return x_BD * jax.lax.rsqrt(jnp.mean(jnp.square(x_BD), axis=1, keepdims=True))

    def cache(key: jax.Array) -> KeysValues:
        num_own, num_prompt = workload.cap // 2, workload.prompt_lengths[1]
        own, prompt = (num_rows, heads[0], num_own, heads[2]), (workload.num_prompts, heads[0], num_prompt, heads[2])
        drawn = [jax.random.normal(key, shape) for shape in (own, own, prompt, prompt)]
        return KeysValues(jnp.swapaxes(drawn[0], 2, 3), drawn[1], jnp.swapaxes(drawn[2], 2, 3), drawn[3])

    caches = [cache(jax.random.key(i)) if with_attention else None for i in range(config.num_layers)]
    start = (jax.random.normal(jax.random.key(0), (num_rows, config.hidden_size)), jnp.zeros(num_rows))

    @jax.jit
    def loop(carry: Any, params: Any, caches: Any) -> Any:
        def step(_: Any, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            x_BD, total = carry
            for i in range(config.num_layers):
                x_BD = layer(x_BD, params[f"layers_{i}"], caches[i])
            tied = config.tie_word_embeddings
            head = params["embed_tokens"]["embedding"].T if tied else params["lm_head"]["kernel"]
            return x_BD, total + jnp.max(x_BD @ head, axis=1)

        return jax.lax.fori_loop(0, NUM_STEPS, step, carry)

    jax.block_until_ready(loop(start, params, caches))  # compiles

    def measure() -> float:
        begin = time.perf_counter()
        jax.block_until_ready(loop(start, params, caches))
        return (time.perf_counter() - begin) / NUM_STEPS

    return measure
