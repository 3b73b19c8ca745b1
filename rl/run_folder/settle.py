"""Decides whether a start continues from a store or from the run's staging folder.

In: the steps of both, and the staging folder's record of the last step that both had. Out: the step to fetch, or a
ValueError that says which of the two to remove. Nothing here reads or writes a store.
"""

import json
import pathlib
import uuid
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from rl.files.local_files import file_hash, write_file
from rl.run_folder.contents import HASHES
from rl.run_folder.remote_steps import STEPS, Marker


class Record(NamedTuple):
    """The record of a staging folder.

    Attributes:
      token: identifies the folder in leases. run: the id of its run.
      step, digest: the newest step that folder and store were seen to have in common; None before the first.
      damaged: later steps of the store that were seen to be damaged.
    """

    token: str
    run: str
    step: int | None
    digest: str | None
    damaged: Sequence[int] = ()


def settle(
    url: str,
    root: pathlib.Path,
    run: str | None,
    markers: Mapping[int, Marker],
    local: Mapping[int, str],
    record: Record,
) -> tuple[str, int | None]:
    """Decides whether a start continues from the store or from the staging folder.

    Args:
      run: id of the run in the store; None: the store is empty.
      markers: the steps of the store. local: the steps of the staging folder `root`, with their digests.

    Returns:
      What is done, in words, and the step to fetch from the store. None: no step is fetched. The folder is right as it
      is; or the store holds another run without a step, and only that run's files are fetched.

    Raises:
      ValueError: both hold steps, and neither continues the other.
    """
    way_out = f"to go on from the store remove {root}; to keep what is there copy {root}/run to another output_dir"
    if run not in (None, record.run) and local:
        raise ValueError(f"{url} holds another run than its staging folder {root}; {way_out}")
    if not markers:
        if run not in (None, record.run):
            return f"{url} holds the start of a run, without a complete step; it continues in {root}/run", None
        if local and record.step is not None:
            raise ValueError(
                f"{url} no longer holds the run whose step {record.step} was uploaded to it from {root}; to start "
                f"afresh remove {root}, to keep that run copy {root}/run to another output_dir"
            )
        return f"{url} holds no step; the run is written to {root}/run and uploaded from there", None
    newest = max(markers)
    if not local:
        return f"fetched step {newest} of {url} to {root}/run", newest
    for step in sorted(local.keys() & markers.keys()):
        if local[step] != markers[step].digest:
            raise ValueError(f"step {step} of {url} is another than in its staging folder {root}; {way_out}")
    if newest in local and max(local) == newest:
        return f"step {newest} of {url} is in {root}/run already", None
    if newest > max(local):
        return f"fetched step {newest} of {url} to {root}/run, which had step {max(local)}", newest
    if newest in local or (record.step, record.digest) == (newest, markers[newest].digest):
        return f"step {max(local)} of {root}/run is newer than step {newest} of {url} and is uploaded now", None
    raise ValueError(
        f"step {max(local)} of the staging folder {root} does not go on from step {newest} of {url}, which another "
        f"machine wrote; {way_out}"
    )


def local_steps(run: pathlib.Path) -> dict[int, str]:
    """The complete steps of a run folder, with their digests."""
    folder = run / STEPS
    entries = folder.iterdir() if folder.is_dir() else []
    return {
        int(entry.name): file_hash(entry / HASHES)
        for entry in entries
        if entry.name.isdecimal() and (entry / HASHES).is_file()
    }


def read_record(root: pathlib.Path) -> Record:
    """The record of a staging folder; a new one where there is none. ValueError where the file is no record."""
    path = root / "record.json"
    try:
        return Record(**json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        record = Record(uuid.uuid4().hex, uuid.uuid4().hex, None, None)
        write_record(root, record)
        return record
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path} must be the record of a staging folder, got: {error}; remove {root}") from error


def write_record(root: pathlib.Path, record: Record) -> None:
    """Replaces the record of a staging folder."""
    write_file(root / "record.json", f"{json.dumps(record._asdict())}\n".encode())
