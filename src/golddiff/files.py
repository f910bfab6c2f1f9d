"""Files and folders that appear under their names only when they are complete, and where the cache lies."""

from __future__ import annotations

import hashlib
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from .errors import GolddiffError

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None  # type: ignore[assignment]

__all__ = [
    "cache_folder",
    "growing_folder",
    "half_written",
    "hash_edges",
    "hash_file",
    "holding",
    "is_empty",
    "replacing",
    "save_tensors",
    "sweep",
]

EDGE = 2**16  # bytes
WRITER = 2**21  # bytes, more than what the writer of safetensors takes beside the tensors
LOCK = ".lock"
HALF_WRITTEN = re.compile(r"\.[0-9a-f]{8}-.+|\.tmp[A-Za-z0-9]{6}")


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


def save_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Writes a safetensors file, which appears only when it is complete."""
    with replacing(path) as part:
        bytearray(WRITER)  # or MemoryError: where this does not fit, the writer would end the process
        try:
            save_file(tensors, part, metadata=metadata)
        except SafetensorError as error:
            raise OSError(str(error)) from error


def half_written(path: Path) -> bool:
    """Whether a file was left by a process that was killed while it wrote: of `replacing`, or of safetensors."""
    return HALF_WRITTEN.fullmatch(path.name) is not None


def is_empty(folder: Path) -> bool:
    """Whether a folder holds nothing but what killed processes left."""
    return all(path.name.startswith(LOCK) or half_written(path) for path in folder.iterdir())


def sweep(folder: Path, before: float) -> None:
    """Removes what killed processes left half-written in a folder before a time (of `time.time`)."""
    for path in folder.iterdir():
        with suppress(OSError):  # another process may sweep too
            if half_written(path) and path.stat().st_mtime < before:
                path.unlink()


@contextmanager
def growing_folder(out: Path, stamp: str, worth_keeping: Callable[[Path], bool]) -> Iterator[Path | None]:
    """Gives a folder to fill, which becomes `out` at the end. It holds what an interrupted call with this stamp left.

    Others that want the same `out` wait until this one is done, and are given None then.

    Arguments:
        out: where it goes; what is there stays until then, and is replaced.
        stamp: of what is made.
        worth_keeping: whether what is in the folder is kept when filling fails; else it is removed.
    """
    folder, note = out.with_name(f".{out.name}-part"), "stamp"
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        before = out.stat().st_ino if out.exists() else None
        with _locked(out.with_name(f".{out.name}-lock")):
            if out.exists() and out.stat().st_ino != before:
                yield None
                return
            if not (folder / note).is_file() or (folder / note).read_text() != stamp:
                shutil.rmtree(folder, ignore_errors=True)
                folder.mkdir()
                (folder / note).write_text(stamp)
            try:
                yield folder
                (folder / note).unlink()
                _take_place(folder, out)
            finally:
                if folder.exists() and not worth_keeping(folder):
                    shutil.rmtree(folder, ignore_errors=True)
    except OSError as error:
        raise GolddiffError(
            f"{out} cannot be written ({error.strerror or error}): make room there, or choose another folder"
        ) from error


@contextmanager
def holding(folder: Path, part: tuple[int, int] | None = None) -> Iterator[None]:
    """Makes a folder and keeps it for this process while it works there. A lock that a killed process left is no lock.

    Arguments:
        part: `(i, n)` for the i-th of n processes that share the work of this folder; None for one that does all of it.

    Raises:
        GolddiffError: another process works there, or the folder cannot be written to.
    """
    busy = f"another process is at work in {folder}: wait until it has ended, or choose another --out"
    with ExitStack() as locks:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            locks.enter_context(_locked(folder / LOCK, busy, shared=part is not None))
            if part is not None:
                locks.enter_context(_locked(folder / f"{LOCK}-{part[0] + 1}-of-{part[1]}", busy))
        except FileExistsError as error:
            raise GolddiffError(f"{folder} is a file: choose another --out") from error
        except OSError as error:
            raise GolddiffError(
                f"{folder} cannot be written to ({error.strerror or error}): make room there, or choose another --out"
            ) from error
        yield


@contextmanager
def _locked(path: Path, busy: str | None = None, *, shared: bool = False) -> Iterator[None]:
    """Holds a lock file, which the last to hold it removes.

    While another process holds it, waits; or, where it says `busy`, raises that as an error.
    """
    if fcntl is None:  # where there are no such locks
        yield
        return
    kind = (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (fcntl.LOCK_NB if busy else 0)
    while True:
        file = path.open("w")
        try:
            fcntl.flock(file, kind)
        except BlockingIOError as error:
            file.close()
            raise GolddiffError(busy or "") from error
        except OSError:  # a file system without locks
            break
        if path.exists() and path.stat().st_ino == os.fstat(file.fileno()).st_ino:
            break  # nobody has removed it meanwhile
        file.close()
    try:
        yield
    finally:
        with suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # fails while others share it
            path.unlink(missing_ok=True)
        file.close()


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


def hash_edges(path: Path) -> str:
    """128-bit hash of the size, the beginning and the end of a file: quick, whatever its size."""
    digest = hashlib.blake2b(digest_size=16)
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        for start in (0, max(EDGE, size - EDGE)):
            file.seek(start)
            digest.update(file.read(EDGE))
    digest.update(size.to_bytes(8, "little"))
    return digest.hexdigest()


def hash_file(path: Path) -> str:
    """128-bit hash of the bytes of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()
