"""What a step costs and how exact it is as a bank grows: time, error, recall and bytes for banks of any size.

    for n in 10000 50000 200000 1281167; do python benchmarks/crops.py $n --out crops/$n; done
    python benchmarks/scale.py crops/* --json scale.json --plot scale.png

All banks are compared through the masks of the largest, on noisy crops that are in none of them. The error is that of
the mean at 64 output pixels of 4 images, against the exact mean over all rows of the same bank; recall is the share of
the 10 best rows of a tile by score that a search scores, of all tiles and of those whose scores rest on under 100 rows.
Times are medians of a batch of 8, after a first call. Masks and cells are made when they are not there (minutes).
"""

import argparse
import json
import math
import platform
import statistics
import time
from pathlib import Path

import numpy as np
import torch

import golddiff as gd
from crops import crops
from golddiff import spectrum
from golddiff.denoise import MaskedDenoiser
from golddiff.denoise.compiled import masked_softmax
from golddiff.golden import Everything
from golddiff.importance import ANYWHERE, SEARCHED, LocalSubset
from golddiff.locality import Locality, MaskRuns
from golddiff.spectrum import Statistics

SCHEDULE = gd.DDPM()
TIMES = range(900, -1, -100)
COMPARED = (900, 600, 300, 0)
IMAGES, BATCH, PIXELS, NEIGHBOURS, NARROW = 4, 8, 64, 10, 100


def noisy(t: int, clean: torch.Tensor) -> tuple[torch.Tensor, gd.Noise]:
    """Images with the noise of a time, always the same."""
    noise = SCHEDULE(t)
    z = torch.randn(clean.shape, generator=torch.Generator().manual_seed(t))
    return (noise.alpha * clean + noise.sigma * z).float(), noise


def exact_mean(
    bank: gd.Bank, locality: Locality, x_t: torch.Tensor, noise: gd.Noise, pixels: torch.Tensor
) -> torch.Tensor:
    """The mean over all rows at some pixels, `(B, pixels)`."""
    support = Everything(bank).select(x_t, noise, locality, None, torch.zeros(len(x_t)))
    runs = [MaskRuns.of(locality.mask(noise), pixels)]
    mean, _, _ = masked_softmax(bank, *bank.query(x_t.double(), noise), support, runs)
    return bank.uncentred(mean)[:, pixels]


def recall(subset: LocalSubset, locality: Locality, x_t: torch.Tensor, noise: gd.Noise) -> dict[str, float]:
    """The share of the best rows of a tile that are scored: of all tiles, and of narrow ones."""
    bank, scores = subset.bank, subset._scores
    level = scores.level(noise, locality, None)
    q, s = bank.query(x_t.double(), noise)
    cells = subset._cells_of(level)
    seen, step = scores.query(q, s[0], level)
    least = math.log(ANYWHERE * SEARCHED / len(bank))
    chances = cells.chances(seen, step, round((1 - ANYWHERE) * SEARCHED), least)
    shares, ess = [], []
    for b in range(len(q)):
        every = scores.shared(q[b : b + 1], s[0], level, torch.arange(len(bank)))[0]
        for t, row in enumerate(every):
            weights = row.double().softmax(0)
            ess.append(float(1 / weights.square().sum()))
            best = row.topk(NEIGHBOURS).indices
            shares.append(float(chances[b, t][cells.cells[best, t].long()].exp().mean()))
    narrow = [share for share, size in zip(shares, ess, strict=True) if size < NARROW]
    return {
        "all": float(np.mean(shares)),
        "narrow": float(np.mean(narrow)) if narrow else math.nan,
        "narrow tiles": len(narrow) / len(shares),
        "median support of scores": statistics.median(ess),
    }


