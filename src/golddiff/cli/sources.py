"""golddiff attribute and audit: where images come from."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from ..denoise import METHODS
from ..errors import GolddiffError
from ..noise import SCHEDULES
from ..recipe import (
    Recipe,
    open_bank,
    parse_labels,
    parse_options,
    parse_seeds,
)
from ..reports import Removal, attribution_report, audit_report
from ..sample import SAMPLERS
from .common import (
    BUILDING,
    Name,
    app,
    bank_of,
    default_out,
    device_of,
    in_range_of,
    override,
    samples_of,
    source_options,
    stated_by,
)


@app.command("attribute", short_help="Which training images an image comes from.")
@click.argument("source", metavar="[BANK]", required=False)
@click.argument("options", nargs=-1, metavar="[KEY=VALUE]...")
@click.option("--method", type=Name("method", METHODS), help="The denoiser.  [default: golddiff]")
@click.option("--seed", type=int, help="Of the image.  [default: the recipe's first, or 0]")
@click.option("--steps", type=int, help="Denoising steps.  [default: 10]")
@click.option("--schedule", type=Name("schedule", SCHEDULES), help="Noise levels.  [default: ddpm]")
@click.option("--sampler", type=Name("sampler", SAMPLERS), help="How to step.  [default: ddim]")
@click.option("--label", help="Class of the image, as 3 or cat.")
@click.option("--step", type=int, help="Which step's posterior mean, from 1.  [default: the last, the image itself]")
@click.option("--region", help="A box of pixels, as TOP,LEFT,BOTTOM,RIGHT; the last two are not part of it.")
@click.option("--top", type=int, default=8, show_default=True, help="Sources to show.")
@click.option("--remove", help="Sample the seed again without these rows of the bank, as 12,40-43.")
@click.option("--remove-label", help="The same without these classes, as 3,7 or cat.")
@click.option("--remove-top", type=int, default=0, metavar="K", help="The same without the K first sources.")
@click.option(
    "--statistics",
    type=Name("statistics", ("recompute", "keep")),
    default="recompute",
    show_default=True,
    help="Without images: mean, covariance and masks of those that stay, or still of all.",
)
@click.option("--recipe", type=click.Path(path_type=Path), help="A run's recipe.json: attribute one of its seeds.")
@click.option("--device", default="auto", show_default=True, help="auto, cpu or cuda.")
@click.option("--out", type=click.Path(path_type=Path), help="Folder.  [default: runs/BANK-METHOD-attribute-SEED]")
@source_options
def attribute_command(source: str | None, options: tuple[str, ...], **given: Any) -> None:
    """Say which training images one seed's image comes from, exactly, and what it is without some of them.

    Every pixel of a posterior mean is a weighted sum of the same pixel of training images. Writes sources.csv,
    attribution.json and panel.png.
    """
    source, stated, settings, options = stated_by(source, options, given["recipe"])
    given["label"] = (given["label"],) if given["label"] else ()
    given["start"], given["seeds"] = None, None if given["seed"] is None else [given["seed"]]
    override(settings, given, parse_options(options))
    building = {key: given[key] for key in BUILDING}
    held = bank_of(source, stated, building)
    settings["seeds"] = parse_seeds(settings.get("seeds", [0]))[:1]
    recipe, model = Recipe.resolve(held.to(device_of(given["device"])), settings)
    removal = Removal(
        parse_seeds(given["remove"], "rows") if given["remove"] else (),
        parse_labels(given["remove_label"], held),
        given["remove_top"],
        given["statistics"],
    )
    seed = recipe.seeds[0]
    asked = {"step": given["step"], "region": given["region"], "removal": asdict(removal) if removal else None}
    settings["attribution"] = asked if any(asked.values()) else None
    out = given["out"] or Path(f"{default_out(source or stated, held, recipe.method, settings)}-attribute-{seed}")
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
    _say_where(out, "sources.csv")


def _say_where(out: Path, table: str) -> None:
    drawn = (out / "panel.png").exists()
    click.echo(f"in {out}: look at {out / ('panel.png' if drawn else table)}")


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
@click.option("--layout", type=Name("layout", ("NHWC", "NCHW", "NHW")), help="Axes of an array, if unclear.")
@click.option("--limit", type=int, metavar="N", help="Take the first N samples only.")
@click.option("--out", type=click.Path(path_type=Path), help="Folder.  [default: runs/SAMPLES-audit-BANK]")
def audit_command(
    samples: str, source: str, size: int | None, layout: str | None, limit: int | None, out: Path | None
) -> None:
    """Find the nearest bank images of SAMPLES, of any model, and flag copies: d1 under a third of d2.

    SAMPLES is anything that `bank build` reads: a folder of pictures, an .npz or .npy file, a zip. Writes audit.csv,
    audit.json and panel.png. d1 and d2 are root mean square differences of a pixel (range 0 to 2) to the nearest and
    second nearest bank image.
    """
    held = open_bank(source)
    images = samples_of(samples, size=size, layout=layout, limit=limit)
    out = out or Path("runs") / f"{Path(samples).resolve().stem}-audit-{Path(source).resolve().stem}"
    found = audit_report(held, images, in_range_of(held, images), out)
    click.echo(f"{found['copies']} of {found['images']} images are copies of one of {len(held)} bank images")
    click.echo(f"d1 {found['mean_d1']:.4f}, d1/d2 {found['mean_ratio']:.3f} on average")
    _say_where(out, "audit.csv")
