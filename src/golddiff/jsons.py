"""JSON files: written whole or not at all, read with care, and sealed where they decide what images come out."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from .errors import GolddiffError
from .files import replacing
from .foreign import LARGEST_TEXT, parse_json, read_text

__all__ = ["as_written", "checksum", "read_json", "sealed", "unsealed", "write_json"]

SEAL = "checksum"


def write_json(path: Path, content: Any) -> None:
    """Writes a file, which appears only when it is complete."""
    with replacing(path) as part:
        part.write_text(_text(content))


def as_written(path: Path) -> bool:
    """Whether every byte of a sealed file is as it was written."""
    try:
        text = read_text(path)
        content = parse_json(text)
        return content[SEAL] == checksum(content) and text == _text(content)
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return False


def _text(content: Any) -> str:
    return json.dumps(content, indent=1) + "\n"


def read_json(path: Path, fix: str, most: int = LARGEST_TEXT) -> Any:
    """The content of a file of at most so many bytes.

    Arguments:
        fix: what to do if it is damaged, for the message.
    """
    try:
        return parse_json(read_text(path, most))
    except GolddiffError:
        raise
    except (OSError, ValueError, MemoryError) as error:
        raise GolddiffError(f"{path} cannot be read ({str(error)[:120] or type(error).__name__}): {fix}") from error


def checksum(content: dict[str, Any]) -> str:
    """Hash of the content without its seal."""
    plain = json.dumps({key: value for key, value in content.items() if key != SEAL}, sort_keys=True)
    return hashlib.blake2b(plain.encode(), digest_size=16).hexdigest()


def sealed(content: dict[str, Any]) -> dict[str, Any]:
    """The content with a checksum of it."""
    return {**content, SEAL: checksum(content)}


def _seals(content: dict[str, Any]) -> bool:
    try:
        return bool(content[SEAL] == checksum(content))
    except (TypeError, ValueError):  # what is no JSON was not sealed here: YAML has keys that are no text
        return False


def unsealed(content: dict[str, Any], path: Path) -> dict[str, Any]:
    """The content without its seal, if it is as it was sealed, or has no seal (any more).

    Raises:
        GolddiffError: it was changed after it was sealed.
    """
    if SEAL in content and not _seals(content):
        raise GolddiffError(
            f"{path} was changed after it was written: take it from a copy, or, if you changed it, remove its {SEAL}"
        )
    return {key: value for key, value in content.items() if key != SEAL}
