"""The command line: golddiff bank build|info|verify, sample, serve, doctor, completion."""

from __future__ import annotations

import hashlib
import json
import math
import sys
from pathlib import Path
from typing import Any

import click
import torch
from click.shell_completion import get_completion_class

from . import __version__
from .bank import Bank
from .calibrate import calibrate
from .compare import compare
from .concentrate import concentrate
from .denoise import METHODS
from .doctor import checks
from .errors import GolddiffError, unknown
from .explorer import serve
from .files import replacing
from .images import Images, open_source
from .metrics import evaluate
from .noise import SCHEDULES
from .oracle import PREDICTIONS, oracle
from .pictures import grid, save_png, to_uint8
from .ranks import Ranks, joined, own_device, parse_shard
from .recipe import (
    DEFAULTS,
    Recipe,
    check_fingerprint,
    comparison,
    open_bank,
    parse_labels,
    parse_options,
    parse_seeds,
    read_settings,
)
from .reports import Removal, attribution_report, audit_report
from .runs import run
from .sample import SAMPLERS
from .spectrum import LARGEST_EIGENBASIS, Spectrum
from .training import Training, train_oracle

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
    click.option("--latents", metavar="FOLDER", help="Hold latents of this autoencoder; or where it is now."),
)
FEW = 32  # golden subsets of fewer rows are worth a note
BUILDING = ("size", "split", "limit", "flip", "skip_broken", "layout", "latents")


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


@bank.command("build", short_help="Build a bank from pictures.")
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


@bank.command("info", short_help="Describe a bank, and draw a sheet of it.")
@click.argument("path", metavar="BANK")
def bank_info(path: str) -> None:
    """Say what is in a bank, and draw a sheet of its pictures (in the bank's folder)."""
    held = _built(path)
    _describe(held)
    _statistics(held)
    if held.path and (held.is_latent or held.shape[0] in (1, 3, 4)):
        rows = torch.linspace(0, len(held) - 1, min(len(held), 100)).round().long()
        sheet = held.path / "sheet.png"
        try:
            save_png(grid(to_uint8(held.decode(held.images(rows)))), sheet)
            click.echo(f"sheet        {sheet}")
        except GolddiffError as error:
            click.echo(f"sheet        not drawn: {error}")


@bank.command("verify", short_help="Check every byte of a bank.")
@click.argument("path", metavar="BANK")
def bank_verify(path: str) -> None:
    """Check every byte of a bank against the hashes of its build."""
    wrong = _built(path).verify()
    if wrong:
        raise GolddiffError(f"{path} is damaged, build it again: {'; '.join(wrong)}")
    click.echo(f"{path}: all is as it was built")


@app.command(short_help="Sample images from a bank.")
@click.argument("source", metavar="[BANK]", required=False)
@click.argument("options", nargs=-1, metavar="[KEY=VALUE]...")
@click.option("--method", type=_Name("method", METHODS), help="The denoiser.  [default: golddiff]")
@click.option("--seeds", help="One image for each, as 0-15 or 3,7,20-29.  [default: 0-15]")
@click.option("--steps", type=int, help="Denoising steps.  [default: 10]")
@click.option("--schedule", type=_Name("schedule", SCHEDULES), help="Noise levels.  [default: ddpm]")
@click.option(
    "--sampler", type=_Name("sampler", SAMPLERS), help="How to step; dpm++ needs the extra diffusers.  [default: ddim]"
)
@click.option("--label", multiple=True, help="Class, as 3 or cat; of several (3,7), seed s takes number s modulo them.")
@click.option("--start", type=float, help="Begin at this time, from noised bank images.  [default: pure noise]")
@click.option("--batch", type=int, default=8, show_default=True, help="Images that go together.")
@click.option("--device", default="auto", show_default=True, help="auto, cpu or cuda.")
@click.option("--out", type=click.Path(path_type=Path), help="Run folder.  [default: runs/BANK-METHOD]")
@click.option("--save-steps", is_flag=True, help="Keep x_t and mean of every step; draw trajectories.png.")
@click.option("--nearest", type=int, default=0, metavar="K", help="Draw the K nearest training images: nearest.png.")
@click.option("--recipe", type=click.Path(path_type=Path), help="A run's recipe.json, or YAML with some of its keys.")
@click.option("--force", is_flag=True, help="Start again in a folder that holds another run.")
@click.option("--shard", metavar="I/N", help="Do every Nth batch only, from the Ith; others do the rest, same folder.")
@click.option("--spread", default="seeds", help="Over processes of torchrun or srun: seeds, or the bank's rows.")
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
    if source is None and stated is None:
        raise GolddiffError("which BANK? Give a path or a known name, as in: golddiff sample mnist5k")
    _override(settings, given, parse_options(options))
    parse_seeds(settings.get("seeds", DEFAULTS["seeds"]))
    if given["batch"] < 1:
        raise GolddiffError(f"--batch is {given['batch']}: give at least 1")
    device = _device(given["device"])
    building = {key: given[key] for key in BUILDING}
    with joined(device) as ranks:
        _sample(
            source, stated, settings, building, device, parse_shard(given["shard"]) if given["shard"] else ranks, given
        )


