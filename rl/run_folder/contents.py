"""What a run writes into its folder, and how a folder is shown to be a run's.

In: a folder. Out: the run's configuration and identity, or a ValueError that says why it is not shown to be a run; the
names of what the run wrote. A name alone proves nothing: `run.json` must say that it is ours, and what lies beside it
must agree. Nothing here changes a folder. Whose turn it is to write is `rl.run_folder.folder`.
"""

import contextlib
import hashlib
import json
import os
import pathlib
import re
from typing import Any

from rl.config.load import Config, load_config
from rl.files.local_files import UNFINISHED

CONFIG, IDENTITY, METRICS, SAMPLES = "config.yml", "run.json", "metrics.jsonl", "samples.jsonl"
CHECKPOINTS, EXPORT, EXPORT_RECORD = "checkpoints", "export", "export.json"
HASHES = "hashes.json"  # of a checkpoint, see `rl.state.checkpoint_files`
LOCK, LOG, CURVES = ".lock", "rewards.log", "reward.png"
LOG_BEFORE = LOG + ".1"  # what came before, see `rewards.log`
FORMAT = "tandem run 1"
KINDS = ("grpo", "sft")
# Keys of run.json that are about the file, not about what the run starts from.
FORMAT_KEY, FILES_KEY = "format", "files"
# The id of the run, in run.json and in hashes.json of each of its steps; that of a run in a store is its ledger's, too.
RUN_KEY = "run"
HELD_OUT = "held_out"  # of run.json: what the held-out rows are known by; older versions wrote none

# Written anew, or gone on with, by each run of a folder; rewards.log is the folder's, whichever run it has.
_FILES = (METRICS, SAMPLES, CONFIG, IDENTITY)
CURVES_MARK = "Tandem: grpo report"  # in every picture that it draws, whatever the format
_LARGEST_CURVES = 1 << 25  # bytes
# What Orbax and `rl.state.checkpoint_files` put into a step, beside files that hashes.json lists.
_STEP_ENTRIES = (
    *("state", "loop", "reference", HASHES, "_CHECKPOINT_METADATA", "commit_success.txt"),
    *("metrics", "descriptor"),
)
# Names of steps: one part of a path each. The damaged were set aside.
_OWN_STEP = re.compile(r"\d+(\.orbax-checkpoint-tmp[^/\0]*|\.damaged(\.\d+)?)?", re.ASCII)
_STEP = re.compile(r"\d+(\.orbax-checkpoint-tmp[^/\0]*)?", re.ASCII)


