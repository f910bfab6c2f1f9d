"""The masked softmax of a local denoiser by a compiled kernel (extra `fast`, numba), on the CPU.

A column of a mask is a few runs of neighbouring pixels, so a masked sum is a few differences of prefix sums instead of
a product with all D entries:

    sum_n M[n, m] d_i[n] = sum over runs (P_i[end] - P_i[start]),    P_i[n] = d_i[0] + ... + d_i[n - 1].

64 rows go side by side through vector registers, and pixels in tiles whose prefix sums stay in the cache. Prefix sums
are whole numbers (int32, which wrap without harm) where their resolution is enough, else float64; so nothing is lost to
cancellation. Softmax and weighted mean follow while the sums are at hand: no array of k x D is made.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from ..bank import Bank
from ..golden import Support
from ..locality import TILE, MaskRuns

__all__ = ["masked_softmax", "usable"]

AT_ONCE = 2**26  # rows times pixels whose partial results are held at once
LONGEST, NUMBERS = 1024, 2**17  # rows of a chunk, and rows times pixels
SMALLEST = 64  # pixels that are transposed at once
WORTH = 2e9  # flops of the plain product from which compiling pays
RESOLUTION = 3e-4  # largest standard error of a logit from whole-number sums


def usable(bank: Bank, x_t: Tensor, rows: int) -> bool:
    """Whether the kernel can take this work (if the mask has no weights), and is worth compiling for it."""
    return bank.compiled and x_t.dtype == torch.float32 and bank.D >= SMALLEST and 2 * rows * bank.D**2 >= WORTH


def masked_softmax(
    bank: Bank, q: Tensor, s: Tensor, support: Support, runs: list[MaskRuns]
) -> tuple[Tensor, Tensor, Tensor]:
    """Softmax-weighted mean of the centred rows, log of the total, and ess, `(B, D)` float64 each.

    Arguments:
        q: `(B, D)` float64. s: `(B,)` float64.
        runs: of the mask, for each tile of the support.
    """
    from .. import kernels

    kernels.use_threads_of_torch()
    # the part q^2 is the same for all rows and is added at the end; what is left is small at high noise
    reach = s * torch.maximum(bank.centre, 255 - bank.centre).max()
    largest = (reach * (reach + 2 * q.abs().amax(1))).clamp(min=1e-20).numpy()
    squares = (q**2).numpy()
    out = np.empty((3, *q.shape))
    for tile, columns in enumerate(runs):
        units = 2.0**30 / (max(columns.largest, 1) * largest)
        step = np.maximum(1 / units / math.sqrt(12), largest * 2.0**-24)  # of int32, or of the float32 before it
        whole = math.sqrt(columns.largest) * step / 2 <= RESOLUTION
        for kind in np.unique(whole):
            images = np.flatnonzero(whole == kind)
            parts = []
            for rows, log_q, chunks in _work(support, tile, images.tolist(), len(columns.outputs)):
                sums = _sums(bank, q, s, rows, log_q, chunks, columns, units if kind else None)
                parts.append(_merged(chunks[:, 0], *sums))
                bank.bytes_read += len(rows) * len(columns.blocks) * kernels.LANES
            _, peak, total, total_of_squares, mean = _merged(*map(np.concatenate, zip(*parts, strict=True)))
            same = kernels.run_sums(squares[np.ix_(images, columns.inputs)], TILE, columns.start, columns.ends)
            found = (mean / total, peak + np.log(total) - same / 2, total**2 / total_of_squares)
            for kept, numbers in zip(out, found, strict=True):
                kept[np.ix_(images, columns.outputs)] = numbers
    mean, log_total, ess = torch.from_numpy(out)
    return mean, log_total, ess


def _work(
    support: Support, tile: int, images: list[int], pixels: int
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Rows and `log_q` of a tile, of as many images as go together, and their chunks `(n, 3)`: image, begin, end."""
    from .. import kernels

    most = max(kernels.CHUNK, AT_ONCE // pixels)
    chunk = max(kernels.CHUNK, min(LONGEST, NUMBERS // pixels // kernels.LANES * kernels.LANES))
    rows: list[Tensor] = []
    log_q: list[Tensor] = []
    chunks: list[tuple[int, int, int]] = []
    held = 0
    for b, part, added in _pieces(support, tile, images, most):
        if held and held + len(part) > most:
            yield torch.cat(rows).numpy(), torch.cat(log_q).numpy(), np.array(chunks)
            rows, log_q, chunks, held = [], [], [], 0
        end = held + len(part)
        chunks += [(b, first, min(first + chunk, end)) for first in range(held, end, chunk)]
        rows.append(part)
        log_q.append(added)
        held = end
    if held:
        yield torch.cat(rows).numpy(), torch.cat(log_q).numpy(), np.array(chunks)


def _pieces(support: Support, tile: int, images: list[int], most: int) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Yields an image, some of its rows and their `log_q`; rows that images share come for all of them before others,
    so that a bank which does not fit into memory is read once."""
    if support.shared:
        rows, log_q = support.rows_of(images[0], tile), support.log_q_of(images[0], tile)
        for part, added in zip(rows.split(most), log_q.split(most), strict=True):
            yield from ((b, part, added) for b in images)
    else:
        for b in images:
            rows, log_q = support.rows_of(b, tile), support.log_q_of(b, tile)
            yield from ((b, *pair) for pair in zip(rows.split(most), log_q.split(most), strict=True))


def _sums(
    bank: Bank,
    q: Tensor,
    s: Tensor,
    rows: np.ndarray,
    log_q: np.ndarray,
    chunks: np.ndarray,
    columns: MaskRuns,
    units: np.ndarray | None,
) -> tuple[np.ndarray, ...]:
    """Peaks, totals, sums of squares and weighted sums of chunks, `(n, P)`; in whole numbers if there are units."""
    from .. import kernels

    number = np.float64 if units is None else np.float32
    chosen = np.ones(len(q)) if units is None else units
    return kernels.masked_softmax_kernel(units is not None)(
        bank.pixels.flatten(1).numpy(),
        bank.centre.numpy(),
        q.numpy().astype(number),
        s.numpy().astype(number),
        rows,
        log_q,
        chunks,
        columns.blocks,
        columns.inputs,
        columns.outputs,
        min(TILE, max(len(columns.inputs), 1)),
        columns.start,
        columns.ends,
        chosen.astype(number),
    )


def _merged(
    images: np.ndarray, peaks: np.ndarray, totals: np.ndarray, squares: np.ndarray, means: np.ndarray
) -> tuple[np.ndarray, ...]:
    """Images without repetition, and one peak, total, sum of squares and weighted sum of each, `(B, P)`, from those of
    several sets of rows, `(n, P)`; `images` `(n,)`."""
    if (images[1:] < images[:-1]).any():
        order = np.argsort(images, kind="stable")
        images, peaks, totals, squares, means = (part[order] for part in (images, peaks, totals, squares, means))
    begins = np.flatnonzero(np.r_[True, images[1:] != images[:-1]])
    peak = np.maximum.reduceat(peaks, begins)
    shrink = np.exp(peaks - peak.repeat(np.diff([*begins, len(images)]), 0))
    sums = (np.add.reduceat(n, begins) for n in (totals * shrink, squares * shrink**2, means * shrink))
    return images[begins], peak, *sums
