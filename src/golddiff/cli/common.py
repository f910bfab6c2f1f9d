"""The group of all commands, and what several of them share."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch

from .. import __version__
from ..bank import Bank
from ..errors import GolddiffError, unknown
from ..images import Images, open_source
from ..memory import require
from ..ranks import own_device
from ..recipe import (
    DEFAULTS,
    check_fingerprint,
    open_bank,
    read_settings,
)

__all__ = [
    "BUILDING",
    "Name",
    "app",
    "bank_of",
    "default_out",
    "device_of",
    "in_range_of",
    "listed",
    "override",
    "samples_of",
    "source_options",
    "stated_by",
]

WELCOME = """golddiff makes images from the closed-form denoiser of a set of images, without training.

Begin with one of these:
  golddiff sample mnist5k                    16 digits from 5,000 built-in ones; look at runs/mnist5k-golddiff/grid.png
  golddiff sample mnist5k --method optimal   the exact posterior mean, which copies training images
  golddiff bank build PHOTOS --size 64 --out photos.bank    prepare a folder of your own pictures,
  golddiff sample photos.bank                               and sample from it
  golddiff doctor                            what this machine has
  golddiff --help                            all commands
"""


class Name(click.ParamType):
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
    click.option("--layout", type=Name("layout", ("NHWC", "NCHW", "NHW")), help="Axes of an array, if unclear."),
    click.option("--latents", metavar="FOLDER", help="Hold latents of this autoencoder; or where it is now."),
)


BUILDING = ("size", "split", "limit", "flip", "skip_broken", "layout", "latents")


def source_options(command: Any) -> Any:
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


def device_of(name: str) -> torch.device:
    if name == "auto":
        return own_device(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise unknown("device", name, ("auto", "cpu", "cuda")) from error
    if device.type not in ("cpu", "cuda"):
        raise unknown("device", name, ("auto", "cpu", "cuda"))
    if device.type == "cuda" and not torch.cuda.is_available():
        raise GolddiffError("there is no CUDA device here: use --device cpu")
    return own_device(device)


def stated_by(
    source: str | None, options: tuple[str, ...], recipe: Path | None
) -> tuple[str | None, Any, dict[str, Any], tuple[str, ...]]:
    """BANK if it is named, the bank that a recipe states, its other settings, and KEY=VALUE options."""
    if source and "=" in source and not Path(source).exists():
        options, source = (source, *options), None
    settings = read_settings(recipe) if recipe else {}
    stated = settings.pop("bank", None)
    settings.pop("format", None)
    if source is None and stated is None:
        command = click.get_current_context().info_name
        raise GolddiffError(f"which BANK? Give a path or a known name, as in: golddiff {command} mnist5k")
    return source, stated, settings, options


def override(settings: dict[str, Any], given: dict[str, Any], options: dict[str, Any]) -> None:
    """Puts what the command line says in the place of what a recipe says; another method drops the recipe's options."""
    if given["method"] not in (None, settings.get("method", DEFAULTS["method"])):
        settings.pop("options", None)
    for key in ("method", "seeds", "steps", "schedule", "sampler", "start"):
        if given[key] is not None:
            settings[key] = given[key]
    if given["label"]:
        settings["labels"] = list(given["label"])
    kept = settings.get("options") or {}
    if options and isinstance(kept, dict):
        settings["options"] = {**kept, **options}


def bank_of(source: str | None, stated: Any, building: dict[str, Any]) -> Bank:
    """The bank that the command line names, or the recipe; with the fingerprint that the recipe wants."""
    said = [f"--{key.replace('_', '-')}" for key, value in building.items() if value and value != "train"]
    if source is None and isinstance(stated, dict) and said:
        raise GolddiffError(f"the recipe says how its bank is made: leave {', '.join(said)} out, or name a bank")
    held = open_bank(source or stated, **(building if source or isinstance(stated, str) else {}))
    return check_fingerprint(held, stated.get("fingerprint")) if isinstance(stated, dict) else held


def default_out(named: Any, held: Bank, method: str, chosen: dict[str, Any]) -> Path:
    """`runs/BANK-METHOD`, and a short hash of what is not at its default, so that other settings are another folder."""
    stored = held.source["name"] if held.source["name"] != "array" else str(held.path)
    name = named if isinstance(named, str) else stored
    usual = {**DEFAULTS, "split": "train"}
    keys = ("options", "steps", "schedule", "sampler", "labels", "start", "attribution", *BUILDING)
    unusual = {key: chosen[key] for key in keys if chosen.get(key) and chosen[key] != usual.get(key)}
    digest = hashlib.blake2b(json.dumps(unusual, sort_keys=True, default=str).encode(), digest_size=3).hexdigest()
    return Path("runs") / (f"{Path(name).resolve().stem}-{method}" + (f"-{digest}" if unusual else ""))


def samples_of(path: str, **options: Any) -> Images:
    """Pictures of any origin, a bank too; those of a run folder are in its samples.npz."""
    folder = Path(path)
    if (folder / "bank.json").is_file():
        held = Bank.open(folder)
        ids = [name.decode(errors="replace") for name in held.ids]
        pixels, kind = held.pixels.numpy(), np.dtype(str(held.pixels.dtype).removeprefix("torch."))
        images = Images(held.shape, kind, held.labels.numpy(), ids, lambda first, last: pixels[first:last])
        return images.first(options.get("limit"))
    packed = folder / "samples.npz"
    return open_source(packed if packed.is_file() and (folder / "recipe.json").is_file() else path, **options)


def in_range_of(held: Bank, images: Images) -> torch.Tensor:
    """Pictures in [-1, 1], `(n, C, H, W)`; floats as they are."""
    require(14 * len(images) * held.D, f"{len(images)} images", "give fewer at a time")
    pixels = torch.from_numpy(images.read(0, len(images)).copy())
    if pixels.is_floating_point():
        return pixels.float()
    return (pixels.double() / 127.5 - 1).float()


def listed(names: list[str]) -> str:
    return f"{len(names)} pictures: {', '.join(names[:5])}{', ...' if len(names) > 5 else ''}"
