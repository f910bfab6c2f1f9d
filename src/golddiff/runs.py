"""Run folders: pictures, samples, the recipe that made them, and what it cost."""

from __future__ import annotations

import json
import os
import platform
import resource
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from .bank import Bank
from .denoise import Denoiser
from .errors import GolddiffError
from .noise import schedule_named
from .pictures import grid, save_png, to_uint8
from .sample import sampler_named, trajectory

__all__ = ["Recipe", "run"]

RECIPE_FORMAT = 1


@dataclass(frozen=True)
class Recipe:
    """Everything that decides what a run's images are.

    Arguments:
        bank: `source` (as built) and `fingerprint`.
        method: name of the denoiser. options: all of its options, resolved.
        steps, schedule, sampler: of sampling.
        labels: the label of seed s is `labels[s % len(labels)]`; empty for none.
        seeds: of the run.
        format: version of this file.
    """

    bank: dict[str, Any]
    method: str
    options: dict[str, Any]
    steps: int
    schedule: str
    sampler: str
    labels: list[int]
    seeds: list[int]
    format: int = RECIPE_FORMAT

    def label_of(self, seed: int) -> int:
        """The label of a seed, -1 for none."""
        return self.labels[seed % len(self.labels)] if self.labels else -1

    def same_images(self, other: dict[str, Any]) -> bool:
        """Whether another recipe (as read from its file) gives a seed the same image."""
        return _plain({**asdict(self), "seeds": None}) == {**other, "seeds": None}


def run(
    denoiser: Denoiser,
    recipe: Recipe,
    out: Path,
    *,
    batch: int = 16,
    save_steps: bool = False,
    force: bool = False,
) -> Path:
    """Samples the seeds of a recipe into a folder; seeds that are finished there are kept.

    The folder gets `seed000003.png` for each seed, `grid.png`, `samples.npz` (`arr_0`, uint8 NHWC, in the order
    of the seeds), `recipe.json` and `metrics.json`; with `save_steps` also `steps.npz` (`x_t` and `mean`,
    float32 `(steps, N, C, H, W)`).

    Raises:
        GolddiffError: `out` holds something else, and `force` is not given.
    """
    _claim(out, recipe, force)
    todo = [s for s in recipe.seeds if save_steps or not _picture(out, s).exists()]
    meter = _Meter(denoiser.bank, recipe.steps)
    saved: list[tuple[np.ndarray, np.ndarray]] = []
    with tqdm(total=len(todo) * recipe.steps, desc=recipe.method, unit="step", disable=None) as bar:
        for start in range(0, len(todo), batch):
            seeds = todo[start : start + batch]
            steps = trajectory(
                denoiser,
                seeds,
                steps=recipe.steps,
                schedule=schedule_named(recipe.schedule),
                sampler=sampler_named(recipe.sampler),
                labels=[recipe.label_of(s) for s in seeds],
            )
            kept = []
            meter.start()
            for step in steps:
                meter.record(step.index, step.posterior.ess, len(seeds))
                bar.update(len(seeds))
                if save_steps:
                    kept.append((step.x_t.cpu().numpy(), step.posterior.mean.cpu().numpy()))
            for seed, picture in zip(seeds, to_uint8(step.posterior.mean), strict=True):
                save_png(picture, _picture(out, seed))
            if save_steps:
                saved.append((np.stack([k[0] for k in kept]), np.stack([k[1] for k in kept])))
    pictures = np.stack([_read(_picture(out, s)) for s in recipe.seeds])
    _save_npz(out / "samples.npz", arr_0=pictures)
    if saved:
        x_t, mean = (np.concatenate([pair[i] for pair in saved], axis=1) for i in (0, 1))
        _save_npz(out / "steps.npz", x_t=x_t, mean=mean)
    save_png(grid(pictures), out / "grid.png")
    if todo:
        _save_json(out / "metrics.json", meter.summary(denoiser, batch, len(todo)))
    return out


def resolved(denoiser: Denoiser) -> dict[str, Any]:
    """The options of a denoiser as a recipe stores them."""
    if denoiser.options.get("mask") is not None:
        raise GolddiffError("a mask given as an array cannot be stored in a recipe: use it from Python")
    return denoiser.options


