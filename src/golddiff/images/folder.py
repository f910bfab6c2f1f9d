"""Folders of pictures: flat, or one folder (with any folders below it) for each class."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import GolddiffError
from ..foreign import regular
from .core import NO_LABEL, Images
from .pictures import EncodedPicture, decoded

__all__ = ["SPLITS", "SUFFIXES", "by_first_folder", "only_train", "read_folder"]

SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".ppm", ".pgm"}
SPLITS = {"train", "test", "val", "valid", "validation"}


def read_folder(folder: Path, split: str, **options: Any) -> Images:
    """Pictures of a folder in the order of their paths; the first level of sub-folders are the classes.

    A folder whose sub-folders are all called train, test, val, ... is a data set with splits, and the one
    named `split` is read.
    """
    below = {p.name for p in folder.iterdir() if p.is_dir() and not p.name.startswith(".")}
    if below and below <= SPLITS:
        if split not in below:
            raise GolddiffError(f"{folder} has no split '{split}': it has {', '.join(sorted(below))}")
        folder = folder / split
    else:
        only_train(folder, split)
    files = sorted(_pictures_below(folder), key=Path.as_posix)
    if not files:
        raise GolddiffError(f"{folder} holds no pictures ({', '.join(sorted(SUFFIXES))}), nor do its sub-folders")
    ids = [file.relative_to(folder).as_posix() for file in files]
    labels, classes = by_first_folder(ids)

    def fetch(i: int) -> EncodedPicture:
        return EncodedPicture(str(files[i]), regular(files[i]))

    return decoded(len(files), fetch, labels, ids, classes, **options)


def only_train(source: object, split: str) -> None:
    """Refuses a split of what has no parts."""
    if split != "train":
        raise GolddiffError(f"{source} has no split '{split}': it has no parts, leave --split out")


def by_first_folder(names: list[str]) -> tuple[np.ndarray, tuple[str, ...]]:
    """Labels and class names from the first folder of each path; no labels if all lie at the top."""
    tops = [name.split("/")[0] if "/" in name else "" for name in names]
    classes = sorted(set(tops))
    if classes == [""]:
        return np.full(len(names), NO_LABEL, dtype=np.int64), ()
    if "" in classes:
        stray = names[tops.index("")]
        raise GolddiffError(
            f"there are pictures beside class folders ({stray}, {classes[1]}/): move them into class "
            "folders too, or all pictures into one folder"
        )
    numbers = {name: i for i, name in enumerate(classes)}
    return np.array([numbers[top] for top in tops], dtype=np.int64), tuple(classes)


def _pictures_below(folder: Path) -> Iterator[Path]:
    def refuse(error: OSError) -> None:
        raise error

    seen = set()
    for top, folders, names in os.walk(folder, onerror=refuse, followlinks=True):
        there = Path(top).stat()
        if (there.st_dev, there.st_ino) in seen:  # links in a ring, or links to links whose number grows without end
            raise GolddiffError(f"{top} is a folder that links lead to twice: remove the link")
        seen.add((there.st_dev, there.st_ino))
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in names:
            if Path(name).suffix.lower() in SUFFIXES and not name.startswith("."):
                yield Path(top) / name
