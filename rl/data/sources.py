"""Reads data rows from a source.

In: files, a data set of the hub, a procedural task or an object. Out: dicts with Tandem's column names. Each process
of a run reads one block of a file, and gets the other rows from the other processes. Nothing here knows about tokens or
splits. pyarrow and datasets are imported only by the sources that need them, jax only to read.
"""

import bisect
import dataclasses
import difflib
import glob
import json
import os
import pathlib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, BinaryIO

from rl.config.objects import rows_of
from rl.data.parquet_pages import check_pages
from rl.data.prepare import prepare_rows
from rl.data.table_files import (
    CSV_ARGS,
    MOST_NESTED,
    check_start,
    delimiter_hint,
    depth_of,
    read_csv,
    read_json,
    slice_range,
    split_slice,
)
from rl.data.tasks import Row, is_procedural, procedural_rows
from rl.errors import missing
from rl.files.json_file import briefly, shown
from rl.files.stores import is_remote, local_copy

_SOURCES = (
    "x.jsonl, .json, .csv, .tsv, .parquet, .arrow or .txt, a folder, a hub id that this machine can reach, arithmetic "
    "or reasoning_gym:TASK"
)
_SOURCE_RULE = f"data source must be {_SOURCES}"
# The arguments that files take, by their endings. `datasets` checks those of the last two.
_FILE_ARGS: dict[str, tuple[str, ...] | None] = {
    ".jsonl": (),
    ".parquet": (),
    ".json": ("field",),
    ".csv": CSV_ARGS,
    ".tsv": CSV_ARGS,
    ".arrow": None,
    ".txt": None,
}
_BUILDERS = {".arrow": "arrow", ".txt": "text"}  # of `datasets`
MAX_LINE_BYTES = 100_000_000  # of a row in JSON, which may take a few dozen times as much memory
# Endings of files that are not read, which no data set of the hub has in its name.
_OTHER_FILES = (
    ".gz",
    ".bz2",
    ".xz",
    ".zst",
    ".zip",
    ".tar",
    ".xlsx",
    ".xls",
    ".pkl",
    ".npz",
    ".ndjson",
    ".yml",
    ".yaml",
)
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


@dataclasses.dataclass(frozen=True)
class RowSource:
    """Rows that can be read in parts.

    Attributes:
      name: of the file or data set, for messages.
      size: of the whole, in the unit by which it is cut; `unit` is bytes or rows.
      read: (start, end) -> the rows that begin in this range.
      first: the number in the file of the first row, where the source is a slice.
      files: those that hold the rows, where it is known.
    """

    name: str
    size: int
    unit: str
    read: Callable[[int, int], list[Row]]
    first: int = 0
    files: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class SourceRows:
    """Rows of one or several files under Tandem's column names.

    Attributes:
      rows: in the order of the files.
      starts: the number of each file's first row, among all that were read. names: of the files. firsts: see
        `RowSource.first`.
      origins: for each of `rows` its number among all that were read; None: nothing was left out or made.
      num_empty: rows that were left out because they had no answer.
    """

    rows: list[Row]
    starts: list[int]
    names: list[str]
    firsts: list[int]
    origins: list[int] | None = None
    num_empty: int = 0

    def kept(self, indices: Sequence[int], rows: list[Row] | None = None) -> "SourceRows":
        """Some of the rows by their numbers; `rows`: what was made of them."""
        origins = list(indices) if self.origins is None else [self.origins[index] for index in indices]
        rows = [self.rows[index] for index in indices] if rows is None else rows
        return dataclasses.replace(self, rows=rows, origins=origins)

    def where(self, index: int) -> str:
        """The file of row `index`, and the row's number in that file, from 0."""
        index = index if self.origins is None else self.origins[index]
        part = bisect.bisect_right(self.starts, index) - 1
        return f"{self.names[part]!r} row {index - self.starts[part] + self.firsts[part]}"


def load_rows(source: str, args: Mapping[str, Any], columns: Mapping[str, str | None], seed: int) -> list[Row]:
    """The rows of `read_rows`."""
    return read_rows(source, args, columns, seed).rows


