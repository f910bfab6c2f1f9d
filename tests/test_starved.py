"""Disks that are full, read-only or gone, and too little memory: a clear error, nothing corrupted, nothing left behind.

`GOLDDIFF_DISKS=60` tries so many sizes of a small disk for each kind of work; some otherwise.
"""

import multiprocessing
import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

import golddiff as gd
import jobs
from golddiff.errors import GolddiffError

SIZES = int(os.environ.get("GOLDDIFF_DISKS", "8"))
LIMITS = (0, 1, 2, 3, 4, 6, 8, 12, 16, 24, 64, 4000)  # MiB of address space beyond what is taken
WRITING = ["build", "derive", "sample", "compare", "train", "calibrate", "attribute", "audit", "concentrate"]
MIB = 2**20


def mount(folder, *options):
    return subprocess.run(["mount", *options, str(folder)], capture_output=True, check=False).returncode == 0  # noqa: S607


@pytest.fixture
def disk(tmp_path):
    """A disk of its own, which can be made smaller."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if not shutil.which("mount") or not mount(folder, "-t", "tmpfs", "-o", "size=256m", "tmpfs"):
        pytest.skip("only who may mount a disk can make a small one")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)  # noqa: S607


def resize(disk, size):
    assert mount(disk, "-o", f"remount,rw,size={-(-int(size) // 4096) * 4096}")


def used(disk):
    found = os.statvfs(disk)
    return (found.f_blocks - found.f_bfree) * found.f_frsize


@pytest.fixture(scope="module")
def server():
    """Processes that begin with everything imported."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["jobs", "numba", "diffusers", "matplotlib.figure"])
    process = context.Process(target=jobs.nothing, args=(None,))
    process.start()
    process.join()
    return context


def outcome(server, target, *arguments, said):
    """The error that a job ended with, or ""; a crash is no end."""
    said.unlink(missing_ok=True)
    process = server.Process(target=target, args=(*arguments, said))
    process.start()
    process.join()
    assert process.exitcode == 0, "it crashed"
    return said.read_text() if said.exists() else ""


def check(job, out, whole, ended):
    if known := getattr(jobs, f"check_{job}", None):
        known(out, whole, ended)
    elif ended and job != "derive":
        assert {path.name for path in out.iterdir()} == {path.name for path in whole.iterdir()}


@pytest.mark.parametrize("job", WRITING)
def test_a_full_disk_at_every_writing_step(server, disk, tmp_path, job):
    if job == "train":
        pytest.importorskip("diffusers", reason="the extra diffusers is not there")
    jobs.prepared(disk)
    out, whole, said = disk / "out", tmp_path / "whole", tmp_path / "said"
    before = used(disk)
    assert outcome(server, jobs.told, job, disk, said=said) == ""
    need = used(disk) - before
    result = disk / "bank" / "derived" if job == "derive" else out
    shutil.move(result, whole)
    before, errors = used(disk), 0
    for i in range(SIZES):
        resize(disk, max(before + need * i / (SIZES - 1), used(disk)))
        error = outcome(server, jobs.told, job, disk, said=said)
        if error:
            errors += 1
            assert error.startswith("GolddiffError: "), error
            assert "No space left on device" in error, error
            assert "make room" in error, error
            assert "\n" not in error
        names = [path.relative_to(disk).as_posix() for path in disk.rglob(".*")]
        assert [name for name in names if not name.startswith(".out-part")] == []
        check(job, out, whole, not error)
    assert errors
    resize(disk, 256 * MIB)
    if job == "derive":
        shutil.rmtree(result, ignore_errors=True)
    assert outcome(server, jobs.told, job, disk, said=said) == ""
    check(job, out, whole, True)
    assert gd.Bank.open(disk / "bank").verify() == []
    print(f"{job}: {errors} of {SIZES} disks of up to {need / MIB:.2f} MiB were too small, and each was said")


@pytest.mark.parametrize("job", [job for job in WRITING if job != "derive"])
def test_a_disk_that_cannot_be_written_to(server, disk, tmp_path, job):
    if job == "train":
        pytest.importorskip("diffusers", reason="the extra diffusers is not there")
    jobs.prepared(disk)
    said, names = tmp_path / "said", sorted(disk.rglob("*"))
    assert mount(disk, "-o", "remount,ro")
    error = outcome(server, jobs.told, job, disk, said=said)
    assert error.startswith("GolddiffError: "), error
    assert "Read-only file system" in error
    assert sorted(disk.rglob("*")) == names


def test_a_bank_on_a_disk_that_cannot_be_written_to_works(server, disk, tmp_path):
    jobs.prepared(disk)
    assert mount(disk, "-o", "remount,ro")
    assert outcome(server, jobs.told, "derive", disk, said=tmp_path / "said") == ""
    assert not (disk / "bank" / "derived" / "mask").exists()


def mapped(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (3000, 3, 16, 16), dtype=np.uint8)
    return gd.Bank.build(pixels, tmp_path / "bank"), gd.Bank.build(pixels)


@pytest.mark.parametrize("method", ["optimal", "golddiff", "ls"])
def test_a_bank_whose_files_are_removed_while_in_use_goes_on(tmp_path, method):
    bank, same = mapped(tmp_path)
    model = gd.denoiser(method, bank)
    expected = gd.sample(gd.denoiser(method, same), [3], steps=4)
    steps = gd.trajectory(model, [3], steps=4)
    next(steps)
    shutil.rmtree(tmp_path / "bank")
    *_, last = steps
    assert torch.equal(last.posterior.mean, expected)


