"""Oracles, metrics, and the comparison."""

import json
import math

import numpy as np
import pytest
import torch

import golddiff as gd
from conftest import noisy, outside
from golddiff.compare import parse_method
from golddiff.metrics import agreement, copies, distribution, extractor, mean_and_error, reference_features
from golddiff.training import Training, train_oracle
from test_cli import call


def teacher(bank, prediction):
    """A network that knows: its answers make the optimal denoiser's mean."""
    optimal, schedule = gd.denoiser("optimal", bank), gd.DDPM()

    def network(x, t):
        levels = [schedule(float(v)) for v in t]
        noise = gd.Noise([float(n.alpha) for n in levels], [float(n.sigma) for n in levels])
        mean = optimal(x, noise).mean
        alpha, sigma = noise.like(x)
        eps = (x - alpha * mean) / sigma
        return {"epsilon": eps, "sample": mean, "v_prediction": alpha * eps - sigma * mean}[prediction]

    return network


@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v_prediction"])
def test_an_oracle_reads_what_a_network_says(digits, prediction):
    network = gd.oracle(teacher(digits, prediction), digits, prediction=prediction, schedule="ddpm")
    levels = [gd.DDPM()(t) for t in (900, 200, 500)]
    noise = gd.Noise([float(n.alpha) for n in levels], [float(n.sigma) for n in levels])
    x_t = torch.cat([noisy(digits, n, rows=[i], dtype=torch.float32) for i, n in enumerate(levels)])
    exact = gd.denoiser("optimal", digits)(x_t, noise).mean
    assert float((network(x_t, noise).mean - exact).abs().max()) < 1e-3
    # the same level, scaled as flow matching or EDM scale it
    scaled = gd.Noise(noise.alpha * 3, noise.sigma * 3)
    assert float((network(x_t * 3, scaled).mean - exact).abs().max()) < 1e-3


def test_a_denoised_network_sees_sigma(digits):
    optimal = gd.denoiser("optimal", digits)
    network = gd.oracle(
        lambda x, sigma: optimal(x, gd.Noise([1.0] * len(x), sigma)).mean, digits, prediction="denoised"
    )
    noise = gd.DDPM()(400)
    x_t = noisy(digits, noise, dtype=torch.float32)
    assert float((network(x_t, noise).mean - optimal(x_t, noise).mean).abs().max()) < 1e-4


def test_times_between_those_of_the_table(digits):
    seen = []
    network = gd.oracle(lambda x, t: seen.extend(t.tolist()) or x, digits, prediction="sample", schedule="ddpm")
    x_t = torch.zeros(1, 1, 8, 8)
    for t in (0, 17, 999):
        network(x_t, gd.DDPM()(t))
    angles = [math.atan2(float(gd.DDPM()(t).sigma), float(gd.DDPM()(t).alpha)) for t in (500, 501)]
    half = sum(angles) / 2
    network(x_t, gd.Noise(math.cos(half), math.sin(half)))
    network(x_t, gd.Noise(1.0, 1e-6))
    assert seen == [0, 17, 999, pytest.approx(500.5), 0]


def test_wrong_oracles_are_refused(digits, tmp_path):
    with pytest.raises(gd.GolddiffError, match="schedule"):
        gd.oracle(lambda x, t: x, digits)
    with pytest.raises(gd.GolddiffError, match="prediction"):
        gd.oracle(lambda x, t: x, digits, prediction="noise", schedule="ddpm")
    with pytest.raises(gd.GolddiffError, match="give its folder"):
        gd.oracle(tmp_path, digits)
    with pytest.raises(gd.GolddiffError, match="callable"):
        gd.oracle(7, digits)
    shrinks = gd.oracle(lambda x, t: x[:, :, :4], digits, schedule="ddpm")
    with pytest.raises(gd.GolddiffError, match="keep the shape"):
        shrinks(torch.zeros(1, 1, 8, 8), gd.DDPM()(5))


