"""`grpo quantize`: what it writes, what it says, how little memory it takes, and what reads its folders."""

import json
import math
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from rl.cli import main
from rl.config.load import load_config
from rl.data.tokenizer import load_tokenizer
from rl.grpo_trainer import train
from rl.models.config import Quantization
from rl.models.files.hf import load_params, read_config, save_folder, write_model_files
from rl.models.flavours import create_policy
from rl.models.inputs import Inputs
from rl.models.logprobs import token_logprobs
from rl.models.lora import join, merge, split
from rl.models.quantized import QuantizedArray, dequantize, quantize_params
from rl.tools.quantization.quantize import quantize_folder
from rl.tools.trained import load_checkpoint, load_start
from tests.helpers.places import REWARDS, ROOT
from tests.helpers.tiny_models import FAMILIES, noisy_params, tiny_config

ATTENTION = (r"self_attn/\w+/kernel$",)
# Of each family another way of quantising, so that all of them, and all families, are seen.
WAYS = {
    "llama": Quantization("int4", 8, head=True),
    "qwen2": Quantization("int8"),
    "qwen3": Quantization("float8_e4m3fn", patterns=ATTENTION),
    "gemma3_text": Quantization("int4", 4, head=True),
}
QLORA = f"""
tokenizer: {{source: byte}}
data: {{source: arithmetic, args: {{operation: add, digits: 1}}, eval_size: 2, max_prompt_length: 8}}
rewards: {{functions: [{{function: "{REWARDS}:digit_share", name: digits}}], num_workers: 1}}
sampling: {{max_completion_length: 8, slots: 2, warm_up: false}}
grpo: {{steps: 1, prompts_per_step: 2, group_size: 2, max_tokens_per_microbatch: 64}}
eval: {{every: 0}}
checkpoint: {{every: 1}}
mesh: {{num_devices: 1}}
optimizer: {{lr: 1e-2}}
"""


def model_of(family):
    return tiny_config(family, vocab_size=300, eos_token_ids=(258,), tie_word_embeddings=family != "llama")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> pathlib.Path:
    """One model of each family with a tokenizer, NAME_small as `WAYS` says, NAME.json what was said about it."""
    path = tmp_path_factory.mktemp("quantize")
    (path / "text.txt").write_text("what is 12+34? it is 46, as everybody knows.")
    for family in FAMILIES:
        save_folder(path / family, model_of(family), noisy_params(model_of(family)), tokenizer=load_tokenizer("byte"))
    (path / "recipe.yml").write_text(QLORA)
    return path


@pytest.fixture(scope="module")
def small(folder) -> pathlib.Path:
    """qwen2 in int8."""
    if not (folder / "small").exists():
        quantize_folder(folder / "qwen2", folder / "small", WAYS["qwen2"])
    return folder / "small"


def text_tokens(folder):
    return load_tokenizer("byte").encode((folder / "text.txt").read_text())


def perplexity_of(config, params, tokens, context, pure_nnx):
    """By the whole model at once, the pieces of the text in one row."""
    policy, index = create_policy(config, pure_nnx), np.arange(len(tokens))[None]
    tokens, groups = np.asarray([tokens]), index // context
    mask = groups[:, 1:] == groups[:, :-1]

    def run(params):
        hidden = policy.hidden(params, Inputs(tokens, index % context, groups, np.zeros_like(groups)))
        return token_logprobs(policy, params, hidden[:, :-1], tokens[:, 1:], 1.0, 512, False, mask)[0]

    return math.exp(-float(jnp.sum(jax.jit(run)(params))) / mask.sum())


