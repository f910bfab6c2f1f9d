import os

import numpy as np
import pytest
import torch

import golddiff as gd
import oracles
from conftest import outside, toy_arrays
from golddiff.locality import PCAMask

LEVELS = [900, 600, 300, 100, 0]


def rows_of(bank):
    return bank.images(slice(None), torch.float64).flatten(1).numpy()


@pytest.mark.parametrize("rule", ["output", "correlation", "published"])
@pytest.mark.parametrize("t", LEVELS)
@pytest.mark.parametrize("threshold", [0.02, 0.3])
def test_masks_are_their_formulas(toy, rule, t, threshold):
    noise = gd.DDPM()(t)
    case = (rows_of(toy), float(noise.alpha), float(noise.sigma), threshold)
    expected = oracles.published_mask(*case) if rule == "published" else oracles.stable_mask(*case, rule)
    assert np.array_equal(PCAMask(toy, threshold, rule).mask(noise).numpy(), expected)


def test_threshold_zero_of_the_published_rule_keeps_the_ratios(toy):
    noise = gd.DDPM()(500)
    w = oracles.pca_weights(rows_of(toy), float(noise.alpha), float(noise.sigma))
    mask = PCAMask(toy, 0.0, "published").mask(noise).numpy()
    assert np.abs(mask - w / w.diagonal()[:, None]).max() < 1e-9


@pytest.mark.parametrize("t", LEVELS)
def test_every_pixel_sees_itself(digits, t):
    assert PCAMask(digits).mask(gd.DDPM()(t)).diagonal().all()


@pytest.mark.parametrize("t", LEVELS)
def test_a_constant_pixel_changes_no_other_entry(t):
    pixels, _ = toy_arrays(200)
    wider = np.concatenate([pixels, np.full((200, 3, 4, 1), 201, dtype=np.uint8)], axis=3)
    noise = gd.DDPM()(t)
    narrow = PCAMask(gd.Bank.build(pixels)).mask(noise).reshape(3, 4, 5, 3, 4, 5)
    wide = PCAMask(gd.Bank.build(wider)).mask(noise).reshape(3, 4, 6, 3, 4, 6)
    assert torch.equal(wide[:, :, :5, :, :, :5], narrow)
    constant = torch.zeros(3, 4, 6, dtype=torch.bool)
    constant[:, :, 5] = True
    flat, c = wide.reshape(72, 72), constant.flatten()
    assert torch.equal(flat[c], torch.eye(72, dtype=torch.bool)[c])
    assert torch.equal(flat[:, c], torch.eye(72, dtype=torch.bool)[:, c])


def same_in_float32(bank: gd.Bank, t: int) -> float:
    """Share of entries that differ between the pixels as read in float64 and in float32."""
    masks = [
        PCAMask(gd.Bank.build(bank.images(slice(None), dtype).numpy(), layout="NCHW")).mask(gd.DDPM()(t))
        for dtype in (torch.float32, torch.float64)
    ]
    return float((masks[0] != masks[1]).double().mean())


@pytest.mark.parametrize("t", LEVELS)
def test_float32_pixels_give_the_same_mask_on_digits(digits, t):
    assert same_in_float32(digits, t) <= 1e-6


@pytest.mark.parametrize("name", ["mnist", "fashion_mnist"])
def test_float32_pixels_give_the_same_mask_on_real_data(name):
    outside("GOLDDIFF_DATA")
    bank = gd.Bank.build(name, limit=2000)
    banks = [gd.Bank.build(bank.images(slice(None), d).numpy(), layout="NCHW") for d in (torch.float32, torch.float64)]
    differing = [
        float((PCAMask(banks[0]).mask(gd.DDPM()(t)) != PCAMask(banks[1]).mask(gd.DDPM()(t))).double().mean())
        for t in range(0, 1000, 100)
    ]
    assert max(differing) <= 1e-6, differing


def test_masks_are_kept_with_the_bank(tmp_path):
    bank = gd.Bank.build("digits", tmp_path / "bank", limit=300)
    noise = gd.DDPM()(400)
    first = PCAMask(bank).mask(noise)
    files = sorted(p.name for p in (tmp_path / "bank" / "derived").iterdir())
    assert sum(name.startswith("mask-") for name in files) == 1
    reopened = PCAMask(gd.Bank.open(tmp_path / "bank"))
    reopened._stable = None  # it must not be computed again
    assert torch.equal(reopened.mask(noise), first)


def test_a_bank_that_cannot_be_written_still_works(tmp_path):
    bank = gd.Bank.build("digits", tmp_path / "bank", limit=300)
    folder = tmp_path / "bank"
    folder.chmod(0o555)
    (folder / "derived").chmod(0o555)
    try:
        mask = PCAMask(bank).mask(gd.DDPM()(400))
    finally:
        folder.chmod(0o755)
        (folder / "derived").chmod(0o755)
    assert mask.shape == (64, 64)
    if os.getuid() != 0:
        assert not list((folder / "derived").glob("mask-*"))


def test_what_is_kept_beside_a_bank_can_be_bounded(tmp_path):
    bank = gd.Bank.build("digits", tmp_path / "bank", limit=300)
    free = [PCAMask(gd.Bank.open(bank.path)).mask(gd.DDPM()(t)) for t in (100, 500, 900)]
    files = list((bank.path / "derived").glob("mask-*"))
    largest = max(file.stat().st_size for file in files)
    for file in files:
        file.unlink()
    bank.keep_at_most(2 * largest)
    for t, expected in zip((100, 500, 900), free, strict=True):
        assert torch.equal(PCAMask(bank).mask(gd.DDPM()(t)), expected)
    kept = sum(file.stat().st_size for file in (bank.path / "derived").glob("mask-*"))
    assert 0 < kept <= 2 * largest


def test_masks_of_class_statistics_differ(toy):
    noise = gd.DDPM()(300)
    rows = toy.images(toy.rows_of(2), torch.float64).flatten(1).numpy()
    expected = oracles.stable_mask(rows, float(noise.alpha), float(noise.sigma), 0.1, "output")
    by_class = PCAMask(toy, 0.1, statistics="class")
    assert np.array_equal(by_class.mask(noise, 2).numpy(), expected)
    assert torch.equal(by_class.mask(noise, None), PCAMask(toy, 0.1).mask(noise))
