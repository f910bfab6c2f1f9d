"""Where images come from, and what they are without some of the images of the bank."""

import csv
import gc
import json
import os

import numpy as np
import pytest
import torch
from PIL import Image

import golddiff as gd
from conftest import noisy, toy_arrays
from golddiff import bank as bank_module
from golddiff import importance, scan
from golddiff.metrics import copies
from golddiff.recipe import Recipe
from test_cli import call

SCHEDULE = gd.DDPM()
METHODS = {
    "optimal": ("optimal", {}),
    "optimal certified": ("optimal", {"retrieval": "certified"}),
    "pca": ("pca", {}),
    "golddiff": ("golddiff", {"tol": 0.05}),
    "golddiff reference": ("golddiff", {"retrieval": "reference"}),
    "golddiff ls": ("golddiff", {"locality": "ls", "window": 3}),
    "ls": ("ls", {"window": 3}),
    "pspc": ("pspc", {"window": 5}),
    "nearest": ("nearest", {}),
}
each_method = pytest.mark.parametrize("name", METHODS)


def last_step(bank, name, seeds=(3, 4), **how):
    method, options = METHODS[name]
    *_, step = gd.trajectory(gd.denoiser(method, bank, **options), list(seeds), **how)
    return step


# ---- sums ------------------------------------------------------------------------------------------------------------


@each_method
def test_the_weighted_sum_is_the_image(digits, name):
    method, options = METHODS[name]
    for step in gd.trajectory(gd.denoiser(method, digits, **options), [3, 4], labels=[-1, 5]):
        for b in range(2):
            found = gd.attribute(digits, step.posterior, b)
            assert float((found.image - step.posterior.mean[b].double()).abs().max()) < 1e-5
            assert float(found.shares.sum()) == pytest.approx(1)
            assert (found.shares.diff() <= 0).all()
            if b == 1:
                assert (digits.labels[found.rows] == 5).all()


def test_the_weighted_sum_is_the_image_of_5000_digits():
    bank = gd.Bank.build("mnist5k")
    for name in METHODS:
        step = last_step(bank, name, steps=10)
        found = gd.attribute(bank, step.posterior, 1)
        assert float((found.image - step.posterior.mean[1].double()).abs().max()) < 1e-5, name


@each_method
def test_maps_and_sources_are_the_weights(digits, name):
    step = last_step(digits, name, steps=4)
    found = gd.attribute(digits, step.posterior)
    maps = found.maps(5)
    assert maps.shape == (min(5, len(found.rows)), 1, 8, 8)
    assert torch.allclose(maps.mean((1, 2, 3)), found.shares[:5])
    for pixel in (0, 27, 63):
        rows, weights = step.posterior.weights(0, [pixel])
        weights = weights.reshape(len(rows), -1)[:, 0].double()
        assert float(found.source_weight.flatten()[pixel]) == pytest.approx(float(weights.max()))
        assert float(weights[rows == found.source.flatten()[pixel]].sum()) == pytest.approx(float(weights.max()))
        for i, row in enumerate(found.rows[:5]):
            expected = float(weights[rows == row].sum())
            assert float(maps[i].flatten()[pixel]) == pytest.approx(expected, abs=1e-15)
    assert found.coverage(len(found.rows)) == pytest.approx(1)
    assert found.coverage(3) == pytest.approx(float(found.shares[:3].sum()))


