"""A branch of a run: `grpo train RUN --branch FOLDER key=value ...`.

In: a run folder, and a configuration that differs from it in keys of `rl.config.load.BRANCH_KEYS`. Out: a new folder
that holds the run's newest checkpoint, its best one, and what led to them under the new configuration, so that the run
goes on there as a resumed run does. The old run stays as it is.
"""

import contextlib
import json
import os
import pathlib
import shutil
import uuid

from rl.config.load import BRANCH_KEYS, Config, cannot_branch, dump_config
from rl.files.local_files import UNFINISHED
from rl.files.stores import is_remote
from rl.run_folder.contents import (
    CHANGED,
    CHECKPOINTS,
    CONFIG,
    EVENTS,
    IDENTITY,
    METRICS,
    RUN_KEY,
    SAMPLES,
    best_step,
    checkpoint_steps,
    is_run_folder,
    read_json,
)
from rl.run_folder.folder import checkpoint_folder, read_run
from rl.run_folder.trust import write_identity
from rl.state.checkpoint_files import damaged_files, give_to

BRANCH_KEY = "branch"  # of run.json: {of: id of the run, step: the checkpoint}


def make_branch(run: str | os.PathLike, config: Config, kind: str) -> str:
    """Makes config.output_dir a branch of a run, unless it is one already. The folder appears whole or not at all.

    Args:
      run: the run folder; code that it names may run.
      kind: "grpo" or "sft", what the command trains.

    Returns:
      What was done, in words.

    Raises:
      ValueError: `run` is no run folder with a checkpoint, or of another kind; it differs in a key that a branch cannot
        change; or the new folder holds something else.
    """
    old, identity = read_run(run)
    assert config.output_dir is not None
    target = pathlib.Path(config.output_dir)
    if is_remote(config.output_dir):
        raise ValueError(
            f"--branch must be a local folder, got {config.output_dir!r}; copy the run there when it is done"
        )
    if identity["kind"] != kind:
        raise ValueError(f"--branch needs a run of the command's own kind, {kind!r}, got one of {identity['kind']!r}")
    if changed := cannot_branch(old, config, kind):
        text = "; ".join(f"{key} was {then!r}, is {now!r}" for key, (then, now) in list(changed.items())[:5])
        raise ValueError(
            f"a branch must have the model, data and state of its run, got other values: {text}; only these keys may "
            f"change what a step computes: {', '.join(BRANCH_KEYS)}"
        )
    steps = checkpoint_steps(run)
    if not steps:
        raise ValueError(f"--branch needs a run with a checkpoint, got {str(run)!r} with none; let it reach one")
    if problems := damaged_files(checkpoint_folder(run, steps[-1])):
        raise ValueError(f"--branch needs a whole checkpoint, got {steps[-1]} of {run}: {'; '.join(problems[:3])}")
    if is_run_folder(target) and read_json(target / IDENTITY).get(BRANCH_KEY, {}).get("of") == identity.get(RUN_KEY):
        return f"{target} is a branch of {run} already, and goes on"
    if os.path.lexists(target) and (not target.is_dir() or any(target.iterdir())):
        raise ValueError(f"--branch must be a new or empty folder, got {str(target)!r}, which holds something else")
    target.parent.mkdir(parents=True, exist_ok=True)
    draft = target.with_name(f"{UNFINISHED}{target.name}-{uuid.uuid4().hex[:8]}")
    try:
        own_id = uuid.uuid4().hex
        for step in sorted({steps[-1], best_step(run) or steps[-1]} & {*steps}):
            shutil.copytree(checkpoint_folder(run, step), copy := draft / CHECKPOINTS / str(step))
            give_to(copy, own_id)
        for name in (METRICS, SAMPLES, EVENTS):  # the start drops the lines of later steps
            if (pathlib.Path(run) / name).is_file():
                shutil.copyfile(pathlib.Path(run) / name, draft / name)
        _drop_changes(draft / EVENTS)
        text = dump_config(config)
        (draft / CONFIG).write_text(text, encoding="utf-8")
        branch = {RUN_KEY: own_id, BRANCH_KEY: {"of": identity.get(RUN_KEY), "step": steps[-1]}}
        write_identity(draft, {**identity, **branch}, config, text)
        if target.is_dir():
            target.rmdir()
        os.rename(draft, target)
    except OSError as error:
        raise ValueError(f"--branch must be a folder that can be written, got {str(target)!r}: {error}") from error
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return f"{target} is a branch of {run} at step {steps[-1]}"


def _drop_changes(events: pathlib.Path) -> None:
    """Takes out of starts which keys the old run's config.yml had otherwise: the branch's config.yml has them all."""
    if not events.is_file():
        return
    lines = []
    for line in events.read_bytes().splitlines(keepends=True):
        with contextlib.suppress(ValueError):  # a line that a kill has cut stays as it is
            event = json.loads(line)
            if isinstance(event, dict) and event.pop(CHANGED, None) is not None:
                line = json.dumps(event).encode() + b"\n"
        lines.append(line)
    events.write_bytes(b"".join(lines))
