"""The one exception of the library, and the way it offers the nearest name."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

__all__ = ["GolddiffError", "beyond", "unknown"]


class GolddiffError(ValueError):
    """A request that cannot be met. The message is one line and ends with what to do about it."""

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.split()))


def unknown(what: str, name: object, known: Iterable[str]) -> GolddiffError:
    """The error for a name that is not among `known`: it offers the nearest one and lists them all."""
    names = sorted(known)
    near = difflib.get_close_matches(str(name), names, n=1, cutoff=0.5)
    hint = f"did you mean '{near[0]}'? " if near else ""
    return GolddiffError(f"unknown {what} '{name}': {hint}known are {', '.join(names)}")


def beyond(kind: object) -> GolddiffError:
    """The error for noisy images and levels that a type of floats cannot hold."""
    wider = "float64, or " if str(kind) == "torch.float32" else ""
    return GolddiffError(f"x_t is too large for {kind}, or sigma / alpha too small: use {wider}smaller values")
