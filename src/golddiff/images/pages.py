"""Pages of parquet files: what each announces that it inflates to. Arrow takes that much without asking, and the footer
says nothing about it that binds.

The headers of pages are Thrift structures in the compact protocol. Two of their numbers are read, the rest is skipped:
https://github.com/apache/thrift/blob/master/doc/specs/thrift-compact-protocol.md
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import pyarrow.parquet as pq

__all__ = ["largest_pages"]

KIND, INFLATED, STORED = 1, 2, 3  # fields of the header of a page: all of them are I32
DICTIONARY = 2  # the kind of page whose values cells name by their numbers
SIZES = (2**10, 2**14, 2**19, 2**24)  # bytes of a header to try; Arrow reads no longer ones either
DEEPEST, VALUES = 16, 10_000  # nesting and number of values of a header

TRUE, FALSE, BYTE, I16, I32, I64, DOUBLE, BINARY, LIST, SET, MAP, STRUCT = range(1, 13)  # types of Thrift


def largest_pages(file: Path, columns: set[str]) -> tuple[int, int]:
    """Bytes of the largest page of values and of the largest dictionary of some columns, inflated.

    Raises:
        ValueError: where the header of a page should be is none.
    """
    with pq.ParquetFile(file) as parquet:
        groups = [parquet.metadata.row_group(group) for group in range(parquet.metadata.num_row_groups)]
        chunks = [group.column(column) for group in groups for column in range(group.num_columns)]
        spans = [_span(chunk) for chunk in chunks if chunk.path_in_schema.partition(".")[0] in columns]
    if sum(end - start for start, end in spans) > file.stat().st_size:  # or few bytes would be read again and again
        raise ValueError("columns that overlap")
    values = dictionary = 0
    with file.open("rb") as opened:
        for kind, size in (page for span in spans for page in _pages(opened, *span)):
            if kind == DICTIONARY:
                dictionary = max(dictionary, size)
            else:
                values = max(values, size)
    return values, dictionary


def _span(chunk: pq.ColumnChunkMetaData) -> tuple[int, int]:
    """Where the pages of a column of a group begin and end."""
    first = [at for at in (chunk.dictionary_page_offset, chunk.data_page_offset) if at]
    start = min(first, default=0)
    if min(start, chunk.total_compressed_size) < 0:
        raise ValueError("a column of no place")
    return start, start + chunk.total_compressed_size


def _pages(opened: BinaryIO, start: int, end: int) -> Iterator[tuple[int, int]]:
    """Kind and inflated size of each page."""
    while start < end:
        length, fields = _header(opened, start)
        if min(fields.get(INFLATED, -1), fields.get(STORED, -1)) < 0:
            raise ValueError("a page without a size")
        yield fields.get(KIND, -1), fields[INFLATED]
        start += length + fields[STORED]


def _header(opened: BinaryIO, start: int) -> tuple[int, dict[int, int]]:
    """Length of a header, and its numbers by field."""
    for size in SIZES:
        opened.seek(start)
        header = _Header(opened.read(size))
        try:
            fields = header.structure()
        except IndexError:
            continue
        return header.at, fields
    raise ValueError("the header of a page does not end")


class _Header:
    """Reads Thrift. IndexError: the bytes end too early."""

    def __init__(self, data: bytes) -> None:
        self._data, self.at, self._values = data, 0, 0

    def structure(self, depth: int = 0) -> dict[int, int]:
        """Its numbers of 32 bits by field."""
        fields: dict[int, int] = {}
        field = 0
        while head := self._byte():
            self._count(depth)
            step, kind = divmod(head, 16)
            field = field + step if step else _signed(self._number())
            if kind == I32:
                fields[field] = _signed(self._number() % 2**32)
            elif kind not in (TRUE, FALSE):  # those are all in the head
                self._skip(kind, depth + 1)
        return fields

    def _skip(self, kind: int, depth: int) -> None:
        self._count(depth)
        if kind in (TRUE, FALSE, BYTE):
            self.at += 1
        elif kind in (I16, I32, I64):
            self._number()
        elif kind == DOUBLE:
            self.at += 8
        elif kind == BINARY:
            length = self._number()  # which moves `at` too
            self.at += length
        elif kind in (LIST, SET):
            size, of = divmod(self._byte(), 16)
            for _ in range(self._number() if size == 15 else size):
                self._skip(of, depth + 1)
        elif kind == MAP:
            size = self._number()
            key, value = divmod(self._byte(), 16) if size else (0, 0)
            for _ in range(size):
                self._skip(key, depth + 1)
                self._skip(value, depth + 1)
        elif kind == STRUCT:
            self.structure(depth)
        else:
            raise ValueError("the header of a page is none")

    def _count(self, depth: int) -> None:
        self._values += 1
        if depth > DEEPEST or self._values > VALUES:
            raise ValueError("the header of a page holds more than such headers do")

    def _byte(self) -> int:
        self.at += 1
        return self._data[self.at - 1]

    def _number(self) -> int:
        number = 0
        for place in range(10):
            byte = self._byte()
            number |= (byte & 127) << 7 * place
            if byte < 128:
                return number
        raise ValueError("the header of a page is none")


def _signed(number: int) -> int:
    """Of zigzag: 0, -1, 1, -2, ..."""
    return number >> 1 ^ -(number & 1)
