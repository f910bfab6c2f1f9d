"""Compiled loops over uint8 rows (extra `fast`, numba). Importing this module needs numba.

Vectors of 64 lanes, one for each of 64 rows, are named in two intrinsics, because the compiler does not find them by
itself: the rest is left to its loop vectoriser.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial, wraps
from typing import Any

import numba
import numpy as np
import torch
from llvmlite import ir
from numba import njit, prange, types
from numba.extending import intrinsic

__all__ = [
    "CHUNK",
    "LANES",
    "count_runs",
    "distances_in",
    "dots",
    "drawn",
    "fill_runs",
    "histograms",
    "local_scores",
    "log_lots",
    "masked_softmax_kernel",
    "reached",
    "run_sums",
    "scores_of",
    "use_threads_of_torch",
]

LANES = 64
CHUNK = 2 * LANES  # rows of one partial softmax, at least
GROUP = 4  # images that are scored together
FAST = {"reassoc", "contract", "nsz"}  # sums may be taken in another order; infinities and NaN keep their meaning
BYTE = ir.IntType(8)


def compiled(function: Callable[..., Any], **options: Any) -> Any:
    """The function compiled, and kept for other processes where there is a place for it."""
    make = partial(njit, nogil=True, fastmath=FAST, error_model="numpy", **options)
    try:
        built = make(cache=True)(function)
    except RuntimeError:  # nowhere to keep compiled code: compile in every process
        built = make()(function)
    return interruptible(built) if options.get("parallel") else built


def interruptible(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, out of which Ctrl-C comes as itself: numba makes a SystemError of it."""

    @wraps(function)
    def call(*arguments: Any) -> Any:
        try:
            return function(*arguments)
        except SystemError as error:
            reason: BaseException | None = error
            while reason is not None and not isinstance(reason, KeyboardInterrupt):
                reason = reason.__cause__ or reason.__context__
            if reason is None:
                raise
            raise KeyboardInterrupt from error

    return call


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


def _log_lots(keys, salt):
    """See `golddiff.drawing.log_uniform`."""
    out = np.empty(len(keys), np.float32)
    for i in prange(len(keys)):
        x = np.uint64(keys[i]) ^ np.uint64(salt)
        x += np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        x ^= x >> np.uint64(31)
        out[i] = np.log((np.float64(x >> np.uint64(11)) + 0.5) / 9007199254740992.0)
    return out


def _histograms(scores, tops, widths, bins):
    """How many scores `(G, n)` lie how far under `tops` `(G,)`, in bins of `1 / widths` `(G,)`, `(G, bins)`."""
    counts = np.zeros((len(scores), bins), np.int64)
    for g in prange(len(scores)):
        row, top, width = scores[g], tops[g], widths[g]
        found = np.zeros((4, bins), np.int32)  # neighbours that fall into one bin do not wait for each other
        for i in range(len(row)):
            far = (top - row[i]) * width
            found[i & 3, np.int32(far) if far < bins - 1 else bins - 1] += 1  # the last one for NaN too
        for k in range(bins):
            counts[g, k] = found[0, k] + found[1, k] + found[2, k] + found[3, k]
    return counts


