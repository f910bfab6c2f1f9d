"""The smallest and dullest banks at all noise levels, and banks that cannot be: NaN and numbers beyond all pictures."""

import numpy as np
import pytest
import torch

import golddiff as gd
import oracles
from cases import CONTENTS, content_of, drawn_rows
from conftest import noisy, toy_arrays
from golddiff.images import Images
from reach import ROUNDOFF, Formula

RHO = [10.0**n for n in range(-4, 5)]
SMALL = {"k_min": 1, "k_max": 2}
VARIANTS = {
    "optimal": ("optimal", {}),
    "optimal certified": ("optimal", {"retrieval": "certified"}),
    "optimal reference": ("optimal", {"retrieval": "reference"}),
    "optimal paper": ("optimal", {"retrieval": "paper", **SMALL}),
    "wiener": ("wiener", {}),
    "wiener class": ("wiener", {"statistics": "class"}),
    "pca": ("pca", {}),
    "pca class": ("pca", {"statistics": "class"}),
    "pca correlation": ("pca", {"mask_rule": "correlation"}),
    "pca published": ("pca", {"mask_rule": "published"}),
    "pca ratios": ("pca", {"mask_rule": "published", "threshold": 0.0}),
    "pca legacy": ("pca", {"legacy_batch": 2}),
    "pca paper": ("pca", {"retrieval": "paper"}),
    "golddiff": ("golddiff", {}),
    "golddiff local": ("golddiff", {"tol": 1.9}),
    "golddiff budget": ("golddiff", {"retrieval": "local", "budget": "paper", **SMALL}),
    "golddiff reference": ("golddiff", {"retrieval": "reference", **SMALL}),
    "golddiff paper": ("golddiff", {"retrieval": "paper"}),
    "golddiff optimal": ("golddiff", {"locality": "optimal"}),
    "golddiff ls": ("golddiff", {"locality": "ls", "window": 3}),
    "ls": ("ls", {}),
    "ls reference": ("ls", {"window": 1, "retrieval": "reference"}),
    "els": ("els", {"window": 3}),
    "els pixels": ("els", {"window": 1}),
    "bbels": ("bbels", {"window": 3}),
    "pspc": ("pspc", {"window": 3}),
    "cfdm": ("cfdm", {"draws": 2}),
    "nearest": ("nearest", {}),
    "knn": ("knn", {"neighbours": 2, "draws": 8}),
}


def rows(content, count, *shape, dtype=np.uint8):
    return drawn_rows(np.random.default_rng(1), content, count, shape, dtype)


def equal(count):
    return np.repeat(rows("random", 1, 3, 4, 5), count, 0)