def test_stored_oracles_need_a_schedule_and_the_right_shape(digits):
    folder = outside("GOLDDIFF_ORACLES") / "mnist"
    with pytest.raises(gd.GolddiffError, match="1 x 28 x 28"):
        gd.oracle(folder, digits)
    with pytest.raises(gd.GolddiffError, match="oracle-schedule"):
        gd.oracle(folder, gd.Bank.build("mnist5k", limit=50))


def test_a_stored_oracle_denoises():
    folder = outside("GOLDDIFF_ORACLES") / "mnist"
    bank = gd.Bank.build("mnist5k", limit=50)
    network = gd.oracle(folder, bank, schedule="ddpm")
    for t in (50, 300):
        noise = gd.DDPM()(t)
        x_t = noisy(bank, noise, rows=range(8), dtype=torch.float32)
        before = float((x_t / noise.like(x_t)[0] - bank.images(slice(0, 8))).square().mean())
        assert float((network(x_t, noise).mean - bank.images(slice(0, 8))).square().mean()) < before / 4


def test_agreement_is_as_the_paper_defines_it():
    u = torch.tensor([[[[-1.0, 1.0], [0.0, 0.5]]]])
    x = torch.tensor([[[[-3.0, 0.5], [0.0, 0.5]]]])
    found = agreement(x, u)
    # in [0, 1]: u = 0, 1, .5, .75; x = 0 (clamped), .75, .5, .75; variance of u: mean .5625, squares sum .546875 / 3
    assert float(found.mse) == pytest.approx(0.0625 / 4)
    assert float(found.r2) == pytest.approx(1 - 0.0625 / (4 * (0.546875 / 3)))
    same = agreement(u, u)
    assert (float(same.mse), float(same.r2), float(same.cosine)) == (0.0, 1.0, pytest.approx(1.0))
    with pytest.raises(gd.GolddiffError, match="same shape"):
        agreement(u, u[:, :, :1])


def test_mean_and_error():
    assert mean_and_error(torch.tensor([1.0, 3.0])) == (2.0, 1.0)
    assert mean_and_error(torch.tensor([1.0, math.nan]))[0] == 1.0
    assert math.isnan(mean_and_error(torch.tensor([1.0]))[1])


def test_copies_are_found(digits):
    images = digits.images(torch.tensor([3, 50]))
    images[1] = torch.randn(1, 8, 8, generator=torch.Generator().manual_seed(0)).clamp(-1, 1)
    found = copies(images, digits)
    assert int(found.row[0]) == 3
    assert float(found.d1[0]) == pytest.approx(0, abs=1e-6)
    assert found.share == 0.5
    rows = digits.images(slice(None), torch.float64).flatten(1)
    exact = (rows - images[1].double().flatten()).square().mean(1).sqrt().sort().values
    assert [float(found.d1[1]), float(found.d2[1])] == pytest.approx(exact[:2].tolist())


def test_distribution_metrics():
    random = torch.Generator().manual_seed(0)
    a = torch.randn(400, 3, generator=random, dtype=torch.float64)
    b = torch.randn(500, 3, generator=random, dtype=torch.float64)
    same, far = distribution(a, b), distribution(a + 10, b)
    assert abs(same["kid"][0]) < 0.1
    assert same["fid"][0] < 0.1
    assert same["precision"][0] > 0.9
    assert same["coverage"][0] > 0.9
    assert far["fid"][0] == pytest.approx(300, rel=0.03)  # the square of the distance of the means
    assert far["precision"][0] == far["recall"][0] == far["coverage"][0] == far["density"][0] == 0
    # both ways to the trace of the root: fewer images than features, and more
    wide = torch.cat([b, torch.zeros(500, 600)], 1)
    assert distribution(torch.cat([a, torch.zeros(400, 600)], 1), wide)["fid"][0] == pytest.approx(
        same["fid"][0], abs=1e-4
    )
    with pytest.raises(gd.GolddiffError, match="one extractor"):
        distribution(a, b[:, :2])


