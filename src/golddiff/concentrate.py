"""How the posterior concentrates as noise falls: over how many rows it spreads, for whole images and for pixels."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .bank import Bank
from .denoise import denoiser
from .denoise.local import masked_logits
from .errors import GolddiffError
from .files import replacing
from .golden import Budget
from .importance import LocalSubset
from .jsons import write_json
from .locality import Masked
from .memory import explained
from .noise import Noise, schedule_named
from .posterior import softmax_of_rows
from .progress import Bar
from .sample import initial_noise

__all__ = ["concentrate"]

SHARES = (0.5, 0.9, 0.99)
BANDS = (0.05, 0.5, 0.95)
MEASURES = ("ess", "entropy", *(f"k{share:.0%}".rstrip("%") for share in SHARES))
BLOCK = 2048
FAR = 2**40  # from the seeds of samples


@explained()
def concentrate(
    bank: Bank,
    out: str | Path,
    *,
    images: Tensor | None = None,
    count: int = 8,
    pixels: int = 16,
    steps: int = 10,
    schedule: str = "ddpm",
    tol: float = 0.01,
    **options: Any,
) -> dict[str, Any]:
    """Measures the posterior's spread at each noise level and writes `concentrate.json`, `table.md` and a plot.

    For each image, over whole images, and for each pixel through the masks of PCA-locality: the effective support
    `ess = 1 / sum w^2`, the exponential of the entropy, and how many rows hold 50, 90 and 99 % of the weight. Bands are
    the 5, 50 and 95 % quantiles over images (and pixels).

    Arguments:
        images: `(n, C, H, W)` that are no rows, noised at each level; by default rows of the bank, evenly spaced, each
            left out of its own posterior.
        count: how many images. pixels: how many pixels, evenly spaced among those that vary.
        tol: of `retrieval=local`, whose number of rows is shown.
        options: of the mask, see `PCAMask`.

    Raises:
        GolddiffError: a bank of fewer than 2 images, or `out` is a file.
    """
    out = Path(out)
    if len(bank.removed):
        raise GolddiffError("concentrate looks at whole banks: give the bank that images were removed from")
    if len(bank) < 2:
        raise GolddiffError("a bank of one image has nothing to concentrate: give a larger bank")
    if min(count, pixels) < 1:
        raise GolddiffError(f"{count} images and {pixels} pixels: give at least one of each")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise GolddiffError(f"{out} cannot be made ({error.strerror}): choose another --out") from error
    rows = torch.linspace(0, len(bank) - 1, min(count, len(bank))).long()
    x = bank.images(rows.to(bank.device)) if images is None else images[:count].to(bank.device)
    left_out = rows if images is None else None
    varying = bank.spectrum().varying.nonzero()[:, 0]
    varying = varying if len(varying) else torch.arange(bank.D)
    chosen = varying[torch.linspace(0, len(varying) - 1, min(pixels, len(varying))).long()].to(bank.device)
    model = denoiser("pca", bank, **options)
    locality: Masked = model.locality  # type: ignore[attr-defined]
    local, paper = LocalSubset(bank, tol), Budget()
    z = initial_noise([FAR + i for i in range(len(x))], bank.shape).to(x)
    levels = []
    with Bar(total=steps * len(x), desc="concentrate", unit="image", disable=None) as bar:
        for time, noise in schedule_named(schedule).levels(steps):
            alpha, sigma = noise.like(x)
            found: dict[str, list[Tensor]] = {"whole": [], "pixels": []}
            for b in range(len(x)):
                x_t, own = (alpha * x + sigma * z)[b : b + 1], None if left_out is None else int(left_out[b])
                for name, logits in _logits(bank, locality, x_t, noise, chosen):
                    if own is not None:
                        logits[:, own] = -math.inf
                    found[name].append(_spread(logits))
                bar.update()
            levels.append(
                {
                    "time": time,
                    "rho": float(noise.rho),
                    **{name: _bands(torch.cat(parts)) for name, parts in found.items()},
                    "rows_paper": paper.sizes(noise, len(bank))[1],
                    "rows_local": min(len(bank), local.wanted(noise, locality)),
                }
            )
    result = {
        "bank": bank.fingerprint,
        "images": len(x),
        "held_out": images is not None,
        "pixels": len(chosen),
        "tol": tol,
        "levels": levels,
    }
    _write(result, out, len(bank))
    return result


def _logits(bank: Bank, locality: Masked, x_t: Tensor, noise: Noise, pixels: Tensor) -> list[tuple[str, Tensor]]:
    """Logits of all rows for the whole image, `(1, N)`, and for some pixels, `(pixels, N)`."""
    q, s = bank.query(x_t, noise)
    everything = torch.arange(len(bank), device=x_t.device)
    sums = locality.sums(noise, None, x_t)
    parts = [masked_logits(q[0], s[0], v, sums, pixels) for _, _, v in bank.blocks(None, x_t.dtype, BLOCK)]
    return [
        ("whole", -bank.distances(q[0], s[0], everything)[None] / 2),
        ("pixels", torch.cat(parts).T.contiguous()),
    ]


def _spread(logits: Tensor) -> Tensor:
    """The measures of posteriors `(n, N)`, `(n, 5)` float64."""
    weights, _, ess = softmax_of_rows(logits)
    entropy = -(weights * weights.clamp(min=1e-300).log()).sum(1)
    mass = weights.sort(1, descending=True).values.cumsum(1)
    counts = [(mass < share).sum(1) + 1 for share in SHARES]
    return torch.stack([ess, entropy.exp(), *(c.clamp(max=logits.shape[1]).double() for c in counts)], 1)


def _bands(values: Tensor) -> dict[str, list[float]]:
    quantiles = values.quantile(torch.tensor(BANDS, dtype=values.dtype, device=values.device), 0)
    return {name: quantiles[:, i].tolist() for i, name in enumerate(MEASURES)}


def _write(result: dict[str, Any], out: Path, count: int) -> None:
    write_json(out / "concentrate.json", result)
    with replacing(out / "table.md") as part:
        part.write_text(table(result, count))
    _plot(result, out / "concentrate.png", count)


def table(result: dict[str, Any], count: int) -> str:
    """Markdown: medians, with 5 and 95 % quantiles of the effective support."""
    origin = "held-out images" if result["held_out"] else "rows, each left out of its own posterior"
    lines = [
        f"{count} rows; {result['images']} {origin}, {result['pixels']} pixels of each; medians (5 to 95 %).",
        "",
        "| time | sigma/alpha | ess, image | k50 | k90 | k99 | ess, pixel | k50 | k90 | k99 | paper | local |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for level in result["levels"]:
        cells = [f"{level['time']:g}", f"{level['rho']:.3g}"]
        for name in ("whole", "pixels"):
            low, middle, high = level[name]["ess"]
            cells.append(f"{middle:.0f} ({low:.0f} to {high:.0f})")
            cells += [f"{level[name][k][1]:.0f}" for k in ("k50", "k90", "k99")]
        cells += [str(level["rows_paper"]), str(level["rows_local"])]
        lines.append("| " + " | ".join(cells) + " |")
    lines += [
        "",
        f"Recommended: retrieval=local tol={result['tol']:g}; it takes the rows of the last column for each tile.",
    ]
    short = [level for level in result["levels"] if level["rows_paper"] < level["pixels"]["k90"][1]]
    if short:
        times = ", ".join(f"{level['time']:g}" for level in short)
        lines.append(f"The paper's budget is less than 90 % of a pixel's weight at time {times}.")
    return "\n".join(lines) + "\n"


def _plot(result: dict[str, Any], path: Path, count: int) -> None:
    """Rows against noise, if matplotlib (extra `plots`) is there."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return
    figure = Figure(figsize=(10, 4), layout="constrained")
    levels = result["levels"]
    rho = [level["rho"] for level in levels]
    for axes, (name, title) in zip(
        figure.subplots(1, 2, sharey=True), (("whole", "whole images"), ("pixels", "pixels, PCA masks")), strict=True
    ):
        low, middle, high = zip(*(level[name]["ess"] for level in levels), strict=True)
        axes.fill_between(rho, low, high, alpha=0.2, color="C0")
        axes.plot(rho, middle, color="C0", marker="o", ms=3, label="effective support")
        for i, key in enumerate(("k50", "k90", "k99")):
            axes.plot(rho, [level[name][key][1] for level in levels], color=f"C{i + 1}", label=f"{key[1:]} % of weight")
        axes.plot(rho, [level["rows_paper"] for level in levels], "k--", lw=1, label="golden rows, paper")
        if name == "pixels":
            axes.plot(rho, [level["rows_local"] for level in levels], "k:", lw=1, label="rows of a tile, local")
        axes.axhline(count, color="grey", lw=0.5)
        axes.set(xscale="log", yscale="log", title=title, xlabel="noise, sigma / alpha")
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7)
    figure.axes[0].set_ylabel("rows")
    with replacing(path) as part:
        figure.savefig(part, dpi=110, format="png")
