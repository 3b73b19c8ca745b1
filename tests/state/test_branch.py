"""What a resumed run may change, and how a branch of it goes on in a new folder."""

import json

import numpy as np
import pytest

from rl.cli import main
from rl.config.load import load_config
from rl.grpo_trainer import train
from rl.run.metrics import read_events, read_metrics
from rl.run_folder.folder import read_run
from rl.tools.report.read import read_runs
from rl.tools.trained import load_checkpoint
from tests.helpers.places import REWARDS

RECIPE = f"""
model:
  arch:
    {{family: llama, hidden_size: 16, intermediate_size: 24, num_layers: 1, num_heads: 2, num_kv_heads: 1, head_dim: 8}}
data: {{source: arithmetic, args: {{operation: add, digits: 1}}, max_prompt_length: 8}}
rewards: {{functions: [{{function: "{REWARDS}:digit_share", name: digits}}]}}
sampling: {{max_completion_length: 6}}
grpo: {{steps: 2, prompts_per_step: 2, group_size: 4, beta: 0, epochs: 2, max_tokens_per_microbatch: 64}}
optimizer: {{lr: 1e-2, schedule: linear, final_lr_ratio: 0.5}}
eval: {{every: 0}}
mesh: {{num_devices: 1}}
"""


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    path = tmp_path_factory.mktemp("branch") / "recipe.yml"
    path.write_text(RECIPE)
    return path


def test_a_run_gets_more_steps_under_its_schedule_and_a_branch_another_learning_rate(recipe, capsys):
    run, other = recipe.parent / "run", recipe.parent / "other"
    settings = [f"output_dir={run}"]
    train(load_config(recipe, settings))
    told = capsys.readouterr().out
    assert f"done: {run} has all 2 steps; " in told
    # More steps would move the end of the schedule. The message says so, and how the schedule stays.
    with pytest.raises(ValueError, match=r"grpo\.steps was 2, is 3, and the linear schedule") as error:
        train(load_config(recipe, [*settings, "grpo.steps=3"]))
    ways = str(error.value)
    assert "optimizer.schedule_updates=4 keeps the schedule of the run, to resume it" in ways
    assert ways.index("--branch") < ways.index("checkpoint.overwrite=true"), "what is lost is offered last"
    longer = [*settings, "grpo.steps=3", "optimizer.schedule_updates=4"]
    train(load_config(recipe, longer))
    assert [line["lr"] for line in read_metrics(run)] == pytest.approx([8.75e-3, 6.25e-3, 5e-3])
    assert "resumed at step 2 of 3" in capsys.readouterr().out
    # The run folder alone stands for its newest start; what is on the command line comes first.
    assert main(["train", str(run)]) == 0
    told = capsys.readouterr().out
    assert f"newest start of {run}, and not as in its config.yml: grpo.steps=3 optimizer.schedule_updates=4" in told
    assert "the run has 3 steps already and grpo.steps is 3: nothing is left to do" in told
    assert main(["train", str(run), "--check", "grpo.steps=4"]) == 0
    told = capsys.readouterr().out
    assert "config.yml: optimizer.schedule_updates=4\n" in told

    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    with pytest.raises(
        ValueError, match=r"optimizer\.lr was 0\.01, is 0\.002, which .*`grpo train .*run --branch FOLDER"
    ):
        train(load_config(recipe, [*longer, "optimizer.lr=2e-3"]))
    branch = ["train", str(run), "--branch", str(other), "optimizer.lr=2e-3", "optimizer.schedule=constant"]
    branch += ["optimizer.schedule_updates=null", "grpo.steps=5"]
    assert main([*branch, "model.arch.hidden_size=32"]) == 2
    assert "model.arch.hidden_size was 16, is 32; only these keys may change" in capsys.readouterr().err
    assert not other.exists()
    assert main(branch) == 0
    told = capsys.readouterr().out
    assert f"{other} is a branch of {run} at step 3" in told
    assert "resumed at step 3 of 5" in told
    lines = read_metrics(other)
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5]
    assert lines[:3] == read_metrics(run)
    assert [line["lr"] for line in lines[3:]] == pytest.approx([2e-3, 2e-3])
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before
    (config, record), old = read_run(other), read_run(run)[1]
    assert (config.optimizer.lr, record["branch"]) == (2e-3, {"of": old["run"], "step": 3})
    assert record["run"] != old["run"]
    assert json.loads((other / "checkpoints/5/hashes.json").read_text())["run"] == record["run"]
    assert any("changed" in event for event in read_events(run))
    assert not any("changed" in event for event in read_events(other)), "its config.yml has them"
    assert main(branch) == 0  # the same command again goes on with the branch
    assert "is a branch of" in capsys.readouterr().out
    assert main(["train", str(run), f"--branch={recipe.parent}"]) == 2
    assert "--branch must be a new or empty folder" in capsys.readouterr().err
    assert main(["train", str(recipe), "--branch", str(recipe.parent / "no")]) == 2
    assert (
        f"--branch must follow a run folder, from whose newest checkpoint it goes on, got {str(recipe)!r}, a file"
        in (capsys.readouterr().err)
    )
    # The report, and a branch that does not say how many steps it has, go by the newest start of the run.
    found = read_runs([run])[0].config
    assert (found["grpo.steps"], found["optimizer.schedule_updates"]) == (3, 4)
    assert main(["train", str(run), f"--branch={recipe.parent / 'same'}"]) == 0
    assert "the run has 3 steps already and grpo.steps is 3" in capsys.readouterr().out
    assert main(["train", str(run), f"--branch={recipe.parent / 'new'}", "output_dir=elsewhere"]) == 2
    assert "output_dir must be left out with --branch" in capsys.readouterr().err
    # The branch goes on from the run's weights: at a learning rate of 0 nothing moves.
    still = recipe.parent / "still"
    assert main(["train", str(run), "--branch", str(still), *branch[5:], "optimizer.lr=0", "grpo.steps=4"]) == 0
    weights = [load_checkpoint(read_run(folder)[0], folder).params["embed_tokens"] for folder in (run, still)]
    np.testing.assert_array_equal(*(np.asarray(each["embedding"]) for each in weights))
