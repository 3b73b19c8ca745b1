"""The recipes of examples/: each runs two steps as it stands, but for a tiny model and data that lie beside the tests.

Commands are those of the recipes' README files, in this process and from the checkout, as the paths in the recipes say.
"""

import json

import pytest

from rl.config.load import load_config
from rl.grpo_trainer import train
from rl.run.metrics import read_metrics, read_samples
from rl.tools.rewards import check
from tests.helpers.places import ROOT

# As few shapes as the prompts allow, so that most programs are compiled for one recipe only.
ARCH = (
    "family: qwen3, hidden_size: 16, intermediate_size: 24, num_layers: 1, num_heads: 2, num_kv_heads: 1, head_dim: 8"
)
TINY = [
    "model.source=null",
    "tokenizer.source=byte",
    f"model.arch={{{ARCH}}}",
    "mesh.num_devices=1",
    "sampling.slots=4",
    "sampling.max_completion_length=8",
    "optimizer.warmup_updates=0",
    "eval.max_prompts=2",
]
STEPS = ["grpo.steps=2", "grpo.prompts_per_step=2", "grpo.group_size=2", "eval.every=2", "logging.samples_per_step=4"]


@pytest.fixture(autouse=True)
def _in_the_checkout(monkeypatch):
    monkeypatch.chdir(ROOT)


def two_steps(recipe, folder, *overrides):
    """Runs the recipe. Returns the lines of its metrics and samples, after checking what holds for every recipe."""
    settings = [*TINY, *STEPS, f"output_dir={folder}", *overrides]
    checked = check(f"examples/{recipe}", 2, overrides=settings)
    assert checked.verdict is None, checked.verdict
    run = train(load_config(f"examples/{recipe}", settings))
    lines, samples = read_metrics(run), read_samples(run)
    assert [line["step"] for line in lines][-2:] == [1, 2]
    assert len(samples) == 8
    return lines, samples


def test_custom_reward_in_both_flavours(tmp_path):
    from examples.custom_reward.reward import speakable

    runs = [two_steps("custom_reward/grpo.yml", tmp_path / flag, f"pure_nnx={flag}") for flag in ("true", "false")]
    assert runs[0][1] == runs[1][1]
    for sample in runs[0][1]:
        assert sample["rewards"] == {"speakable": speakable(sample["prompt"], sample["completion"])}
    rows = [json.loads(line) for line in (ROOT / "examples/custom_reward/letters.jsonl").read_text().splitlines()]
    assert {speakable(row["prompt"], row["answer"]) for row in rows} == {1.0}
