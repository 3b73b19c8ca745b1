"""`grpo checkpoint inspect | verify | convert | bench`: what is in a checkpoint, whether it is whole, and how fast.

In: a run folder, or any folder that Orbax wrote. Out: text. Reading files is `rl.state.checkpoint_files`, other layouts
are `rl.tools.checkpoints.convert`, measuring is `rl.tools.checkpoints.checkpoint_bench`.
"""

import argparse
import contextlib
import dataclasses
import datetime
import hashlib
import json
import os
import pathlib
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from rl.errors import missing
from rl.files.output_file import check_writable
from rl.files.stores import check_path
from rl.models.files.folders import write_json
from rl.models.files.maxtext import ROPES, layout_of
from rl.run_folder.contents import Step, chosen_step
from rl.run_folder.folder import changed_config, check_code, checkpoint_steps, is_run_folder, read_run
from rl.run_folder.remote_steps import local_source
from rl.run_folder.trust import MODEL
from rl.state.checkpoint import ADAPTER, create_checkpoint_manager
from rl.state.checkpoint_files import (
    DamagedArrayError,
    StoredArray,
    array_hash,
    damaged_files,
    item_folders,
    read_array,
    read_record,
    read_step_metadata,
    stored_arrays,
)
from rl.state.origin import find_origin, tokenizer_from_config
from rl.tools.checkpoints.checkpoint_bench import bench, report, to_json
from rl.tools.checkpoints.convert import convert_maxtext, missing_record_keys, upgrade_run
from rl.tools.step_option import step_option
from rl.tools.trained import training_setup

_MAX_NAMED = 5  # arrays named for one problem


_RULE = "a run folder, or a folder that Orbax wrote"


class Found(NamedTuple):
    """A checkpoint: its folder and, if it belongs to a run, the run and the step."""

    folder: pathlib.Path
    run: pathlib.Path | None
    step: int | None


class Verification(NamedTuple):
    """The findings of a verification.

    Attributes:
      hashes: {name: content hash} of the arrays that could be read.
      notes: what was not checked, in words. problems: what is wrong.
    """

    hashes: dict[str, str]
    notes: list[str]
    problems: list[str]


def find(path: str | pathlib.Path, step: Step | None = None) -> Found:
    """The checkpoint of a run folder (at `step`; None: the newest), or in its own folder.

    Raises:
      ValueError: there is no checkpoint.
    """
    path = local_source(path, step)
    if is_run_folder(path):
        steps, step = checkpoint_steps(path), chosen_step(path, step)
        wanted = steps[-1] if step is None and steps else step
        if wanted not in steps:
            if step is None:
                raise ValueError(
                    f"run folder {str(path)!r} must hold a checkpoint, and it has none; let it reach checkpoint.every"
                )
            raise ValueError(f"--step must be one of the checkpoints of {str(path)!r}, {steps}, got {step}")
        return Found(path / "checkpoints" / str(wanted), path, wanted)
    if step is not None:
        raise ValueError(f"--step needs a run folder, got {str(path)!r}")
    if not path.exists():
        raise missing("CHECKPOINT", _RULE, path)
    if not path.is_dir():
        raise ValueError(f"CHECKPOINT must be {_RULE}, got {str(path)!r}, a file")
    run = path.absolute().parent.parent
    if path.absolute().parent.name == "checkpoints" and path.name.isdecimal() and is_run_folder(run):
        return Found(path, run, int(path.name))
    return Found(path, None, None)


def inspect(found: Found) -> list[str]:
    """The content of a checkpoint as lines of text. Reads no array.

    Raises:
      ValueError: the folder is no checkpoint, or its metadata cannot be read.
    """
    arrays: dict[str, StoredArray] = {}
    for item, folder in item_folders(found.folder).items():
        arrays |= {_name(item, array.path): array for array in stored_arrays(folder)}
    record, notes = read_record(found.folder) or {}, read_step_metadata(found.folder)
    rows: dict[str, Any] = {"checkpoint": found.folder, "step": found.step, "written by": record.get("flavour")}
    rows["layout"] = layout_of(array.path for array in arrays.values())
    if nanoseconds := notes.get("commit_timestamp_nsecs"):
        rows["written at"] = datetime.datetime.fromtimestamp(nanoseconds / 1e9, datetime.UTC).isoformat(" ", "seconds")
    if found.run is not None:
        config, identity = read_run(found.run)
        rows["run"] = f"{found.run}, {identity['kind']}, optimizer {config.optimizer.name}"
        rows["policy"] = json.dumps(identity["policy"])
    if record.get(ADAPTER):
        rows["adapter"] = json.dumps(record[ADAPTER])
    if record:
        rows["loop"] = json.dumps({key: value for key, value in record.items() if key != ADAPTER})
    lines = [f"{name:<12}{value}" for name, value in rows.items() if value is not None]
    width = max(map(len, arrays), default=0)
    for name, array in arrays.items():
        shape = "[" + ", ".join(map(str, array.shape)) + "]"
        lines.append(f"  {name:<{width}}  {array.dtype.name:<10}{shape:<22}{array.num_bytes:>16,} bytes")
    for part, members in _by_part(arrays).items():
        count = sum(int(np.prod(array.shape, dtype=np.int64)) for array in members)
        size = sum(array.num_bytes for array in members)
        lines.append(f"{part:<20}{len(members):>6} arrays{count:>18,} numbers{size:>20,} bytes")
    return lines