def read_json(path: pathlib.Path) -> dict[str, Any]:
    """The JSON object in a file; ValueError, naming the file, where there is none."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path.name} cannot be read: {type(error).__name__}: {str(error)[:200]}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path.name} must hold a JSON object, got {type(value).__name__}")
    return value


def read_identity(folder: pathlib.Path) -> dict[str, Any]:
    """run.json of a folder: a known format and kind, and the source of a policy; ValueError where it says less."""
    identity = read_json(folder / IDENTITY)
    mark, start = identity.get(FORMAT_KEY), identity.get("policy")
    if mark not in (FORMAT, None):
        raise ValueError(f"{IDENTITY} must have {FORMAT_KEY} {FORMAT!r}, got {str(mark)[:80]!r}")
    if identity.get("kind") not in KINDS:
        raise ValueError(f"{IDENTITY} must have a kind out of {KINDS}, got {str(identity.get('kind'))[:80]!r}")
    if not isinstance(start, dict) or "source" not in start:
        raise ValueError(f"{IDENTITY} must name the source of the policy, got {str(start)[:80]!r}")
    return identity


def identify(*folders: pathlib.Path) -> tuple[Config, dict[str, Any]]:
    """The configuration and run.json of a folder that is shown to be a run's, by content; reads only.

    A run that a kill left half-moved lies in two folders, each file of it in one of them (`rl.run_folder.replaced`).

    run.json must be a JSON object with a known kind and the source of a policy; config.yml must load and name the same
    source. run.json must have our mark; older versions wrote none, and of their runs there must be a line of metrics or
    a checkpoint of Orbax's. A run that recorded nothing must have the very config.yml that run.json was written with.

    Raises:
      ValueError: it is not shown, and why.
    """
    identity = read_identity(holder(IDENTITY, *folders))
    mark, source = identity.get(FORMAT_KEY), identity["policy"]["source"]
    folder = holder(CONFIG, *folders)
    if not isinstance(identity.get(RUN_KEY, ""), str):
        raise ValueError(f"{IDENTITY} must have an id of the run that is text, got {str(identity[RUN_KEY])[:80]!r}")
    try:
        config = load_config(folder / CONFIG)
    except (OSError, ValueError) as error:
        raise ValueError(f"{CONFIG}: {error}") from error
    if source != config.model.source:
        raise ValueError(
            f"{IDENTITY} and {CONFIG} must agree, got a policy from {source!r} and model.source {config.model.source!r}"
        )
    steps = [step for each in folders for step in _steps(each)]
    if mark is None and not (any(map(_has_metrics, folders)) or any(map(is_checkpoint, steps))):
        raise ValueError(f"{IDENTITY} has no {FORMAT_KEY}, and there is neither a line in {METRICS} nor a checkpoint")
    if mark is not None and not any(map(has_work, folders)) and not _is_as_written(folder, identity):
        raise ValueError(f"nothing is recorded, and {CONFIG} is not the one that {IDENTITY} was written with")
    return config, identity


def holder(name: str, *folders: pathlib.Path) -> pathlib.Path:
    """The first of these folders that has an entry of this name; the last where none has."""
    return next((folder for folder in folders if os.path.lexists(folder / name)), folders[-1])


def is_config_changed(folder: pathlib.Path, identity: dict[str, Any]) -> bool:
    """Whether config.yml is not the file that run.json was written with; False where run.json, of an older version, has
    no hash of it.
    """
    files = identity.get(FILES_KEY)
    return isinstance(files, dict) and CONFIG in files and not _is_as_written(folder, identity)


def is_start_alone(folder: pathlib.Path) -> bool:
    """Whether the folder is empty, or holds no more than a start leaves behind that was killed before it could write
    config.yml. A log is a start's beside the lock, which a start makes before; alone it is a user's.
    """
    names = {entry.name for entry in folder.iterdir() if not entry.name.startswith(UNFINISHED)}
    lock = folder / LOCK
    if LOCK in names and (lock.is_symlink() or not lock.is_file() or lock.stat().st_size):
        return False
    if IDENTITY in names and not is_own_identity(folder):
        return False
    if names & {LOG, LOG_BEFORE} and not names & {LOCK, IDENTITY}:
        return False
    return names <= {LOCK, LOG, LOG_BEFORE, IDENTITY}


def is_own_identity(folder: pathlib.Path) -> bool:
    """Whether run.json has our mark."""
    with contextlib.suppress(ValueError):
        return read_json(folder / IDENTITY).get(FORMAT_KEY) == FORMAT
    return False


def run_id(folder: pathlib.Path) -> str | None:
    """The id of the run in a folder; None where an older version wrote run.json. ValueError where there is none."""
    return read_json(folder / IDENTITY).get(RUN_KEY)


def is_run_folder(path: str | os.PathLike) -> bool:
    """Whether the folder holds a run's identity and configuration, by name; `identify` looks into them."""
    folder = pathlib.Path(path)
    return (folder / IDENTITY).is_file() and (folder / CONFIG).is_file()


def checkpoint_steps(path: str | os.PathLike) -> list[int]:
    """Steps of the complete checkpoints of a run folder, rising."""
    return sorted(int(entry.name) for entry in _steps(pathlib.Path(path)))


def is_checkpoint(folder: pathlib.Path) -> bool:
    """Whether the folder of a step has what Orbax, or `rl.state.checkpoint_files`, writes into one."""
    marks = ("_CHECKPOINT_METADATA", HASHES, "state/_METADATA", "loop/metadata")
    return folder.is_dir() and any((folder / mark).is_file() for mark in marks)


def strange_steps(folder: pathlib.Path) -> list[str]:
    """Entries of checkpoints/ that are named as steps are, and are no checkpoints."""
    return sorted(f"{CHECKPOINTS}/{entry.name}" for entry in _steps(folder) if not is_checkpoint(entry))


def unfinished_steps(folder: pathlib.Path) -> list[pathlib.Path]:
    """The checkpoints that Orbax was writing when it was stopped."""
    checkpoints = folder / CHECKPOINTS
    entries = sorted(checkpoints.iterdir()) if checkpoints.is_dir() else []
    return [entry for entry in entries if _STEP.fullmatch(entry.name) and not entry.name.isdecimal()]


def has_work(folder: pathlib.Path) -> bool:
    """Whether a run has recorded anything here: a line of metrics or samples, or a checkpoint."""
    files = (folder / METRICS, folder / SAMPLES)
    return any(file.is_file() and file.stat().st_size > 0 for file in files) or bool(checkpoint_steps(folder))


def own_entries(folder: pathlib.Path, kind: str) -> list[str]:
    """What a run of this kind wrote into its folder, without the log: paths in it, run.json last.

    Fine-tuning alone writes export/; that of another run is a user's.
    """
    entries = []
    if kind == "sft" and (folder / EXPORT).is_dir() and not (folder / EXPORT).is_symlink():
        entries.append(EXPORT)
    checkpoints = folder / CHECKPOINTS
    if checkpoints.is_dir() and not checkpoints.is_symlink():
        steps = sorted(entry for entry in checkpoints.iterdir() if _OWN_STEP.fullmatch(entry.name))
        entries += [f"{CHECKPOINTS}/{step.name}" for step in steps if not step.name.isdecimal() or is_checkpoint(step)]
    if kind == "sft" and is_export_record(folder / EXPORT_RECORD):
        entries.append(EXPORT_RECORD)
    if is_own_curves(folder / CURVES):
        entries.append(CURVES)
    return entries + [name for name in _FILES if _is_plain_file(folder / name)]


