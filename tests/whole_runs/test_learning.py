"""Promise 6: it learns, in both flavours, and not when the signal is taken away or turned round. It learns over several
turns, too: the recipes `calculator` and `guess_the_number`, smaller.
"""

import pathlib

import pytest

from rl import sft_trainer
from rl.config.load import load_config
from rl.grpo_trainer import train
from rl.run.metrics import read_metrics
from tests.helpers.places import REWARDS, ROOT

DIGITS = f"{{function: '{REWARDS}:digit_share', name: digits, weight: %s}}"
CONSTANT = f"{{function: '{REWARDS}:constant', name: constant, weight: 1.0}}"

RECIPE = """
model:
  arch:
    {family: qwen3, hidden_size: 32, intermediate_size: 64, num_layers: 1,
     num_heads: 2, num_kv_heads: 1, head_dim: 16}
data: {source: arithmetic, args: {operation: add, digits: 1}, max_prompt_length: 8}
sampling: {max_completion_length: 8}
grpo: {steps: 30, prompts_per_step: 8, group_size: 8, max_tokens_per_microbatch: 1024}
optimizer: {lr: 1e-2}
eval: {every: 0}
mesh: {num_devices: 1}
checkpoint: {every: 1000}
"""


def last_reward(folder: pathlib.Path, functions: str, pure_nnx: bool) -> float:
    recipe = folder / "recipe.yml"
    recipe.write_text(RECIPE)
    config = load_config(
        recipe, [f"output_dir={folder / 'run'}", f"rewards.functions=[{functions}]", f"pure_nnx={pure_nnx}".lower()]
    )
    metrics = read_metrics(train(config))
    return sum(line["reward/digits/mean"] for line in metrics[-5:]) / 5


@pytest.mark.parametrize("pure_nnx", [True, False])
def test_reward_reaches_the_threshold(tmp_path, pure_nnx):
    assert last_reward(tmp_path, DIGITS % "1.0", pure_nnx) > 0.6


def test_reward_stays_low_when_advantages_are_zero(tmp_path):
    assert last_reward(tmp_path, f"{DIGITS % '0.0'}, {CONSTANT}", True) < 0.1


def test_reward_vanishes_when_advantages_are_negated(tmp_path):
    assert last_reward(tmp_path, DIGITS % "-1.0", True) < 0.04


def imitate(recipe: str, folder: pathlib.Path, *settings: str) -> list[str]:
    """Runs the warm start of a recipe. Returns settings for what follows: without evaluations and checkpoints."""
    run = sft_trainer.train(load_config(f"examples/{recipe}/sft.yml", [f"output_dir={folder / 'sft'}", *settings]))
    return [f"model.source={run / 'export'}", f"output_dir={folder / 'run'}", "eval.every=0", "checkpoint.every=1000"]


def mean_of(lines: list[dict], name: str) -> float:
    return sum(line[name] for line in lines) / len(lines)


@pytest.mark.slow
def test_guesses_become_fewer_where_each_costs(tmp_path, monkeypatch):
    """With zeroed advantages (rollout.environment_weight=0 and a constant reward) they stay as many: docs/LOG.md."""
    monkeypatch.chdir(ROOT)
    settings = [*imitate("guess_the_number", tmp_path, "mesh.num_devices=1"), "mesh.num_devices=1", "grpo.steps=14"]
    lines = read_metrics(train(load_config("examples/guess_the_number/grpo.yml", settings)))
    assert mean_of(lines[-4:], "turns/mean") < mean_of(lines[:2], "turns/mean") - 0.25
    assert mean_of(lines[-4:], "reward/environment/mean") > mean_of(lines[:2], "reward/environment/mean") + 0.1
