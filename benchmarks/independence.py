"""How often a completion depends on its company: the same requests drawn in other slots, batches and orders.

A completion is a function of (key, prompt index, sample index, position), up to rounding: in another shape sums are
rounded differently, and a token may change where its random number falls within that rounding of a boundary between two
tokens. After the first changed token the rest is another completion, so only tokens up to there are compared.

    python benchmarks/independence.py [--shape a] [--tokens 100000]
"""

import argparse
from collections.abc import Sequence

import jax
import numpy as np
from shapes import CPU_SHAPES, CPU_WORKLOADS, tiny_shape
from weights import Weights

from rl.sampler import Completion, Sampler
from rl.sampling import SamplingParams

COMPANIES = {"seven at a time": {"slots": 7}, "half at a time, short chunks": {"slots": 32, "chunk": 5}}


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
    """(changed, compared) by company, over at least `num_tokens` tokens each."""
    config = tiny_shape(CPU_SHAPES[shape]) if tiny else CPU_SHAPES[shape]
    workload, weights = CPU_WORKLOADS["ragged"], Weights(config)
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
            workload.num_samples,
            sampling,
            jax.random.key(call),
            prompt_indices=order,
        )
        return [completion for group in (groups[::-1] if reverse else groups) for completion in group]

    together = sampler()
    others = {name: sampler(**options) for name, options in COMPANIES.items()}
    found = dict.fromkeys(others, (0, 0))
    call = 0
    while min(compared for _, compared in found.values()) < num_tokens:
        expected = draw(together, call, reverse=False)
        for name, other in others.items():
            changed, compared = changed_tokens(expected, draw(other, call, reverse=True))
            found[name] = found[name][0] + changed, found[name][1] + compared
        call += 1
    return found


def main(argv: Sequence[str] | None = None) -> dict[str, tuple[int, int]]:
    """Prints one line per company."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--shape", choices=sorted(CPU_SHAPES), default="a", help="model shape (default: a)")
    parser.add_argument("--tokens", type=int, default=100_000, help="tokens to compare (default: 100,000)")
    parser.add_argument("--tiny", action="store_true", help="a tiny model, to try the benchmark itself")
    arguments = parser.parse_args(argv)
    found = measure(arguments.shape, arguments.tokens, arguments.tiny)
    for name, (changed, compared) in found.items():
        print(f"{name}, prompts reversed: {changed} of {compared:,} tokens changed ({changed / compared:.1e})")
    return found


if __name__ == "__main__":
    main()
