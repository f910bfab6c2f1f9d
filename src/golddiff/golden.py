"""Golden subsets: which rows of the bank matter at a noisy image and a noise level."""

from __future__ import annotations

import abc
import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from .bank import WORTH_COMPILING, Bank
from .errors import GolddiffError, unknown
from .locality import Locality
from .noise import Noise
from .ranks import Ranks

__all__ = [
    "Budget",
    "Everything",
    "GoldenSubset",
    "Subset",
    "Support",
    "checked_tol",
    "draw",
    "hashed",
    "lots",
    "nearest_proxies",
    "nearest_rows",
    "salt_of",
]

PADDING = -1
NOTHING = -1e30  # a logit of no weight
BLOCK = 8192
FEW_IMAGES = 3  # whose proxies are compared faster one by one
SCORES_AT_ONCE = 2**26  # proxy scores of images that are compared together


@dataclass(frozen=True, eq=False)
class Support:
    """The rows that stand for the posterior.

    Arguments:
        rows: `(B, T, K)` int64 for T tiles of pixels (T = 1: the whole image), padded with -1; None for all.
        log_q: `(B, T, K)` what is added to the logits: 0 in an exact head, `log(n / L)` in a tail of L rows
            that stand for n; None for zeros.
        tiles: the tile of each pixel, `(D,)`; None where T = 1.
        eligible: how many rows could have been chosen, for each image `(B,)`.
        shared: all images have the same rows.
        log_missed: a bound of `logsumexp` of the logits of all rows left out, `(B,)`; None where there is none.
    """

    rows: Tensor | None
    log_q: Tensor | None
    tiles: Tensor | None
    eligible: Tensor
    shared: bool
    log_missed: Tensor | None = None

    @property
    def tiled(self) -> bool:
        """Rows differ from tile to tile, or some stand for others, so `rows_of` alone does not say it all."""
        return self.tiles is not None or self.log_q is not None

    @property
    def size(self) -> int:
        """How many rows an output pixel has at most."""
        return int(self.eligible.max()) if self.rows is None else self.rows.shape[2]

    @property
    def tile_count(self) -> int:
        """T."""
        return 1 if self.tiles is None else int(self.tiles.max()) + 1

    def outputs(self, pixels: int) -> list[Tensor]:
        """The pixels of each tile, of so many in all."""
        if self.tiles is None:
            return [torch.arange(pixels, device=self.eligible.device)]
        return [(self.tiles == tile).nonzero()[:, 0] for tile in range(self.tile_count)]

    def rows_of(self, b: int, tile: int = 0) -> Tensor:
        """The rows of image b (and of one of its tiles), `(K,)`, without padding."""
        if self.rows is None:
            return torch.arange(int(self.eligible[b]), device=self.eligible.device)
        return self.rows[b, tile, : self._counts[b][tile]]

    @cached_property
    def _counts(self) -> list[list[int]]:
        """How many rows each image has in each tile."""
        assert self.rows is not None  # noqa: S101 - asked for only where rows are listed
        return (self.rows != PADDING).sum(-1).tolist()

    def log_q_of(self, b: int, tile: int = 0) -> Tensor:
        """What is added to the logits of `rows_of`, `(K,)`."""
        rows = self.rows_of(b, tile)
        return torch.zeros(len(rows), device=rows.device) if self.log_q is None else self.log_q[b, tile, : len(rows)]

    def blocks(self, size: int) -> Iterator[tuple[range, Tensor | slice]]:
        """Yields `(images, rows)`: up to `size` rows and the images that they serve."""
        batch = len(self.eligible)
        if self.rows is None:
            for start in range(0, int(self.eligible[0]), size):
                yield range(batch), slice(start, min(start + size, int(self.eligible[0])))
        elif self.shared:
            for part in self.rows_of(0).split(size):
                yield range(batch), part
        else:
            for b in range(batch):
                for part in self.rows_of(b).split(size):
                    yield range(b, b + 1), part

    def owned(self, ranks: Ranks) -> Support:
        """The rows that are a rank's; one that stands for nothing where an image has none in a tile."""
        if not ranks.linked:
            return self
        if self.rows is None or self.shared:
            every = self.rows_of(0)
            every = every[ranks.owns(every)]
            if len(every):
                return replace(self, rows=every.expand(len(self.eligible), 1, -1))
        batch, tiles = len(self.eligible), self.tile_count
        rows, log_q = [], []
        for b, t in itertools.product(range(batch), range(tiles)):
            own, added = self.rows_of(b, t), self.log_q_of(b, t)
            mine = ranks.owns(own)
            rows.append(own[mine] if mine.any() else own[:1])
            log_q.append(added[mine] if mine.any() else torch.full_like(added[:1], NOTHING))
        pad = torch.nn.utils.rnn.pad_sequence
        return replace(
            self,
            rows=pad(rows, batch_first=True, padding_value=PADDING).unflatten(0, (batch, tiles)),
            log_q=pad(log_q, batch_first=True).unflatten(0, (batch, tiles)),
            shared=False,
        )

    @staticmethod
    def merge(parts: list[Support], items: list[Tensor]) -> Support:
        """One support from those of parts of a batch; `items[p]` are the images of part p."""
        if len(parts) == 1:
            return parts[0]
        batch = sum(len(i) for i in items)
        eligible = torch.empty(batch, dtype=torch.int64, device=parts[0].eligible.device)
        for part, where in zip(parts, items, strict=True):
            eligible[where] = part.eligible
        if all(part.rows is None for part in parts):
            return Support(None, None, None, eligible, shared=True)
        tiles = next((part.tiles for part in parts if part.tiles is not None), None)
        count = 1 if tiles is None else int(tiles.max()) + 1
        width = max(part.size for part in parts)
        rows = torch.full((batch, count, width), PADDING, device=eligible.device)
        log_q = torch.zeros(batch, count, width, device=eligible.device)
        for part, where in zip(parts, items, strict=True):
            for j, i in enumerate(where.tolist()):
                for tile in range(count):  # a part without tiles has the same rows in all of them
                    own = tile if part.tiles is not None else 0
                    chosen = part.rows_of(j, own)
                    rows[i, tile, : len(chosen)], log_q[i, tile, : len(chosen)] = chosen, part.log_q_of(j, own)
        some = any(part.log_q is not None for part in parts)
        return Support(rows, log_q if some else None, tiles, eligible, shared=False)


