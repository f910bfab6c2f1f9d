"""Denoisers that draw at random: closed-form diffusion, and nearest neighbours with random proposals."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ..bank import Bank
from ..errors import GolddiffError
from ..golden import PADDING, Support, hashed
from ..noise import Noise
from ..posterior import Posterior
from .base import Denoiser
from .sources import Weighed
from .whole import Optimal

__all__ = ["NeighbourProposals", "Smoothed"]


class Smoothed(Denoiser):
    r"""sigma-CFDM ("Closed-Form Diffusion Models"): the mean of the optimal denoiser around `x_t`.

    .. math:: mean = \frac{1}{M} \sum_m \mathrm{Optimal}(x_t + \alpha \kappa \xi_m)

    Draws are fresh at each noise level, and a function of the seed alone. `ess` is None, and weights are the means of
    those of the draws.

    Arguments:
        kappa: how far to look around, in the units of the data.
        draws: M.
        antithetic: draw pairs of opposite directions; M must be even.
    """

    properties = frozenset({"convex", "permutation_invariant", "mean_at_high_noise"})

    def __init__(
        self, bank: Bank, kappa: float, draws: int, antithetic: bool, options: dict[str, Any] | None = None
    ) -> None:
        if not isinstance(kappa, int | float) or isinstance(kappa, bool) or not 0 <= kappa < math.inf:
            raise GolddiffError(f"kappa is {kappa!r}: give a number of at least 0, such as 0.1")
        if type(draws) is not int or draws < 1 or (antithetic and draws % 2):
            raise GolddiffError(f"draws is {draws!r}: give a whole number of at least 1, even for antithetic pairs")
        self.bank, self.options = bank, options or {}
        self.kappa, self.draws, self.antithetic = float(kappa), draws, bool(antithetic)
        self._optimal = Optimal(bank)

    def _posterior(
        self, x_t: Tensor, noise: Noise, label: int | None, eligible: Tensor | None, seed: Tensor
    ) -> Posterior:
        count = self.draws // 2 if self.antithetic else self.draws
        directions = []
        for one, level in zip(seed.tolist(), noise.angle.tolist(), strict=True):
            xi = torch.randn(count, *x_t.shape[1:], generator=generator(one, level)).to(x_t.device, x_t.dtype)
            directions.append(torch.cat([xi, -xi]) if self.antithetic else xi)
        alpha, _ = noise.like(x_t)
        around = x_t[:, None] + alpha[:, None] * self.kappa * torch.stack(directions)
        levels = noise[torch.arange(len(x_t)).repeat_interleave(self.draws)]
        seeds = seed.repeat_interleave(self.draws)
        drawn = self._optimal._posterior(around.flatten(0, 1), levels, label, eligible, seeds)
        assert drawn.support is not None  # noqa: S101 - the optimal denoiser has rows
        rows = None if eligible is None else eligible.expand(len(x_t), 1, -1)
        support = Support(rows, None, None, drawn.support.eligible[:: self.draws], shared=True)

        def weigh(b: int, pixels: Tensor | None) -> tuple[Tensor, Tensor]:
            each = [drawn.weights(b * self.draws + m)[1] for m in range(self.draws)]
            return support.rows_of(b), torch.stack(each).mean(0)

        return Posterior(
            mean=drawn.mean.unflatten(0, (-1, self.draws)).mean(1),
            log_evidence=drawn.log_evidence.unflatten(0, (-1, self.draws)).logsumexp(1) - math.log(self.draws),
            ess=None,
            support=support,
            x_t=x_t,
            noise=noise,
            _sources=Weighed(self.bank, weigh),
        )


class NeighbourProposals(Denoiser):
    r"""Nearest neighbours with random proposals ("Nearest Neighbour Score Estimators for Diffusion Generative Models").

    Rows are drawn, n times, with `q_i` proportional to `e^{l_i}` for the k nearest and to the k-th's for all others;
    the mean is weighted by `e^{l_i} / q_i`, normalised by its own sum. Draws are a function of seed and noise level.

    Arguments:
        neighbours: k. draws: n.
    """

    properties = frozenset({"convex", "permutation_invariant"})

    def __init__(self, bank: Bank, neighbours: int, draws: int, options: dict[str, Any] | None = None) -> None:
        for name, value in (("neighbours", neighbours), ("draws", draws)):
            if type(value) is not int or value < 1:
                raise GolddiffError(f"{name} is {value!r}: give a whole number of at least 1")
        self.bank, self.neighbours, self.draws, self.options = bank, neighbours, draws, options or {}

    def _posterior(
        self, x_t: Tensor, noise: Noise, label: int | None, eligible: Tensor | None, seed: Tensor
    ) -> Posterior:
        everything = torch.arange(len(self.bank), device=x_t.device) if eligible is None else eligible
        everything = everything[self.bank.keys[everything].argsort()]  # so that the order of the rows does not matter
        q, s = self.bank.query(x_t, noise)
        drawn, means, totals, ess = [], [], [], []
        for b, level in enumerate(noise.angle.tolist()):
            rows, weights, log_total = self._draw(q[b], s[b], everything, generator(int(seed[b]), level))
            drawn.append((rows, weights))
            means.append(weights @ self.bank.centred(rows, torch.float64))
            totals.append(log_total)
            ess.append(1 / weights.square().sum())
        longest = max(len(rows) for rows, _ in drawn)
        kept = torch.full((len(x_t), 1, longest), PADDING, device=x_t.device)
        for b, (rows, _) in enumerate(drawn):
            kept[b, 0, : len(rows)] = rows
        count = torch.full((len(x_t),), len(everything), device=x_t.device)
        return Posterior(
            mean=self.bank.uncentred(torch.stack(means)).to(x_t.dtype).reshape(x_t.shape),
            log_evidence=torch.stack(totals) - math.log(len(everything)),
            ess=torch.stack(ess),
            support=Support(kept, None, None, count, shared=False),
            x_t=x_t,
            noise=noise,
            _sources=Weighed(self.bank, lambda b, pixels: drawn[b]),
        )

    def _draw(self, q: Tensor, s: Tensor, rows: Tensor, random: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """Distinct rows that were drawn, ascending, their weights, and the estimated log of the total."""
        logits = self.bank.distances(q, s, rows) / -2
        top = logits.max()
        logits -= top
        near = logits.topk(min(self.neighbours, len(rows)))
        others = torch.ones(len(rows), dtype=torch.bool, device=rows.device).index_fill_(0, near.indices, False)
        far = others.nonzero()[:, 0]
        last = near.values[-1]
        log_far = last + math.log(len(far)) if len(far) else torch.tensor(-math.inf, device=rows.device)
        log_total = torch.logaddexp(near.values.logsumexp(0), log_far)
        uniform = torch.rand(self.draws, 2, generator=random, dtype=torch.float64).to(rows.device)
        among = (near.values - log_total).exp().cumsum(0)
        place = torch.searchsorted(among, uniform[:, 0].contiguous())
        is_near = (place < len(among)) | (len(far) == 0)
        from_near = near.indices[place.clamp(max=len(among) - 1)]
        from_far = far[(uniform[:, 1] * len(far)).long()] if len(far) else from_near
        chosen = torch.where(is_near, from_near, from_far)
        ratios = torch.where(is_near, 0.0, logits[chosen] - last)  # log of e^l / q, in units of the total
        peak = ratios.max()
        ratios = (ratios - peak).exp()
        distinct, which = chosen.unique(return_inverse=True)
        weights = torch.zeros(len(distinct), dtype=torch.float64, device=rows.device).index_add_(0, which, ratios)
        order = rows[distinct].argsort()
        return rows[distinct][order], weights[order] / weights.sum(), top + log_total + peak + ratios.mean().log()


def generator(seed: int, level: int) -> torch.Generator:
    """Random numbers of a seed at a noise level (`Noise.angle`), on the CPU."""
    mixed = hashed(hashed(torch.tensor(seed)) ^ torch.tensor(~level))
    return torch.Generator().manual_seed(int(mixed) & (2**63 - 1))
