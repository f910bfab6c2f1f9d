"""The command line: golddiff bank build | bank info | sample."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click
import torch

from . import __version__
from .bank import Bank
from .denoise import METHODS, denoiser
from .errors import GolddiffError, unknown
from .noise import SCHEDULES, schedule_named
from .runs import Recipe, parse_labels, parse_options, parse_seeds, resolved, run
from .sample import SAMPLERS

__all__ = ["app", "main"]


class _Name(click.ParamType):
    """One of some names; an unknown one is refused with the nearest."""

    def __init__(self, what: str, known: Any) -> None:
        self.name, self.known = what, list(known)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if value not in self.known:
            raise unknown(self.name, value, self.known)
        return value

    def get_metavar(self, param: click.Parameter, ctx: click.Context | None = None) -> str:
        return "|".join(self.known)


def _source_options(command: Any) -> Any:
    """The options that say how a source becomes a bank."""
    for option in (
        click.option("--limit", type=int, help="Take the first N pictures only."),
        click.option("--layout", type=_Name("layout", ("NHWC", "NCHW", "NHW")), help="Axes of an array, if unclear."),
        click.option("--split", default="train", show_default=True, help="Part of a data set that has parts."),
        click.option("--size", type=int, help="Cut pictures to the central square and resize to N x N (Lanczos)."),
    ):
        command = option(command)
    return command


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__)
def app() -> None:
    """Analytical diffusion: images from the closed-form denoiser of a set of images, without training.

    Begin with: golddiff sample mnist5k
    """


@app.group()
def bank() -> None:
    """Make and look at banks: images prepared for search."""


@bank.command("build")
@click.argument("source")
@click.option("--out", type=click.Path(path_type=Path), help="Folder of the bank (default: the cache).")
@_source_options
@click.option("--force", is_flag=True, help="Replace a bank that is there.")
def bank_build(source: str, out: Path | None, force: bool, **options: Any) -> None:
    """Build a bank from SOURCE: a folder of pictures, IDX, parquet, .npz or .npy files, or a known name."""
    built = Bank.build(source, out, force=force, progress=True, **options)
    _describe(built)


@bank.command("info")
@click.argument("path", metavar="BANK")
def bank_info(path: str) -> None:
    """Say what is in a bank."""
    _describe(Bank.build(path, progress=True))


@app.command()
@click.argument("source", metavar="BANK")
@click.option("--method", type=_Name("method", METHODS), default="golddiff", show_default=True, help="The denoiser.")
@click.option("--seeds", default="0-15", show_default=True, help="One image for each seed, as 0-15 or 3,7,20-29.")
@click.option("--steps", type=int, default=10, show_default=True, help="Denoising steps.")
@click.option("--schedule", type=_Name("schedule", SCHEDULES), default="ddpm", show_default=True, help="Noise levels.")
@click.option("--sampler", type=_Name("sampler", SAMPLERS), default="ddim", show_default=True, help="How to step.")
@click.option("--label", help="Class of the images, as 3 or cat; of several (3,7), seed s takes number s modulo them.")
@click.option("--batch", type=int, default=16, show_default=True, help="Images that go together.")
@click.option("--device", default="auto", show_default=True, help="auto, cpu or cuda.")
@click.option("--out", type=click.Path(path_type=Path), help="Run folder (default: runs/BANK-METHOD).")
@click.option("--save-steps", is_flag=True, help="Also keep x_t and the mean of every step, in steps.npz.")
@click.option("--force", is_flag=True, help="Start again in a folder that holds another run.")
@_source_options
@click.argument("options", nargs=-1, metavar="[KEY=VALUE]...")
def sample(source: str, method: str, seeds: str, options: tuple[str, ...], **given: Any) -> None:
    """Sample images from BANK: a built bank, anything that `bank build` takes, or a known name.

    KEY=VALUE sets options of the method, as in: golddiff sample mnist5k retrieval=paper k_max=300
    """
    chosen, wanted = parse_seeds(seeds), parse_options(options)
    if given["batch"] < 1:
        raise GolddiffError(f"--batch is {given['batch']}: give at least 1")
    schedule_named(given["schedule"]).levels(given["steps"])
    device = _device(given["device"])
    held = Bank.build(source, progress=True, **{k: given[k] for k in ("size", "split", "limit", "layout")})
    held = held.to(device)
    model = denoiser(method, held, **wanted)
    recipe = Recipe(
        bank={"source": held.source, "fingerprint": held.fingerprint},
        method=method,
        options=resolved(model),
        steps=given["steps"],
        schedule=given["schedule"],
        sampler=given["sampler"],
        labels=parse_labels(given["label"], held),
        seeds=chosen,
    )
    out = given["out"] or Path("runs") / f"{Path(source).stem}-{method}"
    run(model, recipe, out, batch=given["batch"], save_steps=given["save_steps"], force=given["force"])
    click.echo(f"{len(chosen)} images in {out}: look at {out / 'grid.png'}")


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise unknown("device", name, ("auto", "cpu", "cuda")) from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise GolddiffError("there is no CUDA device here: use --device cpu")
    return device


def _describe(held: Bank) -> None:
    c, h, w = held.shape
    labels, counts = held.labels.unique(return_counts=True)
    classes = int((labels >= 0).sum())
    size = sum(t.numel() * t.element_size() for t in (held.pixels, held.proxy, held.norms, held.keys, held.labels))
    click.echo(f"images       {len(held)} of {c} x {h} x {w}, {str(held.pixels.dtype).removeprefix('torch.')}")
    click.echo(f"labels       {f'{classes} classes of {counts.min()} to {counts.max()}' if classes else 'none'}")
    if held.classes:
        click.echo(f"classes      {', '.join(held.classes[:10])}{', ...' if len(held.classes) > 10 else ''}")
    click.echo(f"source       {', '.join(f'{k} {v}' for k, v in held.source.items() if v is not None)}")
    click.echo(f"fingerprint  {held.fingerprint}")
    click.echo(f"size         {size / 2**20:.1f} MiB mapped")
    click.echo(f"folder       {held.path}")


def main() -> None:
    """Runs the command line; every error is one line and exit code 2."""
    try:
        code = app.main(prog_name="golddiff", standalone_mode=False)
        sys.exit(code if isinstance(code, int) else 0)
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.format_message())
        sys.exit(2)
    except click.ClickException as error:
        click.echo(f"golddiff: {error.format_message()}", err=True)
        sys.exit(2)
    except GolddiffError as error:
        click.echo(f"golddiff: {error}", err=True)
        sys.exit(2)
    except (click.Abort, KeyboardInterrupt):
        click.echo("golddiff: stopped; the same command goes on from here", err=True)
        sys.exit(130)
