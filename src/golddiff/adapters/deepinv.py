"""A denoiser for deepinv's plug-and-play and diffusion solvers (extra `deepinv`)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..denoise import Denoiser
from ..errors import GolddiffError
from ..noise import Noise

try:
    import deepinv
except ImportError as error:
    raise GolddiffError(
        f"this needs deepinv ({error}): pip install 'golddiff[deepinv]'; deepinv itself needs torchvision"
    ) from error

__all__ = ["GoldDiffDenoiser"]


class GoldDiffDenoiser(deepinv.models.Denoiser):
    r"""A golddiff denoiser where deepinv expects one, as the prior of an inverse problem.

    deepinv's images lie in [0, 1] and its `sigma` is the standard deviation of the noise in that range. golddiff's lie
    in [-1, 1], so inside

    .. math:: x' = 2 x - 1, \quad \sigma' = 2 \sigma, \quad \alpha = 1

    and the posterior mean is brought back to [0, 1]. Nothing is clipped: `x` may leave the range.

    Gradients with respect to `x` flow, in closed form, for denoisers that have a derivative; none to `sigma`.

    Arguments:
        denoiser: any denoiser of golddiff; its bank decides the shape of the images and the device.
        label: restricts the rows to a class: one for all or `(B,)`.
        seed: for what is drawn inside retrieval: one for all or `(B,)`.
    """

    def __init__(self, denoiser: Denoiser, *, label: Any = None, seed: Any = 0) -> None:
        super().__init__(device=denoiser.bank.device)
        self.denoiser, self.label, self.seed = denoiser, label, seed

    def forward(self, x: Tensor, sigma: Any, **kwargs: Any) -> Tensor:
        """Denoised images, `(B, C, H, W)` in [0, 1].

        Arguments:
            x: `(B, C, H, W)`, images in [0, 1] plus noise.
            sigma: its standard deviation: a number, `(B,)`, or any shape with one number for each image; positive.
            **kwargs: `label` and `seed` for this call only; others are ignored, as deepinv's denoisers do.
        """
        level = torch.as_tensor(sigma, dtype=torch.float64).detach().flatten()
        level = level[0] if len(level) == 1 else level
        label, seed = kwargs.get("label", self.label), kwargs.get("seed", self.seed)
        return (self.denoiser.mean(2 * x - 1, Noise(1.0, 2 * level), label, seed=seed) + 1) / 2
