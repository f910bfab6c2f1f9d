"""Pictures for people: 8-bit export and grids."""

from __future__ import annotations

import math
import os
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from .errors import GolddiffError

__all__ = ["grid", "save_png", "to_uint8"]

TILE = 96  # small pictures are enlarged to about this side
PAPER = 255


def to_uint8(images: Tensor) -> np.ndarray:
    """`(N, C, H, W)` in [-1, 1] -> `(N, H, W, C)` uint8; values outside are clipped."""
    scaled = ((images.detach().cpu().double() + 1) * 127.5).round().clamp(0, 255)
    return scaled.to(torch.uint8).permute(0, 2, 3, 1).numpy()


def grid(pictures: np.ndarray, columns: int | None = None, gap: int = 4) -> Image.Image:
    """Pictures side by side on white; small ones are enlarged by a whole factor, without smoothing.

    Arguments:
        pictures: `(N, H, W, C)` uint8 with 1, 3 or 4 channels.
        columns: how many in a row; as square as possible if None.
        gap: pixels between pictures.
    """
    count, height, width, channels = pictures.shape
    columns = columns or math.ceil(math.sqrt(count))
    rows = math.ceil(count / columns)
    zoom = math.ceil(TILE / max(height, width))
    big = pictures.repeat(zoom, axis=1).repeat(zoom, axis=2)
    height, width = height * zoom + gap, width * zoom + gap
    sheet = np.full((rows * height + gap, columns * width + gap, channels), PAPER, dtype=np.uint8)
    for i, picture in enumerate(big):
        top, left = gap + i // columns * height, gap + i % columns * width
        sheet[top : top + height - gap, left : left + width - gap] = picture
    return _image(sheet)


def save_png(image: Image.Image | np.ndarray, path: Path) -> None:
    """Writes a PNG; it appears under its name only when it is complete. Arrays are `(H, W, C)` uint8."""
    part = path.with_name(f".{os.getpid()}-{path.name}")
    (image if isinstance(image, Image.Image) else _image(image)).save(part, format="PNG")
    part.replace(path)


def _image(array: np.ndarray) -> Image.Image:
    if array.shape[2] not in (1, 3, 4):
        raise GolddiffError(f"{array.shape[2]} channels are no picture: 1, 3 or 4 can be shown")
    return Image.fromarray(array[:, :, 0] if array.shape[2] == 1 else array)
