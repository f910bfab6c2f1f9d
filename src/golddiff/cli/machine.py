"""golddiff serve, doctor and completion."""

from __future__ import annotations

from typing import Any

import click
from click.shell_completion import get_completion_class

from ..doctor import checks
from ..errors import unknown
from ..explorer import serve
from ..recipe import open_bank
from .common import Name, app, device_of, source_options


@app.command("serve", short_help="A page that shows images come about.")
@click.argument("source", metavar="BANK")
@click.option("--host", default="127.0.0.1", show_default=True, help="Address; others than loopback need a token.")
@click.option("--port", type=int, default=8765, show_default=True, help="0 takes a free one.")
@click.option("--device", default="auto", show_default=True, help="auto, cpu or cuda.")
@click.option("--open", "open_browser", is_flag=True, help="Open the page in a browser.")
@source_options
def serve_command(source: str, host: str, port: int, device: str, open_browser: bool, **building: Any) -> None:
    """Serve a page of BANK: trajectories step by step, which training images made a pixel, and what happens without
    them. Needs the extra web."""
    serve(open_bank(source, **building).to(device_of(device)), host, port, open_browser=open_browser)


@app.command()
def doctor() -> None:
    """Say what this machine has: versions, threads, devices, speed, disk, extras."""
    for what, found in checks():
        click.echo(f"{what:18} {found}")


@app.command(short_help="Print a script that completes commands.")
@click.argument("shell", type=Name("shell", ("bash", "zsh", "fish")))
def completion(shell: str) -> None:
    """Print a completion script for SHELL, as in: eval "$(golddiff completion bash)"."""
    made = get_completion_class(shell)
    if made is None:
        raise unknown("shell", shell, ("bash", "zsh", "fish"))
    click.echo(made(app, {}, "golddiff", "_GOLDDIFF_COMPLETE").source())
