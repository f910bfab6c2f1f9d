"""Long work in small, which tests kill, starve and watch in processes of its own. Each job writes `folder / "out"`."""

import json
import os
import resource
from pathlib import Path

import numpy as np
import torch
from safetensors.numpy import load_file

import golddiff as gd
from golddiff import prepare, runs, spectrum
from golddiff.recipe import Recipe
from golddiff.reports import attribution_report, audit_report
from golddiff.runs import run
from golddiff.scan import multiply_bytes
from golddiff.training import Training, train_oracle

torch.set_num_threads(1)
TIMES = ("seconds", "memory")  # of what a comparison keeps


def pictures(count=2400, side=16):
    return np.random.default_rng(0).integers(0, 256, (count, 3, side, side), dtype=np.uint8)


def bank_of(folder):
    """A small bank, which nobody kills."""
    if (folder / "bank").exists():
        return gd.Bank.open(folder / "bank")
    return gd.Bank.build(str(folder / "pixels.npy"), folder / "bank")


def nothing(folder):
    """What a process takes that does no work."""


def prepared(folder):
    np.save(folder / "pixels.npy", pictures(600, 8))
    np.save(folder / "many.npy", pictures())
    bank_of(folder)


def build(folder):
    prepare.NOTE_EVERY, prepare.BLOCK = 0, 200
    gd.Bank.build(str(folder / "many.npy"), folder / "out")


def sample(folder):
    settings = {"method": "ls", "seeds": "0-15", "steps": 5}
    recipe, model = Recipe.resolve(bank_of(folder), settings)
    run(model, recipe, folder / "out", batch=2, save_steps=True)


def compare(folder):
    gd.compare(
        bank_of(folder), ["optimal", "nearest", "wiener", "ls"], folder / "out", seeds=range(8), steps=4, batch=4
    )


def train(folder):
    train_oracle(bank_of(folder), folder / "out", Training(images=320, batch=16, width=16), save_every=2)


def long_run(folder, images):
    """Resident memory after each batch of a run of many images, in `folder / "memory.npy"`, bytes."""
    seen, add, peak = [], runs._RunFolder.add, runs.memory_since()

    def noted(self, *batch):
        add(self, *batch)
        seen.append(int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE"))

    runs._RunFolder.add = noted
    recipe, model = Recipe.resolve(gd.Bank.build("digits"), {"method": "optimal", "seeds": f"0-{images - 1}"})
    run(model, recipe, folder / "out", batch=16)
    np.save(folder / "memory.npy", [*seen, peak()])


def calibrate(folder):
    bank = bank_of(folder)
    network = gd.oracle(lambda x, t: x, bank, prediction="sample", schedule="ddpm")
    gd.calibrate(bank, network, folder / "out" / "windows.json", seeds=range(2), sides=[3, 5], steps=2)


def attribute(folder):
    recipe, model = Recipe.resolve(bank_of(folder), {"method": "optimal", "seeds": [0], "steps": 3})
    attribution_report(recipe, model, folder / "out")


def audit(folder):
    pictures = gd.open_source(np.load(folder / "pixels.npy")[:12])
    audit_report(bank_of(folder), pictures, bank_of(folder).images(slice(0, 12)), folder / "out")


def concentrate(folder):
    gd.concentrate(bank_of(folder), folder / "out", count=2, steps=2)


def derive(folder):
    """Statistics and masks, which are kept beside the bank."""
    gd.sample(gd.denoiser("pca", bank_of(folder)), [0], steps=2)


def product(folder):
    """A product of bytes."""
    a, b = torch.randint(-128, 128, (600, 192), dtype=torch.int8), torch.randint(-128, 128, (192, 24), dtype=torch.int8)
    found = multiply_bytes(a, b, out=torch.empty(600, 24, dtype=torch.int32))
    assert torch.equal(found.double(), a.double() @ b.double())


def covariance(folder, kind):
    """What statistics are said to take, and what they take, in `folder / "memory.npy"`, bytes."""
    shape, stated = (4000, 3, 20, 20) if kind == "eigenbasis" else (1200, 3, 48, 48), []
    bank = gd.Bank.build(np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8))
    spectrum.require = lambda needed, *_: stated.append(needed)
    torch.linalg.eigh(torch.eye(8, dtype=torch.float64))
    now, peak = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE"), runs.memory_since()
    bank.spectrum()
    np.save(folder / "memory.npy", [stated[0], peak() - now])


def told(job, folder, said):
    """Does a job and writes down the error that it ended with, if any."""
    try:
        globals()[job](folder)
    except BaseException as error:
        said.write_text(f"{type(error).__name__}: {error}")


def starved(room, job, folder, said):
    """The same with so many bytes of address space left."""
    with Path("/proc/self/statm").open() as file:
        now = int(file.read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    resource.setrlimit(resource.RLIMIT_AS, (now + room, now + room))
    told(job, folder, said)


# what is left when a job has ended, or was ended: valid, and in the end as of an undisturbed job in `whole`


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
