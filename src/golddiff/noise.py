"""Noise levels, and schedules that map time to them."""

from __future__ import annotations

import abc
import copy
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .errors import GolddiffError, unknown

__all__ = [
    "CLEAN",
    "DDPM",
    "EDM",
    "Cosine",
    "DiffusersSchedule",
    "Flow",
    "Noise",
    "Schedule",
    "noise_of_sigma",
    "noise_of_table",
    "schedule_named",
    "scheduler_kind",
]


MOST_STEPS = 100_000


@dataclass(frozen=True, eq=False)
class Noise:
    r"""A noise level, or one for each image of a batch.

    .. math:: x_t = \alpha x + \sigma z

    Arguments:
        alpha: signal, a number or `(B,)`, at least 0.
        sigma: noise, a number or `(B,)`, at least 0; 0 is a legal end of a schedule, denoisers refuse it.

    Raises:
        GolddiffError: NaN, infinite or negative values, both zero, or shapes that differ.
    """

    alpha: Tensor
    sigma: Tensor

    def __init__(self, alpha: Any, sigma: Any) -> None:
        try:
            pair = [torch.as_tensor(v, dtype=torch.float64).cpu() for v in (alpha, sigma)]
        except (TypeError, ValueError, RuntimeError, OverflowError) as error:
            raise GolddiffError(f"alpha and sigma must be numbers or (B,) arrays: {error}") from error
        if any(v.ndim > 1 for v in pair) or (pair[0].ndim == pair[1].ndim == 1 and len(pair[0]) != len(pair[1])):
            raise GolddiffError("alpha and sigma must be numbers or (B,) arrays of the same length")
        a, s = torch.broadcast_tensors(*pair)
        for name, value in (("alpha", a), ("sigma", s)):
            if not bool(torch.isfinite(value).all()) or bool((value < 0).any()):
                raise GolddiffError(f"{name} is {value.tolist()}: give finite numbers of at least 0")
        if bool(((a == 0) & (s == 0)).any()):
            raise GolddiffError("alpha and sigma are both 0: one of them must be positive")
        object.__setattr__(self, "alpha", a)
        object.__setattr__(self, "sigma", s)

    def __repr__(self) -> str:
        return f"Noise(alpha={self.alpha.tolist()}, sigma={self.sigma.tolist()})"

    @property
    def rho(self) -> Tensor:
        """`sigma / alpha`, the noise in units of the data."""
        return self.sigma / self.alpha

    @property
    def g(self) -> Tensor:
        """`sigma / sqrt(alpha^2 + sigma^2)`, from 0 (clean) to 1 (pure noise)."""
        return self.sigma / torch.hypot(self.alpha, self.sigma)

    @property
    def angle(self) -> Tensor:
        """`atan(sigma / alpha)` rounded to 2^-40: the same number however (alpha, sigma) are scaled."""
        return torch.round(torch.atan2(self.sigma, self.alpha) * 2**40).long()

    def expand(self, batch: int) -> Noise:
        """One level for each of `batch` images."""
        if self.alpha.ndim == 1 and len(self.alpha) != batch:
            raise GolddiffError(f"{len(self.alpha)} noise levels for {batch} images: give one, or one each")
        return Noise(self.alpha.expand(batch), self.sigma.expand(batch))

    def __getitem__(self, items: Any) -> Noise:
        return Noise(self.alpha[items], self.sigma[items])

    def like(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """`alpha` and `sigma` in the type and on the device of `x`, shaped to multiply it, `(B or 1, 1, ...)`."""
        shape = (-1,) + (1,) * (x.ndim - 1)
        alpha, sigma = (v.reshape(shape).to(x.device, x.dtype) for v in (self.alpha, self.sigma))
        return alpha, sigma


CLEAN = Noise(1.0, 0.0)


class Schedule(abc.ABC):
    """Time to noise level.

    Attributes:
        init_noise_sigma: the standard deviation of the noise that sampling starts from.
    """

    init_noise_sigma: float = 1.0

    @abc.abstractmethod
    def __call__(self, time: float) -> Noise:
        """The noise level at a time."""

    @abc.abstractmethod
    def times(self, steps: int) -> list[float]:
        """The times of `steps` denoising steps, from noise to image. The clean image follows the last one."""

    def levels(self, steps: int) -> list[tuple[float, Noise]]:
        """`times(steps)`, each with its noise level."""
        _check_steps(steps)
        return [(time, self(time)) for time in self.times(steps)]


class DDPM(Schedule):
    r"""The discrete schedule of DDPM with linear betas ("Denoising Diffusion Probabilistic Models").

    .. math:: \bar\alpha_t = \prod_{s \le t} (1 - \beta_s), \quad
        \alpha = \sqrt{\bar\alpha_t}, \quad \sigma = \sqrt{1 - \bar\alpha_t}

    The table is made in float32 as diffusers' schedulers make theirs, so that levels are equal to theirs.
    Times are whole numbers; steps are spaced as "leading": 10 of 1,000 are 900, 800, ..., 0.

    Arguments:
        train_steps: length of the table.
        beta_start: first beta. beta_end: last beta.
    """

    def __init__(self, train_steps: int = 1000, beta_start: float = 1e-4, beta_end: float = 0.02) -> None:
        if type(train_steps) is not int or train_steps < 1 or not 0 < beta_start <= beta_end < 1:
            raise GolddiffError("DDPM needs train_steps of at least 1, and 0 < beta_start <= beta_end < 1")
        betas = torch.linspace(beta_start, beta_end, train_steps, dtype=torch.float32)
        self.alphas_cumprod = torch.cumprod(1.0 - betas, dim=0)

    def __call__(self, time: float) -> Noise:
        return noise_of_table(self.alphas_cumprod, time)

    def times(self, steps: int) -> list[float]:
        total = len(self.alphas_cumprod)
        if steps > total:
            raise GolddiffError(f"{steps} steps of a schedule of {total}: give at most {total}")
        return [float(i * (total // steps)) for i in reversed(range(steps))]


class Cosine(Schedule):
    r"""The cosine schedule ("Improved Denoising Diffusion Probabilistic Models"), time from 1 (noise) to 0.

    .. math:: \alpha(t) = \cos\left(\frac{\pi}{2} \frac{t + s}{1 + s}\right) /
        \cos\left(\frac{\pi}{2} \frac{s}{1 + s}\right), \quad \sigma = \sqrt{1 - \alpha^2}

    Arguments:
        s: the offset that keeps noise from falling too fast near 0.
    """

    def __init__(self, s: float = 0.008) -> None:
        if not s >= 0:
            raise GolddiffError(f"s is {s}: give a number of at least 0")
        self.s = s

    def __call__(self, time: float) -> Noise:
        _within(time, 0.0, 1.0)
        angle = [math.pi / 2 * (t + self.s) / (1 + self.s) for t in (time, 0.0)]
        alpha = 0.0 if time == 1 else math.cos(angle[0]) / math.cos(angle[1])
        return Noise(alpha, math.sqrt(1 - alpha**2))

    def times(self, steps: int) -> list[float]:
        return [1 - i / steps for i in range(steps)]


class EDM(Schedule):
    r"""The schedule of EDM ("Elucidating the Design Space of Diffusion-Based Generative Models").

    `alpha = 1`, and time is `sigma` itself. Steps are

    .. math:: \sigma_i = \left(\sigma_{max}^{1/\rho} +
        \tfrac{i}{n - 1} (\sigma_{min}^{1/\rho} - \sigma_{max}^{1/\rho})\right)^\rho
    """

    def __init__(self, sigma_min: float = 0.002, sigma_max: float = 80.0, curvature: float = 7.0) -> None:
        if not (0 < sigma_min < sigma_max and curvature > 0):
            raise GolddiffError(f"sigma_min {sigma_min} and sigma_max {sigma_max}: give 0 < sigma_min < sigma_max")
        self.sigma_min, self.sigma_max, self.curvature = sigma_min, sigma_max, curvature
        self.init_noise_sigma = sigma_max

    def __call__(self, time: float) -> Noise:
        return Noise(1.0, time)

    def times(self, steps: int) -> list[float]:
        first, last = (s ** (1 / self.curvature) for s in (self.sigma_max, self.sigma_min))
        return [(first + i / max(steps - 1, 1) * (last - first)) ** self.curvature for i in range(steps)]


class Flow(Schedule):
    """Rectified flow ("Flow Straight and Fast"): `alpha = t`, `sigma = 1 - t`, time from 0 (noise) to 1."""

    def __call__(self, time: float) -> Noise:
        _within(time, 0.0, 1.0)
        return Noise(time, 1 - time)

    def times(self, steps: int) -> list[float]:
        return [i / steps for i in range(steps)]


class DiffusersSchedule(Schedule):
    """The levels of a diffusers scheduler (extra `diffusers`), as it sets them for a number of steps.

    Arguments:
        scheduler: any scheduler whose `kind` is known, see `scheduler_kind`; a copy is used.
    """

    def __init__(self, scheduler: Any) -> None:
        self.kind = scheduler_kind(scheduler)
        self.scheduler = copy.deepcopy(scheduler)
        self.init_noise_sigma = float(getattr(scheduler, "init_noise_sigma", 1.0))

    def levels(self, steps: int) -> list[tuple[float, Noise]]:
        times = self.times(steps)
        if self.kind == "table":
            return [(time, self(time)) for time in times]
        # some schedulers repeat levels within a step; the end is left out
        sigmas = list(dict.fromkeys(float(s) for s in self.scheduler.sigmas[: len(self.scheduler.timesteps)]))
        if len(sigmas) != len(times) or sigmas != sorted(sigmas, reverse=True) or sigmas[-1] == 0:
            raise GolddiffError(
                f"the levels of {type(self.scheduler).__name__} are not understood: take another scheduler"
            )
        self.init_noise_sigma = float(getattr(self.scheduler, "init_noise_sigma", 1.0))
        return [(time, noise_of_sigma(self.kind, sigma)) for time, sigma in zip(times, sigmas, strict=True)]

    def times(self, steps: int) -> list[float]:
        _check_steps(steps)
        self.scheduler.set_timesteps(steps)
        return list(dict.fromkeys(float(t) for t in self.scheduler.timesteps))

    def __call__(self, time: float) -> Noise:
        if self.kind not in ("table", "vp"):
            raise GolddiffError("the levels of this scheduler depend on the number of steps: use levels(steps)")
        return noise_of_table(self.scheduler.alphas_cumprod, time)


STRANGE = ("Inverse", "SDE", "KDPM2Ancestral", "CogVideoXDPM", "UnCLIP", "Helios")  # they step in ways of their own


def scheduler_kind(scheduler: Any) -> str:
    """How a diffusers scheduler writes its noise levels.

    `flow`: by `sigmas` s, `alpha = 1 - s, sigma = s` (flow matching). `ve`: by `sigmas`, `alpha = 1` (Euler, Heun, EDM
    and others whose start is not of unit variance). `vp`: by `sigmas`, scaled to `alpha^2 + sigma^2 = 1` (multistep
    solvers). `table`: by the square roots of `alphas_cumprod` (DDIM, DDPM and others).

    Raises:
        GolddiffError: it is no scheduler, or one whose levels or outputs are not understood.
    """
    if not hasattr(scheduler, "set_timesteps") or not hasattr(scheduler, "config"):
        raise GolddiffError(f"{type(scheduler).__name__} is no diffusers scheduler: give one with set_timesteps")
    name, config = type(scheduler).__name__, scheduler.config
    by_sigmas, by_table = hasattr(scheduler, "sigmas"), hasattr(scheduler, "alphas_cumprod")
    known = hasattr(scheduler, "step") and not any(part in name for part in STRANGE)
    if known and by_sigmas and (name.startswith("FlowMatch") or config.get("use_flow_sigmas")):
        return "flow"
    known = known and "prediction_type" in config
    if known and by_sigmas and float(scheduler.init_noise_sigma) != 1.0:
        return "ve"
    if known and by_table:
        return "vp" if by_sigmas else "table"
    raise GolddiffError(
        f"the levels of {name} are not understood: take DDIM, DDPM, PNDM, DPMSolverMultistep, UniPC, EulerDiscrete, "
        "HeunDiscrete, EDMEuler, EDMDPMSolverMultistep, FlowMatchEulerDiscrete or one of their kind"
    )


def noise_of_sigma(kind: str, sigma: float) -> Noise:
    """The noise level of an entry of a scheduler's `sigmas`; `kind` as in `scheduler_kind`, not `table`."""
    if kind == "flow":
        return Noise(1 - sigma, sigma)
    return Noise(1.0, sigma) if kind == "ve" else Noise(1 / math.hypot(1, sigma), sigma / math.hypot(1, sigma))


def noise_of_table(table: Tensor, time: float) -> Noise:
    """The noise level of a whole time in a table `alphas_cumprod`."""
    if not 0 <= time < len(table) or time != int(time):
        raise GolddiffError(f"time {time}: give a whole number from 0 to {len(table) - 1}")
    abar = table[int(time)].double()
    return Noise(abar.sqrt(), (1 - abar).sqrt())


SCHEDULES: dict[str, type[Schedule]] = {"ddpm": DDPM, "cosine": Cosine, "edm": EDM, "flow": Flow}


def schedule_named(name: str) -> Schedule:
    """`ddpm`, `cosine`, `edm` or `flow`, with its usual settings."""
    if name not in SCHEDULES:
        raise unknown("schedule", name, SCHEDULES)
    return SCHEDULES[name]()


def _check_steps(steps: int) -> None:
    if type(steps) is not int or not 1 <= steps <= MOST_STEPS:
        raise GolddiffError(f"steps is {steps!r}: give a whole number from 1 to {MOST_STEPS}")


def _within(time: float, low: float, high: float) -> None:
    if not low <= time <= high:
        raise GolddiffError(f"time {time}: give a number from {low} to {high}")
