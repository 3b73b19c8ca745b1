"""A family of decoders that combines existing features is one entry of `FAMILIES`: twins and files follow."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rl.config.load import load_config
from rl.models import ops
from rl.models.config import SLIDING_ATTENTION, parameter_specs
from rl.models.families import FAMILIES, FOUR_NORMS, Family
from rl.models.files import maxtext
from rl.models.files.hf import load_params, read_config, save_folder
from rl.models.flavours import create_policy
from rl.models.inputs import Inputs, plain_inputs
from rl.models.ops import RopeScaling
from rl.state.origin import find_origin, tokenizer_from_config
from tests.helpers import tunix_golden
from tests.helpers.tiny_models import VOCAB, init_cache, noisy_params, tiny_config

# Gemma 1: of Gemma 3 the norms and the embedding; two norms in a layer, none of queries and keys, no window.
GEMMA = Family(
    norm_offset=1.0,
    scales_embedding=True,
    activation="gelu_tanh",
    architecture="GemmaForCausalLM",
    config_keys=("attention_bias",),
    config_defaults={"tie_word_embeddings": True, "head_dim": 256},
)
# Something of every family, and half of each head rotated.
MIXED = Family(
    norm_offset=1.0,
    norms=FOUR_NORMS,
    qk_norm=True,
    always_attention_bias=True,
    output_bias=False,
    may_have_mlp_bias=True,
    rotary_share=0.5,
    window_pattern=2,
    activation="gelu",
    rope_theta=500.0,
    architecture="MixedForCausalLM",
    config_keys=("attention_bias", "mlp_bias", "sliding_window", "layer_types"),
    known_keys=("sliding_window", "layer_types"),
)


@pytest.fixture(autouse=True)
def rows(monkeypatch):
    monkeypatch.setitem(FAMILIES, "gemma", GEMMA)
    monkeypatch.setitem(FAMILIES, "mixed", MIXED)


def mixed_config():
    return tiny_config("mixed", layer_types=None, sliding_window=3, mlp_bias=True, tie_word_embeddings=False)


def logits_of(policy, params, tokens):
    @jax.jit
    def logits(params, tokens):
        return policy.unembed(params, policy.hidden(params, plain_inputs(tokens)))

    return logits(params, tokens)


def decoded_logits(policy, params, tokens, prefix):
    """Logits of every token after the prefix, read one by one from the cache."""
    num_rows, length = tokens.shape
    inputs, extend = plain_inputs(tokens), jax.jit(policy.extend)
    cache = init_cache(policy.config, num_rows, length)
    _, cache = extend(params, Inputs(*(x[:, :prefix] for x in inputs)), cache)
    found = []
    for i in range(prefix, length):
        hidden, cache = extend(params, Inputs(*(x[:, i : i + 1] for x in inputs)), cache)
        found.append(policy.unembed(params, hidden[:, 0]))
    return jnp.stack(found, axis=1)


@pytest.mark.parametrize("pure_nnx", [True, False])
def test_a_folder_of_gemma_gives_the_logits_of_transformers_whole_and_decoded(pure_nnx):
    folder = tunix_golden.FOLDER / "gemma"
    config = read_config(folder)
    assert (config.family, config.activation, config.rope_theta) == ("gemma", "gelu_tanh", 10_000.0)
    expected = json.loads((folder / "expected.json").read_text())
    tokens, logits = jnp.asarray(expected["token_ids"]), np.asarray(expected["logits"])
    policy, params = create_policy(config, pure_nnx), load_params(folder, config)
    np.testing.assert_allclose(logits_of(policy, params, tokens), logits, rtol=0, atol=5e-5)
    np.testing.assert_allclose(decoded_logits(policy, params, tokens, 10), logits[:, 10:], rtol=0, atol=5e-5)


def test_twins_of_a_mixture_are_the_same_program_and_decode_what_they_train():
    config, params = mixed_config(), noisy_params(mixed_config())
    assert config.layer_types == (SLIDING_ATTENTION, "full_attention")
    tokens = jax.random.randint(jax.random.key(1), (2, 9), 0, VOCAB)
    policies = [create_policy(config, pure_nnx) for pure_nnx in (True, False)]
    arguments = (params, plain_inputs(tokens))
    first, second = (jax.jit(policy.hidden).lower(*arguments).as_text() for policy in policies)
    assert first == second
    logits = logits_of(policies[0], params, tokens)
    np.testing.assert_allclose(decoded_logits(policies[1], params, tokens, 4), logits[:, 4:], rtol=0, atol=5e-5)


def test_a_share_of_each_head_is_rotated_as_a_smaller_head_is():
    config, positions = mixed_config(), jnp.arange(5)[None]
    x = jax.random.normal(jax.random.key(0), (1, 5, 4, 8))
    rotated = ops.apply_rope(x, *ops.layer_rope(config, positions, "full_attention"))
    tables = ops.rope_tables(positions, ops.rope_frequencies(4, 500.0, RopeScaling()), jnp.float32)
    np.testing.assert_array_equal(rotated[..., :4], ops.apply_rope(x[..., :4], *tables))
    np.testing.assert_array_equal(rotated[..., 4:], x[..., 4:])
    assert not np.allclose(rotated[:, 1:, :, :4], x[:, 1:, :, :4], atol=0.1)


def test_a_folder_of_a_mixture_is_written_and_read_back(tmp_path):
    config, params = mixed_config(), noisy_params(mixed_config())
    layer = parameter_specs(config)["layers_0"]
    assert {"post_feedforward_layernorm", "pre_feedforward_layernorm"} < set(layer)
    assert "bias" in layer["self_attn"]["q_proj"]
    assert "bias" not in layer["self_attn"]["o_proj"]
    save_folder(tmp_path / "out", config, params)
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (written["model_type"], written["architectures"]) == ("mixed", ["MixedForCausalLM"])
    assert (written["partial_rotary_factor"], written["sliding_window"], written["mlp_bias"]) == (0.5, 3, True)
    assert "rope_local_base_freq" not in written
    assert read_config(tmp_path / "out") == config
    jax.tree.map(np.testing.assert_array_equal, load_params(tmp_path / "out", config), params)
    for name, wrong, message in (
        ("partial_rotary_factor", 1.0, r"option partial_rotary_factor = 1\.0 is not supported for mixed"),
        ("attention_bias", False, r"attention_bias = False is not supported for mixed"),
        ("use_sliding_window", True, r"option use_sliding_window = True is not supported for mixed"),
    ):
        shutil.copytree(tmp_path / "out", tmp_path / name)
        (tmp_path / name / "config.json").write_text(json.dumps(written | {name: wrong}))
        with pytest.raises(ValueError, match=message):
            read_config(tmp_path / name)


def test_a_recipe_makes_a_fresh_model_of_a_new_family():
    config = load_config(None, ["model.arch.family=mixed", "tokenizer.source=byte"])
    made = find_origin(config, tokenizer_from_config(config)).model_config
    assert (made.family, made.activation, made.attention_bias) == ("mixed", "gelu", True)


def test_rules_of_families_name_the_new_ones():
    for family, changes, message in (
        ("mamba", {}, "family must be one of llama, qwen2, .*, gemma, mixed, got 'mamba'"),
        ("gemma", {"mlp_bias": True}, "mlp_bias must be false for gemma, got true; only llama, .*mixed has it"),
        ("mixed", {"attention_bias": False}, "attention_bias must be true for mixed"),
        ("mixed", {"head_dim": 6}, r"head_dim must let mixed rotate an even number of dims, 0\.5 of them, got 6"),
    ):
        with pytest.raises(ValueError, match=message):
            tiny_config(family, **changes)
    with pytest.raises(ValueError, match=r"read for llama, qwen2, qwen3, gemma3_text only, got family mixed; convert"):
        maxtext.read_params(mixed_config(), {}, lambda path: np.zeros(1))
