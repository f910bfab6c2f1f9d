"""What is fuzzed: for each reader a file name, valid files to begin from, and what is done with a file.

`attempt(target, data, folder)` gives one input to one reader. It is right if the reader succeeds or raises a
`GolddiffError`, and neither writes outside of the folder nor runs anything.
"""

from __future__ import annotations

import gzip
import io
import json
import os
import shutil
import struct
import sys
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import yaml
from PIL import Image, PngImagePlugin

import golddiff as gd
from golddiff.files import hash_edges
from golddiff.jsons import sealed
from golddiff.prepare import described
from golddiff.recipe import DEFAULTS, Recipe, comparison, read_settings

__all__ = ["TARGETS", "Finding", "attempt", "seeds", "without_checksums"]

COLOUR = np.random.default_rng(0).integers(0, 256, (4, 5, 7, 3), dtype=np.uint8)
LABELS = np.array([0, 1, 1, 2])
MOST_PIXELS = 2**22  # of a picture of which all of a source are read; of larger ones the first
FORBIDDEN = {
    "subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.fork", "os.kill", "pickle.find_class",
    "socket.connect", "socket.bind", "os.symlink", "os.link",
}  # fmt: skip
CHANGING = {"os.chmod", "os.chown", "os.mkdir", "os.remove", "os.rename", "os.rmdir", "os.truncate", "shutil.rmtree"}
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


class Finding(BaseException):
    """A reader did what no input may make it do. Not an `Exception`, so that no reader can catch it."""


@dataclass(frozen=True)
class Target:
    """A reader.

    Arguments:
        file: the name that an input gets.
        make: the valid inputs to begin from.
        use: reads the file.
        change: what becomes of an input before it is written.
    """

    file: str
    make: Callable[[], list[bytes]]
    use: Callable[[Path], Any]
    change: Callable[[bytes], bytes] = bytes


def attempt(target: str, data: bytes, folder: Path) -> bool:
    """Gives an input to a reader, in a folder that is emptied before; whether it was accepted.

    Raises:
        Finding: something else than success or a `GolddiffError`.
    """
    chosen = TARGETS[target]
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    (folder / chosen.file).write_bytes(chosen.change(data))
    around = sorted(folder.parent.iterdir())
    with _watched(folder) as wrong:
        try:
            chosen.use(folder / chosen.file)
            accepted = True
        except gd.GolddiffError as error:
            accepted = False
            if "\n" in str(error):
                wrong.append("a message of several lines")
    if sorted(folder.parent.iterdir()) != around:
        wrong.append(f"files beside the folder: {[path.name for path in folder.parent.iterdir()]}")
    if wrong:
        raise Finding("; ".join(wrong))
    return accepted


@contextmanager
def _watched(folder: Path) -> Iterator[list[str]]:
    """Notes what is written outside of a folder, or run, meanwhile."""
    if not _watching:
        sys.addaudithook(_note)  # for good: it cannot be removed
        _watching.append(True)
    _state["folder"], _state["wrong"] = f"{folder}/", []
    try:
        yield _state["wrong"]
    finally:
        _state["folder"] = None


_watching: list[bool] = []
_state: dict[str, Any] = {"folder": None, "wrong": []}


def _note(event: str, values: tuple[Any, ...]) -> None:
    if _state["folder"] is None:
        return
    if event in FORBIDDEN:
        _state["wrong"].append(f"{event} {values!r:.200}")
    elif event in CHANGING or (event == "open" and isinstance(values[2], int) and values[2] & WRITING):
        place = os.path.abspath(os.fsdecode(values[0])) if isinstance(values[0], str | bytes | os.PathLike) else ""  # noqa: PTH100
        if place and not place.startswith(_state["folder"]):
            _state["wrong"].append(f"{event} {place}")


@contextmanager
def without_checksums() -> Iterator[None]:
    """Checksums of PNG, zip and tar are taken as right: who makes a hostile file computes them, a fuzzer does not."""
    places = [(PngImagePlugin.ChunkStream, "crc"), (zipfile.ZipExtFile, "_update_crc"), (tarfile, "calc_chksums")]
    before = [getattr(owner, name) for owner, name in places]
    PngImagePlugin.ChunkStream.crc = PngImagePlugin.ChunkStream.crc_skip
    zipfile.ZipExtFile._update_crc = lambda *_: None
    tarfile.calc_chksums = lambda _: range(2**62)
    try:
        yield
    finally:
        for (owner, name), value in zip(places, before, strict=True):
            setattr(owner, name, value)


def seeds(target: str) -> list[bytes]:
    """Valid inputs of a target."""
    return TARGETS[target].make()


# ---- pictures ----------------------------------------------------------------------------------------


def _read(path: Path, **options: Any) -> None:
    images = gd.open_source(path, **options)
    count = len(images) if np.prod(images.shape) <= MOST_PIXELS else 1
    for start in range(0, count, 8):
        images.read(start, min(start + 8, count))


