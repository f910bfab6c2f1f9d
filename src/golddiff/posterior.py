"""The posterior over the bank: what every denoiser returns, and the one place of the softmax."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from .bank import Bank
from .errors import GolddiffError
from .golden import Support, hashed
from .noise import Noise

__all__ = ["Piece", "Posterior", "RunningSoftmax", "Sources", "softmax_of_rows"]


class Piece(NamedTuple):
    """Weights of some pixels: flat indices `(P,)`, rows of the bank `(K,)`, weights `(K, P)` that sum to 1."""

    pixels: Tensor
    rows: Tensor
    weights: Tensor


class Sources:
    """Where the means of a batch come from, and how they move with `x_t`: image by image, computed when asked for.

    This one knows nothing, and says what to use instead. Pixels are flat indices `(P,)`, None for all.
    """

    @property
    def bank_of_rows(self) -> Bank | None:
        """Whose rows they are, if there are any."""
        return None

    def weights(self, b: int, pixels: Tensor | None) -> tuple[Tensor, Tensor]:
        """Rows `(K,)`, and weights `(K,)` for whole images or `(K, P)` for local denoisers."""
        raise GolddiffError(
            "this denoiser has no rows, or not all of them, so it has no weights: use optimal, pca, ls or golddiff, "
            "with the bank in one process"
        )

    def pieces(self, b: int, pixels: Tensor | None) -> Iterator[Piece]:
        """The same in pieces; together they hold each of the pixels, which are given, once."""
        rows, weights = self.weights(b, pixels)
        if weights.ndim == 2:
            yield Piece(torch.arange(weights.shape[1], device=rows.device) if pixels is None else pixels, rows, weights)
        elif pixels is not None:
            yield Piece(pixels, rows, weights[:, None].expand(-1, len(pixels)))

    def error(self, b: int, pixels: Tensor | None) -> Tensor:
        """`(P,)` float64, see `Posterior.error`."""
        raise GolddiffError("this denoiser draws no rows, so it has no such error: use retrieval=local")

    def spread(self, b: int, v: Tensor, transposed: bool) -> Tensor:
        """Covariances of pixels times directions v `(k, D)` float64, `(k, D)`: the sum over n of `M[n, m] Cov(x[m],
        x[n]) v[n]` under the weights of pixel m, or, transposed, the sum over m of the same times `v[m]`."""
        raise GolddiffError("this denoiser has no derivative in closed form: use optimal, wiener, pca, ls or golddiff")


NOTHING_KNOWN = Sources()


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
    _sources: Sources = NOTHING_KNOWN
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
        return self._sources.weights(self._checked(b), None if pixels is None else self._flat(pixels))

    @property
    def bank(self) -> Bank | None:
        """The bank whose rows the weights are of; None where there are none."""
        return self._sources.bank_of_rows

    def pieces(self, b: int, pixels: Tensor | list[int] | None = None) -> Iterator[Piece]:
        """The same in pieces, whatever the kind of denoiser: together they hold each pixel once. With masks and windows
        their size is bounded.

        Arguments:
            b, pixels: as in `weights`.
        """
        yield from self._sources.pieces(self._checked(b), self._flat(pixels))

    def error(self, b: int, pixels: Tensor | list[int] | None = None) -> Tensor:
        """An estimate of the standard error of the mean of image b that drawing rows brings, `(pixels,)` float64.

        From the rows that were drawn (`sum (1 - pi) w^2 (x - mean)^2`): it knows nothing of rows of weight that the
        proxy took for light, so at low noise it is too small. 0 where nothing was drawn.

        Arguments:
            b, pixels: as in `weights`.
        """
        return self._sources.error(self._checked(b), None if pixels is None else self._flat(pixels))

    def jvp(self, v: Tensor) -> Tensor:
        r"""The Jacobian of the mean times `v`: how the mean moves when `x_t` moves by `v`, `(B, C, H, W)`.

        .. math:: J[m, n] = \frac{\alpha}{\sigma^2} M[n, m] \, \mathrm{Cov}_{w_m}(x[m], x[n])

        with M = 1 for whole images. The rows of a subset are held fixed.

        Arguments:
            v: `(B, C, H, W)`.

        Raises:
            GolddiffError: wrong shape, or a denoiser whose derivative has no closed form.
        """
        alpha, sigma = self.noise.like(self.x_t)
        return self._spread(v, transposed=False) * (alpha / sigma**2)

    def vjp(self, v: Tensor) -> Tensor:
        """The transposed Jacobian of the mean times `v`, as in `jvp`: the gradient of `sum(v * mean)`."""
        alpha, sigma = self.noise.like(self.x_t)
        return self._spread(v, transposed=True) * (alpha / sigma**2)

    def covariance_product(self, v: Tensor) -> Tensor:
        """The posterior covariance of the clean image times `v`, `(B, C, H, W)`, for denoisers of whole images."""
        self._check_whole()
        return self._spread(v, transposed=False)

    def covariance(self, b: int, pixels: Tensor | list[int] | None = None) -> Tensor:
        """The posterior covariance of some pixels of image b, `(P, P)` float64, for denoisers of whole images."""
        self._check_whole()
        wanted = self._flat(pixels)
        units = torch.zeros(len(wanted), self.x_t[0].numel(), dtype=torch.float64, device=wanted.device)
        units[torch.arange(len(wanted)), wanted] = 1
        return self._sources.spread(self._checked(b), units, False)[:, wanted]

    def _spread(self, v: Tensor, transposed: bool) -> Tensor:
        if not isinstance(v, Tensor) or v.shape != self.x_t.shape:
            raise GolddiffError(f"v must be a tensor of the shape of x_t, {tuple(self.x_t.shape)}")
        flat = v.flatten(1).to(self.x_t.device, torch.float64)
        parts = [self._sources.spread(b, flat[b : b + 1], transposed) for b in range(len(flat))]
        return torch.cat(parts).to(self.x_t.dtype).reshape(self.x_t.shape)

    def _check_whole(self) -> None:
        if self.log_evidence.ndim > 1:
            raise GolddiffError(
                "a local denoiser has a posterior for each pixel, not one of whole images: use optimal or wiener"
            )

    def _checked(self, b: int) -> int:
        if type(b) is not int or not 0 <= b < len(self.mean):
            raise GolddiffError(f"image {b!r} of a batch of {len(self.mean)}: count from 0")
        return b

    def _flat(self, pixels: Tensor | list[int] | None) -> Tensor:
        """Flat indices `(P,)`, checked."""
        count = self.x_t[0].numel()
        if pixels is None:
            return torch.arange(count, device=self.x_t.device)
        wrong = GolddiffError(f"pixels must be a list of flat indices from 0 to {count - 1}")
        try:
            flat = torch.as_tensor(pixels)
        except (TypeError, ValueError, RuntimeError, OverflowError) as error:
            raise wrong from error
        whole = flat.ndim == 1 and not (flat.is_floating_point() or flat.is_complex() or flat.dtype == torch.bool)
        if not whole or flat.numel() == 0 or bool(((flat < 0) | (flat >= count)).any()):
            raise wrong
        return flat.long().to(self.x_t.device)

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
        self._check_whole()
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

        def joined(tensors: list[Tensor]) -> Tensor:
            return torch.cat(tensors)[order.to(x_t.device)]

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
            _sources=_Merged([p._sources for p in parts], home),
            _keys=parts[0]._keys,
        )


class _Merged(Sources):
    """Those of the parts of a batch; `home[b]` is the part of image b, and its number there."""

    def __init__(self, parts: list[Sources], home: dict[int, tuple[int, int]]) -> None:
        self._parts, self._home = parts, home

    @property
    def bank_of_rows(self) -> Bank | None:
        return self._parts[0].bank_of_rows

    def _of(self, b: int) -> tuple[Sources, int]:
        part, number = self._home[b]
        return self._parts[part], number

    def weights(self, b: int, pixels: Tensor | None) -> tuple[Tensor, Tensor]:
        part, number = self._of(b)
        return part.weights(number, pixels)

    def pieces(self, b: int, pixels: Tensor | None) -> Iterator[Piece]:
        part, number = self._of(b)
        return part.pieces(number, pixels)

    def error(self, b: int, pixels: Tensor | None) -> Tensor:
        part, number = self._of(b)
        return part.error(number, pixels)

    def spread(self, b: int, v: Tensor, transposed: bool) -> Tensor:
        part, number = self._of(b)
        return part.spread(number, v, transposed)


def softmax_of_rows(logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Weights `(..., n)`, `logsumexp` and `1 / sum w^2` `(...)` in float64, of logits `(..., n)` held at once."""
    peak = logits.double().amax(-1, keepdim=True)  # apart from the total, which a large peak would swallow
    weights = (logits.double() - peak).exp_()
    total = weights.sum(-1, keepdim=True)
    weights /= total
    return weights, (peak + total.log())[..., 0], 1 / weights.square().sum(-1)


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
