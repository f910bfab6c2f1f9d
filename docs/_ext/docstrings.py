"""Docstrings of golddiff as pages: only what a module's `__all__` names, in the order of its source."""

from __future__ import annotations

import inspect
import re
import sys
from typing import Any

from sphinx.application import Sphinx
from sphinx.util.typing import ExtensionMetadata


def only_public(app: Sphinx, what: str, name: str, item: Any, skip: bool, options: Any) -> bool | None:
    """Leaves out what `__all__` does not name; with `ignore-module-all`, since Sphinx would take its order too."""
    module = sys.modules.get(app.env.current_document.autodoc_module)
    return True if what == "module" and name not in getattr(module, "__all__", [name]) else None


def one_each(app: Sphinx, what: str, name: str, item: Any, options: Any, lines: list[str]) -> None:
    """Gives arguments that share a line, `alpha: signal. sigma: noise.`, a line each."""
    try:
        known = set(inspect.signature(item).parameters)
    except (TypeError, ValueError):
        return
    if "Arguments:" not in lines:
        return
    first = lines.index("Arguments:") + 1
    indent = " " * (len(lines[first]) - len(lines[first].lstrip()))
    for i in range(first, len(lines)):
        if not lines[i].startswith(" "):
            break
        found = re.finditer(r"(?<=[.;] )((?:\w+, )*\w+): ", lines[i])
        starts = [match.start() for match in found if set(match[1].split(", ")) <= known]
        pieces = [lines[i][a:b].rstrip() for a, b in zip([0, *starts], [*starts, None], strict=True)]
        lines[i] = "\n".join([pieces[0], *(indent + piece for piece in pieces[1:])])
    lines[:] = "\n".join(lines).split("\n")


def without_private(
    app: Sphinx, what: str, name: str, item: Any, options: Any, signature: str | None, returns: str | None
) -> tuple[str, str | None] | None:
    """Cuts fields that begin with an underscore, which are a class's last, from its signature."""
    if signature is None or ", _" not in signature:
        return None
    return signature[: signature.index(", _")] + ")", returns


def setup(app: Sphinx) -> ExtensionMetadata:
    app.connect("autodoc-skip-member", only_public)
    app.connect("autodoc-process-signature", without_private)
    app.connect("autodoc-process-docstring", one_each, priority=400)  # before napoleon
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
