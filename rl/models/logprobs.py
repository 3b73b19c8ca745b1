"""Log-probs and entropies of tokens from hidden states, without holding the logits of all tokens at one time.

In: final hidden states at the predicting positions, and the tokens that followed. Out: the log-prob of each token under
softmax(logits / temperature), over the vocabulary or over the ids that could be drawn, and the entropy of that
distribution. The vocabulary is the largest dim of training, so logits exist for one chunk of positions at a time, in
the forward and in the backward pass; the backward pass computes them again, unless all of them are few. Chunks behind
the last position that counts are not computed.
Not here: the model, the alignment of positions and targets, the loss.

Shapes: B sequences, T token positions, C positions of a chunk, V vocabulary, D model, X words of
`rl.models.drawn_from`.
"""

from collections.abc import Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

from rl.models.drawn_from import DrawnFrom
from rl.models.ops import widen

# The name, in compiled programs, of the loops over chunks. Their length is a number of the batch.
CHUNK_LOOP = "logits"
TILE_ROWS = 16  # of bfloat16 numbers in a tile of a TPU's memory; of wider ones there are fewer
# Positions of all sequences on a device together. An accelerator reads the head in about the time of 512 positions'
# products; on a CPU fewer leave less of the last chunk empty.
CHUNK_POSITIONS, CPU_CHUNK_POSITIONS = 512, 256
FEW_LOGITS = 2**24  # on a device; 64 MiB of float32


