"""Pictures in archives: zips of EDM's kind (with `dataset.json`) and webdataset tar shards."""

from __future__ import annotations

import re
import tarfile
import zipfile
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from ..errors import GolddiffError
from ..foreign import open_zip, opened_entry, parse_json, regular
from .core import NO_LABEL, Images, as_labels
from .folder import SPLITS, SUFFIXES, by_first_folder
from .pictures import LARGEST_FILE, EncodedPicture, decoded

__all__ = ["find_shards", "read_tars", "read_zip"]

LABELS = "dataset.json"
LARGEST_LIST = 2**28  # bytes of that
LARGEST_NOTE = 2**20  # bytes of the label of a sample in a tar
EXTRA = (tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK, tarfile.SOLARIS_XHDTYPE)
LARGEST_HEADER = 2**16  # bytes of what a tar says of a file beyond its name and size


def read_zip(path: Path, **options: Any) -> Images:
    """Pictures of a zip in the order of their names.

    Labels come from `dataset.json` (`{"labels": [["00000/img00000000.png", 6], ...]}`, or null for none) if the
    zip has one, else from the names of its folders. Nothing is unpacked to disk.
    """
    archive = open_zip(path)
    entries = [e for e in archive.infolist() if _is_picture(e.filename)]
    entries.sort(key=lambda e: e.filename)
    _check_sizes(path, [(e.filename, e.file_size) for e in entries])
    names = [e.filename for e in entries]
    classes: tuple[str, ...] = ()
    if LABELS in archive.namelist():
        try:
            listed = parse_json(_read(path, archive, archive.getinfo(LABELS), LARGEST_LIST))
        except ValueError as error:
            raise GolddiffError(f"{path}: {LABELS} cannot be read ({error}): write it again") from error
        labels = _listed_labels(path, listed, names)
    else:
        labels, classes = by_first_folder(names)

    def fetch(i: int) -> EncodedPicture:
        return EncodedPicture(f"{path.name}/{names[i]}", _read(path, archive, entries[i], LARGEST_FILE))

    return decoded(len(entries), fetch, labels, names, classes, **options)


def find_shards(folder: Path, split: str) -> list[Path]:
    """The tar shards of a split (named so, or the only kind there is); [] if the folder has none."""
    files = sorted(folder.glob("*.tar"))
    chosen = [f for f in files if _says(f, split)]
    if files and not chosen and (split != "train" or any(_says(f, other) for other in SPLITS for f in files)):
        raise GolddiffError(f"{folder} has no split '{split}': it holds {', '.join(f.name for f in files[:6])}")
    return chosen or files


def _says(file: Path, split: str) -> bool:
    return re.search(rf"(?<![a-z]){re.escape(split)}(?![a-z])", file.name) is not None


def read_tars(files: list[Path], **options: Any) -> Images:
    """Pictures of webdataset shards, one after the other.

    A sample is the files that share a name up to the first dot of its last part; its label is the number in its
    `.cls` file, or `cls` or `label` in its `.json` file.
    """
    samples: list[tuple[Path, str, int, int]] = []
    labels: list[int] = []
    for file in files:
        index = _index(file)
        _check_sizes(file, [(name, size) for name, (_, size, _) in index.items()])
        for name, (offset, size, label) in index.items():
            samples.append((file, name, offset, size))
            labels.append(label)

    def fetch(i: int) -> EncodedPicture:
        file, name, offset, size = samples[i]
        with file.open("rb") as stream:
            stream.seek(offset)
            return EncodedPicture(f"{file.name}/{name}", stream.read(size))

    ids = [f"{file.name}/{name}" for file, name, _, _ in samples]
    return decoded(len(samples), fetch, as_labels(labels), ids, **options)


