"""CIFAR-10 and CIFAR-100 in their binary version (`data_batch_1.bin`, ...)."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from ..errors import GolddiffError
from ..foreign import read_text, regular
from ..memory import require
from .arrays import from_array
from .core import Images

__all__ = ["find_cifar", "read_cifar"]

PIXELS = 3 * 32 * 32
LARGEST_NAMES = 2**20  # bytes of a list of names of classes
CONVERT = (
    "python -c \"import pickle, numpy as np; d = [pickle.load(open(f, 'rb'), encoding='latin1') for f in [{files}]]; "
    "np.savez('cifar.npz', images=np.concatenate([b['data'] for b in d]).reshape(-1, 3, 32, 32), "
    "labels=np.concatenate([b['{labels}'] for b in d]))\""
)


def find_cifar(folder: Path, split: str) -> list[Path]:
    """The binary batches of a split, [] if the folder has none; the pickled version is refused with the remedy."""
    ten, hundred = folder / "data_batch_1", folder / "meta"
    if ten.exists() or (hundred.exists() and (folder / "train").is_file()):
        names = [f"'data_batch_{i}'" for i in range(1, 6)] if ten.exists() else ["'train'"]
        convert = CONVERT.format(files=", ".join(names), labels="labels" if ten.exists() else "fine_labels")
        raise GolddiffError(
            f"{folder} holds CIFAR's pickled version, and pickles are never read here; take the binary version, or, "
            f"if you trust the files, convert them there with: {convert}"
        )
    batches = sorted(folder.glob("data_batch_*.bin")) or sorted(folder.glob("train.bin"))
    tests = sorted(folder.glob("test_batch.bin")) or sorted(folder.glob("test.bin"))
    if not batches and not tests:
        return []
    chosen = {"train": batches, "test": tests}.get(split, [])
    if not chosen:
        raise GolddiffError(f"{folder} has no split '{split}': it holds CIFAR's binary train and test batches")
    return chosen


def read_cifar(files: list[Path]) -> Images:
    """Pictures and labels of binary batches; CIFAR-100's fine labels."""
    hundred = files[0].name in ("train.bin", "test.bin")
    head = 2 if hundred else 1
    parts = []
    require(3 * sum(regular(file).stat().st_size for file in files), str(files[0].parent), "take fewer batches")
    for file in files:
        data = np.fromfile(file, dtype=np.uint8)
        if len(data) == 0 or len(data) % (head + PIXELS):
            raise GolddiffError(f"{file} holds {len(data)} bytes, no multiple of {head + PIXELS}: fetch it again")
        parts.append(data.reshape(-1, head + PIXELS))
    records = np.concatenate(parts)
    names = files[0].with_name("fine_label_names.txt" if hundred else "batches.meta.txt")
    classes = tuple(read_text(names, LARGEST_NAMES).split()) if names.exists() else ()
    pixels = records[:, head:].reshape(-1, 3, 32, 32)
    return from_array(pixels, records[:, head - 1], layout="NCHW", classes=classes)
