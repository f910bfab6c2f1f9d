# ruff: noqa: E402 - what is optional is looked for first
"""The explorer's server: what it answers, refuses, forgets, and does for two at once."""

import base64
import io
import json
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import CancelledError, ThreadPoolExecutor

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("fastapi", reason="the extra web is not installed")
httpx = pytest.importorskip("httpx2", reason="httpx2 is not installed")
from fastapi.testclient import TestClient

import golddiff as gd
from golddiff.denoise import METHODS
from golddiff.explorer import serve, sources
from golddiff.explorer.guard import cookie_of, is_loopback
from golddiff.explorer.runs import Explorer
from golddiff.explorer.show import Screen
from golddiff.explorer.web import application
from golddiff.explorer.work import Busy, Worker
from test_cli import call

HERE = "http://127.0.0.1"


@pytest.fixture(scope="module")
def bank():
    return gd.Bank.build("digits", limit=300)


@pytest.fixture
def explorer(bank):
    made = Explorer(bank, prepare=False)
    yield made
    assert made.worker.stop(10)


@pytest.fixture
def client(explorer):
    with TestClient(application(explorer), base_url=HERE) as made:
        yield made


def eventually(holds, seconds=60):
    """Waits until something holds; fails after so many seconds."""
    until = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < until
        time.sleep(0.01)


def begun(client, **settings):
    """The id of a new run."""
    answer = client.post("/api/runs", json=settings)
    assert answer.status_code == 201, answer.text
    return answer.json()["id"]


def followed(client, name, what="steps"):
    """All events of a stream but signs of life."""
    lines = client.get(f"/api/runs/{name}/{what}").text.splitlines()
    return [event for event in map(json.loads, lines) if event["kind"] != "alive"]


def picture(encoded):
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(encoded))))


def expected(bank, method="golddiff", seed=0, steps=4, labels=None, **options):
    return list(gd.trajectory(gd.denoiser(method, bank, **options), [seed], steps=steps, labels=labels))


# ---- the bank ----------------------------------------------------------------------------------------------------


def test_the_bank_is_described(client, bank):
    info = client.get("/api/bank").json()
    assert (info["name"], info["rows"], info["shape"]) == ("digits", 300, [1, 8, 8])
    assert {method["name"] for method in info["methods"]} == set(METHODS)
    assert sum(found["rows"] for found in info["classes"]) == 300
    for method in info["methods"]:
        if method["retrieval"] is not None:
            assert gd.denoiser(method["name"], bank).options["retrieval"] == method["retrieval"]
            for retrieval in method["retrievals"]:
                gd.denoiser(method["name"], bank, retrieval=retrieval)


def test_thumbnails_are_the_rows(client, bank):
    answer = client.get("/api/rows/17.png")
    assert answer.headers["content-type"] == "image/png"
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(answer.content))), bank.pixels[17, 0].numpy())
    assert client.get("/api/rows/300.png").status_code == 404
    assert client.get("/api/rows/-1.png").status_code == 422
    assert client.get("/api/rows/x.png").status_code == 422


# ---- runs --------------------------------------------------------------------------------------------------------


def test_a_run_is_the_trajectory(client, bank):
    name = begun(client, seed=5, steps=4, label=3)
    assert client.get(f"/api/runs/{name}").json()["state"] == "waiting"
    *steps, end = followed(client, name)
    assert end == {"kind": "end", "state": "finished", "message": ""}
    wanted = expected(bank, seed=5, labels=3)
    for step, true in zip(steps, wanted, strict=True):
        alpha, sigma = float(true.noise.alpha), float(true.noise.sigma)
        assert (step["alpha"], step["sigma"], step["time"]) == (alpha, sigma, true.time)
        for shown, image in ((step["mean"], true.posterior.mean), (step["noisy"], true.x_t / np.hypot(alpha, sigma))):
            scaled = ((image[0, 0].double() + 1) * 127.5).round().clamp(0, 255)
            assert np.array_equal(picture(shown), scaled.numpy().astype(np.uint8))
        assert step["ess"]["median"] == pytest.approx(float(true.posterior.ess.quantile(0.5)))
        assert step["eligible"] == int((bank.labels == 3).sum())
    assert followed(client, name) == [*steps, end]  # a second reader is told the same
    assert client.get(f"/api/runs/{name}").json()["state"] == "finished"


