"""The bank: training images prepared for search, built once and opened at once."""

from __future__ import annotations

import copy
import hashlib
import importlib.util
import math
import os
import secrets
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .derived import Derived
from .errors import GolddiffError, beyond, unknown
from .files import growing_folder, hash_edges, hash_file
from .foreign import regular
from .images import NO_LABEL, Images, open_source
from .jsons import as_written, checksum, read_json, sealed, write_json
from .latents import Latents, reopened, same_as
from .latents import latents as latents_in
from .memory import DoesNotFit, explained, is_lack, require
from .noise import Noise
from .prepare import (
    BLOCK,
    FORMAT,
    JOURNAL,
    Journal,
    block_of,
    cached_path,
    described,
    fill,
    fingerprint,
    misfit,
    source_name,
    stamp,
)
from .progress import Bar
from .proxy import Pooling
from .spectrum import (
    LARGEST_EIGENBASIS,
    DenseCovariance,
    Rows,
    Spectrum,
    Statistics,
    compute_covariance,
    compute_spectrum,
    reduced_spectrum,
)

__all__ = ["Bank"]

META = "bank.json"
DERIVED = "derived"
STATISTICS_ROWS = 2**16
SUMMED_ANEW = 10_000  # statistics of fewer rows are summed anew when some are removed
BLOCK_NUMBERS = 2**21  # of a block that stays in a processor's cache
LARGEST_SPARE = 2**26  # bytes of a block that is kept for the next one
WORTH_COMPILING = 2**22  # pixels to compare from which a compiled loop is loaded
ARRAYS = ("pixels", "labels", "ids", "keys", "centre", "norms", "proxy")


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
        removed: rows that are not to be used, ascending `(n,)`, see `without`.
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
        self._files: dict[str, Any] = {
            name: array.base for name, array in arrays.items() if isinstance(array, np.memmap)
        }
        self._derived = self._of_rows = Derived(path / DERIVED if path else None, self.fingerprint)
        self._rows: dict[int, Tensor] = {}
        self._spare: dict[torch.dtype, Tensor] = {}
        self.removed = torch.empty(0, dtype=torch.int64, device=self.device)
        self._whole: Bank | None = None
        self._own_statistics = True
        self._latents: Latents | None = None

    def __len__(self) -> int:
        return len(self.pixels) - len(self.removed)

    def __repr__(self) -> str:
        c, h, w = self.shape
        less = f", {len(self.removed)} removed" if len(self.removed) else ""
        return f"Bank({len(self)} images of {c} x {h} x {w}{less}, fingerprint {self.fingerprint[:12]})"

    @property
    def is_uint8(self) -> bool:
        return self.pixels.dtype == torch.uint8

    @property
    def device(self) -> torch.device:
        return self.pixels.device

    @property
    def is_latent(self) -> bool:
        """Whether its rows are latents of pictures, which `decode` brings back."""
        return self.source.get("latents") is not None

    def decode(self, x: Tensor) -> Tensor:
        """Pictures `(B, C, H, W)` of images in the bank's space: decoded latents, or `x` itself in a bank of pictures.

        Raises:
            GolddiffError: the autoencoder is gone, or was two callables of another process.
        """
        if not self.is_latent:
            return x
        if self._latents is None:
            self._latents = reopened(self.source["latents"])
        return self._latents.decoded(x)

    def with_latents(self, given: Latents | str | Path) -> Bank:
        """This bank, decoding by these latents, which must be those it was built with (a folder may have moved)."""
        if not self.is_latent:
            raise GolddiffError("this bank holds pictures, not latents: leave latents out, or build it with them")
        self._latents = same_as(self.source["latents"], given if isinstance(given, Latents) else latents_in(given))
        return self

    @cached_property
    def compiled(self) -> bool:
        """Whether compiled loops can read the rows, uint8 on the CPU, and the extra `fast` is there."""
        return self.is_uint8 and self.device.type == "cpu" and importlib.util.find_spec("numba") is not None

    @cached_property
    def proxy_norms(self) -> Tensor:
        """`|P v_i|^2`, `(N,)` float32."""
        return torch.cat([part.square().sum(1) for part in self.proxy.split(BLOCK)])

    # ---- making and opening -------------------------------------------------------------------------

    @classmethod
    @explained()
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
        flip: bool = False,
        skip_broken: bool = False,
        latents: Latents | str | Path | None = None,
        force: bool = False,
        progress: bool = False,
    ) -> Bank:
        """Builds a bank, or opens it if the cache already holds it.

        Arguments:
            source: a path or a known name (`digits`, `mnist5k`, `mnist`, ...), an array or tensor of pictures
                (uint8, or floats in [-1, 1]), a map-style data set, or the folder of a built bank, which is opened.
            out: folder of the bank. By default it goes to the cache (`$GOLDDIFF_CACHE`); a bank of an array or
                data set without `out` lives in memory.
            labels, split, size, limit, layout, flip, skip_broken: see `golddiff.open_source`.
            latents: hold the latents of the pictures: `golddiff.Latents`, or the folder of an autoencoder. For a bank
                that is built already, what decodes it, if its folder has moved.
            force: replace `out` if it exists.
            progress: show progress bars.

        Raises:
            GolddiffError: a source that cannot be read, or an `out` that exists.
        """
        options: dict[str, Any] = {
            "split": split,
            "size": size,
            "limit": limit,
            "layout": layout,
            "flip": flip,
            "skip_broken": skip_broken,
        }
        coder = latents if latents is None or isinstance(latents, Latents) else latents_in(latents)
        from_path = isinstance(source, str | Path)
        telling = options if coder is None else {**options, "latents": coder.identity}
        known = None  # what tells this source from others; to know it, all of its files are looked at
        if from_path and out is None:
            if (Path(source) / META).is_file():
                return cls._open_as_is(Path(source), options)._decoding(coder)
            out = cached_path(source, telling)
            known = out.name
            if (out / META).exists() and not force:
                return cls.open(out)._decoding(coder)
        elif out is not None:
            _check_free(Path(out), force)
        out = None if out is None else Path(out)
        images = open_source(source, labels=labels, **options)
        stated: dict[str, Any] = {"name": source_name(source) if from_path else "array", **options}
        if coder is not None:
            images, stated["latents"] = coder.encoded(images), coder.stated
        if out is None:
            size = math.prod(images.shape)
            together = min(len(images), block_of(size))
            require(
                len(images) * size * images.dtype.itemsize + 2 * together * size * 8,
                f"a bank of {len(images)} images in memory",
                "give out=, and it is written to a folder and mapped",
            )
            arrays: dict[str, np.ndarray] = {}

            def in_memory(name: str, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
                return arrays.setdefault(name, np.empty(shape, dtype))

            meta = fill(images, stated, in_memory, Journal(None, math.prod(images.shape), len(images)), progress)
            return cls(arrays, meta)._decoding(coder)
        if known is None:
            known = stamp(source, telling) if from_path or isinstance(source, Images) else secrets.token_hex(4)
        with growing_folder(out, known, lambda part: (part / JOURNAL).exists()) as folder:
            if folder is not None:
                cls._fill_folder(folder, images, stated, progress)
        bank = cls.open(out)
        if {key: bank.source.get(key) for key in stated} != stated:
            raise GolddiffError(f"{out} has meanwhile been built from something else: choose another folder")
        return bank._decoding(coder)

    def _decoding(self, coder: Latents | None) -> Bank:
        return self if coder is None else self.with_latents(coder)

    @classmethod
    def _fill_folder(cls, folder: Path, images: Images, stated: dict[str, Any], progress: bool) -> None:
        """Writes a bank into a folder, or what is missing of it."""

        def on_disk(name: str, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
            file = folder / f"{name}.npy"
            array = None
            with suppress(OSError, ValueError, EOFError):  # not there, or half made
                array = np.lib.format.open_memmap(file, "r+")
            if array is None or array.shape != shape or array.dtype != dtype:
                array = np.lib.format.open_memmap(file, "w+", dtype, shape)
            if hasattr(os, "posix_fallocate"):  # a full disk is an error here, not a crash later
                with file.open("r+b") as opened:
                    os.posix_fallocate(opened.fileno(), 0, array.offset + array.nbytes)
            return array

        journal = Journal(folder / JOURNAL, math.prod(images.shape), len(images))
        meta = fill(images, stated, on_disk, journal, progress)
        with ThreadPoolExecutor() as pool:
            hashes = pool.map(hash_file, [folder / f"{name}.npy" for name in ARRAYS])
            meta["hashes"] = dict(zip(ARRAYS, hashes, strict=True))
        meta["edges"] = {name: hash_edges(folder / f"{name}.npy") for name in ARRAYS}
        write_json(folder / META, sealed(meta))
        bank = cls.open(folder)
        if bank.D <= LARGEST_EIGENBASIS:  # larger: when it is first needed
            bar = Bar(total=1, desc="spectrum", disable=None if progress else True)
            with bar, suppress(DoesNotFit):  # methods without it work all the same
                bank.spectrum()
                bar.update()
        for name in (JOURNAL, "digests.npy"):  # in this order
            (folder / name).unlink(missing_ok=True)

    @classmethod
    @explained()
    def open(cls, path: str | Path) -> Bank:
        """Opens a built bank; its arrays are mapped, not read but for their edges, which are checked."""
        path = Path(path)
        if not (path / META).is_file():
            raise GolddiffError(f"{path} is not a bank (it has no {META}): make one with golddiff bank build")
        meta = _read_meta(path / META)
        arrays = {name: _mapped(path / f"{name}.npy", meta) for name in ARRAYS}
        if wrong := misfit(arrays):
            raise GolddiffError(f"{path}/{wrong}.npy does not fit the pixels: build the bank again")
        return cls(arrays, meta, path)

    @classmethod
    def _open_as_is(cls, path: Path, options: dict[str, Any]) -> Bank:
        """A built bank; options that say how to build one are refused."""
        given = [
            f"--{n.replace('_', '-')}"
            for n, value in options.items()
            if value not in (None, "train") and value is not False
        ]
        if given:
            raise GolddiffError(f"{path} is a built bank: give {', '.join(given)} when building it from its source")
        return cls.open(path)

    def check_files(self) -> None:
        """Refuses to go on where a file was cut short since it was opened: to read there would end the process."""
        for name, file in self._files.items():
            if file.size() < len(file):
                raise GolddiffError(f"{name}.npy of {self.path} was cut short while in use: build the bank again")

    def verify(self) -> list[str]:
        """Checks every byte of the bank's files against the hashes of the build; `[]` if all is well.

        Raises:
            GolddiffError: the bank lives in memory.
        """
        if self.path is None:
            raise GolddiffError("this bank lives in memory, or is a view: it has no files to verify")
        wrong = []
        if not as_written(self.path / META):
            wrong.append(f"{META}: its content was changed")
        for name in ARRAYS:
            if hash_file(self.path / f"{name}.npy") != (self.meta.get("hashes") or {}).get(name):
                wrong.append(f"{name}.npy: its bytes are not those of the build")
        if not wrong and self.fingerprint != fingerprint(self.pixels.cpu(), self.labels.cpu()):
            wrong.append("the fingerprint is not that of the pixels and labels")
        return wrong + self._derived.damaged()

    def to(self, device: str | torch.device) -> Bank:
        """The same bank with its arrays on `device`."""
        if torch.device(device) == self.device:
            return self
        if self._whole is not None:
            kept = "recompute" if self._own_statistics else "keep"
            return self._whole.to(device).without(self.removed, statistics=kept)
        arrays = {n: getattr(self, n) if n == "ids" else getattr(self, n).to(device) for n in ARRAYS}
        moved = Bank(arrays, self.meta, self.path)
        moved._latents = self._latents
        return moved

    def without(
        self, rows: Sequence[int] | Tensor = (), labels: int | Sequence[int] = (), *, statistics: str = "recompute"
    ) -> Bank:
        """This bank without some images: the same files, and the same numbers for the rows that stay.

        A denoiser of it is that of a bank built without these images; rows that stay draw the same lots.

        Arguments:
            rows: numbers of images. labels: classes.
            statistics: mean, covariance and so masks, of the images that stay (`recompute`), or still of all (`keep`),
                so that nothing but the rows changes.

        Raises:
            GolddiffError: a row or class that is not there, or nothing left.
        """
        if statistics not in ("recompute", "keep"):
            raise unknown("statistics", statistics, ("recompute", "keep"))
        whole = self.whole
        gone = [self.removed, whole._checked_rows(rows)]
        if isinstance(labels, Tensor | np.ndarray):
            labels = labels.tolist()
        if not isinstance(labels, Sequence | int) or isinstance(labels, str):
            raise GolddiffError(f"labels is {labels!r}: give a class, or a list of classes")
        for label in [labels] if isinstance(labels, int) else labels:
            if not (label is None or type(label) is int):
                raise GolddiffError(f"label {label!r}: give a whole number")
            there = whole.rows_of(label)
            if there is None:
                raise GolddiffError(f"label {label} stands for all images: give a class")
            gone.append(there)
        removed = torch.cat(gone).unique()
        if len(removed) == 0:
            return whole
        if len(removed) == len(whole.pixels):
            raise GolddiffError("no image is left: remove fewer")
        view = copy.copy(whole)
        view.removed, view._whole, view._own_statistics = removed, whole, statistics == "recompute"
        view.path, view._rows = None, {}
        said = f"{whole.fingerprint} without {removed.tolist()}, {statistics}"
        view.fingerprint = hashlib.blake2b(said.encode(), digest_size=16).hexdigest()
        view._of_rows = Derived(None, view.fingerprint)
        if view._own_statistics:
            view._derived = view._of_rows
        return view

    def _checked_rows(self, rows: Sequence[int] | Tensor) -> Tensor:
        wrong = GolddiffError(f"rows must be a list of whole numbers from 0 to {len(self.pixels) - 1}")
        try:
            chosen = torch.as_tensor(rows, device=self.device)
        except (TypeError, ValueError, RuntimeError, OverflowError) as error:
            raise wrong from error
        if chosen.numel() == 0:
            return chosen.flatten().long()
        whole = not (chosen.is_floating_point() or chosen.is_complex() or chosen.dtype == torch.bool)
        if not whole or chosen.ndim != 1 or bool(((chosen < 0) | (chosen >= len(self.pixels))).any()):
            raise wrong
        return chosen.long()

    @property
    def whole(self) -> Bank:
        """This bank with the images that were removed."""
        return self._whole or self

    @property
    def rows(self) -> Tensor:
        """The numbers of all images but those removed, ascending `(n,)`."""
        if NO_LABEL not in self._rows:
            there = torch.ones(len(self.pixels), dtype=torch.bool, device=self.device)
            self._rows[NO_LABEL] = there.index_fill_(0, self.removed, False).nonzero()[:, 0]
        return self._rows[NO_LABEL]

    # ---- reading -------------------------------------------------------------------------------------

    def rows_of(self, label: int | None) -> Tensor | None:
        """Rows of a class, ascending `(n,)`; for None or -1 None, which stands for all, or those that were not removed.

        Raises:
            GolddiffError: no row has this label.
        """
        if label is None or label == NO_LABEL:
            return self.rows if len(self.removed) else None
        if label not in self._rows:
            rows = (self.labels == label).nonzero()[:, 0] if abs(label) < 2**63 else self.labels[:0]
            rows = rows[~torch.isin(rows, self.removed)]
            if len(rows) == 0:
                there = [n for n in self.labels[self.rows].unique().tolist() if n != NO_LABEL]
                listed = f"{', '.join(map(str, there[:12]))}{', ...' if len(there) > 12 else ''}"
                raise GolddiffError(
                    f"no image has label {label}: " + (f"labels here are {listed}" if there else "this bank has none")
                )
            self._rows[label] = rows
        return self._rows[label]

    def centred(
        self, rows: Tensor | slice, dtype: torch.dtype, out: Tensor | None = None, pixels: Tensor | None = None
    ) -> Tensor:
        """`v` of some rows, `(n, D)`, or of some of their pixels, `(n, P)`; written into the first rows of `out` if
        given."""
        if pixels is not None:
            assert isinstance(rows, Tensor)  # noqa: S101 - the pair is one index
            some = self.pixels.flatten(1)[rows[:, None], pixels]
            self.bytes_read += some.nbytes
            return some.to(dtype).sub_(self.centre[pixels])
        chosen = self.pixels[rows].flatten(1)
        self.bytes_read += chosen.numel() * chosen.element_size()
        if out is None:
            return torch.sub(chosen, self.centre.to(dtype)).to(dtype)
        return out[: len(chosen)].copy_(chosen).sub_(self.centre)

    def blocks(
        self, rows: Tensor | None, dtype: torch.dtype, size: int | None = None
    ) -> Iterator[tuple[slice, Tensor | slice, Tensor]]:
        """All rows, or some, block by block: yields `(part, rows, v)` with `v` `(n, D)` in a buffer that is used again.

        Arguments:
            rows: `(n,)`; None for all.
            size: rows of a block; by default as many as stay in a processor's cache.
        """
        count = len(self.pixels) if rows is None else len(rows)
        size = max(1, min(size or max(256, BLOCK_NUMBERS // self.D), count))
        buffer = self._spare.pop(dtype, None)  # large memory that comes and goes leaves holes
        if buffer is None or len(buffer) < size:
            buffer = torch.empty(size, self.D, dtype=dtype, device=self.device)
        try:
            for start in range(0, count, size):
                part = slice(start, min(start + size, count))
                chosen = part if rows is None else rows[part]
                yield part, chosen, self.centred(chosen, dtype, buffer)
        finally:
            if buffer.nbytes <= LARGEST_SPARE:
                self._spare[dtype] = buffer

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
        q = ((x_t.flatten(1).double() - alpha * origin) / sigma).to(x_t.dtype)
        s = (self.scale * alpha / sigma)[:, 0].to(x_t.dtype)
        if not bool((q.square().sum(1) + (255 * s).square() * self.D).isfinite().all()):
            raise beyond(x_t.dtype)
        return q, s

    def distances(self, q: Tensor, s: Tensor, rows: Tensor) -> Tensor:
        """`|q - s v_i|^2` of some rows by differences in float64, `(n,)`, for one image: q `(D,)`, s `()`."""
        q, s = q.double(), s.double()
        if self.compiled and len(rows) * self.D >= WORTH_COMPILING:
            return self._compiled_distances(q, s, rows, np.float64)
        out = torch.empty(len(rows), dtype=torch.float64, device=q.device)
        for part, _, v in self.blocks(rows, torch.float64):
            out[part] = torch.sub(q, v.mul_(s), out=v).square_().sum(1)
        return out

    def rough_distances(self, q: Tensor, s: Tensor, rows: Tensor) -> tuple[Tensor, float]:
        """As `distances`, in float32 by a compiled loop, and a bound of their errors."""
        out = self._compiled_distances(q.double(), s.double(), rows, np.float32)
        eps, longest = float(np.finfo(np.float32).eps), math.sqrt(float(out.max()))
        reach = float((q + s * self.centre).norm()) + float(s) * 255 * math.sqrt(self.D)
        return out, eps * longest * ((self.D / 64 + 16) * longest + 4 * reach)

    def _compiled_distances(self, q: Tensor, s: Tensor, rows: Tensor, kind: Any) -> Tensor:
        from . import kernels

        kernels.use_threads_of_torch()
        self.bytes_read += len(rows) * self.D
        shifted = (q + s * self.centre.double()).numpy().astype(kind)
        measure = kernels.distances_in(kind)
        return torch.from_numpy(measure(self.pixels.flatten(1).numpy(), shifted, kind(float(s)), rows.numpy()))

    @property
    def has_eigenbasis(self) -> bool:
        """Whether `spectrum()` is an eigenbasis."""
        if self._whole is not None and not self._own_statistics:
            return self._whole.has_eigenbasis
        return min(self.D, len(self), STATISTICS_ROWS) <= LARGEST_EIGENBASIS

    def spectrum(self, label: int | None = None) -> Statistics:
        """Mean and covariance of all rows, or of a class; computed once and kept in the bank.

        An eigenbasis (`Spectrum`), or where `min(N, D)` is over 4,096 the covariance itself (`DenseCovariance`). Of
        more than 65,536 rows that many are taken, those with the smallest keys: a random sample, whatever their order.
        """
        if self._whole is not None and not self._own_statistics:
            return self._whole.spectrum(label)
        if self._whole is not None and label in (None, NO_LABEL) and self._few_are_gone():
            return Spectrum(**self.keep("spectrum", lambda: vars(self._reduced())))
        rows = self._sampled(self.rows_of(label))
        name = "" if label in (None, NO_LABEL) else f"-{label}"
        if min(self.D, len(self) if rows is None else len(rows)) <= LARGEST_EIGENBASIS:
            return Spectrum(**self.keep(f"spectrum{name}", lambda: vars(compute_spectrum(self._rows_for(rows)))))
        return DenseCovariance(**self.keep(f"covariance{name}", lambda: vars(compute_covariance(self._rows_for(rows)))))

    def _few_are_gone(self) -> bool:
        """Whether it is less work to take what was removed out of the statistics than to sum over what is left."""
        if len(self.pixels) > STATISTICS_ROWS or self.D > LARGEST_EIGENBASIS:
            return False
        return len(self.pixels) >= SUMMED_ANEW and 2 * len(self.removed) < len(self.pixels)

    def _reduced(self) -> Spectrum:
        assert self._whole is not None  # noqa: S101 - asked for of views only
        whole = self._whole.spectrum()
        assert isinstance(whole, Spectrum)  # noqa: S101 - of this size it is
        gone = self._whole.images(self.removed, torch.float64).flatten(1)
        return reduced_spectrum(whole, len(self.pixels), gone.cpu())

    def _sampled(self, rows: Tensor | None) -> Tensor | None:
        """The rows whose statistics are taken."""
        count = len(self) if rows is None else len(rows)
        if count <= STATISTICS_ROWS:
            return rows
        keys = (self.keys if rows is None else self.keys[rows]).cpu()
        chosen = torch.from_numpy(np.sort(np.argpartition(keys.numpy(), STATISTICS_ROWS)[:STATISTICS_ROWS]))
        return chosen.to(self.device) if rows is None else rows[chosen.to(self.device)]

    def _rows_for(self, rows: Tensor | None) -> Rows:
        count = len(self) if rows is None else len(rows)

        def blocks(size: int, dtype: torch.dtype) -> Iterator[Tensor]:
            for start in range(0, count, size):
                part = slice(start, min(start + size, count))
                yield self.centred(part if rows is None else rows[part], dtype).cpu()

        centre = self.centre.cpu()
        largest = float(torch.maximum(centre, 255 - centre).max()) if self.is_uint8 else None
        return Rows(blocks, count, centre, self.scale, self.offset, largest)

    def keep(
        self,
        name: str,
        compute: Callable[[], dict[str, Tensor]],
        remember: bool = True,
        *,
        of_rows: bool = False,
        fits: Callable[[dict[str, Tensor]], bool] | None = None,
    ) -> dict[str, Tensor]:
        """Tensors derived from this bank, see `Derived.get`.

        Arguments:
            of_rows: they depend on which rows are there, so a view does not share them even if it keeps statistics.
        """
        return (self._of_rows if of_rows else self._derived).get(name, compute, remember, fits)

    def keep_at_most(self, size: int) -> None:
        """From now on puts at most so many bytes beside the bank; what is more is derived again when it is needed."""
        self._derived.left = size


def _check_free(out: Path, force: bool) -> None:
    """Refuses a folder that is there, and with `force` one that is no bank."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    if not force:
        raise GolddiffError(f"{out} exists: choose another folder, or give --force to replace a bank")
    if not (out / META).is_file():
        raise GolddiffError(f"{out} exists and is no bank, so it is not replaced: choose another folder")


def _read_meta(file: Path) -> dict[str, Any]:
    """The metadata of a bank, checked."""
    again = "build the bank again"
    meta = read_json(file, again)
    if not isinstance(meta, dict) or meta.get("format") != FORMAT:
        version = meta.get("format") if isinstance(meta, dict) else None
        raise GolddiffError(f"{file} is of format {version}, this is {FORMAT}: {again}")
    if meta.get("checksum") != checksum(meta):
        raise GolddiffError(f"{file} was changed after it was written: {again}")
    for key, kind in (("arrays", dict), ("classes", list), ("source", dict), ("fingerprint", str)):
        if not isinstance(meta.get(key), kind):
            raise GolddiffError(f"{file} is damaged ({key} is no {kind.__name__}): {again}")
    if not all(isinstance(name, str) for name in (*meta["classes"], meta["source"].get("name"))):
        raise GolddiffError(f"{file} is damaged (names are no text): {again}")
    return meta


def _mapped(file: Path, meta: dict[str, Any]) -> np.ndarray:
    """An array of a bank, if its file begins and ends as it was built."""
    try:
        if hash_edges(regular(file)) != (meta.get("edges") or {}).get(file.stem):
            raise ValueError("it is not the file of the build")
        # copy-on-write: torch wants writable memory, the file is never written to
        array: np.ndarray = np.lib.format.open_memmap(file, "c")
    except Exception as error:  # a file that is damaged fails in any way
        if is_lack(error):
            raise
        raise GolddiffError(f"{file} cannot be opened ({error}): build the bank again") from error
    found, stated = described(array), meta["arrays"].get(file.stem)
    if found != stated:
        raise GolddiffError(f"{file} is {found}, not {stated}: build the bank again")
    return array


def _tensor(array: Any) -> Tensor:
    return array if isinstance(array, Tensor) else torch.from_numpy(array)
