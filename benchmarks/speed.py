"""How fast: golddiff's steps beside strong baselines that have their data in memory, in one run.

    python benchmarks/speed.py mnist cifar10 crops --json speed.json
    python benchmarks/speed.py cifar10 --batch 8 --parts golddiff --rules output --rounds 5
    python benchmarks/speed.py cifar10 --device cuda

Workloads: a name that `golddiff.Bank.build` knows, or `crops`: 15,000 crops of 64 x 64 x 3 from 1,000 photographs
(GOLDDIFF_DATA). Parts:

- `golddiff`: whole steps of GoldDiff on PCA-locality, the paper's budgets, at the ten levels of DDIM on its own
  trajectory, beside `dense`: the published formulation (all squared differences of the same golden rows times the dense
  mask, both float32 in memory already, softmax, weighted mean; no retrieval). `retrieval` is part of the step.
- `pca`: PCA-locality over all rows, one image, beside `dense` over all rows in blocks of 2,048, at three levels.
- `optimal`: the exact scan beside `attention` (scaled_dot_product_attention with the bank as keys and values, and their
  squared norms as its mask) and `blocked` (plain products of blocks of 2,048 float32 rows with a running softmax).
- `profile`: the share of a step's time that each part of it takes, batch 8.
- `setup`: seconds to build the bank (known names; in a process of its own, empty cache), for mean and covariance,
  and for the first use of a mask.
- `memory`: peak of a process that only samples: all resident, and without mapped files.

Works take turns after a warm-up round; medians over the rounds; seconds are per image. `floor` is the time of the bare
matrix products of the dense formulation (`optimal`: of the two products of a scan) in the better of the two layouts,
measured in the same run; a floor over the step's time means that the step does with less than the product.
Means are asserted to agree with the baseline's to 1e-3.
"""

import argparse
import cProfile
import json
import os
import platform
import pstats
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch.nn.functional import scaled_dot_product_attention

import golddiff as gd
from crops import crops_bank
from golddiff.files import cache_folder
from golddiff.locality import MaskRuns, PCAMask
from golddiff.spectrum import LARGEST_EIGENBASIS, compute_covariance, compute_spectrum

SCHEDULE = gd.DDPM()
THRESHOLDS = {"output": (0.02, 0.02), "published": (0.02, 0.03)}  # grey, colour


def bank_of(name: str) -> gd.Bank:
    return crops_bank(15_000, cache_folder() / "crops-15000") if name == "crops" else gd.Bank.build(name, progress=True)


