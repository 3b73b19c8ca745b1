"""What the pages of a parquet file say they decompress to: read from their headers, before anything is decompressed.

In: a file and its metadata as pyarrow reads it. Out: nothing, or a ValueError for a page, or a group of rows, that is
larger than it may be. A reader allocates what a page header says, whatever the metadata of the file says, so that it is
the headers that are looked at (https://parquet.apache.org/docs/file-format/data-pages/).
"""

import os
import pathlib
from typing import Any, BinaryIO

MAX_PAGE_BYTES = 1_000_000_000
_MAX_HEADER_BYTES = 16 << 20  # as in the C++ reader
_UNCOMPRESSED, _COMPRESSED = 2, 3  # numbers of the fields of a page header

# Types of Thrift's compact protocol.
_STOP, _TRUE, _FALSE, _BYTE, _DOUBLE, _BINARY, _LIST, _SET, _STRUCT = 0, 1, 2, 3, 7, 8, 9, 10, 12
_VARINTS = (4, 5, 6)
_MAX_DEPTH = 8  # of structs within each other


def check_pages(path: pathlib.Path, metadata: Any) -> None:
    """Reads the header of every page.

    Raises:
      ValueError: a page that decompresses to more than `MAX_PAGE_BYTES`, a group of rows whose pages together are more
        than the memory of this machine, or a header that cannot be read.
    """
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        for group in range(metadata.num_row_groups):
            row_group, total = metadata.row_group(group), 0
            for index in range(row_group.num_columns):
                column = row_group.column(index)
                name = f"{path}: column {column.path_in_schema!r} of row group {group}"
                total += _check_column(file, column, size, name)
            if total > memory:
                raise ValueError(
                    f"{path}: row group {group} must decompress to what fits in memory, got {total} bytes of {memory}; "
                    "write the file with smaller row groups"
                )


def _check_column(file: BinaryIO, column: Any, size: int, name: str) -> int:
    """Bytes of a column's pages when they are decompressed."""
    first = column.data_page_offset
    if column.dictionary_page_offset:  # 0 and None: there is none
        first = min(first, column.dictionary_page_offset)
    place, end, total = first, min(first + column.total_compressed_size, size), 0
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
    for limit in (256, 16 << 10, _MAX_HEADER_BYTES):  # mostly it is short
        file.seek(place)
        thrift = _Thrift(file.read(limit))
        try:
            fields = thrift.numbers(depth=0)
        except IndexError:  # it is longer
            continue
        if _UNCOMPRESSED in fields and _COMPRESSED in fields:
            return fields[_UNCOMPRESSED], fields[_COMPRESSED], thrift.place
        break
    raise ValueError(f"{name} must have a page header at byte {place}, and it cannot be read; the file is damaged")


class _Thrift:
    """A message in Thrift's compact protocol, of which whole numbers are kept and all else is passed over.

    https://github.com/apache/thrift/blob/master/doc/specs/thrift-compact-protocol.md. IndexError: it goes on.
    """

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.place = 0

    def numbers(self, depth: int) -> dict[int, int]:
        """The whole numbers of a struct by the numbers of their fields."""
        found, field = {}, 0
        while (header := self._byte()) != _STOP:
            delta, kind = header >> 4, header & 15
            field = field + delta if delta else self._zigzag()
            if kind in _VARINTS:
                found[field] = self._zigzag()
            else:
                self._pass(kind, depth, in_list=False)
        return found

    def _pass(self, kind: int, depth: int, in_list: bool) -> None:
        if depth > _MAX_DEPTH:
            raise IndexError(depth)
        if kind in (_TRUE, _FALSE):
            self.place += in_list  # as a field its type is its value
        elif kind == _BYTE:
            self.place += 1
        elif kind in _VARINTS:
            self._varint()
        elif kind == _DOUBLE:
            self.place += 8
        elif kind == _BINARY:
            size = self._varint()
            self.place += size
        elif kind in (_LIST, _SET):
            header = self._byte()
            count = header >> 4 if header >> 4 != 15 else self._varint()
            for _ in range(min(count, len(self.data) + 1)):
                self._pass(header & 15, depth + 1, in_list=True)
                self._check()
        elif kind == _STRUCT:
            self.numbers(depth + 1)
        else:  # maps are in no page header
            raise IndexError(kind)
        self._check()

    def _check(self) -> None:
        if self.place > len(self.data):
            raise IndexError(self.place)

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
