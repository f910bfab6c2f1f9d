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
from golddiff.noise import Noise
from golddiff.sample import initial_noise


def network_images(folder: Path, seeds: range, shape: tuple[int, int, int]) -> torch.Tensor:
    """The network's images by the same sampler, `(B, C, H, W)`."""
    from diffusers import UNet2DModel

    model = UNet2DModel.from_pretrained(folder).eval()
    schedule, times = gd.DDPM(), iter(gd.DDPM().times(10))

    def denoise(x_t: torch.Tensor, noise: Noise) -> gd.Posterior:
        with torch.no_grad():
            eps = model(x_t, int(next(times))).sample
        alpha, sigma = noise.like(x_t)
        return gd.Posterior((x_t - sigma * eps) / alpha, torch.zeros(len(x_t)), None, None, x_t, noise)

    *_, last = gd.DDIM().steps(denoise, initial_noise(seeds, shape), schedule.levels(10), seeds)
    return last.x_next


def agreement(images: torch.Tensor, network: torch.Tensor) -> tuple[float, float]:
    """MSE and r2 as the paper defines them."""
    x, u = (((i + 1) / 2).clamp(0, 1).flatten(1) for i in (images, network))
    error = (x - u).square()
    r2 = 1 - error.sum(1) / (u.shape[1] * u.var(1))
    return float(error.mean()), float(r2.mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bank", choices=["mnist", "cifar10"])
    parser.add_argument("--seeds", type=int, default=8)
    parser.add_argument("--thresholds", type=float, nargs="+", default=[0.02])
    parser.add_argument("--retrieval", nargs="+", default=["reference", "paper"])
    args = parser.parse_args()
    bank = gd.Bank.build(args.bank, progress=True)
    seeds = range(args.seeds)
    network = network_images(Path(os.environ["GOLDDIFF_ORACLES"]) / args.bank, seeds, bank.shape)
    print(f"| {args.bank}, {args.seeds} seeds: rule | threshold | retrieval | MSE | r2 |\n|---|---|---|---|---|")
    wiener = agreement(gd.sample(gd.denoiser("wiener", bank), seeds), network)
    print("| (Wiener) | | | {:.4f} | {:.3f} |".format(*wiener))
    for retrieval in args.retrieval:
        for threshold in args.thresholds:
            for rule in MASK_RULES:
                options = {"retrieval": retrieval, "threshold": threshold, "mask_rule": rule}
                images = gd.sample(gd.denoiser("golddiff", bank, **options), seeds)
                scores = agreement(images, network)
                print(
                    "| {} | {} | {} | {:.4f} | {:.3f} |".format(rule, threshold, retrieval, *scores),
                    flush=True,
                )


if __name__ == "__main__":
    main()
