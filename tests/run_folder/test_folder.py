"""Whose a run folder is: opened, begun, resumed, refused, and never damaged."""

import functools
import itertools
import json
import os
import shutil
import subprocess
import sys

import pytest

from rl.config.load import dump_config, load_config
from rl.run.eval_files import evaluation_file
from rl.run.metrics import MetricsWriter
from rl.run_folder.folder import RunFolder, load_run_config, read_run
from rl.run_folder.replaced import move_aside
from rl.state.checkpoint_files import write_hashes
from tests.helpers.places import ROOT

ORIGIN = {"policy": {"source": "some/model", "hash": "abc"}, "reference": None}
IDENTITY, CONFIG = json.dumps({"kind": "grpo", **ORIGIN}), "model: {source: some/model}\n"
MARKED = json.dumps({"format": "tandem run 1", "kind": "grpo", **ORIGIN, "files": {"config.yml": "0"}})
LATER = json.dumps({"format": "tandem run 2", "kind": "grpo", **ORIGIN})


@functools.cache
def config_for(folder, *overrides):
    return load_config(None, [f"output_dir={folder}", "model.source=some/model", *overrides])


def open_folder(folder, *overrides, kind="grpo", origin=ORIGIN):
    return RunFolder(config_for(folder, *overrides), kind, origin)


def save_checkpoint(folder, step, content="weights"):
    """As Orbax and the hashes written with it leave one on disk."""
    (folder / "checkpoints" / str(step) / "state").mkdir(parents=True)
    (folder / "checkpoints" / str(step) / "state" / "data").write_text(content)
    (folder / "checkpoints" / str(step) / "_CHECKPOINT_METADATA").write_text("{}")
    write_hashes(folder / "checkpoints" / str(step))


def record(folder, *steps):
    with (folder / "metrics.jsonl").open("a") as file:
        file.writelines(f'{{"step": {step}}}\n' for step in steps)


def make_run(folder, *overrides, **arguments):
    """A run that has recorded one step and a checkpoint."""
    run = open_folder(folder, *overrides, **arguments)
    run.begin()
    record(folder, 1)
    (folder / "samples.jsonl").write_text('{"step": 1}\n')
    (folder / "rewards.log").write_text("said\n")
    save_checkpoint(folder, 1)
    run.close()


def snapshot(folder):
    """{path: (content, time of the last change)} of everything below a folder."""
    return {
        str(path.relative_to(folder)): (path.read_bytes(), path.stat().st_mtime_ns) if path.is_file() else None
        for path in folder.rglob("*")
    }


def contents(folder):
    return {name: entry and entry[0] for name, entry in snapshot(folder).items()}


def killed(run):
    """What a killed process leaves: the lock is free, nothing is closed."""
    os.close(run._place._lock)


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
    assert identity == {"kind": "grpo", **ORIGIN, "run": identity["run"]}
    (folder / "metrics.jsonl").write_text('{"step": 0}\n')
    run.close()
    assert {"config.yml", "run.json", "metrics.jsonl"} <= {path.name for path in folder.iterdir()}


@pytest.mark.parametrize("check_only", [True, False])
@pytest.mark.parametrize("target", ["nowhere", "link"])  # the second is the link itself
@pytest.mark.parametrize("below", ["", "below"])
def test_a_link_to_nothing_is_no_folder_for_a_run(tmp_path, check_only, target, below):
    (tmp_path / "link").symlink_to(tmp_path / target)
    with pytest.raises(ValueError, match=f"{tmp_path}/link is a link to nothing; remove that link"):
        RunFolder(config_for(tmp_path / "link" / below), "grpo", ORIGIN, check_only)
    assert [path.name for path in tmp_path.iterdir()] == ["link"]


def test_a_start_that_fails_leaves_nothing_behind(tmp_path):
    run = open_folder(tmp_path / "some" / "new")
    for name in ("rewards.log", "rewards.log.1"):
        (tmp_path / "some" / "new" / name).write_text("a traceback")
    run.close()
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "empty").mkdir()
    run = open_folder(tmp_path / "empty")
    run.begin()
    (tmp_path / "empty" / "checkpoints" / "1.orbax-checkpoint-tmp").mkdir(parents=True)  # as Orbax makes it
    (tmp_path / "empty" / "metrics.jsonl").touch()
    with evaluation_file(tmp_path / "empty", 0, keep=1) as write:  # before the first step
        write({"prompt": "2+2"})
    (tmp_path / "empty" / "evaluations" / ".tandem-1.jsonl").touch()  # of an evaluation that was killed
    run.close()
    assert list((tmp_path / "empty").iterdir()) == []


