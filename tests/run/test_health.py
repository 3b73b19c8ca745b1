"""Skipped updates, spikes and signs of collapse: what is said when, what ends a run, and that a resume changes none of
it.
"""

import dataclasses
import gzip
import json
import math
import pathlib
import re
import shutil
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from rewards.batch import COUNTS, TOO_MANY, RewardResult
from rewards.contract import RewardSpec
from rewards.runner import RewardRunner
from rl import grpo_trainer, sft_trainer
from rl.config.load import load_config
from rl.data.prompts import PromptData
from rl.rollout.collector import Collector
from rl.rollout.failing import FailureWatch
from rl.run.health import HealthState, examine, healthy, is_spike, raise_if_stuck
from rl.run.log import RunLog
from rl.run.metrics import read_metrics, read_samples
from rl.run.not_finite import cause_of_skips, sizes_of
from rl.run_folder.folder import checkpoint_steps
from rl.state.checkpoint_files import array_hash, read_array, stored_arrays
from tests.helpers.metric_lines import steady
from tests.helpers.places import REWARDS

FINE = {"skipped_updates": 0, "kl": 0.1, "grad_norm": 1.0, "entropy": 1.0, "zero_variance_share": 0.2}
FINE |= {"truncated_share": 0.1}
RECIPE = f"""
model:
  arch:
    {{family: llama, hidden_size: 16, intermediate_size: 24, num_layers: 1, num_heads: 2, num_kv_heads: 1, head_dim: 8}}
data: {{source: arithmetic, args: {{operation: add, digits: 1}}, max_prompt_length: 8}}
rewards:
  functions: [{{function: "{REWARDS}:digit_share", name: shown}}]
sampling: {{max_completion_length: 4}}
grpo: {{steps: 6, prompts_per_step: 4, group_size: 2, minibatches: 2, max_tokens_per_microbatch: 128}}
sft: {{steps: 6, batch_size: 8, max_completion_length: 4}}
optimizer: {{lr: 1e-2, warmup_updates: 2}}
checkpoint: {{every: 1, keep: 9}}
eval: {{every: 0}}
mesh: {{num_devices: 1}}
logging:
  samples_per_step: 2
"""


def section(*overrides: str):
    return load_config(None, overrides).health


def run_of(steps: list[dict], *overrides: str, state: HealthState | None = None):
    """The checkups of steps whose metrics are `FINE` but for what is given."""
    state, checkups = state or healthy(), []
    for changes in steps:
        checkups.append(examine(section(*overrides), state, FINE | changes))
        state = checkups[-1].health
    return checkups


def wavy(num_steps: int) -> list[dict]:
    """Ordinary steps, none like the other."""
    return [{"kl": 0.1 + 0.01 * math.sin(i), "grad_norm": 1 + 0.2 * math.cos(2 * i)} for i in range(num_steps)]


# Spikes


@pytest.mark.parametrize(("name", "way_out"), [("kl", "grpo.beta"), ("grad_norm", "optimizer.max_grad_norm")])
def test_spike_is_named_with_its_median_and_asks_for_all_samples(name, way_out):
    checkups = run_of([*wavy(20), {name: 30.0}, *wavy(3)])
    assert [i for i, checkup in enumerate(checkups) if checkup.keep_samples] == [20]
    (warning,) = checkups[20].warnings
    assert warning.startswith(f"{name} 30 is a spike, its median over the last 20 steps is ")
    assert way_out in warning
    assert not [warning for checkup in checkups[:20] + checkups[21:] for warning in checkup.warnings]


def test_nothing_is_a_spike_before_ten_steps_or_when_switched_off():
    assert not any(checkup.keep_samples for checkup in run_of([*wavy(9), {"kl": 99.0}]))
    assert run_of([*wavy(10), {"kl": 99.0}])[-1].keep_samples
    assert not run_of([*wavy(10), {"kl": 99.0}], "health.kl_spike=null")[-1].keep_samples
    assert not run_of([*wavy(10), {"grad_norm": 99.0}], "health.grad_norm_spike=null")[-1].keep_samples


def test_threshold_counts_spreads_above_the_median():
    recent = [float(i) for i in range(1, 12)]  # median 6, median deviation 3, spread 4.4478
    assert not is_spike(6 + 2 * 4.44, recent, threshold=2.0)
    assert is_spike(6 + 2 * 4.45, recent, threshold=2.0)


