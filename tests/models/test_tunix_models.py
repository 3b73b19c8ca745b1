"""Models of tunix.models as policies: equal to the toolkit's own decoder, their known defects corrected, whole runs."""

import json
import pathlib
import shutil

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx

from rl.config.load import load_config
from rl.data.tokenizer import load_tokenizer
from rl.grpo_trainer import train
from rl.models.files.hf import load_params, read_config, save_folder
from rl.models.flavours import NNXPolicy, create_policy, foreign_config
from rl.models.foreign.files import check_policy, load_weights
from rl.models.foreign.tunix_files import write_weights
from rl.models.foreign.tunix_policy import TunixPolicy
from rl.models.inputs import Inputs, plain_inputs
from rl.run.metrics import read_metrics, read_samples
from rl.state.export import write_folder
from rl.state.origin import find_origin, tokenizer_from_config
from tests.helpers import tunix_golden
from tests.helpers.places import FILES, REWARDS
from tests.helpers.tiny_models import noisy_params, tiny_config

pytestmark = [pytest.mark.filterwarnings(warning) for warning in tunix_golden.IGNORED_WARNINGS]
GOLDEN = FILES / "models"
FAMILIES = ["qwen3", "qwen2", "llama_tied", "llama3_scaled_rope", "gemma3_text"]


def describe(folder, *overrides):
    config = load_config(None, [f"model.source=tunix:{folder}", *overrides])
    return foreign_config(config, pathlib.Path(folder))


def tunix_policy(folder, *overrides):
    config = describe(folder, *overrides)
    policy = TunixPolicy(config)
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    shardings = jax.tree.map(lambda _: place, jax.eval_shape(lambda: policy.init(jax.random.key(0))))
    return policy, load_weights(pathlib.Path(folder), config, shardings)


def assert_exported_files_are_the_loaded_ones(policy, params, folder, out):
    """Weights through Tunix's loader and back are the very tensors of the checkpoint."""
    out.mkdir()
    write_weights(out, policy.config, params)
    for file in folder.glob("*.safetensors"):
        stored, written = (safetensors.numpy.load_file(side / file.name) for side in (folder, out))
        assert stored.keys() == written.keys()
        for name, value in stored.items():
            np.testing.assert_array_equal(written[name], value, err_msg=name)


def logits_of(policy, params, tokens_BT, positions_BT=None, groups_BT=None, branches_BT=None):
    plain, given = plain_inputs(tokens_BT), (tokens_BT, positions_BT, groups_BT, branches_BT)
    inputs = Inputs(*(jnp.asarray(x if y is None else y) for x, y in zip(plain, given, strict=True)))
    return jax.jit(lambda p: policy.unembed(p, policy.hidden(p, inputs)))(params)


def own_policy(folder):
    config = read_config(folder)
    return NNXPolicy(config), load_params(folder, config)


@pytest.mark.parametrize("name", FAMILIES)
def test_logits_are_those_of_the_own_decoder(tmp_path, name):
    policy, params = tunix_policy(GOLDEN / name)
    own, own_params = own_policy(GOLDEN / name)
    tokens_BT, labels = jax.random.randint(jax.random.key(1), (2, 40), 0, 101), ()
    if policy.packs_rows:  # in the second row a prompt of 5 tokens with two completions, then another prompt
        positions = [[*range(40)], [0, 1, 2, 3, 4, 5, 6, 7, 5, 6, *range(30)]]
        groups, branches = [[0] * 40, [0] * 10 + [1] * 30], [[0] * 40, [0] * 5 + [1] * 3 + [2] * 2 + [0] * 30]
        labels = (positions, groups, branches)
    expected = logits_of(own, own_params, tokens_BT, *labels)
    np.testing.assert_allclose(logits_of(policy, params, tokens_BT, *labels), expected, atol=3e-4)
    assert_exported_files_are_the_loaded_ones(policy, params, GOLDEN / name, tmp_path / "out")
    check_policy(policy, params, name)  # decoding with Tunix's cache, and packed rows where it can have them
    assert policy.packs_rows == (name != "gemma3_text")


