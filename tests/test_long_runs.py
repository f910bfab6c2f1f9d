"""Runs that are left alone: many images in flat memory, two at once, jumping clocks, closed terminals.

`GOLDDIFF_IMAGES=10000` watches the memory of so many images in one run; of some hundred otherwise.
"""

import multiprocessing
import os
import pty
import random
import signal
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest

import golddiff as gd
import jobs
from golddiff.errors import GolddiffError
from golddiff.files import holding

IMAGES = int(os.environ.get("GOLDDIFF_IMAGES", "640"))
MIB = 2**20


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="the system does not say how much memory is used")
def test_memory_is_flat_over_many_images(tmp_path):
    process = multiprocessing.get_context("spawn").Process(target=jobs.long_run, args=(tmp_path, IMAGES))
    process.start()
    process.join()
    assert process.exitcode == 0
    *seen, peak = np.load(tmp_path / "memory.npy") / MIB
    warm = seen[len(seen) // 5]
    print(f"{IMAGES} images: {warm:.1f} MiB after a fifth, {seen[-1]:.1f} MiB at the end, {peak:.1f} MiB at the most")
    assert max(seen) - warm < 8
    assert peak - warm < 24  # samples.npz and the grid too
    with np.load(tmp_path / "out" / "samples.npz") as kept:
        assert kept["arr_0"].shape == (IMAGES, 8, 8, 1)
        assert kept["seeds"].tolist() == list(range(IMAGES))


@pytest.mark.parametrize("job", ["sample", "compare", "train"])
def test_two_runs_into_one_folder_refuse_each_other(tmp_path, job):
    if job == "train":
        pytest.importorskip("diffusers", reason="the extra diffusers is not there")
    jobs.prepared(tmp_path)
    out = tmp_path / "out"
    with holding(out):
        held = list(out.iterdir())
        with pytest.raises(GolddiffError, match="another process is at work in .*choose another --out"):
            getattr(jobs, job)(tmp_path)
        assert list(out.iterdir()) == held
    assert list(out.iterdir()) == []
    (out / ".lock").touch()  # of a process that was killed
    getattr(jobs, job)(tmp_path)
    assert not [path for path in out.iterdir() if path.name.startswith(".")]


def test_shards_share_a_folder_and_nobody_else(tmp_path):
    with ExitStack() as first:
        first.enter_context(holding(tmp_path, (0, 2)))
        with holding(tmp_path, (1, 2)):
            for part in ((0, 2), (1, 2), None):
                with pytest.raises(GolddiffError, match="at work"), holding(tmp_path, part):
                    pass
        with pytest.raises(GolddiffError, match="at work"), holding(tmp_path):
            pass
    with holding(tmp_path):
        pass
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("job", ["build", "sample", "train"])
def test_a_clock_that_jumps_changes_nothing(tmp_path, monkeypatch, job):
    if job == "train":
        pytest.importorskip("diffusers", reason="the extra diffusers is not there")
    jobs.prepared(tmp_path)
    getattr(jobs, job)(tmp_path)
    (tmp_path / "out").rename(tmp_path / "whole")
    chance, clock = random.Random(0), time.time  # noqa: S311 - jumps of a clock
    monkeypatch.setattr(time, "time", lambda: max(0.0, clock() + chance.choice([-1, 1]) * chance.uniform(0, 1e9)))
    getattr(jobs, job)(tmp_path)
    names = {path.name for path in (tmp_path / "whole").iterdir()}
    assert {path.name for path in (tmp_path / "out").iterdir()} == names
    for name in names - {"metrics.json", "bank.json", "derived"}:
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    if job == "build":
        assert gd.Bank.open(tmp_path / "out").verify() == []


def started(out, terminal, ignored=()):
    """A run that takes a while, with this terminal."""

    def prepare():
        os.setsid()
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN if number in ignored else signal.SIG_DFL)

    command = [sys.executable, "-m", "golddiff", "sample", "mnist5k", "--seeds", "0-7", "--batch", "1", "--out", out]
    return subprocess.Popen(
        command, stdin=terminal, stdout=terminal, stderr=terminal, preexec_fn=prepare, close_fds=True
    )


@pytest.mark.parametrize(("number", "code"), [(signal.SIGHUP, 129), (signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals_end_a_run_cleanly(tmp_path, number, code):
    gd.Bank.build("mnist5k")
    ours, theirs = pty.openpty()
    process = started(tmp_path / "run", theirs)
    os.close(theirs)
    wait_for(tmp_path / "run", 2)
    if number == signal.SIGHUP:
        os.close(ours)  # the terminal is closed: whoever writes to it gets an error
    process.send_signal(number)
    assert process.wait(60) == code
    done = sorted((tmp_path / "run").glob("seed*.png"))
    assert 2 <= len(done) < 8
    assert not [path for path in (tmp_path / "run").iterdir() if path.name.startswith(".")]
    with np.load(tmp_path / "run" / "samples.npz") as kept:
        assert len(kept["arr_0"]) == len(done)
    if number != signal.SIGHUP:
        assert b"goes on from there" in os.read(ours, 2**16)
        os.close(ours)


def test_under_nohup_a_closed_terminal_is_no_end(tmp_path):
    gd.Bank.build("mnist5k")
    process = started(tmp_path / "run", subprocess.DEVNULL, ignored=(signal.SIGHUP,))
    wait_for(tmp_path / "run", 1)
    process.send_signal(signal.SIGHUP)
    assert process.wait(120) == 0
    assert len(list((tmp_path / "run").glob("seed*.png"))) == 8


def wait_for(out, pictures):
    limit = time.monotonic() + 60
    while len(list(out.glob("seed*.png"))) < pictures:
        assert time.monotonic() < limit
        time.sleep(0.01)
