"""Folders of pictures: flat, or one folder for each class."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from ..errors import GolddiffError
from .core import NO_LABEL, Images
from .pictures import EncodedPicture, decoded

__all__ = ["read_folder"]

SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".ppm", ".pgm"}
SPLITS = {"train", "test", "val", "valid", "validation"}


def read_folder(folder: Path, split: str, size: int | None = None) -> Images:
    """Pictures of a folder in the order of their names; the names of sub-folders are the classes.

    A folder whose sub-folders are all called train, test, val, ... is a data set with splits, and the one
    named `split` is read.
    """
    below = {p.name for p in folder.iterdir() if p.is_dir() and not p.name.startswith(".")}
    if below and below <= SPLITS:
        if split not in below:
            raise GolddiffError(f"{folder} has no split '{split}': it has {', '.join(sorted(below))}")
        folder = folder / split
    flat = _pictures_in(folder)
    by_class = {
        sub.name: files
        for sub in sorted(p for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))
        if (files := _pictures_in(sub))
    }
    if flat and by_class:
        raise GolddiffError(
            f"{folder} has pictures beside class folders ({flat[0].name}, {next(iter(by_class))}/): "
            "move them into a class folder"
        )
    if not flat and not by_class:
        raise GolddiffError(f"{folder} holds no pictures ({', '.join(sorted(SUFFIXES))}) and no class folders")
    files = flat or [file for group in by_class.values() for file in group]
    classes = tuple(by_class)
    labels = (
        np.full(len(files), NO_LABEL, dtype=np.int64)
        if flat
        else np.repeat(np.arange(len(classes)), [len(group) for group in by_class.values()])
    )
    ids = [file.relative_to(folder).as_posix() for file in files]

    def fetch(start: int, stop: int) -> list[EncodedPicture]:
        return [EncodedPicture(str(file), file) for file in files[start:stop]]

    return decoded(len(files), fetch, labels, ids, classes, size)


def _pictures_in(folder: Path) -> list[Path]:
    return sorted(
        p for p in folder.iterdir()
        if p.suffix.lower() in SUFFIXES and not p.name.startswith(".") and p.is_file()
    )  # fmt: skip
