"""Hugging Face folders: the golden models of transformers, both styles of config, refusals, and the way back out."""

import dataclasses
import json
import pathlib
import shutil

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from rl.models import cache as kv
from rl.models import ops
from rl.models.config import ModelConfig, RopeScaling, parameter_specs
from rl.models.files import hf
from rl.models.flavours import create_policy
from rl.models.inputs import Inputs, plain_inputs
from tests.helpers.places import FILES
from tests.helpers.tiny_models import init_cache

GOLDEN = FILES / "models"
NAMES = ("gemma3_text", "llama3_scaled_rope", "llama_tied", "qwen2", "qwen3")


def golden_copy(tmp_path, name="llama_tied"):
    return pathlib.Path(shutil.copytree(GOLDEN / name, tmp_path / name, ignore=shutil.ignore_patterns("expected.json")))


def edit_config(folder, **changes):
    """Writes changed keys into config.json; a value of Ellipsis removes the key."""
    path = folder / "config.json"
    raw = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in raw.items() if value is not ...}))


def edit_tensors(folder, edit):
    path = folder / "model.safetensors"
    tensors = safetensors.numpy.load_file(path)
    edit(tensors)
    safetensors.numpy.save_file(tensors, path)


def load(folder):
    return hf.load_params(folder, hf.read_config(folder))


# Golden models


@pytest.mark.matrix
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("flavour", [False, True])
def test_logprobs_are_those_of_transformers(name, flavour):
    config, params = hf.read_config(GOLDEN / name), load(GOLDEN / name)
    expected = json.loads((GOLDEN / name / "expected.json").read_text())
    policy, tokens = create_policy(config, flavour), np.array(expected["token_ids"])

    @jax.jit
    def logits_of(params):
        return policy.unembed(params, policy.hidden(params, plain_inputs(tokens)))

    logits = logits_of(params)
    logprobs = np.take_along_axis(np.asarray(jax.nn.log_softmax(logits))[:, :-1], tokens[:, 1:, None], -1)[..., 0]
    np.testing.assert_allclose(logprobs, expected["next_token_logprobs"], rtol=0, atol=1e-5)
    np.testing.assert_allclose(logits[:, -1], expected["last_logits"], rtol=0, atol=5e-5)


@pytest.mark.matrix
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("flavour", [False, True])
def test_greedy_continuation_through_the_cache_is_that_of_transformers(name, flavour):
    config, params = hf.read_config(GOLDEN / name), load(GOLDEN / name)
    expected = json.loads((GOLDEN / name / "expected.json").read_text())
    prompt = jnp.asarray(expected["greedy_prompt"])[None]
    num_new = len(expected["greedy_continuation"])
    policy, length = create_policy(config, flavour), prompt.shape[1]

    @jax.jit
    def continue_greedily(params):
        cache = init_cache(config, 1, length)
        hidden, cache = policy.extend(params, plain_inputs(prompt), cache)
        cache = init_cache(config, 1, num_new, [kv.share_evenly(cache.own, 1)])

        def step(carry, position):
            hidden, cache = carry
            token = jnp.argmax(policy.unembed(params, hidden[:, -1:]), axis=-1).astype(jnp.int32)
            zeros = jnp.zeros_like(token)
            return policy.extend(params, Inputs(token, zeros + position, zeros, zeros), cache), token[0, 0]

        return jax.lax.scan(step, (hidden[:, -1:], cache), length + jnp.arange(num_new))[1]

    assert continue_greedily(params).tolist() == expected["greedy_continuation"]


def test_float16_and_bfloat16_tensors_mix_with_float32_ones(tmp_path):
    folder = golden_copy(tmp_path)
    exact = load(folder)

    def narrow(tensors):
        for i, name in enumerate(sorted(tensors)):
            dtype = (np.float32, np.float16, ml_dtypes.bfloat16)[i % 3]
            tensors[name] = tensors[name].astype(dtype)

    edit_tensors(folder, narrow)
    mixed = load(folder)
    kinds = {leaf.dtype for leaf in jax.tree.leaves(mixed)}
    assert kinds == {jnp.dtype("float32")}
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2**-8, atol=1e-6), mixed, exact)
    low = hf.load_params(folder, dataclasses.replace(hf.read_config(folder), param_dtype="bfloat16"))
    assert {leaf.dtype for leaf in jax.tree.leaves(low)} == {jnp.dtype("bfloat16")}


