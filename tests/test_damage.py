"""Damaged files: bits flipped, cut short, emptied, swapped. `bank verify` finds all, and nothing else goes wrong.

`GOLDDIFF_FLIPS=1000` flips so many bits of each file, one at a time; some dozens otherwise.
"""

import json
import os
import random
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch

import golddiff as gd
from golddiff.cells import Cells
from golddiff.cli import app
from golddiff.errors import GolddiffError
from golddiff.jsons import write_json
from golddiff.locality import PCAMask
from golddiff.recipe import Recipe, read_settings

FLIPS = int(os.environ.get("GOLDDIFF_FLIPS", "60"))
FILES = [f"{name}.npy" for name in ("pixels", "labels", "ids", "keys", "centre", "norms", "proxy")]
DERIVED = ["spectrum", "mask", "cells"]


def made(folder, first):
    """A bank with all that can be derived from it, a recipe and a calibration."""
    digits = gd.Bank.build("digits")
    rows = slice(first, first + 300)
    some = gd.open_source(digits.pixels[rows].numpy(), labels=digits.labels[rows].numpy())
    bank = gd.Bank.build(replace(some, ids=[str(1000 + first + i) for i in range(300)]), folder / "bank")
    PCAMask(bank).mask(gd.DDPM()(300))
    inputs, weights = torch.arange(64).expand(1, -1), torch.ones(1, 64)
    bank.keep("cells", lambda: Cells.find(lambda rows: bank.centred(rows, torch.float32), bank.keys, inputs, weights))
    Recipe.resolve(bank, {"method": "ls"})[0].save(folder / "recipe.json")
    network = gd.oracle(lambda x, t: x, bank, prediction="sample", schedule="ddpm")
    gd.calibrate(bank, network, folder / "windows.json", sides=[3, 5], steps=2)
    return bank


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    made(folder, 0)
    return folder


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    """The same of other images, so that every file is of the same size and form."""
    folder = tmp_path_factory.mktemp("other")
    made(folder, 1000)
    return folder


@pytest.fixture
def copy(whole, tmp_path):
    shutil.copytree(whole, tmp_path / "copy")
    return tmp_path / "copy"


def file_of(folder, name):
    if name in DERIVED:
        return next((folder / "bank" / "derived").glob(f"{name}*"))
    return folder / name if name in ("recipe.json", "windows.json") else folder / "bank" / name


def damage(folder, name):
    """What `golddiff bank verify` says; None if it finds nothing."""
    path = folder if name.endswith("s.json") or name == "recipe.json" else folder / "bank"
    try:
        app.main(["bank", "verify", str(file_of(folder, name) if path == folder else path)], standalone_mode=False)
    except GolddiffError as error:
        return str(error)
    return None


def use(folder):
    """An image of the bank, by the recipe and by the calibration; None where one of them was refused."""
    try:
        bank = gd.Bank.open(folder / "bank")
        bank.spectrum()
        settings = read_settings(folder / "recipe.json")
        settings.pop("bank")
        Recipe.resolve(bank, {key: settings[key] for key in settings if key != "format"})
        model = gd.denoiser("ls", bank, window=str(folder / "windows.json"))
        masked = gd.denoiser("pca", bank)
        return torch.cat([gd.sample(m, [0], steps=2) for m in (model, masked)])
    except GolddiffError:
        return None


