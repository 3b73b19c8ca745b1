"""Reads data rows from a source.

In: a file, a data set of the hub, a procedural task or an object. Out: dicts with Tandem's column names. Each process
of a run reads one block of the source, and gets the other rows from the other processes. Nothing here knows about
tokens or splits. pyarrow and datasets are imported only by the sources that need them, jax only to read.
"""

import dataclasses
import difflib
import json
import os
import pathlib
import re
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any, BinaryIO

from rl.config.objects import rows_of
from rl.data.parquet_pages import check_pages
from rl.data.tasks import Row, is_procedural, procedural_rows
from rl.files.json_file import briefly, shown
from rl.files.stores import is_remote, local_copy

_SOURCE_RULE = (
    "data source must be x.jsonl, x.parquet, a folder, a hub id that this machine can reach, arithmetic or "
    "reasoning_gym:TASK"
)
# Deeper rows would cause a RecursionError later, at a depth that depends on the version of Python.
MOST_NESTED = 100
MAX_LINE_BYTES = 100_000_000  # of a row in JSON, which may take a few dozen times as much memory
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


@dataclasses.dataclass(frozen=True)
class RowSource:
    """Rows that can be read in parts.

    Attributes:
      size: of the whole, in the unit by which it is cut; `unit` is bytes or rows.
      read: (start, end) -> the rows that begin in this range.
    """

    size: int
    unit: str
    read: Callable[[int, int], list[Row]]


def load_rows(source: str, args: Mapping[str, Any], columns: Mapping[str, str | None], seed: int) -> list[Row]:
    """All rows of a source, with columns under Tandem's names, in every process of the run.

    Args:
      source: x.jsonl, x.parquet, a hub id, a folder that `datasets.load_dataset` reads, `arithmetic`,
        `reasoning_gym:TASK`, or what stands for rows that are given (`rl.config.objects`).
      args: arguments of a procedural source or of `datasets.load_dataset`. None counts as not given.
      columns: {Tandem's name: the data set's name}; None maps nothing. Other columns keep their names.
      seed: the run's seed, for procedural sources.

    Raises:
      ValueError: the source cannot be read, is empty, lacks a column, or has another size in another process.
    """
    from rl.devices import hosts

    opened = hosts.together(lambda: open_source(source, args, seed))
    hosts.check_equal({f"the number of {opened.unit} of data source {source!r}": opened.size})
    rows = _read_together(opened)
    if not rows:
        raise ValueError(f"data source {source!r} must hold at least one row, got an empty data set")
    return _map_columns(rows, columns, source)


def open_source(source: str, args: Mapping[str, Any], seed: int) -> RowSource:
    """Opens a source by its name; arguments as in `load_rows`. No row of a file is read yet."""
    args = {name: value for name, value in args.items() if value is not None}
    if (given := rows_of(source)) is not None:
        if args:
            raise ValueError(f"data.args must be empty for rows that are given as an object, got {shown(args)}")
        return RowSource(len(given), "rows", lambda start, end: given[start:end])
    if is_procedural(source):
        rows = procedural_rows(source, args, seed)
        return RowSource(len(rows), "rows", lambda start, end: rows[start:end])
    if is_remote(source):
        source = str(local_copy(source))
    if source.endswith((".jsonl", ".parquet")):
        path = pathlib.Path(source).expanduser()
        if not path.is_file():
            raise ValueError(f"data source {source!r} must be an existing file (working directory {os.getcwd()})")
        if args:
            raise ValueError(
                f"data.args must be empty for a file such as {source!r}, got {shown(args)}; "
                f"set data.args.{next(iter(args))}=null"
            )
        if source.endswith(".jsonl"):
            return RowSource(path.stat().st_size, "bytes", partial(_read_jsonl_part, path))
        return _open_parquet(path)
    return _open_data_set(source, args)


