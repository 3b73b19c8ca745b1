"""Promises 1 and 2 over whole runs, in processes of their own: Linen == NNX bit for bit, sampler == trainer."""

import json
import os
import pathlib
import subprocess
import sys
from typing import NamedTuple

import numpy as np
import pytest

from rl.run.metrics import read_metrics, read_samples
from tests.helpers.metric_lines import steady
from tests.helpers.places import REWARDS, ROOT

STEPS = 12
# Four updates per step, all parts of the loss at work over the ids that could be drawn, and evaluation in between. The
# schedule does not depend on grpo.steps, so that a run may be stopped early by it.
RECIPE = f"""
model:
  arch:
    {{family: qwen3, hidden_size: 32, intermediate_size: 48, num_layers: 1, num_heads: 2, num_kv_heads: 1, head_dim: 8}}
data: {{source: arithmetic, args: {{operation: add, digits: 1}}, eval_size: 10, max_prompt_length: 8}}
rewards:
  functions: [{{function: "{REWARDS}:digit_share", name: digits}}]
sampling: {{temperature: 0.9, top_p: 0.9, logit_bias: {{50: 2.0}}, min_completion_length: 2, max_completion_length: 8}}
grpo:
  steps: {STEPS}
  prompts_per_step: 4
  group_size: 4
  minibatches: 2
  epochs: 2
  max_tokens_per_microbatch: 128
  policy_distribution: sampled
  sampler_is_correction: true
  entropy_coef: 0.001
optimizer: {{lr: 3e-3, warmup_updates: 5}}
eval: {{every: 4}}
checkpoint: {{every: 4}}
"""
# Several starts in one process, which imports everything once: a list of arguments for each.
STARTS = """
import json, sys
from rl.grpo_trainer import main
for arguments in json.loads(sys.argv[1]):
    main(arguments)
"""
# A layer of one twin is replaced before the program starts; nothing else of it changes.
PATCHED_STARTS = f"""
from rl.models import nnx_model
original = nnx_model.MLP.__call__
nnx_model.MLP.__call__ = lambda self, x_BTD: 0.5 * original(self, x_BTD)
{STARTS}"""


class Start(NamedTuple):
    """A start of the run called `name`, which is made, or gone on with."""

    name: str
    flavour: str
    overrides: tuple[str, ...] = ()


class Runs:
    """Starts runs of the recipe below one folder, one at a time, for all share a cache of compiled programs. It gives a
    run of one flavour a program of the other only where both flavours say the same to the compiler.
    """

    def __init__(self, folder: pathlib.Path):
        self.folder = folder
        self.recipe = folder / "recipe.yml"
        self.recipe.write_text(RECIPE)

    def arguments(self, start: Start) -> list[str]:
        """What the command is given: the recipe and the overrides."""
        settings = (
            f"output_dir={self.folder / start.name}",
            f"pure_nnx={'true' if start.flavour == 'nnx' else 'false'}",
            f"logging.compilation_cache={self.folder / 'cache'}",
        )
        return [str(self.recipe), *settings, *start.overrides]

    def run(self, *starts: Start, program: str = STARTS, **environment: str) -> list[pathlib.Path]:
        """The folders of the starts, one after another in a process of their own."""
        command = [sys.executable, "-c", program, json.dumps([self.arguments(start) for start in starts])]
        environment = {**os.environ, "XLA_FLAGS": "", "JAX_PLATFORMS": "cpu", **environment}
        subprocess.run(command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, check=True)
        return [self.folder / start.name for start in starts]


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Runs:
    return Runs(tmp_path_factory.mktemp("parity"))


@pytest.fixture(scope="module")
def whole(runs) -> dict[str, pathlib.Path]:
    """An uninterrupted run in each flavour."""
    flavours = ("nnx", "linen")
    return dict(zip(flavours, runs.run(*(Start(flavour, flavour) for flavour in flavours)), strict=True))


def stable_metrics(folder: pathlib.Path) -> list[dict]:
    return [steady(line) for line in read_metrics(folder)]