@pytest.mark.parametrize("name", ["optimal", "golddiff", "ls"])
def test_regions(toy, name):
    """A box, a mask and a list of pixels are the same region, and the shares of parts add up to those of the whole."""
    step = last_step(toy, name, steps=3)
    mask = torch.zeros(4, 5, dtype=torch.bool)
    mask[1:3, 2:5] = True
    flat = torch.arange(60).reshape(3, 4, 5)[:, 1:3, 2:5].flatten()
    box, masked, listed = (gd.attribute(toy, step.posterior, 1, r) for r in ((1, 2, 3, 5), mask, flat))
    for other in (masked, listed):
        assert torch.equal(box.rows, other.rows)
        assert torch.allclose(box.shares, other.shares)
    assert (box.source.flatten()[flat] >= 0).all()
    outside = torch.ones(60, dtype=torch.bool).index_fill_(0, flat, False)
    assert (box.source.flatten()[outside] == -1).all()
    assert box.image.flatten()[outside].isnan().all()
    assert float((box.image - step.posterior.mean[1]).flatten()[flat].abs().max()) < 1e-5
    rest = gd.attribute(toy, step.posterior, 1, ~mask)
    whole = gd.attribute(toy, step.posterior, 1)

    def by_row(found):
        return torch.zeros(60, dtype=torch.float64).index_add_(0, found.rows, found.shares) * len(found.pixels)

    assert torch.allclose(by_row(box) + by_row(rest), by_row(whole))


def test_what_has_no_sources_is_refused(toy):
    noise = SCHEDULE(500)
    x_t = noisy(toy, noise)
    for name, message in (("wiener", "no rows"), ("els", "ls"), ("bbels", "ls")):
        posterior = gd.denoiser(name, toy, **({} if name == "wiener" else {"window": 3}))(x_t, noise)
        with pytest.raises(gd.GolddiffError, match=message):
            gd.attribute(toy, posterior, 0, [7])
    posterior = gd.denoiser("pca", toy)(x_t, noise)
    for region in ((0, 0, 5, 5), (2, 2, 2, 3), (0, 0, 1), [60], [-1], [], [3, 3], "all", 3, torch.zeros(4, 4).bool()):
        with pytest.raises(gd.GolddiffError, match="region is"):
            gd.attribute(toy, posterior, 0, region)
    with pytest.raises(gd.GolddiffError, match="count from 0"):
        gd.attribute(toy, posterior, 3)
    for pixels in ([60], [], [0.5]):
        with pytest.raises(gd.GolddiffError, match="flat indices"):
            posterior.weights(0, pixels)
    other = gd.Bank.build(toy_arrays(80, seed=3)[0])
    with pytest.raises(gd.GolddiffError, match="another bank"):
        gd.attribute(other, posterior)
    view = toy.without([4])
    ours = gd.attribute(toy, gd.denoiser("pca", view)(x_t, noise))  # rows of a view keep their numbers
    assert 4 not in ours.rows


# ---- without some images ---------------------------------------------------------------------------------------------

REMOVAL = {
    "optimal": ("optimal", {}),
    "optimal certified": ("optimal", {"retrieval": "certified", "tol": 1e-9}),
    "ls": ("ls", {"window": 3}),
    "pca": ("pca", {}),
    "pca class": ("pca", {"statistics": "class"}),
    "wiener": ("wiener", {}),
    "golddiff reference": ("golddiff", {"retrieval": "reference", "k_min": 5, "k_max": 8, "m_min": 9, "m_max": 20}),
    "golddiff paper": ("golddiff", {"retrieval": "paper", "k_min": 5, "k_max": 8, "m_min": 9, "m_max": 20}),
    "els": ("els", {"window": 3}),
    "pspc": ("pspc", {"window": 3}),
    "nearest": ("nearest", {}),
    "cfdm": ("cfdm", {"kappa": 0.2, "draws": 3}),
    "knn": ("knn", {"neighbours": 10, "draws": 30}),
}
GONE = [0, 7, 8, 31]


@pytest.fixture(scope="module")
def rebuilt():
    """The toy bank, built without some of its rows; with the numbers of those that stay."""
    pixels, labels = toy_arrays()
    stay = np.setdiff1d(np.arange(60), GONE)
    return gd.Bank.build(pixels[stay], labels=labels[stay]), torch.from_numpy(stay)


