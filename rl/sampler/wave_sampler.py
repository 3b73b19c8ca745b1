"""Completions from a policy with its own kind of cache, decoded in waves of rows that are at the same position.

In: a `rl.models.policy.WavePolicy`, parameters, prompts as token ids, a key. Out: a `Completion` for each request, as
from `rl.sampler.slot_sampler`, with the same random numbers. A position is also the place in the cache, so nothing is
padded: a prompt longer than the shortest of its wave is read token by token while others draw. This is right for any
causal model, whether its cache holds keys or a recurrent state. The price: each sample has its own copy of its prompt,
and a wave lasts as long as its longest completion. Not here: the rule that draws a token (`rl.sampler.token_draw`), the
toolkit's own decoder (`rl.sampler.slot_sampler`).
Legend: B rows of a wave, P prompt positions, C steps of a chunk, V vocabulary, N most likely tokens.
"""

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, NoReturn

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from rl.devices import hosts
from rl.devices.mesh import num_row_shards, replicated, row_sharding
from rl.devices.programs import Program
from rl.models.inputs import Inputs, plain_inputs
from rl.models.policy import Params, WavePolicy
from rl.sampler.contract import (
    DECODE,
    PREFILL,
    Completion,
    DrawProgram,
    DrawPrograms,
    Request,
    check_requests,
    refuse_slot_rules,
    refuse_turns,
    with_continued,
)
from rl.sampler.decoding import TOKEN_LOOP, request_key
from rl.sampler.endings import Drawing, find_end
from rl.sampler.prompt_logprobs import PromptScorer
from rl.sampler.sizes import size_at_least, size_at_most
from rl.sampler.token_draw import Draw, SamplingParams, TokenCounts, add_token, draw

MAX_DERIVED_ROWS = 256  # when a memory budget sets the number


class Wave(NamedTuple):
    """The requests of a wave's rows: prompts_BP is int32, padded at the end; a row without a request has limit 0.
    before_B: tokens at the end of a prompt that belong to the completion, which the request continues.
    """

    prompts_BP: Any
    lengths_B: Any
    limits_B: Any
    keys_B: Any
    before_B: Any
    prompt_seen_BV: Any = None


class Progress(NamedTuple):
    """The state of a wave: all positions before `position` are in the cache; tokens_B were drawn last; counts are
    `TokenCounts` where a penalty is on, else None.
    """

    position: Any
    tokens_B: Any
    done_B: Any
    counts: Any


