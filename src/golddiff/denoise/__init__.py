"""Denoisers by name: a locality (what is compared) times a subset (against whom)."""

from __future__ import annotations

from typing import Any

from ..bank import Bank
from ..certified import CertifiedSubset
from ..errors import GolddiffError, unknown
from ..golden import Budget, Everything, GoldenSubset, Subset
from ..importance import SEARCHED, LocalSubset
from ..locality import GivenMask, Masked, PCAMask, Window, Windows
from .base import Denoiser, per_image
from .crops import CropDenoiser
from .draws import NeighbourProposals, Smoothed
from .local import MaskedDenoiser
from .patches import PatchDenoiser
from .whole import Nearest, Optimal
from .wiener import Wiener

__all__ = ["METHODS", "Denoiser", "MaskedDenoiser", "Optimal", "Wiener", "denoiser", "per_image"]

RETRIEVAL = {
    "retrieval": "full",
    "budget": None,
    "tol": None,
    "k_min": 1 / 20,
    "k_max": 1 / 10,
    "m_min": None,
    "m_max": None,
    "search": None,
}
PCA = {"threshold": 0.05, "mask_rule": "output", "mask": None, "legacy_batch": None, "statistics": "bank"}

METHODS: dict[str, dict[str, Any]] = {
    "optimal": {**RETRIEVAL},
    "wiener": {"statistics": "bank"},
    "pca": {**RETRIEVAL, **PCA},
    "golddiff": {**RETRIEVAL, **PCA, "retrieval": None, "locality": "pca", "window": None},
    "ls": {**RETRIEVAL, "window": None},
    "els": {"window": None},
    "bbels": {"window": None},
    "pspc": {"window": None},
    "cfdm": {"kappa": 0.1, "draws": 10, "antithetic": False},
    "nearest": {},
    "knn": {"neighbours": 2048, "draws": 256},
}
"""Every method with its options and their defaults."""

TOLERANCE = {"local": 0.01, "certified": 1e-3}

CHOICES: dict[str, tuple[str | None, ...]] = {
    "retrieval": ("full", "reference", "paper", "local", "certified", None),
    "budget": ("paper", "auto", None),
    "statistics": ("bank", "class"),
    "locality": ("pca", "optimal", "ls"),
}


def denoiser(name: str, bank: Bank, **options: Any) -> Denoiser:
    """A denoiser by name.

    Arguments:
        name: `optimal` (posterior mean over whole images), `wiener` (linear), `pca` (PCA-locality), `golddiff`
            (PCA-locality over a golden subset), `ls`, `els` and `bbels` (Kamb's machines), `pspc` (overlapping crops),
            `cfdm` (the optimal denoiser, smoothed), `nearest`, `knn` (nearest neighbours with random proposals).
        bank: the training images.
        retrieval: `full` (all rows; the default of optimal and pca), `local` (drawn by importance for each tile of
            pixels, see `LocalSubset`; the default of golddiff), `certified` (whole images, with a bound of the error,
            see `CertifiedSubset`; that of golddiff with `locality="optimal"`), or the paper's golden subsets:
            `reference` (a random pool, then the nearest) and `paper` (the nearest of all).
        budget: `paper`, or `auto`: as many rows as `tol` needs (the default of local and certified).
        tol: root mean square error of a pixel (range 2) that is aimed at (local, 0.01) or held (certified, 0.001).
        search: rows of a tile that local retrieval scores where it has to search a bank of more than 131,072 rows;
            more cost time and leave less to chance; 0 scores all (default 24,576).
        k_min, k_max, m_min, m_max: sizes of golden subset and candidates; rows, or fractions of the eligible
            rows. Defaults 1/20, 1/10, k_max, and all (`reference`) or 1/4 (`paper`).
        threshold, mask_rule: of the PCA mask, see `PCAMask`.
        mask: a `(D, D)` boolean M[n, m] to use instead, or a callable of `Noise` that returns one.
        legacy_batch: average the means of batches of so many rows, as published code does; biased.
        statistics: masks and Wiener from the whole `bank`, or from the rows of the `class`.
        locality: of golddiff, `pca`, `optimal` or `ls`.
        window: of ls, els, bbels and pspc, see `Windows`.
        kappa, draws, antithetic: of cfdm, see `Smoothed`. neighbours, draws: of knn, see `NeighbourProposals`.

    Raises:
        GolddiffError: an unknown name or option, or a value that is out of range.
    """
    if not isinstance(bank, Bank):
        raise GolddiffError(f"bank is a {type(bank).__name__}: give golddiff.Bank.build(...) or Bank.open(...)")
    if not isinstance(name, str) or name not in METHODS:
        raise unknown("method", name, METHODS)
    chosen = dict(METHODS[name])
    for key, value in options.items():
        if key not in chosen:
            raise unknown(f"option of {name}", key, chosen)
        chosen[key] = value
    _refuse_idle(name, chosen)
    for key, choices in CHOICES.items():
        if key in chosen and not (isinstance(chosen[key], str | None) and chosen[key] in choices):
            raise unknown(key, chosen[key], [choice for choice in choices if choice])
    if name == "wiener":
        return Wiener(bank, chosen["statistics"], chosen)
    if name == "nearest":
        return Nearest(bank, chosen)
    if name == "cfdm":
        return Smoothed(bank, chosen["kappa"], chosen["draws"], chosen["antithetic"], chosen)
    if name == "knn":
        return NeighbourProposals(bank, chosen["neighbours"], chosen["draws"], chosen)
    windows = None
    if "window" in chosen and chosen.get("locality", "ls") == "ls":
        windows = Windows(chosen["window"], bank.shape, (bank.fingerprint, bank.whole.fingerprint))
        chosen["window"] = windows.table
        if name == "pspc":
            return CropDenoiser(bank, windows, chosen)
        if name in ("els", "bbels"):
            return PatchDenoiser(bank, windows, name == "bbels", chosen)
    whole = name == "optimal" or chosen.get("locality") == "optimal"
    subset = _subset(bank, chosen, whole)
    if whole:
        return Optimal(bank, subset, chosen)
    if windows is not None:
        return MaskedDenoiser(bank, Window(bank.shape, windows), subset, chosen.get("legacy_batch"), chosen)
    mask: Masked
    if chosen["mask"] is None:
        mask = PCAMask(bank, chosen["threshold"], chosen["mask_rule"], chosen["statistics"])
    else:
        mask = GivenMask(chosen["mask"], bank.D)
    return MaskedDenoiser(bank, mask, subset, chosen["legacy_batch"], chosen)


