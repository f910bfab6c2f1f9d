"""golddiff doctor and completion."""

from __future__ import annotations

import click
from click.shell_completion import get_completion_class

from ..doctor import checks
from ..errors import unknown
from .common import Name, app


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
