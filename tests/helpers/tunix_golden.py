"""Tiny models of the families that only `tunix.models` computes, with the logits that transformers gives for them.

`python -m tests.helpers.tunix_golden` writes them anew, to tests/files/tunix_models/FAMILY (config.json,
model.safetensors and expected.json); it needs torch, the tests that read them do not. Weights are random, and norms are
no ones.
"""

import json
import pathlib
import shutil
from typing import Any

import numpy as np

from tests.helpers.places import FILES

# Tunix 0.1.7 uses interfaces that jax and flax are about to drop, and says so at every call.
IGNORED_WARNINGS = [
    f"ignore:{text}:DeprecationWarning"
    for text in (
        "jax.experimental.shard_map is deprecated",
        "jax.interpreters.pxla.thread_resources is deprecated",
        "'sharding' is deprecated",
        "'.value' access is now deprecated",
        "`flax.nnx.State` will be deprecated",
    )
]
FOLDER = FILES / "tunix_models"
VOCAB = 61
COMMON = {
    "vocab_size": VOCAB,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "intermediate_size": 24,
    "initializer_range": 0.3,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-6,
    "eos_token_id": 1,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 12, "norm_topk_prob": True},
    "gemma": {},
    # More tokens than the window, and logits that the caps bend.
    "gemma2": {"sliding_window": 5, "query_pre_attn_scalar": 8, "attn_logit_softcapping": 5.0},
}


def logits_of(folder: pathlib.Path, tokens_BT: np.ndarray) -> np.ndarray:
    """float32 logits of the model in `folder`, by transformers."""
    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", dtype="float32")
    with torch.no_grad():
        return model.eval()(torch.tensor(tokens_BT)).logits.numpy()


def write(family: str) -> None:
    """Makes a model of `family` and writes its folder."""
    import torch
    import transformers

    torch.manual_seed(0)
    settings = transformers.AutoConfig.for_model(family, **COMMON, **FAMILIES[family])
    model = transformers.AutoModelForCausalLM.from_config(settings)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.2 * torch.randn_like(parameter))
    folder = FOLDER / family
    shutil.rmtree(folder, ignore_errors=True)
    model.save_pretrained(folder)
    tokens_BT = np.random.default_rng(0).integers(0, VOCAB, (2, 14))
    expected = {"token_ids": tokens_BT.tolist(), "logits": np.round(logits_of(folder, tokens_BT), 5).tolist()}
    (folder / "expected.json").write_text(json.dumps(expected))


if __name__ == "__main__":
    for name in FAMILIES:
        write(name)