def _drawn(scores, steepness, cuts, lots, tiles, padding):
    """Of each row of scores `(G, n)`, the places where `lot < chance`, `chance = steepness score + cut`, padded to the
    same width `(G, K)`, and `-min(chance, 0)` of them; lots `(G / tiles, n)`."""
    counts = np.zeros(len(scores), np.int64)
    for g in prange(len(scores)):
        row, lot, steep, cut, found = scores[g], lots[g // tiles], steepness[g], cuts[g], 0
        for i in range(len(row)):
            found += lot[i] < row[i] * steep + cut
        counts[g] = found
    width = max(np.int64(1), counts.max())
    chosen, log_q = np.full((len(scores), width), padding), np.zeros((len(scores), width), np.float32)
    for g in prange(len(scores)):
        row, lot, steep, cut, j = scores[g], lots[g // tiles], steepness[g], cuts[g], 0
        for i in range(len(row)):
            chance = row[i] * steep + cut
            if lot[i] < chance:
                chosen[g, j] = i
                log_q[g, j] = -min(chance, np.float32(0))
                j += 1
    return chosen, log_q


def _reached(chances, least, lots, drawn, begins, rows, cells, padding):
    """Rows that the search reaches for each image and tile, padded to the same width `(G, K)`, the logarithms of their
    chances, and what is left of their lots, `lot - chance`, infinite for padding.

    They are those of cells with a chance `(G, C)` over the least whose lot `(B, N)` is under it, and of the rows drawn
    anyway `(B, L)` (padded) those in the other cells. See `Cells` for `begins`, `rows` and `cells`.
    """
    tiles, count = len(begins), chances.shape[1]
    counts = np.zeros(len(chances), np.int64)
    for g in prange(len(chances)):
        b, t, found = g // tiles, g % tiles, 0
        for c in range(count):
            chance = chances[g, c]
            if chance >= 0:
                found += begins[t, c + 1] - begins[t, c]
            elif chance > least:
                for i in range(begins[t, c], begins[t, c + 1]):
                    found += lots[b, rows[t, i]] < chance
        for i in range(drawn.shape[1]):
            if drawn[b, i] != padding:
                found += chances[g, cells[drawn[b, i], t]] <= least
        counts[g] = found
    width = max(np.int64(1), counts.max())
    found_rows, bounds = np.full((len(chances), width), padding), np.zeros((len(chances), width), np.float32)
    left = np.full((len(chances), width), np.float32(np.inf))
    for g in prange(len(chances)):
        b, t, j = g // tiles, g % tiles, 0
        for c in range(count):
            chance = chances[g, c]
            if chance > least:
                for i in range(begins[t, c], begins[t, c + 1]):
                    lot = lots[b, rows[t, i]]
                    if lot < chance:
                        found_rows[g, j], bounds[g, j], left[g, j] = rows[t, i], chance, lot - chance
                        j += 1
        for i in range(drawn.shape[1]):
            row = drawn[b, i]
            if row != padding and chances[g, cells[row, t]] <= least:
                found_rows[g, j], bounds[g, j], left[g, j] = row, least, lots[b, row] - least
                j += 1
    return found_rows, bounds, left


histograms = compiled(_histograms, parallel=True)
drawn = compiled(_drawn, parallel=True)
log_lots = compiled(_log_lots, parallel=True)
reached = compiled(_reached, parallel=True)


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


@intrinsic
def add_products(typingctx, sums, values, inputs, squares, linear, stride, count):
    """`sums[k, w] += v (linear[k stride + j] + squares[j] v)` with `v = values[inputs[j], w]`, over j < count, k < 4.

    Addresses of 4 x 64 float32, of rows of 64 of them, of int32, and of float32; what is read serves four sums, which
    stay in registers and are added in the order of j.
    """
    single, number = ir.FloatType(), ir.IntType(32)

    def generate(context, builder, signature, arguments):
        lanes = ir.VectorType(single, LANES)
        address, values, inputs, squares, linear, stride, count = arguments
        word = count.type

        def at(base: Any, bytes_: Any, kind: Any) -> Any:
            return builder.inttoptr(builder.add(base, bytes_), kind.as_pointer())

        def spread(base: Any, j: Any) -> Any:
            factor = builder.load(at(base, builder.shl(j, word(2)), single), align=4)
            one = builder.insert_element(ir.Constant(lanes, ir.Undefined), factor, number(0))
            order = ir.Constant(ir.VectorType(number, LANES), [0] * LANES)
            return builder.shuffle_vector(one, ir.Constant(lanes, ir.Undefined), order)

        def fused(x: Any, y: Any, z: Any) -> Any:
            return builder.fadd(builder.fmul(x, y, flags=("contract",)), z, flags=("contract",))

        targets = [at(address, word(k * LANES * 4), lanes) for k in range(GROUP)]
        factors = [builder.add(linear, builder.mul(stride, word(4 * k))) for k in range(GROUP)]
        starts = [builder.load(target, align=4) for target in targets]
        before = builder.block
        head = builder.append_basic_block("head")
        body = builder.append_basic_block("body")
        end = builder.append_basic_block("end")
        builder.branch(head)
        builder.position_at_end(head)
        j, own = builder.phi(word), builder.phi(lanes)
        totals = [builder.phi(lanes) for _ in targets]
        j.add_incoming(word(0), before)
        own.add_incoming(ir.Constant(lanes, [single(0.0)] * LANES), before)
        for total, start in zip(totals, starts, strict=True):
            total.add_incoming(start, before)
        builder.cbranch(builder.icmp_signed("<", j, count), body, end)
        builder.position_at_end(body)
        place = builder.load(at(inputs, builder.shl(j, word(2)), number), align=4)
        offset = builder.mul(builder.zext(place, word), word(LANES * 4))
        value = builder.load(at(values, offset, lanes), align=4)
        own.add_incoming(fused(builder.fmul(spread(squares, j), value), value, own), body)
        for total, factor in zip(totals, factors, strict=True):
            total.add_incoming(fused(spread(factor, j), value, total), body)
        j.add_incoming(builder.add(j, word(1)), body)
        builder.branch(head)
        builder.position_at_end(end)
        for total, target in zip(totals, targets, strict=True):
            builder.store(builder.fadd(total, own), target, align=4)
        return context.get_dummy_value()

    return types.none(*[types.intp] * 7), generate


@compiled
def aligned(count, width):
    """An empty array of `count` rows of 64 numbers of `width` bytes, as bytes, at the beginning of a cache line.

    Vectors that cross cache lines are read at a third of the speed.
    """
    size = count * LANES * width
    room = np.empty(size + 64, np.uint8)
    start = -room.ctypes.data % 64
    return room[start : start + size].reshape(count, LANES * width)


def _local_scores(matrix, centre, rows, inputs, counts, linear, squares, out):
    """Scores of rows for each image and tile: `out[b, t, i] = sum over j of v (a + c v)`, `v = matrix[i] - centre`.

    Bytes `matrix` `(N, M)`, `rows` `(n,)`; for tile t the first `counts[t]` of `inputs[t]` `(T, U)` int32, with
    `a = linear[b, t, j]` (B a multiple of 4) and `c = squares[t, j]`. The order of the sums does not depend on the rows
    or images beside them.
    """
    size, count, stride = matrix.shape[1], len(rows), inputs.size
    for block in prange((count + LANES - 1) // LANES):
        first = block * LANES
        here = min(LANES, count - first)
        bytes_, values = aligned(size, 1), aligned(size, 4).view(np.float32)
        offsets = np.empty(LANES, np.int64)
        sums = aligned(GROUP, 4).view(np.float32)
        for w in range(LANES):
            offsets[w] = rows[first + min(w, here - 1)] * size
        for start in range(0, size, LANES):
            n0 = min(start, size - LANES)
            transpose(matrix.ctypes.data + n0, offsets.ctypes.data, bytes_.ctypes.data + LANES * n0)
        for n in range(size):
            for w in range(LANES):
                values[n, w] = np.float32(bytes_[n, w]) - centre[n]
        for t in range(len(counts)):
            skip = 4 * t * inputs.shape[1]
            for b in range(0, len(linear), GROUP):
                sums[:] = 0
                add_products(
                    sums.ctypes.data,
                    values.ctypes.data,
                    inputs.ctypes.data + skip,
                    squares.ctypes.data + skip,
                    linear.ctypes.data + 4 * b * stride + skip,
                    stride,
                    counts[t],
                )
                for k in range(min(GROUP, len(out) - b)):
                    for w in range(here):
                        out[b + k, t, first + w] = sums[k, w]


def _scores_of(matrix, centre, rows, counts, inputs, sizes, blocks, linear, squares, out):
    """Scores of rows of their own for each image and tile, `out[g, i]` for the first `counts[g]` of `rows[g]` `(G, K)`;
    the rest as in `_local_scores`. `blocks` `(T, n)`: the places of a row at which blocks of 64 bytes begin that hold
    the inputs of a tile, padded with -1."""
    size, tiles, per = matrix.shape[1], len(sizes), (rows.shape[1] + LANES - 1) // LANES
    for job in prange(len(rows) * per):
        g, first = job // per, job % per * LANES
        here = min(LANES, counts[g] - first)
        if here <= 0:
            continue
        t = g % tiles
        bytes_, sums = aligned(size, 1), np.zeros(LANES, np.float32)
        offsets = np.empty(LANES, np.int64)
        for w in range(LANES):
            offsets[w] = rows[g, first + min(w, here - 1)] * size
        for n0 in blocks[t]:
            if n0 >= 0:
                transpose(matrix.ctypes.data + n0, offsets.ctypes.data, bytes_.ctypes.data + LANES * n0)
        for j in range(sizes[t]):
            n = inputs[t, j]
            row, middle, slope, curve = bytes_[n], centre[n], linear[g // tiles, t, j], squares[t, j]
            for w in range(LANES):
                v = np.float32(row[w]) - middle
                sums[w] += v * (slope + curve * v)
        for w in range(here):
            out[g, first + w] = sums[w]


local_scores = compiled(_local_scores, parallel=True)
scores_of = compiled(_scores_of, parallel=True)


@compiled
def run_sums(values, tile, start, ends):
    """Sums of values `(B, U)` over the runs of each column, `(B, P)` float64."""
    size, columns = values.shape[1], start.shape[1] - 1
    out = np.zeros((len(values), columns))
    prefix = np.zeros(tile + 1)
    for b in range(len(values)):
        for t in range(len(start)):
            for n in range(min(tile, size - t * tile)):
                prefix[n + 1] = prefix[n] + values[b, t * tile + n]
            for m in range(columns):
                total = 0.0
                for j in range(start[t, m], start[t, m + 1], 2):
                    total += prefix[ends[j + 1]] - prefix[ends[j]]
                out[b, m] += total
    return out


@cache
def masked_softmax_kernel(whole: bool) -> Any:
    """Partial softmaxes of chunks of rows, with sums as whole numbers (int32) or as float64.

    `kernel(pixels, centre, q, s, rows, log_q, chunks, blocks, inputs, outputs, tile, start, ends, units)` gives peaks,
    totals, squares and means, `(chunks, P)` float64 each, of the logits `log_q - sum over runs of d / 2` where
    `d = s v (s v - 2 q)`, `v = pixels - centre`. `chunks` `(n, 3)` are an image (of q, s and units) and the begin and
    end of its rows. Only the pixels `inputs` `(U,)` are summed, which lie in the 64 bytes from each of `blocks`, and
    only `outputs` `(P,)` are averaged. `start` `(tiles, P + 1)` says where the runs of each column begin in `ends`,
    which count from the beginning of the tile.
    """
    kept, rounding = (np.int32, True) if whole else (np.float64, False)
    width = np.dtype(kept).itemsize
    unused = kept(0)

    def kernel(pixels, centre, q, s, rows, log_q, chunks, blocks, inputs, outputs, tile, start, ends, units):
        size, count, columns = q.shape[1], len(inputs), len(outputs)
        peaks = np.full((len(chunks), columns), -np.inf)
        totals, squares = np.zeros((len(chunks), columns)), np.zeros((len(chunks), columns))
        means = np.zeros((len(chunks), columns))
        for c in prange(len(chunks)):
            image, last = chunks[c, 0], chunks[c, 2]
            scale, unit = s[image], units[image]
            curve = scale * scale * unit
            bytes_ = aligned(size, 1)
            prefix = aligned(tile + 1, width).view(kept)
            sums = aligned(columns, width).view(kept)
            offsets = np.empty(LANES, np.int64)
            logits, powers = np.empty(LANES, np.float32), np.empty(LANES, np.float32)
            exponents, added = np.empty(LANES, np.int32), np.zeros(LANES)
            running = np.zeros(LANES, kept)
            scales = exponents.view(np.float32)
            for first in range(chunks[c, 1], last, LANES):
                here = min(LANES, last - first)
                most = -np.inf
                for w in range(LANES):
                    place = first + min(w, here - 1)
                    offsets[w], added[w] = rows[place] * size, log_q[place]
                    most = max(most, added[w])
                for n0 in blocks:
                    transpose(pixels.ctypes.data + n0, offsets.ctypes.data, bytes_.ctypes.data + LANES * n0)
                sums[:] = 0
                prefix[0] = 0
                for t in range(len(start)):
                    begin = t * tile
                    running[:] = 0
                    for j in range(min(tile, count - begin)):
                        n = np.uint64(inputs[begin + j])
                        slope, middle = -2 * q[image, n] * scale * unit, centre[n]
                        row, upto = bytes_[n], prefix[np.uint64(j + 1)]
                        for w in range(LANES):
                            x = np.float32(row[w]) - middle
                            d = x * (x * curve + slope)
                            if rounding:
                                running[w] += np.int32(np.rint(d))
                            else:
                                running[w] += d
                            upto[w] = running[w]
                    for i in range(columns):
                        add_runs(
                            sums.ctypes.data + i * LANES * width,
                            prefix.ctypes.data,
                            ends.ctypes.data,
                            start[t, i],
                            start[t, i + 1],
                            unused,
                        )
                for m in range(columns):
                    best = sums[m, 0]
                    for w in range(LANES):
                        best = min(best, sums[m, w])
                    peak = most - 0.5 * np.float64(best) / unit  # or a little less
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
                        logits[w] = np.float32((added[w] - 0.5 / unit * sums[m, w] - top) * 1.4426950408889634)
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
                    pixel = outputs[m]
                    middle = centre[pixel]
                    total, square, mean = np.float32(0), np.float32(0), np.float32(0)
                    for w in range(LANES):
                        e = powers[w] * scales[w]
                        total += e
                        square += e * e
                        mean += e * (np.float32(bytes_[pixel, w]) - middle)
                    totals[c, m] += total
                    squares[c, m] += square
                    means[c, m] += mean
        return peaks, totals, squares, means

    return compiled(kernel, parallel=True)
