"""Run folders: pictures, samples, the recipe that made them, and what it cost."""

from __future__ import annotations

import math
import os
import platform
import re
import resource
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from zipfile import ZIP_DEFLATED, BadZipFile, ZipFile

import numpy as np
import torch
from PIL import Image

from .bank import Bank
from .denoise import Denoiser
from .errors import GolddiffError, unknown
from .files import holding, is_empty, replacing, sweep
from .foreign import Npz
from .jsons import read_json, unsealed, write_json
from .memory import explained, require
from .pictures import grid, save_png, to_uint8
from .progress import Bar
from .ranks import ALONE, Ranks
from .recipe import Recipe
from .sample import Step
from .scan import nearest_images

__all__ = ["memory_since", "peak_memory", "run"]

RECIPE = "recipe.json"
SHOWN = 8  # trajectories and neighbours are shown for so many images
IN_GRID = 144
OURS = re.compile(r"seed\d{6,}(-steps\.npz|\.png)")


@explained()
def run(
    denoiser: Denoiser,
    recipe: Recipe,
    out: Path,
    *,
    batch: int = 8,
    save_steps: bool = False,
    nearest: int = 0,
    force: bool = False,
    ranks: Ranks = ALONE,
    spread: str = "seeds",
) -> int:
    """Samples the seeds of a recipe into a folder; seeds that are finished there are kept.

    The folder gets `seed000003.png` for each seed, `grid.png` (the first 144), `samples.npz` (`arr_0`, uint8 NHWC, and
    `seeds`), `recipe.json` and `metrics.json` (of the images that this call made). A run that is stopped keeps what is
    finished, and goes on from there when it is called again.

    Arguments:
        denoiser, recipe: from `Recipe.resolve`.
        out: the folder.
        batch: images that go together. Batches are always cut from the list of seeds in the same way, so a run that
            was interrupted gives the same files.
        save_steps: also keep `seed000003-steps.npz` (`x_t` and `mean`, float32 `(steps, C, H, W)`) and show the first
            ones in `trajectories.png`.
        nearest: show the first images beside their so many nearest training images, in `nearest.png`.
        force: start again in a folder that holds something else.
        ranks: this process among others that do the same with the same folder.
        spread: what is spread over them, `seeds` or the rows of the `bank`.

    Returns:
        how many images the folder holds now.

    Raises:
        GolddiffError: `out` holds something else, and `force` is not given; or another rank was lost.
    """
    if spread not in ("seeds", "bank"):
        raise unknown("spread", spread, ("seeds", "bank"))
    apart = ranks.size > 1 and not ranks.linked
    if apart and (force or spread == "bank"):
        raise GolddiffError("shards know nothing of each other: remove the folder instead of --force, and spread seeds")
    if spread == "bank" and ranks.linked:
        denoiser = denoiser.over(ranks)
    if batch < 1:
        raise GolddiffError(f"batch is {batch}: give at least 1")
    if denoiser.bank.is_latent:
        _check_latent(denoiser.bank, nearest)
    elif denoiser.bank.shape[0] not in (1, 3, 4):
        raise GolddiffError(f"{denoiser.bank.shape[0]} channels are no pictures: use golddiff.sample from Python")
    if not 0 <= nearest <= len(denoiser.bank):
        raise GolddiffError(f"nearest is {nearest}: give a number from 0 to {len(denoiser.bank)}, the rows of the bank")
    denoiser.require_memory(min(batch, len(recipe.seeds)))
    if save_steps:
        numbers = min(batch, len(recipe.seeds)) * recipe.levels * denoiser.bank.D
        require(8 * numbers, "the steps of a batch", "give smaller batches (--batch), or leave --save-steps out")
    part = (ranks.rank, ranks.size) if apart else None
    with holding(out, part) if ranks.is_first or apart else nullcontext():
        return _run(denoiser, recipe, out, batch, save_steps, nearest, force, ranks, spread)


