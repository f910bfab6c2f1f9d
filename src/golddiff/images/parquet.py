"""Hugging Face parquet files: a column of encoded pictures, perhaps a column of labels."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ..errors import GolddiffError
from ..foreign import parse_json, regular
from ..memory import in_words, require
from .core import NO_LABEL, ROW_MEMORY, Images, as_labels
from .pages import largest_pages
from .pictures import LARGEST_FILE, EncodedPicture, decoded

__all__ = ["find_parquet", "read_parquet"]

BATCH = 16  # cells that are read at once
COPIES = 12  # of a page, while Arrow makes cells of it; measured: 4 to 11
LABEL_COLUMNS = ("label", "labels", "fine_label", "class")


def find_parquet(folder: Path, split: str) -> list[Path]:
    """The parquet files of a split (`train-00000-of-00002.parquet`, ...), [] if the folder has none."""
    files = sorted(folder.glob("*.parquet")) or sorted(folder.glob("data/*.parquet"))
    chosen = [f for f in files if f.name == f"{split}.parquet" or f.name.startswith(f"{split}-")]
    if files and not chosen:
        raise GolddiffError(f"{folder} has no split '{split}': it holds {', '.join(f.name for f in files[:6])}")
    return chosen


def read_parquet(files: list[Path], **options: Any) -> Images:
    """Pictures of parquet files, one after the other. Ids are row numbers over all files."""
    columns = [_columns(file) for file in files]
    for file, names in zip(files, columns, strict=True):
        _check_pages(file, {name for name in names if name})
    if len({label for _, label in columns}) > 1:
        raise GolddiffError(f"{files[0].parent}: some files have labels and some have none, or under another name")
    counts = [_count(file) for file in files]
    starts = np.concatenate([[0], np.cumsum(counts)])
    total = int(starts[-1])
    require(ROW_MEMORY * total, f"a list of {total} rows", "take fewer files")
    labels = np.concatenate([_labels(f, c[1], n) for f, c, n in zip(files, columns, counts, strict=True)])

    @lru_cache(maxsize=1)
    def pictures(shard: int) -> _Column:
        return _Column(files[shard], columns[shard][0])

    def fetch(row: int) -> EncodedPicture:
        shard = int(np.searchsorted(starts, row, side="right")) - 1
        local = row - int(starts[shard])
        cell = pictures(shard)[local]
        data = cell.get("bytes") if isinstance(cell, dict) else cell
        name = f"{files[shard].name} row {local}"
        if not isinstance(data, bytes) or not 0 < len(data) <= LARGEST_FILE:
            raise GolddiffError(f"{name} has no picture bytes: it must be stored in the file itself")
        return EncodedPicture(name, data)

    return decoded(total, fetch, labels, [str(i) for i in range(total)], _classes(files[0], columns[0][1]), **options)


class _Column:
    """Cells of a column by row number. They are read some at a time, and in order without reading any twice: few bytes
    of parquet can stand for millions of equal cells."""

    def __init__(self, file: Path, name: str) -> None:
        self._file, self._name = file, name
        with _reading(file):
            self._parquet = pq.ParquetFile(file)
            groups = self._parquet.metadata.num_row_groups
            self._groups = np.cumsum([0, *(self._parquet.metadata.row_group(g).num_rows for g in range(groups))])
        self._start, self._end, self._cells = -1, -1, None
        self._coming: Iterator[pa.RecordBatch] = iter(())

    def __getitem__(self, row: int) -> Any:
        with _reading(self._file):
            group = int(np.searchsorted(self._groups, row, side="right")) - 1
            if row < self._start or self._end < self._groups[group]:
                self._from(group)
            while row >= self._end:
                batch = next(self._coming, None)
                if batch is None:
                    raise GolddiffError(f"{self._file} ends before row {row}, which it announces: fetch it again")
                self._start, self._end, self._cells = self._end, self._end + len(batch), batch.column(0)
            return self._cells[row - self._start].as_py()  # type: ignore[index]

    def _from(self, group: int) -> None:
        """Begins to read at a group of rows."""
        self._start = self._end = int(self._groups[group])
        groups = range(group, len(self._groups) - 1)
        self._coming = self._parquet.iter_batches(BATCH, row_groups=list(groups), columns=[self._name])


@contextmanager
def _reading(file: Path) -> Iterator[None]:
    try:
        yield
    except GolddiffError:
        raise
    except (pa.ArrowException, OSError, ValueError) as error:
        raise GolddiffError(f"{file} is damaged ({str(error)[:120]}): fetch it again") from error


def _count(file: Path) -> int:
    """How many rows a file announces.

    Raises:
        GolddiffError: more than it has bytes, or others than its groups of rows.
    """
    with _reading(file):
        metadata = pq.ParquetFile(file).metadata
        rows = int(metadata.num_rows)
        groups = [metadata.row_group(g).num_rows for g in range(metadata.num_row_groups)]
    size = file.stat().st_size
    if sum(groups) != rows or min(groups, default=0) < 0 or rows > size:
        raise GolddiffError(
            f"{file} announces {rows} rows, {sum(groups)} in its groups, and has {size} bytes: fetch it again"
        )
    return rows


def _check_pages(file: Path, columns: set[str]) -> None:
    """Refuses pages that would not fit inflated: a few bytes can announce gigabytes.

    Raises:
        GolddiffError: they would not, or what should be pages is none.
    """
    with _reading(file):
        values, dictionary = largest_pages(file, columns)
    needed = COPIES * values + (COPIES + BATCH) * dictionary  # each cell of a batch may be all of the dictionary
    require(needed, f"reading {file}, whose pages inflate to {in_words(max(values, dictionary))},", "fetch it again")


def _columns(file: Path) -> tuple[str, str | None]:
    """Names of the column of pictures and of the column of labels (None if there is none)."""
    try:
        schema = pq.read_schema(regular(file))
    except (pa.ArrowException, OSError) as error:
        raise GolddiffError(f"{file} is not a readable parquet file ({str(error)[:120]})") from error
    encoded = [
        field.name for field in schema
        if pa.types.is_binary(field.type)
        or (pa.types.is_struct(field.type) and field.type.get_field_index("bytes") >= 0)
    ]  # fmt: skip
    if len(encoded) != 1:
        found = ", ".join(f"{f.name} ({f.type})" for f in schema)[:1000]
        raise GolddiffError(f"{file} has {len(encoded)} columns of picture bytes, not one: {found}")
    label = next((name for name in LABEL_COLUMNS if name in schema.names), None)
    return encoded[0], label


def _labels(file: Path, column: str | None, count: int) -> np.ndarray:
    if column is None:
        return np.full(count, NO_LABEL, dtype=np.int64)
    with _reading(file):
        values = pq.read_table(file, columns=[column]).column(column)
    if not pa.types.is_integer(values.type):
        raise GolddiffError(f"{file}: labels in column {column} are {values.type}, not integers")
    if len(values) != count:
        raise GolddiffError(f"{file} has {len(values)} labels for {count} rows: fetch it again")
    with _reading(file):
        return as_labels(values.cast(pa.int64()).fill_null(NO_LABEL).to_numpy())


def _classes(file: Path, column: str | None) -> tuple[str, ...]:
    """Class names from the metadata that Hugging Face `datasets` writes into the schema."""
    metadata = pq.read_schema(file).metadata or {}
    try:
        features = parse_json(metadata.get(b"huggingface", b"{}"))["info"]["features"]
        return tuple(str(name) for name in features[column]["names"])
    except (KeyError, TypeError, ValueError):
        return ()
