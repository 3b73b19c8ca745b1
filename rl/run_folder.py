"""The folder of one run: who owns it, and whether this configuration may go on in it.

`output_dir` holds config.yml (the resolved configuration that started the run), run.json (what kind of run, and which weights it started
from), metrics.jsonl, samples.jsonl, rewards.log and checkpoints/. A folder that holds anything else, or another run, is never touched.
"""

import fcntl
import json
import os
import pathlib
import shutil
from typing import Any

from rl.config import Config, differences, dump_config, load_config, require

FILES = ("config.yml", "run.json", "metrics.jsonl", "samples.jsonl", "rewards.log", "reward.png")
FOLDERS = ("checkpoints", "export")


class RunFolder:
    """An output folder that this process owns until `close` or its end.

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
          ValueError: the folder holds something else, another kind of run, a run with other settings or other weights, or is in use by
            another process.
        """
        self.path = pathlib.Path(require(config.output_dir, "output_dir", "runs/my_run"))
        if self.path.exists() and not self.path.is_dir():
            raise ValueError(f"output_dir must be a folder, got the file {self.path}")
        found = sorted(entry.name for entry in self.path.iterdir()) if self.path.exists() else []
        found = [name for name in found if name != ".lock"]
        ours = {"config.yml", "run.json"} <= set(found)
        if found and not ours:
            raise ValueError(f"output_dir must be empty or hold a run, got {self.path} with {found[:5]}; choose another output_dir")
        self.path.mkdir(parents=True, exist_ok=True)
        self._lock = _lock(self.path)
        if ours and config.checkpoint.overwrite:
            _clear(self.path)
            ours = False
        self.resumed = ours
        if ours:
            _check_same_run(self.path, config, kind, origin)
        else:
            _write(self.path / "config.yml", dump_config(config))
            _write(self.path / "run.json", json.dumps({"kind": kind, **origin}, indent=2) + "\n")

    def close(self) -> None:
        """Lets another process open the folder."""
        os.close(self._lock)


def read_run(path: str | os.PathLike) -> tuple[Config, dict[str, Any]]:
    """The configuration and run.json of a run folder; ValueError when there is none."""
    folder = pathlib.Path(path)
    if not (folder / "run.json").is_file() or not (folder / "config.yml").is_file():
        raise ValueError(f"{str(folder)!r} must be a run folder with config.yml and run.json, and it is not")
    return load_config(folder / "config.yml"), json.loads((folder / "run.json").read_text())


def _check_same_run(path: pathlib.Path, config: Config, kind: str, origin: dict[str, Any]) -> None:
    old_config, identity = read_run(path)
    way_out = "choose another output_dir, or pass checkpoint.overwrite=true to delete that run"
    if identity["kind"] != kind:
        raise ValueError(f"output_dir {path} holds a run of kind {identity['kind']!r}, this is {kind!r}; {way_out}")
    changed = differences(old_config, config)
    if changed:
        text = "; ".join(f"{key} was {old!r}, is {new!r}" for key, (old, new) in list(changed.items())[:5])
        raise ValueError(f"output_dir {path} holds another run: {text}; {way_out}, or restore the old values to resume it")
    for name, value in origin.items():
        if identity.get(name) != value:
            raise ValueError(
                f"the {name} of the run in {path} was {identity.get(name)}, it is now {value}; a resumed run needs the same one; {way_out}"
            )


def _lock(path: pathlib.Path) -> int:
    handle = os.open(path / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(handle)
        raise ValueError(f"output_dir {path} is in use by another process; stop that one or choose another output_dir") from error
    return handle


def _clear(path: pathlib.Path) -> None:
    for name in FILES:
        (path / name).unlink(missing_ok=True)
    for name in FOLDERS:
        shutil.rmtree(path / name, ignore_errors=True)


def _write(path: pathlib.Path, text: str) -> None:
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)
