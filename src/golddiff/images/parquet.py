"""Hugging Face parquet files: a column of encoded pictures, perhaps a column of labels."""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ..errors import GolddiffError
from .core import NO_LABEL, Images
from .pictures import EncodedPicture, decoded

__all__ = ["find_parquet", "read_parquet"]

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
    if len({label for _, label in columns}) > 1:
        raise GolddiffError(f"{files[0].parent}: some files have labels and some have none, or under another name")
    counts = [pq.ParquetFile(file).metadata.num_rows for file in files]
    starts = np.concatenate([[0], np.cumsum(counts)])
    labels = np.concatenate([_labels(f, c[1], n) for f, c, n in zip(files, columns, counts, strict=True)])

    @lru_cache(maxsize=1)
    def pictures(shard: int) -> pa.ChunkedArray:
        name = columns[shard][0]
        return _read(files[shard], name)

    def fetch(row: int) -> EncodedPicture:
        shard = int(np.searchsorted(starts, row, side="right")) - 1
        local = row - int(starts[shard])
        cell = pictures(shard)[local].as_py()
        data = cell.get("bytes") if isinstance(cell, dict) else cell
        name = f"{files[shard].name} row {local}"
        if not data:
            raise GolddiffError(f"{name} has no picture bytes: it must be stored in the file itself")
        return EncodedPicture(name, data)

    total = int(starts[-1])
    return decoded(total, fetch, labels, [str(i) for i in range(total)], _classes(files[0], columns[0][1]), **options)


def _read(file: Path, column: str) -> pa.ChunkedArray:
    try:
        return pq.read_table(file, columns=[column]).column(column)
    except (pa.ArrowException, OSError) as error:
        raise GolddiffError(f"{file} is damaged ({str(error)[:120]}): fetch it again") from error


def _columns(file: Path) -> tuple[str, str | None]:
    """Names of the column of pictures and of the column of labels (None if there is none)."""
    try:
        schema = pq.read_schema(file)
    except (pa.ArrowException, OSError) as error:
        raise GolddiffError(f"{file} is not a readable parquet file ({str(error)[:120]})") from error
    encoded = [
        field.name for field in schema
        if pa.types.is_binary(field.type)
        or (pa.types.is_struct(field.type) and field.type.get_field_index("bytes") >= 0)
    ]  # fmt: skip
    if len(encoded) != 1:
        found = ", ".join(f"{f.name} ({f.type})" for f in schema)
        raise GolddiffError(f"{file} has {len(encoded)} columns of picture bytes, not one: {found}")
    label = next((name for name in LABEL_COLUMNS if name in schema.names), None)
    return encoded[0], label


def _labels(file: Path, column: str | None, count: int) -> np.ndarray:
    if column is None:
        return np.full(count, NO_LABEL, dtype=np.int64)
    values = _read(file, column)
    if not pa.types.is_integer(values.type):
        raise GolddiffError(f"{file}: labels in column {column} are {values.type}, not integers")
    return values.fill_null(NO_LABEL).to_numpy().astype(np.int64)


def _classes(file: Path, column: str | None) -> tuple[str, ...]:
    """Class names from the metadata that Hugging Face `datasets` writes into the schema."""
    metadata = pq.read_schema(file).metadata or {}
    try:
        features = json.loads(metadata.get(b"huggingface", b"{}"))["info"]["features"]
        return tuple(str(name) for name in features[column]["names"])
    except (KeyError, TypeError, ValueError):
        return ()
