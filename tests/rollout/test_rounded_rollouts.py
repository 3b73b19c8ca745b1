"""Training on completions drawn with rounded weights and a rounded cache: the mismatch is shown and corrected for; and
what a rollout keeps of a common prefix is gone before the policy is updated.
"""

import weakref

import pytest

from rl.config.load import load_config
from rl.grpo_trainer import train
from rl.run.metrics import read_metrics
from rl.sampler.slot_sampler import Sampler
from rl.training.update import Updater
from tests.helpers.places import REWARDS

RECIPE = f"""
model:
  arch:
    {{family: llama, hidden_size: 16, intermediate_size: 24, num_layers: 1, num_heads: 2, num_kv_heads: 1, head_dim: 8,
      initializer_range: 0.4}}
data:
  {{source: arithmetic, args: {{operation: add, digits: 1}}, max_prompt_length: 120, system_prompt: "{"Add. " * 20}"}}
rewards: {{functions: [{{function: "{REWARDS}:low_characters", name: low}}]}}
sampling: {{max_completion_length: 6, slots: 8}}
grpo: {{steps: 2, prompts_per_step: 4, group_size: 3, max_tokens_per_microbatch: 256, sampler_is_correction: true}}
optimizer: {{lr: 1e-3}}
eval: {{every: 0}}
mesh: {{num_devices: 1}}
"""


@pytest.mark.parametrize("pure_nnx", [True, False])
def test_rounded_rollouts_are_corrected_for_and_leave_no_prefix_in_memory(pure_nnx, tmp_path, monkeypatch):
    prefixes, alive_in_updates = [], []
    prefill_common, update = Sampler._prefill_common, Updater.update

    def recorded(*arguments):
        part = prefill_common(*arguments)
        prefixes.append(weakref.ref(part))
        return part

    def watched(*arguments, **options):
        alive_in_updates.append(sum(prefix() is not None for prefix in prefixes))
        return update(*arguments, **options)

    monkeypatch.setattr(Sampler, "_prefill_common", recorded)
    monkeypatch.setattr(Updater, "update", watched)
    path = tmp_path / "recipe.yml"
    path.write_text(RECIPE)

    def run(name, *overrides):
        flavour = f"pure_nnx={pure_nnx}".lower()
        return read_metrics(train(load_config(path, [f"output_dir={tmp_path / name}", flavour, *overrides])))

    exact = run("exact")
    rounded = run("rounded", "sampling.kv_dtype=int8", "sampling.weight_dtype=int8")
    assert len(exact) == len(rounded) == 2
    for line in exact:
        assert line["drawn_difference/max"] < 1e-5
        assert line["sampler_ratio/max"] == pytest.approx(1, abs=1e-4)
    for line in rounded:
        assert 1e-5 < line["drawn_difference/mean"] < 0.2
        assert line["sampler_ratio/min"] < 1 - 1e-4
    assert len(prefixes) == 4
    assert alive_in_updates == [0] * 4
