"""Drawing rows in proportion to their scores (Poisson sampling), by lots that are functions of seed, level and row."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .golden import PADDING, lots, salt_of

__all__ = ["drawn", "log_uniform"]

BINS, WIDTH = 1024, 16.0  # of a histogram of scores: 64 in all, in steps of 1/16
FLATTER = 8.0  # how much flatter scores are taken, again and again, until enough rows are within the histogram


def log_uniform(keys: Tensor, seed: int, level: int, compiled: bool) -> Tensor:
    """The logarithm of a number between 0 and 1 for each row, `(n,)` float32."""
    if compiled:
        from . import kernels

        kernels.use_threads_of_torch()
        return torch.from_numpy(kernels.log_lots(keys.numpy(), salt_of(seed, level).item()))
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


def drawn(scores: Tensor, lots: Tensor, wanted: int, compiled: bool) -> tuple[Tensor, Tensor]:
    """Which of each row of scores `(G, n)` are drawn, and the `log_q` of them, `(G, K)`, padded with -1 and 0.

    Arguments:
        lots: `(G / T, n)`, logarithms of what was drawn for each score, of groups of T rows.
        wanted: how many are expected.
    """
    tops = scores.amax(-1)
    steepness, cuts = _cuts(scores, tops, wanted, compiled)
    places, log_q = _taken(scores, steepness, cuts, lots, compiled)
    for g in (places[:, 0] == PADDING).nonzero()[:, 0]:  # where few are wanted: the one that was closest to be drawn
        chances = scores[g] * steepness[g] + cuts[g]
        places[g, 0] = nearest = (chances - lots[g * len(lots) // len(scores)]).argmax()
        log_q[g, 0] = -chances[nearest].clamp(max=0)
    return places, log_q


def _taken(scores: Tensor, steepness: Tensor, cuts: Tensor, lots: Tensor, compiled: bool) -> tuple[Tensor, Tensor]:
    tiles = len(scores) // len(lots)
    if compiled:
        from . import kernels

        numbers = (tensor.contiguous().numpy() for tensor in (scores, steepness, cuts, lots))
        places, log_q = kernels.drawn(*numbers, tiles, PADDING)
        return torch.from_numpy(places), torch.from_numpy(log_q)
    chances = scores * steepness[:, None] + cuts[:, None]
    found = [row.nonzero()[:, 0] for row in lots.repeat_interleave(tiles, 0) < chances]
    width = max(1, *(len(part) for part in found))
    places = torch.full((len(scores), width), PADDING, device=scores.device)
    log_q = torch.zeros(len(scores), width, device=scores.device)
    for g, part in enumerate(found):
        places[g, : len(part)], log_q[g, : len(part)] = part, -chances[g, part].clamp(max=0)
    return places, log_q
