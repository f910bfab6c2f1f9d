"""What every reader returns: pictures of one shape, read block by block."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ..errors import GolddiffError

__all__ = ["NO_LABEL", "ROW_MEMORY", "Images", "as_labels"]

NO_LABEL = -1
LARGEST_LABEL = 2**31 - 1
ROW_MEMORY = 128  # bytes that a picture takes before it is read: label, id, place


def as_labels(values: Any) -> np.ndarray:
    """Labels as `(N,)` int64.

    Raises:
        GolddiffError: something else than whole numbers from -1 to 2^31 - 1.
    """
    labels = np.asarray(values)  # whole numbers beyond 64 bits become objects
    if len(labels) == 0:
        return np.empty(0, dtype=np.int64)
    if labels.dtype.kind not in "iuO":
        raise GolddiffError(f"labels are {labels.dtype}: give whole numbers, -1 for none")
    for bound, beyond in ((labels.max(), labels.max() > LARGEST_LABEL), (labels.min(), labels.min() < NO_LABEL)):
        if beyond:
            said = bound if abs(int(bound)) < 10**20 else f"of {int(bound).bit_length()} bits"
            raise GolddiffError(f"label {said}: give whole numbers from 0 to {LARGEST_LABEL}, or -1 for none")
    return labels.astype(np.int64)


@dataclass(frozen=True, eq=False)
class Images:
    """Pictures from anywhere, in a fixed order.

    Arguments:
        shape: `(C, H, W)` of every picture.
        dtype: `uint8` (0 to 255), or `float32` / `float64` (taken as they are; [-1, 1] expected).
        labels: class of each picture, `(N,)` int64, `NO_LABEL` where there is none.
        ids: where each picture comes from, N strings (a path in the folder, or a row number).
        read: `read(start, stop)` decodes pictures `start..stop-1` to `(stop - start, C, H, W)`.
        classes: the names of the classes, if they have any; `labels` index them.
        skipped: names of the pictures that could not be read and were left out.
    """

    shape: tuple[int, int, int]
    dtype: np.dtype
    labels: np.ndarray
    ids: Sequence[str]
    read: Callable[[int, int], np.ndarray]
    classes: tuple[str, ...] = ()
    skipped: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if len(self.labels) != len(self.ids):
            raise GolddiffError(
                f"{len(self.ids)} pictures but {len(self.labels)} labels: give one label for each picture"
            )
        as_labels(self.labels)
        if min(self.shape) < 1:
            raise GolddiffError(f"pictures of shape {self.shape}: they need at least one pixel")
        if len(self.ids) == 0:
            raise GolddiffError("there are no pictures: a bank needs at least one")

    def __len__(self) -> int:
        return len(self.ids)

    def blocks(self, size: int, first: int = 0) -> Iterator[tuple[int, np.ndarray]]:
        """Yields `(start, pictures)` with `size` pictures each, in order from number `first` on; the next ones are read
        while these are used."""
        starts = list(range(first, len(self), size))
        with ThreadPoolExecutor(1) as reader:

            def reading(start: int) -> Future[np.ndarray]:
                return reader.submit(self.read, start, min(start + size, len(self)))

            coming = [reading(start) for start in starts[:1]]
            for start, following in zip(starts, [*starts[1:], None], strict=False):
                block = coming.pop().result()
                if following is not None:
                    coming.append(reading(following))
                yield start, block

    def flipped(self) -> Images:
        """These pictures, then their mirror images in the same order (ids end in `|flip`)."""
        count, read = len(self), self.read

        def both(start: int, stop: int) -> np.ndarray:
            parts = []
            if start < count:
                parts.append(read(start, min(stop, count)))
            if stop > count:
                parts.append(read(max(start - count, 0), stop - count)[..., ::-1])
            return np.concatenate(parts)

        return replace(
            self,
            labels=np.concatenate([self.labels, self.labels]),
            ids=[*self.ids, *(f"{name}|flip" for name in self.ids)],
            read=both,
        )

    def first(self, count: int | None) -> Images:
        """The first `count` pictures (all of them if there are fewer, or if `count` is None)."""
        if count is None or count >= len(self):
            return self
        if count < 1:
            raise GolddiffError(f"limit is {count}: give a number of pictures of at least 1")
        return replace(self, labels=self.labels[:count], ids=self.ids[:count])
