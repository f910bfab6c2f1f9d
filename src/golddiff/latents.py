"""Latents: what an autoencoder makes of pictures, so that a bank can hold those instead."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .errors import GolddiffError
from .files import hash_file
from .images import Images
from .networks import read_network, weights_of

__all__ = ["Latents", "latents", "reopened", "same_as"]

BATCH = 8
Coder = Callable[[Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class Latents:
    """A pair of maps between pictures and what a bank holds of them.

    Arguments:
        encode: pictures `(n, C, H, W)` float32 in [-1, 1] -> `(n, c, h, w)`; a function of the picture alone.
        decode: the way back. What it is given lies on the device of the bank.
        name: tells it from others: banks of other names are other banks. For a folder, its path.
        weights: a hash of the network's files, if it has some.
    """

    encode: Coder
    decode: Coder
    name: str
    weights: str | None = None

    def __post_init__(self) -> None:
        if not callable(self.encode) or not callable(self.decode) or not isinstance(self.name, str) or not self.name:
            raise GolddiffError("latents need two callables, encode and decode, and a name that tells them from others")

    @property
    def identity(self) -> str:
        """What banks are told apart by, the weights, wherever they lie, or the name."""
        return self.weights or self.name

    @property
    def stated(self) -> dict[str, Any]:
        """What a bank keeps of it."""
        return {"name": self.name, "weights": self.weights}

    def encoded(self, images: Images) -> Images:
        """The same pictures, encoded when they are read, float32.

        Raises:
            GolddiffError: `encode` gives something else than finite `(n, c, h, w)` floats.
        """
        shape = self._block(images.read(0, 1), None, 0).shape[1:]

        def read(start: int, stop: int) -> np.ndarray:
            pixels, begins = images.read(start, stop), range(0, stop - start, BATCH)
            return np.concatenate([self._block(pixels[i : i + BATCH], shape, start + i) for i in begins])

        return replace(images, shape=(shape[0], shape[1], shape[2]), dtype=np.dtype(np.float32), read=read)

    def decoded(self, z: Tensor) -> Tensor:
        """Pictures of latents, `(n, C, H, W)`.

        Raises:
            GolddiffError: `decode` gives something else than finite pictures, one for each.
        """
        said = self.decode(z)
        fits = isinstance(said, Tensor) and said.ndim == 4 and len(said) == len(z) and said.is_floating_point()
        if not fits or not bool(said.isfinite().all()):
            raise GolddiffError(
                f"latents of {self.name}: decode makes {_kind(said)} of {len(z)} latents: it must give finite floats "
                f"({len(z)}, C, H, W)"
            )
        return said.detach()

    def _block(self, pixels: np.ndarray, shape: tuple[int, ...] | None, first: int) -> np.ndarray:
        """The latents of some pictures, of which the first is row `first`; `shape` is that of those before."""
        x = torch.from_numpy(np.array(pixels)).float()
        with torch.no_grad():
            said = self.encode(x / 127.5 - 1 if pixels.dtype == np.uint8 else x)
        fits = isinstance(said, Tensor) and said.ndim == 4 and len(said) == len(x) and said.is_floating_point()
        same = fits and (shape is None or tuple(said.shape[1:]) == shape)
        if not same:
            raise GolddiffError(
                f"latents of {self.name}: encode makes {_kind(said)} of {len(x)} pictures: it must give finite floats "
                f"({len(x)}, c, h, w), the same for all"
            )
        finite = said.float().isfinite().flatten(1).all(1)
        if not bool(finite.all()):
            raise GolddiffError(
                f"latents of {self.name}: row {first + int(finite.int().argmin())} has NaN or infinite values: "
                "encode must give finite floats"
            )
        return said.detach().float().cpu().numpy()


def _kind(said: Any) -> str:
    return f"{said.dtype} {tuple(said.shape)}" if isinstance(said, Tensor) else type(said).__name__


def latents(folder: str | Path) -> Latents:
    r"""The latents of a diffusers autoencoder, `AutoencoderKL` (extra `diffusers`).

    .. math:: z = (mode(q(z | x)) - shift\_factor) \cdot scaling\_factor

    so that their variance is about 1. Grey pictures are given to a network for colour as three equal channels. The
    network goes where its input is.

    Arguments:
        folder: of the autoencoder, or of a pipeline that holds one as `vae/`. Nothing is downloaded.

    Raises:
        GolddiffError: there is no such network.
    """
    place = Path(folder)
    place = place / "vae" if (place / "vae").is_dir() else place
    try:
        model = read_network(place, "AutoencoderKL").eval().float().requires_grad_(False)
    except GolddiffError:
        raise
    except Exception as error:  # files of others fail in any way
        reason = str(error).split("\n")[0][:160]
        raise GolddiffError(f"{place} holds no autoencoder that can be read ({reason}): give its folder") from error
    scale = float(model.config.scaling_factor or 1)
    shift = float(model.config.get("shift_factor") or 0)
    step = 2 ** (len(model.config.block_out_channels) - 1)

    def encode(x: Tensor) -> Tensor:
        channels, height, width = x.shape[1:]
        if channels not in (1, model.config.in_channels) or height % step or width % step:
            raise GolddiffError(
                f"{folder} takes pictures of {model.config.in_channels} channels whose sides are multiples of {step}, "
                f"not {channels} x {height} x {width}: bring them to such a --size"
            )
        x = x.expand(-1, model.config.in_channels, -1, -1)
        mode: Tensor = model.to(x.device).encode(x).latent_dist.mode()
        return (mode - shift) * scale

    def decode(z: Tensor) -> Tensor:
        with torch.no_grad():
            parts = [model.to(z.device).decode(part).sample for part in (z.float() / scale + shift).split(BATCH)]
        return torch.cat(parts)

    weights = " ".join(hash_file(path)[:16] for path in weights_of(place)) + f" {scale:g} {shift:g}"
    return Latents(encode, decode, str(place.resolve()), weights)


def reopened(stated: dict[str, Any]) -> Latents:
    """The latents that a bank was built with, if they came from a folder that is still there.

    Raises:
        GolddiffError: they came from callables, or the folder is gone or holds other weights.
    """
    name = stated["name"]
    if stated["weights"] is None:
        raise GolddiffError(f"the latents '{name}' of this bank came from callables: give them again, as latents=")
    if not (Path(name) / "config.json").is_file():
        raise GolddiffError(f"the autoencoder of this bank is no longer at {name}: say where with --latents FOLDER")
    return same_as(stated, latents(name))


def same_as(stated: dict[str, Any], given: Latents) -> Latents:
    """The given latents, if they are those that a bank was built with."""
    if given.identity != (stated["weights"] or stated["name"]):
        raise GolddiffError(f"the bank holds latents of {stated['name']}, not those of {given.name}: give the same")
    return given
