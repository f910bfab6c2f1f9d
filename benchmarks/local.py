"""Golden subsets drawn by importance, beside the paper's and the exact scan: error, time, and which image comes out.

    python benchmarks/local.py mnist cifar10 --json local.json --plot docs/pictures/error-time.png

For each bank, on the exact scan's own trajectories (PCA-locality, ten DDIM steps, the same masks for all): the mean
square error of each way to retrieve to the exact mean, and seconds per image and step in batches of 8, with works
taking turns after a warm-up, medians over the rounds. `dense` is the published formulation over the reference's golden
rows, and `dense full` over all rows (one image; the latter at three levels), both float32 in memory already; see
speed.py. Then whole trajectories from the same noise: r2 of the final images to the exact scan's.
"""

import argparse
import json
import os
import platform
import statistics
from pathlib import Path

import torch

import golddiff as gd
from golddiff.metrics import agreement
from speed import dense, take_turns

SCHEDULE = gd.DDPM()
THRESHOLDS = {"mnist": 0.02, "fashion_mnist": 0.02, "cifar10": 0.03}  # the paper's
VARIANTS = {
    "reference": {"retrieval": "reference"},
    "paper": {"retrieval": "paper"},
    **{f"local {tol:g}": {"retrieval": "local", "tol": tol} for tol in (0.02, 0.01, 0.007, 0.005)},
}
BATCH = 8
FULL_LEVELS = (900, 500, 100)


def steps_of(bank: gd.Bank, threshold: float, trajectory: list[gd.Step], rounds: int) -> list[dict]:
    """Error and seconds at each level."""
    models = {"exact": gd.denoiser("pca", bank, threshold=threshold)}
    models |= {name: gd.denoiser("golddiff", bank, threshold=threshold, **o) for name, o in VARIANTS.items()}
    everything, out = bank.images(slice(None)).flatten(1), []
    for step in trajectory:
        x_t, noise, found = step.x_t[:BATCH], step.noise, {}
        mask = models["exact"].locality.mask(noise).float()
        rows = models["reference"](x_t[:1], noise, seed=0).support.rows_of(0)
        golden = everything[rows].contiguous()

        def run(name: str, x_t=x_t, noise=noise, found=found) -> None:
            found[name] = models[name](x_t, noise, seed=list(range(len(x_t)))).mean

        works = {name: (lambda name=name, run=run: run(name)) for name in models}
        works["dense"] = lambda x_t=x_t, noise=noise, mask=mask, golden=golden: dense(golden, x_t[0], noise, mask)
        if step.time in FULL_LEVELS:
            works["dense full"] = lambda x_t=x_t, noise=noise, mask=mask: dense(everything, x_t[0], noise, mask)
        seconds = take_turns(works, rounds)
        exact = step.posterior.mean[:BATCH]
        out.append(
            {
                "time": step.time,
                "seconds": {n: s / (1 if n.startswith("dense") else len(x_t)) for n, s in seconds.items()},
                "mse": {name: float((mean - exact).square().mean()) for name, mean in found.items()},
            }
        )
        print(f"t = {step.time:g}", {n: f"{s:.4f}" for n, s in out[-1]["seconds"].items()}, flush=True)
    return out


def trajectories_of(bank: gd.Bank, threshold: float, exact: torch.Tensor) -> dict[str, list[float]]:
    """r2 of the final images, for each seed."""
    out = {}
    for name, options in VARIANTS.items():
        images = gd.sample(
            gd.denoiser("golddiff", bank, threshold=threshold, **options), range(len(exact)), batch=BATCH
        )
        out[name] = agreement(images, exact).r2.tolist()
    return out


def tables(bank: str, steps: list[dict], r2: dict[str, list[float]]) -> str:
    names = [name for name in steps[0]["mse"] if name != "exact"]
    lines = [f"**{bank}**, mean square error to the exact mean (range 2):", ""]
    lines += ["| | " + " | ".join("t = {time:g}".format(**s) for s in steps) + " |", "|---" * (len(steps) + 1) + "|"]
    lines += [f"| {name} | " + " | ".join("{:.2g}".format(s["mse"][name]) for s in steps) + " |" for name in names]
    mean = {n: statistics.mean(s["seconds"][n] for s in steps if n in s["seconds"]) for n in steps[0]["seconds"]}
    lines += ["", "| | s / image-step | dense / it | dense full / it | median r2 | r2 over 0.8 | least r2 |"]
    lines.append("|---|---|---|---|---|---|---|")
    for name, seconds in mean.items():
        ratios = [f"{mean['dense'] / seconds:.1f}", f"{mean['dense full'] / seconds:.0f}"]
        ends = ["", "", ""]
        if name in r2:
            values = r2[name]
            ends = [f"{statistics.median(values):.3f}", f"{sum(v > 0.8 for v in values)} of {len(values)}"]
            ends.append(f"{min(values):.2f}")
        lines.append("| " + " | ".join([name, f"{seconds:.4f}", *ratios, *ends]) + " |")
    return "\n".join(lines) + "\n"


def plot(results: dict[str, dict], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.2 * len(results), 4), layout="constrained")
    for axes, (bank, found) in zip(figure.subplots(1, len(results), squeeze=False)[0], results.items(), strict=True):
        steps = found["steps"]
        points = {
            name: (
                statistics.mean(s["seconds"][name] for s in steps),
                statistics.mean(s["mse"].get(name, 0.0) for s in steps),
            )
            for name in ("reference", "paper", *(n for n in VARIANTS if n.startswith("local")))
        }
        curve = [points[name] for name in points if name.startswith("local")]
        axes.plot(*zip(*curve, strict=True), "C2-o", label="local, tol 0.02 to 0.005")
        for name, colour in (("reference", "C0"), ("paper", "C1")):
            axes.plot(*points[name], "s", color=colour, label=name)
        for name, style in (("exact", "C3--"), ("dense", "k:"), ("dense full", "k-.")):
            seconds = statistics.mean(s["seconds"][name] for s in steps if name in s["seconds"])
            axes.axvline(
                seconds, color=style[:2] if style[0] == "C" else "k", ls=style.lstrip("Ck0123456789"), label=name
            )
        axes.set(xscale="log", yscale="log", title=bank, xlabel="seconds per image and step")
        axes.set_ylabel("mean square error to the exact mean")
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("banks", nargs="+", help="names that golddiff.Bank.build knows")
    parser.add_argument("--seeds", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--threshold", type=float, help="of the masks; by default the paper's for the bank")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    args = parser.parse_args()
    print(f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, torch {torch.__version__}")
    results = {}
    for name in args.banks:
        bank = gd.Bank.build(name, progress=True)
        threshold = args.threshold or THRESHOLDS[name]
        exact = gd.denoiser("pca", bank, threshold=threshold)
        trajectory = list(gd.trajectory(exact, range(args.seeds)))
        results[name] = {
            "steps": steps_of(bank, threshold, trajectory, args.rounds),
            "r2": trajectories_of(bank, threshold, trajectory[-1].posterior.mean),
        }
        print(
            tables(f"{name}, threshold {threshold:g}", **{"steps": results[name]["steps"], "r2": results[name]["r2"]}),
            flush=True,
        )
    if args.json:
        args.json.write_text(json.dumps(results, indent=1) + "\n")
    if args.plot:
        plot(results, args.plot)


if __name__ == "__main__":
    main()
