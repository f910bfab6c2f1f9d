"""Pictures for people: 8-bit export, labelled grids, trajectories, nearest training images."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from .errors import GolddiffError
from .files import replacing

__all__ = ["framed", "grid", "rgb", "save_png", "to_uint8"]

TILE = 96  # small pictures are enlarged to about this side
PAPER, INK = 255, 60
FRAME = 3
TEXT = 15  # height of letters in pixels


def to_uint8(images: Tensor) -> np.ndarray:
    """`(N, C, H, W)` in [-1, 1] -> `(N, H, W, C)` uint8; values outside are clipped."""
    scaled = ((images.detach().cpu().double() + 1) * 127.5).round().clamp(0, 255)
    return scaled.to(torch.uint8).permute(0, 2, 3, 1).numpy()


def rgb(picture: np.ndarray) -> np.ndarray:
    """`(H, W, C)` uint8 with 1, 3 or 4 channels -> `(H, W, 3)`; transparency is laid on white."""
    if picture.shape[2] != 4:
        return np.asarray(_image(picture).convert("RGB"))
    image = _image(picture)
    return np.asarray(Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB"))


def framed(picture: np.ndarray, colour: np.ndarray | None = None) -> np.ndarray:
    """`(H, W, 3)` uint8, enlarged as in `grid`, with a frame of some colour (none: white) around it."""
    zoom = math.ceil(TILE / max(picture.shape[:2]))
    big = picture.repeat(zoom, axis=0).repeat(zoom, axis=1)
    frame = np.empty((big.shape[0] + 2 * FRAME, big.shape[1] + 2 * FRAME, 3), np.uint8)
    frame[:] = PAPER if colour is None else colour
    frame[FRAME:-FRAME, FRAME:-FRAME] = big
    return frame


def grid(
    pictures: np.ndarray,
    columns: int | None = None,
    *,
    rows: Sequence[str] = (),
    heads: Sequence[str] = (),
    captions: Sequence[str] = (),
    gap: int = 4,
) -> Image.Image:
    """Pictures side by side on white; small ones are enlarged by a whole factor, without smoothing.

    Arguments:
        pictures: `(N, H, W, C)` uint8 with 1, 3 or 4 channels.
        columns: how many in a row; if None, nearly square, and without a gap in the last row if that is possible.
        rows: labels to the left of the rows. heads: labels above the columns. captions: one below each picture.
        gap: pixels between pictures.
    """
    count, height, width, channels = pictures.shape
    columns = columns or _columns(count)
    zoom = math.ceil(TILE / max(height, width))
    big = pictures.repeat(zoom, axis=1).repeat(zoom, axis=2)
    font = ImageFont.load_default(TEXT)
    left = gap + (max(math.ceil(font.getlength(text)) for text in rows) + 2 * gap if rows else 0)
    top = gap + (TEXT + gap if heads else 0)
    step_x, step_y = width * zoom + gap, height * zoom + gap + (TEXT + gap if captions else 0)
    size = (left + columns * step_x, top + math.ceil(count / columns) * step_y)
    sheet = Image.new("L" if channels == 1 and not (rows or heads or captions) else "RGB", size, "white")
    if channels == 4:
        sheet = sheet.convert("RGBA")
    draw = ImageDraw.Draw(sheet)
    ink = (INK,) * 3
    for i, picture in enumerate(big):
        x, y = left + i % columns * step_x, top + i // columns * step_y
        sheet.paste(_image(picture).convert(sheet.mode), (x, y))
        if captions:
            draw.text((x + width * zoom // 2, y + height * zoom + gap // 2), captions[i], ink, font, anchor="mt")
    for i, text in enumerate(rows):
        draw.text((left - 2 * gap, top + i * step_y + height * zoom // 2), text, ink, font, anchor="rm")
    for i, text in enumerate(heads):
        draw.text((left + i * step_x + width * zoom // 2, gap), text, ink, font, anchor="mt")
    return sheet


def _columns(count: int) -> int:
    square = math.ceil(math.sqrt(count))
    return next((n for n in range(square, 2 * square) if count % n == 0), square)


def save_png(image: Image.Image | np.ndarray, path: Path) -> None:
    """Writes a PNG; it appears under its name only when it is complete. Arrays are `(H, W, C)` uint8."""
    with replacing(path) as part:
        (image if isinstance(image, Image.Image) else _image(image)).save(part, format="PNG")


def _image(array: np.ndarray) -> Image.Image:
    if array.shape[2] not in (1, 3, 4):
        raise GolddiffError(f"{array.shape[2]} channels are no picture: 1, 3 or 4 can be shown")
    return Image.fromarray(array[:, :, 0] if array.shape[2] == 1 else array)
