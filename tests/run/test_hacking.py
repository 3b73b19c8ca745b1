"""The watch for hacked rewards: what is read of a step's arrays, when that is a sign, and that a resume changes
nothing.
"""

import json
import math

import numpy as np
import pytest

from rl.config.load import load_config
from rl.data.prompt_rows import PromptRow
from rl.rollout.groups import Judged, with_advantages
from rl.run.hacking import trend
from rl.run.health import HealthState, examine, healthy
from rl.sampler.contract import Completion

FINE = {"skipped_updates": 0}


def completion_of(ids):
    tokens, logprobs, none = (
        np.array(ids, np.int32),
        np.zeros(len(ids), np.float32),
        np.zeros((len(ids), 0), np.float32),
    )
    return Completion(0, 0, tokens, logprobs, logprobs, "eos", None, none, none)


def metrics_of(rewards, ids, names, weights, *overrides):
    """The metrics of a step with these rewards [B][K] and completions [P][G]; every group has a prompt of its own."""
    rows = [PromptRow(str(p), np.array([p], np.int32), {}, p) for p in range(len(ids))]
    completions = [[completion_of(own) for own in group] for group in ids]
    config = load_config(None, [f"grpo.group_size={len(ids[0])}", *overrides])
    judged = Judged(rows, completions, ["x"] * len(rewards), rewards, names, weights, {}, [])
    return with_advantages(config, judged).metrics


def warnings_of(steps, *overrides, watched=(), state=None):
    """(step from 1, warning) of steps with these metrics, and the state after them."""
    section, state, told = load_config(None, overrides).health, state or healthy(), []
    for number, metrics in enumerate(steps, 1):
        checkup = examine(section, state, FINE | metrics, watched=watched)
        state = checkup.health
        told += [(number, warning) for warning in checkup.warnings]
    return told, state


IDS = [[[1], [2, 2], [3, 3, 3], [4]], [[5], [6, 6], [7, 7, 7], [4]]]


def test_one_function_that_carries_the_spread_of_a_sum_is_named_while_others_have_more_to_give():
    """Shares by hand: in the first group both functions differ, in the second neither does."""
    rewards = [[0.0, 0.0], [0.0, 1.0], [10.0, 0.0], [10.0, 1.0], *[[0.0, 0.0]] * 4]
    metrics = metrics_of(rewards, IDS, ["right", "form"], [1.0, 0.5])
    # Parts are -5, -5, 5, 5 and -.25, .25, -.25, .25, which are orthogonal.
    assert metrics["reward/right/variance_share"] == pytest.approx(100 / 100.25)
    assert metrics["reward/form/variance_share"] == pytest.approx(0.25 / 100.25)
    assert metrics["reward/dominant_share"] == metrics["reward/right/variance_share"]
    told, _ = warnings_of([metrics] * 13)
    assert [step for step, _ in told] == [3, 6, 12]
    assert told[0][1].startswith("100% of the spread of weighted rewards within groups is that of 'right', although")
    assert "rewards.functions" in told[0][1]
    assert warnings_of([metrics] * 5, "health.dominant_share=null")[0] == []
    assert "reward/dominant_share" not in metrics_of(rewards, IDS, ["right", "form"], [1.0, 0.0])  # no sum of several
    other = metrics_of(rewards, IDS, ["right", "form"], [1.0, 0.5], "grpo.aggregation=normalize_then_sum")
    assert not [name for name in other if "share" in name and name.startswith("reward/")]
    learned = [[right, 1.0] for right, _ in rewards]  # the form is right everywhere: nothing is wrong
    metrics = metrics_of(learned, IDS, ["right", "form"], [1.0, 0.5])
    assert metrics["reward/right/variance_share"] == pytest.approx(1.0)
    assert "reward/dominant_share" not in metrics
    unjudged = [[None, 1.0], *rewards[1:]]  # a completion that not all could judge says nothing of their shares
    assert math.isfinite(metrics_of(unjudged, IDS, ["right", "form"], [1.0, 0.5])["reward/dominant_share"])