@pytest.mark.parametrize("label", [None, 1])
@pytest.mark.parametrize("name", REMOVAL)
def test_removal_is_a_bank_built_without_the_rows(toy, rebuilt, name, label):
    (method, options), (fresh, stay) = REMOVAL[name], rebuilt
    view = toy.without(GONE)
    assert len(view) == 56
    assert torch.equal(view.rows, stay)
    for t in (900, 400, 0):
        noise = SCHEDULE(t)
        x_t = noisy(toy, noise)
        ours, theirs = (gd.denoiser(method, bank, **options)(x_t, noise, label, seed=4) for bank in (view, fresh))
        assert float((ours.mean - theirs.mean).abs().max()) < 1e-8
        assert torch.allclose(ours.log_evidence, theirs.log_evidence, atol=1e-6)
        if ours.support is not None and theirs.support.rows is not None:
            for tile in range(ours.support.tile_count):
                assert torch.equal(ours.support.rows_of(1, tile), stay[theirs.support.rows_of(1, tile)])
    samples = [gd.sample(gd.denoiser(method, bank, **options), [5], labels=label, steps=4) for bank in (view, fresh)]
    assert float((samples[0] - samples[1]).abs().max()) < 1e-5


@pytest.mark.parametrize("name", ["pca", "wiener"])
def test_statistics_may_stay(toy, rebuilt, name):
    """With the old statistics only the rows change: the masks are those of the whole bank."""
    (method, options), (fresh, _) = REMOVAL[name], rebuilt
    noise = SCHEDULE(400)
    x_t = noisy(toy, noise)
    kept, anew = (toy.without(GONE, statistics=how) for how in ("keep", "recompute"))
    assert kept.fingerprint != anew.fingerprint != toy.fingerprint
    means = [gd.denoiser(method, bank, **options)(x_t, noise).mean for bank in (kept, anew, toy)]
    if method == "wiener":
        assert torch.equal(means[0], means[2])
        assert not torch.allclose(means[0], means[1])
    else:
        mask = gd.denoiser("pca", toy).locality.mask(noise)
        assert not torch.equal(mask, gd.denoiser("pca", fresh).locality.mask(noise))
        given = gd.denoiser(method, fresh, mask=mask)(x_t, noise).mean
        assert float((means[0] - given).abs().max()) < 1e-8
        assert not torch.allclose(means[0], means[2])


@pytest.mark.parametrize("statistics", ["keep", "recompute"])
def test_removal_from_golden_subsets(digits, statistics):
    """Rows are drawn by scores in bytes, whose unit the rows decide: so near the exact posterior of those that stay,
    with none of those that do not."""
    gone = list(range(0, 1797, 5))
    view = digits.without(gone, statistics=statistics)
    for t in (700, 400, 100):
        noise = SCHEDULE(t)
        x_t = noisy(digits, noise, rows=[0, 5, 10])
        drawn = gd.denoiser("golddiff", view, tol=0.05)(x_t, noise, seed=[1, 2, 3])
        exact = gd.denoiser("pca", view)(x_t, noise)
        assert float((drawn.mean - exact.mean).square().mean().sqrt()) < 0.1
        assert not torch.isin(drawn.support.rows, torch.tensor(gone)).any()


def test_statistics_without_some_rows_by_subtraction(digits, monkeypatch):
    gone = torch.arange(0, 1797, 4)
    summed = digits.without(gone).spectrum()
    monkeypatch.setattr(bank_module, "SUMMED_ANEW", 100)
    subtracted = digits.without(gone).spectrum()
    assert torch.allclose(subtracted.mean, summed.mean, atol=1e-12)
    assert torch.allclose(subtracted.variances, summed.variances, atol=1e-12)
    assert torch.allclose(subtracted.eigenvalues, summed.eigenvalues, atol=1e-12)
    ours, theirs = ((u.eigenvectors * u.eigenvalues) @ u.eigenvectors.T for u in (subtracted, summed))
    assert torch.allclose(ours, theirs, atol=1e-12)
    masks = [gd.denoiser("pca", bank).locality.mask(SCHEDULE(300)) for bank in (digits.without(gone),)]
    monkeypatch.setattr(bank_module, "SUMMED_ANEW", 10_000)
    assert torch.equal(masks[0], gd.denoiser("pca", digits.without(gone)).locality.mask(SCHEDULE(300)))


