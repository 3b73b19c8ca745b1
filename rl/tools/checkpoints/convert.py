"""`grpo checkpoint convert`: checkpoints in other layouts become those of this version.

In: a run folder of an older version, or weights that MaxText wrote. Out: a new run folder that this version resumes, or
a Hugging Face folder that `model.source` takes. The input is not changed. What an older run lacks is filled in:

| missing or other | now |
|---|---|
| `health` in the loop record | that of a run without a skipped update |
| `epoch`, `position` in the loop record of GRPO | what the step says |
| `opt_state` of sgd: its count at `.../1/1/count` | at `.../2/count` |
| `data` in run.json | rows and hash of the data as it is now |
| `sampling.max_rows` in config.yml | `sampling.slots` |
"""

import dataclasses
import json
import pathlib
import re
import shutil
from typing import Any

import orbax.checkpoint as ocp

from rl.config.load import Config, dump_config, load_config
from rl.config.sections import prepare_keys
from rl.data.prompts import fingerprint, load_pairs, load_prompts
from rl.data.tokenizer import load_tokenizer
from rl.files.json_file import shown
from rl.models.files.folders import new_folder, set_leaf
from rl.models.files.hf import read_config, resolve_source, save_folder
from rl.models.files.maxtext import read_params, weight_names
from rl.run.health import healthy
from rl.run_folder.contents import HASHES, read_json
from rl.run_folder.folder import changed_config, checkpoint_folder, checkpoint_steps, is_run_folder, read_run
from rl.run_folder.trust import code_of, untrusted, write_identity
from rl.state.checkpoint_files import (
    StoredArray,
    damaged_files,
    item_folders,
    read_array,
    read_record,
    stored_arrays,
    write_hashes,
    write_record,
)
from rl.state.origin import tokenizer_from_config

_RECORD_KEYS = {
    "grpo": ("step", "epoch", "position", "flavour", "entropy", "health"),
    "sft": ("step", "flavour", "health"),
}


def missing_record_keys(kind: str, record: dict[str, Any]) -> list[str]:
    """The keys that the loop record lacks for a resume of a run of this kind ("grpo" or "sft")."""
    return [key for key in _RECORD_KEYS[kind] if key not in record]


def upgrade_run(run: str | pathlib.Path, out: str | pathlib.Path) -> list[str]:
    """Writes a run of an older version as one that this version resumes. Returns a line for each change.

    Raises:
      ValueError: `run` is no run folder, `out` exists, or the run lacks something that cannot be filled in.
    """
    run, out = pathlib.Path(run), pathlib.Path(out)
    for step in checkpoint_steps(run):
        _check_whole(checkpoint_folder(run, step))
    is_trusted = _is_trusted(run)
    changed = is_run_folder(run) and changed_config(run) is not None
    changes = ["config.yml: has changed since the run wrote it, and is taken as it is"] if changed else []
    with new_folder(out) as draft:
        hidden = shutil.ignore_patterns(".lock", "*.orbax-checkpoint-tmp*", "*.tmp")
        shutil.copytree(run, draft, dirs_exist_ok=True, ignore=hidden)
        changes += _upgrade_config(draft / "config.yml", out)
        config, identity = read_run(draft)
        changes += _upgrade_identity(draft, config, identity, is_trusted)
        for step in checkpoint_steps(draft):
            folder = draft / "checkpoints" / str(step)
            own = _upgrade_record(folder, config, identity["kind"]) + _upgrade_sgd(folder, config)
            if own or not (folder / HASHES).exists():
                write_hashes(folder)
            changes += [f"checkpoint {step}: {change}" for change in own]
    return changes


def convert_maxtext(
    checkpoint: str | pathlib.Path,
    out: str | pathlib.Path,
    like: str,
    dtype: str | None = None,
    rope: str | None = None,
) -> list[str]:
    """Writes weights that MaxText saved as a Hugging Face folder. Returns remarks, a line each.

    Args:
      checkpoint: the folder of an item (".../0/items"), or of its step.
      like: folder or hub id with the config.json and the tokenizer of the model.
      dtype: float32, bfloat16 or float16; None: the dtype of `like`.
      rope: see `rl.models.files.maxtext.read_params`.

    Raises:
      ValueError: the folder is no checkpoint of MaxText's, or of another model, or `out` holds something.
    """
    for folder in (pathlib.Path(checkpoint), pathlib.Path(checkpoint).absolute().parent):
        _check_whole(folder)
    items = item_folders(pathlib.Path(checkpoint))
    arrays = {array.path: array for item in items.values() for array in stored_arrays(item)}
    names = weight_names(arrays)
    if not names:
        raise ValueError(f"{checkpoint} must hold the weights of a decoder of MaxText's (decoder/...), and it does not")
    folder = resolve_source(like, what="--like")
    config = read_config(folder)
    params, left_out = read_params(config, names, lambda path: read_array(arrays[path]), rope)
    save_folder(out, config, params, load_tokenizer(folder), dtype)
    others = sorted({name.partition("/")[0] for name in left_out})
    return [f"left out {len(left_out)} arrays of {', '.join(others)}: the model is text only"] if others else []


