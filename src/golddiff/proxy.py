"""Cheap views of an image for coarse search, with what they guarantee about the true distance."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["Pooling"]

SIDE = 16
USEFUL = 8


class Pooling:
    r"""Average pooling, scaled so that it is an orthonormal projection `P`.

    Each cell of the grid holds `sum(pixels of the block) / sqrt(their number)`, so that for any two images

    .. math:: |P a - P b|^2 \le |a - b|^2

    and, where all blocks have the same size, distances order rows exactly as average pooling does.
    A side goes to its largest divisor that is at most 16 (64 and 32 to 16, 28 to 14). Where that divisor is
    under 8, the side is cut into 16 blocks that differ by at most one pixel.

    Arguments:
        shape: `(C, H, W)` of the images.
    """

    def __init__(self, shape: tuple[int, int, int]) -> None:
        self.shape = shape
        self._rows = _blocks(shape[1])
        self._columns = _blocks(shape[2])
        self.size = shape[0] * len(self._rows) * len(self._columns)
        counts = self._rows.sum(1)[:, None] * self._columns.sum(1)[None]
        self._scale = counts.rsqrt()

    def __call__(self, x: Tensor, dtype: torch.dtype = torch.float64) -> Tensor:
        """`(n, D)` -> `(n, P)` in a type. Sums of whole numbers are exact, whatever the size of the batch: in float32
        while they are under 2^24."""
        images = x.reshape(-1, *self.shape).to(dtype)
        rows, columns, scale = (m.to(x.device, dtype) for m in (self._rows, self._columns, self._scale))
        return ((rows @ images @ columns.T) * scale).flatten(1)


def _blocks(side: int) -> Tensor:
    """`(cells, side)` matrix of zeros and ones: which pixels each cell sums."""
    cells = next(d for d in range(min(SIDE, side), 0, -1) if side % d == 0)
    if cells < min(USEFUL, side):
        cells = min(SIDE, side)
    owner = torch.arange(side) * cells // side
    return (owner[None] == torch.arange(cells)[:, None]).double()
