"""Scores: what a cheap view of a row says of its logit at a tile of output pixels.

A score is the masked distance of the tile as a whole, in block averages of the image, or pixel by pixel where the noise
is so low that averages would hide what matters.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .bank import Bank
from .golden import PADDING
from .locality import Masked, Recent
from .noise import Noise
from .spectrum import COLUMNS

__all__ = ["Level", "Scores"]

TILINGS = ((0.8, 1, 2.5), (0.65, 1, 1.0), (0.35, 4, 1.0), (0.0, 8, 1.4))
"""From such an overlap of the masks of all pixels on: tiles along a side, and rows in units of `variance / tol^2`. More
at high noise, where they cost little and decide which image comes out; and at low noise, where scores say less."""
LOST = 100.0  # of a logit, from which averages hide too much
LARGEST = 1e25  # product of a query and a row in a score, in units of 255
LEAST = 1e-30  # step that stands for 0
BLOCK = 2**14
BYTES = 64  # of a row that compiled loops read together
IMAGES = 4  # that the compiled loop scores together
NOTHING = -1e30  # the score of padding


@dataclass(frozen=True, eq=False)
class Level:
    """What is compared at a noise level, for T tiles of output pixels.

    Arguments:
        name: of the mask among what is kept with the bank, if it has one.
        tiles: the tile of each pixel, `(D,)`; None where T = 1.
        factor: for the number of rows.
        fine: rows are compared pixel by pixel, else by their coarse view.
        inputs: entries of a row that count for each tile, `(T, U)` int32; the first `counts` `(T,)` of them.
        weights: how much each counts, `(T, U)` float64, 0 beyond `counts`.
    """

    name: str | None
    tiles: Tensor | None
    factor: float
    fine: bool
    inputs: Tensor
    counts: Tensor
    weights: Tensor


class Scores:
    """Scores of the rows of a bank at any noise level; what they need is kept."""

    def __init__(self, bank: Bank) -> None:
        self.bank = bank
        self._levels = Recent()
        self._coarse: tuple[Tensor, float] | None = None

    def level(self, noise: Noise, locality: Masked, label: int | None) -> Level:
        name, device = locality.name(noise, label), self.bank.device

        def tensors() -> dict[str, Tensor]:
            return self._computed_level(noise, locality.mask(noise, label).cpu())

        def compute() -> tuple[Level, int]:
            kept = (
                tensors() if name is None else self.bank.keep(f"level-{name}", tensors, remember=False, fits=self._fits)
            )
            along, factor = TILINGS[int(kept["tiling"])][1:]
            level = Level(
                name=name,
                tiles=None if along == 1 else _tiles(self.bank.shape, along).to(device),
                factor=factor,
                fine=bool(kept["fine"]),
                inputs=kept["inputs"].to(device),
                counts=kept["counts"].to(device),
                weights=kept["weights"].to(device),
            )
            return level, level.inputs.nbytes + level.weights.nbytes

        return self._levels.get((int(noise.angle), locality.statistics_of(label)), compute)

    def _fits(self, kept: dict[str, Tensor]) -> bool:
        """Whether what is kept of a level leads to places of rows that there are."""
        inputs, counts, weights = kept["inputs"], kept["counts"], kept["weights"]
        tiles = int(_tiles(self.bank.shape, TILINGS[range(len(TILINGS))[int(kept["tiling"])]][1]).max()) + 1
        places = self.bank.D if bool(kept["fine"]) else self.bank.proxy.shape[1]
        same = inputs.shape == weights.shape and counts.shape == (tiles,) and len(inputs) == tiles
        whole = (inputs.dtype, counts.dtype) == (torch.int32, torch.int64) and weights.is_floating_point()
        return (
            same
            and whole
            and bool(
                inputs.min() >= 0 and inputs.max() < places and counts.min() >= 0 and counts.max() <= inputs.shape[1]
            )
        )

    def _computed_level(self, noise: Noise, mask: Tensor) -> dict[str, Tensor]:
        overlap = _overlap(mask)
        tiling = next(i for i, (least, _, _) in enumerate(TILINGS) if overlap >= least)
        numbers = _tiles(self.bank.shape, TILINGS[tiling][1])
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
        return {
            "tiling": torch.tensor(tiling),
            "fine": torch.tensor(fine),
            "inputs": order.to(torch.int32),
            "counts": counts,
            "weights": weights.gather(1, order),
        }

    def _pooled_variance(self) -> float:
        """The variance of all blocks together, in the units of pixels in [-1, 1]."""
        kept = self.bank.keep("proxy-variance", lambda: {"variance": _variance(self.bank.proxy)})
        return float(kept["variance"]) * self.bank.scale**2

    def view(self, fine: bool) -> tuple[Tensor, Tensor, float]:
        """Rows as bytes `(N, M)` (or floats), what is subtracted from them `(M,)`, and the unit of what is left."""
        if fine:
            return self.bank.pixels.flatten(1), self.bank.centre, 1.0
        if self._coarse is None:
            kept = self.bank.keep(
                "coarse",
                lambda: _as_bytes(self.bank.proxy),
                remember=False,
                fits=lambda kept: kept["bytes"].shape == self.bank.proxy.shape and kept["bytes"].dtype == torch.uint8,
            )
            self._coarse = kept["bytes"].to(self.bank.device), float(kept["unit"])
        rows, unit = self._coarse
        return rows, torch.full(rows.shape[1:], 128.0, device=rows.device), unit

    def query(self, q: Tensor, s: Tensor, level: Level) -> tuple[Tensor, Tensor]:
        """What the tiles see of an image in the units of the view of rows, `(B, T, U)` float64, and the step `()` from
        those to logits; for q `(B, D)` and s `()` float64."""
        step = (s * self.view(level.fine)[2]).clamp(min=LEAST)
        whole = q if level.fine else self.bank.pooling(q)
        return whole[:, level.inputs.long()] / step, step

    def reader(self, level: Level) -> Callable[[Tensor], Tensor]:
        """`read(rows)` gives the view of some rows, `(n, M)` float32 on the CPU."""
        matrix, centre, _ = self.view(level.fine)
        return lambda rows: (matrix[rows.to(matrix.device)].float() - centre).cpu()

    def _factors(self, q: Tensor, s: Tensor, level: Level) -> tuple[Tensor, Tensor]:
        """`a` `(B, T, U)` and `c` `(T, U)` float32 of the scores `sum of v (a + c v)`."""
        seen, step = self.query(q, s, level)
        # beyond the range of float32 only the order of the rows matters
        reach = 1.0 if self.bank.is_uint8 or not level.fine else float(self.bank.norms.max().sqrt()) / 255
        shrink = 1 / (step**2 * (seen.abs().max().clamp(min=1) * max(reach, 1.0))).div(LARGEST).clamp(min=1)
        return (level.weights * seen * (step**2 * shrink)).float(), (level.weights * -(step**2 * shrink) / 2).float()

    def shared(self, q: Tensor, s: Tensor, level: Level, rows: Tensor) -> Tensor:
        """Logits of rows `(n,)` up to a constant, `(B, T, n)` float32; q `(B, D)` and s `()` float64."""
        matrix, centre, _ = self.view(level.fine)
        linear, squares = self._factors(q, s, level)
        self.bank.bytes_read += len(rows) * matrix.shape[1] * matrix.element_size()
        if self._compiled(matrix):
            from . import kernels

            kernels.use_threads_of_torch()
            out = np.empty((*linear.shape[:2], len(rows)), np.float32)
            padded = torch.nn.functional.pad(linear, (0, 0, 0, 0, 0, -len(linear) % IMAGES)).contiguous()
            numbers = (padded.numpy(), squares.contiguous().numpy())
            kernels.local_scores(matrix.numpy(), centre.numpy(), rows.numpy(), *_inputs(level), *numbers, out)
            return torch.from_numpy(out)
        scores = torch.empty(len(q), len(level.counts), len(rows), device=q.device)
        for start in range(0, len(rows), BLOCK):
            v = matrix[rows[start : start + BLOCK]].double() - centre
            for t, here in enumerate(level.inputs.long()):
                part = v[:, here]
                own = part.square() @ squares[t].double()
                scores[:, t, start : start + BLOCK] = (linear[:, t].double() @ part.T + own).float()
        return scores

    def own(self, q: Tensor, s: Tensor, level: Level, rows: Tensor) -> Tensor:
        """The same for rows of their own for each image and tile, `(B T, K)`, padded with -1."""
        matrix, centre, _ = self.view(level.fine)
        linear, squares = self._factors(q, s, level)
        counts = (rows != PADDING).sum(1)
        self.bank.bytes_read += int((counts.view(len(q), -1).sum(0) * level.counts).sum()) * matrix.element_size()
        if self._compiled(matrix):
            from . import kernels

            kernels.use_threads_of_torch()
            out = np.full(rows.shape, NOTHING, np.float32)
            numbers = (linear.contiguous().numpy(), squares.contiguous().numpy())
            blocks = _blocks_of_bytes(level, matrix.shape[1]).numpy()
            kernels.scores_of(
                matrix.numpy(), centre.numpy(), rows.numpy(), counts.numpy(), *_inputs(level), blocks, *numbers, out
            )
            return torch.from_numpy(out)
        scores = torch.full(rows.shape, NOTHING, device=q.device)
        tiles = len(level.counts)
        for g, count in enumerate(counts.tolist()):
            b, t = divmod(g, tiles)
            v = (matrix[rows[g, :count]].double() - centre)[:, level.inputs[t].long()]
            scores[g, :count] = (v @ linear[b, t].double() + v.square() @ squares[t].double()).float()
        return scores

    def _compiled(self, matrix: Tensor) -> bool:
        return self.bank.compiled and matrix.dtype == torch.uint8 and matrix.shape[1] >= BYTES


def _inputs(level: Level) -> tuple[np.ndarray, np.ndarray]:
    return level.inputs.contiguous().numpy(), level.counts.numpy()


def _blocks_of_bytes(level: Level, size: int) -> Tensor:
    """Where the blocks of a row begin that hold what each tile compares, `(T, n)`, padded with -1."""
    used = [row[:count].long() for row, count in zip(level.inputs, level.counts, strict=True)]
    begins = [(places // BYTES * BYTES).clamp(max=size - BYTES).unique() for places in used]
    return torch.nn.utils.rnn.pad_sequence(begins, batch_first=True, padding_value=-1)


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
