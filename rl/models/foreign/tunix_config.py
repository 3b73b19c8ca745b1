"""The class of `tunix.models` that fits a Hugging Face folder, and its configuration.

In: config.json. Out: a `ForeignConfig` for `rl.models.foreign.tunix_policy`, or a ValueError that names an option which
Tunix would ignore. Tunix is imported only when a folder is described. Weights are not read here.
"""

import dataclasses
import importlib
import pathlib
import re
import types
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from rl.files.json_file import Fields, read_object
from rl.models.config import (
    LARGEST,
    SLIDING_ATTENTION,
    ForeignConfig,
    ModelConfig,
    ParameterSpec,
    base_specs,
    flatten_specs,
)
from rl.models.files.folders import open_tensors
from rl.models.files.hf import tensor_name
from rl.models.files.hf_config import SpecialIds, parse_config, read_special_ids
from rl.models.ops import rope_frequencies
from rl.models.train_state import string_keys

DTYPES = ("float32", "bfloat16")
FIXED_NORM_EPS = 1e-6  # of Tunix's Gemma models
LARGEST_EXPERTS = 4096  # of a layer
GEMMA3_PERIOD = 6  # of Tunix's Gemma 3, whose every sixth layer is global

# {pattern of a parameter's name: (logical axes of its last dims, those of them that its product sums over)}. Earlier
# dims (stacked matrices) have no axes.
MATRICES: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    r"embedder/input_embedding$": (("vocab", "embed"), ("embed",)),
    r"lm_head/w$": (("embed", "vocab"), ("embed",)),
    r"attn/q_proj/w$": (("embed", "heads", "head_dim"), ("embed",)),
    r"attn/[kv]_proj/w$": (("embed", "kv_heads", "head_dim"), ("embed",)),
    r"attn/o_proj/w$|attn_vec_einsum/w$": (("heads", "head_dim", "embed"), ("heads", "head_dim")),
    r"attn/q_einsum/w$|attn/qkv_einsum/w$": (("heads", "embed", "head_dim"), ("embed",)),
    r"attn/kv_einsum/w$": (("kv_heads", "embed", "head_dim"), ("embed",)),
    r"mlp/(gate|up)_proj(/kernel)?$": (("embed", "mlp"), ("embed",)),
    r"mlp/down_proj(/kernel)?$": (("mlp", "embed"), ("mlp",)),
}


@dataclasses.dataclass(frozen=True, eq=False)
class TunixModel:
    """The parts of a policy over a Tunix model (`ForeignConfig.model`).

    Attributes:
      library: the module of its classes. loader: the module with create_model_from_safe_tensors.
      model_class, config: the class of the model and its configuration.
      frequencies: of the rotary embedding, where Tunix's `apply_rope` has a fixed theta and must be replaced; else
        None.
      packs_rows: False where a layer counts its window in places of the row, not in positions.
      softcap: the cap of the logits, or None.
      num_layers, num_kv_heads, head_dim: the sizes of its cache.
      folder: the folder of the checkpoint.
      tensor_names: the tensors that the folder's files must hold.
      key_changes: corrections of the loader's table (pattern of a tensor's name: its parameter).
    """

    library: Any
    loader: Any
    model_class: type
    config: Any
    frequencies: np.ndarray | None
    packs_rows: bool
    softcap: float | None
    num_layers: int
    num_kv_heads: int
    head_dim: int
    folder: pathlib.Path
    tensor_names: frozenset[str]
    key_changes: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def make(self, key: jax.Array) -> Any:
        """A new model with random weights."""
        return self.model_class(self.config, rngs=nnx.Rngs(params=key))


