"""Pictures in arrays: `.npy`, `.npz`, and arrays, tensors or data sets at hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ..errors import GolddiffError
from ..foreign import Npz, regular
from ..memory import require
from .core import NO_LABEL, ROW_MEMORY, Images, as_labels

__all__ = ["from_array", "from_dataset", "read_numpy"]

CHANNELS = (1, 3, 4)
IMAGE_KEYS = ("arr_0", "images", "x")
LABEL_KEYS = ("arr_1", "labels")
LAYOUTS = ("NHWC", "NCHW", "NHW")


def from_array(array: Any, labels: Any = None, layout: str | None = None, classes: tuple[str, ...] = ()) -> Images:
    """Pictures held in memory.

    Arguments:
        array: uint8 or float32 / float64, `(N, H, W, C)`, `(N, C, H, W)` or `(N, H, W)`.
        labels: integers `(N,)`, -1 for none.
        layout: which of `NHWC`, `NCHW`, `NHW` it is; found from the shape when None.

    Raises:
        GolddiffError: other types, non-finite floats, a shape that does not tell the channel axis.
    """
    array = np.asarray(array)
    layout = layout or guess_layout(array.shape)
    if layout not in LAYOUTS or len(layout) != array.ndim:
        raise GolddiffError(
            f"layout {layout} does not fit an array of shape {array.shape}: use --layout NHWC, NCHW or NHW"
        )
    if 0 in array.shape[1:]:
        raise GolddiffError(f"pictures of shape {array.shape[1:]}: they need at least one pixel")
    require(ROW_MEMORY * len(array), f"a list of {len(array)} pictures", "take fewer")
    check_pixels(array)
    if layout == "NHW":
        array = array[:, None]
    elif layout == "NHWC":
        array = np.moveaxis(array, 3, 1)
    return Images(
        shape=(array.shape[1], array.shape[2], array.shape[3]),
        dtype=array.dtype,
        labels=_labels(labels, len(array)),
        ids=[str(i) for i in range(len(array))],
        read=lambda start, stop: array[start:stop],
        classes=classes,
    )


def from_dataset(dataset: Any) -> Images:
    """Pictures of a map-style data set (`len(d)`, `d[i]`), such as any `torch.utils.data.Dataset`.

    An item is a picture, or a tuple that begins with picture and label. A picture is a PIL image, a uint8 array
    or tensor, or floats in [-1, 1]; `(H, W, C)`, `(C, H, W)` or `(H, W)`. Items are read twice: once
    for the labels, once for the pixels.
    """

    def item(i: int) -> tuple[np.ndarray, int]:
        try:
            value = dataset[i]
        except Exception as error:  # whatever a foreign data set raises
            raise GolddiffError(f"item {i} of the data set cannot be read ({type(error).__name__}: {error})") from error
        picture, label = (
            (value[0], value[1]) if isinstance(value, tuple | list) and len(value) > 1 else (value, NO_LABEL)
        )
        picture = picture[0] if isinstance(picture, tuple | list) else picture
        if isinstance(picture, Image.Image):
            picture = picture.convert("L" if picture.mode in ("1", "L", "LA") else "RGB")
        if np.ndim(label) or np.asarray(label).dtype.kind not in "iu":
            raise GolddiffError(f"item {i} has the label {label!r}: give a whole number")
        array = np.asarray(picture)
        if array.ndim == 2:
            return array[None], int(label)
        layout = guess_layout((1, *array.shape))
        return (np.moveaxis(array, 2, 0) if layout == "NHWC" else array), int(label)

    count = len(dataset)
    if count == 0:
        raise GolddiffError("the data set is empty: a bank needs at least one picture")
    first, _ = item(0)
    check_pixels(first[None])
    labels = as_labels([item(i)[1] for i in range(count)])

    def read(start: int, stop: int) -> np.ndarray:
        block = np.empty((stop - start, *first.shape), dtype=first.dtype)
        for i in range(start, stop):
            picture, _ = item(i)
            if picture.shape != first.shape or picture.dtype != first.dtype:
                raise GolddiffError(
                    f"item {i} is {picture.dtype} {picture.shape}, item 0 is {first.dtype} {first.shape}: "
                    "bring them to one shape and type"
                )
            block[i - start] = picture
        check_pixels(block, start)
        return block

    shape = (first.shape[0], first.shape[1], first.shape[2])
    return Images(shape, first.dtype, labels, [str(i) for i in range(count)], read)


def check_pixels(array: np.ndarray, first: int = 0) -> None:
    """Refuses what cannot be pixels, with the conversion that is missing; `first` is the number of the first row."""
    if array.dtype not in (np.uint8, np.float32, np.float64):
        raise GolddiffError(f"pixels of type {array.dtype}: convert them to uint8 (0 to 255) or to float32 in [-1, 1]")
    if array.dtype != np.uint8 and array.size:
        finite = np.isfinite(array).reshape(len(array), -1).all(axis=1)
        if not finite.all():
            raise GolddiffError(f"row {first + int(np.argmin(finite))} has NaN or infinite pixels: remove or mend it")
        if array.size and array.max() > 2 and array.min() >= 0:
            raise GolddiffError(f"float pixels from {array.min():.4g} to {array.max():.4g}: bring them to [-1, 1]")


def guess_layout(shape: tuple[int, ...]) -> str:
    """`NHWC`, `NCHW` or `NHW` from a shape; an error naming `--layout` when the shape does not tell."""
    ambiguous = GolddiffError(
        f"the channel axis of an array of shape {shape} is not clear: say --layout NHWC, NCHW or NHW"
    )
    if len(shape) == 3:
        if shape[1] in CHANNELS or shape[2] in CHANNELS:
            raise ambiguous
        return "NHW"
    if len(shape) != 4:
        raise GolddiffError(f"an array of shape {shape} is not (N, H, W, C), (N, C, H, W) or (N, H, W)")
    first, last = shape[1] in CHANNELS, shape[3] in CHANNELS
    if first and last:  # the last axis is preferred where only that makes the pictures square
        if shape[1] == shape[2] != shape[3]:
            return "NHWC"
        raise ambiguous
    if last:
        return "NHWC"
    if first:
        return "NCHW"
    raise GolddiffError(f"no axis of size 1, 3 or 4 in an array of shape {shape}: say --layout NHWC or NCHW")


def read_numpy(path: Path, layout: str | None = None) -> Images:
    """A `.npy` file of pictures, or a `.npz` with `arr_0`, `images` or `x` and labels in `arr_1` or `labels`."""
    with regular(path).open("rb") as file:
        packed = file.read(2) == b"PK"
    if not packed:
        try:
            return from_array(np.lib.format.open_memmap(path, "r"), layout=layout)
        except (GolddiffError, PermissionError):
            raise
        except Exception as error:  # a file that is none fails in any way
            raise GolddiffError(f"{path} is not a readable NumPy file of plain numbers: save it again") from error
    with Npz(path) as loaded:
        key = next((k for k in IMAGE_KEYS if k in loaded.files), None)
        if key is None:
            raise GolddiffError(
                f"{path} has the arrays {', '.join(loaded.files[:9]) or '(none)'}: name the pictures arr_0, images or x"
            )
        label_key = next((k for k in LABEL_KEYS if k in loaded.files), None)
        return from_array(loaded[key], loaded[label_key] if label_key else None, layout)


def _labels(labels: Any, count: int) -> np.ndarray:
    if labels is None:
        return np.full(count, NO_LABEL, dtype=np.int64)
    labels = np.asarray(labels)
    if labels.ndim == 2 and labels.shape[1] == 1:  # CIFAR-10 as some tools save it
        labels = labels[:, 0]
    if labels.shape != (count,):
        raise GolddiffError(f"labels of shape {labels.shape} for {count} pictures: give one integer each")
    return as_labels(labels)