def verify(found: Found, trust: bool = False) -> Verification:
    """Compares a checkpoint's files with their hashes, reads every array, and compares the arrays with the run's
    configuration.

    The last comparison is left out where it needs code that `rl.run_folder.folder.check_code` refuses.

    Raises:
      ValueError: the folder is no checkpoint.
    """
    notes, problems, hashes = [], [], {}
    damaged = damaged_files(found.folder)
    if damaged is None:
        notes.append("the files have no hashes.json: a changed byte that still decodes to a number is not noticed")
    problems += damaged or []
    unreadable: dict[str, list[str]] = {}
    not_finite = []
    for item, folder in item_folders(found.folder).items():
        broken: list[DamagedArrayError] = []
        for array in stored_arrays(folder, broken):
            name = _name(item, array.path)
            try:
                value = read_array(array)
            except DamagedArrayError as error:
                broken.append(error)
                continue
            hashes[name] = array_hash(value)
            if jnp.issubdtype(value.dtype, jnp.floating) and not np.isfinite(value).all():
                not_finite.append(f"{name} ({int((~np.isfinite(value)).sum())} of {value.size})")
        for error in broken:
            unreadable.setdefault(error.where, []).append(_name(item, error.path))
    problems += [f"{where}: cannot be read: {_some(names)}" for where, names in unreadable.items()]
    if not_finite:
        problems.append(f"numbers that are not finite in {_some(not_finite)}")
    if found.run is None:
        notes.append("not part of a run folder: not compared with a configuration")
    elif unreadable:
        notes.append("not compared with the run's configuration, because of the damage")
    else:
        if (change := changed_config(found.run)) is not None and not trust:
            problems.append(change)
        try:
            check_code(found.run, read_run(found.run)[0], (), (MODEL,), trust)
        except ValueError as error:
            notes.append(f"not compared with the run's configuration: {error}")
        else:
            problems += _misfits(found)
    return Verification(hashes, notes, problems)


def compare_hashes(hashes: dict[str, str], against: dict[str, str]) -> list[str]:
    """The differences between content hashes and earlier ones, in words; empty where there are none."""
    groups = {
        "missing": sorted(against.keys() - hashes.keys()),
        "not there before": sorted(hashes.keys() - against.keys()),
        "other numbers": sorted(name for name in hashes.keys() & against.keys() if hashes[name] != against[name]),
    }
    return [f"{problem}: {_some(names)}" for problem, names in groups.items() if names]


def _name(item: str, path: tuple[str, ...]) -> str:
    """The name of an array in a checkpoint, with the name of its item first, if there is one."""
    return "/".join(filter(None, (item, *path)))


def _by_part(arrays: dict[str, StoredArray]) -> dict[str, list[StoredArray]]:
    parts: dict[str, list[StoredArray]] = {}
    for name, array in arrays.items():
        item = name.removesuffix("/".join(array.path)).rstrip("/")
        parts.setdefault("/".join(filter(None, (item, array.path[0]))), []).append(array)
    return {**parts, "all": list(arrays.values())}


def _misfits(found: Found) -> list[str]:
    """What keeps the run from resuming: arrays, adapter settings and keys of the loop record."""
    assert found.run is not None
    config, identity = read_run(found.run)
    problems = []
    record = read_record(found.folder)
    if record is None:
        return [f"{found.folder / 'loop'} is missing"]
    if missing := missing_record_keys(identity["kind"], record):
        problems.append(
            f"the loop record lacks {', '.join(missing)}: written by an older version; "
            "`grpo checkpoint convert RUN OUT` fills it in"
        )
    origin = find_origin(config, tokenizer_from_config(config))
    mesh, init_state_fn = training_setup(config, origin)
    config = dataclasses.replace(config, output_dir=str(found.run))
    checkpoints = create_checkpoint_manager(config, mesh, init_state_fn, read_only=True)
    checks = [checkpoints.check, *([checkpoints.check_reference] if config.reference.sync_every else [])]
    with contextlib.closing(checkpoints):
        for check in checks:
            try:
                check(found.step)
            except ValueError as error:
                problems.append(str(error))
    return problems


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - _MAX_NAMED} more" if len(names) > _MAX_NAMED else ""
    return ", ".join(names[:_MAX_NAMED]) + more


def _inspect_command(arguments: argparse.Namespace) -> int:
    print("\n".join(inspect(find(arguments.checkpoint, arguments.step))))
    return 0


