"""Windows of LS and its relatives, chosen at each noise level by agreement with a network."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from .bank import Bank
from .denoise import denoiser
from .errors import GolddiffError
from .jsons import sealed, write_json
from .memory import explained
from .noise import schedule_named
from .oracle import Oracle
from .progress import Bar
from .sample import trajectory

__all__ = ["calibrate"]


@explained()
def calibrate(
    bank: Bank,
    oracle: Oracle,
    out: str | Path,
    *,
    method: str = "ls",
    sides: Sequence[int] | None = None,
    seeds: Sequence[int] = range(8),
    steps: int = 10,
    schedule: str = "ddpm",
    batch: int = 8,
    **options: Any,
) -> dict[str, Any]:
    """The window at each noise level whose predicted noise is most like the network's, by cosine similarity.

    On the network's own trajectories, mean over seeds; among all choices that do not grow as noise falls, the one of
    the largest sum of similarities over the levels. `out` can be given as `window=` to ls, els, bbels and pspc.

    Arguments:
        method: whose windows. options: of it.
        sides: to try; by default 3, 5, 7, 11, 15, 23 and the whole image.
    """
    largest = 2 * max(bank.shape[1:]) - 1
    tried = sorted({*(sides or [s for s in (3, 5, 7, 11, 15, 23) if s < largest]), *([] if sides else [largest])})
    if Path(out).suffix != ".json":
        raise GolddiffError(f"{out}: give a file that ends in .json")
    if type(batch) is not int or batch < 1:
        raise GolddiffError(f"batch is {batch!r}: give a whole number of at least 1")
    try:
        Path(out).parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise GolddiffError(f"{Path(out).parent} cannot be made ({error.strerror}): give another file") from error
    models = [denoiser(method, bank, window=side, **options) for side in tried]
    total = torch.zeros(steps, len(tried), dtype=torch.float64)
    levels = schedule_named(schedule).levels(steps)
    with Bar(total=len(seeds) * steps * len(tried), desc="calibrating", disable=None) as bar:
        for start in range(0, len(seeds), batch):
            part = list(seeds)[start : start + batch]
            for step in trajectory(oracle, part, steps=steps, schedule=schedule_named(schedule)):
                theirs = step.posterior.eps().flatten(1).double()
                for w, model in enumerate(models):
                    ours = model(step.x_t, step.noise, seed=part).eps().flatten(1).double()
                    total[step.index, w] += torch.cosine_similarity(ours, theirs).sum().cpu()
                    bar.update(len(part))
    similarity = total / len(seeds)
    chosen = _falling(similarity)
    found = {
        "windows": [[float(noise.rho), tried[w]] for (_, noise), w in zip(levels, chosen, strict=True)],
        "method": method,
        "bank": bank.fingerprint,
        "seeds": [int(seed) for seed in seeds],
        "times": [t for t, _ in levels],
        "sides": tried,
        "cosine": similarity.tolist(),
    }
    write_json(Path(out), sealed(found))
    return found


def _falling(similarity: torch.Tensor) -> list[int]:
    """One column for each row, never larger than in the row before, of the largest sum."""
    best, path = similarity[0], [[w] for w in range(similarity.shape[1])]
    for row in similarity[1:]:
        before = [int(best[w:].argmax()) + w for w in range(len(row))]  # windows at least as large
        best, path = best[before] + row, [[*path[b], w] for w, b in enumerate(before)]
    return path[int(best.argmax())]