@pytest.mark.parametrize("name", ["bank.json", *FILES, *DERIVED, "recipe.json", "windows.json"])
def test_every_flipped_bit_is_found(whole, copy, name):
    file, right = file_of(copy, name), use(whole)
    assert damage(copy, name) is None
    data, chance = file.read_bytes(), random.Random(name)  # noqa: S311 - places to damage
    in_head = [chance.randrange(8 * min(len(data), 512)) for _ in range(FLIPS // 4)]  # where headers lie
    for bit in [*in_head, *(chance.randrange(8 * len(data)) for _ in range(FLIPS - len(in_head)))]:
        flipped = bytearray(data)
        flipped[bit // 8] ^= 1 << bit % 8
        file.write_bytes(flipped)
        assert damage(copy, name) is not None, f"bit {bit}"
        if bit % 10 == 0:  # what is not refused at once may be wrong, but nothing breaks
            image = use(copy)
            assert image is None or (image.shape == right.shape and bool(image.isfinite().all()))
    file.write_bytes(data)
    assert damage(copy, name) is None
    assert torch.equal(use(copy), right)


@pytest.mark.parametrize("harm", ["cut by two bytes", "cut in half", "emptied", "longer", "removed"])
@pytest.mark.parametrize("name", ["bank.json", *FILES, *DERIVED, "recipe.json", "windows.json"])
def test_files_of_another_length_are_found(copy, name, harm):
    file = file_of(copy, name)
    data = file.read_bytes()
    if harm == "removed":
        file.unlink()
    else:
        half = data[: len(data) // 2]
        new = {"cut by two bytes": data[:-2], "cut in half": half, "emptied": b"", "longer": data + b"\0"}
        file.write_bytes(new[harm])
    if harm == "removed" and name in DERIVED:
        assert damage(copy, name) is None  # it is made again
        assert use(copy) is not None
        return
    assert damage(copy, name) is not None
    if name not in DERIVED:
        assert use(copy) is None, "found when it is opened"


@pytest.mark.parametrize("name", ["bank.json", *FILES, *DERIVED])
def test_files_of_another_bank_are_found(copy, other, whole, name):
    shutil.copy(file_of(other, name), file_of(copy, name).with_name(file_of(copy, name).name))
    assert damage(copy, name) is not None
    if name in DERIVED:
        assert torch.equal(use(copy), use(whole))  # it is made again
    else:
        with pytest.raises(GolddiffError, match="build the bank again"):
            gd.Bank.open(copy / "bank")


def test_recipes_and_calibrations_of_another_bank_are_refused(copy, other):
    for name, refused in (("recipe.json", "fingerprint"), ("windows.json", "made with another bank")):
        shutil.copy(other / name, copy / name)
        assert damage(copy, name) is None  # as a file it is whole
        arguments = {
            "recipe.json": [str(copy / "bank"), "--recipe", str(copy / name)],
            "windows.json": [str(copy / "bank"), "--method", "ls", f"window={copy / name}"],
        }
        with pytest.raises(GolddiffError, match=refused):
            app.main(["sample", *arguments[name], "--out", str(copy / "run")], standalone_mode=False)
        assert not (copy / "run").exists()


def test_what_was_changed_on_purpose_can_be_used(copy):
    for name in ("recipe.json", "windows.json"):
        content = json.loads((copy / name).read_text())
        if name == "recipe.json":
            content["steps"] = 3
        else:
            content["windows"] = [[1.0, 7]]
        write_json(copy / name, content)
        assert use(copy) is None
        del content["checksum"]
        write_json(copy / name, content)
        assert use(copy) is not None


@pytest.mark.parametrize("seal", ["", "checksum: x\n"])
def test_keys_that_are_no_text(tmp_path, seal):
    path = tmp_path / "recipe.yaml"
    path.write_text("options:\n  1: 2\n  tol: 3\n" + seal)
    if seal:
        with pytest.raises(GolddiffError, match="was changed after it was written"):
            read_settings(path)
    else:
        assert read_settings(path)["options"] == {1: 2, "tol": 3}


def test_a_swap_of_large_files_is_found_when_the_bank_is_opened(tmp_path):
    """Files are compared with their build by their edges, so a swap is found in files of any size."""
    rng = np.random.default_rng(0)
    for name in "ab":
        gd.Bank.build(rng.integers(0, 256, (2000, 3, 16, 16), dtype=np.uint8), tmp_path / name)
    shutil.copy(tmp_path / "b" / "pixels.npy", tmp_path / "a" / "pixels.npy")
    assert (tmp_path / "a" / "pixels.npy").stat().st_size > 2**20
    with pytest.raises(GolddiffError, match="not the file of the build"):
        gd.Bank.open(tmp_path / "a")
    assert gd.Bank.open(tmp_path / "b").verify() == []