def _verify_command(arguments: argparse.Namespace) -> int:
    check_writable(arguments.write, "--write")
    for name, value in (("--write", arguments.write), ("--against", arguments.against)):
        check_path(value, name, may_be_remote=False)
    against = None if arguments.against is None else _read_hashes(arguments.against)
    found = find(arguments.checkpoint, arguments.step)
    hashes, notes, problems = verify(found, arguments.trust)
    for name, value in hashes.items():
        print(f"{value}  {name}")
    if against is not None:
        problems += [f"compared with {arguments.against}: {text}" for text in compare_hashes(hashes, against)]
    if arguments.write is not None:
        write_json(pathlib.Path(arguments.write), hashes)
    total = hashlib.sha256("".join(f"{value} {name}\n" for name, value in hashes.items()).encode()).hexdigest()
    print(f"{total}  {found.folder}, {len(hashes)} arrays")
    for note in notes:
        print(f"note: {note}")
    for problem in problems:
        print(f"problem: {problem}", file=sys.stderr)
    print("damaged or unusable" if problems else "whole")
    return 1 if problems else 0


def _read_hashes(path: str) -> dict[str, str]:
    """{name: content hash} from a file that --write wrote."""
    rule = f"--against must be a file that `grpo checkpoint verify --write` wrote, got {path!r}"
    try:
        hashes = json.loads(pathlib.Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{rule}: {error}") from error
    if not isinstance(hashes, dict) or not all(isinstance(value, str) for value in hashes.values()):
        raise ValueError(f"{rule}: it holds no object with a hash for each name")
    return hashes


def _convert_command(arguments: argparse.Namespace) -> int:
    source, out = arguments.checkpoint, arguments.out
    check_path(source, "the checkpoint to convert", may_be_remote=False)
    check_path(out, "OUT", may_be_remote=False)
    if not os.path.lexists(source):
        raise missing("CHECKPOINT", _RULE, source)
    if is_run_folder(source):
        given = [name for name in ("like", "dtype", "rope") if getattr(arguments, name) is not None]
        if given:
            raise ValueError(f"--{given[0]} must be left out for a run folder, which has a configuration of its own")
        lines = upgrade_run(source, out) or ["nothing was missing"]
    else:
        if arguments.like is None:
            raise ValueError("--like MODEL must give the config.json and the tokenizer of a MaxText checkpoint's model")
        lines = convert_maxtext(source, out, arguments.like, arguments.dtype, arguments.rope)
    print("\n".join([*lines, f"converted {source} to {out}"]))
    return 0


def _bench_command(arguments: argparse.Namespace) -> int:
    check_writable(arguments.json, "--json")
    check_path(arguments.source, "what is timed", may_be_remote=False)
    check_path(arguments.json, "--json", may_be_remote=False)
    result = bench(arguments.source, arguments.steps, tuple(arguments.overrides), arguments.trust)
    print("\n".join(report(result)))
    if arguments.json is not None:
        write_json(pathlib.Path(arguments.json), to_json(result))
    return 0


def _parser(name: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=f"grpo checkpoint {name}")
    if name in ("inspect", "verify"):
        parser.add_argument("checkpoint", help="run folder, or a folder that Orbax wrote")
        parser.add_argument(
            "--step", type=step_option, default=None, help="checkpoint of a run, or best; the newest when left out"
        )
    if name == "verify":
        parser.add_argument("--write", default=None, help="JSON file for the content hashes")
        parser.add_argument("--against", default=None, help="JSON file of content hashes to compare with")
    if name in ("verify", "bench"):
        parser.add_argument(
            "--trust", action="store_true", help="take config.yml of a run folder, and code that it names, as they are"
        )
    if name == "convert":
        parser.add_argument("checkpoint", help="run folder, or folder of a MaxText checkpoint")
        parser.add_argument("out", help="folder to write")
        parser.add_argument("--like", default=None, help="folder or hub id with config.json and tokenizer of the model")
        parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default=None)
        parser.add_argument("--rope", choices=ROPES, default=None)
    if name == "bench":
        parser.add_argument("source", help="run folder, or YAML recipe")
        parser.add_argument("--steps", type=int, default=3, help="how often to save and restore")
        parser.add_argument("--json", default=None, metavar="FILE", help="write the seconds and GB/s of every phase")
        parser.add_argument("overrides", nargs="*", metavar="key=value", help="overrides with dotted keys")
    return parser


_COMMANDS = {
    "inspect": _inspect_command,
    "verify": _verify_command,
    "convert": _convert_command,
    "bench": _bench_command,
}


def main(argv: Sequence[str] | None = None) -> int:
    """`grpo checkpoint inspect | verify | convert | bench ...`; the exit status."""
    name, *rest = (sys.argv[1:] if argv is None else list(argv)) or [""]
    if name not in _COMMANDS:
        raise ValueError(f"grpo checkpoint needs one of {', '.join(_COMMANDS)}, got {name!r}")
    # Intermixed: options may stand before overrides.
    return _COMMANDS[name](_parser(name).parse_intermixed_args(rest))


if __name__ == "__main__":
    sys.exit(main())
