"""Banks of latents: encoded while they are built, decoded when they are sampled."""

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

import golddiff as gd
from conftest import noisy, toy_arrays
from golddiff.bank import Bank
from golddiff.noise import Noise
from test_cli import call


def scatter(x):
    """2 x 2 space to depth, then an orthogonal map of the channels: distances stay what they are."""
    return torch.einsum("oc,nchw->nohw", MIX, torch.nn.functional.pixel_unshuffle(x, 2))


def gather(z):
    return torch.nn.functional.pixel_shuffle(torch.einsum("oc,nohw->nchw", MIX, z), 2)


MIX = torch.linalg.qr(torch.randn(4, 4, generator=torch.Generator().manual_seed(0)))[0]
ROTATED = gd.Latents(scatter, gather, name="rotated")


@pytest.fixture(scope="session")
def rotated() -> Bank:
    return Bank.build("digits", latents=ROTATED)


@pytest.fixture(scope="module")
def autoencoder(tmp_path_factory):
    """A tiny AutoencoderKL with random weights, for colour pictures whose sides are even."""
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(1)
    model = diffusers.AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * 2,
        up_block_types=["UpDecoderBlock2D"] * 2,
        block_out_channels=[8, 8],
        layers_per_block=1,
        norm_num_groups=4,
        latent_channels=4,
        sample_size=8,
        scaling_factor=0.7,
        shift_factor=0.3,
    )
    folder = tmp_path_factory.mktemp("networks") / "vae"
    model.save_pretrained(folder)
    return folder


def test_an_orthogonal_map_changes_nothing(digits, rotated):
    assert rotated.shape == (4, 4, 4)
    assert rotated.pixels.dtype == torch.float32
    noise = Noise(0.8, 0.4)
    x_t = noisy(digits, noise, dtype=torch.float32)
    plain, latent = gd.denoiser("optimal", digits), gd.denoiser("optimal", rotated)
    a, b = plain(x_t, noise, [1, -1, 3]), latent(scatter(x_t), noise, [1, -1, 3])
    assert torch.allclose(a.mean, gather(b.mean), atol=1e-5)
    assert torch.allclose(a.log_evidence, b.log_evidence, rtol=1e-5)
    assert torch.allclose(a.ess, b.ess, rtol=1e-3)
    assert torch.allclose(rotated.decode(rotated.images(slice(None))), digits.images(slice(None)), atol=1e-5)
    assert torch.equal(digits.decode(x_t), x_t)


def test_wiener_and_sampling_follow_the_map(digits, rotated):
    noise = Noise(0.8, 0.4)
    x_t = noisy(digits, noise, dtype=torch.float32)
    a, b = (gd.denoiser("wiener", bank) for bank in (digits, rotated))
    assert torch.allclose(a(x_t, noise).mean, gather(b(scatter(x_t), noise).mean), atol=1e-4)
    optimal = gd.denoiser("optimal", rotated)
    unclipped = gd.sample(optimal, range(3), sampler=gd.DDIM(clip_sample=False))
    assert torch.equal(gd.sample(optimal, range(3)), unclipped)
    rows = digits.images(slice(None)).flatten(1)
    assert float(torch.cdist(rotated.decode(unclipped).flatten(1), rows).min(1).values.max()) < 0.01


def test_latents_are_not_clipped_by_a_run(tmp_path, capsys):
    """Latents ten times as large: a sampler that clips them to [-1, 1] would lose the picture."""
    large = gd.Latents(lambda x: 10 * scatter(x), lambda z: gather(z) / 10, name="large")
    bank = Bank.build("digits", latents=large)
    from golddiff.recipe import Recipe
    from golddiff.runs import run

    recipe, model = Recipe.resolve(bank, {"method": "optimal", "seeds": "0-2", "steps": 40, "schedule": "edm"})
    run(model, recipe, tmp_path / "run")
    made = np.load(tmp_path / "run" / "samples.npz")["arr_0"][..., 0].reshape(3, -1).astype(float)
    pixels = Bank.build("digits").pixels.flatten(1).double()
    assert float(torch.cdist(torch.from_numpy(made), pixels).min(1).values.max()) < 8  # of 255, over 64 pixels


def test_other_latents_are_other_banks(digits, rotated):
    assert rotated.fingerprint != digits.fingerprint
    other = Bank.build("digits", latents=gd.Latents(scatter, gather, name="other"))
    assert other.path != rotated.path
    assert other.fingerprint == rotated.fingerprint
    assert rotated.source["latents"] == {"name": "rotated", "weights": None}
    assert Bank.build("digits", latents=ROTATED).path == rotated.path