class Subset(abc.ABC):
    """Chooses rows. `by_level`: all images of one call must have the same noise level."""

    by_level: bool

    @abc.abstractmethod
    def select(
        self,
        x_t: Tensor,
        noise: Noise,
        locality: Locality,
        eligible: Tensor | None,
        seed: Tensor,
        label: int | None = None,
    ) -> Support:
        """The support of each image.

        Arguments:
            x_t: `(B, C, H, W)`. noise: of all images, or of each.
            locality: what is compared. label: of the images, for localities that depend on it.
            eligible: rows to choose from, `(n,)` ascending; None for all.
            seed: `(B,)` int64, for what is drawn at random.
        """


class Everything(Subset):
    """All eligible rows: the exact posterior."""

    by_level = False

    def __init__(self, bank: Bank) -> None:
        self.bank = bank

    def select(
        self,
        x_t: Tensor,
        noise: Noise,
        locality: Locality,
        eligible: Tensor | None,
        seed: Tensor,
        label: int | None = None,
    ) -> Support:
        count = len(self.bank) if eligible is None else len(eligible)
        rows = None if eligible is None else eligible.expand(len(x_t), 1, -1)
        return Support(rows, None, None, torch.full((len(x_t),), count, device=x_t.device), shared=True)


@dataclass(frozen=True)
class Budget:
    r"""How many candidates and golden rows the paper takes at a noise level ("Fast and Scalable Analytical
    Diffusion"). With n eligible rows and :math:`loc = 1 - \sigma / \sqrt{\alpha^2 + \sigma^2}`,

    .. math:: m = m_{min} + (m_{max} - m_{min}) loc, \quad k = k_{max} - (k_{max} - k_{min}) loc

    Arguments:
        k_min, k_max, m_min, m_max: numbers of rows (int), or fractions of the eligible rows (float <= 1);
            they must not decrease in this order. Where a number and a fraction cross, because a class has
            few rows, the earlier one stands for the later.
    """

    k_min: int | float = 1 / 20
    k_max: int | float = 1 / 10
    m_min: int | float = 1 / 10
    m_max: int | float = 1.0

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            whole = isinstance(value, int) and not isinstance(value, bool)
            if not (whole and value >= 1) and not (isinstance(value, float) and 0 < value <= 1):
                raise GolddiffError(
                    f"{name} is {value}: give a number of rows (1, 2, ...) or a fraction (over 0, up to 1.0)"
                )
        for low, high in (("k_min", "k_max"), ("m_min", "m_max"), ("k_max", "m_min")):
            a, b = getattr(self, low), getattr(self, high)
            if isinstance(a, int) == isinstance(b, int) and a > b:
                raise GolddiffError(f"{low} is {a}, more than {high} = {b}: lower {low} or raise {high}")

    def rows(self, count: int) -> tuple[int, int, int, int]:
        """`k_min, k_max, m_min, m_max` in rows, of `count` eligible ones."""
        sizes = [v if isinstance(v, int) else round(v * count) for v in vars(self).values()]
        k_min, k_max, m_min, m_max = itertools.accumulate((min(max(v, 1), count) for v in sizes), max)
        return k_min, k_max, m_min, m_max

    def sizes(self, noise: Noise, count: int) -> tuple[int, int]:
        """`m, k` at one noise level, of `count` eligible rows."""
        k_min, k_max, m_min, m_max = self.rows(count)
        loc = 1 - float(noise.g)
        m = round(m_min + (m_max - m_min) * loc)
        k = max(k_min, round(k_max - (k_max - k_min) * loc))
        return m, k


