"""The baselines beside golddiff: Kamb's machines, crops, smoothing, nearest neighbours."""

import json
import math

import numpy as np
import pytest
import torch

import golddiff as gd
import oracles
from conftest import noisy, outside, toy_arrays
from golddiff.locality import Windows
from golddiff.noise import EDM

LEVELS = [900, 500, 200, 0]
SCHEDULE = gd.DDPM()


def rows_of(bank):
    return bank.images(slice(None), torch.float64).numpy()


@pytest.mark.parametrize("name", ["mnist", "cifar10"])
@pytest.mark.parametrize("t", [900, 500, 200, 100])
def test_agreement_with_the_released_code_of_kamb(name, t):
    stored = np.load(outside("GOLDDIFF_REFERENCE") / f"kamb_{name}.npz")
    outside("GOLDDIFF_DATA")
    bank = gd.Bank.build(name, limit=int(stored["n_rows"]))
    x_t, noise = torch.from_numpy(stored[f"x_t_{t}"]), SCHEDULE(t)
    for key in stored.files:
        method, *window, time = key.split("_")
        if time != f"t{t}" or method == "x":
            continue
        options = {} if method == "is" else {"window": int(window[0][1:])}
        ours = gd.denoiser({"is": "optimal"}.get(method, method), bank, **options)(x_t, noise).mean
        assert float((ours - torch.from_numpy(stored[key])).abs().max()) < 1e-3, key


def patches_of_image(image, window):
    """Zero-padded patches around every pixel, `(H, W, C, window, window)`."""
    h = window // 2
    padded = np.pad(image, ((0, 0), (h, h), (h, h)))
    _, height, width = image.shape
    return np.array([[padded[:, y : y + window, x : x + window] for x in range(width)] for y in range(height)])


@pytest.mark.parametrize("t", LEVELS)
@pytest.mark.parametrize("name", ["ls", "els", "bbels"])
def test_kamb_machines_are_their_formulas(name, t):
    pixels, _ = toy_arrays(5, (2, 6, 5))
    bank, noise, window, h = gd.Bank.build(pixels, layout="NCHW"), SCHEDULE(t), 3, 1
    alpha, sigma = float(noise.alpha), float(noise.sigma)
    x_t = noisy(bank, noise, rows=[1, 3])
    posterior = gd.denoiser(name, bank, window=window)(x_t, noise)
    rows = rows_of(bank)
    for b in range(2):
        query = patches_of_image(x_t[b].numpy(), window)
        if name == "els":
            padded = np.pad(x_t[b].numpy(), ((0, 0), (h, h), (h, h)), mode="wrap")
            query = np.array([[padded[:, y : y + 3, x : x + 3] for x in range(5)] for y in range(6)])
        candidates = [patches_of_image(row, window) for row in rows]
        inside = [(y, x) for y in range(h, 6 - h) for x in range(h, 5 - h)]
        for y in range(6):
            for x in range(5):
                ys = [y] if name == "ls" or (name == "bbels" and not h <= y < 6 - h) else range(h, 6 - h)
                xs = [x] if name == "ls" or (name == "bbels" and not h <= x < 5 - h) else range(h, 5 - h)
                places = inside if name == "els" else [(i, j) for i in ys for j in xs]
                logits, values = [], []
                for row, patches in zip(rows, candidates, strict=True):
                    for i, j in places:
                        logits.append(-((query[y, x] - alpha * patches[i, j]) ** 2).sum() / (2 * sigma**2))
                        values.append(row[:, i, j])
                weights, evidence, ess = oracles.posterior(logits)
                mean = sum(w * v for w, v in zip(weights, values, strict=True))
                assert np.abs(posterior.mean[b, :, y, x].numpy() - mean).max() < 1e-8
                assert float(posterior.log_evidence[b, 0, y, x]) == pytest.approx(evidence, abs=1e-6, rel=1e-9)
                assert float(posterior.ess[b, 1, y, x]) == pytest.approx(ess, rel=1e-6)


