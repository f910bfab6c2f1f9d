"""What every denoiser must hold, over the list of their names."""

import math

import numpy as np
import pytest
import torch

import golddiff as gd
import oracles
from conftest import noisy, toy_arrays

VARIANTS = {
    "optimal": ("optimal", {}),
    "wiener": ("wiener", {}),
    "pca": ("pca", {}),
    "pca published": ("pca", {"mask_rule": "published", "threshold": 0.1}),
    "pca legacy": ("pca", {"legacy_batch": 7}),
    "golddiff": ("golddiff", {}),
    "golddiff reference": ("golddiff", {"retrieval": "reference"}),
    "golddiff paper": ("golddiff", {"retrieval": "paper"}),
    "golddiff local": ("golddiff", {"retrieval": "local", "tol": 0.2}),
    "optimal certified": ("optimal", {"retrieval": "certified", "tol": 1e-9}),
    "golddiff optimal": ("golddiff", {"locality": "optimal", "retrieval": "reference", "k_min": 9, "k_max": 15}),
    "optimal paper": ("optimal", {"retrieval": "paper", "k_min": 9, "k_max": 15}),
    "ls": ("ls", {"window": 3}),
    "golddiff ls": ("golddiff", {"locality": "ls", "window": 3, "retrieval": "reference"}),
    "els": ("els", {"window": 3}),
    "bbels": ("bbels", {"window": 3}),
    "pspc": ("pspc", {"window": 3}),
    "cfdm": ("cfdm", {"kappa": 0.2, "draws": 3}),
    "nearest": ("nearest", {}),
    "knn": ("knn", {"neighbours": 10, "draws": 30}),
}
PATCHES = ("els", "bbels")  # candidates from other places
LEVELS = [900, 500, 200, 0]
SCHEDULE = gd.DDPM()


def build(variant, bank):
    name, options = VARIANTS[variant]
    return gd.denoiser(name, bank, **options)


def rows_of(bank, dtype=torch.float64):
    return bank.images(slice(None), dtype).flatten(1).numpy()


def close(a, b, atol=1e-10):
    return float((a - b).abs().max()) <= atol


each_variant = pytest.mark.parametrize("variant", VARIANTS)
each_level = pytest.mark.parametrize("t", LEVELS)
each_type = pytest.mark.parametrize(("dtype", "atol"), [(torch.float64, 1e-9), (torch.float32, 1e-4)])


@each_level
@each_type
def test_optimal_is_its_formula(toy, t, dtype, atol):
    noise, rows = SCHEDULE(t), rows_of(toy)
    x_t = noisy(toy, noise, dtype=dtype)
    posterior = gd.denoiser("optimal", toy)(x_t, noise)
    assert posterior.mean.dtype == dtype
    for b in range(3):
        mean, evidence, ess = oracles.optimal(
            x_t[b].flatten().double().numpy(), rows, float(noise.alpha), float(noise.sigma)
        )
        assert np.abs(posterior.mean[b].flatten().numpy() - mean).max() < atol
        assert float(posterior.log_evidence[b]) == pytest.approx(evidence, abs=10 * atol, rel=10 * atol)
        assert float(posterior.ess[b]) == pytest.approx(ess, rel=10 * atol)


@each_level
@each_type
@pytest.mark.parametrize(
    "options", [{}, {"mask_rule": "published", "threshold": 0.1}, {"legacy_batch": 7}, {"mask": 1}]
)
def test_pca_is_its_formula(toy, t, dtype, atol, options):
    noise, rows = SCHEDULE(t), rows_of(toy)
    if "mask" in options:
        options = {"mask": torch.rand(60, 60, generator=torch.Generator().manual_seed(1)) < 0.2}
    denoiser = gd.denoiser("pca", toy, **options)
    mask = denoiser.locality.mask(noise).double().numpy()
    x_t = noisy(toy, noise, dtype=dtype)
    posterior = denoiser(x_t, noise)
    for b in range(2):
        case = (x_t[b].flatten().double().numpy(), rows, mask, float(noise.alpha), float(noise.sigma))
        mean, evidence, ess = oracles.masked(*case)
        if "legacy_batch" in options:
            mean = oracles.per_batch(*case, 7)
        else:
            assert np.allclose(posterior.ess[b].flatten().numpy(), ess, rtol=20 * atol)
        # batches of far rows only have large logits, and float32 knows those less well
        assert np.abs(posterior.mean[b].flatten().numpy() - mean).max() < (5 if "legacy_batch" in options else 1) * atol
        assert np.allclose(posterior.log_evidence[b].flatten().numpy(), evidence, atol=10 * atol, rtol=10 * atol)


