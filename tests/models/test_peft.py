"""Adapters as PEFT's files: names and layouts, there and back, refusals, and that peft computes what Tandem does."""

import dataclasses
import json

import jax
import numpy as np
import pytest
import safetensors.numpy

from rl.cli import main
from rl.config.load import load_config
from rl.models.config import LoRAConfig, ModelConfig
from rl.models.files import hf
from rl.models.files.peft import adapter_for, check_adapter, load_adapter, read_adapter, save_adapter
from rl.models.flavours import create_policy
from rl.models.inputs import plain_inputs
from rl.models.lora import join, split
from rl.tools.trained import load_start
from tests.helpers.places import FILES
from tests.helpers.tiny_models import noisy_params, tiny_config

GOLDEN = FILES / "models"
NAMES = ("gemma3_text", "llama3_scaled_rope", "llama_tied", "qwen2", "qwen3")
LORA = LoRAConfig(rank=3, alpha=6.0, targets=("*_proj",))


def golden_config(name, lora=LORA) -> ModelConfig:
    return dataclasses.replace(hf.read_config(GOLDEN / name), lora=lora)


def edit_settings(folder, **changes):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_files_have_the_names_and_layouts_of_peft(tmp_path):
    config = tiny_config(
        "qwen2", tie_word_embeddings=False, lora=LoRAConfig(3, 6.0, ("*/[qo]_proj", "lm_head", "*_0/mlp/*"))
    )
    params = noisy_params(config)
    save_adapter(tmp_path / "out", config, params, "some/base")
    tensors = safetensors.numpy.load_file(tmp_path / "out" / "adapter_model.safetensors")
    prefix, attention = "base_model.model.model.layers.1.self_attn.", params["layers_1"]["self_attn"]
    x = np.random.default_rng(0).normal(size=(2, 32)).astype(np.float32)
    low = x @ tensors[prefix + "o_proj.lora_A.weight"].T
    np.testing.assert_allclose(low, x @ np.asarray(attention["o_proj"]["lora_a"]).reshape(32, 3), rtol=1e-5)
    out = low @ tensors[prefix + "q_proj.lora_B.weight"].T
    np.testing.assert_allclose(out, low @ np.asarray(attention["q_proj"]["lora_b"]).reshape(3, 32), rtol=1e-5)
    assert tensors["base_model.model.lm_head.lora_B.weight"].shape == (97, 3)
    settings = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (settings["r"], settings["lora_alpha"], settings["base_model_name_or_path"]) == (3, 6.0, "some/base")
    mlp = [f"model.layers.0.mlp.{name}_proj" for name in ("gate", "up", "down")]
    assert sorted(settings["target_modules"]) == sorted(["q_proj", "o_proj", "lm_head", *mlp])


@pytest.mark.parametrize("name", NAMES)
def test_an_adapter_comes_back_bit_for_bit(tmp_path, name):
    config = golden_config(name)
    trained = split(config, noisy_params(config))[0]
    save_adapter(tmp_path / "out", config, trained, None)
    back = load_adapter(tmp_path / "out", config)
    assert jax.tree.structure(back) == jax.tree.structure(trained)
    jax.tree.map(np.testing.assert_array_equal, back, trained)
    found = read_adapter(tmp_path / "out")
    assert (found.rank, found.alpha, found.rank_stabilized) == (3, 6.0, False)
    assert set(found.targets) == {"/".join(p) for p in modules_of(trained)}


def modules_of(trained):
    return {tuple(part.key for part in path[:-1]) for path, _ in jax.tree_util.tree_leaves_with_path(trained)}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"use_dora": True}, "use_dora must be False; anything else is not supported, got True"),
        ({"use_dora": "false"}, "use_dora must be False; .* got 'false'"),
        ({"alora_invocation_tokens": [1]}, "alora_invocation_tokens must be None"),
        ({"rank_pattern": {"q_proj": 4}}, "rank_pattern must be"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights must be"),
        ({"peft_type": "IA3"}, "peft_type must be 'LORA'; anything else is not supported, got 'IA3'"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save must be"),
        ({"r": None}, "r must be a whole number from 1 to .* got None"),
        ({"r": "3"}, "r must be a whole number from 1 to .* got '3'"),
        ({"r": 2}, "lora.rank must be that of the adapter .*, 2, got 3"),
        ({"lora_alpha": float("nan")}, r"adapter_config\.json: lora_alpha must be a number from 0 to .* got nan"),
        ({"lora_alpha": 0}, r"adapter_config\.json: lora alpha must be > 0, got 0"),
        ({"use_rslora": 1}, "use_rslora must be true or false, got 1"),
        ({"target_modules": None}, "target_modules must be a list of texts, got None"),
        (
            {"target_modules": ["q_proj"]},
            "target_modules must name the matrices in .* differs in 12 of them: layers_0/mlp",
        ),
        ({"target_modules": "(", "r": 3}, r"target_modules must be a list of names or a regular expression \(.*rror"),
        ({"target_modules": r".*\.layers\.0\..*_proj"}, "which differs in 7 of them: layers_1/mlp/down_proj"),
        ({"layers_to_transform": [1]}, "which differs in 7 of them: layers_0/mlp/down_proj"),
        ({"layers_to_transform": "1"}, "layers_to_transform must be a whole number"),
        ({"lora_alpha": 7}, r"lora\.alpha must be that of the adapter .*, 7\.0, got 6\.0"),
        ({"use_rslora": True}, r"lora\.rank_stabilized must be that of the adapter"),
    ],
)
def test_an_adapter_of_another_kind_is_refused(tmp_path, changes, message):
    config = tiny_config(lora=LORA)
    save_adapter(tmp_path / "out", config, noisy_params(config), None)
    edit_settings(tmp_path / "out", **changes)
    with pytest.raises(ValueError, match=message):
        check_adapter(tmp_path / "out", config)