def _refuse_idle(name: str, chosen: dict[str, Any]) -> None:
    """Refuses options that would have no effect with the locality that is chosen."""
    locality = chosen.get("locality", "pca")
    idle = {"pca": ("window",), "ls": tuple(PCA.keys() - {"legacy_batch"}), "optimal": (*PCA, "window")}
    for key in idle.get(locality, ()) if name == "golddiff" else ():
        usual = METHODS[name][key]
        if chosen[key] is not None if usual is None else chosen[key] != usual:
            raise GolddiffError(f"{key} has no effect with locality={locality}: leave it out, or change the locality")


def _subset(bank: Bank, chosen: dict[str, Any], whole: bool) -> Subset:
    """The subset, with the defaults that depend on other options filled in."""
    if chosen["retrieval"] is None:
        chosen["retrieval"] = "certified" if whole else "local"
    retrieval = chosen["retrieval"]
    self_sizing = retrieval in ("local", "certified")
    chosen["budget"] = chosen["budget"] or ("auto" if self_sizing else "paper")
    if chosen["tol"] is not None and not (self_sizing and chosen["budget"] == "auto"):
        raise GolddiffError(f"tol has no effect with retrieval={retrieval}, budget={chosen['budget']}: leave it out")
    if chosen["search"] is not None and retrieval != "local":
        raise GolddiffError(f"search has no effect with retrieval={retrieval}: leave it out, or use retrieval=local")
    if retrieval == "local" and chosen["search"] is None:
        chosen["search"] = SEARCHED
    if retrieval == "local" and chosen.get("legacy_batch") is not None:
        raise GolddiffError("legacy_batch does not go with retrieval=local: add retrieval=reference, paper or full")
    if self_sizing != (chosen["budget"] == "auto") and retrieval != "local":
        sized = "auto" if self_sizing else "paper"
        raise GolddiffError(f"budget={chosen['budget']} does not go with retrieval={retrieval}: use budget={sized}")
    if retrieval == "full":
        return Everything(bank)
    if self_sizing and whole != (retrieval == "certified"):
        other = "certified" if whole else "local"
        raise GolddiffError(f"retrieval={retrieval} does not go with this locality: use retrieval={other}")
    if self_sizing and chosen["budget"] == "auto":
        for key in ("k_min", "k_max", "m_min", "m_max"):
            if chosen[key] != RETRIEVAL[key]:
                raise GolddiffError(
                    f"{key} has no effect with retrieval={retrieval}, which sizes its subsets by tol: add "
                    "retrieval=reference or paper, or leave it out"
                )
        chosen["tol"] = TOLERANCE[retrieval] if chosen["tol"] is None else chosen["tol"]
        tol, search = chosen["tol"], chosen["search"]
        return CertifiedSubset(bank, tol) if whole else LocalSubset(bank, tol, search=search)
    if chosen["m_min"] is None:
        chosen["m_min"] = chosen["k_max"]
    if chosen["m_max"] is None:
        share = 0.25 if retrieval == "paper" else 1.0
        chosen["m_max"] = max(share, chosen["m_min"]) if isinstance(chosen["m_min"], float) else share
    budget = Budget(*(chosen[key] for key in ("k_min", "k_max", "m_min", "m_max")))
    return (
        LocalSubset(bank, budget=budget, search=chosen["search"])
        if retrieval == "local"
        else GoldenSubset(bank, retrieval, budget)
    )