BANKS = {
    "one row": rows("random", 1, 3, 4, 5),
    "two rows": rows("random", 2, 3, 4, 5),
    "three rows": rows("random", 3, 1, 5, 4),
    "all rows equal": equal(20),
    "two equal rows": equal(2),
    "copies": rows("copies", 20, 3, 4, 5),
    "rows of one colour": rows("constant", 12, 1, 4, 4),
    "black": rows("black", 9, 3, 3, 3),
    "white": rows("white", 9, 1, 3, 3),
    "one pixel varies": rows("one pixel varies", 12, 3, 3, 3),
    "black and white pixels": rows("few values", 12, 1, 2, 2),
    "one pixel, grey": rows("random", 20, 1, 1, 1),
    "one pixel, colour": rows("random", 20, 3, 1, 1),
    "one pixel, one row": rows("random", 1, 1, 1, 1),
    "one pixel, floats": rows("random", 7, 3, 1, 1, dtype=np.float64),
    "two pixels": rows("random", 12, 1, 2, 1),
    "a line": rows("random", 12, 3, 1, 9),
    "floats": rows("random", 8, 1, 3, 3, dtype=np.float32),
    "floats, all equal": rows("black", 6, 1, 3, 3, dtype=np.float32) + 1.3,
    "doubles, nearly equal": rows("alike", 8, 1, 3, 3, dtype=np.float64),
}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("bank", BANKS)
def test_small_and_dull_banks(bank, variant):
    """At each level, for images at their noise level and for others (far off, or empty), in both types: the formula."""
    name, options = VARIANTS[variant]
    pixels = BANKS[bank]
    one_of_a_kind = np.r_[5, np.full(len(pixels) - 1, 2)]
    held = gd.Bank.build(pixels, labels=one_of_a_kind, layout="NCHW")
    denoiser = gd.denoiser(name, held, **options)
    random = np.random.default_rng(0)
    noise = gd.Noise([1.0, 1e-3, 20.0] * 3, np.array(RHO) * ([1.0, 1e-3, 20.0] * 3))
    alpha, sigma = (v[:, None, None, None] for v in (noise.alpha, noise.sigma))
    z = torch.from_numpy(random.normal(size=(9, *held.shape)))
    x = held.images(torch.arange(9) % len(held), torch.float64)
    wanted = [-1, 5, -1, -1, 5, -1, 5, -1, -1]
    others = 3 * (alpha + sigma) * z * (torch.arange(9) % 2)[:, None, None, None]
    for image in (alpha * x + sigma * z, others):
        for dtype in (torch.float32, torch.float64):
            posterior = denoiser(image.float().to(dtype), noise, wanted)
            assert posterior.mean.dtype == dtype
            formula = Formula(denoiser, posterior, wanted, [0] * 9)
            for b in range(9):
                expected = formula.of(b)
                if expected is not None:
                    assert expected.holds(posterior, b) == ""
                elif wanted[b] == 5:  # drawn from a class of one row
                    off = posterior.mean[b] - held.images(held.rows_of(5), dtype)[0]
                    assert float(off.abs().max()) <= 4 * ROUNDOFF[dtype]


@pytest.mark.parametrize("rho", [0.02, 0.3, 3.0])
def test_the_formula_is_the_loops_and_leaves_little_room(rho):
    """What the tests of numbers compare with, beside loops; and float32 has to be right to a few digits."""
    pixels, labels = toy_arrays(15, (1, 4, 5))
    held, noise = gd.Bank.build(pixels, labels=labels), gd.Noise(1.0, rho)
    x_t = noisy(held, noise, rows=[3])
    plain = held.images(slice(None), torch.float64).flatten(1).numpy()
    y = x_t.flatten().numpy()
    for name in ("optimal", "pca", "ls", "wiener"):
        denoiser = gd.denoiser(name, held)
        if name == "optimal":
            told = oracles.optimal(y, plain, 1.0, rho)
        elif name == "wiener":
            told = oracles.wiener(y, plain, 1.0, rho)[:1]
        else:
            told = oracles.masked(y, plain, denoiser.locality.mask(noise).double().numpy(), 1.0, rho)
        for dtype, room in ((torch.float64, 1e-8), (torch.float32, 2e-3)):
            found = Formula(denoiser, denoiser(x_t.to(dtype), noise), [-1], [0]).of(0)
            if dtype == torch.float64:
                for mine, theirs in zip((found.mean, found.evidence, found.ess), told, strict=False):
                    assert np.allclose(mine, theirs, rtol=1e-10, atol=1e-10)
            assert found.mean_error.max() < room


@pytest.mark.parametrize("content", CONTENTS)
def test_one_image_of_a_class_is_its_mean(content):
    """Whatever the method: what is asked of a class of one image is that image (of Wiener: by its own statistics)."""
    pixels = rows(content, 9, 3, 4, 4)
    held = gd.Bank.build(pixels, labels=[3] + [0] * 8, layout="NCHW")
    x = held.images(torch.tensor([0]), torch.float64)
    for name, options in VARIANTS.values():
        if (name, options) == ("wiener", {}) or name in ("els", "bbels"):  # pixels from other places
            continue
        for rho in RHO:
            found = gd.denoiser(name, held, **options)(torch.full_like(x, 0.3), gd.Noise(1.0, rho), 3).mean
            assert float((found - x).abs().max()) < 1e-12, name


class Items:
    def __init__(self, pixels):
        self.pixels = pixels

    def __len__(self):
        return len(self.pixels)

    def __getitem__(self, i):
        return self.pixels[i], 0