def recalls(name: str) -> str:
    """Recall for test images of a known bank, at all levels with tiles."""
    denoise = gd.denoiser("golddiff", gd.Bank.build(name))
    clean = gd.Bank.build(name, split="test", limit=IMAGES).images(slice(0, IMAGES))
    lines = ["| t | recall, all tiles | narrow tiles | their share |", "|---|---|---|---|"]
    for t in TIMES:
        x_t, noise = noisy(t, clean)
        r = recall(denoise.subset, denoise.locality, x_t, noise)
        lines.append(f"| {t} | {r['all']:.3f} | {r['narrow']:.3f} | {r['narrow tiles']:.2f} |")
    return "\n".join(lines)


def measured(
    bank: gd.Bank, locality: Locality, clean: torch.Tensor, rounds: int, check: bool, search: int
) -> list[dict]:
    """What each level costs, and how exact it is."""
    subset = LocalSubset(bank, search=search)
    denoise = MaskedDenoiser(bank, locality, subset)
    pixels = torch.randperm(bank.D, generator=torch.Generator().manual_seed(0))[:PIXELS].sort().values
    rows = []
    for t in TIMES:
        x_t, noise = noisy(t, clean)
        plan = subset.plan(noise, locality)
        many = x_t.repeat(BATCH // len(x_t), 1, 1, 1)
        denoise(many, noise, seed=range(BATCH))
        seconds, errors, read = [], [], bank.bytes_read
        for i in range(rounds):
            began = time.perf_counter()
            found = denoise(many, noise, seed=range(BATCH * i, BATCH * (i + 1)))
            seconds.append((time.perf_counter() - began) / BATCH)
            errors.append(found.mean.flatten(1)[:, pixels].double())
        row = {
            "t": t,
            "plan": plan.kind,
            "scored": plan.rows,
            "rows": found.support.size,
            "seconds": statistics.median(seconds),
            "megabytes": (bank.bytes_read - read) / rounds / BATCH / 1e6,
        }
        if t in COMPARED:
            exact = exact_mean(bank, locality, x_t, noise, pixels).repeat(BATCH // len(x_t), 1)
            row["mse"] = float(torch.stack([(mean - exact).square() for mean in errors]).mean())
        if check and plan.kind == "search":
            row["recall"] = recall(subset, locality, x_t[:2], noise)
        print(json.dumps(row), flush=True)
        rows.append(row)
    return rows


def masks(few: gd.Bank, many: gd.Bank) -> str:
    """How far masks agree (Jaccard index): those of two samples of rows; and those of the covariance itself with those
    of its leading eigenvectors, the others taken as equal."""
    lines = ["| t | two samples | leading eigenvectors | gain of the largest left out |", "|---|---|---|---|"]
    localities = [gd.denoiser("golddiff", bank).locality for bank in (few, many)]
    statistics_of_many = many.spectrum()
    largest = float(statistics_of_many.eigenvalues[0])
    for t in (900, 700, 500, 400, 300, 0):
        noise = SCHEDULE(t)
        spectrum.AGREES = -1.0  # the covariance itself
        both = [mask_of(found, noise) for found in (statistics_of_many, statistics_of_many.leading)]
        own, others = (locality.mask(noise) for locality in localities)
        lines.append(f"| {t} | {agree(own, others):.3f} | {agree(*both):.4f} | {largest / float(noise.rho) ** 2:.4f} |")
    return "\n".join(lines)


def mask_of(found: Statistics, noise: gd.Noise) -> torch.Tensor:
    """The default mask of some statistics (no pixel of these is constant)."""
    own, columns = found.filter(float(noise.alpha), float(noise.sigma))
    return torch.cat([w.abs() >= 0.05 * own[part] for part, w in columns()], dim=1).fill_diagonal_(True)


def agree(a: torch.Tensor, b: torch.Tensor) -> float:
    """Jaccard index."""
    return float((a & b).sum() / (a | b).sum())


def tables(results: dict[str, list[dict]]) -> str:
    sizes = sorted(map(int, results))
    lines = ["| t | " + " | ".join(f"N = {n:,}" for n in sizes) + " |", "|---" * (len(sizes) + 1) + "|"]
    for i, t in enumerate(TIMES):
        each = [results[str(n)][i] for n in sizes]
        lines.append(f"| {t} | " + " | ".join(f"{r['seconds']:.3f} s, {r['plan']}" for r in each) + " |")
    means = [statistics.mean(r["seconds"] for r in results[str(n)]) for n in sizes]
    lines.append("| mean | " + " | ".join(f"**{m:.3f} s**" for m in means) + " |")
    lines.append("")
    lines += ["| root mean square error at t | " + " | ".join(f"N = {n:,}" for n in sizes) + " |", lines[1]]
    for i, t in enumerate(TIMES):
        if t in COMPARED:
            each = [results[str(n)][i]["mse"] ** 0.5 for n in sizes]
            lines.append(f"| {t} | " + " | ".join(f"{e:.4f}" for e in each) + " |")
    slope = np.polyfit(np.log(sizes), np.log(means), 1)[0]
    lines += ["", f"Time grows as N^{slope:.2f}."]
    found = [(row["t"], row["recall"]) for row in results[str(sizes[-1])] if "recall" in row]
    if found:
        lines += [
            "",
            "| t | recall, all tiles | narrow tiles | their share | median support of scores |",
            "|---|---|---|---|---|",
        ]
        for t, r in found:
            lines.append(
                f"| {t} | {r['all']:.3f} | {r['narrow']:.3f} | {r['narrow tiles']:.2f} | "
                f"{r['median support of scores']:.0f} |"
            )
    return "\n".join(lines)


def plot(results: dict[str, list[dict]], path: Path) -> None:
    import matplotlib.pyplot as plt

    sizes = sorted(map(int, results))
    means = [statistics.mean(r["seconds"] for r in results[str(n)]) for n in sizes]
    slope, offset = np.polyfit(np.log(sizes), np.log(means), 1)
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    left.loglog(sizes, means, "o-", label="measured")
    left.loglog(sizes, np.exp(offset) * np.array(sizes) ** slope, ":", color="grey", label=f"N^{slope:.2f}")
    left.loglog(sizes, means[0] * np.array(sizes) / sizes[0], "--", color="silver", label="N")
    left.set(xlabel="images in the bank", ylabel="seconds per image and step", title="time")
    left.legend()
    for i, t in enumerate(TIMES):
        if t in COMPARED:
            right.loglog(sizes, [results[str(n)][i]["mse"] ** 0.5 for n in sizes], "o-", label=f"t = {t}")
    right.set_ylim(bottom=2e-3)
    right.set(xlabel="images in the bank", ylabel="root mean square error", title="error of the mean, range 2")
    right.legend()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("banks", nargs="*", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--search", type=int, default=SEARCHED, help="rows of a tile that are scored; 0 for all")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--masks", action="store_true", help="compare the masks of the two largest banks instead")
    parser.add_argument("--recall", metavar="NAME", help="the recall of a search of a known bank instead, as cifar10")
    args = parser.parse_args()
    if args.recall:
        print(recalls(args.recall))
        return
    banks = sorted((gd.Bank.open(path) for path in args.banks), key=len)
    if args.masks:
        print(masks(*banks[-2:]))
        return
    locality = gd.denoiser("golddiff", banks[-1]).locality
    clean = torch.from_numpy(crops(2000, banks[0].shape[1], seed=1).read(100, 100 + IMAGES)).float() / 127.5 - 1
    results = {}
    for bank in banks:
        print(bank, f"on {platform.machine()}, {torch.get_num_threads()} threads", flush=True)
        results[str(len(bank))] = measured(bank, locality, clean, args.rounds, bank is banks[-1], args.search)
        if args.json:
            args.json.write_text(json.dumps(results, indent=1))
    print(tables(results))
    if args.plot:
        plot(results, args.plot)


if __name__ == "__main__":
    main()