def test_parameters_arrive_in_the_shardings_asked_for():
    config = hf.read_config(GOLDEN / "qwen3")
    mesh = jax.make_mesh((2,), ("tensor",), axis_types=(AxisType.Auto,), devices=jax.devices()[:2])
    kernel_sharding = NamedSharding(mesh, PartitionSpec(None, "tensor", None))

    def sharding_of(path, spec):
        return kernel_sharding if "q_proj" in str(path) else NamedSharding(mesh, PartitionSpec())

    specs = parameter_specs(config)
    shardings = jax.tree_util.tree_map_with_path(sharding_of, specs, is_leaf=lambda node: hasattr(node, "axes"))
    params = hf.load_params(GOLDEN / "qwen3", config, shardings)
    kernel = params["layers_1"]["self_attn"]["q_proj"]["kernel"]
    assert kernel.sharding == kernel_sharding
    assert kernel.addressable_shards[0].data.shape == (32, 2, 16)
    jax.tree.map(np.testing.assert_array_equal, params, hf.load_params(GOLDEN / "qwen3", config))


# config.json


def test_configs_of_the_older_form_mean_the_same(tmp_path):
    for name in NAMES:
        folder = golden_copy(tmp_path, name)
        new = hf.read_config(folder)
        raw = json.loads((folder / "config.json").read_text())
        parameters = raw["rope_parameters"]
        old = {"rope_parameters": ..., "dtype": ..., "layer_types": ..., "torch_dtype": raw["dtype"]}
        if name == "gemma3_text":
            theta = parameters["full_attention"]["rope_theta"]
            local = parameters["sliding_attention"]["rope_theta"]
            old |= {"rope_theta": theta, "rope_local_base_freq": local, "rope_scaling": None}
            old |= {"sliding_window_pattern": 6, "_sliding_window_pattern": ...}
        else:
            scaling = {key: value for key, value in parameters.items() if key != "rope_theta"}
            old |= {"rope_theta": parameters["rope_theta"]}
            old |= {"rope_scaling": scaling if scaling["rope_type"] != "default" else None}
        edit_config(folder, **old)
        assert hf.read_config(folder) == new


def test_the_fields_of_a_config_are_read():
    llama = hf.read_config(GOLDEN / "llama3_scaled_rope")
    assert llama.rope_scaling == RopeScaling("llama3", 8.0, 1.0, 4.0, 32)
    assert (llama.rope_theta, llama.tie_word_embeddings, llama.dtype) == (500000.0, False, "float32")
    assert (llama.eos_token_ids, llama.bos_token_id, llama.pad_token_id) == ((1,), 2, 0)
    gemma = hf.read_config(GOLDEN / "gemma3_text")
    assert (gemma.sliding_window, gemma.rope_local_theta, gemma.activation) == (8, 10000.0, "gelu_tanh")
    assert gemma.layer_types.count("full_attention") == 1


def test_linear_rope_scaling_is_read_in_its_older_spelling(tmp_path):
    folder = golden_copy(tmp_path)
    edit_config(folder, rope_parameters=..., rope_theta=10000.0, rope_scaling={"type": "linear", "factor": 2})
    assert hf.read_config(folder).rope_scaling == RopeScaling("linear", 2.0)


