"""Numbers that compare images: with a network's, with the bank's, as sets."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .bank import Bank
from .errors import GolddiffError
from .files import hash_file
from .scan import nearest_images

__all__ = [
    "Agreement",
    "Copies",
    "agreement",
    "copies",
    "distribution",
    "evaluate",
    "extractor",
    "mean_and_error",
    "reference_features",
]

TWINS = (8, 64, 512)  # nearest rows that are looked at while they are all the same image
COPY = 1 / 3  # d1 / d2 under which an image counts as a copy
SAME = 1 / 255
COMPONENTS = 64
NEIGHBOURS = 5
FEWEST = NEIGHBOURS + 1  # images of a set
REFERENCES, NUMBERS = 10_000, 2**25  # rows of the bank that sets of images are compared with, and their pixels


@dataclass(frozen=True)
class Agreement:
    """How near images are to those of a network, one number for each image `(n,)` float64.

    Arguments:
        mse: mean square difference of a pixel. r2: `1 - sum (x - u)^2 / (D var_unbiased(u))`, u the network's image.
        cosine: of the two images less their own means.
    """

    mse: Tensor
    r2: Tensor
    cosine: Tensor


def agreement(images: Tensor, network: Tensor) -> Agreement:
    """As the paper defines it: images `(n, C, H, W)` in [-1, 1] are mapped to [0, 1] and clamped first."""
    if images.shape != network.shape:
        raise GolddiffError(f"images {tuple(images.shape)} beside {tuple(network.shape)}: give the same shape")
    x, u = (((i.double() + 1) / 2).clamp(0, 1).flatten(1) for i in (images, network))
    squares = (x - u).square()
    variance = u.var(1)  # a network that says one flat image has no variance to explain
    r2 = torch.where(variance > 0, 1 - squares.sum(1) / (u.shape[1] * variance), torch.nan)
    centred = [i - i.mean(1, keepdim=True) for i in (x, u)]
    return Agreement(squares.mean(1), r2, torch.cosine_similarity(centred[0], centred[1]))


def mean_and_error(values: Tensor) -> tuple[float, float]:
    """Mean of `(n,)` and its standard error; NaN where one image only."""
    values = values[values.isfinite()].double()
    if len(values) == 0:
        return math.nan, math.nan
    return float(values.mean()), float(values.std() / math.sqrt(len(values))) if len(values) > 1 else math.nan


@dataclass(frozen=True)
class Copies:
    """The nearest rows of each image.

    Arguments:
        row, second: numbers of the nearest row and of the nearest other image, `(n,)`.
        d1, d2: root mean square difference of a pixel (range 0 to 2) to them, `(n,)` float64.
    """

    row: Tensor
    second: Tensor
    d1: Tensor
    d2: Tensor

    @property
    def ratio(self) -> Tensor:
        """`d1 / d2`, `(n,)`; 0 where both are 0."""
        return self.d1 / self.d2.clamp(min=1e-12)

    @property
    def flagged(self) -> Tensor:
        """Images with `d1 / d2` under 1/3, or with d1 under half a grey level: copies, `(n,)` bool."""
        return (self.d1 < COPY * self.d2) | (self.d1 < SAME)

    @property
    def share(self) -> float:
        return float(self.flagged.double().mean())


def copies(images: Tensor, bank: Bank) -> Copies:
    """The nearest row of each image `(n, C, H, W)`, and the nearest that is another image than that."""
    if len(bank) < 2:
        raise GolddiffError("a bank of one image has no second nearest: give a larger bank")
    rows, distances = nearest_images(bank, images, 2)
    row, second, d1, d2 = rows[:, 0], rows[:, 1].clone(), distances[:, 0], distances[:, 1].clone()
    for count in TWINS:  # the second nearest is another image: not the same one, if the bank has it twice
        alike = _same(bank, row, second).nonzero()[:, 0]
        if len(alike) == 0:
            break
        rows, distances = nearest_images(bank, images[alike.to(images.device)], min(count, len(bank)))
        for i, near, far in zip(alike.tolist(), rows, distances, strict=True):
            place = int(_same(bank, row[i].expand(len(near)), near).int().argmin())  # the nearest, if all are alike
            second[i], d2[i] = near[place], far[place]
    return Copies(row, second, d1, d2)


def _same(bank: Bank, a: Tensor, b: Tensor) -> Tensor:
    """Whether rows are the same images, `(n,)`; a row is itself."""
    pixels = (bank.pixels[rows.to(bank.device)].flatten(1) for rows in (a, b))
    return torch.eq(*pixels).all(1).cpu()


Extractor = Callable[[Tensor], Tensor]


def extractor(name: str, bank: Bank) -> Extractor:
    """Features `(n, F)` float64 of images `(n, C, H, W)` in [-1, 1].

    Arguments:
        name: `pixels`, `pca` (the bank's 64 strongest components), or a TorchScript file.
    """
    if name == "pixels":
        return lambda images: images.double().flatten(1)
    if name == "pca":
        if not bank.has_eigenbasis:
            raise GolddiffError("images of this size have no eigenbasis: use --features pixels, or a TorchScript file")
        statistics: Any = bank.spectrum()
        basis, mean = statistics.eigenvectors[:, -COMPONENTS:], statistics.mean
        return lambda images: (images.double().flatten(1) - mean) @ basis
    if not Path(name).is_file():
        raise GolddiffError(f"features '{name}': give pixels, pca, or a TorchScript file that is there")
    try:
        network = torch.jit.load(name, map_location="cpu").eval()
    except Exception as error:  # files of others fail in any way
        raise GolddiffError(f"{name} is no TorchScript file ({str(error).splitlines()[0][:120]})") from error

    def features(images: Tensor) -> Tensor:
        try:
            with torch.no_grad():
                out = torch.cat([network(part.float()).flatten(1).double() for part in images.split(256)])
        except Exception as error:  # networks of others fail in any way
            shape = tuple(images.shape[1:])
            raise GolddiffError(
                f"{name} does not take images of shape {shape}: {str(error).splitlines()[-1]}"
            ) from error
        if not bool(out.isfinite().all()):
            raise GolddiffError(f"{name} returns NaN or infinite features: mend it, or use pixels or pca")
        return out

    return features


def reference_features(bank: Bank, name: str) -> Tensor:
    """Features `(n, F)` float64 of up to 10,000 rows, evenly spaced; those of a network are kept with the bank."""
    extract = extractor(name, bank)
    count = max(2, min(len(bank), REFERENCES, NUMBERS // bank.D))
    rows = bank.rows[torch.linspace(0, len(bank) - 1, count).long().to(bank.device)]

    def compute() -> dict[str, Tensor]:
        parts = [extract(bank.images(part).cpu()) for part in rows.split(256)]
        return {"features": torch.cat(parts)}

    if name in ("pixels", "pca"):
        return compute()["features"]
    return bank.keep(f"features-{hash_file(Path(name))}", compute, remember=False, of_rows=True)["features"]


def evaluate(images: Tensor, bank: Bank, features: str = "pca") -> dict[str, Any]:
    """What is known of images of any origin `(n, C, H, W)` in [-1, 1] beside a bank: `distribution` of their features
    (from 6 images on), mean d1 and `d1 / d2` with standard errors, and the share of copies."""
    if tuple(images.shape[1:]) != bank.shape:
        raise GolddiffError(f"images of {tuple(images.shape[1:])} beside a bank of {bank.shape}: give the same shape")
    found = copies(images, bank)
    out: dict[str, Any] = {
        "images": len(images),
        "d1": mean_and_error(found.d1),
        "ratio_d1_d2": mean_and_error(found.ratio),
        "copies": found.share,
    }
    if min(len(images), len(bank)) >= FEWEST:
        out["sets"] = distribution(extractor(features, bank)(images), reference_features(bank, features))
    return out


def distribution(features: Tensor, reference: Tensor, blocks: int = 4) -> dict[str, tuple[float, float]]:
    """FID, KID, precision, recall, density and coverage of `(n, F)` beside `(m, F)`, each with the standard error over
    blocks of images.

    FID: "GANs Trained by a Two Time-Scale Update Rule"; KID (cubic kernel, unbiased): "Demystifying MMD GANs";
    precision, recall, density, coverage (5 neighbours): "Reliable Fidelity and Diversity Metrics for Generative
    Models".
    """
    if features.shape[1] != reference.shape[1]:
        raise GolddiffError(f"{features.shape[1]} features beside {reference.shape[1]}: use one extractor for both")
    if len(features) < FEWEST or len(reference) < FEWEST:
        raise GolddiffError(f"{len(features)} and {len(reference)} images: sets need at least {FEWEST}")

    def all_of(part: Tensor) -> dict[str, float]:
        return {"fid": _fid(part, reference), "kid": _kid(part, reference), **_prdc(part, reference)}

    whole = all_of(features)
    blocks = max(1, min(blocks, len(features) // FEWEST))
    parts = [all_of(part) for part in features.tensor_split(blocks)] if blocks > 1 else []
    return {
        name: (value, mean_and_error(torch.tensor([p[name] for p in parts]))[1] if parts else math.nan)
        for name, value in whole.items()
    }


def _fid(a: Tensor, b: Tensor) -> float:
    """Distance of Gaussians; the trace of `(A B)^(1/2)` from the singular values of `A^(1/2) B^(1/2)`."""
    means = [x.mean(0) for x in (a, b)]
    roots = [(x - mean) / math.sqrt(len(x) - 1) for x, mean in zip((a, b), means, strict=True)]
    small = [r if len(r) <= r.shape[1] else _root(r.T @ r) for r in roots]  # both have A = root^T root
    product = small[0] @ small[1].T
    wide = product if len(product) <= product.shape[1] else product.T
    overlap = float(torch.linalg.eigvalsh(wide @ wide.T).clamp(min=0).sqrt().sum())
    traces = sum(float(r.square().sum()) for r in roots)
    return float((means[0] - means[1]).square().sum()) + traces - 2 * overlap


def _root(covariance: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(covariance)
    return values.clamp(min=0).sqrt()[:, None] * vectors.T


def _kid(a: Tensor, b: Tensor) -> float:
    def kernel(x: Tensor, y: Tensor) -> Tensor:
        return (x @ y.T / x.shape[1] + 1) ** 3

    n, m = len(a), len(b)
    within = [(kernel(x, x).sum() - kernel(x, x).diagonal().sum()) / (len(x) * (len(x) - 1)) for x in (a, b)]
    return float(within[0] + within[1] - 2 * kernel(a, b).sum() / (n * m))


def _prdc(a: Tensor, b: Tensor) -> dict[str, float]:
    radius = {name: torch.cdist(x, x).kthvalue(NEIGHBOURS + 1, dim=1).values for name, x in (("a", a), ("b", b))}
    between = torch.cdist(b, a)  # reference by images
    inside = between < radius["b"][:, None]
    return {
        "precision": float(inside.any(0).double().mean()),
        "recall": float((between < radius["a"]).any(1).double().mean()),
        "density": float(inside.sum(0).double().mean() / NEIGHBOURS),
        "coverage": float((between.amin(1) < radius["b"]).double().mean()),
    }