def _sample(
    source: str | None,
    stated: Any,
    settings: dict[str, Any],
    building: dict[str, Any],
    device: torch.device,
    ranks: Ranks,
    given: dict[str, Any],
) -> None:
    """What `golddiff sample` does on one rank."""
    held = _bank_of(source, stated, building)
    recipe, model = Recipe.resolve(held.to(device), settings)
    out = given["out"] or _default_out(source or stated, held, recipe.method, {**settings, **building})
    pictures = Path(source).resolve() if source and Path(source).is_dir() else None
    if source and pictures and held.path != Path(source) and out.resolve().is_relative_to(pictures):
        raise GolddiffError(f"{out} would lie among the pictures of {source}: give another --out")
    if ranks.is_first:
        _say_what_to_expect(held, recipe, given["skip_broken"])
    how = {key: given[key] for key in ("batch", "save_steps", "nearest", "force", "spread")}
    count = run(model, recipe, out, ranks=ranks, **how)
    if ranks.is_first or not ranks.linked:
        click.echo(f"{count} images in {out}: look at {out / 'grid.png'}")


def _say_what_to_expect(held: Bank, recipe: Recipe, skip_broken: bool) -> None:
    """Notes on standard error: pictures that were left out, and golden subsets too small to be one."""
    if skip_broken and held.source.get("skipped"):
        click.echo(f"golddiff: left out {_listed(held.source['skipped'])}", err=True)
    k_max = recipe.options.get("k_max", 1.0)
    rows = round(k_max * len(held)) if isinstance(k_max, float) else k_max
    if recipe.options.get("retrieval") in ("reference", "paper") and rows < FEW:
        click.echo(
            f"golddiff: note: the paper's budgets leave at most {rows} of {len(held)} images to each step, so expect "
            "copies; for a small bank take all rows, with --method pca",
            err=True,
        )


def _listed(names: list[str]) -> str:
    return f"{len(names)} pictures: {', '.join(names[:5])}{', ...' if len(names) > 5 else ''}"


def _override(settings: dict[str, Any], given: dict[str, Any], options: dict[str, Any]) -> None:
    """Puts what the command line says in the place of what a recipe says; another method drops the recipe's options."""
    if given["method"] not in (None, settings.get("method", DEFAULTS["method"])):
        settings.pop("options", None)
    for key in ("method", "seeds", "steps", "schedule", "sampler", "start"):
        if given[key] is not None:
            settings[key] = given[key]
    if given["label"]:
        settings["labels"] = ",".join(given["label"])
    kept = settings.get("options") or {}
    if options and isinstance(kept, dict):
        settings["options"] = {**kept, **options}


def _bank_of(source: str | None, stated: Any, building: dict[str, Any]) -> Bank:
    """The bank that the command line names, or the recipe; with the fingerprint that the recipe wants."""
    said = [f"--{key.replace('_', '-')}" for key, value in building.items() if value and value != "train"]
    if source is None and isinstance(stated, dict) and said:
        raise GolddiffError(f"the recipe says how its bank is made: leave {', '.join(said)} out, or name a bank")
    held = open_bank(source or stated, **(building if source or isinstance(stated, str) else {}))
    return check_fingerprint(held, stated.get("fingerprint")) if isinstance(stated, dict) else held


