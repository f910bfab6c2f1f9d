import json
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

import golddiff as gd
from golddiff import cli


def call(capsys, *arguments):
    """Exit code, standard output and standard error of the command line."""
    before = sys.argv
    sys.argv = ["golddiff", *map(str, arguments)]
    try:
        with pytest.raises(SystemExit) as stopped:
            cli.main()
    finally:
        sys.argv = before
    out, err = capsys.readouterr()
    return stopped.value.code, out, err


@pytest.mark.parametrize("method", ["optimal", "wiener", "pca", "golddiff"])
def test_sample_makes_a_run_folder(tmp_path, capsys, method):
    out = tmp_path / "run"
    code, said, _ = call(capsys, "sample", "digits", "--method", method, "--seeds", "0-3,9", "--out", out, "--batch", 2)
    assert code == 0
    assert "grid.png" in said
    assert sorted(p.name for p in out.iterdir()) == [
        "grid.png", "metrics.json", "recipe.json", "samples.npz",
        *(f"seed{s:06d}.png" for s in (0, 1, 2, 3, 9)),
    ]  # fmt: skip
    samples = np.load(out / "samples.npz")["arr_0"]
    assert (samples.shape, samples.dtype) == ((5, 8, 8, 1), np.uint8)
    expected = gd.sample(gd.denoiser(method, gd.Bank.build("digits")), [0, 1, 2, 3, 9])
    difference = samples[..., 0].astype(int) - ((expected[:, 0] + 1) * 127.5).clamp(0, 255).numpy()
    assert np.abs(difference).max() <= 0.51
    assert np.array_equal(np.asarray(Image.open(out / "seed000009.png")), samples[4, :, :, 0])
    recipe, metrics = (json.loads((out / f"{name}.json").read_text()) for name in ("recipe", "metrics"))
    assert recipe["bank"]["fingerprint"] == gd.Bank.build("digits").fingerprint
    assert recipe["seeds"] == [0, 1, 2, 3, 9]
    assert len(metrics["seconds_per_image_and_step"]) == 10
    assert metrics["peak_memory_bytes"] > 1e7
    if method != "wiener":
        assert recipe["options"]["retrieval"] == ("local" if method == "golddiff" else "full")
        assert all(1 <= ess <= 1797 for ess in metrics["effective_support"])
        assert all(n > 0 for n in metrics["bytes_read"])


def test_finished_seeds_are_kept_and_other_runs_refused(tmp_path, capsys):
    out = tmp_path / "run"
    assert call(capsys, "sample", "digits", "--seeds", "0-1", "--out", out)[0] == 0
    stamp = (out / "seed000001.png").stat().st_mtime_ns
    assert call(capsys, "sample", "digits", "--seeds", "0-2", "--out", out)[0] == 0
    assert (out / "seed000001.png").stat().st_mtime_ns == stamp
    assert np.load(out / "samples.npz")["arr_0"].shape[0] == 3
    code, _, err = call(capsys, "sample", "digits", "--steps", 5, "--out", out)
    assert code == 2
    assert "another recipe" in err
    assert call(capsys, "sample", "digits", "--steps", 5, "--seeds", "0", "--out", out, "--force")[0] == 0
    assert not (out / "seed000001.png").exists()


def test_save_steps_and_labels(tmp_path, capsys):
    out = tmp_path / "run"
    code, _, _ = call(
        capsys,
        "sample",
        "digits",
        "--method",
        "optimal",
        "--label",
        "3,7",
        "--seeds",
        "4-6",
        "--save-steps",
        "--out",
        out,
    )
    assert code == 0
    steps = [np.load(out / f"seed{s:06d}-steps.npz") for s in (4, 5, 6)]
    assert all(s["x_t"].shape == s["mean"].shape == (10, 1, 8, 8) for s in steps)
    assert (out / "trajectories.png").exists()
    bank = gd.Bank.build("digits")
    rows = bank.images(slice(None)).flatten(1).numpy()
    nearest = [int(bank.labels[np.abs(rows - m.reshape(-1)).sum(1).argmin()]) for m in (s["mean"][-1] for s in steps)]
    assert nearest == [3, 7, 3]


def test_bank_build_and_info(tmp_path, capsys):
    code, said, _ = call(capsys, "bank", "build", "digits", "--limit", 100, "--out", tmp_path / "bank")
    assert code == 0
    assert "100 of 1 x 8 x 8" in said
    code, again, _ = call(capsys, "bank", "info", tmp_path / "bank")
    assert code == 0
    assert again.startswith(said)
    assert "sheet" in again


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["sample", "no/such/path"], "nothing at no/such/path"),
        (["sample", "digitz"], "did you mean 'digits'"),
        (["sample", "digits", "--method", "godldiff"], "did you mean 'golddiff'"),
        (["sample", "digits", "--metod", "pca"], "--method"),
        (["sample", "digits", "kmin=3"], "did you mean 'k_min'"),
        (["sample", "digits", "k_min=300", "k_max=30", "retrieval=paper"], "k_min is 300, more than k_max"),
        (["sample", "digits", "nonsense"], "key=value"),
        (["sample", "digits", "--label", "11"], "no image has label 11: labels here are 0, 1"),
        (["sample", "digits", "--label", "cat"], "no class is called 'cat'"),
        (["sample", "digits", "--seeds", "3-1"], "write them as 0-15"),
        (["sample", "digits", "--seeds", "1,1"], "twice"),
        (["sample", "digits", "--steps", "0"], "steps is 0"),
        (["sample", "digits", "--batch", "0"], "--batch is 0"),
        (["sample", "digits", "--schedule", "ddmp"], "did you mean 'ddpm'"),
        (["sample", "digits", "--device", "tpu9"], "unknown device"),
        (["sample"], "BANK"),
        (["bank", "info", "."], "no bank yet"),
        (["smaple", "digits"], "smaple"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    code, out, err = call(capsys, *arguments)
    assert code == 2
    assert message in err
    assert err.startswith("golddiff: ")
    assert err.strip().count("\n") == 0
    assert out == ""
    assert list(tmp_path.iterdir()) == []


def test_a_folder_of_something_else_is_not_taken_for_a_run(tmp_path, capsys):
    (tmp_path / "thesis.tex").write_text("x")
    code, _, err = call(capsys, "sample", "digits", "--out", tmp_path)
    assert code == 2
    assert "no run folder" in err


def test_the_command_is_installed():
    done = subprocess.run([sys.executable, "-m", "golddiff", "--version"], capture_output=True, text=True, check=True)
    assert gd.__version__ in done.stdout
