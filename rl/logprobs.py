"""Log-probs and entropies of tokens from hidden states, without ever holding the logits of all of them.

In: final hidden states at the positions that predict, and the tokens that followed. Out: the log-prob of each token
under softmax(logits / temperature), and the entropy of that distribution. The vocabulary is the largest dim of
training, so logits exist for one chunk of positions at a time, in the forward and in the backward pass; the backward
pass computes them again, unless all fit in one chunk. Not here: the model, the alignment of positions and targets, the
loss.

Shapes: B sequences, T token positions, C positions of a chunk, V vocabulary, D model.
"""

import functools
from typing import Any, Protocol

import jax
import jax.numpy as jnp

TILE_ROWS = 16  # of bfloat16 numbers in a tile of a TPU's memory; of wider ones there are fewer
FEWEST_POSITIONS, FEW_LOGITS = 512, 2**24  # of a chunk whose size is left open; 64 MiB of float32


class Unembedding(Protocol):
    """The part of a policy that is needed here."""

    def unembed(self, params: Any, hidden: jax.Array) -> jax.Array:
        """Logits [..., V] of hidden states [..., D]."""
        ...


def token_logprobs(
    policy: Unembedding,
    params: Any,
    hidden_BTD: jax.Array,
    targets_BT: jax.Array,
    temperature: jax.Array | float,
    chunk_size: int | None,
    with_entropy: bool,
    mask_BT: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array | None]:
    """Log-probs of target tokens and, if asked for, entropies. Differentiable in `params` and `hidden_BTD`.

    Args:
        policy: gives logits, see `Unembedding`.
        params: of the policy.
        hidden_BTD: hidden_BTD[b, t] predicts targets_BT[b, t].
        targets_BT: int token ids in [0, V) where the mask is not 0.
        temperature: of the distribution that the tokens were drawn from; above 0.
        chunk_size: positions of each sequence whose logits exist at one time (B * chunk_size * V numbers). It changes
            memory and speed, never the result. None: 512, or as many as have `FEW_LOGITS` logits together.
        with_entropy: also give entropies.
        mask_BT: where it is 0, values are exactly 0, no gradient flows, and hidden state and target are arbitrary.
            None: all positions count.

    Returns:
        (logprobs_BT, entropy_BT or None) in nats, of the dtype of the logits, float32 at least.

    Raises:
        ValueError: chunk_size is below 1, or the shapes do not fit.
    """
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"chunk_size must be >= 1, got {chunk_size}; 512 is a good start")
    if hidden_BTD.shape[:2] != targets_BT.shape:
        raise ValueError(
            f"hidden states [B, T, D] and targets [B, T] must have the same B and T, got {hidden_BTD.shape} and "
            f"{targets_BT.shape}; cut the hidden states to the positions that predict the targets"
        )
    if chunk_size is None:
        row = jax.eval_shape(policy.unembed, params, hidden_BTD[:, :1])
        chunk_size = max(FEWEST_POSITIONS, FEW_LOGITS // max(row.size, 1))
    if mask_BT is not None:
        mask_BT = mask_BT.astype(bool)
        # 0 in place of garbage before it meets a matrix: 0 * NaN in a sum would reach the gradient of the parameters.
        hidden_BTD = jnp.where(mask_BT[..., None], hidden_BTD, 0)

    def of_chunk(params: Any, hidden_BCD: jax.Array, targets_BC: jax.Array) -> tuple[jax.Array, ...]:
        logits_BCV = policy.unembed(params, hidden_BCD)
        logits_BCV = logits_BCV.astype(jnp.promote_types(logits_BCV.dtype, jnp.float32))
        return _of_logits(with_entropy, logits_BCV / temperature, targets_BC)

    results = _map_chunks(of_chunk, params, hidden_BTD, targets_BT, chunk_size)
    if mask_BT is not None:
        results = tuple(jnp.where(mask_BT, values_BT, 0) for values_BT in results)
    return (results[0], results[1]) if with_entropy else (results[0], None)


def _map_chunks(function: Any, params: Any, hidden_BTD: jax.Array, targets_BT: jax.Array, chunk_size: int) -> Any:
    """function(params, hidden_BCD, targets_BC) -> arrays [B, C], run over chunks of T and put together to [B, T]."""
    B, T, D = hidden_BTD.shape
    num_chunks = -(-T // chunk_size)
    if num_chunks <= 1:
        # One chunk holds everything: its logits are kept, since computing them again would save nothing.
        return function(params, hidden_BTD, targets_BT)
    # Even chunks: less padding, the same number of them. They end where tiles of a TPU's memory do if that makes none
    # larger than asked for: moving all hidden states within tiles is more code than the rest of the loss.
    chunk_size = min(chunk_size, -(-T // (num_chunks * TILE_ROWS)) * TILE_ROWS)
    padding = num_chunks * chunk_size - T
    hidden_BTD = jnp.pad(hidden_BTD, ((0, 0), (0, padding), (0, 0)))
    targets_BT = jnp.pad(targets_BT, ((0, 0), (0, padding)))
    chunks = (
        jnp.moveaxis(hidden_BTD.reshape(B, num_chunks, chunk_size, D), 1, 0),
        jnp.moveaxis(targets_BT.reshape(B, num_chunks, chunk_size), 1, 0),
    )
    # Inside a scan nothing can be merged with the first computation, so the barrier of prevent_cse is not needed.
    function = jax.checkpoint(function, prevent_cse=False)
    _, results = jax.lax.scan(lambda carry, chunk: (carry, function(params, *chunk)), None, chunks)
    return jax.tree.map(lambda x_NBC: jnp.moveaxis(x_NBC, 0, 1).reshape(B, num_chunks * chunk_size)[:, :T], results)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _of_logits(with_entropy: bool, logits_BCV: jax.Array, targets_BC: jax.Array) -> tuple[jax.Array, ...]:
    """(log-prob of the target,) or (log-prob, entropy) of softmax(logits).

    The gradient is written out: the automatic one keeps several arrays of the size of the logits and scatters into
    another, this one is a single pass over the logits. Logits of -inf (forbidden tokens) are fine if one is finite.
    """
    return _of_logits_forward(with_entropy, logits_BCV, targets_BC)[0]


def _of_logits_forward(with_entropy: bool, logits_BCV: jax.Array, targets_BC: jax.Array) -> tuple[Any, Any]:
    shifted_BCV = logits_BCV - jnp.max(logits_BCV, axis=-1, keepdims=True)
    log_sum_BC = jnp.log(jnp.sum(jnp.exp(shifted_BCV), axis=-1))
    # A masked sum instead of a gather: it stays local where the vocabulary is spread over devices.
    logprobs_BC = jnp.sum(jnp.where(_is_target(logits_BCV, targets_BC), shifted_BCV, 0), axis=-1) - log_sum_BC
    if not with_entropy:
        return (logprobs_BC,), (shifted_BCV, log_sum_BC, None, targets_BC)
    probabilities_BCV = jnp.exp(shifted_BCV - log_sum_BC[..., None])
    entropy_BC = log_sum_BC - jnp.sum(probabilities_BCV * _finite(shifted_BCV), axis=-1)
    return (logprobs_BC, entropy_BC), (shifted_BCV, log_sum_BC, entropy_BC, targets_BC)


def _of_logits_backward(with_entropy: bool, residuals: Any, gradients: tuple[jax.Array, ...]) -> tuple[Any, None]:
    """d logprob / d logit_v = [v is target] - p_v;  d entropy / d logit_v = -p_v (log p_v + entropy)."""
    shifted_BCV, log_sum_BC, entropy_BC, targets_BC = residuals
    log_probabilities_BCV = shifted_BCV - log_sum_BC[..., None]
    probabilities_BCV = jnp.exp(log_probabilities_BCV)
    gradient_BC1 = gradients[0][..., None]
    logits_gradient_BCV = jnp.where(_is_target(shifted_BCV, targets_BC), gradient_BC1, 0)
    logits_gradient_BCV -= gradient_BC1 * probabilities_BCV
    if with_entropy:
        surprise_BCV = _finite(log_probabilities_BCV) + entropy_BC[..., None]
        logits_gradient_BCV -= gradients[1][..., None] * probabilities_BCV * surprise_BCV
    return logits_gradient_BCV, None


_of_logits.defvjp(_of_logits_forward, _of_logits_backward)


def _is_target(logits_BCV: jax.Array, targets_BC: jax.Array) -> jax.Array:
    vocabulary = jax.lax.broadcasted_iota(targets_BC.dtype, logits_BCV.shape, logits_BCV.ndim - 1)
    return vocabulary == targets_BC[..., None]


def _finite(log_values: jax.Array) -> jax.Array:
    """0 in place of -inf, whose product with probability 0 must be 0."""
    return jnp.where(jnp.isneginf(log_values), 0, log_values)
