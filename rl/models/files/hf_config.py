"""Hugging Face `config.json` in and out: old style (rope_theta, torch_dtype) and new (rope_parameters, dtype).

In: a folder. Out: a `ModelConfig`, or a ValueError that names an unsupported option. No option that could change the
maths is ignored. Weights are in `rl.models.files.hf`. Imports no jax.
"""

import dataclasses
import math
import pathlib
from collections.abc import Mapping
from typing import Any, NamedTuple

from rl.files.json_file import Fields, read_object, shown
from rl.models.config import (
    DTYPES,
    FULL_ATTENTION,
    LARGEST,
    LARGEST_ID,
    LARGEST_OF_STATES,
    LINEAR_ATTENTION,
    QUANTIZED_DTYPES,
    SLIDING_ATTENTION,
    WITHOUT_ROTARY,
    ModelConfig,
    Quantization,
    RopeScaling,
    alternating_layer_types,
    default_layer_types,
    has_rotary,
    has_window,
    local_rope_of,
    with_rotary,
)
from rl.models.families import FAMILIES, OWN_ROPE, Family

QUANT_METHOD = "tandem"

# Values of keys that config.json leaves out, in every family. `Family.config_defaults` has those of one family.
_COMMON_DEFAULTS = {
    "initializer_range": 0.02,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "mlp_bias": False,
    "embedding_multiplier": 1.0,
    "residual_multiplier": 1.0,
    "attention_multiplier": 1.0,
    "logits_scaling": 1.0,
}
# Keys whose null means "none", and not the default.
_NULLABLE = ("sliding_window", "attn_logit_softcapping", "final_logit_softcapping", "num_global_key_value_heads")
# What config.json of a multimodal model says of the other parts, and of where in a text they are.
_MULTIMODAL_KEYS = frozenset({"vision_config", "audio_config", "projector_hidden_act", "multimodal_projector_bias"})
_MULTIMODAL_ENDS = ("_token_id", "_token_index", "_soft_tokens_per_image", "_merge_size", "_feature_layer")
# Options that change what a model computes, and are not computed at any other value.
_ONLY_AT = {
    "num_local_experts": (0,),
    "enable_moe_block": (False,),
    "use_bidirectional_attention": (False, "vision"),  # "vision": of images, of which there are none here
    "attn_output_gate": (True,),
    "mamba_ssm_dtype": ("float32",),
    "resid_pdrop": (0, 0.0),
    "embd_pdrop": (0, 0.0),
}

ACTIVATION_NAMES = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
}
ACTIVATION_HF_NAMES = {"silu": "silu", "gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh"}

# fmt: off
# Keys that this module reads.
READ_KEYS = frozenset({
    "model_type", "architectures", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
    "num_attention_heads", "num_key_value_heads", "head_dim", "max_position_embeddings", "rms_norm_eps",
    "tie_word_embeddings", "rope_theta", "rope_scaling", "rope_parameters", "rope_local_base_freq", "hidden_act",
    "hidden_activation", "attention_bias", "mlp_bias", "initializer_range", "eos_token_id", "bos_token_id",
    "pad_token_id", "dtype", "torch_dtype", "attention_dropout", "original_max_position_embeddings",
    "quantization_config",
})
# Keys without influence on the maths: bookkeeping, and defaults of generation.
HARMLESS_KEYS = frozenset({
    "_name_or_path", "_attn_implementation", "_attn_implementation_autoset", "_from_model_config",
    "transformers_version", "transformers.js_config", "auto_map", "use_cache", "cache_implementation",
    "pretraining_tp", "is_llama_config", "tokenizer_class", "return_dict", "output_hidden_states",
    "output_attentions", "torchscript", "is_encoder_decoder", "is_decoder", "id2label", "label2id", "problem_type",
    "task_specific_params", "finetuning_task", "prefix", "sep_token_id", "decoder_start_token_id", "max_length",
    "min_length", "do_sample", "early_stopping", "num_beams", "num_beam_groups", "diversity_penalty", "temperature",
    "top_k", "top_p", "typical_p", "repetition_penalty", "length_penalty", "no_repeat_ngram_size",
    "encoder_no_repeat_ngram_size", "bad_words_ids", "num_return_sequences", "output_scores",
    "return_dict_in_generate", "forced_bos_token_id", "forced_eos_token_id", "remove_invalid_values",
    "exponential_decay_length_penalty", "suppress_tokens", "begin_suppress_tokens", "chunk_size_feed_forward",
    "unsloth_fixed", "unsloth_version", "model_name", "mlx_version",
})
# fmt: on
_SIZE_NAMES = {  # {our name: the name in config.json}
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_heads",
    "num_key_value_heads": "num_kv_heads",
}
_LARGEST_NUMBER = 1e15  # of thetas and factors
NEUTRAL_VALUES: tuple[Any, ...] = (None, False, 0, 1.0, "", [], {})


