"""The command line: golddiff bank build|info|verify, sample, doctor, completion."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click
import torch
from click.shell_completion import get_completion_class

from . import __version__
from .bank import Bank
from .denoise import METHODS
from .doctor import checks
from .errors import GolddiffError, unknown
from .noise import SCHEDULES
from .pictures import grid, save_png, to_uint8
from .recipe import DEFAULTS, Recipe, check_fingerprint, open_bank, parse_options, parse_seeds, read_settings
from .runs import run
from .sample import SAMPLERS

__all__ = ["app", "main"]

WELCOME = """golddiff makes images from the closed-form denoiser of a set of images, without training.

Begin with one of these:
  golddiff sample mnist5k                    16 digits from 5,000 built-in ones; look at runs/mnist5k-golddiff/grid.png
  golddiff sample mnist5k --method optimal   the exact posterior mean, which copies training images
  golddiff bank build PHOTOS --size 64 --out photos.bank    prepare a folder of your own pictures,
  golddiff sample photos.bank                               and sample from it
  golddiff doctor                            what this machine has
  golddiff --help                            all commands
"""


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

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[Any]:
        return [click.shell_completion.CompletionItem(n) for n in self.known if n.startswith(incomplete)]


SOURCE_OPTIONS = (
    click.option("--size", type=int, metavar="N", help="Cut to the central square, resize to N x N (Lanczos)."),
    click.option("--split", default="train", help="Part of a data set that has parts.  [default: train]"),
    click.option("--limit", type=int, metavar="N", help="Take the first N pictures only."),
    click.option("--flip", is_flag=True, help="Add the mirror image of every picture."),
    click.option("--skip-broken", is_flag=True, help="Leave out pictures that cannot be read, and say which."),
    click.option("--layout", type=_Name("layout", ("NHWC", "NCHW", "NHW")), help="Axes of an array, if unclear."),
)
BUILDING = ("size", "split", "limit", "flip", "skip_broken", "layout")


def _source_options(command: Any) -> Any:
    """Adds the options that say how a source becomes a bank."""
    for option in reversed(SOURCE_OPTIONS):
        command = option(command)
    return command


@click.group(context_settings={"help_option_names": ["-h", "--help"]}, invoke_without_command=True)
@click.version_option(__version__)
@click.pass_context
def app(context: click.Context) -> None:
    """Analytical diffusion: images from the closed-form denoiser of a set of images, without training."""
    if context.invoked_subcommand is None:
        click.echo(WELCOME, nl=False)


@app.group()
def bank() -> None:
    """Make, look at and check banks: images prepared for search."""


@bank.command("build")
@click.argument("source")
@click.option("--out", type=click.Path(path_type=Path), help="Folder of the bank (default: the cache).")
@_source_options
@click.option("--force", is_flag=True, help="Replace a bank that is there.")
def bank_build(source: str, out: Path | None, force: bool, **options: Any) -> None:
    """Build a bank from SOURCE.

    SOURCE is a folder of pictures (sub-folders are classes), a .zip of them (with EDM's dataset.json or without),
    webdataset .tar shards, Hugging Face .parquet files, MNIST's IDX files, CIFAR's .bin batches, an .npz or .npy file,
    hf:NAME on the Hugging Face hub, or a known name (digits, mnist5k, mnist, fashion_mnist, cifar10).
    """
    built = Bank.build(source, out, force=force, progress=True, **options)
    _describe(built)


@bank.command("info")
@click.argument("path", metavar="BANK")
def bank_info(path: str) -> None:
    """Say what is in a bank, and draw a sheet of its pictures (in the bank's folder)."""
    held = Bank.build(path, progress=True)
    _describe(held)
    _statistics(held)
    if held.path and held.shape[0] in (1, 3, 4):
        rows = torch.linspace(0, len(held) - 1, min(len(held), 100)).round().long()
        sheet = held.path / "sheet.png"
        save_png(grid(to_uint8(held.images(rows))), sheet)
        click.echo(f"sheet        {sheet}")


@bank.command("verify")
@click.argument("path", metavar="BANK")
def bank_verify(path: str) -> None:
    """Check every byte of a bank against the hashes of its build."""
    wrong = Bank.build(path).verify()
    if wrong:
        raise GolddiffError(f"{path} is damaged, build it again: {'; '.join(wrong)}")
    click.echo(f"{path}: all is as it was built")


@app.command()
@click.argument("source", metavar="[BANK]", required=False)
@click.argument("options", nargs=-1, metavar="[KEY=VALUE]...")
@click.option("--method", type=_Name("method", METHODS), help="The denoiser.  [default: golddiff]")
@click.option("--seeds", help="One image for each, as 0-15 or 3,7,20-29.  [default: 0-15]")
@click.option("--steps", type=int, help="Denoising steps.  [default: 10]")
@click.option("--schedule", type=_Name("schedule", SCHEDULES), help="Noise levels.  [default: ddpm]")
@click.option("--sampler", type=_Name("sampler", SAMPLERS), help="How to step.  [default: ddim]")
@click.option("--label", help="Class, as 3 or cat; of several (3,7), seed s takes number s modulo them.")
@click.option("--batch", type=int, default=16, show_default=True, help="Images that go together.")
@click.option("--device", default="auto", show_default=True, help="auto, cpu or cuda.")
@click.option("--out", type=click.Path(path_type=Path), help="Run folder.  [default: runs/BANK-METHOD]")
@click.option("--save-steps", is_flag=True, help="Keep x_t and mean of every step; draw trajectories.png.")
@click.option("--nearest", type=int, default=0, metavar="K", help="Draw the K nearest training images: nearest.png.")
@click.option("--recipe", type=click.Path(path_type=Path), help="A run's recipe.json, or YAML with some of its keys.")
@click.option("--force", is_flag=True, help="Start again in a folder that holds another run.")
@_source_options
def sample(source: str | None, options: tuple[str, ...], **given: Any) -> None:
    """Sample images from BANK: a built bank, anything that `bank build` takes, or a known name.

    KEY=VALUE sets options of the method, as in:

      golddiff sample mnist5k retrieval=paper k_max=300

    With --recipe, BANK may be left out, and what is said here goes before what the recipe says. The same command on
    the same folder goes on where it was stopped.
    """
    if source and "=" in source and not Path(source).exists():
        options, source = (source, *options), None
    settings = read_settings(given["recipe"]) if given["recipe"] else {}
    stated = settings.pop("bank", None)
    settings.pop("format", None)
    for key in ("method", "seeds", "steps", "schedule", "sampler"):
        if given[key] is not None:
            settings[key] = given[key]
    if given["label"] is not None:
        settings["labels"] = given["label"]
    if options:
        same = settings.get("method") in (None, given["method"]) or given["method"] is None
        settings["options"] = {**(settings.get("options") or {} if same else {}), **parse_options(options)}
    parse_seeds(settings.get("seeds", DEFAULTS["seeds"]))
    if given["batch"] < 1:
        raise GolddiffError(f"--batch is {given['batch']}: give at least 1")
    device = _device(given["device"])
    if source is None and stated is None:
        raise GolddiffError("which BANK? Give a path or a known name, as in: golddiff sample mnist5k")
    building = {key: given[key] for key in BUILDING}
    held = open_bank(source or stated, **building)
    if isinstance(stated, dict):
        check_fingerprint(held, stated.get("fingerprint"))
    recipe, model = Recipe.resolve(held.to(device), settings)
    name = stated if isinstance(stated, str) else held.path or held.source["name"]
    out = given["out"] or Path("runs") / f"{Path(source or name).stem}-{recipe.method}"
    kept = {key: given[key] for key in ("batch", "save_steps", "nearest", "force")}
    run(model, recipe, out, **kept)
    click.echo(f"{len(recipe.seeds)} images in {out}: look at {out / 'grid.png'}")


@app.command()
def doctor() -> None:
    """Say what this machine has: versions, threads, devices, speed, disk, extras."""
    for what, found in checks():
        click.echo(f"{what:18} {found}")


@app.command()
@click.argument("shell", type=_Name("shell", ("bash", "zsh", "fish")))
def completion(shell: str) -> None:
    """Print a completion script for SHELL, as in: eval "$(golddiff completion bash)"."""
    made = get_completion_class(shell)
    if made is None:
        raise unknown("shell", shell, ("bash", "zsh", "fish"))
    click.echo(made(app, {}, "golddiff", "_GOLDDIFF_COMPLETE").source())


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise unknown("device", name, ("auto", "cpu", "cuda")) from error
    if device.type not in ("cpu", "cuda"):
        raise unknown("device", name, ("auto", "cpu", "cuda"))
    if device.type == "cuda" and not torch.cuda.is_available():
        raise GolddiffError("there is no CUDA device here: use --device cpu")
    return device


def _describe(held: Bank) -> None:
    c, h, w = held.shape
    values, counts = held.labels[held.labels >= 0].unique(return_counts=True)
    labels = f"{len(values)} classes of {counts.min()} to {counts.max()} images" if len(values) else "none"
    size = sum(t.numel() * t.element_size() for t in (held.pixels, held.proxy, held.norms, held.keys, held.labels))
    said = [f"{key} {value}" for key, value in held.source.items() if value and key != "skipped"]
    click.echo(f"images       {len(held)} of {c} x {h} x {w}, {str(held.pixels.dtype).removeprefix('torch.')}")
    click.echo(f"labels       {labels}")
    if held.classes:
        click.echo(f"classes      {', '.join(held.classes[:10])}{', ...' if len(held.classes) > 10 else ''}")
    click.echo(f"source       {', '.join(said)}")
    if held.source.get("skipped"):
        click.echo(f"skipped      {len(held.source['skipped'])}: {', '.join(held.source['skipped'][:5])}")
    click.echo(f"fingerprint  {held.fingerprint}")
    click.echo(f"size         {size / 2**20:.1f} MiB mapped")
    click.echo(f"folder       {held.path}")


def _statistics(held: Bank) -> None:
    spectrum = held.spectrum()
    power = spectrum.eigenvalues.flip(0)
    share = power.cumsum(0) / power.sum().clamp(min=1e-300)
    wide = [int((share < part).sum()) + 1 for part in (0.5, 0.9, 0.99)]
    deviation = float(spectrum.variances.mean().sqrt())
    copies = len(held) - len(held.pixels.flatten(1).unique(dim=0)) if len(held) * held.D <= 2**27 else None
    click.echo(f"pixels       mean {float(spectrum.mean.mean()):.3f}, deviation {deviation:.3f} (range -1 to 1)")
    click.echo(f"constant     {int((~spectrum.varying).sum())} of {held.D} pixels never change")
    click.echo(f"spectrum     {wide[0]}, {wide[1]}, {wide[2]} components hold 50, 90, 99 % of the variance")
    if copies is not None:
        click.echo(f"copies       {copies} images are exact copies of another")


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
    except GolddiffError as error:
        click.echo(f"golddiff: {error}", err=True)
        sys.exit(2)
    except (click.Abort, KeyboardInterrupt):
        click.echo("golddiff: stopped; what is finished is kept, and the same command goes on from there", err=True)
        sys.exit(130)