def test_eos_ids_of_both_files_are_joined(tmp_path):
    folder = golden_copy(tmp_path)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 1], "top_p": 0.8}))
    assert hf.read_config(folder).eos_token_ids == (7, 1)
    (folder / "generation_config.json").unlink()
    edit_config(folder, eos_token_id=[3, 4])
    assert hf.read_config(folder).eos_token_ids == (3, 4)


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("llama_tied", {"model_type": "gemma3"}, "model_type must be one of .* got 'gemma3'"),
        ("llama_tied", {"model_type": "qwen3_moe"}, "got 'qwen3_moe', which is not supported"),
        ("llama_tied", {"architectures": ["LlamaForSequenceClassification"]}, "architectures must be"),
        (
            "llama_tied",
            {"rope_parameters": {"rope_type": "dynamic", "factor": 4.0}},
            "rope_parameters\\.rope_type must be one of .* got 'dynamic'",
        ),
        ("llama_tied", {"rope_scaling": {"type": "dynamic", "factor": 4.0}}, "got 'dynamic'"),
        ("llama_tied", {"rope_scaling": {"type": "linear"}}, "rope_scaling\\.factor must be a number from"),
        (
            "llama_tied",
            {"rope_scaling": {"type": "linear", "factor": 2, "beta_fast": 32}},
            "rope_scaling.beta_fast = 32 is not supported with rope type 'linear'",
        ),
        ("llama_tied", {"rope_scaling": {"type": "linear", "factor": 2}}, "and rope_scaling must agree"),
        ("llama_tied", {"partial_rotary_factor": 0.5}, "option partial_rotary_factor = 0.5 is not supported"),
        ("llama_tied", {"rope_interleaved": True}, "option rope_interleaved = True"),
        ("llama_tied", {"num_experts": 8}, "option num_experts = 8 is not supported for llama"),
        (
            "llama_tied",
            {"quantization_config": {"bits": 4}},
            "quantization_config must be of quant_method 'tandem', got None",
        ),
        ("llama_tied", {"hidden_act": "relu2"}, "hidden_act must be one of .* got 'relu2'"),
        ("llama_tied", {"attention_dropout": 0.1}, "attention_dropout must be 0, got 0.1"),
        ("llama_tied", {"dtype": "float8_e4m3fn"}, "got 'float8_e4m3fn', which is not supported"),
        ("llama_tied", {"num_hidden_layers": ...}, "num_hidden_layers must be a whole number from 1 to 4096, got None"),
        ("llama_tied", {"num_key_value_heads": 3}, "num_heads must be a multiple of num_kv_heads"),
        ("qwen2", {"use_sliding_window": True}, "use_sliding_window = True is not supported for qwen2"),
        ("qwen3", {"layer_types": ["full_attention", "sliding_attention", "full_attention"]}, "layer_types with"),
        ("qwen2", {"attention_bias": False}, "attention_bias = False is not supported for qwen2"),
        ("qwen3", {"mlp_bias": True}, "mlp_bias = True is not supported for qwen3"),
        ("gemma3_text", {"final_logit_softcapping": 30.0}, "option final_logit_softcapping = 30.0"),
        ("gemma3_text", {"attn_logit_softcapping": 50.0}, "option attn_logit_softcapping = 50.0"),
        ("gemma3_text", {"use_bidirectional_attention": True}, "option use_bidirectional_attention = True"),
        ("gemma3_text", {"layer_types": ["chunked_attention"] * 7}, "layer_types entry must be one of"),
    ],
)
def test_an_unsupported_option_is_refused_by_name(tmp_path, name, changes, message):
    folder = golden_copy(tmp_path, name)
    edit_config(folder, **changes)
    with pytest.raises(ValueError, match=message) as caught:
        hf.read_config(folder)
    assert str(folder / "config.json") in str(caught.value)


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("llama_tied", {"num_hidden_layers": 10**9}, "num_hidden_layers must be a whole number from 1 to 4096, got 10"),
        ("llama_tied", {"vocab_size": "101"}, "vocab_size must be a whole number from 1 to .* got '101'"),
        ("llama_tied", {"vocab_size": True}, "vocab_size must be a whole number from 1 to .* got True"),
        ("llama_tied", {"hidden_size": 32.5}, "hidden_size must be a whole number from 1 to .* got 32.5"),
        ("llama_tied", {"num_attention_heads": 0}, "num_attention_heads must be a whole number from 1 to"),
        (
            "llama_tied",
            {"hidden_size": 2**20, "intermediate_size": 2**22},
            "must multiply to at most 1e\\+13 parameters",
        ),
        ("llama_tied", {"rms_norm_eps": float("nan")}, "rms_norm_eps must be a number from 0 to 1, got nan"),
        ("llama_tied", {"rms_norm_eps": "1e-6"}, "rms_norm_eps must be a number from 0 to 1, got '1e-6'"),
        ("llama_tied", {"rms_norm_eps": 0}, "norm_eps must be > 0, got 0"),
        ("llama_tied", {"initializer_range": 10**400}, "initializer_range must be a number .* got 1000.*characters"),
        ("llama_tied", {"tie_word_embeddings": "false"}, "tie_word_embeddings must be true or false, got 'false'"),
        ("llama_tied", {"attention_bias": 0}, "attention_bias must be true or false, got 0"),
        ("llama_tied", {"rope_scaling": [1]}, r"rope_scaling must be an object, got \[1\]"),
        ("llama_tied", {"rope_parameters": {"rope_theta": "1e4"}}, r"rope_parameters\.rope_theta must be a number"),
        ("llama_tied", {"rope_parameters": {"rope_type": []}}, r"rope_parameters\.rope_type must be one of"),
        ("llama_tied", {"eos_token_id": "2"}, "eos_token_id must be a whole number .* or a list of such, got '2'"),
        ("llama_tied", {"eos_token_id": [1, "x"]}, r"eos_token_id must be a whole number .* got \[1, 'x'\]"),
        ("llama_tied", {"eos_token_id": 5000}, r"eos_token_ids must be in \[0, vocab_size = \d+\), got 5000"),
        ("llama_tied", {"pad_token_id": 0.5}, "pad_token_id must be a whole number from -1 to"),
        ("llama_tied", {"model_type": ["llama"]}, r"model_type must be one of .* got \['llama'\]"),
        ("llama_tied", {"architectures": "LlamaForCausalLM"}, "architectures must be a list of texts"),
        ("llama_tied", {"dtype": ["float32"]}, "dtype must be one of"),
        ("llama_tied", {"hidden_act": {}}, "hidden_act must be one of"),
        ("llama_tied", {"quantization_config": [4]}, "quantization_config must be an object"),
        (
            "llama_tied",
            {"quantization_config": {"quant_method": "tandem", "dtype": "int8", "patterns": ["("], "head": False}},
            r"patterns of quantised weights must be regular expressions, got '\('",
        ),
        ("qwen3", {"layer_types": "full_attention"}, "layer_types must be a list of texts, got 'full_attention'"),
        ("qwen3", {"layer_types": ["full_attention"]}, "layer_types must name"),
        ("gemma3_text", {"sliding_window": -1}, "sliding_window must be a whole number from 1 to"),
        ("gemma3_text", {"query_pre_attn_scalar": "x"}, "query_pre_attn_scalar must be a number"),
    ],
)
def test_a_value_of_another_type_or_range_is_refused_by_its_key(tmp_path, name, changes, message):
    folder = golden_copy(tmp_path, name)
    edit_config(folder, **changes)
    with pytest.raises(ValueError, match=message) as caught:
        hf.read_config(folder)
    assert str(folder / "config.json") in str(caught.value)