class SpecialIds(NamedTuple):
    """The special tokens of generation_config.json: those that end a text, and padding."""

    eos: tuple[int, ...] = ()
    pad: int | None = None


def read_config(folder: str | pathlib.Path) -> ModelConfig:
    """The architecture of a Hugging Face folder, with the dtype of its weights as `dtype` and `param_dtype`.

    EOS ids come from generation_config.json (first) and config.json together. Raises ValueError, naming the file and
    the key, for a value of a wrong type or range, and for an architecture or option that is not supported.
    """
    folder = pathlib.Path(folder)
    path = folder / "config.json"
    raw = read_object(path)
    special_ids = read_special_ids(folder)
    try:
        return parse_config(raw, special_ids)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def read_special_ids(folder: pathlib.Path) -> SpecialIds:
    """The special tokens in the generation_config.json of a folder; none where there is no such file."""
    path = folder / "generation_config.json"
    if not path.exists():
        return SpecialIds()
    fields = Fields(read_object(path), f"{path}: ")
    return SpecialIds(tuple(fields.wholes("eos_token_id", 0, LARGEST_ID)), _token_id(fields, "pad_token_id"))


def config_json(config: ModelConfig, dtype: str) -> dict[str, Any]:
    """The content of config.json for `config`, in the older form, which every transformers since 4.50 and vLLM read."""
    features = config.features
    raw: dict[str, Any] = {
        "architectures": [features.architecture],
        "model_type": config.family,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "max_position_embeddings": config.max_position_embeddings,
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tie_word_embeddings,
        **_rope_json(config),
        "attention_dropout": 0.0,
        "initializer_range": config.initializer_range,
        "use_cache": True,
        "torch_dtype": dtype,
        **_token_ids_json(config),
    }
    pattern = _sliding_window_pattern(config.layer_types)
    uses_window = any(map(has_window, config.layer_types))
    of_family = {
        _activation_key(features): ACTIVATION_HF_NAMES[config.activation],
        "attention_bias": config.attention_bias,
        "mlp_bias": config.mlp_bias,
        "query_pre_attn_scalar": _whole(config.query_pre_attn_scalar),
        "partial_rotary_factor": features.rotary_share if config.rotary_share is None else config.rotary_share,
        "rope_local_base_freq": config.rope_local_theta,
        "use_sliding_window": uses_window and features.windows_without_rotary,
        "sliding_window": config.sliding_window,
        "layer_types": [name.removesuffix(WITHOUT_ROTARY) for name in config.layer_types],
        **({} if pattern is None else {"sliding_window_pattern": pattern}),
        "no_rope_layers": [int(has_rotary(name)) for name in config.layer_types],
        "embedding_multiplier": config.embedding_multiplier,
        "residual_multiplier": config.residual_multiplier,
        "attention_multiplier": config.attention_multiplier,
        "logits_scaling": config.logits_divisor,
        "attn_logit_softcapping": config.attention_softcap,
        "final_logit_softcapping": config.logit_softcap,
        "global_head_dim": config.global_head_dim,
        "num_global_key_value_heads": config.num_global_kv_heads,
        "attention_k_eq_v": config.keys_are_values,
        "num_kv_shared_layers": config.num_kv_shared_layers,
        "use_double_wide_mlp": config.double_wide_mlp,
        "hidden_size_per_layer_input": config.per_layer_input_size,
        **{name: getattr(config, name) for name in LARGEST_OF_STATES},
    }
    if config.per_layer_input_size:
        of_family["vocab_size_per_layer_input"] = config.per_layer_vocab_size
    if config.rope_scaling.kind == "longrope":
        of_family["original_max_position_embeddings"] = config.rope_scaling.original_max_position_embeddings
    if features.may_lack_rotary:  # Granite 4, of which attention layers alone are computed
        of_family |= {
            "shared_intermediate_size": config.intermediate_size,
            "num_local_experts": 0,
            "num_experts_per_tok": 0,
            "position_embedding_type": "rope" if all(map(has_rotary, config.layer_types)) else None,
            "layer_types": ["attention"] * config.num_layers,
            # transformers checks that these fit, although no layer uses them.
            "mamba_n_heads": 1,
            "mamba_d_head": 2 * config.hidden_size,
            "mamba_expand": 2,
        }
    written = {_activation_key(features), *features.config_keys}
    written |= {"partial_rotary_factor"} if features.rotary_share != 1 else set()
    return raw | {key: value for key, value in of_family.items() if key in written}


