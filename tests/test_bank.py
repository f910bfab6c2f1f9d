import json
import subprocess
import sys

import numpy as np
import pytest
import torch

import golddiff as gd
import oracles
from conftest import noisy, toy_arrays
from golddiff.locality import MASK_RULES, PCAMask
from golddiff.proxy import Pooling
from test_images import write_idx


def covariance_of(spectrum):
    return torch.cat([block for _, block in spectrum.filter(0.0, 1.0)[1]()], dim=1).numpy()


def test_rows_come_back_in_minus_one_to_one(toy):
    pixels, labels = toy_arrays()
    rows = torch.tensor([5, 0, 59])
    expected = torch.from_numpy(pixels[rows]).double() / 127.5 - 1
    assert torch.allclose(toy.images(rows, torch.float64), expected, atol=1e-14)
    assert torch.equal(toy.labels, torch.from_numpy(labels))
    assert torch.allclose(toy.norms, toy.centred(slice(None), torch.float64).square().sum(1), rtol=0, atol=0)


@pytest.mark.parametrize("count", [200, 60, 20, 2])
@pytest.mark.parametrize("kind", [np.uint8, np.float32])
def test_spectrum_is_that_of_the_covariance(count, kind):
    pixels, _ = toy_arrays(count)
    pixels[:, 0, 1, 1] = 77  # a constant pixel
    if kind is np.float32:
        pixels = pixels.astype(np.float32) / 127.5 - 1
    bank = gd.Bank.build(pixels)
    rows = bank.images(slice(None), torch.float64).flatten(1).numpy()
    mean, cov = oracles.covariance(rows)
    spectrum = bank.spectrum()
    assert np.abs(spectrum.mean.numpy() - mean).max() < 1e-12
    assert np.abs(covariance_of(spectrum) - cov).max() < 1e-12
    assert np.abs(spectrum.variances.numpy() - cov.diagonal()).max() < 1e-12
    u = spectrum.eigenvectors
    assert (u.T @ u - torch.eye(u.shape[1])).abs().max() < 1e-9
    constant = 1 * 5 + 1
    assert not spectrum.varying[constant]
    assert u[constant].abs().max() == 0


