"""Promise 4: a run that is killed and started again ends as one that never stopped, bit for bit."""

import io
import os
import pathlib
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from rl.config.load import load_config
from rl.grpo_trainer import train
from rl.run.interrupt import StopRequest
from rl.run.metrics import read_metrics, read_samples
from rl.run_folder.folder import read_run
from rl.tools.trained import load_checkpoint
from tests.helpers.metric_lines import steady
from tests.helpers.places import REWARDS, ROOT

STEPS = 14
RECIPE = f"""
model:
  arch:
    {{family: llama, hidden_size: 32, intermediate_size: 64, num_layers: 1,
     num_heads: 2, num_kv_heads: 1, head_dim: 16}}
data: {{source: arithmetic, args: {{operation: add, digits: 1}}, eval_size: 10, max_prompt_length: 8}}
rewards:
  functions: [{{function: "{REWARDS}:digit_share", name: digits}}]
sampling: {{max_completion_length: 8}}
grpo: {{steps: {STEPS}, prompts_per_step: 4, group_size: 4, minibatches: 2, epochs: 2, max_tokens_per_microbatch: 256}}
optimizer: {{lr: 3e-3, schedule: cosine, warmup_updates: 5}}
eval: {{every: 5}}
checkpoint: {{every: 2, keep: 2}}
"""


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("resume")
    path = folder / "recipe.yml"
    path.write_text(RECIPE + f"logging: {{compilation_cache: {folder / 'cache'}}}\n")
    return path


@pytest.fixture(scope="module")
def uninterrupted(recipe) -> pathlib.Path:
    folder = recipe.parent / "uninterrupted"
    assert start(recipe, folder).wait() == 0
    return folder


def start(recipe: pathlib.Path, folder: pathlib.Path, *overrides: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "rl.grpo_trainer", str(recipe), f"output_dir={folder}", *overrides]
    environment = {**os.environ, "XLA_FLAGS": "--xla_backend_optimization_level=0", "JAX_PLATFORMS": "cpu"}
    return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL)


def wait_for_lines(process: subprocess.Popen, folder: pathlib.Path, count: int) -> None:
    """Returns when metrics.jsonl has `count` lines, or the process has ended."""
    path = folder / "metrics.jsonl"
    while process.poll() is None and (not path.exists() or path.read_bytes().count(b"\n") < count):
        time.sleep(0.01)


def assert_same_run(left: pathlib.Path, right: pathlib.Path) -> None:
    def stable(lines):
        return [steady(line) for line in lines]

    assert stable(read_metrics(left)) == stable(read_metrics(right))
    assert read_samples(left) == read_samples(right)
    trees = [final_state(folder) for folder in (left, right)]
    assert trees[0].keys() == trees[1].keys()
    for path, array in trees[0].items():
        np.testing.assert_array_equal(array, trees[1][path], err_msg=path)


def final_state(folder: pathlib.Path) -> dict[str, np.ndarray]:
    """Every array of the last checkpoint, by path: weights, moments, step, rng."""
    import jax
    import orbax.checkpoint as ocp

    path = folder / "checkpoints" / str(STEPS) / "state"
    tree = ocp.StandardCheckpointer().restore(path.absolute())
    return {jax.tree_util.keystr(p): np.asarray(leaf) for p, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]}


def test_run_killed_at_several_moments_equals_the_uninterrupted_run(recipe, uninterrupted):
    folder = recipe.parent / "killed"
    # Before the first line, between checkpoints, right after a line (a checkpoint may be half written), near the end.
    for lines, delay in ((0, 2.0), (4, 0.0), (7, 0.05), (11, 0.02)):
        process = start(recipe, folder)
        wait_for_lines(process, folder, lines)
        time.sleep(delay)
        process.kill()
        assert process.wait() in (-signal.SIGKILL, 0)
    assert start(recipe, folder).wait() == 0
    assert_same_run(folder, uninterrupted)


def test_sigterm_saves_and_the_next_start_goes_on_in_the_other_flavour(recipe, uninterrupted):
    folder = recipe.parent / "terminated"
    process = start(recipe, folder)
    wait_for_lines(process, folder, 4)
    process.send_signal(signal.SIGTERM)
    assert process.wait() == 0
    done = read_metrics(folder)[-1]["step"]
    assert 0 < done < STEPS
    assert (folder / "checkpoints" / str(done)).is_dir()
    process = start(recipe, folder, "pure_nnx=false")
    wait_for_lines(process, folder, done + 4)
    process.send_signal(signal.SIGINT)
    assert process.wait() == 0
    assert start(recipe, folder).wait() == 0
    assert_same_run(folder, uninterrupted)


def test_a_signal_amid_a_write_of_the_console_is_a_request_like_any_other(capfd):
    class Interrupted(io.RawIOBase):
        """The first write to it is interrupted by SIGTERM."""

        num_writes = 0

        def writable(self):
            return True

        def write(self, data):
            self.num_writes += 1
            if self.num_writes == 1:
                signal.raise_signal(signal.SIGTERM)
            return len(data)

    stream = io.TextIOWrapper(io.BufferedWriter(Interrupted()))

    def say(text):
        stream.write(text)
        stream.flush()

    with StopRequest(say) as stop:
        say("step 1")
    assert stop.requested
    assert "SIGTERM: finishing this step" in capfd.readouterr().err


def test_reference_is_the_same_after_a_resume(uninterrupted):
    config, identity = read_run(uninterrupted)
    assert identity["reference"] == {"source": None, "seed": config.seed}
    # The KL is measured against the start, not against a restored policy: it keeps growing.
    metrics = read_metrics(uninterrupted)
    assert 0 < metrics[1]["kl"] < metrics[-1]["kl"]


def test_finished_run_started_again_does_nothing(recipe, uninterrupted):
    before = (uninterrupted / "metrics.jsonl").read_bytes()
    train(load_config(recipe, [f"output_dir={uninterrupted}", "mesh.num_devices=1"]))
    assert (uninterrupted / "metrics.jsonl").read_bytes() == before


def test_more_steps_under_a_cosine_schedule_are_another_run(recipe, uninterrupted):
    before = (uninterrupted / "metrics.jsonl").read_bytes()
    settings = [f"output_dir={uninterrupted}", "mesh.num_devices=1", f"grpo.steps={STEPS + 2}"]
    with pytest.raises(ValueError, match=rf"grpo\.steps was {STEPS}, is {STEPS + 2}"):
        train(load_config(recipe, settings))
    assert (uninterrupted / "metrics.jsonl").read_bytes() == before
    assert load_checkpoint(load_config(recipe, ["mesh.num_devices=1"]), uninterrupted).step == STEPS
