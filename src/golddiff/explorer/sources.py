"""Which rows made an image or a pixel, as the page shows it."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..bank import Bank
from ..posterior import Posterior
from .models import Source, Sources
from .show import encoded, png

__all__ = ["at_pixel", "of_image"]

LISTED = 24
PRODUCTS = {False: 1e10, True: 1.5e11}  # multiplications that an answer may cost, without and with a map
WEIGHTS = 2**25  # numbers that are held at once
OTHER = (140, 140, 140)
COLOURS = (
    (230, 159, 0), (86, 180, 233), (0, 158, 115), (240, 228, 66), (0, 114, 178), (213, 94, 0), (204, 121, 167),
    (120, 94, 240), (170, 220, 130), (150, 75, 40), (255, 176, 190), (60, 60, 60),
)  # fmt: skip
"""Okabe and Ito's colours, which people of any colour vision tell apart, and a few more."""


def _listed(bank: Bank, rows: Tensor, shares: Tensor) -> list[Source]:
    return [
        Source(row=row, label=label, share=share)
        for row, label, share in zip(
            rows[:LISTED].tolist(), bank.labels[rows[:LISTED]].tolist(), shares[:LISTED].tolist(), strict=True
        )
        if share > 0
    ]


def at_pixel(bank: Bank, posterior: Posterior, y: int, x: int) -> Sources:
    """The rows that made a pixel, by their weights there (the mean over the channels)."""
    found = attribute(bank, posterior, 0, (y, x, y + 1, x + 1))
    listed = _listed(bank, found.rows, found.shares)
    return Sources(
        rows=listed,
        total=int((found.shares > 0).sum()),
        coverage=math.fsum(source.share for source in listed),
        pixels=1,
        of=1,
        value=posterior.mean[0, :, y, x].tolist(),
    )


def stride_of(posterior: Posterior, with_map: bool) -> int:
    """Every how many pixels, down and across, weights are taken, so that it does not take long."""
    _, height, width = posterior.mean.shape[1:]
    if posterior.support is None or posterior.log_evidence.ndim == 1:
        return 1
    rows, pixels = posterior.support.size * posterior.support.tile_count, posterior.mean[0].numel()
    stride = 1
    while stride < min(height, width):
        taken = pixels / stride**2
        if posterior.support.size * pixels * taken <= PRODUCTS[with_map] and rows * taken <= WEIGHTS * 8:
            break
        stride *= 2
    return stride


def of_image(bank: Bank, posterior: Posterior, with_map: bool) -> Sources:
    """The rows that made an image, by their share of the weights of all pixels (or of a grid of them)."""
    height, width = posterior.mean.shape[2:]
    stride = stride_of(posterior, with_map)
    grid = torch.zeros(height, width, dtype=torch.bool)
    grid[stride // 2 :: stride, stride // 2 :: stride] = True
    found = attribute(bank, posterior, 0, None if stride == 1 else grid)
    listed = _listed(bank, found.rows, found.shares)
    answer = Sources(
        rows=listed,
        total=int((found.shares > 0).sum()),
        coverage=math.fsum(source.share for source in listed),
        pixels=int(grid.sum()),
        of=height * width,
    )
    if with_map:
        best = found.source_weight.argmax(0, keepdim=True)
        source = found.source.gather(0, best)[0][stride // 2 :: stride, stride // 2 :: stride]
        answer.map = _painted(source.cpu().numpy(), answer, stride, (height, width), bank)
        for painted in answer.rows:
            painted.share = float(found.shares[found.rows == painted.row].sum())
    return answer


def _painted(source: np.ndarray, answer: Sources, stride: int, size: tuple[int, int], bank: Bank) -> str:
    """The source map as a PNG; gives the rows of the answer their colours, and adds rows that dominate much."""
    rows, counts = np.unique(source, return_counts=True)
    order = np.lexsort((rows, -counts))[: len(COLOURS)]
    colours = dict(zip(rows[order].tolist(), COLOURS, strict=False))
    areas = dict(zip(rows.tolist(), (counts / source.size).tolist(), strict=True))
    known = {listed.row: listed for listed in answer.rows}
    for row, colour in colours.items():
        listed = known.get(row) or Source(row=row, label=int(bank.labels[row]), share=0.0)
        listed.colour = "#{:02x}{:02x}{:02x}".format(*colour)
        if row not in known:
            answer.rows.append(listed)
    for listed in answer.rows:
        listed.area = areas.get(listed.row, 0.0)
    picture = np.empty((*source.shape, 3), np.uint8)
    picture[:] = OTHER
    for row, colour in colours.items():
        picture[source == row] = colour
    full = picture.repeat(stride, 0).repeat(stride, 1)
    full = np.pad(
        full, [(0, max(0, side - got)) for side, got in zip(size, full.shape[:2], strict=True)] + [(0, 0)], "edge"
    )
    return encoded(png(full[: size[0], : size[1]]))


# ---- until golddiff.attribute is there ------------------------------------------------------------------------------


@dataclass
class Attribution:
    rows: Tensor
    shares: Tensor
    source: Tensor
    source_weight: Tensor


def attribute(bank: Bank, posterior: Posterior, b: int = 0, region: object = None) -> Attribution:
    channels, height, width = posterior.mean.shape[1:]
    chosen = torch.zeros(height, width, dtype=torch.bool)
    if region is None:
        chosen[:] = True
    elif isinstance(region, Tensor):
        chosen = region
    else:
        top, left, bottom, right = region  # type: ignore[misc]
        chosen[top:bottom, left:right] = True
    flat = chosen.expand(channels, height, width).flatten().nonzero()[:, 0]
    rows, weights = posterior.weights(b, flat)
    if weights.ndim == 1:
        weights = weights[:, None].expand(-1, len(flat))
    shares = weights.mean(1)
    order = shares.argsort(descending=True, stable=True)
    source = torch.full((channels * height * width,), -1)
    heaviest = torch.zeros(channels * height * width, dtype=torch.float64)
    heaviest[flat], best = weights.max(0)
    source[flat] = rows[best]
    shape = (channels, height, width)
    return Attribution(rows[order], shares[order], source.reshape(shape), heaviest.reshape(shape))
