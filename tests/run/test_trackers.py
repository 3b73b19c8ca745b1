"""Trackers: what they get, what happens when they fail, hang or are slow, and what real packages read back."""

import importlib.util
import inspect
import json
import re
import threading
import time

import numpy as np
import pytest

from rl.config.load import load_config
from rl.config.sections import TRACKER_NAMES, to_dict
from rl.run.log import RunLog
from rl.run.trackers.contract import TrackedRun, TrackedStep, table_of
from rl.run.trackers.trackers import Trackers
from tests.helpers.pages import blocks, texts
from tests.helpers.places import ROOT

ID = "0123456789abcdef" * 2
SAMPLE = {
    "prompt_index": 0,
    "sample_index": 1,
    "prompt": "1+1=",
    "completion": "<b>2</b>\n| x",
    "answer": "2",
    "rewards": {"right": 1.0, "short": None},
    "reward": 1.0,
    "advantage": 0.5,
    "finish_reason": "eos",
    "token_ids": [1, 2],
    "num_tokens": 2,
}
OWN = """
import threading
SEEN, GATE = [], threading.Event()

class Tracker:
    def __init__(self, run, mode):
        self.mode, self.place = mode, f"run {run.name}"

    def log(self, step):
        if self.mode == "hangs":
            GATE.wait()
        if self.mode == "fails" and step.step % 2:
            raise OSError("the server is down")
        SEEN.append(step)

    def close(self, is_failed):
        SEEN.append(is_failed)

def make_tracker(run, mode="works"):
    if mode == "cannot be made":
        raise RuntimeError("no such project")
    return 7 if mode == "is none" else Tracker(run, mode)
"""


@pytest.fixture
def own(tmp_path):
    """The name of a user's tracker, as the configuration has it."""
    (tmp_path / "own.py").write_text(OWN)
    return f"{tmp_path / 'own.py'}:make_tracker"


def trackers_of(names, args="{}", *overrides):
    return Trackers(load_config(None, [f"logging.trackers=[{names}]", f"logging.tracker_args={args}", *overrides]))


def run_in(folder, is_resumed=False):
    return TrackedRun(ID, folder.name, "grpo", folder, to_dict(load_config(None)), is_resumed)


def step_of(number, *samples):
    values = np.arange(4.0) * number
    return TrackedStep(number, {"reward/mean": number / 10}, {"reward": values}, samples)


def follow(trackers, folder, numbers, is_resumed=False):
    """Has the trackers take steps; returns what their end warns about."""
    trackers.start(run_in(folder, is_resumed))
    for number in numbers:
        trackers.put(step_of(number, *([SAMPLE] if number % 2 == 0 else [])))
    return trackers.end(False, False, print)


def seen_by(trackers):
    """What a user's tracker has seen, and the event that lets a hanging one go on."""
    maker = trackers._makers[trackers.names[0]]
    return maker.args[0].__globals__["SEEN"], maker.args[0].__globals__["GATE"]


def test_a_users_tracker_gets_every_step_and_the_end_in_a_thread_of_its_own(own, tmp_path, capsys):
    trackers = trackers_of(own)
    assert follow(trackers, tmp_path, range(1, 5)) == []
    assert capsys.readouterr().out == f"tracker make_tracker: run {tmp_path.name}\n"
    *steps, is_failed = seen_by(trackers)[0]
    assert [step.step for step in steps] == [1, 2, 3, 4]
    assert (dict(steps[1].metrics), list(steps[1].samples), is_failed) == ({"reward/mean": 0.2}, [SAMPLE], False)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("tracker")]


def test_trackers_speak_before_the_last_words_of_a_run_also_where_no_step_was_left(own, tmp_path, capsys):
    (tmp_path / "run.json").write_text('{"run": "1234"}')
    config = load_config(None, [f"logging.trackers=[{own}]", "grpo.steps=4"])
    with RunLog(config) as log, log.tracking(tmp_path, "grpo", True):
        log.ended(4, tmp_path, "`grpo eval`")
    told = capsys.readouterr().out.splitlines()
    assert told == [
        f"tracker make_tracker: run {tmp_path.name}",
        f"done: {tmp_path} has all 4 steps; next: `grpo eval`",
    ]


