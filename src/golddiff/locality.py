"""Locality: which input pixels vote on each output pixel."""

from __future__ import annotations

import abc
import hashlib
import math
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from .bank import Bank
from .errors import GolddiffError, unknown
from .jsons import read_json, unsealed
from .noise import EDM, Noise

__all__ = [
    "MASK_RULES",
    "GivenMask",
    "Locality",
    "MaskRuns",
    "Masked",
    "PCAMask",
    "Recent",
    "WholeImage",
    "Window",
    "Windows",
]

MASK_RULES = ("output", "correlation", "published")
BYTES_IN_MEMORY = 2**28
LARGEST_SIDE = 2**31  # of a window; larger whole numbers are no sides
LARGEST_TABLE = 2**20  # bytes of a calibration
LARGEST_MASK = 2**28  # entries of a window's mask
WORTH_KEEPING = 4096  # pixels from which runs of a mask are kept with the bank
CALIBRATION = ("windows", "method", "bank", "seeds", "times", "sides", "cosine", "checksum")  # keys of its file
TILE = 1024  # pixels of one prefix sum, see kernels.py
Sums = Callable[..., Tensor]
LEVEL = 1e-6  # what is so little under a threshold, as ties are, is on it, whatever the rounding
PUBLISHED_WINDOWS = list(zip(EDM().times(18), [32] * 7 + [23, 15, 11, 7, 5] + [3] * 6, strict=True))
"""PSPC's crops of 32 x 32 pictures at the 18 levels of EDM."""


class Recent:
    """What was computed recently, up to a number of bytes."""

    def __init__(self) -> None:
        self._kept: OrderedDict[Any, tuple[Any, int]] = OrderedDict()

    def get(self, key: Any, compute: Callable[[], tuple[Any, int]]) -> Any:
        """The value of a key; `compute()` gives it and its size if it is not there."""
        self._kept[key] = kept = self._kept.pop(key, None) or compute()
        while len(self._kept) > 1 and sum(size for _, size in self._kept.values()) > BYTES_IN_MEMORY:
            self._kept.popitem(last=False)
        return kept[0]


class Locality(abc.ABC):
    """What is compared when a row is weighed. A *local* one has logits for each output pixel of its own."""

    local: bool


class WholeImage(Locality):
    """All pixels vote on every pixel: one weight for each row."""

    local = False


