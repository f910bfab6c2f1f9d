"""golddiff compare, evaluate, calibrate, concentrate and oracle train."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import click
import torch

from ..bank import Bank
from ..calibrate import calibrate
from ..compare import compare
from ..concentrate import concentrate
from ..errors import GolddiffError
from ..images import open_source
from ..jsons import write_json
from ..metrics import evaluate
from ..noise import SCHEDULES
from ..oracle import PREDICTIONS, oracle
from ..recipe import (
    comparison,
    open_bank,
    parse_seeds,
)
from ..training import Training, train_oracle
from .common import BUILDING, Name, app, device_of, in_range_of, samples_of, source_options


@app.command("compare", short_help="Methods beside each other and a network.")
@click.argument("source", metavar="[BANK]", required=False)
@click.option("--methods", help="Names, as optimal,pca,golddiff:retrieval=paper,els@8 (@8: the first 8 seeds only).")
@click.option("--oracle", type=click.Path(path_type=Path), help="Folder of a trained network (diffusers UNet2DModel).")
@click.option("--oracle-schedule", type=Name("schedule", ("ddpm",)), help="The network's, if its folder has none.")
@click.option("--prediction", type=Name("prediction", PREDICTIONS), help="What the network says.")
@click.option("--seeds", help="Of the initial noise, the same for all.  [default: 0-15]")
@click.option("--steps", type=int, help="DDIM steps.  [default: 10]")
@click.option("--schedule", type=Name("schedule", SCHEDULES), help="Noise levels.  [default: ddpm]")
@click.option("--held-out", type=int, default=64, show_default=True, help="Test images to denoise, if BANK has some.")
@click.option("--features", help="For FID: pixels, pca, or a TorchScript file.  [default: pca]")
@click.option("--batch", type=int, default=8, show_default=True, help="Images that go together.")
@click.option("--device", default="auto", show_default=True, help="auto, cpu or cuda.")
@click.option("--out", type=click.Path(path_type=Path), help="Folder of the tables.  [default: runs/BANK-compare]")
@click.option("--recipe", help="paper/mnist, paper/cifar10, ..., or a YAML file with bank, methods, seeds, steps.")
@source_options
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
    device = device_of(given["device"])
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
    return in_range_of(held, images) if images.shape == held.shape else None


@app.command("evaluate", short_help="Pictures of any origin beside a bank.")
@click.argument("samples", metavar="SAMPLES")
@click.option("--bank", "source", metavar="BANK", required=True, help="A bank, or anything that makes one.")
@click.option("--features", default="pca", show_default=True, help="pixels, pca, or a TorchScript file.")
@click.option("--size", type=int, metavar="N", help="Bring SAMPLES to N x N first, as bank build does.")
@click.option("--layout", type=Name("layout", ("NHWC", "NCHW", "NHW")), help="Axes of an array, if unclear.")
@click.option("--out", type=click.Path(path_type=Path), help="Also write the numbers here, as JSON.")
def evaluate_command(
    samples: str, source: str, features: str, size: int | None, layout: str | None, out: Path | None
) -> None:
    """Compare SAMPLES with BANK: FID, KID, precision, recall, density, coverage, and copies of bank images.

    SAMPLES is anything that `bank build` reads: a folder of pictures, an .npz or .npy file, a zip. Each number comes
    with its standard error over blocks of images.
    """
    held = open_bank(source)
    images = samples_of(samples, size=size, layout=layout)
    found = evaluate(in_range_of(held, images), held, features)
    if out:
        write_json(out, found)
    click.echo(f"images         {found['images']}, beside {len(held)} of the bank, features {features}")
    for name, (value, error) in found.get("sets", {}).items():
        click.echo(f"{name:14} {value:.4g}" + (f" ± {error:.2g}" if math.isfinite(error) else ""))
    click.echo(
        "d1             {:.4f} ± {:.4f}  root mean square distance to the nearest bank image".format(*found["d1"])
    )
    click.echo("d1/d2          {:.3f} ± {:.3f}".format(*found["ratio_d1_d2"]))
    click.echo(f"copies         {found['copies']:.0%}")


@app.command("calibrate", short_help="Windows of LS and its relatives, by a network.")
@click.argument("source", metavar="BANK")
@click.option("--oracle", type=click.Path(path_type=Path), required=True, help="Folder of a trained network.")
@click.option("--oracle-schedule", type=Name("schedule", ("ddpm",)), help="The network's, if its folder has none.")
@click.option("--prediction", type=Name("prediction", PREDICTIONS), help="What the network says.")
@click.option("--method", type=Name("method", ("ls", "els", "bbels", "pspc")), default="ls", show_default=True)
@click.option("--sides", help="Windows to try, as 3,7,15.")
@click.option("--seeds", default="0-7", show_default=True, help="Trajectories of the network.")
@click.option("--steps", type=int, default=10, show_default=True)
@click.option("--schedule", type=Name("schedule", SCHEDULES), default="ddpm", show_default=True)
@click.option("--out", type=click.Path(path_type=Path), required=True, help="File to write, .json; give it as window=.")
@source_options
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
@click.option("--schedule", type=Name("schedule", SCHEDULES), default="ddpm", show_default=True)
@click.option("--threshold", type=float, default=0.05, show_default=True, help="Of the PCA mask.")
@click.option("--tol", type=float, default=0.01, show_default=True, help="Of retrieval=local.")
@click.option("--out", type=click.Path(path_type=Path), help="Folder to write.  [default: runs/BANK-concentrate]")
@source_options
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
@source_options
def oracle_train(source: str, out: Path, device: str, mirror: bool, **given: Any) -> None:
    """Train an attention-free U-Net on BANK, as a yardstick.

    It predicts the noise of DDPM-linear levels; what is kept is the moving average of its weights.

    The same command goes on where it was stopped, and ends at the same weights.
    """
    held = open_bank(source, **{key: given[key] for key in BUILDING}).to(device_of(device))
    keys = ("images", "batch", "width", "learning_rate", "seed")
    train_oracle(held, out, Training(flip=mirror, **{key: given[key] for key in keys}))
    click.echo(f"an oracle in {out}: give it as --oracle {out}")
