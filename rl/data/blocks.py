"""Sources that are too large for memory, read block by block: `data.streaming`.

In: the name of a source. Out: `Blocks`, any of which can be read by its number. Lines of JSON and of CSV are read once
at the start, to find every `_STRIDE`-th row; parquet files say where their rows stand; data sets of `datasets` are
mapped into memory by that library. The bytes of all files are hashed at the start, because a resumed run must see the
same rows. Not here: prompts, and the order of rows (`rl.data.stream`).
"""

import dataclasses
import hashlib
import pathlib
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from rl.config.objects import is_object
from rl.data.sources import (
    MAX_LINE_BYTES,
    RowSource,
    SourceRows,
    check_file,
    files_of,
    json_row,
    kind_of,
    line_number,
    next_line,
    open_source,
    read_together,
    sliced,
)
from rl.data.table_files import index_csv, read_csv_part, split_slice
from rl.data.tasks import Row, is_procedural
from rl.files.stores import is_remote, local_copy

_STRIDE = 1000  # rows between two that an index knows
_CHUNK = 1000  # rows that are hashed at a time where no file is known


@dataclasses.dataclass(frozen=True)
class Blocks:
    """A source of one or several files, cut into blocks of rows.

    Attributes:
      parts: the files, cut by rows. size: the rows of a block; the last has what is left.
      content: a hash of all that is read.
    """

    parts: Sequence[RowSource]
    size: int
    content: str

    @property
    def num_rows(self) -> int:
        """Rows in all blocks."""
        return sum(part.size for part in self.parts)

    @property
    def num_blocks(self) -> int:
        """The number of blocks; at least 1."""
        return -(-self.num_rows // self.size)

    def read(self, number: int) -> SourceRows:
        """The rows of a block as they were read, in every process; each process reads its share."""
        start, end = number * self.size, min((number + 1) * self.size, self.num_rows)
        spans: list[tuple[RowSource, int, int, int]] = []  # file, its first and last row, place of the first in block
        before = 0
        for part in self.parts:
            first, last = max(start - before, 0), min(end - before, part.size)
            if first < last:
                spans.append((part, first, last, before + first - start))
            before += part.size

        def read(own_start: int, own_end: int) -> list[Row]:
            rows: list[Row] = []
            for part, first, last, place in spans:
                a, b = max(own_start - place, 0), min(own_end - place, last - first)
                if a < b:
                    rows += part.read(first + a, first + b)
            return rows

        rows = read_together(RowSource(f"block {number}", end - start, "rows", read))
        assert len(rows) == end - start, (number, len(rows))
        return SourceRows(
            rows,
            [place for *_, place in spans],
            [part.name for part, *_ in spans],
            [part.first + first for part, first, *_ in spans],
        )


def open_blocks(source: str, args: Mapping[str, Any], seed: int, size: int) -> Blocks:
    """Opens a source; every process does, and all must find the same.

    Args:
      source, args: as in `rl.data.sources.read_rows`. size: rows of a block.

    Raises:
      ValueError: the source cannot be read by blocks, is empty, or has other bytes in another process.
    """
    from rl.devices import hosts

    def opened() -> tuple[list[RowSource], str]:
        parts = _open_parts(source, args, seed)
        digest = hashlib.sha256(repr([(part.size, part.first) for part in parts]).encode())
        for part in parts:
            _hash_into(digest, part)
        return parts, digest.hexdigest()

    parts, content = hosts.together(opened)
    hosts.check_equal({f"what data source {source!r} holds": [content, [part.size for part in parts]]})
    if not any(part.size for part in parts):
        raise ValueError(f"data source {source!r} must hold at least one row, got an empty data set")
    return Blocks(parts, size, content)


def _open_parts(source: str, args: Mapping[str, Any], seed: int) -> list[RowSource]:
    if is_object(source) or is_procedural(source):
        what = "questions made by a program" if is_procedural(source) else "rows that are given as an object"
        raise ValueError(
            f"data.streaming must be false for {what}, which are in memory as a whole, got true for {source!r}; set "
            "data.streaming=false, or write the rows to a file"
        )
    args = {name: value for name, value in args.items() if value is not None}
    named, part = split_slice(source)
    local = str(local_copy(named)) if is_remote(named) else named
    found = []
    for name in files_of(local):
        path = pathlib.Path(name).expanduser()
        if kind_of(path) in _INDEXED and not path.is_dir():
            check_file(path, name, args)
            whole = _INDEXED[kind_of(path)](path, args)
        else:
            whole = open_source(name, args, seed)
        found.append(whole if part is None else sliced(whole, part, source))
    return found


def _open_csv(path: pathlib.Path, args: Mapping[str, Any]) -> RowSource:
    index = index_csv(path, args, _STRIDE)
    read = partial(read_csv_part, path, args, index)
    return RowSource(
        str(path), index.num_rows, "rows", lambda a, b: _all_there(read(a, b), path, b - a), 0, (str(path),)
    )


def _open_lines(path: pathlib.Path, args: Mapping[str, Any]) -> RowSource:
    """A file of lines of JSON, of which every `_STRIDE`-th row is found."""
    if kind_of(path) == ".json" and ("field" in args or _is_one_value(path)):
        raise ValueError(
            f"{path} must hold a row a line for data.streaming, got one JSON value, which can be read only as a whole; "
            "write it as x.jsonl, or set data.streaming=false"
        )
    places, count, place = [], 0, 0
    with path.open("rb") as file:
        while line := file.readline(MAX_LINE_BYTES + 1):
            if len(line) > MAX_LINE_BYTES:
                file.seek(place)
                next_line(file, path)  # raises
            if not line.isspace():
                if count % _STRIDE == 0:
                    places.append(place)
                count += 1
            place += len(line)
    return RowSource(str(path), count, "rows", partial(_read_lines, path, places), 0, (str(path),))


def _is_one_value(path: pathlib.Path) -> bool:
    with path.open("rb") as file:
        return file.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip()[:1] == b"["


def _read_lines(path: pathlib.Path, places: Sequence[int], start: int, end: int) -> list[Row]:
    rows, number = [], start // _STRIDE * _STRIDE
    with path.open("rb") as file:
        file.seek(places[start // _STRIDE])
        while number < end:
            place = file.tell()
            line = next_line(file, path)
            if not line:
                break
            if line.strip():
                if number >= start:
                    rows.append(json_row(line, path, partial(line_number, path, place)))
                number += 1
    return _all_there(rows, path, end - start)


def _all_there(rows: list[Row], path: pathlib.Path, count: int) -> list[Row]:
    if len(rows) < count:
        raise ValueError(
            f"{path} must not change while a run reads it, got {len(rows)} rows where {count} were at the start; put "
            "the file back and resume"
        )
    return rows


def _hash_into(digest: Any, part: RowSource) -> None:
    """Adds the bytes of a source's files; where no file is known, its rows."""
    for name in part.files:
        with open(name, "rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    if not part.files:
        for start in range(0, part.size, _CHUNK):
            digest.update(repr(part.read(start, min(start + _CHUNK, part.size))).encode("utf-8", "surrogatepass"))


_INDEXED = {".csv": _open_csv, ".tsv": _open_csv, ".jsonl": _open_lines, ".json": _open_lines}