@each_level
@each_type
def test_wiener_is_its_formula(toy, t, dtype, atol):
    noise, rows = SCHEDULE(t), rows_of(toy)
    x_t = noisy(toy, noise, dtype=dtype)
    posterior = gd.denoiser("wiener", toy)(x_t, noise)
    for b in range(3):
        mean, density = oracles.wiener(x_t[b].flatten().double().numpy(), rows, float(noise.alpha), float(noise.sigma))
        assert np.abs(posterior.mean[b].flatten().numpy() - mean).max() < atol
        assert float(posterior.log_density[b]) == pytest.approx(density, abs=1e-6)


@each_variant
@each_level
def test_weights_give_the_mean(toy, variant, t):
    denoiser, noise = build(variant, toy), SCHEDULE(t)
    if variant == "wiener":
        with pytest.raises(gd.GolddiffError, match="no rows"):
            denoiser(noisy(toy, noise), noise).weights(0)
        return
    if variant in PATCHES:
        return  # weights over patches: tests/test_baselines.py
    posterior = denoiser(noisy(toy, noise), noise, label=[-1, 1, 2])
    images = toy.images(slice(None), torch.float64).flatten(1)
    for b in range(3):
        rows, weights = posterior.weights(b)
        assert torch.allclose(weights.double().sum(0), torch.ones((), dtype=torch.float64))
        values = images[rows]
        mean = weights @ values if weights.ndim == 1 else (weights * values).sum(0)
        assert close(mean, posterior.mean[b].flatten())
        ess = 1 / weights.square().sum(0)
        if variant not in ("pca legacy", "cfdm"):
            assert close(ess / posterior.ess[b].flatten(), torch.ones(()), 1e-8)
        if weights.ndim == 2:
            some = posterior.weights(b, [5, 17])
            assert close(some[1], weights[torch.isin(rows, some[0])][:, [5, 17]])


@each_variant
def test_a_batch_is_its_images_one_by_one(toy, variant):
    denoiser = build(variant, toy)
    levels = [SCHEDULE(t) for t in (900, 100, 500, 100)]
    noise = gd.Noise([float(n.alpha) for n in levels], [float(n.sigma) for n in levels])
    x_t = torch.cat([noisy(toy, n, rows=[i], seed=i) for i, n in enumerate(levels)])
    labels, seeds = [-1, 2, 0, -1], [5, 6, 7, 8]
    together = denoiser(x_t, noise, labels, seed=seeds)
    for b in range(4):
        alone = denoiser(x_t[b : b + 1], levels[b], labels[b], seed=seeds[b])
        assert close(together.mean[b], alone.mean[0])
        assert close(together.log_evidence[b], alone.log_evidence[0], 1e-8)
        assert close(together.score()[b], alone.score()[0], 1e-5)
        if variant not in ("wiener", "cfdm"):
            assert close(together.ess[b], alone.ess[0], 1e-7)
        if variant != "wiener":
            assert torch.equal(together.support.rows_of(b), alone.support.rows_of(0))
            pixels = [31] if variant in PATCHES else None
            assert close(together.weights(b, pixels)[1], alone.weights(0, pixels)[1])


@each_variant
@each_level
@pytest.mark.parametrize("scale", [0.01, 3.7])
def test_only_ratios_matter(toy, variant, t, scale):
    denoiser, noise = build(variant, toy), SCHEDULE(t)
    x_t = noisy(toy, noise)
    a = denoiser(x_t, noise)
    b = denoiser(scale * x_t, gd.Noise(scale * noise.alpha, scale * noise.sigma))
    assert close(a.mean, b.mean, 1e-8)
    assert close(a.log_evidence, b.log_evidence, 1e-6)