def _default_out(named: Any, held: Bank, method: str, chosen: dict[str, Any]) -> Path:
    """`runs/BANK-METHOD`, and a short hash of what is not at its default, so that other settings are another folder."""
    stored = held.source["name"] if held.source["name"] != "array" else str(held.path)
    name = named if isinstance(named, str) else stored
    usual = {**DEFAULTS, "split": "train"}
    keys = ("options", "steps", "schedule", "sampler", "labels", "start", *BUILDING)
    unusual = {key: chosen[key] for key in keys if chosen.get(key) and chosen[key] != usual.get(key)}
    digest = hashlib.blake2b(json.dumps(unusual, sort_keys=True, default=str).encode(), digest_size=3).hexdigest()
    return Path("runs") / (f"{Path(name).resolve().stem}-{method}" + (f"-{digest}" if unusual else ""))


@app.command("compare", short_help="Methods beside each other and a network.")
@click.argument("source", metavar="[BANK]", required=False)
@click.option("--methods", help="Names, as optimal,pca,golddiff:retrieval=paper,els@8 (@8: the first 8 seeds only).")
@click.option("--oracle", type=click.Path(path_type=Path), help="Folder of a trained network (diffusers UNet2DModel).")
@click.option("--oracle-schedule", type=_Name("schedule", ("ddpm",)), help="The network's, if its folder has none.")
@click.option("--prediction", type=_Name("prediction", PREDICTIONS), help="What the network says.")
@click.option("--seeds", help="Of the initial noise, the same for all.  [default: 0-15]")
@click.option("--steps", type=int, help="DDIM steps.  [default: 10]")
@click.option("--schedule", type=_Name("schedule", SCHEDULES), help="Noise levels.  [default: ddpm]")
@click.option("--held-out", type=int, default=64, show_default=True, help="Test images to denoise, if BANK has some.")
@click.option("--features", help="For FID: pixels, pca, or a TorchScript file.  [default: pca]")
@click.option("--batch", type=int, default=8, show_default=True, help="Images that go together.")
@click.option("--device", default="auto", show_default=True, help="auto, cpu or cuda.")
@click.option("--out", type=click.Path(path_type=Path), help="Folder of the tables.  [default: runs/BANK-compare]")
@click.option("--recipe", help="paper/mnist, paper/cifar10, ..., or a YAML file with bank, methods, seeds, steps.")
@_source_options
def compare_command(source: str | None, **given: Any) -> None:
    """Compare methods on BANK from the same initial noise: with a network, on held-out images, as sets of images.

    Writes table.md, results.json, grid.png and steps.png. The same command on the same folder goes on where it was
    stopped, and more methods can be added to it.
    """
    said = comparison(given["recipe"]) if given["recipe"] else {}
    source = source or said.get("bank")
    if source is None:
        raise GolddiffError("which BANK? Give a path or a known name, as in: golddiff compare mnist5k")
    chosen = {key: given[key] if given[key] is not None else said.get(key) for key in ("methods", "seeds", "steps")}
    methods = chosen["methods"] or "optimal,wiener,pca,golddiff"
    listed = methods.split(",") if isinstance(methods, str) else methods
    device = _device(given["device"])
    building = {key: given[key] for key in BUILDING}
    held = open_bank(source, **building)
    test = _held_out(source, held, given["held_out"], building)
    network = None
    if given["oracle"]:
        network = oracle(
            given["oracle"], held.to(device), prediction=given["prediction"], schedule=given["oracle_schedule"]
        )
    out = given["out"] or Path("runs") / f"{Path(given['recipe'] or source).stem}-compare"
    compare(
        held.to(device),
        listed,
        out,
        oracle=network,
        oracle_name=str(given["oracle"] or ""),
        seeds=parse_seeds("0-15" if chosen["seeds"] is None else chosen["seeds"]),
        steps=10 if chosen["steps"] is None else chosen["steps"],
        schedule=given["schedule"] or said.get("schedule", "ddpm"),
        held_out=test,
        features=given["features"] or said.get("features", "pca"),
        batch=given["batch"],
    )
    click.echo((out / "table.md").read_text(), nl=False)
    click.echo(f"\nin {out}: look at {out / 'grid.png'}")


def _held_out(source: str, held: Bank, count: int, building: dict[str, Any]) -> torch.Tensor | None:
    """The first images of the test part of a source, in [-1, 1]; None where there is none."""
    if count < 1 or held.is_latent or building["split"] != "train" or (Path(source) / "bank.json").is_file():
        return None
    try:
        options = {key: building[key] for key in ("size", "layout", "skip_broken")}
        images = open_source(source, split="test", limit=count, **options)
    except GolddiffError:
        return None
    return _in_range_of(held, images) if images.shape == held.shape else None