@pytest.mark.parametrize(
    "left", [(), (".lock",), (".lock", "rewards.log", "rewards.log.1"), (".lock", ".tandem-run.json")]
)
def test_a_start_that_was_killed_before_its_identity_is_no_run(tmp_path, left):
    folder = tmp_path / "a"
    folder.mkdir()
    for name in left:
        (folder / name).write_text("" if name == ".lock" else "{")
    before = snapshot(tmp_path)
    open_folder(folder).close()
    assert snapshot(tmp_path) == before
    run = open_folder(folder)
    assert not run.resumed
    run.begin()
    assert read_run(folder)[1].items() >= {"kind": "grpo", **ORIGIN}.items()
    assert not list(folder.glob(".tandem-*"))
    run.close()


def test_a_start_that_is_killed_between_two_files_is_no_run_and_in_nobodys_way(tmp_path):
    folder = tmp_path / "a"
    start = open_folder(folder, "optimizer.lr=1e-3")
    start.begin()
    killed(start)
    (folder / "config.yml").unlink()
    again = open_folder(folder)
    again.begin()
    again.close()
    assert not folder.exists() or [entry.name for entry in folder.iterdir()] == [".lock"]


def test_other_settings_may_take_over_a_folder_in_which_nothing_was_recorded(tmp_path):
    first = open_folder(tmp_path / "a", "optimizer.lr=1e-3")
    first.begin()
    with pytest.raises(KeyError), evaluation_file(tmp_path / "a", 0, keep=1):
        raise KeyError
    assert list((tmp_path / "a" / "evaluations").iterdir()) == []  # no draft stays
    (tmp_path / "a" / "evaluations" / "0.jsonl").touch()
    killed(first)
    second = open_folder(tmp_path / "a", "optimizer.lr=1e-4")
    second.begin()
    assert read_run(tmp_path / "a")[0].optimizer.lr == 1e-4
    assert not (tmp_path / "a" / "evaluations").exists()
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


@pytest.mark.parametrize("is_rotated", [False, True])
def test_a_resumed_start_that_fails_leaves_every_byte(tmp_path, is_rotated):
    folder = tmp_path / "a"
    make_run(folder)
    (folder / ".lock").unlink()
    before = snapshot(folder)
    run = open_folder(folder)
    with (folder / "rewards.log").open("a") as log:
        log.write("a traceback")
    if is_rotated:
        (folder / "rewards.log").rename(folder / "rewards.log.1")
        (folder / "rewards.log").write_text("another")
    run.begin()
    MetricsWriter(folder, 1)  # would write step 1 again
    run.close()
    assert snapshot(folder) == before


def test_a_start_that_fails_takes_back_a_log_that_was_moved_on(tmp_path):
    folder = tmp_path / "a"
    make_run(folder)
    before = snapshot(folder)
    run = open_folder(folder)
    with (folder / "rewards.log").open("a") as log:
        log.write("a long traceback")
    os.rename(folder / "rewards.log", folder / "rewards.log.1")
    (folder / "rewards.log").write_text("and more")
    run.close()
    assert snapshot(folder) == before
    new = open_folder(tmp_path / "new")
    for name in ("rewards.log", "rewards.log.1"):
        (new.path / name).write_text("a traceback")
    new.close()
    assert not new.path.exists()


# A run in the place of another


def overwrite(folder, **arguments):
    run = open_folder(folder, "checkpoint.overwrite=true", "optimizer.lr=1e-3", **arguments)
    assert not run.resumed
    return run


def moved(folder):
    return sorted(folder.parent.glob(f"{folder.name}.old-*"))


