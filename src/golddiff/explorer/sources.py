"""Which rows made an image or a pixel, as the page shows it."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from ..attribution import Tally, attribute
from ..bank import Bank
from ..posterior import Posterior
from .models import Source, Sources
from .show import encoded, png

__all__ = ["image_of", "pixel_of"]

LISTED = 24
TURN = 2e9  # multiplications between two turns: some tenths of a second
FEW = 1e10  # those that a first answer may cost; it is of some of the pixels
READING = 125  # reading a number of a row costs as much as so many multiplications
OTHER, SHADES = 90, 90  # rows beyond the colours are grey, each in a shade of its own or nearly so
COLOURS = (
    (230, 159, 0), (86, 180, 233), (0, 158, 115), (240, 228, 66), (0, 114, 178), (213, 94, 0), (204, 121, 167),
    (120, 94, 240), (170, 220, 130), (150, 75, 40), (255, 176, 190), (60, 60, 60),
)  # fmt: skip
"""Okabe and Ito's colours, which people of any colour vision tell apart, and a few more."""


class Answering:
    """Adds up the weights of pixels to an answer."""

    def __init__(self, bank: Bank, posterior: Posterior) -> None:
        self.bank, self.posterior, self.tally = bank, posterior, Tally(bank)
        self.whole = posterior.log_evidence.ndim == 1  # all pixels have the same weights

    def add(self, chosen: Tensor) -> None:
        """Adds the weights of some more pixels, flat indices in all channels."""
        for piece in self.posterior.pieces(0, chosen[:1] if self.whole else chosen):
            self.tally.add(piece, everywhere=self.whole)

    def answer(self, of: int) -> Sources:
        """The rows with the largest shares, of a region of so many pixels."""
        found, shares = self.tally.ordered()
        rows = [self.listed(row, share) for row, share in zip(found[:LISTED].tolist(), shares.tolist(), strict=False)]
        return Sources(
            rows=rows,
            total=len(found),
            coverage=math.fsum(source.share for source in rows),
            pixels=of if self.whole else self.tally.count // self.bank.shape[0],
            of=of,
        )

    def listed(self, row: int, share: float) -> Source:
        return Source(row=row, label=int(self.bank.labels[row]), share=share)

    def paint(self, answer: Sources) -> None:
        """Puts the source map into an answer, and the rows that dominate much of it."""
        best = self.tally.heaviest.reshape(self.bank.shape).argmax(0, keepdim=True)
        source = self.tally.source.reshape(self.bank.shape).gather(0, best)[0].cpu().numpy()
        rows, counts = np.unique(source, return_counts=True)
        areas = dict(zip(rows.tolist(), (counts / source.size).tolist(), strict=True))
        known = {listed.row: listed for listed in answer.rows}
        picture = np.repeat(OTHER + source[:, :, None] * 37 % SHADES, 3, 2).astype(np.uint8)
        for row, colour in zip(rows[np.lexsort((rows, -counts))].tolist(), COLOURS, strict=False):
            if row not in known:
                known[row] = self.listed(row, float(self.tally.totals[row]) / self.tally.count)
            known[row].colour = "#{:02x}{:02x}{:02x}".format(*colour)
            picture[source == row] = colour
        answer.rows = sorted(known.values(), key=lambda listed: -listed.share)
        answer.coverage = math.fsum(listed.share for listed in answer.rows)
        for listed in answer.rows:
            listed.area = areas.get(listed.row, 0.0)
        answer.map = encoded(png(picture))


def pixel_of(bank: Bank, posterior: Posterior, y: int, x: int) -> Sources:
    """The rows that made a pixel, by their weights there: the mean over the channels."""
    found = attribute(bank, posterior, 0, (y, x, y + 1, x + 1))
    rows = [
        Source(row=row, label=int(bank.labels[row]), share=share)
        for row, share in zip(found.rows[:LISTED].tolist(), found.shares[:LISTED].tolist(), strict=True)
    ]
    value = posterior.mean[0, :, y, x].tolist()
    return Sources(rows=rows, total=len(found.rows), coverage=found.coverage(LISTED), pixels=1, of=1, value=value)


def image_of(bank: Bank, posterior: Posterior, every: bool) -> Iterator[Sources | None]:
    """The rows that made an image, by their share of the weights of its pixels; None until it is there.

    Arguments:
        every: of all pixels, with a map; otherwise of as many as do not take long.
    """
    answering = Answering(bank, posterior)
    parts = parts_of(posterior, bank, TURN)
    if not every:
        few = max(1, int(FEW / max(products_of(posterior, bank, len(part)) for part in parts)))
        parts = parts[:: math.ceil(len(parts) / few)]
    for part in parts:
        answering.add(part)
        yield None
    answer = answering.answer(bank.shape[1] * bank.shape[2])
    if every:
        answering.paint(answer)
    yield answer


def products_of(posterior: Posterior, bank: Bank, numbers: int) -> float:
    """About how many multiplications the weights of so many numbers of one tile cost."""
    if posterior.support is None or posterior.log_evidence.ndim == 1:
        return 1.0
    return float(posterior.support.size * bank.D) * (READING + numbers)


def parts_of(posterior: Posterior, bank: Bank, products: float) -> list[Tensor]:
    """All pixels, as flat indices in all channels, in parts whose weights take about so many multiplications each.

    Pixels of one tile read the same rows, so they go together; parts are spread over the image.
    """
    channels, height, width = bank.shape
    plane = height * width
    everything = torch.arange(plane)
    support = posterior.support
    if support is None or posterior.log_evidence.ndim == 1:
        return [torch.arange(bank.D)]
    read = support.size * bank.D
    together = max(1, int((max(products / read, 5 * READING) - READING) / channels))  # reading is a fifth at most
    if support.tiles is None:
        count = math.ceil(plane / together)
        planes = [everything[first::count] for first in range(count)]
    else:
        tiles = support.tiles[:plane].cpu()
        planes = [everything[tiles == tile] for tile in tiles.unique().tolist()]
    offsets = torch.arange(channels)[:, None] * plane
    return [(offsets + part).flatten() for part in planes]