class GoldenSubset(Subset):
    """The golden subset of the paper: coarse search in a proxy space, exact distances on the candidates.

    `reference` (the released code): a random pool of m rows for each image, of which the k_max nearest by
    proxy, of which the k nearest. `paper` (its text): the m nearest of all rows by proxy, of which the k
    nearest. Distances are those of whole images, whatever the locality.

    The pool is the m rows with the smallest hash of (seed, noise level, row key), so it does not depend on
    the order of the rows or on the other images. Rows near a cut are measured again in float64, and ties
    go by row key.

    Arguments:
        retrieval: `reference` or `paper`.
        budget: sizes of pool and subset.
    """

    by_level = True

    def __init__(self, bank: Bank, retrieval: str, budget: Budget) -> None:
        if retrieval not in ("reference", "paper"):
            raise unknown("retrieval", retrieval, ("reference", "paper"))
        self.bank, self.retrieval, self.budget = bank, retrieval, budget

    def select(
        self,
        x_t: Tensor,
        noise: Noise,
        locality: Locality,
        eligible: Tensor | None,
        seed: Tensor,
        label: int | None = None,
    ) -> Support:
        rows = torch.arange(len(self.bank), device=x_t.device) if eligible is None else eligible
        m, k = self.budget.sizes(noise if noise.alpha.ndim == 0 else noise[0], len(rows))
        q, s = self.bank.query(x_t, noise)
        pools: list[Tensor | None] = [None] * len(x_t)
        wanted = m
        if self.retrieval == "reference":
            keys, level = self.bank.keys[rows], int(noise.angle.reshape(-1)[0])
            pools = [draw(keys, m, int(one), level) for one in seed]
            wanted = self.budget.rows(len(rows))[1]
        chosen = [
            nearest_rows(self.bank, q[b], s[b], rows[candidates], k)
            for b, candidates in enumerate(nearest_proxies(self.bank, q, s, eligible, pools, wanted))
        ]
        eligible_count = torch.full((len(x_t),), len(rows), device=x_t.device)
        return Support(torch.stack(chosen)[:, None], None, None, eligible_count, shared=False)


