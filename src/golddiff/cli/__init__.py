"""The command line: one module for each group of commands."""

from __future__ import annotations

import os
import signal
import sys
from contextlib import suppress
from types import FrameType

import click

from ..errors import GolddiffError
from . import banks, machine, measures, page, sampling, sources
from .common import app

__all__ = ["app", "banks", "machine", "main", "measures", "page", "sampling", "sources"]

STOPPED = "golddiff: stopped; finished batches of images are kept, and the same command goes on from there"


def main() -> None:
    """Runs the command line; every error is one line and exit code 2."""
    asked = _end_as_by_interrupt()
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
        click.echo(STOPPED, err=True)
        sys.exit(128 + (asked or [signal.SIGINT])[0])


def _end_as_by_interrupt() -> list[int]:
    """Makes a closed terminal (SIGHUP, unless under nohup) and a polite end (SIGTERM) as clean as Ctrl-C.

    Returns:
        a list that will hold the signal.
    """
    terminals = [number for number in (1, 2) if os.isatty(number)]
    asked: list[int] = []

    def end(number: int, frame: FrameType | None) -> None:
        asked.append(number)
        if number != signal.SIGTERM:  # nobody reads any more, and writing there would be an error
            with suppress(OSError):
                nowhere = os.open(os.devnull, os.O_WRONLY)
                for terminal in terminals:
                    os.dup2(nowhere, terminal)
                os.close(nowhere)
        raise KeyboardInterrupt

    for name in ("SIGHUP", "SIGTERM"):
        number = getattr(signal, name, None)
        if number is not None and signal.getsignal(number) == signal.SIG_DFL:
            signal.signal(number, end)
    return asked