@pytest.mark.parametrize("count", [200, 40])
@pytest.mark.parametrize("kind", [np.uint8, np.float32])
def test_large_images_keep_the_covariance_itself(count, kind, monkeypatch):
    pixels, labels = toy_arrays(count)
    pixels[:, 0, 1, 1] = 77  # a constant pixel
    if kind is np.float32:
        pixels = pixels.astype(np.float32) / 127.5 - 1
    eigen, dense = gd.Bank.build(pixels, labels=labels), gd.Bank.build(pixels, labels=labels)
    spectra = {"eigen": [eigen.spectrum(), eigen.spectrum(1)]}
    monkeypatch.setattr("golddiff.bank.LARGEST_EIGENBASIS", 4)
    monkeypatch.setattr("golddiff.spectrum.AGREES", -1.0)  # no short cut
    spectra["dense"] = [dense.spectrum(), dense.spectrum(1)]
    x = torch.randn(5, 60, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x[:, 6] = 0  # nothing is there where nothing varies
    for a, b in zip(spectra["eigen"], spectra["dense"], strict=True):
        assert type(a).__name__ == "Spectrum"
        assert type(b).__name__ == "DenseCovariance"
        assert torch.allclose(a.mean, b.mean, atol=1e-12)
        assert torch.equal(a.varying, b.varying)
        for alpha, sigma in ((0.0, 1.0), (1e-5, 1.0), (0.3, 0.9), (1.0, 0.1), (1.0, 1e-2)):
            (own, columns), (own_b, columns_b) = a.filter(alpha, sigma), b.filter(alpha, sigma)
            w, w_b = (torch.cat([block.clone() for _, block in c()], dim=1) for c in (columns, columns_b))
            assert torch.allclose(own, own_b, rtol=1e-6, atol=1e-9)
            assert torch.allclose(w, w_b, rtol=1e-6, atol=1e-7)
        levels = torch.tensor([[0.3, 0.9], [1.0, 0.1], [0.3, 0.9], [0.0, 1.0], [1.0, 0.01]], dtype=torch.float64)
        results = [one.denoise(x, levels[:, :1], levels[:, 1:]) for one in (a, b)]
        assert torch.allclose(results[0][0], results[1][0], atol=1e-8)
        assert torch.allclose(results[0][1], results[1][1], rtol=1e-8)


def test_masks_and_wiener_of_large_images_are_the_same(monkeypatch):
    pixels, _ = toy_arrays(200)
    noise = gd.DDPM()(400)
    eigen, dense = gd.Bank.build(pixels), gd.Bank.build(pixels)
    x_t = noisy(eigen, noise)
    wanted = [PCAMask(eigen, 0.02, rule).mask(noise) for rule in MASK_RULES]
    mean = gd.denoiser("wiener", eigen)(x_t, noise).mean
    monkeypatch.setattr("golddiff.bank.LARGEST_EIGENBASIS", 4)
    monkeypatch.setattr("golddiff.spectrum.AGREES", -1.0)  # no short cut
    assert all(torch.equal(PCAMask(dense, 0.02, r).mask(noise), m) for r, m in zip(MASK_RULES, wanted, strict=True))
    assert torch.allclose(gd.denoiser("wiener", dense)(x_t, noise).mean, mean, atol=1e-10)


def test_spectrum_of_a_class(toy):
    rows = toy.images(toy.rows_of(1), torch.float64).flatten(1).numpy()
    mean, cov = oracles.covariance(rows)
    spectrum = toy.spectrum(1)
    assert np.abs(spectrum.mean.numpy() - mean).max() < 1e-12
    assert np.abs(covariance_of(spectrum) - cov).max() < 1e-12


def test_statistics_do_not_depend_on_the_order_of_rows():
    pixels, labels = toy_arrays(200)
    order = np.random.default_rng(1).permutation(200)
    a, b = gd.Bank.build(pixels, labels=labels), gd.Bank.build(pixels[order], labels=labels[order])
    assert torch.equal(a.spectrum().eigenvectors, b.spectrum().eigenvectors)
    assert torch.equal(a.keys[torch.from_numpy(order)], b.keys)
    assert a.fingerprint != b.fingerprint


def test_fingerprint_sees_pixels_and_labels():
    pixels, labels = toy_arrays()
    prints = {gd.Bank.build(pixels, labels=labels).fingerprint}
    pixels[3, 1, 2, 2] ^= 1
    prints.add(gd.Bank.build(pixels, labels=labels).fingerprint)
    labels[3] = (labels[3] + 1) % 3
    prints.add(gd.Bank.build(pixels, labels=labels).fingerprint)
    assert len(prints) == 3


def test_copies_of_an_image_have_keys_of_their_own():
    pixels, _ = toy_arrays(10)
    bank = gd.Bank.build(np.concatenate([pixels, pixels, pixels[:2]]))
    assert len(bank.keys.unique()) == 22


@pytest.mark.parametrize(
    ("side", "cells"),
    [(64, 16), (32, 16), (28, 14), (8, 8), (5, 5), (1, 1), (20, 10), (29, 16), (34, 16), (17, 16)],
)
def test_pooling_is_a_projection_that_bounds_distances(side, cells):
    pooling = Pooling((2, side, side))
    assert pooling.size == 2 * cells**2
    a, b = torch.randn(2, 4, 2 * side * side, dtype=torch.float64)
    small, full = (pooling(a) - pooling(b)).square().sum(1), (a - b).square().sum(1)
    assert (small <= full * (1 + 1e-12)).all()
    image = a[0].reshape(2, side, side).numpy()
    assert np.abs(pooling(a[:1])[0].numpy() - oracles.pooled(image, cells, cells)).max() < 1e-12


def test_built_once_opened_at_once(tmp_path, digits):
    bank = gd.Bank.build("digits", tmp_path / "bank")
    assert bank.fingerprint == digits.fingerprint
    again = gd.Bank.open(tmp_path / "bank")
    assert torch.equal(again.pixels, bank.pixels)
    assert again.path == tmp_path / "bank"
    assert gd.Bank.build("digits").path == digits.path
    assert gd.Bank.build(tmp_path / "bank").path == tmp_path / "bank"
    assert [p.name for p in tmp_path.iterdir()] == ["bank"]
    assert not list((tmp_path / "bank").rglob("*.pkl"))


def test_a_bank_is_not_overwritten_without_force(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("x")
    with pytest.raises(gd.GolddiffError, match="--force"):
        gd.Bank.build("digits", tmp_path / "mine")
    assert (tmp_path / "mine" / "thesis.tex").exists()


def test_a_build_that_fails_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr("golddiff.prepare.Pooling.__call__", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        gd.Bank.build("digits", tmp_path / "bank")
    assert list(tmp_path.iterdir()) == []


def test_changed_files_are_another_bank(tmp_path):
    pixels, _ = toy_arrays()
    np.save(tmp_path / "a.npy", pixels)
    first = gd.Bank.build(tmp_path / "a.npy")
    np.save(tmp_path / "a.npy", pixels[:40])
    assert len(gd.Bank.build(tmp_path / "a.npy")) == 40
    assert len(first) == 60


@pytest.mark.parametrize("harm", ["no json", "bad json", "version", "short file", "missing file", "wrong shape"])
def test_damaged_banks_are_refused(tmp_path, harm):
    folder = tmp_path / "bank"
    gd.Bank.build("digits", folder, limit=50)
    meta = folder / "bank.json"
    if harm == "no json":
        meta.unlink()
    elif harm == "bad json":
        meta.write_text(meta.read_text()[:40])
    elif harm == "version":
        meta.write_text(json.dumps({**json.loads(meta.read_text()), "format": 99}))
    elif harm == "short file":
        (folder / "pixels.npy").write_bytes((folder / "pixels.npy").read_bytes()[:-100])
    elif harm == "missing file":
        (folder / "proxy.npy").unlink()
    else:
        np.save(folder / "labels.npy", np.zeros(7, dtype=np.int64))
    with pytest.raises(gd.GolddiffError, match="build|not a bank"):
        gd.Bank.open(folder)


@pytest.mark.parametrize("kind", ["pictures", "file"])
def test_force_replaces_banks_only(tmp_path, kind):
    out = tmp_path / "mine"
    if kind == "file":
        out.write_text("thesis")
    else:
        out.mkdir()
        (out / "thesis.tex").write_text("thesis")
    with pytest.raises(gd.GolddiffError, match="is no bank"):
        gd.Bank.build("digits", out, force=True, limit=20)
    assert (out if kind == "file" else out / "thesis.tex").read_text() == "thesis"
    assert [p.name for p in tmp_path.iterdir()] == ["mine"]
    bank = gd.Bank.build("digits", tmp_path / "bank", limit=20)
    again = gd.Bank.build("digits", tmp_path / "bank", limit=30, force=True)
    assert (len(bank), len(again), len(gd.Bank.open(tmp_path / "bank"))) == (20, 30, 30)


def test_what_is_derived_from_another_bank_is_not_used(tmp_path):
    noise, folder = gd.DDPM()(300), tmp_path / "bank"
    old = gd.Bank.build("digits", folder, limit=100)
    new = gd.Bank.build("digits", folder, limit=400, force=True)
    PCAMask(old).mask(noise)  # written into the folder that is now the new bank's
    assert torch.equal(
        PCAMask(new).mask(noise), PCAMask(gd.Bank.build("digits", tmp_path / "b", limit=400)).mask(noise)
    )
    assert torch.equal(gd.Bank.open(folder).spectrum().mean, new.spectrum().mean)


def test_derived_files_that_were_changed_are_refused(tmp_path):
    bank = gd.Bank.build("digits", tmp_path / "bank", limit=100)
    PCAMask(bank).mask(gd.DDPM()(300))
    file = next((tmp_path / "bank" / "derived").glob("mask-*"))
    file.write_bytes(file.read_bytes()[:-1] + b"\xff")
    with pytest.raises(gd.GolddiffError, match="is damaged"):
        PCAMask(gd.Bank.open(tmp_path / "bank")).mask(gd.DDPM()(300))


def test_files_that_belong_to_a_single_file_count_too(tmp_path):
    pixels, labels = toy_arrays()
    write_idx(tmp_path / "train-images-idx3-ubyte", pixels[:, 0])
    assert gd.Bank.build(tmp_path / "train-images-idx3-ubyte").labels.max() == -1
    write_idx(tmp_path / "train-labels-idx1-ubyte", labels.astype(np.uint8))
    assert gd.Bank.build(tmp_path / "train-images-idx3-ubyte").labels.tolist() == labels.tolist()


def test_two_processes_may_build_the_same_bank(cache):
    code = "import golddiff as gd; print(gd.Bank.build('digits', limit=77).fingerprint)"
    started = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) for _ in range(3)]
    prints = {process.communicate()[0].strip() for process in started}
    assert [process.returncode for process in started] == [0, 0, 0]
    assert len(prints) == 1
    assert not [p for p in (cache / "banks").iterdir() if p.name.startswith(".")]


@pytest.mark.parametrize(
    "source",
    [None, 3, object(), {"a": 1}, np.zeros((3, 0, 4, 1), np.uint8), np.zeros((3, 4, 4, 1), np.int32), [], b"x"],
)
def test_what_is_no_source_is_refused(source):
    with pytest.raises(gd.GolddiffError):
        gd.Bank.build(source)


@pytest.mark.parametrize(
    "labels", [[0.5] * 60, [-2] * 60, [2**40] * 60, ["a"] * 60, [0] * 59, np.full(60, 2**64 - 1, np.uint64)]
)
def test_bad_labels_are_refused(labels):
    with pytest.raises(gd.GolddiffError):
        gd.Bank.build(toy_arrays()[0], labels=labels)
