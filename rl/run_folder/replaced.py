"""A run that a new run replaces: it is moved beside the folder, and removed once the new run has saved a checkpoint.

In: the folder NAME of a run. Out: the folder `NAME.old-TIME` on the same disk, with all that the run wrote and a note
of what was moved and how far the move got. After a kill the next start reads the note: it undoes `moving`, undoes
`moved` if the new run recorded nothing, and continues `removing`.

Only files that a run wrote are moved or removed (`rl.run_folder.contents`). A user's files stay where they are, except
inside a checkpoint, with which they move. The note is not trusted: it must name files that a run of that kind writes,
without links on the way, and the run.json of a run must lie there.
"""

import dataclasses
import json
import os
import pathlib
import re
import shutil
import time
from collections.abc import Callable, Collection, Sequence
from typing import Any

from rl.files.local_files import UNFINISHED, write_file
from rl.run_folder.contents import (
    CHECKPOINTS,
    EVALUATIONS,
    IDENTITY,
    KINDS,
    checkpoint_steps,
    foreign_in,
    has_work,
    holder,
    is_own_name,
    read_identity,
    read_json,
)

_NOTE = ".tandem-moved.json"
_FORMAT = "tandem replaced run 1"
_TIME = re.compile(r"\d{8}-\d{6}(-\d+)?", re.ASCII)


@dataclasses.dataclass(frozen=True)
class Replaced:
    """A replaced run that was moved.

    Attributes:
      path: the folder that it was moved to.
      phase: `moving`, `moved` or `removing`. entries: paths in that folder that were moved, or will be.
    """

    path: pathlib.Path
    phase: str
    entries: tuple[str, ...]

    @property
    def waiting(self) -> list[str]:
        """The entries that are in that folder now."""
        return [entry for entry in self.entries if os.path.lexists(self.path / entry)]


def replaced_runs(folder: pathlib.Path) -> list[Replaced]:
    """The runs of `folder` that were moved beside it, the newest first.

    Raises:
      ValueError: a note is not one that a run writes, or its folder is not shown to hold a run.
    """
    folder = folder.resolve()
    prefix = folder.name + ".old-"
    if not folder.parent.is_dir():
        return []
    found = [entry for entry in folder.parent.iterdir() if entry.name.startswith(prefix)]
    found = [entry for entry in found if _TIME.fullmatch(entry.name.removeprefix(prefix)) and entry.is_dir()]
    return [run for entry in sorted(found, reverse=True) if (run := _read(entry, folder)) is not None]


def coming_back(folder: pathlib.Path) -> Replaced | None:
    """The run that `recover` would move back; None where there is none. Changes nothing."""
    for old in replaced_runs(folder):
        if old.waiting and (old.phase == "moving" or (old.phase == "moved" and not has_work(folder))):
            return old
    return None


def move_aside(folder: pathlib.Path, entries: Sequence[str]) -> Replaced:
    """Moves these entries of a run folder to a new folder beside it, run.json last.

    Raises:
      ValueError: an entry cannot be moved, or a checkpoint would stay, from which the new run would resume. Everything
        is put back.
    """
    folder = folder.resolve()
    old = Replaced(_new_folder(folder), "moving", tuple(entries))
    way_out = "choose another output_dir, or move that run away"
    try:
        _write(old, folder)
        for entry in entries:
            _rename(folder / entry, old.path / entry)
        if steps := checkpoint_steps(folder):
            raise ValueError(
                f"checkpoint.overwrite=true must leave no checkpoint in {folder}, and it would leave {steps[:5]}; "
                f"{way_out}"
            )
        old = dataclasses.replace(old, phase="moved")
        _write(old, folder)
    except OSError as error:
        restore(folder, old)
        raise ValueError(
            f"the run in {folder} must be moved beside it for checkpoint.overwrite=true, and it cannot be: {error}; "
            f"{way_out}"
        ) from error
    except ValueError:
        restore(folder, old)
        raise
    return old


def recover(folder: pathlib.Path, clear: Callable[[], None]) -> list[str]:
    """Completes or undoes a move that a kill interrupted. Returns what was done, in words.

    Args:
      clear: removes from the folder what a start that recorded nothing has left in it.

    Raises:
      ValueError: something lies where the old run must go back to, or see `replaced_runs`.
    """
    done = []
    for old in replaced_runs(folder):
        if old.phase == "removing" or (old.phase == "moved" and checkpoint_steps(folder)):
            done += remove(folder, old)
        elif old.phase == "moving" or not has_work(folder):
            if old.phase == "moved":
                clear()
            restore(folder, old)
            if old.entries:
                done.append(
                    f"the run that {old.path} held is back in {folder}: the one in its place had recorded nothing"
                )
    return done


