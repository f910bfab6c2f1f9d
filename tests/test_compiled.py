"""The compiled kernel of masked softmaxes, against the same in float64 by plain products."""

import numpy as np
import pytest
import torch

import golddiff as gd
from conftest import noisy, toy_arrays
from golddiff import bank as bank_module
from golddiff import golden, locality
from golddiff.denoise import compiled
from golddiff.locality import MaskRuns

pytest.importorskip("numba")
from golddiff.kernels import run_sums

SHAPE = (3, 5, 6)  # more than the 64 pixels that are transposed at once, and no multiple
LEVELS = [999, 900, 600, 300, 100, 0]


@pytest.fixture
def always(monkeypatch):
    """Takes the kernel for small work too."""
    monkeypatch.setattr(compiled, "WORTH", 0)


def masks(size):
    random = torch.rand(size, size, generator=torch.Generator().manual_seed(1))
    return {
        "stable": None,
        "random": random < 0.3,
        "dense": random < 0.97,
        "ones": torch.ones(size, size, dtype=torch.bool),
        "zeros": torch.zeros(size, size, dtype=torch.bool),
        "identity": torch.eye(size, dtype=torch.bool),
        "some empty columns": (random < 0.3) & (torch.arange(size) % 3 > 0),
    }


def check(denoiser, x_t, noise, atol, **options):
    """Kernel in float32 against products in float64."""
    fast, exact = denoiser(x_t.float(), noise, **options), denoiser(x_t.float().double(), noise, **options)
    assert float((fast.mean - exact.mean).abs().max()) < atol
    assert torch.allclose(fast.ess, exact.ess, rtol=max(20 * atol, 1e-5))
    assert torch.allclose(fast.log_evidence, exact.log_evidence, atol=max(20 * atol, 1e-4), rtol=1e-6)


@pytest.mark.parametrize("tile", [1024, 17])
@pytest.mark.parametrize("t", LEVELS)
@pytest.mark.parametrize("kind", masks(2))
@pytest.mark.usefixtures("always")
def test_kernel_is_the_product(t, kind, tile, monkeypatch):
    monkeypatch.setattr(compiled, "TILE", tile)
    monkeypatch.setattr(locality, "TILE", tile)
    bank = gd.Bank.build(toy_arrays(200, SHAPE)[0])
    noise = gd.DDPM()(t)
    check(gd.denoiser("pca", bank, mask=masks(90)[kind]), noisy(bank, noise), noise, 5e-5)


@pytest.mark.parametrize("count", [1, 2, 63, 64, 65, 511, 512, 513, 700])
@pytest.mark.usefixtures("always")
def test_any_number_of_rows(count):
    bank = gd.Bank.build(toy_arrays(count, SHAPE)[0])
    noise = gd.DDPM()(600)
    check(gd.denoiser("pca", bank), noisy(bank, noise, rows=[0]), noise, 5e-5)


@pytest.mark.parametrize("rho", [1e-4, 1e-2, 1.0, 1e2, 1e4])
@pytest.mark.parametrize("name", ["pca", "golddiff"])
@pytest.mark.usefixtures("always")
def test_all_levels_of_noise(digits, rho, name):
    noise = gd.Noise(1.0, rho)
    check(
        gd.denoiser(name, digits),
        noisy(digits, noise, rows=range(4)),
        noise,
        5e-5,
        label=[-1, 3, -1, 4],
        seed=[1, 2, 3, 4],
    )


@pytest.mark.usefixtures("always")
def test_float64_sums_are_exact(digits, monkeypatch):
    monkeypatch.setattr(compiled, "RESOLUTION", 0.0)
    for t in LEVELS:
        noise = gd.DDPM()(t)
        check(gd.denoiser("pca", digits), noisy(digits, noise), noise, 2e-6)


@pytest.mark.usefixtures("always")
def test_threads_do_not_change_a_bit(digits):
    noise = gd.DDPM()(500)
    denoiser, x_t = gd.denoiser("pca", digits), noisy(digits, noise, dtype=torch.float32)
    before = torch.get_num_threads()
    both = denoiser(x_t, noise).mean
    try:
        torch.set_num_threads(1)
        assert torch.equal(denoiser(x_t, noise).mean, both)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(denoiser(x_t[1:2], noise).mean[0], both[1])


def test_work_that_it_does_not_take(digits, monkeypatch):
    x_t = torch.zeros(1, 1, 8, 8)
    floats = gd.Bank.build(np.zeros((5, 8, 8), np.float32), layout="NHW")
    monkeypatch.setattr(compiled, "WORTH", 0)
    assert compiled.usable(digits, x_t, 1797)
    assert not compiled.usable(floats, x_t, 1797)
    assert not compiled.usable(digits, x_t.double(), 1797)
    assert gd.denoiser("pca", digits, mask=torch.rand(64, 64)).locality.runs(gd.Noise(1.0, 1.0)) is None
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert not compiled.usable(gd.Bank.build("digits"), x_t, 1797)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_distances_are_those_of_differences(digits, dtype, monkeypatch):
    noise, rows = gd.DDPM()(300), torch.arange(1700).flip(0)
    q, s = digits.query(noisy(digits, noise, dtype=dtype), noise)
    plain = [digits.distances(q[b], s[b], rows) for b in range(3)]
    monkeypatch.setattr(bank_module, "WORTH_COMPILING", 0)
    for b in range(3):
        assert torch.allclose(digits.distances(q[b], s[b], rows), plain[b], rtol=1e-12)


def test_the_same_golden_rows_with_and_without(digits, monkeypatch):
    noise = gd.DDPM()(200)
    x_t, seed = noisy(digits, noise, rows=range(6), dtype=torch.float32), list(range(6))
    subset = {name: gd.denoiser("golddiff", digits, retrieval=name) for name in ("reference", "paper")}
    plain = {name: d(x_t, noise, seed=seed).support.rows for name, d in subset.items()}
    monkeypatch.setattr(bank_module, "WORTH_COMPILING", 0)
    monkeypatch.setattr(golden, "WORTH_COMPILING", 0)
    for name, denoiser in subset.items():
        assert torch.equal(denoiser(x_t, noise, seed=seed).support.rows, plain[name])


def test_runs_of_a_mask():
    mask = torch.tensor([[1, 0, 0, 1], [1, 0, 1, 0], [0, 0, 1, 1], [1, 0, 1, 1]]).bool()
    runs = MaskRuns.of(mask)
    columns = [runs.ends[runs.start[0, m] : runs.start[0, m + 1]].tolist() for m in range(4)]
    assert columns == [[0, 2, 3, 4], [], [1, 4], [0, 1, 2, 4]]
    assert runs.largest == 3


def test_sums_over_runs_cross_tiles(monkeypatch):
    monkeypatch.setattr(locality, "TILE", 7)
    for mask in masks(60).values():
        if mask is not None:
            values = np.random.default_rng(0).normal(size=(2, 60))
            runs = MaskRuns.of(mask)
            assert np.allclose(run_sums(values, 7, runs.start, runs.ends), values @ mask.double().numpy(), atol=1e-12)