def generation_json(config: ModelConfig) -> dict[str, Any]:
    """The content of generation_config.json: the special tokens only, no sampling defaults."""
    return {"_from_model_config": True, **_token_ids_json(config)}


def parse_config(raw: Mapping[str, Any], special_ids: SpecialIds) -> ModelConfig:
    """`read_config` on the contents of config.json and generation_config.json."""
    raw = text_config(raw)
    family = _family(Fields(raw))
    features = FAMILIES[family]
    values = {**_defaults(features), **{key: value for key, value in raw.items() if value is not None}}
    values |= {key: None for key in _NULLABLE if key in raw and raw[key] is None}
    fields = Fields(values)
    _refuse_unsupported(raw, fields, family)
    num_heads, num_layers = _size(fields, "num_attention_heads"), _size(fields, "num_hidden_layers")
    hidden_size = _size(fields, "hidden_size")
    own_heads = features.kv_heads_default and not fields.has("num_key_value_heads")
    head_dim = _size(fields, "head_dim") if fields.has("head_dim") else hidden_size // num_heads
    dtype = _dtype(Fields(raw))
    mlp_key = "shared_intermediate_size" if fields.has("shared_intermediate_size") else "intermediate_size"
    return ModelConfig(
        family=family,
        vocab_size=_size(fields, "vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=fields.whole(mlp_key, 1, LARGEST["intermediate_size"]),
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_heads if own_heads else _size(fields, "num_key_value_heads"),
        head_dim=head_dim,
        max_position_embeddings=_size(fields, "max_position_embeddings"),
        norm_eps=fields.number("rms_norm_eps", 0, 1),
        tie_word_embeddings=fields.flag("tie_word_embeddings"),
        activation=ACTIVATION_NAMES[fields.choice(_activation_key(features), ACTIVATION_NAMES)],
        attention_bias=fields.flag("attention_bias"),
        mlp_bias=fields.flag("mlp_bias"),
        sliding_window=fields.whole("sliding_window", 1, LARGEST_ID, None) if features.has_windows else None,
        layer_types=_layer_types(fields, family, num_layers),
        query_pre_attn_scalar=(
            fields.number("query_pre_attn_scalar", 0, _LARGEST_NUMBER) if features.has_query_scale else float(head_dim)
        ),
        initializer_range=fields.number("initializer_range", 0, _LARGEST_NUMBER),
        eos_token_ids=tuple(dict.fromkeys((*special_ids.eos, *fields.wholes("eos_token_id", 0, LARGEST_ID)))),
        bos_token_id=_token_id(fields, "bos_token_id"),
        pad_token_id=_token_id(fields, "pad_token_id") if "pad_token_id" in raw else special_ids.pad,
        dtype=dtype,
        param_dtype=dtype,
        remat="none",
        quantization=_quantization(fields),
        **_rope(Fields(raw), fields, family),
        **_of_features(Fields(raw), fields, features),
    )


def text_config(raw: Mapping[str, Any]) -> Mapping[str, Any]:
    """The configuration of the text model: `raw` itself, or the text_config of a multimodal model, with the keys beside
    it that concern text.

    Raises:
      ValueError: the multimodal model is not known, or it has an option that is not computed.
    """
    nested = raw.get("text_config")
    if not isinstance(nested, Mapping):
        return raw
    outer = Fields(raw)
    # Some text_configs leave out the family where the multimodal model has only one.
    families = [name for name, family in FAMILIES.items() if raw.get("model_type") in dict(family.nested_in)]
    if not families:
        known = [model_type for family in FAMILIES.values() for model_type, _ in family.nested_in]
        raise outer.refuse("model_type", f"one of {', '.join(dict.fromkeys(known))} with a text_config")
    family = Fields(nested, "text_config.").choice("model_type", families, families[0])
    architecture = dict(FAMILIES[family].nested_in)[raw["model_type"]]
    if (outer.texts("architectures", []) or [architecture]) != [architecture]:
        raise outer.refuse("architectures", f"[{architecture!r}] for {raw['model_type']}")
    text: dict[str, Any] = {**FAMILIES[family].nested_defaults, **nested}
    text |= {"model_type": family, "architectures": [FAMILIES[family].architecture]}
    beside = {key: value for key, value in raw.items() if key not in ("text_config", "model_type", "architectures")}
    for key, value in beside.items():
        if key in _MULTIMODAL_KEYS or (key.endswith(_MULTIMODAL_ENDS) and key not in _TOKEN_IDS):
            continue
        if key in READ_KEYS and key not in HARMLESS_KEYS:
            text = {key: value, **text} if value is not None else text
        elif key not in HARMLESS_KEYS and value not in NEUTRAL_VALUES:
            raise ValueError(f"option {key} = {shown(value)} is not supported for {raw['model_type']}")
    return text


def _of_features(raw: Fields, fields: Fields, features: Family) -> dict[str, Any]:
    """What few families have, under the names of `ModelConfig`."""
    found: dict[str, Any] = {"attention_multiplier": features.attention_multiplier}
    if features.has_states:
        found |= {name: fields.whole(name, 1, largest) for name, largest in LARGEST_OF_STATES.items()}
    if features.has_multipliers:
        names = ("embedding_multiplier", "residual_multiplier", "attention_multiplier", "logits_scaling")
        numbers = {name: fields.number(name, 0, _LARGEST_NUMBER) for name in names}
        found |= {"logits_divisor": numbers.pop("logits_scaling"), **numbers}
    if features.attention_softcap:
        found["attention_softcap"] = fields.number("attn_logit_softcapping", 0, _LARGEST_NUMBER, None)
    if features.logit_softcap:
        found["logit_softcap"] = fields.number("final_logit_softcapping", 0, _LARGEST_NUMBER, None)
    if features.chooses_rotary_share:
        found["rotary_share"] = _rotary_share(raw, fields)
    if features.mixed_layers:
        keys_are_values, per_layer = (
            fields.flag("attention_k_eq_v"),
            fields.whole("hidden_size_per_layer_input", 0, 2**20),
        )
        found |= {
            "global_head_dim": fields.whole("global_head_dim", 0, LARGEST["head_dim"]) or None,
            # As in transformers, this number is read only where keys are values.
            "num_global_kv_heads": (
                fields.whole("num_global_key_value_heads", 1, LARGEST["num_kv_heads"]) if keys_are_values else None
            ),
            "keys_are_values": keys_are_values,
            "num_kv_shared_layers": fields.whole("num_kv_shared_layers", 0, LARGEST["num_layers"]),
            "double_wide_mlp": fields.flag("use_double_wide_mlp"),
            "per_layer_input_size": per_layer,
            "per_layer_vocab_size": (
                fields.whole("vocab_size_per_layer_input", 1, LARGEST["vocab_size"]) if per_layer else 0
            ),
        }
    return found


def quantization_json(quantization: Quantization) -> dict[str, Any]:
    """The value of quantization_config in the config.json of a folder that `grpo quantize` writes."""
    return {"quant_method": QUANT_METHOD, **dataclasses.asdict(quantization)}


def quantization_in(folder: pathlib.Path) -> Quantization | None:
    """How the config.json of a folder says its weights are quantised; None: they are plain, or there is no
    such file.
    """
    path = folder / "config.json"
    if not path.is_file():
        return None
    raw = read_object(path)
    try:
        return _quantization(Fields(raw))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _quantization(fields: Fields) -> Quantization | None:
    raw = fields.section("quantization_config")
    if not raw.values:
        return None
    method = raw.values.get("quant_method")
    if method != QUANT_METHOD:
        raise ValueError(
            f"quantization_config must be of quant_method {QUANT_METHOD!r}, got {shown(method)}, which is not "
            "supported; take the model's plain weights and grpo quantize"
        )
    return Quantization(
        raw.choice("dtype", QUANTIZED_DTYPES),
        raw.whole("group_size", 1, LARGEST["intermediate_size"], None),
        tuple(raw.texts("patterns")),
        raw.flag("head"),
    )


_TOKEN_IDS = ("eos_token_id", "bos_token_id", "pad_token_id")


def _size(fields: Fields, key: str) -> int:
    return fields.whole(key, 1, LARGEST[_SIZE_NAMES.get(key, key)])


def _token_id(fields: Fields, key: str) -> int | None:
    return fields.whole(key, -1, LARGEST_ID, None)  # -1: how some files say that there is none


def _family(fields: Fields) -> str:
    family = fields.choice("model_type", FAMILIES)
    architecture = FAMILIES[family].architecture
    if (fields.texts("architectures", []) or [architecture]) != [architecture]:
        raise fields.refuse("architectures", f"[{architecture!r}] for {family}")
    return family


def _activation_key(features: Family) -> str:
    return "hidden_activation" if "hidden_activation" in features.config_keys else "hidden_act"


def _defaults(features: Family) -> dict[str, Any]:
    """The values of keys that a config.json of the family leaves out."""
    return {
        **_COMMON_DEFAULTS,
        "attention_bias": features.always_attention_bias,
        "rope_theta": features.rope_theta,
        "partial_rotary_factor": features.rotary_share,
        _activation_key(features): ACTIVATION_HF_NAMES[features.activation],
        **features.config_defaults,
    }


def _refuse_unsupported(raw: Mapping[str, Any], fields: Fields, family: str) -> None:
    """Refuses every key that is not read, not known to be harmless, and not at a value that switches nothing on."""
    features = FAMILIES[family]
    known = READ_KEYS | HARMLESS_KEYS | set(features.known_keys)
    known |= {"partial_rotary_factor"} if features.chooses_rotary_share else set()
    for key, value in raw.items():
        neutral = (None, features.rotary_share) if key == "partial_rotary_factor" else NEUTRAL_VALUES
        if key in _ONLY_AT and value is not None and value not in _ONLY_AT[key]:
            raise ValueError(f"option {key} = {shown(value)} is not supported for {family}")
        if key not in known and not any(type(value) is type(other) and value == other for other in neutral):
            raise ValueError(
                f"option {key} = {shown(value)} is not supported for {family}; remove it from the file only if it does "
                "not change what the model computes"
            )
    if features.may_lack_rotary and fields.whole("num_local_experts", 0, LARGEST["num_layers"], 8):
        raise ValueError(
            f"num_local_experts must be 0 for {family}, got none, which means 8: experts are not supported"
        )
    if fields.number("attention_dropout", 0, 1, 0.0):
        raise ValueError(f"attention_dropout must be 0, got {raw['attention_dropout']!r}: dropout is not supported")
    if fields.flag("use_sliding_window", False) and not features.windows_without_rotary:
        raise ValueError(f"use_sliding_window = True is not supported for {family}")
    if features.always_attention_bias and not fields.flag("attention_bias"):
        raise ValueError(f"attention_bias = False is not supported for {family}, whose q, k and v always have a bias")
    if not features.may_have_attention_bias and fields.flag("attention_bias"):
        raise ValueError(f"attention_bias = True is not supported for {family}")
    if not features.may_have_mlp_bias and fields.flag("mlp_bias"):
        raise ValueError(f"mlp_bias = True is not supported for {family}")


def _dtype(fields: Fields) -> str:
    return fields.choice("dtype" if fields.has("dtype") else "torch_dtype", DTYPES, "float32")


def _layer_types(fields: Fields, family: str, num_layers: int) -> tuple[str, ...]:
    features = FAMILIES[family]
    window = fields.whole("sliding_window", 1, LARGEST_ID, None) if features.has_windows else None
    if features.windows_without_rotary and not fields.flag("use_sliding_window", False):
        window = None
    if features.may_lack_rotary:
        return _granite_types(fields, num_layers)
    if fields.has("layer_types"):
        layer_types = tuple(fields.texts("layer_types"))
        if not features.has_windows and SLIDING_ATTENTION in layer_types:
            raise ValueError(f"layer_types with {SLIDING_ATTENTION!r} is not supported for {family}")
        known = (FULL_ATTENTION, SLIDING_ATTENTION if not features.has_states else LINEAR_ATTENTION)
        if unknown := sorted(set(layer_types) - set(known)):
            raise ValueError(f"layer_types entry must be one of {', '.join(known)}, got {unknown[0]!r}")
    elif features.has_states:
        interval = fields.whole("full_attention_interval", 1, LARGEST["num_layers"], features.state_interval)
        layer_types = alternating_layer_types(num_layers, interval, LINEAR_ATTENTION)
    elif features.window_pattern is not None:
        layer_types = _from_pattern(fields, features, num_layers, window)
    else:
        layer_types = tuple(
            name.removesuffix(WITHOUT_ROTARY) for name in default_layer_types(features, num_layers, window)
        )
    if len(layer_types) != num_layers:
        return layer_types  # which the model's own rules refuse
    if (
        features.window_everywhere
        and fields.has("layer_types")
        and layer_types != (default_layer_types(features, num_layers, window))
    ):
        raise fields.refuse("layer_types", f"left out for {family}, whose layers are all alike")
    if features.mixed_layers and layer_types[-1] != FULL_ATTENTION:
        layer_types = (*layer_types[:-1], FULL_ATTENTION)  # as transformers does, with a warning
    if features.full_layers_without_rotary and window is not None:
        return with_rotary(layer_types, map(has_window, layer_types))
    if features.no_rotary_interval is None:
        return layer_types
    if fields.has("no_rope_layers"):
        flags = fields.wholes("no_rope_layers", 0, 1)
        if len(flags) < num_layers:
            raise fields.refuse("no_rope_layers", f"a list of {num_layers} times 0 or 1")
    else:
        interval = fields.whole("no_rope_layer_interval", 1, LARGEST["num_layers"], features.no_rotary_interval)
        flags = [int((i + 1) % interval != 0) for i in range(num_layers)]
    if features.windows_without_rotary and window is not None and not fields.has("layer_types"):
        layer_types = tuple(FULL_ATTENTION if rotates else SLIDING_ATTENTION for rotates in flags[:num_layers])
    return with_rotary(layer_types, flags[:num_layers])


def _from_pattern(fields: Fields, features: Family, num_layers: int, window: int | None) -> tuple[str, ...]:
    """The layers of a file that names a period instead: a number, or letters L and G for each layer of a period."""
    # transformers 5 writes the pattern back under a private name.
    key = "_sliding_window_pattern" if fields.has("_sliding_window_pattern") else "sliding_window_pattern"
    if features.full_layers_without_rotary and window is None:
        return (FULL_ATTENTION,) * num_layers
    letters = fields.values.get(key)
    if features.full_layers_without_rotary and isinstance(letters, str):
        if not letters or set(letters) - {"L", "G"}:
            raise fields.refuse(key, "a number, or letters L and G")
        types = [SLIDING_ATTENTION if letters[i % len(letters)] == "L" else FULL_ATTENTION for i in range(num_layers)]
        return (*types[:-1], FULL_ATTENTION)
    pattern = fields.whole(key, 1, LARGEST["num_layers"], features.window_pattern)
    return alternating_layer_types(num_layers, pattern)


def _granite_types(fields: Fields, num_layers: int) -> tuple[str, ...]:
    """The layers of Granite 4: attention alone is computed here. Without a list, all are "mamba"."""
    key = "layers_block_type" if fields.has("layers_block_type") else "layer_types"
    types = fields.texts(key, ["mamba"] * num_layers)
    if set(types) - {"attention", FULL_ATTENTION}:
        raise ValueError(f"{key} must name attention layers only, got {shown(types)}: 'mamba' is not supported")
    position = fields.text("position_embedding_type", None)
    if position not in (None, "rope", "nope"):
        raise fields.refuse("position_embedding_type", "rope, nope or null")
    return with_rotary((FULL_ATTENTION,) * len(types), [position == "rope"] * len(types))


def _rotary_share(raw: Fields, fields: Fields) -> float:
    """The share of each head that is rotated, which stands in the file, in its rope_parameters, or in both."""
    places = [raw.section("rope_parameters"), raw.section("rope_scaling"), raw]
    key = "partial_rotary_factor"
    shares = {place.number(key, 0, 1) for place in places if place.has(key)}
    if len(shares) > 1:
        raise raw.refuse(key, f"that of rope_parameters, of {', '.join(map(str, sorted(shares)))} only one")
    return shares.pop() if shares else fields.number(key, 0, 1)


def _rope(raw: Fields, fields: Fields, family: str) -> dict[str, Any]:
    """Theta and scaling of layers without and with a window, under the names of `ModelConfig`. Newer files have
    rope_parameters, older ones rope_scaling.
    """
    features = FAMILIES[family]
    newer, older = raw.section("rope_parameters"), raw.section("rope_scaling")
    local: tuple[float, RopeScaling] | None = None
    if features.rope_by_type and not newer.values:
        newer = Fields(_GEMMA4_ROPE)
    if features.scales_query_by_position and not newer.values and not older.values:
        newer = Fields(_MINISTRAL3_ROPE)
    if newer.values.keys() & {FULL_ATTENTION, SLIDING_ATTENTION}:
        if not features.has_windows:
            raise raw.refuse("rope_parameters", f"one set for all layers for {family}")
        own = newer.section(SLIDING_ATTENTION)
        local_theta = fields.number("rope_local_base_freq", 0, _LARGEST_NUMBER, 10_000.0)
        if features.local_rope != OWN_ROPE:
            local_theta = fields.number("rope_theta", 0, _LARGEST_NUMBER)
        local = (own.number("rope_theta", 0, _LARGEST_NUMBER, local_theta), _rope_scaling(own, fields, family))
        if features.local_rope == OWN_ROPE and not features.rope_by_type and local[1].kind != "none":
            raise newer.refuse(SLIDING_ATTENTION, "of type 'default'")
        newer = newer.section(FULL_ATTENTION)
    theta = fields.number("rope_theta", 0, _LARGEST_NUMBER)
    readings = {
        (parameters.number("rope_theta", 0, _LARGEST_NUMBER, theta), _rope_scaling(parameters, fields, family))
        for parameters in ([newer, older] if newer.values and older.values else [newer if newer.values else older])
    }
    if len(readings) > 1:
        raise ValueError(
            f"rope_parameters and rope_scaling must agree, got {shown(newer.values)} and {shown(older.values)}; "
            "remove one"
        )
    theta, scaling = readings.pop()
    if features.local_rope == OWN_ROPE or not features.has_windows:
        local = local or (fields.number("rope_local_base_freq", 0, _LARGEST_NUMBER, 10_000.0), RopeScaling())
    else:
        of_family = local_rope_of(features, theta, scaling)
        if local not in (None, of_family):
            raise raw.refuse("rope_parameters", f"such that layers with a window have {features.local_rope} rope")
        local = of_family
    return {
        "rope_theta": theta,
        "rope_scaling": scaling,
        "rope_local_theta": local[0],
        "rope_local_scaling": local[1],
    }


_GEMMA4_ROPE = {
    SLIDING_ATTENTION: {"rope_type": "default", "rope_theta": 10_000.0},
    FULL_ATTENTION: {"rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 1_000_000.0},
}
_MINISTRAL3_ROPE = {
    "rope_type": "yarn",
    "rope_theta": 1_000_000.0,
    "factor": 16.0,
    "original_max_position_embeddings": 16_384,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "llama_4_scaling_beta": 0.1,
}
_YARN_NUMBERS = ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim")
_ROPE_KEYS: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": ("factor", "original_max_position_embeddings", "truncate", *_YARN_NUMBERS),
    "longrope": (*("factor", "original_max_position_embeddings", "attention_factor", "short_factor", "long_factor"),),
    "proportional": ("factor", "partial_rotary_factor"),
}


def _rope_scaling(parameters: Fields, fields: Fields, family: str) -> RopeScaling:
    features = FAMILIES[family]
    key = "rope_type" if parameters.has("rope_type") else "type"
    kind = parameters.values.get(key)
    if "original_max_position_embeddings" in features.config_keys and kind in ("su", "yarn"):
        kind = "longrope"  # what Phi-3's files called it at first
    else:
        kind = parameters.choice(key, _ROPE_KEYS, "default")
    if kind == "proportional" and not features.rope_by_type:
        raise parameters.refuse(key, f"another type for {family}")
    read = {"rope_type", "type", "rope_theta", *_ROPE_KEYS[kind]}
    read |= {"mrope_section", "mrope_interleaved"} if features.rope_of_images else set()
    read |= {"partial_rotary_factor"} if features.chooses_rotary_share else set()
    read |= {"llama_4_scaling_beta", "max_position_embeddings"} if features.scales_query_by_position else set()
    rotary_share = fields.values["partial_rotary_factor"]
    for name, value in parameters.values.items():
        neutral = (None, rotary_share) if name == "partial_rotary_factor" else (None,)
        if name == "original_max_position_embeddings" and kind == "default":
            neutral = (value,)  # Phi-3 says it in any case
        if name not in read and value not in neutral:
            raise ValueError(f"{parameters.prefix}{name} = {shown(value)} is not supported with rope type {kind!r}")
    scaling: dict[str, Any] = {}
    if features.scales_query_by_position:
        scaling["query_scale_beta"] = parameters.number("llama_4_scaling_beta", 0, _LARGEST_NUMBER, None)
    needs_length = "original_max_position_embeddings" in _ROPE_KEYS[kind] or scaling.get("query_scale_beta") is not None
    if kind == "default" and not needs_length:
        return RopeScaling()
    most = _size(fields, "max_position_embeddings")
    original = most
    for source in (parameters, fields) if needs_length else ():
        original = source.whole("original_max_position_embeddings", 1, LARGEST_ID, original)
    if needs_length:
        scaling["original_max_position_embeddings"] = original
    if kind in ("yarn", "longrope"):
        scaling["factor"] = parameters.number("factor", 0, _LARGEST_NUMBER, most / original)
        scaling["attention_factor"] = parameters.number("attention_factor", 0, _LARGEST_NUMBER, None)
    if kind == "yarn":
        scaling["beta_fast"] = parameters.number("beta_fast", 0, _LARGEST_NUMBER, 0.0) or 32.0
        scaling["beta_slow"] = parameters.number("beta_slow", 0, _LARGEST_NUMBER, 0.0) or 1.0
        scaling["truncate"] = parameters.flag("truncate", True)
        for name in ("mscale", "mscale_all_dim"):
            scaling[name] = parameters.number(name, 0, _LARGEST_NUMBER, None)
    elif kind == "longrope":
        for name in ("short_factor", "long_factor"):
            scaling[name] = _numbers(parameters, name)
    elif kind == "proportional":
        scaling |= {
            "share": parameters.number("partial_rotary_factor", 0, 1, 1.0),
            "factor": parameters.number("factor", 0, _LARGEST_NUMBER, 1.0),
        }
    elif kind in ("linear", "llama3"):
        names = (name for name in _ROPE_KEYS[kind] if name.endswith("factor"))
        scaling |= {name: parameters.number(name, 0, _LARGEST_NUMBER) for name in names}
    return RopeScaling(kind="none" if kind == "default" else kind, **scaling)


def _numbers(fields: Fields, key: str) -> tuple[float, ...]:
    value = fields.values.get(key)
    if not isinstance(value, list) or not 1 <= len(value) <= LARGEST["head_dim"]:
        raise fields.refuse(key, "a list of numbers")
    return tuple(Fields({key: item}, fields.prefix).number(key, 0, _LARGEST_NUMBER) for item in value)


def _rope_json(config: ModelConfig) -> dict[str, Any]:
    """Theta and scaling in the older form, or by type of layer where transformers' class reads no other."""
    if config.features.rope_of_images:
        pairs = config.rotary_dim // 2
        time = math.ceil(pairs / 3)
        height = math.ceil((pairs - time) / 2)
        parameters = _rope_scaling_json(config.rope_scaling) or {"rope_type": "default"}
        parameters |= {"rope_theta": config.rope_theta, "partial_rotary_factor": config.rotary_dim / config.head_dim}
        # In a text all three positions of a token are the same, so that any division of the pairs gives the same.
        parameters |= {"mrope_interleaved": True, "mrope_section": [time, height, pairs - time - height]}
        return {"rope_parameters": parameters}
    if not config.features.rope_by_type:
        return {"rope_theta": config.rope_theta, "rope_scaling": _rope_scaling_json(config.rope_scaling)}
    by_type = {}
    for name, theta, scaling in (
        (FULL_ATTENTION, config.rope_theta, config.rope_scaling),
        (SLIDING_ATTENTION, config.rope_local_theta, config.rope_local_scaling),
    ):
        by_type[name] = {"rope_theta": theta, **(_rope_scaling_json(scaling) or {"rope_type": "default"})}
    return {"rope_parameters": by_type}


def _rope_scaling_json(scaling: RopeScaling) -> dict[str, Any] | None:
    beta = {} if scaling.query_scale_beta is None else {"llama_4_scaling_beta": scaling.query_scale_beta}
    if beta:
        beta["original_max_position_embeddings"] = scaling.original_max_position_embeddings
    if scaling.kind == "none":
        return {"rope_type": "default", **beta} if beta else None
    found: dict[str, Any] = {"rope_type": scaling.kind}
    for name in _ROPE_KEYS[scaling.kind]:
        value = getattr(scaling, {"partial_rotary_factor": "share"}.get(name, name))
        if value is not None and (name, value) != ("truncate", True):
            found[name] = list(value) if isinstance(value, tuple) else value
    return found | beta


def _whole(value: float) -> float | int:
    """The value as an int where it is whole, because transformers 5 checks the type."""
    return int(value) if value == int(value) else value


def _token_ids_json(config: ModelConfig) -> dict[str, Any]:
    eos = config.eos_token_ids
    return {
        "bos_token_id": config.bos_token_id,
        "eos_token_id": None if not eos else eos[0] if len(eos) == 1 else list(eos),
        "pad_token_id": config.pad_token_id,
    }


def _sliding_window_pattern(layer_types: tuple[str, ...]) -> int | None:
    """The period p if every p-th layer has full attention; None for another pattern."""
    layer_types = tuple(name.removesuffix(WITHOUT_ROTARY) for name in layer_types)
    for pattern in range(1, len(layer_types) + 2):
        if alternating_layer_types(len(layer_types), pattern) == layer_types:
            return pattern
    return None
