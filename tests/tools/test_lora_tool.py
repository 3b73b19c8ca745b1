"""`grpo lora`, and adapters beside a base in `grpo sample` and `grpo eval`."""

import dataclasses
import json
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from rl.cli import main
from rl.config.load import load_config
from rl.data.tokenizer import load_tokenizer
from rl.grpo_trainer import train
from rl.models.config import LoRAConfig
from rl.models.files.folders import same_bits
from rl.models.files.hf import load_params, read_config, save_folder
from rl.models.files.lora_remainder import REMAINDER_FILE
from rl.models.files.peft import adapter_for, load_adapter, save_adapter
from rl.models.lora import join, merge, split, to_float64
from rl.models.quantized import QuantizedArray
from rl.run.metrics import read_metrics
from rl.run_folder.folder import checkpoint_steps
from rl.tools.checkpoints.lora import inspect
from rl.tools.trained import load_checkpoint
from tests.helpers.places import REWARDS, ROOT
from tests.helpers.tiny_models import noisy_params, tiny_config

GPT = ROOT / "examples/own_model/gpt.py"
LORA = LoRAConfig(rank=3, alpha=6.0, targets=("*/self_attn/*", "layers_1/mlp/up_proj"))
CONFIG = tiny_config("qwen2", vocab_size=300, eos_token_ids=(258,), lora=LORA)
RECIPE = f"""
data: {{source: arithmetic, args: {{operation: add, digits: 1}}, eval_size: 3, max_prompt_length: 8}}
rewards: {{functions: [{{function: "{REWARDS}:digit_share", name: digits}}], num_workers: 1}}
sampling: {{max_completion_length: 8, slots: 2, warm_up: false}}
grpo: {{steps: 1, prompts_per_step: 2, group_size: 2, max_tokens_per_microbatch: 64}}
eval: {{every: 0}}
checkpoint: {{every: 1}}
mesh: {{num_devices: 1}}
lora: {{rank: 16}}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> pathlib.Path:
    """base and base16 (the same in bfloat16), adapter, other (an adapter of a deeper model), recipe.yml."""
    path = tmp_path_factory.mktemp("lora_tool")
    adapters, base = split(CONFIG, noisy_params(CONFIG))
    tokenizer = load_tokenizer("byte")
    save_folder(path / "base", CONFIG, base, tokenizer=tokenizer)
    save_folder(path / "base16", CONFIG, base, tokenizer=tokenizer, dtype="bfloat16")
    save_adapter(path / "adapter", CONFIG, adapters, "some/base")
    deeper = tiny_config("qwen2", vocab_size=300, num_layers=3, lora=LORA)
    save_adapter(path / "other", deeper, noisy_params(deeper), None)
    (path / "recipe.yml").write_text(RECIPE + f"model: {{source: {path / 'base'}}}\n")
    return path


def grpo(*arguments):
    assert main([str(argument) for argument in arguments]) == 0


def failure(capsys, *arguments):
    """What a command that must fail says."""
    assert main([str(argument) for argument in arguments]) == 2
    return capsys.readouterr().err


def weights(path):
    return load_params(path, read_config(path))


def test_merged_is_base_plus_adapter_and_unmerged_is_the_base_again(folder, tmp_path):
    grpo("lora", "merge", folder / "base", folder / "adapter", tmp_path / "merged")
    base, adapters = weights(folder / "base"), load_adapter(folder / "adapter", CONFIG)
    want = merge(CONFIG, join(adapters, base))
    jax.tree.map(np.testing.assert_array_equal, weights(tmp_path / "merged"), want)
    assert (
        np.abs(
            want["layers_0"]["self_attn"]["q_proj"]["kernel"] - base["layers_0"]["self_attn"]["q_proj"]["kernel"]
        ).max()
        > 0.1
    )
    grpo("lora", "unmerge", tmp_path / "merged", folder / "adapter", tmp_path / "again")
    jax.tree.map(assert_same_bits, weights(tmp_path / "again"), base)
    grpo("lora", "merge", folder / "base", folder / "adapter", tmp_path / "bare", "--no-remainder")
    names = [sorted(file.name for file in (tmp_path / name).iterdir()) for name in ("merged", "bare")]
    assert names[0] == sorted([*names[1], REMAINDER_FILE])
    grpo("lora", "unmerge", tmp_path / "bare", folder / "adapter", tmp_path / "close")
    ulp, differing = np.finfo(np.float32).eps, 0
    for path, leaf in jax.tree_util.tree_leaves_with_path(weights(tmp_path / "close")):
        start, summed = (np.asarray(_at(tree, path)) for tree in (base, want))
        assert (np.abs(leaf - start) <= ulp * np.maximum(np.abs(start), np.abs(summed))).all(), path
        differing += int((leaf != start).sum())
    assert differing  # so the remainder was needed
    assert load_tokenizer(tmp_path / "merged").encode("1+") == load_tokenizer("byte").encode("1+")


def assert_same_bits(left, right):
    assert same_bits(np.asarray(left), np.asarray(right))


@pytest.mark.parametrize(("base", "dtype"), [("base16", "bfloat16"), ("base16", "float32"), ("base", "float16")])
def test_unmerged_is_the_base_bit_for_bit_in_the_dtype_of_the_merged_folder(folder, tmp_path, base, dtype):
    grpo("lora", "merge", folder / base, folder / "adapter", tmp_path / "merged", "--dtype", dtype)
    grpo("lora", "unmerge", tmp_path / "merged", folder / "adapter", tmp_path / "again")
    assert read_config(tmp_path / "again").param_dtype == dtype
    want = jax.tree.map(lambda leaf: leaf.astype(jnp.dtype(dtype)), weights(folder / base))
    jax.tree.map(assert_same_bits, weights(tmp_path / "again"), want)


def test_a_remainder_of_other_weights_another_adapter_or_a_damaged_one_is_refused(folder, tmp_path, capsys):
    grpo("lora", "merge", folder / "base", folder / "adapter", tmp_path / "merged")
    other = LoRAConfig(rank=3, alpha=6.0, targets=("layers_1/mlp/up_proj",))
    narrower = dataclasses.replace(CONFIG, lora=other)
    save_adapter(tmp_path / "narrower", narrower, split(narrower, noisy_params(narrower))[0], None)
    close = jax.tree.map(lambda leaf: leaf * 1.001, split(CONFIG, noisy_params(CONFIG))[0])
    save_adapter(tmp_path / "close", CONFIG, close, None)
    for adapter in ("narrower", "close"):
        said = failure(capsys, "lora", "unmerge", tmp_path / "merged", tmp_path / adapter, tmp_path / "out")
        assert "lora_remainder.npz must be of these weights and this adapter" in said
    shutil.copytree(tmp_path / "merged", tmp_path / "trained")
    config = read_config(tmp_path / "merged")
    changed = weights(tmp_path / "merged")
    kernel = changed["layers_1"]["mlp"]["up_proj"]["kernel"]
    changed["layers_1"]["mlp"]["up_proj"]["kernel"] = kernel + 0.5
    save_folder(tmp_path / "other", config, changed)
    shutil.copy(tmp_path / "other" / "model.safetensors", tmp_path / "trained")
    said = failure(capsys, "lora", "unmerge", tmp_path / "trained", folder / "adapter", tmp_path / "out")
    assert "remove it to subtract without it" in said
    file = tmp_path / "merged" / REMAINDER_FILE
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    said = failure(capsys, "lora", "unmerge", tmp_path / "merged", folder / "adapter", tmp_path / "out")
    assert "cannot be read" in said
    assert not (tmp_path / "out").exists()


def _at(tree, path):
    for part in path:
        tree = tree[part.key]
    return tree


def test_merging_keeps_the_dtype_of_the_base_unless_another_is_named(folder, tmp_path):
    grpo("lora", "merge", folder / "base16", folder / "adapter", tmp_path / "merged")
    assert read_config(tmp_path / "merged").param_dtype == "bfloat16"
    grpo("lora", "merge", folder / "base16", folder / "adapter", tmp_path / "wide", "--dtype", "float32")
    base, wide = weights(folder / "base16"), weights(tmp_path / "wide")
    want = merge(CONFIG, join(load_adapter(folder / "adapter", CONFIG), base))
    jax.tree.map(np.testing.assert_array_equal, wide, want)
    rounded = jax.tree.map(lambda leaf: np.asarray(leaf, np.float32).astype("bfloat16"), want)
    jax.tree.map(np.testing.assert_array_equal, weights(tmp_path / "merged"), rounded)


def test_inspection_gives_settings_and_the_norms_of_each_matrix(folder, capsys):
    grpo("lora", "inspect", folder / "adapter", "--json")
    found = json.loads(capsys.readouterr().out)
    assert (found["rank"], found["alpha"], found["scale"], found["base"]) == (3, 6.0, 2.0, "some/base")
    assert (found["dtype"], len(found["matrices"])) == ("float32", 9)
    tensors = safetensors.numpy.load_file(folder / "adapter" / "adapter_model.safetensors")
    assert found["parameters"] == sum(tensor.size for tensor in tensors.values())
    for matrix in found["matrices"]:
        name = matrix["module"].replace("layers_", "layers.").replace("/", ".")
        a, b = (tensors[f"base_model.model.model.{name}.lora_{x}.weight"].astype(np.float64) for x in "AB")
        assert (matrix["outputs"], matrix["inputs"]) == (b @ a).shape
        got = [matrix[key] for key in ("norm_a", "norm_b", "norm")]
        np.testing.assert_allclose(got, [np.linalg.norm(x) for x in (a, b, 2 * b @ a)], rtol=1e-9)
    grpo("lora", "inspect", folder / "adapter")
    text = capsys.readouterr().out
    assert "rank 3, alpha 6, scale 2" in text
    assert "layers_1/mlp/up_proj" in text


def test_targets_of_an_adapter_are_named_as_shortly_as_they_can_be(folder):
    found = adapter_for(folder / "adapter", CONFIG)
    assert found.targets == ("*/q_proj", "*/k_proj", "*/v_proj", "*/o_proj", "layers_1/mlp/up_proj")


@pytest.fixture(scope="module")
def run(folder) -> pathlib.Path:
    """The adapter as checkpoint 0 of an NNX run."""
    path = folder.parent / f"{folder.name}_run"
    grpo("lora", "convert", folder / "adapter", path, folder / "recipe.yml")
    return path


@pytest.mark.parametrize("flavour", ["pure_nnx=true", "pure_nnx=false"])
def test_an_adapter_becomes_a_run_and_comes_out_of_it_again(folder, run, tmp_path, flavour):
    config = load_config(run / "config.yml", [flavour])
    assert (config.lora.rank, config.lora.alpha, config.lora.adapter) == (3, 6.0, None)
    assert checkpoint_steps(run) == [0]
    jax.tree.map(np.testing.assert_array_equal, load_checkpoint(config, run).params, noisy_params(CONFIG))
    grpo("lora", "convert", run, tmp_path / "back")
    before, after = (
        safetensors.numpy.load_file(path / "adapter_model.safetensors")
        for path in (folder / "adapter", tmp_path / "back")
    )
    assert before.keys() == after.keys()
    assert all((before[name] == after[name]).all() for name in before)
    assert inspect(str(run))["matrices"] == inspect(str(folder / "adapter"))["matrices"]


def test_a_run_is_refused_beside_another_base_and_finds_its_own_under_any_name(folder, run, tmp_path, capsys):
    other, copy = f"model.source={folder / 'base16'}", shutil.copytree(folder / "base", tmp_path / "copy")
    for command in (["sample", run, "--prompt", "1+2=", other], ["eval", run, other]):
        said = failure(capsys, *command)
        assert f"the base of the adapters in {run} must be what they were trained beside, {{'hash': '" in said
        assert "put the old weights back" in said
    trained = load_checkpoint(load_config(run / "config.yml", [f"model.source={copy}"]), run)
    jax.tree.map(np.testing.assert_array_equal, trained.params, noisy_params(CONFIG))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_exported_run_is_unmerged_to_its_base_bit_for_bit(folder, run, tmp_path, dtype):
    grpo("export", run, tmp_path / "merged", "--dtype", dtype)
    grpo("lora", "extract", run, tmp_path / "adapter")
    assert load_tokenizer(tmp_path / "adapter").encode("1+") == load_tokenizer("byte").encode("1+")
    grpo("lora", "unmerge", tmp_path / "merged", tmp_path / "adapter", tmp_path / "base")
    want = jax.tree.map(lambda leaf: leaf.astype(jnp.dtype(dtype)), weights(folder / "base"))
    jax.tree.map(assert_same_bits, weights(tmp_path / "base"), want)


def test_an_export_beside_an_8_bit_base_is_unmerged_to_the_dequantised_base(folder, tmp_path):
    grpo("lora", "convert", folder / "adapter", tmp_path / "run", folder / "recipe.yml", "lora.base_dtype=int8")
    grpo("export", tmp_path / "run", tmp_path / "merged")
    grpo("lora", "extract", tmp_path / "run", tmp_path / "adapter")
    grpo("lora", "unmerge", tmp_path / "merged", tmp_path / "adapter", tmp_path / "base")
    trained = load_checkpoint(load_config(tmp_path / "run" / "config.yml"), tmp_path / "run")
    base = split(trained.policy.config, trained.params)[1]
    assert isinstance(base["layers_0"]["mlp"]["up_proj"]["kernel"], QuantizedArray)
    want = jax.tree.map(
        lambda leaf: to_float64(leaf).astype(np.float32), base, is_leaf=lambda leaf: isinstance(leaf, QuantizedArray)
    )
    jax.tree.map(assert_same_bits, weights(tmp_path / "base"), want)


def test_an_export_may_leave_out_the_remainder_and_a_parameter_only_checkpoint_has_none(run, tmp_path, capsys):
    grpo("export", run, tmp_path / "merged")
    grpo("export", run, tmp_path / "bare", "--no-remainder")
    names = [sorted(file.name for file in (tmp_path / name).iterdir()) for name in ("merged", "bare")]
    assert names[0] == sorted([*names[1], REMAINDER_FILE])
    grpo("export", run, tmp_path / "params", "--format", "params")
    assert not (tmp_path / "params" / REMAINDER_FILE).exists()
    for options in (["--adapter"], ["--format", "params"]):
        said = failure(capsys, "export", run, tmp_path / "out", "--no-remainder", *options)
        assert "--no-remainder must be left out" in said


@pytest.mark.slow
def test_training_goes_on_from_a_converted_adapter_in_the_other_flavour(run, tmp_path):
    copy = shutil.copytree(run, tmp_path / "copy")
    config = load_config(copy / "config.yml", [f"output_dir={copy}", "pure_nnx=false"])
    assert train(config) == copy
    assert [line["step"] for line in read_metrics(copy)] == [1]
    moved, kept = split(CONFIG, load_checkpoint(config, copy).params)
    before, base = split(CONFIG, noisy_params(CONFIG))
    assert all(np.any(a != b) for a, b in zip(jax.tree.leaves(moved), jax.tree.leaves(before), strict=True))
    jax.tree.map(np.testing.assert_array_equal, kept, base)


@pytest.mark.slow
def test_sampling_and_evaluation_beside_a_base_are_those_of_the_merged_model(folder, tmp_path, capsys):
    grpo("lora", "merge", folder / "base", folder / "adapter", tmp_path / "merged")
    settings = ["mesh.num_devices=1", "sampling.max_completion_length=8", "sampling.slots=2"]
    answers = []
    for model in ([folder / "base", "--adapter", folder / "adapter"], [tmp_path / "merged"]):
        capsys.readouterr()
        grpo("sample", *model, "--prompt", "1+2=", "sampling.temperature=0", *settings)
        answers.append(json.loads(capsys.readouterr().out))
    assert answers[0]["token_ids"] == answers[1]["token_ids"]
    np.testing.assert_allclose(answers[0]["logprobs"], answers[1]["logprobs"], atol=1e-4)
    grpo("eval", folder / "recipe.yml", "lora.rank=0", "--adapter", folder / "adapter", "--output", tmp_path / "1")
    # A Hugging Face folder is evaluated with data and rewards from the command line.
    rewards = f"rewards.functions=[{{function: '{REWARDS}:digit_share', name: digits}}]"
    data = ["data.source=arithmetic", "data.args={operation: add, digits: 1}", "data.eval_size=3", rewards]
    grpo("eval", tmp_path / "merged", *data, *settings, "--output", tmp_path / "2")
    assert (tmp_path / "1").read_text() == (tmp_path / "2").read_text()
    assert "on 3 prompts" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["lora", "merge", "base", "other", "new"], "must fit the model, a qwen2 of 2 layers, got 4 matrices"),
        (["lora", "merge", "base", "adapter", "base16"], "must be new or empty"),
        (["lora", "unmerge", "base", "adapter", "base16"], "must be new or empty"),
        (["lora", "merge", "base", "base", "new"], "adapter_config.json must exist"),
        (["lora", "merge", "base", "adapter", "new", "lora.rank=5"], "lora.rank must be that of the adapter"),
        (["lora", "convert", "adapter", "new"], "only with a RECIPE"),
        (["lora", "convert", "adapter", "base", "recipe.yml"], "must be new or empty"),
        (["lora", "convert", "other", "new", "recipe.yml"], "must fit the model"),
        (["lora", "extract", "base", "new"], "must be a run folder"),
        (["lora", "inspect", "base"], "adapter_config.json must exist"),
        (["lora", "inspect", "adapter", "--step", "1"], "--step needs a run folder"),
        (["lora", "melt", "base"], "needs one of extract, merge"),
        (["sample", "base", "--adapter", "other", "--prompt", "a"], "must fit the model"),
        (["eval", "recipe.yml", "--adapter", "adapter"], "lora.rank=0 takes rank, alpha and targets"),
    ],
)
def test_what_does_not_fit_is_refused(folder, capsys, monkeypatch, arguments, message):
    monkeypatch.chdir(folder)
    assert message in failure(capsys, *arguments)
    assert not (folder / "new").exists()
    assert sorted(path.name for path in folder.iterdir()) == ["adapter", "base", "base16", "other", "recipe.yml"]


@pytest.mark.parametrize("source", ["tunix:base", "own.yml"])
@pytest.mark.parametrize(
    "arguments",
    [
        ["sample", "MODEL", "--adapter", "adapter", "--prompt", "a"],
        ["eval", "MODEL", "--adapter", "adapter"],
        ["train", "RECIPE", "lora.adapter=adapter", "lora.base_dtype=int8"],
        ["quantize", "MODEL", "new", "lora.adapter=adapter"],
        ["lora", "merge", "MODEL", "adapter", "new"],
        ["lora", "unmerge", "MODEL", "adapter", "new"],
        ["lora", "convert", "adapter", "new", "RECIPE"],
    ],
)
def test_an_adapter_is_refused_where_the_model_is_not_the_toolkits_own_decoder(
    folder, tmp_path, capsys, monkeypatch, source, arguments
):
    monkeypatch.chdir(tmp_path)
    for name in ("base", "adapter"):
        (tmp_path / name).symlink_to(folder / name)
    model = source if source.startswith("tunix:") else f"{GPT}:build"
    (tmp_path / "own.yml").write_text(f"model: {{source: '{model}'}}\n")
    names = {"MODEL": source, "RECIPE": "own.yml"}
    said = failure(capsys, *(names.get(argument, argument) for argument in arguments))
    assert f"lora.adapter must be null with model.source {model!r}, got 'adapter'" in said
    assert not (tmp_path / "new").exists()
