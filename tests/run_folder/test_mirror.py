"""A run folder in a store: uploads, kills between any two operations, which side a start goes on from, the lease."""

import itertools
import json
import os
import pathlib
import re

import pytest

from rl.config.load import load_config
from rl.files.stores import Store, file_names
from rl.run_folder.contents import best_step, checkpoint_steps, chosen_step
from rl.run_folder.lease import LEASE, LEASE_SECONDS, Lease
from rl.run_folder.ledger import LEDGER, Ledger, read_ledger
from rl.run_folder.mirror import Mirror, Staging, run_path
from rl.run_folder.remote_steps import MARKER, copy_of_run, read_markers
from rl.run_folder.settle import local_steps
from tests.helpers.remote_stores import CountingStore, clear, memory_store


@pytest.fixture(autouse=True)
def _empty_stores(monkeypatch):
    monkeypatch.setattr("rl.files.stores._NUM_TRANSFERS", 1)  # the operations in one order
    yield
    clear()


class Killed(BaseException):
    """What no `except` of the code under test catches, as for SIGKILL."""


def write_step(run: pathlib.Path, step: int, text: str = "numbers") -> None:
    """What a trainer leaves of a step: lines, and a checkpoint that appears whole."""
    (run / "checkpoints").mkdir(parents=True, exist_ok=True)
    (run / "run.json").write_text('{"format": "tandem run 1", "kind": "grpo"}')
    (run / "config.yml").write_text("seed: 0\n")
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": step}) + "\n")
    draft = run / "checkpoints" / f"{step}.orbax-tmp"
    (draft / "state").mkdir(parents=True)
    (draft / "state" / "a").write_text(f"{text} of {step}")
    (draft / "loop").mkdir()
    (draft / "loop" / "metadata").write_text(str(step))
    (draft / "hashes.json").write_text(json.dumps({"files": {"state/a": f"{text} of {step}"}}))
    os.rename(draft, run / "checkpoints" / str(step))


def train(staging: Staging, last: int, keep: int = 2) -> int:
    """Resumes from the newest step, or starts, and goes on to `last`; returns the step that it found."""
    staging.open()
    found = max(local_steps(staging.run), default=0)
    check_whole(staging.run, found)
    staging.begin()
    for step in range(found + 1, last + 1):
        staging.wait()
        write_step(staging.run, step)
        staging.saved(step)
        staging.wait()
        for old in sorted(local_steps(staging.run))[:-keep]:
            remove(staging.run / "checkpoints" / str(old))
    staging.wait()
    staging.close()
    return found