@pytest.mark.parametrize("family", FAMILIES)
def test_folders_hold_the_quantised_weights_and_the_report_says_how_far_they_are(folder, tmp_path, family):
    config, quantization, tokens = model_of(family), WAYS[family], text_tokens(folder)
    report = quantize_folder(folder / family, tmp_path / "small", quantization, tokens, context=20)
    assert read_config(tmp_path / "small").quantization == quantization
    params = noisy_params(config)
    want = quantize_params(config, params, quantization)
    got = load_params(tmp_path / "small", read_config(tmp_path / "small"))
    jax.tree.map(np.testing.assert_array_equal, got, want)
    is_small = lambda leaf: isinstance(leaf, QuantizedArray)  # noqa: E731
    quantized = [leaf for leaf in jax.tree.leaves(got, is_leaf=is_small) if is_small(leaf)]
    assert report.num_matrices == len(quantized) > 0
    assert report.bytes_after == sum(path.stat().st_size for path in (tmp_path / "small").glob("*.safetensors")) - sum(
        8 + int.from_bytes(path.read_bytes()[:8], "little") for path in (tmp_path / "small").glob("*.safetensors")
    )
    # Errors of the first layer, by hand.
    layer, plain = want["layers_0"], params["layers_0"]
    squares = {}
    for block, modules in plain.items():
        for name in modules:
            if name.endswith("_proj") and is_small(layer[block][name]["kernel"]):
                exact = np.asarray(plain[block][name]["kernel"], np.float64)
                difference = np.asarray(dequantize(layer[block][name]["kernel"]), np.float64) - exact
                squares[f"{block}/{name}"] = (np.sum(difference**2), np.sum(exact**2))
    said = report.layers[1]
    differences, wholes = map(sum, zip(*squares.values(), strict=True))
    assert said.name == "layers_0"
    np.testing.assert_allclose(said.error, math.sqrt(differences / wholes), rtol=1e-4)
    worst = max(squares, key=lambda name: squares[name][0] / squares[name][1])
    assert said.worst == (worst, pytest.approx(math.sqrt(squares[worst][0] / squares[worst][1]), rel=1e-4))
    # Perplexity as the whole model gives it, in one flavour or the other; three pieces of the text.
    assert len(tokens) == 45
    assert report.num_tokens == 19 + 19 + 4
    for number, weights in enumerate((params, want)):
        expected = perplexity_of(config, weights, tokens, 20, pure_nnx=family in ("llama", "qwen2"))
        np.testing.assert_allclose(report.perplexity[number], expected, rtol=1e-4)
    assert report.perplexity[0] != report.perplexity[1]
    assert report.layers[-1].hidden_error is None
    assert all(report.layers[number].hidden_error > 1e-4 for number in (1, 2))