def test_a_reward_that_rises_while_a_watched_function_falls_is_named_and_a_resume_counts_on():
    rng = np.random.default_rng(0)
    rise = [{"reward/mean": 0.1 + 0.02 * i + 0.02 * rng.normal()} for i in range(40)]
    fall = [step | {"reward/kind/mean": 0.9 - 0.01 * i + 0.02 * rng.normal()} for i, step in enumerate(rise)]
    level = [step | {"reward/kind/mean": 0.9 + 0.02 * rng.normal()} for step in rise]
    told, state = warnings_of(fall, watched=["kind"])
    assert [step for step, _ in told] == [22, 25, 31]  # the window is full at 20
    assert "while 'kind', a function of weight 0, fell from about 0.8" in told[0][1]
    assert "give 'kind' a weight in rewards.functions" in told[0][1]
    assert [len(values) for values in state.recent.values()] == [20, 20]
    assert warnings_of(level, watched=["kind"])[0] == []
    assert warnings_of(fall)[0] == []  # it has a weight
    assert warnings_of(fall, "health.watch_trend=null", watched=["kind"])[0] == []
    first, kept = warnings_of(fall[:23], watched=["kind"])
    kept = HealthState(**json.loads(json.dumps(kept._asdict())))
    rest, last = warnings_of(fall[23:], watched=["kind"], state=kept)
    assert [*first, *((step + 23, text) for step, text in rest)] == told
    assert last == state


def test_trend_is_the_slope_in_its_standard_errors():
    values = [1.0, 3.0, 2.0, 5.0]  # slope 1.1; residuals -.1, .8, -1.3, .6; s = sqrt(2.7 / 2), error s / sqrt(5)
    assert trend(values) == pytest.approx(1.1 / math.sqrt(2.7 / 2 / 5))
    assert trend([-value for value in values]) == pytest.approx(-trend(values))
    assert (trend([1.0, 2.0, 3.0]), trend([3.0, 2.0, 1.0])) == (math.inf, -math.inf)
    assert (trend([0.1] * 9), trend([1.0, 2.0])) == (0.0, 0.0)


def test_rewards_that_go_with_length_are_named_with_the_way_out_of_each_direction():
    lengths = [len(ids) for group in IDS for ids in group]
    metrics = metrics_of([[0.1 * length + b // 4] for b, length in enumerate(lengths)], IDS, ["mine"], [1.0])
    assert metrics["reward/length_correlation"] == pytest.approx(1.0)
    told, _ = warnings_of([metrics] * 22)
    assert [step for step, _ in told] == [22]
    assert "longer completions" in told[0][1]
    assert "rewards.overlong_buffer" in told[0][1]
    told, _ = warnings_of([{"reward/length_correlation": -0.9}] * 22)
    assert "shorter completions" in told[0][1]
    assert warnings_of([metrics, {"reward/length_correlation": -1.0}] * 11)[0] == []
    assert warnings_of([metrics] * 22, "health.length_correlation=null")[0] == []
    partly = metrics_of([[1.0], [None], [0.0], [0.5], *[[2.0]] * 4], IDS, ["mine"], [1.0])
    parts = np.array([0.5, -0.5, 0.0]), np.array([1, 3, 1]) - 5 / 3
    expected = parts[0] @ parts[1] / math.sqrt((parts[0] @ parts[0]) * (parts[1] @ parts[1]))
    assert partly["reward/length_correlation"] == pytest.approx(expected)
    assert "reward/length_correlation" not in metrics_of([[1.0]] * 8, IDS, ["mine"], [1.0])


def test_one_completion_for_different_prompts_is_named_and_one_for_one_prompt_is_not():
    ids = [[[4], [4], [4], [4]], [[4], [4], [4], [9]]]
    metrics = metrics_of([[float(b)] for b in range(8)], ids, ["mine"], [1.0])
    assert metrics["equal_completions_share"] == 7 / 8
    told, _ = warnings_of([metrics] * 4)
    assert [step for step, _ in told] == [3]
    assert told[0][1].startswith("88% of the completions are one and the same, for different prompts")
    assert warnings_of([metrics] * 4, "health.equal_completions_share=null")[0] == []
    lost = [[[4], [], [], []], [[], [], [4], [9]]]
    assert metrics_of([[float(b)] for b in range(8)], lost, ["mine"], [1.0])["equal_completions_share"] == 2 / 3
    own = [[[4]] * 4, [[5]] * 4]
    assert metrics_of([[float(b)] for b in range(8)], own, ["mine"], [1.0])["equal_completions_share"] == 0


def test_the_state_of_a_run_before_there_was_a_watch_is_taken_over():
    old = HealthState(num_skipped=1, num_skipped_last=0, recent={"kl": [0.1]}, lasting={"entropy": 2})
    _, state = warnings_of([{"reward/mean": 0.5, "reward/length_correlation": 0.1}], state=old)
    assert state.recent == {"kl": [0.1], "reward/mean": [0.5], "reward/length_correlation": [0.1]}