def test_overwrite_moves_the_old_run_at_begin_and_removes_it_after_the_first_checkpoint(tmp_path):
    folder = tmp_path / "a"
    make_run(folder)
    before = snapshot(folder)
    run = overwrite(folder)
    assert snapshot(folder) == before
    run.begin()
    assert {path.name for path in folder.iterdir()} == {"config.yml", "run.json", "rewards.log", ".lock", "checkpoints"}
    assert read_run(folder)[0].optimizer.lr == 1e-3
    (old,) = moved(folder)
    assert read_run(old)[0].optimizer.lr == 1e-6  # whole, and a run by itself
    assert f"the run that was here is in {old} until this one has saved its first checkpoint" in run.messages
    record(folder, 1)
    assert run.recorded() == []
    assert moved(folder) == [old]
    save_checkpoint(folder, 1, "new")
    assert run.recorded() == []
    assert moved(folder) == []
    run.close()
    assert (folder / "checkpoints/1/state/data").read_text() == "new"


@pytest.mark.parametrize("begins", [False, True])
def test_a_start_with_overwrite_that_fails_leaves_the_old_run(tmp_path, begins):
    make_run(tmp_path / "a")
    before = snapshot(tmp_path)
    run = overwrite(tmp_path / "a")
    if begins:
        run.begin()
        (tmp_path / "a" / "metrics.jsonl").touch()
        with (tmp_path / "a" / "rewards.log").open("a") as log:
            log.write("a traceback")
    run.close()
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("kind", ["grpo", "sft"])
def test_overwrite_leaves_every_file_that_no_run_wrote(tmp_path, kind):
    folder = tmp_path / "a"
    make_run(folder, kind=kind)
    strange = [
        "notes.txt",
        "checkpoints/notes.txt",
        "checkpoints/best/x",
        "checkpoints/1/notes.txt",
        "export/notes.txt",
    ]
    strange += ["checkpoints/1/state/notes.txt", "checkpoints/2.damaged/notes.txt"]
    strange += ["reward.png", "metrics.jsonl.new", "samples.jsonl.new", "export.json"]  # by their names ours
    for name in strange:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(f"mine: {name}")
    run = overwrite(folder, kind=kind)
    run.begin()
    (old,) = moved(folder)
    record(folder, 1)
    save_checkpoint(folder, 1, "new")
    (said,) = run.recorded()
    assert said.startswith(f"{old} stays, for it holds what no run wrote")
    run.close()
    for name in strange:
        places = [place / name for place in (folder, old) if (place / name).is_file()]
        assert [place.read_text() for place in places] == [f"mine: {name}"], name
    assert (folder / "reward.png").is_file()
    assert (folder / "export.json").is_file()
    for again in (folder, old):  # and in nobody's way
        assert (again / "checkpoints/1/state/data").is_file()
    next_one = open_folder(folder, "optimizer.lr=1e-3", kind=kind)
    assert next_one.resumed
    next_one.close()


def test_an_export_that_fine_tuning_wrote_is_replaced_and_anything_else_stays(tmp_path):
    folder = tmp_path / "a"
    make_run(folder, kind="sft")
    run = open_folder(folder, kind="sft")

    def write(text):
        def make(out):
            out.mkdir()
            (out / "model").write_text(text)

        return make

    (folder / "export.json").write_text("mine")
    (said,) = run.replace_export(write("first"))
    assert "export.json; it stays, for no run wrote it" in said
    assert [path.read_text() for path in folder.glob("export.json.old-*")] == ["mine"]
    next(folder.glob("export.json.old-*")).unlink()
    assert run.replace_export(write("second")) == []
    assert contents(folder / "export") == {"model": b"second"}
    assert not [path for path in folder.iterdir() if "old" in path.name]
    (folder / "export" / "notes.txt").write_text("mine")
    (said,) = run.replace_export(write("third"))
    (kept,) = folder.glob("export.old-*")
    assert said == f"{kept} is what was in {folder / 'export'}; it stays, for no run wrote it as it is"
    assert contents(kept) == {"model": b"second", "notes.txt": b"mine"}
    assert contents(folder / "export") == {"model": b"third"}
    shutil.rmtree(folder / "export")  # by hand, or it never came with its record
    assert run.replace_export(write("fourth")) == []
    assert contents(folder / "export") == {"model": b"fourth"}
    run.close()
    new = overwrite(folder, kind="sft")
    new.begin()
    record(folder, 1)
    save_checkpoint(folder, 1)
    assert new.recorded() == []  # with what it had exported
    new.close()
    assert moved(folder) == []
    assert not (folder / "export").exists()
    assert kept.is_dir()


