"""From images to the arrays of a bank: pixels, keys, proxies; and where the cache keeps them.

Work goes block by block and is noted down now and then, so a build that is interrupted goes on where it was.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .errors import GolddiffError
from .files import cache_folder, replacing
from .foreign import Npz
from .images import Images, find_source
from .memory import require
from .progress import Bar
from .proxy import Pooling

__all__ = [
    "BLOCK",
    "FORMAT",
    "JOURNAL",
    "Journal",
    "block_of",
    "cached_path",
    "described",
    "fill",
    "fingerprint",
    "misfit",
    "source_name",
    "stamp",
]

FORMAT = 2  # of the folder of a bank
HASHED = 1  # of what goes into a fingerprint
BLOCK = 1024  # rows
LARGEST_BLOCK = 2**27  # numbers
JOURNAL = "journal.npz"
NOTE_EVERY = 10.0  # seconds
LARGEST = 1e15  # of a float, so that sums of squares stay within float32


def cached_path(source: str | Path, options: dict[str, Any]) -> Path:
    """Where the cache keeps the bank of a source: named by its files (size and time) and the options."""
    found = find_source(source)
    return cache_folder() / "banks" / f"{Path(str(found)).stem}-{stamp(source, options)}"


def stamp(source: str | Path | Images, options: dict[str, Any]) -> str:
    """A hash that tells sources apart: by the size and time of their files, or by the ids of images; and by the options
    of the build."""
    if isinstance(source, Images):
        said = [list(source.shape), source.dtype.str, list(source.classes), list(source.ids), source.labels.tolist()]
        return _short_hash([FORMAT, said, options])
    found = find_source(source)
    signature: list[Any] = [FORMAT, str(found) if isinstance(found, str) else str(found.resolve()), options]
    if isinstance(found, Path):
        # with a single file come those that belong to it: labels of IDX files, class names of CIFAR's
        belonging = "*ubyte*" if "ubyte" in found.name else "*.txt" if found.suffix == ".bin" else found.name
        files = (
            [found, *sorted(found.parent.glob(belonging))]
            if found.is_file()
            else sorted(p for p in found.rglob("*") if p.is_file())
        )
        signature += [(os.fsencode(p).hex(), p.stat().st_size, p.stat().st_mtime_ns) for p in files]
    return _short_hash(signature)


def _short_hash(signature: list[Any]) -> str:
    return hashlib.blake2b(json.dumps(signature).encode(), digest_size=6).hexdigest()


def source_name(source: str | Path) -> str:
    """How a recipe names a source: a known name as it is, else the full path."""
    found = find_source(source)
    known = isinstance(found, str) or (found.name == str(source) and not Path(source).exists())
    return str(source) if known else str(Path(str(found)).resolve())


class Journal:
    """How far a build has come: rows whose pixels are written, rows whose proxies are, and the sum of all pixels.

    Arguments:
        path: where it is kept; None keeps it in memory only.
        size: numbers of a picture. count: pictures.
    """

    def __init__(self, path: Path | None, size: int, count: int) -> None:
        self.path = path
        self.pixels, self.proxies, self.total = 0, 0, np.zeros(size)
        self._noted = time.monotonic()
        if path is not None and path.exists():
            try:
                with Npz(path) as kept:
                    self.pixels, self.proxies = int(kept["pixels"]), int(kept["proxies"])
                    self.total = kept["total"]
                if (
                    not 0 <= self.proxies <= self.pixels <= count
                    or self.total.shape != (size,)
                    or self.total.dtype != np.float64
                ):
                    raise ValueError("it is of other pictures")
            except (OSError, ValueError, KeyError, TypeError) as error:
                raise GolddiffError(f"{path} is damaged ({error}): remove the folder {path.parent}") from error

    def note(self, *arrays: np.ndarray) -> None:
        """Writes down how far it is, if that was some time ago, after what was written to the arrays."""
        if self.path is None or time.monotonic() - self._noted < NOTE_EVERY:
            return
        for array in arrays:
            if isinstance(array, np.memmap):
                array.flush()
        with replacing(self.path) as part, part.open("wb") as file:
            np.savez(file, pixels=self.pixels, proxies=self.proxies, total=self.total)
        self._noted = time.monotonic()


def fill(
    images: Images, source: dict[str, Any], create: Callable[..., np.ndarray], journal: Journal, progress: bool
) -> dict[str, Any]:
    """Writes every array of a bank through `create(name, shape, dtype)`; returns the metadata.

    Goes on from what the journal says. `create` then gives the arrays as they were left.
    """
    count, size = len(images), int(np.prod(images.shape))
    pixels = create("pixels", (count, *images.shape), images.dtype)
    labels = create("labels", (count,), np.int64)
    labels[:] = images.labels
    encoded = [name.encode(errors="surrogateescape") for name in images.ids]
    longest = max(map(len, encoded))
    require(count * longest, f"{count} names of pictures, one of them {longest} bytes long,", "shorten the longest")
    names = np.array(encoded)
    ids = create("ids", names.shape, names.dtype)
    ids[:] = names
    digests = create("digests", (count, 2), np.int64)
    hidden = None if progress else True
    with Bar(total=count, initial=journal.pixels, desc="images", unit="", disable=hidden) as bar:
        for start, block in images.blocks(block_of(size), journal.pixels):
            stop = start + len(block)
            _check_numbers(block, start)
            pixels[start:stop] = block
            journal.total += block.reshape(len(block), -1).sum(0, dtype=np.float64)
            digests[start:stop] = _digests(block, images.labels[start:stop])
            journal.pixels = stop
            journal.note(pixels, digests)
            bar.update(len(block))
    keys = create("keys", (count,), np.int64)
    keys[:] = _distinct(digests[:, 0])
    centre = create("centre", (size,), np.float32)
    mean = journal.total / count
    centre[:] = np.round(mean) if images.dtype == np.uint8 else mean
    pooling = Pooling(images.shape)
    norms = create("norms", (count,), np.float64)
    proxy = create("proxy", (count, pooling.size), np.float32)
    kind = torch.float32 if images.dtype == np.uint8 else torch.float64  # sums of so few bytes are exact in float32
    middle = torch.from_numpy(centre).to(kind)
    with Bar(total=count, initial=journal.proxies, desc="proxies", unit="", disable=hidden) as bar:
        for start in range(journal.proxies, count, block_of(size)):
            stop = min(start + block_of(size), count)
            v = torch.from_numpy(pixels[start:stop].reshape(-1, size)).to(kind) - middle
            norms[start:stop] = v.square().sum(1, dtype=torch.float64)
            proxy[start:stop] = pooling(v, kind)
            journal.proxies = stop
            journal.note(norms, proxy)
            bar.update(stop - start)
    arrays = {"pixels": pixels, "labels": labels, "ids": ids, "keys": keys}
    arrays |= {"centre": centre, "norms": norms, "proxy": proxy}
    if images.skipped:
        source = {**source, "skipped": list(images.skipped)}
    return {
        "format": FORMAT,
        "count": count,
        "shape": list(images.shape),
        "classes": list(images.classes),
        "fingerprint": _hash_digests(images.shape, images.dtype, digests),
        "source": source,
        "arrays": {name: described(array) for name, array in arrays.items()},
    }


def block_of(size: int) -> int:
    """Rows of a block, fewer for large images."""
    return max(1, min(BLOCK, LARGEST_BLOCK // size))


def _check_numbers(block: np.ndarray, first: int) -> None:
    """Refuses floats that are no numbers or too large, by the row; `first` is that of the block."""
    if block.dtype != np.uint8:
        fits = (np.abs(block) <= LARGEST).reshape(len(block), -1).all(1)
        if not fits.all():
            raise GolddiffError(
                f"row {first + int(np.argmin(fits))} has pixels that are NaN, infinite or beyond {LARGEST:g}: "
                "remove or mend it"
            )


def _hash_digests(shape: tuple[int, ...], dtype: np.dtype, digests: np.ndarray) -> str:
    head = json.dumps([HASHED, list(shape), dtype.str]).encode()
    return hashlib.blake2b(head + digests.tobytes(), digest_size=16).hexdigest()


def fingerprint(pixels: Tensor, labels: Tensor) -> str:
    """The fingerprint, from the rows themselves."""
    parts = zip(pixels.split(BLOCK), labels.split(BLOCK), strict=True)
    digests = np.concatenate([_digests(p.numpy(), n.numpy()) for p, n in parts])
    return _hash_digests(tuple(pixels.shape[1:]), pixels.numpy().dtype, digests)


def misfit(arrays: dict[str, np.ndarray]) -> str | None:
    """The name of an array of a bank that has not the shape, type and order which its pixels ask for."""
    pixels = arrays["pixels"]
    if pixels.ndim != 4 or 0 in pixels.shape or pixels.dtype not in (np.uint8, np.float32, np.float64):
        return "pixels"
    count, size = len(pixels), int(np.prod(pixels.shape[1:]))
    pooled = Pooling((pixels.shape[1], pixels.shape[2], pixels.shape[3])).size
    wanted: dict[str, tuple[tuple[int, ...], Any]] = {
        "pixels": (pixels.shape, pixels.dtype),
        "labels": ((count,), np.int64),
        "ids": ((count,), arrays["ids"].dtype if arrays["ids"].dtype.kind == "S" else np.bytes_),
        "keys": ((count,), np.int64),
        "centre": ((size,), np.float32),
        "norms": ((count,), np.float64),
        "proxy": ((count, pooled), np.float32),
    }
    for name, (shape, dtype) in wanted.items():
        if arrays[name].shape != shape or arrays[name].dtype != dtype or not arrays[name].flags.c_contiguous:
            return name
    return None


def described(array: np.ndarray) -> str:
    return f"{array.dtype.str} {'x'.join(map(str, array.shape))}"


def _digests(block: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """128-bit hashes of pixels and label of each row, `(n, 2)` int64."""
    rows = np.ascontiguousarray(block).reshape(len(block), -1).view(np.uint8)
    hashed = [
        hashlib.blake2b(row.data, digest_size=16, salt=int(label).to_bytes(8, "little", signed=True)).digest()
        for row, label in zip(rows, labels, strict=True)
    ]
    return np.frombuffer(b"".join(hashed), dtype=np.int64).reshape(-1, 2)


def _distinct(keys: np.ndarray) -> np.ndarray:
    """Keys with the second, third, ... of equal ones changed, so that copies of an image differ too."""
    order = np.argsort(keys, kind="stable")
    ordered = keys[order]
    first = np.concatenate([[True], ordered[1:] != ordered[:-1]])
    starts = np.maximum.accumulate(np.where(first, np.arange(len(keys)), 0))
    copies = np.empty_like(keys)
    copies[order] = np.arange(len(keys)) - starts
    return keys + copies * np.int64(0x9E3779B97F4A7C1 | 1)