def _read_folder(path: Path) -> None:
    _read(path.parent)
    _read(path.parent, size=8, skip_broken=True)


def _encoded(kind: str, mode: str = "RGB", picture: int = 0, **options: Any) -> bytes:
    file = io.BytesIO()
    Image.fromarray(COLOUR[picture]).convert(mode).save(file, kind, **options)
    return file.getvalue()


def _turned() -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = 6
    return exif


def _png() -> list[bytes]:
    text = PngImagePlugin.PngInfo()
    text.add_text("Title", "x" * 40, zip=True)
    frames = [Image.fromarray(COLOUR[1])]
    return [
        *(_encoded("PNG", mode) for mode in ("1", "L", "LA", "P", "RGB", "RGBA", "I;16")),
        _encoded("PNG", pnginfo=text),
        _encoded("PNG", exif=_turned()),
        _encoded("PNG", save_all=True, append_images=frames),
    ]


def _jpeg() -> list[bytes]:
    return [
        *(_encoded("JPEG", mode) for mode in ("L", "RGB", "CMYK")),
        _encoded("JPEG", progressive=True, exif=_turned()),
    ]


def _gif() -> list[bytes]:
    moving = _encoded("GIF", save_all=True, append_images=[Image.fromarray(COLOUR[1])])
    return [_encoded("GIF", "L"), _encoded("GIF", "P", interlace=1), moving]


def _tiff() -> list[bytes]:
    packed = [_encoded("TIFF", compression=name) for name in ("raw", "tiff_lzw", "tiff_deflate", "packbits", "jpeg")]
    return [*packed, _encoded("TIFF", "1", compression="group4"), _encoded("TIFF", "CMYK"), _encoded("TIFF", "I;16")]


def _ppm() -> list[bytes]:
    text = b"P3 2 2 255\n" + b" ".join(b"%d" % i for i in range(12))
    return [
        _encoded("PPM"),
        _encoded("PPM", "L"),
        _encoded("PPM", "1"),
        text,
        b"P1 3 2\n101010",
        b"P5 2 2 65535\n12345678",
    ]


# ---- archives ----------------------------------------------------------------------------------------


def _zip() -> list[bytes]:
    packed = []
    for method, listed in ((zipfile.ZIP_STORED, True), (zipfile.ZIP_DEFLATED, False)):
        file = io.BytesIO()
        with zipfile.ZipFile(file, "w", method) as archive:
            names = [f"{label:05d}/{i}.png" for i, label in enumerate(LABELS)]
            for i, name in enumerate(names):
                archive.writestr(name, _encoded("PNG", picture=i))
            if listed:
                pairs = [[name, int(label)] for name, label in zip(names, LABELS, strict=True)]
                archive.writestr("dataset.json", json.dumps({"labels": pairs}))
        packed.append(file.getvalue())
    return packed