def test_classes_views_of_views_and_bad_requests(toy):
    noise = SCHEDULE(300)
    x_t = noisy(toy, noise)
    view = toy.without(labels=[1])
    assert not (toy.labels[view.rows] == 1).any()
    two = toy.without([3]).without([5, 3])
    assert two.removed.tolist() == [3, 5]
    assert two.fingerprint == toy.without([5, 3]).fingerprint
    assert toy.without() is toy
    assert torch.equal(two.to("cpu").rows, two.rows)
    assert len(toy) == 60, "the bank itself has all of its rows"
    with pytest.raises(gd.GolddiffError, match="no image has label 1: labels here are 0, 2"):
        gd.denoiser("optimal", view)(x_t, noise, 1)
    for rows in ([60], [-1], [1.5], [True], [[1]], "ab", None, ["3"], [2**70]):
        with pytest.raises(gd.GolddiffError, match="rows must be"):
            toy.without(rows)
    assert toy.without(labels=1).removed.tolist() == view.removed.tolist()
    for label in (-1, None):
        with pytest.raises(gd.GolddiffError, match="give a class"):
            toy.without(labels=[label])
    assert torch.equal(toy.without(labels=toy.labels[:1]).removed, toy.rows_of(int(toy.labels[0])))
    for labels in ("1", None, [True], ["1"]):
        with pytest.raises(gd.GolddiffError, match="labels? "):
            toy.without(labels=labels)
    with pytest.raises(gd.GolddiffError, match="recipe cannot say"):
        Recipe.resolve(view, {})
    with pytest.raises(gd.GolddiffError, match="no image is left"):
        toy.without(range(60))
    with pytest.raises(gd.GolddiffError, match="statistics 'kept'"):
        toy.without([1], statistics="kept")


def test_a_search_finds_none_of_the_removed(digits, monkeypatch):
    monkeypatch.setattr(importance, "SCORED", 1000)
    monkeypatch.setattr(importance, "POOL", 1)
    monkeypatch.setattr(importance, "SAMPLE", 512)
    gone = list(range(0, 1797, 3))
    denoiser = gd.denoiser("golddiff", digits.without(gone, statistics="keep"), tol=0.1, search=400)
    noise = SCHEDULE(300)
    assert denoiser.subset.plan(noise, denoiser.locality).kind == "search"
    support = denoiser(noisy(digits, noise, rows=[0, 3, 6]), noise, seed=[1, 2, 3]).support
    found = support.rows[support.rows >= 0]
    assert len(found) > 50
    assert not torch.isin(found, torch.tensor(gone)).any()


def test_a_view_leaves_the_folder_of_its_bank_alone(tmp_path, monkeypatch):
    """What depends on the rows that are there is not shared, though masks are."""
    monkeypatch.setattr(importance, "SCORED", 1000)
    monkeypatch.setattr(importance, "SAMPLE", 512)
    bank = gd.Bank.build("digits", tmp_path / "bank")
    noise = SCHEDULE(300)
    x_t = noisy(bank, noise)
    view = bank.without(range(0, 1797, 2), statistics="keep")
    gd.denoiser("golddiff", view, tol=0.1, search=400)(x_t, noise)
    kept = {path.name.partition("-")[0] for path in (tmp_path / "bank" / "derived").iterdir()}
    assert "mask" in kept
    assert "share" not in kept
    ours, theirs = (gd.denoiser("golddiff", b, tol=0.1, search=400) for b in (bank, gd.Bank.build("digits")))
    assert torch.equal(ours(x_t, noise).mean, theirs(x_t, noise).mean)


# ---- derivatives -----------------------------------------------------------------------------------------------------

SMOOTH = {
    "optimal": ("optimal", {}),
    "optimal paper": ("optimal", {"retrieval": "paper", "k_min": 9, "k_max": 15}),
    "pca": ("pca", {}),
    "pca published": ("pca", {"mask_rule": "published", "threshold": 0}),
    "golddiff": ("golddiff", {"retrieval": "reference", "k_min": 9, "k_max": 15}),
    "ls": ("ls", {"window": 3}),
    "wiener": ("wiener", {}),
}


