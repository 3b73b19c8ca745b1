"""The table of families in docs/models.md: `python -m rl.models.family_page` prints it, and a test compares the two.

In: `rl.models.families.FAMILIES`. Out: a table in Markdown: what each family has beyond a plain decoder, and what does
not work for it. Imports no jax.
"""

from rl.models.families import FAMILIES, FOUR_NORMS, GLM_NORMS, OWN_ROPE, POST_NORMS, UNSCALED_ROPE, Family

_MODELS = {
    "llama": "Llama 2 to 3.3, SmolLM2, Yi",
    "qwen2": "Qwen2, Qwen2.5",
    "qwen3": "Qwen3",
    "gemma3_text": "Gemma 3",
    "mistral": "Mistral 7B, Nemo, Small 3",
    "ministral3": "Ministral 3",
    "smollm3": "SmolLM3",
    "phi3": "Phi-3, Phi-3.5, Phi-4, Phi-4-mini",
    "olmo2": "OLMo 2",
    "olmo3": "OLMo 3",
    "gemma2": "Gemma 2",
    "granite": "Granite 3",
    "granitemoehybrid": "Granite 4 dense, attention layers only",
    "glm4": "GLM-4-0414",
    "exaone4": "EXAONE 4",
    "gemma4_text": "Gemma 4 E2B, E4B, 31B",
    "qwen3_5_text": "Qwen3.5 dense, 0.8B to 27B",
}


def _features(family: Family) -> list[str]:
    """What the family has beyond a plain decoder."""
    window = f"a window in all but every {family.window_pattern}. layer"
    local = {OWN_ROPE: "with a theta of its own", UNSCALED_ROPE: "there without scaled positions"}
    norms = {FOUR_NORMS: "four norms", GLM_NORMS: "four norms", POST_NORMS: "norms after attention and MLP only"}
    found = {
        norms.get(family.norms, ""): family.norms in norms,
        "norms around 1": bool(family.norm_offset),
        "queries and keys normed in each head": family.qk_norm and not family.qk_norm_of_all,
        "queries and keys normed over all heads": family.qk_norm_of_all,
        "values normed": family.value_norm,
        "biases of q, k, v": family.always_attention_bias,
        "a window in every layer, where there is one": family.window_everywhere,
        ", ".join(filter(None, (window, local.get(family.local_rope)))): family.window_pattern is not None,
        f"no rotary positions in every {family.no_rotary_interval}. layer": family.no_rotary_interval is not None,
        "no rotary positions in layers without a window": family.full_layers_without_rotary,
        "no rotary positions at all, where it says so": family.may_lack_rotary,
        "part of each head rotated": family.chooses_rotary_share,
        "neighbours rotated together": family.interleaved_rotary,
        "queries scaled by position": family.scales_query_by_position,
        "scores scaled by a number of its own": family.has_query_scale or family.attention_multiplier is not None,
        "soft cap of scores": family.attention_softcap,
        "soft cap of logits": family.logit_softcap,
        "four multipliers": family.has_multipliers,
        "own head size and kv heads of full layers, keys as values": family.mixed_layers,
        "inputs of each layer, shared keys and values, double-wide MLP": family.mixed_layers,
        f"a gated delta rule in all but every {family.state_interval}. layer": family.has_states,
        "attention gated": family.gated_attention,
        "fused matrices in files": bool(family.fused),
    }
    return [text for text, is_there in found.items() if is_there and text]


def _missing(family: Family) -> list[str]:
    """What does not work for the family."""
    found = {
        "`model.attention: cudnn`": family.attention_softcap,
        "adapter files (export merges)": bool(family.fused),
        "`quantize --text` of E2B, E4B": family.mixed_layers,
        "MaxText": family.maxtext is None,
        "reward models": family.reward_architecture is None,
    }
    return [text for text, is_missing in found.items() if is_missing]


def table() -> str:
    """The table, one line a family."""
    lines = ["| `model_type` | models | beyond a plain decoder | not there |", "|---|---|---|---|"]
    for name, family in FAMILIES.items():
        nested = [f"`{model_type}` with a text_config" for model_type, _ in family.nested_in]
        cells = [
            ", ".join([f"`{name}`", *nested]),
            _MODELS[name],
            "; ".join(_features(family)) or "-",
            ", ".join(_missing(family)) or "-",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(table(), end="")
