"""Mean and covariance of a set of images in float64: as an eigenbasis, or as it is where that would take too long."""

from __future__ import annotations

import abc
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from .memory import require
from .progress import SILENT, Bar

__all__ = [
    "COLUMNS",
    "CONSTANT",
    "LARGEST_EIGENBASIS",
    "DenseCovariance",
    "Rows",
    "Spectrum",
    "Statistics",
    "compute_covariance",
    "compute_spectrum",
    "reduced_spectrum",
]

LARGEST_EIGENBASIS = 4096  # of min(N, D); its time grows with the cube: 20 s here on two cores
COLUMNS = 1024  # of a block

LEADING, SPARE = 2048, 128  # eigenvectors of a covariance that is too large for all, and those that help to find them
AGREES = 4e-3  # gains of what is left out, up to which masks agree (docs/scale.md)
CONSTANT = 1e-12  # pixels whose variance is at most this are constant
EXACT_FLOAT32 = 2**24  # whole numbers up to here are exact in float32


@dataclass(frozen=True, eq=False)
class Statistics(abc.ABC):
    """Mean and covariance C, in the units of the pixels as read ([-1, 1]), float64 on the CPU.

    Arguments:
        mean: `(D,)`.
        variances: diagonal of C, `(D,)`; constant pixels have exactly 0.
    """

    mean: Tensor
    variances: Tensor

    def to(self, device: torch.device) -> Self:
        """The same on a device."""
        return type(self)(**{name: tensor.to(device) for name, tensor in vars(self).items()})

    @property
    def varying(self) -> Tensor:
        """`(D,)` bool: the pixels that are not constant."""
        return self.variances > 0

    @abc.abstractmethod
    def filter(self, alpha: float, sigma: float) -> tuple[Tensor, Callable[[], Iterator[tuple[slice, Tensor]]]]:
        """`W = C (alpha^2 C + sigma^2 I)^-1`: its diagonal `(D,)`, and a function that yields `(columns, (D, n))`.

        Blocks may be overwritten.
        """

    @abc.abstractmethod
    def denoise(self, x: Tensor, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        r"""For Gaussian data of covariance C around 0, and `x = alpha y + sigma z` `(B, D)` float64, the mean of y
        and `log N(x; 0, A) - log N(0; 0, sigma^2 I)`, `(B,)`, where :math:`A = \alpha^2 C + \sigma^2 I`.

        Arguments:
            alpha, sigma: `(B or 1, 1)`.
        """


@dataclass(frozen=True, eq=False)
class Spectrum(Statistics):
    """`C = U diag(lam) U^T + rest (I - U U^T)`.

    Arguments:
        eigenvalues: `lam >= 0`, `(r,)`, ascending; `r <= min(N, D)`.
        eigenvectors: `U`, `(D, r)`, orthonormal columns, exactly zero at constant pixels.
        rest: `()`, the mean of the eigenvalues that are left out; 0 where none are.
    """

    eigenvalues: Tensor
    eigenvectors: Tensor
    rest: Tensor

    def filter(self, alpha: float, sigma: float) -> tuple[Tensor, Callable[[], Iterator[tuple[slice, Tensor]]]]:
        gain = self.rest / (alpha**2 * self.rest + sigma**2)
        gains = self.eigenvalues / (alpha**2 * self.eigenvalues + sigma**2) - gain

        def columns() -> Iterator[tuple[slice, Tensor]]:
            scaled = self.eigenvectors * gains
            for part in _slices(len(self.mean), COLUMNS):
                block = scaled @ self.eigenvectors[part].T
                block[part].diagonal().add_(gain * self.varying[part])
                yield part, block

        return (self.eigenvectors.square() * gains).sum(1) + gain * self.varying, columns

    def denoise(self, x: Tensor, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        inside = x @ self.eigenvectors
        total, left = alpha**2 * self.eigenvalues + sigma**2, alpha**2 * self.rest + sigma**2
        gain = alpha * self.rest / left
        mean = ((alpha * self.eigenvalues / total - gain) * inside) @ self.eigenvectors.T + gain * x * self.varying
        outside = (x.square().sum(1) - inside.square().sum(1)).clamp(min=0)
        powers = (inside.square() / total).sum(1) + outside / left[:, 0]
        others = len(self.mean) - len(self.eigenvalues)
        logs = torch.log(total / sigma**2).sum(1) + others * torch.log(left / sigma**2)[:, 0]
        return mean, -(powers + logs) / 2


@dataclass(frozen=True, eq=False)
class DenseCovariance(Statistics):
    """C itself, where an eigenbasis would take too long (`LARGEST_EIGENBASIS`): each noise level is a Cholesky
    factor. `sigma^2` is taken as at least `1e-13` of the trace of `alpha^2 C`, which keeps A positive.

    `filter` takes the leading eigenvectors instead, and the others as equal, where that hardly makes a difference: it
    is several times as fast.

    Arguments:
        covariance: `C`, `(D, D)`.
        eigenvalues, eigenvectors: the leading ones, `(r,)` ascending and `(D, r)`.
    """

    covariance: Tensor
    eigenvalues: Tensor
    eigenvectors: Tensor

    def _others_are_alike(self) -> bool:
        """Whether what the leading eigenvectors leave of the variances is much the same for all pixels that vary."""
        left = (self.variances - (self.eigenvectors.square() * self.eigenvalues).sum(1))[self.varying]
        return bool((left >= left.mean() / 2).all() and (left <= left.mean() * 2).all())

    @property
    def leading(self) -> Spectrum:
        """The leading eigenvectors, and the others as equal."""
        rest = (self.variances.sum() - self.eigenvalues.sum()).clamp(min=0) / (len(self.mean) - len(self.eigenvalues))
        vectors = self.eigenvectors * self.varying[:, None]
        return Spectrum(self.mean, self.variances, self.eigenvalues, vectors, rest)

    def filter(self, alpha: float, sigma: float) -> tuple[Tensor, Callable[[], Iterator[tuple[slice, Tensor]]]]:
        size = len(self.mean)
        if float(self.eigenvalues[0]) * alpha**2 <= AGREES * sigma**2 and self._others_are_alike():
            return self.leading.filter(alpha, sigma)
        if alpha**2 * float(self.variances.sum()) < 1e-8 * sigma**2:  # A is sigma^2 I to double precision
            w = self.covariance / sigma**2
        else:
            w = torch.cholesky_inverse(self._factor(alpha, sigma))
            w.mul_(-(self._floored(alpha, sigma) ** 2) / alpha**2).diagonal().add_(1 / alpha**2)
        varying = self.varying
        own = w.diagonal().clone().mul_(varying)

        def columns() -> Iterator[tuple[slice, Tensor]]:
            for part in _slices(size, COLUMNS):
                yield part, w[:, part] * (varying[:, None] & varying[part])

        return own, columns

    def denoise(self, x: Tensor, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        mean, log_density = torch.empty_like(x), x.new_empty(len(x))
        alpha, sigma = alpha.expand(len(x), 1)[:, 0], sigma.expand(len(x), 1)[:, 0]
        for a, s in {(float(a), float(s)) for a, s in zip(alpha, sigma, strict=True)}:
            these = (alpha == a) & (sigma == s)
            factor, s = self._factor(a, s), self._floored(a, s)
            solved = torch.cholesky_solve(x[these].T, factor)
            mean[these] = a * (self.covariance @ solved).T
            powers = (x[these] * solved.T).sum(1)
            log_density[these] = -powers / 2 - (factor.diagonal().log().sum() - len(factor) * math.log(s))
        return mean, log_density

    def _factor(self, alpha: float, sigma: float) -> Tensor:
        _require(len(self.mean), 17 * len(self.mean) ** 2)
        a = self.covariance * alpha**2
        a.diagonal().add_(self._floored(alpha, sigma) ** 2)
        return torch.linalg.cholesky(a)

    def _floored(self, alpha: float, sigma: float) -> float:
        return max(sigma, alpha * math.sqrt(1e-13 * float(self.variances.sum())))


def _slices(count: int, size: int) -> Iterator[slice]:
    for start in range(0, count, size):
        yield slice(start, min(start + size, count))


@dataclass(frozen=True)
class Rows:
    """Rows to take statistics of: `v` with pixels `x = scale * (v + centre) + offset`.

    Arguments:
        blocks: `blocks(n, dtype)` yields the rows, `(n, D)` each.
        count: N.
        centre: `(D,)`.
        largest: bound of `|v|` if the `v` are whole numbers, else None.
    """

    blocks: Callable[[int, torch.dtype], Iterator[Tensor]]
    count: int
    centre: Tensor
    scale: float
    offset: float
    largest: float | None


def compute_spectrum(rows: Rows) -> Spectrum:
    """The eigenbasis of the covariance (divided by N - 1), by the Gram matrix where rows are fewer than pixels."""
    size, count = len(rows.centre), rows.count
    _require(size, 8 * (5 * size * count + 6 * count**2 if count <= size else 9 * size**2))
    if count <= size:
        mean, *found = _by_gram(rows)
    else:
        mean, product = _covariance(rows)
        found = [*_eigenbasis(product)]
    return _spectrum(rows.scale * (mean + rows.centre.double()) + rows.offset, *found)


def _require(size: int, needed: int) -> None:
    what = f"the covariance of images of {size} numbers"
    require(needed, what, "build the bank of smaller images (--size), or use a method without it (optimal, ls, pspc)")


def reduced_spectrum(whole: Spectrum, count: int, gone: Tensor) -> Spectrum:
    """The eigenbasis without some rows, from that of all `count` rows: what they gave is subtracted.

    Arguments:
        gone: the rows in [-1, 1], `(n, D)` float64.
    """
    left = count - len(gone)
    x = gone - whole.mean
    shift = x.sum(0) / -left  # of the mean
    product = (whole.eigenvectors * whole.eigenvalues) @ whole.eigenvectors.T
    product.mul_(count - 1).addmm_(x.T, x, alpha=-1).addr_(shift, shift, alpha=-left)
    return _spectrum(whole.mean + shift, *_eigenbasis(product.div_(max(left - 1, 1))))


def _eigenbasis(product: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Variances, varying pixels, eigenvalues, and eigenvectors of the varying pixels, of a covariance `(D, D)`."""
    variances = product.diagonal().clone()
    varying = variances > CONSTANT
    return variances, varying, *torch.linalg.eigh(product[varying][:, varying])


def _spectrum(mean: Tensor, variances: Tensor, varying: Tensor, values: Tensor, inner: Tensor) -> Spectrum:
    vectors = torch.zeros(len(mean), len(values), dtype=torch.float64)
    vectors[varying] = inner
    return Spectrum(
        mean=mean,
        variances=torch.where(varying, variances, 0.0),
        eigenvalues=values.clamp(min=0),
        eigenvectors=vectors,
        rest=torch.zeros((), dtype=torch.float64),
    )


def compute_covariance(rows: Rows) -> DenseCovariance:
    """The covariance (divided by N - 1) itself, and its leading eigenvectors."""
    size = len(rows.centre)
    _require(size, 17 * size**2 + 24 * size * (LEADING + SPARE))  # the filter takes as much again
    mean, product = _covariance(rows)
    variances = product.diagonal()
    count = min(LEADING, len(mean) // 2)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        vectors, values, _ = torch.svd_lowrank(product.float(), min(count + SPARE, len(mean)), niter=2)
    return DenseCovariance(
        mean=rows.scale * (mean + rows.centre.double()) + rows.offset,
        variances=torch.where(variances > CONSTANT, variances, 0.0),
        covariance=product,
        eigenvalues=values[:count].flip(0).double(),
        eigenvectors=vectors[:, :count].flip(1).double(),
    )


def _by_gram(rows: Rows) -> tuple[Tensor, ...]:
    """Mean of `v`, variances, varying pixels, eigenvalues, eigenvectors of the varying pixels."""
    v = torch.cat(list(rows.blocks(1024, torch.float64)))
    mean = v.sum(0) / rows.count
    x = (v - mean) * rows.scale
    variances = x.square().sum(0) / max(rows.count - 1, 1)
    varying = variances > CONSTANT
    x = x[:, varying]
    values, vectors = torch.linalg.eigh(x @ x.T)
    keep = values > values[-1] * rows.count * torch.finfo(torch.float64).eps
    values, vectors = values[keep], vectors[:, keep]
    return mean, variances, varying, values / max(rows.count - 1, 1), x.T @ vectors / values.sqrt()


def _covariance(rows: Rows) -> tuple[Tensor, Tensor]:
    """Mean of `v`, `(D,)`, and covariance of the pixels as read, `(D, D)`.

    Whole-number pixels are summed exactly: products of `n` rows are exact in float32 while
    `n * largest^2 <= 2^24`, and blocks of that many rows add up in float64. So the result is the same for any order
    of the rows, at the speed of float32. Only one triangle is computed.
    """
    exact = rows.largest is not None
    step = max(1, int(EXACT_FLOAT32 // rows.largest**2)) if rows.largest else 1024
    size = len(rows.centre)
    total = torch.zeros(size, dtype=torch.float64)
    product = torch.zeros(size, size, dtype=torch.float64)
    blocks = rows.blocks(step, torch.float32 if exact else torch.float64)
    for v in Bar(blocks, "covariance", -(-rows.count // step), leave=False, delay=SILENT, disable=None):
        total += v.sum(0, dtype=torch.float64)
        for part in _slices(size, COLUMNS):
            product[part, part.start :] += v[:, part].T @ v[:, part.start :]
    for part in _slices(size, COLUMNS):
        product[part.stop :, part] = product[part, part.stop :].T
    product.addr_(total, total, alpha=-1 / rows.count)
    product *= rows.scale**2 / max(rows.count - 1, 1)
    return total / rows.count, product