def test_generation_config_is_read_by_type(tmp_path):
    folder = golden_copy(tmp_path)
    for content, message in (
        ('{"eos_token_id": "x"}', "eos_token_id must be a whole number from 0 to .* got 'x'"),
        ('{"eos_token_id": null, "pad_token_id": [1]}', r"pad_token_id must be a whole number .* got \[1\]"),
        ("[]", "must hold a JSON object, got list"),
        ("[" * 100_000, "must be valid JSON: .*recursion"),
        ('{"a": ' + "9" * 5000 + "}", "must be valid JSON: Exceeds the limit"),
        ("\udcff", "must be a JSON file, but it cannot be read"),
    ):
        (folder / "generation_config.json").write_bytes(content.encode("utf-8", "surrogateescape"))
        with pytest.raises(ValueError, match=rf"generation_config\.json:? {message}"):
            hf.read_config(folder)


def test_options_that_switch_nothing_on_are_read(tmp_path):
    folder = golden_copy(tmp_path)
    before = hf.read_config(folder)
    harmless = {"rope_interleaved": False, "is_llama_config": True, "quantization_config": None, "num_experts": 0}
    edit_config(folder, **harmless, **{"transformers.js_config": {"dtype": "q4"}})
    assert hf.read_config(folder) == before


def test_a_folder_without_a_readable_config_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"config\.json must exist"):
        hf.read_config(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json must be valid JSON"):
        hf.read_config(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ValueError, match=r"config\.json must hold a JSON object"):
        hf.read_config(tmp_path)


# Broken weights


def test_missing_extra_and_misshapen_tensors_are_named(tmp_path):
    folder, name = golden_copy(tmp_path), "model.layers.1.mlp.up_proj.weight"
    edit_tensors(folder, lambda tensors: tensors.update({name: tensors[name].T.copy()}))
    with pytest.raises(
        ValueError, match=rf"model\.safetensors: tensor {name} must have shape \(72, 32\), got \(32, 72\)"
    ):
        load(folder)
    edit_tensors(folder, lambda tensors: tensors.pop(name))
    with pytest.raises(ValueError, match=f"1 tensors of llama are missing: {name}"):
        load(folder)
    shutil.rmtree(folder)
    folder, extra = golden_copy(tmp_path), "model.layers.0.self_attn.q_norm.weight"
    edit_tensors(folder, lambda tensors: tensors.update({extra: np.ones(8, np.float32)}))
    with pytest.raises(ValueError, match=f"1 tensors have no place in this llama: {extra}"):
        load(folder)


def test_integer_weights_are_refused(tmp_path):
    folder, name = golden_copy(tmp_path), "model.norm.weight"
    edit_tensors(folder, lambda tensors: tensors.update({name: np.ones(32, np.int8)}))
    with pytest.raises(ValueError, match=f"tensor {name} must be one of F64, F32, F16, BF16, got I8"):
        load(folder)


def test_a_truncated_file_and_a_folder_without_weights_are_refused(tmp_path):
    folder = golden_copy(tmp_path)
    path = folder / "model.safetensors"
    whole = path.read_bytes()
    for size in (0, 100, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError, match=r"model\.safetensors must be a whole safetensors file"):
            load(folder)
    path.unlink()
    with pytest.raises(ValueError, match=r"must hold model\.safetensors or model\.safetensors\.index\.json"):
        load(folder)


def test_an_index_names_files_of_its_own_folder_only(tmp_path):
    folder = golden_copy(tmp_path)
    (folder / "model.safetensors").rename(tmp_path / "elsewhere.safetensors")
    for file in (
        "../elsewhere.safetensors",
        str(tmp_path / "elsewhere.safetensors"),
        3,
        None,
        "",
        "a\0b",
        "config.json",
    ):
        (folder / hf.INDEX_FILE).write_text(json.dumps({"weight_map": {"model.norm.weight": file}}))
        with pytest.raises(
            ValueError, match=r"index\.json: weight_map must name a safetensors file in the same folder"
        ):
            load(folder)
    for content in ("[]", '{"weight_map": []}', "{}", "{"):
        (folder / hf.INDEX_FILE).write_text(content)
        with pytest.raises(ValueError, match=r"index\.json must "):
            load(folder)


def test_a_header_that_is_too_large_or_no_json_is_refused(tmp_path):
    folder = golden_copy(tmp_path)
    path = folder / "model.safetensors"
    path.write_bytes((100_000_001).to_bytes(8, "little") + b"{" * 100)
    with pytest.raises(
        ValueError, match=r"model\.safetensors must have a header of at most 100000000 bytes, got 10000000"
    ):
        load(folder)
    for header in (
        b"[]",
        b'{"a": 1}',
        b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 400]}}',
        b"[" * 90_000,
    ):
        path.write_bytes(len(header).to_bytes(8, "little") + header)
        with pytest.raises(ValueError, match=r"model\.safetensors must be a whole safetensors file, got "):
            load(folder)
    path.unlink()
    path.mkdir()
    with pytest.raises(ValueError, match=r"model\.safetensors must be a whole safetensors file, got .*irectory"):
        load(folder)


