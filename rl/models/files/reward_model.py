"""Reward models in Hugging Face folders: a decoder whose head gives one number for a sequence (`score`).

In: a folder of `LlamaForSequenceClassification`, or the same class of another family in `rl.models.families`. Out: the
decoder's `ModelConfig`, its parameters, and the vector of the head. Not here: computing scores
(`rl.rollout.reward_model`).
Legend: D model.
"""

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from rl.files.json_file import Fields, read_object, shown
from rl.models.config import ModelConfig
from rl.models.families import FAMILIES
from rl.models.files.finite import as_finite
from rl.models.files.folders import open_tensors
from rl.models.files.hf import check_weights, load_params, tensor_locations
from rl.models.files.hf_config import SpecialIds, parse_config

SCORE = "score.weight"
_NUM_LABELS = 2  # where config.json does not say, as in transformers' PretrainedConfig


def read_reward_config(folder: pathlib.Path) -> ModelConfig:
    """The decoder of a reward model, after checking the headers of its weights; reads no weights.

    The compute type is the stored one, or float32 for float16. `pad_token_id` is that of config.json alone, by which
    transformers finds the last token.

    Raises:
      ValueError: the model has more than one label, its architecture or an option is not supported, or `score.weight`
        or another tensor is missing or misshapen. The message names file and key.
    """
    path = folder / "config.json"
    raw = read_object(path)
    try:
        config = _parse(raw)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    if SCORE not in tensor_locations(folder):
        raise ValueError(
            f"{folder}: the tensor {SCORE} is missing, the head of a reward model; give a folder of "
            f"{config.features.reward_architecture} that was saved with its head"
        )
    check_weights(folder, config, _head(config))
    return config


def load_reward_params(
    folder: pathlib.Path, config: ModelConfig, shardings: Any, allow_nonfinite: bool
) -> tuple[dict[str, Any], np.ndarray]:
    """The decoder's parameters, placed by `shardings` and in `config.param_dtype`, and the head [D] in float32, on the
    host. ValueError as in `rl.models.files.hf.load_params`.
    """
    params = load_params(folder, config, shardings, allow_nonfinite, _head(config))
    file = tensor_locations(folder)[SCORE]
    with open_tensors(file) as tensors:
        score = tensors.get_tensor(SCORE)
    return params, as_finite(score, np.float32, f"{file}: tensor {SCORE}", allow_nonfinite).reshape(-1)


def _parse(raw: Mapping[str, Any]) -> ModelConfig:
    fields = Fields(raw)
    features = FAMILIES[fields.choice("model_type", FAMILIES)]
    if features.reward_architecture is None:
        raise fields.refuse("model_type", "a family whose reward models can be read")
    if fields.texts("architectures", []) != [features.reward_architecture]:
        raise fields.refuse(
            "architectures", f"[{features.reward_architecture!r}] for a reward model of this model_type"
        )
    labels = raw.get("id2label")
    count = len(labels) if isinstance(labels, Mapping) else fields.whole("num_labels", 1, 2**31 - 1, _NUM_LABELS)
    if count != 1:
        raise ValueError(
            f"a reward model must have one label, whose score is the reward, got {count} (id2label {shown(labels)}, "
            f"num_labels {shown(raw.get('num_labels'))}); give a model that was trained with num_labels=1"
        )
    # There is no head for logits, so no matrix that could be tied to the embedding.
    decoder = {key: value for key, value in raw.items() if key != "num_labels"}
    decoder |= {"architectures": [features.architecture], "tie_word_embeddings": True}
    config = parse_config(decoder, SpecialIds(pad=features.default_pad_id))
    if config.dtype == "float16":
        config = dataclasses.replace(config, dtype="float32", param_dtype="float32")
    return config


def _head(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    return {SCORE: (1, config.hidden_size)}
