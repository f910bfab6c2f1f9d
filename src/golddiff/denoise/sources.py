"""Where a posterior mean comes from: rows and weights, and how it moves with x_t. All of it computed when asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from ..bank import Bank
from ..errors import GolddiffError
from ..golden import Support
from ..posterior import Piece, Sources, softmax_of_rows
from ..spectrum import Statistics

__all__ = ["BLOCK", "Linear", "MaskedRows", "Weighed", "WeighedPatches", "WholeRows"]

BLOCK = 512
WEIGHTS_AT_ONCE = 2**24
NOTHING = 1e-24  # a weight that no sum in float64 can feel
FLAT = 1e-8  # alpha that stands for 0

Weigh = Callable[[int, Tensor | None], tuple[Tensor, Tensor]]
Columns = Callable[[Tensor], tuple[Tensor, Tensor]]


class Weighed(Sources):
    """Weights by a function of image and pixels, and nothing else."""

    def __init__(self, bank: Bank, weigh: Weigh) -> None:
        self.bank, self._weigh = bank, weigh

    @property
    def bank_of_rows(self) -> Bank:
        return self.bank

    def weights(self, b: int, pixels: Tensor | None) -> tuple[Tensor, Tensor]:
        return self._weigh(b, pixels)


class WeighedPatches(Weighed):
    """Weights of patches, which are no rows."""

    def pieces(self, b: int, pixels: Tensor | None) -> Iterator[Piece]:
        raise GolddiffError(
            "els and bbels take patches from other places, so their sources are no rows: ask "
            "posterior.weights(b, [pixel]), or use ls"
        )


class WholeRows(Weighed):
    """One weight for each row; the weights follow `exp(-|x_t - alpha x_i|^2 / (2 sigma^2))`."""

    def spread(self, b: int, v: Tensor, transposed: bool) -> Tensor:
        rows, weights = self.weights(b, None)
        felt = weights > NOTHING
        rows, weights = rows[felt], weights[felt].double()
        mean = sum(weights[part] @ x for part, _, x in self.bank.blocks(rows, torch.float64))
        out = torch.zeros_like(v)
        for part, _, x in self.bank.blocks(rows, torch.float64):
            x = x - mean
            out += (v @ x.T * weights[part]) @ x
        return out * self.bank.scale**2


class MaskedRows(Sources):
    """Weights of rows for each pixel, by masked sums; in float64.

    Arguments:
        q: `(B, D)` float64, s: `(B,)`: see `Bank.query`.
        columns: from pixels to the inputs that vote on them, and their entries of the mask, see `Masked.columns`.
        legacy_batch: see `MaskedDenoiser`.
    """

    def __init__(
        self, bank: Bank, q: Tensor, s: Tensor, columns: Columns, support: Support, legacy_batch: int | None
    ) -> None:
        self.bank, self.q, self.s, self.support = bank, q, s, support
        self._columns, self.legacy_batch = columns, legacy_batch

    @property
    def bank_of_rows(self) -> Bank:
        return self.bank

    def weights(self, b: int, pixels: Tensor | None) -> tuple[Tensor, Tensor]:
        wanted = self._wanted(pixels)
        parts = list(self._parts(b, wanted))
        if not self.support.tiled:
            return self.support.rows_of(b), torch.cat([weights for _, _, weights in parts], 1)
        rows = torch.cat([own for _, own, _ in parts]).unique()
        out = torch.zeros(len(rows), len(wanted), dtype=torch.float64, device=rows.device)
        for where, own, weights in parts:
            out[torch.searchsorted(rows, own)[:, None], where] = weights
        return rows, out

    def pieces(self, b: int, pixels: Tensor | None) -> Iterator[Piece]:
        wanted = self._wanted(pixels)
        for where, rows, weights in self._parts(b, wanted):
            yield Piece(wanted[where], rows, weights)

    def error(self, b: int, pixels: Tensor | None) -> Tensor:
        wanted = self._wanted(pixels)
        variance = torch.zeros(len(wanted), dtype=torch.float64, device=wanted.device)
        for where, rows, weights in self._parts(b, wanted):
            log_q = self.support.log_q_of(b, int(self._tiles(wanted[where[:1]])[0]))
            v = self.bank.centred(rows, torch.float64, pixels=wanted[where])
            spread = (weights * (v - (weights * v).sum(0))).square()
            variance[where] = ((1 - (-log_q.double()).exp())[:, None] * spread).sum(0)
        return variance.sqrt() * self.bank.scale

    def spread(self, b: int, v: Tensor, transposed: bool) -> Tensor:
        if self.legacy_batch:
            return super().spread(b, v, transposed)
        out = torch.zeros_like(v)
        every = self._wanted(None)
        for where, rows, weights in self._parts(b, every):
            at = every[where]
            inputs, mask = self._mask(at)
            values = self.bank.centred(rows, torch.float64, pixels=at)
            weighed = weights * (values - (weights * values).sum(0))
            for part in torch.arange(len(rows), device=rows.device).split(BLOCK):
                x = self.bank.centred(rows[part], torch.float64, pixels=inputs)
                for i, direction in enumerate(v):
                    if transposed:
                        out[i, inputs] += ((weighed[part] * direction[at]) @ mask.T * x).sum(0)
                    else:
                        out[i, at] += (weighed[part] * ((x * direction[inputs]) @ mask)).sum(0)
        return out * self.bank.scale**2

    def _wanted(self, pixels: Tensor | None) -> Tensor:
        device = self.q.device
        return torch.arange(self.bank.D, device=device) if pixels is None else pixels.to(device)

    def _tiles(self, pixels: Tensor) -> Tensor:
        return torch.zeros_like(pixels) if self.support.tiles is None else self.support.tiles[pixels]

    def _parts(self, b: int, wanted: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Yields places in `wanted` `(P,)`, rows `(K,)` and weights `(K, P)`; pixels of one tile go together."""
        tiles = self._tiles(wanted)
        for tile in tiles.unique().tolist():
            rows, log_q = self.support.rows_of(b, tile), self.support.log_q_of(b, tile)
            together = max(1, WEIGHTS_AT_ONCE // max(len(rows), self.bank.D))
            for where in (tiles == tile).nonzero()[:, 0].split(together):
                yield where, rows, self._weights_of(b, rows, log_q.double(), wanted[where])

    def _mask(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """The inputs that vote on some pixels, `(U,)`, and their entries of the mask, `(U, P)` float64."""
        inputs, mask = self._columns(pixels)
        return inputs.to(pixels.device), mask.to(pixels.device, torch.float64)

    def _weights_of(self, b: int, rows: Tensor, log_q: Tensor, pixels: Tensor) -> Tensor:
        inputs, mask = self._mask(pixels)
        logits = []
        for part in rows.split(self.legacy_batch or BLOCK):
            v = self.bank.centred(part, torch.float64, pixels=inputs)
            logits.append(torch.sub(self.q[b, inputs], v.mul_(self.s[b]), out=v).square_() @ mask / -2)
        if self.legacy_batch:
            return torch.cat([softmax_of_rows(part.T)[0].T for part in logits]) / len(logits)
        return softmax_of_rows(torch.cat(logits).add_(log_q[:, None]).T)[0].T


class Linear(Sources):
    """No rows: the mean is linear in `x_t`, through mean and covariance of the data.

    Arguments:
        alpha, sigma: `(B, 1)` float64, of each image.
    """

    def __init__(self, statistics: Statistics, alpha: Tensor, sigma: Tensor) -> None:
        self.statistics, self.alpha, self.sigma = statistics, alpha, sigma

    def spread(self, b: int, v: Tensor, transposed: bool) -> Tensor:
        alpha, sigma = self.alpha[b : b + 1].clamp(min=FLAT), self.sigma[b : b + 1]
        return self.statistics.denoise(v, alpha, sigma)[0] * (sigma**2 / alpha)