def test_distribution_metrics_agree_with_other_code():
    """FID by a matrix root of SciPy, KID by scikit-learn's kernel, the rest by counting."""
    linalg = pytest.importorskip("scipy.linalg")
    pairwise = pytest.importorskip("sklearn.metrics.pairwise")
    random = np.random.default_rng(0)
    a, b = random.normal(size=(60, 7)) @ random.normal(size=(7, 7)), random.normal(0.3, 1.2, (80, 7))
    ours = {k: v for k, (v, _) in distribution(torch.from_numpy(a), torch.from_numpy(b)).items()}
    covariances = np.cov(a.T), np.cov(b.T)
    root = linalg.sqrtm(covariances[0] @ covariances[1]).real
    fid = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(covariances[0] + covariances[1] - 2 * root)
    assert ours["fid"] == pytest.approx(fid, rel=1e-8)
    within = [pairwise.polynomial_kernel(x, degree=3, gamma=1 / 7, coef0=1) for x in (a, b)]
    across = pairwise.polynomial_kernel(a, b, degree=3, gamma=1 / 7, coef0=1)
    kid = sum((k.sum() - np.trace(k)) / (len(k) * (len(k) - 1)) for k in within) - 2 * across.mean()
    assert ours["kid"] == pytest.approx(kid, rel=1e-8)
    inside = [np.sort(pairwise.euclidean_distances(x), 1)[:, 5] for x in (a, b)]  # 0 is the point itself
    apart = pairwise.euclidean_distances(a, b)
    assert ours["precision"] == pytest.approx((apart <= inside[1]).any(1).mean())
    assert ours["recall"] == pytest.approx((apart <= inside[0][:, None]).any(0).mean())
    assert ours["density"] == pytest.approx((apart <= inside[1]).sum(1).mean() / 5)
    assert ours["coverage"] == pytest.approx((apart.min(0) <= inside[1]).mean())


def test_pictures_of_any_origin_are_evaluated(digits, tmp_path, capsys):
    pictures = digits.pixels[:40, 0].numpy()
    np.savez(tmp_path / "pictures.npz", pictures)
    out = tmp_path / "found.json"
    command = ["evaluate", str(tmp_path / "pictures.npz"), "--bank", "digits", "--layout", "NHW", "--out", str(out)]
    code, said, _ = call(capsys, *command)
    assert code == 0
    assert "fid" in said
    found = json.loads(out.read_text())
    assert found["copies"] == 1
    assert found["sets"]["precision"][0] == 1
    np.save(tmp_path / "other.npy", np.zeros((9, 5, 5), np.uint8))
    code, _, error = call(capsys, "evaluate", str(tmp_path / "other.npy"), "--bank", "digits", "--layout", "NHW")
    assert code == 2
    assert "same shape" in error


def test_features_of_a_network_are_kept_with_the_bank(tmp_path):
    bank = gd.Bank.build("digits", tmp_path / "bank", limit=50)
    file = tmp_path / "net.pt"
    torch.jit.script(torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 5))).save(str(file))
    first = reference_features(bank, str(file))
    assert len(list(tmp_path.glob("bank/derived/features-*"))) == 1
    assert torch.equal(first, reference_features(gd.Bank.open(tmp_path / "bank"), str(file)))
    assert torch.equal(first, extractor(str(file), bank)(bank.images(slice(None))))


def test_a_row_with_a_twin_is_a_copy():
    pixels = np.random.default_rng(0).integers(0, 255, (9, 8, 8), dtype=np.uint8)
    pixels[5] = pixels[0]
    bank = gd.Bank.build(pixels, layout="NHW")
    assert copies(bank.images(slice(0, 1)), bank).share == 1.0


@pytest.mark.parametrize("count", [6, 19, 25, 29])
def test_sets_of_any_size(count):
    features = torch.randn(count, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert distribution(features, features)["fid"][0] == pytest.approx(0, abs=1e-9)


def test_extractors(digits, tmp_path):
    images = digits.images(slice(0, 4))
    assert torch.equal(extractor("pixels", digits)(images), images.double().flatten(1))
    assert extractor("pca", digits)(images).shape == (4, 61)  # three pixels of digits never change
    file = tmp_path / "mean.pt"
    torch.jit.script(torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 5))).save(str(file))
    assert extractor(str(file), digits)(images).shape == (4, 5)

    class Broken(torch.nn.Module):
        def forward(self, x):
            return x.flatten(1) / 0.0

    torch.jit.script(Broken()).save(str(file))
    with pytest.raises(gd.GolddiffError, match="NaN"):
        extractor(str(file), digits)(images)
    for wrong in ("inception", str(tmp_path)):
        with pytest.raises(gd.GolddiffError, match="TorchScript"):
            extractor(wrong, digits)
    file.write_text("no")
    with pytest.raises(gd.GolddiffError, match="TorchScript"):
        extractor(str(file), digits)


