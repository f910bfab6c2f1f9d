"""Samplers: from noise to images along a denoiser's posterior means."""

from __future__ import annotations

import abc
import math
import operator
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .bank import Bank
from .denoise import Denoiser, per_image
from .errors import GolddiffError, unknown
from .golden import hashed
from .images import NO_LABEL
from .noise import CLEAN, DDPM, Noise, Schedule
from .posterior import Posterior
from .progress import Bar

__all__ = [
    "DDIM",
    "Ancestral",
    "DPMSolver",
    "Heun",
    "Sampler",
    "Step",
    "initial_noise",
    "levels_from",
    "sample",
    "sampler_named",
    "trajectory",
]

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

    def check(self, levels: list[tuple[float, Noise]]) -> None:  # noqa: B027 - most samplers take any levels
        """Refuses levels that this sampler cannot follow, before any work."""

    @abc.abstractmethod
    def steps(
        self, denoise: Denoise, x_t: Tensor, levels: list[tuple[float, Noise]], seeds: Sequence[int]
    ) -> Iterator[Step]:
        """Yields every step; the last one ends at the clean image.

        Arguments:
            denoise: from `x_t` and a noise level to a posterior.
            x_t: `(B, C, H, W)` at the first level.
            levels: times and noise levels, from noise to image; the clean image follows the last one.
            seeds: of the images, for samplers that draw noise.
        """


class DDIM(Sampler):
    r"""Deterministic DDIM ("Denoising Diffusion Implicit Models"), for any schedule. First order.

    .. math:: x' = \alpha' D + \sigma' (x_t - \alpha D) / \sigma

    Arguments:
        clip_sample: clip `D` to [-1, 1] in its first term (not in the second), as diffusers' `DDIMScheduler` does
            by default.
    """

    def __init__(self, clip_sample: bool = True) -> None:
        self.clip_sample = clip_sample

    def steps(
        self, denoise: Denoise, x_t: Tensor, levels: list[tuple[float, Noise]], seeds: Sequence[int]
    ) -> Iterator[Step]:
        for i, time, noise, after in _pairs(levels):
            posterior = denoise(x_t, noise)
            x_next = _ddim(posterior, after, self.clip_sample)
            yield Step(i, len(levels), time, noise, x_t, posterior, x_next)
            x_t = x_next


class Heun(Sampler):
    r"""Heun's method on the probability flow in :math:`y = x_t / \alpha` over :math:`\rho = \sigma / \alpha`, as in EDM
    ("Elucidating the Design Space of Diffusion-Based Generative Models", algorithm 1 without churn). Second order.

    .. math:: \frac{dy}{d\rho} = \frac{y - D}{\rho}

    Two denoisings a step, one in the last (and in a first one with `alpha = 0`, which is a DDIM step). The posterior
    of a step is that of its first denoising.
    """

    def steps(
        self, denoise: Denoise, x_t: Tensor, levels: list[tuple[float, Noise]], seeds: Sequence[int]
    ) -> Iterator[Step]:
        for i, time, noise, after in _pairs(levels):
            posterior = denoise(x_t, noise)
            x_next = _ddim(posterior, after, clip=False)
            if float(after.sigma) > 0 and float(noise.alpha) > 0:
                second = denoise(x_next, after)
                slopes = [(p.x_t / p.noise.like(p.x_t)[0] - p.mean) / p.noise.rho[0] for p in (posterior, second)]
                y = x_t / noise.alpha + (after.rho - noise.rho) * (slopes[0] + slopes[1]) / 2
                x_next = after.alpha * y
            yield Step(i, len(levels), time, noise, x_t, posterior, x_next)
            x_t = x_next


class Ancestral(Sampler):
    r"""The stochastic sampler of DDPM ("Denoising Diffusion Probabilistic Models"): draws from
    :math:`q(x' | x_t, x = D)`, for any schedule.

    .. math:: x' = \alpha' D + \sqrt{\sigma'^2 - s^2} \, (x_t - \alpha D) / \sigma + s z, \quad
        s^2 = \sigma'^2 \left(1 - \left(\frac{\alpha \sigma'}{\alpha' \sigma}\right)^2\right)

    `z` is a function of seed and step, so a seed gives the same image in any batch.

    Arguments:
        clip_sample: clip `D` to [-1, 1] first, as diffusers' `DDPMScheduler` does by default.
    """

    def __init__(self, clip_sample: bool = True) -> None:
        self.clip_sample = clip_sample

    def steps(
        self, denoise: Denoise, x_t: Tensor, levels: list[tuple[float, Noise]], seeds: Sequence[int]
    ) -> Iterator[Step]:
        for i, time, noise, after in _pairs(levels):
            posterior = denoise(x_t, noise)
            clean = posterior.mean.clamp(-1, 1) if self.clip_sample else posterior.mean
            eps = (x_t - noise.alpha * clean) / noise.sigma
            variance = after.sigma**2 * (1 - (noise.alpha * after.sigma / (after.alpha * noise.sigma)) ** 2)
            x_next = after.alpha * clean + (after.sigma**2 - variance).sqrt() * eps
            if float(variance) > 0:
                x_next = x_next + variance.sqrt() * step_noise(seeds, i, x_t)
            yield Step(i, len(levels), time, noise, x_t, posterior, x_next)
            x_t = x_next


