"""`grpo export`: a run's weights as a Hugging Face folder or a parameter-only checkpoint, whole or not at all."""

import dataclasses
import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from rl import sft_trainer
from rl.cli import main as grpo
from rl.config.load import load_config
from rl.data.tokenizer import load_tokenizer
from rl.devices.mesh import create_mesh
from rl.models.config import flatten_specs, parameter_specs
from rl.models.files import hf
from rl.models.flavours import create_policy
from rl.models.inputs import plain_inputs
from rl.run.metrics import read_metrics
from rl.state import param_folder
from rl.state.checkpoint_files import stored_arrays
from rl.state.export import write_folder
from rl.state.origin import find_origin, pretrained_params, tokenizer_from_config
from rl.state.states import InitStateFn, get_abstract_state, setup_decode_state
from rl.tools.checkpoints.export import export
from rl.tools.trained import load_checkpoint, load_start
from tests.helpers.tiny_models import noisy_params, tiny_config
from tests.tools.test_checkpoint_tool import write_run
from tests.whole_runs.test_sft_trainer import RECIPE

FAMILIES = ("llama", "qwen3", "gemma3_text")


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    path = tmp_path_factory.mktemp("export") / "recipe.yml"
    path.write_text(RECIPE)
    return path


@pytest.fixture(scope="module")
def run(recipe):
    return write_run(recipe.parent / "run", recipe, (2, 4))


@pytest.fixture(scope="module")
def params_folder(run):
    """A parameter-only checkpoint in bfloat16 of the run's newest weights."""
    out = run.parent / "params"
    assert grpo(["export", str(run), str(out), "--format", "params", "--dtype", "bfloat16"]) == 0
    return out


def assert_equal(left, right):
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(np.asarray(a), np.asarray(b)), left, right)


# Parameter-only checkpoints


def test_a_parameter_only_checkpoint_has_the_weights_and_no_optimizer(run, params_folder):
    trained = load_checkpoint(load_config(run / "config.yml"), run)
    arrays = {array.path: array for array in stored_arrays(params_folder / "params")}
    specs = dict(flatten_specs(parameter_specs(trained.policy.config)))
    assert {path: array.shape for path, array in arrays.items()} == {path: spec.shape for path, spec in specs.items()}
    assert {array.dtype for array in arrays.values()} == {np.dtype(jnp.bfloat16)}
    config = hf.read_config(params_folder)
    assert_equal(
        param_folder.load_params(params_folder, config),
        jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), trained.params),
    )
    names = {path.name for path in params_folder.iterdir()}
    assert names == {"params", "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"} | (
        names & {"chat_template.jinja", "special_tokens_map.json"}
    )
    assert load_tokenizer(params_folder).has_chat_template


@pytest.mark.parametrize("flavour", ["true", "false"])
def test_both_flavours_decode_from_it_on_any_mesh(params_folder, flavour):
    plain = param_folder.load_params(
        params_folder, dataclasses.replace(hf.read_config(params_folder), param_dtype="float32")
    )
    overrides = [f"model.source={params_folder}", f"pure_nnx={flavour}", "mesh.fsdp=4", "mesh.tensor=2"]
    config = load_config(None, overrides)
    origin = find_origin(config, tokenizer_from_config(config))
    mesh = create_mesh(config.mesh)
    init_state_fn = InitStateFn(create_policy(origin.model_config, config.pure_nnx), None, 0)
    shardings = get_abstract_state(config, mesh, init_state_fn, is_training=False).shardings.params
    state, _ = setup_decode_state(config, mesh, init_state_fn, pretrained_params(origin, shardings))
    assert state.opt_state == ()
    assert jax.tree.map(lambda leaf: leaf.sharding, state.params) == shardings
    assert_equal(state.params, plain)
    assert jax.tree.leaves(state.params)[0].dtype == jnp.float32


