"""A reference that moves: the mix by hand, whole runs that are resumed, and what is refused."""

import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from rl.config.load import load_config
from rl.grpo_trainer import train
from rl.models.train_state import PureState
from rl.run.metrics import read_metrics
from rl.state.reference_sync import ReferenceSync
from tests.helpers.metric_lines import steady
from tests.helpers.places import REWARDS

RECIPE = f"""
model:
  arch:
    {{family: qwen3, hidden_size: 16, intermediate_size: 24, num_layers: 1, num_heads: 2, num_kv_heads: 1, head_dim: 8}}
data: {{source: arithmetic, args: {{operation: add, digits: 1}}, max_prompt_length: 8}}
rewards: {{functions: [{{function: "{REWARDS}:digit_share", name: digits}}]}}
sampling: {{max_completion_length: 6}}
grpo: {{steps: 5, prompts_per_step: 2, group_size: 4, minibatches: 2, max_tokens_per_microbatch: 64}}
reference: {{sync_every: 2}}
optimizer: {{lr: 1e-2}}
eval: {{every: 0}}
mesh: {{num_devices: 1}}
checkpoint: {{every: 1, keep: 5}}
"""


def recipe(folder: pathlib.Path, name: str, *overrides: str):
    path = folder / "recipe.yml"
    path.write_text(RECIPE)
    return load_config(path, [f"output_dir={folder / name}", *overrides])


def saved(folder: pathlib.Path, step: int, item: str) -> dict[str, np.ndarray]:
    """Weights by path."""
    tree = ocp.StandardCheckpointer().restore((folder / "checkpoints" / str(step) / item).absolute())
    tree = tree["params"] if item == "state" else tree
    return {jax.tree_util.keystr(p): np.asarray(leaf) for p, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def assert_equal(left: dict[str, np.ndarray], right: dict[str, np.ndarray]) -> None:
    assert left.keys() == right.keys()
    for path, array in left.items():
        np.testing.assert_array_equal(array, right[path], err_msg=path)


def stable(folder: pathlib.Path) -> list[dict]:
    return [steady(line) for line in read_metrics(folder)]


def state(values: list[float], dtype=jnp.float32) -> PureState:
    return PureState(jnp.zeros((), jnp.int32), {"w": jnp.asarray(values, dtype)}, (), jnp.zeros(2, jnp.uint32))


def sharding():
    return {"w": jax.sharding.SingleDeviceSharding(jax.devices()[0])}


def test_the_reference_moves_by_the_share_and_at_the_steps_that_are_set():
    config = load_config(None, ["reference.sync_every=3", "reference.ema=0.25"])
    sync, policy = ReferenceSync(config, sharding()), state([8.0, -4.0])
    reference = state([4.0, 4.0])
    assert sync(reference, policy, 1) is reference
    assert sync(reference, policy, 2) is reference
    moved = sync(reference, policy, 3)
    assert moved is not None
    # 0.25 * 8 + 0.75 * 4 and 0.25 * -4 + 0.75 * 4
    assert moved.params["w"].tolist() == [5.0, 2.0]
    assert reference.params["w"].is_deleted()
    assert policy.params["w"].tolist() == [8.0, -4.0]


def test_a_copied_reference_has_memory_of_its_own():
    config = load_config(None, ["reference.sync_every=1"])
    policy = state([8.0, -4.0])
    moved = ReferenceSync(config, sharding())(state([4.0, 4.0]), policy, 1)
    assert moved is not None
    policy.params["w"].delete()  # as the next update does, to which the policy is donated
    assert moved.params["w"].tolist() == [8.0, -4.0]


def test_the_mix_of_bfloat16_weights_is_rounded_once():
    config = load_config(None, ["reference.sync_every=1", "reference.ema=0.1"])
    moved = ReferenceSync(config, sharding())(state([1.0], jnp.bfloat16), state([2.0], jnp.bfloat16), 1)
    assert moved is not None
    assert moved.params["w"].dtype == jnp.bfloat16
    assert float(moved.params["w"][0]) == float(jnp.asarray(1.1, jnp.bfloat16))


def test_without_sync_the_reference_stays_what_it_is():
    reference = state([4.0])
    sync = ReferenceSync(load_config(None), sharding())
    assert sync(reference, state([1.0]), 100) is reference
    assert sync(None, state([1.0]), 100) is None


def test_a_synced_reference_is_the_policy_of_that_step_and_survives_a_resume_in_the_other_flavour(tmp_path):
    whole = train(recipe(tmp_path, "whole"))
    for step, source in ((2, 2), (3, 2), (4, 4), (5, 4)):
        assert_equal(saved(whole, step, "reference"), saved(whole, source, "state"))
    first, later = saved(whole, 1, "reference"), saved(whole, 2, "reference")
    assert any(np.abs(first[path] - later[path]).max() > 1e-3 for path in first)
    # The same run as a crash leaves it after step 3, where the reference is neither the start nor the policy.
    halves = pathlib.Path(shutil.copytree(whole, tmp_path / "halves"))
    for step in (4, 5):
        shutil.rmtree(halves / "checkpoints" / str(step))
    lines_before = (halves / "metrics.jsonl").read_bytes()
    assert train(recipe(tmp_path, "halves", "pure_nnx=false")) == halves
    assert (halves / "metrics.jsonl").read_bytes() != lines_before  # steps 4 and 5 are made again
    assert stable(whole) == stable(halves)
    for item in ("state", "reference"):
        assert_equal(saved(whole, 5, item), saved(halves, 5, item))
    lines = read_metrics(whole)
    assert 0 < lines[2]["kl"] < lines[1]["kl"]  # after step 2 the reference is the policy, which then moves one step


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["reference.sync_every=2", "grpo.beta=0"], r"grpo\.beta must be > 0 with reference\.sync_every 2, got 0"),
        (["reference.sync_every=-1"], r"reference\.sync_every must be >= 0, got -1"),
        (
            ["reference.sync_every=2", "reference.ema=0"],
            r"reference\.ema must be in \(0, 1\]; 1 copies the policy, got 0",
        ),
        (["reference.ema=0.5"], r"reference\.sync_every must be > 0 with reference\.ema 0\.5, got 0"),
    ],
)
def test_settings_that_cannot_be_meant_are_refused(overrides, message):
    with pytest.raises(ValueError, match=message):
        load_config(None, overrides)