@pytest.mark.parametrize(("schedule", "sampler"), [("edm", "heun"), ("flow", "ddpm"), ("cosine", "ddim")])
def test_schedules_and_samplers(client, bank, schedule, sampler):
    *steps, end = followed(client, begun(client, method="optimal", steps=3, schedule=schedule, sampler=sampler))
    assert end["state"] == "finished"
    assert [step["count"] for step in steps] == [3, 3, 3]
    assert (steps[0]["rho"] is None) == (schedule in ("flow", "cosine"))


@pytest.mark.parametrize("method", METHODS)
def test_every_method_shows_its_sources_or_says_that_it_has_none(client, method):
    name = begun(client, method=method, steps=2)
    *steps, end = followed(client, name)
    assert end["state"] == "finished"
    assert len(steps) == 2
    known = next(found for found in client.get("/api/bank").json()["methods"] if found["name"] == method)
    answers = [client.get(f"/api/runs/{name}/steps/1/{what}") for what in ("sources", "pixels/3/4")]
    assert [answer.status_code for answer in answers] == [200 if known["rows"] else 422] * 2
    if not known["rows"]:
        assert "weights" in answers[0].json()["detail"]


@pytest.mark.parametrize("method", ["optimal", "golddiff", "ls"])
def test_weights_of_a_pixel_are_those_of_the_posterior(client, bank, method):
    name = begun(client, method=method, steps=4)
    followed(client, name)
    found = client.get(f"/api/runs/{name}/steps/2/pixels/3/4").json()
    posterior = expected(bank, method)[2].posterior
    rows, weights = posterior.weights(0, [3 * 8 + 4])
    true = dict(zip(rows.tolist(), weights.flatten().tolist(), strict=True))
    assert len(found["rows"]) == min(24, found["total"])
    assert [source["share"] for source in found["rows"]] == pytest.approx(
        sorted(true.values())[::-1][: len(found["rows"])]
    )
    for source in found["rows"]:
        assert source["share"] == pytest.approx(true[source["row"]])
        assert source["label"] == int(bank.labels[source["row"]])
    assert found["value"] == pytest.approx([float(posterior.mean[0, 0, 3, 4])])


@pytest.mark.parametrize("method", ["optimal", "golddiff"])
@pytest.mark.parametrize("every", [False, True])
def test_shares_of_an_image_are_means_of_weights(client, bank, method, every):
    name = begun(client, method=method, steps=4)
    followed(client, name)
    found = client.get(f"/api/runs/{name}/steps/2/sources", params={"every": every}).json()
    rows, weights = expected(bank, method)[2].posterior.weights(0)
    weights = weights[:, None].expand(-1, 64) if weights.ndim == 1 else weights
    shares = dict(zip(rows.tolist(), weights.mean(1).tolist(), strict=True))
    assert found["pixels"] == found["of"] == 64
    assert sum(source["share"] for source in found["rows"]) == pytest.approx(found["coverage"])
    for source in found["rows"]:
        assert source["share"] == pytest.approx(shares[source["row"]])
    assert (found["map"] is not None) == every
    if every:
        dominant = rows[weights.argmax(0)].reshape(8, 8).numpy()
        colours = picture(found["map"])
        for source in found["rows"]:
            assert source["area"] == pytest.approx((dominant == source["row"]).mean())
            if source["colour"]:
                mine = (colours == tuple(bytes.fromhex(source["colour"][1:]))).all(-1)
                assert np.array_equal(mine, dominant == source["row"])


def test_another_question_makes_the_one_before_idle(client, explorer):
    """No error, which a browser would log, but an answer without content; the second question is answered."""
    name = begun(client, steps=2)
    followed(client, name)
    run, holding = explorer.run(name), threading.Event()
    explorer.worker.ask(holding.wait)
    with ThreadPoolExecutor() as pool:
        first = pool.submit(client.get, f"/api/runs/{name}/steps/0/sources")
        eventually(lambda: run._asking is not None)
        task = run._asking
        second = pool.submit(client.get, f"/api/runs/{name}/steps/1/sources")
        eventually(lambda: run._asking is not task)
        holding.set()
        assert (first.result().status_code, first.result().content) == (204, b"")
        assert second.result().json()["total"] == 300


