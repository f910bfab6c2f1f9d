"""golddiff under diffusers' schedulers, and under its pipelines (extra `diffusers`)."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from ..bank import Bank
from ..denoise import Denoiser, denoiser
from ..errors import GolddiffError, unknown
from ..jsons import read_json, sealed, unsealed, write_json
from ..noise import DDPM, Noise, noise_of_sigma, noise_of_table, scheduler_kind
from ..posterior import Posterior
from ..recipe import open_bank

try:
    from diffusers.configuration_utils import FrozenDict
    from diffusers.models.unets.unet_2d import UNet2DOutput
    from diffusers.pipelines.pipeline_utils import DiffusionPipeline, ImagePipelineOutput
    from diffusers.schedulers.scheduling_ddim import DDIMScheduler
    from diffusers.utils.torch_utils import randn_tensor
except ImportError as error:
    raise GolddiffError(f"this needs diffusers ({error}): pip install 'golddiff[diffusers]'") from error

__all__ = ["GoldDiffPipeline", "GoldDiffUNet"]

RECIPE = "golddiff.json"
OUTPUTS = ("pil", "np", "pt", "latent")
SEEDS = 2**63


class GoldDiffPipeline(DiffusionPipeline):
    """Samples a bank with any diffusers scheduler: `GoldDiffPipeline.from_pretrained(bank)`.

    The scheduler says the noise level of each step, the denoiser the posterior mean, and this is handed to the
    scheduler in the form that its `prediction_type` asks for. The scheduler can be exchanged as usual:
    `pipe.scheduler = UniPCMultistepScheduler.from_config(pipe.scheduler.config)`.

    Arguments:
        scheduler: see `golddiff.noise.scheduler_kind`.
        denoiser: any denoiser of golddiff.
        recipe: the `method` and `options` that made it, if it is to be saved or moved.
    """

    _callback_tensor_inputs = ("latents", "denoised")

    def __init__(self, scheduler: Any, denoiser: Denoiser | None = None, recipe: dict[str, Any] | None = None) -> None:
        super().__init__()
        if not isinstance(denoiser, Denoiser):
            raise GolddiffError("a pipeline needs a denoiser: make it with GoldDiffPipeline.from_pretrained(bank)")
        scheduler_kind(scheduler)
        self.register_modules(scheduler=scheduler)
        self.denoiser, self._recipe = denoiser, recipe

    @classmethod
    def from_pretrained(  # type: ignore[override] # its bank comes from no hub
        cls, bank: Bank | str | Path, method: str | None = None, scheduler: Any = None, **options: Any
    ) -> Self:
        """A pipeline over a bank.

        Arguments:
            bank: a bank, what `Bank.build` takes, or a folder that `save_pretrained` wrote.
            method, options: as in `golddiff.denoiser`; `golddiff` by default.
            scheduler: by default `DDIMScheduler(beta_start=1e-4, beta_end=0.02)`, whose images are those of
                `golddiff.sample` (with `clip_sample=False` for a bank of latents).
        """
        if isinstance(bank, str | Path) and (Path(bank) / RECIPE).is_file():
            bank, kept, scheduler = _kept(Path(bank), scheduler)
            if method is None:
                method, options = kept["method"], {**kept["options"], **options}
        held = bank if isinstance(bank, Bank) else Bank.build(bank)
        if scheduler is None:
            scheduler = DDIMScheduler(beta_start=1e-4, beta_end=0.02, clip_sample=not held.is_latent)
        method = method or "golddiff"
        return cls(scheduler, denoiser(method, held, **options), {"method": method, "options": options})

    def save_pretrained(self, save_directory: str | Path, **_: Any) -> None:  # type: ignore[override]
        """Writes the scheduler's configuration, and which bank, method and options (all of them): no images.

        Raises:
            GolddiffError: the bank lives in memory, or an option cannot be written down.
        """
        bank = self.denoiser.bank
        if self._recipe is None or bank.path is None:
            raise GolddiffError("only a pipeline over a whole bank in a folder is saved: build it with out=")
        known = {**bank.source, "path": str(bank.path.resolve()), "fingerprint": bank.fingerprint}
        try:
            said = {"bank": known, "method": self._recipe["method"], "options": self.denoiser.options}
            json.dumps(said)
        except TypeError as error:
            raise GolddiffError(f"an option cannot be saved ({error}): leave it out and give it later") from error
        folder = Path(save_directory)
        self.scheduler.save_pretrained(folder / "scheduler")
        write_json(folder / RECIPE, sealed(said))

    @property
    def device(self) -> torch.device:
        """Where the bank is."""
        return self.denoiser.bank.device

    @property
    def _execution_device(self) -> torch.device:
        return self.device

    @property
    def dtype(self) -> torch.dtype:
        """Images are float32 unless `latents` are float64."""
        return torch.float32

    def to(self, device: str | torch.device, dtype: torch.dtype = torch.float32) -> Self:
        """Brings the bank to a device."""
        if self._recipe is None:
            raise GolddiffError("this pipeline was given its denoiser: make it with from_pretrained, or move the bank")
        if not isinstance(device, str | torch.device) or dtype != torch.float32:
            raise GolddiffError(f"to({device}, {dtype}): give a device; images stay float32")
        bank = self.denoiser.bank.to(device)
        if bank is not self.denoiser.bank:
            self.denoiser = denoiser(self._recipe["method"], bank, **self._recipe["options"])
        return self

    @torch.no_grad()
    def __call__(
        self,
        batch_size: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        num_inference_steps: int = 10,
        class_labels: int | Sequence[int] | Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[..., dict[str, Tensor]] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        latents: Tensor | None = None,
    ) -> Any:
        """Images from noise.

        They are what the scheduler ends at, brought from [-1, 1] to [0, 1]. With `DDIMScheduler` that is the posterior
        mean of the last step, clipped: the images of `golddiff.sample` for `seeds` s when the generators are
        `[torch.Generator().manual_seed(s) for s in seeds]`.

        Arguments:
            batch_size: how many.
            generator: one for each image, or one for all, for the noise of the start and of stochastic schedulers.
                The seed of what is drawn inside retrieval is the image's `generator.initial_seed()`; with one
                generator for all it is that plus the number of the image; without, it is drawn by torch's own.
            num_inference_steps: as the scheduler takes it.
            class_labels: one for all or one for each image; -1 or None for no label.
            output_type: `pil`, `np` `(B, H, W, C)` or `pt` `(B, C, H, W)` in [0, 1], decoded if the bank holds latents;
                `latent`: as the scheduler left it.
            return_dict: `ImagePipelineOutput`, or else a tuple.
            callback_on_step_end: `callback(pipe, step, timestep, tensors) -> dict`; `latents` in what it returns
                replace the sample.
            callback_on_step_end_tensor_inputs: of `latents` and `denoised` (the posterior mean in [-1, 1]).
            latents: the noise of the start, `(B, C, H, W)` of unit variance, float32 or float64.

        Raises:
            GolddiffError: a scheduler that is not understood, or a wrong argument.
        """
        self._check(batch_size, generator, output_type, callback_on_step_end_tensor_inputs)
        if type(num_inference_steps) is not int or num_inference_steps < 1:
            raise GolddiffError(f"num_inference_steps is {num_inference_steps!r}: give a whole number of at least 1")
        x, seeds = self._start(batch_size, generator, latents)
        kind = scheduler_kind(self.scheduler)
        self.scheduler.set_timesteps(num_inference_steps, device=self.device)
        if hasattr(self.scheduler, "set_begin_index"):
            self.scheduler.set_begin_index(0)  # timesteps that occur twice would else be looked up
        x = x * float(getattr(self.scheduler, "init_noise_sigma", 1.0))
        extra = {"generator": generator} if "generator" in inspect.signature(self.scheduler.step).parameters else {}
        for i, t in enumerate(self.progress_bar(self.scheduler.timesteps)):
            self._announce(x, t)
            noise, sigma = _level(self.scheduler, kind, i, t)
            posterior = self.denoiser(x, noise, class_labels, seed=seeds)
            said = _model_output(self.scheduler, kind, posterior, sigma)
            x = self.scheduler.step(said, t, x, **extra).prev_sample
            if callback_on_step_end is not None:
                tensors = {"latents": x, "denoised": posterior.mean}
                asked = {name: tensors[name] for name in callback_on_step_end_tensor_inputs}
                x = (callback_on_step_end(self, i, t, asked) or {}).get("latents", x)
        images = self._finished(x, output_type)
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _announce(self, x: Tensor, t: Tensor) -> None:
        """Lets the scheduler note that its sample was looked at, which some insist on; its scaling is not needed."""
        if hasattr(self.scheduler, "scale_model_input"):
            self.scheduler.scale_model_input(x, t)

    def _check(self, batch_size: int, generator: Any, output_type: str, asked: Sequence[str]) -> None:
        if type(batch_size) is not int or batch_size < 1:
            raise GolddiffError(f"batch_size is {batch_size!r}: give a whole number of at least 1")
        each = generator if isinstance(generator, list) else [] if generator is None else [generator]
        if not all(isinstance(one, torch.Generator) for one in each):
            raise GolddiffError("generator must be a torch.Generator, or a list of one for each image")
        if isinstance(generator, list) and len(generator) != batch_size:
            raise GolddiffError(f"{len(generator)} generators for batch_size={batch_size}: give one, or one each")
        if output_type not in OUTPUTS:
            raise unknown("output_type", output_type, OUTPUTS)
        for name in asked:
            if name not in self._callback_tensor_inputs:
                raise unknown("tensor of callback_on_step_end", name, self._callback_tensor_inputs)

    def _start(self, batch: int, generator: Any, latents: Tensor | None) -> tuple[Tensor, list[int]]:
        """Noise of unit variance, and the seeds of retrieval."""
        if latents is not None and not isinstance(latents, Tensor):
            raise GolddiffError(f"latents are a {type(latents).__name__}: give a tensor (B, C, H, W)")
        if latents is not None and len(latents) != batch:
            raise GolddiffError(f"{len(latents)} latents for batch_size={batch}: give one for each image")
        x = latents
        if x is None:
            shape = (batch, *self.denoiser.bank.shape)
            x = randn_tensor(shape, generator=generator, device=self.device, dtype=self.dtype)
        if isinstance(generator, list):
            first = [each.initial_seed() for each in generator]
        elif generator is not None:
            first = [generator.initial_seed() + i for i in range(batch)]
        else:
            first = torch.randint(2**62, (batch,)).tolist()
        return x.to(self.device), [seed % SEEDS for seed in first]

    def _finished(self, x: Tensor, output_type: str) -> Any:
        if output_type == "latent":
            return x
        images = (self.denoiser.bank.decode(x) / 2 + 0.5).clamp(0, 1)
        if output_type == "pt":
            return images
        array = images.cpu().permute(0, 2, 3, 1).float().numpy()
        if output_type == "np":
            return array
        if array.shape[3] not in (1, 3, 4):
            raise GolddiffError(f"{array.shape[3]} channels are no picture: use output_type='pt'")
        return self.numpy_to_pil(array)


def _kept(folder: Path, scheduler: Any) -> tuple[Bank, dict[str, Any], Any]:
    """Bank, method and options, and scheduler of a folder that `save_pretrained` wrote."""
    try:
        kept = unsealed(read_json(folder / RECIPE, "save it again"), folder / RECIPE)
        if not isinstance(kept["options"], dict):
            raise TypeError("options are no dictionary")
        if scheduler is None:
            stated = read_json(folder / "scheduler" / "scheduler_config.json", "save it again")
            import diffusers

            kind = getattr(diffusers, stated["_class_name"])
            if not issubclass(kind, diffusers.SchedulerMixin):  # else the file could have anything of it made
                raise TypeError(f"{stated['_class_name']} is no scheduler")
            scheduler = kind.from_config(stated)
        return open_bank(kept["bank"]), kept, scheduler
    except GolddiffError:
        raise
    except Exception as error:  # files of others fail in any way
        raise GolddiffError(f"{folder} holds no pipeline that can be read ({error}): save it again") from error


def _level(scheduler: Any, kind: str, index: int, time: Tensor) -> tuple[Noise, Tensor | None]:
    """The noise level of the sample at a step, and the scheduler's own sigma, if it goes by those."""
    if kind == "table":
        return noise_of_table(scheduler.alphas_cumprod, float(time)), None
    between = hasattr(scheduler, "sigmas_interpol") and not scheduler.state_in_first_order  # midpoints of KDPM2
    sigma = (scheduler.sigmas_interpol if between else scheduler.sigmas)[index]
    if float(sigma) == 0:
        raise GolddiffError(
            f"{type(scheduler).__name__} asks for step {index} at sigma 0, where the image is clean: give other "
            "num_inference_steps"
        )
    return noise_of_sigma(kind, float(sigma)), sigma


