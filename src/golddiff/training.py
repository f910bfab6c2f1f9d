"""A small trainer for oracles: networks to compare with, not masterpieces."""

from __future__ import annotations

import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from .bank import Bank
from .errors import GolddiffError
from .files import holding, is_empty, save_tensors, sweep
from .golden import hashed
from .jsons import read_json, write_json
from .memory import explained
from .progress import Bar

__all__ = ["Training", "train_oracle"]

STATE, SETTINGS = "state.safetensors", "training.json"


@dataclass(frozen=True)
class Training:
    """How an oracle is trained.

    Arguments:
        images: seen in all. batch: of a step.
        width: channels of the first level; the others have twice as many.
        learning_rate: of AdamW, after a warm-up of 200 steps and before a fall to a tenth (cosine).
        average: weight of the past in the moving average of the network, once warm.
        flip: mirror half of the images.
        seed: of the weights and of all draws.
    """

    images: int = 200_000
    batch: int = 64
    width: int = 32
    learning_rate: float = 4e-4
    average: float = 0.999
    flip: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("images", "batch", "width"):
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise GolddiffError(f"{name} is {value!r}: give a whole number of at least 1")
        if self.width % 16:
            raise GolddiffError(f"width is {self.width}: give a multiple of 16")
        if not (0 < self.learning_rate < 1 and 0 <= self.average < 1):
            raise GolddiffError("learning_rate must be over 0 and under 1, and average from 0 to under 1")

    @property
    def steps(self) -> int:
        return math.ceil(self.images / self.batch)


@explained()
def train_oracle(bank: Bank, out: str | Path, training: Training, *, save_every: int = 200) -> Path:
    """Trains an attention-free U-Net (diffusers' `UNet2DModel`) to predict the noise of DDPM-linear levels.

    The folder gets the moving average of the network as diffusers stores it (`config.json` and weights, and
    `scheduler_config.json`), written at the end; until then `state.safetensors`, from which the same command goes on.
    Each step is a function of seed and step alone, so an interrupted training ends at the same weights.

    Raises:
        GolddiffError: diffusers is not installed, or the folder holds another training.
    """
    try:
        from diffusers import DDPMScheduler
    except ImportError as error:
        raise GolddiffError(
            "training an oracle needs the extra diffusers: pip install 'golddiff[diffusers]'"
        ) from error
    with holding(Path(out)):
        return _train(bank, Path(out), training, save_every, DDPMScheduler)


def _train(bank: Bank, out: Path, training: Training, save_every: int, scheduler: Any) -> Path:
    """What `train_oracle` does in a folder that it holds."""
    _claim(out, bank, training)
    if (out / "config.json").is_file():
        (out / STATE).unlink(missing_ok=True)  # it may have been killed right before that
        return out
    device = bank.device
    torch.manual_seed(training.seed)
    model = _network(bank, training.width).to(device, memory_format=torch.channels_last)
    average = [p.detach().clone() for p in model.parameters()]
    optimiser = torch.optim.AdamW(model.parameters(), lr=training.learning_rate, weight_decay=0.0)
    schedule = scheduler(num_train_timesteps=1000, beta_start=1e-4, beta_end=0.02, beta_schedule="linear")
    table = schedule.alphas_cumprod.to(device)
    losses = _resume(out, model, average, optimiser)
    half = torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")
    with Bar(total=training.steps, initial=len(losses), desc="training", unit="step", disable=None) as bar:
        for step in range(len(losses), training.steps):
            x, z, t = _batch(bank, training, step)
            abar = table[t][:, None, None, None]
            for group in optimiser.param_groups:
                group["lr"] = training.learning_rate * _pace(step, training.steps)
            with half:
                said = model((abar.sqrt() * x + (1 - abar).sqrt() * z).contiguous(memory_format=torch.channels_last), t)
            loss = (said.sample.float() - z).square().mean()
            if not bool(loss.isfinite()):
                raise GolddiffError(f"the loss is {float(loss)} at step {step}: lower learning_rate, and start again")
            optimiser.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimiser.step()
            decay = min(training.average, (1 + step) / (10 + step))
            with torch.no_grad():
                torch._foreach_lerp_(average, list(model.parameters()), 1 - decay)
            losses.append(float(loss.detach()))
            bar.update()
            bar.set_postfix(loss=f"{sum(losses[-100:]) / len(losses[-100:]):.4f}", refresh=False)
            if (step + 1) % save_every == 0:
                _save(out, model, average, optimiser, losses)
    with torch.no_grad():
        for parameter, mean in zip(model.parameters(), average, strict=True):
            parameter.copy_(mean)
    _save(out, model, average, optimiser, losses)
    try:
        schedule.save_pretrained(out)
    except OSError as error:
        raise GolddiffError(f"{out} cannot be written to ({error.strerror or error}): make room there") from error
    final = model.to("cpu", memory_format=torch.contiguous_format)
    weights = {name: tensor.contiguous() for name, tensor in final.state_dict().items()}
    save_tensors(out / "diffusion_pytorch_model.safetensors", weights, {"format": "pt"})
    # last: its presence says that all is there
    write_json(out / "config.json", {"_class_name": "UNet2DModel", **_plain(final.config)})
    (out / STATE).unlink()
    return out


