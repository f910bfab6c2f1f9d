"""Methods beside each other and beside a trained network, on equal terms: same noise, same steps, same images."""

from __future__ import annotations

import hashlib
import json
import math
import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import torch
from torch import Tensor

from .bank import Bank
from .denoise import Denoiser, denoiser
from .errors import GolddiffError
from .files import holding, is_empty, replacing
from .foreign import Npz
from .jsons import read_json, write_json
from .memory import explained, require
from .metrics import agreement, evaluate, mean_and_error, reference_features
from .noise import schedule_named
from .oracle import Oracle
from .pictures import grid, save_png, to_uint8
from .progress import Bar
from .recipe import parse_options
from .runs import memory_since
from .sample import DDIM, initial_noise, trajectory

__all__ = ["Method", "compare", "parse_method"]

SETTINGS, ORACLE = "compare.json", "oracle"
HELD_OUT_SEED = 2**40  # far from the seeds of samples
IN_GRID = 12


@dataclass(frozen=True)
class Method:
    """A method of a comparison, as `name`, `name:option=value:...`, and `...@n` for the first n seeds only."""

    key: str
    name: str
    options: dict[str, Any]
    seeds: int | None

    @property
    def file(self) -> str:
        return re.sub(r"[^a-z0-9._=-]+", "_", self.key.lower()) + ".npz"


def parse_method(text: str) -> Method:
    """`golddiff:retrieval=paper:k_max=5000@32` -> its parts."""
    body, at, count = text.partition("@")
    if at and (not count.isdecimal() or int(count) < 1):
        raise GolddiffError(f"'{text}': write the number of seeds as in els@8")
    name, *pairs = body.split(":")
    return Method(body, name, parse_options(pairs), int(count) if at else None)


@explained()
def compare(
    bank: Bank,
    methods: Sequence[str],
    out: str | Path,
    *,
    oracle: Oracle | None = None,
    oracle_name: str = "",
    seeds: Sequence[int] = range(16),
    steps: int = 10,
    schedule: str = "ddpm",
    held_out: Tensor | None = None,
    features: str = "pca",
    batch: int = 8,
) -> dict[str, Any]:
    """Runs methods from the same initial noise and writes tables, plots and grids; finished methods are kept.

    The folder gets `compare.json` (what was asked), `oracle.npz` and one `.npz` for each method, `results.json`,
    `table.md`, `grid.png` and (with the extra `plots`) `steps.png`.

    Arguments:
        methods: names of denoisers, with options, see `Method`.
        oracle: a network; without one, nothing is compared with it.
        oracle_name: how it is called in the table.
        seeds: of the initial noise, the same for all. steps, schedule: of DDIM with clipping, as the paper's protocol.
        held_out: images `(n, C, H, W)` that are no part of the bank, noised at each level and denoised.
        features: for FID and the like, see `golddiff.metrics.extractor`.
        batch: images that go together; changes no number but seconds.

    Returns:
        the content of `results.json`.

    Raises:
        GolddiffError: an unknown method or option, or a folder that holds another comparison.
    """
    out, listed = Path(out), [int(seed) for seed in seeds]
    parsed = [parse_method(text) for text in methods]
    if len({m.key for m in parsed}) != len(parsed) or not parsed:
        raise GolddiffError(f"methods {list(methods)}: name each once, and at least one")
    denoisers = [denoiser(m.name, bank, **m.options) for m in parsed]
    if type(batch) is not int or batch < 1:
        raise GolddiffError(f"batch is {batch!r}: give a whole number of at least 1")
    if bank.is_latent:
        raise GolddiffError("comparisons are of pictures, and this bank holds latents: build one without them")
    if len(bank) < 2:
        raise GolddiffError("a bank of one image has nothing to compare: give a larger bank")
    reference_features(bank, features)  # a wrong extractor is refused before the work
    levels = schedule_named(schedule).levels(steps)
    kinds = 3 if oracle else 1  # of means that are kept: on own trajectories, and of and on the network's
    numbers = len(listed) * len(levels) * bank.D * kinds * (len(parsed) + 1)
    require(4 * numbers, f"a comparison of {len(listed)} seeds", "compare fewer seeds, or fewer methods at once")
    settings = {
        "bank": bank.fingerprint,
        "oracle": oracle_name if oracle else None,
        "network": oracle.identity if oracle else None,
        "seeds": listed,
        "steps": steps,
        "schedule": schedule,
        "held_out": None if held_out is None else [len(held_out), _hash(held_out)],
        "features": features,
    }
    with holding(out):
        folder = _Folder(out, settings)
        kept: dict[str, dict[str, np.ndarray]] = {}
        work = _Work(bank, levels, schedule, held_out, batch)
        guide = None
        if oracle is not None:
            guide = kept[ORACLE] = folder.make(f"{ORACLE}.npz", {}, lambda: work.of(oracle, listed, None, "oracle"))
        for method, model in zip(parsed, denoisers, strict=True):
            chosen = listed[: method.seeds]
            stored = {"options": _plain(model.options), "seeds": chosen}
            x_t = None if guide is None else torch.from_numpy(guide["x_t"][: len(chosen)])
            run = partial(work.of, model, chosen, x_t, method.key)
            kept[method.key] = folder.make(method.file, stored, run)
        results = {
            "settings": settings,
            "times": [t for t, _ in levels],
            "methods": {key: _summary(arrays, guide, bank, features) for key, arrays in kept.items()},
        }
        folder.write(results, kept, guide)
        return results