@dataclass(frozen=True, eq=False)
class MaskRuns:
    """Columns of a mask as runs of neighbours among the pixels that they see, tile by tile of `TILE` pixels.

    Arguments:
        inputs: pixels that some column sees, ascending `(U,)`. outputs: pixels of the columns, `(P,)`.
        blocks: the pixels at which blocks of 64 begin that hold all inputs and outputs.
        start: `(tiles, P + 1)` int64: where the entries of each column begin in `ends`.
        ends: begin and end of each run, one after the other, among the inputs of the tile; int16.
        largest: most pixels in a column.
    """

    inputs: np.ndarray
    outputs: np.ndarray
    blocks: np.ndarray
    start: np.ndarray
    ends: np.ndarray
    largest: int

    @staticmethod
    def of(mask: Tensor, outputs: Tensor | None = None) -> MaskRuns:
        """The runs of a boolean mask M[n, m], `(D, D)`, or of some of its columns; needs numba."""
        from . import kernels

        kernels.use_threads_of_torch()
        chosen = mask if outputs is None else mask[:, outputs]
        inputs = torch.arange(len(mask)) if outputs is None else chosen.any(1).nonzero()[:, 0]
        outputs = torch.arange(len(mask)) if outputs is None else outputs
        columns = chosen[inputs].T.contiguous().numpy()
        counts = kernels.count_runs(columns, TILE)
        start = np.zeros((len(counts), len(columns) + 1), np.int64)
        done = 0
        for row, count in zip(start, counts, strict=True):
            row[0] = done
            np.cumsum(count, out=row[1:])
            row[1:] += done
            done = row[-1]
        ends = np.empty(done, np.int16)
        kernels.fill_runs(columns, TILE, start, ends)
        last = max(0, len(mask) - kernels.LANES)
        begins = torch.cat([inputs, outputs]).unique() // kernels.LANES * kernels.LANES
        blocks = begins.clamp(max=last).unique().numpy()
        return MaskRuns(inputs.numpy(), outputs.numpy(), blocks, start, ends, int(chosen.sum(0).max()))

    @staticmethod
    def packed(parts: list[MaskRuns]) -> dict[str, Tensor]:
        """Several as tensors, to be kept with a bank."""
        arrays = {
            f"{i} {name}": np.asarray(value) for i, part in enumerate(parts) for name, value in vars(part).items()
        }
        return {name: torch.from_numpy(array) for name, array in arrays.items()}

    @staticmethod
    def unpacked(tensors: dict[str, Tensor]) -> list[MaskRuns]:
        """What `packed` has packed."""
        names = ("inputs", "outputs", "blocks", "start", "ends")
        parts = []
        for i in range(len(tensors) // (len(names) + 1)):
            inputs, outputs, blocks, start, ends = (tensors[f"{i} {name}"].numpy() for name in names)
            parts.append(MaskRuns(inputs, outputs, blocks, start, ends, int(tensors[f"{i} largest"])))
        return parts

    def within(self, size: int) -> bool:
        """Whether all of its numbers lead to places of rows of so many pixels, and of its own arrays."""
        pixels = [(self.inputs, size), (self.outputs, size), (self.blocks, max(0, size - 64) + 1)]
        shape = (-(-len(self.inputs) // TILE), len(self.outputs) + 1)
        if self.start.shape != shape or self.start.dtype != np.int64 or self.ends.dtype != np.int16:
            return False
        if any(part.dtype != np.int64 or part.ndim != 1 for part, _ in pixels) or self.ends.ndim != 1:
            return False
        flat = self.start.ravel()
        bounds = [*pixels, (self.ends, min(TILE, len(self.inputs)) + 1), (flat, len(self.ends) + 1)]
        inside = all(part.size == 0 or (part.min() >= 0 and part.max() < bound) for part, bound in bounds)
        return inside and bool((np.diff(flat) >= 0).all()) and not (flat % 2).any()

    @property
    def nbytes(self) -> int:
        return self.start.nbytes + self.ends.nbytes + self.inputs.nbytes


class Masked(Locality):
    r"""A mask decides which pixels n vote on the output pixel m:

    .. math:: l_i[m] = -\frac{1}{2 \sigma^2} \sum_n M[n, m] (x_t[n] - \alpha x_i[n])^2
    """

    local = True

    def __init__(self) -> None:
        self._recent_runs = Recent()

    @abc.abstractmethod
    def mask(self, noise: Noise, label: int | None = None) -> Tensor:
        """`M[n, m]` at one noise level, `(D, D)` bool (or float weights); the sum runs over n."""

    def sums(self, noise: Noise, label: int | None, like: Tensor) -> Sums:
        """A function from squares `(n, D)` to their masked sums `(n, D)`, or `(n, pixels)` of some pixels.

        Arguments:
            like: has the type and device of the squares.
        """

        mask = self.mask(noise, label).to(like.device).to(like.dtype)
        return lambda squares, pixels=None: squares @ (mask if pixels is None else mask[:, pixels])

    def columns(self, noise: Noise, label: int | None, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """The pixels n that vote on some output pixels m `(P,)`, ascending `(U,)`, and their `M[n, m]`, `(U, P)`."""
        return _without_empty_rows(self._columns(noise, label, pixels.cpu()))

    def _columns(self, noise: Noise, label: int | None, pixels: Tensor) -> Tensor:
        """`M[:, pixels]`, `(D, P)`."""
        return self.mask(noise, label)[:, pixels]

    def runs(self, noise: Noise, label: int | None = None, tiles: Tensor | None = None) -> list[MaskRuns] | None:
        """The mask as runs, one set for each tile `(D,)` of output pixels, kept for recent noise levels; None for
        weights. Needs numba."""

        count = 0 if tiles is None else int(tiles.max()) + 1

        def compute() -> tuple[list[MaskRuns] | None, int]:
            runs = self._runs(noise, label, tiles, count)
            return runs, 0 if runs is None else sum(part.nbytes for part in runs)

        return self._recent_runs.get((int(noise.angle), self.statistics_of(label), count), compute)

    def _runs(self, noise: Noise, label: int | None, tiles: Tensor | None, count: int) -> list[MaskRuns] | None:
        mask = self.mask(noise, label)
        if mask.dtype != torch.bool:
            return None
        members = [None] if tiles is None else [(tiles == t).nonzero()[:, 0] for t in range(count)]
        return [MaskRuns.of(mask, outputs) for outputs in members]

    def statistics_of(self, label: int | None) -> int | None:
        """The class whose statistics make the mask, if any."""
        return None

    def name(self, noise: Noise, label: int | None = None) -> str | None:
        """What the mask at one noise level is called among what is kept with a bank; None for masks not to be kept."""
        return None


class Windows:
    """The side of a square window at each noise level: that of the nearest level of a table (by angle).

    Arguments:
        sides: None for the table of PSPC, scaled to the image; one side for all levels; a table of pairs
            `[sigma / alpha, side]`; or the file of a calibration (JSON with such a table as `windows`).
        shape: `(C, H, W)` of the images.
        banks: fingerprints, of which a calibration must have one; empty for any.

    Raises:
        GolddiffError: a table that is none, or a side that is no whole number of at least 1.
    """

    def __init__(self, sides: Any, shape: tuple[int, int, int], banks: Sequence[str] = ()) -> None:
        if sides is None:
            largest = max(shape[1:])
            scaled = [[rho, _odd(side * largest / 32)] for rho, side in PUBLISHED_WINDOWS if side < 32]
            sides = [[rho, 2 * largest - 1] for rho, side in PUBLISHED_WINDOWS if side >= 32] + scaled
        elif isinstance(sides, str | Path):
            sides = _read_windows(Path(sides), banks)
        elif type(sides) is int:
            sides = [[1.0, sides]]
        wrong = GolddiffError(f"window is {sides!r}: give an odd side, a table of [sigma / alpha, side], or a file")
        if not isinstance(sides, list | tuple) or not sides:
            raise wrong
        for pair in sides:
            if not isinstance(pair, list | tuple) or len(pair) != 2:
                raise wrong
            rho, side = pair
            number = (isinstance(rho, float) or (type(rho) is int and rho < LARGEST_SIDE)) and rho >= 0
            if not number or type(side) is not int or not 1 <= side < LARGEST_SIDE or side % 2 == 0:
                raise wrong
        self.table: list[list[float]] = sorted([float(rho), side] for rho, side in sides)
        self._angles = [math.atan(rho) for rho, _ in self.table]

    def __call__(self, noise: Noise) -> int:
        """The side at one noise level."""
        angle = math.atan2(float(noise.sigma), float(noise.alpha))
        nearest = min(range(len(self.table)), key=lambda i: abs(self._angles[i] - angle))
        return int(self.table[nearest][1])


def _odd(side: float) -> int:
    return max(3, 2 * round((side - 1) / 2) + 1)


def _read_windows(path: Path, banks: Sequence[str]) -> Any:
    """The table of a calibration file, which must be of one of these banks if it names one."""
    fix = "make a calibration with golddiff calibrate"
    found = read_json(path, fix, LARGEST_TABLE)
    if not isinstance(found, dict) or "windows" not in found:
        raise GolddiffError(f"{path} has no windows: {fix}")
    for key in found:
        if key not in CALIBRATION:
            raise unknown(f"key in {path}", key, CALIBRATION)
    found = unsealed(found, path)
    if banks and found.get("bank", banks[0]) not in banks:
        raise GolddiffError(
            f"{path} was made with another bank: {fix}, or take its bank and its checksum out to use it all the same"
        )
    return found["windows"]


class Window(Masked):
    """A square window around each pixel, over all channels: LS of Kamb and Ganguli.

    From "An Analytic Theory of Creativity in Convolutional Diffusion Models". Pixels outside the image do not count.

    Arguments:
        shape: `(C, H, W)` of the images.
        windows: the side at each noise level.
    """

    def __init__(self, shape: tuple[int, int, int], windows: Windows) -> None:
        super().__init__()
        self.shape, self.windows = shape, windows

    def mask(self, noise: Noise, label: int | None = None) -> Tensor:
        channels, height, width = self.shape
        half = self.windows(noise) // 2
        near = [(torch.arange(n)[:, None] - torch.arange(n)).abs() <= half for n in (height, width)]
        plane = (near[0][:, None, :, None] & near[1][None, :, None, :]).reshape(height * width, -1)
        return plane.repeat(channels, channels)

    def _columns(self, noise: Noise, label: int | None, pixels: Tensor) -> Tensor:
        channels, height, width = self.shape
        half, place = self.windows(noise) // 2, pixels % (height * width)
        rows = (torch.arange(height)[:, None] - place // width).abs() <= half
        columns = (torch.arange(width)[:, None] - place % width).abs() <= half
        return (rows[:, None] & columns).flatten(0, 1).repeat(channels, 1)

    def name(self, noise: Noise, label: int | None = None) -> str:
        return _short_hash(f"window {self.windows(noise)} {int(noise.angle)}")

    def runs(self, noise: Noise, label: int | None = None, tiles: Tensor | None = None) -> list[MaskRuns] | None:
        # box sums need no mask, so for large images none is made
        return super().runs(noise, label, tiles) if math.prod(self.shape) ** 2 <= LARGEST_MASK else None

    def sums(self, noise: Noise, label: int | None, like: Tensor) -> Sums:
        channels, height, width = self.shape
        side = min(self.windows(noise), 2 * max(height, width) - 1)

        def box(squares: Tensor, pixels: Tensor | None = None) -> Tensor:
            plane = squares.unflatten(1, self.shape).sum(1, keepdim=True)
            # the kernel is cut where it reaches beyond any image
            rows, columns = min(side, 2 * height - 1), min(side, 2 * width - 1)
            padded = functional.pad(plane, (columns // 2, columns // 2, rows // 2, rows // 2))
            sums = functional.avg_pool2d(padded, (rows, columns), stride=1, divisor_override=1)
            flat = sums.repeat(1, channels, 1, 1).flatten(1)
            return flat if pixels is None else flat[:, pixels]

        return box


class GivenMask(Masked):
    """A mask given by the user.

    Arguments:
        mask: `(D, D)` boolean (or float weights) M[n, m], or a callable of `Noise` that returns one.
        size: `D`, how many numbers an image has.
    """

    def __init__(self, mask: Any, size: int) -> None:
        super().__init__()
        self._mask: Callable[[Noise], Any] = mask if callable(mask) else lambda noise: mask
        self._size = size
        if isinstance(mask, str | int | float):
            raise GolddiffError(f"mask is {mask!r}: give a ({size}, {size}) boolean array, or a callable of Noise")
        if not callable(mask):
            self.mask(Noise(1.0, 1.0))

    def mask(self, noise: Noise, label: int | None = None) -> Tensor:
        mask = torch.as_tensor(self._mask(noise))
        if mask.shape != (self._size, self._size):
            raise GolddiffError(
                f"mask of shape {tuple(mask.shape)}: give ({self._size}, {self._size}), M[n, m] summed over n"
            )
        if mask.is_complex() or not bool(torch.isfinite(mask).all()):
            raise GolddiffError("mask has NaN, infinite or complex entries: give booleans, or finite weights")
        if mask.dtype != torch.bool and not mask.is_floating_point():
            mask = mask.bool()
        return mask


class PCAMask(Masked):
    r"""The mask of PCA-locality ("Locality in Image Diffusion Models Emerges from Data Statistics").

    With the eigenbasis of the bank's covariance in float64,

    .. math:: W = U \,\mathrm{diag}\left(\frac{\alpha^2 \lambda}{\alpha^2 \lambda + \sigma^2}\right) U^T

    `output` (default): `M[n, m] = |W[n, m]| >= threshold * W[m, m]`, relative to the output pixel.
    `correlation`: `M[n, m] = |W[n, m]| >= threshold * sqrt(W[n, n] W[m, m])`.
    In both, ties count, every pixel sees itself; constant pixels see only themselves and no other pixel sees them.

    `published`: with `R[n, m] = W[n, m] / W[n, n]` (`R[n, n] = 1` where `|W[n, n]| < 1e-6`),
    `M[n, m] = |R[n, m]| >= threshold * max |R|`. The maximum is set by pixels of almost no variance, so
    columns can be empty (their output is the plain mean of the subset). A threshold of 0 keeps R itself.

    Masks are computed once for a bank and noise level, and kept with the bank.

    Arguments:
        threshold: at least 0; the default by comparison (docs/accuracy.md); the paper has 0.02 to 0.04, published.
        rule: `output`, `correlation` or `published`.
        statistics: `bank`, or `class` for the statistics of the label's rows.
    """

    def __init__(self, bank: Bank, threshold: float = 0.05, rule: str = "output", statistics: str = "bank") -> None:
        if rule not in MASK_RULES:
            raise unknown("mask_rule", rule, MASK_RULES)
        if not isinstance(threshold, int | float) or isinstance(threshold, bool) or not 0 <= threshold <= 1:
            raise GolddiffError(f"threshold is {threshold!r}: give a number from 0 to 1")
        super().__init__()
        self.bank, self.threshold, self.rule, self.statistics = bank, threshold, rule, statistics
        self._recent = Recent()

    def statistics_of(self, label: int | None) -> int | None:
        return label if self.statistics == "class" else None

    def name(self, noise: Noise, label: int | None = None) -> str:
        return _short_hash(f"{self.rule} {self.threshold!r} {self.statistics_of(label)} {int(noise.angle)}")

    def mask(self, noise: Noise, label: int | None = None) -> Tensor:
        kept = self._packed(noise, label)
        return kept if kept.is_floating_point() else _unpack(kept, self.bank.D)

    def _columns(self, noise: Noise, label: int | None, pixels: Tensor) -> Tensor:
        kept = self._packed(noise, label)
        if kept.is_floating_point():
            return kept[:, pixels]
        return (kept[:, pixels // 8] >> (7 - pixels % 8).to(torch.uint8) & 1).bool()

    def _packed(self, noise: Noise, label: int | None) -> Tensor:
        """The mask, its columns in bits `(D, D / 8)`; or ratios, `(D, D)` float."""
        name = f"mask-{self.name(noise, label)}"

        def compute() -> tuple[Tensor, int]:
            mask = self._compute(name, noise, self.statistics_of(label))
            return mask, mask.nbytes

        return self._recent.get(name, compute)

    def _runs(self, noise: Noise, label: int | None, tiles: Tensor | None, count: int) -> list[MaskRuns] | None:
        if self.bank.D < WORTH_KEEPING or (self.rule == "published" and self.threshold == 0):
            return super()._runs(noise, label, tiles, count)

        def compute() -> dict[str, Tensor]:
            return MaskRuns.packed(super(PCAMask, self)._runs(noise, label, tiles, count) or [])

        def fits(tensors: dict[str, Tensor]) -> bool:
            return all(part.within(self.bank.D) for part in MaskRuns.unpacked(tensors))

        name = f"runs-{count}-{self.name(noise, label)}"
        return MaskRuns.unpacked(self.bank.keep(name, compute, remember=False, fits=fits))

    def _compute(self, name: str, noise: Noise, label: int | None) -> Tensor:
        """The mask, bit-packed and kept with the bank; or the ratios themselves, float."""
        compute = self._published if self.rule == "published" else self._stable
        if self.rule == "published" and self.threshold == 0:
            return compute(noise, label)
        return self.bank.keep(name, lambda: {"bits": _pack(compute(noise, label))}, remember=False)["bits"]

    def _stable(self, noise: Noise, label: int | None) -> Tensor:
        statistics = self.bank.spectrum(label)
        # W without alpha^2, a common factor that these rules do not see: so alpha = 0 has its limit, C itself
        own, columns = statistics.filter(float(noise.alpha), float(noise.sigma))
        varying, least = statistics.varying, self.threshold * (1 - LEVEL)
        mask = torch.empty(self.bank.D, self.bank.D, dtype=torch.bool)
        for part, w in columns():
            scale = own[part] if self.rule == "output" else own.sqrt()[:, None] * own[part].sqrt()
            mask[:, part] = (w.abs_() >= least * scale) & varying[:, None] & varying[part]
        return mask.fill_diagonal_(True)

    def _published(self, noise: Noise, label: int | None) -> Tensor:
        own, columns = self.bank.spectrum(label).filter(float(noise.alpha), float(noise.sigma))
        power = float(noise.alpha) ** 2
        own = torch.where(power * own.abs() < 1e-6, 1.0, power * own)

        def ratios() -> Iterator[tuple[slice, Tensor]]:
            for part, w in columns():
                w.mul_(power)[part].diagonal().copy_(own[part])
                yield part, w.div_(own[:, None])

        if self.threshold == 0:
            return torch.cat([ratio for _, ratio in ratios()], dim=1)
        largest = max(float(ratio.abs().max()) for _, ratio in ratios())
        mask = torch.empty(self.bank.D, self.bank.D, dtype=torch.bool)
        for part, ratio in ratios():
            mask[:, part] = ratio.abs_() >= self.threshold * largest
        return mask


def _without_empty_rows(columns: Tensor) -> tuple[Tensor, Tensor]:
    seen = (columns != 0).any(1).nonzero()[:, 0]
    return seen, columns[seen]


def _short_hash(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def _pack(mask: Tensor) -> Tensor:
    return torch.from_numpy(np.packbits(mask.numpy(), axis=1))


def _unpack(bits: Tensor, size: int) -> Tensor:
    return torch.from_numpy(np.unpackbits(bits.numpy(), axis=1, count=size)).bool()