@pytest.mark.slow
def test_sample_evaluate_and_train_take_it_as_a_source(recipe, params_folder, tmp_path, capsys):
    assert grpo(["sample", str(params_folder), "--prompt", "1+1=", "sampling.max_completion_length=3"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[0])["prompt"] == "1+1="
    source = f"model.source={params_folder}"
    assert grpo(["eval", str(recipe), source]) == 0
    assert "model.source: accuracy" in capsys.readouterr().out
    command = ["train", str(recipe), source, f"output_dir={tmp_path / 'run'}", "eval.every=0"]
    assert grpo(command) == 0
    identity = json.loads((tmp_path / "run" / "run.json").read_text())
    assert identity["policy"] == {
        "source": str(params_folder),
        "hash": param_folder.weights_hash(params_folder),
    }
    assert read_metrics(tmp_path / "run")[0]["step"] == 1


def test_its_hash_changes_with_the_config_and_with_a_single_byte(run, tmp_path):
    export(run, tmp_path / "out", kind="params")
    hashes = [param_folder.weights_hash(tmp_path / "out")]
    path = max((p for p in (tmp_path / "out" / "params").rglob("d/*")), key=lambda path: path.stat().st_size)
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    hashes.append(param_folder.weights_hash(tmp_path / "out"))
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    (tmp_path / "out" / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-5}))
    assert len({*hashes, param_folder.weights_hash(tmp_path / "out")}) == 3


def test_arrays_that_do_not_fit_its_config_are_named(run, tmp_path):
    export(run, tmp_path / "out", kind="params")
    config = hf.read_config(tmp_path / "out")
    param_folder.check_weights(tmp_path / "out", config)
    for changes, message in (
        ({"num_layers": 2, "layer_types": ("full_attention",) * 2}, r"layers_1/input_layernorm/scale is missing"),
        ({"intermediate_size": 32}, r"down_proj/kernel must have shape \(32, 32\), got \(64, 32\)"),
        ({"family": "qwen3"}, r"layers_0/self_attn/k_norm/scale is missing"),
    ):
        with pytest.raises(ValueError, match=message):
            param_folder.check_weights(tmp_path / "out", dataclasses.replace(config, **changes))
    export(run, tmp_path / "again", kind="params")
    qwen2 = dataclasses.replace(tiny_config("qwen2"), tie_word_embeddings=False)
    param_folder.save_params(tmp_path / "qwen2", qwen2, noisy_params(qwen2))
    tied = dataclasses.replace(qwen2, tie_word_embeddings=True)
    with pytest.raises(ValueError, match=r"lm_head/kernel has no place in this qwen2"):
        param_folder.check_weights(tmp_path / "qwen2", tied)


def test_adapters_take_a_parameter_only_checkpoint_as_their_base(params_folder):
    config = load_config(None, [f"model.source={params_folder}", "lora.rank=2", "lora.base_dtype=int8"])
    start = load_start(config)
    kernel = start.params["layers_0"]["mlp"]["up_proj"]["kernel"]
    assert kernel.values.dtype == jnp.int8
    plain = param_folder.load_params(params_folder, hf.read_config(params_folder))["layers_0"]["mlp"]["up_proj"][
        "kernel"
    ]
    error = np.abs(np.asarray(kernel.values * kernel.scale) - np.asarray(plain, np.float32))
    assert error.max() < 0.01 * np.abs(np.asarray(plain, np.float32)).max()


# Hugging Face folders


def test_a_hugging_face_folder_is_complete_and_names_no_sampling_default(run, tmp_path):
    assert grpo(["export", str(run), str(tmp_path / "out"), "--step", "2"]) == 0
    tokenizer = load_tokenizer("byte")
    generation = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    wanted = {"eos_token_id": tokenizer.eos_ids[0], "bos_token_id": tokenizer.bos_id, "pad_token_id": tokenizer.pad_id}
    assert {key: value for key, value in generation.items() if not key.startswith("_")} == wanted
    again = load_tokenizer(tmp_path / "out")
    assert again.backend.chat_template == tokenizer.backend.chat_template
    assert again.encode("1+1=") == tokenizer.encode("1+1=")
    assert again.is_of_text_prompts  # so that a run that starts from it is not warned of them
    trained = load_checkpoint(load_config(run / "config.yml"), run, 2)
    assert_equal(hf.load_params(tmp_path / "out", hf.read_config(tmp_path / "out")), trained.params)