def directions(x_t):
    return torch.randn(x_t.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64)


@pytest.mark.parametrize("t", [900, 500, 200])
@pytest.mark.parametrize("name", SMOOTH)
def test_jacobian_products_are_differences(toy, name, t):
    """Central differences in float64; the subsets do not change over so short a way."""
    method, options = SMOOTH[name]
    denoiser, noise = gd.denoiser(method, toy, **options), SCHEDULE(t)
    x_t = noisy(toy, noise)
    posterior, v = denoiser(x_t, noise), directions(x_t)
    h = 1e-5 * float(noise.sigma)
    difference = (denoiser(x_t + h * v, noise).mean - denoiser(x_t - h * v, noise).mean) / (2 * h)
    product = posterior.jvp(v)
    assert float((product - difference).abs().max()) < 1e-6 * float(product.abs().max()) + 1e-9
    other = directions(x_t).flip(0)
    ours, theirs = (product * other).flatten(1).sum(1), (v * posterior.vjp(other)).flatten(1).sum(1)
    assert torch.allclose(ours, theirs, rtol=1e-10), "the transpose"


def test_jacobian_products_are_automatic_derivatives(digits):
    """For drawn rows, held fixed with what they stand for: torch differentiates the formula."""
    denoiser, noise = gd.denoiser("golddiff", digits, tol=0.05), SCHEDULE(400)
    x_t = noisy(digits, noise, rows=[0])
    posterior, v = denoiser(x_t, noise, seed=3), directions(x_t)
    support, mask = posterior.support, denoiser.locality.mask(noise).double()
    alpha, sigma = float(noise.alpha), float(noise.sigma)

    def mean(x):
        out = torch.zeros(64, dtype=torch.float64)
        for tile, outputs in enumerate(support.outputs(64)):
            values = digits.images(support.rows_of(0, tile), torch.float64).flatten(1)
            logits = (x.flatten() - alpha * values).square() @ mask[:, outputs] / (-2 * sigma**2)
            weights = (logits + support.log_q_of(0, tile)[:, None]).softmax(0)
            out = out.index_add(0, outputs, (weights * values[:, outputs]).sum(0))
        return out.reshape(1, 1, 8, 8)

    assert support.log_q is not None
    value, product = torch.func.jvp(mean, (x_t,), (v,))
    assert torch.allclose(value, posterior.mean, atol=1e-6)
    assert torch.allclose(product, posterior.jvp(v), atol=1e-9)
    _, pull = torch.func.vjp(mean, x_t)
    assert torch.allclose(pull(v)[0], posterior.vjp(v), atol=1e-9)


@pytest.mark.parametrize("name", ["optimal", "pca", "wiener"])
def test_gradients_flow_through_the_mean(toy, name):
    denoiser, noise = gd.denoiser(name, toy), SCHEDULE(500)
    x_t = noisy(toy, noise, rows=[0, 1])
    assert torch.equal(denoiser.mean(x_t, noise, [1, -1]), denoiser(x_t, noise, [1, -1]).mean)
    assert torch.autograd.gradcheck(lambda x: denoiser.mean(x, noise, [1, -1]), (x_t.requires_grad_(),))


def test_gradients_keep_nothing_alive(toy):
    denoiser, noise = gd.denoiser("optimal", toy), SCHEDULE(500)
    gc.collect()
    gc.disable()
    try:
        before = sum(type(thing) is gd.Posterior for thing in gc.get_objects())
        for _ in range(3):
            denoiser.mean(noisy(toy, noise).requires_grad_(), noise).sum().backward()
        assert sum(type(thing) is gd.Posterior for thing in gc.get_objects()) == before
    finally:
        gc.enable()