def test_sources_of_large_work_come_from_some_pixels_first(client, bank, monkeypatch):
    monkeypatch.setattr(sources, "READING", 1)
    monkeypatch.setattr(sources, "TURN", 300 * 64 * 9)
    monkeypatch.setattr(sources, "FEW", 300 * 64 * 9 * 2)
    name = begun(client, steps=4)
    followed(client, name)
    found = client.get(f"/api/runs/{name}/steps/2/sources").json()
    assert (found["pixels"], found["of"]) == (16, 64)
    weights = expected(bank)[2].posterior.weights(0)[1]
    some = torch.zeros(64, dtype=torch.bool)
    some[0::8] = some[4::8] = True  # 8 parts of 8 pixels, of which every fourth is taken
    assert found["rows"][0]["share"] == pytest.approx(float(weights[:, some].mean(1).max()))
    every = client.get(f"/api/runs/{name}/steps/2/sources?every=true").json()
    assert every["pixels"] == 64
    assert every["rows"][0]["share"] == pytest.approx(float(weights.mean(1).max()))


def test_parts_of_tiles_are_all_pixels(bank):
    pixels, labels = np.random.default_rng(0).integers(0, 255, (900, 8, 8, 3), np.uint8), np.zeros(900, int)
    colour = gd.Bank.build(pixels, labels=labels)
    posterior = expected(colour, "golddiff", steps=2, tol=0.2)[1].posterior
    parts = sources.parts_of(posterior, colour, 1.0)
    assert torch.equal(torch.cat(parts).sort().values, torch.arange(192))
    *_, answer = sources.image_of(colour, posterior, True)
    rows, weights = posterior.weights(0)
    shares = dict(zip(rows.tolist(), weights.mean(1).tolist(), strict=True))
    assert [found.share for found in answer.rows] == pytest.approx([shares[found.row] for found in answer.rows])
    assert answer.rows[0].share == pytest.approx(max(shares.values()))


@pytest.mark.parametrize("statistics", ["recompute", "keep"])
def test_removed_images_are_gone_from_the_same_seed(client, bank, statistics):
    name = begun(client, steps=4, without={"rows": [4, 40], "labels": [3], "statistics": statistics})
    *steps, _ = followed(client, name)
    view = bank.without(rows=[4, 40], labels=[3], statistics=statistics)
    true = expected(view)[-1].posterior
    assert np.array_equal(picture(steps[-1]["mean"]), Screen(bank).pixels(true.mean[0])[:, :, 0])
    gone = {4, 40, *(bank.labels == 3).nonzero()[:, 0].tolist()}
    assert client.get(f"/api/runs/{name}").json()["rows"] == len(view) == 300 - len(gone)
    for step in range(4):
        for source in client.get(f"/api/runs/{name}/steps/{step}/sources").json()["rows"]:
            assert source["row"] not in (4, 40)
            assert source["label"] != 3


def test_exact_comparison(client, bank):
    for settings, exact in (({"retrieval": "full"}, True), ({"retrieval": "paper"}, False)):
        name = begun(client, steps=4, **settings)
        assert client.get(f"/api/runs/{name}/exact").status_code == 422  # no steps yet
        followed(client, name)
        *compared, end = followed(client, name, "exact")
        assert end["state"] == "finished"
        assert [event["index"] for event in compared] == [0, 1, 2, 3]
        if exact:
            assert [event["rms"] for event in compared] == [0, 0, 0, 0]
            continue
        full = gd.denoiser("golddiff", bank, retrieval="full")
        for event, step in zip(compared, expected(bank, retrieval="paper"), strict=True):
            difference = step.posterior.mean - full(step.x_t, step.noise, seed=0).mean
            assert event["rms"] == pytest.approx(float(difference.double().square().mean().sqrt()), rel=1e-5)
        assert max(event["rms"] for event in compared) > 1e-3
    name = begun(client, method="wiener", steps=2)
    followed(client, name)
    assert "no golden subset" in client.get(f"/api/runs/{name}/exact").json()["detail"]


# ---- wrong input -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"method": "goldiff"}, "did you mean 'golddiff'"),
        ({"schedule": "ddim"}, "unknown schedule"),
        ({"sampler": "euler"}, "unknown sampler"),
        ({"retrieval": "everything"}, "unknown retrieval"),
        ({"method": "wiener", "retrieval": "full"}, "unknown option"),
        ({"method": "optimal", "retrieval": "local"}, "does not go with"),
        ({"label": 11}, "no image has label 11"),
        ({"seed": -1}, "seed"),
        ({"seed": 2**53}, "seed"),
        ({"seed": 1.5}, "seed"),
        ({"seed": "1"}, "seed"),
        ({"steps": 0}, "steps"),
        ({"steps": 201}, "steps"),
        ({"colour": 1}, "colour"),
        ({"without": {"rows": [300]}}, "rows must be"),
        ({"without": {"rows": list(range(300))}}, "no image is left"),
        ({"without": {"rows": [1] * 1001}}, "rows"),
        ({"without": {"labels": [17]}}, "no image has label 17"),
        ({"without": {"statistics": "guess"}}, "statistics"),
        ({"label": 3, "without": {"labels": [3]}}, "no image has label 3"),
        ([], ""),
        ("text", ""),
        (None, ""),
    ],
)
def test_wrong_settings_are_refused_with_a_sentence(client, settings, said):
    answer = client.post("/api/runs", json=settings)
    assert answer.status_code == 422
    assert said in answer.json()["detail"]


