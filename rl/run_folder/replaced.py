"""An old run that a new one takes the place of: moved beside it, and removed once the new one has saved a checkpoint.

In: the folder NAME of a run. Out: the folder `NAME.old-TIME` on the same disk with all that the run wrote. It holds a
note of what was moved and how far this got, so that a kill at any moment can be made good by the next start: `moving`
is undone, `moved` is undone where the new run recorded nothing, `removing` is gone on with. Only what a run wrote is
moved or removed (`rl.run_folder.contents`); files of a user stay where they are, those inside a checkpoint go and stay
with it.
"""

import json
import os
import pathlib
import re
import shutil
import time
from collections.abc import Callable, Sequence
from typing import Any

from rl.files.local_files import UNFINISHED, write_file
from rl.run_folder.contents import CHECKPOINTS, checkpoint_steps, foreign_in, has_work, read_json

_NOTE = ".tandem-moved.json"
_FORMAT = "tandem replaced run 1"
_TIME = re.compile(r"\d{8}-\d{6}(-\d+)?", re.ASCII)


def replaced_runs(folder: pathlib.Path) -> list[pathlib.Path]:
    """The folders beside `folder` to which runs of it were moved, the newest first."""
    folder = folder.resolve()
    prefix = folder.name + ".old-"
    if not folder.parent.is_dir():
        return []
    found = [entry for entry in folder.parent.iterdir() if entry.name.startswith(prefix)]
    found = [entry for entry in found if _TIME.fullmatch(entry.name.removeprefix(prefix)) and entry.is_dir()]
    return sorted((entry for entry in found if _read(entry, folder) is not None), reverse=True)


def move_aside(folder: pathlib.Path, entries: Sequence[str]) -> pathlib.Path:
    """Moves these entries of a run folder to a new folder beside it, run.json last; gives that folder.

    Raises:
      ValueError: it cannot be done; everything is where it was.
    """
    folder = folder.resolve()
    old = _new_folder(folder)
    try:
        _write(old, folder, "moving", entries)
        for entry in entries:
            _rename(folder / entry, old / entry)
        _write(old, folder, "moved", entries)
    except OSError as error:
        restore(folder, old)
        raise ValueError(
            f"the run in {folder} must be moved beside it for checkpoint.overwrite=true, and it cannot be: {error}; "
            "choose another output_dir, or move that run away"
        ) from error
    return old


def recover(folder: pathlib.Path, clear: Callable[[], None]) -> list[str]:
    """Makes good what a kill has left; what was done, in words.

    Args:
      clear: removes from the folder what a start that recorded nothing has left in it.

    Raises:
      ValueError: something lies where the old run must go back to.
    """
    done = []
    for old in replaced_runs(folder):
        state = _read(old, folder)
        assert state is not None
        if state["phase"] == "removing" or (state["phase"] == "moved" and checkpoint_steps(folder)):
            done += remove(folder, old)
        elif state["phase"] == "moving" or not has_work(folder):
            if state["phase"] == "moved":
                clear()
            restore(folder, old)
            if state["entries"]:
                done.append(f"the run that {old} held is back in {folder}: the one in its place had recorded nothing")
    return done


def restore(folder: pathlib.Path, old: pathlib.Path) -> None:
    """Moves a run back, and removes the folder that it was moved to.

    Raises:
      ValueError: something lies where it must go.
    """
    folder = folder.resolve()
    state = _read(old, folder)
    entries = [] if state is None else state["entries"]
    waiting = [entry for entry in entries if os.path.lexists(old / entry)]
    for entry in waiting:
        if os.path.lexists(folder / entry):
            raise ValueError(
                f"the run in {old} must go back to {folder}, and {folder / entry} is in its way; move one of the two"
            )
    if state is not None and state["phase"] != "moving":
        _write(old, folder, "moving", entries)
    for entry in waiting:
        _rename(old / entry, folder / entry)
    _end(old)


def remove(folder: pathlib.Path, old: pathlib.Path) -> list[str]:
    """Removes what a run wrote, after it was moved to `old`, and the folder, where nothing else is in it; what stays,
    in words.
    """
    state = _read(old, folder)
    assert state is not None
    if state["phase"] != "removing":
        _write(old, folder, "removing", state["entries"])
    for entry in state["entries"]:
        path = old / entry
        if path.is_dir():
            if not foreign_in(path):
                shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    _end(old)
    if not old.exists():
        return []
    kept = [path for path in sorted(old.rglob("*")) if not path.is_dir()]
    return [f"{old} stays, for it holds what no run wrote or what was changed since: {', '.join(map(str, kept[:5]))}"]


def _new_folder(folder: pathlib.Path) -> pathlib.Path:
    name = f"{folder.name}.old-{time.strftime('%Y%m%d-%H%M%S', time.gmtime())}"
    for number in range(1, 1000):
        old = folder.with_name(name if number == 1 else f"{name}-{number}")
        try:
            old.mkdir()
        except FileExistsError:
            continue
        except OSError as error:
            raise ValueError(
                f"checkpoint.overwrite=true moves the old run to {old}, which cannot be made: {error}; choose another "
                "output_dir, or move that run away"
            ) from error
        return old
    raise ValueError(f"checkpoint.overwrite=true moves the old run beside {folder}, where {name} to {name}-999 exist")


def _rename(source: pathlib.Path, target: pathlib.Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    os.rename(source, target)


def _end(old: pathlib.Path) -> None:
    """Removes the note, and the folders if they are empty."""
    _remove_if_empty(old / CHECKPOINTS)
    for name in (UNFINISHED + _NOTE, _NOTE):  # without its note the folder must be empty, to be known as ours
        (old / name).unlink(missing_ok=True)
    _remove_if_empty(old)


def _remove_if_empty(folder: pathlib.Path) -> None:
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()


def _write(old: pathlib.Path, folder: pathlib.Path, phase: str, entries: Sequence[str]) -> None:
    note = {"format": _FORMAT, "folder": folder.name, "phase": phase, "entries": list(entries)}
    write_file(old / _NOTE, f"{json.dumps(note, indent=1)}\n".encode())


def _read(old: pathlib.Path, folder: pathlib.Path) -> dict[str, Any] | None:
    """The note of a folder to which a run of `folder` was moved; an empty folder by that name is one that a kill left.
    None for any other folder.
    """
    try:
        if all(entry.name == UNFINISHED + _NOTE for entry in old.iterdir()):
            return {"phase": "moving", "entries": []}
        note = read_json(old / _NOTE)
    except (OSError, ValueError):
        return None
    is_ours = note.get("format") == _FORMAT and note.get("folder") == folder.resolve().name
    return note if is_ours else None
