"""Long work in small, which tests kill, starve and watch in processes of its own. Each job writes `folder / "out"`."""

import os
from pathlib import Path

import numpy as np
import torch

import golddiff as gd
from golddiff import prepare, runs
from golddiff.recipe import Recipe
from golddiff.runs import run
from golddiff.training import Training, train_oracle

torch.set_num_threads(1)


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
