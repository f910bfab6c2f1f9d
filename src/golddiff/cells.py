"""Cells: the rows of a large bank, grouped by what the tiles of a noise level compare, so that few need be scored.

For each tile the rows are brought to a few principal coordinates of what its mask weighs, and grouped by two rounds of
k-means. A search looks at cells first. A cell gets a chance from where its centre lies and how far its rows spread;
rows of cells whose chance is 1 are all scored, rows of others are drawn by that chance, and no chance is less than that
of a draw from the whole bank, so nothing is left out for good. Who is drawn depends on the lots of the rows alone.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .golden import PADDING
from .progress import SILENT, Bar

__all__ = ["Cells", "reached"]

COORDINATES = 32
BRANCHES = 64
CELLS = BRANCHES**2
TRAINING = 2**16  # rows that cells are found from
SHAPING = 2**14  # rows that coordinates are found from
ROUNDS = 8  # of k-means
NEAREST = 0.75  # of the rows that are reached, those of the nearest cells
STEEPEST, FARTHEST = 1e30, 1e12  # what is beyond the range of float32 is taken for these
NUMBERS = 2**25  # rows times entries that are read at once

Rows = Callable[[Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class Cells:
    """Cells of T tiles, C of each.

    Arguments:
        basis: `(T, U, d)` float32, from the inputs of a row that count for a tile to coordinates.
        centres: `(T, C, d)` float32.
        spreads: `(T, C)` float32, the mean square of a coordinate of a row from its centre.
        begins: `(T, C + 1)` int64, where the rows of each cell begin.
        rows: `(T, N)` int32, cell by cell.
        cells: `(N, T)` int16, the cell of each row.
    """

    basis: Tensor
    centres: Tensor
    spreads: Tensor
    begins: Tensor
    rows: Tensor
    cells: Tensor

    @staticmethod
    def find(read: Rows, keys: Tensor, inputs: Tensor, weights: Tensor) -> dict[str, Tensor]:
        """The tensors of the cells of all rows.

        Arguments:
            read: `read(rows)` gives what is compared of some rows, `(n, M)` float32.
            keys: of the rows, `(N,)`; those with the smallest are a sample of all.
            inputs: `(T, U)`. weights: how much each counts, `(T, U)`; 0 for padding.
        """
        count, tiles, places = len(keys), len(inputs), list(inputs.long())
        block = max(1, NUMBERS // read(torch.zeros(1, dtype=torch.int64)).shape[1])
        sample = keys.argsort()[: min(TRAINING, count)]
        shaping = read(sample[:SHAPING]).T.contiguous()
        roots = weights.sqrt().float()[..., None]
        bases = [_principal(shaping[here] * root) * root for here, root in zip(places, roots, strict=True)]

        def coordinates(rows: Tensor) -> list[Tensor]:
            v = read(rows).T.contiguous()
            return [(basis.T @ v[here]).T.contiguous() for here, basis in zip(places, bases, strict=True)]

        parts = zip(*(coordinates(part) for part in sample.split(block)), strict=True)
        trees = [_Tree.grow(torch.cat(part)) for part in parts]
        cells = torch.empty(count, tiles, dtype=torch.int16)
        sums = torch.zeros(tiles, CELLS, dtype=torch.float64)
        for start in Bar(range(0, count, block), desc="cells", leave=False, delay=SILENT, disable=None):
            some = torch.arange(start, min(start + block, count))
            for t, (tree, y) in enumerate(zip(trees, coordinates(some), strict=True)):
                cell, far = tree.find(y)
                cells[some, t] = cell.to(torch.int16)
                sums[t].index_add_(0, cell, far.double())
        rows = torch.empty(tiles, count, dtype=torch.int32)
        begins = torch.zeros(tiles, CELLS + 1, dtype=torch.int64)
        for t in range(tiles):
            own = cells[:, t].numpy()
            rows[t] = torch.from_numpy(np.argsort(own, kind="stable").astype(np.int32))
            begins[t, 1:] = torch.from_numpy(np.bincount(own, minlength=CELLS)).cumsum(0)
        sizes = begins.diff(dim=1).clamp(min=1)
        return {
            "basis": torch.stack(bases),
            "centres": torch.stack([tree.leaves for tree in trees]),
            "spreads": (sums / sizes / bases[0].shape[1]).float(),
            "begins": begins,
            "rows": rows,
            "cells": cells,
        }

    @staticmethod
    def fit(tensors: dict[str, Tensor], count: int, inputs: Tensor) -> bool:
        """Whether tensors are cells of so many rows, whose numbers lead to rows and cells that there are."""
        begins, rows, cells, basis = (tensors[name] for name in ("begins", "rows", "cells", "basis"))
        tiles, places = inputs.shape
        shapes = [tuple(tensors[name].shape) for name in ("begins", "rows", "cells", "spreads")]
        if shapes != [(tiles, CELLS + 1), (tiles, count), (count, tiles), (tiles, CELLS)]:
            return False
        if basis.shape[:2] != (tiles, places) or tensors["centres"].shape != (tiles, CELLS, basis.shape[2]):
            return False
        if (begins.dtype, rows.dtype, cells.dtype) != (torch.int64, torch.int32, torch.int16):
            return False
        steady = bool((begins.diff(dim=1) >= 0).all() and (begins[:, 0] == 0).all() and (begins[:, -1] == count).all())
        return steady and bool(rows.min() >= 0 and rows.max() < count and cells.min() >= 0 and cells.max() < CELLS)

    def chances(self, seen: Tensor, step: Tensor, wanted: int, least: float) -> Tensor:
        r"""The logarithm of the chance of each cell, `(B, T, C)` float32; so many rows of a tile are expected.

        Logits are :math:`-a |y - q|^2 / 2` in the coordinates y, `a = step^2`. The chance that makes the variance of a
        sum of weights smallest is proportional to the root of the mean of their squares, which for rows spread around
        the centre c like a Gaussian of variance r^2 in d coordinates is

        .. math:: (1 + 2 a r^2)^{-d / 4} \exp\left(-\frac{a}{2} \frac{|c - q|^2}{1 + 2 a r^2}\right)

        Rows are not quite that, so the nearest cells are taken whole before, up to three quarters of the rows.

        Arguments:
            seen: of the query, `(B, T, U)` float64, in the units of the rows. step: `()`.
            wanted: rows of a tile. least: the logarithm of the chance of a row in any cell.
        """
        a = min(float(step) ** 2, STEEPEST)
        y = torch.einsum("btu,tud->btd", seen.clamp(-FARTHEST, FARTHEST).float(), self.basis)
        squares = self.centres.square().sum(-1) + y.square().sum(-1, keepdim=True)  # (B, T, C)
        far = (squares - 2 * torch.einsum("btd,tcd->btc", y, self.centres)).clamp(min=0)
        wide = 1 + 2 * a * self.spreads
        scores = (-(self.basis.shape[2] / 4) * wide.log() - a / wide * far / 2).clamp(min=-STEEPEST)
        scores -= scores.amax(-1, keepdim=True)
        nearest = far.argsort(dim=-1)
        sizes = self.begins.diff(dim=1).expand_as(nearest).gather(-1, nearest).cumsum(-1)
        scores = scores.scatter(-1, nearest, torch.where(sizes <= NEAREST * wanted, 0.0, scores.gather(-1, nearest)))
        return (scores + self._log_c(scores, wanted)).clamp(min=least, max=0.0)

    def _log_c(self, scores: Tensor, wanted: int) -> Tensor:
        """`log c`, `(B, T, 1)`, such that the chances `min(1, c exp(score))` of all rows add up to so many."""
        order = scores.argsort(dim=-1, descending=True)
        sizes = self.begins.diff(dim=1).expand_as(order).gather(-1, order).double()
        ordered = scores.gather(-1, order).double()
        # with the first j cells taken whole, the others get exp(score + log c): the c that makes up the rest
        whole = sizes.cumsum(-1) - sizes
        mass = (ordered.exp() * sizes).flip(-1).cumsum(-1).flip(-1)
        log_c = ((wanted - whole).clamp(min=1e-9) / mass.clamp(min=1e-300)).log()
        fits = ordered + log_c <= 0
        fits[..., -1] = True
        return log_c.gather(-1, fits.to(torch.int8).argmax(-1, keepdim=True)).to(scores.dtype)


def reached(cells: Cells, chances: Tensor, least: float, lots: Tensor, compiled: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Rows that are to be scored for each image and tile, the logarithms of their chances, and what is left of their
    lots (`lot - chance`), `(B T, K)` each, padded with -1, 0 and infinity.

    Arguments:
        chances: `(B, T, C)`, at least `least`. lots: `(B, N)`, logarithms of what each row has drawn.
    """
    batch, tiles, _ = chances.shape
    anyway = [(lot < least).nonzero()[:, 0] for lot in lots]
    if compiled:
        from . import kernels

        kernels.use_threads_of_torch()
        padded = torch.nn.utils.rnn.pad_sequence(anyway, batch_first=True, padding_value=PADDING)
        numbers = (tensor.numpy() for tensor in (lots, padded, cells.begins, cells.rows, cells.cells))
        found = kernels.reached(chances.flatten(0, 1).contiguous().numpy(), np.float32(least), *numbers, PADDING)
        return torch.from_numpy(found[0]), torch.from_numpy(found[1]), torch.from_numpy(found[2])
    rows, bounds, left = [], [], []
    for b, t in itertools.product(range(batch), range(tiles)):
        own = chances[b, t]
        near = (own > least).nonzero()[:, 0]
        begins, sizes = cells.begins[t][near], cells.begins[t].diff()[near]
        places = torch.arange(int(sizes.sum()), device=sizes.device) + (
            begins - sizes.cumsum(0) + sizes
        ).repeat_interleave(sizes)
        found_rows, chance = cells.rows[t][places].long(), own[near].repeat_interleave(sizes)
        some = lots[b][found_rows] < chance
        others = anyway[b][own[cells.cells[anyway[b], t].long()] <= least]
        rows.append(torch.cat([found_rows[some], others]))
        bounds.append(torch.cat([chance[some], torch.full((len(others),), least, device=chance.device)]))
        left.append(lots[b][rows[-1]] - bounds[-1])

    def padded_with(value: float, parts: list[Tensor]) -> Tensor:
        return torch.nn.utils.rnn.pad_sequence(parts, batch_first=True, padding_value=value)

    return padded_with(PADDING, rows), padded_with(0.0, bounds), padded_with(math.inf, left)