def test_callables_are_asked_for_again(rotated):
    opened = Bank.open(rotated.path)
    assert opened.is_latent
    with pytest.raises(gd.GolddiffError, match="came from callables: give them again"):
        opened.decode(opened.images(slice(0, 2)))
    images = opened.with_latents(ROTATED).decode(opened.images(slice(0, 2)))
    assert images.shape == (2, 1, 8, 8)
    assert torch.equal(opened.to("cpu").decode(opened.images(slice(0, 2))), images)
    with pytest.raises(gd.GolddiffError, match="not those of other"):
        opened.with_latents(gd.Latents(scatter, gather, name="other"))


def test_a_bank_of_pictures_has_no_latents(digits):
    with pytest.raises(gd.GolddiffError, match="holds pictures"):
        Bank.build(digits.path, latents=ROTATED)


def test_arrays_and_flips_are_encoded():
    pixels, labels = toy_arrays(shape=(3, 4, 4))
    half = gd.Latents(lambda x: torch.nn.functional.avg_pool2d(x, 2), lambda z: z.repeat_interleave(2, 3), name="half")
    bank = Bank.build(pixels, labels=labels, flip=True, layout="NCHW", latents=half)
    x = torch.from_numpy(pixels).float() / 127.5 - 1
    expected = torch.nn.functional.avg_pool2d(torch.cat([x, x.flip(3)]), 2)
    assert torch.allclose(bank.images(slice(None)), expected, atol=1e-6)
    assert bank.decode(bank.images(slice(0, 1))).shape == (1, 3, 2, 4)


def test_a_build_that_is_stopped_goes_on(tmp_path, monkeypatch):
    from golddiff import prepare

    monkeypatch.setattr(prepare, "NOTE_EVERY", 0.0)
    images = np.random.default_rng(0).integers(0, 255, (2500, 4, 4, 1)).astype(np.uint8)
    np.save(tmp_path / "images.npy", images)
    seen = []

    def encode(x):
        seen.append(len(x))
        if sum(seen) > 2100 and not went_on:
            raise KeyboardInterrupt
        return scatter(x)

    went_on = []
    watched = gd.Latents(encode, gather, name="watched")
    with pytest.raises(KeyboardInterrupt):
        Bank.build(tmp_path / "images.npy", tmp_path / "bank", latents=watched)
    went_on.append(True)
    seen.clear()
    bank = Bank.build(tmp_path / "images.npy", tmp_path / "bank", latents=watched)
    assert sum(seen) < 2500
    assert bank.verify() == []
    assert bank.fingerprint == Bank.build(images, latents=watched).fingerprint


@pytest.mark.parametrize(
    ("encode", "says"),
    [
        (lambda x: x.flatten(1), r"float32 \(1, 64\) of 1 pictures"),
        (lambda x: x.numpy(), "encode makes ndarray"),
        (lambda x: x / 0, "finite floats"),
        (lambda x: x.long(), "encode makes torch.int64"),
    ],
)
def test_encoders_that_are_none(encode, says):
    with pytest.raises(gd.GolddiffError, match=says):
        Bank.build("digits", latents=gd.Latents(encode, gather, name="wrong"))


def test_latents_need_callables_and_a_name():
    for wrong in ((None, gather, "x"), (scatter, gather, ""), (scatter, 3, "x")):
        with pytest.raises(gd.GolddiffError, match="two callables, encode and decode, and a name"):
            gd.Latents(*wrong)


# ---- autoencoders of diffusers ----------------------------------------------------------------------------


def test_an_autoencoder_scales_and_shifts(autoencoder):
    import diffusers

    model = diffusers.AutoencoderKL.from_pretrained(autoencoder).eval()
    x = torch.rand(3, 3, 8, 8, generator=torch.Generator().manual_seed(2)) * 2 - 1
    coder = gd.latents(autoencoder)
    with torch.no_grad():
        mode = model.encode(x).latent_dist.mode()
        z = coder.encode(x)
        assert torch.allclose(z, (mode - 0.3) * 0.7, atol=1e-6)
        assert torch.allclose(coder.decode(z), model.decode(mode).sample, atol=1e-5)
    assert z.shape == (3, 4, 4, 4)
    assert gd.latents(autoencoder.parent).identity == coder.identity  # a pipeline's folder holds vae/
    assert torch.equal(coder.encode(x[:, :1]), coder.encode(x[:, :1].expand(-1, 3, -1, -1)))
    with pytest.raises(gd.GolddiffError, match="multiples of 2, not 3 x 7 x 8"):
        coder.encode(torch.zeros(1, 3, 7, 8))