def test_what_is_not_json_is_refused(client):
    answer = client.post("/api/runs", content=b"{", headers={"content-type": "application/json"})
    assert answer.status_code == 422
    assert client.post("/api/runs", content=b"x" * 70_000).status_code == 413
    assert client.put("/api/runs", json={}).status_code == 405


@pytest.mark.parametrize("path", ["", "/steps", "/exact", "/steps/0/sources", "/steps/0/pixels/0/0"])
def test_unknown_runs(client, path):
    answer = client.get(f"/api/runs/nothing{path}")
    assert answer.status_code == 404
    assert "run it again" in answer.json()["detail"]


def test_steps_and_pixels_that_are_not_there(client):
    name = begun(client, steps=2)
    followed(client, name)
    for path, status in (
        ("steps/2/sources", 422),
        ("steps/-1/sources", 422),
        ("steps/0/sources?every=perhaps", 422),
        ("steps/2/sources?every=true", 422),
        ("steps/2/pixels/0/0", 422),
        ("steps/0/pixels/8/0", 404),
        ("steps/0/pixels/0/8", 404),
        ("steps/0/pixels/a/0", 422),
    ):
        assert client.get(f"/api/runs/{name}/{path}").status_code == status, path


# ---- who may ask -------------------------------------------------------------------------------------------------


def test_pages_and_nothing_else_of_the_disk(client):
    for path, kind in (("/", "text/html"), ("/page/app.js", "text/javascript"), ("/page/style.css", "text/css")):
        answer = client.get(path)
        assert answer.status_code == 200
        assert answer.headers["content-type"].startswith(kind)
        assert answer.headers["content-security-policy"].startswith("default-src 'self'; img-src 'self' data:")
    for path in ("/page/../web.py", "/page/%2e%2e/web.py", "/page//etc/passwd", "/page/", "/etc/passwd", "/docs"):
        answer = client.get(path)
        assert answer.status_code == 404
        assert 'href="/"' in answer.text
    assert client.get("/api/nothing").json()["detail"] == "Not Found"
    assert client.get("/openapi.json").json()["info"]["title"] == "golddiff explorer"


def test_other_names_and_origins_are_refused(client):
    assert client.get("/api/bank", headers={"host": "evil.example"}).status_code == 421
    assert client.get("/api/bank", headers={"host": "localhost:99"}).status_code == 200
    assert client.get("/api/bank", headers={"host": "[::1]:99"}).status_code == 200
    assert client.post("/api/runs", json={}, headers={"origin": "http://evil.example"}).status_code == 403
    assert client.post("/api/runs", json={"steps": 1}, headers={"origin": HERE}).status_code == 201


def test_a_token_is_wanted_beyond_loopback(explorer):
    with TestClient(application(explorer, "secret"), base_url="http://machine.example") as client:
        for path in ("/", "/api/bank", "/page/app.js", "/openapi.json", "/?token=secre", "/api/bank?token=secret"):
            assert client.get(path).status_code == 401, path
        assert client.get("/api/bank", headers={"authorization": "Bearer secret"}).status_code == 200
        answer = client.get("/?token=secret", follow_redirects=False)
        assert (answer.status_code, answer.headers["location"]) == (303, "/")
        assert "HttpOnly" in answer.headers["set-cookie"]
        assert client.cookies[cookie_of("secret")] == "secret"
        assert client.get("/api/bank").status_code == 200
    assert [is_loopback(host) for host in ("127.0.0.1", "::1", "localhost", "0.0.0.0", "example.com")] == [  # noqa: S104
        True, True, True, False, False,
    ]  # fmt: skip


# ---- several at once ---------------------------------------------------------------------------------------------


