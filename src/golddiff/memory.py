"""Whether work fits into memory, said before it begins."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from .errors import GolddiffError

try:
    import resource
except ImportError:  # not on Windows
    resource = None  # type: ignore[assignment]

__all__ = ["DoesNotFit", "explained", "in_words", "is_lack", "require", "room"]

ENDLESS = 2**60  # limits that are none
GROUPS = Path("/sys/fs/cgroup")


class DoesNotFit(GolddiffError):
    """Work that takes more memory than there is."""


def room() -> int | None:
    """Bytes that this process can still take: the least of what the machine, its control groups and its own limits
    leave. None where the system does not say."""
    left = [bytes_ for bytes_ in (_of_machine(), *_of_groups(), _of_address_space()) if bytes_ is not None]
    return max(0, min(left)) if left else None


def require(needed: int, what: str, advice: str) -> None:
    """Refuses work that takes more memory than there is.

    Arguments:
        needed: bytes at its peak.
        what: what takes them, for the message. advice: what to do instead.

    Raises:
        DoesNotFit: it does not.
    """
    left = room()
    if left is not None and needed > left:
        raise DoesNotFit(f"{what} needs {in_words(needed)} of memory and {in_words(left)} is left: {advice}")


@contextmanager
def explained(advice: str = "close other programs, or give smaller batches") -> Iterator[None]:
    """Says in one line that memory ran out, whoever found out: Python, NumPy, torch or the system. Also a decorator.

    Raises:
        DoesNotFit: in the place of their errors.
    """
    try:
        yield
    except (MemoryError, RuntimeError, OSError) as error:
        if not is_lack(error):
            raise
        left = room()
        said = "" if left is None else f", {in_words(left)} is left"
        reason = f" ({str(error)[:100]})" if str(error) else ""
        raise DoesNotFit(f"there is too little memory for this{said}{reason}: {advice}") from error


def is_lack(error: Exception) -> bool:
    """Whether an error says that memory ran out."""
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    told = ("allocate memory", "out of memory", "start new thread")
    return isinstance(error, MemoryError) or any(words in str(error) for words in told)


def in_words(count: float) -> str:
    """`3221225472` -> `3.0 GiB`."""
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.1f} {unit}" if unit != "bytes" else f"{int(count)} bytes"
        count /= 1024
    return f"{count:.1f} TiB"


def _of_machine() -> int | None:
    with suppress(OSError, ValueError, IndexError):
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    with suppress(OSError, ValueError, AttributeError):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return None


def _of_groups() -> Iterator[int | None]:
    """What the control groups of this process leave; files that are mapped count as free, as they can be let go."""
    lines: list[str] = []
    with suppress(OSError):
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    for line in lines:
        number, kinds, path = line.split(":", 2)
        if number == "0":
            yield from _limits(GROUPS, path, "memory.max", "memory.current", "inactive_file")
        elif "memory" in kinds.split(","):
            root = GROUPS / "memory"
            yield from _limits(root, path, "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")


def _limits(root: Path, path: str, most: str, used: str, mapped: str) -> Iterator[int | None]:
    """What each group from `path` up to the root leaves. In a container the path may be that outside of it."""
    folder = root / path.strip("/")
    for group in dict.fromkeys([folder, *folder.parents, root]):
        if group != root and root not in group.parents:
            continue
        with suppress(OSError, ValueError):
            limit = int((group / most).read_text())
            if limit < ENDLESS:
                stated = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
                yield limit - int((group / used).read_text()) + int(stated.get(mapped, 0))


def _of_address_space() -> int | None:
    if resource is None:
        return None
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    if limit == resource.RLIM_INFINITY:
        return None
    with suppress(OSError, ValueError, IndexError):
        return int(limit) - int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    return int(limit)
