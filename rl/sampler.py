"""Completions of prompts, drawn with the policy's own parameters on the policy's own mesh: no copy, no weight sync.

In: parameters, prompts as token ids, a key. Out: per prompt and sample a `Completion`. The rule that draws one token is
`rl.sampling`, what runs on the device `rl.decoding`; tokenising, rewards and the choice of prompts are not here.

Completions are drawn in waves of whole groups. A wave prefills each prompt once (its cache is shared by the samples of
the prompt), then decodes in jitted chunks of a few tokens. Between chunks the host reads what was drawn, looks for stop
strings, drops finished rows once half of all can go, and grows the cache.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from rl.decoding import WaveInputs, decode_chunk, grow_part, prefill, select_rows
from rl.mesh import num_row_shards, partition_spec, replicated, row_sharding
from rl.models.cache import CachePart
from rl.models.policy import Params, Policy
from rl.sampling import SamplingParams
from rl.waves import Completion, Row, Tracker, plan_waves, size_at_least, wave_inputs

__all__ = ["Completion", "Sampler"]

MIN_OWN_SLOTS = 32


class Sampler:
    """Draws completions; holds the compiled functions and no parameters.

    Args:
      policy: what to sample from.
      mesh: where the parameters live; rows are spread over the axes that `rules["batch"]` names, the heads of the cache
        over those of `rules["kv_heads"]`.
      param_shardings: a `NamedSharding` per parameter, as in the training state.
      rules: logical axis -> mesh axes, the `mesh.rules` of the config.
      max_rows: completions decoded at a time; bounds the KV cache.
      decode_text: token ids -> text; needed for stop strings only.
      chunk: tokens decoded between two looks of the host.
      stop_chunk: the same when there are stop strings, which only the host can see.

    Raises:
      ValueError: max_rows below the number of pieces that rows are cut into on this mesh.
    """

    def __init__(
        self,
        policy: Policy,
        mesh: Mesh,
        param_shardings: Any,
        *,
        rules: Mapping[str, Sequence[str]],
        max_rows: int,
        decode_text: Callable[[Sequence[int]], str] | None = None,
        chunk: int = 32,
        stop_chunk: int = 8,
    ) -> None:
        self._num_shards = num_row_shards(mesh, rules)
        if max_rows < self._num_shards:
            raise ValueError(
                f"sampling.max_rows must be >= {self._num_shards}, the devices rows are spread over, got {max_rows}"
            )
        self._policy = policy
        self._param_shardings = param_shardings
        self._max_rows = max_rows
        self._decode_text = decode_text
        self._chunk = chunk
        self._stop_chunk = min(stop_chunk, chunk)
        self._everywhere = replicated(mesh)
        self._rows = row_sharding(mesh, rules)
        config = policy.config
        heads = NamedSharding(
            mesh,
            partition_spec(
                ("batch", None, "kv_heads", None),
                (self._num_shards, 1, config.num_kv_heads, config.head_dim),
                mesh,
                rules,
            ),
        )
        layers = (heads,) * config.num_layers
        self._part: Any = CachePart(layers, layers, self._rows, self._rows, self._rows)  # pyright: ignore[reportArgumentType]
        self._compiled: dict[tuple, Callable] = {}

    @property
    def num_compiles(self) -> int:
        """How many functions were compiled so far: one per shape and set of sampling parameters."""
        return len(self._compiled)

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
          params: the policy's parameters, laid out as `param_shardings` says; read, never copied or kept.
          prompts: token ids of each prompt, without padding.
          sampling: how to draw; a new value compiles anew.
          key: one PRNG key.
          prompt_indices: the number that stands for each prompt in its randomness; None: 0, 1, 2, ... A completion of
            the same key, prompt index and sample index is the same whatever else is drawn with it.

        Returns:
          For every prompt its completions, in the order of prompts and samples.

        Raises:
          ValueError: an empty prompt, token ids outside the vocabulary, a length beyond the model's positions, stop
            strings without `decode_text`.
        """
        indices = list(range(len(prompts))) if prompt_indices is None else [int(index) for index in prompt_indices]
        self._check(prompts, indices, num_samples, sampling)
        completions: dict[Row, Completion] = {}
        for groups in plan_waves(len(prompts), num_samples, self._max_rows, self._num_shards):
            completions.update(self._run_wave(params, prompts, indices, groups, sampling, key))
        return [[completions[Row(p, g)] for g in range(num_samples)] for p in range(len(prompts))]

    def _run_wave(
        self,
        params: Params,
        prompts: Sequence[Sequence[int] | np.ndarray],
        indices: Sequence[int],
        groups: list[list[Row]],
        sampling: SamplingParams,
        key: jax.Array,
    ) -> dict[Row, Completion]:
        """Draws the completions of one wave; the rows of a group share a prompt."""
        limit = sampling.max_completion_length
        inputs = wave_inputs(prompts, indices, groups, self._num_shards)
        most_slots = size_at_least(max(limit - 1, 1))  # the last token is never fed back
        num_slots = min(MIN_OWN_SLOTS, most_slots)
        labels, prefix, own, drawn = self._prefill(inputs, num_slots, sampling)(params, inputs, key)
        tracker = Tracker(groups, inputs, sampling, self._decode_text)
        tracker.read(drawn)
        while tracker.num_live:
            kept_B = tracker.compact(self._num_shards)
            if kept_B is not None:
                labels, prefix, own = self._select(prefix, own, kept_B.size)(labels, prefix, own, kept_B)
            if tracker.length > own.num_slots:
                own = self._grow(own, min(2 * own.num_slots, most_slots))(own)
            decode, chunk = self._decode(prefix, own, sampling)
            end = min(tracker.length + chunk, own.num_slots + 1, limit)
            own, drawn = decode(
                params,
                labels,
                prefix,
                own,
                tracker.last_tokens_B,
                tracker.finished_B,
                np.int32(tracker.length),
                np.int32(end),
            )
            tracker.read(drawn)
        return tracker.completions(indices)

    # Compiled functions, by everything that their shapes depend on

    def _prefill(self, inputs: WaveInputs, num_slots: int, sampling: SamplingParams) -> Callable:
        name = ("prefill", inputs.tokens_PT.shape, inputs.sample_indices_B.shape, num_slots, sampling)
        function = partial(prefill, self._policy, sampling, num_slots, self._rows)
        return self._jit(
            name,
            function,
            in_shardings=(self._param_shardings, self._everywhere, self._everywhere),
            out_shardings=(self._rows, self._part, self._part, self._everywhere),
        )

    def _decode(self, prefix: CachePart, own: CachePart, sampling: SamplingParams) -> tuple[Callable, int]:
        chunk = self._stop_chunk if sampling.stop_strings else self._chunk
        name = ("decode", prefix.positions.shape, own.positions.shape, chunk, sampling)
        function = partial(decode_chunk, self._policy, sampling, chunk, self._rows)
        small = (self._everywhere,) * 4
        jitted = self._jit(
            name,
            function,
            in_shardings=(self._param_shardings, self._rows, self._part, self._part, *small),
            out_shardings=(self._part, self._everywhere),
            donate_argnums=(3,),
        )
        return jitted, chunk

    def _grow(self, own: CachePart, num_slots: int) -> Callable:
        name = ("grow", own.positions.shape, num_slots)
        function = partial(grow_part, num_slots)
        return self._jit(name, function, in_shardings=(self._part,), out_shardings=self._part)

    def _select(self, prefix: CachePart, own: CachePart, num_rows: int) -> Callable:
        name = ("select", prefix.positions.shape, own.positions.shape, num_rows)
        shardings = (self._rows, self._part, self._part)
        return self._jit(name, select_rows, in_shardings=(*shardings, self._everywhere), out_shardings=shardings)

    def _jit(self, name: tuple, function: Callable, **options: Any) -> Callable:
        if name not in self._compiled:
            self._compiled[name] = jax.jit(function, **options)
        return self._compiled[name]

    def _check(
        self,
        prompts: Sequence[Sequence[int] | np.ndarray],
        indices: Sequence[int],
        num_samples: int,
        sampling: SamplingParams,
    ) -> None:
        config = self._policy.config
        if num_samples < 1:
            raise ValueError(f"num_samples must be >= 1, got {num_samples}")
        if len(indices) != len(prompts):
            raise ValueError(
                f"prompt_indices must have one entry for each of {len(prompts)} prompts, got {len(indices)}"
            )
        if sampling.stop_strings and self._decode_text is None:
            raise ValueError(
                f"sampling.stop_strings needs a tokenizer to see text, got {sampling.stop_strings} without decode_text"
            )
        if any(i >= config.vocab_size for i in sampling.eos_ids):
            raise ValueError(
                f"sampling.eos_ids must be below the vocabulary size {config.vocab_size}, got {sampling.eos_ids}"
            )
        for number, prompt in enumerate(prompts):
            if not len(prompt):
                raise ValueError(f"prompts[{number}] must have at least one token, got none")
            if min(prompt) < 0 or max(prompt) >= config.vocab_size:
                raise ValueError(
                    f"prompts[{number}] must have token ids in [0, {config.vocab_size}), got {min(prompt)} to "
                    f"{max(prompt)}; the tokenizer and the model do not fit"
                )
            if len(prompt) + sampling.max_completion_length > config.max_position_embeddings:
                raise ValueError(
                    f"prompts[{number}] with sampling.max_completion_length must fit in the model's "
                    f"{config.max_position_embeddings} positions, got {len(prompt)} + "
                    f"{sampling.max_completion_length}; shorten one of them"
                )
