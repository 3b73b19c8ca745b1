"""Losses and advantages from a user's file: the examples of docs/algorithms.md in whole runs, and what is refused."""

import pathlib
import re

import numpy as np
import pytest

from rl.algorithms.advantages import ESTIMATORS, compute_advantages
from rl.algorithms.from_config import check_estimator, check_loss, loss_config
from rl.config.load import load_config
from rl.config.sections import ESTIMATOR_NAMES
from rl.config.user_files import file_hashes
from rl.grpo_trainer import train
from rl.run.metrics import read_metrics
from tests.helpers.places import REWARDS, ROOT

RECIPE = f"""
model:
  arch:
    {{family: qwen3, hidden_size: 16, intermediate_size: 24, num_layers: 1, num_heads: 2, num_kv_heads: 1, head_dim: 8}}
data: {{source: arithmetic, args: {{operation: add, digits: 1}}, max_prompt_length: 8}}
rewards: {{functions: [{{function: "{REWARDS}:digit_share", name: digits}}]}}
sampling: {{max_completion_length: 6}}
grpo: {{steps: 2, prompts_per_step: 2, group_size: 4, minibatches: 2, max_tokens_per_microbatch: 64}}
optimizer: {{lr: 1e-2}}
eval: {{every: 0}}
mesh: {{num_devices: 1}}
"""
PPO = """
import jax.numpy as jnp

def term(sequences, config):
    clipped = jnp.clip(sequences.ratio_BX, 1 - config.epsilon, 1 + config.upper_epsilon)
    return -jnp.minimum(sequences.ratio_BX * sequences.advantages_BX, clipped * sequences.advantages_BX), {}
"""
GRPO = """
import numpy as np

def estimator(rewards_BK, weights_K, group_size):
    scores_PG = (rewards_BK @ weights_K).reshape(-1, group_size)
    centred_PG = scores_PG - np.nanmean(scores_PG, axis=1, keepdims=True)
    return (centred_PG / (np.nanstd(scores_PG, axis=1, ddof=1, keepdims=True) + 1e-4)).reshape(-1)
"""


def write(folder: pathlib.Path, name: str, code: str) -> pathlib.Path:
    path = folder / name
    path.write_text(code)
    return path


def recipe(folder: pathlib.Path, *overrides: str):
    return load_config(write(folder, "recipe.yml", RECIPE), [f"output_dir={folder / 'run'}", *overrides])


def stable(folder: pathlib.Path) -> list[dict]:
    names = ("loss", "grad_norm", "reward/mean", "advantage/std", "kl")
    return [{name: line[name] for name in names} for line in read_metrics(folder)]


def test_names_of_estimators_in_the_configuration_are_those_of_the_table():
    assert set(ESTIMATOR_NAMES) == set(ESTIMATORS)


def test_the_examples_of_the_documentation_train(tmp_path, monkeypatch):
    blocks = re.findall(r"```python\n# (\w+\.py)\n(.*?)```", (ROOT / "docs" / "algorithms.md").read_text(), re.DOTALL)
    assert [name for name, _ in blocks] == ["my_losses.py", "my_advantages.py"]
    for name, code in blocks:
        write(tmp_path, name, code)
    monkeypatch.chdir(tmp_path)  # paths are relative to the working directory
    settings = ("grpo.loss_type=my_losses.py:linear_clip", "grpo.epochs=2", "pure_nnx=false")
    folder = train(recipe(tmp_path, *settings, "grpo.advantage_estimator=my_advantages.py:median_baseline"))
    lines = read_metrics(folder)
    assert [line["step"] for line in lines] == [1, 2]
    assert all(line["grad_norm"] > 0 and line["loss_term/soft_clip_ratio"] >= 0 for line in lines)
    assert all("clip_ratio/low_mean" not in line for line in lines)


