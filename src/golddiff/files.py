"""Files and folders that appear under their names only when they are complete, and where the cache lies."""

from __future__ import annotations

import errno
import hashlib
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .errors import GolddiffError

__all__ = ["cache_folder", "fresh_folder", "hash_file", "replacing"]


def cache_folder() -> Path:
    """`$GOLDDIFF_CACHE`, by default `golddiff` in the user's cache folder."""
    default = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "golddiff"
    return Path(os.environ.get("GOLDDIFF_CACHE") or default)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Gives another name to write to; it becomes `path` at the end, and is removed if anything fails."""
    part = path.with_name(f".{secrets.token_hex(4)}-{path.name}")
    try:
        yield part
        part.replace(path)
    except OSError as error:
        raise GolddiffError(
            f"{path} cannot be written ({error.strerror or error}): make room, or choose another"
        ) from error
    finally:
        part.unlink(missing_ok=True)


@contextmanager
def fresh_folder(out: Path, replace: bool) -> Iterator[Path]:
    """Gives a folder to fill; it becomes `out` at the end.

    Arguments:
        out: where it goes; what is there stays until then.
        replace: take the place of what is there; if False, what has appeared there meanwhile is kept.
    """
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    except OSError as error:
        raise GolddiffError(f"{out.parent} cannot be written to ({error.strerror}): choose another folder") from error
    try:
        folder.chmod(0o755)
        yield folder
        if replace or not out.exists():
            _take_place(folder, out)
    except OSError as error:
        if not replace and out.exists() and error.errno in (errno.ENOTEMPTY, errno.EEXIST):
            return
        raise GolddiffError(f"{out} cannot be written ({error.strerror or error}): make room there") from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _take_place(folder: Path, out: Path) -> None:
    """Renames `folder` to `out`; what was at `out` is removed after that, or comes back if it fails."""
    if not out.exists():
        folder.rename(out)
        return
    old = folder.with_name(folder.name + "-old")
    out.rename(old)
    try:
        folder.rename(out)
    except BaseException:
        old.rename(out)
        raise
    if old.is_dir():
        shutil.rmtree(old, ignore_errors=True)
    else:
        old.unlink()


def hash_file(path: Path) -> str:
    """128-bit hash of the bytes of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()