@pytest.mark.parametrize("t", [900, 400, 100])
def test_posterior_covariance(toy, t):
    noise = SCHEDULE(t)
    x_t = noisy(toy, noise)
    v = directions(x_t)
    posterior = gd.denoiser("optimal", toy)(x_t, noise)
    rows, weights = posterior.weights(1)
    x = toy.images(rows, torch.float64).flatten(1)
    centred = x - weights @ x
    expected = (centred * weights[:, None]).T @ centred
    covariance = posterior.covariance(1)
    assert torch.allclose(covariance, expected, atol=1e-12)
    assert torch.allclose(posterior.covariance(1, [4, 9]), expected[[4, 9]][:, [4, 9]], atol=1e-12)
    assert torch.allclose(posterior.covariance_product(v)[1].flatten(), expected @ v[1].flatten(), atol=1e-11)
    wiener = gd.denoiser("wiener", toy)(x_t, noise)
    c = np.cov(toy.images(toy.rows, torch.float64).flatten(1).numpy().T)
    total = float(noise.alpha) ** 2 * c + float(noise.sigma) ** 2 * np.eye(60)
    linear = float(noise.sigma) ** 2 * np.linalg.solve(total, c)
    assert np.abs(wiener.covariance(0).numpy() - linear).max() < 1e-9


def test_covariance_where_there_is_no_signal(toy):
    """alpha = 0: the covariance of the data, and a mean that does not move."""
    x_t = noisy(toy, gd.Noise(1, 1))
    c = torch.from_numpy(np.cov(toy.images(toy.rows, torch.float64).flatten(1).numpy().T))
    for name, share in (("optimal", 59 / 60), ("wiener", 1.0)):  # of the rows themselves; of what they are drawn from
        posterior = gd.denoiser(name, toy)(x_t, gd.Noise(0.0, 1.0))
        assert torch.allclose(posterior.covariance(0), share * c, atol=1e-9)
        assert torch.equal(posterior.jvp(x_t), torch.zeros_like(x_t))


def test_derivatives_that_are_not_there(toy):
    noise = SCHEDULE(500)
    x_t = noisy(toy, noise)
    for name, options in (("cfdm", {}), ("knn", {}), ("els", {"window": 3}), ("pca", {"legacy_batch": 7})):
        with pytest.raises(gd.GolddiffError, match="closed form"):
            gd.denoiser(name, toy, **options)(x_t, noise).jvp(x_t)
    posterior = gd.denoiser("pca", toy)(x_t, noise)
    with pytest.raises(gd.GolddiffError, match="shape of x_t"):
        posterior.jvp(x_t[:1])
    with pytest.raises(gd.GolddiffError, match="optimal or wiener"):
        posterior.covariance(0)


# ---- folders ---------------------------------------------------------------------------------------------------------


def test_attribute_writes_a_folder(tmp_path, capsys):
    out = tmp_path / "found"
    code, said, _ = call(
        capsys, "attribute", "digits", "--seed", 3, "--steps", 5, "--label", 4, "--remove-top", 2, "--top", 3,
        "--region", "1,2,6,7", "--out", out, "tol=0.05",
    )  # fmt: skip
    assert code == 0
    assert "without 2 images" in said
    assert sorted(p.name for p in out.iterdir()) == ["attribution.json", "panel.png", "sources.csv"]
    found = json.loads((out / "attribution.json").read_text())
    digits = gd.Bank.build("digits")
    model = gd.denoiser("golddiff", digits, tol=0.05)
    *_, step = gd.trajectory(model, [3], steps=5, labels=4)
    expected = gd.attribute(digits, step.posterior, 0, (1, 2, 6, 7))
    assert [one["row"] for one in found["sources"]] == expected.rows[:3].tolist()
    assert found["pixels"] == 25
    assert found["without"]["removed"] == sorted(expected.rows[:2].tolist())
    with (out / "sources.csv").open() as file:
        table = list(csv.DictReader(file))
    assert [int(line["row"]) for line in table] == expected.rows.tolist()
    assert sum(float(line["share"]) for line in table) == pytest.approx(1)
    assert {line["label"] for line in table} == {"4"}