def test_more_layers_than_the_files_hold_are_refused(tmp_path):
    folder = golden_copy(tmp_path)
    edit_config(folder, num_hidden_layers=4000)
    with pytest.raises(ValueError, match=r"config\.json says 4000 layers, the files hold 3"):
        load(folder)


def test_rotary_buffers_and_a_tied_head_are_accepted_but_a_different_head_is_not(tmp_path):
    folder = golden_copy(tmp_path)
    before = load(folder)

    def add(tensors):
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(4, np.float32)
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()

    edit_tensors(folder, add)
    jax.tree.map(np.testing.assert_array_equal, load(folder), before)
    edit_tensors(folder, lambda tensors: tensors.update({"lm_head.weight": tensors["lm_head.weight"] + 1}))
    with pytest.raises(ValueError, match=r"lm_head\.weight must equal model\.embed_tokens\.weight"):
        load(folder)


# Out, and in again


def biased_config():
    """Every optional parameter of the llama family, and a head dim that is not hidden / heads."""
    return ModelConfig.from_arch(
        "llama",
        vocab_size=37,
        hidden_size=12,
        intermediate_size=20,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=6,
        attention_bias=True,
        mlp_bias=True,
        tie_word_embeddings=False,
        rope_scaling=RopeScaling("linear", 2.0),
        activation="gelu",
        eos_token_ids=(5, 6),
        bos_token_id=1,
    )