def test_values_that_hardly_differ_do_not_make_a_spike_of_a_small_step():
    recent = [1.0] * 20
    assert not is_spike(1.4, recent, threshold=10.0)
    assert is_spike(1.6, recent, threshold=10.0)
    assert not is_spike(1e-9, [0.0] * 20, threshold=10.0)
    assert not is_spike(math.nan, recent, threshold=10.0)


def test_only_the_last_steps_count_and_values_that_are_not_finite_are_none():
    state = run_of([*wavy(30), {"kl": math.nan}], "health.spike_window=12")[-1].health
    assert [len(values) for values in state.recent.values()] == [12, 12]
    assert state.recent["kl"][-1] == wavy(30)[-1]["kl"]
    # A new level is unusual once, or while most of the window is the old one, and ordinary afterwards.
    checkups = run_of([*wavy(12), *[{"kl": 5.0}] * 12], "health.spike_window=12")
    flagged = [checkup.keep_samples for checkup in checkups[12:]]
    assert flagged[0]
    assert not any(flagged[7:])


def test_run_without_kl_is_watched_all_the_same():
    metrics = {name: value for name, value in FINE.items() if name != "kl"}
    checkup = examine(section(), healthy(), metrics)
    assert checkup.warnings == []
    assert list(checkup.health.recent) == ["grad_norm"]


def without_reference(num_steps: int, scale: float) -> list[dict]:
    """Ordinary steps of a run with grpo.beta 0: in place of the KL how far sampler and trainer are apart."""
    return [{"grad_norm": 1.0, "logprob_difference/mean": scale * (1 + 0.2 * math.sin(i))} for i in range(num_steps)]


def bare_run(steps: list[dict], *overrides: str):
    state, checkups = healthy(), []
    for metrics in steps:
        checkups.append(examine(section(*overrides), state, {"skipped_updates": 0, **metrics}))
        state = checkups[-1].health
    return checkups


def test_without_a_reference_the_distance_to_the_sampler_is_watched_in_the_place_of_the_kl():
    spike = {"grad_norm": 1.0, "logprob_difference/mean": 0.5}
    steps = without_reference(20, scale=0.01)
    checkups = bare_run([*steps, spike, *steps[:3]])
    assert [i for i, checkup in enumerate(checkups) if checkup.keep_samples] == [20]
    (warning,) = checkups[20].warnings
    assert warning.startswith("logprob_difference/mean 0.5 is a spike, its median over the last 20 steps is 0.01")
    assert "grpo.sampler_is_correction" in warning
    assert set(checkups[-1].health.recent) == {"logprob_difference/mean", "grad_norm"}
    assert not any(checkup.keep_samples for checkup in bare_run([*steps, spike], "health.kl_spike=null"))


def test_with_a_reference_the_kl_is_watched_alone():
    steps = [step | {"kl": 0.1} for step in without_reference(20, scale=0.01)]
    checkups = bare_run([*steps, steps[0] | {"logprob_difference/mean": 0.5}])
    assert not any(checkup.keep_samples for checkup in checkups)
    assert set(checkups[-1].health.recent) == {"kl", "grad_norm"}


def test_what_float32_rounds_is_no_spike_however_often_it_doubles():
    steps = without_reference(20, scale=1e-7)
    assert not bare_run([*steps, steps[0] | {"logprob_difference/mean": 1e-4}])[-1].keep_samples
    assert bare_run([*steps, steps[0] | {"logprob_difference/mean": 0.02}])[-1].keep_samples


# Signs of collapse


@pytest.mark.parametrize(
    ("bad", "key", "switch"),
    [
        ({"zero_variance_share": 1.0}, "grpo.group_size", "equal_rewards_share"),
        ({"entropy": 0.001}, "grpo.entropy_coef", "entropy_floor"),
        ({"truncated_share": 0.6}, "sampling.max_completion_length", "truncated_share"),
    ],
)
def test_sign_that_lasts_is_named_with_the_key_to_change_and_ever_more_seldom(bad, key, switch):
    checkups = run_of([bad] * 13)
    assert [i + 1 for i, checkup in enumerate(checkups) if checkup.warnings] == [3, 6, 12]
    assert all(key in warning for checkup in checkups for warning in checkup.warnings)
    assert not any(checkup.keep_samples for checkup in checkups)
    assert not any(checkup.warnings for checkup in run_of([bad, bad, {}] * 3))  # a good step in between
    assert not any(checkup.warnings for checkup in run_of([bad] * 13, f"health.{switch}=null"))


