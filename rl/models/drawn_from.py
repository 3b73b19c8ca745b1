"""The distribution from which tokens were drawn, where sampling rules change it from the policy's softmax.

In: the active rules. Out, for the sampler: the ids that the rules left at a token, in few words; for training: logits
that give the same distribution for any weights. With `grpo.policy_distribution: sampled` all log-probs of a token are
normalised over the ids that could have been drawn with it ("Keep Sampling Mask", https://arxiv.org/abs/2512.02556,
section 3.1). The ids are the sampler's own, because logits of another program round differently: a rule that is applied
again could decide otherwise about an id at its boundary. Not here: the rules themselves (`rl.sampler.token_draw`).

Words are uint32. How many a token has, and what they mean, follows from the rules and the vocabulary:

- top-k of at most V / 32: the ids, each plus 1; 0 for an id that another rule removed;
- other truncation: a bit for each id, the lowest first; exact for a set of any size;
- a minimum length alone: the end ids that could not be drawn, each plus 1; 0 where all could.

Words that are all 0 leave the whole vocabulary. Forbidden ids and the bias are the same at every token, so they take no
words. Legend: V vocabulary, X words of a token, K ids.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

BITS = 32  # of a word
MAX_ENDS = 8  # end ids that a minimum length may forbid, where nothing else needs words


@dataclasses.dataclass(frozen=True)
class DrawnFrom:
    """The rules that changed the distribution; hashable, so that it can be a static argument of jit.

    top_k: 0 is off. truncates: top-p or min-p is on. forbids_ends: a minimum length is on.
    forbidden_ids: never drawn. logit_bias: pairs of a token id and what its logit gains.
    """

    top_k: int
    truncates: bool
    forbids_ends: bool
    forbidden_ids: tuple[int, ...]
    logit_bias: tuple[tuple[int, float], ...]

    @classmethod
    def of(cls, rules: Any, forbids_ends: bool) -> "DrawnFrom":
        """From anything with the rules' fields: the `sampling` section, or `rl.sampler.token_draw.SamplingParams`."""
        return cls(
            top_k=rules.top_k,
            truncates=rules.top_p < 1 or rules.min_p > 0,
            forbids_ends=forbids_ends,
            forbidden_ids=tuple(rules.forbidden_ids),
            logit_bias=tuple(sorted(dict(rules.logit_bias).items())),
        )

    def holds_ids(self, vocab_size: int) -> bool:
        """Whether words are the ids that top-k left."""
        return 0 < self.top_k <= _num_bit_words(vocab_size)

    @property
    def holds_ends(self) -> bool:
        """Whether words are the end ids that could not be drawn."""
        return self.forbids_ends and not self.truncates and not self.top_k

    def num_words(self, vocab_size: int) -> int:
        """X, the words of each token."""
        if self.holds_ids(vocab_size):
            return self.top_k
        if self.truncates or self.top_k:
            return _num_bit_words(vocab_size)
        return MAX_ENDS if self.forbids_ends else 0

    def adjusted(self, logits_V: jax.Array) -> jax.Array:
        """Logits [..., V] with the bias, and with -inf for the forbidden ids: what is the same at every token."""
        if self.logit_bias:
            logits_V = logits_V + bias_of(self.logit_bias, logits_V.shape[-1], logits_V.dtype)
        if self.forbidden_ids:
            logits_V = jnp.where(is_any_of(self.forbidden_ids, logits_V.shape[-1]), -jnp.inf, logits_V)
        return logits_V

    def kept(self, words_X: jax.Array, vocab_size: int) -> jax.Array:
        """bool [..., V]: which ids the words [..., X] leave; forbidden ids need not be left out."""
        if self.holds_ends:
            return ~marked(words_X, vocab_size)
        is_empty_1 = jnp.all(words_X == 0, axis=-1, keepdims=True)
        if self.holds_ids(vocab_size):
            return marked(words_X, vocab_size) | is_empty_1
        bits = words_X[..., None] >> jnp.arange(BITS, dtype=jnp.uint32) & 1
        return (bits.reshape(*words_X.shape[:-1], -1)[..., :vocab_size] == 1) | is_empty_1


def bias_of(logit_bias: tuple[tuple[int, float], ...], vocab_size: int, dtype: jnp.dtype) -> jax.Array:
    """What each logit gains, [V]; there is at least one pair."""
    ids, biases = zip(*logit_bias, strict=True)
    return jnp.zeros(vocab_size, dtype).at[jnp.asarray(ids)].set(jnp.asarray(biases, dtype))


def is_any_of(ids: tuple[int, ...], vocab_size: int) -> jax.Array:
    """bool [V]: the ids; those outside the vocabulary are dropped."""
    return jnp.zeros(vocab_size, bool).at[jnp.asarray(ids)].set(True, mode="drop")


def ids_to_words(ids_K: jax.Array, is_one_K: jax.Array) -> jax.Array:
    """Ids [..., K] as words: each plus 1, 0 where the bool is_one_K does not hold."""
    return jnp.where(is_one_K, ids_K + 1, 0).astype(jnp.uint32)


def bits_to_words(kept_V: jax.Array) -> jax.Array:
    """bool [..., V] as words, a bit for each id."""
    padding = -kept_V.shape[-1] % BITS
    padded_V = jnp.pad(kept_V, [*[(0, 0)] * (kept_V.ndim - 1), (0, padding)])
    bits = padded_V.reshape(*kept_V.shape[:-1], -1, BITS).astype(jnp.uint32)
    return jnp.sum(bits << jnp.arange(BITS, dtype=jnp.uint32), axis=-1, dtype=jnp.uint32)


def marked(words_K: jax.Array, vocab_size: int) -> jax.Array:
    """bool [..., V]: the ids that words [..., K] hold, each plus 1; 0 holds none."""
    shape = words_K.shape[:-1]
    rows = jnp.arange(words_K[..., 0].size)[:, None]
    # 0 becomes an id behind the vocabulary, which is dropped.
    ids_NK = jnp.where(words_K == 0, vocab_size, words_K.astype(jnp.int32) - 1).reshape(-1, words_K.shape[-1])
    is_marked_NV = jnp.zeros((rows.size, vocab_size), bool).at[rows, ids_NK].set(True, mode="drop")
    return is_marked_NV.reshape(*shape, vocab_size)


def _num_bit_words(vocab_size: int) -> int:
    return -(-vocab_size // BITS)
