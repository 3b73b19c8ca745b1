"""What is measured: model shapes, and the prompts and lengths of a workload. No model, no clock.

Prompts, completions and EOS ids follow from a seed and the size of the vocabulary, so every engine gets the same ones.
"""

import dataclasses
from typing import NamedTuple

import numpy as np

from rl.models.config import ModelConfig
from rl.training.packing import PackingPlan

ROPE_THETA = 1_000_000.0  # Tunix 0.1.7 rotates by this theta, whatever its configuration says


class Workload(NamedTuple):
    """`num_prompts` prompts with `num_samples` completions each, of at most `cap` tokens.

    prompt_lengths: smallest and largest number of tokens of a prompt.
    mean_share: mean completion length as a share of the cap; None: no EOS, so every completion has `cap` tokens.
    """

    num_prompts: int
    num_samples: int
    prompt_lengths: tuple[int, int]
    cap: int
    mean_share: float | None = None

    @property
    def num_rows(self) -> int:
        """Completions of one call."""
        return self.num_prompts * self.num_samples

    def eos_ids(self, vocab_size: int) -> tuple[int, ...]:
        """Token ids spread over the vocabulary, as many as give the mean length when every token is equally likely (as
        in a random model, nearly).
        """
        if self.mean_share is None:
            return ()
        counts = np.arange(1, vocab_size)
        errors = np.abs(mean_length(counts / vocab_size, self.cap) - self.mean_share * self.cap)
        return tuple(np.linspace(0, vocab_size - 1, counts[np.argmin(errors)], dtype=int).tolist())

    def prompts(self, vocab_size: int, seed: int) -> list[list[int]]:
        """Random token ids; the lengths are uniform between the smallest and the largest."""
        rng = np.random.default_rng(seed)
        shortest, longest = self.prompt_lengths
        lengths = rng.integers(shortest, longest + 1, self.num_prompts)
        return [rng.integers(0, vocab_size, length).tolist() for length in lengths]

    def completions(self, vocab_size: int, seed: int) -> list[list[int]]:
        """Completions of every prompt in turn as a model would draw them to which all tokens are equally likely: each
        up to and including its first EOS, or `cap` tokens long.
        """
        drawn = np.random.default_rng((seed, 1)).integers(0, vocab_size, (self.num_rows, self.cap))
        is_eos = np.isin(drawn, self.eos_ids(vocab_size))
        lengths = np.where(is_eos.any(axis=1), is_eos.argmax(axis=1) + 1, self.cap)
        return [row[:length].tolist() for row, length in zip(drawn, lengths, strict=True)]


def mean_length(hazard: np.ndarray, cap: int) -> np.ndarray:
    """Mean of min(L, cap) for a geometric L: the sum over t < cap of (1 - hazard)^t, the chance to draw token t + 1."""
    return (1 - (1 - hazard) ** cap) / hazard


def tiny_shape(config: ModelConfig) -> ModelConfig:
    """The same kind of model, small enough to try the benchmark itself."""
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_layers": 1}
    heads = {"num_heads": 4, "num_kv_heads": 2, "head_dim": 8, "query_pre_attn_scalar": 8}
    return dataclasses.replace(config, **sizes, **heads, layer_types=config.layer_types[:1])


def tiny_workload(workload: Workload) -> Workload:
    """The same kind of workload, small enough to try the benchmark itself."""
    shortest = 10 if workload.prompt_lengths[0] == workload.prompt_lengths[1] else 4
    return workload._replace(num_prompts=2, num_samples=3, prompt_lengths=(shortest, 10), cap=12)


