"""Oracles: trained networks as denoisers, to compare with."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .bank import Bank
from .denoise import Denoiser
from .errors import GolddiffError, unknown
from .files import hash_file
from .networks import read_network, settings, weights_of
from .noise import DDPM, Noise, Schedule
from .posterior import Posterior

__all__ = ["PREDICTIONS", "Oracle", "oracle"]

PREDICTIONS = ("epsilon", "sample", "v_prediction", "denoised")
BATCH = 64
SCHEDULER = "scheduler_config.json"


class Oracle(Denoiser):
    r"""A network's estimate of the clean image. It has no rows, and its `log_evidence` is NaN.

    What the network sees is `x = x_t / sqrt(alpha^2 + sigma^2)` and the time t of its own schedule (a fraction where
    the noise level lies between two whole times), and what it says is read as

    .. math:: epsilon: (x - \sigma o) / \alpha, \quad sample: o, \quad v\_prediction: \alpha x - \sigma o

    with alpha and sigma brought to `alpha^2 + sigma^2 = 1`. A `denoised` network has no schedule: it sees `x_t / alpha`
    and `sigma / alpha` and says the clean image, as EDM's preconditioned networks do.

    Arguments:
        bank: gives the shape of the images, and the device.
        network: `network(x, t)`: `(B, C, H, W)` float32 and `(B,)` -> `(B, C, H, W)`.
        prediction: `epsilon`, `sample`, `v_prediction` or `denoised`.
        schedule: of the network, with a table `alphas_cumprod`; None for `denoised`.
        weights: a hash of the network's files, if it has some.

    Attributes:
        identity: of weights, prediction and schedule.
    """

    properties = frozenset({"permutation_invariant"})

    def __init__(
        self,
        bank: Bank,
        network: Callable[[Tensor, Tensor], Tensor],
        prediction: str,
        schedule: DDPM | None,
        weights: str = "",
    ) -> None:
        if prediction not in PREDICTIONS:
            raise unknown("prediction", prediction, PREDICTIONS)
        if (schedule is None) != (prediction == "denoised"):
            raise GolddiffError(
                f"a network that predicts {prediction} {'has no' if schedule else 'needs a'} schedule: "
                + ("leave it out" if schedule else "give one, such as schedule='ddpm'")
            )
        self.bank, self.network, self.prediction = bank, network, prediction
        self.options = {"prediction": prediction}
        self._angles = None
        if schedule is not None:
            table = schedule.alphas_cumprod.double()
            if len(table) < 2 or not bool(((table >= 0) & (table <= 1)).all()) or bool((table.diff() > 0).any()):
                raise GolddiffError(
                    "alphas_cumprod of a network's schedule must fall from 1 to 0: give another schedule"
                )
            self._angles = torch.atan2((1 - table).sqrt(), table.sqrt())
        said = f"{weights} {prediction} {None if self._angles is None else self._angles.tolist()}"
        self.identity = hashlib.blake2b(said.encode(), digest_size=8).hexdigest()

    def _posterior(
        self, x_t: Tensor, noise: Noise, label: int | None, eligible: Tensor | None, seed: Tensor
    ) -> Posterior:
        size = torch.hypot(noise.alpha, noise.sigma)
        level = Noise(noise.alpha / size, noise.sigma / size)
        alpha, sigma = level.like(x_t)
        if self._angles is None:
            x, time = x_t / noise.like(x_t)[0], noise.rho
        else:
            x, time = x_t / size.to(x_t.device, x_t.dtype).reshape(-1, 1, 1, 1), self._times(level)
        with torch.no_grad():
            parts = [
                self.network(part.float(), t.float().to(x_t.device))
                for part, t in zip(x.split(BATCH), time.split(BATCH), strict=True)
            ]
        said = torch.cat(parts).to(x_t.dtype)
        if said.shape != x_t.shape:
            raise GolddiffError(f"the network says {tuple(said.shape)} of {tuple(x_t.shape)}: it must keep the shape")
        mean = {
            "epsilon": lambda: (x - sigma * said) / alpha,
            "v_prediction": lambda: alpha * x - sigma * said,
        }.get(self.prediction, lambda: said)()
        return Posterior(
            mean=mean,
            log_evidence=torch.full((len(x_t),), math.nan, dtype=torch.float64, device=x_t.device),
            ess=None,
            support=None,
            x_t=x_t,
            noise=noise,
        )

    def _times(self, level: Noise) -> Tensor:
        """The times of noise levels in the network's table, whole where a level is in the table."""
        assert self._angles is not None  # noqa: S101 - only networks with a table are asked
        angle = torch.atan2(level.sigma, level.alpha)
        above = torch.searchsorted(self._angles, angle).clamp(1, len(self._angles) - 1)
        low, high = self._angles[above - 1], self._angles[above]
        time = above - 1 + ((angle - low) / (high - low)).clamp(0, 1)
        return torch.where((time - time.round()).abs() < 1e-4, time.round(), time)


