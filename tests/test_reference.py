"""Agreement with what other people's implementations gave (GOLDDIFF_REFERENCE)."""

import numpy as np
import pytest
import torch

import golddiff as gd
from conftest import outside
from golddiff.denoise import MaskedDenoiser
from golddiff.golden import Subset, Support, nearest_proxies, nearest_rows
from golddiff.locality import GivenMask

TIMES = range(900, -1, -100)
CASES = {"mnist": "mnist2k", "cifar10": "cifar102k"}
ATOL = 2e-4


class GivenRows(Subset):
    """The golden rows of the stored run."""

    by_level = True

    def __init__(self, rows):
        self.rows = torch.from_numpy(rows).long()

    def select(self, x_t, noise, locality, eligible, seed, label=None):
        return Support(self.rows[:, None], None, None, torch.full((len(x_t),), 2000), shared=False)


@pytest.fixture(scope="module", params=CASES)
def case(request):
    outside("GOLDDIFF_DATA")
    folder, short = outside("GOLDDIFF_REFERENCE"), CASES[request.param]
    stored = {kind: np.load(folder / f"{kind}_{short}.npz") for kind in ("golddiff", "pca_locality", "wiener")}
    return gd.Bank.build(request.param, limit=2000), stored


def at(case, t):
    """Bank, stored arrays, index of the step, noise level, x_t and mask."""
    bank, stored = case
    i = stored["golddiff"]["timesteps"].tolist().index(t)
    x_t = torch.from_numpy(stored["golddiff"]["x_t"][i])
    bits = np.unpackbits(stored["golddiff"][f"mask_{t}"], axis=1, count=bank.D)
    return bank, stored, i, gd.DDPM()(t), x_t, torch.from_numpy(bits).bool()


def error(posterior, stored):
    return float((posterior.mean - torch.from_numpy(stored)).abs().max())


@pytest.mark.parametrize("t", TIMES)
def test_given_the_pool_the_golden_rows_are_the_same(case, t):
    bank, stored, _, noise, x_t, _ = at(case, t)
    theirs, pools = stored["golddiff"][f"golden_{t}"], stored["golddiff"][f"pool_{t}"]
    q, s = bank.query(x_t, noise)
    drawn = [torch.from_numpy(pool).long() for pool in pools[: len(x_t)]]
    for b, candidates in enumerate(nearest_proxies(bank, q, s, None, drawn, 200)):
        rows = nearest_rows(bank, q[b], s[b], candidates, theirs.shape[1])
        ours, other = set(rows.tolist()), set(theirs[b].tolist())
        mine = bank.distances(q[b], s[b], torch.tensor(sorted(ours - other), dtype=torch.int64))
        yours = bank.distances(q[b], s[b], torch.tensor(sorted(other - ours), dtype=torch.int64))
        assert torch.allclose(mine.sort().values, yours.sort().values, rtol=1e-6)  # ties only


@pytest.fixture(params=["kernel", "products"])
def path(request, monkeypatch):
    """With the compiled kernel (where it is installed and the work is worth it), and without."""
    if request.param == "products":
        monkeypatch.setattr("golddiff.denoise.compiled.WORTH", float("inf"))


@pytest.mark.parametrize("t", TIMES)
@pytest.mark.usefixtures("path")
def test_given_mask_and_rows_golddiff_agrees(case, t):
    bank, stored, i, noise, x_t, mask = at(case, t)
    denoiser = MaskedDenoiser(bank, GivenMask(mask, bank.D), GivenRows(stored["golddiff"][f"golden_{t}"]))
    assert error(denoiser(x_t, noise), stored["golddiff"]["x0"][i]) < ATOL


@pytest.mark.parametrize("t", TIMES)
@pytest.mark.usefixtures("path")
def test_given_the_mask_pca_locality_agrees(case, t):
    bank, stored, i, noise, x_t, mask = at(case, t)
    exact = gd.denoiser("pca", bank, mask=mask)(x_t, noise)
    assert error(exact, stored["pca_locality"]["x0_exact"][i]) < ATOL
    legacy = gd.denoiser("pca", bank, mask=mask, legacy_batch=256)(x_t, noise)
    assert error(legacy, stored["pca_locality"]["x0_per_batch_256"][i]) < ATOL


@pytest.mark.parametrize("t", TIMES)
def test_wiener_agrees(case, t):
    bank, stored, i, noise, x_t, _ = at(case, t)
    assert error(gd.denoiser("wiener", bank)(x_t, noise), stored["wiener"]["x0"][i]) < ATOL


@pytest.mark.parametrize("t", [900, 700, 500])
def test_published_rule_agrees_where_it_is_stable(case, t):
    bank, _, _, noise, _, mask = at(case, t)
    threshold = 0.03 if bank.shape[0] == 3 else 0.02
    ours = gd.denoiser("pca", bank, mask_rule="published", threshold=threshold).locality.mask(noise)
    assert float((ours & mask).sum() / (ours | mask).sum()) > 0.96


def test_steps_follow_each_other_by_ddim(case):
    data = case[1]["golddiff"]
    means, noises = torch.from_numpy(data["x0"]), [gd.DDPM()(int(t)) for t in data["timesteps"]]
    count = iter(range(10))

    def denoise(x_t, noise):
        mean = means[next(count)]
        return gd.Posterior(mean, torch.zeros(len(mean)), None, None, x_t, noise)

    levels = [(float(t), n) for t, n in zip(data["timesteps"], noises, strict=True)]
    for step in gd.DDIM().steps(denoise, torch.from_numpy(data["x_t"][0]), levels, range(4)):
        if step.index < 9:
            assert float((step.x_next - torch.from_numpy(data["x_t"][step.index + 1])).abs().max()) < 2e-5


@pytest.mark.parametrize("name", ["mnist", "cifar10"])
@pytest.mark.parametrize("t", [900, 500, 200, 100])
def test_optimal_is_kambs_ideal_score_machine(name, t):
    outside("GOLDDIFF_DATA")
    stored = np.load(outside("GOLDDIFF_REFERENCE") / f"kamb_{name}.npz")
    bank = gd.Bank.build(name, limit=int(stored["n_rows"]))
    posterior = gd.denoiser("optimal", bank)(torch.from_numpy(stored[f"x_t_{t}"]), gd.DDPM()(t))
    assert error(posterior, stored[f"is_k0_t{t}"]) < ATOL
