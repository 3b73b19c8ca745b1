"""What is asked of a sampler and what it gives.

In: a `Request` for each completion: which prompt, which randomness, how many tokens at most. Out: a `Completion` for
each request. `CompletionSource` is the protocol of everything that draws completions. Not here: how they are drawn.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import numpy as np

from rl.sampler.token_draw import SamplingParams


@dataclasses.dataclass(frozen=True)
class Completion:
    """One completion of one prompt.

    prompt_index, sample_index: which completion it is; the key, these two and the position are all its randomness.
    token_ids: int32, the EOS or the token that completes a stop string included, nothing after it.
    sampler_logprobs: per token, under the distribution it was drawn from (penalties, truncation); 0 when greedy.
    policy_logprobs: per token, under softmax(logits / temperature); at temperature 1 when greedy.
    finish_reason: "eos", "stop" (a stop string) or "length".
    stop_reason: the EOS id, the stop string, or None.
    top_ids, top_logprobs: [tokens, N], the N most likely tokens of the plain softmax, best first; N may be 0.
    """

    prompt_index: int
    sample_index: int
    token_ids: np.ndarray
    sampler_logprobs: np.ndarray
    policy_logprobs: np.ndarray
    finish_reason: str
    stop_reason: int | str | None
    top_ids: np.ndarray
    top_logprobs: np.ndarray


@dataclasses.dataclass(frozen=True)
class Request:
    """One completion to draw: the prompt's place in the caller's list, its randomness, its limit in tokens."""

    prompt: int
    prompt_index: int
    sample_index: int
    limit: int
    seed: int | None = None


def requests_for(prompt_indices: Sequence[int], num_samples: int, limit: int) -> list[Request]:
    """`num_samples` requests of each prompt in turn. prompt_indices: what stands for each prompt in its randomness."""
    return [
        Request(place, int(index), sample, limit)
        for place, index in enumerate(prompt_indices)
        for sample in range(num_samples)
    ]


class CompletionSource(Protocol):
    """What draws completions: `rl.sampler.slot_sampler.Sampler`, or `rl.sampler.wave_sampler.WaveSampler`, as the
    policy asks for.
    """

    def expect(self, prompts: Sequence[Sequence[int] | np.ndarray], num_prompts: int = 0, num_samples: int = 0) -> None:
        """Plans shapes for prompts like these, and for calls of up to so many prompts and samples of each."""
        ...

    def stream(
        self,
        params: Any,
        prompts: Sequence[Sequence[int] | np.ndarray],
        requests: Sequence[Request],
        sampling: SamplingParams,
        key: Any,
    ) -> Iterator[tuple[int, Completion]]:
        """Draws the requests and yields (its place in `requests`, completion) of each as it ends."""
        ...

    def prompt_logprobs(
        self, params: Any, prompts: Sequence[Sequence[int] | np.ndarray], temperature: float, chunk_size: int | None
    ) -> list[np.ndarray]:
        """Log-probs of prompt tokens under the weights that completions are drawn with."""
        ...

    def release(self) -> None:
        """Drops what calls with the same weights share: the weights are about to change."""
        ...

    def warm_up(self, params: Any, num_prompts: int, num_samples: int, sampling: SamplingParams) -> None:
        """Compiles what calls of this size can need, in the background where it can."""
        ...

    def close(self) -> None:
        """Drops what waits to be compiled in the background; what is being compiled already comes to its end first."""
        ...