def by_latents(pixels, tmp_path):
    values = iter(pixels)  # what an encoder says of one picture after the other
    first = []

    def encode(x):
        if not first:  # asked once for the shape
            first.append(True)
            return torch.from_numpy(pixels[:1])
        return torch.stack([torch.from_numpy(next(values)) for _ in x])

    pictures = np.zeros((len(pixels), 5, 5), np.uint8)
    return gd.Bank.build(pictures, latents=gd.Latents(encode, lambda z: z, "strange"))


def saved(way, pixels, tmp_path):
    path = tmp_path / f"rows.{way}"
    (np.save if way == "npy" else np.savez)(path, pixels)
    return path


WAYS = {
    "array": lambda x, _: gd.Bank.build(x, layout="NCHW"),
    "tensor": lambda x, _: gd.Bank.build(torch.from_numpy(x), layout="NCHW"),
    "npy": lambda x, tmp: gd.Bank.build(saved("npy", x, tmp), layout="NCHW"),
    "npy to a folder": lambda x, tmp: gd.Bank.build(saved("npy", x, tmp), tmp / "bank", layout="NCHW"),
    "npz": lambda x, tmp: gd.Bank.build(saved("npz", x, tmp), layout="NCHW"),
    "data set": lambda x, _: gd.Bank.build(Items(x)),
    "reader": lambda x, _: gd.Bank.build(
        Images(x.shape[1:], x.dtype, np.zeros(len(x), np.int64), [str(i) for i in range(len(x))], lambda i, j: x[i:j])
    ),
    "latents": by_latents,
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", [np.float32, np.float64])
@pytest.mark.parametrize("wrong", [np.nan, -np.inf, 1e30])
@pytest.mark.parametrize("row", [3, 1029])
def test_what_is_no_number_is_refused_by_its_row(way, kind, wrong, row, tmp_path):
    pixels = np.random.default_rng(0).uniform(-1, 1, (1030, 1, 2, 5)).astype(kind)
    pixels[row, 0, 1, 2] = wrong
    with pytest.raises(gd.GolddiffError, match=rf"row {row}\b"):
        WAYS[way](pixels, tmp_path)
    assert not (tmp_path / "bank").exists()
    pixels[row, 0, 1, 2] = 0
    if way != "latents" or kind == np.float32:
        assert len(WAYS[way](pixels, tmp_path)) == 1030


@pytest.mark.parametrize("size", [1e-6, 1e-3, 30.0, 1e3, 1e6])
@pytest.mark.parametrize("variant", VARIANTS)
def test_latents_of_any_size(variant, size):
    """Floats need not lie in [-1, 1]: brought to another size, rows, images and noise give the same, as large."""
    name, options = VARIANTS[variant]
    options = {key: value for key, value in options.items() if key != "tol"}  # which is in the units of the rows
    pixels = rows("random", 12, 3, 3, 3, dtype=np.float64) - 0.1
    held = gd.Bank.build(pixels * size, layout="NCHW")
    x = held.images(torch.arange(3), torch.float64)
    z = torch.from_numpy(np.random.default_rng(3).normal(size=x.shape))
    for rho in (0.01, 0.3, 5.0):
        x_t = (x + rho * size * z).float()
        for dtype in (torch.float32, torch.float64):
            denoiser = gd.denoiser(name, held, **options)
            posterior = denoiser(x_t.to(dtype), gd.Noise(1.0, rho * size))
            formula = Formula(denoiser, posterior, [-1] * 3, [0] * 3)
            for b in range(3):
                expected = formula.of(b)
                assert expected is None or expected.holds(posterior, b) == ""


def test_the_message_of_float64_is_of_use():
    """A refusal says what helps: in float64 it is not float64."""
    held = gd.Bank.build(toy_arrays(5)[0])
    for dtype, huge, told in ((torch.float32, 1e30, "use float64"), (torch.float64, 1e200, "smaller")):
        with pytest.raises(gd.GolddiffError, match=told):
            gd.denoiser("optimal", held)(torch.full((1, *held.shape), huge, dtype=dtype), gd.Noise(1.0, 1.0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("content", ["black", "alike"])
def test_pure_noise_and_far_images_with_drawn_rows(content, dtype):
    """Scores stay numbers where alpha is 0 or `x_t` is far beyond the rows, so rows are drawn and make the mean."""
    held = gd.Bank.build(rows(content, 60, 1, 8, 8), layout="NCHW")
    z = torch.from_numpy(np.random.default_rng(0).normal(size=(2, *held.shape)))
    for noise, size in ((gd.Noise(0.0, 1.0), 1.0), (gd.Noise(0.0, 1.0), 1e14), (gd.Noise(1.0, 1.0), 1e14)):
        denoiser = gd.denoiser("golddiff", held, tol=1.9)
        posterior = denoiser((size * z).to(dtype), noise)
        assert posterior.support.rows is not None  # not all of them
        for b in range(2):
            assert Formula(denoiser, posterior, [-1] * 2, [0] * 2).of(b).holds(posterior, b) == ""


@pytest.mark.parametrize("size", [1e3, 1e9, 1e16])
@pytest.mark.parametrize("variant", ["optimal", "pca", "ls", "pspc", "cfdm", "knn", "golddiff reference"])
def test_weights_sum_to_one_however_far(variant, size):
    """Logits of 1e30 do not swallow the logarithm of their number."""
    held = gd.Bank.build(rows("copies", 20, 1, 3, 3), layout="NCHW")
    name, options = VARIANTS[variant]
    x_t = torch.full((1, *held.shape), size, dtype=torch.float64)
    posterior = gd.denoiser(name, held, **options)(x_t, gd.Noise(1.0, 0.5))
    chosen, weights = posterior.weights(0)
    values = held.images(chosen, torch.float64).flatten(1)
    assert float((weights.sum(0) - 1).abs().max()) < 1e-12
    told = weights @ values if weights.ndim == 1 else (weights * values).sum(0)
    if size < 1e16:  # from where on differences of float64 tell no rows apart
        assert float((told - posterior.mean.flatten()).abs().max()) < 1e-12


@pytest.mark.parametrize("rho", [0.1, 2.0, None])
def test_equal_rows_are_drawn_by_their_keys(rho):
    """Where rows are equal, or all are at pure noise (None), none is preferred for its place."""
    pixels = rows("copies", 40, 1, 3, 4)
    order = np.random.default_rng(5).permutation(40)
    labels = np.arange(40) % 7
    banks = [gd.Bank.build(pixels[o], labels=labels[o], layout="NCHW") for o in (np.arange(40), order)]
    noise = gd.Noise(0.0, 1.0) if rho is None else gd.Noise(1.0, rho)
    x_t = torch.from_numpy(np.random.default_rng(0).normal(size=(20, *banks[0].shape)))
    for name, options in (
        ("ls", {"retrieval": "local", "budget": "paper", "k_min": 1, "k_max": 1}),
        ("golddiff", {"retrieval": "local", "budget": "paper", "k_min": 1, "k_max": 2}),
        ("optimal", {"retrieval": "certified", "tol": 0.9}),
        ("golddiff", {"retrieval": "paper", "k_min": 1, "k_max": 2}),
    ):
        found = [gd.denoiser(name, bank, **options)(x_t, noise, seed=range(20)) for bank in banks]
        for b in range(20):
            assert content_of(found[0].support, banks[0], b) == content_of(found[1].support, banks[1], b)


@pytest.mark.parametrize("scale", [0.3, 0.37, 5.0])
def test_ties_of_masks_are_on_the_threshold(scale):
    """Two rows have one direction in common, so all correlations are 1: rounding must not decide."""
    held = gd.Bank.build(rows("alike", 2, 1, 1, 6), layout="NCHW")
    varying = held.spectrum().varying
    denoiser = gd.denoiser("pca", held, threshold=1.0, mask_rule="correlation")
    for rho in RHO[2:]:
        mask = denoiser.locality.mask(gd.Noise(scale, scale * rho))
        assert bool(mask[varying][:, varying].all())