def test_the_command_prints_errors_sizes_perplexity_and_memory(folder, tmp_path, capsys):
    arguments = ["--dtype", "int4", "--group-size", "8", "--only", "mlp/", "--text", str(folder / "text.txt")]
    assert main(["quantize", str(folder / "qwen3"), str(tmp_path / "out"), *arguments, "--max-tokens", "9"]) == 0
    text = capsys.readouterr().out
    assert "6 matrices in int4, a scale per 8 inputs" in text
    assert "embed_tokens  as it was        0.00000" in text
    assert "perplexity on 8 tokens: " in text
    assert "peak memory: " in text
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"config.json", "generation_config.json", "tokenizer.json", "model.safetensors.index.json"} <= names
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["quantization_config"]["patterns"] == ["mlp/"]
    tensors = safetensors.numpy.load_file(tmp_path / "out" / "model-00002-of-00004.safetensors")
    packed, scale = (tensors[f"model.layers.0.mlp.up_proj.weight{end}"] for end in ("", "_scale"))
    assert (packed.shape, packed.dtype, scale.shape, scale.dtype) == ((24, 8), np.uint8, (24, 2), np.float32)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["qwen2", "new", "--only", "router"], "must each find a matrix, got 'router'"),
        (["qwen2", "new", "--group-size", "7"], "must divide the inputs of each matrix, got 7 for 16 inputs"),
        (["qwen2", "new", "--group-size", "0"], "group size of quantised weights must be > 0"),
        (["small", "new"], "must hold plain weights, got int8 already"),
        (["qwen2", "small"], "must be new or empty"),
        (["qwen2", "new", "--text", "missing.txt"], "--text must be a text file"),
        (["qwen2", "new", "--text", "text.txt", "--max-tokens", "1"], "must hold at least two tokens"),
        (["recipe.yml", "new"], "model source must be a folder or hub id to quantise"),
    ],
)
def test_what_cannot_be_quantised_is_refused(folder, small, capsys, monkeypatch, arguments, message):
    monkeypatch.chdir(folder)
    assert main(["quantize", *arguments]) == 2
    assert message in capsys.readouterr().err
    assert not (folder / "new").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--only", "mlp/", "--only", "["], "--only must be a regular expression, got '[': unterminated character set"),
        (["--text", "latin.txt", "--tokenizer", "byte"], "--text must be text in UTF-8, got 'latin.txt': "),
    ],
)
def test_options_that_cannot_be_read_are_named_before_the_model_is_looked_for(
    tmp_path, capsys, monkeypatch, arguments, message
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "latin.txt").write_bytes("caf\xe9".encode("latin-1"))
    assert main(["quantize", "absent/folder", "new", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_a_parameter_only_checkpoint_is_refused_with_the_command_that_writes_another(tmp_path, capsys):
    (tmp_path / "own" / "params").mkdir(parents=True)
    (tmp_path / "own" / "params" / "_METADATA").write_text("{}")
    write_model_files(tmp_path / "own", tiny_config(), "float32", None)
    assert main(["quantize", str(tmp_path / "own"), str(tmp_path / "new")]) == 2
    told = capsys.readouterr().err
    assert f"got the parameter-only checkpoint {str(tmp_path / 'own')!r}; `grpo export` without --format params" in told


def test_int4_of_an_odd_number_of_inputs_is_refused(tmp_path):
    config = tiny_config(intermediate_size=25)
    save_folder(tmp_path / "odd", config, noisy_params(config))
    with pytest.raises(ValueError, match="int4 needs an even number of inputs, got 25 for layers_0/mlp/down_proj"):
        quantize_folder(tmp_path / "odd", tmp_path / "out", Quantization("int4"))


def test_damaged_quantised_folders_are_refused(small, tmp_path):
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in small.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    settings = json.loads((copy / "config.json").read_text())

    def write(**changes):
        changed = settings | {"quantization_config": settings["quantization_config"] | changes}
        (copy / "config.json").write_text(json.dumps(changed))

    write(group_size=8)
    with pytest.raises(ValueError, match=r"weight_scale must have shape \(\d+, \d+\), got \(\d+, 1\)"):
        load_params(copy, read_config(copy))
    write(dtype="int4")
    with pytest.raises(ValueError, match=r"must have shape \(16, 12\), got \(16, 24\)"):
        load_params(copy, read_config(copy))
    write(quant_method="awq")
    with pytest.raises(ValueError, match="must be of quant_method 'tandem', got 'awq'"):
        read_config(copy)
    (copy / "config.json").write_text(json.dumps(settings))
    file = copy / "model-00002-of-00004.safetensors"
    tensors = safetensors.numpy.load_file(file)
    del tensors["model.layers.0.mlp.up_proj.weight_scale"]
    safetensors.numpy.save_file(tensors, file)
    with pytest.raises(ValueError, match=r"up_proj\.weight_scale"):
        load_params(copy, read_config(copy))


@pytest.mark.parametrize("flavour", ["pure_nnx=true", "pure_nnx=false"])
def test_a_quantised_folder_loads_onto_a_mesh_as_it_is_stored(folder, tmp_path, flavour):
    quantize_folder(folder / "gemma3_text", tmp_path / "small", WAYS["gemma3_text"])
    settings = [f"model.source={tmp_path / 'small'}", "mesh.num_devices=8", "mesh.fsdp=4", "mesh.tensor=2", flavour]
    trained = load_start(load_config(None, settings))
    config = model_of("gemma3_text")
    want = quantize_params(config, noisy_params(config), WAYS["gemma3_text"])
    jax.tree.map(np.testing.assert_array_equal, trained.params, want)
    assert jax.tree.map(lambda leaf: leaf.sharding, trained.params) == trained.shardings
    kernel = trained.params["layers_0"]["self_attn"]["q_proj"]["kernel"]
    assert kernel.values.sharding.spec == kernel.scale.sharding.spec
    assert kernel.scale.addressable_shards[0].data.shape == (1, 2, 8)


def test_all_weights_of_a_quantised_model_cannot_be_trained(folder, small, capsys):
    settings = [f"model.source={small}", f"output_dir={folder / 'run'}"]
    with pytest.raises(ValueError, match=r"must be trained through adapters, got lora\.rank 0; set lora\.rank"):
        train(load_config(folder / "recipe.yml", settings))
    with pytest.raises(ValueError, match=r"lora\.base_dtype must be left out for a model that is stored in int8"):
        train(load_config(folder / "recipe.yml", [*settings, "lora.rank=2", "lora.base_dtype=int4"]))
    assert not (folder / "run").exists()
    assert main(["sample", str(small), "--prompt", "1+", "sampling.weight_dtype=int8"]) == 2
    assert "sampling.weight_dtype must be null for weights that are quantised already" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["lora.rank=2", "lora.base_group_size=32"], r"lora\.base_group_size must be null where no weights"),
        (["lora.base_group_size=32"], r"lora\.base_group_size must be null without adapters"),
        (["sampling.weight_group_size=32"], r"sampling\.weight_group_size must be null where no weights"),
        (
            ["sampling.weight_dtype=int4", "sampling.weight_group_size=0"],
            r"weight_group_size must be >= 1 or null, got 0",
        ),
    ],
)
def test_group_sizes_that_say_nothing_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        load_config(None, settings)