def test_an_export_that_was_stopped_leaves_nothing_and_the_next_one_is_not_taken_for_anothers(tmp_path):
    folder = tmp_path / "a"
    make_run(folder, kind="sft")
    run = open_folder(folder, kind="sft")

    def stop(out):  # as `rl.models.files.folders.new_folder` does, which writes beside the folder it makes
        (out.parent / f".{out.name}.scratch").mkdir()
        raise KeyboardInterrupt

    def write(out):
        out.mkdir()
        (out / "model").write_text("weights")

    with pytest.raises(KeyboardInterrupt):
        run.replace_export(stop)
    (folder / "export.json").mkdir()  # so that it cannot be written
    with pytest.raises(OSError, match=r"export\.json"):
        run.replace_export(write)
    (folder / "export.json").rmdir()
    assert run.replace_export(write) == []
    assert contents(folder / "export") == {"model": b"weights"}
    assert not [
        path for path in folder.iterdir() if "export" in path.name and path.name not in ("export", "export.json")
    ]
    run.close()


class Killed(BaseException):
    """In the place of a signal that cannot be caught."""


@pytest.fixture
def kill_after(monkeypatch):
    """kill_after(k): the k-th change of the disk from now on (counted from 1) does not happen, nor anything after it;
    kill_after(None): everything happens again.
    """
    left = None
    plain = {name: getattr(os, name) for name in ("rename", "replace", "unlink", "mkdir", "rmdir")}

    def guarded(name):
        def call(*arguments, **options):
            nonlocal left
            if left is not None:
                left -= 1
                if left <= 0:
                    raise Killed
            return plain[name](*arguments, **options)

        return call

    for name in plain:
        monkeypatch.setattr(os, name, guarded(name))

    def set_left(count):
        nonlocal left
        left = count

    return set_left


def is_killed(kill_after, number, action):
    """Whether the action had a change of that number, at which it was killed."""
    kill_after(number)
    try:
        action()
    except Killed:
        return True
    finally:
        kill_after(None)
    return False


def test_a_kill_while_the_old_run_is_moved_and_again_while_it_is_moved_back_keeps_it_whole(tmp_path, kill_after):
    make_run(tmp_path / "start")
    (tmp_path / "start" / "notes.txt").write_text("mine")
    old_run = contents(tmp_path / "start")
    for number in itertools.count(1):
        folder = tmp_path / str(number) / "a"
        shutil.copytree(tmp_path / "start", folder)
        run = overwrite(folder)
        was_killed = is_killed(kill_after, number, run.begin)
        killed(run)
        second = 1 + number * 5 % 16
        start = open_folder(folder)
        is_killed(kill_after, second, start.begin)
        killed(start)
        again = open_folder(folder)
        assert again.resumed
        again.begin()
        again.close()
        assert contents(folder) == old_run
        assert moved(folder) == []
        if not was_killed:  # begun, and nothing recorded
            assert number > 10
            return


def test_a_kill_while_the_old_run_is_removed_keeps_the_new_one(tmp_path, kill_after):
    make_run(tmp_path / "start" / "a")
    run = overwrite(tmp_path / "start" / "a")
    run.begin()
    record(run.path, 1)
    save_checkpoint(run.path, 1, "new")
    new_run = contents(run.path)
    killed(run)
    for number in itertools.count(1):
        shutil.copytree(tmp_path / "start", tmp_path / str(number))
        folder = tmp_path / str(number) / "a"
        start = open_folder(folder, "optimizer.lr=1e-3")
        was_killed = is_killed(kill_after, number, start.begin)
        killed(start)
        again = open_folder(folder, "optimizer.lr=1e-3") if was_killed else None
        if again is not None:
            again.begin()
        assert contents(folder) == new_run
        assert moved(folder) == []
        if again is None:
            assert number > 10
            return
        assert again.resumed
        again.close()


def test_a_new_run_that_recorded_steps_and_no_checkpoint_goes_on_and_the_old_one_waits(tmp_path):
    folder = tmp_path / "a"
    make_run(folder)
    run = overwrite(folder)
    run.begin()
    record(folder, 1)
    killed(run)
    again = open_folder(folder, "optimizer.lr=1e-3")
    assert again.resumed
    assert len(moved(folder)) == 1
    save_checkpoint(folder, 1, "new")
    again.recorded()
    again.close()
    assert moved(folder) == []


