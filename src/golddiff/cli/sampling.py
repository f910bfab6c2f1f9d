"""golddiff sample."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
import torch

from ..bank import Bank
from ..denoise import METHODS
from ..errors import GolddiffError
from ..noise import SCHEDULES
from ..ranks import Ranks, joined, parse_shard
from ..recipe import (
    DEFAULTS,
    Recipe,
    parse_options,
    parse_seeds,
)
from ..runs import run
from ..sample import SAMPLERS
from .common import BUILDING, Name, app, bank_of, default_out, device_of, listed, override, source_options, stated_by

FEW = 32  # golden subsets of fewer rows are worth a note


@app.command(short_help="Sample images from a bank.")
@click.argument("source", metavar="[BANK]", required=False)
@click.argument("options", nargs=-1, metavar="[KEY=VALUE]...")
@click.option("--method", type=Name("method", METHODS), help="The denoiser.  [default: golddiff]")
@click.option("--seeds", help="One image for each, as 0-15 or 3,7,20-29.  [default: 0-15]")
@click.option("--steps", type=int, help="Denoising steps.  [default: 10]")
@click.option("--schedule", type=Name("schedule", SCHEDULES), help="Noise levels.  [default: ddpm]")
@click.option(
    "--sampler", type=Name("sampler", SAMPLERS), help="How to step; dpm++ needs the extra diffusers.  [default: ddim]"
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
@source_options
def sample(source: str | None, options: tuple[str, ...], **given: Any) -> None:
    """Sample images from BANK: a built bank, anything that `bank build` takes, or a known name.

    KEY=VALUE sets options of the method, as in:

      golddiff sample mnist5k retrieval=paper k_max=300

    With --recipe, BANK may be left out, and what is said here goes before what the recipe says. The same command on
    the same folder goes on where it was stopped.
    """
    source, stated, settings, options = stated_by(source, options, given["recipe"])
    override(settings, given, parse_options(options))
    parse_seeds(settings.get("seeds", DEFAULTS["seeds"]))
    if given["batch"] < 1:
        raise GolddiffError(f"--batch is {given['batch']}: give at least 1")
    device = device_of(given["device"])
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
    held = bank_of(source, stated, building)
    recipe, model = Recipe.resolve(held.to(device), settings)
    out = given["out"] or default_out(source or stated, held, recipe.method, {**settings, **building})
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
        click.echo(f"golddiff: left out {listed(held.source['skipped'])}", err=True)
    k_max = recipe.options.get("k_max", 1.0)
    rows = round(k_max * len(held)) if isinstance(k_max, float) else k_max
    if recipe.options.get("retrieval") in ("reference", "paper") and rows < FEW:
        click.echo(
            f"golddiff: note: the paper's budgets leave at most {rows} of {len(held)} images to each step, so expect "
            "copies; for a small bank take all rows, with --method pca",
            err=True,
        )
