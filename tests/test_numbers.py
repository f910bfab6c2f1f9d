"""Numbers hold for random banks, options and noise levels: 300 cases, or as many as `GOLDDIFF_CASES` says.

A case is one draw of a bank, a denoiser with options, noise levels, and a batch; each property has its share of them,
and looks at all images of the batch.
"""

import os
from contextlib import ExitStack
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, note, settings
from hypothesis import strategies as st

import golddiff as gd
from cases import cases, content_of
from golddiff import bank as bank_module
from golddiff import certified, golden, importance, scan, scores
from golddiff.denoise import compiled, crops, local, patches, sources, whole
from reach import Formula, rows_of

PROPERTIES = 10
CASES = int(os.environ.get("GOLDDIFF_CASES", "300"))
SLOW = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much]
share = settings(
    max_examples=-(-CASES // PROPERTIES), deadline=None, derandomize=True, database=None, suppress_health_check=SLOW
)
SMALL = {
    (bank_module, "BLOCK_NUMBERS"): 1, (golden, "BLOCK"): 2, (whole, "MEASURED_AGAIN"): 2,
    (golden, "SCORES_AT_ONCE"): 1, (scan, "BLOCK_NUMBERS"): 1, (scan, "FEWEST_ROWS"): 3, (whole, "LOGITS_AT_ONCE"): 1,
    (certified, "BLOCK"): 3, (local, "BLOCK"): 4, (sources, "BLOCK"): 5, (sources, "WEIGHTS_AT_ONCE"): 1,
    (crops, "BLOCK"): 3, (patches, "NUMBERS_AT_ONCE"): 1, (scores, "BLOCK"): 3, (importance, "SCORES_AT_ONCE"): 1,
    (compiled, "AT_ONCE"): 1, (compiled, "LONGEST"): 64, (compiled, "NUMBERS"): 1,
}  # fmt: skip
"""How much work goes together, as little as can be."""
FAST = {(compiled, "WORTH"): 0, (bank_module, "WORTH_COMPILING"): 0, (golden, "WORTH_COMPILING"): 0}
"""Compiled loops for the smallest work."""


@pytest.fixture(autouse=True, scope="module")
def subsets_of_small_banks():
    """Retrieval leaves rows out of banks of 40 rows too."""
    with changed(
        {
            (certified, "FIRST"): 3, (importance, "FEWEST"): 8, (importance, "SCORED"): 32, (importance, "POOL"): 32,
            (importance, "SAMPLE"): 8, (importance, "PROBES"): 3,
        }
    ):  # fmt: skip
        yield


def changed(constants):
    stack = ExitStack()
    for (module, name), value in constants.items():
        stack.enter_context(mock.patch.object(module, name, value))
    return stack


def answer(case, dtype, bank=None):
    """The posterior, or None where it is rightly refused."""
    note(f"{case} {dtype}")
    try:
        return case.posterior(dtype, bank)
    except gd.GolddiffError as error:
        if case.usual or "smaller values" not in str(error):
            raise
        return None


def agree(case, one, other, bank=None):
    """Two posteriors of the same case are the same, as far as rounding in their type lets them be."""
    formula = Formula(case.denoiser(), one, case.wanted, case.seeds)
    own = Formula(case.denoiser(bank), other, case.wanted, case.seeds)
    for b in range(len(case.x_t)):
        same = content_of(one.support, case.bank, b) == content_of(other.support, bank or case.bank, b)
        assert same or not case.clear
        drawn = one.support is not None and one.support.log_q is not None  # chances are float32, of either summation
        # where rounding says which rows are near, or how likely: right for its own
        expected = (formula if same and not drawn else own).of(b)
        if expected is not None:
            assert expected.holds(other, b) == ""
        else:  # random proposals, in float64 throughout
            assert torch.allclose(one.mean[b], other.mean[b], atol=1e-5 if one.mean.dtype == torch.float32 else 1e-9)


@share
@given(cases(), st.sampled_from((torch.float32, torch.float64)), st.sampled_from(({}, FAST, SMALL)))
def test_each_type_says_its_formula(case, dtype, constants):
    with changed(constants):
        posterior = answer(case, dtype)
        if posterior is None:
            return
        assert posterior.mean.dtype == dtype
        assert posterior.mean.shape == case.x_t.shape
        formula = Formula(case.denoiser(), posterior, case.wanted, case.seeds)
        for b in range(len(case.x_t)):
            expected = formula.of(b)
            assert expected is None or expected.holds(posterior, b) == ""


@share
@given(cases(), st.sampled_from((torch.float32, torch.float64)))
def test_the_order_of_rows_does_not_matter(case, dtype):
    if "permutation_invariant" not in case.denoiser().properties:
        assert "legacy_batch" in case.options
        return
    order = np.random.default_rng(len(case.rows)).permutation(len(case.rows))
    labels = None if case.labels is None else case.labels[order]
    other = gd.Bank.build(case.rows[order], labels=labels, layout="NCHW")
    if case.unstable(other):
        return
    posterior, permuted = answer(case, dtype), answer(case, dtype, other)
    if posterior is not None:
        agree(case, posterior, permuted, other)


@share
@given(cases(), st.sampled_from((torch.float32, torch.float64)), st.sampled_from((SMALL, FAST, SMALL | FAST)))
def test_the_size_of_blocks_does_not_matter(case, dtype, constants):
    posterior = answer(case, dtype)
    with changed(constants):
        other = answer(case, dtype)
        if posterior is not None:
            agree(case, posterior, other)


@share
@given(cases(), st.sampled_from((torch.float32, torch.float64)))
def test_a_batch_is_its_images(case, dtype):
    together = answer(case, dtype)
    if together is None:
        return
    denoiser = case.denoiser()
    formula = Formula(denoiser, together, case.wanted, case.seeds)
    for b, label in enumerate(case.wanted):
        alone = denoiser(case.x_t[b : b + 1].to(dtype), case.noise[b], label, seed=case.seeds[b])
        keys, own = content_of(together.support, case.bank, b), content_of(alone.support, case.bank, 0)
        assert keys == (own and own * (len(keys) // len(own)))  # beside tiles an image without has its rows in all
        expected = formula.of(b)
        if expected is not None:
            own = Formula(denoiser, alone, [label], [case.seeds[b]]).of(0)
            assert own.holds(alone, 0) == ""
        else:
            assert torch.allclose(alone.mean[0], together.mean[b], atol=1e-5)


@share
@given(cases(), st.sampled_from((2.0**-40, 0.37, 5.0, 2.0**30)))
def test_only_ratios_matter(case, scale):
    """In float64; scaled images are rounded once more."""
    posterior = answer(case, torch.float64)
    noise = gd.Noise(case.noise.alpha * scale, case.noise.sigma * scale)
    if posterior is None or case.unstable(case.bank, scale):
        return
    other = case.denoiser()(case.x_t * scale, noise, case.wanted, seed=case.seeds)
    formula = Formula(case.denoiser(), other, case.wanted, case.seeds)
    back = Formula(case.denoiser(), posterior, case.wanted, case.seeds)
    for b in range(len(case.x_t)):
        expected, own = formula.of(b), back.of(b)
        if expected is not None:
            assert expected.holds(other, b) == ""
            same = content_of(posterior.support, case.bank, b) == content_of(other.support, case.bank, b)
            assert same or not case.clear
            off = np.abs(expected.mean - own.mean)
            assert not same or expected.choices is not None or (off <= expected.mean_error + own.mean_error).all()


@share
@given(cases(), st.sampled_from((torch.float32, torch.float64)))
def test_weights_make_the_mean(case, dtype):
    posterior = answer(case, dtype)
    if posterior is None:
        return
    x, properties = rows_of(case.bank), case.denoiser().properties
    u = 2.0**-24 if dtype == torch.float32 else 2.0**-53
    room = 4 * (len(x) + 8) * u * np.abs(x).max()
    for b in range(len(case.x_t)):
        mean = posterior.mean[b].double().numpy().ravel()
        if posterior.ess is not None:
            ess = posterior.ess[b].double().numpy()
            candidates = case.bank.pixels[0, 0].numel() if case.name in ("els", "bbels") else 1
            assert (ess >= 1 - 4 * (len(x) + 8) * u).all()
            assert (ess <= int(posterior.support.eligible[b]) * candidates * (1 + 4 * (len(x) + 8) * u)).all()
        if "convex" in properties:
            there = slice(None) if case.wanted[b] < 0 else case.labels == case.wanted[b]
            assert (mean >= x[there].min(0) - room).all()
            assert (mean <= x[there].max(0) + room).all()
        if case.name in ("wiener", "els", "bbels"):
            continue
        rows, weights = posterior.weights(b)
        weights, values = weights.double().numpy(), x[rows.numpy()]
        assert (weights >= 0).all()
        assert np.abs(weights.sum(0) - 1).max() <= 4 * (len(x) + 8) * u
        assert len(rows.unique()) == len(rows)
        expected = Formula(case.denoiser(), posterior, case.wanted, case.seeds).of(b)
        told = weights @ values if weights.ndim == 1 else (weights * values).sum(0)
        slack = room if expected is None else room + 2 * expected.mean_error
        assert (np.abs(told - mean) <= slack).all()
        pieces = torch.cat([piece.pixels for piece in posterior.pieces(b)])
        assert pieces.sort().values.tolist() == list(range(len(mean)))


@share
@given(
    cases(("optimal", "pca", "golddiff", "ls", "optimal", "golddiff")), st.sampled_from((torch.float32, torch.float64))
)
def test_subsets_keep_what_they_promise(case, dtype):
    posterior = answer(case, dtype)
    if posterior is None:
        return
    sizes = ("k_min", "k_max", "m_min", "m_max", "tol", "search", "budget")
    options = {key: value for key, value in case.options.items() if key not in sizes} | {"retrieval": "full"}
    exact = gd.denoiser(case.name, case.bank, **options)
    everything = exact(case.x_t.to(dtype), case.noise, case.wanted, seed=case.seeds)
    formula = Formula(exact, everything, case.wanted, case.seeds)
    for b in range(len(case.x_t)):
        expected, count = formula.of(b), int(posterior.support.eligible[b])
        keys = content_of(posterior.support, case.bank, b)
        assert all(1 <= len(part) == len(set(part)) <= count for part in keys)
        if not posterior.support.tiled and len(keys[0]) == count:  # nothing is left out
            assert expected.holds(posterior, b) == ""
        if case.options["retrieval"] == "certified":
            off = np.abs(posterior.mean[b].double().numpy().ravel() - expected.mean)
            away = np.sqrt(np.square((off - 2 * expected.mean_error).clip(min=0)).mean())
            bound = float(posterior.error_bound[b])
            assert away <= bound * (1 + 1e-9)
            assert bound <= case.options["tol"] * (1 + 1e-6)
        if posterior.support.log_q is not None:
            for tile in range(len(keys)):
                chances = -posterior.support.log_q_of(b, tile)
                assert bool((chances <= 0).all())
                assert bool(chances.isfinite().all())


@share
@given(cases(), st.sampled_from((torch.float32, torch.float64)))
def test_the_same_again_and_without_some_rows(case, dtype):
    posterior = answer(case, dtype)
    if posterior is None:
        return
    again = answer(case, dtype)
    assert torch.equal(posterior.mean, again.mean)
    assert torch.equal(posterior.log_evidence, again.log_evidence)
    gone = np.arange(0, len(case.rows), 3)
    left = np.delete(np.arange(len(case.rows)), gone)
    if len(left) == 0 or "copies" in case.content or "legacy_batch" in case.options:
        return
    if case.labels is not None and not set(case.wanted) - {-1} <= set(case.labels[left].tolist()):
        return
    labels = None if case.labels is None else case.labels[left]
    built = gd.Bank.build(case.rows[left], labels=labels, layout="NCHW")
    view = case.bank.without(gone.tolist())
    if len(set(built.keys.tolist()) ^ set(case.bank.keys[left].tolist())):
        return  # copies got other keys
    a, b = answer(case, dtype, view), answer(case, dtype, built)
    formula = Formula(case.denoiser(built), b, case.wanted, case.seeds)
    for i in range(len(case.x_t)):
        expected = formula.of(i)
        if case.clear and case.options.get("retrieval") != "certified":  # which has other bounds there
            assert content_of(a.support, view, i) == content_of(b.support, built, i)
        if expected is not None:
            assert expected.holds(b, i) == ""


@share
@given(cases(("optimal", "pca", "golddiff", "ls", "wiener")), st.integers(0, 2**32 - 1))
def test_derivatives_are_a_jacobian(case, seed):
    """`v . J u = J^T v . u`; for whole images the covariance is symmetric and has no negative eigenvalues."""
    posterior = answer(case, torch.float64)
    if posterior is None or "legacy_batch" in case.options:  # which has no derivative
        return
    random = torch.Generator().manual_seed(seed)
    u, v = (torch.randn(case.x_t.shape, generator=random, dtype=torch.float64) for _ in range(2))
    forward, backward = posterior.jvp(u), posterior.vjp(v)
    size = forward.flatten(1).norm(dim=1) * v.flatten(1).norm(dim=1)
    size += backward.flatten(1).norm(dim=1) * u.flatten(1).norm(dim=1)
    off = ((v * forward).flatten(1).sum(1) - (backward * u).flatten(1).sum(1)).abs()
    assert bool((off <= 1e-9 * size + 1e-200).all())
    if posterior.log_evidence.ndim == 1:
        for b in range(len(case.x_t)):
            covariance = posterior.covariance(b)
            largest = float(covariance.abs().max())
            assert float((covariance - covariance.T).abs().max()) <= 1e-12 * largest
            assert float(torch.linalg.eigvalsh(covariance)[0]) >= -1e-12 * len(covariance) * largest


@share
@given(cases(), st.sampled_from((torch.float32, torch.float64)))
def test_declared_limits(case, dtype):
    """Towards no noise the nearest row, towards pure noise the mean of the rows."""
    x, denoiser = rows_of(case.bank), case.denoiser()
    for b, label in enumerate(case.wanted):
        there = np.arange(len(x)) if label < 0 else (case.labels == label).nonzero()[0]
        bank_only = case.name == "wiener" and case.options["statistics"] == "bank"
        eligible = x[there]
        if "mean_at_high_noise" in denoiser.properties:
            mean = (x if bank_only else eligible).mean(0)
            for noise in (gd.Noise(0.0, 1.0), gd.Noise(1.0, 1e8)):
                z = torch.from_numpy(np.random.default_rng(b).normal(size=(1, *case.bank.shape))) * noise.sigma
                found = denoiser(z.to(dtype), noise, label).mean.double().numpy().ravel()
                size, rho = float(np.linalg.norm(z)) / float(noise.sigma), 1e8  # (or none at all)
                # a logit is at most |z| |x_i| / rho from another; Wiener's gain is at most trace(C) / rho
                most = np.linalg.norm(x, axis=1).max()
                room = 4 * size * max(most**2, 1) / rho + 4 * (len(x) + 8) * 2.0**-24
                assert np.abs(found - mean).max() <= room
        if "nearest_at_low_noise" in denoiser.properties:
            row = there[b % len(there)]
            noise = gd.Noise(1.0, 1e-5)
            clean = torch.from_numpy(x[row]).reshape(1, *case.bank.shape)
            found = denoiser(clean.to(dtype), noise, label).mean.double().numpy().ravel()
            assert np.abs(found - x[row]).max() <= (1e-5 if dtype == torch.float32 else 1e-12)