def test_methods_are_parsed():
    method = parse_method("golddiff:retrieval=paper:k_max=0.1@8")
    assert (method.name, method.options, method.seeds) == ("golddiff", {"retrieval": "paper", "k_max": 0.1}, 8)
    assert parse_method("optimal").seeds is None
    with pytest.raises(gd.GolddiffError, match="els@8"):
        parse_method("els@many")


@pytest.fixture
def compared(digits, tmp_path):
    def run(*methods, **options):
        network = gd.oracle(teacher(digits, "epsilon"), digits, schedule="ddpm")
        given = {"oracle": network, "oracle_name": "teacher", "seeds": range(7), "steps": 4, **options}
        return gd.compare(digits, methods, tmp_path / "out", **given)

    return run, tmp_path / "out"


def test_compare_a_method_with_itself(compared, digits):
    run, out = compared
    found = run("optimal", "wiener@6", held_out=digits.images(slice(0, 9)))
    best = found["methods"]["optimal"]
    assert best["own"]["r2"][-1][0] == pytest.approx(1, abs=1e-4)
    assert best["own"]["mse"][-1][0] == pytest.approx(0, abs=1e-5)
    assert all(r2 == pytest.approx(1, abs=1e-3) for r2, _ in best["single"]["r2"])
    assert best["copies"] == 1.0
    assert best["images"] == 7
    assert found["methods"]["wiener"]["images"] == 6
    assert found["methods"]["wiener"]["own"]["r2"][-1][0] < 0.9
    assert best["held_out"][-1][0] < best["held_out"][0][0]
    table = (out / "table.md").read_text()
    assert "On the first 6 seeds" in table
    assert "| optimal | 7 |" in table
    assert (out / "grid.png").stat().st_size > 1000
    assert (out / "steps.png").exists()


def test_compare_goes_on_and_adds_methods(compared, digits):
    run, out = compared
    first = run("optimal")
    stamp = (out / "optimal.npz").stat().st_mtime_ns
    again = run("optimal", "nearest")
    assert (out / "optimal.npz").stat().st_mtime_ns == stamp
    assert again["methods"]["optimal"] == first["methods"]["optimal"]
    assert "nearest" in again["methods"]
    with pytest.raises(gd.GolddiffError, match="other seeds"):
        run("optimal", seeds=range(3, 9))
    with pytest.raises(gd.GolddiffError, match="other steps"):
        run("optimal", steps=5)
    with pytest.raises(gd.GolddiffError, match="other options or seeds"):
        run("optimal@3")
    with pytest.raises(gd.GolddiffError, match="other network"):
        run("optimal", oracle=gd.oracle(lambda x, t: x, digits, prediction="sample", schedule="ddpm"))
    with pytest.raises(gd.GolddiffError, match="other held_out"):
        run("optimal", held_out=digits.images(slice(0, 2)))
    with pytest.raises(gd.GolddiffError, match="batch"):
        run("optimal", batch=0)
    (out / "optimal.npz").write_bytes(b"no")
    with pytest.raises(gd.GolddiffError, match="damaged"):
        run("optimal")
    with pytest.raises(gd.GolddiffError, match="method"):
        run("optimum")
    with pytest.raises(gd.GolddiffError, match="once"):
        run("optimal", "optimal")


def test_the_table_is_the_same_for_any_batch(digits, tmp_path):
    results = []
    for batch in (1, 5):
        network = gd.oracle(teacher(digits, "epsilon"), digits, schedule="ddpm")
        results.append(
            gd.compare(
                digits, ["golddiff", "pca"], tmp_path / str(batch), oracle=network, seeds=range(6), steps=3, batch=batch
            )["methods"]
        )
    for name in ("golddiff", "pca"):
        a, b = (np.array(r[name]["own"]["r2"]) for r in results)
        assert np.allclose(a, b, atol=1e-4)