def _network(bank: Bank, width: int) -> Any:
    from diffusers import UNet2DModel

    channels, height, width_of_image = bank.shape
    if height % 4 or width_of_image % 4:
        raise GolddiffError(f"images of {height} x {width_of_image}: an oracle needs sides that 4 divides")
    return UNet2DModel(
        sample_size=height if height == width_of_image else (height, width_of_image),
        in_channels=channels,
        out_channels=channels,
        block_out_channels=(width, 2 * width, 2 * width),
        layers_per_block=1,
        down_block_types=("DownBlock2D",) * 3,
        up_block_types=("UpBlock2D",) * 3,
        norm_num_groups=16,
        add_attention=False,
    )


def _batch(bank: Bank, training: Training, step: int) -> tuple[Tensor, Tensor, Tensor]:
    """Images, noise and times of a step."""
    mixed = hashed(hashed(torch.tensor(training.seed)) ^ torch.tensor(step))
    random = torch.Generator().manual_seed(int(mixed) & (2**63 - 1))
    rows = bank.rows[torch.randint(len(bank), (training.batch,), generator=random).to(bank.device)]
    x = bank.images(rows)
    if training.flip:
        mirrored = torch.rand(training.batch, generator=random).to(x.device) < 0.5
        x = torch.where(mirrored[:, None, None, None], x.flip(3), x)
    z = torch.randn(x.shape, generator=random).to(x.device)
    return x, z, torch.randint(1000, (training.batch,), generator=random).to(x.device)


def _pace(step: int, steps: int) -> float:
    warm = min(200, max(1, steps // 10))
    if step < warm:
        return (step + 1) / warm
    return 0.1 + 0.45 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))


def _claim(out: Path, bank: Bank, training: Training) -> None:
    """Writes into the folder what is trained there; refuses the folder of something else."""
    said = {"bank": bank.fingerprint, **asdict(training)}
    file = out / SETTINGS
    if file.exists():
        if read_json(file, "choose another --out") != said:
            raise GolddiffError(f"{out} holds a training with other settings: choose another --out, or ask the same")
    elif not is_empty(out):
        raise GolddiffError(f"{out} exists and holds no training: choose another --out")
    sweep(out, time.time())
    write_json(file, said)


def _save(out: Path, model: Any, average: list[Tensor], optimiser: Any, losses: list[float]) -> None:
    tensors = {"losses": torch.tensor(losses, dtype=torch.float64)}
    for i, (parameter, mean) in enumerate(zip(model.parameters(), average, strict=True)):
        moments = optimiser.state[parameter]
        tensors[f"{i} value"], tensors[f"{i} average"] = parameter.detach(), mean
        tensors[f"{i} first"], tensors[f"{i} second"] = moments["exp_avg"], moments["exp_avg_sq"]
    save_tensors(out / STATE, {name: tensor.cpu().contiguous() for name, tensor in tensors.items()})


def _resume(out: Path, model: Any, average: list[Tensor], optimiser: Any) -> list[float]:
    """Puts back what was saved; the losses of the steps that are done."""
    file = out / STATE
    if not file.exists():
        return []
    try:
        kept = load_file(file)
        losses = kept["losses"].tolist()
        with torch.no_grad():
            for i, (parameter, mean) in enumerate(zip(model.parameters(), average, strict=True)):
                parameter.copy_(kept[f"{i} value"])
                mean.copy_(kept[f"{i} average"])
                optimiser.state[parameter] = {
                    "step": torch.tensor(float(len(losses))),
                    "exp_avg": torch.empty_like(parameter).copy_(kept[f"{i} first"]),
                    "exp_avg_sq": torch.empty_like(parameter).copy_(kept[f"{i} second"]),
                }
    except (SafetensorError, KeyError, RuntimeError, OSError) as error:
        raise GolddiffError(f"{file} is damaged ({error}): remove it to start again") from error
    return losses


def _plain(config: Any) -> dict[str, Any]:
    return {key: list(value) if isinstance(value, tuple) else value for key, value in dict(config).items()}
