"""Checks the decompressed sizes of a parquet file's pages in their headers, before anything is decompressed.

In: a file. Out: nothing, or a ValueError for a page or a row group that is too large. A reader allocates what a page
header says, whatever the metadata of the file says, so the headers are checked
(https://parquet.apache.org/docs/file-format/). pyarrow is not used to find them, because some damage to the metadata
makes it end the whole process.
"""

import os
import pathlib
from typing import Any, BinaryIO

MAX_PAGE_BYTES = 1_000_000_000
_MAX_METADATA_BYTES = 100_000_000
_MAX_HEADER_BYTES = 16 << 20  # of a page, the limit of the C++ reader
_MAGIC = b"PAR1"

# Numbers of fields in https://github.com/apache/parquet-format/blob/master/src/main/thrift/parquet.thrift.
_ROW_GROUPS, _COLUMNS, _COLUMN = 4, 1, 3
_PATH, _CHUNK_COMPRESSED, _DATA_PAGE, _DICTIONARY_PAGE = 3, 7, 9, 11
_UNCOMPRESSED, _COMPRESSED = 2, 3

# Types of Thrift's compact protocol.
_STOP, _TRUE, _FALSE, _BYTE, _DOUBLE, _BINARY, _LIST, _SET, _STRUCT = 0, 1, 2, 3, 7, 8, 9, 10, 12
_VARINTS = (4, 5, 6)
_MAX_DEPTH = 16  # of structs and lists within each other


def check_pages(path: pathlib.Path) -> None:
    """Checks the header of every page of a parquet file. Any other file is left to the reader.

    Raises:
      ValueError: a page decompresses to more than `MAX_PAGE_BYTES`, the pages of a row group to more than this
        machine's memory, or metadata or a header cannot be read.
    """
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        file.seek(max(size - 8, 0))
        end = file.read(8)
        if end[4:] != _MAGIC:
            return  # encrypted, or no parquet file: the reader reports it
        length = int.from_bytes(end[:4], "little")
        if length > min(_MAX_METADATA_BYTES, size - 8):
            raise ValueError(
                f"{path} must have metadata of at most {_MAX_METADATA_BYTES} bytes, got {length} of {size}"
            )
        file.seek(size - 8 - length)
        try:
            groups = _row_groups(_Thrift(file.read(length)).struct())
        except (
            IndexError,
            TypeError,
            ValueError,
            KeyError,
        ) as error:  # the metadata ends too early, or is something else
            raise ValueError(
                f"{path} must be a parquet file, and its metadata cannot be read; it is damaged"
            ) from error
        for number, columns in enumerate(groups):
            total = 0
            for name, first, length in columns:
                described = f"{path}: column {name!r} of row group {number}"
                total += _check_column(file, first, min(first + length, size), described)
            if total > memory:
                raise ValueError(
                    f"{path}: row group {number} must decompress to what fits in memory, got {total} bytes of "
                    f"{memory}; write the file with smaller row groups"
                )


def _row_groups(metadata: dict[int, Any]) -> list[list[tuple[str, int, int]]]:
    """(name, place of the first page, bytes) of every column of every row group."""
    groups = []
    for group in metadata.get(_ROW_GROUPS, []):
        columns = []
        for chunk in group[_COLUMNS]:
            column = chunk[_COLUMN]
            name = ".".join(str(part, "utf-8") for part in column[_PATH])
            first = min(place for place in (column[_DATA_PAGE], column.get(_DICTIONARY_PAGE)) if place)  # 0: none
            columns.append((name[:100], first + 0, column[_CHUNK_COMPRESSED] + 0))  # TypeError: no numbers
        groups.append(columns)
    return groups


def _check_column(file: BinaryIO, place: int, end: int, name: str) -> int:
    """Decompressed bytes of a column's pages, which lie from `place` to `end`."""
    total = 0
    while 0 < place < end:
        uncompressed, compressed, header_bytes = _read_header(file, place, name)
        if not 0 <= uncompressed <= MAX_PAGE_BYTES:
            raise ValueError(
                f"{name} must have pages of at most {MAX_PAGE_BYTES} bytes when decompressed, got {uncompressed}; "
                "write the file again with smaller pages"
            )
        if compressed < 0:
            raise ValueError(f"{name} must have pages of a size, got {compressed}; the file is damaged")
        total += uncompressed
        place += header_bytes + compressed
    return total


def _read_header(file: BinaryIO, place: int, name: str) -> tuple[int, int, int]:
    """(uncompressed bytes, compressed bytes, bytes of the header) of the page that begins there."""
    for limit in (256, 16 << 10, _MAX_HEADER_BYTES):  # most headers are short
        file.seek(place)
        thrift = _Thrift(file.read(limit))
        try:
            fields = thrift.struct()
        except IndexError:  # the header is longer
            continue
        sizes = fields.get(_UNCOMPRESSED), fields.get(_COMPRESSED)
        if isinstance(sizes[0], int) and isinstance(sizes[1], int):
            return sizes[0], sizes[1], thrift.place
        break
    raise ValueError(f"{name} must have a page header at byte {place}, and it cannot be read; the file is damaged")


class _Thrift:
    """A message in Thrift's compact protocol.

    https://github.com/apache/thrift/blob/master/doc/specs/thrift-compact-protocol.md. IndexError: the message is
    incomplete.
    """

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.place = 0

    def struct(self, depth: int = 0) -> dict[int, Any]:
        """{field number: value} of a struct. Values are int, bytes, list or a dict; None for other types."""
        found, field = {}, 0
        while (header := self._byte()) != _STOP:
            delta, kind = header >> 4, header & 15
            field = field + delta if delta else self._zigzag()
            found[field] = None if kind in (_TRUE, _FALSE) else self._value(kind, depth)  # the type holds the value
        return found

    def _value(self, kind: int, depth: int) -> Any:
        if depth > _MAX_DEPTH:
            raise IndexError(depth)
        if kind in _VARINTS:
            return self._zigzag()
        if kind == _BINARY:
            return self._bytes(self._varint())
        if kind == _STRUCT:
            return self.struct(depth + 1)
        if kind in (_LIST, _SET):
            header = self._byte()
            count = header >> 4 if header >> 4 != 15 else self._varint()
            if count > len(self.data) - self.place:  # each entry takes at least a byte
                raise IndexError(count)
            return [self._value(header & 15, depth + 1) for _ in range(count)]
        if kind in (_TRUE, _FALSE, _BYTE):
            return self._byte()
        if kind == _DOUBLE:
            return self._bytes(8)
        raise IndexError(kind)  # parquet's messages hold no maps

    def _bytes(self, count: int) -> bytes:
        start = self.place
        self.place += count
        if self.place > len(self.data):
            raise IndexError(self.place)
        return self.data[start : self.place]

    def _byte(self) -> int:
        self.place += 1
        return self.data[self.place - 1]

    def _varint(self) -> int:
        value = shift = 0
        while True:
            byte = self._byte()
            value |= (byte & 127) << shift
            if byte < 128:
                return value
            shift += 7
            if shift > 63:
                raise IndexError(shift)

    def _zigzag(self) -> int:
        value = self._varint()
        return (value >> 1) ^ -(value & 1)
