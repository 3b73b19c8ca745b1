"""Reads rows of CSV and JSON files, and cuts slices.

In: a file. Out: dicts, one for each row. Values are taken as they stand in the file: a cell of a CSV file is text, so
that 007, 1.10, NA and None stay what an author wrote. Lines of JSON are read by `rl.data.sources`.
"""

import contextlib
import csv
import dataclasses
import itertools
import pathlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TextIO

from rl.data.tasks import Row
from rl.files.json_file import shown

MAX_JSON_BYTES = 1_000_000_000  # of a file that is read as a whole, which may take a few dozen times as much memory
MAX_CELL_CHARACTERS = 100_000_000  # of a CSV file; as many as a line of JSON may have bytes
# Deeper rows would cause a RecursionError later, at a depth that depends on the version of Python.
MOST_NESTED = 100
CSV_ARGS = ("delimiter", "quotechar", "encoding")
_DELIMITERS = (";", "\t", "|", ",")
_PACKED = {
    b"\x1f\x8b": "gzip",
    b"BZh": "bzip2",
    b"\xfd7zXZ": "xz",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"PK\x03\x04": "zip",
    b"PAR1": "parquet",
}
_SLICE = re.compile(r"(?P<source>.+)(?P<slice>\[[^\[\]]*:[^\[\]]*\])", re.DOTALL)


@dataclasses.dataclass(frozen=True)
class CsvIndex:
    """Where the rows of a CSV file stand.

    Attributes:
      header: the names of the columns. num_rows: of the whole file.
      places: for every `stride`-th row, from row 0 on, where its text begins and how many lines stand before it.
    """

    header: list[str]
    num_rows: int
    stride: int
    places: list[tuple[int, int]]


def read_csv(path: pathlib.Path, args: Mapping[str, Any]) -> list[Row]:
    """The rows of a CSV file (TSV: tabs between cells). The first line names the columns; an empty cell is None.

    Args:
      args: delimiter, quotechar, encoding.

    Raises:
      ValueError: an argument has a wrong form, the file has no header, a name twice, or a row with another number of
        cells; the message has the file and the line.
    """
    with _open_csv(path, args) as (file, form):
        lines = csv.reader(file, strict=True, **form)
        return list(_csv_rows(lines, _header(lines, path), path, form))


def index_csv(path: pathlib.Path, args: Mapping[str, Any], stride: int) -> CsvIndex:
    """Reads a CSV file once, without keeping its rows. Arguments and errors as in `read_csv`."""
    places, count = [], 0
    with _open_csv(path, args) as (file, form):
        # `readline`, because a file that is iterated does not say where it stands.
        lines = csv.reader(iter(file.readline, ""), strict=True, **form)
        header = _header(lines, path)
        rows, is_left = _csv_rows(lines, header, path, form), True
        while is_left:
            if count % stride == 0:
                places.append((file.tell(), lines.line_num))
            is_left = next(rows, None) is not None
            count += is_left
    return CsvIndex(header, count, stride, places)


