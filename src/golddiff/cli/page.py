"""golddiff serve: a page that shows how images come about."""

from __future__ import annotations

import os
import sys
from typing import Any

import click

from ..explorer import serve
from ..recipe import open_bank
from .common import app, device_of, source_options


@app.command("serve", short_help="A page that shows how images come about.")
@click.argument("source", metavar="BANK")
@click.option("--host", default="127.0.0.1", show_default=True, help="Address; others than loopback need a token.")
@click.option("--port", type=int, default=8765, show_default=True, help="0 takes a free one.")
@click.option("--device", default="auto", show_default=True, help="auto, cpu or cuda.")
@click.option("--open", "open_browser", is_flag=True, help="Open the page in a browser.")
@source_options
def serve_command(source: str, host: str, port: int, device: str, open_browser: bool, **building: Any) -> None:
    """Serve a page of BANK: trajectories step by step, which training images made a pixel, and the same seed without
    some of them. Needs the extra web."""
    ended = serve(open_bank(source, **building).to(device_of(device)), host, port, open_browser=open_browser)
    if not ended:  # nothing of the step that is still being computed would be kept
        sys.stderr.flush()
        os._exit(0)