def _in_range_of(held: Bank, images: Images) -> torch.Tensor:
    """Pictures in [-1, 1], `(n, C, H, W)`; floats as they are."""
    pixels = torch.from_numpy(images.read(0, len(images)).copy())
    if pixels.is_floating_point():
        return pixels.float()
    return (pixels.double() / 127.5 - 1).float()


def _samples(path: str, **options: Any) -> Images:
    """Pictures of any origin; those of a run folder are in its samples.npz."""
    folder = Path(path)
    packed = folder / "samples.npz"
    return open_source(packed if packed.is_file() and (folder / "recipe.json").is_file() else path, **options)


@app.command("evaluate", short_help="Pictures of any origin beside a bank.")
@click.argument("samples", metavar="SAMPLES")
@click.option("--bank", "source", metavar="BANK", required=True, help="A bank, or anything that makes one.")
@click.option("--features", default="pca", show_default=True, help="pixels, pca, or a TorchScript file.")
@click.option("--layout", type=_Name("layout", ("NHWC", "NCHW", "NHW")), help="Axes of an array, if unclear.")
@click.option("--out", type=click.Path(path_type=Path), help="Also write the numbers here, as JSON.")
def evaluate_command(samples: str, source: str, features: str, layout: str | None, out: Path | None) -> None:
    """Compare SAMPLES with BANK: FID, KID, precision, recall, density, coverage, and copies of bank images.

    SAMPLES is anything that `bank build` reads: a folder of pictures, an .npz or .npy file, a zip. Each number comes
    with its standard error over blocks of images.
    """
    held = open_bank(source)
    images = _samples(samples, layout=layout)
    found = evaluate(_in_range_of(held, images), held, features)
    if out:
        with replacing(out) as part:
            part.write_text(json.dumps(found, indent=1) + "\n")
    click.echo(f"images         {found['images']}, beside {len(held)} of the bank, features {features}")
    for name, (value, error) in found.get("sets", {}).items():
        click.echo(f"{name:14} {value:.4g}" + (f" ± {error:.2g}" if math.isfinite(error) else ""))
    click.echo(
        "d1             {:.4f} ± {:.4f}  root mean square distance to the nearest bank image".format(*found["d1"])
    )
    click.echo("d1/d2          {:.3f} ± {:.3f}".format(*found["ratio_d1_d2"]))
    click.echo(f"copies         {found['copies']:.0%}")