def _model_output(scheduler: Any, kind: str, posterior: Posterior, sigma: Tensor | None) -> Tensor:
    r"""What a network of the scheduler's `prediction_type` would have said, `(B, C, H, W)`.

    .. math:: epsilon: (x - \alpha D) / \sigma, \quad sample: D, \quad flow: \epsilon - D, \quad
        v: \alpha \epsilon - \sigma D \text{ with } \alpha^2 + \sigma^2 = 1
    """
    mean, x = posterior.mean, posterior.x_t
    if hasattr(scheduler, "precondition_outputs"):  # D = c_skip x + c_out F, to be solved for F
        nothing, one = torch.zeros((), dtype=x.dtype), torch.ones((), dtype=x.dtype)
        c_out = scheduler.precondition_outputs(nothing, one, sigma)
        return (mean - scheduler.precondition_outputs(x, nothing, sigma)) / c_out
    prediction = scheduler.config.get("prediction_type", "flow_prediction")
    if prediction in ("sample", "original_sample"):
        return mean
    eps = posterior.eps()
    if prediction == "epsilon":
        return eps
    if prediction == "flow_prediction":
        return eps - mean
    if prediction == "v_prediction":
        alpha, deviation = posterior.noise.like(x)
        return (alpha * eps - deviation * mean) / torch.hypot(alpha, deviation)
    raise unknown("prediction_type", prediction, ("epsilon", "sample", "v_prediction", "flow_prediction"))


