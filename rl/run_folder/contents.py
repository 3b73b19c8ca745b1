"""What a run writes into its folder, and how the content of a folder shows that it is a run's.

In: a folder. Out: the run's configuration and identity, or a ValueError with the reason why the folder is not shown to
be a run's; the names of the run's files. A name alone proves nothing: `run.json` must have our mark, and the other
files must agree with it. Nothing here changes a folder. `rl.run_folder.folder` says who may write.
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
EVENTS = "events.jsonl"  # what is no number of a step: starts, warnings, histograms
CHANGED = "changed"  # there beside `start`: {key: value} of keys that a resumed run has otherwise than config.yml
JOURNAL = "journal.jsonl"  # of the steps since the last checkpoint, see `rl.rollout.journal`
BEST = "best"  # in place of a step's number, and in loop records: the checkpoint with the best checkpoint.best.metric
Step = int | str  # a number, or BEST
EVALUATIONS = "evaluations"  # folder of the samples of evaluations, see `rl.run.eval_files`
CHECKPOINTS, EXPORT, EXPORT_RECORD = "checkpoints", "export", "export.json"
HASHES = "hashes.json"  # of a checkpoint, see `rl.state.checkpoint_files`
LOCK, LOG, CURVES, REPORT = ".lock", "rewards.log", "reward.png", "report.html"
LOG_BEFORE = LOG + ".1"  # what came before, see `rewards.log`
FORMAT = "tandem run 1"
KINDS = ("grpo", "sft")
# Keys of run.json that are about the file, not about what the run starts from.
FORMAT_KEY, FILES_KEY = "format", "files"
# The id of the run. It is in run.json, in hashes.json of each step, and in the ledger of a run in a store.
RUN_KEY = "run"
HELD_OUT = "held_out"  # of run.json: the identity of the held-out rows; older versions wrote none

# Each run of a folder writes or continues these. rewards.log belongs to the folder, whichever run it holds.
_FILES = (METRICS, SAMPLES, EVENTS, JOURNAL, CONFIG, IDENTITY)
CURVES_MARK = "Tandem: grpo report"  # in every page and picture that it writes, whatever the format
_LARGEST_CURVES = 1 << 25  # bytes
# Files of a step, by Orbax and `rl.state.checkpoint_files`, that hashes.json does not list.
_STEP_ENTRIES = (
    *("state", "loop", "reference", HASHES, "_CHECKPOINT_METADATA", "commit_success.txt"),
    *("metrics", "descriptor"),
)
# Names of step folders. A damaged step is one that was set aside.
_OWN_STEP = re.compile(r"\d+(\.orbax-checkpoint-tmp[^/\0]*|\.damaged(\.\d+)?)?", re.ASCII)
_EVALUATION = re.compile(r"\d+\.jsonl", re.ASCII)
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
    """The run.json of a folder. ValueError where the format or the kind is unknown, or the policy's source is
    missing.
    """
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
    """The configuration and run.json of a folder whose content shows that it is a run's. Reads only.

    A run that a kill left half-moved lies in two folders, each file in one of them (`rl.run_folder.replaced`).

    run.json must be a JSON object with a known kind and a policy's source, and config.yml must load and name the same
    source. run.json must have our mark. Older versions wrote no mark: their runs must have a line of metrics or an
    Orbax checkpoint. A run that recorded nothing must have the config.yml that run.json was written with, unchanged.

    Raises:
      ValueError: the content does not show it; the message says why.
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
    """The first of these folders that has an entry of this name; the last folder if none has."""
    return next((folder for folder in folders if os.path.lexists(folder / name)), folders[-1])


def is_config_changed(folder: pathlib.Path, identity: dict[str, Any]) -> bool:
    """Whether config.yml has changed since run.json was written. False where an older version wrote no hash of it."""
    files = identity.get(FILES_KEY)
    return isinstance(files, dict) and CONFIG in files and not _is_as_written(folder, identity)


def is_start_alone(folder: pathlib.Path) -> bool:
    """Whether the folder is empty, or holds only what a start leaves that was killed before it wrote config.yml.

    A log beside the lock is left by a start, which makes the lock first. A log alone is a user's file.
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
    """The id of the run in a folder; None where an older version wrote run.json. ValueError where there is no run."""
    return read_json(folder / IDENTITY).get(RUN_KEY)


def is_run_folder(path: str | os.PathLike) -> bool:
    """Whether the folder has files with the names of a run's identity and configuration. `identify` reads them."""
    folder = pathlib.Path(path)
    return (folder / IDENTITY).is_file() and (folder / CONFIG).is_file()


def checkpoint_steps(path: str | os.PathLike) -> list[int]:
    """Steps of the complete checkpoints of a run folder, in rising order."""
    return sorted(int(entry.name) for entry in _steps(pathlib.Path(path)))