def _run(
    denoiser: Denoiser,
    recipe: Recipe,
    out: Path,
    batch: int,
    save_steps: bool,
    nearest: int,
    force: bool,
    ranks: Ranks,
    spread: str,
) -> int:
    """What `run` does in a folder that it holds."""
    apart = ranks.size > 1 and not ranks.linked
    folder = _RunFolder(out, save_steps, denoiser.bank.decode)
    began = time.time()
    whole = folder.claim(recipe, force) if ranks.is_first or apart else recipe
    ranks.wait()
    meter = _Meter(denoiser.bank, recipe.levels)
    todo, writes = _work_of(recipe, folder, batch, ranks, spread)
    shown = None if ranks.is_first else True
    try:
        with Bar(total=sum(map(len, todo)) * recipe.levels, desc=recipe.method, unit="step", disable=shown) as bar:
            for seeds in todo:
                kept = []
                for step in meter.timed(recipe.trajectory(denoiser, seeds)):
                    if save_steps:
                        kept.append(_Kept.of(step))
                    bar.update(len(seeds))
                if writes:
                    folder.add(seeds, to_uint8(denoiser.bank.decode(step.posterior.mean)), kept)
        ranks.wait()
    finally:
        if ranks.is_first or apart:
            folder.summarise(whole)
        if ranks.size == 1:
            sweep(out, began)
        if meter.images:
            number = "" if ranks.is_first else f"-{ranks.rank + 1}"
            folder.save_json(f"metrics{number}.json", meter.summary(batch))
    if not ranks.is_first:
        return sum(map(len, todo))
    if nearest:
        save_png(_neighbours(denoiser.bank, folder, recipe.seeds[:SHOWN], nearest), out / "nearest.png")
    return sum(folder.picture(seed).exists() for seed in whole.seeds)


def _check_latent(bank: Bank, nearest: int) -> None:
    """Refuses what cannot be done with a bank of latents, before any work."""
    if nearest:
        raise GolddiffError("nearest images are compared as pictures, and this bank holds latents: leave --nearest out")
    shape = tuple(bank.decode(bank.images(slice(0, 1))).shape)
    if len(shape) != 4 or shape[1] not in (1, 3, 4):
        raise GolddiffError(f"the latents decode to {shape}, which is no picture: use golddiff.sample from Python")


def _work_of(recipe: Recipe, folder: _RunFolder, batch: int, ranks: Ranks, spread: str) -> tuple[list[list[int]], bool]:
    """The batches of seeds that this rank has to do, and whether it writes them down."""
    batches = [recipe.seeds[i : i + batch] for i in range(0, len(recipe.seeds), batch)]
    left = torch.tensor([not all(map(folder.finished, seeds)) for seeds in batches])
    if spread == "seeds":
        mine = [i % ranks.size == ranks.rank for i in range(len(batches))]
        return [seeds for seeds, own, open_ in zip(batches, mine, left.tolist(), strict=True) if own and open_], True
    agreed = ranks.gathered(left.int())[0]  # all do the same
    return [seeds for seeds, open_ in zip(batches, agreed.tolist(), strict=True) if open_], ranks.is_first


@dataclass(frozen=True)
class _Kept:
    """What is kept of a step: arrays `(B, C, H, W)` float32, and the scale that brings `x_t` to unit variance."""

    time: float
    scale: float
    x_t: np.ndarray
    mean: np.ndarray

    @staticmethod
    def of(step: Step) -> _Kept:
        x_t, mean = (t.float().cpu().numpy() for t in (step.x_t, step.posterior.mean))
        return _Kept(step.time, float(torch.hypot(step.noise.alpha, step.noise.sigma)), x_t, mean)


