"""Golden subsets of local denoisers: drawn tile by tile, in proportion to what a proxy says of a row's weight.

The posterior of an output pixel weighs rows through a mask, so the rows that matter to it are those near in the mask's
own distance, and at high noise they are a large part of the bank. Both are served by one rule. For each tile of output
pixels a cheap proxy of the masked distance gives every row a score `l~`; a row is then taken with probability

    pi = min(1, c exp(l~)),    and its logit gets  log_q = -log(pi).

Where the posterior is narrow this is an exact head; where it is broad it is a random tail; and in between, both. Sums
over the rows that are taken are unbiased for those over all rows (Horvitz and Thompson), and their error is estimated
from the same rows. As many rows are expected as the wanted error needs, whatever the size of the bank: n independent
draws of the posterior have the mean square error `variance / n`.

Of a large bank not even all scores are needed. Rows get a chance `p` to be scored at all, and those that are scored are
taken with probability `min(1, c exp(l~) / p)`, so that `pi = min(p, c exp(l~))`. Where the posterior is broad, p is the
same for all rows: a pool drawn at random. Where it is narrow, p follows from a search of cells (`Cells`). Which it is
follows from the share of the bank that the posterior rests on, measured once for a noise level.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from .bank import Bank
from .cells import Cells, reached
from .drawing import drawn, log_uniform
from .errors import GolddiffError
from .golden import PADDING, Budget, Subset, Support, checked_tol
from .locality import Locality, Masked, Recent
from .noise import Noise
from .scores import Level, Scores

__all__ = ["LocalSubset", "Plan"]

FEWEST = 16  # rows of a tile
SCORES_AT_ONCE = 2**26
SCORED = 2**17  # a bank of up to so many rows is scored whole
POOL, POOL_SCORES = 2**17, 2**20  # rows of a pool, and their scores for all tiles, at most
SPARE = 4.0  # how much larger a pool is than the posterior needs
SEARCHED = 3 * 2**13  # rows of a tile that a search scores
ANYWHERE = 0.25  # the share of them that is drawn from the whole bank
SAMPLE, PROBES = 2**14, 16  # rows and images that the share of the posterior is measured on


@dataclass(frozen=True)
class Plan:
    """Which rows are scored at a noise level.

    Arguments:
        kind: `all`; `pool`, drawn at random for each image; or `search`, for each image and tile.
        rows: how many are expected.
    """

    kind: str
    rows: int


class LocalSubset(Subset):
    """A golden subset for each tile of output pixels, drawn by importance; see the module.

    Where the masks of all pixels are much the same, one tile is the whole image. Draws are functions of (seed, noise
    level, row key), the same for all tiles, so the subset does not depend on the batch or on the order of the rows.

    Arguments:
        tol: the root mean square error of a pixel (range 2) that is aimed at; decides the number of rows.
        budget: takes the paper's number of golden rows instead, if given.
        search: rows of a tile that a search scores; more cost time and leave less to chance. 0 scores all rows.
    """

    by_level = True

    def __init__(self, bank: Bank, tol: float = 0.01, budget: Budget | None = None, search: int = SEARCHED) -> None:
        if type(search) is not int or search < 0:
            raise GolddiffError(f"search is {search!r}: give a number of rows to score, or 0 to score all")
        self.bank, self.tol, self.budget, self.search = bank, checked_tol(tol), budget, search
        self._scores = Scores(bank)
        self._cells = Recent()

    def wanted(self, noise: Noise, locality: Masked, label: int | None = None) -> int:
        """How many rows a tile should get at one noise level; all are taken where that is more than half of them."""
        rows = self.bank.rows_of(label)
        level = self._scores.level(noise, locality, label)
        return self._wanted(noise, level, len(self.bank) if rows is None else len(rows))

    def plan(self, noise: Noise, locality: Masked, label: int | None = None) -> Plan:
        """Which rows are scored at one noise level."""
        rows = self.bank.rows_of(label)
        level = self._scores.level(noise, locality, label)
        return self._plan(noise, level, rows, self.wanted(noise, locality, label))

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
        total = len(self.bank) if eligible is None else len(eligible)
        count = torch.full((len(x_t),), total, device=x_t.device)
        level = self._scores.level(one, locality, label)
        wanted = self._wanted(one, level, total)
        if 2 * wanted >= total:
            everything = None if eligible is None else eligible.expand(len(x_t), 1, -1)
            return Support(everything, None, None, count, shared=True)
        q, s = self.bank.query(x_t.double(), noise)
        plan = self._plan(one, level, eligible, wanted)
        rows = torch.arange(total, device=x_t.device) if eligible is None else eligible
        parts = list(self._parts(plan, q, s[0], level, rows, seed, int(one.angle), wanted))
        width = max(chosen.shape[2] for chosen, _ in parts)

        def grown(part: Tensor, fill: float) -> Tensor:
            return torch.nn.functional.pad(part, (0, width - part.shape[2]), value=fill)

        chosen = torch.cat([grown(part, PADDING) for part, _ in parts])
        log_q = torch.cat([grown(part, 0.0) for _, part in parts])
        return Support(chosen, log_q, level.tiles, count, shared=False)

    # ---- how many, and of which ----------------------------------------------------------------------

    def _wanted(self, noise: Noise, level: Level, count: int) -> int:
        if self.budget is not None:
            return self.budget.sizes(noise, count)[1]
        variance = float(self.bank.spectrum().variances.mean())
        return max(FEWEST, math.ceil(level.factor * variance / self.tol**2))

    def _plan(self, noise: Noise, level: Level, eligible: Tensor | None, wanted: int) -> Plan:
        total = len(self.bank) if eligible is None else len(eligible)
        if total <= SCORED or not self.search:
            return Plan("all", total)
        enough = math.ceil(SPARE * wanted / self._share(noise, level))
        if enough <= min(POOL, POOL_SCORES // len(level.counts)):
            return Plan("pool", enough)
        rows = max(self.search, 2 * wanted)  # of which those that are wanted can be drawn
        unlabelled = total == len(self.bank)
        searchable = unlabelled and level.name is not None and 2 * rows < total
        return Plan("search", rows) if searchable else Plan("all", total)

    def _share(self, noise: Noise, level: Level) -> float:
        """The share of the rows that the posterior rests on, that of the narrowest tenth of tiles and images: by scores
        of a sample of rows, for other rows with noise."""

        def measured() -> dict[str, Tensor]:
            order = self.bank.rows[self.bank.keys[self.bank.rows].argsort()]
            sample, probes = order[:SAMPLE].sort().values, order[SAMPLE : SAMPLE + PROBES]
            x = self.bank.images(probes, torch.float64)
            z = torch.randn(x.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(x.device)
            alpha, sigma = noise.like(x)
            q, s = self.bank.query(alpha * x + sigma * z, noise)
            weights = self._scores.shared(q, s[0], level, sample).double().softmax(-1)
            ess = 1 / weights.square().sum(-1)
            return {"share": (ess / len(sample)).flatten().quantile(0.1).cpu()}

        kept = self.bank.keep(f"share-{level.name}", measured, of_rows=True) if level.name else measured()
        return float(kept["share"])

    # ---- scoring and drawing -------------------------------------------------------------------------

    def _parts(
        self, plan: Plan, q: Tensor, s: Tensor, level: Level, rows: Tensor, seed: Tensor, angle: int, wanted: int
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Rows and `log_q`, `(b, T, K)` each, padded with -1 and 0, of one part of the images after the other."""
        every = len(rows) == len(self.bank.keys)
        keys = self.bank.keys if every else self.bank.keys[rows]
        most = SCORES_AT_ONCE // (len(level.counts) * plan.rows)
        together = 1 if plan.kind == "pool" else max(1, most)  # every image has a pool of its own
        for first in range(0, len(q), together):
            part = slice(first, first + together)
            lots = torch.stack([log_uniform(keys, int(one), angle, self.bank.compiled) for one in seed[part]])
            if plan.kind == "all":
                yield self._drawn(self._scores.shared(q[part], s, level, rows), rows, lots, wanted)
            elif plan.kind == "pool":
                least = math.log(plan.rows / len(rows))
                places = (lots[0] < least).nonzero()[:, 0]
                scores = self._scores.shared(q[part], s, level, rows[places])
                chosen, log_q = self._drawn(scores, rows[places], lots[:, places] - least, wanted)
                yield chosen, (log_q - least).masked_fill_(chosen == PADDING, 0.0)
            else:
                if not every:  # those that are not there are never drawn
                    some, lots = lots, lots.new_full((len(lots), len(self.bank.keys)), math.inf)
                    lots[:, rows] = some
                yield self._searched(q[part], s, level, lots, plan.rows, wanted)

    def _searched(
        self, q: Tensor, s: Tensor, level: Level, lots: Tensor, count: int, wanted: int
    ) -> tuple[Tensor, Tensor]:
        """Rows and `log_q`, `(b, T, K)` each, of those that a search of the cells reaches."""
        cells = self._cells_of(level)
        seen, step = self._scores.query(q, s, level)
        least = math.log(ANYWHERE * count / lots.shape[1])
        chances = cells.chances(seen, step, round((1 - ANYWHERE) * count), least)
        rows, bounds, left = reached(cells, chances, least, lots, self.bank.compiled)
        scores = self._scores.own(q, s, level, rows).sub_(bounds)
        return self._drawn(scores.unflatten(0, (len(q), -1)), rows, left, wanted, bounds)

    def _drawn(
        self, scores: Tensor, rows: Tensor, lots: Tensor, wanted: int, bounds: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Rows and `log_q`, `(B, T, K)` each, padded with -1 and 0.

        Arguments:
            scores: `(B, T, n)`. rows: `(n,)`, or `(B T, n)` where tiles have their own. lots: `(B or B T, n)`.
            bounds: `(B T, n)`, logarithms of the chances that the rows had to be scored.
        """
        places, log_q = drawn(scores.flatten(0, 1), lots, wanted, self.bank.compiled)
        some = places.clamp(min=0)
        found = rows[some] if rows.ndim == 1 else rows.gather(1, some)
        if bounds is not None:
            log_q = log_q - bounds.gather(1, some)
        none = places == PADDING
        chosen, log_q = found.masked_fill_(none, PADDING), log_q.masked_fill_(none, 0.0)
        return chosen.unflatten(0, scores.shape[:2]), log_q.unflatten(0, scores.shape[:2])

    def _cells_of(self, level: Level) -> Cells:
        """The cells of a level, found when they are first needed and kept with the bank."""

        def find() -> dict[str, Tensor]:
            return Cells.find(self._scores.reader(level), self.bank.keys.cpu(), level.inputs.cpu(), level.weights.cpu())

        def fits(tensors: dict[str, Tensor]) -> bool:
            return Cells.fit(tensors, len(self.bank.keys), level.inputs)

        def compute() -> tuple[Cells, int]:
            kept = self.bank.keep(f"cells-{level.name}", find, remember=False, fits=fits)
            return Cells(**{name: tensor.to(self.bank.device) for name, tensor in kept.items()}), 0  # mapped

        return self._cells.get(level.name, compute)