def test_two_users_take_turns_and_get_what_each_would_get_alone(explorer, bank):
    order, runs = [], []
    gate = explorer.worker.ask(lambda: time.sleep(0.2))
    from golddiff.explorer.models import RunSettings

    for seed in (1, 2):
        run = explorer.open(RunSettings(seed=seed, steps=4, method="pca"))
        keep = run._keep
        run._keep = lambda item, seed=seed, keep=keep: (order.append(seed), keep(item))
        run.begin(explorer.worker)
        runs.append(run)
    gate.result()
    deadline = time.monotonic() + 30
    while any(run.state == "running" for run in runs) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert order == [1, 2] * 4
    for seed, run in zip((1, 2), runs, strict=True):
        for (x_t, _), true in zip(run.steps, expected(bank, "pca", seed), strict=True):
            assert torch.equal(x_t, true.x_t)


def test_a_run_is_cancelled_when_asked_and_when_its_reader_leaves(client, explorer):
    name = begun(client, steps=100, method="pca")
    held = threading.Event()
    explorer.worker.ask(lambda: held.wait(10))
    told = []
    reader = threading.Thread(target=lambda: told.extend(followed(client, name)))
    reader.start()
    eventually(lambda: explorer.run(name).state != "waiting")
    assert client.delete(f"/api/runs/{name}").status_code == 200
    held.set()
    reader.join(10)
    assert told[-1]["state"] == "cancelled"
    assert len(told) < 100
    assert client.get(f"/api/runs/{name}").json()["state"] == "cancelled"
    run = explorer.run(begun(client, steps=100, method="pca"))
    held.clear()
    explorer.worker.ask(lambda: held.wait(10))
    run.begin(explorer.worker)
    run.feed.followers = 1
    run.feed.left()
    held.set()
    eventually(lambda: run.state != "running")
    assert run.state == "cancelled"
    assert client.get("/api/bank").status_code == 200


def test_too_many_runs_are_refused_and_old_ones_forgotten(client, explorer, bank):
    held = threading.Event()
    explorer.worker.ask(lambda: held.wait(10))
    tasks = [explorer.worker.start(iter(())) for _ in range(explorer.worker.most)]
    with pytest.raises(Busy):
        explorer.worker.start(iter(()))
    held.set()
    explorer.worker.ask(lambda: None).result(10)
    assert len(tasks) == explorer.worker.most
    eventually(lambda: not explorer.worker.waiting)
    first = begun(client, steps=2)
    followed(client, first)
    explorer.room = 1
    second = begun(client, steps=2)
    followed(client, second)
    assert client.get(f"/api/runs/{first}").status_code == 410
    assert client.get(f"/api/runs/{first}/steps").status_code == 410
    assert client.get(f"/api/runs/{second}").status_code == 200


def test_posteriors_that_were_forgotten_are_computed_again(client, explorer):
    explorer.stock._posteriors.most = 1
    name = begun(client, steps=4)
    followed(client, name)
    run = explorer.run(name)
    first = explorer.worker.ask(lambda: run.posterior(0)).result(10)
    explorer.worker.ask(lambda: run.posterior(1)).result(10)
    again = explorer.worker.ask(lambda: run.posterior(0)).result(10)
    assert again is not first
    assert torch.equal(again.mean, first.mean)