def best_step(path: str | os.PathLike) -> int | None:
    """The step of a run's best checkpoint, by the loop record of its newest one; None where it names none."""
    steps = checkpoint_steps(path)
    return recorded_best(pathlib.Path(path) / CHECKPOINTS / str(steps[-1])) if steps else None


def chosen_step(path: str | os.PathLike, step: Step | None) -> int | None:
    """The number of the step that a reader of a run folder names: None stays None, `best` is looked up.

    Raises:
      ValueError: there is no best checkpoint.
    """
    if step is None or isinstance(step, int):
        return step
    found = best_step(path)
    if found is None:
        raise ValueError(
            f"--step {BEST} needs a run that keeps its best checkpoint (checkpoint.best.metric), got "
            f"{os.fspath(path)!r}, whose newest checkpoint names none; its checkpoints are {checkpoint_steps(path)}"
        )
    return found


def recorded_best(step: pathlib.Path) -> int | None:
    """The step of the best checkpoint by the record in the folder of a step; None where it names none."""
    with contextlib.suppress(ValueError):  # whoever reads the step itself says what is wrong with it
        best = read_json(step / "loop" / "metadata").get(BEST)
        found = best.get("step") if isinstance(best, dict) else None
        return found if isinstance(found, int) else None
    return None


def evaluation_files(folder: pathlib.Path) -> list[pathlib.Path]:
    """The files of samples of evaluations, oldest step first."""
    place = folder / EVALUATIONS
    if not place.is_dir() or place.is_symlink():
        return []
    return sorted(
        (entry for entry in place.iterdir() if _EVALUATION.fullmatch(entry.name) and _is_plain_file(entry)),
        key=lambda entry: int(entry.stem),
    )


def unfinished_evaluations(folder: pathlib.Path) -> list[pathlib.Path]:
    """Drafts of such files, left by an evaluation that was killed."""
    place = folder / EVALUATIONS
    if not place.is_dir() or place.is_symlink():
        return []
    names = [entry for entry in place.iterdir() if entry.name.startswith(UNFINISHED) and _is_plain_file(entry)]
    return [entry for entry in names if _EVALUATION.fullmatch(entry.name.removeprefix(UNFINISHED))]


def is_checkpoint(folder: pathlib.Path) -> bool:
    """Whether the folder of a step has what Orbax, or `rl.state.checkpoint_files`, writes into one."""
    marks = ("_CHECKPOINT_METADATA", HASHES, "state/_METADATA", "loop/metadata")
    return folder.is_dir() and any((folder / mark).is_file() for mark in marks)


def strange_steps(folder: pathlib.Path) -> list[str]:
    """Entries of checkpoints/ that have the name of a step and are no checkpoint."""
    return sorted(f"{CHECKPOINTS}/{entry.name}" for entry in _steps(folder) if not is_checkpoint(entry))


def unfinished_steps(folder: pathlib.Path) -> list[pathlib.Path]:
    """The checkpoints that Orbax was writing when it was stopped."""
    checkpoints = folder / CHECKPOINTS
    entries = sorted(checkpoints.iterdir()) if checkpoints.is_dir() else []
    return [entry for entry in entries if _STEP.fullmatch(entry.name) and not entry.name.isdecimal()]


def has_work(folder: pathlib.Path) -> bool:
    """Whether a run has recorded anything here: a line of metrics, samples or its journal, or a checkpoint."""
    files = (folder / METRICS, folder / SAMPLES, folder / JOURNAL)
    return any(file.is_file() and file.stat().st_size > 0 for file in files) or bool(checkpoint_steps(folder))


def own_entries(folder: pathlib.Path, kind: str) -> list[str]:
    """Paths, in the folder, of what a run of this kind wrote, without the log and with run.json last.

    Only fine-tuning writes export/. In the folder of another kind of run, export/ is a user's.
    """
    entries = []
    if kind == "sft" and (folder / EXPORT).is_dir() and not (folder / EXPORT).is_symlink():
        entries.append(EXPORT)
    checkpoints = folder / CHECKPOINTS
    if checkpoints.is_dir() and not checkpoints.is_symlink():
        steps = sorted(entry for entry in checkpoints.iterdir() if _OWN_STEP.fullmatch(entry.name))
        entries += [f"{CHECKPOINTS}/{step.name}" for step in steps if not step.name.isdecimal() or is_checkpoint(step)]
    entries += [f"{EVALUATIONS}/{entry.name}" for entry in evaluation_files(folder)]
    if kind == "sft" and is_export_record(folder / EXPORT_RECORD):
        entries.append(EXPORT_RECORD)
    entries += [name for name in (CURVES, REPORT) if is_own_curves(folder / name)]
    return entries + [name for name in _FILES if _is_plain_file(folder / name)]


