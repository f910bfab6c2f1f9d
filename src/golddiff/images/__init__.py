"""Pictures from anywhere, as blocks of `(n, C, H, W)` with labels and source ids."""

from .arrays import from_array
from .core import NO_LABEL, Images
from .source import BUILT_IN, KNOWN, find_source, open_source

__all__ = ["BUILT_IN", "KNOWN", "NO_LABEL", "Images", "find_source", "from_array", "open_source"]
