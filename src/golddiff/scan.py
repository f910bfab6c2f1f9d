"""The two products of a scan, rows with images and images with rows, in floats or in bytes."""

from __future__ import annotations

import abc

import torch
from torch import Tensor

from .bank import BLOCK_NUMBERS, Bank
from .errors import GolddiffError
from .golden import rounding, smallest
from .memory import DoesNotFit
from .noise import Noise

__all__ = ["Scan", "nearest_images", "scan_of"]

DIGITS = torch.tensor([1.0, 2.0**8, 2.0**16, 2.0**24], dtype=torch.float64)
MOST_PRODUCTS = 2**17 - 1  # of bytes, that add up in int32
UNTOUCHED = -(2**31)  # what no sum of so many products is
LOGITS_AT_ONCE = 2**26  # of images that are scanned together
FEWEST_ROWS, MOST_ROWS = 256, 2**15  # of a block


class Scan(abc.ABC):
    """`bank.query(x_t, noise)` of a batch against blocks of rows, and weighted sums of rows.

    Arguments:
        q: `(B, D)`. s: `(B,)`.

    Attributes:
        size: rows of a block.
    """

    size: int

    def __init__(self, bank: Bank, q: Tensor, s: Tensor) -> None:
        self.bank, self.s = bank, s
        self.lengths = q.double().norm(dim=1)
        self.half = (s.double() ** 2 / -2).to(q.dtype)

    @abc.abstractmethod
    def read(self, rows: Tensor | slice) -> Tensor:
        """The rows as products take them, `(n, D)`; overwritten by the next call."""

    @abc.abstractmethod
    def logits(self, block: Tensor, norms: Tensor, out: Tensor) -> Tensor:
        """`s q v - s^2 |v|^2 / 2`, `(n, B)`, into `out`; returns a bound of their rounding errors, `(B,)`."""

    @abc.abstractmethod
    def begin(self, images: int) -> None:
        """Begins weighted sums for so many images."""

    @abc.abstractmethod
    def add(self, block: Tensor, weights: Tensor) -> Tensor:
        """Adds rows by weights `(n, images)` from 0 to 1; returns the sums of the weights as they were taken,
        `(images,)` float64."""

    @abc.abstractmethod
    def weighted_sum(self, total: Tensor) -> Tensor:
        """The sum of `v` by weights, `(images, D)` float64; `total` are the sums of the weights."""