@each_variant
@each_level
def test_order_of_rows_does_not_matter(variant, t):
    pixels, labels = toy_arrays()
    order = np.random.default_rng(3).permutation(60)
    banks = gd.Bank.build(pixels, labels=labels), gd.Bank.build(pixels[order], labels=labels[order])
    noise = SCHEDULE(t)
    x_t = noisy(banks[0], noise)
    a, b = (build(variant, bank)(x_t, noise, [-1, 1, 2], seed=4) for bank in banks)
    if "permutation_invariant" in build(variant, banks[0]).properties:
        assert close(a.mean, b.mean)
        assert close(a.log_evidence, b.log_evidence, 1e-8)
    else:
        assert variant == "pca legacy"


@each_variant
@each_level
def test_declared_properties_hold(toy, variant, t):
    denoiser, noise = build(variant, toy), SCHEDULE(t)
    images = toy.images(slice(None), torch.float64)
    mean = denoiser(noisy(toy, noise), noise).mean
    if "convex" in denoiser.properties:
        assert (mean >= images.amin(0) - 1e-12).all()
        assert (mean <= images.amax(0) + 1e-12).all()
    if "nearest_at_low_noise" in denoiser.properties:
        tiny = gd.Noise(1.0, 1e-3)
        x_t = images[:5] + 0.01
        assert close(denoiser(x_t, tiny).mean, images[torch.cdist(x_t.flatten(1), images.flatten(1)).argmin(1)])
    if "mean_at_high_noise" in denoiser.properties:
        for noise in (gd.Noise(1.0, 1e7), gd.Noise(0.0, 1.0)):
            x_t = torch.randn(3, *toy.shape, dtype=torch.float64) * noise.sigma
            assert close(denoiser(x_t, noise).mean, images.mean(0), 1e-5)


@each_variant
def test_alpha_zero_is_legal_and_free_of_nan(toy, variant):
    x_t = torch.randn(2, *toy.shape, dtype=torch.float32)
    posterior = build(variant, toy)(x_t, gd.Noise(0.0, 1.0))
    if variant in (*PATCHES, "knn"):  # the mean of all patches, or of rows drawn
        assert bool(posterior.mean.isfinite().all())
        return
    rows = posterior.weights(0)[0] if posterior.support else torch.arange(60)
    batches = toy.images(rows, torch.float64).split(7 if variant == "pca legacy" else len(rows))
    plain = torch.stack([batch.mean(0) for batch in batches]).mean(0)
    assert close(posterior.mean[0].double(), plain, 1e-6)


@each_level
def test_full_subset_is_the_exact_denoiser(toy, t):
    noise = SCHEDULE(t)
    x_t = noisy(toy, noise)
    for retrieval in ("paper", "reference"):
        everything = {"retrieval": retrieval, "k_min": 1.0, "k_max": 1.0}
        assert close(
            gd.denoiser("golddiff", toy, **everything)(x_t, noise).mean,
            gd.denoiser("pca", toy)(x_t, noise).mean,
        )
        whole = gd.denoiser("golddiff", toy, locality="optimal", **everything)(x_t, noise)
        exact = gd.denoiser("optimal", toy)(x_t, noise)
        assert close(whole.mean, exact.mean)
        assert close(whole.log_evidence, exact.log_evidence, 1e-8)


@each_level
def test_a_mask_of_ones_is_optimal(toy, t):
    noise = SCHEDULE(t)
    x_t = noisy(toy, noise)
    local = gd.denoiser("pca", toy, mask=torch.ones(60, 60, dtype=torch.bool))(x_t, noise)
    whole = gd.denoiser("optimal", toy)(x_t, noise)
    assert close(local.mean, whole.mean)
    assert close(local.log_evidence, whole.log_evidence[:, None, None, None], 1e-8)


def test_an_empty_column_gives_the_plain_mean(toy):
    mask = torch.eye(60, dtype=torch.bool)
    mask[:, 7] = False
    noise = SCHEDULE(100)
    posterior = gd.denoiser("pca", toy, mask=lambda noise: mask)(noisy(toy, noise), noise)
    plain = toy.images(slice(None), torch.float64).mean(0).flatten()
    assert close(posterior.mean.flatten(1)[:, 7], plain[7])
    assert close(posterior.ess.flatten(1)[:, 7], torch.tensor(60.0), 1e-9)