def test_a_tracker_that_hangs_holds_up_neither_steps_nor_the_end_and_what_it_lacks_is_counted(own, tmp_path):
    trackers = trackers_of(
        own, f"{{'{own}': {{mode: hangs}}}}", "logging.tracker_queue=2", "logging.tracker_wait_seconds=0.05"
    )
    trackers.start(run_in(tmp_path))
    delivery = trackers._deliveries[0]
    trackers.put(step_of(1))
    while delivery._queue.qsize():  # until the thread hangs in the first step
        time.sleep(0.001)
    for number in range(2, 7):
        trackers.put(step_of(number))
    assert trackers.metrics() == {"trackers/make_tracker/dropped": 3}
    (problem,) = trackers.problems()
    assert "tracker make_tracker: 2 steps wait for it (logging.tracker_queue), so further ones are dropped" in problem
    said = []
    (left,) = trackers.end(False, False, said.append)
    assert said[0].startswith("waiting for make_tracker to take the last steps, at most 0.05 s (logging.tracker_wait")
    # the step in hand, two that wait, and the three dropped ones
    assert "tracker make_tracker has not ended after 0.05 s, and is left; it lacks 6 steps of this start" in left
    seen_by(trackers)[1].set()
    delivery.wait(5.0)
    assert False not in seen_by(trackers)[0]  # it is not closed any more


def test_a_tracker_that_raises_is_warned_about_once_and_its_steps_are_counted(own, tmp_path):
    trackers = trackers_of(own, f"{{'{own}': {{mode: fails}}}}")
    problem, lacking = follow(trackers, tmp_path, range(1, 6))
    assert "tracker make_tracker: a step did not reach it: OSError: the server is down (" in problem
    assert "own.py:13)" in problem
    assert "lacks 3 steps" in lacking
    assert [step.step for step in seen_by(trackers)[0][:-1]] == [2, 4]


def test_a_users_tracker_that_cannot_be_made_is_refused_with_its_own_line(own, tmp_path):
    with pytest.raises(
        ValueError, match=r"must not raise when it is made, got RuntimeError: no such project \(.*own.py:21\)"
    ):
        trackers_of(own, f"{{'{own}': {{mode: cannot be made}}}}").start(run_in(tmp_path))
    with pytest.raises(ValueError, match="must return an object with the methods log and close, got a int without log"):
        trackers_of(own, f"{{'{own}': {{mode: is none}}}}").start(run_in(tmp_path))


def test_settings_that_a_tracker_does_not_take_are_refused_by_name(own):
    with pytest.raises(ValueError, match=r"got \['speed'\].*it takes \['mode'\]"):
        trackers_of(own, f"{{'{own}': {{speed: 1}}}}")
    with pytest.raises(ValueError, match=r"logging.trackers tensorboard must take .* it takes \['folder'\]"):
        trackers_of("tensorboard", "{tensorboard: {folders: x}}")
    with pytest.raises(ValueError, match="does not import: FileNotFoundError"):
        trackers_of("no_such_file.py:make_tracker")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["logging.trackers=[wandbb]"], r"logging.trackers must hold one of \['tensorboard', .* got 'wandbb'"),
        (["logging.trackers=[wandb, wandb]"], "must name each tracker once"),
        (["logging.tracker_args.neptune.project=x"], r"logging.tracker_args must be for \[\]"),
        (["logging.tracker_args.wandb=3"], "logging.tracker_args.wandb must be a mapping, got 3"),
        (["logging.tracker_args.wandb.api_key=123"], "must hold no passwords or keys, which config.yml would show"),
        (["logging.tracker_args.mlflow.tracking_uri='https://me:secret@host'"], "must hold no passwords or keys"),
        (["logging.tracker_args.trackio.server_url='http://host?write_token=1'"], "must hold no passwords or keys"),
        (["profile.steps=[3]"], r"profile.steps must be \[first, last\] or \[\]"),
        (["profile.steps=[5, 3]"], r"profile.steps must be \[first, last\] or \[\]"),
        (["profile.memory=true"], r"profile.steps must name \[first, last\] with profile.memory"),
    ],
)
def test_a_configuration_that_cannot_track_is_refused_when_it_is_read(overrides, message):
    with pytest.raises(ValueError, match=message) as error:
        load_config(None, overrides)
    assert "secret" not in str(error.value)


@pytest.mark.parametrize("name", TRACKER_NAMES)
def test_a_missing_library_is_an_error_that_names_the_extra(name, monkeypatch):
    module = {"tensorboard": "tensorboard.summary.writer.event_file_writer"}.get(name, name)
    monkeypatch.setitem(__import__("sys").modules, module, None)
    with pytest.raises(ValueError, match=rf"logging.trackers {name} needs the library {name}.*tandem-grpo\[{name}\]"):
        trackers_of(name)


def test_a_table_of_samples_has_a_column_for_each_reward():
    columns, (row,) = table_of([SAMPLE | {"prompt": [{"role": "user", "content": "1+1="}]}])
    assert dict(zip(columns, row, strict=True)) == {
        "prompt_index": 0,
        "sample_index": 1,
        "prompt": '[{"role": "user", "content": "1+1="}]',
        "completion": "<b>2</b>\n| x",
        "answer": "2",
        "reward": 1.0,
        "reward/right": 1.0,
        "reward/short": None,
        "advantage": 0.5,
        "finish_reason": "eos",
    }