def is_own_name(entry: str, kind: str) -> bool:
    """Whether `own_entries` of a run of this kind can give this path. No other is ever moved or removed."""
    folder, _, step = entry.partition("/")
    if folder == CHECKPOINTS and step:
        return _OWN_STEP.fullmatch(step) is not None
    return entry in (*_FILES, CURVES) or (kind == "sft" and entry in (EXPORT, EXPORT_RECORD))


def linked_files(folder: pathlib.Path) -> list[pathlib.Path]:
    """Links where a run has its files: what it writes would go to where they lead."""
    return [folder / name for name in (LOCK, LOG, LOG_BEFORE, *_FILES) if (folder / name).is_symlink()]


def linked_entries(folder: pathlib.Path, kind: str) -> list[pathlib.Path]:
    """Links where a run of this kind has its checkpoints and its export, and in checkpoints/ by the names of steps."""
    names = (CHECKPOINTS, EXPORT, EXPORT_RECORD) if kind == "sft" else (CHECKPOINTS,)
    checkpoints = folder / CHECKPOINTS
    steps = sorted(checkpoints.iterdir()) if checkpoints.is_dir() and not checkpoints.is_symlink() else []
    entries = [*(folder / name for name in names), *(step for step in steps if _OWN_STEP.fullmatch(step.name))]
    return [entry for entry in entries if entry.is_symlink()]


def is_own_curves(path: pathlib.Path) -> bool:
    """Whether a file is a picture that `grpo report` drew."""
    if not _is_plain_file(path) or path.stat().st_size > _LARGEST_CURVES:
        return False
    return CURVES_MARK.encode() in path.read_bytes()


def foreign_in(path: pathlib.Path) -> list[pathlib.Path]:
    """What no run wrote into something that `own_entries` names: into a step, or into export/."""
    if path.name == EXPORT:
        return [] if is_own_export(path.parent) else [path]
    if path.parent.name != CHECKPOINTS or (_STEP.fullmatch(path.name) and not path.name.isdecimal()):
        return []
    foreign = [entry for entry in path.iterdir() if entry.name not in _STEP_ENTRIES]
    with contextlib.suppress(ValueError):  # without hashes the items of a step are Orbax's, as their names say
        files = read_json(path / HASHES).get("files")
        if isinstance(files, dict):
            below = (
                file for file in sorted(path.glob("*/**/*")) if file.is_file() and file.name != "commit_success.txt"
            )
            foreign += [file for file in below if file.relative_to(path).as_posix() not in files]
    return sorted(set(foreign))


def describe_files(folder: pathlib.Path) -> dict[str, list[int]]:
    """[size in bytes, time of the last change in ns] of every file below a folder, by path."""
    files = [path for path in sorted(folder.rglob("*")) if not path.is_dir()]
    return {path.relative_to(folder).as_posix(): [path.lstat().st_size, path.lstat().st_mtime_ns] for path in files}


def is_own_export(folder: pathlib.Path) -> bool:
    """Whether every file in export/ is one that a run left there, as it was."""
    with contextlib.suppress(ValueError):
        return describe_files(folder / EXPORT).items() <= read_json(folder / EXPORT_RECORD).items()
    return False


def _is_plain_file(path: pathlib.Path) -> bool:
    return path.is_file() and not path.is_symlink()


def is_export_record(path: pathlib.Path) -> bool:
    """Whether a file is what `describe_files` says of an export."""
    with contextlib.suppress(ValueError):
        sizes = read_json(path).values() if _is_plain_file(path) else ()
        return bool(sizes) and all(isinstance(size, list) and list(map(type, size)) == [int, int] for size in sizes)
    return False


def _steps(folder: pathlib.Path) -> list[pathlib.Path]:
    checkpoints = folder / CHECKPOINTS
    return [entry for entry in checkpoints.iterdir() if entry.name.isdecimal()] if checkpoints.is_dir() else []


def _has_metrics(folder: pathlib.Path) -> bool:
    """Whether metrics.jsonl begins with a line of a run's."""
    with contextlib.suppress(OSError, ValueError, RecursionError):
        with (folder / METRICS).open("rb") as stream:
            line = json.loads(stream.readline(1 << 20))
        return isinstance(line, dict) and isinstance(line.get("step"), int)
    return False


def _is_as_written(folder: pathlib.Path, identity: dict[str, Any]) -> bool:
    files = identity.get(FILES_KEY)
    content = (folder / CONFIG).read_bytes()
    return isinstance(files, dict) and files.get(CONFIG) == hashlib.sha256(content).hexdigest()
