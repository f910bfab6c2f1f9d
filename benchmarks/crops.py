"""Banks of any size from 1,000 real photographs: crops of random place and scale, some mirrored.

    python benchmarks/crops.py 15000 --out crops15k
    python benchmarks/crops.py 15000 --classes 398 --out animals

Crop i is a function of the seed and i alone, so a smaller bank is the beginning of a larger one; crop i is of
photograph i modulo the number of classes. Crops of one photograph resemble each other more than the images of a true
data set do. Needs GOLDDIFF_DATA.
"""

import argparse
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image

import golddiff as gd
from golddiff.images import Images
from golddiff.images.source import find_source


def crops(count: int, size: int = 64, seed: int = 0, classes: int = 1000) -> Images:
    """`count` crops of `size x size`, labelled by the photograph's class."""
    folders = sorted(path for path in Path(find_source("imagenet_sample")).iterdir() if path.is_dir())[:classes]
    files = [next(iter(sorted(folder.iterdir()))) for folder in folders]

    @cache
    def photograph(i: int) -> Image.Image:
        with Image.open(files[i]) as image:
            return image.convert("RGB")

    def crop(i: int) -> np.ndarray:
        image = photograph(i % len(files))
        random = np.random.default_rng([seed, i])
        side = int(random.integers(min(size, *image.size), min(image.size) + 1))
        left, top = (int(random.integers(0, full - side + 1)) for full in image.size)
        box = (left, top, left + side, top + side)
        pixels = np.asarray(image.resize((size, size), Image.Resampling.LANCZOS, box)).transpose(2, 0, 1)
        return pixels[..., ::-1] if random.random() < 0.5 else pixels

    def read(start: int, stop: int) -> np.ndarray:
        with ThreadPoolExecutor() as pool:
            return np.stack(list(pool.map(crop, range(start, stop))))

    labels = np.arange(count) % len(files)
    ids = [f"{files[label].stem} {seed}-{i}" for i, label in enumerate(labels)]
    return Images((3, size, size), np.dtype(np.uint8), labels, ids, read, tuple(file.stem for file in files))


def crops_bank(count: int, out: str | Path) -> gd.Bank:
    """The bank of `count` crops in a folder, built if it is not there."""
    out = Path(out)
    return gd.Bank.open(out) if out.exists() else gd.Bank.build(crops(count), out, progress=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("count", type=int)
    parser.add_argument("--out", type=Path, required=True, help="folder of the bank")
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--classes", type=int, default=1000, help="of the first so many classes")
    args = parser.parse_args()
    print(gd.Bank.build(crops(args.count, args.size, args.seed, args.classes), args.out, progress=True))


if __name__ == "__main__":
    main()