def test_the_ids_of_model_and_tokenizer_are_joined(tmp_path):
    config = dataclasses.replace(tiny_config("llama", vocab_size=300), eos_token_ids=(7, 9))
    write_folder(tmp_path / "out", config, noisy_params(config), load_tokenizer("byte"), None)
    read = hf.read_config(tmp_path / "out")
    assert (read.eos_token_ids, read.bos_token_id, read.pad_token_id) == ((7, 9, 2), 1, 0)


@pytest.mark.parametrize("kind", ["huggingface", "params"])
def test_a_folder_that_holds_something_is_left_alone(run, tmp_path, kind):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "note").write_text("mine")
    with pytest.raises(ValueError, match="must be new or empty"):
        export(run, tmp_path / "out", kind=kind)
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "note"]
    (tmp_path / "out" / "note").unlink()
    assert export(run, tmp_path / "out", kind=kind) == 4
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_what_is_not_read_back_as_written_leaves_no_folder(tmp_path, monkeypatch):
    """A disk that changes a byte, played by the library that writes."""
    config = tiny_config("qwen3")
    save = safetensors.numpy.save_file

    def save_on_a_bad_disk(tensors, path, metadata=None):
        save(tensors, path, metadata=metadata)
        content = bytearray(pathlib.Path(path).read_bytes())
        content[-3] ^= 1
        pathlib.Path(path).write_bytes(content)

    monkeypatch.setattr(safetensors.numpy, "save_file", save_on_a_bad_disk)
    with pytest.raises(ValueError, match="was not read back as it was written to"):
        hf.save_folder(tmp_path / "out", config, noisy_params(config))
    assert list(tmp_path.iterdir()) == []


def test_arguments_that_do_not_go_together_are_refused(run, tmp_path, capsys):
    for option, value in (("--dtype", "bfloat16"), ("--format", "params")):
        assert grpo(["export", str(run), str(tmp_path / "out"), "--adapter", option, value]) == 2
        assert f"{option} must be left out with --adapter" in capsys.readouterr().err
    assert grpo(["export", str(run), str(tmp_path / "out"), "--adapter"]) == 2
    assert "--adapter needs a run that trained adapters (lora.rank)" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("flavour", ["true", "false"])
def test_a_run_with_layers_in_a_loop_is_exported_layer_by_layer(recipe, tmp_path, flavour):
    settings = [
        "model.scan_layers=true",
        "model.arch.num_layers=3",
        "sft.steps=2",
        "eval.every=0",
        f"pure_nnx={flavour}",
    ]
    run = sft_trainer.train(load_config(recipe, [f"output_dir={tmp_path / 'run'}", *settings]))
    assert read_metrics(run)[0]["grad_norm"] > 0
    for name, form in (("folder", "huggingface"), ("params", "params")):
        assert grpo(["export", str(run), str(tmp_path / name), "--format", form]) == 0
    names = safetensors.numpy.load_file(tmp_path / "folder" / "model.safetensors")
    assert {f"model.layers.{layer}.mlp.up_proj.weight" for layer in range(3)} <= set(names)
    trained = load_checkpoint(load_config(run / "config.yml"), run)
    assert trained.policy.config.scan_layers
    expected = logits_of(trained.policy, trained.params)
    for name in ("folder", "params"):
        start = load_start(load_config(None, [f"model.source={tmp_path / name}", "mesh.num_devices=1"]))
        assert not start.policy.config.scan_layers
        assert_equal(start.params, trained.params)
        np.testing.assert_allclose(logits_of(start.policy, start.params), expected, rtol=0, atol=1e-5)
    layers = [start.params[f"layers_{layer}"]["mlp"]["up_proj"]["kernel"] for layer in range(3)]
    assert not np.allclose(layers[0], layers[1])  # no layer stands for another


# Other programs

TOKENS = np.arange(2, 26).reshape(2, 12)


def exported(folder, family, **changes):
    """A model with its folder in several files, and the logits that are computed here."""
    config = tiny_config(family, **changes)
    params = noisy_params(config)
    hf.save_folder(folder, config, params, max_shard_bytes=4000)
    assert len(list(folder.glob("model-*.safetensors"))) > 1
    assert (folder / "model.safetensors.index.json").exists()
    assert_equal(hf.load_params(folder, config), params)
    return config, logits_of(create_policy(config, True), params)


