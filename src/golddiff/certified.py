"""Golden subsets of whole images with a guarantee: what they leave out is bounded."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .bank import Bank
from .errors import GolddiffError
from .golden import PADDING, Subset, Support, checked_tol
from .locality import Locality, WholeImage
from .noise import Noise
from .spectrum import Spectrum

__all__ = ["CertifiedSubset"]

COORDINATES = 256  # principal components that bound distances
FIRST = 64  # rows that are measured to begin with
BLOCK = 8192
SLACK = 1e-6  # of lengths, far beyond the rounding of float32 coordinates


class CertifiedSubset(Subset):
    r"""As many of the nearest rows as it takes to know the posterior mean up to a given error, whatever the data.

    With an orthonormal projection P (the bank's principal components; block averages where it has no eigenbasis) and
    the lengths r of what it leaves out,

    .. math:: |x - z|^2 \ge |P x - P z|^2 + (r(x) - r(z))^2,

    so one scan of projections bounds the logit of every row, and the mass of those that are not taken,
    `missed <= sum of the bounds`. With `Z` the mass of those that are, the mean moves by no more than
    `missed / (Z + missed)` times the largest distance of a row to it. Rows are taken until that is under `tol`.

    Arguments:
        tol: the root mean square error of a pixel (range 2) that is allowed.
    """

    by_level = True

    def __init__(self, bank: Bank, tol: float = 1e-3) -> None:
        self.bank, self.tol = bank, checked_tol(tol)
        self._projection: tuple[Tensor | None, Tensor, Tensor, Tensor] | None = None

    def select(
        self,
        x_t: Tensor,
        noise: Noise,
        locality: Locality,
        eligible: Tensor | None,
        seed: Tensor,
        label: int | None = None,
    ) -> Support:
        if not isinstance(locality, WholeImage):
            raise GolddiffError("retrieval=certified is for whole images: for local denoisers use retrieval=local")
        rows = torch.arange(len(self.bank), device=x_t.device) if eligible is None else eligible
        q, s = self.bank.query(x_t.double(), noise)
        bounds = self.lower_bounds(q, s, rows)
        share, by_key = self.allowed(rows), self.bank.keys[rows].argsort()  # so that their order does not matter
        rows, bounds = rows[by_key], bounds[:, by_key]
        chosen, missed = zip(*(self.enough(q[b], s[b], bounds[b], rows, share) for b in range(len(q))), strict=True)
        width = max(len(part) for part in chosen)
        padded = torch.full((len(q), 1, width), PADDING, device=rows.device)
        for b, part in enumerate(chosen):
            padded[b, 0, : len(part)] = part
        count = torch.full((len(q),), len(rows), device=x_t.device)
        log_missed = torch.tensor(missed, dtype=torch.float64, device=x_t.device)
        return Support(padded, None, None, count, shared=False, log_missed=log_missed)

    def allowed(self, rows: Tensor) -> float:
        """The share of the mass that may be missed: no two means are further apart than twice the longest row."""
        farthest = 2 * self.bank.scale * float(self.bank.norms[rows].max().sqrt()) / math.sqrt(self.bank.D)
        return min(1.0, self.tol / max(farthest, 1e-30))

    def enough(self, q: Tensor, s: Tensor, bounds: Tensor, rows: Tensor, share: float) -> tuple[Tensor, float]:
        """Rows of one image, ascending, that miss no more than a share of the mass, and `log` of what they may miss.

        Arguments:
            q: `(D,)` float64. s: `()` float64. bounds: `(n,)` float64, of `|q - s v|^2` from below.
        """
        order = bounds.argsort(stable=True)
        unseen = (bounds[order] / -2).flip(0).logcumsumexp(0).flip(0)  # of this place and all that follow
        nearest = self.bank.distances(q, s, rows[order[:FIRST]])
        certain = float((nearest / -2).logsumexp(0))
        late = (unseen <= certain + math.log(share / max(1 - share, 1e-12))).nonzero()[:, 0]
        count = max(len(nearest), int(late[0])) if len(late) else len(rows)
        log_missed = float(unseen[count]) if count < len(rows) else -math.inf
        return rows[order[:count]].sort().values, log_missed

    def lower_bounds(self, q: Tensor, s: Tensor, rows: Tensor) -> Tensor:
        """Bounds of `|q - s v|^2` from below, `(B, n)` float64: q `(B, D)`, s `(B,)` float64."""
        basis, coordinates, rests, lengths = self._projected()
        seen = self.bank.pooling(q) if basis is None else q @ basis
        hidden = (q.square().sum(1) - seen.square().sum(1)).clamp(min=0).sqrt()
        size = q.norm(dim=1)
        out = torch.empty(len(q), len(rows), dtype=torch.float64, device=q.device)
        for start in range(0, len(rows), BLOCK):
            part = rows[start : start + BLOCK]
            p = coordinates[part].double()
            self.bank.bytes_read += p.nbytes // 2
            for b in range(len(q)):
                slack = SLACK * (size[b] + s[b] * lengths[part])
                near = ((seen[b] - s[b] * p).square_().sum(1).sqrt() - slack).clamp(min=0)
                rest = ((hidden[b] - s[b] * rests[part]).abs() - slack).clamp(min=0)
                out[b, start : start + BLOCK] = near.square() + rest.square()
        return out

    def _projected(self) -> tuple[Tensor | None, Tensor, Tensor, Tensor]:
        """The basis `(D, r)` (None: block averages), coordinates `(N, r)` float32, and the lengths of what they leave
        out and of the rows, `(N,)` float64."""
        if self._projection is None:
            bank, device = self.bank, self.bank.device
            lengths = bank.norms.sqrt()
            if not bank.has_eigenbasis:
                basis, coordinates = None, bank.proxy
            else:
                statistics = bank.spectrum()
                assert isinstance(statistics, Spectrum)  # noqa: S101 - of this size it is
                basis = statistics.eigenvectors[:, -COORDINATES:].to(device)
                kept = bank.keep("coordinates", lambda: {"coordinates": self._coordinates(basis)}, remember=False)
                coordinates = kept["coordinates"].to(device)
            squares = torch.cat([part.double().square().sum(1) for part in coordinates.split(BLOCK)])
            self._projection = basis, coordinates, (bank.norms - squares).clamp(min=0).sqrt(), lengths
        return self._projection

    def _coordinates(self, basis: Tensor) -> Tensor:
        return torch.cat([(v @ basis).float().cpu() for _, _, v in self.bank.blocks(None, torch.float64)])
