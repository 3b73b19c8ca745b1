"""Layers with a state: chunks over packed rows against one token after the other, and a cache against whole rows."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rl.models import cache, delta_rule
from rl.models.config import LINEAR_ATTENTION, ModelConfig
from rl.models.flavours import create_policy
from rl.models.inputs import Inputs, check_segments, plain_inputs
from tests.helpers.tiny_models import noisy_params

CONFIG = ModelConfig.from_arch(
    "qwen3_5_text",
    vocab_size=50,
    hidden_size=16,
    intermediate_size=24,
    num_layers=4,
    num_heads=2,
    num_kv_heads=1,
    head_dim=8,
    linear_num_key_heads=2,
    linear_key_head_dim=3,
    linear_num_value_heads=4,
    linear_value_head_dim=5,
    linear_conv_kernel_dim=4,
    dtype="float64",
    param_dtype="float64",
)
# Lengths of a prompt and its branches. Prompts are shorter than the convolution, end on the edge of a chunk or beside
# it, and cross one; a branch may come without its prompt, and 0 is padding.
LAYOUTS = [
    [(1, 3, 60), (2, 1, 1, 70), (0, 5), (61, 40)],
    [(64, 2, 130), (3, 1, 40, 2, 10)],
    [(63, 1, 1, 64), (65, 30, 30)],
]


def packed(layout, length):
    """(inputs [1, T], the place of the token before each on its path; -1: none)."""
    columns, parents = [], []
    for group, (prompt, *branches) in enumerate(layout):
        end = len(parents) + prompt - 1
        for branch, size in enumerate((prompt, *branches)):
            start = 0 if branch == 0 else prompt
            for i in range(size):
                is_padding = prompt == 0 and branch
                labels = (0, -1, 0) if is_padding else (start + i, group, branch)
                before = len(parents) - 1 if i else (end if branch else -1)
                columns.append((1 + (7 * len(columns)) % 49, *labels))
                parents.append(-1 if is_padding else before)
    assert len(parents) <= length, len(parents)
    columns += [(0, 0, -1, 0)] * (length - len(columns))
    inputs = Inputs(*np.array(columns, np.int32).T[:, None])
    check_segments(inputs)
    return inputs, np.array(parents + [-1] * (length - len(parents)))


def token_by_token(parents, q, k, v, g, beta):
    """The rule over one row, each token from the state of its parent. Key heads are there for each value head."""
    states = jnp.zeros((len(parents) + 1, v.shape[1], k.shape[2], v.shape[2]), v.dtype)

    def step(states, token):
        i, parent, q, k, v, g, beta = token
        state = states[parent + 1] * jnp.exp(g)[:, None, None]
        update = beta[:, None] * (v - jnp.einsum("HKV,HK->HV", state, k))
        state = state + k[..., None] * update[:, None]
        return states.at[i + 1].set(state), jnp.einsum("HKV,HK->HV", state, q)

    return jax.lax.scan(step, states, (jnp.arange(len(parents)), parents, q, k, v, g, beta))[1]


@jax.jit
def chunked(arrays, weights, context, _):
    """(a sum of the outputs, its gradients), in chunks."""

    def loss(arrays):
        return jnp.sum(weights * delta_rule.gated_delta_rule(*arrays, context)[0])

    return jax.value_and_grad(loss)(arrays)


@jax.jit
def recurrent(arrays, weights, _, parents):
    """The same, one token after the other."""

    def loss(arrays):
        q, k, v, g, beta = arrays
        out = token_by_token(parents, *(jnp.repeat(x[0], 2, 1) for x in (q, k)), v[0], g[0], beta[0])
        return jnp.sum(weights[0] * out)

    return jax.value_and_grad(loss)(arrays)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_chunks_of_a_packed_row_give_values_and_gradients_of_one_token_after_the_other(layout):
    length = 260
    with jax.enable_x64(True):
        inputs, parents = packed(layout, length)
        context = delta_rule.plain_context(CONFIG, Inputs(*map(jnp.asarray, inputs)))[LINEAR_ATTENTION]
        rng = np.random.default_rng(0)
        q, k = (jnp.asarray(rng.normal(size=(1, length, 2, 3))) for _ in range(2))
        k = k / jnp.linalg.norm(k, axis=-1, keepdims=True)
        v = jnp.asarray(rng.normal(size=(1, length, 4, 5)))
        live = (inputs.group_ids_BT >= 0)[..., None]
        g, beta = (jnp.asarray(x * live) for x in (-rng.exponential(0.1, (1, length, 4)), rng.random((1, length, 4))))
        weights = jnp.asarray(rng.normal(size=v.shape) * live[..., None])

        arguments = ((q, k, v, g, beta), weights, context, jnp.asarray(parents))
        got, want = chunked(*arguments), recurrent(*arguments)
    for found, wanted in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-11 * max(1, np.max(np.abs(wanted))))
    assert all(np.any(leaf) for leaf in jax.tree.leaves(want))


def test_a_convolution_over_one_token_is_refused():
    with pytest.raises(ValueError, match="linear_conv_kernel_dim must be >= 2"):
        dataclasses.replace(CONFIG, linear_conv_kernel_dim=1)


def test_taps_follow_the_path():
    inputs, parents = packed(LAYOUTS[0], 260)
    context = delta_rule.plain_context(CONFIG, Inputs(*map(jnp.asarray, inputs)))[LINEAR_ATTENTION]
    live = inputs.group_ids_BT[0] >= 0
    places = np.arange(260)
    for found in np.asarray(context.ancestors_DBT):
        places = np.where(places < 0, -1, parents[places])
        np.testing.assert_array_equal(found[0][live], places[live])


def test_a_cache_in_pieces_gives_the_hidden_states_of_whole_rows_and_idle_rows_keep_their_state():
    """Rows of different length, padded at their end; a row that is all padding advances by nothing, bit for bit."""
    lengths = np.array([70, 9, 1])  # in one chunk, and in the next
    rng = np.random.default_rng(1)
    tokens = rng.integers(1, 50, (3, 75)).astype(np.int32)
    with jax.enable_x64(True):
        params = noisy_params(CONFIG)
        policies = [create_policy(CONFIG, pure_nnx) for pure_nnx in (True, False)]
        policy = policies[0]
        want = np.asarray(jax.jit(policy.hidden)(params, plain_inputs(tokens)))
        state = cache.KVCache(cache.empty_part(CONFIG, 3, 80), jnp.zeros(3, jnp.int32))
        extend = jax.jit(policy.extend)
        text = [
            jax.jit(each.extend).lower(params, _piece(tokens, 0, 66, lengths), state).as_text() for each in policies
        ]
        assert text[0] == text[1]
        start = 0
        for size in (66, 1, 1, 5):
            piece = _piece(tokens, start, size, lengths)
            before = state.own.states
            hidden, state = extend(params, piece, state)
            live = piece.group_ids_BT >= 0
            np.testing.assert_allclose(
                np.asarray(hidden)[live], want[:, start : start + size][live], rtol=0, atol=1e-11
            )
            idle = ~live.any(axis=1)
            for old, new in zip(jax.tree.leaves(before), jax.tree.leaves(state.own.states), strict=True):
                np.testing.assert_array_equal(np.asarray(new)[idle], np.asarray(old)[idle])
            start += size
    assert start > 70 > 66


def _piece(tokens, start, size, lengths):
    positions = np.broadcast_to(np.arange(start, start + size, dtype=np.int32), (len(tokens), size))
    is_live = positions < lengths[:, None]
    groups = np.where(is_live, 0, -1).astype(np.int32)
    return Inputs(tokens[:, start : start + size], np.where(is_live, positions, 0), groups, is_live.astype(np.int32))
