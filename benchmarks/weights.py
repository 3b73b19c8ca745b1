"""The same random weights on every side: Tandem's own, and the model of a peer that has read their Hugging Face folder.

Also what a peer takes for a tokenizer where prompts are token ids already. What is computed with all this is in
`engines.py` (samplers) and `trainers.py` (updates).
"""

import importlib.util
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rl.config.load import load_config
from rl.devices.mesh import create_mesh, tree_shardings
from rl.models.config import ModelConfig, logical_axes
from rl.models.flavours import policy_from_config


def has_library(library: str) -> bool:
    """Whether a library can be imported."""
    return importlib.util.find_spec(library) is not None


class Weights:
    """A random model on the first device: matrices normal(0.02), norms 1."""

    def __init__(self, model_config: ModelConfig, seed: int = 0) -> None:
        self.run_config = load_config(None)
        rules = self.run_config.mesh.rules
        self.mesh = create_mesh(self.run_config.mesh, jax.devices()[:1])
        self.policy = policy_from_config(self.run_config, model_config)
        abstract = jax.eval_shape(self.policy.init, jax.random.key(0))
        self.shardings = tree_shardings(abstract, logical_axes(model_config), self.mesh, rules)
        rng = np.random.default_rng(seed)

        # In numpy: XLA takes seconds to compile the random numbers of a tiny model, minutes for a large one.
        def fill(leaf: jax.ShapeDtypeStruct, sharding: jax.sharding.Sharding) -> jax.Array:
            is_norm = len(leaf.shape) == 1
            value = np.ones(leaf.shape) if is_norm else 0.02 * rng.standard_normal(leaf.shape, np.float32)
            return jax.device_put(value.astype(leaf.dtype), sharding)

        self.params = jax.tree.map(fill, abstract, self.shardings)


class TokenIds:
    """What Tunix takes for a tokenizer, when its prompts are token ids already: so it spends no time on text.

    The special ids are outside the vocabulary. Tunix hides from attention every token that equals its padding, drawn
    ones too; and an EOS that is never drawn gives completions of full length.
    """

    def __init__(self, vocab_size: int) -> None:
        self._vocab_size = vocab_size

    def encode(self, text: Sequence[int], **_: Any) -> list[int]:
        return list(text)

    def decode(self, ids: Sequence[int], **_: Any) -> str:
        return ""

    def bos_id(self) -> None:
        return None

    def pad_id(self) -> int:
        return self._vocab_size

    def eos_id(self) -> int:
        return self._vocab_size + 1


def tunix_architecture(config: ModelConfig, **changes: Any) -> tuple[Any, Any, Any]:
    """(model class, its configuration, module that reads its weights) of Tunix for the same shape.

    Args:
      changes: fields of Tunix' configuration that have no equal in `config`.
    """
    options: dict[str, Any] = {
        "num_layers": config.num_layers,
        "vocab_size": config.vocab_size,
        "embed_dim": config.hidden_size,
        "hidden_dim": config.intermediate_size,
        "num_heads": config.num_heads,
        "head_dim": config.head_dim,
        "num_kv_heads": config.num_kv_heads,
        "rope_theta": int(config.rope_theta),
        "norm_eps": config.norm_eps,
        **changes,
    }
    if config.family == "qwen3":
        from tunix.models.qwen3 import model, params

        dtype = jnp.dtype(config.dtype)
        options |= {"use_tied_embedding": config.tie_word_embeddings, "dtype": dtype, "param_dtype": dtype}
        return model.Qwen3, model.ModelConfig(**options), params
    from tunix.models.llama3 import model, params

    return model.Llama3, model.ModelConfig(**options, weight_tying=config.tie_word_embeddings), params


def tunix_model(config: ModelConfig, folder: pathlib.Path, mesh: jax.sharding.Mesh | None = None) -> Any:
    """Tunix' own model with the weights of a Hugging Face folder; on `mesh` in Tunix' own shardings."""
    _, tunix_config, params = tunix_architecture(config)
    return params.create_model_from_safe_tensors(str(folder), tunix_config, mesh)