@app.command("attribute", short_help="Which training images an image comes from.")
@click.argument("source", metavar="[BANK]", required=False)
@click.argument("options", nargs=-1, metavar="[KEY=VALUE]...")
@click.option("--method", type=_Name("method", METHODS), help="The denoiser.  [default: golddiff]")
@click.option("--seed", type=int, help="Of the image.  [default: the recipe's first, or 0]")
@click.option("--steps", type=int, help="Denoising steps.  [default: 10]")
@click.option("--schedule", type=_Name("schedule", SCHEDULES), help="Noise levels.  [default: ddpm]")
@click.option("--sampler", type=_Name("sampler", SAMPLERS), help="How to step.  [default: ddim]")
@click.option("--label", help="Class of the image, as 3 or cat.")
@click.option("--step", type=int, help="Which step's posterior mean, from 1.  [default: the last, the image itself]")
@click.option("--region", help="A box of pixels, as TOP,LEFT,BOTTOM,RIGHT; the last two are not part of it.")
@click.option("--top", type=int, default=8, show_default=True, help="Sources to show.")
@click.option("--remove", help="Sample the seed again without these rows of the bank, as 12,40-43.")
@click.option("--remove-label", help="The same without these classes, as 3,7 or cat.")
@click.option("--remove-top", type=int, default=0, metavar="K", help="The same without the K first sources.")
@click.option(
    "--statistics",
    type=_Name("statistics", ("recompute", "keep")),
    default="recompute",
    show_default=True,
    help="Without images: mean, covariance and masks of those that stay, or still of all.",
)
@click.option("--recipe", type=click.Path(path_type=Path), help="A run's recipe.json: attribute one of its seeds.")
@click.option("--device", default="auto", show_default=True, help="auto, cpu or cuda.")
@click.option("--out", type=click.Path(path_type=Path), help="Folder.  [default: runs/BANK-METHOD-attribute-SEED]")
@_source_options
def attribute_command(source: str | None, options: tuple[str, ...], **given: Any) -> None:
    """Say which training images one seed's image comes from, exactly, and what it is without some of them.

    Every pixel of a posterior mean is a weighted sum of the same pixel of training images. Writes sources.csv,
    attribution.json and panel.png.
    """
    if source and "=" in source and not Path(source).exists():
        options, source = (source, *options), None
    settings = read_settings(given["recipe"]) if given["recipe"] else {}
    stated = settings.pop("bank", None)
    settings.pop("format", None)
    if source is None and stated is None:
        raise GolddiffError("which BANK? Give a path or a known name, as in: golddiff attribute mnist5k")
    given["label"] = (given["label"],) if given["label"] else ()
    given["start"], given["seeds"] = None, None if given["seed"] is None else [given["seed"]]
    _override(settings, given, parse_options(options))
    building = {key: given[key] for key in BUILDING}
    held = _bank_of(source, stated, building)
    settings["seeds"] = parse_seeds(settings.get("seeds", [0]))[:1]
    recipe, model = Recipe.resolve(held.to(_device(given["device"])), settings)
    removal = Removal(
        parse_seeds(given["remove"]) if given["remove"] else (),
        parse_labels(given["remove_label"], held),
        given["remove_top"],
        given["statistics"],
    )
    seed = recipe.seeds[0]
    out = given["out"] or Path(f"{_default_out(source or stated, held, recipe.method, settings)}-attribute-{seed}")
    found = attribution_report(
        recipe, model, out, step=given["step"], region=_box(given["region"]), top=given["top"], removal=removal
    )
    click.echo(f"{found['pixels']} pixels at step {found['step']} come from {found['images_of_weight']} images")
    for one in found["sources"]:
        click.echo(f"row {one['row']:<8} {one['share']:7.2%}  {one['id']}  {one['label']}")
    if "without" in found:
        count, change = len(found["without"]["removed"]), found["without"]["rms_change"]
        click.echo(
            f"without {count} images the same seed differs by {change:.4f} (root mean square of a pixel, range 2)"
        )
    _say_where(out)


def _say_where(out: Path) -> None:
    drawn = (out / "panel.png").exists()
    click.echo(f"in {out}: look at {out / ('panel.png' if drawn else 'sources.csv')}")


def _box(text: str | None) -> tuple[int, int, int, int] | None:
    if text is None:
        return None
    parts = text.split(",")
    if len(parts) != 4 or not all(part.strip().isdecimal() for part in parts):
        raise GolddiffError(f"region '{text}': write it as TOP,LEFT,BOTTOM,RIGHT, as in 4,4,12,12")
    top, left, bottom, right = (int(part) for part in parts)
    return top, left, bottom, right


@app.command("audit", short_help="Which pictures are copies of a bank's.")
@click.argument("samples", metavar="SAMPLES")
@click.option("--bank", "source", metavar="BANK", required=True, help="A bank, or anything that makes one.")
@click.option("--size", type=int, metavar="N", help="Bring SAMPLES to N x N first, as bank build does.")
@click.option("--layout", type=_Name("layout", ("NHWC", "NCHW", "NHW")), help="Axes of an array, if unclear.")
@click.option("--limit", type=int, metavar="N", help="Take the first N samples only.")
@click.option("--out", type=click.Path(path_type=Path), help="Folder.  [default: runs/SAMPLES-audit]")
def audit_command(
    samples: str, source: str, size: int | None, layout: str | None, limit: int | None, out: Path | None
) -> None:
    """Find the nearest bank images of SAMPLES, of any model, and flag copies: d1 under a third of d2.

    SAMPLES is anything that `bank build` reads: a folder of pictures, an .npz or .npy file, a zip. Writes audit.csv,
    audit.json and panel.png. d1 and d2 are root mean square differences of a pixel (range 0 to 2) to the nearest and
    second nearest bank image.
    """
    held = open_bank(source)
    images = _samples(samples, size=size, layout=layout, limit=limit)
    out = out or Path("runs") / f"{Path(samples).resolve().stem}-audit"
    found = audit_report(held, images, _in_range_of(held, images), out)
    click.echo(f"{found['copies']} of {found['images']} images are copies of one of {len(held)} bank images")
    click.echo(f"d1 {found['mean_d1']:.4f}, d1/d2 {found['mean_ratio']:.3f} on average")
    click.echo(f"in {out}: look at {out / 'panel.png'}")