def random_params(config):
    shapes = jax.eval_shape(lambda key: ops.init_params(config, key), jax.random.key(0))
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), leaf.dtype), shapes)


@pytest.mark.parametrize("name", NAMES)
def test_a_golden_model_goes_out_and_in_bit_for_bit(tmp_path, name):
    config, params = hf.read_config(GOLDEN / name), load(GOLDEN / name)
    hf.save_folder(tmp_path / "out", config, params)
    assert hf.read_config(tmp_path / "out") == config
    jax.tree.map(np.testing.assert_array_equal, load(tmp_path / "out"), params)
    stored, original = (
        safetensors.numpy.load_file(folder / "model.safetensors") for folder in (tmp_path / "out", GOLDEN / name)
    )
    assert stored.keys() == original.keys()
    for key, value in original.items():
        np.testing.assert_array_equal(stored[key], value)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_biases_shards_and_narrow_types_go_out_and_in(tmp_path, dtype):
    config = dataclasses.replace(biased_config(), dtype=dtype, param_dtype=dtype)
    params = random_params(config)
    hf.save_folder(tmp_path / "out", config, params, max_shard_bytes=3000)
    files = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    assert len(files) > 2
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    assert hf.read_config(tmp_path / "out") == config
    jax.tree.map(np.testing.assert_array_equal, load(tmp_path / "out"), params)
    (tmp_path / "out" / files[1]).unlink()
    with pytest.raises(ValueError, match=f"{files[1]} must exist"):
        load(tmp_path / "out")


def test_an_index_that_disagrees_with_its_files_is_refused(tmp_path):
    config = biased_config()
    hf.save_folder(tmp_path / "out", config, random_params(config), max_shard_bytes=3000)
    path = tmp_path / "out" / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    wrong = next(
        name for name in sorted(set(index["weight_map"].values())) if name != index["weight_map"]["lm_head.weight"]
    )
    index["weight_map"]["lm_head.weight"] = wrong
    path.write_text(json.dumps(index))
    with pytest.raises(ValueError, match=rf"{wrong}: tensor lm_head\.weight is missing"):
        load(tmp_path / "out")


def test_saving_in_another_type_casts_and_says_so_in_the_config(tmp_path):
    config = biased_config()
    params = random_params(config)
    hf.save_folder(tmp_path / "out", config, params, dtype="bfloat16")
    read = hf.read_config(tmp_path / "out")
    assert (read.dtype, read.param_dtype) == ("bfloat16", "bfloat16")
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b.astype(jnp.bfloat16)), load(tmp_path / "out"), params)


def test_a_used_folder_and_foreign_parameters_are_refused_and_leave_nothing_behind(tmp_path):
    config = biased_config()
    params = random_params(config)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "note.txt").write_text("mine")
    with pytest.raises(ValueError, match="export folder must be new or empty"):
        hf.save_folder(tmp_path / "full", config, params)
    params["layers_0"]["mlp"]["down_proj"]["kernel"] = jnp.ones((3, 3))
    with pytest.raises(ValueError, match=r"layers_0/mlp/down_proj/kernel must have shape \(20, 12\), got \(3, 3\)"):
        hf.save_folder(tmp_path / "out", config, params)
    del params["layers_0"]["mlp"]["down_proj"]["kernel"]
    with pytest.raises(ValueError, match=r"layers_0/mlp/down_proj/kernel .* got no such parameter"):
        hf.save_folder(tmp_path / "out", config, params)
    assert [path.name for path in tmp_path.iterdir()] == ["full"]


def test_a_tokenizer_that_cannot_be_saved_leaves_no_folder(tmp_path):
    class BrokenTokenizer:
        def save_pretrained(self, folder):
            raise OSError("disk full")

    config = biased_config()
    with pytest.raises(OSError, match="disk full"):
        hf.save_folder(tmp_path / "out", config, random_params(config), tokenizer=BrokenTokenizer())
    assert list(tmp_path.iterdir()) == []


