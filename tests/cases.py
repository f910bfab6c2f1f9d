"""Random banks, denoisers with valid options, noise levels and noisy images, for hypothesis."""

from dataclasses import dataclass, field

import numpy as np
import torch
from hypothesis import strategies as st

import golddiff as gd
from golddiff.denoise import METHODS
from golddiff.golden import PADDING

CONTENTS = ("random", "alike", "copies", "constant", "few values", "one pixel varies", "black", "white")
"""`alike`: close to each other; `copies`: each row twice or more; `constant`: all pixels of a row the same."""
IMAGES = ("near", "near", "far", "huge", "a row", "between", "zero")
SIZES = ({}, {"k_min": 1, "k_max": 1}, {"k_min": 2, "k_max": 5}, {"k_min": 1.0, "k_max": 1.0},
         {"k_min": 0.2, "k_max": 0.5, "m_min": 0.6, "m_max": 0.9})  # fmt: skip
MASKS = ({}, {"mask_rule": "correlation"}, {"mask_rule": "published"}, {"mask_rule": "published", "threshold": 0.0},
         {"threshold": 0.0}, {"threshold": 1.0}, {"threshold": 0.3, "statistics": "class"}, {"mask": "random"},
         {"mask": "weights"})  # fmt: skip


@dataclass
class Case:
    """One denoiser at one batch. `rows`, `labels`: of the bank; `wanted`: labels that are asked for, -1 for all."""

    rows: np.ndarray
    labels: np.ndarray | None
    name: str
    options: dict
    alpha: list[float]
    sigma: list[float]
    x_t: torch.Tensor
    wanted: list[int]
    seeds: list[int]
    content: str
    image: str
    bank: gd.Bank = field(init=False)

    def __post_init__(self):
        self.bank = gd.Bank.build(self.rows, labels=self.labels, layout="NCHW")

    def __repr__(self):
        label = None if self.labels is None else self.labels.tolist()
        shown = {k: "..." if isinstance(v, torch.Tensor) else v for k, v in self.options.items()}
        return (
            f"Case({self.name} {shown}, {self.content} {self.rows.dtype} {self.rows.shape}, labels {label}, x_t "
            f"{self.image}, alpha {self.alpha}, sigma {self.sigma}, wanted {self.wanted}, seeds {self.seeds})"
        )

    @property
    def noise(self):
        return gd.Noise(self.alpha, self.sigma)

    def denoiser(self, bank=None):
        return gd.denoiser(self.name, self.bank if bank is None else bank, **self.options)

    def posterior(self, dtype=torch.float64, bank=None):
        return self.denoiser(bank)(self.x_t.to(dtype), self.noise, self.wanted, seed=self.seeds)

    @property
    def clear(self):
        """Whether it is not rounding that says which of two rows is nearer; equal rows go by their keys."""
        return self.image in ("near", "far") and self.content not in ("few values", "constant", "alike")

    def unstable(self, other, scale=1.0):
        """Whether rounding decides about the published masks (docs/accuracy.md): they differ from those of another bank
        of the same rows, or at a scaled level."""
        if self.options.get("mask_rule") != "published" or "mask" in self.options:
            return False
        scaled = gd.Noise(self.noise.alpha * scale, self.noise.sigma * scale)
        masks = [
            torch.stack([self.denoiser(bank).locality.mask(noise[b]).double() for b in range(len(self.x_t))])
            for bank, noise in ((self.bank, self.noise), (other, scaled))
        ]
        return not torch.allclose(*masks, rtol=1e-9)

    @property
    def usual(self):
        """Whether float32 has to manage it: rows and images of the size of pictures."""
        return self.image != "huge"