def test_a_folder_of_something_else_is_refused(digits, tmp_path):
    (tmp_path / "mine.txt").write_text("x")
    with pytest.raises(gd.GolddiffError, match="no comparison"):
        gd.compare(digits, ["optimal"], tmp_path)


def test_calibrated_windows_fall_with_the_noise(digits, tmp_path):
    network = gd.oracle(teacher(digits, "epsilon"), digits, schedule="ddpm")
    found = gd.calibrate(digits, network, tmp_path / "w.json", seeds=range(3), steps=5, sides=[3, 7, 15])
    sides = [side for _, side in found["windows"]]
    assert sides == sorted(sides, reverse=True)
    cosine = np.array(found["cosine"])
    assert (cosine[:, -1] > 0.999).all()  # the teacher is the optimal denoiser: the largest window is its own
    assert sides == [15] * 5
    again = gd.denoiser("ls", digits, window=str(tmp_path / "w.json"))
    assert again.options["window"] == sorted(found["windows"])
    with pytest.raises(gd.GolddiffError, match="json"):
        gd.calibrate(digits, network, tmp_path / "w")


def test_training_goes_on_where_it_was_stopped(digits, tmp_path, monkeypatch):
    training = Training(images=96, batch=8, width=16)
    whole = train_oracle(digits, tmp_path / "whole", training)

    class Stop(Exception):
        pass

    from golddiff import training as module

    make = module._batch

    def stopping(bank, settings, step):
        if step == 7:
            raise Stop
        return make(bank, settings, step)

    monkeypatch.setattr(module, "_batch", stopping)
    with pytest.raises(Stop):
        train_oracle(digits, tmp_path / "cut", training, save_every=2)
    monkeypatch.undo()
    cut = train_oracle(digits, tmp_path / "cut", training, save_every=2)
    assert not (cut / "state.safetensors").exists()
    name = "diffusion_pytorch_model.safetensors"
    assert (cut / name).read_bytes() == (whole / name).read_bytes()
    network = gd.oracle(cut, digits)  # its schedule lies beside it
    assert network.prediction == "epsilon"
    assert network(torch.zeros(2, 1, 8, 8), gd.DDPM()(100)).mean.shape == (2, 1, 8, 8)
    with pytest.raises(gd.GolddiffError, match="other settings"):
        train_oracle(digits, tmp_path / "cut", Training(images=96, batch=8, width=16, seed=1))
    with pytest.raises(gd.GolddiffError, match="width"):
        Training(width=20)


def test_training_learns(digits, tmp_path):
    network = gd.oracle(train_oracle(digits, tmp_path / "net", Training(images=8000, batch=32, width=16)), digits)
    noise = gd.DDPM()(200)
    x_t = noisy(digits, noise, rows=range(64), dtype=torch.float32)
    clean = digits.images(slice(0, 64))
    mean = clean.mean()
    error = float((network(x_t, noise).mean - clean).square().mean())
    assert error < 0.3 * float((clean - mean).square().mean())


def test_the_command_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    training = ["--images", 64, "--batch", 16, "--width", 16]
    assert call(capsys, "oracle", "train", "digits", "--out", "net", *training)[0] == 0
    code, said, _ = call(
        capsys, "calibrate", "digits", "--oracle", "net", "--out", "w.json", "--steps", 3, "--seeds", "0-1"
    )
    assert code == 0
    assert "window" in said
    methods = "wiener,ls:window=w.json,golddiff"
    command = ["compare", "digits", "--methods", methods, "--oracle", "net", "--seeds", "0-6", "--steps", 3]
    code, said, _ = call(capsys, *command)
    assert code == 0
    assert "| ls:window=w.json | 7 |" in said
    assert json.loads((tmp_path / "runs/digits-compare/results.json").read_text())["settings"]["oracle"] == "net"
    code, _, error = call(capsys, "compare", "digits", "--recipe", "paper/cifar11")
    assert code == 2
    assert "paper/cifar10" in error
