"""Files made by others, read within bounds: no number in such a file is used as a size before it is checked."""

from __future__ import annotations

import errno
import json
import math
import os
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from .errors import GolddiffError
from .memory import in_words, require

__all__ = ["INFLATED", "LARGEST_TEXT", "Npz", "open_zip", "opened_entry", "parse_json", "read_text", "regular"]

LARGEST_TEXT = 2**28
INFLATED = 1100  # bytes that a byte of deflate can become (1,032), and some for small files
JSON_MEMORY = 64  # bytes that a byte of JSON can become: `[[],[],...]`
ENTRY_MEMORY = 24  # bytes that a byte of a zip's table of contents can become
ZIP_ENDS = ((b"PK\5\6", 12, 4), (b"PK\6\6", 40, 8))  # records that say how long that table is: mark, place, width
ZIP_TAIL = 2**16 + 98  # bytes from the end in which they lie


def regular(path: Path) -> Path:
    """The path, if a file lies there.

    Raises:
        GolddiffError: it is a pipe, a device, a socket, or a link that leads nowhere: reading it may never end.
        FileNotFoundError: nothing is there.
    """
    if not path.is_file():
        if not path.exists() and not path.is_symlink():
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))
        kind = "a pipe, a socket or a device" if path.exists() else "a link that leads nowhere"
        raise GolddiffError(f"{path} is no file but {kind}: remove it, or give a regular file")
    return path


def read_text(path: Path, most: int = LARGEST_TEXT) -> str:
    """The UTF-8 text of a file of at most so many bytes.

    Raises:
        GolddiffError: a larger one, or none. OSError, UnicodeDecodeError: one that cannot be read.
    """
    with regular(path).open("rb") as file:
        data = file.read(min(most, path.stat().st_size) + 1)
    if len(data) > most:
        raise GolddiffError(f"{path} has more than {in_words(most)} of text: shorten it")
    return data.decode("utf-8")


def parse_json(text: str | bytes) -> Any:
    """What JSON says.

    Raises:
        ValueError: it is none, nests too deeply, or needs more memory than there is.
    """
    if len(text) > 2**16:
        require(JSON_MEMORY * len(text), "reading this much JSON", "shorten it")
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("its brackets nest too deeply") from error


def open_zip(path: Path) -> zipfile.ZipFile:
    """A zip whose table of contents fits into memory.

    Raises:
        GolddiffError: it does not, or the file is no zip.
    """
    try:
        with regular(path).open("rb") as file:
            size = file.seek(0, 2)
            file.seek(max(0, size - ZIP_TAIL))
            table = min(size, _longest_table(file.read()))
        require(ENTRY_MEMORY * table, f"the table of contents of {path}", "make several smaller zips")
        return zipfile.ZipFile(path)
    except (GolddiffError, PermissionError):
        raise
    except Exception as error:  # a file that is none fails in any way
        raise GolddiffError(f"{path} is not a readable zip ({error}): make it again") from error


def _longest_table(tail: bytes) -> int:
    """The most that any record says at the end of a zip; which of them counts is for zipfile to find out."""
    longest = 0
    for mark, place, width in ZIP_ENDS:
        at = tail.find(mark)
        while at >= 0:
            stated = tail[at + place : at + place + width]
            longest = max(longest, int.from_bytes(stated, "little") if stated != b"\xff" * width else 0)
            at = tail.find(mark, at + 1)
    return longest


@contextmanager
def opened_entry(archive: zipfile.ZipFile, entry: zipfile.ZipInfo, most: int) -> Iterator[BinaryIO]:
    """The bytes of an entry of a zip; it gives no more of them than it announces, and that at most `most`.

    Raises:
        GolddiffError: it announces more, or more than its bytes can give, or is packed in a way whose size is not
            known before (bzip2, LZMA), or is encrypted.
    """
    said = f"{archive.filename}: {entry.filename} announces {in_words(entry.file_size)}"
    if entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED) or entry.flag_bits & 1:
        raise GolddiffError(f"{archive.filename}: {entry.filename} is neither plain nor deflated: pack it so")
    if entry.file_size > most:
        raise GolddiffError(f"{said}, more than the {in_words(most)} that it may have: make it smaller")
    if entry.file_size > INFLATED * (entry.compress_size + 1):
        raise GolddiffError(f"{said}, more than {in_words(entry.compress_size)} can be packed from: make the zip again")
    with archive.open(entry) as stream:
        yield stream  # type: ignore[misc]


class Npz:
    """The arrays of a `.npz` file as `numpy.load` gives them, but none is made before its header is checked.

    Arguments:
        path: of the file.

    Attributes:
        files: the names of the arrays.

    Raises:
        GolddiffError: here and when an array is asked for: a damaged file, objects, or headers that announce something
            else than there is, or more than fits into memory.
    """

    def __init__(self, path: Path) -> None:
        try:
            self._archive = open_zip(path)
        except GolddiffError as error:
            raise GolddiffError(f"{path} is not a readable NumPy file ({error}): save it again") from error
        self._path = path
        self._entries = {entry.filename.removesuffix(".npy"): entry for entry in self._archive.infolist()}
        self.files = list(self._entries)

    def __enter__(self) -> Npz:
        return self

    def __exit__(self, *_: object) -> None:
        self._archive.close()

    def __getitem__(self, name: str) -> np.ndarray:
        try:
            with opened_entry(self._archive, self._entries[name], 2**63) as stream:
                self._check(name, stream)
                array: np.ndarray = np.lib.format.read_array(stream, allow_pickle=False)
                if stream.read(1):
                    raise ValueError("bytes after the last number")
                return array
        except (KeyError, GolddiffError):
            raise
        except Exception as error:  # a file that is damaged fails in any way
            reason = str(error)[:120]
            raise GolddiffError(
                f"{self._path}: {name} is damaged or holds objects, not numbers ({reason}): save it again"
            ) from error

    def _check(self, name: str, stream: BinaryIO) -> None:
        """Refuses an array whose header announces something else than its entry holds."""
        if np.lib.format.read_magic(stream) != (1, 0):
            raise ValueError("a header of another version than 1.0")
        shape, _, dtype = np.lib.format.read_array_header_1_0(stream)
        size, stated = math.prod(shape) * dtype.itemsize, self._entries[name].file_size - stream.tell()
        if dtype.hasobject:
            raise ValueError("objects would run code")
        if size != stated or min(shape, default=0) < 0:
            raise GolddiffError(
                f"{self._path}: {name} announces {dtype} of shape {shape} and its entry {stated} bytes: save it again"
            )
        require(size, f"{self._path}: {name}", "take fewer pictures, or save them as .npy, which is mapped")
        stream.seek(0)