class _Floats(Scan):
    """Rows converted block by block, and products of floats."""

    def __init__(self, bank: Bank, q: Tensor, s: Tensor) -> None:
        super().__init__(bank, q, s)
        self.size = min(max(FEWEST_ROWS, BLOCK_NUMBERS // bank.D), MOST_ROWS, len(bank))
        self._query = (s.double()[:, None] * q).to(q.dtype)
        self._buffer = q.new_empty(self.size, bank.D)

    def read(self, rows: Tensor | slice) -> Tensor:
        return self.bank.centred(rows, self._buffer.dtype, self._buffer)

    def logits(self, block: Tensor, norms: Tensor, out: Tensor) -> Tensor:
        torch.mul(norms.to(out.dtype)[:, None], self.half, out=out).addmm_(block, self._query.T)
        return rounding(self.s, self.lengths, norms, out.dtype)

    def begin(self, images: int) -> None:
        self._sum = self._query.new_zeros(self.bank.D, images)

    def add(self, block: Tensor, weights: Tensor) -> Tensor:
        self._sum.addmm_(block.T, weights)
        return weights.sum(0).double()

    def weighted_sum(self, total: Tensor) -> Tensor:
        return self._sum.T.double()


class _Bytes(Scan):
    """Products of bytes, three times as fast as those of floats, and exact but for the digits of queries and weights.

    A pixel is a byte, `p = 128 + b` with b from -128 to 127. A query is brought to whole numbers of 24 bits and a
    weight to 31 bits, each written in digits from -128 to 127 to the base 256. So every product is one of signed bytes,
    whose sums are exact in int32. With `v = b - (centre - 128)` the rest is a constant for each image.
    """

    def __init__(self, bank: Bank, q: Tensor, s: Tensor) -> None:
        super().__init__(bank, q, s)
        self.size = min(max(FEWEST_ROWS, 2 * BLOCK_NUMBERS // bank.D), MOST_ROWS, len(bank))
        self._buffer = torch.empty(self.size, bank.D, dtype=torch.uint8)
        self._middle = bank.centre.double() - 128
        unit = q.double().abs().amax(1).clamp(min=1e-30) / (2**23 - 2**15 - 2**7 - 1)
        spelled = digits((q.double() / unit[:, None]).round_())[..., :3]
        self._query = spelled.permute(2, 0, 1).flatten(0, 1).contiguous()  # (3 B, D)
        self._products = torch.empty(self.size, len(self._query), dtype=torch.int32)
        self._constant = (s.double() * (q.double() @ self._middle)).to(q.dtype)
        self._scale = (s.double() * unit).to(q.dtype)
        self._step = 1 / (2**31 - 2**24)

    def read(self, rows: Tensor | slice) -> Tensor:
        chosen = self.bank.pixels[rows].flatten(1)
        self.bank.bytes_read += chosen.numel()
        return torch.bitwise_xor(chosen, 128, out=self._buffer[: len(chosen)]).view(torch.int8)

    def logits(self, block: Tensor, norms: Tensor, out: Tensor) -> Tensor:
        products = multiply_bytes(block, self._query.T, out=self._products[: len(block)])
        low, middle, high = products.unflatten(1, (3, -1)).unbind(1)
        out.copy_(high).mul_(2.0**16).add_(middle, alpha=2.0**8).add_(low)
        out.mul_(self._scale).sub_(self._constant).addcmul_(norms.to(out.dtype)[:, None], self.half)
        longest = norms.max().sqrt() + self._middle.norm()  # of b
        return rounding(self.s, self.lengths, longest**2, out.dtype)

    def begin(self, images: int) -> None:
        self._sums = torch.zeros(self.bank.D, images, 4, dtype=torch.int32)
        self._added = torch.empty(self.bank.D, 4 * images, dtype=torch.int32)
        self._done = torch.zeros(self.bank.D, images, dtype=torch.float64)
        self._rows = 0

    def add(self, block: Tensor, weights: Tensor) -> Tensor:
        if self._rows + len(block) > MOST_PRODUCTS:
            self._settle()
        whole = (weights.double() / self._step).round_()
        self._sums += multiply_bytes(block.T, digits(whole).flatten(1), out=self._added).view_as(self._sums)
        self._rows += len(block)
        return whole.sum(0) * self._step

    def weighted_sum(self, total: Tensor) -> Tensor:
        self._settle()
        return self._done.T - total[:, None] * self._middle

    def _settle(self) -> None:
        """Brings the sums of digits to numbers, before they overflow."""
        self._done += (self._sums.double() @ DIGITS) * self._step
        self._sums.zero_()
        self._rows = 0


def multiply_bytes(a: Tensor, b: Tensor, out: Tensor) -> Tensor:
    """`a @ b` of signed bytes, `(n, k)` int32, into `out`.

    Where memory runs out torch neither computes this product nor says so. So some rows, at least one of the part of
    each thread, begin as what cannot come out.

    Raises:
        DoesNotFit: it was not computed.
    """
    some = out[::16]
    some.fill_(UNTOUCHED)
    torch._int_mm(a, b, out=out)
    if some.amin() == UNTOUCHED:
        raise DoesNotFit(
            "there is too little memory for a product of bytes: close other programs, or give smaller batches"
        )
    return out


def digits(whole: Tensor) -> Tensor:
    """Whole numbers as four digits from -128 to 127 to the base 256, lowest first, `(..., 4)` int8."""
    lifted = whole.to(torch.int32) + 0x00808080  # each digit but the highest by 128, so that digits are bytes
    return (lifted ^ 0x00808080).contiguous().view(torch.int8).unflatten(-1, (-1, 4))


def scan_of(bank: Bank, q: Tensor, s: Tensor) -> Scan:
    """The fastest scan that this machine and these rows allow."""
    on_cpu = bank.is_uint8 and bank.device.type == "cpu" and q.dtype == torch.float32
    takes_bytes = on_cpu and 1 < bank.D <= MOST_PRODUCTS  # of one byte torch's product is wrong
    fast = getattr(torch.cpu, "_is_vnni_supported", lambda: False)() and hasattr(torch, "_int_mm")
    return (_Bytes if takes_bytes and fast else _Floats)(bank, q, s)


def nearest_images(bank: Bank, images: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The nearest rows of images of any origin, exactly: by one scan for many images; rows near the cut are measured
    again in float64.

    Arguments:
        images: `(n, C, H, W)` in [-1, 1].

    Returns:
        rows `(n, count)`, nearest first, and the root mean square difference of a pixel (range 0 to 2), float64; on the
        CPU.
    """
    if len(images) == 0:
        raise GolddiffError("there are no images to look for: give at least one")
    if tuple(images.shape[1:]) != bank.shape:
        raise GolddiffError(f"images of {tuple(images.shape[1:])} beside a bank of {bank.shape}: give the same shape")
    rows, found = bank.rows, []
    for some in images.split(max(1, LOGITS_AT_ONCE // len(rows))):
        q, s = bank.query(some.to(bank.device, torch.float32), Noise(1.0, 1.0))
        scan = scan_of(bank, q, s)
        scores = q.new_empty(len(rows), len(q))
        errors = torch.zeros(len(q), dtype=torch.float64, device=q.device)
        for start in range(0, len(rows), scan.size):
            part = slice(start, min(start + scan.size, len(rows)))
            chosen: Tensor | slice = rows[part] if len(bank.removed) else part
            errors = torch.maximum(errors, scan.logits(scan.read(chosen), bank.norms[chosen], out=scores[part]))
        exact = bank.query(some.to(bank.device, torch.float64), Noise(1.0, 1.0))
        for b, (query, step) in enumerate(zip(*exact, strict=True)):
            found.append(_nearest(bank, query, step, rows, scores[:, b].neg(), float(errors[b]), count))
    nearest, distances = zip(*found, strict=True)
    return torch.stack(nearest).cpu(), torch.stack(distances).cpu()


def _nearest(
    bank: Bank, q: Tensor, s: Tensor, rows: Tensor, scores: Tensor, error: float, count: int
) -> tuple[Tensor, Tensor]:
    """Those of one image, from scores `(n,)` that are known up to an error."""
    near = rows[
        smallest(
            scores.contiguous(),
            count,
            error,
            lambda i: bank.distances(q, s, rows[i]),
            lambda i: bank.keys[rows[i]],
        )
    ]
    near = near[bank.keys[near].argsort()]
    distances, order = bank.distances(q, s, near).sort(stable=True)
    return near[order], (distances / bank.D).sqrt()
