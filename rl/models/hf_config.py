"""Hugging Face `config.json` in and out: old style (rope_theta, torch_dtype) and new (rope_parameters, dtype).

In: a folder. Out: a `ModelConfig`, or a ValueError that names the option we cannot honour; nothing is ignored that
could change the maths. Weights are in `rl.models.hf`. Imports no jax.
"""

import dataclasses
import json
import pathlib
from collections.abc import Mapping
from typing import Any

from rl.models.config import (
    DTYPES,
    FULL_ATTENTION,
    SLIDING_ATTENTION,
    ModelConfig,
    Quantization,
    RopeScaling,
    alternating_layer_types,
)

ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "gemma3_text": "Gemma3ForCausalLM",
}

QUANT_METHOD = "tandem"

# What transformers' configuration class of each family takes where the file says nothing.
_COMMON_DEFAULTS = {"hidden_act": "silu", "initializer_range": 0.02, "rms_norm_eps": 1e-6, "tie_word_embeddings": False}
FAMILY_DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {**_COMMON_DEFAULTS, "rope_theta": 10_000.0, "attention_bias": False, "mlp_bias": False},
    "qwen2": {**_COMMON_DEFAULTS, "rope_theta": 10_000.0, "attention_bias": True, "mlp_bias": False},
    "qwen3": {
        **_COMMON_DEFAULTS,
        "rope_theta": 10_000.0,
        "attention_bias": False,
        "mlp_bias": False,
        "head_dim": 128,
    },
    "gemma3_text": {
        **_COMMON_DEFAULTS,
        "tie_word_embeddings": True,
        "hidden_activation": "gelu_pytorch_tanh",
        "rope_theta": 1_000_000.0,
        "rope_local_base_freq": 10_000.0,
        "attention_bias": False,
        "mlp_bias": False,
        "head_dim": 256,
        "query_pre_attn_scalar": 256,
        "sliding_window": 4096,
        "sliding_window_pattern": 6,
    },
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
# Keys that say nothing about the maths: bookkeeping, and defaults of generation.
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
_QWEN_SLIDING_KEYS = frozenset({"use_sliding_window", "sliding_window", "max_window_layers", "layer_types"})
FAMILY_KEYS = {
    "qwen2": _QWEN_SLIDING_KEYS,
    "qwen3": _QWEN_SLIDING_KEYS,
    "gemma3_text": frozenset({
        "sliding_window", "sliding_window_pattern", "_sliding_window_pattern", "layer_types", "query_pre_attn_scalar",
    }),
}
# fmt: on
NEUTRAL_VALUES: tuple[Any, ...] = (None, False, 0, 1.0, "", [], {})
NEUTRAL_ROPE_VALUES = {"partial_rotary_factor": (None, 1.0), "mrope_section": (None,)}