@pytest.mark.parametrize("targets", ["all-linear", r"model\.layers\.\d+\.(self_attn|mlp)\.[a-z]+_proj"])
def test_target_modules_may_be_a_pattern_and_must_name_what_the_model_has(tmp_path, targets):
    config = tiny_config(lora=LORA)
    save_adapter(tmp_path / "out", config, noisy_params(config), None)
    edit_settings(tmp_path / "out", target_modules=targets)
    check_adapter(tmp_path / "out", config)
    assert adapter_for(tmp_path / "out", config).rank == 3
    with pytest.raises(ValueError, match=r"target_modules must name the matrices in .* differs in 7 of them: layers_2"):
        adapter_for(tmp_path / "out", dataclasses.replace(tiny_config(num_layers=3)))


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_nan_and_infinity_in_an_adapter_are_refused(tmp_path, value):
    config = tiny_config(lora=LORA)
    save_adapter(tmp_path / "out", config, noisy_params(config), None)
    file = tmp_path / "out" / "adapter_model.safetensors"
    tensors = safetensors.numpy.load_file(file)
    name = "base_model.model.model.layers.1.mlp.up_proj.lora_A.weight"
    tensors[name][1, 2] = value
    safetensors.numpy.save_file(tensors, file)
    message = rf"out: tensor {name} must hold finite numbers, got 1 of 48 .*, the first at \[1, 2\]"
    with pytest.raises(ValueError, match=message):
        load_adapter(tmp_path / "out", config)
    assert main(["lora", "inspect", str(tmp_path / "out")]) == 2
    loaded = load_adapter(tmp_path / "out", config, allow_nonfinite=True)
    assert not np.isfinite(loaded["layers_1"]["mlp"]["up_proj"]["lora_a"]).all()
    tensors[name] = np.ones((3, 16), np.int32)
    safetensors.numpy.save_file(tensors, file)
    with pytest.raises(ValueError, match=f"tensor {name} must be one of F64, F32, F16, BF16, got I32"):
        check_adapter(tmp_path / "out", config)


def test_adapters_of_other_matrices_shapes_or_tensors_are_refused(tmp_path):
    config = tiny_config(lora=LORA)
    save_adapter(tmp_path / "out", config, noisy_params(config), None)
    with pytest.raises(ValueError, match=r"lora\.targets must match the matrices.*differs in 6 of them: layers_0/mlp"):
        check_adapter(tmp_path / "out", tiny_config(lora=LoRAConfig(3, 6.0, ("*/self_attn/*",))))
    wide = tiny_config(lora=LORA, intermediate_size=40)
    save_adapter(tmp_path / "wide", wide, noisy_params(wide), None)
    with pytest.raises(ValueError, match=r"gate_proj\.lora_B\.weight must have shape \(24, 3\), got \(40, 3\)"):
        check_adapter(tmp_path / "wide", config)
    file = tmp_path / "out" / "adapter_model.safetensors"
    tensors = safetensors.numpy.load_file(file)
    tensors["base_model.model.model.embed_tokens.lora_embedding_A"] = np.zeros((3, 97), np.float32)
    safetensors.numpy.save_file(tensors, file)
    with pytest.raises(ValueError, match="lora_embedding_A' must be A or B of a matrix"):
        read_adapter(tmp_path / "out")


