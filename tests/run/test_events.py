import math

import numpy as np

from rl.config.load import load_config
from rl.run.histograms import MOST_BINS, histogram
from rl.run.log import RunLog
from rl.run.metrics import read_events
from rl.run.step_values import StepValues

CONFIG = load_config(None, ["grpo.steps=8"])


def run(folder, first_step, steps, early=()):
    """A run that warns in its even steps."""
    with RunLog(CONFIG) as log:
        log.warnings(early)
        with log.recording(folder, first_step):
            for step in steps:
                with log.timer("train"):
                    pass
                log.step(step, {"reward/mean": 0.5}, 10, values=StepValues({"reward": np.array([0.0] + [1.0] * step)}))
                log.warnings([f"step {step} is odd"] * (step % 2 == 0))


def test_warnings_have_the_step_they_came_at_and_starts_their_environment(tmp_path, capsys):
    run(tmp_path, 0, range(1, 5), early=["before the first step"])
    start, early, *others = read_events(tmp_path)
    assert start["step"] == 0
    assert start["start"]["python"].startswith("3.")
    assert "cpu" in start["start"]["devices"]
    assert early == {"step": 0, "warning": "before the first step"}
    assert [event["step"] for event in others if "warning" in event] == [2, 4]
    assert [event["histograms"]["reward"][1] for event in others if "histograms" in event] == [
        [1.0, k] for k in range(1, 5)
    ]
    assert capsys.readouterr().out.count("warning: ") == 3


def test_a_resumed_run_repeats_the_events_of_the_steps_that_run_again(tmp_path):
    run(tmp_path / "whole", 0, range(1, 6))
    run(tmp_path / "resumed", 0, range(1, 5))
    run(tmp_path / "resumed", 3, range(4, 6))

    def without_starts(name):
        return [event for event in read_events(tmp_path / name) if "start" not in event]

    assert without_starts("resumed") == without_starts("whole")
    assert [event["step"] for event in read_events(tmp_path / "resumed") if "start" in event] == [0, 3]


def test_a_start_that_ends_before_its_first_line_writes_no_file(tmp_path):
    with RunLog(CONFIG) as log, log.recording(tmp_path / "run", 0):
        log.warning("nothing is drawn yet")
    assert not (tmp_path / "run").exists()


def test_a_run_of_an_older_version_has_no_events(tmp_path):
    assert read_events(tmp_path) == []


def test_few_values_are_counted_as_they_are_and_many_in_bins():
    assert histogram([1.0, 0.0, 1.0, math.nan]) == [[0.0, 1], [1.0, 2]]
    assert histogram([]) == []
    pairs = histogram(float(k) for k in range(1000))
    assert len(pairs) == MOST_BINS
    assert sum(count for _, count in pairs) == 1000
    assert pairs[0][0] == 15.6094  # the middle of the first of 32 bins from 0 to 999
