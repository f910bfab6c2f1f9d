"""The masked softmax of a local denoiser as a compiled kernel (extra `fast`, numba), on the CPU.

A column of a mask is a few runs of neighbouring pixels, so a masked sum is a few differences of prefix sums instead of
a product with all D entries:

    sum_n M[n, m] d_i[n] = sum over runs (P_i[end] - P_i[start]),    P_i[n] = d_i[0] + ... + d_i[n - 1].

64 rows go side by side through vector registers. Prefix sums are whole numbers (int32, which wrap without harm) where
their resolution is enough, else float64; so nothing is lost to cancellation. Softmax and weighted mean follow while the
sums are at hand: no array of k x D is made.
"""

from __future__ import annotations

import importlib.util
import math
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..bank import Bank

__all__ = ["MaskRuns", "masked_softmax", "usable"]

LANES = 64
CHUNK = 512  # rows of one partial softmax; partial results are merged in order, whatever the number of threads
WORTH = 2e9  # flops of the plain product from which compiling pays
RESOLUTION = 3e-4  # largest standard error of a logit from whole-number sums


@dataclass(frozen=True, eq=False)
class MaskRuns:
    """The columns of a mask as runs.

    Arguments:
        start: `(D + 1,)` where each column's entries of `ends` begin.
        ends: begin and end of each run, one after the other.
        largest: most pixels in a column.
    """

    start: np.ndarray
    ends: np.ndarray
    largest: int

    @staticmethod
    def of(mask: Tensor) -> MaskRuns:
        """The runs of a boolean mask M[n, m], `(D, D)`."""
        size = len(mask)
        columns = np.zeros((size, size + 2), dtype=np.int8)
        columns[:, 1:-1] = mask.T.numpy()
        column, place = np.nonzero(columns[:, 1:] != columns[:, :-1])
        start = np.zeros(size + 1, dtype=np.int64)
        np.cumsum(np.bincount(column, minlength=size), out=start[1:])
        return MaskRuns(start, place.astype(np.int32), int(mask.sum(0).max()))


def usable(bank: Bank, x_t: Tensor, mask: Tensor, rows: int) -> bool:
    """Whether the kernel can take this work, and is worth compiling for it."""
    return (
        2 * rows * bank.D**2 >= WORTH
        and bank.is_uint8
        and mask.dtype == torch.bool
        and x_t.dtype == torch.float32
        and x_t.device.type == "cpu"
        and importlib.util.find_spec("numba") is not None
    )


def masked_softmax(bank: Bank, q: Tensor, s: Tensor, rows: Tensor, runs: MaskRuns) -> tuple[Tensor, Tensor, Tensor]:
    """Softmax-weighted mean of the centred rows, log of the total, and ess, `(D,)` float64 each, for one image.

    Arguments:
        q: `(D,)` float64. s: `()` float64. rows: `(k,)`.
        runs: of the mask.
    """
    import numba

    numba.set_num_threads(min(torch.get_num_threads(), numba.config.NUMBA_NUM_THREADS))  # type: ignore[attr-defined]
    query, scale = q.numpy(), float(s)
    # the part q^2 is the same for all rows and is added at the end; what is left is small at high noise
    reach = scale * float(torch.maximum(bank.centre, 255 - bank.centre).max())
    largest = reach * (reach + 2 * float(np.abs(query).max()))
    unit = 2.0**30 / (max(runs.largest, 1) * max(largest, 1e-30))
    whole = math.sqrt(runs.largest / 12) / unit / 2 <= RESOLUTION
    kernel = _kernel(whole)
    pixels = bank.pixels.flatten(1).numpy()
    parts = kernel(
        pixels,
        bank.centre.numpy(),
        query.astype(np.float32) if whole else query,
        np.float32(scale) if whole else scale,
        rows.numpy(),
        runs.start,
        runs.ends,
        np.float32(unit) if whole else 1.0,
    )
    bank.bytes_read += len(rows) * bank.D
    peaks, totals, squares, means = (torch.from_numpy(part) for part in parts)
    peak = peaks.amax(0)
    shrink = (peaks - peak).exp_()
    total = (totals * shrink).sum(0)
    squares = (squares * shrink**2).sum(0)
    mean = (means * shrink).sum(0) / total
    prefix = np.concatenate([[0.0], np.cumsum(query**2)])
    signs = np.resize([-1.0, 1.0], len(runs.ends))
    own = np.add.reduceat(np.append(prefix[runs.ends] * signs, 0.0), runs.start[:-1])
    own[runs.start[1:] == runs.start[:-1]] = 0.0
    return mean, peak + total.log() - torch.from_numpy(own) / 2, total**2 / squares