def test_rewards_that_are_all_equal_are_told_from_those_equal_within_each_group():
    bad = {"zero_variance_share": 1.0, "reward/std": 1e-17, "reward/mean": 0.1}
    (all_equal,) = run_of([bad], "health.patience=1")[0].warnings
    assert "every completion of the step has the same reward, 0.1" in all_equal
    assert "rewards.functions" in all_equal
    (within,) = run_of([bad | {"reward/std": 0.2}], "health.patience=1")[0].warnings
    assert "as the others of their group" in within


# Nothing to learn from


def test_step_without_a_judged_completion_names_the_function_and_its_failure_and_nothing_else():
    step = {"unjudged_share": 1.0, "masked_share": 1.0, "zero_variance_share": 1.0, "entropy": 0.0}
    step |= {"reward/a/b/exception": 3, "reward/a/b/none": 2, "reward/late/timeouts": 1, "reward/late/mean": math.nan}
    checkups = run_of([step] * 4)
    assert [len(checkup.warnings) for checkup in checkups] == [1, 1, 0, 1]
    (warning,) = checkups[0].warnings
    assert "no reward could be judged" in warning
    assert "'a/b' failed with exception 3 times" in warning
    assert "rewards.log" in warning
    (declined,) = run_of([step | {"reward/late/none": 9}])[0].warnings
    assert "'late' returned None 9 times" in declined
    assert "data.columns" in declined
    assert "look at rewards.functions" in run_of([{"unjudged_share": 1.0}])[0].warnings[0]


def test_step_whose_completions_were_all_masked_names_the_length_limit_and_nothing_else():
    step = {"masked_share": 1.0, "truncated_share": 1.0, "entropy": 0.0, "unjudged_share": 0.0}
    (warning,) = run_of([step])[0].warnings
    assert "every completion of the step that could be judged was cut at the length limit" in warning
    assert "raise sampling.max_completion_length" in warning
    assert "turn grpo.mask_truncated off" in warning
    assert run_of([step | {"masked_share": 0.9}])[0].warnings == []


def test_what_is_not_finite_is_named_with_its_way_out():
    whole = {"layer": {"kernel": jnp.ones((2, 3)), "steps": jnp.int32(3)}, "head": jnp.ones(2, jnp.bfloat16)}
    broken = whole | {"head": jnp.array([1.0, jnp.nan], jnp.bfloat16)}
    assert sizes_of(whole) == {"layer/kernel": 1.0, "head": 1.0}
    assert math.isnan(sizes_of(broken)["head"])
    lost, fine = {"loss": math.nan, "grad_norm": math.nan}, np.array([1.0, -1.0])
    assert re.search(r"1 arrays of weights .*head.*earlier checkpoint", cause_of_skips(lost, broken, fine))
    large = cause_of_skips(lost, whole, 1e30 * fine)
    assert re.search(r"the loss is not finite, .*up to 1e\+30: .*rewards\.functions", large)
    large = cause_of_skips(lost, {"head": jnp.array([1e8])})
    assert re.search(r"weights go up to 1e\+08 \(head\).*optimizer\.lr", large)
    assert re.search(r"the loss is not finite: log-probs .*model\.dtype", cause_of_skips(lost, whole, fine))
    overflown = cause_of_skips({"loss": 0.5, "grad_norm": math.inf}, whole)
    assert re.search(r"the gradient is not finite, while the loss is: .*model\.dtype", overflown)


# Skipped updates


def test_skipped_updates_in_a_row_end_the_run_and_one_that_was_made_breaks_the_row():
    skipped = {"skipped_updates": 1}
    checkups = run_of([skipped, skipped, {}, skipped, skipped])
    assert [checkup.health.num_skipped_last for checkup in checkups] == [1, 2, 0, 1, 2]
    assert checkups[-1].health.num_skipped == 4
    assert checkups[0].keep_samples
    assert "1 update(s) skipped" in checkups[0].warnings[0]
    raise_if_stuck(section("health.max_skipped_updates=3"), checkups[-1])
    raise_if_stuck(section("health.max_skipped_updates=null"), checkups[-1])
    with pytest.raises(ValueError, match=r"2 skipped.*In the last step the loss is NaN\."):
        raise_if_stuck(section("health.max_skipped_updates=2"), checkups[-1]._replace(cause_of_skips="the loss is NaN"))


