"""What questions about a posterior cost: attribution, Jacobian products, an audit, statistics of a view.

    python benchmarks/sources.py cifar10

Seconds of one call after a warm-up, in one process; the audit beside a search of the same images one by one.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import torch

import golddiff as gd
from golddiff.golden import nearest_rows
from golddiff.metrics import copies

AUDITED = 96


def seconds(work: Callable[[], Any]) -> float:
    work()
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def one_by_one(bank: gd.Bank, images: torch.Tensor) -> None:
    for image in images:
        q, s = bank.query(image[None], gd.Noise(1.0, 1.0))
        nearest_rows(bank, q[0], s[0], bank.rows, 2)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("source", nargs="?", default="mnist5k")
    bank = gd.Bank.build(parser.parse_args().source)
    steps = list(gd.trajectory(gd.denoiser("golddiff", bank), [1]))
    print(f"{bank}, {torch.get_num_threads()} threads")
    for number in (3, 6, 10):
        posterior = steps[number - 1].posterior
        found = gd.attribute(bank, posterior)
        off = float((found.image - posterior.mean[0].double()).abs().max())
        took = seconds(lambda posterior=posterior: gd.attribute(bank, posterior))
        print(f"attribute, step {number:2}: {took:.2f} s for all pixels; the sum differs from the mean by {off:.1e}")
    middle = steps[5].posterior
    v = torch.randn(middle.mean.shape, generator=torch.Generator().manual_seed(0))
    exact = gd.denoiser("optimal", bank)(middle.x_t, middle.noise)
    print(f"attribute, one pixel: {seconds(lambda: gd.attribute(bank, middle, 0, (9, 9, 10, 10))):.3f} s")
    print(f"jvp {seconds(lambda: middle.jvp(v)):.2f} s, vjp {seconds(lambda: middle.vjp(v)):.2f} s (golddiff, step 6)")
    print(f"jvp {seconds(lambda: exact.jvp(v)):.2f} s (optimal)")
    images = torch.cat([step.posterior.mean for step in steps] * (AUDITED // len(steps) + 1))[:AUDITED]
    both = seconds(lambda: copies(images, bank)), seconds(lambda: one_by_one(bank, images))
    print(f"audit of {AUDITED} images: {both[0]:.2f} s; one by one {both[1]:.2f} s: {both[1] / both[0]:.1f} times")
    print(f"statistics without three images: {seconds(lambda: bank.without([1, 2, 3]).spectrum()):.1f} s")


if __name__ == "__main__":
    main()
