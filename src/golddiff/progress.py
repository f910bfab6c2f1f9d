"""The bars that long work shows."""

from __future__ import annotations

from typing import Any

from tqdm import tqdm

__all__ = ["SILENT", "Bar"]

SILENT = 5.0  # seconds until work that is mostly short shows one


class Bar(tqdm):
    """tqdm without its thread, for which Python would wait for ever if there is no memory to start it."""

    monitor_interval = 0

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, miniters=1, **options)  # what the thread is for: work that becomes slow is shown