@app.command("calibrate", short_help="Windows of LS and its relatives, by a network.")
@click.argument("source", metavar="BANK")
@click.option("--oracle", type=click.Path(path_type=Path), required=True, help="Folder of a trained network.")
@click.option("--oracle-schedule", type=_Name("schedule", ("ddpm",)), help="The network's, if its folder has none.")
@click.option("--prediction", type=_Name("prediction", PREDICTIONS), help="What the network says.")
@click.option("--method", type=_Name("method", ("ls", "els", "bbels", "pspc")), default="ls", show_default=True)
@click.option("--sides", help="Windows to try, as 3,7,15.")
@click.option("--seeds", default="0-7", show_default=True, help="Trajectories of the network.")
@click.option("--steps", type=int, default=10, show_default=True)
@click.option("--schedule", type=_Name("schedule", SCHEDULES), default="ddpm", show_default=True)
@click.option("--out", type=click.Path(path_type=Path), required=True, help="File to write, .json; give it as window=.")
@_source_options
def calibrate_command(source: str, **given: Any) -> None:
    """Choose a window at each noise level by the cosine similarity of predicted noise with a network's."""
    held = open_bank(source, **{key: given[key] for key in BUILDING})
    network = oracle(given["oracle"], held, prediction=given["prediction"], schedule=given["oracle_schedule"])
    sides = parse_seeds(given["sides"]) if given["sides"] else None
    found = calibrate(
        held,
        network,
        given["out"],
        method=given["method"],
        sides=sides,
        seeds=parse_seeds(given["seeds"]),
        steps=given["steps"],
        schedule=given["schedule"],
    )
    for time, (rho, side) in zip(found["times"], found["windows"], strict=True):
        click.echo(f"time {time:<8g} sigma/alpha {rho:<10.4g} window {side}")
    click.echo(f"in {given['out']}: give it as window={given['out']}")


@app.command("concentrate", short_help="Over how many rows the posterior spreads.")
@click.argument("source", metavar="BANK")
@click.option("--images", "count", type=int, default=8, show_default=True, help="Noised images to look at.")
@click.option("--pixels", type=int, default=16, show_default=True, help="Pixels of each.")
@click.option("--steps", type=int, default=10, show_default=True, help="Noise levels.")
@click.option("--schedule", type=_Name("schedule", SCHEDULES), default="ddpm", show_default=True)
@click.option("--threshold", type=float, default=0.05, show_default=True, help="Of the PCA mask.")
@click.option("--tol", type=float, default=0.01, show_default=True, help="Of retrieval=local.")
@click.option("--out", type=click.Path(path_type=Path), help="Folder to write.  [default: runs/BANK-concentrate]")
@_source_options
def concentrate_command(source: str, count: int, out: Path | None, **given: Any) -> None:
    """Measure how the posterior over BANK concentrates as noise falls, and recommend budgets.

    Test images of a data set that has some are noised at each level; else images of BANK, each left out of its own
    posterior. Writes table.md, concentrate.json and concentrate.png.
    """
    building = {key: given.pop(key) for key in BUILDING}
    held = open_bank(source, **building)
    out = out or Path("runs") / f"{Path(source).resolve().stem}-concentrate"
    concentrate(held, out, images=_held_out(source, held, count, building), count=count, **given)
    click.echo((out / "table.md").read_text(), nl=False)
    click.echo(f"\nin {out}: look at {out / 'concentrate.png'}")


@app.group("oracle")
def oracle_group() -> None:
    """Trained networks to compare with."""


@oracle_group.command("train", short_help="Train a small network on a bank.")
@click.argument("source", metavar="BANK")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Folder of the network.")
@click.option("--images", type=int, default=200_000, show_default=True, help="Seen in all.")
@click.option("--batch", type=int, default=64, show_default=True, help="Of a step.")
@click.option("--width", type=int, default=32, show_default=True, help="Channels of the first level.")
@click.option("--learning-rate", type=float, default=4e-4, show_default=True)
@click.option("--mirror", is_flag=True, help="Mirror half of the images.")
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--device", default="auto", show_default=True, help="auto, cpu or cuda.")
@_source_options
def oracle_train(source: str, out: Path, device: str, mirror: bool, **given: Any) -> None:
    """Train an attention-free U-Net on BANK, as a yardstick.

    It predicts the noise of DDPM-linear levels; what is kept is the moving average of its weights.

    The same command goes on where it was stopped, and ends at the same weights.
    """
    held = open_bank(source, **{key: given[key] for key in BUILDING}).to(_device(device))
    keys = ("images", "batch", "width", "learning_rate", "seed")
    train_oracle(held, out, Training(flip=mirror, **{key: given[key] for key in keys}))
    click.echo(f"an oracle in {out}: give it as --oracle {out}")