@pytest.mark.parametrize("t", LEVELS)
def test_crops_are_their_formula(t):
    pixels, _ = toy_arrays(6, (2, 5, 4))
    bank, noise, side = gd.Bank.build(pixels, layout="NCHW"), SCHEDULE(t), 3
    x_t, rows = noisy(bank, noise, rows=[2]), rows_of(bank)
    total, count = np.zeros((2, 5, 4)), np.zeros((2, 5, 4))
    for y in range(5 - side + 1):
        for x in range(4 - side + 1):
            crop = (slice(None), slice(y, y + side), slice(x, x + side))
            size = 2 * side * side
            mean, _, _ = oracles.optimal(
                x_t[0].numpy()[crop].reshape(size), np.array([r[crop].reshape(size) for r in rows]),
                float(noise.alpha), float(noise.sigma),
            )  # fmt: skip
            total[crop] += mean.reshape(2, side, side)
            count[crop] += 1
    posterior = gd.denoiser("pspc", bank, window=side)(x_t, noise)
    assert np.abs(posterior.mean[0].numpy() - total / count).max() < 1e-9
    chosen, weights = posterior.weights(0)
    mean = (weights * torch.from_numpy(rows[chosen]).flatten(1)).sum(0)
    assert torch.allclose(mean, posterior.mean[0].flatten(), atol=1e-9)


def test_windows_as_large_as_the_image_are_the_optimal_denoiser(toy):
    noise = SCHEDULE(400)
    x_t = noisy(toy, noise)
    optimal = gd.denoiser("optimal", toy)(x_t, noise).mean
    for name, side in (("ls", 9), ("pspc", 9), ("bbels", 9)):
        assert torch.allclose(gd.denoiser(name, toy, window=side)(x_t, noise).mean, optimal, atol=1e-9)


def test_the_golden_subset_plugs_into_ls(toy):
    noise = SCHEDULE(300)
    x_t = noisy(toy, noise)
    everything = gd.denoiser("golddiff", toy, locality="ls", window=3, retrieval="reference", k_min=60, k_max=60)
    exact = gd.denoiser("ls", toy, window=3)(x_t, noise)
    assert torch.allclose(everything(x_t, noise).mean, exact.mean, atol=1e-10)
    few = gd.denoiser("golddiff", toy, locality="ls", window=3, retrieval="reference")(x_t, noise)
    assert few.support.rows.shape[-1] < 60


def test_weights_over_patches(toy):
    noise = SCHEDULE(500)
    x_t = noisy(toy, noise)
    images = toy.images(slice(None), torch.float64)
    posterior = gd.denoiser("els", toy, window=3)(x_t, noise)
    where, weights = posterior.weights(1, [7, 27])
    values = images[where[:, 0], :, where[:, 1], where[:, 2]]
    for i, pixel in enumerate((7, 27)):
        channel = pixel // 20
        assert float(weights[:, i] @ values[:, channel]) == pytest.approx(float(posterior.mean[1].flatten()[pixel]))
    with pytest.raises(gd.GolddiffError, match="say for which pixels"):
        posterior.weights(1)
    with pytest.raises(gd.GolddiffError, match="one at a time"):
        gd.denoiser("bbels", toy, window=3)(x_t, noise).weights(0, [0, 7])


@pytest.mark.parametrize("antithetic", [False, True])
def test_smoothing_is_the_mean_around(toy, antithetic):
    noise = SCHEDULE(300)
    x_t = noisy(toy, noise)
    optimal = gd.denoiser("optimal", toy)
    exact = optimal(x_t, noise)
    still = gd.denoiser("cfdm", toy, kappa=0.0, draws=2, antithetic=antithetic)(x_t, noise, seed=[1, 2, 3])
    assert torch.allclose(still.mean, exact.mean, atol=1e-12)
    assert torch.allclose(still.log_evidence, exact.log_evidence, atol=1e-9)
    moved = gd.denoiser("cfdm", toy, kappa=0.3, draws=4, antithetic=antithetic)
    a, b = moved(x_t, noise, seed=[1, 2, 3]), moved(x_t[1:2], noise, seed=[2])
    assert torch.allclose(a.mean[1], b.mean[0], atol=1e-12)
    assert not torch.allclose(a.mean, exact.mean, atol=1e-6)
    rows, weights = a.weights(0)
    assert torch.allclose(weights @ toy.images(rows, torch.float64).flatten(1), a.mean[0].flatten(), atol=1e-10)