@pytest.mark.parametrize("name", ["qwen3", "llama3_scaled_rope"])
def test_tunix_alone_rotates_with_a_fixed_theta(name):
    """The defect that is corrected: when this fails, Tunix reads the theta of its configuration."""
    policy, params = tunix_policy(GOLDEN / name)
    description = policy.config.model
    stock = nnx.graphdef(nnx.eval_shape(lambda: description.make(jax.random.key(0))))
    template = nnx.to_pure_dict(nnx.state(policy.model(params), nnx.Param))
    tokens_BT = jax.random.randint(jax.random.key(1), (2, 12), 0, 101)
    positions_BT = jnp.broadcast_to(jnp.arange(12), (2, 12))
    causal_BTT = jnp.broadcast_to(jnp.tri(12, dtype=bool), (2, 12, 12))
    wrong = nnx.merge(stock, template)(tokens_BT, positions_BT, None, causal_BTT)[0]
    assert jnp.max(jnp.abs(wrong - logits_of(policy, params, tokens_BT))) > 0.1


def test_a_file_of_mixed_dtypes_is_read_as_what_it_holds(tmp_path):
    folder = tmp_path / "mixed"
    shutil.copytree(GOLDEN / "qwen3", folder)
    tensors = safetensors.numpy.load_file(folder / "model.safetensors")
    mixed = {k: v.astype(ml_dtypes.bfloat16) if v.ndim > 1 else v for k, v in tensors.items()}
    safetensors.numpy.save_file(mixed, folder / "model.safetensors")
    policy, params = tunix_policy(folder)
    own, own_params = own_policy(folder)
    tokens_BT = jax.random.randint(jax.random.key(1), (1, 12), 0, 101)
    np.testing.assert_allclose(logits_of(policy, params, tokens_BT), logits_of(own, own_params, tokens_BT), atol=3e-4)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_an_export_has_the_dtype_that_is_asked_for_and_is_read_again(tmp_path, dtype):
    policy, params = tunix_policy(GOLDEN / "llama_tied")
    write_folder(tmp_path / "out", policy.config, params, load_tokenizer("byte"), dtype)
    stored = safetensors.numpy.load_file(tmp_path / "out" / "model.safetensors")
    for name, value in safetensors.numpy.load_file(GOLDEN / "llama_tied" / "model.safetensors").items():
        np.testing.assert_array_equal(stored[name], value.astype(dtype), err_msg=name, strict=True)
    raw = json.loads((tmp_path / "out" / "config.json").read_text())
    assert {raw[key] for key in ("dtype", "torch_dtype") if key in raw} == {dtype}
    assert (tmp_path / "out" / "tokenizer.json").is_file()
    again = tunix_policy(tmp_path / "out")[1]
    jax.tree.map(
        lambda old, new: np.testing.assert_array_equal(old.astype(dtype).astype("float32"), new), params, again
    )


def edited(tmp_path, name, **changes):
    folder = tmp_path / name
    shutil.copytree(GOLDEN / name, folder)
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**raw, **changes}))
    return folder


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("gemma3_text", {"rms_norm_eps": 1e-5}, "rms_norm_eps must be 1e-06 for tunix.models, which ignores"),
        ("gemma3_text", {"layer_types": ["full_attention"] * 7}, "layer_types must be global in every 6th layer only"),
        ("llama_tied", {"attention_bias": True}, "attention_bias and mlp_bias must be false"),
        ("qwen3", {"hidden_act": "gelu"}, "hidden_act must be silu"),
        ("qwen3", {"model_type": "mamba"}, "model_type must be one of qwen3, qwen3_moe"),
    ],
)
def test_what_tunix_ignores_is_refused(tmp_path, name, changes, message):
    with pytest.raises(ValueError, match=message):
        describe(edited(tmp_path, name, **changes))


@pytest.mark.parametrize("key", ["num_experts", "num_experts_per_tok", "moe_intermediate_size"])
def test_a_config_of_experts_that_lacks_a_number_is_refused(tmp_path, key):
    raw = json.loads((tunix_golden.FOLDER / "qwen3_moe" / "config.json").read_text())
    raw["num_experts"] = raw.pop("num_local_experts")  # as older transformers write it
    del raw[key]
    for value in (None, True, "4"):
        (tmp_path / "config.json").write_text(json.dumps(raw if value is None else {**raw, key: value}))
        with pytest.raises(ValueError, match=rf"config\.json: {key} must be a whole number .* got {value!r}"):
            describe(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"tie_word_embeddings": False, "num_hidden_layers": 4}, "missing"), ({"num_hidden_layers": 2}, "extra")],
)
def test_files_that_do_not_hold_the_model_are_refused_before_they_are_read(tmp_path, changes, message):
    folder = edited(tmp_path, "qwen3", layer_types=None, vocab_size=259, **changes)
    config = load_config(None, [f"model.source=tunix:{folder}", "tokenizer.source=byte"])
    with pytest.raises(ValueError, match=message):
        find_origin(config, tokenizer_from_config(config))


