"""Kamb's equivariant machines: the candidates for a pixel are patches from other places too."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ..bank import Bank
from ..errors import GolddiffError
from ..golden import Support
from ..locality import Window, Windows
from ..noise import Noise
from ..posterior import Posterior, RunningSoftmax
from .base import Denoiser
from .local import MaskedDenoiser
from .sources import WeighedPatches

__all__ = ["PatchDenoiser"]

NUMBERS_AT_ONCE = 2**24  # logits of a block
TYPICAL = 2.0  # root mean square of noise, in units of sigma, with some room
WORST_ROUNDING = 1e-4  # of a logit in float32, by a generous bound; float64 is used beyond


@dataclass(frozen=True)
class _Group:
    """Pixels that have the same candidates: their rows and columns, and those of the candidates' centres."""

    pixels: tuple[range, range]
    centres: tuple[range, range]


class PatchDenoiser(Denoiser):
    r"""ELS and bbELS ("An Analytic Theory of Creativity in Convolutional Diffusion Models").

    .. math:: l_{i, y', x'}[y, x] = -|P_{y x} x_t - \alpha P_{y' x'} x_i|^2 / (2 \sigma^2)

    for `window x window` patches P over all channels; the mean at a pixel is the softmax-weighted mean of the centres.

    ELS (`borders=False`): candidates are all patches that lie within the images, and `x_t` is padded circularly.
    bbELS: a patch that crosses a border is compared with patches that cross it alike, and pixels outside do not count.
    A window as large as the image falls back to LS. The work grows with N (H W)^2: mind the size of the bank.

    Weights are over patches: `weights(b, pixels)` gives `(K, 3)` row, y', x' in the place of rows.

    Arguments:
        windows: the side at each noise level.
    """

    properties = frozenset({"permutation_invariant", "exact"})
    by_level = True

    def __init__(self, bank: Bank, windows: Windows, borders: bool, options: dict[str, Any] | None = None) -> None:
        self.bank, self.windows, self.borders, self.options = bank, windows, borders, options or {}
        self._whole = MaskedDenoiser(bank, Window(bank.shape, windows))

    def _posterior(
        self, x_t: Tensor, noise: Noise, label: int | None, eligible: Tensor | None, seed: Tensor
    ) -> Posterior:
        _, height, width = self.bank.shape
        side = self.windows(noise[0])
        if side >= min(height, width):
            return self._whole._posterior(x_t, noise, label, eligible, seed)
        scan = _PatchScan(self.bank, x_t, noise[0], side, self.borders, eligible)
        mean, log_evidence, ess = (torch.zeros(x_t.shape, dtype=torch.float64, device=x_t.device) for _ in range(3))
        for group in scan.groups():
            sums = scan.softmax(group)
            index = _place(group.pixels)
            shape = (len(x_t), len(group.pixels[0]), len(group.pixels[1]))
            candidates = scan.count * len(group.centres[0]) * len(group.centres[1])
            mean[index] = sums.mean.reshape(-1, *shape).transpose(0, 1)
            log_evidence[index] = (sums.log_total - math.log(candidates)).reshape(shape)[:, None]
            ess[index] = sums.ess.reshape(shape)[:, None]
        count = torch.full((len(x_t),), scan.count, device=x_t.device)
        rows = None if eligible is None else eligible.expand(len(x_t), 1, -1)
        return Posterior(
            mean=mean.to(x_t.dtype),
            log_evidence=log_evidence,
            ess=ess,
            support=Support(rows, None, None, count, shared=True),
            x_t=x_t,
            noise=noise,
            _sources=WeighedPatches(self.bank, scan.weigh),
        )


