"""From images to the arrays of a bank: pixels, keys, proxies; and where the cache keeps them."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from .files import cache_folder
from .images import Images, find_source
from .proxy import Pooling

__all__ = ["BLOCK", "FORMAT", "cached_path", "described", "fill", "fingerprint", "source_name"]

FORMAT = 1
BLOCK = 1024


def cached_path(source: str | Path, options: dict[str, Any]) -> Path:
    """Where the cache keeps the bank of a source: named by its files (size and time) and the options."""
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
    digest = hashlib.blake2b(json.dumps(signature).encode(), digest_size=6).hexdigest()
    return cache_folder() / "banks" / f"{Path(str(found)).stem}-{digest}"


def source_name(source: str | Path) -> str:
    """How a recipe names a source: a known name as it is, else the full path."""
    found = find_source(source)
    known = isinstance(found, str) or (found.name == str(source) and not Path(source).exists())
    return str(source) if known else str(Path(str(found)).resolve())


def fill(images: Images, source: dict[str, Any], create: Callable[..., np.ndarray], progress: bool) -> dict[str, Any]:
    """Writes every array of a bank through `create(name, shape, dtype)`; returns the metadata."""
    count, size = len(images), int(np.prod(images.shape))
    pixels = create("pixels", (count, *images.shape), images.dtype)
    labels = create("labels", (count,), np.int64)
    labels[:] = images.labels
    names = np.array([name.encode(errors="surrogateescape") for name in images.ids])
    ids = create("ids", names.shape, names.dtype)
    ids[:] = names
    digests = np.empty((count, 2), dtype=np.int64)
    total = np.zeros(size)
    with tqdm(total=count, desc="images", unit="", disable=None if progress else True) as bar:
        for start, block in images.blocks(BLOCK):
            stop = start + len(block)
            pixels[start:stop] = block
            total += block.reshape(len(block), -1).sum(0, dtype=np.float64)
            digests[start:stop] = _digests(block, images.labels[start:stop])
            bar.update(len(block))
    keys = create("keys", (count,), np.int64)
    keys[:] = _distinct(digests[:, 0])
    centre = create("centre", (size,), np.float32)
    mean = total / count
    centre[:] = np.round(mean) if images.dtype == np.uint8 else mean
    pooling = Pooling(images.shape)
    norms = create("norms", (count,), np.float64)
    proxy = create("proxy", (count, pooling.size), np.float32)
    for start in tqdm(range(0, count, BLOCK), desc="proxies", disable=None if progress else True):
        part = slice(start, min(start + BLOCK, count))
        v = torch.from_numpy(pixels[part].reshape(-1, size) - centre.astype(np.float64))
        norms[part] = v.square().sum(1)
        proxy[part] = pooling(v)
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


def _hash_digests(shape: tuple[int, ...], dtype: np.dtype, digests: np.ndarray) -> str:
    head = json.dumps([FORMAT, list(shape), dtype.str]).encode()
    return hashlib.blake2b(head + digests.tobytes(), digest_size=16).hexdigest()


def fingerprint(pixels: Tensor, labels: Tensor) -> str:
    """The fingerprint, from the rows themselves."""
    parts = zip(pixels.split(BLOCK), labels.split(BLOCK), strict=True)
    digests = np.concatenate([_digests(p.numpy(), n.numpy()) for p, n in parts])
    return _hash_digests(tuple(pixels.shape[1:]), pixels.numpy().dtype, digests)


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
