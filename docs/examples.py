"""Runs the Python blocks of a page in order, as `tests/test_docs.py` does, and leaves what they write in a folder.

    python docs/examples.py docs/tutorial.md docs/pictures

makes the pictures of the tutorial. A block after `<!-- skip: why -->` is left out, one after `<!-- needs: deepinv -->`
where that package is not there. A `text` block right after a Python block is what it prints; numbers may differ by 2 %,
as processors round differently.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import itertools
import linecache
import math
import os
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

BLOCK = re.compile(
    r"(?:<!-- (?P<mark>skip|needs): (?P<what>[^\n]+) -->\n+)?^```(?P<language>\w+)\n(?P<code>.*?)^```$", re.M | re.S
)
CLOSE = 0.02


@dataclass(frozen=True)
class Block:
    """A fenced block of a page: its language, text and line, whether it is skipped, and what it should print."""

    language: str
    code: str
    line: int
    skipped: bool
    prints: str | None


def blocks(page: Path) -> list[Block]:
    """The fenced blocks of a page, in order."""
    text = page.read_text()
    found = list(BLOCK.finditer(text))
    out = []
    for match, following in itertools.zip_longest(found, found[1:]):
        adjacent = following is not None and following["language"] == "text" and not following["mark"]
        printed = adjacent and not text[match.end() : following.start()].strip()
        line = text.count("\n", 0, match.start("code")) + 1
        prints = following["code"] if printed else None
        out.append(Block(match["language"], match["code"], line, skipped(match["mark"], match["what"]), prints))
    return out


def skipped(mark: str | None, what: str | None) -> bool:
    """Whether a block is left out for its mark."""
    missing = mark == "needs" and not all(map(importlib.util.find_spec, (what or "").split(", ")))
    return mark == "skip" or missing


def run(page: Path) -> None:
    """Runs the Python blocks of a page in one namespace, in the present folder.

    Raises:
        AssertionError: a block prints something else than the page says.
    """
    names: dict[str, Any] = {"__name__": "__main__"}
    for block in blocks(page):
        if block.language != "python" or block.skipped:
            continue
        place = f"{page}, line {block.line}"
        linecache.cache[place] = (len(block.code), None, block.code.splitlines(True), place)
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            exec(compile(block.code, place, "exec"), names)  # noqa: S102 - our own pages
        if block.prints is not None and not alike(printed.getvalue(), block.prints):
            raise AssertionError(f"{place} prints\n{printed.getvalue()}instead of\n{block.prints}")


def alike(a: str, b: str) -> bool:
    """The same words and whole numbers, and nearly the same other numbers."""

    def same(x: str, y: str) -> bool:
        try:
            whole = x.isdecimal() or y.isdecimal()
            return x == y if whole else math.isclose(float(x), float(y), rel_tol=CLOSE)
        except ValueError:
            return x == y

    words = a.split(), b.split()
    return len(words[0]) == len(words[1]) and all(map(same, *words))


if __name__ == "__main__":
    page, folder = Path(sys.argv[1]).resolve(), Path(sys.argv[2])
    folder.mkdir(parents=True, exist_ok=True)
    os.chdir(folder)
    run(page)