class _Work:
    """What is measured of one denoiser."""

    def __init__(self, bank: Bank, levels: Any, schedule: str, held_out: Tensor | None, batch: int) -> None:
        self.bank, self.levels, self.schedule, self.batch = bank, levels, schedule, batch
        self.held_out = held_out

    def of(self, model: Denoiser, seeds: list[int], guide: Tensor | None, name: str) -> dict[str, np.ndarray]:
        """Arrays of one method: means along its own trajectory and on the network's `x_t` `(n, steps, C, H, W)`,
        seconds of each step and image, memory, errors on held-out images `(steps, n)`."""
        self._say_how_long(model, seeds, guide, name)
        finished: dict[str, list[np.ndarray]] = {"means": [], "x_t": [], "single": []}
        seconds = np.zeros(len(self.levels))
        measure = memory_since()
        batches = [slice(i, i + self.batch) for i in range(0, len(seeds), self.batch)]
        with Bar(total=len(seeds), desc=name, unit="image", disable=None) as bar:
            for part in batches:
                steps, clock = [], time.perf_counter()
                for step in trajectory(
                    model, seeds[part], steps=len(self.levels), schedule=schedule_named(self.schedule), sampler=DDIM()
                ):
                    seconds[step.index] += time.perf_counter() - clock
                    steps.append(step)
                    clock = time.perf_counter()
                finished["means"].append(_stack([s.posterior.mean for s in steps]))
                if isinstance(model, Oracle):
                    finished["x_t"].append(_stack([s.x_t for s in steps]))
                if guide is not None:
                    finished["single"].append(_stack(list(self._single(model, guide[part], seeds[part]))))
                bar.update(len(seeds[part]))
        arrays = {key: np.concatenate(parts) for key, parts in finished.items() if parts}
        arrays |= {"seconds": seconds / len(seeds), "memory": np.array(measure()), "seeds": np.array(seeds)}
        if self.held_out is not None:
            arrays["held_out"] = self._held_out(model)
        return arrays

    def _single(self, model: Denoiser, x_t: Tensor, seeds: list[int]) -> Iterator[Tensor]:
        """Means on the network's own `x_t` at each level."""
        for i, (_, noise) in enumerate(self.levels):
            yield model(x_t[:, i].to(self.bank.device), noise, seed=seeds).mean

    def _held_out(self, model: Denoiser) -> np.ndarray:
        """Mean square error of a pixel (in [0, 1]) of each held-out image at each level, `(steps, n)`."""
        assert self.held_out is not None  # noqa: S101 - asked for only with held-out images
        seeds = [HELD_OUT_SEED + i for i in range(len(self.held_out))]
        out = np.zeros((len(self.levels), len(seeds)))
        for start in range(0, len(seeds), self.batch):
            part = slice(start, start + self.batch)
            x = self.held_out[part].to(self.bank.device)
            z = initial_noise(seeds[part], self.bank.shape, torch.float32).to(self.bank.device)
            for i, (_, noise) in enumerate(self.levels):
                alpha, sigma = noise.like(x)
                mean = model(alpha * x + sigma * z, noise, seed=seeds[part]).mean
                error = ((mean.clamp(-1, 1) - x) / 2).square().flatten(1).mean(1)
                out[i, part] = error.cpu().numpy()
        return out

    def _say_how_long(self, model: Denoiser, seeds: list[int], guide: Tensor | None, name: str) -> None:
        """Prints an estimate before long work, from one image at two levels."""
        x = initial_noise(seeds[:1], self.bank.shape, torch.float32).to(self.bank.device)
        spent = []
        for _, noise in (self.levels[len(self.levels) // 2], self.levels[len(self.levels) // 4]):
            model(x, noise, seed=seeds[:1])  # masks and compiled code
            start = time.perf_counter()
            model(x, noise, seed=seeds[:1])
            spent.append(time.perf_counter() - start)
        images = len(seeds) * (1 if guide is None else 2) + (0 if self.held_out is None else len(self.held_out))
        estimate = sum(spent) / len(spent) * len(self.levels) * images
        if estimate > 20:
            Bar.write(f"{name}: about {estimate / 60:.1f} minutes, or less in batches")


class _Folder:
    """The files of a comparison. A method is finished when its file is there."""

    def __init__(self, path: Path, settings: dict[str, Any]) -> None:
        self.path = path
        file = path / SETTINGS
        if not is_empty(path) and not file.exists():
            raise GolddiffError(f"{path} exists and holds no comparison: choose another --out")
        if file.exists():
            before = read_json(file, "choose another --out, or remove it")
            if not isinstance(before, dict):
                raise GolddiffError(f"{file} is damaged: choose another --out, or remove it")
            different = [key for key in settings if before.get(key) != settings[key]]
            if different:
                raise GolddiffError(
                    f"{path} holds a comparison with other {', '.join(different)}: choose another --out, or ask for it"
                )
        self._json(SETTINGS, settings)

    def make(self, name: str, stored: dict[str, Any], work: Any) -> dict[str, np.ndarray]:
        """The arrays of a file, computed if it is not there."""
        file, said = self.path / name, json.dumps(stored, sort_keys=True, default=str)
        if file.exists():
            try:
                with Npz(file) as kept:
                    arrays = {key: kept[key] for key in kept.files}
            except (OSError, ValueError, EOFError, BadZipFile) as error:
                raise GolddiffError(f"{file} is damaged: remove it, and it is made again") from error
            if str(arrays.pop("stored")) != said:
                raise GolddiffError(f"{file} was made with other options or seeds: remove it, or choose another --out")
            return arrays
        arrays = work()
        with replacing(file) as part, part.open("wb") as target:
            np.savez(target, stored=np.array(said), **arrays)
        return arrays

    def write(self, results: dict[str, Any], kept: dict[str, dict[str, np.ndarray]], guide: Any) -> None:
        self._json("results.json", results)
        with replacing(self.path / "table.md") as part:
            part.write_text(_tables(results))
        count = min(IN_GRID, *(len(arrays["seeds"]) for arrays in kept.values()))
        if next(iter(kept.values()))["means"].shape[2] in (1, 3):
            pictures = np.concatenate([to_uint8(torch.from_numpy(a["means"][:count, -1])) for a in kept.values()])
            heads = [f"seed {seed}" for seed in next(iter(kept.values()))["seeds"][:count]]
            save_png(grid(pictures, count, rows=list(kept), heads=heads), self.path / "grid.png")
        _plot(results, self.path / "steps.png")

    def _json(self, name: str, content: Any) -> None:
        write_json(self.path / name, content)


def _hash(tensor: Tensor) -> str:
    return hashlib.blake2b(tensor.contiguous().cpu().numpy().tobytes(), digest_size=8).hexdigest()


def _stack(steps: list[Tensor]) -> np.ndarray:
    """`(n, steps, C, H, W)` float32."""
    return torch.stack([s.float().cpu() for s in steps], 1).numpy()


def _plain(options: dict[str, Any]) -> dict[str, Any]:
    return json.loads(json.dumps(options, default=str))


def _summary(
    arrays: dict[str, np.ndarray], guide: dict[str, np.ndarray] | None, bank: Bank, features: str
) -> dict[str, Any]:
    """Means and standard errors of one method."""
    means = torch.from_numpy(arrays["means"])
    out: dict[str, Any] = {
        **evaluate(means[:, -1], bank, features),
        "seconds": float(arrays["seconds"].mean()),
        "seconds_per_step": arrays["seconds"].tolist(),
        "memory_bytes": float(arrays["memory"]),
    }
    if guide is not None:
        network = torch.from_numpy(guide["means"][: len(means)])
        for name, ours in (("own", means), ("single", torch.from_numpy(arrays.get("single", arrays["means"])))):
            each = [agreement(ours[:, i], network[:, i]) for i in range(ours.shape[1])]
            out[name] = {key: [mean_and_error(getattr(a, key)) for a in each] for key in ("mse", "r2", "cosine")}
        last = agreement(means[:, -1], network[:, -1])
        out["r2_of_each_seed"], out["mse_of_each_seed"] = last.r2.tolist(), last.mse.tolist()
    if "held_out" in arrays:
        out["held_out"] = [mean_and_error(torch.from_numpy(row)) for row in arrays["held_out"]]
    return out


def _tables(results: dict[str, Any]) -> str:
    """Markdown: the end of the trajectories, then each step."""
    methods, settings = results["methods"], results["settings"]
    lines = [
        f"{settings['steps']} DDIM steps ({settings['schedule']}), oracle: {settings['oracle'] or 'none'}; "
        "mean ± standard error over images.",
        "",
        "| method | images | MSE | r2 | cosine | s / image-step | memory (MiB) | d1/d2 | copies | FID | coverage |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for key, m in methods.items():
        ends = [_pm(m["own"][k][-1], 4 if k == "mse" else 3) if "own" in m else "" for k in ("mse", "r2", "cosine")]
        sets = [_pm(m["sets"][k], 2) if "sets" in m else "" for k in ("fid", "coverage")]
        memory = f"{m['memory_bytes'] / 2**20:.0f}" if math.isfinite(m["memory_bytes"]) else ""
        cells = [str(m["images"]), *ends, f"{m['seconds']:.4f}", memory, _pm(m["ratio_d1_d2"], 2)]
        lines.append("| " + " | ".join([key, *cells, f"{m['copies']:.0%}", *sets]) + " |")
    fewest = min(m["images"] for m in methods.values())
    if any("r2_of_each_seed" in m and m["images"] > fewest for m in methods.values()):
        lines += [
            "",
            f"On the first {fewest} seeds, which all methods have:",
            "",
            "| method | MSE | r2 |",
            "|---|---|---|",
        ]
        for key, m in methods.items():
            both = [torch.tensor(m[f"{k}_of_each_seed"][:fewest]) for k in ("mse", "r2")]
            mse, r2 = (mean_and_error(v) for v in both)
            lines.append(f"| {key} | {_pm(mse, 4)} | {_pm(r2, 3)} |")
    times = [f"t = {t:g}" for t in results["times"]]
    for title, name, pick in (
        ("r2 along each method's own trajectory", "own", "r2"),
        ("r2 of a single step, on the network's x_t", "single", "r2"),
        ("MSE on held-out images", "held_out", None),
    ):
        shown = {key: m[name][pick] if pick else m[name] for key, m in methods.items() if name in m}
        if shown:
            lines += ["", f"{title}:", "", f"| method | {' | '.join(times)} |", "|---" * (len(times) + 1) + "|"]
            digits = 3 if pick else 4
            lines += [
                f"| {key} | {' | '.join(f'{value:.{digits}f}' for value, _ in row)} |" for key, row in shown.items()
            ]
    return "\n".join(lines) + "\n"


def _pm(pair: Sequence[float], digits: int) -> str:
    value, error = pair
    return f"{value:.{digits}f}" + (f" ± {error:.{digits}f}" if math.isfinite(error) else "")


def _plot(results: dict[str, Any], path: Path) -> None:
    """r2 along the steps and held-out error, if matplotlib (extra `plots`) is there."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return
    panels = [
        (title, name, pick)
        for title, name, pick in (
            ("r2 to the network, own trajectory", "own", "r2"),
            ("r2 to the network, single step", "single", "r2"),
            ("MSE on held-out images", "held_out", None),
        )
        if any(name in m for m in results["methods"].values())
    ]
    if not panels:
        return
    figure = Figure(figsize=(5.2 * len(panels), 4), layout="constrained")
    for axes, (title, name, pick) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        for i, (key, m) in enumerate(results["methods"].items()):
            if name in m and not (key == ORACLE and pick):
                row = m[name][pick] if pick else m[name]
                values, errors = np.array(row).T
                colour = f"C{i}"  # the same in all panels
                axes.plot(results["times"], values, "-" if i < 10 else "--", marker="o", ms=3, color=colour, label=key)
                axes.fill_between(results["times"], values - errors, values + errors, color=colour, alpha=0.2)
        if pick:
            axes.set_ylim(-0.5, 1.02)
        else:
            axes.set_yscale("log")
        axes.invert_xaxis()
        axes.set(title=title, xlabel="time")
        axes.grid(alpha=0.3)
    axes.legend(fontsize=7)
    with replacing(path) as part:
        figure.savefig(part, dpi=110, format="png")
