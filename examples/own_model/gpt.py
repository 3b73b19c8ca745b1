"""A GPT-2-like policy as a flax.nnx.Module: learned positions, pre-norm blocks, GELU, tied head.

It takes the attention mask, so that training rows hold many sequences. It has no cache: decoding computes all positions
again for each token, which is fine while sequences are short; examples/own_model/ssm.py shows a module with a cache.
"""

import jax
import jax.numpy as jnp
from flax import nnx


class Block(nnx.Module):
    """Attention and MLP, each added to the residual stream."""

    def __init__(self, hidden_size: int, num_heads: int, rngs: nnx.Rngs):
        self.num_heads = num_heads
        self.ln_1 = nnx.LayerNorm(hidden_size, rngs=rngs)
        self.qkv = nnx.Linear(hidden_size, 3 * hidden_size, rngs=rngs)
        self.out = nnx.Linear(hidden_size, hidden_size, rngs=rngs)
        self.ln_2 = nnx.LayerNorm(hidden_size, rngs=rngs)
        self.up = nnx.Linear(hidden_size, 4 * hidden_size, rngs=rngs)
        self.down = nnx.Linear(4 * hidden_size, hidden_size, rngs=rngs)

    def __call__(self, x_BTD: jax.Array, mask_BTT: jax.Array) -> jax.Array:
        B, T, D = x_BTD.shape
        parts = jnp.split(self.qkv(self.ln_1(x_BTD)), 3, axis=-1)
        q, k, v = (part.reshape(B, T, self.num_heads, -1) for part in parts)
        scores = jnp.einsum("BTNH,BSNH->BNTS", q, k) / q.shape[-1] ** 0.5
        weights = jax.nn.softmax(jnp.where(mask_BTT[:, None], scores, -1e9), axis=-1)
        x_BTD = x_BTD + self.out(jnp.einsum("BNTS,BSNH->BTNH", weights, v).reshape(B, T, D))
        return x_BTD + self.down(jax.nn.gelu(self.up(self.ln_2(x_BTD))))


class GPT(nnx.Module):
    """The whole network up to the hidden states, and the head."""

    # Which dim of a weight goes to which axis of the mesh: see mesh.rules in configs/base.yml. Optional.
    logical_axes = {  # noqa: RUF012
        "tokens/embedding": ("vocab", "embed"),
        "*/qkv/kernel": ("embed", "heads"),
        "*/out/kernel": ("heads", "embed"),
        "*/up/kernel": ("embed", "mlp"),
        "*/down/kernel": ("mlp", "embed"),
    }

    def __init__(
        self,
        vocab_size: int,
        rngs: nnx.Rngs,
        hidden_size: int = 128,
        num_layers: int = 3,
        num_heads: int = 4,
        max_positions: int = 64,
    ):
        self.max_positions = max_positions
        small = nnx.initializers.normal(0.02)
        self.tokens = nnx.Embed(vocab_size, hidden_size, embedding_init=small, rngs=rngs)
        self.places = nnx.Embed(max_positions, hidden_size, embedding_init=small, rngs=rngs)
        self.blocks = nnx.List([Block(hidden_size, num_heads, rngs) for _ in range(num_layers)])
        self.ln_f = nnx.LayerNorm(hidden_size, rngs=rngs)

    def __call__(self, tokens: jax.Array, positions: jax.Array, attention_mask: jax.Array) -> jax.Array:
        x_BTD = self.tokens(tokens) + self.places(positions)
        for block in self.blocks:
            x_BTD = block(x_BTD, attention_mask)
        return self.ln_f(x_BTD)

    def unembed(self, hidden: jax.Array) -> jax.Array:
        return self.tokens.attend(hidden)


def build(vocab_size: int, rngs: nnx.Rngs, **sizes: int) -> GPT:
    """What `model.source: examples/own_model/gpt.py:build` names; `sizes` are model.args."""
    return GPT(vocab_size, rngs, **sizes)
