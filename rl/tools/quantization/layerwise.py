"""The forward pass of a model with one layer in memory at a time, which measures how well the model predicts a text.

In: token ids, and the parameters of one layer after the other. Out: hidden states between layers, on the host, and the
log-likelihood of the text at the end. The layers are the Linen twin's; nothing is sharded, cached or trained here.
Shapes: R rows of a text, T token positions, D model, V vocabulary.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rl.models import linen_model, ops
from rl.models.config import LayerShape, ModelConfig
from rl.models.inputs import PADDING_GROUP, Inputs, plain_inputs
from rl.models.logprobs import token_logprobs
from rl.models.quantized import Weight

LOGITS_CHUNK = 128  # token positions whose logits exist at one time


def to_rows(tokens: Sequence[int], length: int) -> Inputs:
    """Consecutive rows of `length` tokens; the last one is padded. Each row is predicted from its own beginning,
    without its first token.
    """
    num_rows = -(-len(tokens) // length)
    padded, group_ids = np.zeros((2, num_rows * length), np.int32)
    padded[: len(tokens)] = tokens
    group_ids[len(tokens) :] = PADDING_GROUP
    return plain_inputs(padded.reshape(num_rows, length))._replace(group_ids_BT=group_ids.reshape(num_rows, length))


class Passage:
    """A text on its way through several versions of a model, for instance with plain and with quantised weights.

    `embed`, then `layer` for each layer in order, then `finish` take the parameters of each version.

    Attributes:
      hidden: hidden states [R, T, D] of each version, float32, on the host.
      num_tokens: the number of predicted tokens, known at the end.
    """

    def __init__(self, config: ModelConfig, tokens: Sequence[int], context: int) -> None:
        self._config = dataclasses.replace(config, dtype="float32")
        self._rows = to_rows(tokens, min(context, len(tokens)))
        self._layers: dict[Any, Callable[..., jax.Array]] = {}
        self._log_likelihoods: list[float] = []
        self.hidden: list[np.ndarray] = []
        self.num_tokens = int(np.sum(self._rows.group_ids_BT[:, 1:] >= 0))

    def embed(self, tables: Sequence[Weight]) -> None:
        """Computes the input of the first layer."""
        program = jax.jit(lambda table, tokens_RT: ops.embed(table, tokens_RT, self._config))
        self.hidden = [
            np.stack([np.asarray(program(table, tokens_T[None]))[0] for tokens_T in self._rows.tokens_BT])
            for table in tables
        ]

    def layer(self, index: int, params: Sequence[Any]) -> None:
        """Takes the text through one layer, whose parameters are nested dicts for its module."""
        kind = self._config.layer_types[index], self._config.layer_shape(index)
        program = self._layers.setdefault(kind, _layer_program(self._config, *kind))
        for version, tree in enumerate(params):
            rows = zip(self.hidden[version], *self._rows, strict=True)
            self.hidden[version] = np.stack(
                [np.asarray(program(tree, x_TD[None], Inputs(*(x[None] for x in row))))[0] for x_TD, *row in rows]
            )

    def finish(self, norm_scale: jax.Array, heads: Sequence[Weight]) -> None:
        """Takes the text through the final norm and the head: its kernel [D, V], or the tied table [V, D]."""
        program = jax.jit(self._row_log_likelihood)
        for hidden_RTD, head in zip(self.hidden, heads, strict=True):
            rows = zip(hidden_RTD, self._rows.tokens_BT, self._rows.group_ids_BT, strict=True)
            self._log_likelihoods.append(sum(float(program(norm_scale, head, *row)) for row in rows))

    def perplexities(self) -> tuple[float, ...]:
        """exp(- mean log-likelihood of a token) of each version."""
        return tuple(math.exp(-total / self.num_tokens) for total in self._log_likelihoods)

    def _row_log_likelihood(
        self, norm_scale: jax.Array, head: Weight, x_TD: jax.Array, tokens_T: jax.Array, group_ids_T: jax.Array
    ) -> jax.Array:
        """Sum of log p(token | those before it in the row), in nats."""
        hidden_TD = ops.rms_norm(x_TD, norm_scale, self._config)
        kernel = head.T if self._config.tie_word_embeddings else head
        logprobs_BT, _ = token_logprobs(
            _Head(self._config),
            kernel,
            hidden_TD[None, :-1],
            tokens_T[None, 1:],
            temperature=1.0,
            chunk_size=LOGITS_CHUNK,
            with_entropy=False,
            mask_BT=group_ids_T[None, 1:] >= 0,
        )
        return jnp.sum(logprobs_BT)


class _Head:
    """Gives logits; see `rl.models.logprobs.Unembedding`."""

    def __init__(self, config: ModelConfig) -> None:
        self._config = config

    def unembed(self, params: Weight, hidden: jax.Array) -> jax.Array:
        return ops.finish_logits(ops.dense(hidden, params, out_dtype=ops.widen(hidden.dtype)), self._config)


def _layer_program(config: ModelConfig, layer_type: str, shape: LayerShape) -> Callable[..., jax.Array]:
    """(parameters of a layer, hidden states [B, T, D], their inputs) -> hidden states after it."""
    block = linen_model.Block(config, shape)

    def run(params: Any, x_BTD: jax.Array, inputs: Inputs) -> jax.Array:
        context = ops.plain_contexts(config, inputs, ops.attention)[layer_type]
        return block.apply({"params": params}, x_BTD, context)[0]

    return jax.jit(run)
