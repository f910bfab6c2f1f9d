"""The IDX format of MNIST (`train-images-idx3-ubyte`, gzipped or not)."""

from __future__ import annotations

import gzip
import math
import zlib
from pathlib import Path

import numpy as np

from ..errors import GolddiffError
from ..foreign import INFLATED, regular
from ..memory import require
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
    pictures = read_array(path, 3)
    beside = path.with_name(path.name.replace("-images", "-labels").replace("idx3", "idx1"))
    other = beside.with_suffix("") if beside.suffix == ".gz" else beside.with_name(beside.name + ".gz")
    labels = next((read_array(p, 1) for p in (beside, other) if p != path and p.exists()), None)
    return from_array(pictures, labels, layout="NHW")


def read_array(path: Path, dimensions: int) -> np.ndarray:
    """The uint8 array of an IDX file. The sizes in its header are checked against the bytes that follow."""
    try:
        with regular(path).open("rb") as raw:
            length, packed = raw.seek(0, 2), raw.seek(0) == 0 and raw.read(2) == b"\x1f\x8b"
            raw.seek(0)
            file = gzip.GzipFile(fileobj=raw) if packed else raw
            shape = _shape(path, file.read(4 + 4 * dimensions), dimensions)
            size = math.prod(shape)
            announced = f"{path} announces {' x '.join(map(str, shape))} bytes"
            if packed and size > INFLATED * length:
                raise GolddiffError(f"{announced}, more than its {length} can be packed from: fetch it again")
            require(2 * min(size, length * (INFLATED if packed else 1)), str(path), "take a smaller file")
            data = file.read(size + 1 if packed else length)
    except (OSError, EOFError, zlib.error) as error:
        raise GolddiffError(f"{path} cannot be read ({error}): fetch it again") from error
    if len(data) != size:
        holds = f"more than {size}" if packed and len(data) > size else len(data)
        raise GolddiffError(f"{announced} and holds {holds}: fetch it again")
    return np.frombuffer(data, dtype=np.uint8).reshape(shape)


def _shape(path: Path, head: bytes, dimensions: int) -> tuple[int, ...]:
    if len(head) < 4 or head[:2] != b"\x00\x00" or head[2] != UBYTE:
        raise GolddiffError(f"{path} is not an IDX file of bytes: its header is {head[:4].hex() or 'empty'}")
    if head[3] != dimensions:
        kind = "pictures: give the idx3 file" if dimensions == 3 else "labels: give the idx1 file"
        raise GolddiffError(f"{path} holds {head[3]} dimensions, not {kind}")
    if len(head) < 4 + 4 * dimensions:
        raise GolddiffError(f"{path} announces {dimensions} dimensions and ends before their sizes: fetch it again")
    return tuple(int(n) for n in np.frombuffer(head[4:], dtype=">u4"))