@pytest.mark.parametrize("check_only", [True, False])
@pytest.mark.parametrize("phase", ["moving", "moved", "removing"])
def test_a_start_that_fails_makes_nothing_good_that_a_kill_has_left(tmp_path, kill_after, phase, check_only):
    folder = tmp_path / "a"
    make_run(folder)
    run = overwrite(folder)
    if phase == "moving":  # where config.yml is moved, and run.json is not
        assert is_killed(kill_after, 12, run.begin)
        assert [(folder / name).exists() for name in ("config.yml", "run.json")] == [False, True]
    else:
        run.begin()
    if phase == "removing":
        record(folder, 1)
        save_checkpoint(folder, 1, "new")
    killed(run)
    before = snapshot(tmp_path)
    settings = ["optimizer.lr=1e-3"] if phase == "removing" else []
    again = RunFolder(config_for(folder, *settings), "grpo", ORIGIN, check_only)
    assert again.resumed
    again.close()
    assert snapshot(tmp_path) == before
    with pytest.raises(ValueError, match=r"holds another run: optimizer\.lr was "):
        RunFolder(config_for(folder, "optimizer.lr=1e-2"), "grpo", ORIGIN, check_only)
    assert snapshot(tmp_path) == before


NOTES = {
    "a neighbour": (["../victim"], "no run writes '../victim'"),
    "a path of the disk": (["{tmp}/victim/file"], "no run writes '.*/victim/file'"),
    "a way out of a step": (["checkpoints/../../victim"], "no run writes"),
    "a way out of an unfinished step": (["checkpoints/1.orbax-checkpoint-tmp/../../../victim"], "no run writes"),
    "the folder itself": (["."], "no run writes"),
    "a user's file": (["notes.txt"], "no run writes"),
    "an export of a run that writes none": (["export"], "no run of kind 'grpo' writes 'export'"),
    "no names": ([1], "the entries are"),
    "no run": (["metrics.jsonl"], "run.json cannot be read"),
    "a link": (["checkpoints/1"], "checkpoints is a link"),
    "an unknown phase": (["metrics.jsonl"], "the phase is 'gone'"),
}


@pytest.mark.parametrize(
    ("name", "phase"),
    [
        (name, phase)
        for name in NOTES
        for phase in ("moving", "moved", "removing")
        if (name, phase) != ("no run", "removing")  # a kill leaves that: run.json is removed last
    ],
)
def test_a_note_of_a_replaced_run_that_does_not_fit_is_refused_and_nothing_is_touched(tmp_path, name, phase):
    entries, message = NOTES[name]
    old, victim = tmp_path / "a.old-20260101-000000", tmp_path / "victim"
    for folder in (old / "export", victim / "1"):
        folder.mkdir(parents=True)
    for path in (victim / "file", victim / "1" / "_CHECKPOINT_METADATA", old / "notes.txt", old / "metrics.jsonl"):
        path.write_text("mine")
    if name == "a link":
        (old / "checkpoints").symlink_to(victim)
    if name != "no run":
        (old / "run.json").write_text(MARKED)
    note = {"format": "tandem replaced run 1", "folder": "a", "phase": "gone" if "phase" in name else phase}
    note["entries"] = [entry.format(tmp=tmp_path) if isinstance(entry, str) else entry for entry in entries]
    (old / ".tandem-moved.json").write_text(json.dumps(note))
    before = snapshot(tmp_path)
    with pytest.raises(
        ValueError, match=rf"a\.old-20260101-000000 must hold a run .*{message}.*Nothing of it is touched"
    ):
        open_folder(tmp_path / "a")
    assert snapshot(tmp_path) == before


def test_a_note_without_a_run_removes_nothing_but_itself(tmp_path):
    old = tmp_path / "a.old-20260101-000000"
    old.mkdir()
    (old / "metrics.jsonl").write_text("mine")
    note = {"format": "tandem replaced run 1", "folder": "a", "phase": "removing", "entries": ["metrics.jsonl"]}
    (old / ".tandem-moved.json").write_text(json.dumps(note))
    run = open_folder(tmp_path / "a")
    run.begin()
    run.close()
    assert contents(old) == {"metrics.jsonl": b"mine"}