def _claim(out: Path, recipe: Recipe, force: bool) -> None:
    """Makes the folder and writes the recipe; refuses a folder of something else."""
    file = out / "recipe.json"
    if out.exists() and not force:
        if not out.is_dir() or (any(out.iterdir()) and not file.exists()):
            raise GolddiffError(f"{out} exists and is no run folder: choose another --out, or give --force")
        if file.exists():
            try:
                other = json.loads(file.read_text())
            except ValueError as error:
                raise GolddiffError(f"{file} is damaged ({error}): give --force to start again") from error
            if not isinstance(other, dict) or not recipe.same_images(other):
                raise GolddiffError(f"{out} holds a run of another recipe: choose another --out, or give --force")
    try:
        out.mkdir(parents=True, exist_ok=True)
        if force:
            for old in (*out.glob("seed*.png"), out / "steps.npz", out / "metrics.json"):
                old.unlink(missing_ok=True)
        _save_json(file, _plain(asdict(recipe)))
    except OSError as error:
        raise GolddiffError(f"{out} cannot be written to ({error}): choose another --out") from error


class _Meter:
    """Seconds, effective support and bytes of each step of a run."""

    def __init__(self, bank: Bank, steps: int) -> None:
        self.bank = bank
        self.seconds, self.ess = np.zeros(steps), np.zeros(steps)
        self.bytes = np.zeros(steps, dtype=np.int64)
        self.has_ess = True

    def start(self) -> None:
        self._time, self._bytes = time.perf_counter(), self.bank.bytes_read

    def record(self, index: int, ess: torch.Tensor | None, images: int) -> None:
        self.seconds[index] += time.perf_counter() - self._time
        self.bytes[index] += self.bank.bytes_read - self._bytes
        if ess is None:
            self.has_ess = False
        else:
            self.ess[index] += float(ess.flatten(1).mean(1).sum()) if ess.ndim > 1 else float(ess.sum())
        self.start()

    def summary(self, denoiser: Denoiser, batch: int, images: int) -> dict[str, Any]:
        return {
            "images": images,
            "batch": batch,
            "seconds_per_image_and_step": [round(float(s) / images, 6) for s in self.seconds],
            "effective_support": [round(float(e) / images, 3) for e in self.ess] if self.has_ess else None,
            "bytes_read": self.bytes.tolist(),
            "peak_memory_bytes": peak_memory(),
            "device": str(self.bank.device),
            "threads": torch.get_num_threads(),
            "machine": f"{platform.machine()}, {os.cpu_count()} cores",
            "versions": {"python": platform.python_version(), "torch": torch.__version__},
        }


def peak_memory() -> int:
    """Largest resident memory of this process so far, in bytes."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _picture(out: Path, seed: int) -> Path:
    return out / f"seed{seed:06d}.png"


def _read(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        array = np.asarray(image)
    return array[:, :, None] if array.ndim == 2 else array


def _plain(value: Any) -> Any:
    return json.loads(json.dumps(value))


def _save_json(path: Path, content: dict[str, Any]) -> None:
    part = path.with_name(f".{os.getpid()}-{path.name}")
    part.write_text(json.dumps(content, indent=1) + "\n")
    part.replace(path)


def _save_npz(path: Path, **arrays: np.ndarray) -> None:
    part = path.with_name(f".{os.getpid()}-{path.name}")
    with part.open("wb") as file:
        np.savez_compressed(file, **arrays)  # type: ignore[arg-type]
    part.replace(path)


def parse_seeds(text: str) -> list[int]:
    """`"0-3,8"` -> `[0, 1, 2, 3, 8]`."""
    seeds: list[int] = []
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not first.isdigit() or (dash and not last.isdigit()) or (dash and int(last) < int(first)):
            raise GolddiffError(f"seeds '{text}': write them as 0-15 or 3,7,20-29")
        seeds.extend(range(int(first), int(last if dash else first) + 1))
    if len(set(seeds)) != len(seeds):
        raise GolddiffError(f"seeds '{text}' name a seed twice: write each once")
    return seeds


def parse_labels(text: str | None, bank: Bank) -> list[int]:
    """`"3,7"`, or names of classes, -> labels that the bank has."""
    labels: list[int] = []
    for part in [] if text is None else [p.strip() for p in text.split(",")]:
        if part.lstrip("-").isdigit():
            labels.append(int(part))
        elif part in bank.classes:
            labels.append(bank.classes.index(part))
        else:
            listed = ", ".join(bank.classes[:12]) or "none, only numbers"
            raise GolddiffError(f"no class is called '{part}': names here are {listed}")
    for label in labels:
        bank.rows_of(label)
    return labels


def parse_options(pairs: Sequence[str]) -> dict[str, Any]:
    """`["k_max=5000", "mask_rule=published"]` -> a dictionary; values are numbers, true, false, null or text."""
    options: dict[str, Any] = {}
    for pair in pairs:
        key, equals, text = pair.partition("=")
        if not equals or not key:
            raise GolddiffError(f"'{pair}' is no option: write key=value, as in k_max=5000")
        try:
            options[key] = json.loads(text)
        except ValueError:
            options[key] = text
    return options
