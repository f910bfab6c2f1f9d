"""Denoisers of whole images: one weight for each row."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ..bank import Bank
from ..golden import Everything, Subset, Support, nearest_rows
from ..locality import WholeImage
from ..noise import Noise
from ..posterior import Posterior, Sources, softmax_of_rows
from ..scan import LOGITS_AT_ONCE, scan_of
from .base import Denoiser
from .sources import WholeRows

__all__ = ["Nearest", "Optimal"]

MEASURED_AGAIN = 512  # up to so many rows of weight are measured again by differences
TINY = 80.0  # exp(-80) stands for all that is smaller: denormal numbers are slow
NOTHING = 45.0  # a row of weight exp(-45) is nothing to double precision


class Optimal(Denoiser):
    r"""The ideal denoiser of the bank: the posterior mean over its rows.

    .. math:: l_i = -|x_t - \alpha x_i|^2 / (2 \sigma^2), \quad mean = \sum_i \mathrm{softmax}(l)_i \, x_i

    At low noise it copies training images, by construction. With a golden subset the sum runs over the
    subset only. Everything is scanned by matrix products that a batch shares; where few rows carry weight
    they are measured again by differences in float64.
    """

    properties = frozenset({"convex", "permutation_invariant", "exact", "nearest_at_low_noise", "mean_at_high_noise"})
    can_share = True

    def __init__(self, bank: Bank, subset: Subset | None = None, options: dict[str, Any] | None = None) -> None:
        self.bank, self.locality, self.options = bank, WholeImage(), options or {}
        self.subset = subset or Everything(bank)
        self.by_level = self.subset.by_level
        if not isinstance(self.subset, Everything):
            self.properties = frozenset({"convex", "permutation_invariant"})

    def _posterior(
        self, x_t: Tensor, noise: Noise, label: int | None, eligible: Tensor | None, seed: Tensor
    ) -> Posterior:
        support = self.subset.select(x_t, noise, self.locality, eligible, seed, label).owned(self.ranks)
        q, s = self.bank.query(x_t, noise)
        if isinstance(self.subset, Everything) and support.log_q is None:
            mean, log_total, ess = self._scan(q, s, support.rows_of(0) if self.ranks.linked else eligible)
        else:
            parts = [self._measured(q[b], s[b], support.rows_of(b), support.log_q_of(b)) for b in range(len(q))]
            mean, log_total, ess = (torch.stack(tensors) for tensors in zip(*parts, strict=True))
        mean, log_total, ess = self.ranks.merged(mean, log_total, ess)

        def weigh(b: int, pixels: Tensor | None) -> tuple[Tensor, Tensor]:
            rows = support.rows_of(b)
            return rows, softmax_of_rows(support.log_q_of(b).double() - self.bank.distances(q[b], s[b], rows) / 2)[0]

        return Posterior(
            mean=self.bank.uncentred(mean).to(x_t.dtype).reshape(x_t.shape),
            log_evidence=log_total - support.eligible.double().log().to(x_t.device),
            ess=ess,
            support=support,
            x_t=x_t,
            noise=noise,
            error_bound=self._error_bound(mean, log_total, support),
            _sources=Sources() if self.ranks.linked else WholeRows(self.bank, weigh),
            _keys=self.bank.keys,
        )

    def _error_bound(self, mean: Tensor, log_total: Tensor, support: Support) -> Tensor | None:
        """How far the mean may be from that of all rows, `(B,)`: what is missed, times how far a row may be from it."""
        if isinstance(self.subset, Everything):
            return torch.zeros(len(mean), dtype=torch.float64, device=mean.device)
        if support.log_missed is None:
            return None
        share = torch.sigmoid(support.log_missed - log_total)
        farthest = self.bank.norms.max().sqrt() + mean.double().norm(dim=1)
        return share * farthest * self.bank.scale / math.sqrt(self.bank.D)

    def _measured(
        self, q: Tensor, s: Tensor, rows: Tensor, log_q: Tensor | float = 0.0
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Mean (of the centred rows) `(D,)`, log of the total and ess of one image over some rows, by distances in
        float64."""
        logits = self.bank.distances(q, s, rows) / -2 + log_q
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
        """Logits of all rows by one product with each block. Few rows of weight are measured again; where there are
        many, a second product with the blocks that matter gives their weighted sum."""
        count, scan = len(self.bank) if eligible is None else len(eligible), scan_of(self.bank, q, s)
        parts = [slice(start, min(start + scan.size, count)) for start in range(0, count, scan.size)]
        logits, tops = q.new_empty(count, len(q)), []
        error = torch.zeros(len(q), dtype=torch.float64, device=q.device)
        for part in parts:
            rows = part if eligible is None else eligible[part]
            error = torch.maximum(error, scan.logits(scan.read(rows), self.bank.norms[rows], out=logits[part]))
            tops.append(logits[part].amax(0))
        peak = torch.stack(tops).amax(0)
        negligible = 4 - math.log(torch.finfo(q.dtype).eps)  # rows that together weigh a fraction of a rounding error
        floor = (peak.double() - 2 * error - negligible - math.log(count)).to(q.dtype)
        carried = logits >= floor
        heavy = carried.sum(0, dtype=torch.int32) > MEASURED_AGAIN
        mean = torch.zeros(q.shape, dtype=torch.float64, device=q.device)
        log_total, ess = mean.new_zeros(len(q)), mean.new_zeros(len(q))
        where, which = (carried & ~heavy).nonzero(as_tuple=True)
        for b in (~heavy).nonzero()[:, 0].tolist():
            chosen = where[which == b]
            mean[b], log_total[b], ess[b] = self._measured(q[b], s[b], chosen if eligible is None else eligible[chosen])
        if bool(heavy.any()):
            only = slice(None) if bool(heavy.all()) else heavy.nonzero()[:, 0]
            scan.begin(int(heavy.sum()))
            total = squares = mean.new_zeros(int(heavy.sum()))
            for part, top in zip(parts, tops, strict=True):
                if bool((top[only] >= floor[only]).any()):
                    block = scan.read(part if eligible is None else eligible[part])
                    weights = torch.sub(logits[part, only], peak[only]).clamp_(min=-TINY).exp_()
                    total = total + scan.add(block, weights)
                    squares = squares + torch.linalg.vector_norm(weights, dim=0).double() ** 2
            mean[only] = scan.weighted_sum(total) / total[:, None]
            log_total[only] = peak[only].double() + total.log() - q[only].double().square().sum(1) / 2
            ess[only] = total**2 / squares
        return mean, log_total, ess


