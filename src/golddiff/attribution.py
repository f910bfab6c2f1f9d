"""Attribution: which training images, and which of their pixels, an image comes from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .bank import Bank
from .errors import GolddiffError
from .posterior import Piece, Posterior

__all__ = ["Attribution", "Tally", "attribute", "pixels_of"]

NOBODY = -1
NUMBERS = 2**23  # weights times pixels that are summed at once


@dataclass(frozen=True, eq=False, repr=False)
class Attribution:
    r"""A posterior mean, taken apart: every pixel is a weighted sum of the same pixel of training images.

    .. math:: mean[m] = \sum_i w_i[m] \, x_i[m], \quad share_i = \frac{1}{|R|} \sum_{m \in R} w_i[m]

    Arguments:
        rows: training images of any weight, the largest share first, `(K,)` int64.
        shares: how much of the region comes from each, `(K,)` float64; they sum to 1.
        pixels: the region R, flat indices `(P,)`.
        source: the row of the largest weight at each pixel, `(C, H, W)` int64; -1 outside the region.
        source_weight: its weight, `(C, H, W)` float64; 0 outside.
        image: the weighted sum itself, `(C, H, W)` float64, which is the posterior mean; NaN outside.
        bank, posterior, b: what was asked.
    """

    rows: Tensor
    shares: Tensor
    pixels: Tensor
    source: Tensor
    source_weight: Tensor
    image: Tensor
    bank: Bank
    posterior: Posterior
    b: int

    def __repr__(self) -> str:
        first = ", ".join(
            f"row {row} {share:.1%}"
            for row, share in zip(self.rows[:3].tolist(), self.shares[:3].tolist(), strict=True)
        )
        return f"Attribution of {len(self.pixels)} pixels to {len(self.rows)} images: {first}"

    def coverage(self, count: int) -> float:
        """The share of the region that comes from the first `count` images, from 0 to 1."""
        return float(self.shares[:count].sum())

    def maps(self, count: int) -> Tensor:
        """The weights of the first `count` images at each pixel, `(count, C, H, W)` float64; 0 outside the region."""
        chosen = self.rows[:count]
        out = torch.zeros(len(chosen), self.bank.D, dtype=torch.float64, device=chosen.device)
        for pixels, rows, weights in self.posterior.pieces(self.b, self.pixels):
            for i, row in enumerate(chosen):
                out[i, pixels] = weights[rows == row].sum(0)  # it is there once, or not at all
        return out.unflatten(1, self.bank.shape)


def attribute(bank: Bank, posterior: Posterior, b: int = 0, region: object = None) -> Attribution:
    """Takes the posterior mean of one image apart.

    The last posterior of a trajectory is that of the generated image itself, since samples are posterior means.

    Arguments:
        bank: the bank of the denoiser, or the one that it is a view of.
        posterior: what the denoiser returned.
        b: which image of the batch.
        region: None for the whole image, a box `(top, left, bottom, right)` in pixels (the last two exclusive), a
            boolean mask `(H, W)`, or a list or tensor of flat indices into `C * H * W`.

    Raises:
        GolddiffError: a denoiser without weights of rows, or a region that is none.
    """
    if posterior.bank is not None and posterior.bank.meta["fingerprint"] != bank.meta["fingerprint"]:
        raise GolddiffError("this posterior is over another bank: give the bank of its denoiser")
    pixels = pixels_of(region, bank.shape).to(posterior.mean.device)
    image = torch.full((bank.D,), torch.nan, dtype=torch.float64, device=pixels.device)
    tally = Tally(bank)
    for piece in posterior.pieces(b, pixels):
        tally.add(piece)
        image[piece.pixels] = _weighted_sum(bank, *piece)
    rows, shares = tally.ordered()
    return Attribution(
        rows=rows,
        shares=shares,
        pixels=pixels,
        source=tally.source.unflatten(0, bank.shape),
        source_weight=tally.heaviest.unflatten(0, bank.shape),
        image=image.unflatten(0, bank.shape),
        bank=bank,
        posterior=posterior,
        b=b,
    )


class Tally:
    """Adds up the weights of pixels, piece by piece.

    Attributes:
        totals: the weights of each row of the bank over all pixels so far, `(N,)` float64. count: of these pixels.
        source, heaviest: at each pixel the row of the largest weight, and that weight, `(D,)`; -1 and 0 where none
            were added.
    """

    def __init__(self, bank: Bank) -> None:
        self.totals = torch.zeros(len(bank.pixels), dtype=torch.float64, device=bank.device)
        self.source = torch.full((bank.D,), NOBODY, device=bank.device)
        self.heaviest = torch.zeros(bank.D, dtype=torch.float64, device=bank.device)
        self.count = 0

    def add(self, piece: Piece, everywhere: bool = False) -> None:
        """Adds a piece; with `everywhere` its one pixel stands for all, which have the same weights."""
        where: Tensor | slice = slice(None) if everywhere else piece.pixels
        self.totals[piece.rows] += piece.weights.sum(1).double()
        largest = piece.weights.max(0)
        self.source[where], self.heaviest[where] = piece.rows[largest.indices], largest.values.double()
        self.count += len(piece.pixels)

    def ordered(self) -> tuple[Tensor, Tensor]:
        """Rows of any weight, the largest share first, and their shares, `(K,)` each."""
        rows = self.totals.argsort(descending=True, stable=True)[: int((self.totals > 0).sum())]
        return rows, self.totals[rows] / max(1, self.count)


def _weighted_sum(bank: Bank, pixels: Tensor, rows: Tensor, weights: Tensor) -> Tensor:
    """Of the same pixels of the rows, `(P,)` float64, weights `(K, P)`."""
    total = torch.zeros(len(pixels), dtype=torch.float64, device=pixels.device)
    for part in torch.arange(len(rows), device=rows.device).split(max(1, NUMBERS // len(pixels))):
        total += (weights[part] * bank.centred(rows[part], torch.float64, pixels=pixels)).sum(0)
    return (total + bank.centre[pixels].double()) * bank.scale + bank.offset


def pixels_of(region: object, shape: tuple[int, int, int]) -> Tensor:
    """The flat indices of a region, `(P,)` int64, see `attribute`."""
    channels, height, width = shape
    everything = torch.arange(channels * height * width).reshape(shape)
    if region is None:
        return everything.flatten()
    wrong = GolddiffError(
        f"region is {region!r}: give (top, left, bottom, right) within {height} x {width} pixels, a boolean mask "
        f"({height}, {width}), or flat indices under {everything.numel()}"
    )
    if isinstance(region, tuple):
        if len(region) != 4 or not all(type(edge) is int for edge in region):
            raise wrong
        top, left, bottom, right = region
        if not (0 <= top < bottom <= height and 0 <= left < right <= width):
            raise wrong
        return everything[:, top:bottom, left:right].flatten()
    if not isinstance(region, Tensor | Sequence) or isinstance(region, str):
        raise wrong
    try:
        chosen = torch.as_tensor(region).cpu()
    except (TypeError, ValueError, RuntimeError) as error:
        raise wrong from error
    if chosen.dtype == torch.bool and tuple(chosen.shape) == (height, width):
        chosen = everything[chosen.expand(shape)]
    whole = not (chosen.is_floating_point() or chosen.is_complex() or chosen.dtype == torch.bool)
    if not whole or chosen.ndim != 1 or chosen.numel() == 0 or len(chosen.unique()) < len(chosen):
        raise wrong
    if int(chosen.min()) < 0 or int(chosen.max()) >= everything.numel():
        raise wrong
    return chosen.long()
