"""Golden subsets of local denoisers: drawn tile by tile, in proportion to what a proxy says of a row's weight.

The posterior of an output pixel weighs rows through a mask, so the rows that matter to it are those near in the mask's
own distance, and at high noise they are a large part of the bank. Both are served by one rule. For each tile of output
pixels a cheap proxy of the masked distance gives every row a score `l~`; a row is then taken with probability

    pi = min(1, c exp(l~)),    and its logit gets  log_q = -log(pi).

Where the posterior is narrow this is an exact head; where it is broad it is a random tail; and in between, both. Sums
over the rows that are taken are unbiased for those over all rows (Horvitz and Thompson), and their error is estimated
from the same rows. As many rows are expected as the wanted error needs, whatever the size of the bank: n independent
draws of the posterior have the mean square error `variance / n`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .bank import Bank
from .errors import GolddiffError
from .golden import PADDING, Budget, Subset, Support, checked_tol, lots
from .locality import Locality, Masked, Recent
from .noise import Noise
from .spectrum import COLUMNS

__all__ = ["LocalSubset"]

TILINGS = ((0.8, 1, 2.5), (0.65, 1, 1.0), (0.35, 4, 1.0), (0.0, 8, 1.4))
"""From such an overlap of the masks of all pixels on: tiles along a side, and rows in units of `variance / tol^2`. More
at high noise, where they cost little and decide which image comes out; and at low noise, where scores say less."""
LOST = 100.0  # of a logit, from which averages hide too much
BINS, WIDTH = 1024, 16.0  # of a histogram of scores: 64 in all, in steps of 1/16
FLATTER = 8.0  # how much flatter scores are taken, again and again, until enough rows are within the histogram
FEWEST = 16  # rows of a tile
LARGEST = 1e25  # product of a query and a row in a score
SCORES_AT_ONCE = 2**26
BLOCK = 2**14
IMAGES = 4  # that the compiled loop scores together


@dataclass(frozen=True, eq=False)
class _Level:
    """What is compared at a noise level, for T tiles of output pixels.

    Arguments:
        tiles: the tile of each pixel, `(D,)`; None where T = 1.
        factor: for the number of rows.
        fine: rows are compared pixel by pixel, else by their coarse view.
        inputs: entries of a row that count for each tile, `(T, U)` int32; the first `counts` `(T,)` of them.
        weights: how much each counts, `(T, U)` float64, 0 beyond `counts`.
    """

    tiles: Tensor | None
    factor: float
    fine: bool
    inputs: Tensor
    counts: Tensor
    weights: Tensor


class LocalSubset(Subset):
    """A golden subset for each tile of output pixels, drawn by importance; see the module.

    Scores are masked distances of the tile as a whole, in block averages of the image, or pixel by pixel where the
    noise is so low that averages would hide what matters. Where the masks of all pixels are much the same, one tile is
    the whole image. Draws are functions of (seed, noise level, row key), the same for all tiles, so the subset does not
    depend on the batch or on the order of the rows.

    Arguments:
        tol: the root mean square error of a pixel (range 2) that is aimed at; decides the number of rows.
        budget: takes the paper's number of golden rows instead, if given.
    """

    by_level = True

    def __init__(self, bank: Bank, tol: float = 0.01, budget: Budget | None = None) -> None:
        self.bank, self.tol, self.budget = bank, checked_tol(tol), budget
        self._levels = Recent()
        self._coarse: tuple[Tensor, float] | None = None

    def wanted(self, noise: Noise, locality: Masked, label: int | None = None) -> int:
        """How many rows a tile should get at one noise level; all are taken where that is more than half of them."""
        rows = self.bank.rows_of(label)
        return self._wanted(noise, self._level(noise, locality, label), len(self.bank) if rows is None else len(rows))

    def _wanted(self, noise: Noise, level: _Level, count: int) -> int:
        if self.budget is not None:
            return self.budget.sizes(noise, count)[1]
        variance = float(self.bank.spectrum().variances.mean())
        return max(FEWEST, math.ceil(level.factor * variance / self.tol**2))

    def select(
        self,
        x_t: Tensor,
        noise: Noise,
        locality: Locality,
        eligible: Tensor | None,
        seed: Tensor,
        label: int | None = None,
    ) -> Support:
        if not isinstance(locality, Masked):
            raise GolddiffError("retrieval=local is for local denoisers: for whole images use retrieval=certified")
        one = noise if noise.alpha.ndim == 0 else noise[0]
        rows = torch.arange(len(self.bank), device=x_t.device) if eligible is None else eligible
        count = torch.full((len(x_t),), len(rows), device=x_t.device)
        level = self._level(one, locality, label)
        wanted = self._wanted(one, level, len(rows))
        if 2 * wanted >= len(rows):
            everything = None if eligible is None else eligible.expand(len(x_t), 1, -1)
            return Support(everything, None, None, count, shared=True)
        q, s = self.bank.query(x_t.double(), noise)
        together = max(1, SCORES_AT_ONCE // (len(level.counts) * len(rows)))
        parts = [
            self._drawn(self._scores(q[i : i + together], s[0], level, rows), rows, seed[i : i + together], one, wanted)
            for i in range(0, len(q), together)
        ]
        width = max(chosen.shape[2] for chosen, _ in parts)

        def grown(part: Tensor, fill: float) -> Tensor:
            return torch.nn.functional.pad(part, (0, width - part.shape[2]), value=fill)

        chosen = torch.cat([grown(part, PADDING) for part, _ in parts])
        log_q = torch.cat([grown(part, 0.0) for _, part in parts])
        return Support(chosen, log_q, level.tiles, count, shared=False)

    # ---- what is compared ----------------------------------------------------------------------------

    def _level(self, noise: Noise, locality: Masked, label: int | None) -> _Level:
        def compute() -> tuple[_Level, int]:
            level = self._computed_level(noise, locality.mask(noise, label).cpu())
            return level, level.inputs.nbytes + level.weights.nbytes

        return self._levels.get((int(noise.angle), locality.statistics_of(label)), compute)

    def _computed_level(self, noise: Noise, mask: Tensor) -> _Level:
        device = self.bank.device
        along, factor = next((count, factor) for least, count, factor in TILINGS if _overlap(mask) >= least)
        tiles = None if along == 1 else _tiles(self.bank.shape, along)
        numbers = torch.zeros(self.bank.D, dtype=torch.int64) if tiles is None else tiles
        variance = self.bank.spectrum().variances.cpu()
        worth = variance + 1e-9  # of an output: one that hardly varies can hardly be wrong
        belongs = torch.nn.functional.one_hot(numbers).double() * worth[:, None]
        belongs /= belongs.sum(0)
        share = torch.cat([part.double() @ belongs for part in mask.split(COLUMNS)]).T.clamp(min=0)
        pooled = self.bank.pooling(torch.ones(1, self.bank.D))[0]
        blocks = self.bank.pooling(share) / pooled  # the mean of the mask in each block
        # of a row's distance to another, the part within blocks is hidden from averages
        within = max(0.0, float(variance.sum() - self._pooled_variance())) / float(variance.sum().clamp(min=1e-12))
        signal = float(noise.alpha / noise.sigma) ** 2 if float(noise.sigma) > 0 else math.inf
        fine = float((share @ variance).mean()) * within * signal > LOST
        weights = share if fine else blocks
        counts = (weights > 0).sum(1)
        order = (weights > 0).to(torch.int8).argsort(dim=1, descending=True, stable=True)[:, : int(counts.max())]
        chosen = weights.gather(1, order)
        return _Level(
            tiles=None if tiles is None else tiles.to(device),
            factor=factor,
            fine=fine,
            inputs=order.to(torch.int32).to(device),
            counts=counts.to(device),
            weights=chosen.to(device),
        )

    def _pooled_variance(self) -> float:
        """The variance of all blocks together, in the units of pixels in [-1, 1]."""
        kept = self.bank.keep("proxy-variance", lambda: {"variance": _variance(self.bank.proxy)})
        return float(kept["variance"]) * self.bank.scale**2

    def _view(self, fine: bool) -> tuple[Tensor, Tensor, float]:
        """Rows as bytes `(N, M)` (or floats), what is subtracted from them `(M,)`, and the unit of what is left."""
        if fine:
            return self.bank.pixels.flatten(1), self.bank.centre, 1.0
        if self._coarse is None:
            kept = self.bank.keep("coarse", lambda: _as_bytes(self.bank.proxy), remember=False)
            self._coarse = kept["bytes"].to(self.bank.device), float(kept["unit"])
        rows, unit = self._coarse
        return rows, torch.full(rows.shape[1:], 128.0, device=rows.device), unit

    def _scores(self, q: Tensor, s: Tensor, level: _Level, rows: Tensor) -> Tensor:
        """Logits of rows up to a constant, `(B, T, n)` float32; q `(B, D)` and s `()` float64."""
        matrix, centre, unit = self._view(level.fine)
        query = q if level.fine else self.bank.pooling(q)
        places, step = level.inputs.long(), s * unit
        # beyond the range of float32 only the order of the rows matters
        shrink = 1 / torch.maximum(step**2, step * query.abs().max()).div(LARGEST).clamp(min=1)
        linear = (level.weights * query[:, places] * (step * shrink)).float()
        squares = (level.weights * -(step**2 * shrink) / 2).float()
        self.bank.bytes_read += len(rows) * matrix.shape[1] * matrix.element_size()
        if self.bank.compiled and matrix.dtype == torch.uint8 and matrix.shape[1] >= 64:
            return self._compiled_scores(matrix, centre, rows, level, linear, squares)
        out = torch.empty(len(q), len(places), len(rows), device=q.device)
        for start in range(0, len(rows), BLOCK):
            v = matrix[rows[start : start + BLOCK]].double() - centre
            for t, here in enumerate(places):
                part = v[:, here]
                own = part.square() @ squares[t].double()
                out[:, t, start : start + BLOCK] = (linear[:, t].double() @ part.T + own).float()
        return out

    def _compiled_scores(
        self, matrix: Tensor, centre: Tensor, rows: Tensor, level: _Level, linear: Tensor, squares: Tensor
    ) -> Tensor:
        from . import kernels

        kernels.use_threads_of_torch()
        out = np.empty((*linear.shape[:2], len(rows)), np.float32)
        padded = torch.nn.functional.pad(linear, (0, 0, 0, 0, 0, -len(linear) % IMAGES)).contiguous()
        kernels.local_scores(
            matrix.numpy(),
            centre.numpy(),
            rows.numpy(),
            level.inputs.contiguous().numpy(),
            level.counts.numpy(),
            padded.numpy(),
            squares.contiguous().numpy(),
            out,
        )
        return torch.from_numpy(out)

    # ---- drawing -------------------------------------------------------------------------------------

    def _drawn(self, scores: Tensor, rows: Tensor, seed: Tensor, noise: Noise, wanted: int) -> tuple[Tensor, Tensor]:
        """Rows and `log_q`, `(B, T, K)` each, padded with -1 and 0."""
        batch, tiles, _ = scores.shape
        flat, tops = scores.flatten(0, 1), scores.amax(-1).flatten()
        keys = self.bank.keys[rows]
        chances = torch.stack([_log_uniform(keys, int(one), int(noise.angle)) for one in seed])
        steepness, cuts = _cuts(flat, tops, wanted, self.bank.compiled)
        chosen, log_q = _taken(flat, steepness, cuts, chances, rows, self.bank.compiled)
        for g in (chosen[:, 0] == PADDING).nonzero()[:, 0]:  # never, to all intents and purposes
            chosen[g, 0] = rows[flat[g].argmax()]
        return chosen.unflatten(0, (batch, tiles)), log_q.unflatten(0, (batch, tiles))


def _tiles(shape: tuple[int, int, int], along: int) -> Tensor:
    """The tile of each pixel, `(D,)`: squares over all channels, at most so many along a side."""
    channels, height, width = shape
    side = math.ceil(max(height, width) / along)
    rows, columns = torch.arange(height) // side, torch.arange(width) // side
    return (rows[:, None] * (int(columns[-1]) + 1) + columns).expand(channels, -1, -1).flatten()


def _overlap(mask: Tensor) -> float:
    """How much the columns of a mask have in common, from 0 to 1; those that see themselves only do not count."""
    seen = mask != 0
    columns = seen.sum(0) > 1
    share = (seen & columns).sum(1).double() / columns.sum()
    return float(share.square().sum() / share.sum()) if bool(columns.any()) else 0.0


def _variance(proxy: Tensor) -> Tensor:
    """The sum of the variances of the columns, `()` float64."""
    mean = torch.stack([part.double().sum(0) for part in proxy.split(BLOCK)]).sum(0) / len(proxy)
    return torch.stack([(part.double() - mean).square().sum() for part in proxy.split(BLOCK)]).sum() / len(proxy)


def _as_bytes(proxy: Tensor) -> dict[str, Any]:
    """Proxies as bytes: `128 + round(proxy / unit)`."""
    largest = max((float(part.abs().max()) for part in proxy.split(BLOCK)), default=0.0)
    unit = max(largest, 1e-30) / 127
    parts = [(part.double() / unit).round_().add_(128).to(torch.uint8) for part in proxy.split(BLOCK)]
    return {"bytes": torch.cat(parts).cpu(), "unit": torch.tensor(unit, dtype=torch.float64)}


def _log_uniform(keys: Tensor, seed: int, level: int) -> Tensor:
    """The logarithm of a number between 0 and 1 for each row, `(n,)` float32."""
    return (((lots(keys, seed, level) >> 11 & (2**53 - 1)).double() + 0.5) / 2**53).log_().float()


def _histograms(scores: Tensor, tops: Tensor, widths: Tensor, compiled: bool) -> Tensor:
    """How many scores `(G, n)` lie how far under the largest, in bins of `1 / widths`, `(G, BINS)` int64 on the CPU."""
    if compiled:
        from . import kernels

        return torch.from_numpy(kernels.histograms(scores.numpy(), tops.numpy(), widths.numpy(), BINS))
    counts = []
    for row, top, width in zip(scores, tops, widths, strict=True):
        bins = ((top - row) * width).clamp_(max=BINS - 1).long()
        counts.append(torch.bincount(bins, minlength=BINS))
    return torch.stack(counts).cpu()


def _cuts(scores: Tensor, tops: Tensor, wanted: int, compiled: bool) -> tuple[Tensor, Tensor]:
    """`beta` and `log c`, `(G,)` float32, such that the chances `min(1, c exp(beta score))` of each row of scores add
    up to the wanted number of rows (to a few percent).

    `beta` is 1, or smaller where rows of any weight at all, as far as the scores know, are fewer.
    """
    under = torch.arange(BINS, dtype=torch.float64) / WIDTH
    beta, cuts = torch.ones(len(scores)), torch.zeros(len(scores), dtype=torch.float64)
    left = torch.arange(len(scores))
    while len(left):
        here = left.to(scores.device)
        some, most = (scores, tops) if len(left) == len(scores) else (scores[here], tops[here])
        counts = _histograms(some, most, (WIDTH * beta[left]).to(scores.device), compiled).double()
        counts[:, -1] = 0  # those beyond
        mass = counts * (-under).exp()
        beyond = mass.flip(1).cumsum(1).flip(1) - mass
        expected = counts.cumsum(1) + under.exp() * beyond  # with log c = under
        enough = expected >= wanted
        first = enough.to(torch.int8).argmax(1)
        cut = torch.where(first > 0, under[first], (wanted / mass.sum(1)).log())  # first = 0: no chance is 1
        cuts[left] = cut - beta[left].double() * most.cpu().double()
        flat = beta[left] < FLATTER**-8  # scores are all the same but for a few
        cuts[left[flat]] = math.inf
        left = left[~(enough.any(1) | flat)]
        beta[left] /= FLATTER
    return beta.to(scores.device), cuts.float().to(scores.device)


def _taken(
    scores: Tensor, steepness: Tensor, cuts: Tensor, lots: Tensor, rows: Tensor, compiled: bool
) -> tuple[Tensor, Tensor]:
    """The rows that are taken by each row of scores `(G, n)`, and their `log_q`, `(G, K)`, padded with -1 and 0.

    `lots` `(B, n)`: the logarithms of what the rows have drawn, of images; `rows` `(n,)`.
    """
    tiles = len(scores) // len(lots)
    if compiled:
        from . import kernels

        numbers = (tensor.numpy() for tensor in (scores, steepness, cuts, lots))
        chosen, log_q = kernels.drawn(*numbers, tiles, rows.numpy(), PADDING)
        return torch.from_numpy(chosen), torch.from_numpy(log_q)
    chances = scores * steepness[:, None] + cuts[:, None]
    found = lots.repeat_interleave(tiles, 0) < chances
    places = [row.nonzero()[:, 0] for row in found]
    width = max(1, *(len(part) for part in places))
    chosen = torch.full((len(scores), width), PADDING, device=scores.device)
    log_q = torch.zeros(len(scores), width, device=scores.device)
    for g, part in enumerate(places):
        chosen[g, : len(part)], log_q[g, : len(part)] = rows[part], -chances[g, part].clamp(max=0)
    return chosen, log_q