def describe(section: Any, folder: pathlib.Path) -> ForeignConfig:
    """The model in `folder`, computed in `section`'s (the configuration's `model`) dtypes.

    Raises:
      ValueError: Tunix does not have the architecture, or ignores an option.
    """
    path = folder / "config.json"
    raw, special_ids = read_object(path), read_special_ids(folder)
    try:
        family = Fields(raw).choice("model_type", _FAMILIES)
        shape, model = _FAMILIES[family](raw, special_ids, section)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    model = dataclasses.replace(model, folder=folder, tensor_names=frozenset(_tensor_names(family, raw, shape)))
    abstract = nnx.eval_shape(lambda: model.make(jax.random.key(0)))
    shapes = string_keys(nnx.to_pure_dict(nnx.state(abstract, nnx.Param)))
    return ForeignConfig(
        kind="tunix",
        family=f"tunix.models {model.model_class.__name__}",
        vocab_size=shape.vocab_size,
        hidden_size=shape.hidden_size,
        max_position_embeddings=shape.max_position_embeddings,
        eos_token_ids=shape.eos_token_ids,
        bos_token_id=shape.bos_token_id,
        pad_token_id=shape.pad_token_id,
        dtype=section.dtype,
        param_dtype=section.param_dtype,
        remat=section.remat,
        specs=_specs(shapes),
        model=model,
        quantization=shape.quantization,
    )


# Families


def _qwen3(raw: Mapping[str, Any], special_ids: SpecialIds, section: Any) -> tuple[ModelConfig, TunixModel]:
    shape = parse_config(raw, special_ids)
    return shape, _qwen("qwen3", "Qwen3", shape, section, _frequencies(shape), rope_theta=shape.rope_theta)


def _qwen3_moe(raw: Mapping[str, Any], special_ids: SpecialIds, section: Any) -> tuple[ModelConfig, TunixModel]:
    own = {"norm_topk_prob", "decoder_sparse_step", "mlp_only_layers", "num_experts", "num_experts_per_tok"}
    own |= {"moe_intermediate_size", "output_router_logits", "router_aux_loss_coef", "num_local_experts"}
    fields = Fields(raw)
    _require(fields.flag("norm_topk_prob", False), "norm_topk_prob", "true", False)
    step = fields.whole("decoder_sparse_step", 1, LARGEST["num_layers"], 1)
    _require(step == 1, "decoder_sparse_step", "1", step)
    _require(not raw.get("mlp_only_layers"), "mlp_only_layers", "empty", raw.get("mlp_only_layers"))
    width = fields.whole("moe_intermediate_size", 1, LARGEST["intermediate_size"])
    shape = _as_family("qwen3", raw, special_ids, own, {"intermediate_size": width})
    num_experts = _num_experts(raw)
    experts = {"num_experts": num_experts, "num_experts_per_tok": fields.whole("num_experts_per_tok", 1, num_experts)}
    frequencies = _frequencies(shape)
    return shape, _qwen("qwen3", "Qwen3", shape, section, frequencies, rope_theta=shape.rope_theta, **experts)


def _num_experts(raw: Mapping[str, Any]) -> int:
    """The number of experts; newer transformers write it under another name."""
    is_new = "num_experts" not in raw and "num_local_experts" in raw
    return Fields(raw).whole("num_local_experts" if is_new else "num_experts", 1, LARGEST_EXPERTS)


def _qwen2(raw: Mapping[str, Any], special_ids: SpecialIds, section: Any) -> tuple[ModelConfig, TunixModel]:
    shape = parse_config(raw, special_ids)
    _require(shape.rope_scaling.kind == "none", "rope scaling", "off in Tunix's Qwen2", shape.rope_scaling.kind)
    return shape, _qwen("qwen2", "Qwen2", shape, section, None, rope_theta=shape.rope_theta)


def _qwen(
    name: str, model_class: str, shape: ModelConfig, section: Any, frequencies: np.ndarray | None, **options: Any
) -> TunixModel:
    _require(shape.activation == "silu", "hidden_act", "silu", shape.activation)
    _require(name == "qwen2" or not shape.attention_bias, "attention_bias", "false", shape.attention_bias)
    return _model(
        name,
        model_class,
        shape,
        section,
        frequencies,
        {
            "vocab_size": shape.vocab_size,
            "norm_eps": shape.norm_eps,
            "use_tied_embedding": shape.tie_word_embeddings,
            "dtype": jnp.dtype(section.dtype),
            "param_dtype": jnp.dtype(section.param_dtype),
            **options,
        },
    )