class _Header(tarfile.TarInfo):
    """A header of a tar whose size is one. Negative sizes would make tarfile read in circles, and long extra headers
    take it a time that grows with their square."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> _Header:
        header = super().frombuf(buf, encoding, errors)
        extra = header.type not in tarfile.SUPPORTED_TYPES or header.type in (*EXTRA, tarfile.XHDTYPE, tarfile.XGLTYPE)
        if header.size < 0 or (extra and header.size > LARGEST_HEADER):
            raise tarfile.ReadError(f"a header announces {header.size} bytes")
        return header


def _index(file: Path) -> dict[str, tuple[int, int, int]]:
    """Pictures of a shard, in order: name -> (offset, size, label)."""
    pictures: dict[str, tuple[str, int, int]] = {}
    labels: dict[str, int] = {}
    try:
        length = regular(file).stat().st_size
        with tarfile.open(file, "r:", tarinfo=_Header) as archive:
            for member in archive:
                archive.members = []  # type: ignore[attr-defined]  # else it keeps all
                if not 0 <= member.size <= length - member.offset_data or member.issparse():
                    raise tarfile.ReadError(f"{member.name} announces {member.size} bytes, which are not there")
                path = PurePosixPath(member.name)
                if not member.isreg() or not path.name:
                    continue
                stem, _, ending = path.name.partition(".")
                key = str(path.with_name(stem or path.name))
                if _is_picture(member.name):
                    if key in pictures:
                        raise GolddiffError(f"{file}: sample {key} has two pictures; one is expected")
                    pictures[key] = (member.name, member.offset_data, member.size)
                elif ending in ("cls", "json") and member.size <= LARGEST_NOTE:
                    stream = archive.extractfile(member)
                    labels[key] = _label(file, member.name, stream.read() if stream else b"")
    except GolddiffError:
        raise
    except (tarfile.TarError, OSError, EOFError, ValueError, IndexError, RecursionError) as error:
        raise GolddiffError(f"{file} is not a readable, uncompressed tar ({error}): make it again") from error
    return {name: (offset, size, labels.get(key, NO_LABEL)) for key, (name, offset, size) in pictures.items()}


def _label(file: Path, name: str, text: bytes) -> int:
    try:
        value = parse_json(text)
    except ValueError:
        value = None
    if isinstance(value, dict):
        value = value.get("cls", value.get("label", NO_LABEL))
    if type(value) is not int:
        raise GolddiffError(f"{file}: {name} holds no label: a whole number is expected")
    return value


def _listed_labels(path: Path, listed: Any, names: list[str]) -> np.ndarray:
    pairs = listed.get("labels") if isinstance(listed, dict) else listed
    if pairs is None:
        return np.full(len(names), NO_LABEL, dtype=np.int64)
    wrong = GolddiffError(f'{path}: labels in {LABELS} are not like [["00000/img00000000.png", 6], ...]: write them so')
    if not isinstance(pairs, list):
        raise wrong
    known: dict[str, int] = {}
    for pair in pairs:
        if not isinstance(pair, list) or len(pair) != 2 or not isinstance(pair[0], str) or type(pair[1]) is not int:
            raise wrong
        if known.setdefault(pair[0], pair[1]) != pair[1]:
            raise GolddiffError(f"{path}: {LABELS} gives {pair[0]} two labels: give one")
    missing = next((name for name in names if name not in known), None)
    if missing is not None:
        raise GolddiffError(f"{path}: {LABELS} has no label for {missing}: list all pictures, or none")
    return as_labels([known[name] for name in names])


def _is_picture(name: str) -> bool:
    path = PurePosixPath(name)
    return path.suffix.lower() in SUFFIXES and not path.name.startswith(".") and "__MACOSX" not in path.parts


def _check_sizes(path: Path, sizes: list[tuple[str, int]]) -> None:
    if not sizes:
        raise GolddiffError(f"{path} holds no pictures ({', '.join(sorted(SUFFIXES))})")
    for name, size in sizes:
        if size > LARGEST_FILE:
            raise GolddiffError(f"{path}: {name} announces {size} bytes, more than a picture has")


def _read(path: Path, archive: zipfile.ZipFile, entry: zipfile.ZipInfo, most: int) -> bytes:
    try:
        with opened_entry(archive, entry, most) as stream:
            return stream.read(most)
    except GolddiffError:
        raise
    except Exception as error:  # a zip that is damaged fails in any way
        raise GolddiffError(f"{path}: {entry.filename} cannot be read ({error}): make the zip again") from error
