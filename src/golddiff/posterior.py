"""The posterior over the bank: what every denoiser returns, and the one place of the softmax."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .errors import GolddiffError
from .golden import Support, hashed
from .noise import Noise

__all__ = ["Posterior", "RunningSoftmax", "softmax_of_rows"]

Weigh = Callable[[int, Tensor | None], tuple[Tensor, Tensor]]


@dataclass(frozen=True, eq=False, repr=False)
class Posterior:
    r"""The posterior of the clean image given `x_t`, over the rows of a bank.

    .. math:: w = \mathrm{softmax}(l + \log q), \quad mean = \sum_i w_i x_i

    Arguments:
        mean: `(B, C, H, W)` in [-1, 1], the denoised image.
        log_evidence: `logsumexp(l + log q) - log N`, float64: `(B,)` for whole-image denoisers,
            `(B, C, H, W)` for local ones.
        ess: effective number of rows `1 / sum w^2`, same shape; None for denoisers without rows.
        support: the rows; None for denoisers without rows.
        x_t: `(B, C, H, W)`. noise: its level, of each image.
        error_bound: how far the mean may be from that over all rows, root mean square of a pixel, `(B,)` float64; 0 for
            exact denoisers, None where nothing is guaranteed.
    """

    mean: Tensor
    log_evidence: Tensor
    ess: Tensor | None
    support: Support | None
    x_t: Tensor
    noise: Noise
    error_bound: Tensor | None = None
    _weigh: Weigh | None = None
    _error: Callable[[int, Tensor | None], Tensor] | None = None
    _keys: Tensor | None = None

    def __repr__(self) -> str:
        rows = "" if self.ess is None else f", ess {float(self.ess.mean()):.1f} on average"
        return f"Posterior of {len(self.mean)} images {tuple(self.mean.shape[1:])}{rows}"

    def weights(self, b: int, pixels: Tensor | list[int] | None = None) -> tuple[Tensor, Tensor]:
        """Rows and weights of image b, computed when asked for.

        Arguments:
            b: which image of the batch.
            pixels: for local denoisers, flat indices into `C * H * W`; None for all pixels.

        Returns:
            rows `(K,)`, and weights `(K,)` for whole images or `(K, pixels)` for local denoisers.
        """
        if self._weigh is None:
            raise GolddiffError(
                "this denoiser has no rows, or not all of them, so it has no weights: use optimal, pca or golddiff, "
                "with the bank in one process"
            )
        if not 0 <= b < len(self.mean):
            raise GolddiffError(f"image {b} of a batch of {len(self.mean)}: count from 0")
        return self._weigh(b, None if pixels is None else torch.as_tensor(pixels))

    def error(self, b: int, pixels: Tensor | list[int] | None = None) -> Tensor:
        """An estimate of the standard error of the mean of image b that drawing rows brings, `(pixels,)` float64.

        From the rows that were drawn (`sum (1 - pi) w^2 (x - mean)^2`): it knows nothing of rows of weight that the
        proxy took for light, so at low noise it is too small. 0 where nothing was drawn.

        Arguments:
            b, pixels: as in `weights`.
        """
        if self._error is None:
            raise GolddiffError("this denoiser draws no rows, so it has no such error: use retrieval=local")
        if not 0 <= b < len(self.mean):
            raise GolddiffError(f"image {b} of a batch of {len(self.mean)}: count from 0")
        return self._error(b, None if pixels is None else torch.as_tensor(pixels))

    def score(self) -> Tensor:
        """`(alpha mean - x_t) / sigma^2`, the gradient of the log-density at `x_t`, `(B, C, H, W)`."""
        alpha, sigma = self.noise.like(self.x_t)
        return (alpha * self.mean - self.x_t) / sigma**2

    def eps(self) -> Tensor:
        """`(x_t - alpha mean) / sigma`, the expected noise, `(B, C, H, W)`."""
        alpha, sigma = self.noise.like(self.x_t)
        return (self.x_t - alpha * self.mean) / sigma

    @property
    def log_density(self) -> Tensor:
        """`log p_t(x_t)`, `(B,)` float64, for denoisers of whole images."""
        if self.log_evidence.ndim > 1:
            raise GolddiffError("a local denoiser has no density of whole images: use optimal or wiener")
        size = self.x_t[0].numel()
        return self.log_evidence - size / 2 * torch.log(2 * math.pi * self.noise.sigma.to(self.x_t.device) ** 2)

    def draw(self, seed: int | Sequence[int] | Tensor = 0) -> Tensor:
        """One row for each image, drawn from the posterior over whole images, `(B,)`.

        The draw is a function of seed, noise level and row keys, so it does not depend on the rest of the batch.

        Arguments:
            seed: one for all or `(B,)`.
        """
        if self.log_evidence.ndim > 1 or self._keys is None:
            raise GolddiffError("this denoiser has no posterior over whole images: use optimal")
        seeds = torch.as_tensor(seed).long().expand(len(self.mean))
        out = []
        for b, level in enumerate(self.noise.expand(len(self.mean)).angle):
            rows, weights = self.weights(b)
            salt = hashed(hashed(seeds[b].cpu()) ^ ~level).to(rows.device)
            uniform = ((hashed(self._keys[rows] ^ salt) >> 11 & (2**53 - 1)).double() + 0.5) / 2**53
            out.append(rows[(weights.double().log() - (-uniform.log()).log()).argmax()])
        return torch.stack(out)

    @staticmethod
    def merge(parts: list[Posterior], items: list[Tensor], x_t: Tensor, noise: Noise) -> Posterior:
        """The posterior of a batch from those of its parts; `items[p]` are the images of part p."""
        if len(parts) == 1:
            return replace(parts[0], x_t=x_t, noise=noise)
        order = torch.cat(items).argsort()
        home = {int(i): (p, j) for p, where in enumerate(items) for j, i in enumerate(where)}

        def weigh(b: int, pixels: Tensor | None) -> tuple[Tensor, Tensor]:
            part, local = home[b]
            return parts[part].weights(local, pixels)

        def joined(tensors: list[Tensor]) -> Tensor:
            return torch.cat(tensors)[order.to(x_t.device)]

        def error(b: int, pixels: Tensor | None) -> Tensor:
            part, local = home[b]
            return parts[part].error(local, pixels)

        bounds = [p.error_bound for p in parts if p.error_bound is not None]
        supports = [p.support for p in parts if p.support is not None]
        ess = [p.ess for p in parts if p.ess is not None]
        return Posterior(
            mean=joined([p.mean for p in parts]),
            log_evidence=joined([p.log_evidence for p in parts]),
            ess=joined(ess) if ess else None,
            support=Support.merge(supports, items) if supports else None,
            x_t=x_t,
            noise=noise,
            error_bound=joined(bounds) if len(bounds) == len(parts) else None,
            _weigh=weigh if parts[0]._weigh else None,
            _error=error if parts[0]._error else None,
            _keys=parts[0]._keys,
        )


def softmax_of_rows(logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Weights `(..., n)`, `logsumexp` and `1 / sum w^2` `(...)` in float64, of logits `(..., n)` held at once."""
    log_total = logits.double().logsumexp(-1)
    weights = (logits.double() - log_total[..., None]).exp_()
    return weights, log_total, 1 / weights.square().sum(-1)


