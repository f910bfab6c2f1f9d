import numpy as np
import pytest
import torch

import golddiff as gd
import oracles
from conftest import noisy, toy_arrays
from golddiff.golden import Budget, GoldenSubset, draw, nearest_rows, smallest
from golddiff.locality import WholeImage

SCHEDULE = gd.DDPM()


def test_budgets_are_the_papers():
    budget = Budget(2500, 5000, 5000, 50000)
    for t, abar in enumerate(SCHEDULE.alphas_cumprod.double().tolist()):
        loc = 1 - (1 - abar) ** 0.5
        m, k = budget.sizes(SCHEDULE(t), 50000)
        assert m == round(5000 + 45000 * loc)
        assert k == max(2500, round(5000 - 2500 * loc))


@pytest.mark.parametrize("count", [1, 2, 7, 100, 1797])
def test_budgets_are_monotone_and_within_bounds(count):
    sizes = [Budget().sizes(SCHEDULE(t), count) for t in range(999, -1, -37)]
    m, k = (list(column) for column in zip(*sizes, strict=True))
    assert m == sorted(m)
    assert k == sorted(k, reverse=True)
    assert all(1 <= k_t <= m_t <= count for m_t, k_t in sizes)


@pytest.mark.parametrize(
    "sizes",
    [{"k_min": 9, "k_max": 5}, {"k_min": 0}, {"k_max": 1.5}, {"m_min": -3}, {"m_min": 50, "m_max": 40}, {"k_min": True},
     {"k_max": 0.5, "m_min": 0.2}],
)  # fmt: skip
def test_budgets_that_make_no_sense_are_refused(toy, sizes):
    with pytest.raises(gd.GolddiffError):
        gd.denoiser("golddiff", toy, retrieval="reference", **sizes)


@pytest.mark.parametrize("t", [999, 500, 0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_nearest_rows_are_the_nearest(toy, t, dtype):
    noise = SCHEDULE(t)
    x_t = noisy(toy, noise, dtype=dtype)
    q, s = toy.query(x_t, noise)
    rows = toy.images(slice(None), torch.float64).flatten(1).numpy()
    for b in range(3):
        expected = oracles.nearest(x_t[b].flatten().double().numpy(), rows, float(noise.alpha), 7)
        assert nearest_rows(toy, q[b], s[b], torch.arange(60), 7).tolist() == sorted(expected)


def test_equal_distances_go_by_key_whatever_the_order():
    pixels, _ = toy_arrays(5)
    many = np.concatenate([pixels] * 20)
    order = np.random.default_rng(0).permutation(100)
    noise = SCHEDULE(300)
    chosen = []
    for bank in (gd.Bank.build(many), gd.Bank.build(many[order])):
        x_t = noisy(gd.Bank.build(pixels), noise, rows=[0], dtype=torch.float32)
        q, s = bank.query(x_t, noise)
        chosen.append(sorted(bank.keys[nearest_rows(bank, q[0], s[0], torch.arange(100), 33)].tolist()))
    assert chosen[0] == chosen[1]


def test_values_near_the_cut_are_measured_exactly():
    truth = torch.arange(1000, dtype=torch.float64) / 1000
    noise = torch.rand(1000, generator=torch.Generator().manual_seed(0), dtype=torch.float64) - 0.5
    fast = (truth + 0.04 * noise).float()
    measured = []

    def exact(i):
        measured.append(len(i))
        return truth[i]

    chosen = smallest(fast, 400, 0.02, exact, lambda i: i)
    assert sorted(chosen.tolist()) == list(range(400))
    assert max(measured) < 200


def test_pools_are_uniform_and_independent_of_other_rows():
    keys = torch.from_numpy(np.random.default_rng(0).integers(-(2**63), 2**63 - 1, 500))
    counts = torch.zeros(500)
    for seed in range(2000):
        counts[draw(keys, 50, seed, 77)] += 1
    # each count is Binomial(2000, 0.1): mean 200, standard deviation 13.4
    assert abs(float(counts.std()) - 13.4) < 1.5
    assert float((counts - 200).abs().max()) < 60
    pool = set(keys[draw(keys, 50, 3, 77)].tolist())
    rest = keys[torch.randperm(500, generator=torch.Generator().manual_seed(1))[:400]]
    again = set(rest[draw(rest, 50, 3, 77)].tolist())
    assert pool & set(rest.tolist()) <= again
    assert pool != set(keys[draw(keys, 50, 4, 77)].tolist())
    assert pool != set(keys[draw(keys, 50, 3, 78)].tolist())


def test_paper_retrieval_is_nearest_of_nearest(toy):
    noise = SCHEDULE(200)
    x_t = noisy(toy, noise, rows=range(8))
    subset = GoldenSubset(toy, "paper", Budget(4, 8, 12, 30))
    m, k = subset.budget.sizes(noise, 60)
    support = subset.select(x_t, noise, WholeImage(), None, torch.zeros(8, dtype=torch.int64))
    rows = toy.images(slice(None), torch.float64)
    for b in range(8):
        small = toy.pooling(rows.flatten(1)).numpy()
        query = toy.pooling(x_t[b : b + 1].flatten(1)).numpy()[0]
        candidates = oracles.nearest(query, small, float(noise.alpha), m)
        best = oracles.nearest(x_t[b].flatten().numpy(), rows.flatten(1).numpy()[candidates], float(noise.alpha), k)
        assert support.rows_of(b).tolist() == sorted(candidates[i] for i in best)


def test_golden_recall_against_exact_neighbours_at_low_noise(digits):
    noise = SCHEDULE(0)
    x_t = noisy(digits, noise, rows=range(40))
    subset = GoldenSubset(digits, "paper", Budget(10, 20, 100, 400))
    support = subset.select(x_t, noise, WholeImage(), None, torch.zeros(40, dtype=torch.int64))
    rows = digits.images(slice(None), torch.float64).flatten(1)
    exact = torch.cdist(x_t.flatten(1), float(noise.alpha) * rows).topk(10, largest=False).indices
    hits = [len(set(exact[b].tolist()) & set(support.rows_of(b).tolist())) for b in range(40)]
    assert hits == [10] * 40


def test_a_class_restricts_pool_and_subset(toy):
    denoiser = gd.denoiser("golddiff", toy, retrieval="reference")
    noise = SCHEDULE(400)
    support = denoiser(noisy(toy, noise), noise, label=[0, 2, -1]).support
    assert {int(toy.labels[r]) for r in support.rows_of(0)} == {0}
    assert {int(toy.labels[r]) for r in support.rows_of(1)} == {2}
    counts = [int((toy.labels == 0).sum()), int((toy.labels == 2).sum()), 60]
    assert support.eligible.tolist() == counts
    assert [len(support.rows_of(b)) for b in range(3)] == [Budget().sizes(noise, n)[1] for n in counts]


@pytest.mark.parametrize("name", ["golddiff", "nearest", "optimal"])
def test_noise_beyond_float32_in_float64(digits, name):
    options = {} if name == "nearest" else {"retrieval": "paper"}
    noise = gd.Noise(1.0, 1e-20)
    x_t = digits.images(slice(3, 5), torch.float64)
    mean = gd.denoiser(name, digits, **options)(x_t, noise).mean
    assert torch.allclose(mean, x_t, atol=1e-9)