def test_step_of_several_updates_counts_each_of_them():
    state = examine(section(), healthy(), FINE | {"skipped_updates": 4}, num_updates=4).health
    assert state.num_skipped_last == 4
    assert examine(section(), state, FINE | {"skipped_updates": 3}, num_updates=4).health[:2] == (7, 0)


@pytest.mark.parametrize(
    ("override", "rule"),
    [
        ("health.max_skipped_updates=0", "health.max_skipped_updates must be >= 1, got 0"),
        ("health.spike_window=9", "health.spike_window must be >= 10, got 9"),
        ("health.kl_spike=0", "health.kl_spike must be > 0 or null"),
        ("health.truncated_share=1.5", "health.truncated_share must be in"),
        ("health.patience=0", "health.patience must be >= 1, got 0"),
        ("rewards.max_failed_share=1.5", r"rewards.max_failed_share must be in \[0, 1\], a share of the completions"),
    ],
)
def test_settings_out_of_range_are_refused(override, rule):
    with pytest.raises(ValueError, match=rule):
        load_config(None, [override])


# Whole runs


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> pathlib.Path:
    path = tmp_path_factory.mktemp("health") / "recipe.yml"
    path.write_text(RECIPE + f"  compilation_cache: {path.parent / 'cache'}\n")
    return path


def reward(name: str, weight: float = 1.0) -> str:
    return f'rewards.functions=[{{function: "{REWARDS}:{name}", name: shown, weight: {weight}}}]'


def start(recipe: pathlib.Path, name: str, *overrides: str, train=grpo_trainer.train) -> pathlib.Path:
    return train(load_config(recipe, [f"output_dir={recipe.parent / name}", *overrides]))


TRACKER = """
import json

class Tracker:
    def __init__(self, run, to):
        self.file = open(to, "a")
        self.say(run=[run.id, run.name, run.kind, run.is_resumed, run.config["grpo"]["steps"]])

    def say(self, **what):
        print(json.dumps(what), file=self.file, flush=True)

    def log(self, step):
        counts = {name: len(values) for name, values in step.histograms.items()}
        self.say(step=step.step, metrics=dict(step.metrics), counts=counts, samples=len(step.samples))

    def close(self, is_failed):
        self.say(is_failed=is_failed)
        self.file.close()

def make_tracker(run, to):
    return Tracker(run, to)
"""


def tracked(folder: pathlib.Path) -> list[str]:
    """Overrides with which a run is followed by a tracker that writes tracked.jsonl, and its second step is traced."""
    (folder / "tracker.py").write_text(TRACKER)
    name = f"{folder / 'tracker.py'}:make_tracker"
    args = json.dumps({name: {"to": str(folder / "tracked.jsonl")}})
    return [f"logging.trackers=['{name}']", f"logging.tracker_args={args}", "profile={steps: [2, 2], memory: true}"]


def test_run_without_a_finite_update_ends_and_can_go_on_with_a_higher_limit(recipe, capsys):
    broken = (reward("huge", 1e30), "grpo.scale_rewards=none", "health.max_skipped_updates=4", *tracked(recipe.parent))
    with pytest.raises(ValueError, match=r"got 4 with 4 skipped.*advantages go up to .*rewards\.functions"):
        start(recipe, "stuck", *broken)
    folder = recipe.parent / "stuck"
    check_profile(folder / "profile")
    assert [(line["step"], line["skipped_updates"]) for line in read_metrics(folder)] == [(1, 2), (2, 2)]
    assert capsys.readouterr().out.count("2 update(s) skipped") == 2
    assert checkpoint_steps(folder) == [1]  # the step that ended the run saved nothing
    assert len(read_samples(folder)) == 2 * 8  # all, not samples_per_step
    start(recipe, "stuck", *broken[:2], *broken[3:5], "health.max_skipped_updates=99", "profile.steps=[1, 1]")
    said = capsys.readouterr().out
    assert "make_tracker: step 2 comes again, for the run goes on from" in said
    assert "no profile is made: the run goes on after step 1, and profile.steps names [1, 1]; name later ones" in said
    lines = read_metrics(folder)
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert [line["lr"] for line in lines] == [pytest.approx(0.005)] * 6  # the schedule has not moved
    check_tracked([json.loads(line) for line in (recipe.parent / "tracked.jsonl").read_text().splitlines()], lines)


