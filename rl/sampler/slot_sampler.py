"""Completions of prompts, drawn with the policy's own parameters on the policy's own mesh: no copy, no weight sync.

In: parameters, prompts as token ids, a key. Out: a `Completion` for each prompt and sample, all together or as they
end. Elsewhere: the rule that draws a token (`rl.sampler.token_draw`), compiled decoding (`rl.sampler.engine`), who
waits where (`rl.sampler.request_queue`), tokenising, rewards and the choice of prompts.

Every prompt is prefilled once, packed with others, and all its samples read it in place. A common prefix of all prompts
is prefilled once. Slots draw in chunks of a few tokens. A slot whose completion ends takes the next request inside the
chunk. Between chunks the host reads the drawn tokens, looks for stop strings, prefills more prompts, drops idle slots
and grows the cache.
"""

import dataclasses
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from rl.devices.programs import Build, Program
from rl.models.cache import CachePart
from rl.models.config import Quantization
from rl.models.inputs import plain_inputs
from rl.models.lora import quantization_of
from rl.models.policy import Params, Policy
from rl.models.quantized import quantize_params, quantized_shardings
from rl.sampler import request_queue
from rl.sampler.contract import (
    DECODE,
    PREFILL,
    Completion,
    DrawProgram,
    DrawPrograms,
    Request,
    check_requests,
    requests_for,
    with_continued,
)
from rl.sampler.engine import Engine, Shape, generate_key, prefill_key, prefill_pieces
from rl.sampler.prompt_logprobs import PromptScorer
from rl.sampler.shape_plan import (
    READ_SIZES,
    ExpectedPrompts,
    KVBudget,
    ShardRequests,
    few_rows,
    first_shape,
    open_shape,
    rest_lengths,
    rows_moved,
    rows_read,
    turn_shape,
    usable_common_length,
)
from rl.sampler.sizes import CacheSize, cache_sizes, later_cache_sizes, later_session_sizes, session_sizes
from rl.sampler.slot_rules import SlotSampling
from rl.sampler.slot_session import SlotSession, prefill_chunk
from rl.sampler.token_draw import SamplingParams

__all__ = ["Completion", "Sampler"]

TURN_CHUNK = 16  # tokens decoded between two looks of the host, where slots whose turns ended wait for the host


@dataclasses.dataclass(frozen=True)
class _Prefix:
    """Keys and values of a common prefix, and the weights that computed them."""

    token_ids: tuple[int, ...]
    weights: list[weakref.ref]
    part: CachePart

    def holds(self, token_ids: tuple[int, ...], params: Params) -> bool:
        """Whether the keys and values belong to this prefix and to these arrays themselves."""
        leaves = jax.tree.leaves(params)
        if token_ids != self.token_ids or len(leaves) != len(self.weights):
            return False
        return all(seen() is leaf for seen, leaf in zip(self.weights, leaves, strict=True))