class DPMSolver(Sampler):
    """DPM-Solver++(2M), by diffusers' `DPMSolverMultistepScheduler` (extra `diffusers`). Second order.

    It knows the levels of `DDPM` only.
    """

    def check(self, levels: list[tuple[float, Noise]]) -> None:
        self._scheduler(levels)

    def _scheduler(self, levels: list[tuple[float, Noise]]) -> Any:
        try:
            from diffusers import DPMSolverMultistepScheduler
        except ImportError as error:
            raise GolddiffError("dpm++ needs the extra diffusers: pip install 'golddiff[diffusers]'") from error
        solver: Any = DPMSolverMultistepScheduler(beta_start=1e-4, beta_end=0.02, prediction_type="sample")
        for time, noise in levels:
            known = time == int(time) and 0 <= time < len(solver.alphas_cumprod)
            if not known or abs(float(solver.alphas_cumprod[int(time)]) - float(noise.alpha) ** 2) > 1e-6:
                raise GolddiffError("dpm++ goes with the schedule ddpm: choose that, or ddim or heun")
        return solver

    def steps(
        self, denoise: Denoise, x_t: Tensor, levels: list[tuple[float, Noise]], seeds: Sequence[int]
    ) -> Iterator[Step]:
        solver = self._scheduler(levels)
        solver.set_timesteps(timesteps=[int(time) for time, _ in levels])
        for i, time, noise, _ in _pairs(levels):
            posterior = denoise(x_t, noise)
            x_next = solver.step(posterior.mean, solver.timesteps[i], x_t).prev_sample
            yield Step(i, len(levels), time, noise, x_t, posterior, x_next)
            x_t = x_next


def _pairs(levels: list[tuple[float, Noise]]) -> Iterator[tuple[int, float, Noise, Noise]]:
    """Yields index, time, noise level and the level after it."""
    after = [noise for _, noise in levels[1:]] + [CLEAN]
    for i, ((time, noise), following) in enumerate(zip(levels, after, strict=True)):
        yield i, time, noise, following


def _ddim(posterior: Posterior, after: Noise, clip: bool) -> Tensor:
    """Where DDIM goes from a posterior."""
    clean = posterior.mean.clamp(-1, 1) if clip else posterior.mean
    return after.alpha * clean + after.sigma * posterior.eps()


SAMPLERS: dict[str, type[Sampler]] = {"ddim": DDIM, "heun": Heun, "ddpm": Ancestral, "dpm++": DPMSolver}


def sampler_named(name: str, clip: bool = True) -> Sampler:
    """`ddim`, `heun`, `ddpm` (ancestral) or `dpm++`, as it is usually set; `clip=False` for banks of latents."""
    if name not in SAMPLERS:
        raise unknown("sampler", name, SAMPLERS)
    kind = SAMPLERS[name]
    return kind(clip_sample=clip) if kind in (DDIM, Ancestral) else kind()


def initial_noise(seeds: Sequence[int], shape: tuple[int, int, int], dtype: torch.dtype = torch.float32) -> Tensor:
    """Standard normal noise, `(len(seeds), C, H, W)`, from one CPU float32 generator for each seed."""
    return torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(s)) for s in seeds]).to(dtype)


def step_noise(seeds: Sequence[int], step: int, like: Tensor) -> Tensor:
    """Standard normal noise of a step, as `like`: from one generator for each seed and step, not that of the start."""
    mixed = hashed(torch.tensor(list(seeds)) ^ hashed(torch.tensor(step + 1)))
    shape = (like.shape[1], like.shape[2], like.shape[3])
    return initial_noise([int(m) & (2**63 - 1) for m in mixed], shape, like.dtype).to(like.device)