def check_way_back(folder: pathlib.Path, old: Replaced, cleared: Collection[pathlib.Path] = ()) -> None:
    """ValueError where something is in the way of a run that must move back, other than what will be cleared."""
    for entry in old.waiting:
        if os.path.lexists(folder / entry) and folder / entry not in cleared:
            raise ValueError(
                f"the run in {old.path} must go back to {folder}, and {folder / entry} is in its way; move one of the "
                "two"
            )


def restore(folder: pathlib.Path, old: Replaced) -> None:
    """Moves a run back, and removes the folder that it was moved to.

    Raises:
      ValueError: something is in the way.
    """
    folder = folder.resolve()
    check_way_back(folder, old)
    waiting = old.waiting
    if waiting and old.phase != "moving":
        _write(dataclasses.replace(old, phase="moving"), folder)
    for entry in waiting:
        _rename(old.path / entry, folder / entry)
    _end(old.path)


def remove(folder: pathlib.Path, old: Replaced) -> list[str]:
    """Removes a moved run, and its folder if nothing else is in it. Returns what stays, in words."""
    if old.phase != "removing":
        _write(dataclasses.replace(old, phase="removing"), folder)
    for entry in old.waiting:
        path = old.path / entry
        if path.is_dir():
            if not foreign_in(path):
                shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    _end(old.path)
    if not old.path.exists():
        return []
    kept = [str(path) for path in sorted(old.path.rglob("*")) if not path.is_dir()]
    return [f"{old.path} stays, for it holds what no run wrote or what was changed since: {', '.join(kept[:5])}"]


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
    _remove_if_empty(old / EVALUATIONS)
    for name in (UNFINISHED + _NOTE, _NOTE):  # a folder without a note counts as ours only if it is empty
        (old / name).unlink(missing_ok=True)
    _remove_if_empty(old)


def _remove_if_empty(folder: pathlib.Path) -> None:
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()


def _write(old: Replaced, folder: pathlib.Path) -> None:
    note = {"format": _FORMAT, "folder": folder.resolve().name, "phase": old.phase, "entries": list(old.entries)}
    write_file(old.path / _NOTE, f"{json.dumps(note, indent=1)}\n".encode())


def _read(path: pathlib.Path, folder: pathlib.Path) -> Replaced | None:
    """The note in a folder to which a run of `folder` was moved. An empty folder of that name was left by a kill. None
    for any other folder. ValueError where the note has our mark and does not fit.
    """
    try:
        if all(entry.name == UNFINISHED + _NOTE for entry in path.iterdir()):
            return None if path.is_symlink() else Replaced(path, "moving", ())
    except OSError:
        return None
    if not os.path.lexists(path / _NOTE):
        return None
    try:
        note = read_json(path / _NOTE)
        if note.get("format") != _FORMAT or note.get("folder") != folder.name:
            return None
        return _checked(path, folder, note)
    except ValueError as error:
        raise ValueError(
            f"{path} must hold a run of {folder} that was moved there, as {_NOTE} in it says, and it is not shown to: "
            f"{error}. Nothing of it is touched; if you know what it is, move it away or remove {path / _NOTE}, or "
            "choose another output_dir"
        ) from error


def _checked(path: pathlib.Path, folder: pathlib.Path, note: dict[str, Any]) -> Replaced:
    """The note, after checks that a run writes every entry, and that the entries are of the run in that folder."""
    phase, entries = note.get("phase"), note.get("entries")
    if phase not in ("moving", "moved", "removing"):
        raise ValueError(f"the phase is {str(phase)[:80]!r}")
    if not isinstance(entries, list) or not all(isinstance(entry, str) for entry in entries):
        raise ValueError(f"the entries are {str(entries)[:80]!r}")
    if strange := [entry for entry in entries if not any(is_own_name(entry, kind) for kind in KINDS)]:
        raise ValueError(f"no run writes {strange[0][:200]!r}")
    places = [path, path / _NOTE, path / CHECKPOINTS, path / EVALUATIONS, *(path / entry for entry in entries)]
    if links := [place for place in places if place.is_symlink()]:
        raise ValueError(f"{links[0]} is a link")
    old = Replaced(path, phase, tuple(entries))
    if not old.waiting:
        return old
    if phase == "removing" and not os.path.lexists(path / IDENTITY):
        return Replaced(path, phase, ())  # run.json is removed last, so it may be gone
    # A move in either direction takes run.json last.
    kind = read_identity(holder(IDENTITY, path, folder) if phase == "moving" else path)["kind"]
    if strange := [entry for entry in entries if not is_own_name(entry, kind)]:
        raise ValueError(f"no run of kind {kind!r} writes {strange[0]!r}")
    return old