# Sources and identity


def test_a_folder_is_its_own_source_and_anything_else_is_explained(tmp_path):
    assert hf.resolve_source(tmp_path) == tmp_path
    with pytest.raises(ValueError, match="must be a Hugging Face folder or a hub id"):
        hf.resolve_source(tmp_path / "nothing" / "here")
    with pytest.raises(ValueError, match="that this machine can reach, got 'nobody-at-all/no-such-model'"):
        hf.resolve_source("nobody-at-all/no-such-model")


@pytest.mark.parametrize("full_bytes", [1 << 30, 0])
def test_the_hash_changes_with_the_config_and_with_a_single_weight(tmp_path, full_bytes):
    folder = golden_copy(tmp_path)
    before = hf.weights_hash(folder, full_bytes)
    assert before == hf.weights_hash(golden_copy(tmp_path / "again"), full_bytes)
    edit_config(folder, rms_norm_eps=1e-5)
    other_config = hf.weights_hash(folder, full_bytes)
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\x01")
    assert len({before, other_config, hf.weights_hash(folder, full_bytes)}) == 3


# Other implementations


@pytest.mark.parametrize("name", NAMES)
def test_transformers_reads_the_config_we_write(tmp_path, name):
    transformers = pytest.importorskip("transformers")
    config = hf.read_config(GOLDEN / name)
    hf.save_folder(tmp_path / "out", config, load(GOLDEN / name))
    ours = transformers.AutoConfig.from_pretrained(tmp_path / "out").to_dict()
    theirs = transformers.AutoConfig.from_pretrained(GOLDEN / name).to_dict()
    bookkeeping = {"_name_or_path", "transformers_version", "_sliding_window_pattern", "sliding_window_pattern"}
    different = {key for key in theirs.keys() - bookkeeping if ours.get(key) != theirs[key]}
    assert different == set()


def test_transformers_computes_the_same_from_the_folder_we_write(tmp_path):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    for name in NAMES:
        config, params = hf.read_config(GOLDEN / name), load(GOLDEN / name)
        hf.save_folder(tmp_path / name, config, params)
        model, report = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / name, output_loading_info=True)
        assert not any(report.values())
        tokens = np.arange(3, 40).reshape(1, -1)
        with torch.no_grad():
            theirs = model(torch.tensor(tokens)).logits.numpy()
        policy = create_policy(config, True)
        ours = policy.unembed(params, jax.jit(policy.hidden)(params, plain_inputs(tokens)))
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=5e-5)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # tunix names its shardings as older flax did
def test_qwen3_agrees_with_tunix_on_the_same_weights():
    tunix_model = pytest.importorskip("tunix.models.qwen3.model")
    tunix_params = pytest.importorskip("tunix.models.qwen3.params")
    from flax import nnx

    # tunix 0.1.7 rotates by theta = 1,000,000, whatever its configuration says.
    config = dataclasses.replace(hf.read_config(GOLDEN / "qwen3"), rope_theta=1_000_000.0)
    params = load(GOLDEN / "qwen3")
    tunix_config = tunix_model.ModelConfig(
        num_layers=config.num_layers,
        vocab_size=config.vocab_size,
        embed_dim=config.hidden_size,
        hidden_dim=config.intermediate_size,
        num_heads=config.num_heads,
        head_dim=config.head_dim,
        num_kv_heads=config.num_kv_heads,
        rope_theta=int(config.rope_theta),
        norm_eps=config.norm_eps,
    )
    peer = tunix_params.create_model_from_safe_tensors(str(GOLDEN / "qwen3"), tunix_config)
    tokens = jnp.asarray(json.loads((GOLDEN / "qwen3" / "expected.json").read_text())["token_ids"])
    inputs = plain_inputs(tokens)
    causal = jnp.broadcast_to(jnp.tril(jnp.ones((60, 60), bool)), (3, 60, 60))
    theirs = nnx.jit(lambda model: model(tokens, inputs.positions_BT, None, causal)[0])(peer)
    policy = create_policy(config, True)
    ours = policy.unembed(params, jax.jit(policy.hidden)(params, inputs))
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=5e-5)
