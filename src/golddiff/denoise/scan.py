"""The two products of a scan, rows with images and images with rows, in floats or in bytes.

A scan keeps, for each image of a batch, a weighted sum of the rows that grows block by block.
"""

from __future__ import annotations

import abc
from collections.abc import Iterator

import torch
from torch import Tensor

from ..bank import Bank
from ..golden import rounding

__all__ = ["SLACK", "Scan", "scan_of"]

SLACK = 2.0  # weights up to exp(2) are taken, so that sums are scaled less often
DIGITS = torch.tensor([1.0, 2.0**8, 2.0**16, 2.0**24], dtype=torch.float64)
MOST_PRODUCTS = 2**17 - 1  # of bytes, that add up in int32
BYTES_AT_ONCE = 2**22
FEWEST_ROWS, MOST_ROWS = 256, 2**15  # of a block


class Scan(abc.ABC):
    """`bank.query(x_t, noise)` of a batch against blocks of rows.

    Arguments:
        q: `(B, D)`. s: `(B,)`.
    """

    def __init__(self, bank: Bank, q: Tensor, s: Tensor) -> None:
        self.bank, self.q, self.s = bank, q, s
        self.lengths = q.double().norm(dim=1)
        self.half = (s.double() ** 2 / -2).to(q.dtype)

    @abc.abstractmethod
    def blocks(self, eligible: Tensor | None) -> Iterator[tuple[slice, Tensor | slice, Tensor]]:
        """Yields `(part, rows, block)`; the block is overwritten by the next one."""

    @abc.abstractmethod
    def logits(self, block: Tensor, norms: Tensor, out: Tensor) -> Tensor:
        """`s q v - s^2 |v|^2 / 2`, `(n, B)`, into `out`; returns a bound of their rounding errors, `(B,)`."""

    @abc.abstractmethod
    def add(self, block: Tensor, weights: Tensor) -> Tensor:
        """Adds rows by weights `(n, B)` from 0 to exp(SLACK); returns the sums of the weights as they were taken,
        `(B,)` float64."""

    @abc.abstractmethod
    def shrink(self, factor: Tensor) -> None:
        """Multiplies what was added so far, by `(B,)`."""

    @abc.abstractmethod
    def weighted_sum(self, total: Tensor) -> Tensor:
        """The sum of `v` by weights, `(B, D)` float64; `total` are the sums of the weights."""


class _Floats(Scan):
    """Rows converted block by block, and products of floats."""

    def __init__(self, bank: Bank, q: Tensor, s: Tensor) -> None:
        super().__init__(bank, q, s)
        self._query = (s.double()[:, None] * q).to(q.dtype)
        self._sum = q.new_zeros(q.shape[1], len(q))

    def blocks(self, eligible: Tensor | None) -> Iterator[tuple[slice, Tensor | slice, Tensor]]:
        return self.bank.blocks(eligible, self.q.dtype)

    def logits(self, block: Tensor, norms: Tensor, out: Tensor) -> Tensor:
        torch.mul(norms.to(out.dtype)[:, None], self.half, out=out).addmm_(block, self._query.T)
        return rounding(self.s, self.lengths, norms, out.dtype)

    def add(self, block: Tensor, weights: Tensor) -> Tensor:
        self._sum.addmm_(block.T, weights)
        return weights.sum(0).double()

    def shrink(self, factor: Tensor) -> None:
        self._sum.mul_(factor)

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
        self._middle = bank.centre.double() - 128
        self._unit = q.double().abs().amax(1).clamp(min=1e-30) / (2**23 - 2**15 - 2**7 - 1)
        self._digits = digits((q.double() / self._unit[:, None]).round_())[..., :3].permute(1, 2, 0).flatten(1)
        self._digits = self._digits.T.contiguous().T
        self._constant = (s.double() * (q.double() @ self._middle)).to(q.dtype)
        self._scale = (s.double() * self._unit).to(q.dtype)
        self._sums = torch.zeros(bank.D, len(q), 4, dtype=torch.int32)
        self._rows = 0
        self._done = torch.zeros(bank.D, len(q), dtype=torch.float64)
        self._step = float(torch.tensor(SLACK).exp() * 1.001) / (2**31 - 2**24)

    def blocks(self, eligible: Tensor | None) -> Iterator[tuple[slice, Tensor | slice, Tensor]]:
        count = len(self.bank) if eligible is None else len(eligible)
        size = min(max(FEWEST_ROWS, BYTES_AT_ONCE // self.bank.D), MOST_ROWS)
        pixels, buffer = self.bank.pixels.flatten(1), torch.empty(min(size, count), self.bank.D, dtype=torch.uint8)
        for start in range(0, count, size):
            part = slice(start, min(start + size, count))
            rows = part if eligible is None else eligible[part]
            chosen = pixels[rows]
            block = torch.bitwise_xor(chosen, 128, out=buffer[: len(chosen)])
            self.bank.bytes_read += block.numel()
            yield part, rows, block.view(torch.int8)

    def logits(self, block: Tensor, norms: Tensor, out: Tensor) -> Tensor:
        low, middle, high = torch._int_mm(block, self._digits).unflatten(1, (3, -1)).unbind(1)
        out.copy_(high).mul_(2.0**16).add_(middle, alpha=2.0**8).add_(low)
        out.mul_(self._scale).sub_(self._constant).addcmul_(norms.to(out.dtype)[:, None], self.half)
        longest = norms.max().sqrt() + self._middle.norm()  # of b
        return rounding(self.s, self.lengths, longest**2, out.dtype)

    def add(self, block: Tensor, weights: Tensor) -> Tensor:
        if self._rows + len(block) > MOST_PRODUCTS:
            self._settle()
        whole = (weights.double() / self._step).round_()
        products = torch._int_mm(block.T, digits(whole).flatten(1))
        self._sums += products.view_as(self._sums)
        self._rows += len(block)
        return whole.sum(0) * self._step

    def shrink(self, factor: Tensor) -> None:
        self._settle()
        self._done *= factor

    def weighted_sum(self, total: Tensor) -> Tensor:
        self._settle()
        return self._done.T - total[:, None] * self._middle

    def _settle(self) -> None:
        if self._rows:
            self._done += (self._sums.double() @ DIGITS) * self._step
            self._sums.zero_()
            self._rows = 0


def digits(whole: Tensor) -> Tensor:
    """Whole numbers as four digits from -128 to 127 to the base 256, lowest first, `(..., 4)` int8."""
    lifted = whole.to(torch.int32) + 0x00808080  # each digit but the highest by 128, so that digits are bytes
    return (lifted ^ 0x00808080).view(torch.int8).unflatten(-1, (-1, 4))


def scan_of(bank: Bank, q: Tensor, s: Tensor) -> Scan:
    """The fastest scan that this machine and these rows allow."""
    takes_bytes = bank.is_uint8 and bank.device.type == "cpu" and bank.D <= MOST_PRODUCTS and q.dtype == torch.float32
    fast = getattr(torch.cpu, "_is_vnni_supported", lambda: False)() and hasattr(torch, "_int_mm")
    return (_Bytes if takes_bytes and fast else _Floats)(bank, q, s)
