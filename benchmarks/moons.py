"""The posterior over two moons concentrates as noise falls: a picture.

    python benchmarks/moons.py docs/pictures/moons.png

2,000 points of two moons are a bank of "images" of two pixels. One noisy point at four levels of noise: the weight of
every row, the posterior mean, and the rows that hold 90 % of the weight.
"""

import sys
from pathlib import Path

import torch
from matplotlib.figure import Figure
from sklearn.datasets import make_moons

import golddiff as gd

LEVELS = (3.0, 0.6, 0.2, 0.05)


def main() -> None:
    points, _ = make_moons(2000, noise=0.06, random_state=0)
    points = torch.tensor((points - points.mean(0)) / 2).float()
    bank = gd.Bank.build(points[:, :, None, None].numpy(), layout="NCHW")
    denoiser = gd.denoiser("optimal", bank)
    clean, z = points[7], torch.randn(2, generator=torch.Generator().manual_seed(4))
    figure = Figure(figsize=(13, 2.6), layout="constrained")
    for axes, sigma in zip(figure.subplots(1, len(LEVELS), sharex=True, sharey=True), LEVELS, strict=True):
        x_t = clean + sigma * z
        posterior = denoiser(x_t.view(1, 2, 1, 1), gd.Noise(1.0, sigma))
        rows, weights = posterior.weights(0)
        order = weights.argsort(descending=True)
        count = int((weights[order].cumsum(0) < 0.9).sum()) + 1
        golden = rows[order[:count]]
        axes.scatter(*points.T, s=2, color="0.8")
        axes.scatter(*points[golden].T, s=4, c=weights[order[:count]], cmap="viridis")
        axes.plot(*posterior.mean.flatten(), "r*", ms=12, label="posterior mean")
        axes.plot(*x_t, "kx", ms=8, label="noisy point")
        axes.set(xlim=(-1.4, 1.4), ylim=(-0.75, 0.75), title=f"sigma {sigma:g}: 90 % of the weight in {count} rows")
        axes.title.set_fontsize(9)
        axes.set_aspect("equal")
    axes.legend(fontsize=7, loc="lower right")
    figure.savefig(Path(sys.argv[1]), dpi=100)


if __name__ == "__main__":
    main()
