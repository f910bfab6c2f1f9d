"""Which rows made an image or a pixel, as the page shows it."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from ..attribution import attribute
from ..bank import Bank
from ..posterior import Posterior
from .models import Source, Sources
from .show import encoded, png

__all__ = ["at_once", "in_turns"]

LISTED = 24
PRODUCTS = 1e10  # multiplications between two turns: some tenths of a second
MAP_PRODUCTS = 3e10  # that a first source map may cost
OTHER, SHADES = 90, 90  # rows beyond the colours are grey, each in a shade of its own or nearly so
COLOURS = (
    (230, 159, 0), (86, 180, 233), (0, 158, 115), (240, 228, 66), (0, 114, 178), (213, 94, 0), (204, 121, 167),
    (120, 94, 240), (170, 220, 130), (150, 75, 40), (255, 176, 190), (60, 60, 60),
)  # fmt: skip
"""Okabe and Ito's colours, which people of any colour vision tell apart, and a few more."""


class Tally:
    """Adds up attributions of pixels, `(H, W)` bool: how much each row has in all, and which has most at each pixel."""

    def __init__(self, bank: Bank, posterior: Posterior, chosen: Tensor) -> None:
        self.bank, self.posterior, self.chosen = bank, posterior, chosen
        self.whole = posterior.log_evidence.ndim == 1  # all pixels have the same weights
        self.shares = torch.zeros(len(bank.pixels), dtype=torch.float64, device=bank.device)
        self.source = torch.full(bank.shape, -1, device=bank.device)
        self.heaviest = torch.zeros(bank.shape, dtype=torch.float64, device=bank.device)
        self.count = 0

    def add(self, chosen: Tensor) -> None:
        """Adds the weights of some more pixels."""
        found = attribute(self.bank, self.posterior, 0, [0] if self.whole else chosen)
        self.shares[found.rows] += found.shares * len(found.pixels)
        self.count += len(found.pixels)
        if self.whole:
            self.source[:], self.heaviest[:] = found.rows[0], found.shares[0]
        else:
            self.source = torch.maximum(self.source, found.source)
            self.heaviest += found.source_weight

    def answer(self, of: int) -> Sources:
        """The rows with the largest shares, of a region of so many pixels."""
        shares = self.shares / max(1, self.count)
        order = shares.argsort(descending=True, stable=True)[:LISTED]
        rows = [self.listed(row, shares) for row in order.tolist() if shares[row] > 0]
        return Sources(
            rows=rows,
            total=int((shares > 0).sum()),
            coverage=math.fsum(source.share for source in rows),
            pixels=of if self.whole else int(self.chosen.sum()),
            of=of,
        )

    def listed(self, row: int, shares: Tensor) -> Source:
        return Source(row=row, label=int(self.bank.labels[row]), share=float(shares[row]))

    def paint(self, answer: Sources, stride: int) -> None:
        """Puts the source map into an answer, and the rows that dominate much of it."""
        best = self.heaviest.argmax(0, keepdim=True)
        every = self.source.gather(0, best)[0].cpu().numpy()
        source = every[stride // 2 :: stride, stride // 2 :: stride]
        rows, counts = np.unique(source, return_counts=True)
        areas = dict(zip(rows.tolist(), (counts / source.size).tolist(), strict=True))
        known = {listed.row: listed for listed in answer.rows}
        picture = np.repeat(OTHER + source[:, :, None] * 37 % SHADES, 3, 2).astype(np.uint8)
        for row, colour in zip(rows[np.lexsort((rows, -counts))].tolist(), COLOURS, strict=False):
            if row not in known:
                known[row] = self.listed(row, self.shares / self.count)
            known[row].colour = "#{:02x}{:02x}{:02x}".format(*colour)
            picture[source == row] = colour
        answer.rows = sorted(known.values(), key=lambda listed: -listed.share)
        answer.coverage = math.fsum(listed.share for listed in answer.rows)
        for listed in answer.rows:
            listed.area = areas.get(listed.row, 0.0)
        answer.map = encoded(png(enlarged(picture, stride, *self.bank.shape[1:])))


def enlarged(picture: np.ndarray, stride: int, height: int, width: int) -> np.ndarray:
    """A picture of every so manieth pixel at full size."""
    full = picture.repeat(stride, 0).repeat(stride, 1)[:height, :width]
    missing = [(0, height - full.shape[0]), (0, width - full.shape[1]), (0, 0)]
    return np.pad(full, missing, "edge")


def cost_of_pixel(posterior: Posterior) -> float:
    """Multiplications that the weights of one pixel take, all channels together."""
    if posterior.support is None or posterior.log_evidence.ndim == 1:
        return 0.0
    return float(posterior.support.size * posterior.mean[0].numel() * posterior.mean.shape[1])


def grid_of(posterior: Posterior, products: float) -> tuple[Tensor, int]:
    """Every so manieth pixel, `(H, W)` bool, such that their weights cost little; and that number, a power of two."""
    height, width = posterior.mean.shape[2:]
    stride = 1
    while stride < min(height, width) and cost_of_pixel(posterior) * height * width > products * stride**2:
        stride *= 2
    grid = torch.zeros(height, width, dtype=torch.bool)
    grid[stride // 2 :: stride, stride // 2 :: stride] = True
    return grid, stride


def at_once(bank: Bank, posterior: Posterior, pixel: tuple[int, int] | None = None, with_map: bool = False) -> Sources:
    """The rows that made a pixel (y, x), by their weights there, the mean over the channels; or those that made an
    image, by their share of the weights of a grid of pixels."""
    height, width = posterior.mean.shape[2:]
    if pixel is None:
        chosen, stride = grid_of(posterior, MAP_PRODUCTS if with_map else PRODUCTS)
    else:
        chosen, stride = torch.zeros(height, width, dtype=torch.bool), 1
        chosen[pixel] = True
    tally = Tally(bank, posterior, chosen)
    tally.add(chosen)
    answer = tally.answer(height * width if pixel is None else 1)
    if pixel is not None:
        answer.value = posterior.mean[0, :, pixel[0], pixel[1]].tolist()
    elif with_map:
        tally.paint(answer, stride)
    return answer


def in_turns(bank: Bank, posterior: Posterior) -> Iterator[Sources | None]:
    """The rows that made an image, by their share of the weights of all pixels, with a map; None until it is there."""
    height, width = posterior.mean.shape[2:]
    every = torch.ones(height, width, dtype=torch.bool)
    tally = Tally(bank, posterior, every)
    together = max(1, int(PRODUCTS / max(cost_of_pixel(posterior), 1.0)))
    for part in every.flatten().nonzero()[:, 0].split(height * width if tally.whole else together):
        chosen = torch.zeros(height * width, dtype=torch.bool)
        chosen[part] = True
        tally.add(chosen.reshape(height, width))
        yield None
    answer = tally.answer(height * width)
    tally.paint(answer, 1)
    yield answer
