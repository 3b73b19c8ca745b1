"""How often a completion depends on its company: the same requests drawn in other slots, batches, orders and caches.

A completion is a function of (key, prompt index, sample index, position), up to rounding: in another shape sums are
rounded differently, and a token may change where its random number falls within that rounding of a boundary between two
tokens. After the first changed token the rest is another completion, so only tokens up to there are compared.

    python benchmarks/independence.py [--shape a] [--tokens 100000]
"""

import argparse
from collections.abc import Sequence
from typing import NamedTuple
from unittest import mock

import jax
import numpy as np
from shapes import CPU_SHAPES, CPU_WORKLOADS, tiny_shape
from weights import Weights

from rl.sampler import sizes
from rl.sampler.contract import Request
from rl.sampler.slot_sampler import Completion, Sampler
from rl.sampler.token_draw import SamplingParams

WORKLOAD = CPU_WORKLOADS["ragged"]
TINY_WORKLOAD = WORKLOAD._replace(
    num_prompts=3, num_samples=4, prompt_lengths=(10, 10), cap=96
)  # more than a cache's first length


class Company(NamedTuple):
    """Slots (None: for half of the completions), tokens between two looks of the host, and the length of the own cache
    to begin with, which doubles.
    """

    slots: int | None
    chunk: int = 32
    first_length: int = sizes.MIN_LENGTH


COMPANIES = {
    "seven at a time": Company(7),
    "half at a time, short chunks, caches that never grow": Company(None, 5, WORKLOAD.cap),
}
ALONE = "alone in one slot"  # as `grpo sample --replay` draws; one sample of each prompt, for it takes long


def changed_tokens(expected: Sequence[Completion], got: Sequence[Completion]) -> tuple[int, int]:
    """(completions that differ, tokens compared: those up to and including the first that differs)."""
    num_changed = num_compared = 0
    for left, right in zip(expected, got, strict=True):
        size = min(left.token_ids.size, right.token_ids.size)
        differ = np.flatnonzero(left.token_ids[:size] != right.token_ids[:size])
        num_changed += differ.size > 0
        num_compared += int(differ[0]) + 1 if differ.size else size
    return num_changed, num_compared


def measure(shape: str, num_tokens: int, tiny: bool) -> dict[str, tuple[int, int]]:
    """(changed, compared) by company: over at least `num_tokens` tokens each, alone over an eighth of them or so."""
    config = tiny_shape(CPU_SHAPES[shape]) if tiny else CPU_SHAPES[shape]
    workload = TINY_WORKLOAD if tiny else WORKLOAD
    weights, num_samples = Weights(config), workload.num_samples
    sampling = SamplingParams(max_completion_length=workload.cap, eos_ids=workload.eos_ids(config.vocab_size))
    rules = weights.run_config.mesh.rules

    def sampler(**options: int) -> Sampler:
        return Sampler(weights.policy, weights.mesh, weights.shardings, rules=rules, **options)

    def draw(sampler: Sampler, call: int, reverse: bool) -> list[Completion]:
        prompts = workload.prompts(config.vocab_size, call)
        order = list(range(len(prompts)))[:: -1 if reverse else 1]
        groups = sampler.sample(
            weights.params,
            [prompts[i] for i in order],
            num_samples,
            sampling,
            jax.random.key(call),
            prompt_indices=order,
        )
        return [completion for group in (groups[::-1] if reverse else groups) for completion in group]

    def draw_alone(sampler: Sampler, call: int, number: int) -> Completion:
        prompts = workload.prompts(config.vocab_size, call)
        request = Request(number // num_samples, number // num_samples, number % num_samples, workload.cap)
        ((_, completion),) = sampler.stream(weights.params, prompts, [request], sampling, jax.random.key(call))
        return completion

    def count(name: str, expected: Sequence[Completion], got: Sequence[Completion]) -> None:
        changed, compared = changed_tokens(expected, got)
        found[name] = found[name][0] + changed, found[name][1] + compared

    together, alone = sampler(), sampler()
    half = workload.num_rows // 2
    others = {name: sampler(slots=company.slots or half, chunk=company.chunk) for name, company in COMPANIES.items()}
    found = dict.fromkeys([*others, ALONE], (0, 0))
    call = 0
    while min(found[name][1] for name in others) < num_tokens:
        expected = draw(together, call, reverse=False)
        for name, other in others.items():
            with mock.patch.object(sizes, "MIN_LENGTH", COMPANIES[name].first_length):
                count(name, expected, draw(other, call, reverse=True))
        numbers = range(call % num_samples, len(expected), num_samples)
        count(ALONE, [expected[i] for i in numbers], [draw_alone(alone, call, i) for i in numbers])
        call += 1
    return found


def main(argv: Sequence[str] | None = None) -> dict[str, tuple[int, int]]:
    """Prints one line per company."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--shape", choices=sorted(CPU_SHAPES), default="a", help="model shape (default: a)")
    parser.add_argument("--tokens", type=int, default=100_000, help="tokens to compare (default: 100,000)")
    parser.add_argument("--tiny", action="store_true", help="a tiny model and workload, to try the benchmark itself")
    arguments = parser.parse_args(argv)
    found = measure(arguments.shape, arguments.tokens, arguments.tiny)
    for name, (changed, compared) in found.items():
        name = name if name == ALONE else f"{name}, prompts reversed"
        print(f"{name}: {changed} of {compared:,} tokens changed ({changed / compared:.1e})")
    return found


if __name__ == "__main__":
    main()
