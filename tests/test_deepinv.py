"""Denoisers as deepinv's: its conventions, and its own solvers with them."""

import re
import sys
from pathlib import Path

import pytest
import torch

import golddiff as gd
from torchvision_stand_in import stand_in_for_torchvision

with stand_in_for_torchvision():
    deepinv = pytest.importorskip("deepinv")
    from golddiff.adapters.deepinv import GoldDiffDenoiser

NOISE = 0.02


@pytest.fixture(scope="module")
def held_out():
    """A bank of digits without every 300th, and those, in [0, 1]."""
    images = gd.open_source("mnist5k")
    pixels = torch.from_numpy(images.read(0, len(images)).copy())
    out = torch.arange(len(pixels)) % 300 == 150
    return gd.Bank.build(pixels[~out][:, 0], layout="NHW"), pixels[out][:6].float() / 255


def psnr(a, x):
    return float(-10 * torch.log10((a.clamp(0, 1) - x).square().flatten(1).mean(1)).mean())


def masked(x):
    """Pictures that have lost 60 % of their pixels, and the physics of it."""
    mask = (torch.rand(1, *x.shape[1:], generator=torch.Generator().manual_seed(0)) > 0.6).float()
    noise = deepinv.physics.GaussianNoise(NOISE, rng=torch.Generator().manual_seed(1))
    physics = deepinv.physics.Inpainting(x.shape[1:], mask=mask, noise_model=noise)
    return physics(x), physics


def test_units(digits):
    denoiser = gd.denoiser("optimal", digits)
    model = GoldDiffDenoiser(denoiser)
    assert isinstance(model, deepinv.models.Denoiser)
    x = torch.rand(3, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    exact = denoiser(2 * x - 1, gd.Noise(1.0, 0.6)).mean / 2 + 0.5
    for sigma in (0.3, torch.tensor(0.3), torch.tensor([0.3]), torch.full((3,), 0.3), torch.full((3, 1, 1, 1), 0.3)):
        assert torch.allclose(model(x, sigma), exact, atol=1e-6)
    each = model(x, torch.tensor([0.3, 0.1, 0.3]))
    assert torch.allclose(each[[0, 2]], exact[[0, 2]], atol=1e-6)
    assert float((each[1] - exact[1]).abs().max()) > 1e-3
    labelled = denoiser(2 * x - 1, gd.Noise(1.0, 0.6), [1, 2, 3]).mean / 2 + 0.5
    assert torch.equal(model(x, 0.3, label=[1, 2, 3]), labelled)
    assert torch.equal(GoldDiffDenoiser(denoiser, label=[1, 2, 3])(x, 0.3, other=1), labelled)


def test_at_low_noise_it_gives_the_row_back(digits):
    x = digits.images(slice(0, 4)) / 2 + 0.5
    noisy = x + 0.01 * torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(GoldDiffDenoiser(gd.denoiser("optimal", digits))(noisy, 0.01), x, atol=1e-5)


@pytest.mark.parametrize("method", ["optimal", "pca"])
def test_gradients_are_those_of_differences(digits, method):
    model = GoldDiffDenoiser(gd.denoiser(method, digits))
    x = torch.rand(1, 1, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()
    v = torch.randn(1, 1, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    sigma = torch.tensor(0.2, requires_grad=True)
    (v * model(x, sigma)).sum().backward()
    assert sigma.grad is None
    h = 1e-6
    difference = (model(x.detach() + h * v, 0.2) - model(x.detach() - h * v, 0.2)) / (2 * h)
    assert float((x.grad * v).sum()) == pytest.approx(float((difference * v).sum()), rel=1e-5)


def test_a_gradient_that_is_not_there(digits):
    x = torch.rand(1, 1, 8, 8, requires_grad=True)
    said = GoldDiffDenoiser(gd.denoiser("pspc", digits, window=5))(x, 0.2)
    with pytest.raises(gd.GolddiffError, match="closed form"):
        said.sum().backward()


def test_errors_say_the_fix(digits):
    model = GoldDiffDenoiser(gd.denoiser("optimal", digits))
    with pytest.raises(gd.GolddiffError, match="sigma is 0"):
        model(torch.rand(1, 1, 8, 8), 0.0)
    with pytest.raises(gd.GolddiffError, match="give a tensor of shape"):
        model(torch.rand(1, 3, 8, 8), 0.1)


@pytest.mark.parametrize(("method", "gain"), [("wiener", 5), ("pca", 2)])
def test_half_quadratic_splitting_fills_the_gaps(held_out, method, gain):
    bank, x = held_out
    y, physics = masked(x)
    sigmas = torch.logspace(0, -1.7, 15)
    solver = deepinv.optim.HQS(
        prior=deepinv.optim.PnP(denoiser=GoldDiffDenoiser(gd.denoiser(method, bank))),
        data_fidelity=deepinv.optim.L2(),
        sigma_denoiser=sigmas.tolist(),
        stepsize=(sigmas / NOISE).square().tolist(),
        max_iter=len(sigmas),
        custom_init=lambda y, p: y + (1 - p.mask) * torch.randn(y.shape, generator=torch.Generator().manual_seed(0)),
    )
    with torch.no_grad():
        assert psnr(solver(y, physics), x) > psnr(y, x) + gain


def test_diffpir_draws_what_was_lost(held_out):
    bank, x = held_out
    y, physics = masked(x)
    model = GoldDiffDenoiser(gd.denoiser("golddiff", bank))
    solver = deepinv.sampling.DiffPIR(model, deepinv.optim.L2(), sigma=NOISE, max_iter=20, zeta=1.0)
    made = solver(y, physics, seed=1)
    assert psnr(made, x) > psnr(y, x) + 2
    kept = physics.mask.expand_as(x) > 0
    assert float((made - y)[kept].abs().mean()) < 2 * NOISE


def test_proximal_gradient_runs_under_autograd(held_out):
    bank, x = held_out
    y, physics = masked(x)
    model = GoldDiffDenoiser(gd.denoiser("wiener", bank))
    solver = deepinv.optim.PGD(
        prior=deepinv.optim.PnP(denoiser=model),
        data_fidelity=deepinv.optim.L2(),
        stepsize=1.0,
        sigma_denoiser=0.1,
        max_iter=30,
    )
    assert psnr(solver(y, physics).detach(), x) > psnr(y, x) + 3


def test_nobody_else_sees_the_stand_in():
    assert "torchvision" not in sys.modules or sys.modules["torchvision"].__spec__.origin


def test_examples_of_the_docs_run():
    pytest.importorskip("diffusers")
    text = (Path(__file__).parents[1] / "docs" / "adapters.md").read_text()
    names = {}
    torch.manual_seed(0)
    for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        exec(compile(block, "docs/adapters.md", "exec"), names)  # noqa: S102 - our own examples
    assert [picture.size for picture in names["pictures"]] == [(28, 28)] * 4
    assert names["threes"].shape == names["noise"].shape == names["draw"].shape == names["denoised"].shape
    assert names["images"].shape == (2, 1, 28, 28)
    assert psnr(names["draw"], names["x"]) > psnr(names["y"], names["x"]) + 2
