"""The log-prob of every token of given prompts under the policy: how likely it finds a text that it did not write.

In: prompts as token ids. Out: one array for each prompt. Prompts are packed into rows of one fixed size, so one program
serves a whole call, and all calls of the same size. Not here: the choice of weights (`rl.sampler.slot_sampler`), and
completions, whose log-probs the sampler reports.
Legend: R rows, T token positions.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from rl.devices.mesh import num_row_shards, replicated, row_sharding
from rl.devices.programs import Program, Programs
from rl.models.inputs import Inputs, empty_inputs
from rl.models.logprobs import chunk_length, token_logprobs
from rl.models.ops import widen
from rl.models.policy import Params, Policy
from rl.sampler.sizes import MIN_TABLE_LENGTH, size_at_least

TOKENS_PER_CALL = 4096  # over all rows, unless one prompt is longer
OPEN_ROWS = 8  # rows to which a prompt may still be added during packing


class PromptScorer:
    """Scores prompts. Holds compiled programs, one for each size of rows, and no parameters.

    Args:
      policy, mesh, param_shardings, rules: see `rl.sampler.engine.Engine`.
    """

    def __init__(self, policy: Policy, mesh: Mesh, param_shardings: Any, rules: Mapping[str, Sequence[str]]) -> None:
        self._policy, self._param_shardings = policy, param_shardings
        self._rows, self._num_shards = row_sharding(mesh, rules), num_row_shards(mesh, rules)
        self._everywhere = replicated(mesh)
        self._programs = Programs()

    def logprobs(
        self, params: Params, prompts: Sequence[Sequence[int] | np.ndarray], temperature: float, chunk_size: int | None
    ) -> list[np.ndarray]:
        """Log-probs of prompt tokens under softmax(logits / temperature), in nats.

        Args:
          prompts: token ids, at least one each.
          temperature: 0 (greedy) counts as 1, as for completions.
          chunk_size: positions of each row whose logits exist at one time. It changes memory only.

        Returns:
          For each prompt [T - 1], float32 or wider: entry t belongs to token t + 1, given the tokens before it. The
          first token has no log-prob, because nothing comes before it.
        """
        results: dict[int, np.ndarray] = {}
        for inputs, places in packed_calls(prompts, TOKENS_PER_CALL, self._num_shards, self._policy.packs_rows):
            num_rows, length = inputs.tokens_BT.shape
            key = (num_rows, length, temperature or 1.0, chunk_size)
            program = self._programs.get(key, lambda key=key: self._compile(params, *key))
            logprobs_RT = np.asarray(program(params, inputs))
            for number, row, span in places:
                results[number] = logprobs_RT[row, span.start : span.stop - 1]
        return [results[number] for number in range(len(prompts))]

    def scores(
        self,
        params: Params,
        prompts: Sequence[Sequence[int] | np.ndarray],
        temperature: float,
        chunk_size: int | None,
        num_top: int,
    ) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """As `logprobs`, with the `num_top` most likely tokens of each position. A token that is the most likely one
        has the very number of the first of them.

        Another temperature needs no other program. Rows come in few sizes, so that a server compiles few programs.

        Returns:
          For each prompt the log-probs [T - 1], ids [T - 1, N] and log-probs [T - 1, N] of the most likely tokens, the
          most likely first.
        """
        results: dict[int, tuple[np.ndarray, ...]] = {}
        calls = packed_calls(prompts, TOKENS_PER_CALL, self._num_shards, self._policy.packs_rows, steps=1)
        for inputs, places in calls:
            num_rows, length = inputs.tokens_BT.shape
            build = partial(self._compile_scores, params, num_rows, length, chunk_size, num_top)
            program = self._programs.get(("scores", num_rows, length, chunk_size, num_top), build)
            arrays = [np.asarray(array) for array in program(params, inputs, np.float32(temperature or 1.0))]
            for number, row, span in places:
                results[number] = tuple(array[row, span.start : span.stop - 1] for array in arrays)
        return [results[number] for number in range(len(prompts))]  # pyright: ignore[reportReturnType]

    def _compile_scores(
        self, params: Params, num_rows: int, length: int, chunk_size: int | None, num_top: int
    ) -> Callable[..., Any]:
        policy = self._policy
        size = chunk_length(-(-num_rows // self._num_shards), length, chunk_size)

        def of_chunk(params: Params, temperature: jax.Array, hidden_RCD: jax.Array, targets_RC: jax.Array) -> Any:
            logits_RCV = policy.unembed(params, hidden_RCD)
            logits_RCV = logits_RCV.astype(widen(logits_RCV.dtype))
            logits_RCV = logits_RCV / temperature.astype(logits_RCV.dtype)
            shifted_RCV = logits_RCV - jnp.max(logits_RCV, axis=-1, keepdims=True)
            log_sum_RC1 = jnp.log(jnp.sum(jnp.exp(shifted_RCV), axis=-1, keepdims=True))
            top_RCN, top_ids_RCN = jax.lax.top_k(shifted_RCV, num_top)
            is_target = jax.lax.broadcasted_iota(jnp.int32, shifted_RCV.shape, 2) == targets_RC[..., None]
            own_RC1 = jnp.sum(jnp.where(is_target, shifted_RCV, 0), axis=-1, keepdims=True)
            return (own_RC1 - log_sum_RC1)[..., 0], top_ids_RCN, top_RCN - log_sum_RC1

        def of_rows(params: Params, inputs: Inputs, temperature: jax.Array) -> Any:
            padding, targets_RT = -length % size, jnp.roll(inputs.tokens_BT, -1, axis=1)

            def chunks(array: jax.Array) -> jax.Array:
                padded = jnp.pad(array, ((0, 0), (0, padding), *((0, 0),) * (array.ndim - 2)))
                return jnp.moveaxis(padded.reshape(num_rows, -1, size, *array.shape[2:]), 1, 0)

            parts = chunks(policy.hidden(params, inputs)), chunks(targets_RT)
            found = jax.lax.map(lambda part: of_chunk(params, temperature, *part), parts)
            return jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1).reshape(num_rows, -1, *x.shape[3:])[:, :length], found)

        inputs = Inputs(*(jax.ShapeDtypeStruct((num_rows, length), jnp.int32),) * 4)
        shardings = (self._param_shardings, Inputs(*(self._rows,) * 4), self._everywhere)
        arguments = (params, inputs, jax.ShapeDtypeStruct((), jnp.float32))
        return Program(of_rows, shardings, (self._rows,) * 3).prepare(arguments)

    def _compile(
        self, params: Params, num_rows: int, length: int, temperature: float, chunk_size: int | None
    ) -> Callable[..., jax.Array]:
        policy, num_shards = self._policy, self._num_shards

        def of_rows(params: Params, inputs: Inputs) -> jax.Array:
            hidden_RTD, group_ids_RT = policy.hidden(params, inputs), inputs.group_ids_BT
            follows_RT = (group_ids_RT[:, 1:] == group_ids_RT[:, :-1]) & (group_ids_RT[:, 1:] >= 0)
            return token_logprobs(
                policy,
                params,
                hidden_RTD[:, :-1],
                inputs.tokens_BT[:, 1:],
                temperature,
                chunk_size,
                with_entropy=False,
                mask_BT=follows_RT,
                num_shards=num_shards,
            )[0]

        inputs = Inputs(*(jax.ShapeDtypeStruct((num_rows, length), jnp.int32),) * 4)
        shardings = (self._param_shardings, Inputs(*(self._rows,) * 4))
        return Program(of_rows, shardings, self._rows).prepare((params, inputs))


def packed_calls(
    prompts: Sequence[Sequence[int] | np.ndarray],
    tokens_per_call: int,
    num_shards: int,
    packs_rows: bool,
    steps: int = 2,
) -> Iterator[tuple[Inputs, list[tuple[int, int, slice]]]]:
    """Prompts, at least one token each, as calls of one shape: rows of one length, a multiple of `num_shards` of them.

    Args:
      tokens_per_call: the most tokens of a call over all rows, unless one prompt for each shard is longer.
      packs_rows: whether a row may hold several prompts, each a group of its own.
      steps: numbers and lengths of rows in each doubling.

    Yields:
      numpy inputs [R, T], and (number of a prompt, its row, its positions in the row).
    """
    longest = max((len(prompt) for prompt in prompts), default=0)
    length = size_at_least(max(longest, MIN_TABLE_LENGTH), steps)
    rows = pack_rows([len(prompt) for prompt in prompts], length, length if packs_rows else 1)
    most = max(tokens_per_call // length // num_shards, 1)
    num_rows = num_shards * min(most, size_at_least(-(-len(rows) // num_shards), steps))
    for first in range(0, len(rows), num_rows):
        inputs, places = empty_inputs(num_rows, length), list(_spans(rows[first : first + num_rows], prompts))
        for number, row, span in places:
            inputs.tokens_BT[row, span] = prompts[number]
            inputs.positions_BT[row, span] = np.arange(len(prompts[number]))
            inputs.group_ids_BT[row, span] = number
        yield inputs, places


def pack_rows(lengths: Sequence[int], row_length: int, most_per_row: int) -> list[list[int]]:
    """Packs prompts, by number, into rows of at most `row_length` tokens: first fit among the newest rows."""
    rows: list[list[int]] = []
    left: list[int] = []
    for number, length in enumerate(lengths):
        first = max(len(rows) - OPEN_ROWS, 0)
        fits = (row for row in range(first, len(rows)) if left[row] >= length and len(rows[row]) < most_per_row)
        row = next(fits, None)
        if row is None:
            rows.append([])
            left.append(row_length)
            row = len(rows) - 1
        rows[row].append(number)
        left[row] -= length
    return rows


def _spans(
    rows: Sequence[Sequence[int]], prompts: Sequence[Sequence[int] | np.ndarray]
) -> Iterator[tuple[int, int, slice]]:
    """(prompt, row, its positions in the row) of packed prompts."""
    for row, numbers in enumerate(rows):
        start = 0
        for number in numbers:
            stop = start + len(prompts[number])
            yield number, row, slice(start, stop)
            start = stop
