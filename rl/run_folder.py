"""The folder of one run: who owns it, and whether this configuration may go on in it.
 `output_dir` holds config.yml (the resolved configuration that started the run), run.json (what kind of run, and which
weights it started from), metrics.jsonl, samples.jsonl, rewards.log and checkpoints/. A folder that holds anything else,
or another run, is never touched; a run that recorded nothing, because its start failed or was killed, is no run.
"""

import fcntl
import json
import os
import pathlib
import shutil
from typing import Any

from rl import hosts
from rl.config import Config, differences, dump_config, load_config, require

_CONFIG, _IDENTITY, _METRICS, _CHECKPOINTS = "config.yml", "run.json", "metrics.jsonl", "checkpoints"
_LOCK, _LOG = ".lock", "rewards.log"
FILES = ("samples.jsonl", "reward.png", _METRICS, _CONFIG, _IDENTITY)
FOLDERS = (_CHECKPOINTS, "export")


class RunFolder:
    """An output folder that this run owns until `close` or its end.

    Opening it changes nothing that it holds; `begin` does, and comes after everything that can be checked before. Of a
    run's processes the first one does all this, and the others wait for it.

    Attributes:
      path: the folder.
      resumed: whether it already held this run.
    """

    def __init__(self, config: Config, kind: str, origin: dict[str, Any]):
        """Opens or creates `config.output_dir`.

        Args:
          kind: "grpo" or "sft".
          origin: JSON-able identity of what the run starts from: the policy's and the reference's source and hash.

        Raises:
          ValueError: the folder cannot be written, holds something else, another kind of run, a run with other settings
            or other weights, or is in use by another process.
        """
        self.path = pathlib.Path(require(config.output_dir, "output_dir", "runs/my_run"))
        self._config, self._identity = config, {"kind": kind, **origin}
        self.resumed = hosts.from_first(self._open)
        if not (self.path / _LOCK).exists():
            raise ValueError(
                f"output_dir must be on a disk that all processes of the run share, got {self.path}, which process 0 "
                "has opened and this one cannot see"
            )

    def _open(self) -> bool:
        """Takes the folder; whether it holds this run."""
        if self.path.exists() and not self.path.is_dir():
            raise ValueError(f"output_dir must be a folder, got the file {self.path}")
        self._is_new = not self.path.exists()
        found = set() if self._is_new else {entry.name for entry in self.path.iterdir()}
        # Before its first line a run may be killed: a folder with only a lock and a log is as good as empty.
        if found - {_LOCK, _LOG, _temporary(_IDENTITY)} and _IDENTITY not in found:
            raise ValueError(
                f"output_dir must be empty or hold a run, got {self.path} with {sorted(found)[:5]}; "
                "choose another output_dir"
            )
        self._lock = _lock(self.path)
        try:
            resumed = _has_work(self.path) and not self._config.checkpoint.overwrite
            if resumed:
                _check_same_run(self.path, self._config, self._identity)
        except ValueError:
            os.close(self._lock)
            raise
        return resumed

    def begin(self) -> None:
        """Makes the folder this run's: as it is when it is resumed, else without what an earlier run left in it."""
        hosts.from_first(self._begin)

    def _begin(self) -> None:
        if self.resumed:
            return
        _clear(self.path)
        # The identity first: a folder that has it is ours, whatever a kill left out.
        _write(self.path / _IDENTITY, json.dumps(self._identity, indent=2) + "\n")
        _write(self.path / _CONFIG, dump_config(self._config))

    def close(self) -> None:
        """Lets another run open the folder. A run that recorded nothing leaves nothing behind."""
        if not hosts.is_first():
            return
        if not _has_work(self.path):
            _clear(self.path)
            for name in (_LOG, _LOCK):
                (self.path / name).unlink(missing_ok=True)
            if self._is_new and not any(self.path.iterdir()):
                self.path.rmdir()
        os.close(self._lock)


def read_run(path: str | os.PathLike) -> tuple[Config, dict[str, Any]]:
    """The configuration and run.json of a run folder; ValueError when there is none."""
    folder = pathlib.Path(path)
    if not is_run_folder(folder):
        raise ValueError(f"{str(folder)!r} must be a run folder with {_CONFIG} and {_IDENTITY}, and it is not")
    return load_config(folder / _CONFIG), json.loads((folder / _IDENTITY).read_text())


def is_run_folder(path: str | os.PathLike) -> bool:
    """Whether the folder holds a run's identity and configuration."""
    folder = pathlib.Path(path)
    return (folder / _IDENTITY).is_file() and (folder / _CONFIG).is_file()


def checkpoint_folder(path: str | os.PathLike, step: int) -> pathlib.Path:
    """Where a run folder has the checkpoint of this step."""
    return pathlib.Path(path) / _CHECKPOINTS / str(step)


def checkpoint_steps(path: str | os.PathLike) -> list[int]:
    """Steps of the complete checkpoints of a run folder, rising."""
    folder = pathlib.Path(path) / _CHECKPOINTS
    return sorted(int(entry.name) for entry in folder.iterdir() if entry.name.isdecimal()) if folder.is_dir() else []


def _has_work(path: pathlib.Path) -> bool:
    """Whether a run has recorded anything here: a line of metrics, or a checkpoint."""
    metrics = path / _METRICS
    return (metrics.is_file() and metrics.stat().st_size > 0) or bool(checkpoint_steps(path))


def _check_same_run(path: pathlib.Path, config: Config, identity: dict[str, Any]) -> None:
    old_config, old_identity = read_run(path)
    way_out = "choose another output_dir, or pass checkpoint.overwrite=true to delete that run"
    if old_identity["kind"] != identity["kind"]:
        raise ValueError(
            f"output_dir {path} holds a run of kind {old_identity['kind']!r}, this is {identity['kind']!r}; {way_out}"
        )
    changed = differences(old_config, config)
    if changed:
        text = "; ".join(f"{key} was {old!r}, is {new!r}" for key, (old, new) in list(changed.items())[:5])
        raise ValueError(
            f"output_dir {path} holds another run: {text}; {way_out}, or restore the old values to resume it"
        )
    for name, value in identity.items():
        if old_identity.get(name) != value:
            raise ValueError(
                f"the {name} of the run in {path} was {old_identity.get(name)}, it is now {value}; "
                f"a resumed run needs the same one; {way_out}"
            )


def _lock(path: pathlib.Path) -> int:
    """Creates the folder and takes its lock, which the process's end gives back, however it comes."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        handle = os.open(path / _LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise ValueError(
            f"output_dir must be a folder that can be written, got {path}: {error}; choose another output_dir"
        ) from error
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(handle)
        raise ValueError(
            f"output_dir {path} is in use by another process; stop that one or choose another output_dir"
        ) from error
    return handle


def _clear(path: pathlib.Path) -> None:
    """Deletes what a run writes, except for the log, which reward workers may hold open. The identity goes last."""
    for name in FOLDERS:
        temporary = path / _temporary(name)
        if temporary.exists():  # of a kill in the lines below
            shutil.rmtree(temporary)
        if (path / name).exists():
            # Renamed first: a kill must not leave half a checkpoint under its own name.
            os.rename(path / name, temporary)
            shutil.rmtree(temporary)
    for name in FILES:
        (path / name).unlink(missing_ok=True)


def _write(path: pathlib.Path, text: str) -> None:
    temporary = path.with_name(_temporary(path.name))
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def _temporary(name: str) -> str:
    return name + ".tmp"
