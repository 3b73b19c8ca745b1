"""Whose a run folder is: opened, begun, resumed, refused, and never damaged."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

from rl.config import load_config
from rl.run_folder import RunFolder, read_run

ORIGIN = {"policy": {"source": "some/model", "hash": "abc"}, "reference": None}
ROOT = pathlib.Path(__file__).resolve().parents[1]


def config_for(folder, *overrides):
    return load_config(None, [f"output_dir={folder}", *overrides])


def open_folder(folder, *overrides, kind="grpo", origin=ORIGIN):
    return RunFolder(config_for(folder, *overrides), kind, origin)


def make_run(folder, *overrides, **arguments):
    """A run that has recorded one step and a checkpoint."""
    run = open_folder(folder, *overrides, **arguments)
    run.begin()
    (folder / "metrics.jsonl").write_text('{"step": 1}\n')
    (folder / "samples.jsonl").write_text('{"step": 1}\n')
    (folder / "rewards.log").write_text("said\n")
    (folder / "checkpoints" / "1").mkdir(parents=True)
    (folder / "checkpoints" / "1" / "data").write_text("weights")
    run.close()


def snapshot(folder):
    """{path: (content, time of the last change)} of everything below a folder."""
    return {
        str(path.relative_to(folder)): (path.read_bytes() if path.is_file() else None, path.stat().st_mtime_ns)
        for path in folder.rglob("*")
    }


# A new run


@pytest.mark.parametrize("exists", [True, False])
def test_a_new_run_writes_its_configuration_and_identity(tmp_path, exists):
    folder = tmp_path / "runs" / "a"
    if exists:
        folder.mkdir(parents=True)
    run = open_folder(folder, "grpo.steps=7")
    assert run.path == folder
    assert not run.resumed
    assert [path.name for path in folder.iterdir()] == [".lock"]  # nothing before begin
    run.begin()
    config, identity = read_run(folder)
    assert config == config_for(folder, "grpo.steps=7")
    assert identity == {"kind": "grpo", **ORIGIN}
    (folder / "metrics.jsonl").write_text('{"step": 0}\n')
    run.close()
    assert {"config.yml", "run.json", "metrics.jsonl"} <= {path.name for path in folder.iterdir()}


def test_a_start_that_fails_leaves_nothing_behind(tmp_path):
    run = open_folder(tmp_path / "new")
    (tmp_path / "new" / "rewards.log").write_text("a traceback")
    run.close()
    assert not (tmp_path / "new").exists()
    (tmp_path / "empty").mkdir()
    run = open_folder(tmp_path / "empty")
    run.begin()
    (tmp_path / "empty" / "checkpoints").mkdir()  # as the checkpoint manager makes it
    (tmp_path / "empty" / "metrics.jsonl").touch()
    run.close()
    assert list((tmp_path / "empty").iterdir()) == []


@pytest.mark.parametrize(
    "left", [(".lock",), (".lock", "rewards.log"), (".lock", "run.json.tmp"), (".lock", "run.json")]
)
def test_a_start_that_was_killed_is_no_run(tmp_path, left):
    folder = tmp_path / "a"
    folder.mkdir()
    for name in left:
        (folder / name).write_text("{}")
    run = open_folder(folder)
    assert not run.resumed
    run.begin()
    assert read_run(folder)[1] == {"kind": "grpo", **ORIGIN}
    run.close()


def test_other_settings_may_take_over_a_folder_in_which_nothing_was_recorded(tmp_path):
    first = open_folder(tmp_path / "a", "optimizer.lr=1e-3")
    first.begin()
    os.close(first._lock)  # killed: no close
    second = open_folder(tmp_path / "a", "optimizer.lr=1e-4")
    second.begin()
    assert read_run(tmp_path / "a")[0].optimizer.lr == 1e-4
    second.close()


# The same run again


def test_the_same_settings_resume_and_change_nothing(tmp_path):
    make_run(tmp_path / "a")
    before = snapshot(tmp_path / "a")
    run = open_folder(tmp_path / "a", "grpo.steps=500", "checkpoint.every=1", "pure_nnx=false")
    assert run.resumed
    run.begin()
    run.close()
    assert snapshot(tmp_path / "a") == before


def test_overwrite_deletes_the_old_run_at_begin_and_not_before(tmp_path):
    folder = tmp_path / "a"
    make_run(folder)
    before = snapshot(folder)
    run = open_folder(folder, "checkpoint.overwrite=true", "optimizer.lr=1e-3")
    assert not run.resumed
    assert snapshot(folder) == before
    run.begin()
    assert {path.name for path in folder.iterdir()} == {"config.yml", "run.json", "rewards.log", ".lock"}
    assert read_run(folder)[0].optimizer.lr == 1e-3
    run.close()


def test_a_start_with_overwrite_that_fails_leaves_the_old_run(tmp_path):
    make_run(tmp_path / "a")
    before = snapshot(tmp_path / "a")
    run = open_folder(tmp_path / "a", "checkpoint.overwrite=true", "optimizer.lr=1e-3")
    run.close()
    assert snapshot(tmp_path / "a") == before


def test_overwrite_leaves_files_that_are_not_the_runs(tmp_path):
    make_run(tmp_path / "a")
    (tmp_path / "a" / "notes.txt").write_text("mine")
    run = open_folder(tmp_path / "a", "checkpoint.overwrite=true")
    run.begin()
    run.close()
    assert (tmp_path / "a" / "notes.txt").read_text() == "mine"


# Refusals


@pytest.mark.parametrize(
    ("overrides", "arguments", "message"),
    [
        (
            ("optimizer.lr=1e-3",),
            {},
            r"holds another run: optimizer\.lr was 1e-06, is 0\.001; choose another output_dir, or",
        ),
        ((), {"kind": "sft"}, r"holds a run of kind 'grpo', this is 'sft'; choose another output_dir"),
        (
            (),
            {"origin": {**ORIGIN, "policy": {"source": "some/model", "hash": "xyz"}}},
            r"the policy of the run in .* was .*'abc'.*, it is now .*'xyz'.*; a resumed run needs the same one",
        ),
    ],
)
def test_another_run_is_refused_and_left_as_it_is(tmp_path, overrides, arguments, message):
    make_run(tmp_path / "a")
    before = snapshot(tmp_path / "a")
    for _ in range(2):  # the lock is given back, too
        with pytest.raises(ValueError, match=message) as error:
            open_folder(tmp_path / "a", *overrides, **arguments)
        assert "checkpoint.overwrite=true to delete that run" in str(error.value)
    assert snapshot(tmp_path / "a") == before


@pytest.mark.parametrize("overwrite", ["true", "false"])
@pytest.mark.parametrize("content", ["thesis.tex", "config.yml", "checkpoints/1/x"])
def test_a_folder_with_something_else_is_refused_and_left_as_it_is(tmp_path, content, overwrite):
    path = tmp_path / "a" / content
    path.parent.mkdir(parents=True)
    path.write_text("mine")
    before = snapshot(tmp_path)
    with pytest.raises(ValueError, match=r"output_dir must be empty or hold a run, got .*choose another output_dir"):
        open_folder(tmp_path / "a", f"checkpoint.overwrite={overwrite}")
    assert snapshot(tmp_path) == before


def test_a_file_or_no_folder_at_all_is_refused(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ValueError, match=r"output_dir must be a folder, got the file "):
        open_folder(tmp_path / "file")
    with pytest.raises(ValueError, match=r"output_dir must be a folder that can be written, got .*choose another"):
        open_folder(tmp_path / "file" / "below")
    with pytest.raises(ValueError, match=r"output_dir must be set, got None; for example output_dir=runs/my_run"):
        RunFolder(load_config(None), "grpo", ORIGIN)


def test_only_one_process_owns_a_folder(tmp_path):
    run = open_folder(tmp_path / "a")
    code = f"""
import sys
sys.path.insert(0, "tests")
from test_run_folder import open_folder
import pathlib
open_folder(pathlib.Path({str(tmp_path / "a")!r}))
"""
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert "is in use by another process; stop that one or choose another output_dir" in result.stderr
    run.begin()
    (tmp_path / "a" / "metrics.jsonl").write_text('{"step": 0}\n')
    run.close()
    again = open_folder(tmp_path / "a")
    assert again.resumed
    again.close()


# Reading


def test_a_folder_without_a_run_cannot_be_read(tmp_path):
    with pytest.raises(ValueError, match=r"must be a run folder with config\.yml and run\.json, and it is not"):
        read_run(tmp_path)
    (tmp_path / "run.json").write_text(json.dumps({"kind": "grpo"}))
    with pytest.raises(ValueError, match="must be a run folder"):
        read_run(tmp_path)