@cache
def _kernel(whole: bool) -> Any:
    """The compiled kernel, with prefix sums as whole numbers or as float64."""
    from numba import njit, prange

    kept = np.int32 if whole else np.float64
    lanes, rounding, ln2 = (LANES if whole else LANES // 2), whole, math.log(2)

    def kernel(pixels, centre, q, s, rows, start, ends, unit):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202
        size, count = len(q), len(rows)
        chunks = (count + CHUNK - 1) // CHUNK
        peaks = np.full((chunks, size), -np.inf)
        totals, squares, means = np.zeros((chunks, size)), np.zeros((chunks, size)), np.zeros((chunks, size))
        for c in prange(chunks):
            v = np.zeros((size, lanes), np.float32)
            prefix = np.zeros((size + 1, lanes), kept)
            sums, logits, powers = np.zeros(lanes, kept), np.zeros(lanes, np.float32), np.zeros(lanes, np.float32)
            exponents = np.zeros(lanes, np.int32)
            scales = exponents.view(np.float32)
            for first in range(c * CHUNK, min((c + 1) * CHUNK, count), lanes):
                here = min(lanes, count - first)
                for n0 in range(0, size, 64):
                    for w in range(here):
                        row = rows[first + w]
                        for n in range(n0, min(n0 + 64, size)):
                            v[n, w] = np.float32(pixels[row, n]) - centre[n]
                for n in range(size):
                    twice = 2 * q[n]
                    for w in range(lanes):
                        x = s * v[n, w]
                        d = x * (x - twice) * unit
                        if rounding:
                            prefix[n + 1, w] = prefix[n, w] + np.int32(np.rint(d))
                        else:
                            prefix[n + 1, w] = prefix[n, w] + d
                for m in range(size):
                    for w in range(lanes):
                        sums[w] = 0
                    for j in range(start[m], start[m + 1], 2):
                        low, high = prefix[ends[j]], prefix[ends[j + 1]]
                        for w in range(lanes):
                            sums[w] += high[w] - low[w]
                    best = sums[0]
                    for w in range(1, here):
                        best = min(best, sums[w])
                    peak = -0.5 * np.float64(best) / unit
                    if peak < peaks[c, m] - 40.0:
                        continue
                    if peak > peaks[c, m]:
                        shrink = np.exp(peaks[c, m] - peak)
                        totals[c, m] *= shrink
                        squares[c, m] *= shrink * shrink
                        means[c, m] *= shrink
                        peaks[c, m] = peak
                    top = peaks[c, m]
                    for w in range(lanes):
                        logits[w] = np.float32((-0.5 / unit * sums[w] - top) * 1.4426950408889634)
                    for w in range(lanes):  # 2^x: the whole part goes to the exponent, the rest through a polynomial
                        x = max(logits[w], np.float32(-126.0))
                        whole_part = np.rint(x)
                        exponents[w] = (np.int32(whole_part) + 127) << 23
                        f = (x - whole_part) * np.float32(ln2)
                        p = np.float32(1 / 5040) * f + np.float32(1 / 720)
                        p = p * f + np.float32(1 / 120)
                        p = p * f + np.float32(1 / 24)
                        p = p * f + np.float32(1 / 6)
                        p = p * f + np.float32(0.5)
                        p = p * f + np.float32(1.0)
                        powers[w] = p * f + np.float32(1.0)
                    total, square, mean = np.float32(0), np.float32(0), np.float32(0)
                    for w in range(here):
                        e = powers[w] * scales[w]
                        total += e
                        square += e * e
                        mean += e * v[m, w]
                    totals[c, m] += total
                    squares[c, m] += square
                    means[c, m] += mean
        return peaks, totals, squares, means

    try:
        return njit(parallel=True, cache=True)(kernel)
    except RuntimeError:  # nowhere to keep compiled code: compile in every process
        return njit(parallel=True)(kernel)