def logits_of(policy, params):
    """Of TOKENS; models of one configuration and flavour are compiled once."""
    return _logits(policy.config, policy.flavour == "nnx", params)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _logits(config, pure_nnx, params):
    policy = create_policy(config, pure_nnx)
    return policy.unembed(params, policy.hidden(params, plain_inputs(TOKENS)))


@pytest.mark.parametrize("family", [*FAMILIES, "qwen2"])
def test_transformers_computes_the_same_from_a_folder_of_several_files(tmp_path, family):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    _, ours = exported(tmp_path / "out", family)
    model, report = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(report.values())
    with torch.no_grad():
        theirs = model(torch.tensor(TOKENS)).logits.numpy()
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-4)


def tunix_model(folder, config):
    """Tunix's own model of the family with the folder's weights."""
    import importlib

    family = {"llama": "llama3", "gemma3_text": "gemma3"}.get(config.family, config.family)
    model = pytest.importorskip(f"tunix.models.{family}.model")
    module = "params_safetensors" if config.family == "gemma3_text" else "params"
    params = importlib.import_module(f"tunix.models.{family}.{module}")
    arguments = {
        "num_layers": config.num_layers,
        "embed_dim": config.hidden_size,
        "hidden_dim": config.intermediate_size,
        "num_heads": config.num_heads,
        "head_dim": config.head_dim,
        "num_kv_heads": config.num_kv_heads,
    }
    if config.family == "gemma3_text":
        arguments |= {"num_embed": config.vocab_size, "sliding_window_size": config.sliding_window}
        arguments |= {"global_base_frequency": 1_000_000, "param_dtype": jnp.float32}
        return params.create_model_from_safe_tensors(str(folder), model.ModelConfig(**arguments), dtype=jnp.float32)
    arguments |= {"vocab_size": config.vocab_size, "norm_eps": config.norm_eps, "rope_theta": int(config.rope_theta)}
    tied = {"llama": "weight_tying"}.get(config.family, "use_tied_embedding")
    arguments |= {tied: config.tie_word_embeddings}
    return params.create_model_from_safe_tensors(str(folder), model.ModelConfig(**arguments))


# The theta of every model but Qwen2 is what Tunix rotates by whatever its configuration says. Its Gemma 3 makes every
# sixth layer global, and ties head and embedding.
TUNIX = {
    "qwen3": ("qwen3", {"rope_theta": 1_000_000.0, "tie_word_embeddings": False}),
    "qwen3_tied": ("qwen3", {"rope_theta": 1_000_000.0, "tie_word_embeddings": True}),
    "qwen2": ("qwen2", {"rope_theta": 50_000.0, "tie_word_embeddings": False}),
    "qwen2_tied": ("qwen2", {"rope_theta": 50_000.0, "tie_word_embeddings": True}),
    "llama": ("llama", {"rope_theta": 1_000_000.0, "tie_word_embeddings": False}),
    "llama_tied": ("llama", {"rope_theta": 1_000_000.0, "tie_word_embeddings": True}),
    "gemma3_text": ("gemma3_text", {"num_layers": 6, "layer_types": ("sliding_attention",) * 5 + ("full_attention",)}),
}


@pytest.mark.parametrize("name", TUNIX)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # tunix names its shardings as older flax did
def test_tunix_computes_the_same_from_a_folder_of_several_files(tmp_path, name):
    pytest.importorskip("tunix")
    from flax import nnx

    family, changes = TUNIX[name]
    config, ours = exported(tmp_path / "out", family, **changes)
    heads = [name for file in (tmp_path / "out").glob("*.safetensors") for name in safetensors.numpy.load_file(file)]
    assert ("lm_head.weight" in heads) != config.tie_word_embeddings
    peer = tunix_model(tmp_path / "out", config)
    length = TOKENS.shape[1]
    causal = jnp.broadcast_to(jnp.tril(jnp.ones((length, length), bool)), (len(TOKENS), length, length))
    positions = jnp.broadcast_to(jnp.arange(length), TOKENS.shape)
    theirs = nnx.jit(lambda model: model(jnp.asarray(TOKENS), positions, None, causal)[0])(peer)
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-4)
