"""The scan of the optimal denoiser, by products of floats and of bytes, against the same in float64."""

import numpy as np
import pytest
import torch

import golddiff as gd
from conftest import noisy, toy_arrays
from golddiff import scan
from golddiff.denoise import whole

LEVELS = [0.05, 0.3, 1.0, 3.0, 30.0, 1e4]


@pytest.fixture(params=["_Floats", "_Bytes"])
def products(request, monkeypatch):
    monkeypatch.setattr(whole, "scan_of", getattr(scan, request.param))


def test_digits_spell_the_number():
    random = np.random.default_rng(0)
    whole = torch.from_numpy(random.integers(-(2**23) + 2**16, 2**23 - 2**16, 1000)).double()
    spelled = scan.digits(whole[None])[0].double()
    assert torch.equal(spelled @ scan.DIGITS, whole)
    assert (spelled[:, 3] == 0).all()
    largest = torch.tensor([[0.0, 1.0, 127.0, 128.0, 2.0**31 - 2**24]], dtype=torch.float64)
    assert torch.equal(scan.digits(largest).double() @ scan.DIGITS, largest)


@pytest.mark.parametrize("rho", LEVELS)
@pytest.mark.parametrize("again", [0, 512])
@pytest.mark.usefixtures("products")
def test_the_scan_is_the_posterior_mean(digits, rho, again, monkeypatch):
    monkeypatch.setattr(whole, "MEASURED_AGAIN", again)
    monkeypatch.setattr(scan, "BLOCK_NUMBERS", 0)  # many small blocks
    noise, labels = gd.Noise(1.0, rho), [-1, 3, -1, 3]
    x_t = noisy(digits, noise, rows=range(4), dtype=torch.float32)
    denoiser = gd.denoiser("optimal", digits)
    fast, exact = denoiser(x_t, noise, labels), denoiser(x_t.double(), noise, labels)
    if again or rho >= 0.3:  # without a second measurement, float32 cannot tell near rows apart at low noise
        assert float((fast.mean - exact.mean).abs().max()) < 2e-5
        assert torch.allclose(fast.log_evidence, exact.log_evidence, rtol=1e-5, atol=1e-3)
        assert torch.allclose(fast.ess, exact.ess, rtol=1e-3)


@pytest.mark.parametrize("order", ["rising", "falling"])
@pytest.mark.usefixtures("products")
def test_rows_ever_nearer_or_ever_farther(order):
    pixels, _ = toy_arrays(700)
    nearer = np.linspace(1, 0, 700) if order == "rising" else np.linspace(0, 1, 700)
    pixels = (pixels[:1] + (pixels.astype(int) - pixels[:1]) * nearer[:, None, None, None]).astype(np.uint8)
    bank = gd.Bank.build(pixels)
    for rho in LEVELS[1:]:
        noise = gd.Noise(1.0, rho)
        x_t = bank.images(slice(0, 2) if order == "falling" else slice(698, 700))
        denoiser = gd.denoiser("optimal", bank)
        assert float((denoiser(x_t, noise).mean - denoiser(x_t.double(), noise).mean).abs().max()) < 2e-5


def test_sums_of_bytes_are_settled_before_they_overflow(monkeypatch):
    pixels = np.full((3000, 1, 8, 8), 255, np.uint8)
    pixels[::2] = 0
    bank, noise = gd.Bank.build(pixels), gd.Noise(1.0, 1e4)
    x_t = noisy(bank, noise, dtype=torch.float32)
    monkeypatch.setattr(scan, "MOST_PRODUCTS", 600)
    monkeypatch.setattr(scan, "BLOCK_NUMBERS", 0)
    monkeypatch.setattr(whole, "scan_of", scan._Bytes)
    exact = gd.denoiser("optimal", bank)(x_t.double(), noise).mean
    assert float((gd.denoiser("optimal", bank)(x_t, noise).mean - exact).abs().max()) < 1e-5


def test_images_in_parts_when_logits_would_take_too_much(digits, monkeypatch):
    noise = gd.DDPM()(500)
    x_t = noisy(digits, noise, rows=range(5), dtype=torch.float32)
    together = gd.denoiser("optimal", digits)(x_t, noise)
    monkeypatch.setattr(whole, "LOGITS_AT_ONCE", 2 * len(digits))
    apart = gd.denoiser("optimal", digits)(x_t, noise)
    assert torch.allclose(together.mean, apart.mean, atol=1e-6)


@pytest.mark.usefixtures("products")
def test_images_of_any_strides(digits):
    x_t = torch.randn(1, 8, 8, 5, generator=torch.Generator().manual_seed(0)).permute(3, 0, 1, 2)
    noise = gd.Noise(1.0, 1.0)
    denoiser = gd.denoiser("optimal", digits)
    assert torch.allclose(denoiser(x_t, noise).mean, denoiser(x_t.contiguous(), noise).mean, atol=1e-5)