def _tar() -> list[bytes]:
    packed = []
    for kind in (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        file = io.BytesIO()
        with tarfile.open(fileobj=file, mode="w", format=kind) as archive:
            for i, label in enumerate(LABELS[:2]):
                long = f"{'long' * 30}-ü" if i and kind != tarfile.USTAR_FORMAT else "short"
                said = json.dumps({"label": int(label)}).encode() if i else b"%d" % label
                for name, data in (
                    (f"{long}.png", _encoded("PNG", picture=i)),
                    (f"{long}.{'json' if i else 'cls'}", said),
                ):
                    info = tarfile.TarInfo(name)
                    info.size = len(data)
                    archive.addfile(info, io.BytesIO(data))
        packed.append(file.getvalue()[:-8192])  # less of the zeros at the end
    return packed


def _parquet() -> list[bytes]:
    packed = []
    cells = [_encoded("PNG", picture=i) for i in range(4)]
    for column, options in (
        ([{"bytes": cell, "path": None} for cell in cells], {}),
        (cells, {"compression": "gzip", "row_group_size": 2, "data_page_version": "2.0"}),
        (cells, {"compression": "none", "use_dictionary": False}),
    ):
        file = io.BytesIO()
        info = {"info": {"features": {"label": {"names": ["a", "b", "c"]}}}}
        table = pa.table({"image": column, "label": LABELS})
        pq.write_table(table.replace_schema_metadata({"huggingface": json.dumps(info)}), file, **options)
        packed.append(file.getvalue())
    return packed


# ---- arrays ------------------------------------------------------------------------------------------


def _idx() -> list[bytes]:
    grey = COLOUR[..., 0]
    return [struct.pack(">HBB", 0, 8, 3) + struct.pack(">3I", *grey.shape) + grey.tobytes()]


def _packed(data: bytes) -> bytes:
    return data if data[:2] == b"\x1f\x8b" else gzip.compress(data, 1)


def _npy() -> list[bytes]:
    packed = []
    for array in (COLOUR, np.asfortranarray(COLOUR[..., 0]), (COLOUR / 127.5 - 1).astype(np.float32)):
        file = io.BytesIO()
        np.save(file, array)
        packed.append(file.getvalue())
    return packed


def _npz() -> list[bytes]:
    packed = []
    for save in (np.savez, np.savez_compressed):
        file = io.BytesIO()
        save(file, images=COLOUR, labels=LABELS)
        packed.append(file.getvalue())
    return packed


def _cifar() -> list[bytes]:
    return [bytes(range(256)) * 12 + b"x", b"\1" + b"y" * 3072 + b"\2" + b"z" * 3072]


# ---- what golddiff itself writes ---------------------------------------------------------------------


def _bank() -> gd.Bank:
    if not _banks:
        _banks.append(gd.Bank.build(COLOUR, labels=LABELS))
    return _banks[0]


_banks: list[gd.Bank] = []


def _recipes() -> list[bytes]:
    whole, _ = Recipe.resolve(_bank(), {"method": "golddiff", "steps": 3, "labels": [1], "seeds": "0-3"})
    some = {"method": "pca", "options": {"mask_rule": "published"}, "seeds": [1, 2], "schedule": "edm", "start": 0.5}
    lists = {"bank": "mnist", "methods": ["golddiff:retrieval=paper", "optimal"], "seeds": "0-7"}
    return [json.dumps(asdict(whole)).encode(), yaml.safe_dump(some).encode(), yaml.safe_dump(lists).encode()]


def _read_recipe(path: Path) -> None:
    with suppress(gd.GolddiffError):
        comparison(str(path))
    settings = read_settings(path)
    Recipe.resolve(_bank(), {key: value for key, value in settings.items() if key in DEFAULTS})


def _calibrations() -> list[bytes]:
    return [json.dumps({"windows": [[0.1, 3], [1.5, 5], [20.0, 7]], "method": "ls"}).encode()]


def _bank_files() -> list[bytes]:
    """Each file of a bank, after its number."""
    scratch = Path(os.environ.get("GOLDDIFF_FUZZ_BANK", ""))
    return [bytes([i]) + (scratch / name).read_bytes() for i, name in enumerate(_names(scratch))]


def _names(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def _use_bank(path: Path) -> None:
    """Puts an input in the place of a file of a bank, with what the other files say of it made right."""
    data, whole, folder = path.read_bytes(), Path(os.environ["GOLDDIFF_FUZZ_BANK"]), path.parent / "bank"
    shutil.copytree(whole, folder)
    names = _names(whole)
    name = names[(data[0] if data else 0) % len(names)]
    (folder / name).write_bytes(data[1:])
    with suppress(Exception):  # it is no array, or no metadata: the bank need not open
        meta = json.loads((folder / "bank.json").read_text())
        if name.endswith(".npy"):
            stem = name.removesuffix(".npy")
            meta["edges"][stem] = hash_edges(folder / name)
            meta["arrays"][stem] = described(np.lib.format.open_memmap(folder / name, "r"))
        (folder / "bank.json").write_text(json.dumps(sealed(meta)))
    bank = gd.Bank.open(folder)
    bank.verify()
    x = bank.images(slice(0, 1))
    gd.denoiser("optimal", bank)(x, gd.Noise(0.7, 0.7))
    gd.denoiser("wiener", bank)(x, gd.Noise(0.7, 0.7))


TARGETS = {
    "png": Target("a.png", _png, _read_folder),
    "jpeg": Target("a.jpg", _jpeg, _read_folder),
    "gif": Target("a.gif", _gif, _read_folder),
    "bmp": Target("a.bmp", lambda: [_encoded("BMP", mode) for mode in ("1", "L", "RGB")], _read_folder),
    "tiff": Target("a.tiff", _tiff, _read_folder),
    "webp": Target("a.webp", lambda: [_encoded("WEBP"), _encoded("WEBP", lossless=True)], _read_folder),
    "ppm": Target("a.ppm", _ppm, _read_folder),
    "zip": Target("a.zip", _zip, _read),
    "tar": Target("a.tar", _tar, _read),
    "parquet": Target("a.parquet", _parquet, _read),
    "idx": Target("train-images-idx3-ubyte", _idx, _read),
    "idx.gz": Target("train-images-idx3-ubyte.gz", _idx, _read, _packed),
    "npy": Target("a.npy", _npy, _read),
    "npz": Target("a.npz", _npz, _read),
    "cifar": Target("data_batch_1.bin", _cifar, _read),
    "recipe": Target("recipe.yaml", _recipes, _read_recipe),
    "calibration": Target("c.json", _calibrations, lambda path: gd.denoiser("ls", _bank(), window=str(path))),
    "bank": Target("input", _bank_files, _use_bank),
}


def prepare_bank(folder: Path) -> None:
    """Builds the bank whose files the target `bank` replaces."""
    gd.Bank.build(torch.from_numpy(COLOUR), folder, labels=LABELS, layout="NHWC")
    os.environ["GOLDDIFF_FUZZ_BANK"] = str(folder)