class _RunFolder:
    """The files of a run. A seed is finished when its picture is there; it is written last."""

    def __init__(self, path: Path, save_steps: bool, decode: Callable[[torch.Tensor], torch.Tensor]) -> None:
        self.path, self.save_steps, self.decode = path, save_steps, decode

    def picture(self, seed: int) -> Path:
        return self.path / f"seed{seed:06d}.png"

    def steps(self, seed: int) -> Path:
        return self.path / f"seed{seed:06d}-steps.npz"

    def finished(self, seed: int) -> bool:
        return self.picture(seed).exists() and (not self.save_steps or self.steps(seed).exists())

    def claim(self, recipe: Recipe, force: bool) -> Recipe:
        """Writes the recipe (with the seeds that are there already) into the folder; refuses another's folder."""
        file = self.path / RECIPE
        if not file.exists() and not is_empty(self.path):
            raise GolddiffError(f"{self.path} exists and is no run folder: choose another --out")
        if file.exists() and not force:
            recipe = self._continued(recipe, file)
        try:
            if force:
                for old in self.path.iterdir():
                    if OURS.fullmatch(old.name):
                        old.unlink()
                for old in self.path.glob("metrics*.json"):
                    old.unlink()
                for name in ("grid.png", "samples.npz", "trajectories.png", "nearest.png"):
                    (self.path / name).unlink(missing_ok=True)
        except OSError as error:
            raise GolddiffError(f"{self.path} cannot be written to ({error.strerror}): choose another --out") from error
        recipe.save(file)
        return recipe

    def _continued(self, recipe: Recipe, file: Path) -> Recipe:
        """The recipe with the seeds of both runs, if they make the same images."""
        try:
            before = unsealed(read_json(file, "give --force to start again"), file)
            earlier = [int(seed) for seed in before["seeds"]]
            same = recipe.same_images(before)
        except GolddiffError:
            raise
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise GolddiffError(f"{file} is damaged ({error}): give --force to start again") from error
        if not same:
            raise GolddiffError(f"{self.path} holds a run of another recipe: choose another --out, or give --force")
        wanted = set(recipe.seeds)
        return replace(recipe, seeds=[*recipe.seeds, *(s for s in earlier if s not in wanted)])

    def add(self, seeds: list[int], pictures: np.ndarray, steps: list[_Kept]) -> None:
        """Writes the images of a batch that are not there yet."""
        for i, (seed, picture) in enumerate(zip(seeds, pictures, strict=True)):
            if self.finished(seed):
                continue
            if self.save_steps:
                x_t, mean = np.stack([k.x_t[i] for k in steps]), np.stack([k.mean[i] for k in steps])
                scale, times = [k.scale for k in steps], [k.time for k in steps]
                self.save_npz(self.steps(seed), x_t=x_t, mean=mean, scale=scale, time=times)
            save_png(picture, self.picture(seed))

    def summarise(self, recipe: Recipe) -> None:
        """`samples.npz`, `grid.png` and `trajectories.png` of the seeds that are there."""
        done = [seed for seed in recipe.seeds if self.picture(seed).exists()]
        if not done:
            return
        self._save_samples(done)
        save_png(grid(self.read(done[:IN_GRID])), self.path / "grid.png")
        if followed := [seed for seed in done if self.steps(seed).exists()]:
            save_png(self._strips(followed[:SHOWN]), self.path / "trajectories.png")

    def _save_samples(self, seeds: list[int]) -> None:
        """`samples.npz`, some pictures at a time, so that memory does not grow with their number."""
        shape = (len(seeds), *self.read(seeds[:1]).shape[1:])
        header = {"descr": "|u1", "fortran_order": False, "shape": shape}
        with replacing(self.path / "samples.npz") as part, ZipFile(part, "w", ZIP_DEFLATED) as archive:
            with archive.open("arr_0.npy", "w", force_zip64=True) as file:
                np.lib.format.write_array_header_1_0(file, header)
                for start in range(0, len(seeds), IN_GRID):
                    pictures = self.read(seeds[start : start + IN_GRID])
                    if pictures.shape[1:] != shape[1:]:
                        name = self.picture(seeds[start])
                        raise GolddiffError(f"{name} is of another size: remove it, and it is made again")
                    file.write(pictures.tobytes())
            with archive.open("seeds.npy", "w") as file:
                np.lib.format.write_array(file, np.array(seeds))

    def read(self, seeds: list[int]) -> np.ndarray:
        """The pictures of seeds, `(N, H, W, C)` uint8."""
        arrays = []
        for seed in seeds:
            try:
                with Image.open(self.picture(seed), formats=("PNG",)) as image:
                    array = np.asarray(image)
            except (OSError, SyntaxError, ValueError) as error:
                raise GolddiffError(f"{self.picture(seed)} is damaged: remove it, and it is made again") from error
            arrays.append(array[:, :, None] if array.ndim == 2 else array)
            if arrays[-1].shape != arrays[0].shape:
                raise GolddiffError(f"{self.picture(seed)} is of another size: remove it, and it is made again")
        return np.stack(arrays)

    def _strips(self, seeds: list[int]) -> Image.Image:
        """`x_t` (scaled to unit variance) above the mean, step by step, for each seed."""
        pictures, labels, heads = [], [], []
        for seed in seeds:
            try:
                with Npz(self.steps(seed)) as kept:
                    x_t, mean, scale, time = (kept[key] for key in ("x_t", "mean", "scale", "time"))
            except (OSError, EOFError, ValueError, KeyError, BadZipFile) as error:
                raise GolddiffError(f"{self.steps(seed)} is damaged: remove it, and it is made again") from error
            for images in (x_t / scale[:, None, None, None], mean):
                pictures.append(to_uint8(self.decode(torch.from_numpy(images).float())))
            heads = [f"time {value:.4g}" for value in time]
            labels += [f"seed {seed}: x_t", "mean"]
        return grid(np.concatenate(pictures), len(heads), rows=labels, heads=heads)

    def save_npz(self, path: Path, **arrays: Any) -> None:
        with replacing(path) as part, part.open("wb") as file:
            np.savez_compressed(file, **arrays)

    def save_json(self, name: str, content: dict[str, Any]) -> None:
        write_json(self.path / name, content)


