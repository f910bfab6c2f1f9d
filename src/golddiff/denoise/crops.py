"""PSPC: posterior means of square crops, averaged where they overlap."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ..bank import Bank
from ..golden import Everything
from ..locality import Windows
from ..noise import Noise
from ..posterior import Posterior
from .base import Denoiser
from .sources import Weighed

__all__ = ["CropDenoiser"]

BLOCK = 512


class CropDenoiser(Denoiser):
    r"""PSPC with square crops C at every place ("Towards a Mechanistic Explanation of Diffusion Model Generalization").

    .. math:: mean = \left(\sum_C C^T C\right)^{-1} \sum_C C^T E[x_C | z_C], \quad
        l_i[C] = -|C x_t - \alpha C x_i|^2 / (2 \sigma^2)

    so the weight of a row at a pixel is the mean of its weights in the crops that hold the pixel. `log_evidence` is the
    mean of the crops' as well.

    Arguments:
        windows: the side of the crops at each noise level; the whole image where it is larger.
    """

    properties = frozenset({"convex", "permutation_invariant", "exact"})
    by_level = True

    def __init__(self, bank: Bank, windows: Windows, options: dict[str, Any] | None = None) -> None:
        self.bank, self.windows, self.options = bank, windows, options or {}

    def _posterior(
        self, x_t: Tensor, noise: Noise, label: int | None, eligible: Tensor | None, seed: Tensor
    ) -> Posterior:
        support = Everything(self.bank).select(x_t, noise, None, eligible, seed)  # type: ignore[arg-type]
        q, s = self.bank.query(x_t, noise)
        wanted = self.windows(noise[0])
        sides = (min(wanted, self.bank.shape[1]), min(wanted, self.bank.shape[2]))
        images = [self._of_one(q[b], s[b], sides, eligible) for b in range(len(q))]
        mean, log_total, ess = (torch.stack(parts) for parts in zip(*images, strict=True))

        def weigh(b: int, pixels: Tensor | None) -> tuple[Tensor, Tensor]:
            peaks, totals = self._totals(q[b], s[b], sides, eligible)
            parts = [
                self._spread((self._logits(q[b], s[b], v, sides) - peaks).exp_() / totals, sides)
                for _, _, v in self.bank.blocks(eligible, q.dtype, BLOCK)
            ]
            weights = torch.cat(parts).flatten(1).repeat(1, self.bank.shape[0])
            return support.rows_of(b), weights if pixels is None else weights[:, pixels]

        log_count = support.eligible.double().log()[:, None].to(x_t.device)
        return Posterior(
            mean=self.bank.uncentred(mean).to(x_t.dtype).reshape(x_t.shape),
            log_evidence=(log_total - log_count).reshape(x_t.shape),
            ess=ess.reshape(x_t.shape),
            support=support,
            x_t=x_t,
            noise=noise,
            _sources=Weighed(self.bank, weigh),
        )

    def _of_one(
        self, q: Tensor, s: Tensor, sides: tuple[int, int], eligible: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Mean of the centred rows, mean log of the totals, and ess, of one image, `(D,)` float64 each."""
        peaks, totals = self._totals(q, s, sides, eligible)
        channels = self.bank.shape[0]
        mean = torch.zeros(q.shape, dtype=torch.float64, device=q.device)
        squares = torch.zeros(self.bank.shape[1:], dtype=torch.float64, device=q.device)
        for _, _, v in self.bank.blocks(eligible, q.dtype, BLOCK):
            weights = self._spread((self._logits(q, s, v, sides) - peaks).exp_() / totals, sides).to(q.dtype)
            mean += (weights[:, None] * v.unflatten(1, self.bank.shape)).sum(0).flatten()
            squares += weights.square().sum(0)
        spread = self._spread((peaks + totals.log())[None], sides)[0]
        return mean, spread.flatten().repeat(channels), (1 / squares).flatten().repeat(channels)

    def _totals(self, q: Tensor, s: Tensor, sides: tuple[int, int], eligible: Tensor | None) -> tuple[Tensor, Tensor]:
        """The largest of each crop's logits, and the sum of `exp(logit - largest)`, `(rows, columns)` float64."""
        peaks, totals = [], []
        for _, _, v in self.bank.blocks(eligible, q.dtype, BLOCK):
            logits = self._logits(q, s, v, sides)
            peaks.append(logits.amax(0))
            totals.append(logits.sub_(peaks[-1]).exp_().sum(0))
        peak = torch.stack(peaks).amax(0)
        return peak, (torch.stack(totals) * (torch.stack(peaks) - peak).exp_()).sum(0)

    def _logits(self, q: Tensor, s: Tensor, v: Tensor, sides: tuple[int, int]) -> Tensor:
        """Of each row and crop, `(n, rows, columns)` float64."""
        squares = (q - v * s).square_().unflatten(1, self.bank.shape).sum(1)
        return functional.avg_pool2d(squares[:, None], sides, stride=1, divisor_override=1)[:, 0].double() / -2

    def _spread(self, crops: Tensor, sides: tuple[int, int]) -> Tensor:
        """Mean over the crops that hold a pixel, `(n, rows, columns)` -> `(n, H, W)`."""
        padded = functional.pad(crops[:, None], (sides[1] - 1,) * 2 + (sides[0] - 1,) * 2)
        sums = functional.avg_pool2d(padded, sides, stride=1, divisor_override=1)[:, 0]
        lengths = zip(self.bank.shape[1:], sides, strict=True)
        holders = [torch.arange(1, n + 1).clamp(max=min(side, n - side + 1)) for n, side in lengths]
        counts = [torch.minimum(h, h.flip(0)).to(crops.device) for h in holders]
        return sums / (counts[0][:, None] * counts[1])