def _read_together(source: RowSource) -> list[Row]:
    """All rows of a source. Each process reads one block and sends it to the others.

    JSON would change values such as dates and bytes. Rows with such values are not sent, and each process reads the
    whole source.
    """
    from rl.devices import hosts

    own = hosts.together(lambda: source.read(*hosts.block(source.size)))
    if hosts.num_processes() == 1:
        return own
    message = _as_json(own)
    if any(hosts.gather(message is None)):
        return hosts.together(lambda: source.read(0, source.size))
    assert message is not None
    return [row for part in hosts.gather_bytes(message) for row in json.loads(part)]


def _as_json(rows: list[Row]) -> bytes | None:
    """The rows as JSON; None where JSON would change them."""
    try:
        text = json.dumps(rows)
    except (TypeError, ValueError):
        return None
    return text.encode() if repr(json.loads(text)) == repr(rows) else None


def read_jsonl(path: pathlib.Path) -> list[tuple[int, Row]]:
    """(line number from 1, row) of every line that is not blank. ValueError with the line number for a line that is no
    JSON object.
    """
    with path.open("rb") as file:
        lines = enumerate(iter(lambda: _next_line(file, path), b""), start=1)
        return [(number, _json_row(line, path, number)) for number, line in lines if line.strip()]


def _read_jsonl_part(path: pathlib.Path, start: int, end: int) -> list[Row]:
    """The rows whose lines begin at bytes from `start` to `end`."""
    rows = []
    with path.open("rb") as file:
        if start:
            file.seek(start - 1)
            while (rest := file.readline(MAX_LINE_BYTES)) and not rest.endswith(b"\n"):
                pass  # a line that crosses the border belongs to the part before
        while (place := file.tell()) < end:
            line = _next_line(file, path)
            if not line:
                break
            if line.strip():
                rows.append(_json_row(line, path, partial(_line_number, path, place)))
    return rows


def _next_line(file: BinaryIO, path: pathlib.Path) -> bytes:
    place = file.tell()
    line = file.readline(MAX_LINE_BYTES + 1)
    if len(line) > MAX_LINE_BYTES:
        raise ValueError(
            f"{path} must hold rows of at most {MAX_LINE_BYTES} bytes, got more in the line that begins at byte {place}"
        )
    return line


