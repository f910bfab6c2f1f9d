"""Encoded pictures (PNG, JPEG, ...) of one shape: headers are checked first, pixels decoded when read."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from ..errors import GolddiffError
from ..memory import require
from .core import Images

__all__ = ["LARGEST_FILE", "EncodedPicture", "decoded"]

LARGEST_SIDE = 4096
LARGEST_PIXELS = 2**26
LARGEST_RUNS = 2**22  # pixels of a BMP in runs, which Pillow fills in one by one
LARGEST_FILE = 2**28  # bytes of one encoded picture
HELD = 2**26  # bytes of encoded pictures after which they are decoded
GROUP = 64  # or so many of them
THREADS = 4
DECODING = 16  # bytes for each pixel while a picture is decoded
FORMATS = ("PNG", "JPEG", "BMP", "GIF", "TIFF", "WEBP", "PPM")  # Pillow knows more; for one it starts a program
GREY = ("1", "L", "LA")
EIGHT_BIT = (*GREY, "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr")


@dataclass(frozen=True)
class EncodedPicture:
    """One picture in its file format: where it comes from, and its bytes or its path."""

    name: str
    source: Path | bytes


def decoded(
    count: int,
    fetch: Callable[[int], EncodedPicture],
    labels: np.ndarray,
    ids: Sequence[str],
    classes: tuple[str, ...] = (),
    *,
    size: int | None = None,
    skip_broken: bool = False,
    limit: int | None = None,
) -> Images:
    """Images from encoded pictures.

    All headers are read before anything else, so that sizes which differ are an error before any work.
    Grey if every picture is grey, else RGB. With `size`, a picture is cut to the central square and resized
    to `size x size` (Lanczos filter with antialiasing).

    Arguments:
        count: N.
        fetch: `fetch(i)` gives the encoded picture i.
        size: the side of the result; None keeps the pictures' own size, which must be the same for all.
        limit: stop after so many pictures.
        skip_broken: leave out pictures that cannot be used (each is decoded once to find out).
    """
    if size is not None and not 1 <= size <= LARGEST_SIDE:
        raise GolddiffError(f"size is {size}: give a side of 1 to {LARGEST_SIDE} pixels")
    first: tuple[str, tuple[int, int]] | None = None
    grey, most = True, 0
    kept: list[int] = []
    skipped: list[str] = []
    for i in range(count):
        if limit is not None and len(kept) == limit:
            break
        picture = None
        try:
            picture = fetch(i)
            side, mode = _header(picture)
            if skip_broken:
                _pixels(picture, mode in GREY, size)
        except GolddiffError:
            if not skip_broken:
                raise
            skipped.append(picture.name if picture else ids[i])
            continue
        kept.append(i)
        most = max(most, math.prod(side))
        grey = grey and mode in GREY
        first = first or (picture.name, side)
        if size is None and side != first[1]:
            raise GolddiffError(
                f"pictures differ in size: {first[0]} is {first[1][0]}x{first[1][1]}, "
                f"{picture.name} is {side[0]}x{side[1]}; give --size N to bring them to N x N"
            )
    if first is None:
        raise GolddiffError("there are no pictures that can be read: a bank needs at least one")
    width, height = (size, size) if size else first[1]
    shape = (1 if grey else 3, height, width)

    def read(start: int, stop: int) -> np.ndarray:
        wanted = kept[start:stop]
        needed = (len(wanted) + GROUP) * math.prod(shape) + THREADS * DECODING * most
        require(needed, f"{len(wanted)} pictures of {width} x {height}", "make them smaller, with --size")
        out = np.empty((len(wanted), *shape), dtype=np.uint8)
        done = 0
        with ThreadPoolExecutor(THREADS) as pool:
            for group in _held(fetch, wanted):
                for picture, pixels in zip(group, pool.map(lambda p: _pixels(p, grey, size), group), strict=True):
                    if pixels.shape != shape:
                        raise GolddiffError(f"{picture.name} has other sides than its header announces: remove it")
                    out[done] = pixels
                    done += 1
        return out

    return Images(shape, np.dtype(np.uint8), labels[kept], [ids[i] for i in kept], read, classes, tuple(skipped))


def _held(fetch: Callable[[int], EncodedPicture], wanted: Sequence[int]) -> Iterator[list[EncodedPicture]]:
    """Encoded pictures in groups that fit into memory."""
    group: list[EncodedPicture] = []
    held = 0
    for i in wanted:
        picture = fetch(i)
        group.append(picture)
        held += len(picture.source) if isinstance(picture.source, bytes) else 0
        if held >= HELD or len(group) == GROUP:
            yield group
            group, held = [], 0
    if group:
        yield group


def _open(picture: EncodedPicture) -> Image.Image:
    source = picture.source
    image = Image.open(source if isinstance(source, Path) else io.BytesIO(source), formats=FORMATS)
    most = LARGEST_RUNS if "bmp_rle" in str(getattr(image, "tile", [])[:1]) else LARGEST_PIXELS
    if image.width * image.height > most:
        image.close()
        raise GolddiffError(
            f"{picture.name} has {image.width} x {image.height} pixels, more than {most}: make it smaller"
        )
    return image


def _header(picture: EncodedPicture) -> tuple[tuple[int, int], str]:
    """Size (as seen upright) and mode, from the header alone; refuses what is not an 8-bit still picture."""
    try:
        with _open(picture) as image:
            deep = _is_deep(image)
            if image.mode not in EIGHT_BIT or deep:
                kind = f"{image.mode} of 16 bits" if deep else image.mode
                raise GolddiffError(
                    f"{picture.name} has pixels of mode {kind}, not 8-bit: convert it to 8 bits a channel"
                )
            if getattr(image, "is_animated", False):  # to count its frames would take as long as it has many
                raise GolddiffError(f"{picture.name} is animated, or has several pages: save one of them")
            sideways = image.getexif().get(0x0112, 1) >= 5  # EXIF orientations 5 to 8 swap the sides
            size = (image.height, image.width) if sideways else image.size
            return size, image.mode
    except GolddiffError:
        raise
    except Exception as error:  # decoders of foreign files fail in any way
        raise _broken(picture, error) from error


def _is_deep(image: Image.Image) -> bool:
    """Whether the file has 16 bits a channel, which Pillow reads as 8 without a word."""
    tiles = str(getattr(image, "tile", [])[:1])
    return (image.format in ("PNG", "TIFF") and ";16" in tiles) or (image.format == "PPM" and "65535" in tiles)


def _pixels(picture: EncodedPicture, grey: bool, size: int | None) -> np.ndarray:
    """`(C, H, W)` uint8."""
    try:
        with _open(picture) as opened:
            image = ImageOps.exif_transpose(opened)
            if "A" in image.getbands() or "transparency" in image.info:
                image = image.convert("RGBA")
                if image.getchannel("A").getextrema()[0] != 255:
                    raise GolddiffError(f"{picture.name} is partly transparent: flatten it onto a background")
            image = image.convert("L" if grey else "RGB")
            if size is not None:
                image = _square(image).resize((size, size), Image.Resampling.LANCZOS)
            pixels = np.asarray(image)
    except GolddiffError:
        raise
    except Exception as error:  # decoders of foreign files fail in any way
        raise _broken(picture, error) from error
    return pixels[None] if grey else np.moveaxis(pixels, 2, 0)


def _square(image: Image.Image) -> Image.Image:
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    return image.crop((left, top, left + side, top + side))


def _broken(picture: EncodedPicture, error: Exception) -> GolddiffError:
    unknown_kind = isinstance(error, UnidentifiedImageError)
    reason = "of no known kind" if unknown_kind else str(error).split("\n")[0][:120]
    return GolddiffError(f"{picture.name} cannot be read as a picture ({reason}): remove it, or give --skip-broken")