def test_functions_that_repeat_the_toolkits_own_give_the_same_run_which_no_other_file_may_go_on_with(tmp_path):
    ours = train(recipe(tmp_path, "grpo.loss_type=dapo", f"output_dir={tmp_path / 'ours'}"))
    loss, estimator = write(tmp_path, "ppo_loss.py", PPO), write(tmp_path, "grpo_estimator.py", GRPO)
    files = (f"grpo.loss_type={loss}:term", f"grpo.advantage_estimator={estimator}:estimator")
    train(recipe(tmp_path, *files, "grpo.steps=1"))
    for name, path in (("loss_type", loss), ("advantage_estimator", estimator)):
        code = path.read_text()
        path.write_text(code + "# another content\n")
        message = rf"the file of grpo\.{name} of the run .* was \w+, it is now \w+; .* same one"
        with pytest.raises(ValueError, match=message):
            train(recipe(tmp_path, *files))
        path.write_text(code)
    theirs = train(recipe(tmp_path, *files))
    assert [line["step"] for line in read_metrics(theirs)] == [1, 2]
    for line, other in zip(stable(ours), stable(theirs), strict=True):
        assert line == pytest.approx(other, rel=1e-4, abs=1e-6)


def test_the_identity_of_a_run_has_the_files_that_it_names(tmp_path):
    loss, estimator = write(tmp_path, "loss.py", PPO), write(tmp_path, "estimator.py", GRPO)
    assert list(file_hashes(recipe(tmp_path, f"grpo.loss_type={loss}:term"))) == ["file of grpo.loss_type"]
    assert file_hashes(recipe(tmp_path)) == {}
    named = file_hashes(recipe(tmp_path, f"grpo.advantage_estimator={estimator}:estimator"))
    assert list(named) == ["file of grpo.advantage_estimator"]


BAD_LOSSES = {
    "bare": (
        "return -sequences.ratio_BX * sequences.advantages_BX",
        r"must return \(term, metrics\), .* `return term, {}`",
    ),
    "wide": (
        "return sequences.logprobs_BT.T, {}",
        r"the term must have shape \[B, T\] or \[B, 1\], here \(4, 3\) or \(4, 1\)",
    ),
    "number": ("return 1.0, {}", r"the term must have shape .* got float"),
    "metric": (
        "return sequences.logprobs_BT, {'m': sequences.advantages_BX[0]}",
        r"metric 'm' must have shape .* shape \(1,\)",
    ),
    "infinite": ("return sequences.logprobs_BT / 0, {}", "must give a finite loss and gradient"),
    "constant": (
        "return jax.lax.stop_gradient(sequences.logprobs_BT), {}",
        "must have a gradient by sequences.logprobs_BT",
    ),
    "mixed": (
        "return sequences.logprobs_BT - sequences.logprobs_BT.mean() ** 2, {}",
        "nothing in it may depend on other seq",
    ),
    "exits": ("raise SystemExit(0)", "failed on a minibatch of 4 x 3 tokens: SystemExit: 0"),
    "raises": ("return sequences.nothing, {}", "failed on a minibatch of 4 x 3 tokens: AttributeError: .*nothing"),
    "numpy": (
        "import numpy; return numpy.asarray(sequences.logprobs_BT) * 1.0, {}",
        "failed on .* TracerArrayConversionError",
    ),
}


REFUSED_KEYS = {
    "unknown": (["grpo.loss_type=ppo"], r"grpo\.loss_type: must be one of \['grpo', .*path/to/file.py.*, got 'ppo'"),
    "cap": (
        ["grpo.loss_type=cispo"],
        r"epsilon_high must be set with loss_type cispo, .* the cap .*for example grpo\.epsilon_high=5\.0",
    ),
    "mode": (
        ["grpo.loss_type=vespo", "grpo.sampler_is_correction=true", "grpo.sampler_is_mode=sequence_mask"],
        r"sampler_is_mode must be token_truncate or token_mask with loss_type vespo, .* got sequence_mask",
    ),
    "tokens": (
        ["grpo.preset=reinforce++", "grpo.loss_type=gmpo"],
        r"grpo\.loss_type must be none of gmpo, vespo .* got 'gmpo'; take dapo",
    ),
    "no arguments": (
        ["grpo.loss_args={tilt: 0.5}"],
        r"loss_args must name arguments of loss_type grpo \(none\), got 'tilt'; leave it out",
    ),
}


