"""golddiff bank build, info and verify."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
import torch

from ..bank import Bank
from ..errors import GolddiffError
from ..jsons import as_written
from ..pictures import grid, save_png, to_uint8
from ..spectrum import LARGEST_EIGENBASIS, Spectrum
from .common import app, listed, source_options


@app.group()
def bank() -> None:
    """Make, look at and check banks: images prepared for search."""


@bank.command("build", short_help="Build a bank from pictures.")
@click.argument("source")
@click.option("--out", type=click.Path(path_type=Path), help="Folder of the bank (default: the cache).")
@source_options
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


@bank.command("verify", short_help="Check every byte of banks, recipes and calibrations.")
@click.argument("paths", metavar="BANK...", nargs=-1, required=True)
def bank_verify(paths: tuple[str, ...]) -> None:
    """Check every byte of a BANK against the hashes of its build, and what was derived from it: spectra, masks, cells.

    Recipes and calibrations (FILE.json) are checked against their checksums.
    """
    for path in paths:
        if Path(path).suffix == ".json" and Path(path).is_file():
            if not as_written(Path(path)):
                raise GolddiffError(f"{path} is not as it was written, or has no checksum: take it from a copy")
        elif wrong := _built(path).verify():
            raise GolddiffError(f"{path} is damaged, build it again: {'; '.join(wrong)}")
        click.echo(f"{path}: all is as it was built")


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
        click.echo(f"left out     {listed(held.source['skipped'])}")
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