def nearest_proxies(
    bank: Bank, q: Tensor, s: Tensor, eligible: Tensor | None, pools: list[Tensor | None], count: int
) -> Iterator[Tensor]:
    """For each image, positions within the eligible rows of the `count` nearest proxies, of all or of its pool.

    Proxies that several images want are read once for all of them, and compared by one product a block.

    Arguments:
        q: `(B, D)`. s: `(B,)`.
        eligible: `(n,)`; None for all rows.
        pools: positions within the eligible rows, for each image; None for all.
    """
    total = len(bank) if eligible is None else len(eligible)
    together = max(1, SCORES_AT_ONCE // total)
    for first in range(0, len(q), together):
        batch = slice(first, first + together)
        yield from _nearest_proxies(bank, bank.pooling(q[batch]), s[batch], eligible, pools[batch], count, total)


def _nearest_proxies(
    bank: Bank, q: Tensor, s: Tensor, eligible: Tensor | None, pools: list[Tensor | None], count: int, total: int
) -> Iterator[Tensor]:
    """As `nearest_proxies`, for images whose scores are held at once; q are pooled, float64."""

    def row(position: Tensor) -> Tensor:
        return position if eligible is None else eligible[position]

    def products(images: slice, positions: Tensor | None, size: int) -> tuple[Tensor, Tensor]:
        out = torch.empty(size, len(q[images]), device=q.device)
        error = torch.zeros(out.shape[1], dtype=torch.float64, device=q.device)
        for start in range(0, size, BLOCK):
            part: Tensor | slice = slice(start, min(start + BLOCK, size))
            chosen = row(positions[part]) if positions is not None else part if eligible is None else eligible[part]
            p, norms = bank.proxy[chosen], bank.proxy_norms[chosen]
            bank.bytes_read += p.nbytes
            scores, tolerance = fast_scores(q[images], s[images], p, norms)
            out[part] = scores
            error = torch.maximum(error, tolerance)
        return out.T.contiguous(), error

    def compiled(b: int, pool: Tensor | None) -> tuple[Tensor, Tensor]:
        from . import kernels

        kernels.use_threads_of_torch()
        rows = row(torch.arange(total) if pool is None else pool)
        norms = bank.proxy_norms[rows]
        bank.bytes_read += len(rows) * bank.proxy.shape[1] * 4
        query, scale = (-2 * s[b].double() * q[b]).float(), float(s[b])
        values = torch.from_numpy(kernels.dots(bank.proxy.numpy(), query.numpy(), rows.numpy()))
        error = 2 * rounding(s[b : b + 1], q[b : b + 1].norm(dim=1), norms, torch.float32)
        return values.add_(norms, alpha=scale**2), error[0]

    sizes = [total if pool is None else len(pool) for pool in pools]
    one_by_one = bank.compiled and len(q) <= FEW_IMAGES and total * bank.proxy.shape[1] >= WORTH_COMPILING
    shared = products(slice(None), None, total) if not one_by_one and sum(sizes) > total / 2 else None
    for b, pool in enumerate(pools):

        def position(i: Tensor, pool: Tensor | None = pool) -> Tensor:
            return i if pool is None else pool[i]

        def exact(i: Tensor, b: int = b, position: Callable[[Tensor], Tensor] = position) -> Tensor:
            proxies = (bank.proxy[row(position(part))].double() for part in i.split(BLOCK))
            return torch.cat([(q[b] - s[b].double() * p).square_().sum(1) for p in proxies])

        if one_by_one:
            values, error = compiled(b, pool)
        elif shared is None:
            values, error = (t[0] for t in products(slice(b, b + 1), pool, sizes[b]))
        else:
            values, error = shared[0][b] if pool is None else shared[0][b, pool], shared[1][b]
        yield position(smallest(values, count, float(error), exact, lambda i: bank.keys[row(position(i))]))


def nearest_rows(bank: Bank, q: Tensor, s: Tensor, rows: Tensor, count: int) -> Tensor:
    """The `count` rows nearest to one image at full resolution, ascending; q `(D,)`, s `()`."""
    rows = _sorted(rows)
    if count >= len(rows):
        return rows

    def exact(i: Tensor) -> Tensor:
        return bank.distances(q, s, rows[i])

    if bank.compiled and len(rows) * bank.D >= WORTH_COMPILING:
        scores, error = bank.rough_distances(q, s, rows)
    else:
        scores, error = torch.empty(len(rows), dtype=q.dtype, device=q.device), 0.0
        for part, chosen, v in bank.blocks(rows, q.dtype):
            part_scores, tolerance = fast_scores(q[None], s[None], v, bank.norms[chosen].to(q.dtype))
            scores[part], error = part_scores[:, 0], max(error, float(tolerance))
    chosen = smallest(scores, count, error, exact, lambda i: bank.keys[rows[i]])
    return _sorted(rows[chosen])


def fast_scores(q: Tensor, s: Tensor, v: Tensor, norms: Tensor) -> tuple[Tensor, Tensor]:
    """`|q - s v|^2 - |q|^2` by one product, `(n, B)`, and a generous bound of its rounding error, `(B,)`."""
    squares, query = (s.double() ** 2).to(v.dtype), (-2 * s.double()[:, None] * q).to(v.dtype)
    return (norms[:, None] * squares).addmm_(v, query.T), 2 * rounding(s, q.double().norm(dim=1), norms, v.dtype)


def rounding(s: Tensor, lengths: Tensor, norms: Tensor, dtype: torch.dtype) -> Tensor:
    """A generous bound of the rounding error of `s^2 |v|^2 / 2 - s q v` by a product in `dtype`, `(B,)` float64.

    Arguments:
        s: `(B,)`. lengths: `|q|`, `(B,)` float64. norms: `|v|^2`, `(n,)`.
    """
    reach = s.double() * norms.max().double().sqrt()
    return 16 * torch.finfo(dtype).eps * reach * (2 * lengths + reach)


def smallest(
    fast: Tensor,
    count: int,
    tolerance: float,
    exact: Callable[[Tensor], Tensor],
    keys: Callable[[Tensor], Tensor],
) -> Tensor:
    """Positions of the `count` smallest values, where `fast` knows them up to `tolerance`.

    Those near the cut are measured by `exact(positions)`; equal ones go by `keys(positions)`.
    """
    if count >= len(fast):
        return torch.arange(len(fast), device=fast.device)
    cut = _kth(fast, count).double()
    if not (bool(cut.isfinite()) and math.isfinite(tolerance)):  # out of the range of a fast product
        everything = torch.arange(len(fast), device=fast.device)
        everything = everything[keys(everything).argsort()]
        return everything[exact(everything).argsort(stable=True)][:count]
    sure = (fast.double() < cut - 2 * tolerance).nonzero()[:, 0]
    near = ((fast.double() - cut).abs() <= 2 * tolerance).nonzero()[:, 0]
    if len(sure) + len(near) > count:
        near = near[keys(near).argsort()]
        near = near[exact(near).argsort(stable=True)][: count - len(sure)]
    return torch.cat([sure, near])


def draw(keys: Tensor, count: int, seed: int, level: int) -> Tensor:
    """Positions of `count` rows drawn uniformly without replacement, ascending: those with the smallest hash.

    Arguments:
        keys: `(n,)` int64, of the rows. seed: of the image. level: of the noise, `Noise.angle`.
    """
    if count >= len(keys):
        return torch.arange(len(keys), device=keys.device)
    values = lots(keys, seed, level)
    if values.device.type == "cpu":  # NumPy's selection is several times as fast as torch's
        return torch.from_numpy(np.sort(np.argpartition(values.numpy(), count)[:count]))
    return values.topk(count, largest=False, sorted=False).indices.sort().values


def checked_tol(tol: float) -> float:
    """The error of a pixel that a subset aims at or holds, if it is a number of the right range."""
    if not isinstance(tol, int | float) or isinstance(tol, bool) or not 0 < tol < 2:
        raise GolddiffError(f"tol is {tol!r}: give the error of a pixel that is allowed, over 0 and under 2, as 0.01")
    return float(tol)


def lots(keys: Tensor, seed: int, level: int) -> Tensor:
    """What each row draws, `(n,)` int64 of any value: a hash of seed, noise level and row key."""
    return hashed(keys ^ salt_of(seed, level).to(keys.device))


def salt_of(seed: int, level: int) -> Tensor:
    """What makes the lots of a seed and noise level its own, `()` int64."""
    return hashed(hashed(torch.tensor(seed)) ^ torch.tensor(level))


def _sorted(rows: Tensor) -> Tensor:
    return torch.from_numpy(np.sort(rows.numpy())) if rows.device.type == "cpu" else rows.sort().values


def _kth(values: Tensor, count: int) -> Tensor:
    """The value that would be number `count` (from 1) in order."""
    if values.device.type == "cpu":
        return torch.tensor(np.partition(values.numpy(), count - 1)[count - 1])
    return values.kthvalue(count).values


def hashed(x: Tensor) -> Tensor:
    """The finaliser of SplitMix64 on int64, which wraps ("Fast splittable pseudorandom number generators")."""
    x = x + -0x61C8864680B583EB
    x = (x ^ _shift(x, 30)) * -0x40A7B892E31B1A47
    x = (x ^ _shift(x, 27)) * -0x6B2FB644ECCEEE15
    return x ^ _shift(x, 31)


def _shift(x: Tensor, bits: int) -> Tensor:
    """Logical shift to the right."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)
