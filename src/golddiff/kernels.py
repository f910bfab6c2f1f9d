"""Compiled loops over uint8 rows (extra `fast`, numba). Importing this module needs numba.

Vectors of 64 lanes, one for each of 64 rows, are named in two intrinsics, because the compiler does not find them by
itself: the rest is left to its loop vectoriser.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import numba
import numpy as np
import torch
from llvmlite import ir
from numba import njit, prange, types
from numba.extending import intrinsic

__all__ = [
    "LANES",
    "count_runs",
    "distances_in",
    "dots",
    "fill_runs",
    "masked_softmax_kernel",
    "run_sums",
    "use_threads_of_torch",
]

LANES = 64
GROUP = 2  # blocks of 64 rows that make one partial softmax
FAST = {"reassoc", "contract", "nsz"}  # sums may be taken in another order; infinities and NaN keep their meaning
BYTE = ir.IntType(8)


def compiled(function: Callable[..., Any], **options: Any) -> Any:
    """The function compiled, and kept for other processes where there is a place for it."""
    make = partial(njit, nogil=True, fastmath=FAST, error_model="numpy", **options)
    try:
        return make(cache=True)(function)
    except RuntimeError:  # nowhere to keep compiled code: compile in every process
        return make()(function)


def use_threads_of_torch() -> None:
    """As many threads as torch uses."""
    numba.set_num_threads(min(torch.get_num_threads(), numba.config.NUMBA_NUM_THREADS))


@cache
def distances_in(kind):
    """`kernel(pixels, q, s, rows)` gives `|q - s pixels|^2` of some rows, `(n,)`, in float32 or float64."""

    def kernel(pixels, q, s, rows):
        out = np.empty(len(rows), kind)
        for i in prange(len(rows)):
            row, total = pixels[rows[i]], kind(0)
            for n in range(len(q)):
                d = q[n] - s * kind(row[n])
                total += d * d
            out[i] = total
        return out

    return compiled(kernel, parallel=True)


def _dots(matrix, q, rows):
    """`matrix[rows] @ q`, `(n,)`, in float32."""
    out = np.empty(len(rows), np.float32)
    for i in prange(len(rows)):
        row, total = matrix[rows[i]], np.float32(0)
        for n in range(len(q)):
            total += row[n] * q[n]
        out[i] = total
    return out


def _count_runs(columns, tile):
    """How many ends the runs of each column `(P, D)` have in each tile, `(tiles, P)`."""
    size = columns.shape[1]
    counts = np.zeros(((size + tile - 1) // tile, len(columns)), np.int64)
    for m in prange(len(columns)):
        for t in range(len(counts)):
            before = False
            for n in range(t * tile, min((t + 1) * tile, size)):
                counts[t, m] += columns[m, n] != before
                before = columns[m, n]
            counts[t, m] += before
    return counts


def _fill_runs(columns, tile, start, ends):
    """Writes the ends of the runs, from the beginning of their tile."""
    size = columns.shape[1]
    for m in prange(len(columns)):
        for t in range(len(start)):
            before, j = False, start[t, m]
            stop = min((t + 1) * tile, size)
            for n in range(t * tile, stop):
                if columns[m, n] != before:
                    ends[j] = n - t * tile
                    j += 1
                before = columns[m, n]
            if before:
                ends[j] = stop - t * tile


dots = compiled(_dots, parallel=True)
count_runs = compiled(_count_runs, parallel=True)
fill_runs = compiled(_fill_runs, parallel=True)


@intrinsic
def add_runs(typingctx, sums, prefix, ends, first, last, kind):
    """`sums[w] += prefix[ends[j + 1], w] - prefix[ends[j], w]` over `j = first, first + 2, ... < last`.

    Addresses of 64 lanes of the type of `kind`, of rows of such lanes, and of int16; sums stay in registers.
    """
    number = ir.IntType(32) if kind == types.int32 else ir.DoubleType()
    size = 4 if kind == types.int32 else 8

    def generate(context, builder, signature, arguments):
        lanes = ir.VectorType(number, LANES)
        address, prefix, ends, first, last, _ = arguments
        word = first.type
        add = builder.add if size == 4 else builder.fadd
        subtract = builder.sub if size == 4 else builder.fsub
        target = builder.inttoptr(address, lanes.as_pointer())
        start = builder.load(target, align=size)
        before = builder.block
        head = builder.append_basic_block("head")
        body = builder.append_basic_block("body")
        end = builder.append_basic_block("end")
        builder.branch(head)
        builder.position_at_end(head)
        j, total = builder.phi(word), builder.phi(lanes)
        j.add_incoming(first, before)
        total.add_incoming(start, before)
        builder.cbranch(builder.icmp_signed("<", j, last), body, end)
        builder.position_at_end(body)
        pair = builder.add(ends, builder.shl(j, word(1)))

        def row(offset: int) -> Any:
            place = builder.load(
                builder.inttoptr(builder.add(pair, word(offset)), ir.IntType(16).as_pointer()), align=2
            )
            step = builder.mul(builder.zext(place, word), word(LANES * size))
            return builder.load(builder.inttoptr(builder.add(prefix, step), lanes.as_pointer()), align=size)

        total.add_incoming(add(total, subtract(row(2), row(0))), body)
        j.add_incoming(builder.add(j, word(2)), body)
        builder.branch(head)
        builder.position_at_end(end)
        builder.store(total, target, align=size)
        return context.get_dummy_value()

    return types.none(*[types.intp] * 5, kind), generate


@intrinsic
def transpose(typingctx, source, rows, target):
    """A block of 64 x 64 bytes: `target[n, w] = source[rows[w] + n]`.

    Addresses of bytes, of 64 int64 offsets, and of 64 x 64 bytes. Six rounds of interleaving transpose it.
    """

    def generate(context, builder, signature, arguments):
        lanes = ir.VectorType(BYTE, LANES)
        source, rows, target = arguments
        word = source.type
        block = []
        for w in range(LANES):
            offset = builder.load(builder.inttoptr(builder.add(rows, word(8 * w)), word.as_pointer()), align=8)
            block.append(builder.load(builder.inttoptr(builder.add(source, offset), lanes.as_pointer()), align=1))
        half = LANES // 2
        orders = [
            ir.Constant(ir.VectorType(ir.IntType(32), LANES), [i // 2 + start + LANES * (i % 2) for i in range(LANES)])
            for start in (0, half)
        ]
        for _ in range(6):
            block = [builder.shuffle_vector(block[i], block[i + half], o) for i in range(half) for o in orders]
        for n, column in enumerate(block):
            place = builder.inttoptr(builder.add(target, word(LANES * n)), lanes.as_pointer())
            builder.store(column, place, align=1)
        return context.get_dummy_value()

    return types.none(types.intp, types.intp, types.intp), generate


@compiled
def aligned(count, width):
    """An empty array of `count` rows of 64 numbers of `width` bytes, as bytes, at the beginning of a cache line.

    Vectors that cross cache lines are read at a third of the speed.
    """
    size = count * LANES * width
    room = np.empty(size + 64, np.uint8)
    start = -room.ctypes.data % 64
    return room[start : start + size].reshape(count, LANES * width)


@compiled
def run_sums(values, tile, start, ends):
    """Sums of values `(D,)` over the runs of each column, `(D,)` float64."""
    size = len(values)
    out = np.zeros(size)
    prefix = np.zeros(tile + 1)
    for t in range(len(start)):
        for n in range(min(tile, size - t * tile)):
            prefix[n + 1] = prefix[n] + values[t * tile + n]
        for m in range(size):
            total = 0.0
            for j in range(start[t, m], start[t, m + 1], 2):
                total += prefix[ends[j + 1]] - prefix[ends[j]]
            out[m] += total
    return out


@cache
def masked_softmax_kernel(whole: bool) -> Any:
    """Partial softmaxes of 128 rows each, with sums as whole numbers (int32) or as float64.

    `kernel(pixels, centre, q, s, rows, tile, start, ends, unit)` gives peaks, totals, squares and means, `(chunks, D)`
    float64 each, of the logits `-sum over runs of d / 2` where `d = s v (s v - 2 q)`, `v = pixels - centre`. `start`
    `(tiles, D + 1)` says where the runs of each column begin in `ends`, which count from the beginning of the tile.
    """
    kept, rounding = (np.int32, True) if whole else (np.float64, False)
    chunk, width = GROUP * LANES, np.dtype(kept).itemsize
    unused = kept(0)

    def kernel(pixels, centre, q, s, rows, tile, start, ends, unit):
        size, count = len(q), len(rows)
        chunks = (count + chunk - 1) // chunk
        peaks = np.full((chunks, size), -np.inf)
        totals, squares, means = np.zeros((chunks, size)), np.zeros((chunks, size)), np.zeros((chunks, size))
        for c in prange(chunks):
            bytes_ = aligned(size, 1)
            prefix = aligned(tile + 1, width).view(kept)
            sums = aligned(size, width).view(kept)
            offsets = np.empty(LANES, np.int64)
            logits, powers = np.empty(LANES, np.float32), np.empty(LANES, np.float32)
            exponents = np.empty(LANES, np.int32)
            scales = exponents.view(np.float32)
            for first in range(c * chunk, min((c + 1) * chunk, count), LANES):
                here = min(LANES, count - first)
                for w in range(LANES):
                    offsets[w] = rows[first + min(w, here - 1)] * size
                for block in range(0, size, LANES):
                    n0 = min(block, size - LANES)
                    transpose(pixels.ctypes.data + n0, offsets.ctypes.data, bytes_.ctypes.data + LANES * n0)
                sums[:] = 0
                prefix[0] = 0
                for t in range(len(start)):
                    begin = t * tile
                    for n in range(min(tile, size - begin)):
                        twice, middle = 2 * q[begin + n], centre[begin + n]
                        for w in range(LANES):
                            x = s * (np.float32(bytes_[begin + n, w]) - middle)
                            d = x * (x - twice) * unit
                            if rounding:
                                prefix[n + 1, w] = prefix[n, w] + np.int32(np.rint(d))
                            else:
                                prefix[n + 1, w] = prefix[n, w] + d
                    for m in range(size):
                        add_runs(
                            sums.ctypes.data + m * LANES * width,
                            prefix.ctypes.data,
                            ends.ctypes.data,
                            start[t, m],
                            start[t, m + 1],
                            unused,
                        )
                for m in range(size):
                    best = sums[m, 0]
                    for w in range(LANES):
                        best = min(best, sums[m, w])
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
                    for w in range(LANES):
                        logits[w] = np.float32((-0.5 / unit * sums[m, w] - top) * 1.4426950408889634)
                    for w in range(LANES):  # 2^x: the whole part goes to the exponent, the rest through a polynomial
                        x = max(logits[w], np.float32(-126.0))
                        whole_part = np.rint(x)
                        exponents[w] = (np.int32(whole_part) + 127) << 23
                        f = (x - whole_part) * np.float32(0.6931471805599453)
                        p = np.float32(1 / 5040) * f + np.float32(1 / 720)
                        p = p * f + np.float32(1 / 120)
                        p = p * f + np.float32(1 / 24)
                        p = p * f + np.float32(1 / 6)
                        p = p * f + np.float32(0.5)
                        p = p * f + np.float32(1.0)
                        powers[w] = p * f + np.float32(1.0)
                    for w in range(here, LANES):
                        powers[w] = 0.0
                    total, square, mean = np.float32(0), np.float32(0), np.float32(0)
                    for w in range(LANES):
                        e = powers[w] * scales[w]
                        total += e
                        square += e * e
                        mean += e * (np.float32(bytes_[m, w]) - centre[m])
                    totals[c, m] += total
                    squares[c, m] += square
                    means[c, m] += mean
        return peaks, totals, squares, means

    return compiled(kernel, parallel=True)