def test_attribute_from_a_recipe_and_bad_requests(tmp_path, capsys):
    run = tmp_path / "run"
    assert call(capsys, "sample", "digits", "--seeds", "5-6", "--steps", 3, "--method", "ls", "--out", run)[0] == 0
    out = tmp_path / "found"
    code, _, err = call(capsys, "attribute", "--recipe", run / "recipe.json", "--remove-label", "1", "--out", out)
    assert code == 0, err
    found = json.loads((out / "attribution.json").read_text())
    assert (found["seed"], found["method"]) == (5, "ls")
    assert len(found["without"]["removed"]) == 182
    for wrong, message in (
        (("--step", 11), "from 1 to 10"),
        (("--region", "1,2,3"), "TOP,LEFT"),
        (("--region", "0,0,9,9"), "region is"),
        (("--top", 99), "top is 99"),
        (("--remove", "1797"), "rows must be"),
        (("--remove", "abc"), "rows 'abc'"),
        (("--remove-top", "-1"), "remove-top is -1"),
        (("--method", "bbels"), "no rows"),
        (("--method", "wiener"), "no rows"),
        (("--label", "cat"), "no class"),
    ):
        code, _, err = call(capsys, "attribute", "digits", *wrong, "--out", tmp_path / "wrong")
        assert code == 2
        assert message in err
        assert not (tmp_path / "wrong").exists()


def test_audit_flags_copies(tmp_path, capsys, digits):
    """Rows of the bank with a little noise are copies; means of two rows are not."""
    pictures = digits.pixels[:6].float()
    pictures[3:] = (pictures[3:] + digits.pixels[600:603].float()) / 2
    pictures[:3] = (pictures[:3] + torch.tensor([[1.0]])).clamp(0, 255)
    np.savez(tmp_path / "made.npz", arr_0=pictures.round().to(torch.uint8).permute(0, 2, 3, 1).numpy())
    out = tmp_path / "audit"
    code, said, _ = call(capsys, "audit", tmp_path / "made.npz", "--bank", "digits", "--out", out)
    assert code == 0
    assert "3 of 6 images are copies" in said
    with (out / "audit.csv").open() as file:
        table = list(csv.DictReader(file))
    assert [line["copy"] for line in table] == ["1", "1", "1", "0", "0", "0"]
    assert [int(line["row"]) for line in table[:3]] == [0, 1, 2]
    x = digits.images(slice(None), torch.float64).flatten(1)
    for i, line in enumerate(table):
        sample = pictures[i].round().double().flatten() / 127.5 - 1
        distances, rows = (x - sample).square().mean(1).sqrt().sort()
        assert [int(line["row"]), int(line["second"])] == rows[:2].tolist()
        assert float(line["d1"]) == pytest.approx(float(distances[0]), abs=1e-6)
        assert float(line["d2"]) == pytest.approx(float(distances[1]), abs=1e-6)
    assert (out / "panel.png").stat().st_size > 1000


def test_twins_do_not_hide_copies(digits):
    """Of an image that the bank has twice, or ten times, the second nearest is the nearest other image."""
    pixels = torch.cat([digits.pixels[:200], digits.pixels[[7]], digits.pixels[[9]].expand(9, -1, -1, -1)])
    bank = gd.Bank.build(pixels)
    images = digits.images(torch.tensor([7, 9, 11])) + 0.02
    found, alone = copies(images, bank), copies(images, gd.Bank.build(digits.pixels[:200]))
    assert torch.allclose(found.d1, alone.d1)
    assert torch.allclose(found.d2, alone.d2)
    assert torch.equal(found.second, alone.second)
    assert found.flagged.tolist() == alone.flagged.tolist() == [True] * 3
    few = gd.Bank.build(digits.pixels[[7, 7, 11]])
    assert copies(images[:1], few).second.tolist() == [2]
    same = gd.Bank.build(digits.pixels[[5]].expand(4, -1, -1, -1))
    assert copies(images, same).d2.tolist() == copies(images, same).d1.tolist()


