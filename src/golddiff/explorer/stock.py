"""What runs are computed with: made when it is needed, the last few kept, so that memory stays bounded."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any

from torch import Tensor

from ..bank import Bank
from ..denoise import Denoiser, denoiser
from ..noise import Noise
from ..posterior import Posterior
from .models import RunSettings, Without

__all__ = ["Stock", "options_of"]

VIEWS = 4
DENOISERS = 6
POSTERIORS = 64


class Stock:
    """Banks without some images, their denoisers, and posteriors. Used in one thread."""

    def __init__(self, bank: Bank) -> None:
        self.whole = bank
        self._views = Recent(VIEWS)
        self._denoisers = Recent(DENOISERS)
        self._posteriors = Recent(POSTERIORS)

    def bank(self, left_out: Without | None) -> Bank:
        """The bank, or a view of it without some images."""
        key = key_of(left_out)
        if left_out is None or key is None:
            return self.whole
        rows, labels, statistics = key
        return self._views.get(
            key, lambda: self.whole.without(rows=list(rows), labels=list(labels), statistics=statistics)
        )

    def denoiser(self, settings: RunSettings) -> Denoiser:
        """The denoiser of a run."""
        key = (key_of(settings.without), settings.method, settings.retrieval)
        return self._denoisers.get(
            key, lambda: denoiser(settings.method, self.bank(settings.without), **options_of(settings))
        )

    def keep(self, name: Hashable, posterior: Posterior) -> None:
        """Remembers a posterior that has just been computed."""
        self._posteriors.get(name, lambda: posterior)

    def posterior(self, name: Hashable, settings: RunSettings, x_t: Tensor, noise: Noise) -> Posterior:
        """The posterior that has this name; the same computed again, if it was forgotten."""
        return self._posteriors.get(
            name, lambda: self.denoiser(settings)(x_t, noise, settings.label, seed=settings.seed)
        )


class Recent:
    """The last `most` things that were asked for."""

    def __init__(self, most: int) -> None:
        self.most = most
        self._kept: OrderedDict[Hashable, Any] = OrderedDict()

    def get(self, key: Hashable, make: Callable[[], Any]) -> Any:
        """What has this key, made if it is not there."""
        if key not in self._kept:
            self._kept[key] = make()
            if len(self._kept) > self.most:
                self._kept.popitem(last=False)
        self._kept.move_to_end(key)
        return self._kept[key]


def key_of(left_out: Without | None) -> tuple[tuple[int, ...], tuple[int, ...], str] | None:
    """The same for the same images left out in the same way; None for nothing left out."""
    if left_out is None or not (left_out.rows or left_out.labels):
        return None
    return tuple(sorted(set(left_out.rows))), tuple(sorted(set(left_out.labels))), left_out.statistics


def options_of(settings: RunSettings) -> dict[str, str]:
    """The options of the denoiser."""
    return {} if settings.retrieval is None else {"retrieval": settings.retrieval}
