"""The bank: training images prepared for search, built once and opened at once."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

from .errors import GolddiffError
from .images import NO_LABEL, Images, find_source, from_array, open_source
from .noise import Noise
from .proxy import Pooling
from .spectrum import Spectrum, compute_spectrum

__all__ = ["Bank", "cache_folder"]

FORMAT = 1
BLOCK = 1024
META = "bank.json"
ARRAYS = ("pixels", "labels", "ids", "keys", "centre", "norms", "proxy")
SPECTRUM_AT_BUILD = 4096  # larger D: the spectrum is computed when it is first needed


class Bank:
    r"""N images of D = C * H * W pixels, read as values in [-1, 1], with what search needs beside them.

    Inside, a row is `v = pixels - centre`: for uint8 pixels whole numbers, exact in float32, and

    .. math:: x_i = scale * (v_i + centre) + offset

    Make one with `Bank.build` or `Bank.open`.

    Attributes:
        pixels: `(N, C, H, W)` uint8 or float, mapped from the file.
        labels: `(N,)` int64, -1 for none. `classes`: their names, if any.
        ids: N source ids (bytes). `keys`: `(N,)` int64, a hash of pixels and label: the row's identity,
            whatever the order of the rows or the reader; draws and ties depend on it.
        centre: `(D,)` float32, in pixel units. `norms`: `|v_i|^2`, `(N,)` float64.
        proxy: `P v_i`, `(N, P)` float32, where `pooling` is P.
        fingerprint: hash of shape, type, pixels, labels and order.
        source: what it was built from, and the options.
    """

    def __init__(self, arrays: dict[str, Any], meta: dict[str, Any], path: Path | None = None) -> None:
        self.pixels: Tensor = _tensor(arrays["pixels"])
        self.labels: Tensor = _tensor(arrays["labels"])
        self.ids: np.ndarray = arrays["ids"]
        self.keys: Tensor = _tensor(arrays["keys"])
        self.centre: Tensor = _tensor(arrays["centre"])
        self.norms: Tensor = _tensor(arrays["norms"])
        self.proxy: Tensor = _tensor(arrays["proxy"])
        self.meta = meta
        self.path = path
        self.shape: tuple[int, int, int] = tuple(self.pixels.shape[1:])  # type: ignore[assignment]
        self.D = int(np.prod(self.shape))
        self.classes: tuple[str, ...] = tuple(meta["classes"])
        self.fingerprint: str = meta["fingerprint"]
        self.source: dict[str, Any] = meta["source"]
        self.scale, self.offset = (1 / 127.5, -1.0) if self.is_uint8 else (1.0, 0.0)
        self.pooling = Pooling(self.shape)
        self.bytes_read = 0
        self._kept: dict[str, dict[str, Tensor]] = {}
        self._rows: dict[int, Tensor] = {}

    def __len__(self) -> int:
        return len(self.pixels)

    def __repr__(self) -> str:
        c, h, w = self.shape
        return f"Bank({len(self)} images of {c} x {h} x {w}, fingerprint {self.fingerprint[:12]})"

    @property
    def is_uint8(self) -> bool:
        return self.pixels.dtype == torch.uint8

    @property
    def device(self) -> torch.device:
        return self.pixels.device

    # ---- making and opening -------------------------------------------------------------------------

    @classmethod
    def build(
        cls,
        source: Any,
        out: str | Path | None = None,
        *,
        labels: Any = None,
        split: str = "train",
        size: int | None = None,
        limit: int | None = None,
        layout: str | None = None,
        force: bool = False,
        progress: bool = False,
    ) -> Bank:
        """Builds a bank, or opens it if the cache already holds it.

        Arguments:
            source: a path or a known name (`digits`, `mnist5k`, `mnist`, ...), an array or tensor of
                pictures (uint8, or floats in [-1, 1]), or the folder of a built bank, which is opened.
            out: folder of the bank. By default it goes to the cache (`$GOLDDIFF_CACHE`); a bank of an array
                without `out` lives in memory.
            labels: `(N,)` integers, for a source that is an array.
            split: the part of a data set that has parts.
            size: cut and resize pictures to `size x size`.
            limit: take the first `limit` pictures only.
            layout: order of the axes of an array (`NHWC`, `NCHW`, `NHW`), where its shape does not tell.
            force: replace `out` if it exists.
            progress: show progress bars.

        Raises:
            GolddiffError: a source that cannot be read, or an `out` that exists.
        """
        in_memory = not isinstance(source, str | Path)
        options = {"split": split, "size": size, "limit": limit, "layout": layout}
        if in_memory:
            images = from_array(source, labels, layout).first(limit)
            described = {"name": "array", **options}
            if out is None:
                arrays: dict[str, np.ndarray] = {}

                def in_ram(name: str, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
                    return arrays.setdefault(name, np.empty(shape, dtype))

                meta = _fill(images, described, in_ram, progress)
                return cls(arrays, meta)
        else:
            if labels is not None:
                raise GolddiffError("labels= goes with an array of pictures; a path brings its own labels")
            if out is None and (Path(source) / META).is_file():
                return cls._open_as_is(Path(source), options)
            if out is None:
                out = _cached_path(source, options)
                if (out / META).exists() and not force:
                    return cls.open(out)
                force = True
            found = find_source(source)
            name = str(source) if isinstance(found, str) or found.name == str(source) else str(found.resolve())
            described = {"name": name, **options}
        out = Path(out)
        if out.exists() and not force:
            raise GolddiffError(f"{out} exists: choose another folder, or give --force to replace it")
        if not in_memory:
            images = open_source(source, split=split, size=size, layout=layout).first(limit)
        with _fresh_folder(out) as folder:

            def on_disk(name: str, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
                return np.lib.format.open_memmap(folder / f"{name}.npy", "w+", dtype, shape)

            meta = _fill(images, described, on_disk, progress)
            (folder / META).write_text(json.dumps(meta, indent=1))
            bank = cls.open(folder)
            if bank.D <= SPECTRUM_AT_BUILD:
                with tqdm(total=1, desc="spectrum", disable=None if progress else True) as bar:
                    bank.spectrum()
                    bar.update()
        return cls.open(out)

    @classmethod
    def open(cls, path: str | Path) -> Bank:
        """Opens a built bank; its arrays are mapped, not read."""
        path = Path(path)
        if not (path / META).is_file():
            raise GolddiffError(f"{path} is not a bank (it has no {META}): make one with golddiff bank build")
        try:
            meta = json.loads((path / META).read_text())
            version = meta["format"]
        except (ValueError, KeyError, TypeError, UnicodeDecodeError) as error:
            raise GolddiffError(f"{path / META} is damaged ({error}): build the bank again") from error
        if version != FORMAT:
            raise GolddiffError(f"{path} is a bank of format {version}, this is {FORMAT}: build it again")
        arrays = {}
        for name in ARRAYS:
            try:
                # copy-on-write: torch wants writable memory, the file is never written to
                arrays[name] = np.load(path / f"{name}.npy", mmap_mode="c", allow_pickle=False)
            except (OSError, ValueError, EOFError) as error:
                raise GolddiffError(f"{path}/{name}.npy cannot be opened ({error}): build it again") from error
            found, stated = _described(arrays[name]), meta["arrays"].get(name)
            if found != stated:
                raise GolddiffError(f"{path}/{name}.npy is {found}, not {stated}: build the bank again")
        return cls(arrays, meta, path)

    @classmethod
    def _open_as_is(cls, path: Path, options: dict[str, Any]) -> Bank:
        changed = [f"--{name}" for name in ("size", "limit", "layout") if options[name] is not None]
        if changed:
            raise GolddiffError(f"{path} is a built bank: give {', '.join(changed)} when building it from its source")
        return cls.open(path)

    def to(self, device: str | torch.device) -> Bank:
        """The same bank with its arrays on `device`."""
        if torch.device(device).type == self.device.type:
            return self
        arrays = {n: getattr(self, n) if n == "ids" else getattr(self, n).to(device) for n in ARRAYS}
        return Bank(arrays, self.meta, self.path)

    # ---- reading -------------------------------------------------------------------------------------

    def rows_of(self, label: int | None) -> Tensor | None:
        """Rows of a class, ascending `(n,)`; None (all rows) for None or -1.

        Raises:
            GolddiffError: no row has this label.
        """
        if label is None or label == NO_LABEL:
            return None
        if label not in self._rows:
            rows = (self.labels == label).nonzero()[:, 0]
            if len(rows) == 0:
                there = [n for n in self.labels.unique().tolist() if n != NO_LABEL]
                listed = f"{', '.join(map(str, there[:12]))}{', ...' if len(there) > 12 else ''}"
                raise GolddiffError(
                    f"no image has label {label}: " + (f"labels here are {listed}" if there else "this bank has none")
                )
            self._rows[label] = rows
        return self._rows[label]

    def centred(self, rows: Tensor | slice, dtype: torch.dtype) -> Tensor:
        """`v` of some rows, `(n, D)`, converted in one pass."""
        chosen = self.pixels[rows].flatten(1)
        self.bytes_read += chosen.numel() * chosen.element_size()
        return torch.sub(chosen, self.centre.to(dtype))

    def uncentred(self, v: Tensor) -> Tensor:
        """`x = scale * (v + centre) + offset`: from centred rows (or their weighted means) to [-1, 1]."""
        return (v + self.centre.to(v.dtype)) * self.scale + self.offset

    def images(self, rows: Tensor | slice, dtype: torch.dtype = torch.float32) -> Tensor:
        """Images of some rows, `(n, C, H, W)` in [-1, 1]."""
        return self.uncentred(self.centred(rows, dtype)).unflatten(1, self.shape)

    def query(self, x_t: Tensor, noise: Noise) -> tuple[Tensor, Tensor]:
        r"""Noisy images `(B, C, H, W)` in the units of the rows: `q` `(B, D)` and `s` `(B,)`, such that

        .. math:: |x_t - \alpha x_i|^2 / \sigma^2 = |q - s v_i|^2

        so that logits are `-|q - s v_i|^2 / 2`, also where `alpha = 0`. Only `sigma / alpha` and `x_t / sigma`
        matter.
        """
        alpha, sigma = noise.expand(len(x_t)).like(x_t.flatten(1).double())
        origin = (self.centre.double() * self.scale + self.offset).to(x_t.device)
        q = (x_t.flatten(1).double() - alpha * origin) / sigma
        return q.to(x_t.dtype), (self.scale * alpha / sigma)[:, 0].to(x_t.dtype)

    def distances(self, q: Tensor, s: Tensor, rows: Tensor) -> Tensor:
        """`|q - s v_i|^2` of some rows by differences in float64, `(n,)`, for one image: q `(D,)`, s `()`."""
        q, s = q.double(), s.double()
        out = torch.empty(len(rows), dtype=torch.float64, device=q.device)
        for start in range(0, len(rows), BLOCK):
            part = rows[start : start + BLOCK]
            out[start : start + BLOCK] = torch.sub(q, self.centred(part, torch.float64) * s).square_().sum(1)
        return out

    def spectrum(self, label: int | None = None) -> Spectrum:
        """Mean and covariance spectrum of all rows, or of a class; computed once and kept in the bank."""
        rows = self.rows_of(label)
        name = "spectrum" if rows is None else f"spectrum-{label}"
        return Spectrum(**self.keep(name, lambda: vars(self._compute_spectrum(rows))))

    def _compute_spectrum(self, rows: Tensor | None) -> Spectrum:
        count = len(self) if rows is None else len(rows)

        def blocks(size: int, dtype: torch.dtype) -> Iterator[Tensor]:
            for start in range(0, count, size):
                part = slice(start, min(start + size, count))
                yield self.centred(part if rows is None else rows[part], dtype).cpu()

        centre = self.centre.cpu()
        largest = float(torch.maximum(centre, 255 - centre).max()) if self.is_uint8 else None
        return compute_spectrum(blocks, count, centre, self.scale, self.offset, largest)

    def keep(self, name: str, compute: Callable[[], dict[str, Tensor]], remember: bool = True) -> dict[str, Tensor]:
        """Tensors derived from this bank: from memory, from its folder, or computed and put there.

        With `remember=False` they are not held in memory (a bank without a folder then forgets them).
        """
        if name in self._kept:
            return self._kept[name]
        file = self.path / "derived" / f"{name}.safetensors" if self.path else None
        if file and file.exists():
            try:
                tensors = load_file(file)
            except SafetensorError as error:
                raise GolddiffError(f"{file} is damaged ({error}): remove it, it will be made again") from error
        else:
            tensors = compute()
            if file and os.access(file.parent.parent, os.W_OK):
                file.parent.mkdir(exist_ok=True)
                part = file.with_name(f".{os.getpid()}-{file.name}")
                save_file({k: t.contiguous() for k, t in tensors.items()}, part)
                part.replace(file)
        if remember:
            self._kept[name] = tensors
        return tensors


def cache_folder() -> Path:
    """`$GOLDDIFF_CACHE`, by default `golddiff` in the user's cache folder."""
    default = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "golddiff"
    return Path(os.environ.get("GOLDDIFF_CACHE") or default)