def test_odd_names_and_places(tmp_path, capsys, digits):
    """Names that are no UTF-8 or hold commas, classes with commas, a file in the way, a bank as samples."""
    for i, part in enumerate((b"cat,dog", b"bird")):
        for j in range(4):
            folder = os.fsencode(tmp_path / "odd") + b"/" + part
            os.makedirs(folder, exist_ok=True)  # noqa: PTH103 - a name in bytes
            picture = Image.fromarray(digits.pixels[10 * i + j, 0].numpy())
            with open(folder + b"/a,\xff%d.png" % j, "wb") as file:  # noqa: PTH123
                picture.save(file, format="PNG")
    odd = tmp_path / "odd"
    code, _, err = call(capsys, "audit", odd, "--bank", odd, "--out", tmp_path / "audit")
    assert code == 0, err
    with (tmp_path / "audit" / "audit.csv").open(encoding="utf-8") as file:
        assert [line["copy"] for line in csv.DictReader(file)] == ["1"] * 8
    found = tmp_path / "found"
    code, _, err = call(capsys, "attribute", odd, "--label", "cat,dog", "--method", "ls", "--steps", 2, "--out", found)
    assert code == 0, err
    with (found / "sources.csv").open(encoding="utf-8") as file:
        assert {line["label"] for line in csv.DictReader(file)} == {"cat,dog"}
    gd.Bank.build(odd, tmp_path / "odd.bank")
    assert call(capsys, "audit", tmp_path / "odd.bank", "--bank", odd, "--out", tmp_path / "again")[0] == 0
    (tmp_path / "file").touch()
    for command in (("attribute", odd), ("audit", odd, "--bank", odd)):
        code, _, err = call(capsys, *command, "--out", tmp_path / "file")
        assert code == 2
        assert "choose another --out" in err


def test_audit_takes_a_run_folder(tmp_path, capsys):
    run = tmp_path / "run"
    call(capsys, "sample", "digits", "--method", "optimal", "--seeds", "0-3", "--out", run)
    code, said, _ = call(capsys, "audit", run, "--bank", "digits", "--out", tmp_path / "audit")
    assert code == 0
    assert "4 of 4 images are copies" in said
    code, _, err = call(capsys, "audit", run, "--bank", "mnist5k", "--out", tmp_path / "other")
    assert code == 2
    assert "same shape" in err


@pytest.mark.parametrize("products", ["_Floats", "_Bytes"])
@pytest.mark.parametrize("together", [2**26, 4000])
def test_nearest_images_are_the_nearest(digits, products, together, monkeypatch):
    """In one part or several, by either product; equal distances go by key."""
    monkeypatch.setattr(scan, "scan_of", getattr(scan, products))
    monkeypatch.setattr(scan, "LOGITS_AT_ONCE", together)
    pixels = torch.cat([digits.pixels[:500], digits.pixels[100:110]])  # ten twins
    bank = gd.Bank.build(pixels)
    x = bank.images(slice(None), torch.float64).flatten(1)
    images = torch.cat(
        [bank.images(torch.arange(95, 105), torch.float64), digits.images(slice(600, 620), torch.float64)]
    )
    rows, distances = scan.nearest_images(bank, images, 3)
    exact = (images.flatten(1)[:, None] - x).square().mean(2).sqrt()
    order = np.lexsort((bank.keys.expand(len(images), -1).numpy(), exact.numpy().round(12)))[:, :3]
    assert torch.equal(rows, torch.from_numpy(order.copy()))
    assert torch.allclose(distances, exact.gather(1, rows), atol=1e-12)
    with pytest.raises(gd.GolddiffError, match="no images"):
        scan.nearest_images(bank, images[:0], 2)


def test_nearest_images_leave_out_what_was_removed(digits):
    images = digits.images(torch.tensor([5, 9]))
    rows, distances = scan.nearest_images(digits, images, 3)
    assert rows[:, 0].tolist() == [5, 9]
    assert float(distances[:, 0].max()) < 1e-7
    fewer, farther = scan.nearest_images(digits.without([5, 9]), images, 2)
    assert torch.equal(fewer, rows[:, 1:])
    assert torch.equal(farther, distances[:, 1:])