def test_a_file_that_is_cut_short_while_in_use_is_an_error_and_no_crash(tmp_path):
    bank, _ = mapped(tmp_path)
    steps = gd.trajectory(gd.denoiser("optimal", bank), [0], steps=4)
    next(steps)
    os.truncate(tmp_path / "bank" / "pixels.npy", 4096)
    with pytest.raises(GolddiffError, match=r"pixels\.npy of .* was cut short while in use: build the bank again"):
        next(steps)


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="the system does not say how much memory is used")
@pytest.mark.parametrize("job", ["derive", "sample", "compare"])
def test_too_little_address_space_is_an_error_and_no_crash(server, tmp_path, job):
    jobs.prepared(tmp_path)
    out, whole, said = tmp_path / "out", tmp_path / "whole", tmp_path / "said"
    assert outcome(server, jobs.told, job, tmp_path, said=said) == ""
    if job != "derive":
        out.rename(whole)
    errors, ended = [], False
    for room in LIMITS:
        shutil.rmtree(tmp_path / "bank" / "derived", ignore_errors=True)
        shutil.rmtree(out, ignore_errors=True)
        error = outcome(server, jobs.starved, room * MIB, job, tmp_path, said=said)
        ended = not error
        errors += [error] if error else []
        assert error.startswith("DoesNotFit: ") or not error, error
        check(job, out, whole, ended)
    assert ended
    assert errors
    print(f"{job}: {len(errors)} of {len(LIMITS)} limits were too low, and each was said")


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="the system does not say how much memory is used")
def test_a_product_of_bytes_is_right_or_refused(server, tmp_path):
    """torch leaves it undone, and says nothing."""
    for room in (0, 1, 2, 3, 4, 64):
        error = outcome(server, jobs.starved, room * MIB, "product", tmp_path, said=tmp_path / "said")
        assert error.startswith("DoesNotFit: ") or not error, error
    assert not error


def left(monkeypatch, room):
    monkeypatch.setattr("golddiff.memory.room", lambda: int(room))


def test_what_cannot_fit_is_refused_before_the_work(tmp_path, monkeypatch):
    pixels = np.random.default_rng(0).integers(0, 256, (600, 3, 16, 16), dtype=np.uint8)
    bank = gd.Bank.build(pixels, tmp_path / "bank")
    left(monkeypatch, 64 * MIB)
    with pytest.raises(GolddiffError, match=r"a batch of 1000 images needs .* MiB .* smaller batches \(--batch\)"):
        gd.denoiser("optimal", bank)(torch.zeros(1000, 3, 16, 16), gd.DDPM()(500))
    left(monkeypatch, 4 * MIB)
    with pytest.raises(GolddiffError, match="covariance of images of 768 numbers needs .* smaller images"):
        gd.sample(gd.denoiser("pca", gd.Bank.build(pixels, tmp_path / "small")), [0], steps=2)
    with pytest.raises(GolddiffError, match="a bank of 600 images in memory needs .* give out="):
        gd.Bank.build(pixels)
    with pytest.raises(GolddiffError, match="a comparison of 5000 seeds needs"):
        gd.compare(bank, ["optimal"], tmp_path / "out", seeds=range(5000), steps=4)
    assert not (tmp_path / "out").exists()
    assert gd.sample(gd.denoiser("optimal", bank), [0], steps=2).shape == (1, 3, 16, 16)


def test_few_large_images_are_not_taken_for_many(monkeypatch):
    left(monkeypatch, 256 * MIB)
    assert len(gd.Bank.build(np.zeros((4, 1024, 1024, 3), np.uint8))) == 4


@pytest.mark.parametrize("kind", ["eigenbasis", "gram"])
def test_what_a_covariance_takes_is_not_underestimated(tmp_path, kind):
    process = multiprocessing.get_context("spawn").Process(target=jobs.covariance, args=(tmp_path, kind))
    process.start()
    process.join()
    assert process.exitcode == 0
    stated, taken = np.load(tmp_path / "memory.npy")
    print(f"{kind}: stated {stated / MIB:.0f} MiB, taken {taken / MIB:.0f} MiB")
    assert taken <= stated <= 3 * taken


def test_what_memory_is_left_is_the_least_that_anyone_leaves(tmp_path, monkeypatch):
    from golddiff import memory

    group = tmp_path / "group"
    group.mkdir()
    (group / "memory.max").write_text("1000\n")
    (group / "memory.current").write_text("900\n")
    (group / "memory.stat").write_text("anon 500\ninactive_file 300\n")
    assert list(memory._limits(tmp_path, "/group", "memory.max", "memory.current", "inactive_file")) == [400]
    (group / "memory.max").write_text("max\n")
    assert list(memory._limits(tmp_path, "/group", "memory.max", "memory.current", "inactive_file")) == []
    monkeypatch.setattr(memory, "_of_machine", lambda: 700)
    monkeypatch.setattr(memory, "_of_groups", lambda: iter([400, None]))
    monkeypatch.setattr(memory, "_of_address_space", lambda: None)
    assert memory.room() == 400
    with pytest.raises(GolddiffError, match="a thing needs 401 bytes of memory and 400 bytes is left: do less"):
        memory.require(401, "a thing", "do less")
    memory.require(400, "a thing", "do less")


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("can't allocate memory: you tried"), OSError(12, "no")])
def test_a_lack_of_memory_is_said_whoever_finds_it(error, toy, monkeypatch):
    def fails(*_):
        raise error

    model = gd.denoiser("optimal", toy)
    monkeypatch.setattr(type(model), "_posterior", fails)
    with pytest.raises(GolddiffError, match="too little memory .* smaller batches"):
        model(torch.zeros(1, *toy.shape), gd.DDPM()(500))