def test_constant_pixels_are_predicted_by_their_value():
    pixels, _ = toy_arrays()
    pixels[:, 1, 2, 3] = 200
    bank = gd.Bank.build(pixels)
    for variant in VARIANTS.keys() - PATCHES:
        for t in LEVELS:
            mean = build(variant, bank)(noisy(bank, SCHEDULE(t)), SCHEDULE(t)).mean
            assert close(mean[:, 1, 2, 3], torch.tensor(200 / 127.5 - 1), 1e-6), variant


@pytest.mark.parametrize("t", [900, 500, 300])
def test_jacobian_of_optimal_is_the_posterior_covariance(toy, t):
    noise, denoiser = SCHEDULE(t), gd.denoiser("optimal", toy)
    x_t = noisy(toy, noise, rows=[0])
    rows, w = denoiser(x_t, noise).weights(0)
    x = toy.images(rows, torch.float64).flatten(1)
    centred = x - w @ x
    covariance = (centred * w[:, None]).T @ centred
    expected = noise.alpha / noise.sigma**2 * covariance
    h = 1e-5
    for n in range(0, 60, 7):
        step = torch.zeros(60, dtype=torch.float64)
        step[n] = h
        up, down = (denoiser(x_t + sign * step.reshape(x_t.shape), noise).mean.flatten() for sign in (1, -1))
        assert close((up - down) / (2 * h), expected[n], 1e-6 * max(1.0, float(expected.abs().max())))


def test_score_is_the_gradient_of_the_log_density(toy):
    noise = SCHEDULE(400)
    x_t = noisy(toy, noise, rows=[0])
    for name in ("optimal", "wiener"):
        denoiser = gd.denoiser(name, toy)
        score = denoiser(x_t, noise).score().flatten()
        for n in (0, 13, 59):
            step = torch.zeros(60, dtype=torch.float64)
            step[n] = 1e-5
            up, down = (denoiser(x_t + s * step.reshape(x_t.shape), noise).log_density for s in (1, -1))
            assert float((up - down) / 2e-5) == pytest.approx(float(score[n]), rel=1e-5)


def test_log_density_of_one_row_is_the_normal_density():
    bank = gd.Bank.build(toy_arrays(1)[0])
    noise, x_t = gd.Noise(0.8, 0.6), torch.randn(1, 3, 4, 5, dtype=torch.float64)
    rest = x_t - 0.8 * bank.images(slice(None), torch.float64)
    expected = -float(rest.square().sum()) / 0.72 - 30 * math.log(2 * math.pi * 0.36)
    assert float(gd.denoiser("optimal", bank)(x_t, noise).log_density) == pytest.approx(expected)


def test_optimal_becomes_wiener_on_gaussian_data():
    rng = np.random.default_rng(0)
    errors = []
    for count in (300, 30000):
        data = 0.3 * rng.normal(size=(count, 1, 1, 2)) @ np.array([[1.0, 0.4], [0.0, 0.7]])
        bank = gd.Bank.build(data, layout="NCHW")
        x_t, noise = torch.tensor([[[[0.2, -0.1]]], [[[0.5, 0.3]]]], dtype=torch.float64), gd.Noise(1.0, 0.5)
        a, b = (gd.denoiser(name, bank)(x_t, noise).mean for name in ("optimal", "wiener"))
        errors.append(float((a - b).abs().max()))
    assert errors[1] < 0.005
    assert errors[1] < errors[0]


def test_wiener_leaves_whitened_noise_on_gaussian_trajectories(toy):
    noise = SCHEDULE(300)
    posterior = gd.denoiser("wiener", toy)(noisy(toy, noise), noise)
    rebuilt = noise.alpha * posterior.mean + noise.sigma * posterior.eps()
    assert close(rebuilt, posterior.x_t)


def test_draws_follow_the_weights(toy):
    noise = SCHEDULE(800)
    posterior = gd.denoiser("optimal", toy)(noisy(toy, noise, rows=[0]), noise)
    _, weights = posterior.weights(0)
    counts = torch.bincount(torch.cat([posterior.draw(seed) for seed in range(3000)]), minlength=60) / 3000
    assert close(counts, weights, 5 * float((weights.max() / 3000).sqrt()))
    assert torch.equal(posterior.draw(3), posterior.draw(3))


