"""Every preset trains as a user starts it: `grpo train`, on a tiny policy, with the advantages of its paper.

Shapes: P prompts, G completions per prompt, K reward functions.
"""

import functools
from collections.abc import Callable

import jax.numpy as jnp
import numpy as np
import pytest

from rl.cli import main
from rl.run.metrics import read_metrics, read_samples
from rl.run_folder.folder import read_run
from rl.state import reference_sync
from rl.training.update import Updater
from tests.helpers.metric_lines import without_entry
from tests.helpers.places import REWARDS, ROOT

PRESETS = sorted(path.stem for path in (ROOT / "configs" / "presets").glob("*.yml"))
STEPS, P, G = 2, 4, 4
RECIPE = f"""
model:
  arch:
    {{family: llama, hidden_size: 16, intermediate_size: 24, num_layers: 1, num_heads: 2, num_kv_heads: 1, head_dim: 8}}
data: {{source: arithmetic, args: {{operation: add, digits: 1}}, max_prompt_length: 8}}
rewards:
  functions:
    - {{function: "{REWARDS}:low_characters", name: low}}
    - {{function: "{REWARDS}:digit_share", name: digits, weight: 0.5}}
sampling: {{max_completion_length: 5, slots: 8, eos_ids: {list(range(60, 120))}}}
grpo: {{steps: {STEPS}, prompts_per_step: {P}, group_size: {G}, minibatches: 2, max_tokens_per_microbatch: 64}}
optimizer: {{lr: 1e-2}}
eval: {{every: 0}}
mesh: {{num_devices: 1}}
logging: {{samples_per_step: {P * G}}}
"""


def standardised(values: np.ndarray, axis: int | None) -> np.ndarray:
    """(x - mean) / (deviation + 1e-4) along an axis, or over all."""
    spread = np.std(values, axis=axis, ddof=1, keepdims=True)
    return (values - np.mean(values, axis=axis, keepdims=True)) / (spread + 1e-4)


def weighted(rewards_PGK: np.ndarray, weights_K: np.ndarray) -> np.ndarray:
    return rewards_PGK @ weights_K


def of_group(rewards_PGK, weights_K):
    return standardised(weighted(rewards_PGK, weights_K), 1)


def centred(rewards_PGK, weights_K):
    scores_PG = weighted(rewards_PGK, weights_K)
    return scores_PG - scores_PG.mean(axis=1, keepdims=True)


def over_mean(rewards_PGK, weights_K):
    return centred(rewards_PGK, weights_K) / (weighted(rewards_PGK, weights_K).mean(axis=1, keepdims=True) + 1e-6)


def minus_mean_of_others(rewards_PGK, weights_K):
    scores_PG = weighted(rewards_PGK, weights_K)
    return scores_PG - (scores_PG.sum(axis=1, keepdims=True) - scores_PG) / (G - 1)


def of_batch(rewards_PGK, weights_K):
    return standardised(weighted(rewards_PGK, weights_K), None)


def centred_then_of_batch(rewards_PGK, weights_K):
    return standardised(centred(rewards_PGK, weights_K), None)


def each_of_group_then_of_batch(rewards_PGK, weights_K):
    return standardised(weighted(standardised(rewards_PGK, 1), weights_K), None)


# Where it is not the reward's distance to the mean of its group, in deviations of the group.
ADVANTAGES: dict[str, Callable] = {
    "dr_grpo": centred,
    "rloo": minus_mean_of_others,
    "maxrl": over_mean,
    "reinforce++": of_batch,
    "reinforce++_baseline": centred_then_of_batch,
    "gdpo": each_of_group_then_of_batch,
}
# Metrics that only runs with this part of the loss have.
OWN_METRICS = {
    "adaptive_entropy": {"entropy_coef", "selected_entropy"},
    "cispo": {"cispo/clip_ratio"},
    "dapo_full": {"dynamic_sampling/refilled", "reward/overlong/mean"},
    "dppo_kl": {"dppo/masked_share"},
    "dppo_tv": {"dppo/masked_share"},
    "gmpo": {"gmpo/clip_ratio"},
    "positive_nll": {"positive_nll"},
}
# So that what a preset does after many steps is done in two.
CHANGES = {"adaptive_entropy": ["grpo.entropy_target=99"], "tr_grpo": ["reference.sync_every=1"]}
WITH_REFERENCE = {"gdpo", "grpo", "reinforce++", "reinforce++_baseline", "rloo", "tr_grpo"}


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_trains_with_the_advantages_and_parts_of_its_paper(name, tmp_path, monkeypatch, capsys):
    recipe = tmp_path / "recipe.yml"
    recipe.write_text(RECIPE)
    flavour = f"pure_nnx={PRESETS.index(name) % 2 == 0}".lower()
    settings = [f"output_dir={tmp_path / 'run'}", f"grpo.preset={name}", flavour]
    settings += CHANGES.get(name, [])
    update, build = Updater.update, reference_sync.setup_decode_state
    references = []

    def recorded(*arguments):
        """The reference, counted."""
        references.append(arguments)
        return build(*arguments)

    @functools.wraps(update)
    def guarded(*arguments, **options):
        """An update, in which a transfer that nobody asked for raises."""
        assert (arguments[2] is not None) == (name in WITH_REFERENCE)
        with pytest.raises(Exception, match="Disallowed host-to-device transfer"):
            jnp.add(np.ones(2, np.float32), np.float32(1))
        return update(*arguments, **options)

    monkeypatch.setattr(Updater, "update", guarded)
    monkeypatch.setattr(reference_sync, "setup_decode_state", recorded)
    assert not main(["train", str(recipe), *settings])
    told = capsys.readouterr().out
    assert f"preset {name}" in told
    assert "xla attention" in told
    lines, samples = read_metrics(tmp_path / "run"), read_samples(tmp_path / "run")
    assert [line["step"] for line in lines] == [1, 2]
    assert len(references) == (name in WITH_REFERENCE)
    for line in lines:
        assert not without_entry(line)
        assert line["skipped_updates"] == 0
        assert line["grad_norm"] > 0
        assert np.isfinite(line["loss"])
        assert ("kl" in line) == (name in WITH_REFERENCE)
        assert line["logprob_difference/mean"] < 1e-5  # where there is no kl, `rl.run.health` watches it
        assert line["masked_share"] == pytest.approx(line["truncated_share"] if name == "dapo" else 0.0)
        own = set().union(*OWN_METRICS.values())
        assert own & line.keys() == OWN_METRICS.get(name, set())
    assert (tmp_path / "run" / "checkpoints" / "2" / "reference").exists() == (name == "tr_grpo")
    if name == "adaptive_entropy":
        # Two updates a step, each of which raises it.
        assert [line["entropy_coef"] for line in lines] == pytest.approx([0.01, 0.02])
    config = read_run(tmp_path / "run")[0]
    weights_K = np.array([1.0, 0.5] + [config.rewards.overlong_factor] * (name == "dapo_full"))
    for step in (1, 2):
        drawn = sorted((s for s in samples if s["step"] == step), key=lambda s: (s["prompt_index"], s["sample_index"]))
        rewards_PGK = np.array([list(sample["rewards"].values()) for sample in drawn]).reshape(P, G, -1)
        want_PG = ADVANTAGES.get(name, of_group)(rewards_PGK, weights_K)
        got_PG = np.array([sample["advantage"] for sample in drawn]).reshape(P, G)
        np.testing.assert_allclose(got_PG, want_PG, rtol=1e-9, atol=1e-9)
        assert np.abs(want_PG).max() > 0.01
