"""The families of decoders that the twins compute: one entry of features each.

The twins, `rl.models.ops` and the readers and writers of files ask for a feature, never for the name of a family. A new
family that combines existing features is one entry of `FAMILIES`. A new feature needs a field here and the code that
computes it. Imports no jax.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any


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


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family:
    """The features of one family of decoders, and how its files are written.

    Attributes:
      norm_offset: added to the scale of every norm: 0, or 1 where the weights are the distance from 1. With 1 the norm
        is rounded once, after the product; with 0 also before it.
      scales_embedding: rows of the embedding table are multiplied by sqrt(hidden_size).
      post_norms: the outputs of attention and MLP are normalised before they are added: four norms in a layer, not two.
      qk_norm: queries and keys are normalised in each head before they are rotated.
      always_attention_bias: q, k and v always have a bias; otherwise the model chooses.
      output_bias: where q, k and v have a bias, o has one.
      may_have_mlp_bias: the model chooses whether the MLP's matrices have a bias; otherwise they have none.
      rotary_share: the share of each head's dims, the first ones, that are rotated.
      window_pattern: the default period of layers: the last of each period has full attention, the others a window;
        None: no layer has a window.
      has_query_scale: the model chooses the scale of the scores; otherwise it is head_dim ** -0.5.
      activation, rope_theta: the defaults.

      architecture: the name in config.json. `model_type` there is the key in `FAMILIES`.
      reward_architecture: the name for the same decoder with a head that scores a sequence; None: there is none.
      default_pad_id: the padding token where config.json leaves it out, as in transformers' class of the family.
      config_keys: keys of config.json that are written, besides those of every family. "hidden_activation" among them
        replaces "hidden_act".
      known_keys: keys of config.json that are read, or accepted at values that switch nothing on.
      config_defaults: values of keys that config.json leaves out, as in transformers' class of the family.
      kv_heads_default: num_key_value_heads may be left out, and then equals num_attention_heads.
      maxtext: the layout of MaxText's checkpoints; None: they are not read for this family.
    """

    norm_offset: float = 0.0
    scales_embedding: bool = False
    post_norms: bool = False
    qk_norm: bool = False
    always_attention_bias: bool = False
    output_bias: bool = True
    may_have_mlp_bias: bool = False
    rotary_share: float = 1.0
    window_pattern: int | None = None
    has_query_scale: bool = False
    activation: str = "silu"
    rope_theta: float = 10_000.0

    architecture: str
    reward_architecture: str | None = None
    default_pad_id: int | None = None
    config_keys: tuple[str, ...] = ()
    known_keys: tuple[str, ...] = ()
    config_defaults: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    kv_heads_default: bool = False
    maxtext: MaxTextLayout | None = None


_QWEN_SLIDING_KEYS = ("use_sliding_window", "sliding_window", "max_window_layers", "layer_types")

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
        post_norms=True,
        qk_norm=True,
        window_pattern=6,
        has_query_scale=True,
        activation="gelu_tanh",
        rope_theta=1_000_000.0,
        architecture="Gemma3ForCausalLM",
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
}


def families_with(feature: str) -> str:
    """The names of the families with this feature, for messages; "no family" where there is none."""
    return ", ".join(name for name, features in FAMILIES.items() if getattr(features, feature)) or "no family"