PAGE = (ROOT / "docs" / "trackers.md").read_text()


def test_the_blocks_of_the_page_load_and_its_tracker_writes_what_it_says(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (code,) = texts("docs/trackers.md", "python")
    (tmp_path / "my_tracker.py").write_text(code)
    recipes = texts("docs/trackers.md", "yaml")
    for number, text in enumerate(recipes):
        (tmp_path / f"{number}.yml").write_text(text)
        load_config(tmp_path / f"{number}.yml")
    (own,) = [number for number, text in enumerate(recipes) if "my_tracker" in text]
    assert follow(Trackers(load_config(tmp_path / f"{own}.yml")), tmp_path, range(1, 4)) == []
    assert (tmp_path / "curve.csv").read_text() == "1,0.1\n2,0.2\n3,0.3\n"
    assert {block.language for block in blocks("docs/trackers.md")} == {"yaml", "bash", "python"}


@pytest.mark.parametrize("name", TRACKER_NAMES)
def test_the_page_has_every_setting_of_a_tracker(name):
    module = importlib.import_module(f"rl.run.trackers.to_{name}")
    settings = [*inspect.signature(module.Settings).parameters]
    (row,) = [line for line in PAGE.splitlines() if line.startswith(f"| `{name}`")]
    named = re.findall(r"`(\w+)`", row.split("|")[3])
    assert [each for each in named if each in settings] == settings


# Real packages. Each test skips where its package is missing: the extras are no dependencies (docs/trackers.md).


def needs(name):
    reason = f"the package {name} is not installed; pip install '.[{name}]'"
    return pytest.mark.skipif(importlib.util.find_spec(name) is None, reason=reason)


@needs("tensorboard")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_tensorboard_reads_back_scalars_histograms_tables_and_hides_what_a_resumed_run_repeats(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator as ScalarAccumulator
    from tensorboard.backend.event_processing.plugin_event_accumulator import EventAccumulator  # of its pages
    from tensorboard.util.tensor_util import make_ndarray

    assert follow(trackers_of("tensorboard"), tmp_path, range(1, 6)) == []
    assert follow(trackers_of("tensorboard"), tmp_path, range(4, 7), is_resumed=True) == []
    events = EventAccumulator(str(tmp_path / "tensorboard"), size_guidance={"tensors": 0})
    events.Reload()

    def read(tag):
        return {event.step: make_ndarray(event.tensor_proto) for event in events.Tensors(tag)}

    scalars = ScalarAccumulator(str(tmp_path / "tensorboard"))
    scalars.Reload()
    expected = [(number, pytest.approx(number / 10)) for number in range(1, 7)]
    assert [(event.step, event.value) for event in scalars.Scalars("reward/mean")] == expected
    assert [(event.step, make_ndarray(event.tensor_proto)) for event in events.Tensors("reward/mean")] == expected
    assert [event.step for event in events.Tensors("histogram/reward")] == [1, 2, 3, 4, 5, 6]
    assert read("histogram/reward")[2][:, 2].sum() == 4
    assert read("histogram/reward")[2][-1, 1] == 6
    header, row = read("samples")[2]
    assert row[list(header).index(b"completion")] == b"    <b>2</b>\n    | x"
    assert b'"group_size"' in read("config")[4].item()


def records_of(content):
    """The records of a .wandb file: a log of LevelDB, whose blocks of 32 KiB hold parts with a header of 7 bytes. The
    package's own reader is not in Python.
    """
    assert content[:4] == b":W&B"
    place, record = 7, b""
    while place + 7 <= len(content):
        if (left := 32768 - place % 32768) < 7:
            place += left
            continue
        size, kind = int.from_bytes(content[place + 4 : place + 6], "little"), content[place + 6]
        record += content[place + 7 : place + 7 + size]
        place += 7 + size
        if kind in (1, 4):  # whole, or the last part
            yield record
            record = b""


@needs("wandb")
@pytest.mark.long
@pytest.mark.filterwarnings("ignore")
def test_wandb_keeps_both_parts_of_a_run_under_one_id_offline(tmp_path):
    from wandb.proto import wandb_internal_pb2

    script = f"""
import pathlib
from tests.run.test_trackers import follow, trackers_of
folder = pathlib.Path({str(tmp_path)!r})
assert follow(trackers_of("wandb", "{{wandb: {{project: sums}}}}"), folder, range(1, 6)) == []
assert follow(trackers_of("wandb", "{{wandb: {{project: sums}}}}"), folder, range(4, 7), is_resumed=True) == []
"""
    key = "0123456789" * 4
    said = in_a_process(script, WANDB_MODE="offline", WANDB_API_KEY=key)  # its files are whole when the process ends
    assert all(line.startswith(("tracker wandb: ", "waiting for wandb")) for line in said.splitlines())
    files = sorted(tmp_path.glob(f"wandb/offline-run-*/run-{ID}.wandb"))
    rows, runs = [], []
    for file in files:
        for data in records_of(file.read_bytes()):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(data)
            if record.HasField("history"):
                rows.append(
                    {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
                )
            if record.HasField("run"):
                runs.append((record.run.run_id, record.run.project, record.run.display_name))
    assert set(runs) == {(ID, "sums", tmp_path.name)}
    assert len(files) == 2
    kept = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert not [path for path in kept if key.encode() in path.read_bytes()]
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 4, 5, 6]
    assert rows[1]["reward/mean"] == 0.2
    assert rows[1]["histogram/reward._type"] == "histogram"
    assert rows[1]["samples._type"] == "table-file"
    table = json.loads(next(tmp_path.glob("wandb/offline-run-*/files/media/table/samples*.table.json")).read_text())
    assert table["data"][0][table["columns"].index("completion")] == "<b>2</b>\n| x"


@needs("trackio")
@pytest.mark.filterwarnings("ignore")
def test_trackio_goes_on_in_the_run_of_the_same_name(tmp_path):
    script = f"""
import pathlib
from tests.run.test_trackers import follow, trackers_of
folder = pathlib.Path({str(tmp_path)!r})
assert follow(trackers_of("trackio"), folder, range(1, 6)) == []
assert follow(trackers_of("trackio"), folder, range(4, 7), is_resumed=True) == []
from trackio.sqlite_storage import SQLiteStorage
import json
(run,) = SQLiteStorage.get_runs("tandem")
rows = SQLiteStorage.get_logs("tandem", run)
print("ROWS", json.dumps([run, rows], default=str))
"""
    output = in_a_process(script, TRACKIO_DIR=str(tmp_path / "trackio"))
    run, rows = json.loads(output.partition("ROWS ")[2].splitlines()[0])
    assert run == f"{tmp_path.name}-{ID[:8]}"
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 4, 5, 6]
    assert rows[1]["reward/mean"] == 0.2
    assert rows[1]["histogram/reward"]["_type"] == "trackio.histogram"
    assert rows[1]["samples"]["_value"][0]["completion"] == "<b>2</b>\n| x"


@needs("mlflow")
@pytest.mark.long
@pytest.mark.filterwarnings("ignore")
def test_mlflow_goes_on_in_the_run_with_the_same_tag_in_a_sqlite_store(tmp_path, monkeypatch):
    import mlflow

    monkeypatch.chdir(tmp_path)  # where its files go
    store = f"sqlite:///{tmp_path}/mlflow.db"
    args = f"{{mlflow: {{tracking_uri: '{store}', experiment: sums}}}}"
    assert follow(trackers_of("mlflow", args), tmp_path, range(1, 6)) == []
    assert follow(trackers_of("mlflow", args), tmp_path, range(4, 7), is_resumed=True) == []
    client = mlflow.MlflowClient(store)
    (run,) = client.search_runs([client.get_experiment_by_name("sums").experiment_id])
    assert (run.info.run_name, run.info.status, run.data.tags["tandem.run"]) == (tmp_path.name, "FINISHED", ID)
    assert run.data.params["grpo.group_size"] == str(load_config(None).grpo.group_size)
    history = client.get_metric_history(run.info.run_id, "reward/mean")
    assert sorted((point.step, point.value) for point in history) == [
        (number, number / 10) for number in (1, 2, 3, 4, 4, 5, 5, 6)
    ]
    folder = mlflow.artifacts.download_artifacts(run_id=run.info.run_id, tracking_uri=store, dst_path=str(tmp_path))
    import csv
    import pathlib

    with (pathlib.Path(folder) / "samples" / "step_00000002.csv").open(newline="") as file:
        (row,) = csv.DictReader(file)
    assert row["completion"] == "<b>2</b>\n| x"
    assert json.loads((pathlib.Path(folder) / "histograms" / "step_00000002.json").read_text())["reward"]["counts"]


def in_a_process(script, **variables):
    """The output of a script in a process of its own, because trackio reads its folder from the environment once."""
    import os
    import subprocess
    import sys

    done = subprocess.run(
        [sys.executable, "-c", script], env={**os.environ, **variables}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout
