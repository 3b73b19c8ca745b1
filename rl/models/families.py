"""The families of decoders that the twins compute: one row of features each.

The twins, `rl.models.ops` and the readers and writers of files ask for a feature, never for the name of a family. A new
family that combines features which are there is one row of `FAMILIES`; a feature that is not needs a field here and
the place that computes it. Imports no jax.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class MaxTextLayout:
    """Where MaxText's arrays of a family differ from those of Hugging Face, beyond what the features below say.

    Attributes:
      divides_queries: query kernels are stored divided by sqrt(head_dim).
      has_two_ropes: the dims of a head that rotate together may be neighbours, or half a head apart.
      scanned_block: layers that a scanned checkpoint takes as one.
    """

    divides_queries: bool = False
    has_two_ropes: bool = False
    scanned_block: int = 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family:
    """What one family of decoders computes, and how its files are written.

    Attributes:
      norm_offset: added to the scale of every norm: 0, or 1 where the weights are the distance from 1. With 1 the
        product is rounded once, after it; with 0 before it as well.
      scales_embedding: rows of the embedding table are multiplied by sqrt(hidden_size).
      post_norms: what attention and MLP give is normalised too, before it is added: four norms in a layer, not two.
      qk_norm: queries and keys are normalised per head before they are rotated.
      always_attention_bias: q, k and v always have a bias; else it is a choice of the model.
      output_bias: where q, k and v have a bias, o has one.
      may_have_mlp_bias: whether the MLP's matrices have one is a choice of the model; else they never have.
      rotary_share: of each head's dims, from the first on, that are rotated.
      window_pattern: of so many layers the last attends to everything and the others to a window, where a model says
        nothing else; None: no layer has a window.
      has_query_scale: the scale of the scores is a choice of the model; else it is head_dim ** -0.5.
      activation, rope_theta: of a model that says nothing else.

      architecture: the name in config.json. `model_type` is the key of the row.
      config_keys: keys of config.json that are written, besides those of every family; "hidden_activation" stands
        for "hidden_act" where it is among them.
      known_keys: keys of config.json that are read, or that are accepted at the values which switch nothing on.
      config_defaults: what a config.json that leaves a key out means by it, as transformers' class of the family does.
      kv_heads_default: num_key_value_heads may be left out, and is then num_attention_heads.
      maxtext: None: MaxText's checkpoints of this family are not read.
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
        config_keys=("attention_bias", "mlp_bias"),
        kv_heads_default=True,
        maxtext=MaxTextLayout(divides_queries=True, has_two_ropes=True),
    ),
    "qwen2": Family(
        always_attention_bias=True,
        output_bias=False,
        architecture="Qwen2ForCausalLM",
        config_keys=("use_sliding_window", "sliding_window"),
        known_keys=_QWEN_SLIDING_KEYS,
        maxtext=MaxTextLayout(),
    ),
    "qwen3": Family(
        qk_norm=True,
        architecture="Qwen3ForCausalLM",
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
    """The names of the families in whose row this field is set, for messages; "no family" where there is none."""
    return ", ".join(name for name, row in FAMILIES.items() if getattr(row, feature)) or "no family"
