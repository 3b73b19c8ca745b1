"""Keys of other toolkits are known, and their table names keys of ours that exist."""

import pytest

from rl.config.load import load_config, to_dict
from rl.config.peer_keys import PEER_KEYS, advice
from rl.config.sections import flatten

OURS = {*flatten(to_dict(load_config(None))), "rewards.functions"}


def test_the_table_names_keys_that_exist_and_each_of_a_peer_once():
    unknown = [key for row in PEER_KEYS for key in row.ours.split(", ") if key and key not in OURS]
    assert not unknown
    assert {row.peer for row in PEER_KEYS} == {"TRL", "verl", "MaxText", "Tunix"}
    assert len({(row.peer, row.key) for row in PEER_KEYS}) == len(PEER_KEYS)
    assert all(row.ours or row.note for row in PEER_KEYS)


@pytest.mark.parametrize("row", [row for row in PEER_KEYS if row.key not in OURS], ids=lambda row: row.key)
def test_a_key_of_a_peer_is_answered_with_ours(row):
    said = advice(row.key)
    assert said is not None
    assert f"{row.ours!r}" in said if row.ours else row.note in said
    assert row.peer in said


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("grpo.num_generations=4", "did you mean 'grpo.group_size'? (completions of a prompt; num_generations is of"),
        ("learning_rate=1e-6", "did you mean 'optimizer.lr'? (learning_rate is of TRL, MaxText)"),
        ("actor_rollout_ref.rollout.n=4", "did you mean 'grpo.group_size'? (completions of a prompt; n is of verl)"),
        (
            "grpo.use_vllm=true",
            "the sampler is a part of the trainer and shares its weights: leave it out; use_vllm is",
        ),
        ("grpo.stepps=4", "did you mean 'grpo.steps'?"),
    ],
)
def test_the_message_about_an_unknown_key_says_what_is_meant_here(override, said):
    with pytest.raises(ValueError, match=r"^unknown config key") as error:
        load_config(None, [override])
    assert said in str(error.value)


def test_an_override_that_is_no_yaml_is_named():
    with pytest.raises(ValueError, match=r"^the value of override 'grpo\.steps=\[1' is not valid YAML"):
        load_config(None, ["seed=1", "grpo.steps=[1"])
