"""Hugging Face `config.json` in and out: old style (rope_theta, torch_dtype) and new (rope_parameters, dtype).

In: a folder. Out: a `ModelConfig`, or a ValueError that names an unsupported option. No option that could change the
maths is ignored. Weights are in `rl.models.files.hf`. Imports no jax.
"""

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any, NamedTuple

from rl.files.json_file import Fields, read_object, shown
from rl.models.config import (
    DTYPES,
    FULL_ATTENTION,
    LARGEST,
    LARGEST_ID,
    QUANTIZED_DTYPES,
    SLIDING_ATTENTION,
    ModelConfig,
    Quantization,
    RopeScaling,
    alternating_layer_types,
)
from rl.models.families import FAMILIES, Family

QUANT_METHOD = "tandem"

# Values of keys that config.json leaves out, in every family. `Family.config_defaults` has those of one family.
_COMMON_DEFAULTS = {
    "initializer_range": 0.02,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "mlp_bias": False,
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
    raw: dict[str, Any] = {
        "architectures": [config.features.architecture],
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
        "rope_theta": config.rope_theta,
        "rope_scaling": _rope_scaling_json(config.rope_scaling),
        "attention_dropout": 0.0,
        "initializer_range": config.initializer_range,
        "use_cache": True,
        "torch_dtype": dtype,
        **_token_ids_json(config),
    }
    pattern = _sliding_window_pattern(config.layer_types)
    of_family = {
        _activation_key(config.features): ACTIVATION_HF_NAMES[config.activation],
        "attention_bias": config.attention_bias,
        "mlp_bias": config.mlp_bias,
        "query_pre_attn_scalar": _whole(config.query_pre_attn_scalar),
        "partial_rotary_factor": config.features.rotary_share,
        "rope_local_base_freq": config.rope_local_theta,
        "use_sliding_window": False,
        "sliding_window": config.sliding_window,
        "layer_types": list(config.layer_types),
        **({} if pattern is None else {"sliding_window_pattern": pattern}),
    }
    written = {_activation_key(config.features), *config.features.config_keys}
    written |= {"partial_rotary_factor"} if config.features.rotary_share != 1 else set()
    return raw | {key: value for key, value in of_family.items() if key in written}


def generation_json(config: ModelConfig) -> dict[str, Any]:
    """The content of generation_config.json: the special tokens only, no sampling defaults."""
    return {"_from_model_config": True, **_token_ids_json(config)}


def parse_config(raw: Mapping[str, Any], special_ids: SpecialIds) -> ModelConfig:
    """`read_config` on the contents of config.json and generation_config.json."""
    family = _family(Fields(raw))
    features = FAMILIES[family]
    values = {**_defaults(features), **{key: value for key, value in raw.items() if value is not None}}
    fields = Fields(values)
    _refuse_unsupported(raw, fields, family)
    num_heads, num_layers = _size(fields, "num_attention_heads"), _size(fields, "num_hidden_layers")
    hidden_size = _size(fields, "hidden_size")
    own_heads = features.kv_heads_default and not fields.has("num_key_value_heads")
    head_dim = _size(fields, "head_dim") if fields.has("head_dim") else hidden_size // num_heads
    rope_theta, rope_scaling, rope_local_theta = _rope(Fields(raw), fields, family)
    dtype = _dtype(Fields(raw))
    return ModelConfig(
        family=family,
        vocab_size=_size(fields, "vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=_size(fields, "intermediate_size"),
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_heads if own_heads else _size(fields, "num_key_value_heads"),
        head_dim=head_dim,
        max_position_embeddings=_size(fields, "max_position_embeddings"),
        norm_eps=fields.number("rms_norm_eps", 0, 1),
        tie_word_embeddings=fields.flag("tie_word_embeddings"),
        rope_theta=rope_theta,
        rope_scaling=rope_scaling,
        rope_local_theta=rope_local_theta,
        activation=ACTIVATION_NAMES[fields.choice(_activation_key(features), ACTIVATION_NAMES)],
        attention_bias=fields.flag("attention_bias"),
        mlp_bias=fields.flag("mlp_bias"),
        sliding_window=fields.whole("sliding_window", 1, LARGEST_ID) if features.window_pattern else None,
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
    )


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
    for key, value in raw.items():
        neutral = (None, features.rotary_share) if key == "partial_rotary_factor" else NEUTRAL_VALUES
        if key not in known and not any(type(value) is type(other) and value == other for other in neutral):
            raise ValueError(
                f"option {key} = {shown(value)} is not supported for {family}; remove it from the file only if it does "
                "not change what the model computes"
            )
    if fields.number("attention_dropout", 0, 1, 0.0):
        raise ValueError(f"attention_dropout must be 0, got {raw['attention_dropout']!r}: dropout is not supported")
    if fields.flag("use_sliding_window", False):
        raise ValueError(f"use_sliding_window = True is not supported for {family}")
    if features.always_attention_bias and not fields.flag("attention_bias"):
        raise ValueError(f"attention_bias = False is not supported for {family}, whose q, k and v always have a bias")
    if not features.may_have_mlp_bias and fields.flag("mlp_bias"):
        raise ValueError(f"mlp_bias = True is not supported for {family}")


def _dtype(fields: Fields) -> str:
    return fields.choice("dtype" if fields.has("dtype") else "torch_dtype", DTYPES, "float32")


def _layer_types(fields: Fields, family: str, num_layers: int) -> tuple[str, ...]:
    if fields.has("layer_types"):
        layer_types = tuple(fields.texts("layer_types"))
        if FAMILIES[family].window_pattern is None and SLIDING_ATTENTION in layer_types:
            raise ValueError(f"layer_types with {SLIDING_ATTENTION!r} is not supported for {family}")
        return layer_types
    if FAMILIES[family].window_pattern is not None:
        # transformers 5 writes the pattern back under a private name.
        key = "_sliding_window_pattern" if fields.has("_sliding_window_pattern") else "sliding_window_pattern"
        return alternating_layer_types(num_layers, fields.whole(key, 1, LARGEST["num_layers"]))
    return (FULL_ATTENTION,) * num_layers


def _rope(raw: Fields, fields: Fields, family: str) -> tuple[float, RopeScaling, float]:
    """(theta, scaling, theta of sliding layers). Newer files have rope_parameters, older ones rope_scaling."""
    newer, older = raw.section("rope_parameters"), raw.section("rope_scaling")
    local_theta = fields.number("rope_local_base_freq", 0, _LARGEST_NUMBER, 10_000.0)
    if newer.values.keys() & {FULL_ATTENTION, SLIDING_ATTENTION}:
        if FAMILIES[family].window_pattern is None:
            raise raw.refuse("rope_parameters", f"one set for all layers for {family}")
        local = newer.section(SLIDING_ATTENTION)
        if _rope_scaling(local, fields).kind != "none":
            raise newer.refuse(SLIDING_ATTENTION, "of type 'default'")
        local_theta = local.number("rope_theta", 0, _LARGEST_NUMBER, local_theta)
        newer = newer.section(FULL_ATTENTION)
    theta = fields.number("rope_theta", 0, _LARGEST_NUMBER)
    readings = {
        (parameters.number("rope_theta", 0, _LARGEST_NUMBER, theta), _rope_scaling(parameters, fields))
        for parameters in ([newer, older] if newer.values and older.values else [newer if newer.values else older])
    }
    if len(readings) > 1:
        raise ValueError(
            f"rope_parameters and rope_scaling must agree, got {shown(newer.values)} and {shown(older.values)}; "
            "remove one"
        )
    theta, scaling = readings.pop()
    return theta, scaling, local_theta


def _rope_scaling(parameters: Fields, fields: Fields) -> RopeScaling:
    known = {"default": (), "linear": ("factor",), "llama3": ("factor", "low_freq_factor", "high_freq_factor")}
    kind = parameters.choice("rope_type" if parameters.has("rope_type") else "type", known, "default")
    extra = ("original_max_position_embeddings",) if kind == "llama3" else ()
    rotary_share = fields.values["partial_rotary_factor"]
    for key, value in parameters.values.items():
        is_read = key in ("rope_type", "type", "rope_theta", *known[kind], *extra)
        if not is_read and value not in ((None, rotary_share) if key == "partial_rotary_factor" else (None,)):
            raise ValueError(f"{parameters.prefix}{key} = {shown(value)} is not supported with rope type {kind!r}")
    if kind == "default":
        return RopeScaling()
    scaling: dict[str, Any] = {key: parameters.number(key, 0, _LARGEST_NUMBER) for key in known[kind]}
    if kind == "llama3":
        of_model = _size(fields, "max_position_embeddings")
        for source in (parameters, fields):
            of_model = source.whole("original_max_position_embeddings", 1, LARGEST_ID, of_model)
        scaling["original_max_position_embeddings"] = of_model
    return RopeScaling(kind=kind, **scaling)


def _rope_scaling_json(scaling: RopeScaling) -> dict[str, Any] | None:
    if scaling.kind == "none":
        return None
    if scaling.kind == "linear":
        return {"rope_type": "linear", "factor": scaling.factor}
    return {
        "rope_type": "llama3",
        "factor": scaling.factor,
        "low_freq_factor": scaling.low_freq_factor,
        "high_freq_factor": scaling.high_freq_factor,
        "original_max_position_embeddings": scaling.original_max_position_embeddings,
    }


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
    for pattern in range(1, len(layer_types) + 2):
        if alternating_layer_types(len(layer_types), pattern) == layer_types:
            return pattern
    return None