def remove(folder: pathlib.Path) -> None:
    for path in sorted(folder.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    folder.rmdir()


def check_whole(run: pathlib.Path, step: int) -> None:
    """Every step that is there has all of its files, and the lines go as far as the newest."""
    for number in local_steps(run):
        folder = run / "checkpoints" / str(number)
        assert (folder / "state" / "a").read_text() == f"numbers of {number}"
        assert (folder / "loop" / "metadata").read_text() == str(number)
    if step:
        lines = (run / "metrics.jsonl").read_text().splitlines()
        assert json.loads(lines[-1])["step"] >= step
        assert (run / "run.json").exists()
        assert (run / "config.yml").exists()


def kill(staging: Staging) -> None:
    """What the end of a process does of itself: the lock of the folder is given back. The lease is not."""
    staging._abandoned.set()
    staging._closing.set()
    staging.lease._stop.set() if hasattr(staging, "lease") else None
    if staging._pool is not None:
        staging._pool.shutdown()
    staging._unlock()


class KillingStore(CountingStore):
    def before(self, operation: str) -> None:
        try:
            super().before(operation)
        except OSError as error:
            raise Killed(str(error)) from None


def killing_store(name: str) -> KillingStore:
    store = memory_store(name)
    store.__class__ = KillingStore
    return store  # pyright: ignore[reportReturnType]


def later() -> float:
    """The clock of a machine that comes when a killed process's lease is over."""
    import time

    return time.time() + LEASE_SECONDS + 1


# What somebody else has put into the folder of a run: beside the files of its steps, and where no step of its is.
BEFORE = {
    "notes.txt": b"theirs",
    "checkpoints/1/theirs": b"theirs",
    "checkpoints/2/state/theirs": b"theirs",
    "checkpoints/01/uploaded.json": b"theirs",
    "checkpoints/7/uploaded.json": b"theirs",
    "checkpoints/7/state/a": b"theirs",
}
AFTER = {"checkpoints/2/later": b"theirs", "checkpoints/8/state/a": b"theirs", "rewards.log": b"theirs"}


def put(store: Store, objects: dict[str, bytes]) -> None:
    for name, data in objects.items():
        store.write(name, data)


def check_kept(store: Store, objects: dict[str, bytes]) -> None:
    assert {name: store.read(name) for name in objects} == objects, "what others have put there stays as it is"


@pytest.mark.parametrize("same_machine", [True, False])
def test_a_kill_between_any_two_operations_leaves_the_earlier_or_the_later_step_whole(tmp_path, same_machine):
    last_known = 0
    for k in itertools.count(1):
        clear()
        root = tmp_path / str(k)
        store = killing_store("run")
        train(Staging(store, root / "a", keep=1), last=1)
        put(store, BEFORE)
        store.fail_at(k)
        staging = Staging(store, root / "a", keep=1)
        try:
            train(staging, last=2)
            break
        except Killed:
            kill(staging)
        store.fail_at(None)
        markers = read_markers(store)
        assert markers, "the store always has a complete step"
        for step, marker in markers.items():  # and all of its objects
            names = store.stats(f"checkpoints/{step}/").keys() - BEFORE.keys()
            assert names == {f"checkpoints/{step}/{name}" for name in (*marker.files, MARKER)}
        put(store, AFTER)
        again = Staging(store, root / ("a" if same_machine else "b"), 1, *([] if same_machine else [later]))
        found = train(again, last=2)
        assert found >= max(markers)
        last_known = max(last_known, found)
        assert set(read_markers(store)) == {2}
        check_kept(store, BEFORE | AFTER)
        numbers = {name.split("/")[1] for name in store.stats("checkpoints/").keys() - (BEFORE | AFTER).keys()}
        assert numbers == {"2"}, "what was left over is gone"
    assert k > 25
    assert last_known == 2


@pytest.mark.parametrize("same_machine", [True, False])
def test_a_kill_between_any_two_operations_of_a_first_upload_is_gone_on_from_anywhere(tmp_path, same_machine):
    for k in itertools.count(1):
        clear()
        root = tmp_path / str(k)
        store = killing_store("run")
        store.fail_at(k)
        staging = Staging(store, root / "a", keep=1)
        try:
            train(staging, last=1)
            break
        except Killed:
            kill(staging)
        store.fail_at(None)
        ledger, lines = read_ledger(store), store.read("metrics.jsonl") or b""
        assert store.stats().keys() <= {LEASE, LEDGER} | (ledger.files if ledger else set()), "nothing is unlisted"
        strangers = {"checkpoints/1/later": b"theirs"} if ledger else {}
        put(store, strangers)
        again = Staging(store, root / ("a" if same_machine else "b"), 1, *([] if same_machine else [later]))
        train(again, last=1)
        assert set(read_markers(store)) == {1}
        check_kept(store, strangers)
        assert (store.read("metrics.jsonl") or b"").startswith(lines), "the lines of a start are gone on with"
        after = read_ledger(store)
        assert ledger is None or (after is not None and after.run == ledger.run), "it is the same run"
    assert k > 15


def test_an_object_of_others_in_the_way_of_an_upload_ends_the_run_and_stays(tmp_path):
    store = memory_store("run")
    train(Staging(store, tmp_path / "a", 1), last=1)
    put(store, {"checkpoints/2/state/a": b"theirs"})
    staging = Staging(store, tmp_path / "a", 1)
    with pytest.raises(ValueError, match=r"run/checkpoints/2/state/a must be free for an upload .*; move that away"):
        train(staging, last=2)
    with pytest.raises(ValueError, match="must be free"):
        staging.close()
    check_kept(store, {"checkpoints/2/state/a": b"theirs"})
    assert set(read_markers(store)) == {1}
    store.remove(["checkpoints/2/state/a"])
    assert train(Staging(store, tmp_path / "a", 1), last=2) == 2, "the staging folder has kept the step"
    assert set(read_markers(store)) == {2}
    put(store, {"export/config.json": b"theirs"})
    staging = Staging(store, tmp_path / "a", 1)
    staging.open()
    staging.begin()
    (staging.run / "export").mkdir()
    (staging.run / "export" / "config.json").write_text("ours")
    with pytest.raises(ValueError, match=r"run/export/config\.json must be free"):
        staging.close()
    check_kept(store, {"export/config.json": b"theirs"})


def test_a_local_run_that_was_copied_into_a_store_is_refused_and_not_touched(tmp_path):
    store = memory_store("run")
    write_step(tmp_path / "local", 1)
    for name in file_names(tmp_path / "local"):
        store.upload(tmp_path / "local" / name, name)
    before = store.stats()
    with pytest.raises(ValueError, match=r"hold a run that was uploaded, .* without the uploads\.json of one"):
        Staging(store, tmp_path / "a", 1).open()
    assert store.stats() == before


def test_files_that_mean_something_elsewhere_are_not_uploaded(tmp_path):
    store = memory_store("run")
    train(Staging(store, tmp_path / "a", 1), last=1)
    put(store, {"reward.png": b"drawn in the store"})
    for name in (LEASE, LEDGER, "reward.png", ".lock"):
        (tmp_path / "a" / "run" / name).write_text("of the staging folder")
    train(Staging(store, tmp_path / "a", 1), last=2)
    assert set(read_markers(store)) == {2}
    check_kept(store, {"reward.png": b"drawn in the store"})


@pytest.mark.parametrize(
    "content",
    [b"[]", b"{", b"[" * 100_000, b'{"run": "a", "files": ["../a"]}', b'{"run": 1, "files": []}', b'{"run": "a"}'],
)
def test_a_ledger_that_is_none_is_refused_and_not_touched(tmp_path, content):
    store = memory_store("run")
    put(store, {LEDGER: content, "checkpoints/1/a": b"theirs"})
    before = store.stats()
    with pytest.raises(ValueError, match=r"run/uploads\.json must list what a run uploaded"):
        Staging(store, tmp_path / "a", 1).open()
    assert store.stats() == before


def test_a_ledger_that_another_process_changed_is_not_replaced():
    store = memory_store("run")
    first = Ledger(store, "a")
    first.claim(["x"])
    second = read_ledger(store)
    assert second is not None
    second.claim(["y"])
    with pytest.raises(ValueError, match=r"uploads\.json was changed by another process"):
        first.claim(["z"])
    with pytest.raises(ValueError, match=r"uploads\.json was changed by another process"):
        Ledger(store, "b").claim(["z"])
    ledger = read_ledger(store)
    assert ledger is not None
    assert (ledger.run, ledger.files) == ("a", {"x", "y"})


def check_whole_store(store: Store, cache: pathlib.Path, steps: set[int]) -> None:
    assert set(read_markers(store)) == steps
    for step in steps:
        assert copy_of_run(store, cache, step)


@pytest.mark.parametrize("machine", ["a", "b", "c"])
def test_a_damaged_newest_step_is_left_out_said_and_replaced_when_the_run_comes_there_again(tmp_path, machine):
    store = memory_store("run")
    train(Staging(store, tmp_path / "a", 2), last=1)
    train(Staging(store, tmp_path / "b", 2), last=2)
    train(Staging(store, tmp_path / "c", 2), last=3)
    if machine == "c":
        remove(tmp_path / "c" / "run" / "checkpoints" / "3")
    store.write("checkpoints/3/state/a", b"damaged")
    before = store.stats("checkpoints/")
    staging = Staging(store, tmp_path / machine, 2)
    assert re.match(
        r"step 3 is left out, and the one before is taken: .*checkpoints/3/state/a .* damaged.*step 2", staging.open()
    )
    staging.begin()
    staging.close()
    assert store.stats("checkpoints/") == before, "nothing is replaced before there is something better"
    assert train(Staging(store, tmp_path / machine, 2), last=4) == 2
    check_whole_store(store, tmp_path / "cache", {3, 4})


@pytest.mark.parametrize("machine", ["a", "b"])
@pytest.mark.parametrize("made", [[3], [3, 4], [4]])
def test_a_damaged_step_that_the_folder_has_made_again_or_passed_is_replaced(tmp_path, machine, made):
    store = memory_store("run")
    train(Staging(store, tmp_path / "a", 2), last=3)
    remove(tmp_path / "a" / "run" / "checkpoints" / "3")
    store.write("checkpoints/3/state/a", b"damaged")
    staging = Staging(store, tmp_path / machine, 2)
    staging.open()
    staging.close()
    for step in made:  # and killed before an upload
        write_step(staging.run, step)
    assert train(Staging(store, tmp_path / machine, 2), last=max(made)) == max(made)
    check_whole_store(store, tmp_path / "cache", {2, max(made)})


def test_a_damaged_step_that_was_mended_in_the_store_counts_again(tmp_path):
    store = memory_store("run")
    train(Staging(store, tmp_path / "a", 2), last=3)
    store.write("checkpoints/3/state/a", b"damaged")
    staging = Staging(store, tmp_path / "b", 2)
    staging.open()
    staging.close()
    store.write("checkpoints/3/state/a", b"numbers of 3")
    assert train(Staging(store, tmp_path / "b", 2), last=3) == 3


def test_a_damaged_step_that_is_the_only_one_is_refused_with_the_way_out_and_not_touched(tmp_path):
    store = memory_store("run")
    train(Staging(store, tmp_path / "a", 1), last=1)
    store.write("checkpoints/1/state/a", b"damaged")
    before = store.stats("checkpoints/")
    with pytest.raises(ValueError, match=r"state/a must be what was uploaded, but it is damaged; remove .*uploaded"):
        Staging(store, tmp_path / "b", 1).open()
    assert store.stats("checkpoints/") == before


def test_a_kill_between_any_two_operations_after_a_damaged_step_leaves_a_whole_one(tmp_path):
    for k in itertools.count(1):
        clear()
        root = tmp_path / str(k)
        store = killing_store("run")
        train(Staging(store, root / "a", keep=2), last=3)
        store.write("checkpoints/3/state/a", b"damaged")
        store.fail_at(k)
        staging = Staging(store, root / "b", keep=2)
        try:
            train(staging, last=4)
            break
        except Killed:
            kill(staging)
        store.fail_at(None)
        assert train(Staging(store, root / "b", 2, later), last=4) >= 2
        check_whole_store(store, root / "cache", {3, 4})
    assert k > 40


@pytest.mark.parametrize("number", [1, 2])
def test_a_kill_between_the_renames_of_a_fetch_is_mended_by_the_next_start(tmp_path, monkeypatch, number):
    train(Staging(memory_store("run"), tmp_path / "a", 2), last=1)
    train(Staging(memory_store("run"), tmp_path / "b", 2), last=3)
    staging, rename, calls = Staging(memory_store("run"), tmp_path / "a", 2), os.rename, []

    def failing(source, target):
        calls.append(source)
        if len(calls) == number:
            raise Killed
        rename(source, target)

    monkeypatch.setattr(os, "rename", failing)
    with pytest.raises(Killed):
        staging.open()
    monkeypatch.setattr(os, "rename", rename)
    again = Staging(memory_store("run"), tmp_path / "a", 2)
    assert train(again, last=3) == 3


def test_a_run_goes_on_from_another_machine_with_the_same_lines(tmp_path):
    store = memory_store("run")
    assert train(Staging(store, tmp_path / "a", 2), last=3) == 0
    assert set(read_markers(store)) == {2, 3}
    assert train(Staging(store, tmp_path / "b", 2), last=5) == 3
    steps = [json.loads(line)["step"] for line in (tmp_path / "b" / "run" / "metrics.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 3, 4, 5]
    assert store.read("metrics.jsonl") == (tmp_path / "b" / "run" / "metrics.jsonl").read_bytes()
    downloads = store.count("download")
    assert train(Staging(store, tmp_path / "b", 2), last=5) == 5
    assert store.count("download") == downloads, "what the folder holds is not fetched again"
    # The first machine is behind, and takes what the second has done.
    assert train(Staging(store, tmp_path / "a", 2), last=5) == 5


def check_journal_moves(store: Store, folder: pathlib.Path) -> None:
    """A run that left a step on one machine finds the step's journal on another."""
    first = Staging(store, folder / "a", 2)
    first.open()
    first.begin()
    write_step(first.run, 1)
    first.saved(1)
    first.wait()
    (first.run / "journal.jsonl").write_text('{"step": 1}\n')
    first.close()
    other = Staging(store, folder / "b", 2)
    other.open()
    assert (other.run / "journal.jsonl").read_text() == '{"step": 1}\n'
    other.begin()
    other.close()


def test_the_journal_of_a_run_that_left_a_step_is_there_on_another_machine(tmp_path):
    check_journal_moves(memory_store("run"), tmp_path)


def test_a_folder_that_is_ahead_goes_on_from_its_own_step_and_uploads_it(tmp_path):
    store = memory_store("run")
    train(Staging(store, tmp_path / "a", 1), last=1)
    write_step(tmp_path / "a" / "run", 2)
    remove(tmp_path / "a" / "run" / "checkpoints" / "1")  # checkpoint.keep is 1
    assert train(Staging(store, tmp_path / "a", 1), last=2) == 2
    assert set(read_markers(store)) == {2}


def test_the_best_step_stays_in_the_store_and_can_be_read_and_old_evaluations_go(tmp_path):
    store, run = memory_store("run"), tmp_path / "a" / "run"
    staging = Staging(store, tmp_path / "a", 1)
    staging.open()
    staging.begin()
    (run / "evaluations").mkdir(parents=True)
    for step in (1, 2, 3):
        write_step(run, step)
        record = run / "checkpoints" / str(step) / "loop" / "metadata"
        record.write_text(json.dumps({"best": {"step": min(step, 2)}}))
        (run / "evaluations" / f"{step}.jsonl").write_text("{}\n")
        (run / "evaluations" / f"{step - 2}.jsonl").unlink(missing_ok=True)
        staging.saved(step)
        staging.wait()
    staging.close()
    assert set(read_markers(store)) == {2, 3}
    assert {name for name in store.stats() if name.startswith("evaluations/")} == {
        *("evaluations/2.jsonl", "evaluations/3.jsonl")
    }
    read = copy_of_run(store, tmp_path / "cache", "best")
    assert (best_step(read), checkpoint_steps(read), chosen_step(read, "best")) == (2, [2], 2)
    other = memory_store("other")
    train(Staging(other, tmp_path / "b", 1), last=1)
    with pytest.raises(ValueError, match=r"--step best needs a run that keeps its best checkpoint"):
        copy_of_run(other, tmp_path / "cache", "best")


def test_a_folder_that_neither_is_behind_nor_ahead_is_refused_with_the_way_out(tmp_path):
    store = memory_store("run")
    train(Staging(store, tmp_path / "a", 1), last=1)
    train(Staging(store, tmp_path / "b", 1), last=2)
    write_step(tmp_path / "a" / "run", 2, "other numbers")
    with pytest.raises(ValueError, match=r"step 2 of memory://bucket/run is another than in its staging.*remove .*/a;"):
        Staging(store, tmp_path / "a", 1).open()
    write_step(tmp_path / "a" / "run", 3)
    remove(tmp_path / "a" / "run" / "checkpoints" / "2")
    with pytest.raises(ValueError, match=r"step 3 of the staging folder .* does not go on from step 2"):
        Staging(store, tmp_path / "a", 1).open()
    assert local_steps(tmp_path / "a" / "run").keys() == {1, 3}, "nothing is lost"
    assert set(read_markers(store)) == {2}


def test_a_folder_of_another_run_and_a_store_that_was_emptied_are_refused(tmp_path):
    store = memory_store("run")
    train(Staging(store, tmp_path / "a", 1), last=1)
    clear()
    with pytest.raises(ValueError, match="no longer holds the run whose step 1 was uploaded"):
        Staging(store, tmp_path / "a", 1).open()
    train(Staging(store, tmp_path / "b", 1), last=1)
    with pytest.raises(ValueError, match="holds another run than its staging folder"):
        Staging(store, tmp_path / "a", 1).open()


@pytest.mark.parametrize("lease", [None, b'{"time": 0}'])
def test_a_folder_that_no_run_made_is_not_touched(tmp_path, lease):
    store = memory_store("run")
    store.write("run.json", b"{}")
    store.write("checkpoints/1/a", b"mine")
    if lease is not None:
        store.write("lease.json", lease)
    before = store.stats()
    with pytest.raises(ValueError, match=r"must be empty or hold a run that was uploaded, got memory://bucket/run"):
        Staging(store, tmp_path / "a", 1).open()
    assert store.stats() == before


@pytest.mark.parametrize(
    ("field", "value"),
    [("files", {"../../../../bad": [1, ""]}), ("files", {"/bad": [1, ""]}), ("digest", "../../../bad" + "0" * 52)],
)
def test_a_marker_of_others_names_no_place_outside_of_its_step(tmp_path, field, value):
    store = memory_store("run")
    train(Staging(store, tmp_path / "a", 1), last=1)
    marker = json.loads(store.read(f"checkpoints/1/{MARKER}") or b"")
    store.write(f"checkpoints/1/{MARKER}", json.dumps(marker | {field: value}).encode())
    with pytest.raises(ValueError, match=r"checkpoints/1/uploaded\.json must be the marker of a step"):
        copy_of_run(store, tmp_path / "cache", None)
    assert not (tmp_path / "cache").exists()


def test_a_run_in_a_store_is_not_overwritten(tmp_path):
    store = memory_store("run")
    train(Staging(store, tmp_path / "a", 1), last=1)
    before = store.stats("checkpoints/")
    with pytest.raises(ValueError, match=r"checkpoint.overwrite must be false while memory://bucket/run holds a run"):
        Staging(store, tmp_path / "a", 1).open(overwrite=True)
    assert store.stats("checkpoints/") == before


def test_a_start_that_fails_leaves_nothing(tmp_path):
    store = memory_store("run")
    for begins in (False, True):
        staging = Staging(store, tmp_path / "a", 1)
        staging.open()
        assert list(store.stats()) == [LEASE]
        if begins:
            staging.begin()
        staging.close()
        assert store.stats() == {}
    train(Staging(store, tmp_path / "b", 1), last=1)
    store.remove([LEASE])
    before = store.stats()
    write_step(tmp_path / "a" / "run", 1)
    with pytest.raises(ValueError, match="holds another run"):
        Staging(store, tmp_path / "a", 1).open()
    staging = Staging(store, tmp_path / "b", 1)
    staging.open()
    staging.close()
    assert store.stats() == before


def test_a_lease_that_was_there_before_or_is_another_s_by_now_is_not_removed():
    store = memory_store("run")
    first, second = Lease(store, "a"), Lease(store, "b", later)
    first.take()
    second.take()  # for the first one's is too old by now
    first.release(is_unused=True)
    second.renew()
    second.release(is_unused=True)
    assert b'"token": null' in (store.read(LEASE) or b"")


def test_a_lease_that_is_removed_while_it_is_taken_is_taken():
    class Removing(CountingStore):
        def read(self, name):
            store.__class__ = CountingStore
            first.release(is_unused=True)
            return store.read(name)

    store = memory_store("run")
    first = Lease(store, "a")
    first.take()
    held = store.read(LEASE)
    store.__class__ = Removing
    second = Lease(store, "b")
    second.take()
    assert store.read(LEASE) not in (held, None)


def test_a_second_start_is_refused_while_the_first_holds_the_lease(tmp_path):
    store = memory_store("run")
    first = Staging(store, tmp_path / "a", 1)
    first.open()
    with pytest.raises(ValueError, match=rf"is held by process {os.getpid()} on .*, which renewed it 0 s ago"):
        Staging(store, tmp_path / "b", 1).open()
    with pytest.raises(ValueError, match=r"staging folder .* is in use by another process"):
        Staging(store, tmp_path / "a", 1).open()
    first.close()
    second = Staging(store, tmp_path / "b", 1)
    second.open()
    second.close()


def test_a_lease_that_is_taken_over_stops_its_first_holder_before_it_marks_a_step(tmp_path):
    store = memory_store("run")
    first = Staging(store, tmp_path / "a", 1)
    first.open()
    first.begin()
    second = Staging(store, tmp_path / "b", 1, later)
    second.open()
    write_step(first.run, 1)
    first.saved(1)
    with pytest.raises(ValueError, match=r"is now held by process .* so this run stops before two write"):
        first.wait()
    assert read_markers(store) == {}
    with pytest.raises(ValueError, match="is now held by"):
        first.close()
    held = store.read("lease.json")
    second.lease.renew()
    second.close()
    assert b'"token": null' not in (held or b"")
    assert local_steps(first.run).keys() == {1}


def test_a_lease_that_cannot_be_renewed_for_too_long_counts_as_lost():
    times = [0.0]
    lease = Lease(memory_store("run"), "token", lambda: times[0])
    lease.take()
    times[0] = LEASE_SECONDS
    lease.check()
    times[0] = LEASE_SECONDS + 1
    with pytest.raises(ValueError, match="could not be renewed for 300 s"):
        lease.check()


def test_a_write_of_the_lease_whose_answer_was_lost_counts(monkeypatch):
    store = memory_store("run")
    write_if = type(store).write_if

    def deaf(self, name, data, version):
        write_if(self, name, data, version)
        return write_if(self, name, data, version)  # repeated by the driver: the version is another now

    monkeypatch.setattr(type(store), "write_if", deaf)
    lease = Lease(store, "token")
    lease.take()
    lease.renew()
    lease.release()
    assert b'"token": null' in (store.read(LEASE) or b"")


def test_an_upload_that_fails_ends_the_run_and_is_made_up_for_by_the_next_start(tmp_path):
    store = memory_store("run")
    staging = Staging(store, tmp_path / "a", 1)
    staging.open()
    staging.begin()
    upload, store.upload = store.upload, refuse
    write_step(staging.run, 1)
    staging.saved(1)
    with pytest.raises(ValueError, match="the store is full"):
        staging.wait()
    with pytest.raises(ValueError, match="the store is full"):
        staging.close()
    store.upload = upload
    assert train(Staging(store, tmp_path / "a", 1), last=1) == 1
    assert set(read_markers(store)) == {1}


def refuse(path, name):
    raise ValueError("the store is full")


def test_a_step_that_is_made_again_replaces_the_one_that_was_uploaded(tmp_path):
    store = memory_store("run")
    staging = Staging(store, tmp_path / "a", 2)
    staging.open()
    staging.begin()
    for text in ("numbers", "numbers again"):
        write_step(staging.run, 1, text)
        staging.saved(1)
        staging.wait()
        remove(staging.run / "checkpoints" / "1")
    assert store.read("checkpoints/1/state/a") == b"numbers again of 1"
    staging.close()


def test_a_reader_gets_a_verified_copy_of_one_step_once(tmp_path):
    store = memory_store("run")
    train(Staging(store, tmp_path / "a", 2), last=3)
    view = copy_of_run(store, tmp_path / "cache", None)
    assert [path.name for path in (view / "checkpoints").iterdir()] == ["3"]
    assert (view / "checkpoints" / "3" / "state" / "a").read_text() == "numbers of 3"
    assert (view / "config.yml").exists()
    downloads = store.count("download")
    assert copy_of_run(store, tmp_path / "cache", 3) == view
    assert store.count("download") == downloads
    with pytest.raises(ValueError, match=r"--step must be one of the checkpoints of .*, \[2, 3\], got 1"):
        copy_of_run(store, tmp_path / "cache", 1)
    store.write("checkpoints/2/state/a", b"numbers of 7")
    with pytest.raises(ValueError, match="checkpoints/2/state/a must be what was uploaded, but it is damaged"):
        copy_of_run(store, tmp_path / "cache", 2)
    with pytest.raises(ValueError, match="must be a run folder with a complete checkpoint"):
        copy_of_run(memory_store("nothing"), tmp_path / "cache", None)


def test_one_local_folder_stands_for_a_url_and_a_local_path_for_itself(tmp_path):
    local = load_config(None, [f"output_dir={tmp_path / 'run'}"])
    assert run_path(local) == tmp_path / "run"
    remote = load_config(None, ["output_dir=gs://bucket/run", f"checkpoint.staging={tmp_path}"])
    other = load_config(None, ["output_dir=gs://other/run", f"checkpoint.staging={tmp_path}"])
    assert run_path(remote).parent.parent == tmp_path
    assert run_path(remote) != run_path(other)
    assert run_path(remote).name == "run"


def test_a_mirror_uploads_what_was_saved_and_of_a_local_run_does_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr("rl.run_folder.mirror.open_store", lambda url: memory_store("run"))
    store, said = memory_store("run"), []
    config = load_config(None, ["output_dir=gs://bucket/run", f"checkpoint.staging={tmp_path}"])
    with Mirror(config, said.append, check_only=True):
        assert store.stats() == {}
    with Mirror(config, said.append) as mirror:
        mirror.begin()
        mirror.check()
        mirror.before_save()
        write_step(run_path(config), 1)
        mirror.saved(1)
        mirror.before_save()
        assert set(read_markers(store)) == {1}
        (run_path(config) / "export").mkdir()
        (run_path(config) / "export" / "config.json").write_text("{}")
        (run_path(config) / ".tandem-draft").write_text("half")
    assert store.read("export/config.json") == b"{}", "what is written after the last step is uploaded at the end"
    assert ".tandem-draft" not in store.stats()
    assert len(said) == 2
    mirror = Mirror(config, said.append).__enter__()
    mirror.begin()
    mirror.before_save()
    write_step(run_path(config), 2)
    mirror.__exit__(KeyboardInterrupt, KeyboardInterrupt(), None)
    assert set(read_markers(store)) == {1}, "a second Ctrl-C does not wait for an upload"
    with Mirror(config, said.append) as mirror:
        mirror.begin()
    assert set(read_markers(store)) == {1, 2}, "the next start makes it"
    local = load_config(None, [f"output_dir={tmp_path / 'local'}"])
    with Mirror(local, said.append) as mirror:
        mirror.begin()
        mirror.saved(1)
        mirror.before_save()
        mirror.check()
    assert not (tmp_path / "local").exists()
