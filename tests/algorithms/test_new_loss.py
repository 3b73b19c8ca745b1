"""A loss with arguments of its own is one function and one entry of `LOSS_TYPES`: nothing else is changed for it."""

import pytest

from rl.algorithms.from_config import loss_config
from rl.algorithms.loss_types import LOSS_TYPES, LossType
from rl.config.load import load_config
from rl.grpo_trainer import train
from rl.run.metrics import read_metrics
from rl.training.computed_groups import leaves_groups_out
from rl.training.supervised import negative_log_likelihood
from tests.helpers.places import REWARDS

RECIPE = f"""
model:
  arch:
    {{family: qwen3, hidden_size: 16, intermediate_size: 24, num_layers: 1, num_heads: 2, num_kv_heads: 1, head_dim: 8}}
data: {{source: arithmetic, args: {{operation: add, digits: 1}}, max_prompt_length: 8}}
rewards: {{functions: [{{function: "{REWARDS}:digit_share", name: digits}}]}}
sampling: {{max_completion_length: 6, stop_strings: [{", ".join("abcdefghijklmnopqrstuvwxyz")}]}}
grpo:
  {{steps: 1, prompts_per_step: 2, group_size: 4, beta: 0, max_tokens_per_microbatch: 64, epsilon_high: 2.0,
  loss_type: tilted, loss_args: {{tilt: 0.25}}}}
optimizer: {{lr: 1e-2}}
eval: {{every: 0}}
mesh: {{num_devices: 1}}
"""


def tilted_term(sequences, config, *, tilt, side="up"):
    """The gain of every completion with its advantage moved by `tilt`."""
    moved_BX = sequences.advantages_BX + (tilt if side == "up" else -tilt)
    return -sequences.ratio_BX * moved_BX, {"tilted_advantage": moved_BX, "tilted_gain": sequences.ratio_BX * moved_BX}


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    entry = LossType(
        tilted_term,
        LOSS_TYPES["grpo"].normalizer,
        averages_within_sequence=True,
        is_of_sequences=True,
        epsilon_high_is_cap=True,
        belongs_to={"tilted_advantage": "sequence"},
    )
    monkeypatch.setitem(LOSS_TYPES, "tilted", entry)
    (tmp_path / "recipe.yml").write_text(RECIPE)

    def read(*overrides):
        return load_config(tmp_path / "recipe.yml", [f"output_dir={tmp_path / 'run'}", *overrides])

    return read


def test_a_loss_with_arguments_trains_as_the_recipe_says(recipe):
    assert not leaves_groups_out(recipe())  # its row does not say that it needs an advantage
    line = read_metrics(train(recipe()))[-1]
    # Advantages of a group have the mean 0, and the ratio is 1 in the only update. The first metric belongs to
    # sequences, the second to tokens, as the ratio does, and the sequences have unequal lengths.
    assert line["tilted_advantage"] == pytest.approx(0.25, abs=1e-6)
    assert line["loss"] == pytest.approx(-0.25, abs=1e-6)
    assert line["tilted_gain"] != pytest.approx(0.25, abs=1e-4)
    with pytest.raises(ValueError, match=r"grpo\.loss_args .*was \{'tilt': 0\.25\}.*"):
        train(recipe("grpo.loss_args={tilt: 0.5}", "grpo.steps=2"))


def test_rules_of_a_new_loss_follow_from_its_row(recipe):
    for overrides, message in (
        (["grpo.loss_args={tlit: 1}"], r"arguments of loss_type tilted \(tilt, side\), got 'tlit'"),
        (["grpo.loss_type=tiltde"], r"grpo\.loss_type: must be one of .*'tilted'.* got 'tiltde'"),
        (["grpo.epsilon_high=null"], r"epsilon_high must be set with loss_type tilted"),
        (["grpo.preset=reinforce++", "grpo.beta=0.1"], r"none of gmpo, tilted, vespo with grpo\.kl_in_reward"),
    ):
        with pytest.raises(ValueError, match=message):
            loss_config(recipe(*overrides))
    with pytest.raises(ValueError, match=r"loss_args must hold 'tilt', an argument of loss_type tilted without a def"):
        # Arguments of a mapping add up over the layers of a configuration; an empty one takes nothing away.
        loss_config(load_config(None, ["grpo.loss_type=tilted", "grpo.epsilon_high=2.0"]))


def test_the_arguments_reach_the_term_and_sft_has_none(recipe):
    config = loss_config(recipe("grpo.loss_args={side: down}"))
    assert config.loss_args == (("side", "down"), ("tilt", 0.25))
    assert hash(config) != hash(loss_config(recipe()))
    assert negative_log_likelihood(recipe()).loss_args == ()


def test_a_wrong_type_of_an_argument_is_found_before_anything_is_written(recipe, tmp_path):
    with pytest.raises(ValueError, match=r"grpo\.loss_type tilted failed on a minibatch of 4 x 3 tokens: TypeError"):
        train(recipe("grpo.loss_args={tilt: much}"))
    assert not (tmp_path / "run").exists()
