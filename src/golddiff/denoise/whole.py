"""Denoisers of whole images: one weight for each row."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ..bank import Bank
from ..golden import Everything, Subset, fast_scores
from ..locality import WholeImage
from ..noise import Noise
from ..posterior import Posterior, RunningSoftmax, softmax_of_rows
from .base import Denoiser

__all__ = ["Optimal"]

BLOCK = 2048
MEASURED_AGAIN = 512  # up to so many rows of weight are measured again by differences
NEGLIGIBLE = 20.0  # rows whose weights together are under exp(-20)


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
            sums = [self._measured(q[b], s[b], support.rows_of(b)) for b in range(len(q))]
            mean, log_total, ess = (torch.stack([getattr(t, n) for t in sums]) for n in ("mean", "log_total", "ess"))

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

    def _measured(self, q: Tensor, s: Tensor, rows: Tensor) -> RunningSoftmax:
        """The posterior of one image over some rows, by differences in float64."""
        total, q, s = RunningSoftmax(), q.double(), s.double()
        for part in rows.split(BLOCK):
            v = self.bank.centred(part, torch.float64)
            total.add(torch.sub(q, v * s).square_().sum(1).mul_(-0.5), v)
        return total

    def _scan(self, q: Tensor, s: Tensor, eligible: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Mean (of the centred rows), `(B, D)`, log of the total and ess, `(B,)`, over all eligible rows."""
        count = len(self.bank) if eligible is None else len(eligible)
        logits = torch.empty(len(q), count, dtype=q.dtype, device=q.device)
        error = torch.zeros(len(q), dtype=torch.float64, device=q.device)
        for part, v, norms in self._blocks(count, eligible, q.dtype):
            scores, tolerance = fast_scores(q, s, v, norms.to(q.dtype))
            logits[:, part] = scores.mul_(-0.5)
            error = torch.maximum(error, tolerance / 2)
        floor = logits.amax(1).double() - 2 * error - NEGLIGIBLE - math.log(count)
        carried = [(row.double() >= low).nonzero()[:, 0] for row, low in zip(logits, floor, strict=True)]
        few = [b for b, rows in enumerate(carried) if len(rows) <= MEASURED_AGAIN]
        many = [b for b in range(len(q)) if b not in few]
        mean = torch.zeros(q.shape, dtype=torch.float64, device=q.device)
        log_total, ess = mean.new_zeros(len(q)), mean.new_zeros(len(q))
        for b in few:
            rows = carried[b] if eligible is None else eligible[carried[b]]
            total = self._measured(q[b], s[b], rows)
            mean[b], log_total[b], ess[b] = total.mean, total.log_total, total.ess
        if many:
            weights, log_total[many], ess[many] = softmax_of_rows(logits[many])
            log_total[many] -= q[many].double().square().sum(1) / 2
            weights = weights.to(q.dtype)
            for part, v, _ in self._blocks(count, eligible, q.dtype):
                mean[many] += weights[:, part] @ v
        return mean, log_total, ess

    def _blocks(
        self, count: int, eligible: Tensor | None, dtype: torch.dtype
    ) -> Iterator[tuple[slice, Tensor, Tensor]]:
        for start in range(0, count, BLOCK):
            part = slice(start, min(start + BLOCK, count))
            rows = part if eligible is None else eligible[part]
            yield part, self.bank.centred(rows, dtype), self.bank.norms[rows]
