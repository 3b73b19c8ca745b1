"""Promise 6: it learns, in both flavours, and not when the signal is taken away or turned round. It learns over several
turns, too: the recipes `calculator` and `guess_the_number`, smaller.
"""

import os
import pathlib
import subprocess
import sys

import pytest

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


def learned(folder: pathlib.Path, recipe: str, *settings: str) -> tuple[list[dict], list[dict]]:
    """The first and the last metrics of GRPO as in a recipe, but short. It starts from what `grpo sft` of the recipe
    wrote, stored in bfloat16 under tests/files/warm_starts. In a process of its own, because the programs of the tests'
    process are compiled without optimisation, and take twice as long.
    """
    start = [f"model.source={ROOT / 'tests/files/warm_starts' / recipe}", f"output_dir={folder / 'run'}"]
    short = ["grpo.steps=14", "eval.every=0", "checkpoint.every=1000", "mesh.num_devices=1"]
    command = [sys.executable, "-m", "rl.cli", "train", f"examples/{recipe}/grpo.yml", *start, *short, *settings]
    subprocess.run(command, cwd=ROOT, env={**os.environ, "XLA_FLAGS": ""}, check=True, stdout=subprocess.DEVNULL)
    lines = read_metrics(folder / "run")
    return lines[:3], lines[-4:]


def mean_of(lines: list[dict], name: str) -> float:
    return sum(line[name] for line in lines) / len(lines)


@pytest.mark.parametrize("judged", [True, pytest.param(False, marks=pytest.mark.long)])
@pytest.mark.slow
def test_a_tool_is_called_where_answers_alone_are_mostly_wrong(tmp_path, judged):
    """Without a signal (the reward counts nothing, a constant all) calls stay as rare."""
    functions = (
        f"[{{function: 'rewards.number:exact_number_strict', name: exact, weight: {float(judged)}}}, {CONSTANT}]"
    )
    small = ["data.args.size=2000", "data.eval_size=0", "grpo.prompts_per_step=16", "sampling.temperature=0.8"]
    first, last = learned(tmp_path, "calculator", *small, f"rewards.functions={functions}")
    more_calls = mean_of(last, "tool_calls/mean") > mean_of(first, "tool_calls/mean") + 0.3
    more_right = mean_of(last, "reward/exact/mean") > mean_of(first, "reward/exact/mean") + 0.1
    assert (more_calls, more_right) == (judged, judged)


@pytest.mark.parametrize("judged", [True, pytest.param(False, marks=pytest.mark.long)])
@pytest.mark.slow
def test_guesses_become_fewer_where_each_costs(tmp_path, judged):
    """Without a signal (the game's reward counts nothing, a constant all) they stay as many."""
    signal = [f"rollout.environment_weight={float(judged)}", f"rewards.functions=[{CONSTANT}]"]
    first, last = learned(tmp_path, "guess_the_number", *signal)
    fewer_turns = mean_of(last, "turns/mean") < mean_of(first, "turns/mean") - 0.2
    more_reward = mean_of(last, "reward/environment/mean") > mean_of(first, "reward/environment/mean") + 0.08
    assert (fewer_turns, more_reward) == (judged, judged)