@dataclass(frozen=True)
class _Tree:
    """Two rounds of k-means: `branches` `(b, d)`, and `leaves` `(C, d)`, those of branch j from `begins[j]` on."""

    branches: Tensor
    leaves: Tensor
    begins: list[int]

    @staticmethod
    def grow(x: Tensor) -> _Tree:
        """From a sample in random order, `(n, d)`."""
        branches = _k_means(x, min(BRANCHES, len(x)))
        home = _nearest(x, branches)
        sizes = torch.bincount(home, minlength=len(branches))
        shares = (sizes * (CELLS - len(branches)) // len(x) + 1).tolist()
        shares[int(sizes.argmax())] += CELLS - sum(shares)
        leaves, begins = [], [0]
        for j, share in enumerate(shares):
            own = x[home == j]
            own = own if len(own) else branches[j : j + 1]
            found = _k_means(own, min(share, len(own)))
            leaves.append(found[torch.arange(share) % len(found)])
            begins.append(begins[-1] + share)
        return _Tree(branches, torch.cat(leaves), begins)

    def find(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The leaf of each `x` `(n, d)`, and the square of the distance to it."""
        home = _nearest(x, self.branches)
        order = torch.from_numpy(np.argsort(home.to(torch.int16).numpy(), kind="stable"))
        leaf = torch.empty_like(home)
        parts = order.split(torch.bincount(home, minlength=len(self.branches)).tolist())
        for j, part in enumerate(parts):
            if len(part):
                leaf[part] = self.begins[j] + _nearest(x[part], self.leaves[self.begins[j] : self.begins[j + 1]])
        return leaf, (x - self.leaves[leaf]).square().sum(1)


def _principal(z: Tensor) -> Tensor:
    """The leading principal directions of columns `(U, n)`, `(U, d)`, padded with zeros."""
    centred = z - z.mean(1, keepdim=True)
    _, vectors = torch.linalg.eigh((centred @ centred.T).double())
    kept = vectors[:, -COORDINATES:].float()
    return torch.nn.functional.pad(kept, (COORDINATES - kept.shape[1], 0))


def _k_means(x: Tensor, count: int) -> Tensor:
    """Centres `(count, d)` of points `(n, d)` in random order."""
    centres = x[:count].clone()
    for _ in range(ROUNDS):
        home = _nearest(x, centres)
        sizes = torch.bincount(home, minlength=count)[:, None]
        sums = torch.zeros_like(centres).index_add_(0, home, x)
        centres = torch.where(sizes > 0, sums / sizes.clamp(min=1), centres)
    return centres


def _nearest(x: Tensor, centres: Tensor) -> Tensor:
    """The nearest centre of each point, `(n,)` int64."""
    return torch.addmm(centres.square().sum(1), x, centres.T, alpha=-2).argmin(1)
