"""Local denoisers: every output pixel has a posterior of its own, weighed through a mask."""

from __future__ import annotations

from functools import partial
from typing import Any, Self

import torch
from torch import Tensor

from ..bank import Bank
from ..errors import GolddiffError
from ..golden import Everything, Subset, Support
from ..locality import Masked, Sums
from ..noise import Noise
from ..posterior import Posterior, RunningSoftmax, Sources
from ..ranks import Ranks
from .base import Denoiser
from .compiled import masked_softmax, usable
from .sources import BLOCK, MaskedRows

__all__ = ["MaskedDenoiser", "masked_logits"]


class MaskedDenoiser(Denoiser):
    r"""PCA-locality, and any other mask, over a subset of the rows.

    .. math:: l_i[m] = -\frac{1}{2 \sigma^2} \sum_n M[n, m] (x_t[n] - \alpha x_i[n])^2, \quad
        mean[m] = \sum_i \mathrm{softmax}(l[m])_i \, x_i[m]

    With everything as its subset this is PCA-locality exactly; with a golden subset it is GoldDiff.

    Arguments:
        locality: the mask at each noise level.
        subset: which rows; everything if None.
        legacy_batch: average the softmax means of batches of so many rows, as published code does (biased,
            and dependent on the order of the rows); for comparisons only.
    """

    properties = frozenset({"convex", "permutation_invariant", "exact"})
    by_level = True
    can_share = True

    def __init__(
        self,
        bank: Bank,
        locality: Masked,
        subset: Subset | None = None,
        legacy_batch: int | None = None,
        options: dict[str, Any] | None = None,
    ) -> None:
        if legacy_batch is not None and (type(legacy_batch) is not int or legacy_batch < 1):
            raise GolddiffError(f"legacy_batch is {legacy_batch!r}: give a number of rows of at least 1")
        self.bank, self.locality, self.options = bank, locality, options or {}
        self.subset = subset or Everything(bank)
        self.legacy_batch = legacy_batch
        if legacy_batch:
            self.properties = frozenset({"convex"})
        elif not isinstance(self.subset, Everything):
            self.properties = frozenset({"convex", "permutation_invariant"})

    def over(self, ranks: Ranks) -> Self:
        if self.legacy_batch:
            raise GolddiffError("legacy_batch averages batches of all rows: spread the seeds, not the bank")
        return super().over(ranks)

    def _posterior(
        self, x_t: Tensor, noise: Noise, label: int | None, eligible: Tensor | None, seed: Tensor
    ) -> Posterior:
        support = self.subset.select(x_t, noise, self.locality, eligible, seed, label).owned(self.ranks)
        q, s = self.bank.query(x_t, noise)
        exact = self.bank.query(x_t.double(), noise)
        together = len(x_t) if support.tiled else 1
        compiled = not self.legacy_batch and usable(self.bank, x_t, support.size * together)
        runs = self.locality.runs(noise[0], label, support.tiles) if compiled else None
        if runs is not None:
            mean, log_total, ess = masked_softmax(self.bank, *exact, support, runs)
        elif support.tiled:
            mean, log_total, ess = self._tiled(q, s, self.locality.mask(noise[0], label), support)
        else:
            mean, log_total, ess = self._blocked(q, s, self.locality.sums(noise[0], label, x_t), support)

        mean, log_total, ess = self.ranks.merged(mean, log_total, ess)

        columns = partial(self.locality.columns, noise[0], label)
        sources = MaskedRows(self.bank, *exact, columns, support, self.legacy_batch)
        return Posterior(
            mean=self.bank.uncentred(mean).to(x_t.dtype).reshape(x_t.shape),
            log_evidence=(log_total - support.eligible.double().log()[:, None].to(x_t.device)).reshape(x_t.shape),
            ess=ess.reshape(x_t.shape),
            support=support,
            x_t=x_t,
            noise=noise,
            _sources=Sources() if self.ranks.linked else sources,
        )

    def _blocked(self, q: Tensor, s: Tensor, masked: Sums, support: Support) -> tuple[Tensor, Tensor, Tensor]:
        """Mean of the centred rows, log of the total, and ess, `(B, D)` each, by masked sums of blocks."""
        sums: list[list[RunningSoftmax]] = [[] for _ in q]
        for images, rows in support.blocks(self.legacy_batch or BLOCK):
            v = self.bank.centred(rows, q.dtype)
            for b in images:
                if self.legacy_batch or not sums[b]:
                    sums[b].append(RunningSoftmax())
                sums[b][-1].add(masked_logits(q[b], s[b], v, masked), v)
        mean = torch.stack([torch.stack([part.mean for part in parts]).mean(0) for parts in sums])
        log_total = torch.stack([torch.stack([part.log_total for part in parts]).logsumexp(0) for parts in sums])
        ess = torch.stack([len(parts) ** 2 / torch.stack([1 / part.ess for part in parts]).sum(0) for parts in sums])
        return mean, log_total, ess

    def _tiled(self, q: Tensor, s: Tensor, mask: Tensor, support: Support) -> tuple[Tensor, Tensor, Tensor]:
        """The same for supports with rows of their own in each tile, or that stand for others."""
        out = torch.empty(3, *q.shape, dtype=torch.float64, device=q.device)
        for tile, outputs in enumerate(support.outputs(self.bank.D)):
            columns = mask[:, outputs.to(mask.device)]
            inputs = (columns != 0).any(1).nonzero()[:, 0]
            columns, inputs = columns[inputs].to(q.device, q.dtype), inputs.to(q.device)
            for b in range(len(q)):
                sums = RunningSoftmax()
                rows, log_q = support.rows_of(b, tile), support.log_q_of(b, tile)
                for part, added in zip(rows.split(BLOCK), log_q.split(BLOCK), strict=True):
                    v = self.bank.centred(part, q.dtype)
                    squares = torch.sub(q[b, inputs], v[:, inputs] * s[b]).square_()
                    sums.add((squares @ columns).mul_(-0.5).add_(added[:, None]), v[:, outputs])
                out[0, b, outputs], out[1, b, outputs], out[2, b, outputs] = sums.mean, sums.log_total, sums.ess
        mean, log_total, ess = out
        return mean, log_total, ess


def masked_logits(q: Tensor, s: Tensor, v: Tensor, masked: Sums, pixels: Tensor | None = None) -> Tensor:
    """Minus half the masked sums of `(q - s v)^2` of one image: q `(D,)`, s `()`, rows v `(n, D)` -> `(n, pixels)`."""
    return masked(torch.sub(q, v * s).square_(), pixels).mul_(-0.5)
