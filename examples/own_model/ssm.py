"""A small state-space policy as a flax.linen.Module: gated linear recurrences (minGRU) between MLPs.

    h_t = (1 - z_t) h_{t-1} + z_t c_t,   z_t = sigmoid(W_z x_t),   c_t = W_c x_t        (https://arxiv.org/abs/2410.01201)

A whole sequence is one associative scan; a token more is one step from the state. The state mixes all tokens before it,
so it knows no attention mask: each training row holds one sequence, and decoding carries the state.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp


class Layer(nn.Module):
    """A recurrence and an MLP, each added to the residual stream."""

    hidden_size: int

    def setup(self) -> None:
        self.norm_1 = nn.RMSNorm()
        self.gate = nn.Dense(self.hidden_size)
        self.candidate = nn.Dense(self.hidden_size)
        self.mixed = nn.Dense(self.hidden_size)
        self.norm_2 = nn.RMSNorm()
        self.up = nn.Dense(4 * self.hidden_size)
        self.down = nn.Dense(self.hidden_size)

    def __call__(self, x_BTD: jax.Array, state_BD: jax.Array) -> tuple[jax.Array, jax.Array]:
        normed = self.norm_1(x_BTD)
        z = jax.nn.sigmoid(self.gate(normed))
        kept, added = jax.lax.associative_scan(
            lambda a, b: (a[0] * b[0], b[0] * a[1] + b[1]), (1 - z, z * self.candidate(normed)), axis=1
        )
        states_BTD = kept * state_BD[:, None] + added
        x_BTD = x_BTD + self.mixed(jax.nn.silu(states_BTD))
        return x_BTD + self.down(jax.nn.gelu(self.up(self.norm_2(x_BTD)))), states_BTD[:, -1]


class StateSpaceModel(nn.Module):
    """Hidden states of a sequence from its beginning (`__call__`) or from a state (`extend`), and the head."""

    vocab_size: int
    hidden_size: int = 128
    num_layers: int = 3

    def setup(self) -> None:
        self.embed = nn.Embed(self.vocab_size, self.hidden_size)
        self.layers = [Layer(self.hidden_size) for _ in range(self.num_layers)]
        self.norm = nn.RMSNorm()
        self.head = nn.Dense(self.vocab_size, use_bias=False)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        return self.extend(tokens, self.init_cache(tokens.shape[0], 0))[0]

    def unembed(self, hidden: jax.Array) -> jax.Array:
        return self.head(hidden)

    def init_cache(self, num_rows: int, length: int) -> list[Any]:
        del length  # a state takes the same room however long the sequence is
        return [jnp.zeros((num_rows, self.hidden_size)) for _ in range(self.num_layers)]

    def extend(self, tokens: jax.Array, cache: list[Any]) -> tuple[jax.Array, list[Any]]:
        x_BTD, states = self.embed(tokens), []
        for layer, state_BD in zip(self.layers, cache, strict=True):
            x_BTD, state_BD = layer(x_BTD, state_BD)
            states.append(state_BD)
        return self.norm(x_BTD), states


def build(vocab_size: int, **sizes: int) -> StateSpaceModel:
    """What `model.source: examples/own_model/ssm.py:build` names; `sizes` are model.args."""
    return StateSpaceModel(vocab_size, **sizes)
