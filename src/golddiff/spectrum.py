"""Mean and covariance of a set of images, as an eigenbasis in float64."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["CONSTANT", "Spectrum", "compute_spectrum"]

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

    @property
    def varying(self) -> Tensor:
        """`(D,)` bool: the pixels that are not constant."""
        return self.variances > 0

    def filtered(self, gains: Tensor) -> Tensor:
        """`U diag(gains) U^T`, `(D, D)`, for gains `(r,)`."""
        return (self.eigenvectors * gains) @ self.eigenvectors.T


def compute_spectrum(
    blocks: Callable[[int, torch.dtype], Iterator[Tensor]],
    count: int,
    centre: Tensor,
    scale: float,
    offset: float,
    largest: float | None,
) -> Spectrum:
    """Mean, covariance (divided by N - 1) and its eigenbasis.

    Whole-number pixels are summed exactly: products of `n` rows are exact in float32 while
    `n * largest^2 <= 2^24`, and blocks of that many rows add up in float64. So the result is the same
    for any order of the rows, at the speed of float32. With fewer rows than pixels the Gram matrix of the
    rows gives the same basis for less.

    Arguments:
        blocks: `blocks(n, dtype)` yields the rows `v`, `(n, D)`, with pixels `x = scale * (v + centre) + offset`.
        count: N.
        largest: bound of `|v|` if the `v` are whole numbers, else None.
    """
    exact = largest is not None
    dtype = torch.float32 if exact else torch.float64
    step = max(1, int(EXACT_FLOAT32 // largest**2)) if largest else 1024
    size = len(centre)
    if count <= size:
        rows = torch.cat(list(blocks(1024, torch.float64)))
        total = rows.sum(0)
        rows = (rows - total / count) * scale
        variances = rows.square().sum(0) / max(count - 1, 1)
        varying = variances > CONSTANT
        values, vectors = torch.linalg.eigh(rows[:, varying] @ rows[:, varying].T)
        keep = values > values[-1] * count * torch.finfo(torch.float64).eps
        values, vectors = values[keep], vectors[:, keep]
        inner = rows[:, varying].T @ vectors / values.sqrt()
        values = values / max(count - 1, 1)
    else:
        total = torch.zeros(size, dtype=torch.float64)
        product = torch.zeros(size, size, dtype=torch.float64)
        for v in blocks(step, dtype):
            total += v.sum(0, dtype=torch.float64)
            product += v.T @ v
        product -= torch.outer(total, total) / count
        product *= scale**2 / max(count - 1, 1)
        variances = product.diagonal().clone()
        varying = variances > CONSTANT
        values, inner = torch.linalg.eigh(product[varying][:, varying])
    vectors = torch.zeros(size, len(values), dtype=torch.float64)
    vectors[varying] = inner
    return Spectrum(
        mean=scale * (total / count + centre.double()) + offset,
        variances=torch.where(varying, variances, 0.0),
        eigenvalues=values.clamp(min=0),
        eigenvectors=vectors,
    )
