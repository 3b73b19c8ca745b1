"""What the sampler compiles: prefill, a chunk of decode steps, and the two ways a cache changes its shape.

In: a policy, its parameters, rows of completions as arrays. Out: drawn tokens and the cache. Pure functions; how rows
are chosen and when completions end is `rl.waves`, jit and shardings are `rl.sampler`.
Legend: B rows (one completion each), P prompts, T prompt positions, C tokens of a chunk, V vocab, D model.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

from rl.models.cache import CachePart, KVCache, grow, init_cache, share_prefix
from rl.models.policy import Params, Policy
from rl.sampling import Draw, SamplingParams, draw


class WaveInputs(NamedTuple):
    """What prefill is told, in int32 (numpy on the host); prompts are right-padded, dummy ones have length 1."""

    tokens_PT: Any
    prompt_lengths_P: Any
    prompt_indices_P: Any
    sample_indices_B: Any


class RowLabels(NamedTuple):
    """Constants of the rows on the device: PRNG keys [B], and int32 [B] prompt lengths, group ids and branch ids."""

    keys_B: jax.Array
    prompt_lengths_B: jax.Array
    group_ids_B: jax.Array
    branch_ids_B: jax.Array


class Drawn(NamedTuple):
    """Tokens and log-probs [B, C] drawn in one chunk; only the first `num_steps` columns hold any."""

    tokens_BC: jax.Array
    sampler_logprobs_BC: jax.Array
    policy_logprobs_BC: jax.Array
    num_steps: jax.Array


def prefill(
    policy: Policy,
    sampling: SamplingParams,
    num_slots: int,
    rows: NamedSharding,
    params: Params,
    inputs: WaveInputs,
    key: jax.Array,
) -> tuple[RowLabels, CachePart, CachePart, Drawn]:
    """Runs every prompt once and draws the first token of each of its B // P rows.

    Returns:
      The rows' labels, the prompts' cache (P rows), an empty own cache of `num_slots` slots (B rows), one drawn column.
    """
    inputs = WaveInputs(*(jax.lax.with_sharding_constraint(x, rows) for x in inputs))
    num_prompts, num_positions = inputs.tokens_PT.shape
    group_size = inputs.sample_indices_B.size // num_prompts
    groups_P = jnp.arange(num_prompts, dtype=jnp.int32)
    positions_PT = jnp.broadcast_to(jnp.arange(num_positions, dtype=jnp.int32), inputs.tokens_PT.shape)
    groups_PT = jnp.where(positions_PT < inputs.prompt_lengths_P[:, None], groups_P[:, None], -1)
    cache = init_cache(policy.config, num_prompts, num_positions)
    hidden_PTD, cache = policy.extend(
        params, inputs.tokens_PT, positions_PT, groups_PT, jnp.zeros_like(groups_PT), cache
    )
    last_PD = jnp.take_along_axis(hidden_PTD, (inputs.prompt_lengths_P - 1)[:, None, None], axis=1)[:, 0]
    logits_BV = jnp.repeat(policy.unembed(params, last_PD), group_size, axis=0)
    # https://docs.jax.dev/en/latest/random-numbers.html: fold_in gives independent streams, whatever the order of rows.
    prompt_keys_P = jax.vmap(jax.random.fold_in, (None, 0))(key, inputs.prompt_indices_P)
    labels = RowLabels(
        keys_B=jax.vmap(jax.random.fold_in)(jnp.repeat(prompt_keys_P, group_size, axis=0), inputs.sample_indices_B),
        prompt_lengths_B=jnp.repeat(inputs.prompt_lengths_P, group_size),
        group_ids_B=jnp.repeat(groups_P, group_size),
        branch_ids_B=inputs.sample_indices_B + 1,
    )
    first = draw_at(jnp.int32(0), logits_BV, labels, sampling)
    cache = share_prefix(cache, group_size, num_slots)
    assert cache.prefix is not None
    return labels, cache.prefix, cache.own, Drawn(*(x[:, None] for x in first[:3]), num_steps=jnp.int32(1))


def decode_chunk(
    policy: Policy,
    sampling: SamplingParams,
    chunk: int,
    rows: NamedSharding,
    params: Params,
    labels: RowLabels,
    prefix: CachePart,
    own: CachePart,
    tokens_B: jax.Array,
    finished_B: jax.Array,
    start: jax.Array,
    end: jax.Array,
) -> tuple[CachePart, Drawn]:
    """Draws the tokens [start, end) of every completion, at most `chunk`, fewer when all rows are finished before.

    Args:
      own: the rows' cache, which holds the tokens [0, start - 1); donated.
      tokens_B: token start - 1 of each row.
      finished_B: rows whose tokens no longer matter; they are computed along and ignored.
    """
    eos_ids = jnp.asarray(sampling.eos_ids, jnp.int32)
    logprob_dtype = jnp.promote_types(policy.config.dtype, jnp.float32)
    buffer = (tokens_B.size, chunk)
    columns = (jnp.zeros(buffer, jnp.int32), jnp.zeros(buffer, logprob_dtype), jnp.zeros(buffer, logprob_dtype))

    def unfinished(carry: tuple) -> jax.Array:
        _, _, finished_B, position, _ = carry
        return (position < end) & ~jnp.all(finished_B)

    def step(carry: tuple) -> tuple:
        own, tokens_B, finished_B, position, columns = carry
        tokens_B = jax.lax.with_sharding_constraint(tokens_B, rows)
        fed_positions_B = labels.prompt_lengths_B + position - 1
        hidden_B1D, cache = policy.extend(
            params,
            tokens_B[:, None],
            fed_positions_B[:, None],
            labels.group_ids_B[:, None],
            labels.branch_ids_B[:, None],
            KVCache(own=own, cursor=position - 1, prefix=prefix),
        )
        drawn = draw_at(position, policy.unembed(params, hidden_B1D[:, 0]), labels, sampling)
        columns = tuple(
            jax.lax.dynamic_update_slice_in_dim(column_BC, new_B[:, None], position - start, axis=1)
            for column_BC, new_B in zip(columns, drawn[:3], strict=True)
        )
        finished_B = finished_B | jnp.isin(drawn.token_B, eos_ids)
        return cache.own, drawn.token_B, finished_B, position + 1, columns

    own, _, _, position, columns = jax.lax.while_loop(unfinished, step, (own, tokens_B, finished_B, start, columns))
    return own, Drawn(*columns, num_steps=position - start)


def draw_at(position: jax.Array, logits_BV: jax.Array, labels: RowLabels, sampling: SamplingParams) -> Draw:
    """Draws the token at a completion position (0 is the first) of every row, with the row's random number there."""

    def uniform(key: jax.Array) -> jax.Array:
        return jax.random.uniform(jax.random.fold_in(key, position), dtype=logits_BV.dtype)

    forbid_eos_B = jnp.broadcast_to(position < sampling.min_completion_length, logits_BV.shape[:1])
    return draw(logits_BV, jax.vmap(uniform)(labels.keys_B), sampling, forbid_eos_B)


def grow_part(num_slots: int, own: CachePart) -> CachePart:
    """The own cache with more slots."""
    return grow(KVCache(own=own, cursor=jnp.int32(0)), num_slots).own


def select_rows(
    labels: RowLabels, prefix: CachePart, own: CachePart, kept_B: jax.Array
) -> tuple[RowLabels, CachePart, CachePart]:
    """The rows `kept_B` only, each with a prefix row of its own."""
    group_size = own.num_rows // prefix.num_rows

    def take(tree: Any, index_B: jax.Array) -> Any:
        return jax.tree.map(lambda x: x[index_B], tree)

    return take(labels, kept_B), take(prefix, kept_B // group_size), take(own, kept_B)
