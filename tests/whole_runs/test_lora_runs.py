"""Whole runs with adapters: both flavours alike, resumed or not, sampler and trainer in agreement, and they learn."""

import json

import jax
import numpy as np
import pytest

from rl.config.load import load_config
from rl.grpo_trainer import train
from rl.models.config import LORA_A, LORA_B
from rl.models.files.hf import load_params, read_config
from rl.models.files.peft import load_adapter
from rl.models.inputs import plain_inputs
from rl.models.lora import split
from rl.run.metrics import read_metrics, read_samples
from rl.tools.checkpoints.export import export, export_adapter
from rl.tools.trained import load_checkpoint
from tests.whole_runs.test_learning import DIGITS, RECIPE
from tests.whole_runs.test_parity import Runs, Start, final_arrays, stable_metrics

STEPS = 6
SETTINGS = (
    "lora.rank=4",
    "lora.targets=['*_proj']",
    "lora.base_dtype=int8",
    "optimizer.lr=2e-2",
    f"grpo.steps={STEPS}",
    "checkpoint.every=3",
    "eval.every=3",
)
# Of whole weights tests/whole_runs/test_parity.py runs optimised programs.
UNOPTIMIZED = "--xla_backend_optimization_level=0"


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Runs:
    return Runs(tmp_path_factory.mktemp("lora"))


@pytest.fixture(scope="module")
def whole(runs):
    """An uninterrupted run in each flavour."""
    flavours = ("nnx", "linen")
    starts = [Start(flavour, flavour, SETTINGS) for flavour in flavours]
    return dict(zip(flavours, runs.run(*starts, XLA_FLAGS=UNOPTIMIZED), strict=True))


def assert_same_run(left, right):
    assert stable_metrics(left) == stable_metrics(right)
    assert read_samples(left) == read_samples(right)
    arrays, others = final_arrays(left, STEPS), final_arrays(right, STEPS)
    assert arrays.keys() == others.keys()
    for path, array in arrays.items():
        assert array.dtype == others[path].dtype, path
        np.testing.assert_array_equal(array, others[path], err_msg=path)


@pytest.mark.slow
def test_linen_and_nnx_runs_are_equal_bit_for_bit(whole):
    assert_same_run(whole["nnx"], whole["linen"])
    lines = read_metrics(whole["nnx"])[1:]
    assert all(line["grad_norm"] > 0 and line["reward/std"] > 0 for line in lines)
    assert lines[-1]["kl"] > 1e-3
    early, late = final_arrays(whole["nnx"], 3), final_arrays(whole["nnx"], STEPS)
    weights = [path for path in late if path.startswith("['params']")]
    assert len(weights) == 7 * 2
    assert all(np.abs(late[path] - early[path]).max() > 0 for path in weights)


@pytest.mark.slow
def test_sampler_and_trainer_agree_at_every_step(whole):
    lines = read_metrics(whole["nnx"])[1:]
    assert max(line["logprob_difference/mean"] for line in lines) <= 1e-6
    assert 0 < max(line["logprob_difference/max"] for line in lines) <= 1e-4


@pytest.mark.slow
def test_checkpoints_hold_adapters_and_their_settings_only(whole):
    paths = final_arrays(whole["nnx"], STEPS)
    assert all(LORA_A in path or LORA_B in path for path in paths if "_proj" in path or path.startswith("['params']"))
    assert not any("embed_tokens" in path or "kernel" in path for path in paths)
    loop = json.loads((whole["nnx"] / "checkpoints" / str(STEPS) / "loop" / "metadata").read_text())
    assert (loop["adapter"]["rank"], loop["adapter"]["base_dtype"]) == (4, "int8")


@pytest.mark.slow
def test_a_run_resumed_in_the_other_flavour_equals_the_uninterrupted_one(runs, whole):
    parts = (("linen", 3), ("nnx", STEPS))
    starts = [Start("mixed", flavour, (*SETTINGS, f"grpo.steps={steps}")) for flavour, steps in parts]
    assert_same_run(runs.run(*starts, XLA_FLAGS=UNOPTIMIZED)[-1], whole["linen"])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("settings", "changed"),
    [
        (["lora.alpha=16"], r"lora\.alpha was 32\.0, is 16\.0"),
        (["lora.rank=2"], r"lora\.rank was 4, is 2"),
        (["lora.targets=['*_proj', '*/q_proj']"], r"lora\.targets was \['\*_proj'\], is \['\*_proj', '\*/q_proj'\]"),
        (["lora.rank=0", "lora.base_dtype=null"], r"lora\.base_dtype was 'int8', is None"),
    ],
)
def test_other_adapter_settings_are_another_run(runs, whole, settings, changed):
    config = load_config(whole["nnx"] / "config.yml", settings)
    with pytest.raises(ValueError, match=changed):
        train(config)
    # A reader of the folder, which compares no recipes, is refused by the checkpoint itself.
    with pytest.raises(ValueError, match="must have this run's settings"):
        load_checkpoint(config, whole["nnx"])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("pure_nnx", "base"),
    [
        pytest.param(True, [], marks=pytest.mark.long),  # easier, and the flavours are equal, as above
        (False, ["lora.base_dtype=int4", "lora.base_group_size=16"]),
    ],
)
def test_adapters_learn_beside_frozen_random_weights(tmp_path, pure_nnx, base):
    recipe = tmp_path / "recipe.yml"
    recipe.write_text(RECIPE)
    # Weights large enough for a frozen head to say something.
    settings = ["lora.rank=8", "model.arch.initializer_range=0.2", "grpo.beta=0.005", f"pure_nnx={pure_nnx}".lower()]
    functions = f"rewards.functions=[{DIGITS % '1.0'}]"
    config = load_config(recipe, [f"output_dir={tmp_path / 'run'}", functions, *settings, *base])
    folder = train(config)
    metrics = read_metrics(folder)
    assert sum(line["reward/digits/mean"] for line in metrics[-5:]) / 5 > 0.5
    trained = load_checkpoint(config, folder)
    assert all(
        np.any(leaf) for leaf in split(trained.policy.config, trained.params)[0]["layers_0"]["mlp"]["up_proj"].values()
    )


@pytest.mark.slow
def test_exported_adapter_and_merged_folder_are_the_trained_policy(whole, tmp_path):
    step = export_adapter(whole["nnx"], tmp_path / "adapter")
    assert step == export(whole["nnx"], tmp_path / "merged") == STEPS
    trained = load_checkpoint(load_config(whole["nnx"] / "config.yml"), whole["nnx"])
    config = trained.policy.config
    back = load_adapter(tmp_path / "adapter", config)
    jax.tree.map(np.testing.assert_array_equal, back, split(config, trained.params)[0])
    merged = load_params(tmp_path / "merged", read_config(tmp_path / "merged"))
    inputs = plain_inputs(np.arange(12).reshape(2, 6))
    got = jax.jit(trained.policy.without_adapters().hidden)(merged, inputs)
    want = jax.jit(trained.policy.hidden)(trained.params, inputs)
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-4)
