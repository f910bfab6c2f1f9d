"""Several processes: the same images however many there are, and a clear end when one dies."""

import os
import random
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from datetime import timedelta

import numpy as np
import pytest
import torch

import golddiff as gd
from golddiff import ranks as places
from golddiff.ranks import Ranks, first_host, joined, parse_shard
from test_cli import call

RUN = ["sample", "digits", "--seeds", "0-6", "--batch", "2", "--steps", "4", "--save-steps"]


def free_port():
    """One that the system gives nobody in between."""
    while True:
        port = random.randrange(20000, 32000)  # noqa: S311
        with suppress(OSError), socket.socket() as s:
            s.bind(("localhost", port))
            return str(port)


def launched(count, arguments, slurm=False):
    """So many processes with the environment of a launcher."""
    port, processes = free_port(), []
    for rank in range(count):
        place = {"MASTER_PORT": port, "OMP_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "1"}
        if slurm:
            place |= {"SLURM_PROCID": str(rank), "SLURM_STEP_NUM_TASKS": str(count), "SLURM_STEP_NODELIST": "localhost"}
        else:
            place |= {"RANK": str(rank), "WORLD_SIZE": str(count), "MASTER_ADDR": "localhost"}
        command = [sys.executable, "-m", "golddiff", *map(str, arguments)]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        processes.append(subprocess.Popen(command, env=os.environ | place, **pipes))
    return processes


def means(folder):
    return np.stack([np.load(folder / f"seed{seed:06d}-steps.npz")["mean"] for seed in range(7)])


@pytest.mark.parametrize(
    ("count", "spread", "method", "slurm"),
    [
        (2, "bank", ["--method", "golddiff", "tol=0.05"], False),
        (3, "bank", ["--method", "golddiff", "retrieval=paper"], False),
        (3, "bank", ["--method", "optimal"], True),
        (2, "bank", ["--method", "pca", "--label", "3,7"], False),
        (3, "seeds", ["--method", "golddiff"], False),
    ],
)
def test_any_number_of_ranks_makes_the_same_images(count, spread, method, slurm, tmp_path, capsys):
    assert call(capsys, *RUN, *method, "--out", tmp_path / "one")[0] == 0
    ranks = launched(count, [*RUN, *method, "--spread", spread, "--out", tmp_path / "many"], slurm)
    said = [rank.communicate(timeout=120) for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0] * count, said
    assert "7 images" in said[0][0]
    assert all(not out for out, _ in said[1:])  # only the first one speaks
    assert np.abs(means(tmp_path / "many") - means(tmp_path / "one")).max() < 1e-5
    assert len(np.load(tmp_path / "many" / "samples.npz")["arr_0"]) == 7


def test_shards_fill_one_folder(tmp_path, capsys):
    assert call(capsys, *RUN, "--out", tmp_path / "one")[0] == 0
    for shard in ("3/3", "1/3", "2/3"):
        assert call(capsys, *RUN, "--shard", shard, "--out", tmp_path / "many")[0] == 0
    assert np.array_equal(means(tmp_path / "many"), means(tmp_path / "one"))
    samples = [np.load(tmp_path / name / "samples.npz")["arr_0"] for name in ("one", "many")]
    assert np.array_equal(*samples)


def test_a_rank_that_dies_ends_the_run(tmp_path, capsys):
    out = tmp_path / "run"
    arguments = ["sample", "digits", "--seeds", "0-3999", "--batch", "4", "--method", "pca", "--out", out]
    for spread in ("bank", "seeds"):
        ranks = launched(2, [*arguments, "--spread", spread])
        while len(list(out.glob("seed*.png"))) < 8 and all(rank.poll() is None for rank in ranks):
            time.sleep(0.1)
        ranks[1].send_signal(signal.SIGKILL)
        if spread == "seeds":  # the first one would work on, and notice at the end: it may be stopped as well
            ranks[0].send_signal(signal.SIGINT)
        _, err = ranks[0].communicate(timeout=60)
        assert ranks[0].returncode in ((2,) if spread == "bank" else (2, 130))  # whichever it notices first
        assert "has lost another rank" in err or "the same command goes on" in err
        done = len(list(out.glob("seed*.png")))
        assert len(np.load(out / "samples.npz")["arr_0"]) <= done  # finished images are kept
        for file in out.iterdir():
            file.unlink()


def test_a_first_rank_that_never_comes_is_not_waited_for_for_ever(monkeypatch):
    place = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": free_port()}
    for name, value in place.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(places, "MEETING", timedelta(seconds=1))
    with pytest.raises(gd.GolddiffError, match="rank 1 of 2 cannot reach the others"), joined(torch.device("cpu")):
        pass


def test_where_a_process_is():
    assert parse_shard("2/5") == Ranks(1, 5)
    for wrong in ("0/3", "4/3", "a", "1", "1/0", "-1/2"):
        with pytest.raises(gd.GolddiffError, match="2/5"):
            parse_shard(wrong)
    assert [first_host(nodes) for nodes in ("n7", "a[03-05,9],b", "gpu-1,gpu-2", "")] == [
        "n7",
        "a03",
        "gpu-1",
        "localhost",
    ]
    owners = torch.stack([Ranks(rank, 3).owns(torch.arange(1000)) for rank in range(3)])
    assert bool((owners.sum(0) == 1).all())


def test_an_environment_that_makes_no_sense(monkeypatch):
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(gd.GolddiffError, match="torchrun"), joined(torch.device("cpu")):
        pass


def test_refused(tmp_path, capsys):
    for more, said in (
        (["--shard", "1/2", "--force"], "shards"),
        (["--shard", "1/2", "--spread", "bank"], "shards"),
        (["--spread", "rows"], "spread"),
    ):
        code, _, err = call(capsys, *RUN, *more, "--out", tmp_path / "run")
        assert code == 2
        assert said in err
    linked = Ranks(0, 2, linked=True)
    bank = gd.Bank.build("digits", limit=100)
    for name, options in (("els", {}), ("nearest", {}), ("pca", {"legacy_batch": 9})):
        with pytest.raises(gd.GolddiffError, match="spread the seeds"):
            gd.denoiser(name, bank, **options).over(linked)
