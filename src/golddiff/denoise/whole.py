"""Denoisers of whole images: one weight for each row."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ..bank import Bank
from ..golden import Everything, Subset, fast_scores
from ..locality import WholeImage
from ..noise import Noise
from ..posterior import Posterior, softmax_of_rows
from .base import Denoiser

__all__ = ["Optimal"]

LOGITS_AT_ONCE = 2**26  # of images that are scanned together
MEASURED_AGAIN = 512  # up to so many rows of weight are measured again by differences
NEGLIGIBLE = 20.0  # rows whose weights together are under exp(-20)
NOTHING = 45.0  # a row of weight exp(-45) is nothing to double precision


class Optimal(Denoiser):
    r"""The ideal denoiser of the bank: the posterior mean over its rows.

    .. math:: l_i = -|x_t - \alpha x_i|^2 / (2 \sigma^2), \quad mean = \sum_i \mathrm{softmax}(l)_i \, x_i

    At low noise it copies training images, by construction. With a golden subset the sum runs over the
    subset only. Everything is scanned by matrix products that a batch shares; where few rows carry weight
    they are measured again by differences in float64.
    """

    properties = frozenset({"convex", "permutation_invariant", "exact", "nearest_at_low_noise", "mean_at_high_noise"})

    def __init__(self, bank: Bank, subset: Subset | None = None, options: dict[str, Any] | None = None) -> None:
        self.bank, self.locality, self.options = bank, WholeImage(), options or {}
        self.subset = subset or Everything(bank)
        self.by_level = self.subset.by_level
        if not isinstance(self.subset, Everything):
            self.properties = frozenset({"convex", "permutation_invariant"})

    def _posterior(
        self, x_t: Tensor, noise: Noise, label: int | None, eligible: Tensor | None, seed: Tensor
    ) -> Posterior:
        support = self.subset.select(x_t, noise, self.locality, eligible, seed)
        q, s = self.bank.query(x_t, noise)
        if isinstance(self.subset, Everything):
            mean, log_total, ess = self._scan(q, s, eligible)
        else:
            parts = [self._measured(q[b], s[b], support.rows_of(b)) for b in range(len(q))]
            mean, log_total, ess = (torch.stack(tensors) for tensors in zip(*parts, strict=True))

        def weigh(b: int, pixels: Tensor | None) -> tuple[Tensor, Tensor]:
            rows = support.rows_of(b)
            return rows, softmax_of_rows(-self.bank.distances(q[b], s[b], rows) / 2)[0]

        return Posterior(
            mean=self.bank.uncentred(mean).to(x_t.dtype).reshape(x_t.shape),
            log_evidence=log_total - support.eligible.double().log().to(x_t.device),
            ess=ess,
            support=support,
            x_t=x_t,
            noise=noise,
            _weigh=weigh,
            _keys=self.bank.keys,
        )

    def _measured(self, q: Tensor, s: Tensor, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Mean (of the centred rows) `(D,)`, log of the total and ess of one image over some rows, by distances in
        float64."""
        logits = self.bank.distances(q, s, rows) / -2
        weighty = logits >= logits.max() - NOTHING
        weights, log_total, ess = softmax_of_rows(logits[weighty])
        dtype = torch.float64 if len(weights) <= MEASURED_AGAIN else q.dtype
        mean = torch.zeros(q.shape, dtype=torch.float64, device=q.device)
        for part, _, v in self.bank.blocks(rows[weighty], dtype):
            mean += weights[part].to(dtype) @ v
        return mean, log_total, ess

    def _scan(self, q: Tensor, s: Tensor, eligible: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Mean (of the centred rows), `(B, D)`, log of the total and ess, `(B,)`, over all eligible rows."""
        count = len(self.bank) if eligible is None else len(eligible)
        together = max(1, LOGITS_AT_ONCE // count)
        parts = [self._scan_some(*some, eligible) for some in zip(q.split(together), s.split(together), strict=True)]
        mean, log_total, ess = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
        return mean, log_total, ess

    def _scan_some(self, q: Tensor, s: Tensor, eligible: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """One pass over the rows: logits by a product with each block, and where a block can matter its weighted sum
        by another, while it is in the cache. Few rows of weight are measured again."""
        count = len(self.bank) if eligible is None else len(eligible)
        logits = q.new_empty(len(q), count)
        mean, peak = torch.zeros_like(q), q.new_full((len(q),), -math.inf)
        total, squares, error = (torch.zeros(len(q), dtype=torch.float64, device=q.device) for _ in range(3))
        for part, rows, v in self.bank.blocks(eligible, q.dtype):
            scores, tolerance = fast_scores(q, s, v, self.bank.norms[rows].to(q.dtype))
            logits[:, part] = block = scores.mul_(-0.5)
            error = torch.maximum(error, tolerance / 2)
            top = block.amax(1)
            before, peak = peak, torch.maximum(peak, top)
            reach = 2 * error + NEGLIGIBLE + math.log(count)
            if bool((top >= peak - reach).any()):
                e = block.sub_(peak[:, None]).exp_()
                shrink = (before - peak).exp_()
                mean.mul_(shrink[:, None]).addmm_(e, v)
                total = total * shrink.double() + e.sum(1)
                squares = squares * shrink.double() ** 2 + e.square_().sum(1)
        carried = logits >= (peak - reach)[:, None]
        mean = mean.double() / total[:, None]
        log_total = peak.double() + total.log() - q.double().square().sum(1) / 2
        ess = total**2 / squares
        for b in (carried.sum(1) <= MEASURED_AGAIN).nonzero()[:, 0].tolist():
            rows = carried[b].nonzero()[:, 0]
            mean[b], log_total[b], ess[b] = self._measured(q[b], s[b], rows if eligible is None else eligible[rows])
        return mean, log_total, ess
