"""The convention `D(x, sigma)` of EDM ("Elucidating the Design Space of Diffusion-Based Generative Models")."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..denoise import Denoiser
from ..errors import GolddiffError
from ..noise import Noise

__all__ = ["EDMDenoiser"]


class EDMDenoiser:
    r"""A denoiser as code written for EDM's networks calls them.

    .. math:: D(x, \sigma) = E[x_0 \mid x = x_0 + \sigma z], \quad x_0 \in [-1, 1]

    Arguments:
        denoiser: any denoiser of golddiff.
        seed: for what is drawn inside retrieval: one for all or `(B,)`.
        sigma_min, sigma_max: what samplers may ask for; every positive `sigma` works.

    Attributes:
        img_resolution: the side of the images. img_channels: C.
        label_dim: number of classes, 0 if the bank has no labels.

    Raises:
        GolddiffError: the images are not square.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        *,
        seed: int | Sequence[int] | Tensor = 0,
        sigma_min: float = 0.0,
        sigma_max: float = float("inf"),
    ) -> None:
        self.img_channels, height, self.img_resolution = denoiser.bank.shape
        if height != self.img_resolution:
            raise GolddiffError(
                f"images of {height} x {self.img_resolution}: img_resolution is one number, so give square ones"
            )
        self.denoiser, self.seed = denoiser, seed
        self.sigma_min, self.sigma_max = sigma_min, sigma_max
        self.label_dim = max(len(denoiser.bank.classes), int(denoiser.bank.labels.max()) + 1)

    def __call__(self, x: Tensor, sigma: Any, class_labels: Any = None, **_: Any) -> Tensor:
        """The denoised images, `(B, C, H, W)` in [-1, 1], in the type of `x`; gradients with respect to `x` flow.

        Arguments:
            x: `(B, C, H, W)`, clean images plus `sigma` times standard normal noise.
            sigma: a number, `(B,)` or `(B, 1, 1, 1)`, positive.
            class_labels: None for all rows, whole numbers `(B,)`, or one-hot `(B, label_dim)` (a row of zeros is no
                label).
            **_: options of other networks, such as `force_fp32`, which mean nothing here.

        Raises:
            GolddiffError: wrong shapes, or labels that are not one-hot.
        """
        level = torch.as_tensor(sigma, dtype=torch.float64).detach().flatten()
        level = level[0] if len(level) == 1 else level
        return self.denoiser.mean(x, Noise(1.0, level), self._labels(class_labels), seed=self.seed)

    def round_sigma(self, sigma: Any) -> Tensor:
        """`sigma` as it is, as a tensor: there is no table of levels to round to."""
        return torch.as_tensor(sigma)

    def _labels(self, given: Any) -> Tensor | None:
        """Whole numbers `(B,)`, -1 for none."""
        if given is None or self.label_dim == 0:
            return None
        labels = torch.as_tensor(given)
        if labels.ndim < 2:
            return labels
        is_one_hot = bool(((labels == 0) | (labels == 1)).all()) and bool((labels.sum(1) <= 1).all())
        if labels.ndim != 2 or labels.shape[1] != self.label_dim or not is_one_hot:
            raise GolddiffError(
                f"class_labels of shape {tuple(labels.shape)}: give whole numbers (B,), or one-hot "
                f"(B, {self.label_dim}) with at most a single 1 in each row"
            )
        return torch.where(labels.sum(1) > 0, labels.int().argmax(1), -1)
