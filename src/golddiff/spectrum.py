"""Mean and covariance of a set of images, as an eigenbasis in float64."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["CONSTANT", "Rows", "Spectrum", "compute_spectrum"]

CONSTANT = 1e-12  # pixels whose variance is at most this are constant
EXACT_FLOAT32 = 2**24  # whole numbers up to here are exact in float32


@dataclass(frozen=True, eq=False)
class Spectrum:
    """`C = U diag(lam) U^T` around `mean`, in the units of the pixels as read ([-1, 1]), float64 on the CPU.

    Arguments:
        mean: `(D,)`.
        variances: diagonal of C, `(D,)`; constant pixels have exactly 0.
        eigenvalues: `lam >= 0`, `(r,)`, ascending; `r <= min(N, D)`.
        eigenvectors: `U`, `(D, r)`, orthonormal columns, exactly zero at constant pixels.
    """

    mean: Tensor
    variances: Tensor
    eigenvalues: Tensor
    eigenvectors: Tensor

    def to(self, device: torch.device) -> Spectrum:
        """The same on a device."""
        return Spectrum(**{name: tensor.to(device) for name, tensor in vars(self).items()})

    @property
    def varying(self) -> Tensor:
        """`(D,)` bool: the pixels that are not constant."""
        return self.variances > 0

    def columns(self, gains: Tensor, size: int = 1024) -> Iterator[tuple[slice, Tensor]]:
        """`U diag(gains) U^T` for gains `(r,)`, in blocks of columns: yields `(columns, (D, n))`."""
        scaled = self.eigenvectors * gains
        for start in range(0, len(self.mean), size):
            part = slice(start, min(start + size, len(self.mean)))
            yield part, scaled @ self.eigenvectors[part].T

    def diagonal(self, gains: Tensor) -> Tensor:
        """The diagonal of `U diag(gains) U^T`, `(D,)`."""
        return (self.eigenvectors.square() * gains).sum(1)


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
    """Mean, covariance (divided by N - 1) and its eigenbasis, by the Gram matrix where rows are fewer than pixels."""
    mean, variances, varying, values, inner = (_by_gram if rows.count <= len(rows.centre) else _by_covariance)(rows)
    vectors = torch.zeros(len(mean), len(values), dtype=torch.float64)
    vectors[varying] = inner
    return Spectrum(
        mean=rows.scale * (mean + rows.centre.double()) + rows.offset,
        variances=torch.where(varying, variances, 0.0),
        eigenvalues=values.clamp(min=0),
        eigenvectors=vectors,
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


def _by_covariance(rows: Rows) -> tuple[Tensor, ...]:
    """As `_by_gram`.

    Whole-number pixels are summed exactly: products of `n` rows are exact in float32 while
    `n * largest^2 <= 2^24`, and blocks of that many rows add up in float64. So the result is the same for any order
    of the rows, at the speed of float32.
    """
    exact = rows.largest is not None
    step = max(1, int(EXACT_FLOAT32 // rows.largest**2)) if rows.largest else 1024
    total = torch.zeros(len(rows.centre), dtype=torch.float64)
    product = torch.zeros(len(total), len(total), dtype=torch.float64)
    for v in rows.blocks(step, torch.float32 if exact else torch.float64):
        total += v.sum(0, dtype=torch.float64)
        product += v.T @ v
    product -= torch.outer(total, total) / rows.count
    product *= rows.scale**2 / (rows.count - 1)
    variances = product.diagonal().clone()
    varying = variances > CONSTANT
    values, inner = torch.linalg.eigh(product[varying][:, varying])
    return total / rows.count, variances, varying, values, inner
