"""Reads weights in the layouts of MaxText's decoders (https://github.com/AI-Hypercomputer/maxtext).

In: the paths of the arrays of a checkpoint, and a function that reads one. Out: the parameter tree of
`rl.models.config.base_specs`. An array that is missing, left over or misshapen is a ValueError with its name.

Known families: Llama, Qwen2, Qwen3 and Gemma 3. Known roots: Linen (`params/params/decoder/...`) and NNX
(`decoder/...`, `model/...` or `base/...`, each array below `value`). Layers stand one by one (`layers_3`) or stacked
along dim 1 (`layers`); Gemma's are stacked in blocks of six with the rest in `layers_remainder`. The optimizer's arrays
are not read.

The weights differ from Hugging Face's as in MaxText's own `checkpoint_conversion/utils/param_mapping.py`: Llama's query
kernels are divided by sqrt(head_dim). With Llama 3.1's rotary embedding, the dims of queries and keys that rotate
together are neighbours. Gemma's embedding is multiplied by sqrt(hidden_size) in bfloat16, and its norms hold 1 + scale.
A vocabulary may be padded.
"""

import math
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from rl.models.config import ModelConfig, base_specs, flatten_specs
from rl.models.families import FAMILIES, MaxTextLayout, families_with

Path = tuple[str, ...]