def check_profile(folder: pathlib.Path) -> None:
    """The trace of one step, and the memory after it."""
    (trace,) = folder.glob("plugins/profile/*/*.trace.json.gz")
    events = json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
    names = [event.get("name") for event in events]
    assert {name: names.count(name) for name in ("step", "rollout", "reward", "train", "checkpoint")} == {
        "step": 1,
        "rollout": 1,
        "reward": 1,
        "train": 1,
        "checkpoint": 1,  # of the step before
    }
    assert [event["args"]["step_num"] for event in events if event.get("name") == "step"] == ["2"]
    assert gzip.decompress((folder / "memory_step_2.prof").read_bytes())  # a profile of pprof is zipped


def check_tracked(seen: list[dict[str, Any]], lines: list[dict[str, Any]]) -> None:
    """What a tracker saw of a run that failed in its second step, and went on from its first."""
    run_id = seen[0]["run"][0]
    assert len(run_id) == 32
    assert [entry.get("step", entry) for entry in seen] == [
        *({"run": [run_id, "stuck", "grpo", False, 6]}, 1, 2, {"is_failed": True}),
        *({"run": [run_id, "stuck", "grpo", True, 6]}, 2, 3, 4, 5, 6, {"is_failed": False}),
    ]
    last = seen[-2]
    known = {name: value for name, value in lines[-1].items() if value is not None and name != "step"}
    assert last["metrics"] == known
    assert known["trackers/make_tracker/dropped"] == 0
    assert last["counts"] == {"reward": 8, "completion_length": 8, "advantage": 8}
    assert [entry["samples"] for entry in seen if "step" in entry] == [
        8,
        0,
        0,
        0,
        0,
        0,
        0,
    ]  # the first step has a table


def test_reward_that_is_down_ends_the_run_with_a_checkpoint_and_a_mended_one_goes_on(recipe, capsys):
    file = recipe.parent / "judge.py"
    file.write_text("def judge(completion):\n    raise ConnectionError('no judge at home')\n")
    judge = f'rewards.functions=[{{function: "{file}:judge"}}, {{function: "{REWARDS}:digit_share", name: fine}}]'
    settings = (judge, "health.patience=2", "grpo.steps=4")
    error = (
        rf"rewards\.max_failed_share .*, got 0\.5, while '{re.escape(str(file))}:judge' failed on more in 2 step\(s\) "
        r"in a row, on 100% in the last \(exception: ConnectionError: no judge at home .*mend the function"
    )
    with pytest.raises(ValueError, match=error):
        start(recipe, "down", *settings)
    told, folder = capsys.readouterr().out, recipe.parent / "down"
    assert told.count("no judge at home") == 2  # at the start, and in the first step
    assert f"warning: reward '{file}:judge' failed as before on 8 of 8 (exception 8), in 2 steps so far" in told
    first = read_metrics(folder)[0]
    counted = [first[f"reward/{file}:judge/{name}"] for name in ("errors", "timeouts", "retries")]
    assert counted == [8, 0, 0]  # the check of the start waited for the server, and nobody does again
    assert [line["step"] for line in read_metrics(folder)] == [1, 2]
    assert checkpoint_steps(folder) == [1, 2]
    record = json.loads((folder / "checkpoints/2/loop/metadata").read_text())
    assert record["reward_steps_down"] == {f"{file}:judge": 2}
    with pytest.raises(
        ValueError, match=r"(?s)judge' failed after 2 steps on sample \d of .*traceback:.*no judge at home"
    ):
        start(recipe, "down", *settings, "rewards.on_error=raise")
    assert checkpoint_steps(folder) == [1, 2]
    file.write_text("def judge(completion):\n    return len(completion)\n")
    start(recipe, "down", *settings)
    assert told.count("rewards of the first row: a right answer scores") == 1
    assert "rewards of the first row" not in capsys.readouterr().out  # a resumed run has begun already
    assert [line["step"] for line in read_metrics(folder)] == [1, 2, 3, 4]


