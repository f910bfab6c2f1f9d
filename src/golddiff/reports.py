"""Folders for people: where an image comes from, and which images are copies of training images."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .attribution import Attribution, attribute
from .bank import Bank
from .denoise import Denoiser, denoiser
from .errors import GolddiffError
from .files import replacing
from .images import NO_LABEL, Images
from .jsons import write_json
from .memory import explained
from .metrics import Copies, copies
from .pictures import framed, grid, rgb, save_png, to_uint8
from .recipe import Recipe
from .sample import Step

__all__ = ["Removal", "attribution_report", "audit_report"]

COLOURS = np.array(
    [[31, 119, 180], [255, 127, 14], [44, 160, 44], [214, 39, 40], [148, 103, 189], [140, 86, 75], [227, 119, 194],
     [188, 189, 34], [23, 190, 207]],
    dtype=np.uint8,
)  # fmt: skip
OTHERS = 225  # grey of the pixels that come from other images
DIMMED = 0.25  # how much of a pixel outside the region is shown
STEPS_SHOWN = 6
IN_PANEL, ACROSS = 24, 3


@dataclass(frozen=True)
class Removal:
    """What to take out of the bank for the same seed again.

    Arguments:
        rows, labels: see `Bank.without`. top: so many of the image's first sources.
        statistics: `recompute` or `keep`.
    """

    rows: Sequence[int] = ()
    labels: Sequence[int] = ()
    top: int = 0
    statistics: str = "recompute"

    def __bool__(self) -> bool:
        return bool(len(self.rows) or len(self.labels) or self.top)


@explained()
def attribution_report(
    recipe: Recipe,
    model: Denoiser,
    out: Path,
    *,
    step: int | None = None,
    region: tuple[int, int, int, int] | None = None,
    top: int = 8,
    removal: Removal | None = None,
) -> dict[str, Any]:
    """Samples one seed and says which training images it comes from.

    The folder gets `sources.csv` (all rows with their shares), `attribution.json`, and `panel.png`: the image, the
    pixels of the heaviest source of each, a map of the first sources, and these; below, the same at other steps.

    Arguments:
        recipe, model: from `Recipe.resolve`, with one seed.
        out: the folder.
        step: which step's posterior mean is taken apart, from 1; the last if None, which is the image itself.
        region: see `attribute`.
        top: how many sources to show.
        removal: also sample the seed without some images.

    Raises:
        GolddiffError: a method without weights, a step or region that is not there.
    """
    seed, bank = recipe.seeds[0], model.bank
    number = recipe.levels if step is None else step
    if not 1 <= number <= recipe.levels:
        raise GolddiffError(f"step {number}: give one from 1 to {recipe.levels}")
    if not 1 <= top <= len(COLOURS):
        raise GolddiffError(f"top is {top}: give a number from 1 to {len(COLOURS)}")
    if removal is not None and removal.top < 0:
        raise GolddiffError(f"--remove-top is {removal.top}: give how many of the first sources to remove")
    if out.exists() and not out.is_dir():
        raise GolddiffError(f"{out} is a file: choose another --out")
    shown = sorted({number, *torch.linspace(1, recipe.levels, STEPS_SHOWN).round().int().tolist()})
    found = {s.index + 1: attribute(bank, s.posterior, 0, region) for s in _steps(recipe, model, seed, shown)}
    image = found[number]
    rows: list[tuple[str, Attribution]] = [("image" if number == recipe.levels else f"step {number}", image)]
    result = {
        "seed": seed,
        "step": number,
        "time": recipe.times[number - 1],
        "region": region,
        "pixels": len(image.pixels) // bank.shape[0],
        "images_of_weight": len(image.rows),
        "coverage": {str(count): image.coverage(count) for count in (1, 8, 64, 512) if count <= len(image.rows)},
        "sources": _listed(image, top),
        "method": recipe.method,
        "options": recipe.options,
        "bank": recipe.bank,
    }
    if removal:
        again = _without(recipe, image, removal, number, region)
        rows.append(("without", again))
        change = (again.posterior.mean[0] - image.posterior.mean[0]).flatten()[image.pixels].double()
        result["without"] = {
            "removed": again.bank.removed.tolist(),
            "statistics": removal.statistics,
            "rms_change": float(change.square().mean().sqrt()),
            "sources": _listed(again, top),
        }
    rows += [(f"step {n}", found[n]) for n in shown if n != number]
    _make(out)
    _write_csv(out / "sources.csv", ("row", "id", "label", "share"), _sources(image))
    write_json(out / "attribution.json", result)
    if _is_picture(bank):
        save_png(_panel(rows, top), out / "panel.png")
    return result


def _steps(recipe: Recipe, model: Denoiser, seed: int, wanted: Sequence[int]) -> Iterator[Step]:
    for step in recipe.trajectory(model, [seed]):
        if step.index + 1 in wanted:
            yield step
        if step.index + 1 == max(wanted):
            return


def _without(
    recipe: Recipe, image: Attribution, removal: Removal, number: int, region: tuple[int, int, int, int] | None
) -> Attribution:
    """The same seed at the same step, from the bank without some images."""
    rows = [*removal.rows, *image.rows[: removal.top].tolist()]
    view = image.bank.without(rows, removal.labels, statistics=removal.statistics)
    again = denoiser(recipe.method, view, **recipe.options)
    (step,) = _steps(recipe, again, recipe.seeds[0], [number])
    return attribute(view, step.posterior, 0, region)


def _sources(image: Attribution) -> Iterator[tuple[int, str, str, float]]:
    bank = image.bank
    for row, share in zip(image.rows.tolist(), image.shares.tolist(), strict=True):
        yield row, _id(bank, row), _class(bank, row), share


def _listed(image: Attribution, count: int) -> list[dict[str, Any]]:
    names = ("row", "id", "label", "share")
    return [dict(zip(names, source, strict=True)) for source, _ in zip(_sources(image), range(count), strict=False)]


def _is_picture(bank: Bank) -> bool:
    """Whether rows can be drawn as they are."""
    return bank.shape[0] in (1, 3, 4) and not bank.is_latent


def _id(bank: Bank, row: int) -> str:
    return bank.ids[row].decode(errors="replace")


def _class(bank: Bank, row: int) -> str:
    label = int(bank.labels[row])
    return "" if label == NO_LABEL else bank.classes[label] if label < len(bank.classes) else str(label)


def _make(out: Path) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise GolddiffError(f"{out} cannot be made ({error.strerror}): choose another --out") from error


def _write_csv(path: Path, head: Sequence[str], rows: Iterator[tuple[Any, ...]]) -> None:
    with replacing(path) as part, part.open("w", newline="", encoding="utf-8", errors="replace") as file:
        writer = csv.writer(file)
        writer.writerow(head)
        writer.writerows(rows)


def _panel(rows: list[tuple[str, Attribution]], top: int) -> Any:
    """One line of pictures for each attribution."""
    pictures, captions, labels = [], [], []
    for name, found in rows:
        first = found.rows[:top]
        inside = torch.zeros(found.bank.D, dtype=torch.bool).index_fill_(0, found.pixels.cpu(), True)
        inside = inside.unflatten(0, found.bank.shape).any(0).numpy()
        mosaic = found.bank.images(found.source.clamp(min=0).flatten(), torch.float32).flatten(1)
        mosaic = mosaic.gather(1, torch.arange(found.bank.D, device=mosaic.device)[:, None]).reshape(found.bank.shape)
        mean, heaviest = (rgb(to_uint8(image[None])[0]) for image in (found.posterior.mean[found.b], mosaic))
        mean, heaviest = _dimmed(mean, inside), np.where(inside[:, :, None], heaviest, np.uint8(255))
        line = [framed(picture) for picture in (mean, heaviest, _coloured(found, first, inside))]
        sources = [rgb(picture) for picture in to_uint8(found.bank.images(first))]
        line += [framed(picture, COLOURS[i]) for i, picture in enumerate(sources)]
        line += [np.full_like(line[0], 255)] * (3 + top - len(line))
        pictures += line
        shares = [
            f"{row}: {share:.1%}" if share > 0.01 else f"{row}: {share:.2%}"
            for row, share in zip(first.tolist(), found.shares.tolist(), strict=False)
        ]
        captions += ["", "", f"{top} images: {found.coverage(top):.1%}", *shares, *[""] * (top - len(shares))]
        labels.append(name)
    heads = ["mean", "heaviest source", "which one", *(f"source {i + 1}" for i in range(top))]
    return grid(np.stack(pictures), 3 + top, rows=labels, heads=heads, captions=captions)


def _coloured(found: Attribution, first: Tensor, inside: np.ndarray) -> np.ndarray:
    """Which of the first sources weighs most at each pixel, `(H, W, 3)`: the mean colour over the channels; white
    outside of the region."""
    source = found.source.cpu()
    colours = torch.full((*source.shape, 3), float(OTHERS))
    for i, row in enumerate(first.tolist()):
        colours[source == row] = torch.from_numpy(COLOURS[i]).float()
    colours[:, torch.from_numpy(~inside)] = 255.0
    return colours.mean(0).round().to(torch.uint8).numpy()


def _dimmed(picture: np.ndarray, inside: np.ndarray) -> np.ndarray:
    faint = (255 - DIMMED * (255 - picture.astype(np.float32))).round().astype(np.uint8)
    return np.where(inside[:, :, None], picture, faint)


@explained()
def audit_report(bank: Bank, samples: Images, x: Tensor, out: Path) -> dict[str, Any]:
    """Which of some images, of any origin, are copies of images of a bank.

    The folder gets `audit.csv` (each image with its nearest and second nearest row and their distances), `audit.json`
    and `panel.png` (the images with the smallest `d1 / d2`, beside these rows).

    Arguments:
        samples: where the images come from. x: the same in [-1, 1], `(n, C, H, W)`.
        out: the folder.
    """
    if tuple(x.shape[1:]) != bank.shape:
        raise GolddiffError(
            f"images of {tuple(x.shape[1:])} beside a bank of {bank.shape}: give the same shape, with --size"
        )
    if out.exists() and not out.is_dir():
        raise GolddiffError(f"{out} is a file: choose another --out")
    found = copies(x, bank)
    order = torch.argsort(found.ratio, stable=True)
    result = {
        "images": len(x),
        "bank": bank.fingerprint,
        "copies": int(found.flagged.sum()),
        "mean_d1": float(found.d1.mean()),
        "mean_ratio": float(found.ratio.mean()),
        "flagged": [samples.ids[i] for i in order.tolist() if found.flagged[i]],
    }
    _make(out)
    head = ("image", "row", "id", "label", "second", "d1", "d2", "ratio", "copy")
    _write_csv(out / "audit.csv", head, _audited(bank, samples, found))
    write_json(out / "audit.json", result)
    if _is_picture(bank):
        save_png(_audit_panel(bank, samples, x, found, order[:IN_PANEL]), out / "panel.png")
    return result


def _audited(bank: Bank, samples: Images, found: Copies) -> Iterator[tuple[Any, ...]]:
    for i, (row, second) in enumerate(zip(found.row.tolist(), found.second.tolist(), strict=True)):
        numbers = [round(float(t[i]), 6) for t in (found.d1, found.d2, found.ratio)]
        yield samples.ids[i], row, _id(bank, row), _class(bank, row), second, *numbers, int(found.flagged[i])


def _audit_panel(bank: Bank, samples: Images, x: Tensor, found: Copies, chosen: Tensor) -> Any:
    """Image, nearest and second nearest row, three of these in a line."""
    pictures, captions = [], []
    for i in chosen.tolist():
        rows = torch.stack([found.row[i], found.second[i]]).to(bank.device)
        three = [rgb(picture) for picture in (*to_uint8(x[i : i + 1]), *to_uint8(bank.images(rows)))]
        colour = COLOURS[3] if found.flagged[i] else None
        pictures += [framed(three[0], colour), framed(three[1]), framed(three[2])]
        captions += [Path(samples.ids[i]).name[-14:], f"d1 {float(found.d1[i]):.3f}", f"d2 {float(found.d2[i]):.3f}"]
    heads = ["image", "nearest", "second"] * min(ACROSS, len(chosen))
    return grid(np.stack(pictures), len(heads), heads=heads, captions=captions)