def _llama(raw: Mapping[str, Any], special_ids: SpecialIds, section: Any) -> tuple[ModelConfig, TunixModel]:
    shape = parse_config(raw, special_ids)
    _require(shape.activation == "silu", "hidden_act", "silu", shape.activation)
    _require(not (shape.attention_bias or shape.mlp_bias), "attention_bias and mlp_bias", "false", True)
    _check_one_dtype(section)
    options = {
        "vocab_size": shape.vocab_size,
        "norm_eps": shape.norm_eps,
        "rope_theta": shape.rope_theta,
        "weight_tying": shape.tie_word_embeddings,
    }
    return shape, _model("llama3", "Llama3", shape, section, _frequencies(shape), options)


def _gemma(raw: Mapping[str, Any], special_ids: SpecialIds, section: Any) -> tuple[ModelConfig, TunixModel]:
    changes = {"hidden_act": raw.get("hidden_activation") or raw.get("hidden_act"), "tie_word_embeddings": True}
    own = {"hidden_activation", "use_bidirectional_attention"}
    shape = _as_family("llama", raw, special_ids, own, changes)
    options = {"final_logit_softcap": None, "use_post_attn_norm": False, "use_post_ffw_norm": False}
    model = _gemma_model(raw, shape, section, options, ("GLOBAL",) * shape.num_layers)
    # The loader knows Gemma 2's norms only. Its norm after attention is Gemma 1's norm before the MLP.
    norm = {r"model\.layers\.([0-9]+)\.post_attention_layernorm\.weight": (r"layers.\1.pre_ffw_norm.scale", None)}
    return shape, dataclasses.replace(model, key_changes=norm)


def _gemma2(raw: Mapping[str, Any], special_ids: SpecialIds, section: Any) -> tuple[ModelConfig, TunixModel]:
    own = {"attn_logit_softcapping", "final_logit_softcapping", "use_bidirectional_attention"}
    shape = _as_family("gemma3_text", raw, special_ids, own, {"sliding_window_pattern": 2})
    scalar = shape.query_pre_attn_scalar
    _require(scalar == shape.head_dim, "query_pre_attn_scalar", f"head_dim ({shape.head_dim})", scalar)
    types = ["LOCAL_SLIDING" if kind == SLIDING_ATTENTION else "GLOBAL" for kind in shape.layer_types]
    options = {
        "final_logit_softcap": _softcap(raw, "final_logit_softcapping", 30.0),
        "attn_logits_soft_cap": _softcap(raw, "attn_logit_softcapping", 50.0),
        "sliding_window_size": shape.sliding_window,
        "use_post_attn_norm": True,
        "use_post_ffw_norm": True,
    }
    return shape, _gemma_model(raw, shape, section, options, types)


def _softcap(raw: Mapping[str, Any], key: str, default: float) -> float | None:
    """A cap of logits. Null switches it off; without the key it is the default."""
    return Fields(raw).number(key, 1e-6, 1e6, None if key in raw else default)


def _gemma_model(
    raw: Mapping[str, Any], shape: ModelConfig, section: Any, options: dict[str, Any], types: Any
) -> TunixModel:
    _check_gemma(raw, shape, section)
    library = importlib.import_module("tunix.models.gemma.model")
    options["attention_types"] = tuple(library.AttentionType[name] for name in types)
    options["num_embed"] = shape.vocab_size
    model = _model("gemma", "Gemma", shape, section, _frequencies(shape), options, loader="params_safetensors")
    return dataclasses.replace(model, packs_rows="LOCAL_SLIDING" not in types, softcap=options["final_logit_softcap"])