def read_rows(
    source: str,
    args: Mapping[str, Any],
    columns: Mapping[str, str | None],
    seed: int,
    prepare: str | None = None,
    remove_empty: bool = False,
) -> SourceRows:
    """All rows of a source, with columns under Tandem's names, in every process of the run.

    Args:
      source: a file (x.jsonl, .json, .csv, .tsv, .parquet, .arrow, .txt) or a pattern of files (data/*.jsonl), a hub
        id, a folder that `datasets` reads, `arithmetic`, `reasoning_gym:TASK`, or what stands for rows that are given
        (`rl.config.objects`). Any of them may end with a slice in the notation of `datasets`, such as [:10%].
      args: arguments of a procedural source, of a file's reader or of `datasets.load_dataset`; None: not given.
      columns: {Tandem's name: the data set's name}; None maps nothing. Other columns keep their names.
      seed: the run's seed, for procedural sources.
      prepare: `path/to/file.py:function`, see `rl.data.prepare`; it gets the data set's own columns.
      remove_empty: leave out rows whose `answer` is missing or blank, and count them.

    Raises:
      ValueError: the source cannot be read, is empty, lacks a column, has another size in another process, or `prepare`
        fails.
    """
    from rl.devices import hosts

    opened = hosts.together(lambda: open_sources(source, args, seed))
    sizes = {f"the number of {part.unit} of data source {part.name!r}": part.size for part in opened}
    hosts.check_equal({f"the number of files of data source {source!r}": len(opened)} if len(opened) > 1 else {})
    hosts.check_equal(sizes)
    rows: list[Row] = []
    starts = []
    for part in opened:
        starts.append(len(rows))
        rows += read_together(part)
    if not rows:
        raise ValueError(f"data source {source!r} must hold at least one row, got an empty data set")
    read = SourceRows(rows, starts, [part.name for part in opened], [part.first for part in opened])
    return shape_rows(read, source, columns, prepare, remove_empty)


def shape_rows(
    read: SourceRows,
    source: str,
    columns: Mapping[str, str | None],
    prepare: str | None = None,
    remove_empty: bool = False,
    may_be_empty: bool = False,
) -> SourceRows:
    """Rows as they were read, made into rows with Tandem's columns; arguments and errors as in `read_rows`.

    may_be_empty: the rows are a part of the source, of which none need be left.
    """
    if prepare is not None:
        made, origins = prepare_rows(read.rows, prepare, read.where, may_be_empty=may_be_empty)
        read = read.kept(origins, made)
    if remove_empty and (answer := columns.get("answer")) is not None:
        full = [
            index for index, row in enumerate(read.rows) if str("" if row.get(answer) is None else row[answer]).strip()
        ]
        read = dataclasses.replace(read.kept(full), num_empty=len(read.rows) - len(full))
        if not full and not may_be_empty:
            raise ValueError(f"data source {source!r} must hold a row with an answer in column {answer!r}, got none")
    return dataclasses.replace(read, rows=_map_columns(read, columns, source)) if read.rows else read


def open_sources(source: str, args: Mapping[str, Any], seed: int) -> list[RowSource]:
    """Opens the files of a pattern, sorted by name, or the one source of that name; arguments as in `read_rows`."""
    named, part = split_slice(source)
    return [open_source(f"{name}{part or ''}", args, seed) for name in files_of(named)]


def kind_of(path: str | pathlib.Path) -> str:
    """The ending of a file's name in small letters."""
    return pathlib.Path(path).suffix.lower()


def files_of(named: str) -> list[str]:
    """The files that a pattern matches, sorted by name; the name alone where it is no pattern of files."""
    suffix = kind_of(named)
    if suffix not in _FILE_ARGS or not glob.has_magic(named) or is_remote(named) or pathlib.Path(named).exists():
        return [named]
    paths = sorted(glob.glob(os.path.expanduser(named), recursive=True))
    if not paths:
        raise ValueError(
            f"data source {named!r} must match an existing file, got none (working directory {os.getcwd()})"
        )
    return paths


def open_source(source: str, args: Mapping[str, Any], seed: int) -> RowSource:
    """Opens a source by its name; arguments as in `read_rows`. Of jsonl and parquet no row is read yet."""
    args = {name: value for name, value in args.items() if value is not None}
    if (given := rows_of(source)) is not None:
        if args:
            raise ValueError(f"data.args must be empty for rows that are given as an object, got {shown(args)}")
        return _in_memory(source, given)
    named, part = split_slice(source)
    if part is not None:
        whole = open_source(named, args, seed)
        if whole.unit != "rows":
            whole = _in_memory(whole.name, whole.read(0, whole.size))
        return sliced(whole, part, source)
    if is_procedural(source):
        return _in_memory(source, procedural_rows(source, args, seed))
    if is_remote(source):
        source = str(local_copy(source))
    path = pathlib.Path(source).expanduser()
    if kind_of(path) not in _FILE_ARGS or path.is_dir():
        return _open_data_set(source, args)
    check_file(path, source, args)
    if kind_of(path) == ".parquet":
        return _open_parquet(path)
    if kind_of(path) in (".csv", ".tsv"):
        return _in_memory(str(path), read_csv(path, args))
    if kind_of(path) == ".json" and (rows := read_json(path, args, JSON.decode)) is not None:
        for index, row in enumerate(rows):
            if (depth := depth_of(row)) > MOST_NESTED:
                raise ValueError(
                    f"{path} row {index} must be at most {MOST_NESTED} lists and objects deep, got {depth}"
                )
        return _in_memory(str(path), rows)
    if kind_of(path) in _BUILDERS:
        loaded = _loaded(_BUILDERS[kind_of(path)], {"split": "train", **args, "data_files": [str(path)]}, source)
        return dataclasses.replace(_of_data_set(str(path), loaded), files=(str(path),))
    return RowSource(str(path), path.stat().st_size, "bytes", partial(_read_jsonl_part, path))