def is_own_name(entry: str, kind: str) -> bool:
    """Whether a run of this kind can own this path (`own_entries`). No other path is ever moved or removed."""
    folder, _, step = entry.partition("/")
    if folder == CHECKPOINTS and step:
        return _OWN_STEP.fullmatch(step) is not None
    if folder == EVALUATIONS and step:
        return _EVALUATION.fullmatch(step) is not None
    return entry in (*_FILES, CURVES, REPORT) or (kind == "sft" and entry in (EXPORT, EXPORT_RECORD))


def linked_files(folder: pathlib.Path) -> list[pathlib.Path]:
    """Links in the place of a run's files. What the run writes would go to wherever they lead."""
    return [folder / name for name in (LOCK, LOG, LOG_BEFORE, *_FILES) if (folder / name).is_symlink()]


def linked_entries(folder: pathlib.Path, kind: str) -> list[pathlib.Path]:
    """Links in the place of the run's checkpoints/ and export/, and of steps in checkpoints/."""
    names = (CHECKPOINTS, EXPORT, EXPORT_RECORD) if kind == "sft" else (CHECKPOINTS,)
    checkpoints = folder / CHECKPOINTS
    steps = sorted(checkpoints.iterdir()) if checkpoints.is_dir() and not checkpoints.is_symlink() else []
    entries = [*(folder / name for name in names), *(step for step in steps if _OWN_STEP.fullmatch(step.name))]
    return [entry for entry in entries if entry.is_symlink()]


def is_own_curves(path: pathlib.Path) -> bool:
    """Whether a file is a page or a picture that `grpo report` wrote."""
    if not _is_plain_file(path) or path.stat().st_size > _LARGEST_CURVES:
        return False
    return CURVES_MARK.encode() in path.read_bytes()


def foreign_in(path: pathlib.Path) -> list[pathlib.Path]:
    """Files that no run wrote, inside a step or export/ (which `own_entries` names)."""
    if path.name == EXPORT:
        return [] if is_own_export(path.parent) else [path]
    if path.parent.name != CHECKPOINTS or (_STEP.fullmatch(path.name) and not path.name.isdecimal()):
        return []
    foreign = [entry for entry in path.iterdir() if entry.name not in _STEP_ENTRIES]
    with contextlib.suppress(ValueError):  # without hashes, a step's files are Orbax's, by their names
        files = read_json(path / HASHES).get("files")
        if isinstance(files, dict):
            below = (
                file for file in sorted(path.glob("*/**/*")) if file.is_file() and file.name != "commit_success.txt"
            )
            foreign += [file for file in below if file.relative_to(path).as_posix() not in files]
    return sorted(set(foreign))


def file_stamps(folder: pathlib.Path) -> dict[str, list[int]]:
    """[size in bytes, time of the last change in ns] of every file below a folder, by path."""
    files = [path for path in sorted(folder.rglob("*")) if not path.is_dir()]
    return {path.relative_to(folder).as_posix(): [path.lstat().st_size, path.lstat().st_mtime_ns] for path in files}


def is_own_export(folder: pathlib.Path) -> bool:
    """Whether every file in export/ is unchanged since a run wrote it."""
    with contextlib.suppress(ValueError):
        return file_stamps(folder / EXPORT).items() <= read_json(folder / EXPORT_RECORD).items()
    return False


def _is_plain_file(path: pathlib.Path) -> bool:
    return path.is_file() and not path.is_symlink()


def is_export_record(path: pathlib.Path) -> bool:
    """Whether a file is a record of an export, as `file_stamps` gives it."""
    with contextlib.suppress(ValueError):
        sizes = read_json(path).values() if _is_plain_file(path) else ()
        return bool(sizes) and all(isinstance(size, list) and list(map(type, size)) == [int, int] for size in sizes)
    return False


def _steps(folder: pathlib.Path) -> list[pathlib.Path]:
    checkpoints = folder / CHECKPOINTS
    return [entry for entry in checkpoints.iterdir() if entry.name.isdecimal()] if checkpoints.is_dir() else []


def _has_metrics(folder: pathlib.Path) -> bool:
    """Whether metrics.jsonl begins with a line of metrics."""
    with contextlib.suppress(OSError, ValueError, RecursionError):
        with (folder / METRICS).open("rb") as stream:
            line = json.loads(stream.readline(1 << 20))
        return isinstance(line, dict) and isinstance(line.get("step"), int)
    return False


def _is_as_written(folder: pathlib.Path, identity: dict[str, Any]) -> bool:
    files = identity.get(FILES_KEY)
    content = (folder / CONFIG).read_bytes()
    return isinstance(files, dict) and files.get(CONFIG) == hashlib.sha256(content).hexdigest()
