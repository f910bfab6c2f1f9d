"""The masked product: golddiff's step against the published formulation, side by side.

    python benchmarks/masked.py cifar10
    python benchmarks/masked.py mnist --batch 8 --rules output published

For each noise level of ten DDIM steps, on the same x_t, the same golden rows and the same mask, interleaved, medians of
the rounds after a warm-up, seconds per image:

- `dense`: all squared differences of the golden rows against the dense float32 mask, then softmax and weighted mean,
  with rows and mask as float32 in memory already and no retrieval;
- `products`: a whole step of golddiff without the compiled kernel, retrieval and conversion included;
- `kernel`: the same with it (extra `fast`);
- `retrieval`: choosing the golden rows, which both include.
"""

import argparse
import json
import os
import platform
import statistics
import time
from pathlib import Path

import torch

import golddiff as gd
from golddiff.denoise import local
from golddiff.denoise.compiled import usable
from golddiff.runs import peak_memory


def dense(rows: torch.Tensor, x_t: torch.Tensor, noise: gd.Noise, mask: torch.Tensor) -> torch.Tensor:
    """The published formulation for one image: rows `(k, D)` in [-1, 1], mask `(D, D)` float32."""
    differences = (x_t.flatten() - float(noise.alpha) * rows).square()
    logits = -(differences @ mask) / (2 * float(noise.sigma) ** 2)
    return (logits.softmax(0) * rows).sum(0)


def timed(work) -> tuple[float, object]:
    start = time.perf_counter()
    result = work()
    return time.perf_counter() - start, result


def measure(denoiser, x_t: torch.Tensor, noise: gd.Noise, rounds: int) -> dict[str, float]:
    batch, seeds = len(x_t), list(range(len(x_t)))
    bank, subset = denoiser.bank, denoiser.subset
    mask = denoiser.locality.mask(noise).float()
    support = denoiser(x_t, noise, seed=seeds).support

    def golddiff(choose):
        local.usable = choose
        try:
            return denoiser(x_t, noise, seed=seeds).mean
        finally:
            local.usable = usable

    times: dict[str, list[float]] = {"dense": [], "products": [], "kernel": [], "retrieval": []}
    for _ in range(rounds + 1):
        spent, means = 0.0, []
        for b in range(batch):
            rows = bank.images(support.rows_of(b)).flatten(1)
            seconds, mean = timed(lambda b=b, rows=rows: dense(rows, x_t[b], noise, mask))
            spent += seconds
            means.append(mean)
        times["dense"].append(spent)
        for name, choose in (("products", lambda *_: False), ("kernel", usable)):
            seconds, mean = timed(lambda choose=choose: golddiff(choose))
            times[name].append(seconds)
            difference = float((mean.flatten(1) - torch.stack(means)).abs().max())
            assert difference < 1e-3, f"{name} differs from dense by {difference}"
        seconds, _ = timed(
            lambda: subset.select(x_t, noise.expand(batch), denoiser.locality, None, torch.tensor(seeds))
        )
        times["retrieval"].append(seconds)
    return {name: statistics.median(values[1:]) / batch for name, values in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bank")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--rules", nargs="+", default=["output", "published"])
    parser.add_argument("--threshold", type=float, help="default: 0.02, and 0.03 for the published rule in colour")
    parser.add_argument("--json", type=Path, help="also write the table there")
    args = parser.parse_args()
    bank, schedule, tables = gd.Bank.build(args.bank), gd.DDPM(), {}
    print(f"machine: {platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}")
    trajectory = [step.x_t for step in gd.trajectory(gd.denoiser("golddiff", bank), range(args.batch))]
    for rule in args.rules:
        threshold = args.threshold or (0.03 if rule == "published" and bank.shape[0] == 3 else 0.02)
        denoiser = gd.denoiser("golddiff", bank, mask_rule=rule, threshold=threshold)
        rows = []
        print(
            f"\n| {args.bank}, {rule} {threshold}, batch {args.batch} | dense | products | kernel | retrieval | ratio |"
        )
        print("|---|---|---|---|---|---|")
        for t, x_t in zip(schedule.times(10), trajectory, strict=True):
            row = measure(denoiser, x_t, schedule(t), args.rounds)
            rows.append({"t": t, **row})
            cells = " | ".join(f"{row[name]:.3f}" for name in row)
            print(f"| t = {t:.0f} | {cells} | {row['dense'] / row['kernel']:.1f} |", flush=True)
        total = {name: sum(row[name] for row in rows) / len(rows) for name in row}
        cells = " | ".join(f"{value:.3f}" for value in total.values())
        print(f"| mean | {cells} | {total['dense'] / total['kernel']:.1f} |")
        tables[rule] = rows
    print(f"\npeak resident memory: {peak_memory() / 2**30:.2f} GiB")
    if args.json:
        args.json.write_text(json.dumps(tables, indent=1))


if __name__ == "__main__":
    main()