def test_a_resumed_run_remembers_how_long_a_reward_was_down(recipe):
    config = load_config(recipe)
    spec = RewardSpec("shown", f"{REWARDS}:digit_share", 1.0, {})
    nothing: Any = None  # is drawn here
    with RewardRunner([spec], [], 1, 5.0) as runner:
        collector = Collector(config, PromptData([], [], 0, 0, []), nothing, runner, nothing, nothing, nothing)
        collector.restore({"reward_calls": runner.calls})  # of a version that did not count
        assert collector.reward_state["reward_steps_down"] == {}
        collector.restore({**collector.reward_state, "reward_steps_down": {"shown": 2, "gone": 1}})
        assert collector.reward_state["reward_steps_down"] == {"shown": 2}


def test_a_run_that_has_its_steps_already_says_so_and_one_that_stopped_how_it_goes_on(tmp_path, capsys):
    for steps_key in ("grpo.steps", "sft.steps"):
        with RunLog(load_config(None, [f"{steps_key}=20"]), steps_key) as log:
            log.resumed(267)
            log.resumed(7)
            log.ended(20, tmp_path, "grpo eval RUN")
            log.ended(9, tmp_path, "grpo eval RUN")
        nothing_left, resumed, done, saved = capsys.readouterr().out.splitlines()
        rule = f"the run has 267 steps already and {steps_key} is 20: nothing is left to do; raise {steps_key} to go on"
        assert nothing_left.startswith(rule)
        assert resumed == "resumed at step 7 of 20"
        assert done == f"done: {tmp_path} has all 20 steps; next: grpo eval RUN"
        assert saved == f"saved step 9 of 20 in {tmp_path}; the same command goes on"


def result_of(failed: int, size: int, name: str = "shown", message: str = "exception: KeyError: 'a' (f.py:1)"):
    """What judging `size` completions comes to of which a function failed on some."""
    counts = {name: dict.fromkeys(COUNTS, 0) | {"exception": failed, "none": size - failed}}
    failures = {name: {"exception: KeyError": message}} if failed else {}
    problems = [f"reward '{name}' sample 0: {message}", "reward 'other' sample 0: crash"] if failed else []
    return RewardResult([[None]] * size, counts, problems, {}, failures)


def test_only_failures_of_a_function_with_a_weight_that_last_are_a_reason_to_end():
    def watch(draws: list[tuple[int, int]], weight: float = 1.0, share: float = 0.5) -> FailureWatch:
        made = FailureWatch([RewardSpec("shown", "f", weight, {})], share, 2)
        for draw in draws:
            made.add(result_of(*draw))
            made.end_step()
        return made

    assert watch([(4, 8), (0, 8)]).error is None  # None, "cannot judge", is no failure; half is not more than half
    assert watch([(5, 8), (4, 8), (5, 8)]).steps_down == {"shown": 1}  # a good step in between
    assert watch([(5, 8), (4, 8), (5, 8)]).error is None
    assert watch([(8, 8)] * 3, weight=0.0).error is None
    assert watch([(8, 8)] * 3, share=1.0).error is None
    down = watch([(5, 8)] * 2)
    assert "on 62% in the last (exception: KeyError: 'a' (f.py:1))" in (down.error or "")
    resumed = watch([])
    resumed.restore(watch([(5, 8)]).steps_down)
    resumed.add(result_of(1, 4))
    resumed.add(result_of(9, 12))  # two draws of one step, as of dynamic sampling
    resumed.end_step()
    assert resumed.steps_down == {"shown": 2}
    assert resumed.error is not None


def test_a_failure_that_was_said_is_counted_afterwards_and_another_one_is_said():
    watch = FailureWatch([RewardSpec("shown", "f", 1.0, {})], 0.5, 3)
    first = result_of(2, 4)
    assert watch.add(first).problems == first.problems
    again = result_of(3, 4, message="exception: KeyError: 'b' (f.py:1)")
    assert watch.add(again).problems == ["reward 'other' sample 0: crash"]  # another draw of the same step
    told = []
    for _ in range(8):
        watch.end_step()
        told.append(watch.add(again).problems[1:])
    line = "reward 'shown' failed as before on 3 of 4 (exception 3), in {} steps so far"
    assert told == [[line.format(2)], [], [line.format(4)], [], [], [], [line.format(8)], []]
    other = dataclasses.replace(result_of(1, 4), failures={"shown": {"crash: died": "crash: died"}})
    assert watch.add(other).problems == other.problems
    talks = dataclasses.replace(result_of(0, 4), problems=[f"reward 'shown' {TOO_MANY}"])
    assert [watch.add(talks).problems for _ in range(2)] == [talks.problems, []]