def _gemma3(raw: Mapping[str, Any], special_ids: SpecialIds, section: Any) -> tuple[ModelConfig, TunixModel]:
    shape = parse_config(raw, special_ids)
    _check_gemma(raw, shape, section)
    expected = tuple((i + 1) % GEMMA3_PERIOD != 0 for i in range(shape.num_layers))
    is_local = tuple(kind == SLIDING_ATTENTION for kind in shape.layer_types)
    _require(is_local == expected, "layer_types", f"global in every {GEMMA3_PERIOD}th layer only", shape.layer_types)
    _require(shape.rope_scaling.kind in ("none", "linear"), "rope scaling", "linear", shape.rope_scaling.kind)
    library = importlib.import_module("tunix.models.gemma3.model")
    scales = library.QueryPreAttentionNormalisation
    known = {
        shape.head_dim: scales.BY_ONE_OVER_SQRT_HEAD_DIM,
        shape.hidden_size // shape.num_heads: scales.BY_ONE_OVER_SQRT_EMBED_DIM_DIV_NUM_HEADS,
    }
    scalar = int(shape.query_pre_attn_scalar)
    _require(scalar in known, "query_pre_attn_scalar", f"one of {sorted(known)}", scalar)
    options = {
        "num_embed": shape.vocab_size,
        "sliding_window_size": shape.sliding_window,
        "local_base_frequency": int(shape.rope_local_theta),
        "global_base_frequency": int(shape.rope_theta),
        "global_scale_factor": shape.rope_scaling.factor,
        "query_pre_attn_norm": scales.BY_ONE_OVER_SQRT_HEAD_DIM if scalar == shape.head_dim else known[scalar],
        "param_dtype": jnp.dtype(section.param_dtype),
    }
    model = _model("gemma3", "Gemma3", shape, section, None, options, loader="params_safetensors")
    return shape, dataclasses.replace(model, packs_rows=False)


_FAMILIES: dict[str, Callable[..., tuple[ModelConfig, TunixModel]]] = {
    "qwen3": _qwen3,
    "qwen3_moe": _qwen3_moe,
    "qwen2": _qwen2,
    "llama": _llama,
    "gemma": _gemma,
    "gemma2": _gemma2,
    "gemma3_text": _gemma3,
}


def _model(
    name: str,
    model_class: str,
    shape: ModelConfig,
    section: Any,
    frequencies: np.ndarray | None,
    options: Mapping[str, Any],
    loader: str = "params",
) -> TunixModel:
    _require(
        section.dtype in DTYPES and section.param_dtype in DTYPES, "model.dtype", " or ".join(DTYPES), section.dtype
    )
    library = importlib.import_module(f"tunix.models.{name}.model")
    remat = {"none": "NONE", "block": "DECODER"}
    _require(section.remat in remat, "model.remat", f"one of {', '.join(remat)} for a Tunix model", section.remat)
    return TunixModel(
        library=library,
        loader=importlib.import_module(f"tunix.models.{name}.{loader}"),
        model_class=getattr(library, model_class),
        config=library.ModelConfig(
            num_layers=shape.num_layers,
            embed_dim=shape.hidden_size,
            hidden_dim=shape.intermediate_size,
            num_heads=shape.num_heads,
            head_dim=shape.head_dim,
            num_kv_heads=shape.num_kv_heads,
            remat_config=library.RematConfig[remat[section.remat]],
            **options,
        ),
        frequencies=frequencies,
        packs_rows=True,
        softcap=None,
        num_layers=shape.num_layers,
        num_kv_heads=shape.num_kv_heads,
        head_dim=shape.head_dim,
        folder=pathlib.Path(),
        tensor_names=frozenset(),
    )


def _as_family(
    family: str, raw: Mapping[str, Any], special_ids: SpecialIds, own: set[str], changes: Mapping[str, Any]
) -> ModelConfig:
    """The configuration of an architecture without a decoder in the toolkit, read as that of `family`. The caller reads
    the keys in `own`.
    """
    rest = {key: value for key, value in raw.items() if key not in own and key != "architectures"}
    return parse_config({**rest, **changes, "model_type": family}, special_ids)