def test_the_command_line_decodes(autoencoder, tmp_path, capsys):
    folder = tmp_path / "pictures"
    folder.mkdir()
    for i, picture in enumerate(np.random.default_rng(3).integers(0, 255, (12, 10, 10, 3)).astype(np.uint8)):
        Image.fromarray(picture).save(folder / f"{i}.png")
    vae = tmp_path / "vae"
    shutil.copytree(autoencoder, vae)
    bank, run = tmp_path / "latent.bank", tmp_path / "run"
    code, said, _ = call(capsys, "bank", "build", folder, "--latents", vae, "--size", 8, "--out", bank)
    assert code == 0
    assert f"latents      {vae}" in said
    common = ["--method", "optimal", "--seeds", "0-1", "--steps", 4]
    assert call(capsys, "sample", bank, *common, "--save-steps", "--out", run)[0] == 0
    made = np.load(run / "samples.npz")["arr_0"]
    opened = Bank.open(bank)
    ours = opened.decode(gd.sample(gd.denoiser("optimal", opened), [0, 1], steps=4))
    assert np.abs(made / 127.5 - 1 - ours.clamp(-1, 1).permute(0, 2, 3, 1).numpy()).max() < 0.5 / 127.5 + 1e-5
    assert np.load(run / "seed000000-steps.npz")["mean"].shape == (4, 4, 4, 4)
    assert Image.open(run / "trajectories.png").mode == "RGB"
    assert json.loads((run / "recipe.json").read_text())["bank"]["latents"]["name"] == str(vae)
    assert call(capsys, "sample", "--recipe", run / "recipe.json", "--out", tmp_path / "again")[0] == 0
    assert np.array_equal(np.load(tmp_path / "again" / "samples.npz")["arr_0"], made)

    vae.rename(tmp_path / "moved")
    code, _, said = call(capsys, "sample", bank, *common, "--out", tmp_path / "gone")
    assert code == 2
    assert "no longer at" in said
    assert "--latents" in said
    assert not (tmp_path / "gone").exists()
    code, _, _ = call(capsys, "sample", bank, "--latents", tmp_path / "moved", *common, "--out", tmp_path / "gone")
    assert code == 0
    assert np.array_equal(np.load(tmp_path / "gone" / "samples.npz")["arr_0"], made)
    code, _, said = call(
        capsys, "sample", bank, "--latents", tmp_path / "moved", "--nearest", 2, "--out", tmp_path / "n"
    )
    assert code == 2
    assert "leave --nearest out" in said
    assert call(capsys, "bank", "info", bank)[0] == 0


def test_other_weights_are_refused(autoencoder, tmp_path):
    import diffusers

    torch.manual_seed(5)
    bank = Bank.build(toy_arrays(shape=(3, 8, 8))[0], tmp_path / "bank", layout="NCHW", latents=autoencoder)
    model = diffusers.AutoencoderKL.from_config(json.loads((autoencoder / "config.json").read_text()))
    model.save_pretrained(tmp_path / "other")
    with pytest.raises(gd.GolddiffError, match="give the same"):
        Bank.build(bank.path, latents=tmp_path / "other")


@pytest.mark.parametrize("content", [None, "{}", '{"_class_name": "VQModel"}'])
def test_folders_that_hold_no_autoencoder(tmp_path, content):
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(gd.GolddiffError, match="holds no autoencoder that can be read"):
        gd.latents(tmp_path)


def test_a_pipeline_decodes(rotated):
    adapters = pytest.importorskip("golddiff.adapters.diffusers")
    pipe = adapters.GoldDiffPipeline.from_pretrained(rotated, "optimal")
    pipe.set_progress_bar_config(disable=True)
    images = pipe(2, [torch.Generator().manual_seed(s) for s in (0, 1)], output_type="pt").images
    ours = rotated.decode(gd.sample(pipe.denoiser, [0, 1]))
    assert images.shape == (2, 1, 8, 8)
    assert float((images - (ours / 2 + 0.5).clamp(0, 1)).abs().max()) < 1e-5