class RunningSoftmax:
    """Softmax-weighted mean of rows that arrive in blocks, for one image.

    Weights are one for each row (whole images) or one for each row and pixel (local). Sums within a block
    are in the type of the logits, sums over blocks in float64.
    """

    def __init__(self) -> None:
        self._peak: Tensor | None = None

    def add(self, logits: Tensor, values: Tensor, shared: bool = False) -> None:
        """Adds rows: logits `(n,)` or `(n, D)` (overwritten), values `(n, D)`.

        With `shared`, all columns of logits `(n, P)` weigh the same values `(n, C)`, and the mean is `(C, P)`.
        """
        peak = logits.amax(0)
        if self._peak is not None:
            peak = torch.maximum(peak, self._peak)
        e = logits.sub_(peak).exp_()
        total, squares = e.sum(0).double(), torch.linalg.vector_norm(e, dim=0).double() ** 2
        mean = (values.T @ e if shared else e @ values if e.ndim == 1 else (e * values).sum(0)).double()
        if self._peak is None:
            self._total, self._squares, self._mean = total, squares, mean
        else:
            shrink = (self._peak - peak).double().exp()
            self._total = self._total * shrink + total
            self._squares = self._squares * shrink**2 + squares
            self._mean = self._mean * shrink + mean
        self._peak = peak

    def shift(self, constant: Tensor) -> None:
        """Adds a constant to all logits, or one to each column."""
        assert self._peak is not None  # noqa: S101 - there is at least one row
        self._peak = self._peak.double() + constant

    @property
    def log_total(self) -> Tensor:
        """`logsumexp` of all logits, `()` or `(D,)` float64."""
        assert self._peak is not None  # noqa: S101 - a subset has at least one row
        return self._peak.double() + self._total.log()

    @property
    def mean(self) -> Tensor:
        """`(D,)` float64."""
        return self._mean / self._total

    @property
    def ess(self) -> Tensor:
        """`1 / sum w^2`, `()` or `(D,)` float64."""
        return self._total**2 / self._squares