def _frequencies(shape: ModelConfig) -> np.ndarray:
    return rope_frequencies(shape.head_dim, shape.rope_theta, shape.rope_scaling)


def _check_gemma(raw: Mapping[str, Any], shape: ModelConfig, section: Any) -> None:
    _check_one_dtype(section)
    _require(shape.activation == "gelu_tanh", "hidden_activation", "gelu_pytorch_tanh", shape.activation)
    _require(shape.norm_eps == FIXED_NORM_EPS, "rms_norm_eps", f"{FIXED_NORM_EPS}", shape.norm_eps)
    fields = Fields(raw)
    _require(fields.flag("tie_word_embeddings", True), "tie_word_embeddings", "true", False)
    _require(not shape.attention_bias, "attention_bias", "false", shape.attention_bias)
    is_causal = not fields.flag("use_bidirectional_attention", False)
    _require(is_causal, "use_bidirectional_attention", "false", True)


def _check_one_dtype(section: Any) -> None:
    rule = f"model.param_dtype ({section.param_dtype}), in which this Tunix model computes,"
    _require(section.dtype == section.param_dtype, "model.dtype", rule, section.dtype)


def _require(holds: bool, key: str, rule: str, got: object) -> None:
    if not holds:
        raise ValueError(f"{key} must be {rule} for tunix.models, which ignores anything else, got {got!r}")


# Parameters and files


def _specs(shapes: Any, prefix: tuple[str, ...] = ()) -> dict[str, Any]:
    specs: dict[str, Any] = {}
    for name, child in shapes.items():
        path = (*prefix, name)
        if hasattr(child, "shape"):
            matches = (matrix for rule, matrix in MATRICES.items() if re.search(rule, "/".join(path)))
            axes, inputs = next(matches, ((), ()))
            axes = (*[None] * (len(child.shape) - len(axes)), *axes)
            specs[name] = ParameterSpec(tuple(child.shape), axes, tuple(axes.index(axis) for axis in inputs))
        else:
            specs[name] = _specs(child, path)
    return specs


def _tensor_names(family: str, raw: Mapping[str, Any], shape: ModelConfig) -> Iterator[str]:
    """Names of the tensors of a Hugging Face checkpoint."""
    for path, _ in flatten_specs(base_specs(shape)):
        name = tensor_name(path)
        if family == "qwen3_moe" and ".mlp." in name:
            expert = re.sub(r"\.mlp\.", ".mlp.experts.{}.", name)
            yield from (expert.format(i) for i in range(_num_experts(raw)))
            yield re.sub(r"\.mlp\..*", ".mlp.gate.weight", name)
        elif not (family == "gemma2" and re.search(r"\.[qk]_norm\.", name)):
            yield name


def check_files(folder: pathlib.Path, config: ForeignConfig) -> None:
    """ValueError for damaged files, and for tensors that are missing, or that Tunix would ignore."""
    expected, found = config.model.tensor_names, set()
    for file in sorted(folder.glob("*.safetensors")):
        with open_tensors(file) as tensors:
            found |= set(tensors.keys())
    missing = sorted(expected - found)
    # A tied head may be stored beside the embedding.
    extra = sorted(found - expected - {"lm_head.weight"})
    if missing or extra:
        raise ValueError(
            f"{folder}: the weights must be those of config.json, got {missing[:8]} missing, {extra[:8]} extra"
        )


def with_globals(function: Callable[..., Any], **changes: Any) -> Callable[..., Any]:
    """A copy of `function` that sees other values of some globals; `function` itself is not changed."""
    assert function.__closure__ is None
    names = {**function.__globals__, **changes}
    return types.FunctionType(function.__code__, names, function.__name__, function.__defaults__)