def test_run_tells_of_spikes_and_signs_of_collapse_and_saves_the_samples_of_spikes(recipe, capsys):
    """Thresholds are such that ordinary steps cross them: spikes can be told after ten steps."""
    spikes = ("health.grad_norm_spike=null", "health.kl_spike=0.01", "grpo.steps=11", "checkpoint.every=99")
    signs = ("health.equal_rewards_share=0.01", "health.entropy_floor=99", "health.truncated_share=0.01")
    folder = start(recipe, "watched", *spikes, *signs, "health.patience=8")
    told = capsys.readouterr().out
    for problem, key in (("have the same reward", "grpo.group_size"), ("entropy", "grpo.entropy_coef")):
        assert re.search(rf"warning: .*{problem}.*raise {key}", told)
    assert re.search(r"warning: .*were cut at the length limit; raise sampling\.max_completion_length", told)
    assert re.search(r"warning: kl [\d.]+ is a spike.*raise grpo\.beta", told)
    assert told.count("a loss near 0 is expected on-policy") == 1
    assert told.index("step  1/11") < told.index("a loss near 0") < told.index("step  2/11")
    steps = [sample["step"] for sample in read_samples(folder)]
    assert [steps.count(step) for step in range(1, 12)] == [2] * 10 + [8]


def test_run_with_skipped_updates_resumes_as_if_it_had_never_stopped(recipe):
    settings = (reward("huge_for_even_answers", 1e30), "grpo.scale_rewards=none", "health.max_skipped_updates=null")
    whole = start(recipe, "whole", *settings)
    skipped = [line["skipped_updates"] for line in read_metrics(whole)]
    assert 0 < sum(skipped) < 12
    assert len(set(skipped)) > 1
    lines = read_metrics(whole)
    assert len({line["completion_length/mean"] for line in lines}) > 1
    assert [line["compiles"] for line in lines[2:]] == [0] * 4  # whatever the lengths are
    for line in lines[1:]:  # the time split holds every second of a step, that of the checkpoint before it included
        seconds = {name: value for name, value in line.items() if name.startswith("seconds/")}
        assert {"seconds/rollout", "seconds/reward", "seconds/train", "seconds/checkpoint"} < seconds.keys()
        assert sum(seconds.values()) == pytest.approx(2 * line["seconds/step"])
        assert seconds["seconds/other"] >= 0
    halves = pathlib.Path(shutil.copytree(whole, recipe.parent / "halves"))
    for step in (4, 5, 6):  # as if it had stopped after step 3
        shutil.rmtree(halves / "checkpoints" / str(step))
    start(recipe, "halves", *settings)
    assert checkpoint_steps(halves) == [1, 2, 3, 4, 5, 6]
    stable = lambda folder: [  # noqa: E731
        {k: line[k] for k in ("step", "loss", "grad_norm", "lr", "skipped_updates", "kl", "reward/mean")}
        for line in read_metrics(folder)
    ]
    assert stable(halves) == stable(whole)
    assert read_samples(halves) == read_samples(whole)


def test_supervised_run_skips_and_ends_likewise(recipe):
    with pytest.raises(ValueError, match=r"got 3 with 3 skipped.*weights go up to .*lower optimizer\.lr"):
        start(recipe, "sft", "optimizer.lr=1e35", "health.max_skipped_updates=3", train=sft_trainer.train)
    folder = recipe.parent / "sft"
    assert [line["skipped_updates"] for line in read_metrics(folder)] == [0, 1, 1, 1]
    assert checkpoint_steps(folder) == [1, 2, 3]


@pytest.mark.long
def test_a_run_that_is_tracked_and_traced_is_bit_for_bit_the_run_that_is_not(recipe):
    start(recipe, "unseen", "grpo.steps=3")
    start(recipe, "seen", "grpo.steps=3", *tracked(recipe.parent))
    unseen, seen = ([steady(line) for line in read_metrics(recipe.parent / name)] for name in ("unseen", "seen"))
    assert [{k: v for k, v in line.items() if not k.startswith("trackers/")} for line in seen] == unseen
    assert read_samples(recipe.parent / "seen") == read_samples(recipe.parent / "unseen")
    states = [recipe.parent / name / "checkpoints" / "3" / "state" for name in ("unseen", "seen")]
    hashes = [{array.path: array_hash(read_array(array)) for array in stored_arrays(state)} for state in states]
    assert hashes[0] == hashes[1]
