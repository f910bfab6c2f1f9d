"""Which mask rule, and which threshold? Trained networks and held-out images say.

    python benchmarks/mask_rules.py mnist --oracles $GOLDDIFF_ORACLES/mnist oracles/mnist-1
    python benchmarks/mask_rules.py fashion_mnist --oracles oracles/fashion_mnist
    python benchmarks/mask_rules.py cifar10 --oracles $GOLDDIFF_ORACLES/cifar10 --seeds 32 --held-out 32

For each rule and threshold, over ten DDIM steps: r2 (mean and standard error, as the paper defines it) of the last
posterior mean to the image of each network from the same initial noise; and the error on held-out test images noised at
each level, beside Wiener's: the geometric mean over the levels, without t = 0, of the ratio of mean square errors.
Needs the extra diffusers.
"""

import argparse
import math

import torch

import golddiff as gd
from golddiff.locality import MASK_RULES
from golddiff.metrics import agreement, mean_and_error
from golddiff.sample import initial_noise

STEPS = 10
FAR = 2**40  # from the seeds of samples


def held_out_errors(denoiser: gd.Denoiser, images: torch.Tensor, batch: int = 32) -> list[float]:
    """Mean square error (in [0, 1]) of a pixel at each level but the last."""
    errors = []
    for _, noise in gd.DDPM().levels(STEPS)[:-1]:
        alpha, sigma = noise.like(images)
        squares = []
        for x, seeds in zip(images.split(batch), torch.arange(len(images)).split(batch), strict=True):
            z = initial_noise((seeds + FAR).tolist(), denoiser.bank.shape)
            mean = denoiser(alpha * x + sigma * z, noise, seed=seeds + FAR).mean.clamp(-1, 1)
            squares.append(((mean - x) / 2).square().flatten(1).mean(1))
        errors.append(float(torch.cat(squares).mean()))
    return errors


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bank")
    parser.add_argument("--oracles", nargs="+", required=True, help="folders of networks")
    parser.add_argument("--seeds", type=int, default=64)
    parser.add_argument("--held-out", type=int, default=64)
    parser.add_argument("--thresholds", type=float, nargs="+", default=[0.01, 0.02, 0.03, 0.05])
    parser.add_argument("--rules", nargs="+", choices=MASK_RULES, default=list(MASK_RULES))
    parser.add_argument("--retrieval", default="local", help="of golddiff; full for all rows")
    args = parser.parse_args()
    bank = gd.Bank.build(args.bank, progress=True)
    test = gd.Bank.build(args.bank, split="test", limit=args.held_out).images(slice(None))
    seeds = range(args.seeds)
    networks = [gd.sample(gd.oracle(folder, bank, schedule="ddpm"), seeds, batch=32) for folder in args.oracles]

    def row(name: str, denoiser: gd.Denoiser) -> list[float]:
        images = gd.sample(denoiser, seeds, batch=32)
        cells = ["{:.3f} ± {:.3f}".format(*mean_and_error(agreement(images, each).r2)) for each in networks]
        errors = held_out_errors(denoiser, test)
        ratio = math.exp(sum(math.log(a / b) for a, b in zip(errors, linear or errors, strict=True)) / len(errors))
        print(f"| {name} | {' | '.join(cells)} | {ratio:.3f} |", flush=True)
        return errors

    linear: list[float] = []
    print(f"| {args.bank}, {args.seeds} seeds | {' | '.join(f'r2 to {o}' for o in args.oracles)} | held-out error |")
    print("|---" * (len(networks) + 2) + "|")
    linear = row("Wiener (no mask)", gd.denoiser("wiener", bank))
    for rule in args.rules:
        for threshold in args.thresholds:
            options = {"retrieval": args.retrieval, "threshold": threshold, "mask_rule": rule}
            row(f"{rule} {threshold:g}", gd.denoiser("golddiff", bank, **options))


if __name__ == "__main__":
    main()