def final_arrays(folder: pathlib.Path, step: int = STEPS) -> dict[str, np.ndarray]:
    """Every array of a checkpoint by path: weights, moments, step, rng."""
    import jax
    import orbax.checkpoint as ocp

    with jax.enable_x64(True):  # so that what was written in 64 bits is read in 64 bits
        tree = ocp.StandardCheckpointer().restore((folder / "checkpoints" / str(step) / "state").absolute())
    return {jax.tree_util.keystr(p): np.asarray(leaf) for p, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def assert_same_run(left: pathlib.Path, right: pathlib.Path) -> None:
    assert stable_metrics(left) == stable_metrics(right)
    assert read_samples(left) == read_samples(right)
    arrays, others = final_arrays(left), final_arrays(right)
    assert arrays.keys() == others.keys()
    for path, array in arrays.items():
        assert array.dtype == others[path].dtype, path
        np.testing.assert_array_equal(array, others[path], err_msg=path)


@pytest.mark.slow
def test_linen_and_nnx_runs_are_equal_bit_for_bit(whole):
    assert_same_run(whole["nnx"], whole["linen"])


@pytest.mark.slow
def test_the_compared_run_is_worth_comparing(whole):
    """It moves: rewards, KL, clipped ratios, entropy and weights all change, so that equality says something."""
    lines = read_metrics(whole["nnx"])
    assert [line["step"] for line in lines] == list(range(STEPS + 1))
    assert [line["step"] for line in lines if "eval/accuracy" in line] == [0, 4, 8, 12]
    steps = lines[1:]
    assert all(line["grad_norm"] > 0 and line["reward/std"] > 0 for line in steps)
    assert steps[-1]["kl"] > 1e-3
    assert max(line["ratio/max"] for line in steps) > 1.05
    assert max(line["clip_ratio/region_mean"] for line in steps) > 0
    assert steps[-1]["entropy"] != steps[0]["entropy"]
    early, late = final_arrays(whole["nnx"], 8), final_arrays(whole["nnx"])
    assert int(early["['step']"]) == 8 * 4
    weights = [path for path in late if path.startswith("['params']")]
    assert len(weights) > 10
    assert all(np.abs(late[path] - early[path]).max() > 0 for path in weights)


@pytest.mark.slow
def test_a_run_resumed_in_the_other_flavour_and_back_equals_the_uninterrupted_one(runs, whole):
    parts = (("linen", 4), ("nnx", 8), ("linen", STEPS))
    folder = runs.run(*(Start("mixed", flavour, (f"grpo.steps={steps}",)) for flavour, steps in parts))[-1]
    loops = [folder / "checkpoints" / str(step) / "loop" / "metadata" for step in (8, STEPS)]
    assert [json.loads(path.read_text())["flavour"] for path in loops] == ["nnx", "linen"]
    assert_same_run(folder, whole["linen"])


@pytest.mark.slow
@pytest.mark.parametrize("flavour", ["nnx", "linen"])
def test_sampler_and_trainer_agree_at_every_step(whole, flavour):
    steps = read_metrics(whole[flavour])[1:]
    assert len(steps) == STEPS
    assert max(line["logprob_difference/mean"] for line in steps) <= 1e-6
    assert max(line["logprob_difference/max"] for line in steps) <= 1e-4
    assert max(line["logprob_difference/max"] for line in steps) > 0  # two programs, not one number twice
    # Old log-probs, those of the policy before the step, are over the ids that the sampler drew from.
    assert max(abs(line["sampler_ratio/raw_mean"] - 1) for line in steps) <= 1e-5
    assert max(line["sampler_ratio/cut_share"] for line in steps) == 0


@pytest.mark.slow
def test_sampler_and_trainer_agree_to_ten_digits_in_float64(runs):
    settings = ("model.dtype=float64", "model.param_dtype=float64", "grpo.steps=3", "checkpoint.every=3")
    settings += ("eval.every=0", "grpo.epochs=1")
    unoptimized = "--xla_backend_optimization_level=0"
    (folder,) = runs.run(Start("double", "nnx", settings), JAX_ENABLE_X64="1", XLA_FLAGS=unoptimized)
    assert max(line["logprob_difference/max"] for line in read_metrics(folder)[1:]) <= 1e-10
    weights = {path: array for path, array in final_arrays(folder, 3).items() if path.startswith("['params']")}
    assert {array.dtype for array in weights.values()} == {np.dtype("float64")}


@pytest.mark.slow
def test_replacing_a_layer_of_the_nnx_twin_changes_the_nnx_run_only(runs, whole):
    settings = ("grpo.steps=2", "eval.every=0")
    starts = [Start(f"patched_{flavour}", flavour, settings) for flavour in ("nnx", "linen")]
    nnx, linen = map(stable_metrics, runs.run(*starts, program=PATCHED_STARTS))
    original = stable_metrics(whole["linen"])[1:3]
    assert linen == original
    for line, other in zip(nnx, original, strict=True):
        assert line.keys() == other.keys()
        assert line["grad_norm"] != other["grad_norm"]
        assert line["entropy"] != other["entropy"]