def _json_row(line: bytes, path: pathlib.Path, number: int | Callable[[], int]) -> Row:
    """The row in a line. `number`: the number of the line, or a function that finds it."""
    try:
        row = _JSON.decode(line.decode(json.detect_encoding(line), "surrogatepass"))  # as json.loads takes bytes
        problem = None if isinstance(row, dict) else f"{type(row).__name__}: {line[:80]!r}"
        # Brackets are counted first, because an exact check of every row would take longer than its parsing.
        if line.count(b"[") + line.count(b"{") > MOST_NESTED and (depth := _depth(row)) > MOST_NESTED:
            problem = f"{line[:80]!r}: lists and objects within each other {depth} deep, the most is {MOST_NESTED}"
    except (ValueError, RecursionError) as error:  # malformed, bytes that are not UTF-8, lists in lists in lists
        row, problem = {}, f"{line[:80]!r}: {error}"
    if problem is not None:
        number = number if isinstance(number, int) else number()
        raise ValueError(f"{path}:{number} must be one JSON object, got {problem}")
    return row


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The JSON object of these keys and values. ValueError for a key that is given twice, because one value would be
    lost.
    """
    made = dict(pairs)
    if len(made) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"key {next(name for name in names if names.count(name) > 1)!r} is given twice")
    return made


_JSON = json.JSONDecoder(object_pairs_hook=_object)


def _depth(value: object) -> int:
    """The depth of nested lists and objects; 0 for a value that is neither."""
    depth, level = 0, [value]
    while level := [inner for inner in level if isinstance(inner, list | dict)]:
        depth += 1
        level = [value for inner in level for value in (inner.values() if isinstance(inner, dict) else inner)]
    return depth


def _line_number(path: pathlib.Path, place: int) -> int:
    """The number, from 1, of the line that begins at this byte."""
    number = 1
    with path.open("rb") as file:
        while file.tell() < place:
            file.readline()
            number += 1
    return number


def list_columns(name: str, existing: Iterable[str]) -> str:
    """The end of a message about a missing column: the existing columns, and the most similar one."""
    existing = sorted(existing)
    near = difflib.get_close_matches(name, existing, n=1)
    return f"; the columns are {briefly(existing)}" + (f", did you mean {near[0]!r}?" if near else "")


def _open_parquet(path: pathlib.Path) -> RowSource:
    import pyarrow
    import pyarrow.parquet

    def read(start: int, end: int) -> list[Row]:
        """Reads the row groups of the file that hold these rows."""
        rows, first = [], 0
        try:
            with pyarrow.parquet.ParquetFile(path) as file:
                for group in range(file.num_row_groups):
                    last = first + file.metadata.row_group(group).num_rows
                    if first < end and start < last:
                        table = file.read_row_group(group)
                        rows += table.slice(max(start - first, 0), min(end, last) - max(start, first)).to_pylist()
                    first = last
        # OSError: damaged metadata; UnicodeDecodeError: text that is not UTF-8.
        except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
            raise ValueError(f"{path} must be a parquet file, got: {error}") from error
        return rows

    try:
        check_pages(path)
        with pyarrow.parquet.ParquetFile(path) as file:
            return RowSource(file.metadata.num_rows, "rows", read)
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} must be a parquet file, got: {error}") from error


def _open_data_set(source: str, args: Mapping[str, Any]) -> RowSource:
    """A hub data set, or a local folder that `datasets` understands."""
    if not pathlib.Path(source).is_dir() and not _HUB_ID.fullmatch(source):
        raise ValueError(f"{_SOURCE_RULE}, got {source!r}, which does not exist (working directory {os.getcwd()})")
    import datasets
    from datasets.exceptions import DatasetsError

    for path in sorted(pathlib.Path(source).rglob("*.parquet")):
        _open_parquet(path)  # checks its pages, because `datasets` would decompress anything
    try:
        loaded = datasets.load_dataset(source, **args)
    except (DatasetsError, OSError, TypeError, ValueError) as error:
        raise ValueError(
            f"{_SOURCE_RULE}, got {source!r} with arguments {shown(dict(args))}, which datasets.load_dataset cannot "
            "load: "
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
    return RowSource(len(loaded), "rows", lambda start, end: loaded.select(range(start, end)).to_list())


def _map_columns(rows: list[Row], columns: Mapping[str, str | None], source: str) -> list[Row]:
    """The rows with Tandem's names. Every row gets every column, None where its source has no value."""
    mapping = {name: theirs for name, theirs in columns.items() if theirs is not None}
    if "prompt" not in mapping:
        raise ValueError(
            f"data.columns must map prompt, got {dict(columns)}; set data.columns.prompt to one of "
            f"{sorted(_names(rows))}"
        )
    existing = _names(rows)
    for name, theirs in mapping.items():
        key = f"data.columns.{briefly(name)}"
        way_out = "" if name == "prompt" else f"; {key}=null does without"
        if theirs not in existing:
            if name == "prompt" and "messages" in existing:
                way_out = "; data.columns.prompt=messages takes conversations, with data.chat=true"
            raise ValueError(
                f"{key} must name a column of {source!r}, got {shown(theirs)}{list_columns(theirs, existing)}{way_out}"
            )
        for index, row in enumerate(rows):
            if row.get(theirs) is None:
                raise ValueError(
                    f"data source {source!r} row {index}: column {shown(theirs)} must have a value{way_out}"
                )
    passed_on = [name for name in existing if name not in mapping and name not in mapping.values()]
    return [
        {name: row.get(theirs) for name, theirs in mapping.items()} | {name: row.get(name) for name in passed_on}
        for row in rows
    ]


def _names(rows: Iterable[Row]) -> list[str]:
    return list(dict.fromkeys(name for row in rows for name in row))