def take_turns(works: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median seconds of each work."""
    seconds: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(rounds + 1):
        for name, work in works.items():
            synchronize()
            start = time.perf_counter()
            work()
            synchronize()
            seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values[1:]) for name, values in seconds.items()}


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def agree(a: torch.Tensor, b: torch.Tensor) -> None:
    difference = float((a.flatten() - b.flatten()).abs().max())
    assert difference < 1e-3, f"means differ by {difference}"


def dense(rows: torch.Tensor, x_t: torch.Tensor, noise: gd.Noise, mask: torch.Tensor) -> torch.Tensor:
    """The published formulation for one image, all at once or block by block: rows `(k, D)` in [-1, 1]."""
    alpha, scale = float(noise.alpha), -1 / (2 * float(noise.sigma) ** 2)
    if len(rows) <= 8192:
        logits = ((x_t.flatten() - alpha * rows).square() @ mask).mul_(scale)
        return (logits.softmax(0) * rows).sum(0)
    return running_mean((((x_t.flatten() - alpha * v).square() @ mask).mul_(scale), v) for v in rows.split(2048))


def running_mean(blocks) -> torch.Tensor:
    """Softmax-weighted mean of rows from blocks of `(logits, rows)`; logits `(n, D)` or `(n, B)`."""
    peak = total = mean = None
    for logits, v in blocks:
        top = logits.amax(0) if peak is None else torch.maximum(peak, logits.amax(0))
        e = (logits - top).exp_()
        part = (e * v).sum(0) if e.shape == v.shape else e.T @ v
        if peak is None:
            total, mean = e.sum(0), part
        else:
            shrink = (peak - top).exp_()
            total = total * shrink + e.sum(0)
            mean = mean * (shrink if part.ndim == 1 else shrink[:, None]) + part
        peak = top
    return mean / (total if mean.ndim == 1 else total[:, None])


def product_seconds(a: torch.Tensor, b: torch.Tensor, rounds: int) -> float:
    """Seconds of `a @ b`, in the better of two layouts."""
    other = b.T.contiguous().T
    transposed = a.T.contiguous().T
    works = {"as it is": lambda: a @ b, "b": lambda: a @ other, "a": lambda: transposed @ b}
    return min(take_turns(works, rounds).values())


def golddiff_rows(bank: gd.Bank, rule: str, batch: int, rounds: int, dense_images: int) -> list[dict]:
    options = {"mask_rule": rule, "threshold": THRESHOLDS[rule][bank.shape[0] == 3]}
    denoiser = gd.denoiser("golddiff", bank, retrieval="reference", **options)
    seeds, out = torch.arange(batch), []
    trajectory = [step.x_t for step in gd.trajectory(denoiser, range(batch))]
    for t, x_t in zip(SCHEDULE.times(10), trajectory, strict=True):
        noise = SCHEDULE(t)
        posterior = denoiser(x_t, noise, seed=seeds)
        mask = denoiser.locality.mask(noise).float().to(bank.device)
        few = range(min(batch, dense_images))
        rows = [bank.images(posterior.support.rows_of(b)).flatten(1) for b in few]
        for b in few:
            agree(dense(rows[b], x_t[b], noise, mask), posterior.mean[b])
        seconds = take_turns(
            {
                "dense": lambda x_t=x_t, rows=rows, noise=noise, mask=mask, few=few: [
                    dense(rows[b], x_t[b], noise, mask) for b in few
                ],
                "golddiff": lambda x_t=x_t, noise=noise: denoiser(x_t, noise, seed=seeds),
                "retrieval": lambda x_t=x_t, noise=noise: denoiser.subset.select(
                    x_t, noise.expand(batch), denoiser.locality, None, seeds
                ),
            },
            rounds,
        )
        out.append(
            {
                "t": t,
                "rows": len(rows[0]),
                "density": float(mask.mean()),
                "dense": seconds["dense"] / len(few),
                "golddiff": seconds["golddiff"] / batch,
                "retrieval": seconds["retrieval"] / batch,
            }
        )
    floor = product_seconds(rows[0], mask, rounds) / len(rows[0])
    for row in out:
        row["floor"] = floor * row["rows"]
    return out


def pca_rows(bank: gd.Bank, rule: str, rounds: int) -> list[dict]:
    denoiser = gd.denoiser("pca", bank, mask_rule=rule, threshold=THRESHOLDS[rule][bank.shape[0] == 3])
    everything, out = bank.images(slice(None)).flatten(1), []
    random = torch.randn(1, *bank.shape, generator=torch.Generator().manual_seed(0)).to(bank.device)
    for t in (900, 500, 100):
        noise = SCHEDULE(t)
        x_t = float(noise.alpha) * bank.images(slice(7, 8)) + float(noise.sigma) * random
        mask = denoiser.locality.mask(noise).float().to(bank.device)
        agree(dense(everything, x_t, noise, mask), denoiser(x_t, noise).mean)
        seconds = take_turns(
            {
                "dense": lambda x_t=x_t, noise=noise, mask=mask: dense(everything, x_t, noise, mask),
                "golddiff": lambda x_t=x_t, noise=noise: denoiser(x_t, noise),
            },
            rounds,
        )
        floor = product_seconds(everything[:2048], mask, rounds) / 2048 * len(bank)
        out.append({"t": t, "rows": len(bank), **seconds, "floor": floor})
    return out


def optimal_rows(bank: gd.Bank, batch: int, rounds: int) -> list[dict]:
    denoiser = gd.denoiser("optimal", bank)
    everything, out = bank.images(slice(None)).flatten(1), []
    norms = everything.square().sum(1)
    trajectory = [step.x_t for step in gd.trajectory(denoiser, range(batch))]
    weights = torch.rand(batch, len(bank), device=bank.device)
    floor = product_seconds(everything, trajectory[0].flatten(1).T, rounds)
    floor += product_seconds(weights, everything, rounds)
    for t, x_t in zip(SCHEDULE.times(10), trajectory, strict=True):
        noise = SCHEDULE(t)
        alpha, sigma = float(noise.alpha), float(noise.sigma)
        bias = (-(alpha**2) / (2 * sigma**2) * norms).expand(1, 1, batch, -1)
        q = x_t.flatten(1)[None, None]

        def attention(q=q, bias=bias, scale=alpha / sigma**2) -> torch.Tensor:
            keys = everything[None, None]
            return scaled_dot_product_attention(q, keys, keys, attn_mask=bias, scale=scale)

        def blocked(q=q, bias=bias, scale=alpha / sigma**2) -> torch.Tensor:
            parts = zip(everything.split(2048), bias[0, 0, 0].split(2048), strict=True)
            return running_mean((scale * (v @ q[0, 0].T) + part[:, None], v) for v, part in parts)

        mean = denoiser(x_t, noise).mean
        if t > 0:  # at t = 0 the baselines lose the nearest row to float32
            agree(attention(), mean)
        works = {"attention": attention, "blocked": blocked, "golddiff": lambda x=x_t, n=noise: denoiser(x, n)}
        seconds = {name: value / batch for name, value in take_turns(works, rounds).items()}
        out.append({"t": t, "rows": len(bank), **seconds, "floor": floor / batch})
    return out


def memory(name: str, method: str, batch: int, device: str) -> dict[str, float]:
    """Peak GiB of a process that samples one batch."""
    code = f"""
import golddiff as gd, speed
bank = speed.bank_of({name!r}).to({device!r})
anonymous = 0
for _ in gd.trajectory(gd.denoiser({method!r}, bank), range({batch})):
    lines = open("/proc/self/status").read().splitlines()
    anonymous = max(anonymous, *(int(line.split()[1]) for line in lines if line.startswith("RssAnon")))
print(int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) / 2**20, anonymous / 2**20)
"""
    folder = Path(__file__).parent
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=True)
    resident, anonymous = map(float, done.stdout.split()[-2:])
    return {"resident": resident, "without mapped files": anonymous}


PARTS = {"draw", "nearest_proxies", "nearest_rows", "select", "masked_softmax", "query", "runs"}


def profile(bank: gd.Bank) -> dict[str, float]:
    """Share of the time of ten steps, batch 8, that is spent in some functions and what they call."""
    denoiser = gd.denoiser("golddiff", bank, retrieval="reference")
    for _ in range(2):  # masks and compiled code first
        profiler = cProfile.Profile()
        profiler.enable()
        for _ in gd.trajectory(denoiser, range(8)):
            pass
        profiler.disable()
    stats = pstats.Stats(profiler)
    shares = {
        function: cumulative / stats.total_tt
        for (file, _, function), (_, _, _, cumulative, _) in stats.stats.items()
        if function in PARTS and "golddiff" in file
    }
    return {name: round(shares[name], 3) for name in sorted(shares, key=shares.get, reverse=True)}


def setup(name: str, bank: gd.Bank) -> dict[str, float]:
    """Seconds that a bank takes before the first step."""
    out = {}
    if name != "crops":
        code = f"import time, golddiff as gd; s = time.time(); gd.Bank.build({name!r}); print(time.time() - s)"
        with tempfile.TemporaryDirectory() as cache:
            environment = {**os.environ, "GOLDDIFF_CACHE": cache}
            command = [sys.executable, "-c", code]
            done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        out["build"] = float(done.stdout)
    start = time.perf_counter()
    large = min(bank.D, len(bank)) > LARGEST_EIGENBASIS
    (compute_covariance if large else compute_spectrum)(bank._rows_for(None))
    out["mean and covariance"] = time.perf_counter() - start
    bank.spectrum()
    start = time.perf_counter()
    mask = PCAMask(bank)._stable(SCHEDULE(500), None)
    out["first use of a mask"] = time.perf_counter() - start
    MaskRuns.of(mask)
    start = time.perf_counter()
    MaskRuns.of(mask)
    out["its runs"] = time.perf_counter() - start
    return {what: round(value, 2) for what, value in out.items()}


def show(title: str, rows: list[dict]) -> None:
    """One line of the table: means over the levels, and the ratio at each."""
    mean = {key: statistics.mean(row[key] for row in rows) for key in rows[0] if key != "t"}
    against = "dense" if "dense" in mean else "attention"
    parts = [f"{name} {mean[name]:.4f}" for name in ("dense", "attention", "blocked", "retrieval") if name in mean]
    ratios = " ".join(f"{row[against] / row['golddiff']:.1f}" for row in rows)
    print(
        f"| {title} | {mean['golddiff']:.4f} | {', '.join(parts)} | {mean[against] / mean['golddiff']:.1f} "
        f"| {mean['floor'] / mean['golddiff']:.2f} | {ratios} |",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workloads", nargs="+")
    parser.add_argument("--parts", nargs="+", default=["golddiff", "pca", "optimal", "profile", "memory"])
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument("--rules", nargs="+", default=["output", "published"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dense-images", type=int, default=1, help="of a batch, that the dense formulation does")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", type=Path, help="also write all levels there")
    args = parser.parse_args()
    machine = f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, {args.device}"
    print(f"machine: {machine}, torch {torch.__version__}\n")
    print("| workload | golddiff | beside | ratio | floor / golddiff | ratio at each level |\n|" + "---|" * 6)
    tables = {"machine": machine}

    def note(title: str, rows: list[dict]) -> None:
        show(title, rows)
        tables[title] = rows
        if args.json:
            args.json.write_text(json.dumps(tables, indent=1))

    for name in args.workloads:
        bank = bank_of(name).to(args.device)
        for batch in args.batch:
            if "golddiff" in args.parts:
                for rule in args.rules:
                    title = f"{name} golddiff, {rule}, batch {batch}"
                    note(title, golddiff_rows(bank, rule, batch, args.rounds, args.dense_images))
            if "optimal" in args.parts:
                note(f"{name} optimal, batch {batch}", optimal_rows(bank, batch, args.rounds))
        if "pca" in args.parts and bank.D <= 4096:
            for rule in args.rules:
                note(f"{name} pca, all rows, {rule}, batch 1", pca_rows(bank, rule, args.rounds))
        for part, work in (("profile", lambda bank=bank: profile(bank)), ("setup", lambda n=name, b=bank: setup(n, b))):
            if part in args.parts:
                tables[f"{name} {part}"] = found = work()
                print(f"| {name} {part} | | {', '.join(f'{k} {v}' for k, v in found.items())} | | | |", flush=True)
        if "memory" in args.parts:
            for method in ("golddiff", "optimal"):
                tables[f"{name} {method} memory"] = peak = memory(name, method, max(args.batch), args.device)
                said = ", ".join(f"{what} {value:.2f} GiB" for what, value in peak.items())
                print(f"| {name} {method}, batch {max(args.batch)}: peak memory | | {said} | | | |", flush=True)
    if args.json:
        args.json.write_text(json.dumps(tables, indent=1))


if __name__ == "__main__":
    main()