@each_type
@pytest.mark.parametrize("rho", [1e-4, 1e-2, 1.0, 1e2, 1e4])
def test_optimal_is_safe_at_all_levels(digits, rho, dtype, atol):
    noise = gd.Noise(1.0, rho)
    x_t = noisy(digits, noise, rows=range(6), dtype=dtype)
    exact = gd.denoiser("optimal", digits)(x_t.double(), noise)
    logits = -(x_t.double().flatten(1)[:, None] - torch.from_numpy(rows_of(digits))[None]).square().sum(2) / (
        2 * rho**2
    )
    mean = logits.softmax(1) @ torch.from_numpy(rows_of(digits))
    assert close(exact.mean.flatten(1), mean, 1e-9)
    assert close(gd.denoiser("optimal", digits)(x_t, noise).mean.double(), exact.mean, 10 * atol)


@pytest.mark.parametrize(
    ("x_t", "noise", "label", "message"),
    [
        (torch.zeros(1, 3, 4, 4), gd.Noise(1, 1), None, "shape"),
        (torch.zeros(3, 4, 5), gd.Noise(1, 1), None, "shape"),
        (torch.zeros(0, 3, 4, 5), gd.Noise(1, 1), None, "no images"),
        (torch.zeros(1, 3, 4, 5, dtype=torch.float16), gd.Noise(1, 1), None, "float32"),
        (torch.zeros(1, 3, 4, 5, dtype=torch.int64), gd.Noise(1, 1), None, "float32"),
        (torch.full((1, 3, 4, 5), math.nan), gd.Noise(1, 1), None, "NaN"),
        (np.zeros((1, 3, 4, 5)), gd.Noise(1, 1), None, "tensor"),
        (torch.zeros(1, 3, 4, 5), gd.Noise(1, 0), None, "sigma is 0"),
        (torch.zeros(1, 3, 4, 5), 0.5, None, "Noise"),
        (torch.zeros(2, 3, 4, 5), gd.Noise([1, 1, 1], 1), None, "noise levels"),
        (torch.zeros(1, 3, 4, 5), gd.Noise(1, 1), 12, "label 12"),
        (torch.zeros(2, 3, 4, 5), gd.Noise(1, 1), [0, 1, 2], "label"),
        (torch.zeros(1, 3, 4, 5), gd.Noise(1, 1), 0.5, "whole number"),
    ],
)
@each_variant
def test_bad_input_is_refused(toy, variant, x_t, noise, label, message):
    with pytest.raises(gd.GolddiffError, match=message):
        build(variant, toy)(x_t, noise, label)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("godldiff", {}, "did you mean 'golddiff'"),
        ("pca", {"treshold": 0.1}, "did you mean 'threshold'"),
        ("optimal", {"mask_rule": "published"}, "unknown option of optimal"),
        ("golddiff", {"retrieval": "papier"}, "did you mean 'paper'"),
        ("golddiff", {"k_min": 20, "k_max": 10, "retrieval": "paper"}, "k_min is 20, more than k_max"),
        ("pca", {"threshold": -1}, "threshold"),
        ("pca", {"mask_rule": "publishd"}, "did you mean 'published'"),
        ("pca", {"mask": torch.ones(3, 3)}, "mask of shape"),
        ("pca", {"legacy_batch": 0}, "legacy_batch"),
        ("wiener", {"statistics": "klass"}, "did you mean 'class'"),
    ],
)
def test_bad_options_are_refused(toy, name, options, message):
    with pytest.raises(gd.GolddiffError, match=message):
        gd.denoiser(name, toy, **options)


@pytest.mark.parametrize("kind", [np.float32, np.float64])
@each_variant
def test_banks_of_floats(variant, kind):
    pixels, labels = toy_arrays()
    bank = gd.Bank.build(pixels, labels=labels)
    floats = gd.Bank.build((pixels / 127.5 - 1).astype(kind), labels=labels)
    noise = SCHEDULE(300)
    for dtype, atol in ((torch.float32, 2e-4), (torch.float64, 1e-5)):
        x_t = noisy(bank, noise, dtype=dtype)
        if "golddiff" in variant or "paper" in variant or variant == "knn":
            posterior = build(variant, floats)(x_t, noise)
            rows, weights = posterior.weights(0)
            values = floats.images(rows, torch.float64).flatten(1)
            mean = weights.double() @ values if weights.ndim == 1 else (weights * values).sum(0)
            assert close(mean, posterior.mean[0].flatten().double(), atol)
        else:
            assert close(build(variant, floats)(x_t, noise).mean, build(variant, bank)(x_t, noise).mean, atol)


