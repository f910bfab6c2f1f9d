"""What the spine costs: building a bank, the first use of a mask, a step of each method, peak memory.

    python benchmarks/spine.py cifar10 --batch 2
    python benchmarks/spine.py cifar10 --batch 16 --methods golddiff --rounds 1

Seconds are per image and step, medians over the rounds after a warm-up round, at each of the ten DDIM steps with the
paper's budgets. The last row compares with the time of the bare masked product (2 k D^2 flops at the rate of this
machine's float32 product, measured in the same run): over 1 means that the compiled kernel did with less.
"""

import argparse
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time

import torch

import golddiff as gd
from golddiff.golden import Budget
from golddiff.locality import PCAMask
from golddiff.runs import peak_memory


def product_rate(rows: int, size: int) -> float:
    """Flops per second of a float32 product of (rows, size) by (size, size)."""
    a, b = torch.rand(rows, size), torch.rand(size, size)
    seconds = []
    for _ in range(7):
        start = time.perf_counter()
        a @ b
        seconds.append(time.perf_counter() - start)
    return 2 * rows * size**2 / statistics.median(seconds[2:])


def step_seconds(denoiser: gd.Denoiser, batch: int, rounds: int) -> list[float]:
    """Seconds per image of each step, medians over rounds after a first one that does not count."""
    table = []
    for _ in range(rounds + 1):
        row, last = [], time.perf_counter()
        for _ in gd.trajectory(denoiser, range(batch)):
            now = time.perf_counter()
            row.append((now - last) / batch)
            last = now
        table.append(row)
    return [statistics.median(column) for column in zip(*table[1:], strict=True)]


def build_seconds(name: str) -> float:
    """Seconds to build the bank in an empty cache, in a process of its own."""
    code = (
        f"import time, golddiff as gd; s = time.perf_counter(); gd.Bank.build({name!r}); print(time.perf_counter() - s)"
    )
    with tempfile.TemporaryDirectory() as cache:
        environment = {**os.environ, "GOLDDIFF_CACHE": cache}
        done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    return float(done.stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bank")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--methods", nargs="+", default=["golddiff", "optimal", "wiener"])
    parser.add_argument("--skip-build", action="store_true")
    args = parser.parse_args()
    threads = torch.get_num_threads()
    print(f"machine: {platform.machine()}, {os.cpu_count()} cores, {threads} threads, torch {torch.__version__}")
    if not args.skip_build:
        print(f"building {args.bank}: {build_seconds(args.bank):.1f} s")
    bank = gd.Bank.build(args.bank)
    schedule = gd.DDPM()
    with tempfile.TemporaryDirectory() as folder:
        fresh = gd.Bank.build(args.bank, f"{folder}/bank", limit=len(bank))
        fresh.spectrum()
        start = time.perf_counter()
        PCAMask(fresh).mask(schedule(500))
        print(f"first use of a mask: {time.perf_counter() - start:.2f} s each (then kept with the bank)")
    rate = product_rate(1024, bank.D)
    print(f"float32 product: {rate / 1e9:.0f} GFLOP/s")
    print(f"| {args.bank}, batch {args.batch} | mean | {' | '.join(f't={t:.0f}' for t in schedule.times(10))} |")
    print("|---" * 12 + "|")
    for method in args.methods:
        seconds = step_seconds(gd.denoiser(method, bank), args.batch, args.rounds)
        print(f"| {method} | {statistics.mean(seconds):.3f} | {' | '.join(f'{s:.3f}' for s in seconds)} |")
        if method in ("golddiff", "pca"):
            sizes = [Budget().sizes(schedule(t), len(bank))[1] for t in schedule.times(10)]
            rows = sizes if method == "golddiff" else [len(bank)] * 10
            shares = [2 * k * bank.D**2 / rate / s for k, s in zip(rows, seconds, strict=True)]
            print(f"| bare product / step | {statistics.mean(shares):.2f} | {' | '.join(f'{s:.2f}' for s in shares)} |")
    print(f"peak resident memory: {peak_memory() / 2**30:.2f} GiB")


if __name__ == "__main__":
    main()