class _PatchScan:
    """All patches of the eligible rows against those of a batch at one noise level."""

    def __init__(
        self, bank: Bank, x_t: Tensor, noise: Noise, side: int, borders: bool, eligible: Tensor | None
    ) -> None:
        self.bank, self.side, self.borders, self.eligible = bank, side, borders, eligible
        self.half = side // 2
        self.count = len(bank) if eligible is None else len(eligible)
        self.scale = float(noise.alpha) / float(noise.sigma)
        y = x_t.double() / float(noise.sigma)
        self.queries = functional.pad(y, (self.half,) * 4, mode="constant" if borders else "circular")
        size = bank.shape[0] * side**2
        longest = self.scale * math.sqrt(size)
        query = (self.scale + TYPICAL) * math.sqrt(size)
        error = 16 * torch.finfo(torch.float32).eps * longest * (2 * query + longest)
        self.dtype = x_t.dtype if error < WORST_ROUNDING else torch.float64

    def groups(self) -> Iterator[_Group]:
        """The pixels by their candidates."""
        _, height, width = self.bank.shape
        for rows in self._parts(height):
            for columns in self._parts(width):
                yield _Group((rows[0], columns[0]), (rows[1], columns[1]))

    def _parts(self, side: int) -> list[tuple[range, range]]:
        """Along one axis: places of pixels, and of the centres that they are compared with."""
        inside = range(self.half, side - self.half)
        if not self.borders:
            return [(range(side), inside)]
        edges = [*range(self.half), *range(side - self.half, side)]
        return [(inside, inside), *((range(i, i + 1), range(i, i + 1)) for i in edges)]

    def softmax(self, group: _Group) -> RunningSoftmax:
        """Over all candidates, for each image and pixel of the group (in this order)."""
        patches = self._patches(self.queries.to(self.dtype), group.pixels)
        total, own = RunningSoftmax(), patches.double().square().sum(1) / 2
        for _, candidates, centres in self._blocks(group, len(patches)):
            total.add(self._logits(patches, candidates), centres, shared=True)
        total.shift(-own)
        return total

    def weigh(self, b: int, pixels: Tensor | None) -> tuple[Tensor, Tensor]:
        _, height, width = self.bank.shape
        if pixels is None or pixels.numel() == 0:
            raise GolddiffError("weights over patches are many: say for which pixels, as in weights(0, [17])")
        places = [divmod(int(p) % (height * width), width) for p in pixels]
        group = next(g for g in self.groups() if places[0][0] in g.pixels[0] and places[0][1] in g.pixels[1])
        if not all(y in group.pixels[0] and x in group.pixels[1] for y, x in places):
            raise GolddiffError("these pixels have different candidates: ask for one at a time")
        query = self.queries[b : b + 1].to(self.dtype)
        patches = torch.cat([self._patches(query, (range(y, y + 1), range(x, x + 1))) for y, x in places])
        found, logits = [], []
        for rows, candidates, _ in self._blocks(group, len(patches)):
            grid = torch.cartesian_prod(rows, torch.tensor(group.centres[0]), torch.tensor(group.centres[1]))
            found.append(grid)
            logits.append(self._logits(patches, candidates).double())
        return torch.cat(found).to(self.queries.device), torch.cat(logits).softmax(0)

    def _blocks(self, group: _Group, queries: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Yields rows, the candidates `(n L, C side^2)` that they give, and their centres `(n L, C)`."""
        each = len(group.centres[0]) * len(group.centres[1])
        size = max(1, NUMBERS_AT_ONCE // (each * max(queries, self.bank.shape[0] * self.side**2)))
        everything = torch.arange(self.count) if self.eligible is None else self.eligible.cpu()
        for rows in everything.split(size):
            images = self.bank.images(rows.to(self.bank.device), self.dtype)
            padded = functional.pad(images, (self.half,) * 4)
            centres = images[_place(group.centres)].permute(0, 2, 3, 1).flatten(0, 2)
            yield rows, self._patches(padded, group.centres), centres

    def _patches(self, padded: Tensor, places: tuple[range, range]) -> Tensor:
        """Patches around places of images that are padded by half a window, `(n places, C side^2)`."""
        rows, columns = (slice(p.start, p.stop + 2 * self.half) for p in places)
        return functional.unfold(padded[:, :, rows, columns], self.side).transpose(1, 2).flatten(0, 1)

    def _logits(self, patches: Tensor, candidates: Tensor) -> Tensor:
        """Up to a constant of the pixel, `(candidates, pixels)`."""
        norms = candidates.square().sum(1, keepdim=True) * (-(self.scale**2) / 2)
        return torch.addmm(norms, candidates, patches.T, alpha=self.scale)


def _place(places: tuple[range, range]) -> tuple[slice, slice, slice, slice]:
    rows, columns = (slice(p.start, p.stop) for p in places)
    return slice(None), slice(None), rows, columns
