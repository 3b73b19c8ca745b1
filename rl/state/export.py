"""Writes a policy's weights as a folder for other programs, with configuration, token ids and tokenizer.

In: parameters on the host. Out: a Hugging Face folder, or a parameter-only checkpoint (`rl.state.param_folder`).
Adapters are merged into the weights. Not here: the command (`rl.tools.checkpoints.export`).
"""

import dataclasses
import functools
import pathlib
from typing import Any

from rl.data.tokenizer import Tokenizer
from rl.models.config import ModelConfig
from rl.models.files.hf import save_folder
from rl.models.files.lora_remainder import merge_with_remainder, write_remainder
from rl.models.foreign import files as foreign
from rl.models.lora import merge
from rl.state.param_folder import save_params

FORMATS = {"huggingface": save_folder, "params": save_params}


def write_folder(
    out: str | pathlib.Path,
    model_config: ModelConfig,
    params: Any,
    tokenizer: Tokenizer,
    dtype: str | None,
    kind: str = "huggingface",
    keep_remainder: bool = True,
) -> None:
    """Writes weights with merged adapters, the model configuration, and the tokenizer with its chat template.

    A model that is not the toolkit's own decoder is written by `rl.models.foreign.files.save_folder`; its `kind` must
    be huggingface, else ValueError.

    Args:
      keep_remainder: where adapters are merged into a Hugging Face folder, also write the file with which `grpo lora
        unmerge` restores the base (dequantised if it was quantised) bit for bit.
    """
    if model_config.kind != "decoder":
        if kind != "huggingface":
            raise ValueError(
                "--format must be huggingface, or left out, for a model of another library or a module of your own, "
                f"got {kind!r}, which is of the toolkit's own decoder alone"
            )
        foreign.save_folder(out, model_config, params, tokenizer, dtype)
        return
    own_config = _with_token_ids(model_config, tokenizer)
    if kind != "huggingface" or model_config.lora is None or not keep_remainder:
        FORMATS[kind](out, own_config, merge(model_config, params), tokenizer=tokenizer, dtype=dtype)
        return
    merged, remainder = merge_with_remainder(model_config, params, dtype or model_config.param_dtype)
    write_more = functools.partial(write_remainder, remainder)
    save_folder(out, own_config, merged, tokenizer=tokenizer, dtype=dtype, write_more=write_more)


def _with_token_ids(model_config: ModelConfig, tokenizer: Tokenizer) -> ModelConfig:
    """The configuration with the special tokens of a run: the model's own, then the tokenizer's."""
    eos_ids = tuple(dict.fromkeys((*model_config.eos_token_ids, *tokenizer.eos_ids)))
    bos_id, pad_id = model_config.bos_token_id, model_config.pad_token_id
    return dataclasses.replace(
        model_config,
        eos_token_ids=eos_ids,
        bos_token_id=tokenizer.bos_id if bos_id is None else bos_id,
        pad_token_id=tokenizer.pad_id if pad_id is None else pad_id,
    )