@pytest.mark.parametrize("name", ["checkpoints", "checkpoints/1"])
def test_an_overwrite_of_linked_checkpoints_is_refused_and_a_run_goes_on_in_them(tmp_path, name):
    """What a link leads to would stay, and the new run would go on from a step of the old one."""
    folder = tmp_path / "a"
    make_run(folder)
    os.rename(folder / name, tmp_path / "big")
    (folder / name).symlink_to(tmp_path / "big")
    before = snapshot(tmp_path)
    with pytest.raises(ValueError, match=rf"a/{name} is a link to .*big, where this run would write; move what it"):
        open_folder(folder, "checkpoint.overwrite=true", "optimizer.lr=1e-3")
    assert snapshot(tmp_path) == before
    run = open_folder(folder)
    assert run.resumed
    run.close()


def test_a_run_is_not_moved_aside_without_its_checkpoints(tmp_path):
    make_run(tmp_path / "a")
    before = snapshot(tmp_path)
    with pytest.raises(ValueError, match=r"must leave no checkpoint in .*, and it would leave \[1\]; choose another"):
        move_aside(tmp_path / "a", ["metrics.jsonl", "config.yml", "run.json"])
    assert snapshot(tmp_path) == before


def test_a_link_in_the_place_of_a_draft_is_not_written_through(tmp_path):
    (tmp_path / "important").write_text("mine")
    (tmp_path / "a").mkdir()
    for name in ("run.json", "config.yml"):
        (tmp_path / "a" / f".tandem-{name}").symlink_to(tmp_path / "important")
    run = open_folder(tmp_path / "a")
    run.begin()
    assert read_run(run.path)[1].items() >= {"kind": "grpo", **ORIGIN}.items()
    run.close()
    assert (tmp_path / "important").read_text() == "mine"


def test_what_lies_in_the_way_of_the_old_run_is_named_and_nothing_is_lost(tmp_path):
    folder = tmp_path / "a"
    make_run(folder)
    run = overwrite(folder)
    run.begin()
    killed(run)
    (folder / "reward.png").write_text("mine")
    (moved(folder)[0] / "reward.png").write_text("the run's")
    note = moved(folder)[0] / ".tandem-moved.json"
    note.write_text(note.read_text().replace('"metrics.jsonl"', '"metrics.jsonl", "reward.png"'))
    with pytest.raises(ValueError, match=r"must go back to .*, and .*reward\.png is in its way; move one of the two"):
        open_folder(folder)
    assert (folder / "reward.png").read_text() == "mine"
    assert (moved(folder)[0] / "checkpoints/1/state/data").read_text() == "weights"


# Refusals