def oracle(
    source: str | Path | Callable[[Tensor, Tensor], Tensor],
    bank: Bank,
    *,
    prediction: str | None = None,
    schedule: str | Schedule | None = None,
) -> Oracle:
    """A trained network as a denoiser.

    Arguments:
        source: a folder of a diffusers `UNet2DModel` with its weights as safetensors, or of a pipeline that holds one
            as `unet/` (extra `diffusers`);
            or a callable, see `Oracle`.
        bank: the images that it is compared on.
        prediction: what the network says; by default what the folder's scheduler says.
        schedule: `ddpm` or a schedule with `alphas_cumprod`; by default that of the folder's scheduler.

    Raises:
        GolddiffError: no such network, images of another shape, or no word of the schedule.
    """
    if isinstance(source, str | Path):
        network, stated, weights = _diffusers(Path(source), bank)
    elif callable(source):
        network, stated, weights = source, None, ""
    else:
        raise GolddiffError(f"an oracle of type {type(source).__name__}: give a folder or a callable")
    if prediction == "denoised":
        return Oracle(bank, network, prediction, None, weights)
    table: Any = DDPM() if schedule == "ddpm" else schedule
    if stated is not None:
        prediction = prediction or str(stated.config.prediction_type)
    if table is None and stated is not None:
        table = DDPM()
        table.alphas_cumprod = stated.alphas_cumprod.float()
    if table is None:
        raise GolddiffError(
            f"{source} says nothing about its schedule: give schedule='ddpm' (--oracle-schedule ddpm), "
            "or put a scheduler_config.json beside its config.json"
        )
    if not hasattr(table, "alphas_cumprod"):
        raise unknown("schedule of an oracle", str(schedule), ("ddpm",))
    return Oracle(bank, network, prediction or "epsilon", table, weights)


def _diffusers(folder: Path, bank: Bank) -> tuple[Callable[[Tensor, Tensor], Tensor], Any, str]:
    """The network of a folder, its scheduler if there is one, and a hash of its weights."""
    unet = folder / "unet" if (folder / "unet").is_dir() else folder
    channels, height, width = bank.shape
    try:
        model = read_network(unet, "UNet2DModel").eval().to(bank.device)
        said = model.config
        size = said.sample_size or (height, width)
        theirs = (said.in_channels, *((size, size) if isinstance(size, int) else size))
        if theirs != bank.shape or said.out_channels != channels:
            raise GolddiffError(
                f"{folder} is a network for images of {' x '.join(map(str, theirs))}, the bank has "
                f"{channels} x {height} x {width}"
            )
        with torch.no_grad():  # settings can be such that it does not work
            model(torch.zeros(1, *bank.shape, device=bank.device), torch.zeros(1, device=bank.device))
        file = next((p for p in (folder / "scheduler" / SCHEDULER, folder / SCHEDULER) if p.is_file()), None)
        scheduler = None if file is None else _scheduler(settings(file))
    except GolddiffError:
        raise
    except Exception as error:  # files of others fail in any way
        reason = str(error).split("\n")[0][:160]
        raise GolddiffError(f"{folder} holds no network that can be read ({reason}): give its folder") from error
    hashes = " ".join(hash_file(path) for path in weights_of(unet))
    return lambda x, t: model(x, t).sample, scheduler, hashes


def _scheduler(stated: dict[str, Any]) -> Any:
    from diffusers import DDPMScheduler

    return DDPMScheduler.from_config(stated)