class Sampler:
    """Draws completions. Holds compiled programs and no parameters.

    Args:
      policy, mesh, param_shardings, rules: see `rl.sampler.engine.Engine`.
      decode_shardings: the layout of parameters in decoding, by `rules`. Every call copies the parameters to it, from
        device to device. None: `param_shardings`, without a copy.
      slots: completions decoded at a time over all devices; None: as many as `kv_bytes` allows, up to 256.
      kv_bytes: the most bytes on each device for keys, values and states, prompts in prefill included; None: no bound.
      decode_text: token ids -> text; needed for stop strings only.
      chunk: tokens decoded between two looks of the host.
      stop_chunk: the same with stop strings, which only the host can see.
      kv_dtype: None: the cache is in the compute dtype; "int8".
      weights: how every call quantises a copy of the matrices for decoding, a quarter or an eighth of their float32
        size (see `rl.models.quantized`). None: the parameters themselves are read.

    Raises:
      ValueError: there are fewer slots than shards of rows on this mesh.
    """

    def __init__(
        self,
        policy: Policy,
        mesh: Mesh,
        param_shardings: Any,
        *,
        rules: Mapping[str, Sequence[str]],
        decode_shardings: Any = None,
        slots: int | None = None,
        kv_bytes: int | None = None,
        decode_text: Callable[[Sequence[int]], str] | None = None,
        chunk: int = 32,
        stop_chunk: int = 8,
        kv_dtype: str | None = None,
        weights: Quantization | None = None,
    ) -> None:
        convert: Callable[[Params], Params] = lambda params: params  # noqa: E731
        shardings = param_shardings if decode_shardings is None else decode_shardings
        if weights is not None:
            if quantization_of(policy.config) is not None:
                raise ValueError(
                    f"sampling.weight_dtype must be null for weights that are quantised already, got {weights.dtype!r}"
                )
            shardings = quantized_shardings(policy.config, shardings, weights)
            convert = partial(quantize_params, policy.config, quantization=weights)
        self._convert = None if shardings is param_shardings else Program(convert, (param_shardings,), shardings)
        self.engine = Engine(policy, mesh, shardings, rules=rules, kv_dtype=kv_dtype)
        if slots is not None and slots < self.engine.num_shards:
            raise ValueError(
                f"sampling.slots must be >= {self.engine.num_shards}, the devices rows are spread over, got {slots}"
            )
        self._policy, self._scorer = policy, PromptScorer(policy, mesh, shardings, rules)
        self._slots, self._kv_bytes = slots, kv_bytes
        self._decode_text = decode_text
        self._chunk, self._stop_chunk = chunk, min(stop_chunk, chunk)
        self._expected = self._prompts()
        self._planned: ShardRequests | None = None
        self._prefix: _Prefix | None = None
        self._num_prefilled_again = 0

    @property
    def peak_kv_bytes(self) -> int:
        """The most bytes that keys, values, labels and states took at any moment so far, over all devices."""
        return self.engine.peak_kv_bytes

    @property
    def num_prefilled_again(self) -> int:
        """Tokens that were prefilled so far for requests that continue a completion. A cache that is kept from call to
        call would save those of them that were there before.
        """
        return self._num_prefilled_again

    def expect(self, prompts: Sequence[Sequence[int] | np.ndarray], num_prompts: int = 0, num_samples: int = 0) -> None:
        """Plans shapes for prompts like these. Calls with such prompts then share their programs.

        Their common prefix is cached once in each call, and table rows get the length that wastes least on such
        prompts.

        Args:
          num_prompts, num_samples: the size of the largest call. Smaller calls take its shapes, so that they share its
            programs, and begin by dropping the slots that stay idle. 0: every call has its own shapes.
        """
        common = request_queue.common_prefix_length(prompts)
        common = usable_common_length(common, len(prompts))
        head = tuple(int(token) for token in prompts[0][:common])
        self._expected = self._prompts(head, rest_lengths(prompts, common))
        self._planned = self._demand(num_prompts, num_samples)

    def expect_length(self, prompt_length: int, num_prompts: int = 0, num_samples: int = 0) -> None:
        """Plans shapes for any prompts of up to so many tokens, without a common prefix.

        num_prompts, num_samples: as in `expect`.
        """
        self._expected = self._prompts((), (max(prompt_length - 1, 1),))
        self._planned = self._demand(num_prompts, num_samples)

    def sample(
        self,
        params: Params,
        prompts: Sequence[Sequence[int] | np.ndarray],
        num_samples: int,
        sampling: SamplingParams,
        key: jax.Array,
        prompt_indices: Sequence[int] | None = None,
    ) -> list[list[Completion]]:
        """Draws `num_samples` completions of every prompt.

        Args:
          params: the policy's parameters, laid out by `param_shardings`. They are read, never copied or kept.
          prompts: token ids of each prompt, without padding.
          sampling: how to draw. Another value needs other programs.
          key: one PRNG key.
          prompt_indices: the number of each prompt in its randomness; None: 0, 1, 2, ... A completion with the same
            key, prompt index and sample index is the same, whatever is drawn beside it.

        Returns:
          The completions of every prompt, in the order of prompts and samples.

        Raises:
          ValueError: a prompt is empty or has token ids outside the vocabulary, a length is beyond the model's
            positions, stop strings are given without `decode_text`, or the cache does not fit in `kv_bytes`.
        """
        indices = range(len(prompts)) if prompt_indices is None else prompt_indices
        if num_samples < 1:
            raise ValueError(f"num_samples must be >= 1, got {num_samples}")
        if len(indices) != len(prompts):
            raise ValueError(
                f"prompt_indices must have one entry for each of {len(prompts)} prompts, got {len(indices)}"
            )
        requests = requests_for(indices, num_samples, sampling.max_completion_length)
        completions: list[Completion | None] = [None] * len(requests)
        for number, completion in self.stream(params, prompts, requests, sampling, key):
            completions[number] = completion
        done = [completion for completion in completions if completion is not None]
        assert len(done) == len(requests)
        return [done[first : first + num_samples] for first in range(0, len(done), num_samples)]

    def stream(
        self,
        params: Params,
        prompts: Sequence[Sequence[int] | np.ndarray],
        requests: Sequence[Request],
        sampling: SamplingParams,
        key: jax.Array,
    ) -> Iterator[tuple[int, Completion]]:
        """Draws the requests and yields (its place in `requests`, completion) of each as it ends.

        The limit of a request may be below `sampling.max_completion_length`. A request with a seed depends on (seed,
        sample index) and on nothing else. Memory does not grow with the number of requests. Requests may have rules of
        their own (`rl.sampler.slot_rules`): the same programs draw all calls in which any has, whatever the rules, and
        `warm_up` with `SlotSampling.of(sampling)` compiles them.

        Raises:
          ValueError: as in `sample`; or a request names a missing prompt, an index outside [0, 2**31), a seed outside
            [0, 2**32), or a limit below 1 or outside `sampling`'s lengths.
        """
        if any(request.rules is not None for request in requests) and not sampling.is_by_slot:
            sampling = SlotSampling.of(sampling)
        check_requests(self._policy.config, self._decode_text, prompts, requests, sampling)
        return self._stream(params, prompts, requests, sampling, key)

    def check_turns(self, num_prompts: int, num_samples: int, longest: int) -> None:
        """ValueError where `kv_bytes` is too small for completions of several turns, see `open`."""
        self._turn_shape(num_prompts, num_samples, longest)

    def warm_up_turns(
        self, params: Params, num_prompts: int, num_samples: int, sampling: SamplingParams, longest: int
    ) -> None:
        """As `warm_up`, for sessions of this size."""
        if self._convert is not None:
            self.engine.programs.prepare(*self._convert_build(params))
        params, num_shards = self._abstract_decode_params(params), self.engine.num_shards
        first = self._turn_shape(num_prompts, num_samples, longest)
        sizes = session_sizes(first.num_slots // num_shards, longest)
        self._prepare_turns(params, first, sizes, sampling, self._turn_chunk)

    def _prepare_turns(
        self, params: Params, first: Shape, sizes: Sequence[CacheSize], sampling: SamplingParams, chunk: int
    ) -> None:
        """Compiles the programs of a session with turns, which starts with the shape `first`."""
        engine, num_shards = self.engine, self.engine.num_shards
        num_slots = first.num_slots // num_shards
        moved, read = rows_moved(num_slots) * num_shards, rows_read(num_slots) * num_shards
        engine.prepare_state(first, sampling)
        for rows in self._prefill_sizes(first):
            engine.prepare_prefill(params, rows, first.prefill_length, prefill_chunk(rows), 0)
            engine.prepare_insert(first, rows)
        for size in sizes:
            shape = first.resized(size.slots * num_shards, size.length, num_shards)
            engine.prepare(params, shape, sampling, chunk)
            if shape.num_active and shape.num_readers > 1:  # else a slot has a prompt of its own, and reads no more
                engine.prepare(params, dataclasses.replace(shape, num_active=0), sampling, chunk)
            engine.prepare_turns(params, shape, sampling, moved, read, READ_SIZES)
            for later in later_session_sizes(sizes, size):
                engine.prepare_resize(shape, sampling, later.slots * num_shards, later.length)

    @property
    def _turn_chunk(self) -> int:
        return min(self._chunk, TURN_CHUNK)

    def open(
        self,
        params: Params,
        sampling: SamplingParams,
        key: jax.Array,
        num_prompts: int,
        num_samples: int,
        longest: int,
    ) -> SlotSession:
        """A call whose completions have several turns, see `rl.sampler.contract.DrawSession`. Requests may
        have rules of their own where `sampling` is a `SlotSampling`.
        """
        shape = self._turn_shape(num_prompts, num_samples, longest)
        sizes = session_sizes(shape.num_slots // self.engine.num_shards, longest)
        self.release()  # no prefix is shared here
        params, chunk = self._decode_params(params), self._turn_chunk
        total = num_prompts * num_samples
        return SlotSession(self.engine, params, shape, sizes, sampling, key, None, self._decode_text, chunk, total)

    def open_endless(
        self,
        params: Params,
        sampling: SamplingParams,
        key: jax.Array,
        num_slots: int,
        num_kept: int,
        longest: int,
        chunk: int,
    ) -> SlotSession:
        """As `open`, for requests that come one by one and without an end, as a server's do. All slots stay, however
        few requests there are.

        Args:
          num_kept: requests whose turn has ended, and which may be held for `SlotSession.follow`; may be 0.
          chunk: tokens decoded between two looks of the host.

        Raises:
          ValueError: the session does not fit the memory, or prompts are not planned by `expect_length`.
        """
        shape = self._endless_shape(num_slots, num_kept, longest)
        self.release()
        params, num_shards = self._decode_params(params), self.engine.num_shards
        sizes = _all_slots(session_sizes(shape.num_slots // num_shards, longest))
        return SlotSession(self.engine, params, shape, sizes, sampling, key, None, self._decode_text, chunk)

    def check_endless(self, num_slots: int, num_kept: int, longest: int) -> None:
        """ValueError where `open_endless` cannot be, see there."""
        self._endless_shape(num_slots, num_kept, longest)

    def warm_up_endless(
        self, params: Params, sampling: SamplingParams, num_slots: int, num_kept: int, longest: int, chunk: int
    ) -> None:
        """Compiles, in the background, what `open_endless` needs with these arguments."""
        if self._convert is not None:
            self.engine.programs.prepare(*self._convert_build(params))
        params = self._abstract_decode_params(params)
        shape = self._endless_shape(num_slots, num_kept, longest)
        sizes = _all_slots(session_sizes(shape.num_slots // self.engine.num_shards, longest))
        self._prepare_turns(params, shape, sizes, sampling, chunk)

    def _endless_shape(self, num_slots: int, num_kept: int, longest: int) -> Shape:
        expected, num_shards = self._planned_prompts(), self.engine.num_shards
        return open_shape(num_shards, num_slots, num_kept, expected, longest, self._budget())

    def prompt_logprobs(
        self, params: Params, prompts: Sequence[Sequence[int] | np.ndarray], temperature: float, chunk_size: int | None
    ) -> list[np.ndarray]:
        """Log-probs of prompt tokens, see `rl.sampler.prompt_logprobs`.

        They are computed with the weights of decoding, rounded by `weights` and laid out by `decode_shardings`. No
        cache is read.
        """
        return self._scorer.logprobs(self._decode_params(params), prompts, temperature, chunk_size)

    def prompt_scores(
        self,
        params: Params,
        prompts: Sequence[Sequence[int] | np.ndarray],
        temperature: float,
        chunk_size: int | None,
        num_top: int,
    ) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """As `prompt_logprobs`, with the most likely tokens, see `PromptScorer.scores`."""
        return self._scorer.scores(self._decode_params(params), prompts, temperature, chunk_size, num_top)

    def release(self) -> None:
        """Drops the keys and values of a common prefix, which calls with the same weights share."""
        self._prefix = None

    def warm_up(self, params: Params, num_prompts: int, num_samples: int, sampling: SamplingParams) -> None:
        """Compiles, in the background, every program that calls of this size can need, whatever is drawn.

        Nothing runs. A call before the end waits only for the programs that it needs. See `expect`.
        `engine.programs.wait()` returns when all programs are ready.
        """
        engine, num_shards = self.engine, self.engine.num_shards
        if self._convert is not None:
            engine.programs.prepare(*self._convert_build(params))
        params = self._abstract_decode_params(params)
        shapes, common_length = self.shapes(num_prompts, num_samples, sampling), len(self._expected.common)
        first = shapes[0]
        sizes = cache_sizes(first.num_slots // num_shards, sampling.max_completion_length)
        for shape in shapes:
            engine.prepare(params, shape, sampling, self._chunk_of(sampling))
        # After the decode programs: a call that comes at once compiles prefill itself, while the background compiles
        # decoding.
        engine.prepare_state(first, sampling)
        if common_length:
            engine.prepare_prefill(params, num_shards, common_length, prefill_chunk(num_shards), 0)
        for num_rows in self._prefill_sizes(first):
            chunk = prefill_chunk(num_rows)
            engine.prepare_prefill(params, num_rows, first.prefill_length, chunk, common_length)
            engine.prepare_insert(first, num_rows)
        for shape in shapes:
            for later in later_cache_sizes(sizes, self._size_of(shape)):
                engine.prepare_resize(shape, sampling, later.slots * num_shards, later.length)

    def shapes(self, num_prompts: int, num_samples: int, sampling: SamplingParams) -> list[Shape]:
        """Every shape that decoding can have in a call of this size, whatever is drawn. It starts with the
        first one.
        """
        limit, num_shards = sampling.max_completion_length, self.engine.num_shards
        requests = requests_for(range(num_prompts), num_samples, limit)
        first = self._shape(ShardRequests.of(request_queue.deal(requests, num_shards)), self._expected, sampling)
        sizes = cache_sizes(first.num_slots // num_shards, limit)
        reachable = [self._size_of(first)]
        for size in reachable:  # the list grows meanwhile
            later = later_cache_sizes(sizes, size)
            reachable += [other for other in later if other not in reachable]
        return [first.resized(size.slots * num_shards, size.length, num_shards) for size in reachable]

    def check(self, num_prompts: int, num_samples: int, sampling: SamplingParams) -> None:
        """ValueError where `kv_bytes` is too small for a call of this size with expected prompts."""
        self.shapes(num_prompts, num_samples, sampling)

    def programs(self, params: Params, num_prompts: int, num_samples: int, sampling: SamplingParams) -> DrawPrograms:
        """The programs that prefill prompts without a common prefix and draw; nothing runs.

        `params` may be abstract. Small programs that move rows of the cache are not among them.
        """
        engine, decode_params = self.engine, self._abstract_decode_params(params)
        shapes = self.shapes(num_prompts, num_samples, sampling)
        largest = max(shapes, key=lambda shape: (shape.num_slots * shape.length, shape.length))
        num_positions = shapes[0].prefill_length
        programs: dict[tuple, DrawProgram] = {}
        for num_rows in self._prefill_sizes(shapes[0]):
            chunk = engine.piece_size(num_positions, prefill_chunk(num_rows))
            for _, length in prefill_pieces(num_positions, chunk):
                arguments = (num_rows, chunk, length, shapes[0].common_length)
                is_largest = (num_rows, length) == (largest.prefill_rows, largest.prefill_length)
                make = partial(engine.prefill_program, decode_params, *arguments)
                key = prefill_key(*arguments)
                programs[key] = DrawProgram(PREFILL, repr(key), make, 0, is_largest)
        for shape in shapes:
            arguments = (shape, sampling, self._chunk_of(sampling))
            key, make = generate_key(*arguments), partial(engine.generate_program, decode_params, *arguments)
            programs[key] = DrawProgram(DECODE, repr(key), make, self._chunk_of(sampling), shape == largest)
        per_position, per_row = engine.bytes_per_position(), engine.bytes_per_row()
        num_cached = largest.num_slots * largest.length + largest.table_rows * largest.table_length
        num_bytes = per_position * num_cached + per_row * (largest.num_slots + largest.table_rows)
        return DrawPrograms(list(programs.values()), num_bytes // engine.num_shards, per_position, per_row)

    def _stream(
        self,
        params: Params,
        prompts: Sequence[Sequence[int] | np.ndarray],
        requests: Sequence[Request],
        sampling: SamplingParams,
        key: jax.Array,
    ) -> Iterator[tuple[int, Completion]]:
        if not requests:
            return
        engine = self.engine
        prompts, requests = with_continued(prompts, requests)
        version, params = params, self._decode_params(params)
        expected = self._plan(prompts)
        common_length = len(expected.common)
        shards = request_queue.deal(requests, engine.num_shards)
        first_requests = [requests[piece[0]] for pieces in shards for piece in pieces]
        self._num_prefilled_again += sum(
            len(prompts[request.prompt]) - 1 - common_length for request in first_requests if request.continues
        )
        shape = self._shape(ShardRequests.of(shards), expected, sampling)
        if not common_length:
            self.release()  # nobody reads the old prefix, so its memory is freed
        common = self._prefill_common(version, params, expected.common) if common_length else None
        sizes = cache_sizes(shape.num_slots // engine.num_shards, sampling.max_completion_length)
        chunk = self._chunk_of(sampling)
        session = SlotSession(engine, params, shape, sizes, sampling, key, common, self._decode_text, chunk)
        session.submit(prompts, requests, shards)
        while session.num_left:
            yield from session.poll()

    def _size_of(self, shape: Shape) -> CacheSize:
        return CacheSize(shape.num_slots // self.engine.num_shards, shape.length)

    # Plans

    def _prompts(self, common: tuple[int, ...] = (), lengths: tuple[int, ...] = ()) -> ExpectedPrompts:
        return ExpectedPrompts(common, lengths, are_whole=self._policy.config.is_recurrent)

    def _prefill_sizes(self, shape: Shape) -> list[int]:
        """The numbers of rows, over all shards, of the two prefills of this shape."""
        few = few_rows(shape.prefill_rows // self.engine.num_shards) * self.engine.num_shards
        return list(dict.fromkeys((shape.prefill_rows, few)))

    def _plan(self, prompts: Sequence[Sequence[int] | np.ndarray]) -> ExpectedPrompts:
        """The plan for these prompts: the expected prefix if they start with it, else their own; at least the expected
        lengths.
        """
        expected = self._expected
        head = np.asarray(expected.common, np.int32)
        fits = all(len(p) > head.size and np.array_equal(np.asarray(p[: head.size]), head) for p in prompts)
        if not expected.lengths or not fits:
            common = usable_common_length(request_queue.common_prefix_length(prompts), len(prompts))
            expected = self._prompts(tuple(int(token) for token in prompts[0][:common]))
        lengths = rest_lengths(prompts, len(expected.common))
        if not expected.lengths:
            return dataclasses.replace(expected, lengths=lengths)
        longest = max(lengths)
        if longest <= max(expected.lengths):
            return expected
        return dataclasses.replace(expected, lengths=(*expected.lengths, longest))

    def _demand(self, num_prompts: int, num_samples: int) -> ShardRequests | None:
        """The requests of each shard in a call of this size; None where the call is empty."""
        requests = requests_for(range(num_prompts), num_samples, 1)
        return ShardRequests.of(request_queue.deal(requests, self.engine.num_shards)) if requests else None

    def _shape(self, demand: ShardRequests, expected: ExpectedPrompts, sampling: SamplingParams) -> Shape:
        """The shape in which decoding starts: the shape of the planned calls, if it serves this one."""
        num_shards, limit = self.engine.num_shards, sampling.max_completion_length
        budget = self._budget()

        def shape_of(demand: ShardRequests, serves_fewer: bool = False) -> Shape:
            return first_shape(num_shards, demand, expected, limit, self._slots, budget, serves_fewer)

        if self._planned is not None:
            shape = shape_of(self._planned, serves_fewer=True)
            if demand.fits(self._planned, shape.num_slots // num_shards):
                return shape
        return shape_of(demand)

    def _turn_shape(self, num_prompts: int, num_samples: int, longest: int) -> Shape:
        demand, expected = self._demand(num_prompts, num_samples), self._planned_prompts()
        assert demand is not None, "a call without requests"
        if self._planned is not None and demand.is_within(self._planned):
            demand = self._planned
        return turn_shape(self.engine.num_shards, demand, expected, longest, self._slots, self._budget())

    def _planned_prompts(self) -> ExpectedPrompts:
        if self._expected.common or not self._expected.lengths:
            raise ValueError("the prompts of a call with turns must be planned by expect_length")
        return self._expected

    def _budget(self) -> KVBudget | None:
        if self._kv_bytes is None:
            return None
        engine = self.engine
        return KVBudget(self._kv_bytes, engine.array_bytes_per_position(), engine.array_bytes_per_row())

    def _prefill_common(self, version: Params, params: Params, prefix: tuple[int, ...]) -> CachePart:
        """Keys and values of the common prefix. Those of the last call are used again if the weights are the same
        arrays.

        Args:
          version: the caller's own weights; `params` may be a copy that was made for this call.
        """
        if self._prefix is None or not self._prefix.holds(prefix, version):
            tokens = np.tile(np.asarray(prefix, np.int32), (self.engine.num_shards, 1))
            chunk = prefill_chunk(tokens.shape[0])
            self._prefix = None  # frees its memory before the new prefix takes memory
            part = self.engine.prefill(params, plain_inputs(tokens), chunk=chunk)
            self._prefix = _Prefix(prefix, [weakref.ref(leaf) for leaf in jax.tree.leaves(version)], part)
        return self._prefix.part

    def close(self) -> None:
        """Drops builds that wait in the background, and waits for the one that is running."""
        self.engine.programs.close()

    def _decode_params(self, params: Params) -> Params:
        return params if self._convert is None else self.engine.programs.get(*self._convert_build(params))(params)

    def _abstract_decode_params(self, params: Params) -> Params:
        return params if self._convert is None else jax.eval_shape(self._convert.function, params)

    def _convert_build(self, params: Params) -> tuple[tuple, Build]:
        assert self._convert is not None
        return ("weights",), partial(self._convert.prepare, (jax.eval_shape(lambda params: params, params),))

    def _chunk_of(self, sampling: SamplingParams) -> int:
        return self._stop_chunk if sampling.stop_strings else self._chunk


def _all_slots(sizes: Sequence[CacheSize]) -> list[CacheSize]:
    """Those of the sizes that have all slots."""
    return [size for size in sizes if size.slots == max(size.slots for size in sizes)]