class WaveSampler:
    """Draws completions. Holds compiled programs and no parameters.

    Args:
      policy, mesh, param_shardings, rules: as `rl.sampler.engine.Engine` takes them.
      slots: rows of a wave over all devices; None: as many as `kv_bytes` allows, up to 256.
      kv_bytes: the most bytes on each device for the policy's cache; None: no bound.
      decode_text: token ids -> text; needed for stop strings only.
      chunk, stop_chunk: steps between two looks of the host, without and with stop strings.
    """

    def __init__(
        self,
        policy: WavePolicy,
        mesh: Mesh,
        param_shardings: Any,
        *,
        rules: Mapping[str, Sequence[str]],
        slots: int | None = None,
        kv_bytes: int | None = None,
        decode_text: Callable[[Sequence[int]], str] | None = None,
        chunk: int = 32,
        stop_chunk: int = 8,
    ) -> None:
        self._policy, self._param_shardings = policy, param_shardings
        self._scorer = PromptScorer(policy, mesh, param_shardings, rules)
        self._num_shards = num_row_shards(mesh, rules)
        if slots is not None and slots < self._num_shards:
            raise ValueError(
                f"sampling.slots must be >= {self._num_shards}, the devices rows are spread over, got {slots}"
            )
        self._slots, self._kv_bytes = slots, kv_bytes
        self._decode_text, self._chunk, self._stop_chunk = decode_text, chunk, min(stop_chunk, chunk)
        self._rows, self._everywhere = row_sharding(mesh, rules), replicated(mesh)
        self._request_keys = jax.jit(_request_keys, out_shardings=self._rows)
        self._longest = 0  # tokens of the longest expected prompt
        self._num_prefilled_again = 0
        self._most_requests = 0  # of the planned calls
        # {(rows, cache length): programs}, kept so that each wave of a run uses the compiled programs again.
        self._programs = functools.cache(self._programs_of)

    @property
    def num_prefilled_again(self) -> int:
        """Tokens that were prefilled, or read one by one, so far for requests that continue a completion."""
        return self._num_prefilled_again

    def expect(self, prompts: Sequence[Sequence[int] | np.ndarray], num_prompts: int = 0, num_samples: int = 0) -> None:
        """Plans shapes for prompts like these. Calls with such prompts then share their programs.

        Calls with fewer than `num_prompts * num_samples` requests share them as well: they have as many rows, some of
        which draw nothing.
        """
        self.expect_length(max(len(prompt) for prompt in prompts), num_prompts, num_samples)

    def expect_length(self, prompt_length: int, num_prompts: int = 0, num_samples: int = 0) -> None:
        """Plans shapes for prompts of up to so many tokens."""
        self._longest = max(self._longest, prompt_length)
        self._most_requests = num_prompts * num_samples

    def close(self) -> None:
        """Nothing is compiled in the background here."""

    def stream(
        self,
        params: Params,
        prompts: Sequence[Sequence[int] | np.ndarray],
        requests: Sequence[Request],
        sampling: SamplingParams,
        key: jax.Array,
    ) -> Iterator[tuple[int, Completion]]:
        """Draws the requests and yields (its place in `requests`, completion) of each as it ends.

        Args and randomness: as `rl.sampler.slot_sampler.Sampler.stream`.

        Raises:
          ValueError: an empty prompt, token ids outside the vocabulary, a length beyond the model's positions, stop
            strings without `decode_text`, a cache that does not fit in `kv_bytes`.
        """
        refuse_slot_rules("a wave policy", sampling)
        check_requests(self._policy.config, self._decode_text, prompts, requests, sampling)
        return self._stream(params, prompts, requests, sampling, key)

    def check_turns(self, num_prompts: int, num_samples: int, longest: int) -> NoReturn:
        """ValueError: here a completion has one turn."""
        refuse_turns("a policy that decodes in waves")

    def warm_up_turns(
        self, params: Any, num_prompts: int, num_samples: int, sampling: SamplingParams, longest: int
    ) -> NoReturn:
        """ValueError as in `check_turns`."""
        refuse_turns("a policy that decodes in waves")

    def open(
        self, params: Any, sampling: SamplingParams, key: Any, num_prompts: int, num_samples: int, longest: int
    ) -> NoReturn:
        """ValueError as in `check_turns`."""
        refuse_turns("a policy that decodes in waves")

    def prompt_logprobs(
        self, params: Params, prompts: Sequence[Sequence[int] | np.ndarray], temperature: float, chunk_size: int | None
    ) -> list[np.ndarray]:
        """Log-probs of prompt tokens, see `rl.sampler.prompt_logprobs`."""
        return self._scorer.logprobs(params, prompts, temperature, chunk_size)

    def release(self) -> None:
        """Nothing is kept from call to call."""

    def warm_up(self, params: Params, num_prompts: int, num_samples: int, sampling: SamplingParams) -> None:
        """Compiles at once what a call of this size needs, for prompts of any length up to the expected one."""
        num_rows, length = self._shape(num_prompts * num_samples, sampling)
        programs = self._programs(num_rows, length)
        for start in self._starts():
            programs.prefill(params, programs.empty_cache(params), self._put(np.zeros((num_rows, start), np.int32)))
        wave = self._wave([], [], [], num_rows, length, sampling, jax.random.key(0))
        programs.chunk(sampling, self._steps(sampling))(
            params, programs.empty_cache(params), self._begin(wave, 0, 0), wave
        )

    def check(self, num_prompts: int, num_samples: int, sampling: SamplingParams) -> None:
        """ValueError where one row of a call of this size does not fit in `kv_bytes`."""
        self._shape(num_prompts * num_samples, sampling)

    def programs(self, params: Params, num_prompts: int, num_samples: int, sampling: SamplingParams) -> DrawPrograms:
        """What a call of this size runs and keeps, for prompts of up to the expected length; nothing runs.

        Of prefill it is the program for the longest prompts, none where these have one token. Nothing is known of the
        cache but its bytes. Raises ValueError as `check` does.
        """
        num_rows, length = self._shape(num_prompts * num_samples, sampling)
        programs = self._programs(num_rows, length)
        cache = programs.cache_shapes
        rows = {name: jax.ShapeDtypeStruct((num_rows,), name) for name in ("int32", "bool")}
        seen = counts = None
        if sampling.needs_counts:
            num_entries = self._policy.config.vocab_size
            counts = jax.eval_shape(
                lambda: TokenCounts(*(jnp.zeros((num_rows, num_entries), dtype) for dtype in (jnp.int32, jnp.bool_)))
            )
            seen = counts.prompt_BV
        keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), num_rows))
        prompts = jax.ShapeDtypeStruct((num_rows, length), jnp.int32)
        wave = Wave(prompts, rows["int32"], rows["int32"], keys, rows["int32"], seen)
        progress = Progress(jax.ShapeDtypeStruct((), jnp.int32), rows["int32"], rows["bool"], counts)
        steps = self._steps(sampling)
        starts = self._starts()
        chunk = programs.chunk_program(sampling, steps), (params, cache, progress, wave)
        found = [DrawProgram(DECODE, DECODE, lambda: chunk, steps)]
        if starts:
            head = jax.ShapeDtypeStruct((num_rows, starts[-1]), jnp.int32)
            prefill = programs.prefill_program, (params, cache, head)
            found.insert(0, DrawProgram(PREFILL, PREFILL, lambda: prefill, 0))
        return DrawPrograms(found, num_rows // self._num_shards * self._bytes_per_row(length), 0)

    def _starts(self) -> list[int]:
        """The numbers of positions with which waves may begin: all but the last of the shortest prompt."""
        return sorted({size_at_most(n) for n in range(1, self._longest)})

    def _stream(
        self,
        params: Params,
        prompts: Sequence[Sequence[int] | np.ndarray],
        requests: Sequence[Request],
        sampling: SamplingParams,
        key: jax.Array,
    ) -> Iterator[tuple[int, Completion]]:
        prompts, requests = with_continued(prompts, requests)
        self._num_prefilled_again += sum(len(prompts[r.prompt]) - 1 for r in requests if r.continues)
        self._longest = max([self._longest, *(len(prompts[request.prompt]) for request in requests)])
        num_rows, length = self._shape(len(requests), sampling)
        # Prompts of similar length go together, so that fewer tokens are read one by one.
        order = sorted(range(len(requests)), key=lambda i: len(prompts[requests[i].prompt]))
        for first in range(0, len(order), num_rows):
            numbers = order[first : first + num_rows]
            yield from self._draw_wave(params, prompts, requests, numbers, num_rows, length, sampling, key)

    def _draw_wave(
        self,
        params: Params,
        prompts: Sequence[Sequence[int] | np.ndarray],
        requests: Sequence[Request],
        numbers: list[int],
        num_rows: int,
        length: int,
        sampling: SamplingParams,
        key: jax.Array,
    ) -> Iterator[tuple[int, Completion]]:
        programs = self._programs(num_rows, length)
        wave = self._wave(prompts, requests, numbers, num_rows, length, sampling, key)
        cache = programs.empty_cache(params)
        shortest = min(len(prompts[requests[number].prompt]) for number in numbers)
        start = size_at_most(shortest - 1) if shortest > 1 else 0
        if start:
            head_BP = np.zeros((num_rows, start), np.int32)
            for row, number in enumerate(numbers):
                head_BP[row] = prompts[requests[number].prompt][:start]
            cache = programs.prefill(params, cache, self._put(head_BP))
        progress = self._begin(wave, len(numbers), start, [requests[number].continues for number in numbers])
        drawings = {row: Drawing(requests[number].continues) for row, number in enumerate(numbers)}
        chunk = programs.chunk(sampling, self._steps(sampling))
        while drawings:
            cache, progress, report = chunk(params, cache, progress, wave)
            num_steps, is_drawn_CB, drawn = jax.device_get(report)
            for row in list(drawings):
                request = requests[numbers[row]]
                steps = np.flatnonzero(is_drawn_CB[:num_steps, row])
                completion = self._add(
                    drawings[row],
                    tuple(column[steps, row] for column in drawn if column is not None),
                    request,
                    sampling,
                )
                if completion is not None:
                    del drawings[row]
                    yield numbers[row], completion
            if sampling.stop_strings:  # which the device cannot see
                is_live_B = np.isin(np.arange(num_rows), list(drawings))
                progress = progress._replace(done_B=self._put(~is_live_B))

    def _add(
        self, drawing: Drawing, columns: tuple[np.ndarray, ...], request: Request, sampling: SamplingParams
    ) -> Completion | None:
        num_checked, num_before = drawing.num_tokens, len(request.continues)
        drawing.add(columns)
        tokens = drawing.token_ids() if sampling.stop_strings else columns[0]
        ends = request.limit, sampling, self._decode_text, num_before
        end = find_end(tokens, num_checked, drawing.num_tokens, *ends)
        if end is None:
            return None
        count, finish_reason, stop_reason = end
        token_ids, sampler_logprobs, policy_logprobs, *more = (
            column[: count - num_before] for column in drawing.columns()
        )
        return Completion(
            request.prompt_index,
            request.sample_index,
            token_ids,
            sampler_logprobs,
            policy_logprobs,
            finish_reason,
            stop_reason,
            *more,
        )

    # Plans

    def _shape(self, num_requests: int, sampling: SamplingParams) -> tuple[int, int]:
        """(rows of a wave, positions of the cache)."""
        length = size_at_least(self._longest + sampling.max_completion_length, 4)
        limit = self._policy.config.max_position_embeddings
        length = min(length, limit)
        most = size_at_least(-(-max(num_requests, self._most_requests) // self._num_shards), 4)
        most = min(most, (self._slots or max(MAX_DERIVED_ROWS, self._num_shards)) // self._num_shards)
        if self._slots is None and self._kv_bytes is not None:
            per_row = self._bytes_per_row(length)
            if per_row > self._kv_bytes:
                raise ValueError(
                    f"sampling.kv_memory must allow at least one sequence of {length} tokens, whose cache takes "
                    f"{per_row:,} bytes, got {self._kv_bytes:,}; raise it, or shorten sampling.max_completion_length"
                )
            most = min(most, self._kv_bytes // max(per_row, 1))
        return most * self._num_shards, length

    def _bytes_per_row(self, length: int) -> int:
        cache = jax.eval_shape(lambda params: self._policy.empty_cache(params, 1, length), self._param_shapes)
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(cache))

    @functools.cached_property
    def _param_shapes(self) -> Any:
        return jax.eval_shape(lambda: self._policy.init(jax.random.key(0)))

    def _steps(self, sampling: SamplingParams) -> int:
        return self._stop_chunk if sampling.stop_strings else self._chunk

    def _wave(
        self,
        prompts: Sequence[Sequence[int] | np.ndarray],
        requests: Sequence[Request],
        numbers: Sequence[int],
        num_rows: int,
        length: int,
        sampling: SamplingParams,
        key: jax.Array,
    ) -> Wave:
        prompts_BP = np.zeros((num_rows, length), np.int32)
        lengths_B, limits_B = np.ones(num_rows, np.int32), np.zeros(num_rows, np.int32)
        indices_2B, seeds_B = np.zeros((2, num_rows), np.int32), np.zeros(num_rows, np.uint32)
        before_B, seeded_B = np.zeros(num_rows, np.int32), np.zeros(num_rows, bool)
        seen_BV = np.zeros((num_rows, self._policy.config.vocab_size), bool) if sampling.needs_counts else None
        for row, number in enumerate(numbers):
            request = requests[number]
            prompt = np.asarray(prompts[request.prompt], np.int32)
            prompts_BP[row, : prompt.size], lengths_B[row], before_B[row] = prompt, prompt.size, len(request.continues)
            limits_B[row] = request.limit - before_B[row]
            indices_2B[:, row] = request.prompt_index, request.sample_index
            seeds_B[row], seeded_B[row] = request.seed or 0, request.seed is not None
            if seen_BV is not None:
                seen_BV[row, prompt[: prompt.size - before_B[row]]] = True
        randomness = map(self._put, (*indices_2B, seeds_B, seeded_B))
        keys_B = self._request_keys(hosts.put_key(key, self._everywhere), *randomness)
        fields = (prompts_BP, lengths_B, limits_B, None, before_B, seen_BV)
        return Wave(*(None if field is None else self._put(field) for field in fields))._replace(keys_B=keys_B)

    def _begin(self, wave: Wave, num_requests: int, start: int, before: Sequence[Sequence[int]] = ()) -> Progress:
        """Where a wave starts. before: the tokens that each request continues."""
        counts = None
        if wave.prompt_seen_BV is not None:
            counts_BV = np.zeros(wave.prompt_seen_BV.shape, np.int32)
            for row, tokens in enumerate(before):
                np.add.at(counts_BV[row], np.array(tokens, np.int32), 1)
            counts = TokenCounts(self._put(counts_BV), wave.prompt_seen_BV)
        done_B = np.arange(wave.limits_B.shape[0]) >= num_requests
        position = hosts.put(np.int32(start), self._everywhere)
        return Progress(position, self._put(np.zeros(done_B.size, np.int32)), self._put(done_B), counts)

    def _put(self, rows: Any) -> jax.Array:
        return hosts.put(rows, self._rows)

    # Programs

    def _programs_of(self, num_rows: int, length: int) -> "_Programs":
        policy, rows, everywhere = self._policy, self._rows, self._everywhere
        shapes = jax.eval_shape(lambda params: policy.empty_cache(params, num_rows, length), self._param_shapes)
        cache = jax.tree.map(lambda leaf: rows if leaf.ndim else everywhere, shapes)
        progress = Progress(everywhere, rows, rows, rows)
        params = self._param_shardings

        def empty_cache(params: Params) -> Any:
            return policy.empty_cache(params, num_rows, length)

        def chunk_program(sampling: SamplingParams, num_steps: int) -> Program:
            decode = functools.partial(_decode_chunk, policy, rows, sampling, num_steps)
            where = (params, cache, progress, Wave(rows, rows, rows, rows, rows, rows))
            return Program(decode, where, (cache, progress, everywhere), donate=(1,))

        prefill = Program(functools.partial(_prefill, policy), (params, cache, rows), cache, donate=(1,))
        return _Programs(
            cache_shapes=shapes,
            empty_cache=Program(empty_cache, (params,), cache).jit(),
            prefill_program=prefill,
            prefill=prefill.jit(),
            chunk_program=chunk_program,
            chunk=functools.cache(lambda sampling, num_steps: chunk_program(sampling, num_steps).jit()),
        )


class _Programs(NamedTuple):
    """Of waves with so many rows and positions. chunk, chunk_program: of (sampling, steps)."""

    cache_shapes: Any
    empty_cache: Callable[..., Any]
    prefill_program: Program
    prefill: Callable[..., Any]
    chunk_program: Callable[[SamplingParams, int], Program]
    chunk: Callable[[SamplingParams, int], Callable[..., Any]]


def _request_keys(
    key: jax.Array, prompt_indices_B: jax.Array, sample_indices_B: jax.Array, seeds_B: jax.Array, seeded_B: jax.Array
) -> jax.Array:
    keys_of = jax.vmap(request_key, (None, 0, 0, 0, 0))
    return keys_of(key, prompt_indices_B, sample_indices_B, seeds_B, seeded_B)


def _prefill(policy: WavePolicy, params: Params, cache: Any, tokens_BP: jax.Array) -> Any:
    """The cache after the first positions of all rows."""
    return policy.extend(params, plain_inputs(tokens_BP), cache)[1]


def _decode_chunk(
    policy: WavePolicy,
    rows: NamedSharding,
    sampling: SamplingParams,
    num_steps: int,
    params: Params,
    cache: Any,
    progress: Progress,
    wave: Wave,
) -> tuple[Any, Progress, tuple[jax.Array, jax.Array, Draw]]:
    """Computes up to `num_steps` more positions of every row. Stops when all rows have ended.

    Returns:
      The cache, the state of the wave, and the report: (steps made, which rows drew a token [C, B], what they drew).
    """
    eos_ids = jnp.asarray(sampling.eos_ids, jnp.int32)
    last = wave.prompts_BP.shape[1] - 1

    def advance(cache: Any, progress: Progress) -> tuple[Any, Progress, jax.Array, Draw]:
        position, counts = progress.position, progress.counts
        prompt_B = jax.lax.dynamic_index_in_dim(wave.prompts_BP, jnp.minimum(position, last), 1, keepdims=False)
        fed_B = jnp.where(position < wave.lengths_B, prompt_B, progress.tokens_B)
        fed_B1 = jax.lax.with_sharding_constraint(fed_B, rows)[:, None]
        labels_B1 = jnp.zeros_like(fed_B1)
        inputs = Inputs(fed_B1, jnp.full_like(fed_B1, position), labels_B1, labels_B1)
        hidden_B1D, cache = policy.extend(params, inputs, cache)
        num_drawn_B = position - (wave.lengths_B - 1)
        is_drawn_B = (num_drawn_B >= 0) & ~progress.done_B
        drawn = _draw(policy.unembed(params, hidden_B1D[:, 0]), wave, num_drawn_B, sampling, counts)
        is_last_B = jnp.isin(drawn.token_B, eos_ids) | (num_drawn_B + 1 >= wave.limits_B)
        progress = Progress(
            position + 1,
            jnp.where(is_drawn_B, drawn.token_B, progress.tokens_B),
            progress.done_B | (is_drawn_B & is_last_B),
            None if counts is None else add_token(counts, drawn.token_B, is_drawn_B),
        )
        return cache, progress, is_drawn_B, drawn

    def step(carry: tuple) -> tuple:
        cache, progress, index, columns = carry
        cache, progress, *new = advance(cache, progress)
        columns = jax.tree.map(
            lambda old, x: jax.lax.dynamic_update_index_in_dim(old, x, index, 0), columns, tuple(new)
        )
        return cache, progress, index + 1, columns

    def unfinished(carry: tuple) -> jax.Array:
        return (carry[2] < num_steps) & ~jnp.all(carry[1].done_B)

    shapes = jax.eval_shape(advance, cache, progress)[2:]
    columns = jax.tree.map(lambda like: jnp.zeros((num_steps, *like.shape), like.dtype), shapes)
    with jax.named_scope(TOKEN_LOOP):
        start = (cache, progress, jnp.int32(0), columns)
        cache, progress, num_made, columns = jax.lax.while_loop(unfinished, step, start)
    return cache, progress, (num_made, *columns)


def _draw(
    logits_BV: jax.Array, wave: Wave, num_drawn_B: jax.Array, sampling: SamplingParams, counts: TokenCounts | None
) -> Draw:
    """The next token of every row, with the row's random number at this position of its completion."""

    def uniform(key: jax.Array, position: jax.Array) -> jax.Array:
        return jax.random.uniform(jax.random.fold_in(key, position), dtype=logits_BV.dtype)

    positions_B = wave.before_B + jnp.maximum(num_drawn_B, 0)
    uniform_B = jax.vmap(uniform)(wave.keys_B, positions_B)
    return draw(logits_BV, uniform_B, sampling, positions_B < sampling.min_completion_length, counts)