class GoldDiffUNet(torch.nn.Module):
    """A denoiser where diffusers expects a `UNet2DModel` that predicts noise.

    So diffusers' own `DDPMPipeline(unet, scheduler)`, `DDIMPipeline(unet, scheduler)` and training or evaluation loops
    run with it. It has no parameters, and no gradient flows through it.

    Arguments:
        denoiser: any denoiser of golddiff.
        alphas_cumprod: the table that timesteps index, `(T,)`; DDPM-linear of 1,000 steps if None. Take the
            scheduler's, `scheduler.alphas_cumprod`.
        seed: for what is drawn inside retrieval: one for all or `(B,)`.

    Attributes:
        config: `in_channels`, `out_channels` and `sample_size` (a number, or `(H, W)` if they differ).
    """

    def __init__(
        self, denoiser: Denoiser, alphas_cumprod: Tensor | None = None, *, seed: int | Sequence[int] | Tensor = 0
    ) -> None:
        super().__init__()
        self.denoiser, self.seed = denoiser, seed
        self.alphas_cumprod = DDPM().alphas_cumprod if alphas_cumprod is None else alphas_cumprod.detach().cpu()
        channels, height, width = denoiser.bank.shape
        size: Any = height if height == width else (height, width)
        self.config = FrozenDict(in_channels=channels, out_channels=channels, sample_size=size)

    @property
    def device(self) -> torch.device:
        return self.denoiser.bank.device

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32

    def forward(
        self, sample: Tensor, timestep: Any, class_labels: Any = None, return_dict: bool = True
    ) -> UNet2DOutput | tuple[Tensor]:
        """The expected noise, `(B, C, H, W)`.

        Arguments:
            sample: `sqrt(abar) x + sqrt(1 - abar) z`, `(B, C, H, W)`.
            timestep: a number or `(B,)`. Between two whole ones, `log(sigma / alpha)` is interpolated, as diffusers
                does where it asks for such times.
            class_labels: one for all or `(B,)`; None for no label.
            return_dict: `UNet2DOutput`, or else a tuple.

        Raises:
            GolddiffError: a timestep outside the table.
        """
        times = torch.as_tensor(timestep, dtype=torch.float64).cpu()
        with torch.no_grad():
            said = self.denoiser(sample.detach(), self._noise(times), class_labels, seed=self.seed).eps()
        return UNet2DOutput(sample=said) if return_dict else (said,)

    def _noise(self, times: Tensor) -> Noise:
        last = len(self.alphas_cumprod) - 1
        if not bool(((times >= 0) & (times <= last)).all()):
            raise GolddiffError(f"timestep {times.tolist()}: give numbers from 0 to {last}")
        below, above = times.floor().long(), times.ceil().long()
        abar = self.alphas_cumprod.double()
        if torch.equal(below, above):
            return Noise(abar[below].sqrt(), (1 - abar[below]).sqrt())
        log_rho = ((1 - abar) / abar).log() / 2
        rho = torch.lerp(log_rho[below], log_rho[above], times - below).exp()
        return Noise(1 / torch.hypot(rho, torch.ones(())), rho / torch.hypot(rho, torch.ones(())))
