"""The command line: one module for each group of commands."""

from __future__ import annotations

import sys

import click

from ..errors import GolddiffError
from . import banks, machine, measures, page, sampling, sources
from .common import app

__all__ = ["app", "banks", "machine", "main", "measures", "page", "sampling", "sources"]


def main() -> None:
    """Runs the command line; every error is one line and exit code 2."""
    try:
        code = app.main(prog_name="golddiff", standalone_mode=False)
        sys.exit(code if isinstance(code, int) else 0)
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.format_message())
        sys.exit(2)
    except click.ClickException as error:
        click.echo(f"golddiff: {' '.join(error.format_message().split())}", err=True)
        sys.exit(2)
    except (GolddiffError, OSError, EOFError) as error:
        click.echo(f"golddiff: {' '.join(str(error).split())}", err=True)
        sys.exit(2)
    except (click.Abort, KeyboardInterrupt):
        click.echo(
            "golddiff: stopped; finished batches of images are kept, and the same command goes on from there", err=True
        )
        sys.exit(130)
