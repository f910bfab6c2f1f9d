"""Samplers: from noise to images along a denoiser's posterior means."""

from __future__ import annotations

import abc
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm import tqdm

from .denoise import Denoiser
from .errors import GolddiffError, unknown
from .images import NO_LABEL
from .noise import CLEAN, DDPM, Noise, Schedule
from .posterior import Posterior

__all__ = ["DDIM", "Sampler", "Step", "initial_noise", "sample", "sampler_named", "trajectory"]

Denoise = Callable[[Tensor, Noise], Posterior]


@dataclass(frozen=True, eq=False)
class Step:
    """One step of a sampler.

    Arguments:
        index: 0, 1, ... of `count`. time: of the schedule.
        noise: the level of `x_t`.
        x_t: `(B, C, H, W)`, where the step starts. x_next: where it ends.
        posterior: what the denoiser said of `x_t`.
    """

    index: int
    count: int
    time: float
    noise: Noise
    x_t: Tensor
    posterior: Posterior
    x_next: Tensor


class Sampler(abc.ABC):
    """Follows a denoiser through a list of noise levels."""

    @abc.abstractmethod
    def steps(self, denoise: Denoise, x_t: Tensor, levels: list[tuple[float, Noise]]) -> Iterator[Step]:
        """Yields every step; the last one ends at the clean image."""


class DDIM(Sampler):
    r"""Deterministic DDIM ("Denoising Diffusion Implicit Models"), for any schedule.

    .. math:: x' = \alpha' D + \sigma' (x_t - \alpha D) / \sigma

    Arguments:
        clip_sample: clip `D` to [-1, 1] in its first term (not in the second), as diffusers'
            `DDIMScheduler` does by default.
    """

    def __init__(self, clip_sample: bool = True) -> None:
        self.clip_sample = clip_sample

    def steps(self, denoise: Denoise, x_t: Tensor, levels: list[tuple[float, Noise]]) -> Iterator[Step]:
        for i, (time, noise) in enumerate(levels):
            after = levels[i + 1][1] if i + 1 < len(levels) else CLEAN
            posterior = denoise(x_t, noise)
            clean = posterior.mean.clamp(-1, 1) if self.clip_sample else posterior.mean
            alpha, sigma = after.like(x_t)
            x_next = alpha * clean + sigma * posterior.eps()
            yield Step(i, len(levels), time, noise, x_t, posterior, x_next)
            x_t = x_next


SAMPLERS: dict[str, type[Sampler]] = {"ddim": DDIM}


def sampler_named(name: str) -> Sampler:
    """`ddim`, with its usual settings."""
    if name not in SAMPLERS:
        raise unknown("sampler", name, SAMPLERS)
    return SAMPLERS[name]()


def initial_noise(seeds: Sequence[int], shape: tuple[int, int, int], dtype: torch.dtype = torch.float32) -> Tensor:
    """Standard normal noise, `(len(seeds), C, H, W)`, from one CPU float32 generator for each seed."""
    return torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(s)) for s in seeds]).to(dtype)


def trajectory(
    denoiser: Denoiser,
    seeds: Sequence[int],
    *,
    steps: int = 10,
    schedule: Schedule | None = None,
    sampler: Sampler | None = None,
    labels: int | Sequence[int] | None = None,
    dtype: torch.dtype = torch.float32,
) -> Iterator[Step]:
    """Samples a batch, step by step.

    Arguments:
        denoiser: any denoiser.
        seeds: one for each image; a seed gives the same image alone and in any batch.
        steps: number of denoising steps.
        schedule: DDPM-linear if None. sampler: DDIM if None.
        labels: one for all or one for each image; -1 or None for no label.
        dtype: float32 or float64.

    Yields:
        Step: with `posterior.mean`, `x_t`, `x_next`.
    """
    seeds = _checked_seeds(seeds)
    schedule, sampler = schedule or DDPM(), sampler or DDIM()
    levels = schedule.levels(steps)
    x = initial_noise(seeds, denoiser.bank.shape, dtype).to(denoiser.bank.device) * schedule.init_noise_sigma
    return sampler.steps(lambda x_t, noise: denoiser(x_t, noise, labels, seed=seeds), x, levels)


def sample(
    denoiser: Denoiser,
    seeds: Sequence[int] = range(16),
    *,
    steps: int = 10,
    schedule: Schedule | None = None,
    sampler: Sampler | None = None,
    labels: int | Sequence[int] | None = None,
    batch: int = 16,
    dtype: torch.dtype = torch.float32,
    progress: bool = False,
) -> Tensor:
    """Images from noise: the posterior means of the last step, `(len(seeds), C, H, W)`, in [-1, 1].

    Arguments are those of `trajectory`, and:
        batch: how many images go together; it changes speed and memory, not the images.
        progress: show a progress bar.
    """
    seeds = _checked_seeds(seeds)
    if batch < 1:
        raise GolddiffError(f"batch is {batch}: give at least 1")
    each = (
        [NO_LABEL if labels is None else labels] * len(seeds) if labels is None or isinstance(labels, int) else labels
    )
    if len(each) != len(seeds):
        raise GolddiffError(f"{len(each)} labels for {len(seeds)} seeds: give one, or one for each")
    out = []
    with tqdm(total=len(seeds) * steps, desc="sampling", unit="step", disable=None if progress else True) as bar:
        for start in range(0, len(seeds), batch):
            part = slice(start, start + batch)
            for step in trajectory(
                denoiser,
                seeds[part],
                steps=steps,
                schedule=schedule,
                sampler=sampler,
                labels=each[part],
                dtype=dtype,
            ):
                bar.update(len(step.x_t))
            out.append(step.posterior.mean)
    return torch.cat(out)


def _checked_seeds(seeds: Sequence[int]) -> list[int]:
    listed = [int(s) for s in seeds]
    if not listed:
        raise GolddiffError("there are no seeds: give at least one")
    if min(listed) < 0 or max(listed) >= 2**63:
        raise GolddiffError(f"seeds must be from 0 to 2^63 - 1, not {min(listed)} to {max(listed)}")
    return listed