def drawn_rows(rng, content, count, shape, dtype):
    """Rows of a kind, uint8, or floats in about [-1, 1]."""
    x = rng.uniform(-1, 1, (count, *shape))
    if content == "alike":
        x = x[:1] + 0.02 * x
    elif content == "copies":
        x = x[rng.integers(0, max(1, count // 2), count)]
    elif content == "constant":
        x = np.broadcast_to(x[:, :1, :1, :1], x.shape).copy()
    elif content == "few values":
        x = np.sign(x)
    elif content == "one pixel varies":
        x[:, 0, 1:] = x[:1, 0, 1:]
        x[:, 1:] = x[:1, 1:]
        x[:, 0, 0, 1:] = x[:1, 0, 0, 1:]
    elif content in ("black", "white"):
        x = np.full_like(x, -1.0 if content == "black" else 1.0)
    return np.round((x + 1) * 127.5).astype(np.uint8) if dtype == np.uint8 else x.astype(dtype)


def drawn_images(rng, image, rows, alpha, sigma):
    """Noisy images `(B, C, H, W)`, whole numbers of float32, so that both types see the same."""
    x = rows / 127.5 - 1 if rows.dtype == np.uint8 else rows.astype(np.float64)
    a, s = (np.array(v)[:, None, None, None] for v in (alpha, sigma))
    z = rng.normal(size=(len(alpha), *rows.shape[1:]))
    first, second = (x[rng.integers(0, len(x), len(alpha))] for _ in range(2))
    x_t = {
        "near": a * first + s * z, "far": 20 * (a + s) * z, "huge": 10.0 ** rng.uniform(3, 30) * (a + s) * z,
        "a row": a * first, "between": a * (first + second) / 2, "zero": 0 * z,
    }[image]  # fmt: skip
    return torch.from_numpy(x_t.astype(np.float32).astype(np.float64))


@st.composite
def methods(draw, rng, size, names):
    """A method with valid options for images of so many numbers, (name, options)."""
    name = names[rng.integers(len(names))]  # each about as often, which hypothesis would not do
    subset = st.sampled_from(("full", "reference", "paper", "local", "certified"))
    options = {}
    if name in ("optimal", "pca", "golddiff", "ls"):
        if name == "golddiff":
            options["locality"] = draw(st.sampled_from(("pca", "pca", "optimal", "ls")))
        options["retrieval"] = draw(subset)
        whole = name == "optimal" or options.get("locality") == "optimal"
        if options["retrieval"] in ("local", "certified"):
            options["retrieval"] = "certified" if whole else "local"
            options["tol"] = draw(st.sampled_from((1e-6, 1e-3, 0.05, 0.5, 1.9)))
        if options["retrieval"] == "local":
            options["search"] = draw(st.sampled_from((0, 24)))
            if draw(st.booleans()):
                options |= {"budget": "paper", **draw(st.sampled_from(SIZES))}
                del options["tol"]
        if options["retrieval"] in ("reference", "paper"):
            options |= draw(st.sampled_from(SIZES))
        if name == "pca" or options.get("locality") == "pca":
            options |= draw(st.sampled_from(MASKS))
            if "mask" in options:
                seen = torch.from_numpy(rng.random((size, size)))
                options["mask"] = seen < 0.3 if options["mask"] == "random" else seen**4
            if options["retrieval"] != "local" and draw(st.integers(0, 5)) == 0:
                options["legacy_batch"] = draw(st.integers(1, 12))
    if name in ("ls", "els", "bbels", "pspc") or options.get("locality") == "ls":
        options["window"] = draw(st.sampled_from((None, 1, 3, 5, 19)))
    if name == "wiener":
        options["statistics"] = draw(st.sampled_from(("bank", "class")))
    if name == "cfdm":
        options = {"kappa": draw(st.sampled_from((0, 0.1, 2.0))), "draws": 2, "antithetic": draw(st.booleans())}
    if name == "knn":
        options = {"neighbours": draw(st.sampled_from((1, 5, 50))), "draws": draw(st.sampled_from((1, 7, 64)))}
    return name, options


@st.composite
def cases(draw, names=(*METHODS, "pca", "golddiff", "ls", "optimal", "pca", "golddiff", "optimal")):
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    count = draw(st.one_of(st.integers(1, 3), st.integers(4, 40), st.integers(17, 80)))
    shape = draw(st.sampled_from((1, 3))), draw(st.integers(1, 9)), draw(st.integers(1, 9))
    dtype = draw(st.sampled_from((np.uint8, np.uint8, np.float32, np.float64)))
    content = draw(st.sampled_from(CONTENTS))
    rows = drawn_rows(rng, content, count, shape, dtype)
    kind = draw(st.sampled_from(("none", "three", "one of a kind", "some")))
    labels = {
        "none": None, "three": rng.integers(0, 3, count), "one of a kind": np.r_[7, np.zeros(count - 1, int)],
        "some": rng.integers(-1, 2, count),
    }[kind]  # fmt: skip
    name, options = draw(methods(rng, int(np.prod(shape)), names))
    batch = draw(st.integers(1, 5))
    there = [-1] if labels is None else [-1, *np.unique(labels[labels >= 0]).tolist()]
    wanted = [draw(st.sampled_from(there)) for _ in range(batch)] if len(there) > 1 else [-1] * batch
    levels = [10 ** draw(st.floats(-4, 4)) for _ in range(batch if draw(st.booleans()) else 1)]
    levels = levels if len(levels) == batch else levels * batch
    alpha = draw(st.sampled_from(("vp", "ve", "small", "large", "none")))
    a = {"vp": lambda rho: 1 / np.hypot(1, rho), "ve": lambda rho: 1.0, "small": lambda rho: 1e-3,
         "large": lambda rho: 1e3, "none": lambda rho: 0.0}[alpha]  # fmt: skip
    alphas = [float(a(rho)) for rho in levels]
    sigmas = [float(rho * a(rho)) if a(rho) else 1.0 for rho in levels]
    image = draw(st.sampled_from(IMAGES))
    x_t = drawn_images(rng, image, rows, alphas, sigmas)
    seeds = [draw(st.integers(0, 9)) for _ in range(batch)]
    return Case(rows, labels, name, options, alphas, sigmas, x_t, wanted, seeds, content, image)


def content_of(support, bank, b):
    """The rows of image b, tile by tile, by their keys (which tell copies apart, in any order of the rows)."""
    if support is None:
        return None
    tiles = range(1 if support.rows is None else support.rows.shape[1])
    rows = [support.rows_of(b, tile) for tile in tiles]
    assert all(bool((part != PADDING).all()) for part in rows)
    return [bank.keys[part].sort().values.tolist() for part in rows]
