"""Pictures of a bank as PNG files."""

from __future__ import annotations

import base64
import io

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..bank import Bank
from ..errors import GolddiffError

__all__ = ["Screen", "encoded", "png"]

PROBED = 256  # rows whose range says how floats are shown
THUMB = 128  # larger pictures are made smaller for lists


class Screen:
    """How the images of a bank become pictures.

    uint8 banks of 1, 3 or 4 channels are shown as they are. Of others (floats, latents) the first channels are shown,
    from the least to the largest value of some rows.

    Attributes:
        note: what a viewer has to know of this; empty if nothing.
    """

    def __init__(self, bank: Bank) -> None:
        channels = bank.shape[0]
        if bank.is_uint8 and channels == 2:
            raise GolddiffError("this bank has 2 channels, which are no picture: build it from 1, 3 or 4")
        self.bank, self.low, self.high, self.note = bank, -1.0, 1.0, ""
        self.channels = channels if channels in (1, 3) or (bank.is_uint8 and channels == 4) else min(channels, 3)
        if self.channels == 2:
            self.channels = 1
        if not bank.is_uint8:
            some = bank.images(slice(0, PROBED))[:, : self.channels]
            low, high = float(some.min()), float(some.max())
            if low < -1 or high > 1:
                self.low, self.high = low, max(high, low + 1e-6)
        shown = "" if self.channels == channels else f"channel 1 to {self.channels} of {channels}"
        scaled = "" if (self.low, self.high) == (-1, 1) else f"values from {self.low:.3g} to {self.high:.3g}"
        self.note = ", ".join(part for part in (shown, scaled) if part)

    def pixels(self, image: Tensor) -> np.ndarray:
        """An image `(C, H, W)` as `(H, W, channels)` uint8; what lies outside the range is clipped."""
        shown = image[: self.channels].detach().cpu().double()
        scaled = ((shown - self.low) * (255 / (self.high - self.low))).round().clamp(0, 255)
        return scaled.to(torch.uint8).permute(1, 2, 0).numpy()

    def picture(self, image: Tensor) -> str:
        """An image `(C, H, W)` as a PNG, in base64."""
        return encoded(png(self.pixels(image)))

    def thumb(self, row: int) -> bytes:
        """A row as a PNG, made smaller if it is large."""
        return png(self.pixels(self.bank.images(torch.tensor([row], device=self.bank.device))[0]), THUMB)


def png(pixels: np.ndarray, most: int | None = None) -> bytes:
    """`(H, W, 1, 3 or 4)` uint8 as a PNG, with sides of at most `most`."""
    image = Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels)
    if most and max(image.size) > most:
        image.thumbnail((most, most), Image.Resampling.BOX)
    out = io.BytesIO()
    image.save(out, format="PNG")
    return out.getvalue()


def encoded(data: bytes) -> str:
    return base64.b64encode(data).decode()