def test_proposals_are_unbiased_up_to_their_noise(toy):
    noise = SCHEDULE(700)
    x_t = noisy(toy, noise, rows=[4])
    exact = gd.denoiser("optimal", toy)(x_t, noise)
    many = gd.denoiser("knn", toy, neighbours=10, draws=20_000)(x_t, noise, seed=[3])
    assert float((many.mean - exact.mean).abs().max()) < 0.02
    assert float(many.log_evidence) == pytest.approx(float(exact.log_evidence), abs=0.02)
    all_near = gd.denoiser("knn", toy, neighbours=10_000, draws=50)(x_t, noise, seed=[3])
    assert float(all_near.log_evidence) == pytest.approx(float(exact.log_evidence), abs=1e-9)
    order = torch.randperm(60, generator=torch.Generator().manual_seed(0))
    pixels, labels = toy_arrays()
    other = gd.Bank.build(pixels[order.numpy()], labels=labels[order.numpy()])
    again = gd.denoiser("knn", other, neighbours=10, draws=50)(x_t, noise, seed=[3])
    first = gd.denoiser("knn", toy, neighbours=10, draws=50)(x_t, noise, seed=[3])
    assert torch.allclose(again.mean, first.mean, atol=1e-6)


def test_nearest_is_the_nearest(toy):
    for t in LEVELS:
        noise = SCHEDULE(t)
        x_t = noisy(toy, noise, rows=[5, 9])
        posterior = gd.denoiser("nearest", toy)(x_t, noise)
        rows = rows_of(toy).reshape(60, -1)
        for b in range(2):
            best = oracles.nearest(x_t[b].flatten().numpy(), rows, float(noise.alpha), 1)[0]
            assert torch.allclose(posterior.mean[b], toy.images(slice(best, best + 1), torch.float64)[0])
            assert posterior.support.rows_of(b).tolist() == [best]


def test_windows_follow_the_noise(tmp_path):
    table = Windows(None, (3, 32, 32))
    levels = EDM().levels(18)
    assert [table(noise) for _, noise in levels] == [63] * 7 + [23, 15, 11, 7, 5] + [3] * 6
    assert Windows(7, (3, 32, 32))(levels[0][1]) == 7
    file = tmp_path / "found.json"
    file.write_text(json.dumps({"windows": [[0.1, 3], [10.0, 15]]}))
    found = Windows(str(file), (3, 32, 32))
    assert [found(gd.Noise(1.0, rho)) for rho in (0.01, 0.2, 5.0, 100.0)] == [3, 3, 15, 15]
    assert Windows(found.table, (3, 32, 32)).table == found.table
    assert found(gd.Noise(0.0, 1.0)) == 15
    for wrong in (4, 0, True, [], [[1.0, 2]], [[1.0]], [["a", 3]], "nothing.json", [[-1.0, 3]], [[math.nan, 3]]):
        with pytest.raises(gd.GolddiffError, match="window|calibration"):
            Windows(wrong, (3, 32, 32))


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("cfdm", {"kappa": -1}, "kappa"),
        ("cfdm", {"draws": 3, "antithetic": True}, "even"),
        ("knn", {"neighbours": 0}, "neighbours"),
        ("knn", {"draws": 1.5}, "draws"),
        ("els", {"window": 4}, "odd"),
        ("golddiff", {"locality": "els"}, "locality"),
        ("golddiff", {"window": 3}, "no effect"),
        ("golddiff", {"locality": "ls", "mask": np.ones((60, 60), bool)}, "no effect"),
        ("golddiff", {"locality": "optimal", "threshold": 0.3}, "no effect"),
    ],
)
def test_bad_options_are_refused(toy, name, options, said):
    with pytest.raises(gd.GolddiffError, match=said):
        gd.denoiser(name, toy, **options)


def test_few_neighbours_at_low_noise(toy):
    noise = gd.Noise(1.0, 0.01)
    x_t = toy.images(slice(0, 1), torch.float64) + 0.01
    posterior = gd.denoiser("knn", toy, neighbours=1, draws=4)(x_t, noise)
    assert float(posterior.weights(0)[1].sum()) == pytest.approx(1)


def test_large_images_need_no_mask_for_a_window(toy, monkeypatch):
    monkeypatch.setattr("golddiff.locality.LARGEST_MASK", 10)
    assert gd.denoiser("ls", toy, window=3).locality.runs(SCHEDULE(5)) is None
