"""The samplers that are compared, behind one interface: prompts in, token ids on the host out.

All hold the same weights: Tandem's own, and for the peers those of the Hugging Face folder that Tandem writes of them.
`check_same_logits` proves it. What is measured, and how often, is `rollout.py`.
"""

import pathlib
from collections.abc import Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from shapes import Workload
from weights import TokenIds, Weights, has_library, tunix_model

from rl.models.config import ModelConfig
from rl.models.inputs import plain_inputs
from rl.run.metrics import CompileCounter
from rl.sampler.slot_sampler import Sampler
from rl.sampler.token_draw import SamplingParams

MAX_WARM_UP_CALLS = 6
NUM_EXPECTED_CALLS = 50  # whose prompts the declared warm-up is shown


class Engine(Protocol):
    """One sampler with one model, ready for one workload."""

    name: str

    def generate(self, prompts: Sequence[Sequence[int]], seed: int) -> list[np.ndarray]:
        """Token ids of `num_samples` completions of each prompt in turn, each up to and including its EOS."""
        ...

    def logits(self, tokens: np.ndarray) -> np.ndarray:
        """Logits [T, V] behind every token of one sequence of token ids [T]."""
        ...

    def kv_bytes(self) -> int | None:
        """Size of the KV cache at its peak so far; None if the engine does not tell."""
        ...


def warm_up(engine: Engine, workload: Workload, vocab_size: int) -> None:
    """What is timed afterwards should not compile: Tandem's declared warm-up, then calls until one compiles nothing."""
    if isinstance(engine, Tandem):
        engine.prepare([prompt for seed in range(NUM_EXPECTED_CALLS) for prompt in workload.prompts(vocab_size, seed)])
    with CompileCounter() as compiles:
        for seed in range(MAX_WARM_UP_CALLS):
            engine.generate(workload.prompts(vocab_size, seed), seed)
            if not compiles.lap():
                return


class Tandem:
    """`rl.sampler.slot_sampler.Sampler`; it always returns two log-probs per token along with the ids."""

    name = "tandem"

    def __init__(self, weights: Weights, workload: Workload, slots: int | None = None) -> None:
        config = weights.run_config
        self._weights = weights
        self._workload = workload
        self._sampler = Sampler(weights.policy, weights.mesh, weights.shardings, rules=config.mesh.rules, slots=slots)
        self._sampling = SamplingParams(
            max_completion_length=workload.cap, eos_ids=workload.eos_ids(weights.policy.config.vocab_size)
        )

    def prepare(self, prompts: Sequence[Sequence[int]]) -> None:
        """Compiles all that calls with prompts like these can need."""
        self._sampler.expect(prompts)
        workload = self._workload
        self._sampler.warm_up(self._weights.params, workload.num_prompts, workload.num_samples, self._sampling)
        self._sampler.engine.programs.wait()

    def generate(self, prompts: Sequence[Sequence[int]], seed: int) -> list[np.ndarray]:
        key = jax.random.key(seed)
        groups = self._sampler.sample(self._weights.params, prompts, self._workload.num_samples, self._sampling, key)
        return [completion.token_ids for group in groups for completion in group]

    def logits(self, tokens: np.ndarray) -> np.ndarray:
        policy = self._weights.policy

        @jax.jit
        def forward(params: Any, tokens_1T: jax.Array) -> jax.Array:
            return policy.unembed(params, policy.hidden(params, plain_inputs(tokens_1T)))[0]

        return np.asarray(forward(self._weights.params, jnp.asarray(tokens, jnp.int32)[None]))

    def kv_bytes(self) -> int | None:
        return self._sampler.peak_kv_bytes


class Tunix:
    """`tunix.generate.sampler.Sampler`, called as Tunix' vanilla rollout calls it; its optional log-probs are off.

    The cache has exactly the slots that prompt and completion need.
    """

    name = "tunix"

    def __init__(self, config: ModelConfig, folder: pathlib.Path, workload: Workload) -> None:
        from tunix.generate import sampler

        self._config = config
        self._workload = workload
        self._eos_ids = workload.eos_ids(config.vocab_size)
        self._tokenizer = TokenIds(config.vocab_size)
        self._model = tunix_model(config, folder)
        num_slots = workload.prompt_lengths[1] + workload.cap
        self._cache = sampler.CacheConfig(num_slots, config.num_layers, config.num_kv_heads, config.head_dim)
        # Any: its type wants strings, but what it does with them is the tokenizer's affair.
        self._sampler: Any = sampler.Sampler(self._model, self._tokenizer, self._cache)

    def generate(self, prompts: Sequence[Sequence[int]], seed: int) -> list[np.ndarray]:
        cap = self._workload.cap
        output = self._sampler(
            input_strings=[prompt for prompt in prompts for _ in range(self._workload.num_samples)],
            max_generation_steps=cap,
            max_prompt_length=self._workload.prompt_lengths[1],
            temperature=1.0,
            top_p=1.0,  # asks for sampling; the default is greedy
            top_k=None,
            seed=seed,
            eos_tokens=self._eos_ids or (self._tokenizer.eos_id(),),
            return_logprobs=False,
        )
        # Tunix cuts the EOS off, and does not say which one it was; only the number of tokens matters here.
        return [np.append(ids, self._eos_ids[0]) if len(ids) < cap else ids for ids in output.tokens]

    def logits(self, tokens: np.ndarray) -> np.ndarray:
        @nnx.jit
        def forward(model: Any, tokens_1T: jax.Array) -> jax.Array:
            causal = jnp.tril(jnp.ones((1, tokens.size, tokens.size), bool))
            return model(tokens_1T, jnp.arange(tokens.size)[None], None, causal)[0][0]

        return np.asarray(forward(self._model, jnp.asarray(tokens, jnp.int32)[None]))

    def kv_bytes(self) -> int:
        cache = self._cache
        values_per_row = cache.cache_size * cache.num_layers * 2 * cache.num_kv_heads * cache.head_dim
        return self._workload.num_rows * values_per_row * jnp.dtype(self._config.dtype).itemsize