def check_file(path: pathlib.Path, source: str, args: Mapping[str, Any]) -> None:
    """ValueError where there is no such file, or one of its kind takes no such argument. `source`: its name."""
    if not path.is_file():
        raise missing("data source", f"a {path.suffix} file", source)
    takes = _FILE_ARGS[kind_of(path)]
    unknown = [name for name in args if takes is not None and name not in takes]
    if unknown:
        rule = f"hold only {list(takes)}" if takes else "be empty"
        way_out = f"; {source}[:10%] is a part of the file" if unknown[0] == "split" else ""
        raise ValueError(
            f"data.args must {rule} for a file such as {source!r}, got {shown(args)}; "
            f"set {' '.join(f'data.args.{name}=null' for name in unknown)}{way_out}"
        )
    if takes is not None and kind_of(path) != ".parquet":
        check_start(path, args)


def sliced(whole: RowSource, part: str, source: str) -> RowSource:
    """A slice of a source that is cut by rows, in the notation of `datasets`. `source`: its name for messages."""
    start, end = slice_range(part, whole.size, source)
    return dataclasses.replace(
        whole, size=end - start, read=lambda a, b: whole.read(start + a, start + b), first=whole.first + start
    )


def _in_memory(name: str, rows: list[Row]) -> RowSource:
    return RowSource(name, len(rows), "rows", lambda start, end: rows[start:end])


def read_together(source: RowSource) -> list[Row]:
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
        lines = enumerate(iter(lambda: next_line(file, path), b""), start=1)
        return [(number, json_row(line, path, number)) for number, line in lines if line.strip()]


def _read_jsonl_part(path: pathlib.Path, start: int, end: int) -> list[Row]:
    """The rows whose lines begin at bytes from `start` to `end`."""
    rows = []
    with path.open("rb") as file:
        if start:
            file.seek(start - 1)
            while (rest := file.readline(MAX_LINE_BYTES)) and not rest.endswith(b"\n"):
                pass  # a line that crosses the border belongs to the part before
        while (place := file.tell()) < end:
            line = next_line(file, path)
            if not line:
                break
            if line.strip():
                rows.append(json_row(line, path, partial(line_number, path, place)))
    return rows


def next_line(file: BinaryIO, path: pathlib.Path) -> bytes:
    """The next line of a file; ValueError for one that is too long."""
    place = file.tell()
    line = file.readline(MAX_LINE_BYTES + 1)
    if len(line) > MAX_LINE_BYTES:
        raise ValueError(
            f"{path} must hold rows of at most {MAX_LINE_BYTES} bytes, got more in the line that begins at byte {place}"
        )
    return line


def json_row(line: bytes, path: pathlib.Path, number: int | Callable[[], int]) -> Row:
    """The row in a line. `number`: the number of the line, or a function that finds it."""
    try:
        row = JSON.decode(line.decode(json.detect_encoding(line), "surrogatepass"))  # as json.loads takes bytes
        problem = None if isinstance(row, dict) else f"{type(row).__name__}: {line[:80]!r}"
        # Brackets are counted first, because an exact check of every row would take longer than its parsing.
        if line.count(b"[") + line.count(b"{") > MOST_NESTED and (depth := depth_of(row)) > MOST_NESTED:
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


JSON = json.JSONDecoder(object_pairs_hook=_object)


def line_number(path: pathlib.Path, place: int) -> int:
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
            return RowSource(str(path), file.metadata.num_rows, "rows", read, files=(str(path),))
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} must be a parquet file, got: {error}") from error


