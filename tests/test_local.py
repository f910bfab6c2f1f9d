"""Golden subsets drawn by importance, and certified ones."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import golddiff as gd
from conftest import noisy, outside, toy_arrays
from golddiff import scores
from golddiff.certified import CertifiedSubset
from golddiff.denoise import compiled
from golddiff.importance import LocalSubset
from golddiff.locality import WholeImage

SCHEDULE = gd.DDPM()
LEVELS = [900, 600, 300, 100, 0]


def local(bank, tol=0.06, **options):
    return gd.denoiser("golddiff", bank, retrieval="local", tol=tol, **options)


@pytest.mark.parametrize("t", [700, 450])
def test_drawn_sums_are_unbiased_and_know_their_error(digits, t):
    """Numerator and denominator of every pixel, over 300 seeds, beside the full sums."""
    noise, seeds = SCHEDULE(t), list(range(300))
    x_t = noisy(digits, noise, rows=[5])
    exact = gd.denoiser("pca", digits)(x_t, noise)
    denoiser = local(digits, tol=0.04)
    drawn = denoiser(x_t.expand(300, -1, -1, -1), noise, seed=seeds)
    size = float((drawn.support.rows >= 0).sum()) / drawn.support.rows[:, :, 0].numel()
    assert 20 < size < 600
    varying = digits.spectrum().varying
    denominators = (drawn.log_evidence - exact.log_evidence).exp().flatten(1)[:, varying]
    numerators = denominators * (drawn.mean + 1).flatten(1)[:, varying]
    for found, wanted in ((denominators, 1.0), (numerators, (exact.mean + 1).flatten()[varying])):
        away = (found.mean(0) - wanted) / (found.std(0) / math.sqrt(300))
        assert float(away.square().mean()) < 4  # pixels share their draws, so it is that of few normal numbers
    observed = drawn.mean.flatten(1)[:, varying].var(0).mean()
    pixels = varying.nonzero()[:, 0]
    estimated = torch.stack([drawn.error(b, pixels).square() for b in range(0, 300, 10)]).mean()
    assert 1 / 1.5 < float(estimated / observed) < 1.5


@pytest.mark.parametrize("t", LEVELS)
@pytest.mark.parametrize("tol", [0.1, 0.05])
def test_weights_make_the_mean(digits, t, tol):
    noise = SCHEDULE(t)
    posterior = local(digits, tol)(noisy(digits, noise), noise, seed=[7, 8, 9])
    for b in range(2):
        rows, weights = posterior.weights(b)
        assert torch.allclose(weights.sum(0), torch.ones(64, dtype=torch.float64))
        x = digits.images(rows, torch.float64).flatten(1)
        assert torch.allclose((weights * x).sum(0), posterior.mean[b].flatten(), atol=1e-6)
        few_rows, few = posterior.weights(b, [3, 40])
        assert torch.allclose(weights[torch.isin(rows, few_rows)][:, [3, 40]], few)


def test_many_rows_are_all_rows(digits):
    noise = SCHEDULE(400)
    x_t = noisy(digits, noise)
    posterior = local(digits, tol=0.001)(x_t, noise)
    assert posterior.support.rows is None
    assert torch.equal(posterior.mean, gd.denoiser("pca", digits)(x_t, noise).mean)
    labelled = local(digits, tol=0.03)(x_t, noise, 3)  # 183 rows
    assert torch.equal(labelled.mean, gd.denoiser("pca", digits)(x_t, noise, 3).mean)


@pytest.mark.parametrize("tiles", [1, 4, 8])
@pytest.mark.parametrize("t", LEVELS)
def test_the_loops_agree(t, tiles, monkeypatch):
    """Compiled in float32 and plain in float64: the same rows but for a few, and with the same rows the same means."""
    monkeypatch.setattr(scores, "TILINGS", ((0.0, tiles, 1.0),))
    monkeypatch.setattr(compiled, "WORTH", 0)
    pixels = toy_arrays(900, (3, 16, 16))[0]
    fast, slow = gd.Bank.build(pixels), gd.Bank.build(pixels)
    monkeypatch.setattr(type(slow), "compiled", property(lambda self: self is not slow))
    noise = SCHEDULE(t)
    x_t = noisy(fast, noise, dtype=torch.float32)
    found = [local(bank)(x_t, noise, seed=[1, 2, 3]) for bank in (fast, slow)]
    kept = [{(b, k, int(r)) for b in range(3) for k in range(p.support.rows.shape[1]) for r in p.support.rows_of(b, k)}
            for p in found]  # fmt: skip
    assert len(kept[0] ^ kept[1]) <= 0.002 * len(kept[0])
    if kept[0] == kept[1]:
        assert float((found[0].mean - found[1].mean).abs().max()) < 5e-4


@pytest.mark.parametrize("t", LEVELS)
def test_neither_batch_nor_order_of_rows_changes_the_subset(digits, t):
    noise = SCHEDULE(t)
    x_t = noisy(digits, noise, dtype=torch.float32, rows=range(5))
    together = local(digits)(x_t, noise, seed=range(5))
    alone = local(digits)(x_t[3:4], noise, seed=3)
    assert torch.equal(alone.support.rows_of(0), together.support.rows_of(3))
    assert torch.allclose(alone.mean[0], together.mean[3], atol=1e-6)
    order = torch.randperm(len(digits), generator=torch.Generator().manual_seed(0)).numpy()
    other = gd.Bank.build(digits.pixels.numpy()[order], labels=digits.labels.numpy()[order], layout="NCHW")
    shuffled = local(other)(x_t, noise, seed=range(5))
    assert torch.allclose(shuffled.mean, together.mean, atol=1e-5)


def test_levels_and_labels_mixed_in_a_batch(digits):
    levels = [800, 300, 300, 10]
    noise = gd.Noise(*(torch.stack([getattr(SCHEDULE(t), n) for t in levels]) for n in ("alpha", "sigma")))
    x_t, labels = noisy(digits, noise, rows=range(4)), [-1, -1, 3, -1]
    denoiser = local(digits)
    mixed = denoiser(x_t, noise, labels, seed=range(4))
    for b, t in enumerate(levels):
        alone = denoiser(x_t[b : b + 1], SCHEDULE(t), labels[b], seed=b)
        assert torch.allclose(mixed.mean[b], alone.mean[0], atol=1e-9)
        rows, weights = mixed.weights(b, [10])
        assert torch.allclose(weights, alone.weights(0, [10])[1]), rows
        assert torch.allclose(mixed.error(b, [10]), alone.error(0, [10]))


def test_better_than_the_reference_with_fewer_rows():
    bank = gd.Bank.build("mnist5k")
    for t in (600, 500, 400, 300):
        noise = SCHEDULE(t)
        x_t = noisy(bank, noise, rows=range(0, 5000, 500), dtype=torch.float32)
        others = torch.tensor([i for i in range(5000) if i % 500])
        without = gd.Bank.build(bank.pixels[others].numpy(), layout="NCHW")  # held-out images
        exact = gd.denoiser("pca", without, threshold=0.02)(x_t, noise).mean
        errors, rows = {}, {}
        for name, options in {"local": {"tol": 0.04}, "reference": {}}.items():
            found = gd.denoiser("golddiff", without, retrieval=name, threshold=0.02, **options)(
                x_t, noise, seed=range(10)
            )
            errors[name] = float((found.mean - exact).square().mean())
            rows[name] = int((found.support.rows >= 0).sum()) / found.support.rows[:, :, 0].numel()
        assert rows["local"] < rows["reference"]
        assert errors["local"] < errors["reference"] / 2, (t, errors)


def test_ls_with_local_subsets(digits):
    noise = SCHEDULE(300)
    x_t = noisy(digits, noise)
    exact = gd.denoiser("ls", digits, window=3)(x_t, noise).mean
    drawn = gd.denoiser("golddiff", digits, locality="ls", window=3, retrieval="local", tol=0.04)(x_t, noise)
    assert drawn.support.rows is not None
    assert float((drawn.mean - exact).square().mean().sqrt()) < 0.12


def test_float_banks_and_masks_with_weights():
    bank = gd.Bank.build((toy_arrays(300)[0] / 127.5 - 1).astype(np.float32))
    noise = SCHEDULE(500)
    x_t = noisy(bank, noise)
    mask = torch.rand(60, 60, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for options in ({}, {"mask": mask}):
        drawn = local(bank, tol=0.1, **options)(x_t, noise)
        exact = gd.denoiser("pca", bank, **options)(x_t, noise)
        assert float((drawn.mean - exact.mean).square().mean().sqrt()) < 0.3
        assert drawn.support.rows is not None


# ---- certified ---------------------------------------------------------------------------------------


@settings(max_examples=2000, deadline=None)
@given(
    count=st.integers(1, 80),
    seed=st.integers(0, 10**6),
    rho=st.floats(0.003, 300.0),
    tol=st.sampled_from([1e-1, 1e-2, 1e-4]),
    spread=st.sampled_from([0.0, 0.02, 1.0]),
    kind=st.sampled_from([np.uint8, np.float32]),
)
def test_the_error_never_exceeds_the_bound(count, seed, rho, tol, spread, kind):
    random = np.random.default_rng(seed)
    pictures = np.clip(128 + 90 * spread * random.normal(size=(count, 2, 3, 4)), 0, 255)
    pixels = pictures.astype(np.uint8) if kind == np.uint8 else (pictures / 127.5 - 1).astype(np.float32)
    bank, noise = gd.Bank.build(pixels, layout="NCHW"), gd.Noise(1.0, rho)
    x_t = noisy(bank, noise, rows=[0, count - 1], seed=seed)
    exact = gd.denoiser("optimal", bank)(x_t, noise)
    found = gd.denoiser("optimal", bank, retrieval="certified", tol=tol)(x_t, noise)
    error = (found.mean - exact.mean).square().flatten(1).mean(1).sqrt()
    assert bool((error <= found.error_bound + 1e-9).all())
    assert bool((found.error_bound <= tol).all())
    assert bool((exact.error_bound == 0).all())


def test_bounds_are_under_the_distances(digits):
    for bank in (digits, gd.Bank.build(toy_arrays(50, (1, 30, 30))[0])):
        subset, noise = CertifiedSubset(bank), SCHEDULE(300)
        q, s = bank.query(noisy(bank, noise), noise)
        bounds = subset.lower_bounds(q, s, torch.arange(len(bank)))
        for b in range(3):
            distances = bank.distances(q[b], s[b], torch.arange(len(bank)))
            assert bool((bounds[b] <= distances).all())
            assert float((bounds[b] / distances).median()) > 0.9


def test_few_rows_are_certified_at_low_noise():
    bank = gd.Bank.build("mnist", limit=None) if outside("GOLDDIFF_DATA") else None
    test = gd.Bank.build("mnist", split="test", limit=11)
    subset, rows = CertifiedSubset(bank), torch.arange(len(bank))
    for t, share in ((200, 0.05), (100, 0.005), (0, 0.005)):
        noise = SCHEDULE(t)
        q, s = bank.query(noisy(test, noise, rows=range(11)), noise)
        bounds = subset.lower_bounds(q, s, rows)
        counts = [len(subset.enough(q[b], s[b], bounds[b], rows, 1e-4)[0]) for b in range(11)]
        assert float(np.median(counts)) <= share * len(bank), (t, counts)


def test_refused():
    bank = gd.Bank.build("digits", limit=100)
    for name, options, said in (
        ("golddiff", {"retrieval": "certified"}, "local"),
        ("optimal", {"retrieval": "local"}, "certified"),
        ("golddiff", {"retrieval": "local", "tol": 0}, "tol"),
        ("optimal", {"retrieval": "certified", "tol": "small"}, "tol"),
        ("golddiff", {"tol": 0.1, "retrieval": "paper"}, "no effect"),
        ("golddiff", {"k_max": 50}, "no effect"),
        ("golddiff", {"budget": "auto", "retrieval": "reference"}, "budget"),
        ("golddiff", {"budget": "paper", "tol": 0.1, "retrieval": "local"}, "no effect"),
        ("optimal", {"retrieval": "certified", "budget": "paper"}, "budget"),
        ("golddiff", {"budget": "all"}, "auto"),
        ("pca", {"budget": "auto"}, "budget"),
        ("golddiff", {"legacy_batch": 9}, "legacy_batch"),
    ):
        with pytest.raises(gd.GolddiffError, match=said):
            gd.denoiser(name, bank, **options)
    with pytest.raises(gd.GolddiffError, match="certified"):
        LocalSubset(bank).select(torch.zeros(1, 1, 8, 8), SCHEDULE(3), WholeImage(), None, torch.zeros(1).long())
    with pytest.raises(gd.GolddiffError, match="draws no rows"):
        gd.denoiser("optimal", bank)(torch.zeros(1, 1, 8, 8), SCHEDULE(3)).error(0)


def test_the_papers_budget_can_be_drawn_too(digits):
    noise = SCHEDULE(500)
    drawn = gd.denoiser("golddiff", digits, retrieval="local", budget="paper")(noisy(digits, noise), noise)
    wanted = gd.denoiser("golddiff", digits, retrieval="reference")(noisy(digits, noise), noise).support.size
    assert abs(drawn.support.size - wanted) < 0.4 * wanted
