"""The IDX format of MNIST (`train-images-idx3-ubyte`, gzipped or not)."""

from __future__ import annotations

import gzip
import zlib
from pathlib import Path

import numpy as np

from ..errors import GolddiffError
from .arrays import from_array
from .core import Images

__all__ = ["find_idx", "read_idx"]

UBYTE = 0x08
PREFIXES = {"train": "train", "test": "t10k"}


def find_idx(folder: Path, split: str) -> Path | None:
    """The file of pictures of a split in a folder of MNIST's layout, or None if there are no IDX files."""
    files = sorted(folder.glob("*-images-idx3-ubyte*")) + sorted(folder.glob("*-images.idx3-ubyte*"))
    if not files:
        return None
    prefix = PREFIXES.get(split, split)
    for file in files:
        if file.name.startswith(f"{prefix}-images"):
            return file
    raise GolddiffError(f"{folder} has no split '{split}': it holds {', '.join(f.name for f in files)}")


def read_idx(path: Path) -> Images:
    """Pictures of an IDX file of three dimensions, with the labels of the file beside it."""
    pictures = read_array(path)
    if pictures.ndim != 3:
        raise GolddiffError(f"{path} holds {pictures.ndim} dimensions, not pictures: give the idx3 file")
    beside = path.with_name(path.name.replace("-images", "-labels").replace("idx3", "idx1"))
    other = beside.with_suffix("") if beside.suffix == ".gz" else beside.with_name(beside.name + ".gz")
    labels = next((read_array(p) for p in (beside, other) if p != path and p.exists()), None)
    return from_array(pictures, None if labels is None else labels.astype(np.int64), layout="NHW")


def read_array(path: Path) -> np.ndarray:
    """The uint8 array of an IDX file. The sizes in its header are checked against the bytes that follow."""
    try:
        data = path.read_bytes()
        if data[:2] == b"\x1f\x8b":
            data = gzip.decompress(data)
    except (OSError, EOFError, zlib.error) as error:
        raise GolddiffError(f"{path} cannot be read ({error}): fetch it again") from error
    if len(data) < 4 or data[:2] != b"\x00\x00" or data[2] != UBYTE:
        raise GolddiffError(f"{path} is not an IDX file of bytes: its header is {data[:4].hex() or 'empty'}")
    start = 4 + 4 * data[3]
    if len(data) < start or data[3] == 0:
        raise GolddiffError(f"{path} announces {data[3]} dimensions and ends before their sizes: fetch it again")
    shape = tuple(int(n) for n in np.frombuffer(data[4:start], dtype=">u4"))
    size = 1
    for n in shape:
        size *= n
    if len(data) - start != size:
        raise GolddiffError(
            f"{path} announces {' x '.join(map(str, shape))} bytes and holds {len(data) - start}: fetch it again"
        )
    return np.frombuffer(data, dtype=np.uint8, offset=start).reshape(shape)
