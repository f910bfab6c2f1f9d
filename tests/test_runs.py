"""Runs that are reproduced, interrupted, resumed, extended, refused."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import golddiff as gd
from golddiff.recipe import open_bank, parse_labels, parse_options, parse_seeds, read_settings
from test_cli import call


def pictures(folder):
    return np.load(folder / "samples.npz")["arr_0"]


def contents(folder):
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir()) if p.name != "metrics.json"}


def test_a_recipe_reproduces_its_run(tmp_path, capsys):
    first, second = tmp_path / "first", tmp_path / "second"
    options = ["--method", "golddiff", "--seeds", "3-6", "--steps", 6, "--schedule", "edm", "--sampler", "heun"]
    more = ["--label", "3,7", "--save-steps", "retrieval=paper", "k_min=5", "k_max=20", "m_max=0.5"]
    assert call(capsys, "sample", "digits", *options, *more, "--out", first)[0] == 0
    assert call(capsys, "sample", "--recipe", first / "recipe.json", "--save-steps", "--out", second)[0] == 0
    assert contents(second) == contents(first)
    a, b = (np.load(folder / "seed000004-steps.npz") for folder in (first, second))
    assert np.abs(a["mean"] - b["mean"]).max() < 1e-5
    recipe = json.loads((first / "recipe.json").read_text())
    assert recipe["labels"] == [3, 7]
    assert recipe["options"]["k_max"] == 20
    assert recipe["options"]["mask_rule"] == "output"


def test_what_is_said_goes_before_the_recipe(tmp_path, capsys):
    file = tmp_path / "config.yaml"
    file.write_text(
        "bank: digits\nmethod: golddiff\nseeds: 0-2\nsteps: 4\noptions:\n  retrieval: paper\n  threshold: 0.1\n"
    )
    code, _, _ = call(capsys, "sample", "--recipe", file, "--steps", 3, "threshold=2e-1", "--out", tmp_path / "run")
    assert code == 0
    recipe = json.loads((tmp_path / "run" / "recipe.json").read_text())
    assert (recipe["steps"], recipe["seeds"], recipe["method"]) == (3, [0, 1, 2], "golddiff")
    assert (recipe["options"]["retrieval"], recipe["options"]["threshold"]) == ("paper", 0.2)


def test_another_bank_is_refused(tmp_path, capsys):
    out = tmp_path / "run"
    assert call(capsys, "sample", "digits", "--seeds", "0", "--limit", 300, "--out", out)[0] == 0
    recipe = out / "recipe.json"
    code, _, err = call(capsys, "sample", "digits", "--recipe", recipe, "--out", tmp_path / "other")
    assert code == 2
    assert "fingerprint" in err
    assert not (tmp_path / "other").exists()
    # the folder of the bank is gone: it is built again from its source, with the options of the recipe
    stored = json.loads(recipe.read_text())
    stored["bank"]["path"] = str(tmp_path / "gone")
    recipe.write_text(json.dumps(stored))
    code, _, err = call(capsys, "sample", "--recipe", recipe, "--out", tmp_path / "again")
    assert code == 2
    assert "if you changed it, remove its checksum" in err
    del stored["checksum"]
    recipe.write_text(json.dumps(stored))
    assert call(capsys, "sample", "--recipe", recipe, "--out", tmp_path / "again")[0] == 0
    assert np.array_equal(pictures(tmp_path / "again"), pictures(out))
    stored["bank"]["fingerprint"] = "0" * 32
    recipe.write_text(json.dumps(stored))
    code, _, err = call(capsys, "sample", "--recipe", recipe, "--out", tmp_path / "third")
    assert code == 2
    assert "fingerprint" in err


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("method: pca\nsteps: [", "neither YAML nor JSON"),
        ("- a\n- b\n", "holds no settings"),
        ("metod: pca\n", "did you mean 'method'"),
        ("format: 99\n", "format 99"),
        ("method: pcaa\n", "did you mean 'pca'"),
        ("seeds: x-y\n", "write them as"),
        ("seeds: []\n", "none"),
        ("steps: many\n", "whole number"),
        ("labels: 77\n", "no image has label 77"),
        ("options: 3\n", "options is 3"),
        ("options: {k_mni: 3}\n", "did you mean 'k_min'"),
        ("schedule: dmpm\n", "did you mean 'ddpm'"),
        ("bank: {fingerprint: x}\n", "names no bank"),
    ],
)
def test_bad_recipes_are_refused(tmp_path, capsys, text, message):
    file = tmp_path / "recipe.yaml"
    file.write_text(text if "bank" in text or text[0] == "-" else "bank: digits\n" + text)
    code, _, err = call(capsys, "sample", "--recipe", file, "--out", tmp_path / "run")
    assert code == 2
    assert message in err
    assert err.strip().count("\n") == 0
    assert not (tmp_path / "run").exists()


def start(out, *extra):
    command = [sys.executable, "-m", "golddiff", "sample", "mnist5k", "--seeds", "0-11", "--batch", "2", "--out", out]

    def heed_interrupts():  # background jobs of a shell ignore them
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    return subprocess.Popen([*command, *extra], stderr=subprocess.PIPE, text=True, preexec_fn=heed_interrupts)


def wait_for_pictures(out, count):
    limit = time.monotonic() + 60
    while len(list(out.glob("seed*.png"))) < count:
        assert time.monotonic() < limit
        time.sleep(0.01)


@pytest.mark.parametrize("kill", [signal.SIGKILL, signal.SIGINT])
def test_a_run_that_was_stopped_goes_on_to_the_same_end(tmp_path, kill):
    gd.Bank.build("mnist5k")
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    assert start(whole).wait() == 0
    process = start(stopped)
    wait_for_pictures(stopped, 3)
    process.send_signal(kill)
    _, said = process.communicate()
    assert 3 <= len(list(stopped.glob("seed*.png"))) < 12
    if kill is signal.SIGINT:
        assert process.returncode == 130
        assert "goes on from there" in said
        done = len(list(stopped.glob("seed*.png")))
        assert len(pictures(stopped)) == done
    kept = {p: p.stat().st_mtime_ns for p in stopped.glob("seed*.png")}
    assert start(stopped).wait() == 0
    assert all(p.stat().st_mtime_ns == stamp for p, stamp in kept.items())
    assert contents(stopped) == contents(whole)


def test_more_seeds_and_more_files_can_be_asked_for_later(tmp_path, capsys):
    out = tmp_path / "run"
    assert call(capsys, "sample", "digits", "--seeds", "0-1", "--out", out)[0] == 0
    assert call(capsys, "sample", "digits", "--seeds", "4-5", "--out", out)[0] == 0
    assert json.loads((out / "recipe.json").read_text())["seeds"] == [4, 5, 0, 1]
    assert len(pictures(out)) == 4
    assert call(capsys, "sample", "digits", "--seeds", "0-1", "--save-steps", "--nearest", 3, "--out", out)[0] == 0
    assert (out / "seed000001-steps.npz").exists()
    assert (out / "nearest.png").exists()


@pytest.mark.skipif(os.getuid() == 0, reason="root may write everywhere")
def test_a_folder_that_cannot_be_written(tmp_path, capsys):
    tmp_path.chmod(0o555)
    code, _, err = call(capsys, "sample", "digits", "--out", tmp_path / "run")
    tmp_path.chmod(0o755)
    assert code == 2
    assert "choose another" in err


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize("what", ["sample", "bank"])
def test_a_full_disk_is_one_line_and_leaves_nothing_half_written(tmp_path, capsys, monkeypatch, what):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    gd.Bank.build("digits")
    if what == "sample":
        monkeypatch.setattr("PIL.Image.Image.save", full)
        arguments = ["sample", "digits", "--seeds", "0", "--out", tmp_path / "run"]
    else:
        monkeypatch.setattr("numpy.lib.format.open_memmap", full)
        arguments = ["bank", "build", "digits", "--out", tmp_path / "bank"]
    code, _, err = call(capsys, *arguments)
    assert code == 2
    assert "No space left" in err
    assert err.strip().count("\n") == 0
    assert not [p for p in tmp_path.rglob("*") if p.suffix in (".png", ".npy") or p.name.startswith(".")]


def damaged(folder, harm):
    pixels = folder / "pixels.npy"
    if harm == "flipped byte":
        data = bytearray(pixels.read_bytes())
        data[len(data) // 2] ^= 4
        pixels.write_bytes(data)
    elif harm == "flipped byte in the mask":
        mask = next((folder / "derived").glob("mask-*"))
        data = bytearray(mask.read_bytes())
        data[-3] ^= 1
        mask.write_bytes(data)
    elif harm == "truncated":
        pixels.write_bytes(pixels.read_bytes()[:-64])
    elif harm == "wrong shape":
        np.save(folder / "keys.npy", np.zeros(3, dtype=np.int64))
    elif harm == "another version":
        meta = json.loads((folder / "bank.json").read_text())
        (folder / "bank.json").write_text(json.dumps({**meta, "format": 0}))
    elif harm == "changed metadata":
        meta = json.loads((folder / "bank.json").read_text())
        (folder / "bank.json").write_text(json.dumps({**meta, "classes": ["x"]}))
    elif harm == "ids of another":
        np.save(folder / "ids.npy", np.load(folder / "ids.npy")[::-1])


@pytest.mark.parametrize(
    "harm",
    ["none", "flipped byte", "flipped byte in the mask", "truncated", "wrong shape", "another version",
     "changed metadata", "ids of another"],
)  # fmt: skip
def test_verify_finds_damage(tmp_path, capsys, harm):
    folder = tmp_path / "bank"
    bank = gd.Bank.build("digits", folder, limit=200)
    gd.sample(gd.denoiser("golddiff", bank), [0], steps=2)
    damaged(folder, harm)
    code, out, err = call(capsys, "bank", "verify", folder)
    if harm == "none":
        assert code == 0
        assert "all is as it was built" in out
    else:
        assert code == 2
        assert err.strip().count("\n") == 0
        assert "again" in err


def test_doctor_and_completion_and_welcome(capsys):
    code, out, _ = call(capsys, "doctor")
    assert code == 0
    for word in ("versions", "threads", "GFLOP/s", "cache", "extra diffusers", "GOLDDIFF_DATA"):
        assert word in out
    for shell in ("bash", "zsh", "fish"):
        code, out, _ = call(capsys, "completion", shell)
        assert code == 0
        assert "_GOLDDIFF_COMPLETE" in out
    code, out, _ = call(capsys)
    assert code == 0
    assert "golddiff sample mnist5k" in out


def test_completion_offers_the_methods():
    environment = {
        **os.environ,
        "_GOLDDIFF_COMPLETE": "bash_complete",
        "COMP_WORDS": "golddiff sample --method ",
        "COMP_CWORD": "3",
    }
    command = "import sys; sys.argv = ['golddiff']; from golddiff.cli import main; main()"
    done = subprocess.run([sys.executable, "-c", command], env=environment, capture_output=True, text=True, check=False)
    assert {line.split(",")[1] for line in done.stdout.split()} >= {"golddiff", "optimal", "pca", "wiener"}


@pytest.mark.parametrize(
    "arguments", [["sample"], ["bank"], ["bank", "build"], ["bank", "info"], ["bank", "verify"], ["doctor"]]
)
def test_help_teaches(capsys, arguments):
    code, out, _ = call(capsys, *arguments, "--help")
    assert code == 0
    assert "Usage: golddiff" in out


def test_seeds_labels_and_options(digits):
    assert parse_seeds("0-3, 8,10-10") == [0, 1, 2, 3, 8, 10]
    assert parse_seeds([4, 2]) == [4, 2]
    assert parse_seeds(7) == [7]
    assert parse_labels("3,7", digits) == parse_labels([3, "7"], digits) == [3, 7]
    assert parse_labels(None, digits) == []
    assert parse_options(["a=1", "b=1e-3", "c=paper", "d=null", "e=true"]) == {
        "a": 1, "b": 1e-3, "c": "paper", "d": None, "e": True,
    }  # fmt: skip
    for bad in ("3-1", "1,1", "", "a", "-1", "1-", "0-99999999999", {"a": 1}, [1.5]):
        with pytest.raises(gd.GolddiffError):
            parse_seeds(bad)


def test_recipes_that_cannot_be_read(tmp_path):
    with pytest.raises(gd.GolddiffError, match="cannot be read"):
        read_settings(tmp_path / "nothing.json")
    (tmp_path / "a.yaml").write_text("a: !!python/object/apply:os.system ['true']")
    with pytest.raises(gd.GolddiffError, match="neither YAML nor JSON"):
        read_settings(tmp_path / "a.yaml")
    with pytest.raises(gd.GolddiffError, match="array"):
        open_bank({"name": "array", "path": None, "fingerprint": "x"})


def test_another_method_drops_the_options_of_the_recipe(tmp_path, capsys):
    file = tmp_path / "config.yaml"
    file.write_text("bank: digits\nmethod: golddiff\nseeds: 0\nsteps: 3\noptions: {retrieval: paper, threshold: 0.1}\n")
    for method, extra in (("wiener", []), ("pca", ["threshold=0.3"]), ("golddiff", ["threshold=0.3"])):
        out = tmp_path / method
        assert call(capsys, "sample", "--recipe", file, "--method", method, *extra, "--out", out)[0] == 0
        options = json.loads((out / "recipe.json").read_text())["options"]
        assert options.get("retrieval") == {"wiener": None, "pca": "full", "golddiff": "paper"}[method]
        assert options.get("threshold") == (0.3 if extra else None)


def test_names_of_classes_go_before_numbers(tmp_path):
    pixels = (
        np.repeat(np.arange(3, dtype=np.uint8)[:, None, None, None] * 50, 4, axis=0).repeat(4, axis=1).repeat(4, axis=2)
    )
    bank = gd.Bank.build(pixels, labels=np.repeat(np.arange(3), 4))
    bank.classes = ("1", "2", "3")
    assert parse_labels("1,3", bank) == [0, 2]
    assert parse_labels([1, 2], bank) == [1, 2]
    for bad in ("--5", "9" * 30, "0,cat", 10**30, [[1]]):
        with pytest.raises(gd.GolddiffError):
            parse_labels(bad, bank)


def test_other_settings_go_to_another_folder(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for arguments in ([], ["--label", "3"], ["retrieval=paper"], ["--label", "3", "--label", "4"], ["--limit", 500]):
        assert call(capsys, "sample", "digits", "--seeds", "0", *arguments)[0] == 0
    folders = sorted(p.name for p in (tmp_path / "runs").iterdir())
    assert len(folders) == 5
    assert folders[0] == "digits-golddiff"


def test_force_takes_runs_only(tmp_path, capsys):
    (tmp_path / "seeds.csv").write_text("mine")
    code, _, err = call(capsys, "sample", "digits", "--seeds", "0", "--out", tmp_path, "--force")
    assert code == 2
    assert "no run folder" in err
    out = tmp_path / "run"
    assert call(capsys, "sample", "digits", "--seeds", "0-1", "--out", out)[0] == 0
    (out / "seedlings.txt").write_text("mine")
    assert call(capsys, "sample", "digits", "--seeds", "5", "--out", out, "--force")[0] == 0
    assert sorted(p.name for p in out.glob("seed*")) == ["seed000005.png", "seedlings.txt"]


@pytest.mark.parametrize("name", ["seed000000.png", "seed000000-steps.npz", "recipe.json"])
@pytest.mark.parametrize("harm", ["empty", "cut", "folder"])
def test_damaged_runs_are_one_line(tmp_path, capsys, name, harm):
    out = tmp_path / "run"
    arguments = ["sample", "digits", "--seeds", "0-1", "--save-steps", "--out", out]
    assert call(capsys, *arguments)[0] == 0
    file = out / name
    data = file.read_bytes()
    file.unlink()
    if harm == "folder":
        file.mkdir()
    else:
        file.write_bytes(data[: len(data) // 2] if harm == "cut" else b"")
    code, _, err = call(capsys, *arguments)
    assert code == 2
    assert err.strip().count("\n") == 0
    assert name in err


def test_a_recipe_says_how_its_bank_is_made(tmp_path, capsys):
    assert call(capsys, "sample", "digits", "--seeds", "0", "--out", tmp_path / "a")[0] == 0
    code, _, err = call(
        capsys, "sample", "--recipe", tmp_path / "a" / "recipe.json", "--limit", 5, "--out", tmp_path / "b"
    )
    assert code == 2
    assert "leave --limit out" in err


def test_dpm_with_another_schedule_is_refused_before_a_folder_is_made(tmp_path, capsys):
    code, _, err = call(
        capsys, "sample", "digits", "--sampler", "dpm++", "--schedule", "edm", "--out", tmp_path / "run"
    )
    assert code == 2
    assert "schedule ddpm" in err
    assert not (tmp_path / "run").exists()


def test_runs_do_not_go_among_the_pictures(tmp_path, capsys, monkeypatch):
    from PIL import Image

    for i in range(3):
        Image.new("L", (8, 8), 60 * i).save(tmp_path / f"{i}.png")
    monkeypatch.chdir(tmp_path)
    code, _, err = call(capsys, "sample", ".", "--seeds", "0")
    assert code == 2
    assert "among the pictures" in err
    out = tmp_path.parent / "run-of-pictures"
    code, _, err = call(capsys, "sample", ".", "retrieval=reference", "--seeds", "0", "--out", out)
    assert code == 0
    assert "expect copies" in err