ROPES = ("interleaved", "halves")
_SCAN_DIM = 1  # MaxText's param_scan_axis
_ROOTS = ("params", "model", "base")
_MODULES = {
    "self_attn/q_proj": "self_attention/query",
    "self_attn/k_proj": "self_attention/key",
    "self_attn/v_proj": "self_attention/value",
    "self_attn/o_proj": "self_attention/out",
    "self_attn/q_norm": "self_attention/query_norm",
    "self_attn/k_norm": "self_attention/key_norm",
    "mlp/gate_proj": "mlp/wi_0",
    "mlp/up_proj": "mlp/wi_1",
    "mlp/down_proj": "mlp/wo",
}
_NORMS = {
    "input_layernorm": "pre_self_attention_layer_norm",
    "post_attention_layernorm": "post_self_attention_layer_norm",
}
_NORMS_OF_FOUR = {
    "input_layernorm": "pre_self_attention_norm",
    "post_attention_layernorm": "post_self_attention_norm",
    "pre_feedforward_layernorm": "pre_ffw_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}
_TOP: dict[Path, str] = {
    ("embed_tokens", "embedding"): "token_embedder/embedding",
    ("norm", "scale"): "decoder/decoder_norm/scale",
    ("lm_head", "kernel"): "decoder/logits_dense/kernel",
}
_OTHER_MODALITIES = ("vision_encoder/", "audio_encoder/")


class _Place(NamedTuple):
    """The place of a parameter: the name of MaxText's array, and its layer's index if the array stacks
    `count` layers.
    """

    name: str
    index: int | None = None
    count: int = 0


def weight_names(paths: Iterable[Path]) -> dict[str, Path]:
    """{name: path} of the weights among `paths`, named as in MaxText's Linen layout without its root
    ("decoder/layers/..."). {} where the paths are not those of a MaxText decoder.
    """
    paths = list(paths)
    root = next((root for root in _ROOTS if any(path[0] == root for path in paths)), None)
    names = {}
    for path in paths:
        parts = list(path)
        if root is not None:
            if parts[0] != root:
                continue
            del parts[0]
            if root == "params" and parts[:1] == ["params"]:
                del parts[0]
        if any(part == "rngs" or part.endswith("_rngs") for part in parts):
            continue
        if parts[-1:] == ["value"]:
            del parts[-1]
        # The names in a list of layers are numbers.
        names[re.sub(r"/(\d+)(?=/|$)", r"_\1", "/".join(parts))] = path
    return names if any(name.startswith("decoder/") for name in names) else {}


def layout_of(paths: Iterable[Path]) -> str | None:
    """The name of MaxText's layout that these paths have; None for none of its layouts."""
    names = weight_names(paths)
    if not names:
        return None
    flavour = "NNX" if any(path[-1] == "value" for path in names.values()) else "Linen"
    layers = "scanned" if any(name.startswith("decoder/layers/") for name in names) else "unscanned"
    return f"MaxText {flavour}, layers {layers}"


def read_params(
    config: ModelConfig, names: Mapping[str, Path], read: Callable[[Path], np.ndarray], rope: str | None = None
) -> tuple[dict[str, Any], list[str]]:
    """The parameters of a checkpoint (numpy). Each of its arrays is read once.

    Args:
      names: from `weight_names`.
      rope: Llama only: whether the dims of a head that rotate together are neighbours ("interleaved") or half a head
        apart ("halves"); None: interleaved where `config` has Llama 3.1's scaling of the frequencies.

    Returns:
      The tree of `base_specs(config)`, and the names of arrays that belong to other modalities and were left out.

    Raises:
      ValueError: arrays are missing, left over or misshapen, or `rope` does not apply.
    """
    layout = _layout(config)
    if rope is not None and not layout.has_two_ropes:
        two = [
            name
            for name, features in FAMILIES.items()
            if features.maxtext is not None and features.maxtext.has_two_ropes
        ]
        raise ValueError(f"rope must be left out for {config.family}, got {rope}: only {', '.join(two)} has two ways")
    interleaved = layout.has_two_ropes and (rope or _default_rope(config)) == "interleaved"
    specs = dict(flatten_specs(base_specs(config)))
    is_scanned = any(name.startswith("decoder/layers/") for name in names)
    users: dict[str, list[tuple[Path, _Place]]] = {}
    for path in specs:
        place = _place(config, path, is_scanned)
        users.setdefault(place.name, []).append((path, place))
    left_out = [name for name in names if name.startswith(_OTHER_MODALITIES)]
    _check_names(config, set(users), set(names) - set(left_out))
    params: dict[str, Any] = {}
    for name, parts in users.items():
        stored = read(names[name])
        for path, place in parts:
            value = _slice(stored, place, specs[path].shape, path)
            node = params
            for part in path[:-1]:
                node = node.setdefault(part, {})
            node[path[-1]] = _to_ours(config, path, value, interleaved)
    return params, left_out


def _layout(config: ModelConfig) -> MaxTextLayout:
    layout = config.features.maxtext
    if layout is None:
        raise ValueError(
            f"MaxText's checkpoints are read for {families_with('maxtext')} only, got family {config.family}; convert "
            "it to safetensors with MaxText's own tool"
        )
    return layout


def _default_rope(config: ModelConfig) -> str:
    return "interleaved" if config.rope_scaling.kind == "llama3" else "halves"


def _place(config: ModelConfig, path: Path, is_scanned: bool) -> _Place:
    if path in _TOP:
        return _Place(_TOP[path])
    layer, *modules, leaf = path
    number = int(layer.removeprefix("layers_"))
    module = "/".join(modules)
    norms = _NORMS_OF_FOUR if config.features.norms.after_attention else _NORMS
    inside = f"{_MODULES.get(module) or norms[module]}/{leaf}"
    if not is_scanned:
        return _Place(f"decoder/layers_{number}/{inside}")
    block_size = _layout(config).scanned_block
    if block_size == 1:
        return _Place(f"decoder/layers/{inside}", number, config.num_layers)
    num_blocks = config.num_layers // block_size
    block, position = divmod(number, block_size)
    if block == num_blocks:
        return _Place(f"decoder/layers_remainder/layers_{position}/{inside}")
    return _Place(f"decoder/layers/layers_{position}/{inside}", block, num_blocks)


def _check_names(config: ModelConfig, wanted: set[str], got: set[str]) -> None:
    for names, problem in ((wanted - got, "must be there and are missing"), (got - wanted, "have no place")):
        if names:
            some = ", ".join(sorted(names)[:5]) + (", ..." if len(names) > 5 else "")
            raise ValueError(
                f"{len(names)} arrays of a MaxText {config.family} with {config.num_layers} layers {problem}: {some}; "
                "check that the model's config.json is the one of this checkpoint"
            )


def _slice(stored: np.ndarray, place: _Place, shape: tuple[int, ...], path: Path) -> np.ndarray:
    """The part of a stored array that is one parameter, without the padding of a vocabulary."""
    wanted = list(shape)
    if place.index is not None:
        wanted.insert(_SCAN_DIM, place.count)
    vocab_dim = {"embed_tokens": 0, "lm_head": 1}.get(path[0])
    got = list(stored.shape)
    if vocab_dim is not None and len(got) == len(wanted) and got[vocab_dim] > wanted[vocab_dim]:
        stored = np.take(stored, np.arange(wanted[vocab_dim]), axis=vocab_dim)
        got[vocab_dim] = wanted[vocab_dim]
    if got != wanted:
        raise ValueError(
            f"{place.name} must have shape {wanted}, got {list(stored.shape)}; check that the model's config.json is "
            "the one of this checkpoint, and that layers are stacked along dim 1 (param_scan_axis)"
        )
    return stored if place.index is None else np.take(stored, place.index, axis=_SCAN_DIM)


def _to_ours(config: ModelConfig, path: Path, value: np.ndarray, interleaved: bool) -> np.ndarray:
    """The value as in Hugging Face's model. Computed numbers are float32 or wider."""
    wide = value.astype(np.promote_types(np.float32, value.dtype) if value.dtype.itemsize > 2 else np.float32)
    if config.features.scales_embedding and path[0] == "embed_tokens":
        return wide / np.float32(ml_dtypes.bfloat16(config.hidden_size**0.5))
    if config.features.norm_offset and path[-1] == "scale":
        return wide - np.float32(config.features.norm_offset)
    if _layout(config).divides_queries and path[-2] == "q_proj":
        value = wide * np.float32(math.sqrt(config.head_dim))
    if interleaved and path[-2] in ("q_proj", "k_proj"):
        value = np.concatenate([value[..., ::2], value[..., 1::2]], axis=-1)
    return value