def _check_whole(folder: pathlib.Path) -> None:
    """ValueError where files of a checkpoint differ from what was written."""
    if problems := damaged_files(folder):
        raise ValueError(
            f"checkpoint {folder} must be whole, and {problems[0]}; put back a copy, or remove that folder"
        )


def _upgrade_config(path: pathlib.Path, out: pathlib.Path) -> list[str]:
    text = path.read_text(encoding="utf-8")
    renamed = re.sub(r"(?m)^  max_rows:", "  slots:", text)
    path.write_text(renamed, encoding="utf-8")
    config = dataclasses.replace(load_config(path), output_dir=str(out))
    path.write_text(dump_config(config), encoding="utf-8")
    return ["config.yml: sampling.max_rows is sampling.slots"] if renamed != text else []


def _is_trusted(run: pathlib.Path) -> bool:
    """Whether all code that a run folder names is shown to be this user's."""
    try:
        config, _ = read_run(run)
        return untrusted(run, read_json(run / "run.json"), code_of(config)) is None
    except ValueError:  # config.yml of an older version
        return False


def _upgrade_identity(folder: pathlib.Path, config: Config, identity: dict[str, Any], is_trusted: bool) -> list[str]:
    changes = []
    if "data" not in identity:
        _check_old_data(config)
        tokenizer = tokenizer_from_config(config)
        is_grpo = identity["kind"] == "grpo"
        rows = load_prompts(config, tokenizer).train if is_grpo else load_pairs(config, tokenizer).rows
        identity = {**identity, "data": fingerprint(rows)}
        changes.append("run.json: data is what data.source gives now; that the run began with it is not known")
    # Signed only if the old signature is valid, or if there is no code to run.
    text = (folder / "config.yml").read_text(encoding="utf-8")
    write_identity(folder, identity, config, text, is_signed=is_trusted or not code_of(config))
    return changes


def _check_old_data(config: Config) -> None:
    """Refuses code that reading the rows would run. Runs that lack what the rows fill in are older than such code."""
    named = {key: function for key, function in prepare_keys(config).items() if function is not None}
    if named:
        raise ValueError(
            "config.yml of a run of a version that recorded no data must not name functions that prepare rows, which "
            f"came later, got {shown(named)}; take them out"
        )


def _upgrade_record(folder: pathlib.Path, config: Config, kind: str) -> list[str]:
    record = read_record(folder)
    if record is None:
        raise ValueError(f"{folder / 'loop'} must hold the record of the loop, and it is missing")
    missing = missing_record_keys(kind, record)
    if "health" in missing:
        record["health"] = json.loads(json.dumps(healthy()._asdict()))
    if "epoch" in missing or "position" in missing:
        _check_old_data(config)
        num_rows = len(load_prompts(config, tokenizer_from_config(config)).train)
        record["epoch"], record["position"] = divmod(record["step"] * config.grpo.prompts_per_step, num_rows)
    still = missing_record_keys(kind, record)
    if still:
        raise ValueError(f"the loop record of {folder} must have {', '.join(still)}, which cannot be filled in")
    if missing:
        write_record(folder, record)
    return [f"loop record: filled in {', '.join(missing)}"] if missing else []


def _upgrade_sgd(folder: pathlib.Path, config: Config) -> list[str]:
    if config.optimizer.name != "sgd":
        return []
    arrays = stored_arrays(folder / "state")
    moved = {array.path: _sgd_path(array.path) for array in arrays if _sgd_path(array.path) != array.path}
    if not moved:
        return []
    _rewrite(folder / "state", {_sgd_path(array.path): array for array in arrays})
    return [f"state: {'/'.join(old)} is {'/'.join(new)}" for old, new in moved.items()]


def _sgd_path(path: tuple[str, ...]) -> tuple[str, ...]:
    if path[0] == "opt_state" and path[2:] == ("1", "1", "count"):
        return (*path[:2], "2", "count")
    return path


def _rewrite(item: pathlib.Path, arrays: dict[tuple[str, ...], StoredArray]) -> None:
    """Writes the same arrays under other paths."""
    tree: dict[str, Any] = {}
    for path, array in arrays.items():
        set_leaf(tree, path, read_array(array))
    shutil.rmtree(item)
    with ocp.Checkpointer(ocp.StandardCheckpointHandler()) as checkpointer:
        checkpointer.save(item.absolute(), args=ocp.args.StandardSave(tree))