class Transformers:
    """`generate` of transformers as TRL's GRPOTrainer calls it: rows padded on the left, sampling, a growing cache."""

    name = "trl"

    def __init__(self, config: ModelConfig, folder: pathlib.Path, workload: Workload) -> None:
        import torch
        import transformers

        transformers.utils.logging.disable_progress_bar()
        self._num_samples = workload.num_samples
        self._eos_ids = workload.eos_ids(config.vocab_size)
        self._kv_bytes = 0
        self._torch = torch
        self._device = "cuda" if torch.cuda.is_available() else "cpu"
        dtype = getattr(torch, config.dtype)
        model: Any = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
        self._model = model.to(self._device).eval()
        self._generation = transformers.GenerationConfig(
            max_new_tokens=workload.cap,
            do_sample=True,
            temperature=1.0,
            top_p=1.0,
            top_k=0,
            pad_token_id=0,
            eos_token_id=list(self._eos_ids) or None,
            disable_compile=True,
            return_dict_in_generate=True,
        )

    def generate(self, prompts: Sequence[Sequence[int]], seed: int) -> list[np.ndarray]:
        torch = self._torch
        torch.manual_seed(seed)
        width = max(map(len, prompts))
        rows = [(width - len(prompt), list(prompt)) for prompt in prompts for _ in range(self._num_samples)]
        tokens = torch.tensor([[0] * padding + prompt for padding, prompt in rows], device=self._device)
        mask = torch.tensor([[0] * padding + [1] * len(prompt) for padding, prompt in rows], device=self._device)
        with torch.no_grad():
            output = self._model.generate(input_ids=tokens, attention_mask=mask, generation_config=self._generation)
        layers = output.past_key_values.layers
        self._kv_bytes = max(self._kv_bytes, sum(layer.keys.nbytes + layer.values.nbytes for layer in layers))
        return [self._up_to_eos(ids) for ids in output.sequences[:, width:].cpu().numpy()]

    def logits(self, tokens: np.ndarray) -> np.ndarray:
        with self._torch.no_grad():
            logits = self._model(self._torch.tensor(tokens, device=self._device)[None]).logits
        return logits[0].float().cpu().numpy()

    def kv_bytes(self) -> int:
        return self._kv_bytes

    def _up_to_eos(self, ids: np.ndarray) -> np.ndarray:
        ends = np.flatnonzero(np.isin(ids, self._eos_ids))
        return ids[: ends[0] + 1] if ends.size else ids


PEERS = {"tunix": Tunix, "trl": Transformers}
LIBRARIES = {"tunix": "tunix", "trl": "torch"}


def is_installed(name: str) -> bool:
    """Whether the library behind an engine can be imported."""
    return name not in LIBRARIES or has_library(LIBRARIES[name])


def build_engine(
    name: str, weights: Weights, folder: pathlib.Path, workload: Workload, slots: int | None = None
) -> Engine:
    """The engine of this name. `folder` holds `weights` in Hugging Face's format; `slots` are Tandem's."""
    if name == Tandem.name:
        return Tandem(weights, workload, slots)
    return PEERS[name](weights.policy.config, folder, workload)


def check_same_logits(engines: Sequence[Engine], vocab_size: int, tolerance: float) -> None:
    """Refuses to compare engines that do not compute the same function.

    Args:
      tolerance: largest absolute difference of two logits.

    Raises:
      ValueError: an engine's logits differ by more.
    """
    tokens = np.random.default_rng(1).integers(0, vocab_size, 12)
    expected = engines[0].logits(tokens)
    for engine in engines[1:]:
        difference = float(np.max(np.abs(engine.logits(tokens) - expected)))
        if not difference <= tolerance:  # NaN too
            raise ValueError(
                f"logits of {engine.name} must be within {tolerance} of those of {engines[0].name}, got a difference "
                f"of {difference:.3g}; leave the engine out with --engines until its weights are the same"
            )