def test_wiener_of_a_class(toy):
    noise = SCHEDULE(300)
    x_t = noisy(toy, noise)
    posterior = gd.denoiser("wiener", toy, statistics="class")(x_t, noise, [1, 2, -1])
    for b, label in enumerate([1, 2, -1]):
        rows = rows_of(toy) if label < 0 else rows_of(toy)[toy.rows_of(label).numpy()]
        mean, _ = oracles.wiener(x_t[b].flatten().numpy(), rows, float(noise.alpha), float(noise.sigma))
        assert np.abs(posterior.mean[b].flatten().numpy() - mean).max() < 1e-9


def test_draws_do_not_depend_on_the_batch_or_the_order_of_rows():
    pixels, _ = toy_arrays()
    order = np.random.default_rng(3).permutation(60)
    bank, other = gd.Bank.build(pixels), gd.Bank.build(pixels[order])
    noise = SCHEDULE(850)
    x_t = noisy(bank, noise)
    together = gd.denoiser("optimal", bank)(x_t, noise).draw([4, 5, 6])
    for b in range(3):
        assert gd.denoiser("optimal", bank)(x_t[b : b + 1], noise).draw(4 + b).tolist() == [int(together[b])]
    assert order[gd.denoiser("optimal", other)(x_t, noise).draw([4, 5, 6]).numpy()].tolist() == together.tolist()


@each_variant
def test_extreme_levels_are_right_or_refused(toy, variant):
    denoiser, x = build(variant, toy), toy.images(torch.tensor([3]))
    for noise in (
        gd.Noise(1, 1e-19),
        gd.Noise(1e30, 1),
        gd.Noise(1e-300, 1e-300),
        gd.Noise(1, 1e-5),
        gd.Noise(1e-9, 1),
    ):
        for x_t in (float(noise.alpha) * x, float(noise.sigma) * torch.randn(x.shape), torch.full_like(x, 1e30)):
            try:
                mean = denoiser(x_t, noise).mean
            except gd.GolddiffError as error:
                assert "float64" in str(error)  # noqa: PT017
            else:
                assert bool(torch.isfinite(mean).all())
                assert variant == "wiener" or float(mean.abs().max()) <= 1


def test_gradients_are_refused_rather_than_wrong(toy):
    x_t = torch.zeros(1, 3, 4, 5, requires_grad=True)
    with pytest.raises(gd.GolddiffError, match="detach"):
        gd.denoiser("optimal", toy)(x_t, gd.Noise(1, 1))


@pytest.mark.parametrize(
    "options",
    [
        {"threshold": "x"},
        {"threshold": True},
        {"threshold": None},
        {"legacy_batch": 2.5},
        {"legacy_batch": "a"},
        {"mask": "x"},
        {"mask": torch.full((60, 60), math.nan)},
        {"mask": 3},
        {"k_min": "a"},
        {"retrieval": 3},
        {"statistics": []},
    ],
)
def test_options_of_the_wrong_kind_are_refused(toy, options):
    with pytest.raises(gd.GolddiffError):
        gd.denoiser("golddiff", toy, **options)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("variant", ["optimal", "wiener", "pca", "golddiff", "ls", "els", "pspc", "cfdm", "nearest"])
def test_images_of_one_pixel(variant, channels):
    """Against the formula, in batches, in both types; for one pixel all localities are the whole image."""
    pixels = np.random.default_rng(0).integers(0, 256, (30, channels, 1, 1), dtype=np.uint8)
    bank, noise = gd.Bank.build(pixels, layout="NCHW"), gd.Noise(1.0, 0.5)
    x_t = torch.linspace(-0.93, 0.97, 3 * channels, dtype=torch.float64).reshape(3, channels, 1, 1)
    name, options = VARIANTS[variant]
    means = [
        gd.denoiser(name, bank, **options)(x_t.to(kind), noise).mean.double() for kind in (torch.float32, x_t.dtype)
    ]
    assert close(means[0], means[1], 1e-5)
    if variant in ("optimal", "ls", "els", "pspc"):
        rows = rows_of(bank)
        expected = [oracles.optimal(x.flatten().numpy(), rows, 1.0, 0.5)[0] for x in x_t]
        assert np.abs(means[1].flatten(1).numpy() - np.array(expected)).max() < 1e-9
