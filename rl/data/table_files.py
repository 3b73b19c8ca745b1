"""Reads rows of CSV and JSON files, and cuts slices.

In: a file. Out: dicts, one for each row. Values are taken as they stand in the file: a cell of a CSV file is text, so
that 007, 1.10, NA and None stay what an author wrote. Lines of JSON are read by `rl.data.sources`.
"""

import csv
import pathlib
import re
from collections.abc import Callable, Mapping
from typing import Any

from rl.data.tasks import Row
from rl.files.json_file import shown

MAX_JSON_BYTES = 1_000_000_000  # of a file that is read as a whole, which may take a few dozen times as much memory
CSV_ARGS = ("delimiter", "quotechar", "encoding")
_SLICE = re.compile(r"(?P<source>.+)(?P<slice>\[[^\[\]]*:[^\[\]]*\])", re.DOTALL)


def read_csv(path: pathlib.Path, args: Mapping[str, Any]) -> list[Row]:
    """The rows of a CSV file (TSV: tabs between cells). The first line names the columns; an empty cell is None.

    Args:
      args: delimiter, quotechar, encoding.

    Raises:
      ValueError: an argument has a wrong form, the file has no header, a name twice, or a row with another number of
        cells; the message has the file and the line.
    """
    for name, value in args.items():
        if not isinstance(value, str) or (name != "encoding" and len(value) != 1):
            form = "the name of an encoding" if name == "encoding" else "one character"
            raise ValueError(f"data.args.{name} must be {form} for {str(path)!r}, got {shown(value)}")
    form = {"delimiter": "\t" if path.suffix == ".tsv" else ",", "quotechar": '"', "encoding": "utf-8-sig"} | dict(args)
    rows: list[Row] = []
    try:
        with path.open(encoding=form["encoding"], newline="") as file:
            lines = csv.reader(file, delimiter=form["delimiter"], quotechar=form["quotechar"], strict=True)
            try:
                header = next(lines, [])
                if not header or len(set(header)) < len(header) or "" in header:
                    raise ValueError(f"{path}:1 must name each column once, got {shown(header)}")
                for cells in lines:
                    if len(cells) != len(header) and cells:
                        raise ValueError(
                            f"{path}:{lines.line_num} must have {len(header)} cells, one for each of {shown(header)}, "
                            f"got {len(cells)}: {shown(cells)}; quote a cell that holds {form['delimiter']!r}"
                        )
                    if cells:  # a blank line is no row
                        rows.append({name: cell or None for name, cell in zip(header, cells, strict=True)})
            except csv.Error as error:
                raise ValueError(f"{path}:{lines.line_num} must be a line of CSV: {error}") from error
    except (UnicodeError, LookupError, TypeError, OSError) as error:  # LookupError: an encoding that is not known
        raise ValueError(
            f"{path} must be a CSV file that can be read, got: {error}; data.args.encoding names its encoding"
        ) from error
    return rows


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
