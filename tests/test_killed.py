"""Killed at any moment: what is finished stays valid, nothing half-written is taken for whole, and starting again ends
where an undisturbed run does.

`GOLDDIFF_KILLS=50` kills each kind of work so often; a few times otherwise.
"""

import multiprocessing
import os
import random
import shutil
import signal
import time

import pytest

import jobs

KILLS = int(os.environ.get("GOLDDIFF_KILLS", "3"))


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


@pytest.mark.parametrize("job", ["build", "sample", "compare", "train"])
def test_killed_at_random_moments(server, tmp_path, job):
    if job == "train":
        pytest.importorskip("diffusers", reason="the extra diffusers is not there")
    check = getattr(jobs, f"check_{job}")
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