def _cached_path(source: str | Path, options: dict[str, Any]) -> Path:
    """Where the cache keeps the bank of a source: named by its files (size and time) and the options."""
    found = find_source(source)
    signature: list[Any] = [FORMAT, str(found) if isinstance(found, str) else str(found.resolve()), options]
    if isinstance(found, Path):
        files = [found] if found.is_file() else sorted(p for p in found.rglob("*") if p.is_file())
        signature += [(str(p.relative_to(found)), p.stat().st_size, p.stat().st_mtime_ns) for p in files]
    digest = hashlib.blake2b(json.dumps(signature).encode(), digest_size=6).hexdigest()
    return cache_folder() / "banks" / f"{Path(str(found)).stem}-{digest}"


class _fresh_folder:
    """A folder that appears under its name only when it is complete; an older one stays until then."""

    def __init__(self, out: Path) -> None:
        self.out = out

    def __enter__(self) -> Path:
        try:
            self.out.parent.mkdir(parents=True, exist_ok=True)
            self.folder = Path(tempfile.mkdtemp(prefix=f".{self.out.name}-", dir=self.out.parent))
        except OSError as error:
            raise GolddiffError(f"{self.out.parent} cannot be written to ({error}): choose another") from error
        self.folder.chmod(0o755)
        return self.folder

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            if self.out.exists():
                old = self.folder.with_name(self.folder.name + "-old")
                self.out.rename(old)
                self.folder.rename(self.out)
                shutil.rmtree(old)
            else:
                self.folder.rename(self.out)
        else:
            shutil.rmtree(self.folder, ignore_errors=True)


def _fill(images: Images, source: dict[str, Any], create: Callable[..., np.ndarray], progress: bool) -> dict[str, Any]:
    """Writes every array of a bank through `create(name, shape, dtype)`; returns the metadata."""
    count, size = len(images), int(np.prod(images.shape))
    pixels = create("pixels", (count, *images.shape), images.dtype)
    labels = create("labels", (count,), np.int64)
    labels[:] = images.labels
    names = np.array([name.encode() for name in images.ids])
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
    head = json.dumps([FORMAT, list(images.shape), images.dtype.str]).encode()
    arrays = {"pixels": pixels, "labels": labels, "ids": ids, "keys": keys}
    arrays |= {"centre": centre, "norms": norms, "proxy": proxy}
    return {
        "format": FORMAT,
        "count": count,
        "shape": list(images.shape),
        "classes": list(images.classes),
        "fingerprint": hashlib.blake2b(head + digests.tobytes(), digest_size=16).hexdigest(),
        "source": source,
        "arrays": {name: _described(array) for name, array in arrays.items()},
    }


def _described(array: np.ndarray) -> str:
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


def _tensor(array: Any) -> Tensor:
    return array if isinstance(array, Tensor) else torch.from_numpy(array)