def test_the_worker_answers_questions_between_steps_and_survives_errors():
    worker, seen, ends = Worker(), [], []

    def failing():
        yield 1
        raise gd.GolddiffError("this fails")

    held = threading.Event()
    worker.ask(lambda: held.wait(10))
    worker.start(iter(["patient"] * 2), seen.append, patient=True)
    worker.start(failing(), seen.append, lambda ending, error: ends.append((ending, str(error))))
    held.set()
    with pytest.raises(ZeroDivisionError):
        worker.ask(lambda: 1 // 0).result(10)
    assert worker.ask(lambda: 7).result(10) == 7
    eventually(lambda: not worker.waiting)
    assert (seen, ends) == ([1, "patient", "patient"], [("failed", "this fails")])
    assert worker.stop(10)
    with pytest.raises(CancelledError):
        worker.ask(lambda: 1).result(10)


# ---- pictures ----------------------------------------------------------------------------------------------------


def test_an_unknown_bank_is_refused_before_anything_is_served(capsys, tmp_path):
    for source, message in (("no_such_bank", "no_such_bank"), (tmp_path / "gone.bank", "check the path")):
        code, said, err = call(capsys, "serve", source, "--port", 0)
        assert (code, said) == (2, "")
        assert message in err
        assert err.count("\n") == 1


def test_nothing_ends_the_thread_that_computes(client, explorer, bank):
    """Neither the end of a task that fails, nor somebody who goes away while his question waits."""

    def fails(ending, error):
        raise RuntimeError("the end fails")

    name = begun(client, steps=2)
    followed(client, name)
    explorer.worker.start(iter([1]), on_end=fails)
    held = threading.Event()
    explorer.worker.ask(held.wait)
    assert explorer.run(name).sources(0, False, explorer.worker).cancel()
    held.set()
    assert explorer.worker.ask(lambda: 7).result(10) == 7
    eventually(lambda: not explorer.worker.waiting)
    assert client.get(f"/api/runs/{name}/steps/1/sources").status_code == 200


def test_a_bank_without_some_images_is_explored_as_it_is(bank):
    explorer = Explorer(bank.without(labels=[3]), prepare=False)
    with TestClient(application(explorer), base_url=HERE) as client:
        info = client.get("/api/bank").json()
        assert info["rows"] == sum(found["rows"] for found in info["classes"]) == int((bank.labels != 3).sum())
        assert 3 not in [found["label"] for found in info["classes"]]
        assert client.get("/api/rows/299.png").status_code == 200
    assert explorer.worker.stop(10)


def test_latents_are_not_clipped():
    """Latents go beyond [-1, 1]; the last step is that of gd.trajectory."""
    codec = gd.Latents(lambda x: 5 * x, lambda x: x / 5, name="five times")
    bank = gd.Bank.build("digits", limit=100, latents=codec)
    explorer = Explorer(bank, prepare=False)
    with TestClient(application(explorer), base_url=HERE) as client:
        name = begun(client, steps=3, method="optimal")
        followed(client, name)
    *_, step = gd.trajectory(gd.denoiser("optimal", bank), [0], steps=3)
    assert torch.equal(explorer.run(name).steps[-1][0], step.x_t)
    assert explorer.worker.stop(10)


def test_floats_of_many_channels_are_shown_by_their_first():
    values = np.random.default_rng(0).normal(size=(20, 4, 6, 5)).astype(np.float32) * 3
    bank = gd.Bank.build(values)
    screen = Screen(bank)
    assert screen.channels == 3
    assert screen.note.startswith("channel 1 to 3 of 4, values from ")
    shown = screen.pixels(bank.images(slice(0, 20))[7])
    low, high = values[:, :3].min(), values[:, :3].max()
    true = np.round((values[7, :3] - low) * 255 / (high - low)).transpose(1, 2, 0)
    assert np.abs(shown.astype(int) - true).max() <= 1
    assert Screen(gd.Bank.build(values[:, :2], layout="NCHW")).channels == 1


# ---- the command -------------------------------------------------------------------------------------------------


def test_ports_and_hosts_that_cannot_be_used(bank):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(gd.GolddiffError, match="--port 0 for a free one"):
            serve(bank, port=port)
    with pytest.raises(gd.GolddiffError, match="from 0 to 65535"):
        serve(bank, port=70_000)
    with pytest.raises(gd.GolddiffError, match="no address of this machine"):
        serve(bank, "no such host", 0)


def test_a_reader_leaves_and_the_server_ends_with_a_stream_open():
    command = [sys.executable, "-m", "golddiff", "serve", "digits", "--limit", "300", "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        address = server.stdout.readline().split()[-1]
        name = httpx.post(f"{address}api/runs", json={"steps": 200, "method": "els"}).json()["id"]
        with httpx.stream("GET", f"{address}api/runs/{name}/steps", timeout=30) as stream:
            next(stream.iter_lines())  # and leaves
        deadline = time.monotonic() + 20
        while (state := httpx.get(f"{address}api/runs/{name}").json()["state"]) == "running":
            assert time.monotonic() < deadline
            time.sleep(0.05)
        assert state == "cancelled"
        name = httpx.post(f"{address}api/runs", json={"steps": 200, "method": "els"}).json()["id"]
        with httpx.stream("GET", f"{address}api/runs/{name}/steps", timeout=30) as stream:
            lines = stream.iter_lines()
            assert json.loads(next(lines))["kind"] in ("step", "alive")
            server.send_signal(signal.SIGINT)
            assert json.loads(list(lines)[-1])["state"] == "cancelled"
        assert server.wait(30) == 0
        assert "stopped" in server.stdout.read()
