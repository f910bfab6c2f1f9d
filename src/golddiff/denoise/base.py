"""What all denoisers share: checks of the input, and batches of mixed labels and noise levels."""

from __future__ import annotations

import abc
import copy
from collections import defaultdict
from collections.abc import Sequence
from typing import Any, Self, final

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..bank import Bank
from ..errors import GolddiffError, beyond
from ..images import NO_LABEL
from ..memory import explained, require
from ..noise import Noise
from ..posterior import Posterior
from ..ranks import ALONE, Ranks

__all__ = ["Denoiser", "per_image"]

BYTES_PER_NUMBER = 144  # of a batch: what comes in, what is computed, and what comes out, by measurement
WORTH_ASKING = 2**26  # bytes


class Denoiser(abc.ABC):
    """A map from noisy images and a noise level to their posterior. It knows no time and no sampler.

    Attributes:
        bank: the training images.
        options: every option, resolved.
        properties: what holds for it. `convex`: the mean lies within the range of the rows, pixel by pixel;
            `permutation_invariant`: the order of the rows does not matter; `exact`: no row is left out;
            `nearest_at_low_noise`: as `sigma -> 0` the mean is the nearest row;
            `mean_at_high_noise`: as `sigma -> infinity` it is the mean of the rows.
        by_level: images of one call to `_posterior` must have the same noise level.
        ranks: the processes that the rows are spread over, see `over`.
    """

    properties: frozenset[str]
    bank: Bank
    options: dict[str, Any]
    by_level: bool = False
    ranks: Ranks = ALONE
    can_share: bool = False

    def __repr__(self) -> str:
        chosen = ", ".join(f"{key}={value!r}" for key, value in self.options.items() if key != "mask")
        return f"{type(self).__name__}({self.bank!r}, {chosen})"

    @final
    @explained()
    def __call__(
        self,
        x_t: Tensor,
        noise: Noise,
        label: int | Sequence[int] | Tensor | None = None,
        *,
        seed: int | Sequence[int] | Tensor = 0,
    ) -> Posterior:
        """The posterior of the clean images.

        Arguments:
            x_t: noisy images, `(B, C, H, W)`, float32 or float64; computed in that type, on that device.
            noise: the level of all, or one for each.
            label: restricts the rows to a class: one for all or `(B,)`; -1 or None for all rows.
            seed: for what is drawn inside retrieval: one for all or `(B,)`.

        Raises:
            GolddiffError: wrong shape or type, NaN, `sigma = 0`, or a label that no row has.
        """
        self._check(x_t, noise)
        self.require_memory(len(x_t))
        self.bank.check_files()
        batch = len(x_t)
        noise = noise.expand(batch)
        labels = per_image(NO_LABEL if label is None else label, batch, "label").tolist()
        seeds = per_image(seed, batch, "seed")
        groups: dict[tuple[int, int], list[int]] = defaultdict(list)
        for i, level in enumerate(noise.angle.tolist()):
            groups[labels[i], level if self.by_level else 0].append(i)
        eligible = {wanted: self.bank.rows_of(wanted) for wanted in set(labels)}
        parts, items = [], []
        for (wanted, _), members in groups.items():
            where = torch.tensor(members)
            part = x_t if len(groups) == 1 else x_t[where.to(x_t.device)]
            only = None if wanted == NO_LABEL else wanted
            parts.append(self._posterior(part, noise[where], only, eligible[wanted], seeds[where]))
            items.append(where)
        merged = Posterior.merge(parts, items, x_t, noise)
        if not bool(torch.isfinite(merged.mean).all()):
            raise beyond(x_t.dtype)
        return merged

    def mean(
        self,
        x_t: Tensor,
        noise: Noise,
        label: int | Sequence[int] | Tensor | None = None,
        *,
        seed: int | Sequence[int] | Tensor = 0,
    ) -> Tensor:
        """The posterior mean alone, `(B, C, H, W)`, through which gradients with respect to `x_t` flow.

        They are in closed form (`Posterior.vjp`), so nothing but the posterior is kept for them. Denoisers without a
        derivative raise an error only if a gradient is asked for.

        Arguments:
            x_t, noise, label, seed: as for the denoiser itself.
        """
        if not isinstance(x_t, Tensor):
            return self(x_t, noise, label, seed=seed).mean  # which says what is wrong
        return _Mean.apply(x_t, self, noise, label, seed)

    def require_memory(self, batch: int) -> None:
        """Refuses a batch of so many images that does not fit into memory.

        Raises:
            GolddiffError: it does not.
        """
        needed = batch * self.bank.D * BYTES_PER_NUMBER
        if needed > WORTH_ASKING and self.bank.device.type == "cpu":
            require(needed, f"a batch of {batch} images", "give smaller batches (--batch)")

    def over(self, ranks: Ranks) -> Self:
        """This denoiser with the rows spread over processes: each sums over its own, and all have the same result.

        Raises:
            GolddiffError: it is of a kind that cannot be.
        """
        if not self.can_share:
            raise GolddiffError("the bank can be spread for optimal, pca, ls and golddiff: for others spread the seeds")
        shared = copy.copy(self)
        shared.ranks = ranks
        return shared

    @abc.abstractmethod
    def _posterior(
        self, x_t: Tensor, noise: Noise, label: int | None, eligible: Tensor | None, seed: Tensor
    ) -> Posterior:
        """The posterior of images that share the label (and the noise level, if `by_level`)."""

    def _check(self, x_t: Tensor, noise: Noise) -> None:
        if not isinstance(x_t, Tensor) or x_t.ndim != 4 or tuple(x_t.shape[1:]) != self.bank.shape:
            found = tuple(x_t.shape) if isinstance(x_t, Tensor) else type(x_t).__name__
            wanted = "(B, {}, {}, {})".format(*self.bank.shape)
            raise GolddiffError(f"x_t is {found}: give a tensor of shape {wanted}, as the images of the bank")
        if len(x_t) == 0:
            raise GolddiffError("x_t holds no images: give at least one")
        if x_t.dtype not in (torch.float32, torch.float64):
            raise GolddiffError(f"x_t is {x_t.dtype}: convert it to float32 or float64")
        if x_t.requires_grad and torch.is_grad_enabled():
            raise GolddiffError(
                "x_t requires grad, and a posterior keeps no graph: give x_t.detach(), or use denoiser.mean"
            )
        if not bool(torch.isfinite(x_t).all()):
            raise GolddiffError("x_t has NaN or infinite values: check the step that made it")
        if x_t.device != self.bank.device:
            raise GolddiffError(f"x_t is on {x_t.device}, the bank on {self.bank.device}: move one with .to(...)")
        if not isinstance(noise, Noise):
            raise GolddiffError(f"noise is a {type(noise).__name__}: give golddiff.Noise(alpha, sigma)")
        if bool((noise.sigma == 0).any()):
            raise GolddiffError("sigma is 0: the image is already clean, there is nothing to denoise")


class _Mean(torch.autograd.Function):
    """The posterior mean, with its derivative in closed form."""

    @staticmethod
    def forward(ctx: Any, x_t: Tensor, denoiser: Denoiser, noise: Noise, label: Any, seed: Any) -> Tensor:
        ctx.posterior = denoiser(x_t.detach(), noise, label, seed=seed)
        return ctx.posterior.mean.clone()  # the context must not hold what it returns

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return ctx.posterior.vjp(gradient), None, None, None, None


def per_image(values: int | Sequence[int] | Tensor, batch: int, what: str) -> Tensor:
    """One whole number for each image, `(B,)` int64 on the CPU."""
    wrong = GolddiffError(f"{what} must be a whole number, or one for each of the {batch} images")
    try:
        numbers = torch.as_tensor(values)
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise wrong from error
    whole = not (numbers.is_floating_point() or numbers.is_complex() or numbers.dtype == torch.bool)
    if not whole or numbers.ndim > 1 or (numbers.ndim == 1 and len(numbers) != batch):
        raise wrong
    return numbers.long().cpu().expand(batch)
