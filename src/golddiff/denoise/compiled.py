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
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ..bank import Bank
from ..locality import TILE, MaskRuns

__all__ = ["masked_softmax", "usable"]

BLOCK = 2**14  # rows whose partial results are held at once
SMALLEST = 64  # pixels that are transposed at once
WORTH = 2e9  # flops of the plain product from which compiling pays
RESOLUTION = 3e-4  # largest standard error of a logit from whole-number sums


def usable(bank: Bank, x_t: Tensor, rows: int) -> bool:
    """Whether the kernel can take this work (if the mask has no weights), and is worth compiling for it."""
    return bank.compiled and x_t.dtype == torch.float32 and bank.D >= SMALLEST and 2 * rows * bank.D**2 >= WORTH


def masked_softmax(bank: Bank, q: Tensor, s: Tensor, rows: Tensor, runs: MaskRuns) -> tuple[Tensor, Tensor, Tensor]:
    """Softmax-weighted mean of the centred rows, log of the total, and ess, `(D,)` float64 each, for one image.

    Arguments:
        q: `(D,)` float64. s: `()` float64. rows: `(k,)`.
        runs: of the mask.
    """
    from .. import kernels

    kernels.use_threads_of_torch()
    query, scale = q.numpy(), float(s)
    # the part q^2 is the same for all rows and is added at the end; what is left is small at high noise
    reach = scale * float(torch.maximum(bank.centre, 255 - bank.centre).max())
    largest = reach * (reach + 2 * float(np.abs(query).max()))
    unit = 2.0**30 / (max(runs.largest, 1) * max(largest, 1e-30))
    steps_of_int32, steps_of_float32 = 1 / unit / math.sqrt(12), largest * 2.0**-24
    whole = math.sqrt(runs.largest) * max(steps_of_int32, steps_of_float32) / 2 <= RESOLUTION
    number = np.float32 if whole else np.float64
    arguments = (
        bank.pixels.flatten(1).numpy(),
        bank.centre.numpy(),
        query.astype(number),
        number(scale),
    )
    kernel, steps = kernels.masked_softmax_kernel(whole), number(unit if whole else 1.0)
    mask = (min(TILE, bank.D), runs.start, runs.ends)
    blocks = [_merged(kernel(*arguments, part.numpy(), *mask, steps)) for part in rows.split(BLOCK)]
    bank.bytes_read += len(rows) * bank.D
    peak, total, squares, mean = _merged([np.stack(parts) for parts in zip(*blocks, strict=True)])
    log_total = peak + np.log(total) - kernels.run_sums(query**2, *mask) / 2
    return torch.from_numpy(mean / total), torch.from_numpy(log_total), torch.from_numpy(total**2 / squares)


def _merged(parts: Sequence[np.ndarray]) -> tuple[np.ndarray, ...]:
    """One peak, total, sum of squares and weighted sum `(D,)` from those of several sets of rows, `(n, D)` each."""
    peaks, totals, squares, means = parts
    peak = peaks.max(0)
    shrink = np.exp(peaks - peak)
    return peak, (totals * shrink).sum(0), (squares * shrink**2).sum(0), (means * shrink).sum(0)
