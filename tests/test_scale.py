"""Large banks: builds that go on where they were, statistics of a part, pools and searches."""

import json
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import torch

import golddiff as gd
from conftest import noisy, toy_arrays
from golddiff import bank as bank_module
from golddiff import importance, prepare, spectrum
from golddiff.cells import Cells, reached
from golddiff.files import growing_folder
from golddiff.images import Images
from golddiff.spectrum import Spectrum

SCHEDULE = gd.DDPM()


# ---- building ----------------------------------------------------------------------------------------


def counted(count: int, fails: set[int]) -> tuple[Images, list[int]]:
    """Images that remember what was read of them; reading a block of `fails` is interrupted, once."""
    pixels, labels = toy_arrays(count)
    begun: list[int] = []

    def read(start: int, stop: int) -> np.ndarray:
        begun.append(start)
        if start in fails:
            fails.remove(start)
            raise KeyboardInterrupt
        return pixels[start:stop]

    ids = [str(i) for i in range(count)]
    return Images((3, 4, 5), np.dtype(np.uint8), labels.astype(np.int64), ids, read), begun


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "bank.json" and path.is_file()}


def test_an_interrupted_build_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr(prepare, "NOTE_EVERY", 0)
    monkeypatch.setattr(prepare, "BLOCK", 100)
    whole = gd.Bank.build(counted(1000, set())[0], tmp_path / "whole")
    images, begun = counted(1000, {300, 700})
    for done in (300, 700):
        with pytest.raises(KeyboardInterrupt):
            gd.Bank.build(images, tmp_path / "bank")
        assert not (tmp_path / "bank").exists()
        assert max(begun) == done
        begun.clear()
    interrupted, before = threading.Event(), prepare.Pooling.__call__

    def stop_once(*arguments):
        if not interrupted.is_set() and len(arguments[1]) == 100:
            interrupted.set()
            raise KeyboardInterrupt
        return before(*arguments)

    monkeypatch.setattr(prepare.Pooling, "__call__", stop_once)
    with pytest.raises(KeyboardInterrupt):
        gd.Bank.build(images, tmp_path / "bank")
    assert begun == [700, 800, 900]  # what was finished is not read again
    begun.clear()
    bank = gd.Bank.build(images, tmp_path / "bank")
    assert begun == []
    assert bank.fingerprint == whole.fingerprint
    assert files(tmp_path / "bank") == files(tmp_path / "whole")
    assert bank.verify() == []
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_another_source_begins_again(tmp_path, monkeypatch):
    monkeypatch.setattr(prepare, "NOTE_EVERY", 0)
    monkeypatch.setattr(prepare, "BLOCK", 100)
    images, _ = counted(500, {200})
    with pytest.raises(KeyboardInterrupt):
        gd.Bank.build(images, tmp_path / "bank")
    others = toy_arrays(300, seed=1)[0]
    assert gd.Bank.build(others, tmp_path / "bank").fingerprint == gd.Bank.build(others).fingerprint


def test_a_failed_build_leaves_nothing(tmp_path):
    images, _ = counted(500, {0})
    with pytest.raises(KeyboardInterrupt):
        gd.Bank.build(images, tmp_path / "bank")
    assert list(tmp_path.iterdir()) == []


BUILD = """
import sys
import golddiff as gd
from golddiff import prepare
prepare.NOTE_EVERY, prepare.BLOCK = 0, 500
gd.Bank.build(sys.argv[1], sys.argv[2])
"""


def test_killed_at_random_moments(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (20_000, 3, 24, 24), dtype=np.uint8)
    np.save(tmp_path / "pixels.npy", pixels)
    command = [sys.executable, "-c", BUILD, str(tmp_path / "pixels.npy"), str(tmp_path / "bank")]
    random, kills = np.random.default_rng(1), 0
    for _ in range(5):
        building = subprocess.Popen(command)
        until = time.monotonic() + 60
        while not (tmp_path / ".bank-part").exists() and building.poll() is None and time.monotonic() < until:
            time.sleep(0.01)
        time.sleep(random.uniform(0, 0.8))
        building.send_signal(signal.SIGKILL)
        kills += building.wait() == -signal.SIGKILL
    assert kills > 0
    subprocess.run(command, check=True)
    bank = gd.Bank.open(tmp_path / "bank")
    assert bank.fingerprint == gd.Bank.build(pixels, layout="NCHW").fingerprint
    assert bank.verify() == []


