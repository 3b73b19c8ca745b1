"""The families of decoders that the twins compute: one entry of features each.

The twins, `rl.models.ops` and the readers and writers of files ask for a feature, never for the name of a family. A new
family that combines existing features is one entry of `FAMILIES`. A new feature needs a field here and the code that
computes it. Imports no jax.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple


@dataclasses.dataclass(frozen=True, kw_only=True)
class MaxTextLayout:
    """How MaxText's arrays of a family differ from Hugging Face's, beyond the features below.

    Attributes:
      divides_queries: query kernels are stored divided by sqrt(head_dim).
      has_two_ropes: the two dims of a head that rotate together may be neighbours, or half a head apart.
      scanned_block: the number of layers that a scanned checkpoint stacks as one.
    """

    divides_queries: bool = False
    has_two_ropes: bool = False
    scanned_block: int = 1


class BlockNorms(NamedTuple):
    """The names of the norms of a layer, in files and in the parameter tree; None: there is none at this place."""

    before_attention: str | None
    after_attention: str | None
    before_mlp: str | None
    after_mlp: str | None


PRE_NORMS = BlockNorms("input_layernorm", None, "post_attention_layernorm", None)
FOUR_NORMS = BlockNorms(
    "input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm"
)
POST_NORMS = BlockNorms(None, "post_attention_layernorm", None, "post_feedforward_layernorm")
GLM_NORMS = BlockNorms("input_layernorm", "post_self_attn_layernorm", "post_attention_layernorm", "post_mlp_layernorm")

# How rotary positions of layers with a window differ from those of the others.
OWN_ROPE, SAME_ROPE, UNSCALED_ROPE = "own theta", "the same", "the same theta, unscaled"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family:
    """The features of one family of decoders, and how its files are written.

    Attributes:
      norm_offset: added to the scale of every norm: 0, or 1 where the weights are the distance from 1. With 1 the norm
        is rounded once, after the product; with 0 also before it, unless `rounds_norm_once`.
      scales_embedding: rows of the embedding table are multiplied by sqrt(hidden_size).
      norms: the norms of a layer. Those after attention and MLP work on what is added to the residual stream.
      qk_norm: queries and keys are normalised before they are rotated: in each head, or with `qk_norm_of_all` over all
        heads together.
      value_norm: values are normalised in each head, without a scale.
      always_attention_bias: q, k and v always have a bias; otherwise the model chooses, if `may_have_attention_bias`.
      output_bias: where q, k and v have a bias, o has one.
      may_have_mlp_bias: the model chooses whether the MLP's matrices have a bias; otherwise they have none.
      rotary_share: the share of each head's dims, the first ones, that are rotated; the default where
        `chooses_rotary_share`.
      interleaved_rotary: neighbours (2 i, 2 i + 1) rotate together; otherwise dims that are half a head apart.
      window_pattern: the default period of layers: the last of each period has full attention, the others a window;
        None: no layer has a window.
      window_everywhere: every layer has a window, where the model has one.
      windows_without_rotary: the model chooses whether layers without rotary positions have a window.
      local_rope: the rotary positions of layers with a window: with a theta of their own, the same as other layers, or
        with the same theta, unscaled.
      no_rotary_interval: the default period of layers whose last has no rotary positions; None: all layers have them.
      full_layers_without_rotary: where layers have a window, the others have no rotary positions.
      may_lack_rotary: the model chooses whether any layer has rotary positions.
      has_query_scale: the model chooses the scale of the scores by query_pre_attn_scalar; otherwise it is
        head_dim ** -0.5.
      attention_multiplier: the scale of the scores; None: as `has_query_scale` says.
      scales_query_by_position: the model may choose `RopeScaling.query_scale_beta`.
      has_multipliers: the model chooses factors of embedding, residual branches, scores and logits.
      attention_softcap, logit_softcap: the model may choose a soft cap of scores, of logits.
      layer_scalar: the output of a layer is multiplied by a number of the file, which is not trained.
      has_states: the model has layers of type "linear_attention", gated delta rules.
      state_interval: the default period of layers whose last has attention, where the others have a state.
      gated_attention: q_proj gives, head by head, a query and the gate of what attention adds.
      mixed_layers: layers may differ in head size, kv heads and MLP, share keys and values, and have own inputs.
      activation, rope_theta: the defaults.

      architecture: the name in config.json. `model_type` there is the key in `FAMILIES`.
      nested_in: (model_type, architecture) of multimodal models whose text_config is of this family.
      nested_defaults: values that a text_config leaves out.
      reward_architecture: the name for the same decoder with a head that scores a sequence; None: there is none.
      default_pad_id: the padding token where config.json leaves it out, as in transformers' class of the family.
      config_keys: keys of config.json that are written, besides those of every family. "hidden_activation" among them
        replaces "hidden_act".
      known_keys: keys of config.json that are read, or accepted at values that switch nothing on.
      config_defaults: values of keys that config.json leaves out, as in transformers' class of the family.
      kv_heads_default: num_key_value_heads may be left out, and then equals num_attention_heads.
      fused: {module of a file: the modules of a layer that it holds, one after the other}, as in transformers' class.
        Files with the separate modules are read, too.
      rope_by_type: config.json has rope_parameters for each type of layer.
      rope_of_images: rope_parameters may say how the positions of images are divided, which concerns no text.
      maxtext: the layout of MaxText's checkpoints; None: they are not read for this family.
    """

    norm_offset: float = 0.0
    rounds_norm_once: bool = False
    scales_embedding: bool = False
    norms: BlockNorms = PRE_NORMS
    qk_norm: bool = False
    qk_norm_of_all: bool = False
    value_norm: bool = False
    always_attention_bias: bool = False
    may_have_attention_bias: bool = True
    output_bias: bool = True
    may_have_mlp_bias: bool = False
    rotary_share: float = 1.0
    chooses_rotary_share: bool = False
    interleaved_rotary: bool = False
    window_pattern: int | None = None
    window_everywhere: bool = False
    windows_without_rotary: bool = False
    local_rope: str = SAME_ROPE
    no_rotary_interval: int | None = None
    full_layers_without_rotary: bool = False
    may_lack_rotary: bool = False
    has_query_scale: bool = False
    attention_multiplier: float | None = None
    scales_query_by_position: bool = False
    has_multipliers: bool = False
    attention_softcap: bool = False
    logit_softcap: bool = False
    layer_scalar: bool = False
    has_states: bool = False
    state_interval: int = 4
    gated_attention: bool = False
    mixed_layers: bool = False
    activation: str = "silu"
    rope_theta: float = 10_000.0

    architecture: str
    nested_in: tuple[tuple[str, str], ...] = ()
    nested_defaults: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    reward_architecture: str | None = None
    default_pad_id: int | None = None
    config_keys: tuple[str, ...] = ()
    known_keys: tuple[str, ...] = ()
    config_defaults: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    kv_heads_default: bool = False
    fused: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    rope_by_type: bool = False
    rope_of_images: bool = False
    maxtext: MaxTextLayout | None = None

    @property
    def has_windows(self) -> bool:
        """Whether layers of a model may have a window."""
        return self.window_pattern is not None or self.window_everywhere or self.windows_without_rotary


_QWEN_SLIDING_KEYS = ("use_sliding_window", "sliding_window", "max_window_layers", "layer_types")

_FUSED_QKV = {"self_attn.qkv_proj": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")}
_FUSED_GATE_UP = {"mlp.gate_up_proj": ("mlp.gate_proj", "mlp.up_proj")}
_MULTIPLIERS = ("embedding_multiplier", "residual_multiplier", "attention_multiplier", "logits_scaling")
_MISTRAL_SIZES = {
    "vocab_size": 32_000,
    "hidden_size": 4096,
    "intermediate_size": 14_336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "max_position_embeddings": 131_072,
}
_GEMMA4_KEYS = (
    *("global_head_dim", "num_global_key_value_heads", "attention_k_eq_v", "num_kv_shared_layers"),
    *("use_double_wide_mlp", "hidden_size_per_layer_input", "vocab_size_per_layer_input"),
)
_STATE_KEYS = (
    *("linear_num_key_heads", "linear_key_head_dim", "linear_num_value_heads", "linear_value_head_dim"),
    "linear_conv_kernel_dim",
)
_QWEN3_5_DEFAULTS = {
    "vocab_size": 248_320,
    "hidden_size": 4096,
    "intermediate_size": 12_288,
    "num_hidden_layers": 32,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "max_position_embeddings": 32_768,
    **dict(zip(_STATE_KEYS, (16, 128, 32, 128, 4), strict=True)),
}
_GEMMA4_UNUSED_KEYS = ("enable_moe_block", "num_experts", "top_k_experts", "moe_intermediate_size")

FAMILIES: dict[str, Family] = {
    "llama": Family(
        may_have_mlp_bias=True,
        architecture="LlamaForCausalLM",
        reward_architecture="LlamaForSequenceClassification",
        config_keys=("attention_bias", "mlp_bias"),
        kv_heads_default=True,
        maxtext=MaxTextLayout(divides_queries=True, has_two_ropes=True),
    ),
    "qwen2": Family(
        always_attention_bias=True,
        output_bias=False,
        architecture="Qwen2ForCausalLM",
        reward_architecture="Qwen2ForSequenceClassification",
        config_keys=("use_sliding_window", "sliding_window"),
        known_keys=_QWEN_SLIDING_KEYS,
        maxtext=MaxTextLayout(),
    ),
    "qwen3": Family(
        qk_norm=True,
        architecture="Qwen3ForCausalLM",
        reward_architecture="Qwen3ForSequenceClassification",
        config_keys=("use_sliding_window", "sliding_window", "attention_bias"),
        known_keys=_QWEN_SLIDING_KEYS,
        config_defaults={"head_dim": 128},
        maxtext=MaxTextLayout(),
    ),
    "gemma3_text": Family(
        norm_offset=1.0,
        scales_embedding=True,
        norms=FOUR_NORMS,
        qk_norm=True,
        window_pattern=6,
        local_rope=OWN_ROPE,
        has_query_scale=True,
        activation="gelu_tanh",
        rope_theta=1_000_000.0,
        architecture="Gemma3ForCausalLM",
        nested_in=(("gemma3", "Gemma3ForConditionalGeneration"),),
        nested_defaults={
            "vocab_size": 262_208,
            "hidden_size": 2304,
            "intermediate_size": 9216,
            "num_hidden_layers": 26,
            "num_attention_heads": 8,
            "num_key_value_heads": 4,
            "max_position_embeddings": 131_072,
        },
        reward_architecture="Gemma3TextForSequenceClassification",
        default_pad_id=0,
        config_keys=(
            *("hidden_activation", "attention_bias", "query_pre_attn_scalar", "rope_local_base_freq"),
            *("sliding_window", "layer_types", "sliding_window_pattern"),
        ),
        known_keys=(
            *("sliding_window", "sliding_window_pattern", "_sliding_window_pattern", "layer_types"),
            "query_pre_attn_scalar",
        ),
        config_defaults={
            "tie_word_embeddings": True,
            "rope_local_base_freq": 10_000.0,
            "head_dim": 256,
            "query_pre_attn_scalar": 256,
            "sliding_window": 4096,
            "sliding_window_pattern": 6,
        },
        maxtext=MaxTextLayout(scanned_block=6),
    ),
    "mistral": Family(
        may_have_attention_bias=False,
        window_everywhere=True,
        architecture="MistralForCausalLM",
        nested_in=(("mistral3", "Mistral3ForConditionalGeneration"),),
        nested_defaults=_MISTRAL_SIZES | {"num_key_value_heads": 8},
        config_keys=("sliding_window",),
        known_keys=("sliding_window",),
        config_defaults={"sliding_window": 4096},
    ),
    "ministral3": Family(
        may_have_attention_bias=False,
        window_everywhere=True,
        scales_query_by_position=True,
        architecture="Ministral3ForCausalLM",
        nested_in=(("mistral3", "Mistral3ForConditionalGeneration"),),
        nested_defaults=_MISTRAL_SIZES | {"vocab_size": 131_072, "num_hidden_layers": 34, "num_key_value_heads": 8},
        config_keys=("sliding_window",),
        known_keys=("sliding_window",),
        config_defaults={"head_dim": 128, "rms_norm_eps": 1e-5},
    ),
    "smollm3": Family(
        may_have_mlp_bias=True,
        windows_without_rotary=True,
        no_rotary_interval=4,
        rope_theta=2_000_000.0,
        architecture="SmolLM3ForCausalLM",
        config_keys=(
            *("attention_bias", "mlp_bias", "no_rope_layers", "use_sliding_window", "sliding_window", "layer_types"),
        ),
        known_keys=(
            *("no_rope_layers", "no_rope_layer_interval", "use_sliding_window", "sliding_window", "layer_types"),
            "max_window_layers",
        ),
        config_defaults={"tie_word_embeddings": True},
        kv_heads_default=True,
    ),
    "phi3": Family(
        may_have_attention_bias=False,
        window_everywhere=True,
        chooses_rotary_share=True,
        architecture="Phi3ForCausalLM",
        config_keys=("sliding_window", "original_max_position_embeddings", "partial_rotary_factor"),
        known_keys=("sliding_window", "resid_pdrop", "embd_pdrop"),
        config_defaults={"rms_norm_eps": 1e-5, "original_max_position_embeddings": 4096},
        kv_heads_default=True,
        fused=_FUSED_QKV | _FUSED_GATE_UP,
    ),
    "olmo2": Family(
        norms=POST_NORMS,
        rounds_norm_once=True,
        qk_norm=True,
        qk_norm_of_all=True,
        architecture="Olmo2ForCausalLM",
        config_keys=("attention_bias",),
        config_defaults={"rms_norm_eps": 1e-5},
        kv_heads_default=True,
    ),
    "olmo3": Family(
        norms=POST_NORMS,
        rounds_norm_once=True,
        qk_norm=True,
        qk_norm_of_all=True,
        window_pattern=4,
        local_rope=UNSCALED_ROPE,
        architecture="Olmo3ForCausalLM",
        config_keys=("attention_bias", "sliding_window", "layer_types"),
        known_keys=("sliding_window", "layer_types"),
        config_defaults={"rms_norm_eps": 1e-5, "sliding_window": 4096},
        kv_heads_default=True,
    ),
    "gemma2": Family(
        norm_offset=1.0,
        scales_embedding=True,
        norms=FOUR_NORMS,
        window_pattern=2,
        has_query_scale=True,
        attention_softcap=True,
        logit_softcap=True,
        activation="gelu_tanh",
        architecture="Gemma2ForCausalLM",
        default_pad_id=0,
        config_keys=(
            *("hidden_activation", "attention_bias", "query_pre_attn_scalar", "sliding_window", "layer_types"),
            *("attn_logit_softcapping", "final_logit_softcapping"),
        ),
        known_keys=(
            *("sliding_window", "layer_types", "query_pre_attn_scalar", "hidden_act"),
            *("attn_logit_softcapping", "final_logit_softcapping"),
        ),
        config_defaults={
            "tie_word_embeddings": True,
            "head_dim": 256,
            "query_pre_attn_scalar": 256,
            "sliding_window": 4096,
            "attn_logit_softcapping": 50.0,
            "final_logit_softcapping": 30.0,
        },
    ),
    "granite": Family(
        may_have_mlp_bias=True,
        has_multipliers=True,
        architecture="GraniteForCausalLM",
        config_keys=("attention_bias", "mlp_bias", *_MULTIPLIERS),
        known_keys=_MULTIPLIERS,
        kv_heads_default=True,
    ),
    "granitemoehybrid": Family(
        has_multipliers=True,
        may_lack_rotary=True,
        architecture="GraniteMoeHybridForCausalLM",
        config_keys=(
            *("attention_bias", *_MULTIPLIERS, "shared_intermediate_size", "num_local_experts", "num_experts_per_tok"),
            *("position_embedding_type", "layer_types", "mamba_n_heads", "mamba_d_head", "mamba_expand"),
        ),
        known_keys=(
            *(*_MULTIPLIERS, "shared_intermediate_size", "num_local_experts", "num_experts_per_tok"),
            *("position_embedding_type", "layer_types", "layers_block_type", "init_method"),
            *("router_aux_loss_coef", "output_router_logits", "time_step_min", "time_step_max", "time_step_limit"),
            *("mamba_n_heads", "mamba_n_groups", "mamba_d_state", "mamba_d_head", "mamba_d_conv", "mamba_expand"),
            *("mamba_chunk_size", "mamba_conv_bias", "mamba_proj_bias", "normalization_function"),
        ),
        kv_heads_default=True,
        fused={
            "shared_mlp.input_linear": ("mlp.gate_proj", "mlp.up_proj"),
            "shared_mlp.output_linear": ("mlp.down_proj",),
        },
    ),
    "glm4": Family(
        norms=GLM_NORMS,
        output_bias=False,
        rotary_share=0.5,
        chooses_rotary_share=True,
        interleaved_rotary=True,
        architecture="Glm4ForCausalLM",
        config_keys=("attention_bias", "partial_rotary_factor"),
        config_defaults={
            "attention_bias": True,
            "rms_norm_eps": 1.5625e-7,
            "head_dim": 128,
            "num_key_value_heads": 2,
        },
        fused=_FUSED_GATE_UP,
    ),
    "exaone4": Family(
        norms=POST_NORMS,
        qk_norm=True,
        may_have_attention_bias=False,
        window_pattern=4,
        full_layers_without_rotary=True,
        architecture="Exaone4ForCausalLM",
        config_keys=("sliding_window", "sliding_window_pattern", "layer_types"),
        known_keys=("sliding_window", "sliding_window_pattern", "layer_types"),
        config_defaults={"rms_norm_eps": 1e-5, "sliding_window": 4096, "sliding_window_pattern": 4},
    ),
    "gemma4_text": Family(
        rounds_norm_once=True,
        scales_embedding=True,
        norms=FOUR_NORMS,
        qk_norm=True,
        value_norm=True,
        window_pattern=6,
        local_rope=OWN_ROPE,
        attention_multiplier=1.0,
        logit_softcap=True,
        layer_scalar=True,
        mixed_layers=True,
        activation="gelu_tanh",
        rope_theta=1_000_000.0,
        architecture="Gemma4ForCausalLM",
        nested_in=(("gemma4", "Gemma4ForConditionalGeneration"),),
        nested_defaults={
            "vocab_size": 262_144,
            "hidden_size": 2304,
            "intermediate_size": 9216,
            "num_hidden_layers": 30,
            "num_attention_heads": 8,
            "max_position_embeddings": 131_072,
        },
        default_pad_id=0,
        config_keys=(
            *("hidden_activation", "attention_bias", "sliding_window", "layer_types", "final_logit_softcapping"),
            *_GEMMA4_KEYS,
        ),
        known_keys=("sliding_window", "layer_types", "final_logit_softcapping", *_GEMMA4_KEYS, *_GEMMA4_UNUSED_KEYS),
        config_defaults={
            "tie_word_embeddings": True,
            "head_dim": 256,
            "num_key_value_heads": 4,
            "sliding_window": 512,
            "hidden_size_per_layer_input": 256,
            "vocab_size_per_layer_input": 262_144,
            "global_head_dim": 512,
            "num_kv_shared_layers": 0,
            "attention_k_eq_v": False,
            "use_double_wide_mlp": False,
        },
        rope_by_type=True,
    ),
    "qwen3_5_text": Family(
        norm_offset=1.0,
        qk_norm=True,
        rotary_share=0.25,
        chooses_rotary_share=True,
        has_states=True,
        gated_attention=True,
        architecture="Qwen3_5ForCausalLM",
        nested_in=(("qwen3_5", "Qwen3_5ForConditionalGeneration"),),
        nested_defaults=_QWEN3_5_DEFAULTS,
        config_keys=("attention_bias", "layer_types", "partial_rotary_factor", *_STATE_KEYS),
        known_keys=(
            *("layer_types", "full_attention_interval", "attn_output_gate", "mamba_ssm_dtype", *_STATE_KEYS),
            *("mtp_num_hidden_layers", "mtp_use_dedicated_embeddings"),
        ),
        config_defaults={key: _QWEN3_5_DEFAULTS[key] for key in ("head_dim", "num_key_value_heads", *_STATE_KEYS)},
        fused={
            "linear_attn.in_proj_qkv": ("linear_attn.q_proj", "linear_attn.k_proj", "linear_attn.v_proj"),
            "linear_attn.in_proj_z": ("linear_attn.z_proj",),
            "linear_attn.in_proj_b": ("linear_attn.b_proj",),
            "linear_attn.in_proj_a": ("linear_attn.a_proj",),
            "linear_attn.out_proj": ("linear_attn.o_proj",),
            "linear_attn.conv1d": ("linear_attn.q_conv", "linear_attn.k_conv", "linear_attn.v_conv"),
        },
        rope_of_images=True,
    ),
}


def families_with(feature: str) -> str:
    """The names of the families with this feature, for messages; "no family" where there is none."""
    return ", ".join(name for name, features in FAMILIES.items() if getattr(features, feature)) or "no family"