@app.command("serve", short_help="A page that shows images come about.")
@click.argument("source", metavar="BANK")
@click.option("--host", default="127.0.0.1", show_default=True, help="Address; others than loopback need a token.")
@click.option("--port", type=int, default=8765, show_default=True, help="0 takes a free one.")
@click.option("--device", default="auto", show_default=True, help="auto, cpu or cuda.")
@click.option("--open", "open_browser", is_flag=True, help="Open the page in a browser.")
@_source_options
def serve_command(source: str, host: str, port: int, device: str, open_browser: bool, **building: Any) -> None:
    """Serve a page of BANK: trajectories step by step, which training images made a pixel, and what happens without
    them. Needs the extra web."""
    serve(open_bank(source, **building).to(_device(device)), host, port, open_browser=open_browser)


@app.command()
def doctor() -> None:
    """Say what this machine has: versions, threads, devices, speed, disk, extras."""
    for what, found in checks():
        click.echo(f"{what:18} {found}")


@app.command(short_help="Print a script that completes commands.")
@click.argument("shell", type=_Name("shell", ("bash", "zsh", "fish")))
def completion(shell: str) -> None:
    """Print a completion script for SHELL, as in: eval "$(golddiff completion bash)"."""
    made = get_completion_class(shell)
    if made is None:
        raise unknown("shell", shell, ("bash", "zsh", "fish"))
    click.echo(made(app, {}, "golddiff", "_GOLDDIFF_COMPLETE").source())


def _device(name: str) -> torch.device:
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


def _built(path: str) -> Bank:
    """A built bank, or that of a known name."""
    if Path(path).exists() and not (Path(path) / "bank.json").exists():
        raise GolddiffError(f"{path} is no bank yet: make one with golddiff bank build {path} --out FOLDER")
    return Bank.build(path, progress=True)


def _describe(held: Bank) -> None:
    c, h, w = held.shape
    values, counts = held.labels[held.labels >= 0].unique(return_counts=True)
    labels = f"{len(values)} classes of {counts.min()} to {counts.max()} images" if len(values) else "none"
    size = sum(t.numel() * t.element_size() for t in (held.pixels, held.proxy, held.norms, held.keys, held.labels))
    said = [f"{key} {value}" for key, value in held.source.items() if value and key not in ("skipped", "latents")]
    click.echo(f"images       {len(held)} of {c} x {h} x {w}, {str(held.pixels.dtype).removeprefix('torch.')}")
    click.echo(f"labels       {labels}")
    if held.classes:
        click.echo(f"classes      {', '.join(held.classes[:10])}{', ...' if len(held.classes) > 10 else ''}")
    click.echo(f"source       {', '.join(said)}")
    if held.is_latent:
        click.echo(f"latents      {held.source['latents']['name']}")
    if held.source.get("skipped"):
        click.echo(f"left out     {_listed(held.source['skipped'])}")
    click.echo(f"fingerprint  {held.fingerprint}")
    derived = sum(p.stat().st_size for p in held.path.glob("derived/*")) if held.path else 0
    click.echo(f"size         {size / 2**20:.1f} MiB mapped, {derived / 2**20:.1f} MiB derived (spectrum, masks)")
    click.echo(f"folder       {held.path}")


def _statistics(held: Bank) -> None:
    spectrum = held.spectrum() if held.D <= LARGEST_EIGENBASIS else None
    if not isinstance(spectrum, Spectrum):
        click.echo("spectrum     not computed for images of this size until a method needs it")
        return
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
    except (GolddiffError, OSError, EOFError) as error:
        click.echo(f"golddiff: {' '.join(str(error).split())}", err=True)
        sys.exit(2)
    except (click.Abort, KeyboardInterrupt):
        click.echo(
            "golddiff: stopped; finished batches of images are kept, and the same command goes on from there", err=True
        )
        sys.exit(130)