def row_workload(name: str, tiny: bool = False) -> Workload:
    """Prompts with eight completions each, as many as fill an update, of which each group fills a row of so many tokens
    (a key of `ROW_LENGTHS`): an eighth of it is the prompt, and the last token of a completion is no input.
    """
    row_length, _, update = _row_sizes(name, tiny)
    prompt = row_length // ROW_SAMPLES
    cap = (row_length - prompt) // ROW_SAMPLES + 1
    return Workload(update // row_length, ROW_SAMPLES, (prompt, prompt), cap)


def row_plan(name: str, tiny: bool = False) -> PackingPlan:
    """The packing of `row_workload`: pieces of equally many tokens whatever the length of a row."""
    row_length, piece, update = _row_sizes(name, tiny)
    cap = row_workload(name, tiny).cap
    return PackingPlan(update // piece, piece // row_length, row_length, ROW_SAMPLES, cap)


def _row_sizes(name: str, tiny: bool) -> tuple[int, int, int]:
    """Tokens of a row, of a piece and of an update."""
    sizes = ROW_LENGTHS[name], max(ROW_LENGTHS.values()), 4 * max(ROW_LENGTHS.values())
    return tuple(size // 64 for size in sizes) if tiny else sizes


def _qwen3(layers: int, width: int, heads: int, kv_heads: int, head_dim: int, mlp: int, vocab: int, dtype: str):
    sizes = (vocab, width, mlp, layers, heads, kv_heads, head_dim)
    return ModelConfig.from_arch("qwen3", *sizes, rope_theta=ROPE_THETA, dtype=dtype, param_dtype=dtype)


CPU_SHAPES = {
    "a": _qwen3(4, 256, 8, 2, 32, 768, 512, "float32"),  # 3.1M parameters
    "b": _qwen3(8, 512, 8, 2, 64, 1536, 4096, "float32"),  # 26M
    "c": ModelConfig.from_arch("llama", 49152, 576, 1536, 30, 9, 3, 64, rope_theta=ROPE_THETA),  # SmolLM2-135M
}
CPU_WORKLOADS = {
    "dense": Workload(4, 8, (64, 64), 128),
    "ragged": Workload(8, 8, (192, 192), 256, mean_share=0.4),
}
# Of the comparison of memory, which gives it the two vocabularies.
MEMORY_BODY = _qwen3(8, 512, 8, 2, 64, 1536, 1024, "float32")
MEMORY_VOCABULARIES = (1024, 151936)
GPU_SHAPES = {
    "0.6b": _qwen3(28, 1024, 16, 8, 128, 3072, 151936, "bfloat16"),
    "1.7b": _qwen3(28, 2048, 16, 8, 128, 6144, 151936, "bfloat16"),
}
GPU_WORKLOADS = {f"rows{rows}": Workload(rows // 8, 8, (256, 256), 256) for rows in (64, 128, 256)}
# Tokens of a row, and completions of a prompt, of updates on an accelerator.
ROW_LENGTHS = {"4k": 4096, "8k": 8192, "16k": 16384}
ROW_SAMPLES = 8
# Every call has other prompt lengths and, through the EOS, other completion lengths.
STEADY_WORKLOAD = Workload(8, 8, (32, 192), 256, mean_share=0.4)

TRAIN_WORKLOADS = {
    "i": Workload(4, 8, (64, 64), 128),
    "i-ragged": Workload(4, 8, (64, 64), 128, mean_share=0.5),
    "ii": Workload(4, 8, (192, 192), 256, mean_share=0.4),
}

# Tokens per second to reach over those of the better peer, by shape and workload.
TARGETS = {("a", "dense"): 2.5, ("b", "dense"): 2.0, ("a", "ragged"): 3.0, ("b", "ragged"): 2.5}
# Bytes of keys and values to stay within, over those of the peer that takes least of them: all peers pad prompts to the
# longest and copy them for every completion. By workload.
KV_TARGETS = {"ragged": 1 / 4}
# Share of the machine's matrix-product rate that decoding should reach, by shape.
SHARE_TARGETS = {"b": 0.5}
# Seconds of an update, and of a whole step with its rollout, to reach over those of the better peer.
UPDATE_TARGETS = {("b", "i"): 0.8, ("b", "i-ragged"): 0.6, ("b", "ii"): 0.35}
STEP_TARGETS = {("b", "i"): 1 / 1.5, ("b", "i-ragged"): 1 / 2, ("b", "ii"): 1 / 3}