def read_csv_part(path: pathlib.Path, args: Mapping[str, Any], index: CsvIndex, start: int, end: int) -> list[Row]:
    """Rows `start` to `end` of a file with this index. Arguments and errors as in `read_csv`."""
    place, line = index.places[start // index.stride]
    first = start // index.stride * index.stride
    with _open_csv(path, args) as (file, form):
        file.seek(place)
        lines = csv.reader(iter(file.readline, ""), strict=True, **form)
        return list(itertools.islice(_csv_rows(lines, index.header, path, form, line), start - first, end - first))


@contextlib.contextmanager
def _open_csv(path: pathlib.Path, args: Mapping[str, Any]) -> Iterator[tuple[TextIO, dict[str, Any]]]:
    """The open file, and the arguments of `csv.reader`."""
    for name, value in args.items():
        if not isinstance(value, str) or (name != "encoding" and len(value) != 1):
            form = "the name of an encoding" if name == "encoding" else "one character"
            raise ValueError(f"data.args.{name} must be {form} for {str(path)!r}, got {shown(value)}")
    form = {
        "delimiter": "\t" if path.suffix.lower() == ".tsv" else ",",
        "quotechar": '"',
        "encoding": "utf-8-sig",
    } | dict(args)
    csv.field_size_limit(MAX_CELL_CHARACTERS)  # of the process; 131,072 without it
    try:
        with path.open(encoding=form.pop("encoding"), newline="") as file:
            yield file, form
    except (UnicodeError, LookupError, TypeError, OSError) as error:  # LookupError: an encoding that is not known
        raise ValueError(
            f"{path} must be a CSV file that can be read, got: {error}; data.args.encoding names its encoding"
        ) from error


def _header(lines: Any, path: pathlib.Path) -> list[str]:
    try:
        header = next(lines, [])
    except csv.Error as error:
        raise ValueError(f"{path}:1 must be a line of CSV: {error}") from error
    if not header or len(set(header)) < len(header) or "" in header:
        raise ValueError(f"{path}:1 must name each column once, got {shown(header)}")
    return header


def _csv_rows(
    lines: Any, header: list[str], path: pathlib.Path, form: Mapping[str, Any], before: int = 0
) -> Iterator[Row]:
    """The rows of a `csv.reader` whose file has `before` lines before its first."""
    try:
        for cells in lines:
            if len(cells) != len(header) and cells:
                way_out = delimiter_hint(header) or f"; quote a cell that holds {form['delimiter']!r}"
                raise ValueError(
                    f"{path}:{before + lines.line_num} must have {len(header)} cells, one for each of {shown(header)}, "
                    f"got {len(cells)}: {shown(cells)}{way_out}"
                )
            if cells:  # a blank line is no row
                yield {name: cell or None for name, cell in zip(header, cells, strict=True)}
    except csv.Error as error:
        raise ValueError(f"{path}:{before + lines.line_num} must be a line of CSV: {error}") from error


def depth_of(value: object) -> int:
    """The depth of nested lists and objects; 0 for a value that is neither."""
    depth, level = 0, [value]
    while level := [inner for inner in level if isinstance(inner, list | dict)]:
        depth += 1
        level = [value for inner in level for value in (inner.values() if isinstance(inner, dict) else inner)]
    return depth


def delimiter_hint(header: Sequence[str]) -> str:
    """The end of a message about a CSV file whose one column has the look of several; else nothing."""
    found = next((mark for mark in _DELIMITERS if len(header) == 1 and mark in header[0]), None)
    if found is None:
        return ""
    return f"; the only column is {shown(header[0])}: set data.args.delimiter={found!r} where that stands between cells"


def check_start(path: pathlib.Path, args: Mapping[str, Any]) -> None:
    """ValueError where a file of text begins as another kind of file does, or as text that is not UTF-8.

    Args:
      args: with `encoding` the text may be anything.
    """
    with path.open("rb") as file:
        start = file.read(6)
    packed = next((name for mark, name in _PACKED.items() if start.startswith(mark)), None)
    if packed is not None:
        way_out = "name it x.parquet" if packed == "parquet" else "unpack it"
        raise ValueError(f"{path} must be text, as its name says, got a {packed} file; {way_out}")
    if "encoding" not in args and (start[:2] in (b"\xff\xfe", b"\xfe\xff") or b"\0" in start[:2]):
        is_csv = path.suffix.lower() in (".csv", ".tsv")
        way_out = "set data.args.encoding=utf-16" if is_csv else "write it as UTF-8"
        raise ValueError(f"{path} must be text in UTF-8, got what begins as UTF-16 does, with {start!r}; {way_out}")


def read_json(path: pathlib.Path, args: Mapping[str, Any], decode: Callable[[str], Any]) -> list[Row] | None:
    """The rows of a JSON file that is one list of objects; None for a file that is none, such as lines of JSON.

    Args:
      args: `field`, the name of the list in a file that is one object.
      decode: parses the text; ValueError where it is no JSON.

    Raises:
      ValueError: the file is too large or no JSON, or what should be a list of objects is something else.
    """
    field = args.get("field")
    with path.open("rb") as file:
        start = file.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip()[:1]
    if start != b"[" and field is None:
        return None
    if (size := path.stat().st_size) > MAX_JSON_BYTES:
        raise ValueError(
            f"{path} must have at most {MAX_JSON_BYTES} bytes as one JSON value, got {size}; write a row a line, as "
            "x.jsonl"
        )
    try:
        value = decode(path.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} must be a JSON list of objects, or lines of JSON: {error}") from error
    if field is not None:
        if not isinstance(value, dict) or field not in value:
            names = sorted(value) if isinstance(value, dict) else type(value).__name__
            raise ValueError(f"data.args.field must name a list in {str(path)!r}, got {shown(field)} of {shown(names)}")
        value = value[field]
    if not isinstance(value, list):
        raise ValueError(f"{path} must hold a list of objects, got {shown(value)}")
    for index, row in enumerate(value):
        if not isinstance(row, dict):
            raise ValueError(f"{path} row {index} must be a JSON object, got {shown(row)}")
    return value


def split_slice(source: str) -> tuple[str, str | None]:
    """`x.jsonl[:10%]` as (`x.jsonl`, `[:10%]`); (source, None) without a slice, or where a file has the whole name."""
    match = _SLICE.fullmatch(source)
    if match is None or pathlib.Path(source).expanduser().exists():
        return source, None
    return match["source"], match["slice"]


def slice_range(text: str, num_rows: int, source: str) -> tuple[int, int]:
    """Start and end of a slice of that many rows, in the notation of `datasets`: [:100], [-100:], [10%:20%].

    Raises:
      ValueError: it is no slice, or holds no row.
    """
    import datasets

    try:
        (part,) = datasets.ReadInstruction.from_spec(f"rows{text}").to_absolute({"rows": num_rows})
    except (AssertionError, ValueError) as error:
        raise ValueError(
            f"data source {source!r}: a slice must look like [:100], [-100:] or [10%:20%], got {text!r}: {error}"
        ) from error
    if part.from_ >= part.to:
        raise ValueError(f"data source {source!r}: slice {text!r} must hold a row, got none of {num_rows}")
    return part.from_, part.to