def read_config(folder: str | pathlib.Path) -> ModelConfig:
    """The architecture of a Hugging Face folder, with `dtype` and `param_dtype` those of its weights, and remat "none".

    EOS ids are those of generation_config.json (first) and config.json together. Raises ValueError, naming the file and
    the key, for an architecture or an option that is not supported.
    """
    folder = pathlib.Path(folder)
    path = folder / "config.json"
    raw = read_json(path)
    generation_path = folder / "generation_config.json"
    generation = read_json(generation_path) if generation_path.exists() else {}
    try:
        return parse_config(raw, generation)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def read_json(path: pathlib.Path) -> dict[str, Any]:
    """The object in a JSON file; ValueError naming the file if there is none."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path} must exist in a Hugging Face model folder, but it does not; check the path") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} must be valid JSON: {error}; fetch it again") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} must hold a JSON object, got {type(value).__name__}")
    return value


def config_json(config: ModelConfig, dtype: str) -> dict[str, Any]:
    """The content of config.json for `config`, in the older form, which every transformers since 4.50 and vLLM read."""
    raw: dict[str, Any] = {
        "architectures": [ARCHITECTURES[config.family]],
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
    activation = ACTIVATION_HF_NAMES[config.activation]
    if config.family == "gemma3_text":
        raw |= {
            "hidden_activation": activation,
            "attention_bias": config.attention_bias,
            "query_pre_attn_scalar": _whole(config.query_pre_attn_scalar),
            "rope_local_base_freq": config.rope_local_theta,
            "sliding_window": config.sliding_window,
            "layer_types": list(config.layer_types),
        }
        pattern = _sliding_window_pattern(config.layer_types)
        return raw if pattern is None else raw | {"sliding_window_pattern": pattern}
    raw["hidden_act"] = activation
    if config.family == "llama":
        raw |= {"attention_bias": config.attention_bias, "mlp_bias": config.mlp_bias}
    else:
        raw |= {"use_sliding_window": False, "sliding_window": None}
    if config.family == "qwen3":
        raw["attention_bias"] = config.attention_bias
    return raw


def generation_json(config: ModelConfig) -> dict[str, Any]:
    """The content of generation_config.json: the special tokens only, no sampling defaults."""
    return {"_from_model_config": True, **_token_ids_json(config)}


def parse_config(raw: Mapping[str, Any], generation: Mapping[str, Any]) -> ModelConfig:
    """The same from the contents of config.json and generation_config.json ({} without one)."""
    family = _family(raw)
    values = {**FAMILY_DEFAULTS[family], **{key: value for key, value in raw.items() if value is not None}}
    _refuse_unsupported(raw, family)
    num_heads = required(values, "num_attention_heads", int)
    num_layers = required(values, "num_hidden_layers", int)
    hidden_size = required(values, "hidden_size", int)
    num_kv_heads = num_heads if family == "llama" and "num_key_value_heads" not in values else None
    head_dim = values.get("head_dim")
    if head_dim is None:
        head_dim = hidden_size // max(num_heads, 1)
    rope_theta, rope_scaling, rope_local_theta = _rope(raw, values, family)
    dtype = _dtype(raw)
    gemma = family == "gemma3_text"
    return ModelConfig(
        family=family,
        vocab_size=required(values, "vocab_size", int),
        hidden_size=hidden_size,
        intermediate_size=required(values, "intermediate_size", int),
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=required(values, "num_key_value_heads", int) if num_kv_heads is None else num_kv_heads,
        head_dim=head_dim,
        max_position_embeddings=required(values, "max_position_embeddings", int),
        norm_eps=float(values["rms_norm_eps"]),
        tie_word_embeddings=bool(values["tie_word_embeddings"]),
        rope_theta=rope_theta,
        rope_scaling=rope_scaling,
        rope_local_theta=rope_local_theta,
        activation=_activation(values["hidden_activation" if gemma else "hidden_act"]),
        attention_bias=bool(values["attention_bias"]),
        mlp_bias=bool(values["mlp_bias"]),
        sliding_window=values["sliding_window"] if gemma else None,
        layer_types=_layer_types(raw, values, family, num_layers),
        query_pre_attn_scalar=float(values["query_pre_attn_scalar"] if gemma else head_dim),
        initializer_range=float(values["initializer_range"]),
        eos_token_ids=_eos_token_ids(generation, raw),
        bos_token_id=raw.get("bos_token_id"),
        pad_token_id=raw.get("pad_token_id", generation.get("pad_token_id")),
        dtype=dtype,
        param_dtype=dtype,
        remat="none",
        quantization=_quantization(raw.get("quantization_config")),
    )


def quantization_json(quantization: Quantization) -> dict[str, Any]:
    """The value of quantization_config in the config.json of a folder that `grpo quantize` writes."""
    return {"quant_method": QUANT_METHOD, **dataclasses.asdict(quantization)}


def quantization_in(folder: pathlib.Path) -> Quantization | None:
    """How the weights in a folder are quantised, as its config.json says; None: they are plain, or there is none."""
    path = folder / "config.json"
    return _quantization(read_json(path).get("quantization_config")) if path.is_file() else None


def _quantization(raw: Any) -> Quantization | None:
    if not raw:
        return None
    method = raw.get("quant_method")
    if method != QUANT_METHOD:
        raise ValueError(
            f"quantization_config must be of quant_method {QUANT_METHOD!r}, got {method!r}, which is not supported; "
            "take the model's plain weights and grpo quantize"
        )
    try:
        return Quantization(raw["dtype"], raw["group_size"], tuple(raw["patterns"]), raw["head"])
    except KeyError as error:
        raise ValueError(f"quantization_config must have {error}, got {raw!r}; quantise the model again") from None


def _family(raw: Mapping[str, Any]) -> str:
    family = raw.get("model_type")
    if family not in ARCHITECTURES:
        raise ValueError(
            f"model_type must be one of {', '.join(ARCHITECTURES)}, got {family!r}, which is not supported"
        )
    architectures = raw.get("architectures") or [ARCHITECTURES[family]]
    if architectures != [ARCHITECTURES[family]]:
        raise ValueError(f"architectures must be [{ARCHITECTURES[family]!r}] for {family}, got {architectures!r}")
    return family


def _refuse_unsupported(raw: Mapping[str, Any], family: str) -> None:
    """Refuses every key that is neither read, nor known to be harmless, nor at a value that switches nothing on."""
    known = READ_KEYS | HARMLESS_KEYS | FAMILY_KEYS.get(family, frozenset())
    for key, value in raw.items():
        if key not in known and not any(
            type(value) is type(neutral) and value == neutral for neutral in NEUTRAL_VALUES
        ):
            raise ValueError(
                f"option {key} = {value!r} is not supported for {family}; remove it from the file only if it does not "
                "change what the model computes"
            )
    if raw.get("attention_dropout"):
        raise ValueError(f"attention_dropout must be 0, got {raw['attention_dropout']!r}: dropout is not supported")
    if raw.get("use_sliding_window"):
        raise ValueError(f"use_sliding_window = {raw['use_sliding_window']!r} is not supported for {family}")
    if family == "qwen2" and raw.get("attention_bias") is False:
        raise ValueError("attention_bias = False is not supported for qwen2, whose q, k and v always have a bias")
    if family != "llama" and raw.get("mlp_bias"):
        raise ValueError(f"mlp_bias = {raw['mlp_bias']!r} is not supported for {family}")


def required(values: Mapping[str, Any], key: str, kind: type) -> Any:
    """The value of a key that a config.json must have; ValueError where it lacks it or holds another kind."""
    value = values.get(key)
    if not isinstance(value, kind) or isinstance(value, bool):
        raise ValueError(f"{key} must be given as {kind.__name__}, got {value!r}")
    return value


def _activation(name: Any) -> str:
    if name not in ACTIVATION_NAMES:
        raise ValueError(
            f"activation must be one of {', '.join(ACTIVATION_NAMES)}, got {name!r}, which is not supported"
        )
    return ACTIVATION_NAMES[name]


def _dtype(raw: Mapping[str, Any]) -> str:
    name = raw.get("dtype") or raw.get("torch_dtype") or "float32"
    if name not in DTYPES:
        raise ValueError(
            f"dtype (or torch_dtype) must be one of {', '.join(DTYPES)}, got {name!r}, which is not supported"
        )
    return name


def _layer_types(raw: Mapping[str, Any], values: Mapping[str, Any], family: str, num_layers: int) -> tuple[str, ...]:
    if raw.get("layer_types") is not None:
        layer_types = tuple(raw["layer_types"])
        if family != "gemma3_text" and SLIDING_ATTENTION in layer_types:
            raise ValueError(f"layer_types with {SLIDING_ATTENTION!r} is not supported for {family}")
        return layer_types
    if family == "gemma3_text":
        # transformers 5 writes the pattern back under a private name.
        pattern = values.get("_sliding_window_pattern", values["sliding_window_pattern"])
        return alternating_layer_types(num_layers, pattern)
    return (FULL_ATTENTION,) * num_layers


def _rope(raw: Mapping[str, Any], values: Mapping[str, Any], family: str) -> tuple[float, RopeScaling, float]:
    """Theta, scaling, and the theta of sliding layers; newer files have rope_parameters, older ones rope_scaling."""
    newer, older = raw.get("rope_parameters") or {}, raw.get("rope_scaling") or {}
    local_theta = float(values.get("rope_local_base_freq", 10_000.0))
    if FULL_ATTENTION in newer or SLIDING_ATTENTION in newer:
        if family != "gemma3_text":
            raise ValueError(f"rope_parameters by layer type are not supported for {family}, got {newer!r}")
        local = newer.get(SLIDING_ATTENTION) or {}
        if _rope_scaling(local, values).kind != "none":
            raise ValueError(f"rope_parameters of {SLIDING_ATTENTION} must be of type 'default', got {local!r}")
        local_theta = float(local.get("rope_theta", local_theta))
        newer = newer.get(FULL_ATTENTION) or {}
    readings = {
        (float(parameters.get("rope_theta", values["rope_theta"])), _rope_scaling(parameters, values))
        for parameters in ([newer, older] if newer and older else [newer or older])
    }
    if len(readings) > 1:
        raise ValueError(f"rope_parameters and rope_scaling must agree, got {newer!r} and {older!r}; remove one")
    theta, scaling = readings.pop()
    return theta, scaling, local_theta


def _rope_scaling(parameters: Mapping[str, Any], values: Mapping[str, Any]) -> RopeScaling:
    kind = parameters.get("rope_type") or parameters.get("type") or "default"
    fields = {"default": (), "linear": ("factor",), "llama3": ("factor", "low_freq_factor", "high_freq_factor")}
    if kind not in fields:
        raise ValueError(f"rope type must be one of {', '.join(fields)}, got {kind!r}, which is not supported")
    extra = ("original_max_position_embeddings",) if kind == "llama3" else ()
    for key, value in parameters.items():
        known = key in ("rope_type", "type", "rope_theta", *fields[kind], *extra)
        if not known and value not in NEUTRAL_ROPE_VALUES.get(key, (None,)):
            raise ValueError(f"rope option {key} = {value!r} is not supported with rope type {kind!r}")
    if kind == "default":
        return RopeScaling()
    for key in fields[kind]:
        if not isinstance(parameters.get(key), int | float):
            raise ValueError(f"rope option {key} must be a number with rope type {kind!r}, got {parameters.get(key)!r}")
    scaling: dict[str, Any] = {key: float(parameters[key]) for key in fields[kind]}
    if kind == "llama3":
        original = values.get("original_max_position_embeddings") or parameters.get("original_max_position_embeddings")
        scaling["original_max_position_embeddings"] = original or values["max_position_embeddings"]
    return RopeScaling(kind=kind, **scaling)


def _eos_token_ids(*sources: Mapping[str, Any]) -> tuple[int, ...]:
    ids: list[int] = []
    for source in sources:
        value = source.get("eos_token_id")
        ids += [value] if isinstance(value, int) else value or []
    return tuple(dict.fromkeys(ids))


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
    """An int where the value is one: transformers 5 checks the type."""
    return int(value) if value == int(value) else value


def _token_ids_json(config: ModelConfig) -> dict[str, Any]:
    eos = config.eos_token_ids
    return {
        "bos_token_id": config.bos_token_id,
        "eos_token_id": None if not eos else eos[0] if len(eos) == 1 else list(eos),
        "pad_token_id": config.pad_token_id,
    }


def _sliding_window_pattern(layer_types: tuple[str, ...]) -> int | None:
    """The period p with every p-th layer global, if the layers are so arranged."""
    for pattern in range(1, len(layer_types) + 2):
        if alternating_layer_types(len(layer_types), pattern) == layer_types:
            return pattern
    return None
