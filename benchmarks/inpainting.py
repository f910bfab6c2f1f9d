"""Inpainting of MNIST test digits by deepinv's solvers, with golddiff's denoisers as the prior: a picture.

    python benchmarks/inpainting.py docs/pictures/inpainting.png

Needs the extras demo and deepinv (which brings torchvision), and MNIST in $GOLDDIFF_DATA; without it, some images of
mnist5k are held out. Half of the digits have lost 65 % of their pixels, the others a square. Nothing is picked.
"""

import sys
from pathlib import Path

import deepinv
import numpy as np
import torch
from torch import Tensor

import golddiff as gd
from golddiff.adapters.deepinv import GoldDiffDenoiser
from golddiff.pictures import grid, save_png, to_uint8

NOISE = 0.02
EACH = 3  # digits for each mask
DRAWS = 8


def data() -> tuple[gd.Bank, Tensor]:
    """A bank, and digits in [0, 1] that are not in it."""
    try:
        test = gd.open_source("mnist", split="test")
        return gd.Bank.build("mnist5k"), torch.from_numpy(test.read(0, 2 * EACH).copy()).float() / 255
    except gd.GolddiffError:
        images = gd.open_source("mnist5k")
        order = np.random.default_rng(0).permutation(len(images))  # they are sorted by class
        pixels = images.read(0, len(images))[order, 0]
        held_out = torch.from_numpy(pixels[: 2 * EACH, None].copy()).float() / 255
        return gd.Bank.build(pixels[2 * EACH :], layout="NHW"), held_out


def masks() -> list[tuple[str, Tensor]]:
    scattered = (torch.rand(1, 1, 28, 28, generator=torch.Generator().manual_seed(0)) > 0.65).float()
    square = torch.ones(1, 1, 28, 28)
    square[:, :, 10:20, 10:20] = 0
    return [("65 % lost", scattered), ("a square lost", square)]


def by_hqs(denoiser: gd.Denoiser, y: Tensor, physics: deepinv.physics.Physics) -> Tensor:
    """Half-quadratic splitting from noise in the gaps; the level of the denoiser falls from 1 to the noise of `y`."""
    sigmas = torch.logspace(0, float(np.log10(NOISE)), 20)

    def start(y: Tensor, physics: deepinv.physics.Physics) -> Tensor:
        return y + (1 - physics.mask) * torch.randn(y.shape, generator=torch.Generator().manual_seed(0))

    solver = deepinv.optim.HQS(
        prior=deepinv.optim.PnP(denoiser=GoldDiffDenoiser(denoiser)),
        data_fidelity=deepinv.optim.L2(),
        sigma_denoiser=sigmas.tolist(),
        stepsize=(sigmas / NOISE).square().tolist(),
        max_iter=len(sigmas),
        custom_init=start,
    )
    with torch.no_grad():
        return solver(y, physics)


def by_diffpir(denoiser: gd.Denoiser, y: Tensor, physics: deepinv.physics.Physics, seed: int = 1) -> Tensor:
    """DiffPIR, which draws from the posterior given `y`: the gaps hold fresh noise of the denoiser's level."""
    model = GoldDiffDenoiser(denoiser)
    return deepinv.sampling.DiffPIR(model, deepinv.optim.L2(), sigma=NOISE, max_iter=30, zeta=1.0)(
        y, physics, seed=seed
    )


def psnr(a: Tensor, x: Tensor) -> Tensor:
    """Of each image, `(B,)`, in decibels, for values in [0, 1]."""
    return -10 * torch.log10((a.clamp(0, 1) - x).square().flatten(1).mean(1))


def main(out: Path) -> None:
    bank, digits = data()
    wiener, optimal, golden = (gd.denoiser(name, bank) for name in ("wiener", "optimal", "golddiff"))
    pictures, captions, rows, heads = [], [], [], []
    for (name, mask), x in zip(masks(), digits.split(EACH), strict=True):
        physics = deepinv.physics.Inpainting((1, 28, 28), mask=mask, noise_model=deepinv.physics.GaussianNoise(NOISE))
        torch.manual_seed(0)
        y = physics(x)
        draws = [by_diffpir(golden, y, physics, seed + 1) for seed in range(DRAWS)]
        columns = {
            "truth": x,
            "masked": y,
            "HQS, wiener": by_hqs(wiener, y, physics),
            "DiffPIR, optimal": by_diffpir(optimal, y, physics),
            "DiffPIR, golddiff": draws[0],
            f"mean of {DRAWS}": torch.stack(draws).mean(0),
        }
        heads = list(columns)
        for i in range(EACH):
            pictures += [to_uint8(2 * made[i : i + 1] - 1) for made in columns.values()]
            captions += ["", *(f"{float(psnr(made, x)[i]):.1f} dB" for key, made in columns.items() if key != "truth")]
            rows.append(name)
        print(name, {key: round(float(psnr(made, x).mean()), 1) for key, made in columns.items() if key != "truth"})
    save_png(grid(np.concatenate(pictures), len(heads), rows=rows, heads=heads, captions=captions, gap=12), out)


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "inpainting.png"))