def _neighbours(bank: Bank, folder: _RunFolder, seeds: list[int], count: int) -> Image.Image:
    """Each image beside its nearest rows, with the root mean square difference of a pixel (range 0 to 2)."""
    pictures, captions = [], []
    samples = folder.read(seeds)
    x = torch.from_numpy(samples).permute(0, 3, 1, 2).double() / 127.5 - 1
    for picture, rows, distances in zip(samples, *nearest_images(bank, x, count), strict=True):
        pictures += [picture[None], to_uint8(bank.images(rows.to(bank.device)))]
        captions += ["", *(f"{distance:.3f}" for distance in distances.tolist())]
    heads = ["sample", "nearest", *(f"{i + 2}" for i in range(count - 1))]
    rows_of_text = [f"seed {seed}" for seed in seeds]
    return grid(np.concatenate(pictures), count + 1, rows=rows_of_text, heads=heads, captions=captions)


class _Meter:
    """Seconds, effective support and bytes of each step of a run."""

    def __init__(self, bank: Bank, steps: int) -> None:
        self.bank, self.images = bank, 0
        self.seconds, self.ess = np.zeros(steps), np.zeros(steps)
        self.bytes = np.zeros(steps, dtype=np.int64)
        self.has_ess = False

    def timed(self, steps: Any) -> Any:
        """Passes the steps of a batch on, and counts what each one took."""
        clock, read = time.perf_counter(), self.bank.bytes_read
        for step in steps:
            self.seconds[step.index] += time.perf_counter() - clock
            self.bytes[step.index] += self.bank.bytes_read - read
            ess = step.posterior.ess
            if ess is not None:
                self.has_ess = True
                self.ess[step.index] += float(ess.flatten(1).mean(1).sum() if ess.ndim > 1 else ess.sum())
            yield step
            clock, read = time.perf_counter(), self.bank.bytes_read
        self.images += len(step.x_t)

    def summary(self, batch: int) -> dict[str, Any]:
        return {
            "images": self.images,
            "batch": batch,
            "seconds_per_image_and_step": [round(float(s) / self.images, 6) for s in self.seconds],
            "effective_support": [round(float(e) / self.images, 3) for e in self.ess] if self.has_ess else None,
            "bytes_read": self.bytes.tolist(),
            "peak_memory_bytes": peak_memory(),
            "device": str(self.bank.device),
            "threads": torch.get_num_threads(),
            "machine": f"{platform.machine()}, {os.cpu_count()} cores",
            "versions": {"python": platform.python_version(), "torch": torch.__version__},
        }


def memory_since() -> Callable[[], float]:
    """A function that says the largest resident memory since this call, in bytes; NaN where the system cannot say."""
    status = Path("/proc/self/status")
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return lambda: math.nan

    def measure() -> float:
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return float(line.split()[1]) * 1024

    return measure


def peak_memory() -> int:
    """Largest resident memory of this process so far, in bytes."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