@pytest.mark.parametrize(("lost", "left"), [("A", "B"), ("B", "A")])
def test_an_adapter_that_lacks_one_of_two_tensors_of_a_matrix_is_refused(tmp_path, capsys, lost, left):
    config = tiny_config(lora=LORA)
    save_adapter(tmp_path / "out", config, noisy_params(config), None)
    file = tmp_path / "out" / "adapter_model.safetensors"
    tensors = safetensors.numpy.load_file(file)
    del tensors[f"base_model.model.model.layers.1.mlp.up_proj.lora_{lost}.weight"]
    safetensors.numpy.save_file(tensors, file)
    assert main(["lora", "inspect", str(tmp_path / "out")]) == 2
    message = f"{file}: every matrix must have lora_A and lora_B, got layers_1/mlp/up_proj with lora_{left} alone"
    assert message in capsys.readouterr().err


def test_a_run_starts_from_an_adapter_beside_its_base(tmp_path):
    config = tiny_config("qwen2", vocab_size=300, eos_token_ids=(2,), lora=LORA)
    params = noisy_params(config)
    adapters, base = split(config, params)
    hf.save_folder(tmp_path / "base", config, base)
    save_adapter(tmp_path / "adapter", config, adapters, None)
    settings = [f"model.source={tmp_path / 'base'}", "tokenizer.source=byte", f"lora.adapter={tmp_path / 'adapter'}"]
    settings += ["mesh.num_devices=2", "lora.rank=3"]
    trained = load_start(load_config(None, [*settings, "lora.alpha=6"]))
    assert jax.tree.structure(trained.params) == jax.tree.structure(params)
    jax.tree.map(np.testing.assert_array_equal, trained.params, params)
    assert jax.tree.map(lambda leaf: leaf.sharding, trained.params) == trained.shardings
    assert len(trained.origin.identity["adapter_hash"]) == 64
    with pytest.raises(ValueError, match=r"lora\.alpha must be that of the adapter"):
        load_start(load_config(None, [*settings, "lora.alpha=12"]))
    with pytest.raises(ValueError, match=r"lora\.adapter needs the model"):
        load_config(None, [*settings, "model.source=null"])


def logits_of(config, adapters, base, tokens):
    params = join(adapters, hf.load_params(base, config))
    policy = create_policy(config, True)
    return jax.jit(lambda params: policy.unembed(params, policy.hidden(params, plain_inputs(tokens))))(params)


@pytest.mark.parametrize("use_rslora", [False, True])
def test_an_adapter_that_peft_wrote_computes_here_what_it_does_there(tmp_path, use_rslora):
    peft, torch = pytest.importorskip("peft"), pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    base = transformers.AutoModelForCausalLM.from_pretrained(GOLDEN / "qwen2", dtype=torch.float32).eval()
    settings = peft.LoraConfig(
        r=3,
        lora_alpha=6,
        target_modules=["q_proj", "o_proj", "down_proj"],
        use_rslora=use_rslora,
        init_lora_weights=False,  # B is not zero then
        task_type="CAUSAL_LM",
    )
    torch.manual_seed(0)
    model = peft.get_peft_model(base, settings).eval()
    model.save_pretrained(tmp_path / "adapter")
    tokens = np.array(json.loads((GOLDEN / "qwen2" / "expected.json").read_text())["token_ids"])
    with torch.no_grad(), model.disable_adapter():
        plain = model(torch.tensor(tokens)).logits.numpy()
    with torch.no_grad():
        want = model(torch.tensor(tokens)).logits.numpy()
    config = golden_config("qwen2", None)
    config = dataclasses.replace(config, lora=adapter_for(tmp_path / "adapter", config))
    assert config.lora == LoRAConfig(3, 6.0, ("*/q_proj", "*/o_proj", "*/down_proj"), use_rslora)
    got = logits_of(config, load_adapter(tmp_path / "adapter", config), GOLDEN / "qwen2", tokens)
    assert np.abs(want - plain).max() > 0.01
    np.testing.assert_allclose(got, want, rtol=0, atol=2e-4)


@pytest.mark.parametrize("name", NAMES)
def test_peft_computes_what_tandem_does(tmp_path, name):
    """Logits of transformers with the adapter that peft opened, against ours with the same files."""
    peft, torch = pytest.importorskip("peft"), pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    config = golden_config(name)
    adapters = split(config, noisy_params(config))[0]
    save_adapter(tmp_path / "out", config, adapters, str(GOLDEN / name))
    tokens = np.array(json.loads((GOLDEN / name / "expected.json").read_text())["token_ids"])
    base = transformers.AutoModelForCausalLM.from_pretrained(GOLDEN / name, dtype=torch.float32).eval()
    with torch.no_grad():
        plain = base(torch.tensor(tokens)).logits.numpy()
        want = peft.PeftModel.from_pretrained(base, tmp_path / "out").eval()(torch.tensor(tokens)).logits.numpy()
    got = logits_of(config, load_adapter(tmp_path / "out", config), GOLDEN / name, tokens)
    assert np.abs(want - plain).max() > 0.1
    np.testing.assert_allclose(got, want, rtol=0, atol=2e-4)