@pytest.mark.parametrize("name", REFUSED_KEYS)
def test_keys_that_the_table_of_losses_refuses(tmp_path, name):
    overrides, message = REFUSED_KEYS[name]
    with pytest.raises(ValueError, match=message):
        train(recipe(tmp_path, *overrides))
    assert not (tmp_path / "run").exists()


def test_a_loss_of_a_file_has_arguments(tmp_path):
    body = "return -(sequences.ratio_BX**power) * (sequences.advantages_BX + shift), {}"
    code = f"def term(sequences, config, power, shift=0.0):\n    {body}\n"
    name = f"grpo.loss_type={write(tmp_path, 'power.py', code)}:term"
    for override, message in (
        ("grpo.loss_args={}", r"loss_args must hold 'power', an argument of loss_type .*power\.py:term without a def"),
        ("grpo.loss_args={power: 2, shft: 1}", r"must name arguments of loss_type .* \(power, shift\), got 'shft'"),
        ("grpo.loss_args={power: [2]}", r"loss_args\.power must be a number, a text, true, false or null, got \[2\]"),
    ):
        with pytest.raises(ValueError, match=message):
            loss_config(recipe(tmp_path, name, override))
    check_loss(loss_config(recipe(tmp_path, name, "grpo.loss_args={power: 2}")))
    with pytest.raises(ValueError, match=r"failed on a minibatch .*TypeError"):
        check_loss(loss_config(recipe(tmp_path, name, "grpo.loss_args={power: high}")))


@pytest.mark.parametrize("name", BAD_LOSSES)
def test_a_loss_that_cannot_work_is_refused_at_the_start(tmp_path, name):
    body, message = BAD_LOSSES[name]
    path = write(tmp_path, f"bad_{name}.py", f"import jax\n\ndef term(sequences, config):\n    {body}\n")
    config = loss_config(recipe(tmp_path, f"grpo.loss_type={path}:term"))
    with pytest.raises(ValueError, match=rf"grpo\.loss_type .*bad_{name}\.py:term.*{message}"):
        check_loss(config)


BAD_ESTIMATORS = {
    "shape": ("return rewards_BK", r"one advantage for each of 8 completions, got shape \(8, 1\)"),
    "nan": ("return rewards_BK[:, 0] / rewards_BK[:, 0].mean()", "finite advantages .* got nan for row 0"),
    "exits": ("raise SystemExit(0)", r"failed on rewards of shape \(8, 1\) and groups of 4: SystemExit: 0"),
    "raises": ("return unknown", r"failed on rewards of shape \(8, 1\) and groups of 4: NameError"),
}


@pytest.mark.parametrize("name", BAD_ESTIMATORS)
def test_an_estimator_that_cannot_work_is_refused_at_the_start(tmp_path, name):
    body, message = BAD_ESTIMATORS[name]
    path = write(tmp_path, f"bad_{name}.py", f"def estimator(rewards_BK, weights_K, group_size):\n    {body}\n")
    with pytest.raises(ValueError, match=rf"grpo\.advantage_estimator .*bad_{name}\.py:estimator .*{message}"):
        check_estimator(recipe(tmp_path, f"grpo.advantage_estimator={path}:estimator"))


def test_refusals_come_before_the_run_folder(tmp_path):
    for override, message in (
        (f"grpo.loss_type={tmp_path}/none.py:term", r"grpo\.loss_type: .*none\.py' does not import: FileNotFoundError"),
        (f"grpo.loss_type={write(tmp_path, 'ppo_too.py', PPO)}:turm", "has no attribute 'turm'; did you mean 'term'"),
        ("grpo.advantage_estimator=rloo", "rloo estimator has a scale of its own: scale_rewards must be none"),
    ):
        with pytest.raises(ValueError, match=message):
            train(recipe(tmp_path, override))
        assert not (tmp_path / "run").exists()


def test_what_the_estimator_says_about_rows_without_reward_is_not_heard():
    rewards_BK = np.array([[1.0], [np.nan]])
    result = compute_advantages(rewards_BK, None, 2, "group", "sum_then_normalize", lambda r, w, g: [3.0, np.nan])
    assert result.advantages_B.tolist() == [3.0, 0.0]
    assert result.valid_B.tolist() == [True, False]