class Nearest(Denoiser):
    """The row nearest to `x_t / alpha`, whatever the noise: `argmin |x_t - alpha x_i|`. It has weight 1."""

    properties = frozenset({"convex", "permutation_invariant", "nearest_at_low_noise"})

    def __init__(self, bank: Bank, options: dict[str, Any] | None = None) -> None:
        self.bank, self.options = bank, options or {}

    def _posterior(
        self, x_t: Tensor, noise: Noise, label: int | None, eligible: Tensor | None, seed: Tensor
    ) -> Posterior:
        rows = torch.arange(len(self.bank), device=x_t.device) if eligible is None else eligible
        q, s = self.bank.query(x_t, noise)
        chosen = torch.stack([nearest_rows(self.bank, q[b], s[b], rows, 1) for b in range(len(q))])
        best = torch.cat([self.bank.distances(q[b], s[b], chosen[b]) for b in range(len(q))]) / -2
        count = torch.full((len(x_t),), len(rows), device=x_t.device)
        return Posterior(
            mean=self.bank.images(chosen[:, 0], x_t.dtype),
            log_evidence=best - math.log(len(rows)),
            ess=torch.ones(len(x_t), dtype=torch.float64, device=x_t.device),
            support=Support(chosen[:, None], None, None, count, shared=False),
            x_t=x_t,
            noise=noise,
            _sources=WholeRows(self.bank, lambda b, _: (chosen[b], torch.ones(1, dtype=torch.float64).to(x_t.device))),
        )