@pytest.mark.slow
def test_adapters_are_trained_beside_a_quantised_model(folder, small, tmp_path):
    settings = [f"model.source={small}", f"output_dir={tmp_path / 'run'}", "lora.rank=2"]
    config = load_config(folder / "recipe.yml", settings)
    run = train(config)
    trained = load_checkpoint(load_config(folder / "recipe.yml", [*settings, "pure_nnx=false"]), run)
    jax.tree.map(np.testing.assert_array_equal, trained.params, load_checkpoint(config, run).params)
    model_config = trained.policy.config
    adapters, base = split(model_config, trained.params)
    jax.tree.map(np.testing.assert_array_equal, base, load_params(small, read_config(small)))
    assert all(np.any(adapters["layers_1"]["mlp"]["up_proj"][name]) for name in ("lora_a", "lora_b"))
    # The merged folder is plain: dequantised base plus adapter.
    assert main(["export", str(run), str(tmp_path / "merged")]) == 0
    assert read_config(tmp_path / "merged").quantization is None
    is_small = lambda leaf: isinstance(leaf, QuantizedArray)  # noqa: E731
    wide = jax.tree.map(lambda leaf: dequantize(leaf) if is_small(leaf) else leaf, base, is_leaf=is_small)
    want = merge(model_config, join(adapters, wide))
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7)  # noqa: E731
    jax.tree.map(close, load_params(tmp_path / "merged", read_config(tmp_path / "merged")), want)


@pytest.mark.slow
def test_sampling_reads_a_quantised_folder_alike_in_both_flavours(small, capsys):
    lines = []
    for flavour in ("pure_nnx=true", "pure_nnx=false"):
        arguments = ["--prompt", "1+2=", "mesh.num_devices=1", "sampling.max_completion_length=8", "sampling.slots=2"]
        assert main(["sample", str(small), *arguments, flavour]) == 0
        lines.append(capsys.readouterr().out)
    assert lines[0] == lines[1]
    assert json.loads(lines[0])["token_ids"]


@pytest.mark.slow
def test_evaluation_reads_a_quantised_folder_alike_in_both_flavours(small, tmp_path):
    """Its greedy completions are those that sampling draws."""
    rewards = f"rewards.functions=[{{function: '{REWARDS}:digit_share', name: digits}}]"
    data = ["data.source=arithmetic", "data.args={operation: add, digits: 1}", "data.eval_size=3", rewards]
    limits = ["mesh.num_devices=1", "sampling.max_completion_length=8", "sampling.slots=2"]
    results = []
    for flavour in ("pure_nnx=true", "pure_nnx=false"):
        assert main(["eval", str(small), *data, *limits, flavour, "--output", str(tmp_path / flavour)]) == 0
        results.append([json.loads(line) for line in (tmp_path / flavour).read_text().splitlines()])
    assert results[0] == results[1]
    assert len(results[0]) == 3
    one = results[0][0]
    drawn = ["--prompt", one["prompt"], "sampling.temperature=0", "--output", str(tmp_path / "drawn")]
    assert main(["sample", str(small), *drawn, *limits]) == 0
    assert json.loads((tmp_path / "drawn").read_text())["completion"] == one["completion"]


MEASURE = """
import sys
from rl.devices.host_memory import limit_arenas
from rl.models.config import Quantization
from rl.tools.quantization.quantize import MALLOC_ARENAS, quantize_folder
limit_arenas(MALLOC_ARENAS)  # as the command does
small, large, out = sys.argv[1:]
quantize_folder(small, out + "_small", Quantization("int4", 32), list(range(20)))  # what compiling and one layer take
report = quantize_folder(large, out, Quantization("int4", 32), list(range(20)))
print(report.bytes_before, report.start_bytes, report.peak_bytes)
"""


@pytest.mark.slow
def test_one_layer_is_in_memory_at_a_time(tmp_path):
    """With 14 layers the process is hardly larger than with 2 of the same shape, also with a text."""
    for name, num_layers in (("small", 2), ("large", 14)):
        config = tiny_config(
            vocab_size=64,
            hidden_size=512,
            intermediate_size=2048,
            num_layers=num_layers,
            num_heads=8,
            num_kv_heads=8,
            head_dim=64,
        )
        params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float32), noisy_params(config))
        save_folder(tmp_path / name, config, params, max_shard_bytes=1e8)
    del params
    command = [sys.executable, "-c", MEASURE, str(tmp_path / "small"), str(tmp_path / "large"), str(tmp_path / "out")]
    output = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    size, start, peak = map(int, output.split())
    assert size > 230e6
    assert peak - start < 0.3 * size