@pytest.mark.parametrize(
    ("overrides", "arguments", "message"),
    [
        (
            ("optimizer.lr=1e-3",),
            {},
            r"holds another run: optimizer\.lr was 1e-06, is 0\.001, which .*; or choose another output_dir, or",
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
        assert "checkpoint.overwrite=true to replace that run" in str(error.value)
    assert snapshot(tmp_path / "a") == before


FOREIGN = {
    "a thesis": {"thesis.tex": "mine"},
    "a configuration": {"config.yml": "mine"},
    "numbers": {"checkpoints/1/x": "mine"},
    "a lock": {".lock": "mine"},
    "a log": {"rewards.log": "mine"},
    "an older log": {"rewards.log.1": "mine"},
    "an identity that says nothing": {"run.json": "{}", "export/model": "mine"},
    "an identity that is no JSON": {"run.json": "\x00", "metrics.jsonl": '{"step": 1}\n'},
    "an identity that is too deep": {"run.json": "[" * 100_000},
    "an identity and no run": {"run.json": IDENTITY, "config.yml": CONFIG, "checkpoints/1/x": "mine"},
    "an identity and other lines": {"run.json": IDENTITY, "config.yml": CONFIG, "metrics.jsonl": "1,2,3\n"},
    "another configuration": {"run.json": IDENTITY, "config.yml": "seed: 3\n", "metrics.jsonl": '{"step": 1}\n'},
    "no configuration": {"run.json": IDENTITY, "config.yml": "- 1\n", "metrics.jsonl": '{"step": 1}\n'},
    "another kind": {
        "run.json": IDENTITY.replace("grpo", "ppo"),
        "config.yml": CONFIG,
        "metrics.jsonl": '{"step": 1}\n',
    },
    "a later format": {"run.json": LATER, "config.yml": CONFIG, "metrics.jsonl": '{"step": 1}\n'},
    "our identity and another configuration": {"run.json": MARKED, "config.yml": CONFIG, "export/model": "mine"},
    "our identity and a file": {"run.json": MARKED, "export/model": "mine"},
    "a run with a folder named as a step": {
        "run.json": IDENTITY,
        "config.yml": CONFIG,
        "metrics.jsonl": '{"step": 1}\n',
        "checkpoints/2024/photo": "mine",
    },
}


@pytest.mark.parametrize("overwrite", ["true", "false"])
@pytest.mark.parametrize("name", FOREIGN)
def test_a_folder_that_is_not_shown_to_be_a_run_is_refused_and_left_as_it_is(tmp_path, name, overwrite):
    for place, text in FOREIGN[name].items():
        (tmp_path / "a" / place).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "a" / place).write_text(text)
    before = snapshot(tmp_path)
    with pytest.raises(ValueError, match=r"output_dir must be empty or hold a run, got .*choose another output_dir"):
        open_folder(tmp_path / "a", f"checkpoint.overwrite={overwrite}")
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("overwrite", ["true", "false"])
@pytest.mark.parametrize("has_run", [True, False])
@pytest.mark.parametrize("name", ["rewards.log", "rewards.log.1", "metrics.jsonl", "samples.jsonl", ".lock"])
def test_a_link_where_a_run_writes_is_refused_and_what_it_leads_to_stays(tmp_path, name, has_run, overwrite):
    folder = tmp_path / "a"
    folder.mkdir()
    if has_run:
        make_run(folder)
    (folder / name).unlink(missing_ok=True)
    (tmp_path / "important").write_text("" if name == ".lock" else '{"step": 1}\n')
    (folder / name).symlink_to(tmp_path / "important")
    before = snapshot(tmp_path)
    with pytest.raises(ValueError, match=rf"a/{name} is a link to .*important, where this run would write; move what"):
        open_folder(folder, f"checkpoint.overwrite={overwrite}")
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("left", ["metrics.jsonl", "checkpoints/3/state/_METADATA"])
def test_a_run_of_an_older_version_is_recognised_and_resumes(tmp_path, left):
    folder = tmp_path / "a"
    (folder / left).parent.mkdir(parents=True)
    (folder / "config.yml").write_text(dump_config(config_for(folder)))
    (folder / "run.json").write_text(json.dumps({"kind": "grpo", **ORIGIN}))
    (folder / left).write_text('{"step": 1}\n')
    run = open_folder(folder)
    assert run.resumed
    run.close()


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
sys.path.insert(0, ".")
from tests.run_folder.test_folder import open_folder
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


# A run folder that was moved


def test_a_run_goes_on_where_it_is_and_a_moved_one_says_so(tmp_path, monkeypatch):
    old, new = tmp_path / "old", tmp_path / "new"
    make_run(old)
    assert load_run_config(old / "config.yml").output_dir == str(old)
    os.rename(old, new)
    said = (
        r"new/config\.yml is the configuration of the run in .*new, and its output_dir is '.*old', {} \(working .*\); "
    )
    way_out = rf"if the run was moved or copied, output_dir={new} goes on with it where it is"
    before = snapshot(tmp_path)
    with pytest.raises(ValueError, match=said.format("which does not exist") + way_out):
        load_run_config(new / "config.yml")
    assert snapshot(tmp_path) == before
    shutil.copytree(new, old)  # a copy, and both are there
    (tmp_path / "link.yml").symlink_to(new / "config.yml")
    for name in (new / "config.yml", tmp_path / "link.yml"):
        with pytest.raises(
            ValueError, match=r"another folder \(working directory .*\); if the run was moved or copied"
        ):
            load_run_config(name)
    for config in (load_run_config(new / "config.yml", [f"output_dir={new}"]), load_run_config(new)):
        assert config.output_dir == str(new)
        run = RunFolder(config, "grpo", ORIGIN)
        assert run.resumed
        run.close()
    assert load_run_config(new, ["output_dir=elsewhere"]).output_dir == "elsewhere"
    make_run(tmp_path / "other", f"output_dir={os.path.relpath(tmp_path / 'other')}")
    assert load_run_config(tmp_path / "other" / "config.yml").output_dir == os.path.relpath(tmp_path / "other")
    monkeypatch.chdir(new)  # from where the relative path is another one
    with pytest.raises(ValueError, match="if the run was moved or copied"):
        load_run_config(tmp_path / "other" / "config.yml")
    assert load_run_config(tmp_path / "other").output_dir == str(tmp_path / "other")
