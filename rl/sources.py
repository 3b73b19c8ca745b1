"""Rows from a source: a file, a data set of the hub, or a procedural task in; dicts under Tandem's column names out.

Nothing here knows about tokens or splits. pyarrow and datasets are imported only by the sources that need them.
"""

import difflib
import json
import os
import pathlib
import re
from collections.abc import Iterable, Mapping
from typing import Any

from rl.tasks import Row, is_procedural, procedural_rows

_SOURCE_RULE = (
    "data source must be x.jsonl, x.parquet, a folder, a hub id that this machine can reach, arithmetic or "
    "reasoning_gym:TASK"
)
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


def load_rows(source: str, args: Mapping[str, Any], columns: Mapping[str, str | None], seed: int) -> list[Row]:
    """The rows of a source, with columns under Tandem's names.

    Args:
      source: x.jsonl, x.parquet, a hub id, a folder that `datasets.load_dataset` reads, `arithmetic` or
        `reasoning_gym:TASK`.
      args: arguments of a procedural source or of `datasets.load_dataset`; a value of None counts as not given.
      columns: Tandem's name -> the data set's name; None maps nothing. Columns not named here keep their own names.
      seed: the run's seed, for procedural sources.

    Raises:
      ValueError: the source cannot be read, is empty, or lacks a column.
    """
    args = {name: value for name, value in args.items() if value is not None}
    if is_procedural(source):
        rows = procedural_rows(source, args, seed)
    elif source.endswith((".jsonl", ".parquet")):
        if args:
            raise ValueError(
                f"data.args must be empty for a file such as {source!r}, got {args}; "
                f"set data.args.{next(iter(args))}=null"
            )
        path = pathlib.Path(source).expanduser()
        if not path.is_file():
            raise ValueError(f"data source {source!r} must be an existing file (working directory {os.getcwd()})")
        is_jsonl = source.endswith(".jsonl")
        rows = [row for _, row in read_jsonl(path)] if is_jsonl else _read_parquet(path)
    else:
        rows = _read_data_set(source, args)
    if not rows:
        raise ValueError(f"data source {source!r} must hold at least one row, got an empty data set")
    return _map_columns(rows, columns, source)


def read_jsonl(path: pathlib.Path) -> list[tuple[int, Row]]:
    """(line number from 1, row) of every line that is not blank; ValueError, with the number, for no JSON object."""
    rows = []
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as error:  # malformed JSON, or bytes that are not UTF-8
                raise ValueError(f"{path}:{number} must be one JSON object, got {line[:80]!r}: {error}") from error
            if not isinstance(row, dict):
                raise ValueError(f"{path}:{number} must be one JSON object, got {type(row).__name__}: {line[:80]!r}")
            rows.append((number, row))
    return rows


def list_columns(name: str, existing: Iterable[str]) -> str:
    """The end of a message about a column that is not there: the columns that are, and the nearest."""
    existing = sorted(existing)
    near = difflib.get_close_matches(name, existing, n=1)
    return f"; the columns are {existing}" + (f", did you mean {near[0]!r}?" if near else "")


def _read_parquet(path: pathlib.Path) -> list[Row]:
    import pyarrow
    import pyarrow.parquet

    try:
        return pyarrow.parquet.read_table(path).to_pylist()
    except pyarrow.ArrowException as error:
        raise ValueError(f"{path} must be a parquet file, got: {error}") from error


def _read_data_set(source: str, args: Mapping[str, Any]) -> list[Row]:
    """Rows of a hub data set, or of a local folder that `datasets` understands."""
    if not pathlib.Path(source).is_dir() and not _HUB_ID.fullmatch(source):
        raise ValueError(f"{_SOURCE_RULE}, got {source!r}, which does not exist (working directory {os.getcwd()})")
    import datasets
    from datasets.exceptions import DatasetsError

    try:
        loaded = datasets.load_dataset(source, **args)
    except (DatasetsError, OSError, TypeError, ValueError) as error:
        raise ValueError(
            f"{_SOURCE_RULE}, got {source!r} with arguments {dict(args)}, which datasets.load_dataset cannot load: "
            f"{type(error).__name__}: {error}"
        ) from error
    if isinstance(loaded, datasets.DatasetDict):
        raise ValueError(
            f"data.args.split must name one split of {source!r}, got none; there are {sorted(map(str, loaded))}"
        )
    if not isinstance(loaded, datasets.Dataset):
        raise ValueError(
            f"data.args must load {source!r} as a whole, got {type(loaded).__name__}; set data.args.streaming=null"
        )
    return loaded.to_list()


def _map_columns(rows: list[Row], columns: Mapping[str, str | None], source: str) -> list[Row]:
    """Rows under Tandem's names; every row gets every column, None where its source has none."""
    mapping = {name: theirs for name, theirs in columns.items() if theirs is not None}
    if "prompt" not in mapping:
        raise ValueError(
            f"data.columns must map prompt, got {dict(columns)}; set data.columns.prompt to one of "
            f"{sorted(_names(rows))}"
        )
    existing = _names(rows)
    for name, theirs in mapping.items():
        way_out = "" if name == "prompt" else f"; data.columns.{name}=null does without"
        if theirs not in existing:
            raise ValueError(
                f"data.columns.{name} must name a column of {source!r}, "
                f"got {theirs!r}{list_columns(theirs, existing)}{way_out}"
            )
        for index, row in enumerate(rows):
            if row.get(theirs) is None:
                raise ValueError(f"data source {source!r} row {index}: column {theirs!r} must have a value{way_out}")
    passed_on = [name for name in existing if name not in mapping and name not in mapping.values()]
    return [
        {name: row.get(theirs) for name, theirs in mapping.items()} | {name: row.get(name) for name in passed_on}
        for row in rows
    ]


def _names(rows: Iterable[Row]) -> list[str]:
    return list(dict.fromkeys(name for row in rows for name in row))