def trajectory(
    denoiser: Denoiser,
    seeds: Sequence[int],
    *,
    steps: int = 10,
    schedule: Schedule | None = None,
    sampler: Sampler | None = None,
    labels: int | Sequence[int] | Tensor | None = None,
    start: float | None = None,
    dtype: torch.dtype = torch.float32,
) -> Iterator[Step]:
    """Samples a batch, step by step.

    Arguments:
        denoiser: any denoiser.
        seeds: one for each image; a seed gives the same image alone and in any batch.
        steps: number of denoising steps.
        schedule: DDPM-linear if None. sampler: DDIM if None (without clipping where the bank holds latents).
        labels: one for all or one for each image; -1 or None for no label.
        start: a time from which to begin, instead of from pure noise: the first `x_t` is then a row of the bank (of
            the label), drawn by the seed, with the noise of that level, which is an exact draw of what the bank's own
            reverse process has there ("Closed-Form Diffusion Models" begins so).
        dtype: float32 or float64.

    Yields:
        Step: with `posterior.mean`, `x_t`, `x_next`.
    """
    seeds = _checked_seeds(seeds)
    schedule = DDPM() if schedule is None else schedule
    sampler = DDIM(clip_sample=not denoiser.bank.is_latent) if sampler is None else sampler
    if not isinstance(sampler, Sampler):
        raise GolddiffError("a sampler is an object, such as gd.DDIM()")
    if dtype not in (torch.float32, torch.float64):
        raise GolddiffError(f"dtype is {dtype}: give torch.float32 or torch.float64")
    levels = levels_from(schedule, steps, start)
    denoiser.require_memory(len(seeds))
    bank, x = denoiser.bank, initial_noise(seeds, denoiser.bank.shape, dtype).to(denoiser.bank.device)
    if start is None:
        x = x * schedule.init_noise_sigma
    else:
        alpha, sigma = levels[0][1].like(x)
        each = per_image(NO_LABEL if labels is None else labels, len(seeds), "labels").tolist()
        rows = torch.stack([_row_of(bank, seed, label) for seed, label in zip(seeds, each, strict=True)])
        x = alpha * bank.images(rows, dtype) + sigma * x
    sampler.check(levels)
    return sampler.steps(lambda x_t, noise: denoiser(x_t, noise, labels, seed=seeds), x, levels, seeds)


def levels_from(schedule: Schedule, steps: int, start: float | None = None) -> list[tuple[float, Noise]]:
    """The levels of `steps` steps, or those of them with no more noise than that of time `start`.

    Raises:
        GolddiffError: there are none.
    """
    if not isinstance(schedule, Schedule):
        raise GolddiffError("a schedule is an object, such as gd.DDPM()")
    levels = schedule.levels(steps)
    if start is None:
        return levels
    wrong = GolddiffError(
        f"start is {start!r}: give a time of the schedule, from {levels[0][0]:g} to {levels[-1][0]:g}"
    )
    if not isinstance(start, int | float) or isinstance(start, bool) or not math.isfinite(start):
        raise wrong
    try:
        most = float(schedule(start).g)
    except GolddiffError as error:
        raise wrong from error
    left = [(time, noise) for time, noise in levels if float(noise.g) <= most + 1e-9]
    if not left:
        raise wrong
    return left


def _row_of(bank: Bank, seed: int, label: int) -> Tensor:
    """A row for a seed, `()`: the one with the smallest hash of seed and row key."""
    rows = bank.rows_of(label)
    keys = bank.keys if rows is None else bank.keys[rows]
    best = hashed(keys ^ hashed(torch.tensor(seed)).to(keys.device)).argmin()
    return best if rows is None else rows[best]


def sample(
    denoiser: Denoiser,
    seeds: Sequence[int] = range(16),
    *,
    steps: int = 10,
    schedule: Schedule | None = None,
    sampler: Sampler | None = None,
    labels: int | Sequence[int] | Tensor | None = None,
    start: float | None = None,
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
    if type(batch) is not int or batch < 1:
        raise GolddiffError(f"batch is {batch!r}: give a whole number of at least 1")
    each = per_image(NO_LABEL if labels is None else labels, len(seeds), "labels").tolist()
    out = []
    count = len(levels_from(DDPM() if schedule is None else schedule, steps, start))
    with Bar(total=len(seeds) * count, desc="sampling", unit="step", disable=None if progress else True) as bar:
        for first in range(0, len(seeds), batch):
            part = slice(first, first + batch)
            for step in trajectory(
                denoiser,
                seeds[part],
                steps=steps,
                schedule=schedule,
                sampler=sampler,
                labels=each[part],
                start=start,
                dtype=dtype,
            ):
                bar.update(len(step.x_t))
            out.append(step.posterior.mean)
    return torch.cat(out)


def _checked_seeds(seeds: Sequence[int]) -> list[int]:
    try:
        listed = [operator.index(s) for s in seeds]
    except TypeError as error:
        raise GolddiffError(f"seeds must be whole numbers in a list or range: {error}") from error
    if not listed:
        raise GolddiffError("there are no seeds: give at least one")
    if min(listed) < 0 or max(listed) >= 2**63:
        raise GolddiffError(f"seeds must be from 0 to 2^63 - 1, not {min(listed)} to {max(listed)}")
    return listed
