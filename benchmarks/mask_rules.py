"""Which mask rule? Agreement of PCA-locality's masks with a trained network.

    python benchmarks/mask_rules.py mnist --seeds 8
    python benchmarks/mask_rules.py cifar10 --seeds 8 --thresholds 0.02 0.03

For each rule and retrieval: MSE and r2 (images mapped to [0, 1] and clamped) between the last posterior mean
and the network's image from the same initial noise, 10 DDIM steps. Needs GOLDDIFF_DATA, GOLDDIFF_ORACLES and
the extra diffusers.
"""

import argparse
import os
from pathlib import Path

import torch

import golddiff as gd
from golddiff.locality import MASK_RULES
from golddiff.metrics import agreement


def scores(images: torch.Tensor, network: torch.Tensor) -> tuple[float, float]:
    """Mean MSE and r2."""
    found = agreement(images, network)
    return float(found.mse.mean()), float(found.r2.mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bank", choices=["mnist", "cifar10"])
    parser.add_argument("--seeds", type=int, default=8)
    parser.add_argument("--thresholds", type=float, nargs="+", default=[0.02])
    parser.add_argument("--retrieval", nargs="+", default=["reference", "paper"])
    args = parser.parse_args()
    bank = gd.Bank.build(args.bank, progress=True)
    seeds = range(args.seeds)
    network = gd.sample(gd.oracle(Path(os.environ["GOLDDIFF_ORACLES"]) / args.bank, bank, schedule="ddpm"), seeds)
    print(f"| {args.bank}, {args.seeds} seeds: rule | threshold | retrieval | MSE | r2 |\n|---|---|---|---|---|")
    wiener = scores(gd.sample(gd.denoiser("wiener", bank), seeds), network)
    print("| (Wiener) | | | {:.4f} | {:.3f} |".format(*wiener))
    for retrieval in args.retrieval:
        for threshold in args.thresholds:
            for rule in MASK_RULES:
                options = {"retrieval": retrieval, "threshold": threshold, "mask_rule": rule}
                images = gd.sample(gd.denoiser("golddiff", bank, **options), seeds)
                found = scores(images, network)
                print(
                    "| {} | {} | {} | {:.4f} | {:.3f} |".format(rule, threshold, retrieval, *found),
                    flush=True,
                )


if __name__ == "__main__":
    main()
