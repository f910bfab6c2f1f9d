"""golddiff: analytical diffusion, fast and exact.

A bank of training images and a noise level give every noisy image an exact posterior over the bank; a golden
subset is the small part of the bank that carries it; its mean is the denoised image, and a sampler that
follows it from noise to image is a generative model that was never trained.

    bank      = gd.Bank.build("mnist5k")
    denoiser  = gd.denoiser("golddiff", bank)
    posterior = denoiser(x_t, gd.DDPM()(500))
    images    = gd.sample(denoiser, seeds=range(16))
"""

from .attribution import Attribution, attribute
from .bank import Bank
from .calibrate import calibrate
from .compare import compare
from .concentrate import concentrate
from .denoise import Denoiser, denoiser
from .errors import GolddiffError
from .images import Images, open_source
from .latents import Latents, latents
from .noise import DDPM, EDM, Cosine, DiffusersSchedule, Flow, Noise, Schedule
from .oracle import Oracle, oracle
from .posterior import Posterior
from .sample import DDIM, Ancestral, DPMSolver, Heun, Sampler, Step, sample, trajectory

__version__ = "0.1.0"

__all__ = [
    "DDIM",
    "DDPM",
    "EDM",
    "Ancestral",
    "Attribution",
    "Bank",
    "Cosine",
    "DPMSolver",
    "Denoiser",
    "DiffusersSchedule",
    "Flow",
    "GolddiffError",
    "Heun",
    "Images",
    "Latents",
    "Noise",
    "Oracle",
    "Posterior",
    "Sampler",
    "Schedule",
    "Step",
    "attribute",
    "calibrate",
    "compare",
    "concentrate",
    "denoiser",
    "latents",
    "open_source",
    "oracle",
    "sample",
    "trajectory",
]