def test_damaged_files_are_refused_before_they_are_read(tmp_path):
    folder = edited(tmp_path, "qwen3", vocab_size=259)
    file = folder / "model.safetensors"
    config = load_config(None, [f"model.source=tunix:{folder}", "tokenizer.source=byte"])
    content = file.read_bytes()
    for damaged in (content[:-1], content[:100], b""):
        file.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"model\.safetensors must be a whole safetensors file, got"):
            find_origin(config, tokenizer_from_config(config))


def test_linen_and_dtypes_that_tunix_does_not_have_are_refused():
    with pytest.raises(ValueError, match=r"pure_nnx must be true with model.source 'tunix:.*NNX modules"):
        describe(GOLDEN / "qwen3", "pure_nnx=false")
    with pytest.raises(ValueError, match=r"model.dtype must be model.param_dtype \(float32\)"):
        describe(GOLDEN / "llama_tied", "model.dtype=bfloat16")
    with pytest.raises(ValueError, match=r"lora.rank must be 0"):
        load_config(None, [f"model.source=tunix:{GOLDEN / 'qwen3'}", "lora.rank=4"])


def expected_of(family):
    """(token ids, logits by transformers) of a golden of tests/helpers/tunix_golden.py."""
    expected = json.loads((tunix_golden.FOLDER / family / "expected.json").read_text())
    return np.array(expected["token_ids"]), np.array(expected["logits"])


@pytest.mark.parametrize("family", tunix_golden.FAMILIES)
def test_families_without_an_own_decoder_give_the_logits_of_transformers(tmp_path, family):
    folder = tunix_golden.FOLDER / family
    policy, params = tunix_policy(folder)
    tokens, logits = expected_of(family)
    np.testing.assert_allclose(logits_of(policy, params, jnp.asarray(tokens)), logits, atol=5e-5)
    check_policy(policy, params, family)
    assert_exported_files_are_the_loaded_ones(policy, params, folder, tmp_path / "out")
    assert policy.packs_rows == (family != "gemma2")


@pytest.mark.parametrize("family", tunix_golden.FAMILIES)
def test_the_goldens_are_what_transformers_computes(family):
    pytest.importorskip("torch")
    tokens, logits = expected_of(family)
    np.testing.assert_allclose(tunix_golden.logits_of(tunix_golden.FOLDER / family, tokens), logits, atol=2e-5)


@pytest.mark.slow
def test_a_run_draws_what_the_own_decoder_draws_and_the_sampler_agrees_with_the_trainer(tmp_path):
    config = tiny_config(
        "qwen3", num_layers=1, vocab_size=259, initializer_range=0.02, rope_theta=5e6, eos_token_ids=(258,)
    )
    save_folder(tmp_path / "model", config, noisy_params(config))
    settings = [
        "tokenizer.source=byte",
        "data.source=arithmetic",
        "data.args={operation: add, digits: 1}",
        "data.max_prompt_length=8",
        f"rewards.functions=[{{function: '{REWARDS}:digit_share', name: digits}}]",
        "sampling.max_completion_length=6",
        "grpo.prompts_per_step=4",
        "grpo.group_size=4",
        "grpo.steps=2",
        "grpo.minibatches=2",
        "grpo.max_tokens_per_microbatch=512",
        "optimizer.lr=1e-3",
        "eval.every=0",
        "mesh.num_devices=2",
        "checkpoint.every=2",
    ]
    runs = {}
    for name, source in (("own", ""), ("tunix", "tunix:")):
        folder = tmp_path / name
        source = f"model.source={source}{tmp_path / 'model'}"
        runs[name] = train(load_config(None, [*settings, source, f"output_dir={folder}"]))
    metrics = {name: read_metrics(folder) for name, folder in runs.items()}
    assert max(line["logprob_difference/mean"] for line in metrics["tunix"]) <= 1e-6
    first = [[row["completion"] for row in read_samples(folder) if row["step"] == 1] for folder in runs.values()]
    assert first[0] == first[1]
    for key in ("grad_norm", "kl", "entropy"):
        np.testing.assert_allclose(metrics["own"][0][key], metrics["tunix"][0][key], rtol=1e-3, atol=1e-6)
    assert create_policy(describe(tmp_path / "model"), True).packs_rows
