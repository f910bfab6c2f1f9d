"""The linear denoiser: exact for Gaussian data of the bank's mean and covariance."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..bank import Bank
from ..noise import Noise
from ..posterior import Posterior
from .base import Denoiser
from .sources import Linear

__all__ = ["Wiener"]


class Wiener(Denoiser):
    r"""The Wiener filter of the bank's mean and covariance, in float64.

    .. math:: mean = \mu + \alpha C (\alpha^2 C + \sigma^2 I)^{-1} (x_t - \alpha \mu)

    It has no rows: `support` and `ess` are None. `log_evidence` is that of the Gaussian.

    Arguments:
        statistics: `bank`, or `class` for the mean and covariance of the label's rows.
    """

    properties = frozenset({"permutation_invariant", "mean_at_high_noise"})

    def __init__(self, bank: Bank, statistics: str = "bank", options: dict[str, Any] | None = None) -> None:
        self.bank, self.statistics, self.options = bank, statistics, options or {}

    def _posterior(
        self, x_t: Tensor, noise: Noise, label: int | None, eligible: Tensor | None, seed: Tensor
    ) -> Posterior:
        statistics = self.bank.spectrum(label if self.statistics == "class" else None).to(x_t.device)
        size = torch.hypot(noise.alpha, noise.sigma)  # only ratios matter, and squares of tiny levels vanish
        alpha, sigma = Noise(noise.alpha / size, noise.sigma / size).like(x_t.flatten(1).double())
        rest = x_t.flatten(1).double() / size[:, None].to(x_t.device) - alpha * statistics.mean
        shift, log_evidence = statistics.denoise(rest, alpha, sigma)
        mean = statistics.mean + shift
        return Posterior(
            mean=mean.to(x_t.dtype).reshape(x_t.shape),
            log_evidence=log_evidence,
            ess=None,
            support=None,
            x_t=x_t,
            noise=noise,
            _sources=Linear(statistics, alpha, sigma),
        )
