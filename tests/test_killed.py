"""Killed at any moment: what is finished stays valid, nothing half-written is taken for whole, and starting again ends
where an undisturbed run does.

`GOLDDIFF_KILLS=50` kills each kind of work so often; a few times otherwise.
"""

import json
import multiprocessing
import os
import random
import shutil
import signal
import time

import numpy as np
import pytest
from safetensors.numpy import load_file

import golddiff as gd
import jobs

KILLS = int(os.environ.get("GOLDDIFF_KILLS", "3"))
TIMES = ("seconds", "memory")  # of what a comparison keeps


@pytest.fixture(scope="module")
def server():
    """Processes that begin with everything imported."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["jobs", "numba", "diffusers"])
    started(context, "nothing", None).join()
    return context


def started(server, job, folder):
    process = server.Process(target=getattr(jobs, job), args=(folder,))
    process.start()
    return process


def arrays(path):
    with np.load(path) as kept:
        return {name: kept[name] for name in kept.files if name not in TIMES}


def same(ours, theirs):
    return ours.keys() == theirs.keys() and all(np.array_equal(ours[name], theirs[name]) for name in ours)


def check_build(out, whole, ended):
    if out.exists():
        assert gd.Bank.open(out).verify() == []
        for path in whole.glob("*.npy"):
            assert (out / path.name).read_bytes() == path.read_bytes()
    assert out.exists() or not ended


def check_sample(out, whole, ended):
    for path in [*out.glob("seed*.png"), *out.glob("seed*.npz")]:
        assert path.read_bytes() == (whole / path.name).read_bytes()
    if ended:
        made = {p.name for p in whole.iterdir()} - {"metrics.json"}  # of the images of one call, if it made any
        assert {p.name for p in out.iterdir()} - {"metrics.json"} == made
        assert same(arrays(out / "samples.npz"), arrays(whole / "samples.npz"))


def check_compare(out, whole, ended):
    for path in out.rglob("*.npz"):
        if not path.name.startswith("."):
            assert same(arrays(path), arrays(whole / path.relative_to(out)))
    if ended:
        ours, theirs = (json.loads((folder / "results.json").read_text()) for folder in (out, whole))
        for name, found in theirs["methods"].items():
            for key in ("d1", "copies", "images"):
                assert ours["methods"][name][key] == found[key]


def check_train(out, whole, ended):
    state = out / "state.safetensors"
    if state.exists():
        assert all(np.isfinite(array).all() for array in load_file(state).values())
    if (out / "config.json").exists():
        assert gd.oracle(out, gd.Bank.open(out.parent / "bank")) is not None
        name = "diffusion_pytorch_model.safetensors"
        assert (out / name).read_bytes() == (whole / name).read_bytes()
    assert not ended or {p.name for p in out.iterdir()} == {p.name for p in whole.iterdir()}


@pytest.mark.parametrize("job", ["build", "sample", "compare", "train"])
def test_killed_at_random_moments(server, tmp_path, job):
    if job == "train":
        pytest.importorskip("diffusers", reason="the extra diffusers is not there")
    check = globals()[f"check_{job}"]
    jobs.prepared(tmp_path)
    began = time.monotonic()
    undisturbed = started(server, job, tmp_path)
    undisturbed.join()
    lasts = time.monotonic() - began
    assert undisturbed.exitcode == 0
    out, whole = tmp_path / "out", tmp_path / "whole"
    out.rename(whole)
    chance, killed, ended = random.Random(1), 0, 0  # noqa: S311 - moments to kill at
    while killed < KILLS:
        process = started(server, job, tmp_path)
        process.join(chance.uniform(0, lasts))
        if process.exitcode is None:
            process.kill()
        process.join()
        killed += process.exitcode == -signal.SIGKILL
        assert process.exitcode in (0, -signal.SIGKILL)
        check(out, whole, process.exitcode == 0)
        if process.exitcode == 0:
            ended += 1
            shutil.rmtree(out)
    last = started(server, job, tmp_path)
    last.join()
    assert last.exitcode == 0
    check(out, whole, True)
    left = {path.name for path in tmp_path.iterdir()} - {"out", "whole", "bank", "pixels.npy", "many.npy"}
    assert not left, "nothing half-written stays"
    print(f"{job}: killed {killed} times, ended {ended + 1} times as an undisturbed run of {lasts:.1f} s")