def test_a_second_build_waits_for_the_first(tmp_path):
    out, order = tmp_path / "out", []

    def second():
        with growing_folder(out, "same", lambda _: False) as folder:
            order.append(folder)

    with growing_folder(out, "same", lambda _: False) as folder:
        (folder / "file").write_text("done")
        thread = threading.Thread(target=second)
        thread.start()
        time.sleep(0.3)
        assert order == []
    thread.join(10)
    assert order == [None]  # it was made meanwhile
    assert (out / "file").read_text() == "done"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


# ---- statistics --------------------------------------------------------------------------------------


def random_spectrum(size: int = 40, count: int = 7, rest: float = 0.3) -> Spectrum:
    generator = torch.Generator().manual_seed(0)
    vectors = torch.linalg.qr(torch.randn(size, count, generator=generator, dtype=torch.float64))[0]
    values = torch.linspace(1, 5, count, dtype=torch.float64)
    covariance = (vectors * (values - rest)) @ vectors.T + rest * torch.eye(size, dtype=torch.float64)
    mean = torch.zeros(size, dtype=torch.float64)
    return Spectrum(mean, covariance.diagonal().clone(), values, vectors, torch.tensor(rest, dtype=torch.float64))


def test_what_is_left_out_counts_as_equal():
    some = random_spectrum()
    covariance = some.eigenvectors * (some.eigenvalues - some.rest) @ some.eigenvectors.T
    covariance += some.rest * torch.eye(40, dtype=torch.float64)
    for alpha, sigma in ((0.9, 0.4), (0.1, 1.0), (1.0, 0.01)):
        total = alpha**2 * covariance + sigma**2 * torch.eye(40, dtype=torch.float64)
        own, columns = some.filter(alpha, sigma)
        w = torch.cat([block for _, block in columns()], dim=1)
        assert torch.allclose(w, covariance @ torch.linalg.inv(total), atol=1e-11)
        assert torch.allclose(own, w.diagonal())
        x = torch.randn(3, 40, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        levels = torch.full((3, 1), alpha, dtype=torch.float64), torch.full((3, 1), sigma, dtype=torch.float64)
        mean, log_density = some.denoise(x, *levels)
        assert torch.allclose(mean, alpha * x @ torch.linalg.inv(total) @ covariance, atol=1e-10)
        gauss = torch.distributions.MultivariateNormal(torch.zeros(40, dtype=torch.float64), total)
        white = torch.distributions.Normal(torch.zeros((), dtype=torch.float64), sigma)
        expected = gauss.log_prob(x) - white.log_prob(torch.zeros(40, dtype=torch.float64)).sum()
        assert torch.allclose(log_density, expected, atol=1e-8)


@pytest.mark.parametrize("border", [False, True])
def test_leading_eigenvectors_make_the_same_masks(border, monkeypatch):
    """Where the covariance itself is kept, its leading eigenvectors stand for it at high noise, if pixels are alike in
    what these leave out: not if some hardly vary."""
    generator = torch.Generator().manual_seed(0)
    smooth = torch.nn.functional.avg_pool2d(torch.randn(3000, 1, 18, 18, generator=generator), 7, stride=1)
    pixels = 0.3 * smooth / smooth.std() + 0.05 * torch.randn(3000, 1, 12, 12, generator=generator)
    if border:
        pixels[:, :, 0] *= 0.01
    pixels = (127.5 + 127.5 * pixels).clamp(0, 255).round().to(torch.uint8).numpy()
    bank, large = (gd.Bank.build(pixels, layout="NCHW") for _ in range(2))
    noise = SCHEDULE(700)
    whole, exact = bank.spectrum(), gd.denoiser("pca", bank).locality.mask(noise)
    monkeypatch.setattr(bank_module, "LARGEST_EIGENBASIS", 8)
    statistics = large.spectrum()
    assert isinstance(statistics, spectrum.DenseCovariance)
    count = len(statistics.eigenvalues)
    assert count == 72
    assert torch.allclose(statistics.leading.eigenvalues, whole.eigenvalues[-count:], rtol=1e-4)
    assert float(statistics.eigenvalues[0] / noise.rho**2) < spectrum.AGREES
    found = gd.denoiser("pca", large).locality.mask(noise)
    assert float((found & exact).sum() / (found | exact).sum()) > 0.97
    monkeypatch.setattr(spectrum, "AGREES", -1.0)
    dense, _ = statistics.filter(float(noise.alpha), float(noise.sigma))
    monkeypatch.setattr(spectrum, "AGREES", 4e-3)
    taken, _ = statistics.filter(float(noise.alpha), float(noise.sigma))
    assert torch.equal(dense, taken) == border  # the short cut is taken where it holds


def test_statistics_of_a_part(monkeypatch):
    monkeypatch.setattr(bank_module, "STATISTICS_ROWS", 500)
    pixels, labels = toy_arrays(900)
    order = torch.randperm(900, generator=torch.Generator().manual_seed(0))
    bank, other = gd.Bank.build(pixels, labels=labels), gd.Bank.build(pixels[order], labels=labels[order])
    rows = bank.keys.argsort()[:500]
    chosen = bank.images(rows, torch.float64).flatten(1)
    assert torch.allclose(bank.spectrum().mean, chosen.mean(0))
    assert torch.allclose(bank.spectrum().variances, chosen.var(0))
    assert torch.allclose(bank.spectrum().variances, other.spectrum().variances)  # whatever the order
    assert torch.allclose(bank.spectrum(0).mean, bank.images(bank.rows_of(0), torch.float64).flatten(1).mean(0))


# ---- pools and searches ------------------------------------------------------------------------------


@pytest.fixture
def small(monkeypatch):
    """Everything but the bank is as for large banks."""
    monkeypatch.setattr(importance, "SCORED", 1000)
    monkeypatch.setattr(importance, "POOL", 3000)
    monkeypatch.setattr(importance, "SAMPLE", 1024)
    return gd.Bank.build("mnist5k")


def local(bank, **options):
    return gd.denoiser("golddiff", bank, **{"tol": 0.05, "search": 1500, **options})


def test_a_pool_where_it_is_broad_and_a_search_where_it_is_not(small):
    denoise = local(small)
    kinds = [denoise.subset.plan(SCHEDULE(t), denoise.locality).kind for t in range(900, -1, -100)]
    assert kinds[0] == "pool"
    assert kinds[-1] == "search"
    assert sorted(kinds) == kinds  # pools, then searches
    scored = local(small, search=0)
    assert {scored.subset.plan(SCHEDULE(t), scored.locality).kind for t in (900, 400, 0)} == {"all"}


def test_a_search_scores_more_than_are_wanted(small):
    noise, kinds = SCHEDULE(300), []
    for tol in (0.05, 0.025, 0.01):
        denoise = local(small, tol=tol, search=500)
        plan, wanted = (f(noise, denoise.locality) for f in (denoise.subset.plan, denoise.subset.wanted))
        kinds.append(plan.kind)
        assert plan.rows >= min(2 * wanted, 5000)
    assert kinds[0] == "search"
    assert kinds[-1] == "all"


@pytest.mark.parametrize("t", [900, 600, 300, 0])
def test_scoring_some_rows_costs_little_accuracy(t, small):
    noise = SCHEDULE(t)
    x_t = noisy(small, noise, rows=range(0, 5000, 1000), dtype=torch.float32)
    exact = gd.denoiser("pca", small)(x_t, noise).mean
    errors = []
    for denoise in (local(small), local(small, search=0)):
        found = [denoise(x_t, noise, seed=range(i, i + 5)).mean for i in range(0, 15, 5)]
        errors.append(float((torch.stack(found) - exact).square().mean().sqrt()))
    assert errors[0] < 1.6 * errors[1] + 2e-3


@pytest.mark.parametrize("t", [900, 300])
def test_sums_over_what_is_reached_are_unbiased(t, small):
    """Over many seeds, the weights of what is taken, each as often as `log_q` says, have the sum of those of all."""
    noise, subset = SCHEDULE(t), local(small).subset
    locality = local(small).locality
    x_t = noisy(small, noise, rows=[7], dtype=torch.float32)
    support = subset.select(x_t.expand(60, -1, -1, -1), noise, locality, None, torch.arange(60))
    assert support.size < 3000
    q, s = small.query(x_t.double(), noise)
    scores = subset._scores.shared(q, s[0], subset._scores.level(noise, locality, None), torch.arange(5000))
    weights = scores[0].double().softmax(-1).expand(60, -1, -1)
    taken = weights.gather(2, support.rows.clamp(min=0)) * support.log_q.double().exp() * (support.rows >= 0)
    sums = taken.sum(-1)
    assert bool(((sums.mean(0) - 1).abs() < 5 * sums.std(0) / 60**0.5 + 1e-6).all())
    assert float(sums.std(0).median()) < 0.1


def test_one_seed_one_image_also_when_searching(small):
    noise, denoise = SCHEDULE(400), local(small)
    assert denoise.subset.plan(noise, denoise.locality).kind == "search"
    x_t = noisy(small, noise, rows=[5, 800, 4000], dtype=torch.float32)
    together = denoise(x_t, noise, seed=[3, 4, 5]).mean
    alone = torch.cat([denoise(x_t[i : i + 1], noise, seed=3 + i).mean for i in range(3)])
    assert torch.allclose(together, alone, atol=1e-5)
    order = torch.randperm(5000, generator=torch.Generator().manual_seed(0))
    permuted = gd.Bank.build(small.pixels[order].numpy(), labels=small.labels[order].numpy(), layout="NCHW")
    assert torch.allclose(local(permuted)(x_t, noise, seed=[3, 4, 5]).mean, together, atol=1e-4)


def some_cells(bank, t=400):
    denoise = local(bank)
    level = denoise.subset._scores.level(SCHEDULE(t), denoise.locality, None)
    return denoise.subset, level, denoise.subset._cells_of(level)


def test_every_row_is_in_one_cell(small):
    _, level, cells = some_cells(small)
    for t in range(len(level.counts)):
        assert torch.equal(cells.rows[t].long().sort().values, torch.arange(5000))
        owner = torch.repeat_interleave(torch.arange(cells.begins.shape[1] - 1), cells.begins[t].diff())
        assert torch.equal(cells.cells[cells.rows[t].long(), t].long(), owner)


def test_the_compiled_search_is_the_plain_one(small):
    pytest.importorskip("numba")
    subset, level, cells = some_cells(small)
    noise = SCHEDULE(400)
    q, s = small.query(noisy(small, noise, rows=[1, 2]), noise)
    seen, step = subset._scores.query(q, s[0], level)
    least = float(np.log(0.05))
    chances = cells.chances(seen, step, 800, least)
    expected = (chances.double().exp() * cells.begins.diff(dim=1)).sum(-1)
    assert bool((expected >= 799).all())
    assert bool((expected <= 800 + 0.05 * 5000).all())
    lots = torch.rand(2, 5000, generator=torch.Generator().manual_seed(0)).log()
    found = [reached(cells, chances, least, lots, compiled) for compiled in (True, False)]
    for g in range(len(found[0][0])):
        sets = []
        for rows, bounds, left in found:
            here = rows[g] >= 0
            order = rows[g][here].argsort()
            sets.append([part[g][here][order] for part in (rows, bounds, left)])
        assert all(torch.equal(*pair) for pair in zip(*sets, strict=True))
    rows = found[0][0]
    own = subset._scores.own(q, s[0], level, rows)
    shared = subset._scores.shared(q, s[0], level, torch.arange(5000)).flatten(0, 1)
    expected = shared.gather(1, rows.clamp(min=0))
    assert torch.allclose(own[rows >= 0], expected[rows >= 0], atol=2e-3, rtol=1e-4)


def test_cells_are_kept_with_the_bank(small):
    _, level, _ = some_cells(small)
    assert (small.path / "derived" / f"cells-{level.name}.safetensors").exists()
    before = Cells.find
    try:
        Cells.find = None
        some_cells(gd.Bank.open(small.path))
    finally:
        Cells.find = before


def test_search_is_checked(small):
    for wrong in (-1, 2.5, "many", True):
        with pytest.raises(gd.GolddiffError, match="search"):
            local(small, search=wrong)
    with pytest.raises(gd.GolddiffError, match="no effect"):
        gd.denoiser("golddiff", small, retrieval="paper", search=5)
    assert json.loads(json.dumps(local(small).options))["search"] == 1500