def _open_data_set(source: str, args: Mapping[str, Any]) -> RowSource:
    """A hub data set, or a local folder that `datasets` understands."""
    folder = pathlib.Path(source).expanduser()
    if folder.is_file() or (kind_of(folder) in _OTHER_FILES and not folder.is_dir()):
        raise ValueError(f"{_SOURCE_RULE}, got {source!r}, a file of another kind; write it as one of these, unpacked")
    if not folder.is_dir() and not _HUB_ID.fullmatch(source):
        raise missing("data source", _SOURCES, source)
    import datasets

    for path in sorted(folder.rglob("*.parquet")):
        _open_parquet(path)  # checks its pages, because `datasets` would decompress anything
    is_saved = (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file()
    loaded = _load_saved(folder, args) if is_saved else _loaded(source, args, source)
    if isinstance(loaded, datasets.DatasetDict):
        if len(loaded) != 1:
            raise ValueError(
                f"data.args.split must name one split of {source!r}, got none; there are {sorted(map(str, loaded))}"
            )
        (loaded,) = loaded.values()
    if not isinstance(loaded, datasets.Dataset):
        raise ValueError(
            f"data.args must load {source!r} as a whole, got {type(loaded).__name__}; set data.args.streaming=null; "
            "data.streaming=true is for a data set that is larger than the memory"
        )
    return _of_data_set(source, loaded)


def _loaded(builder: str, args: Mapping[str, Any], source: str) -> Any:
    """What `datasets.load_dataset` makes of a folder, a hub id or files."""
    import datasets
    from datasets.exceptions import DatasetsError

    try:
        return datasets.load_dataset(builder, **args)
    except (DatasetsError, OSError, TypeError, ValueError) as error:
        # What went wrong in a file is the cause of an error that says little itself.
        cause = f" ({type(error.__cause__).__name__}: {error.__cause__})" if error.__cause__ is not None else ""
        raise ValueError(
            f"{_SOURCE_RULE}, got {source!r} with arguments {shown(dict(args))}, which datasets.load_dataset cannot "
            "load: "
            f"{type(error).__name__}: {error}{cause}"
        ) from error


def _load_saved(folder: pathlib.Path, args: Mapping[str, Any]) -> Any:
    """What `save_to_disk` of `datasets` wrote. The argument `split` names a split."""
    import datasets

    unknown = [name for name in args if name != "split"]
    if unknown:
        raise ValueError(
            f"data.args must hold split alone for {str(folder)!r}, which save_to_disk wrote, got {shown(dict(args))}; "
            f"set data.args.{unknown[0]}=null"
        )
    try:
        loaded = datasets.load_from_disk(str(folder))
    except (OSError, ValueError, LookupError, TypeError) as error:  # a file of it is damaged or missing
        raise ValueError(
            f"data source {str(folder)!r} must be what save_to_disk wrote, got {type(error).__name__}: {error}; write "
            "it again"
        ) from error
    if "split" not in args:
        return loaded
    splits = loaded if isinstance(loaded, datasets.DatasetDict) else {}
    name, part = split_slice(str(args["split"]))
    if name not in splits:
        raise ValueError(
            f"data.args.split must name a split of {str(folder)!r}, got {shown(args['split'])}; there are "
            f"{sorted(map(str, splits)) or 'none, it is one table: set data.args.split=null'}"
        )
    found = splits[name]
    return found if part is None else found.select(range(*slice_range(part, len(found), str(folder))))


def _of_data_set(name: str, loaded: Any) -> RowSource:
    plain = loaded.with_format(None)  # a saved data set may ask for arrays
    files = tuple(str(entry["filename"]) for entry in plain.cache_files)
    return RowSource(
        name, len(plain), "rows", lambda start, end: plain.select(range(start, end)).to_list(), files=files
    )


def _map_columns(read: SourceRows, columns: Mapping[str, str | None], source: str) -> list[Row]:
    """The rows with Tandem's names. Every row gets every column, None where its source has no value."""
    rows = read.rows
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
            is_csv = all(kind_of(name) in (".csv", ".tsv") for name in read.names)
            hint = (delimiter_hint(existing) if is_csv else "") or f"{list_columns(theirs, existing)}{way_out}"
            raise ValueError(f"{key} must name a column of {source!r}, got {shown(theirs)}{hint}")
        for index, row in enumerate(rows):
            if row.get(theirs) is None:
                raise ValueError(
                    f"data source {read.where(index)}: column {shown(theirs)} must have a value, got null{way_out}"
                )
    passed_on = [name for name in existing if name not in mapping and name not in mapping.values()]
    return [
        {name: row.get(theirs) for name, theirs in mapping.items()} | {name: row.get(name) for name in passed_on}
        for row in rows
    ]


def _names(rows: Iterable[Row]) -> list[str]:
    return list(dict.fromkeys(name for row in rows for name in row))