class Unembedding(Protocol):
    """The part of a policy that this module needs."""

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
    num_shards: int = 1,
    on_cpu: bool = False,
    drawn_from: DrawnFrom | None = None,
    kept_words_BTX: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array | None]:
    """Log-probs of target tokens and, if asked for, entropies. Differentiable, once, in `params` and `hidden_BTD`.

    Args:
        policy: gives logits, see `Unembedding`.
        params: the policy's parameters.
        hidden_BTD: hidden_BTD[b, t] predicts targets_BT[b, t].
        targets_BT: int token ids in [0, V) where the mask is not 0.
        temperature: the temperature at which the tokens were drawn; above 0.
        chunk_size: positions of each sequence whose logits exist at one time (B * chunk_size * V numbers). It changes
            memory and speed, never the result. None: see `chunk_length`.
        with_entropy: whether to give entropies as well.
        mask_BT: where it is 0, values are exactly 0, no gradient flows, and hidden state and target are arbitrary.
          Chunks after the last position that counts in any sequence cost nothing. None: all positions count.
        num_shards: devices that share the sequences; `on_cpu`: which are CPUs.
        drawn_from: the rules of the distribution that tokens were drawn from; None: the whole softmax.
        kept_words_BTX: uint32, with `drawn_from`: which ids could be drawn at each position, the target among them. A
            constant. None: the same ids at all positions.

    Returns:
        (logprobs_BT, entropy_BT or None) in nats, of the dtype of the logits, float32 at least.

    Raises:
        ValueError: chunk_size is below 1, or the shapes do not fit.
    """
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"chunk_size must be >= 1, got {chunk_size}; 128 is a good start")
    if hidden_BTD.shape[:2] != targets_BT.shape:
        raise ValueError(
            f"hidden states [B, T, D] and targets [B, T] must have the same B and T, got {hidden_BTD.shape} and "
            f"{targets_BT.shape}; cut the hidden states to the positions that predict the targets"
        )
    B, T, _ = hidden_BTD.shape
    num_rows = -(-B // num_shards)
    if mask_BT is None:
        num_used = T
    else:
        mask_BT = mask_BT.astype(bool)
        # Garbage becomes 0 before it meets a matrix, because 0 * NaN in a sum would reach the gradient of the
        # parameters.
        hidden_BTD = jnp.where(mask_BT[..., None], hidden_BTD, 0)
        num_used = jnp.max(jnp.where(jnp.any(mask_BT, axis=0), jnp.arange(1, T + 1), 0), initial=0)

    def logits_of(hidden_BCD: jax.Array) -> jax.Array:
        logits_BCV = policy.unembed(params, hidden_BCD)
        logits_BCV = logits_BCV.astype(widen(logits_BCV.dtype))
        return (logits_BCV if drawn_from is None else drawn_from.adjusted(logits_BCV)) / temperature

    size = chunk_length(num_rows, T, chunk_size, on_cpu)
    num_chunks = max(-(-T // size), 1)
    num_words = jax.eval_shape(logits_of, hidden_BTD[:, :1]).shape[-1]
    are_few = chunk_size is None and num_rows * T * num_words <= FEW_LOGITS
    padding = num_chunks * size - T
    hidden_BTD = jnp.pad(hidden_BTD, ((0, 0), (0, padding), (0, 0)))
    targets_BT = jnp.pad(targets_BT, ((0, 0), (0, padding)))
    if kept_words_BTX is not None:
        assert drawn_from is not None
        kept_words_BTX = jnp.pad(kept_words_BTX, ((0, 0), (0, padding), (0, 0)))
    # Only arguments get a gradient, so the parameters that `logits_of` reads become arguments.
    unembed, read = jax.closure_convert(logits_of, hidden_BTD[:, :size])
    # One chunk holds everything. Its logits are kept, because computing them again would save nothing.
    over_chunks = _over_chunks(unembed, drawn_from, size, with_entropy, are_few or num_chunks == 1)
    results = over_chunks(read, hidden_BTD, targets_BT, kept_words_BTX, jnp.asarray(-(-num_used // size), jnp.int32))
    results = [values_BT[:, :T] for values_BT in results]
    if mask_BT is not None:
        results = [jnp.where(mask_BT, values_BT, 0) for values_BT in results]
    return (results[0], results[1]) if with_entropy else (results[0], None)


def chunk_length(num_rows: int, num_positions: int, chunk_size: int | None = None, on_cpu: bool = False) -> int:
    """Positions of each of `num_rows` sequences on a device in one chunk.

    Args:
        chunk_size: at most so many; None: so many that `CHUNK_POSITIONS` of all sequences have logits at one time, or
            `CPU_CHUNK_POSITIONS`.

    Chunks have equal lengths, which gives the least padding. They end at tiles of a TPU's memory if no chunk then is
    larger than asked for, because moving hidden states within tiles is more code than the rest of the loss.
    """
    if chunk_size is None:
        together = CPU_CHUNK_POSITIONS if on_cpu else CHUNK_POSITIONS
        chunk_size = max(TILE_ROWS, together // max(num_rows, 1) // TILE_ROWS * TILE_ROWS)
    if num_positions <= chunk_size:
        return max(num_positions, 1)
    num_chunks = -(-num_positions // chunk_size)
    return min(chunk_size, -(-num_positions // (num_chunks * TILE_ROWS)) * TILE_ROWS)


def _over_chunks(unembed: Any, drawn_from: DrawnFrom | None, size: int, with_entropy: bool, keeps_logits: bool) -> Any:
    """(arrays that `unembed` reads, hidden_BTD, targets_BT, kept_words_BTX or None, chunks to compute) ->
    [log-probs_BT] or [.., entropies_BT], 0 in chunks that are not computed. T is a multiple of `size`.

    A loop whose number of rounds depends on the batch has no automatic gradient. The gradient here is a loop over the
    same chunks, which adds up the gradients of the arrays.
    """

    def chunk(array: jax.Array, i: Any) -> jax.Array:
        return jax.lax.dynamic_slice_in_dim(array, i * size, size, axis=1)

    def put(array: jax.Array, values: jax.Array, i: Any) -> jax.Array:
        return jax.lax.dynamic_update_slice_in_dim(array, values, i * size, axis=1)

    def loop(num_chunks: jax.Array, step: Any, carry: Any) -> Any:
        with jax.named_scope(CHUNK_LOOP):
            return jax.lax.fori_loop(0, num_chunks, step, carry)

    def without_removed(logits_BCV: jax.Array, kept_words_BTX: jax.Array | None, i: Any) -> jax.Array:
        """With -inf for ids that could not be drawn; `_logits_gradient` is 0 for these."""
        if kept_words_BTX is None:
            return logits_BCV
        assert drawn_from is not None
        kept_BCV = drawn_from.kept(chunk(kept_words_BTX, i), logits_BCV.shape[-1])
        return jnp.where(kept_BCV, logits_BCV, -jnp.inf)

    def run(
        read: Any,
        hidden_BTD: jax.Array,
        targets_BT: jax.Array,
        kept_words_BTX: jax.Array | None,
        num_chunks: jax.Array,
        keeps: bool,
    ) -> Any:
        def of_chunk(i: Any) -> tuple[Any, Any]:
            logits_BCV = without_removed(unembed(chunk(hidden_BTD, i), *read), kept_words_BTX, i)
            values, residuals = _of_logits(with_entropy, logits_BCV, chunk(targets_BT, i))
            return values, residuals[:-1] if keeps else ()

        def whole(like: jax.ShapeDtypeStruct) -> jax.Array:
            return jnp.zeros((like.shape[0], hidden_BTD.shape[1], *like.shape[2:]), like.dtype)

        def step(i: Any, carry: Any) -> Any:
            return jax.tree.map(lambda array, part: put(array, part, i), carry, of_chunk(i))

        return loop(num_chunks, step, jax.tree.map(whole, jax.eval_shape(of_chunk, 0)))

    @jax.custom_vjp
    def over_chunks(
        read: Any,
        hidden_BTD: jax.Array,
        targets_BT: jax.Array,
        kept_words_BTX: jax.Array | None,
        num_chunks: jax.Array,
    ) -> Any:
        return run(read, hidden_BTD, targets_BT, kept_words_BTX, num_chunks, keeps=False)[0]

    def forward(*arguments: Any) -> tuple[Any, Any]:
        are_moving = [primal.perturbed for primal in arguments[0]]
        inputs = jax.tree.map(lambda primal: primal.value, arguments)
        values, kept = run(*inputs, keeps=keeps_logits)
        read, *others = inputs
        moving = [array if is_moving else None for array, is_moving in zip(read, are_moving, strict=True)]
        still = [None if is_moving else array for array, is_moving in zip(read, are_moving, strict=True)]
        return values, (moving, still, *others, kept)

    def backward(residuals: Any, gradients: Any) -> Any:
        moving, still, hidden_BTD, targets_BT, kept_words_BTX, num_chunks, kept = residuals
        gradients = [_zeros_of(g) if isinstance(g, SymbolicZero) else g for g in gradients]

        def step(i: Any, carry: Any) -> Any:
            def logits_of(moving: Any, hidden_BCD: jax.Array) -> jax.Array:
                arrays = [b if a is None else a for a, b in zip(moving, still, strict=True)]
                return unembed(hidden_BCD, *arrays)

            targets_BC = chunk(targets_BT, i)
            logits_BCV, pull_back = jax.vjp(logits_of, moving, chunk(hidden_BTD, i))
            if keeps_logits:
                of_logits = (*jax.tree.map(lambda array: chunk(array, i), kept), targets_BC)
            else:
                logits_BCV = without_removed(logits_BCV, kept_words_BTX, i)
                _, of_logits = _of_logits(with_entropy, logits_BCV, targets_BC)
            parts = tuple(chunk(gradient_BT, i) for gradient_BT in gradients)
            logits_gradient_BCV = _logits_gradient(with_entropy, of_logits, parts)
            moving_gradient, hidden_gradient_BCD = pull_back(logits_gradient_BCV)
            total, hidden_gradient_BTD = carry
            total = jax.tree.map(lambda sum_of, part: sum_of + part.astype(sum_of.dtype), total, moving_gradient)
            return total, put(hidden_gradient_BTD, hidden_gradient_BCD, i)

        # In bfloat16 a sum of many chunks would lose chunks below 2^-9 of the sum.
        start = [None if array is None else jnp.zeros(array.shape, widen(array.dtype)) for array in moving]
        total, hidden_gradient_BTD = loop(num_chunks, step, (start, jnp.zeros_like(hidden_BTD)))
        total = jax.tree.map(lambda sum_of, array: sum_of.astype(array.dtype), total, moving)
        return total, hidden_gradient_BTD, None, None, None

    over_chunks.defvjp(forward, backward, symbolic_zeros=True)
    return over_chunks


def _zeros_of(like: Any) -> jax.Array:
    return jnp.zeros(like.shape, like.dtype)


def _of_logits(with_entropy: bool, logits_BCV: jax.Array, targets_BC: jax.Array) -> tuple[Any, Any]:
    """((log-prob of the target,) or (log-prob, entropy) of softmax(logits), what the gradient needs of them).

    The gradient is written out: the automatic one keeps several arrays of the size of the logits and scatters into
    another, this one is a single pass over the logits. Logits of -inf (forbidden tokens) are fine if one is finite.
    """
    shifted_BCV = logits_BCV - jnp.max(logits_BCV, axis=-1, keepdims=True)
    log_sum_BC = jnp.log(jnp.sum(jnp.exp(shifted_BCV), axis=-1))
    # A masked sum instead of a gather: it stays local where the vocabulary is spread over devices.
    logprobs_BC = jnp.sum(jnp.where(_is_target(logits_BCV, targets_BC), shifted_BCV, 0), axis=-1) - log_sum_BC
    if not with_entropy:
        return (logprobs_BC,), (shifted_BCV, log_sum_BC, None, targets_BC)
    probabilities_BCV = jnp.exp(shifted_BCV - log_sum_BC[..., None])
    entropy_BC = log_sum_BC - jnp.sum(probabilities_BCV * _finite(shifted_BCV), axis=-1)
    return (logprobs_BC, entropy_BC), (shifted_BCV, log_sum_BC, entropy_BC, targets_BC)


def _logits_gradient(with_entropy: bool, residuals: Any, gradients: Sequence[jax.Array]) -> jax.Array:
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
    return logits_gradient_BCV


def _is_target(logits_BCV: jax.Array, targets_BC: jax.Array) -> jax.Array:
    vocabulary = jax.lax.broadcasted_iota(targets_BC.dtype, logits_BCV.shape, logits_BCV.ndim - 1)
    return vocabulary == targets_BC[..., None]


def _finite(log_values: jax.Array) -> jax.Array:
    """0 in place of -inf, because its product with probability 0 must be 0."""
    return jnp.where(jnp.isneginf(log_values), 0, log_values)
