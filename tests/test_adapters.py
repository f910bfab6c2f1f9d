"""Denoisers under diffusers' schedulers and pipelines, and in EDM's convention."""

import inspect

import diffusers
import numpy as np
import pytest
import torch

import golddiff as gd
from golddiff.adapters.diffusers import GoldDiffPipeline, GoldDiffUNet
from golddiff.adapters.edm import EDMDenoiser
from golddiff.noise import scheduler_kind

DDPM = {"beta_start": 1e-4, "beta_end": 0.02}


def generators(seeds):
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def quiet(pipe):
    pipe.set_progress_bar_config(disable=True)
    return pipe


def piped(denoiser, scheduler, seeds=range(3), **options):
    """What a scheduler ends at, in [-1, 1]."""
    pipe = quiet(GoldDiffPipeline(scheduler, denoiser))
    seeds = list(seeds)
    return pipe(len(seeds), generators(seeds), output_type="latent", **options).images


def off(a, b):
    return float((a - b).abs().max())


@pytest.mark.parametrize("method", ["golddiff", "optimal", "wiener"])
@pytest.mark.parametrize("steps", [7, 10])
def test_the_default_pipeline_is_sample(digits, method, steps):
    pipe = quiet(GoldDiffPipeline.from_pretrained(digits, method))
    images = pipe(batch_size=4, generator=generators(range(4)), num_inference_steps=steps, output_type="pt").images
    ours = gd.sample(pipe.denoiser, range(4), steps=steps)
    assert off(images, (ours / 2 + 0.5).clamp(0, 1)) < 1e-5


def test_labels_are_those_of_sample(digits):
    pipe = quiet(GoldDiffPipeline.from_pretrained("digits", "golddiff", retrieval="paper"))
    images = pipe(3, generators([4, 5, 6]), class_labels=[3, 7, -1], output_type="pt").images
    ours = gd.sample(pipe.denoiser, [4, 5, 6], labels=[3, 7, -1])
    assert off(images, (ours / 2 + 0.5).clamp(0, 1)) < 1e-5


MATCHES = {
    "EulerDiscrete": (DDPM, lambda: gd.DDIM(clip_sample=False)),
    "EDMEuler": ({}, lambda: gd.DDIM(clip_sample=False)),
    "FlowMatchEulerDiscrete": ({}, lambda: gd.DDIM(clip_sample=False)),
    "HeunDiscrete": (DDPM, lambda: gd.Heun()),
    "DPMSolverMultistep": (DDPM, lambda: gd.DPMSolver()),
}


@pytest.mark.parametrize("name", MATCHES)
@pytest.mark.parametrize("method", ["golddiff", "optimal"])
def test_schedulers_with_a_counterpart_here(digits, name, method):
    settings, sampler = MATCHES[name]
    scheduler = getattr(diffusers, f"{name}Scheduler")(**settings)
    denoiser, schedule = gd.denoiser(method, digits), gd.DiffusersSchedule(scheduler)
    ours = gd.sample(denoiser, range(3), steps=12, schedule=schedule, sampler=sampler())
    assert off(piped(denoiser, scheduler, num_inference_steps=12), ours) < 5e-4  # they step in float32 from sigma 150


SCHEDULERS = [
    "DDIM", "DDPM", "PNDM", "DEISMultistep", "DPMSolverMultistep", "DPMSolverSinglestep", "UniPCMultistep", "SASolver",
    "EulerDiscrete", "EulerAncestralDiscrete", "HeunDiscrete", "KDPM2Discrete", "LMSDiscrete", "EDMEuler",
    "EDMDPMSolverMultistep", "FlowMatchEulerDiscrete", "FlowMatchHeunDiscrete",
]  # fmt: skip


NO_SAMPLE = ("PNDM", "EDMEuler", "EDMDPMSolverMultistep", "KDPM2Discrete", "EulerAncestralDiscrete")
LEFT = {"DEISMultistep": 0.45, "SASolver": 0.45, "LMSDiscrete": 0.1}  # these stop at a low noise level instead of none
DRAWING = ("DDPM", "EulerAncestralDiscrete", "SASolver")


def variants(name):
    """A scheduler once for each form of output that it knows."""
    kind = getattr(diffusers, f"{name}Scheduler")
    if name.startswith("FlowMatch"):
        return [kind()]
    usual = {} if name.startswith("EDM") else {**DDPM, "set_alpha_to_one": True} if name == "PNDM" else DDPM
    forms = ["epsilon", "v_prediction"] + ([] if name in NO_SAMPLE else ["sample"])
    return [kind(**usual, prediction_type=form) for form in forms]


def over_flow(name):
    """The same, with the levels of flow matching, if it has such an option."""
    kind = getattr(diffusers, f"{name}Scheduler")
    has = "use_flow_sigmas" in inspect.signature(kind.__init__).parameters
    return [kind(use_flow_sigmas=True, prediction_type="flow_prediction")] if has else []


@pytest.mark.parametrize("name", SCHEDULERS)
def test_every_scheduler_ends_at_a_row_in_every_form_of_output(digits, name):
    rows, denoiser = digits.images(slice(None)).flatten(1), gd.denoiser("optimal", digits)
    ends = [piped(denoiser, made, range(2), num_inference_steps=60) for made in variants(name)]
    for end in ends + [piped(denoiser, made, range(2), num_inference_steps=60) for made in over_flow(name)]:
        assert float(torch.cdist(end.flatten(1), rows).min(1).values.max()) < LEFT.get(name, 0.02)
    if name not in DRAWING:
        assert max(off(ends[0], end) for end in ends) < 2e-3


@pytest.mark.parametrize("options", [{"use_karras_sigmas": True}, {"final_sigmas_type": "sigma_min"}])
@pytest.mark.parametrize("name", ["DPMSolverMultistep", "EulerDiscrete", "UniPCMultistep"])
def test_other_sigmas_of_a_scheduler_are_taken(toy, name, options):
    """Noised rows of one image: where the flow of a bank of one row goes is known exactly."""
    one = gd.Bank.build(np.full((1, 4, 4, 3), 200, np.uint8))
    scheduler = getattr(diffusers, f"{name}Scheduler")(**DDPM, **options)
    end = piped(gd.denoiser("optimal", one), scheduler, range(2), num_inference_steps=8)
    sigma = float(scheduler.sigmas[-1])
    assert off(end, one.images(slice(None))) < 1e-4 + 6 * sigma
    assert (sigma > 0) == ("final_sigmas_type" in options)


def test_ddpm_gives_one_image_for_each_generator(digits):
    denoiser, scheduler = gd.denoiser("golddiff", digits), diffusers.DDPMScheduler(**DDPM)
    many = piped(denoiser, scheduler, range(3, 7))
    alone = piped(denoiser, scheduler, [5])
    assert off(many[2], alone[0]) < 1e-5
    assert off(many[2], many[1]) > 0.1


def test_one_generator_for_all(digits):
    pipe = quiet(GoldDiffPipeline.from_pretrained(digits, retrieval="reference"))
    images = pipe(3, torch.Generator().manual_seed(9), output_type="pt").images
    noise = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(9))
    one_each = pipe(3, generators([9, 10, 11]), latents=noise, output_type="pt").images
    assert torch.equal(images, one_each)
    assert off(images, pipe(3, generators([9, 20, 21]), latents=noise, output_type="pt").images) > 1e-3


def test_without_a_generator_torch_s_own_decides(digits):
    pipe = quiet(GoldDiffPipeline.from_pretrained(digits))
    made = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        made.append(pipe(2, output_type="pt", num_inference_steps=4).images)
    assert torch.equal(made[0], made[1])
    assert off(made[0], made[2]) > 0.1


def test_output_types_and_tuple(digits):
    pipe = quiet(GoldDiffPipeline.from_pretrained(digits, "optimal"))
    made = {
        kind: pipe(2, generators([0, 1]), num_inference_steps=3, output_type=kind).images
        for kind in ("pil", "np", "pt", "latent")
    }
    (tupled,) = pipe(2, generators([0, 1]), num_inference_steps=3, output_type="pt", return_dict=False)
    assert torch.equal(tupled, made["pt"])
    assert made["np"].shape == (2, 8, 8, 1)
    assert np.array_equal(made["np"][..., 0], made["pt"][:, 0].numpy())
    assert off(made["pt"], (made["latent"] / 2 + 0.5).clamp(0, 1)) == 0
    assert [picture.size for picture in made["pil"]] == [(8, 8), (8, 8)]
    assert np.abs(np.asarray(made["pil"][1]) / 255 - made["np"][1, :, :, 0]).max() < 0.5 / 255 + 1e-6


def test_the_callback_sees_and_changes_the_sample(digits):
    pipe, seen = quiet(GoldDiffPipeline.from_pretrained(digits, "optimal")), []

    def look(pipeline, step, time, tensors):
        assert pipeline is pipe
        seen.append((step, int(time), tensors["denoised"], tensors["latents"]))

    asked = {"callback_on_step_end": look, "callback_on_step_end_tensor_inputs": ["latents", "denoised"]}
    pipe(1, generators([3]), **asked)
    steps = list(gd.trajectory(pipe.denoiser, [3]))
    assert [(step, time) for step, time, *_ in seen] == [(i, 900 - 100 * i) for i in range(10)]
    for step, (_, _, denoised, x) in zip(steps, seen, strict=True):
        assert off(step.posterior.mean, denoised) < 1e-5
        assert off(step.x_next, x) < 1e-5
    zeros = {"latents": torch.zeros(1, 1, 8, 8)}
    assert off(pipe(callback_on_step_end=lambda *_: zeros, output_type="latent").images, zeros["latents"]) == 0


def test_the_scheduler_can_be_exchanged(digits):
    pipe = quiet(GoldDiffPipeline.from_pretrained(digits, "optimal"))
    pipe.scheduler = diffusers.HeunDiscreteScheduler.from_config(pipe.scheduler.config)
    images = pipe(2, generators([0, 1]), output_type="latent").images
    ours = gd.sample(pipe.denoiser, [0, 1], schedule=gd.DiffusersSchedule(pipe.scheduler), sampler=gd.Heun())
    assert off(images, ours.clamp(-1, 1)) < 1e-2  # the configuration of DDIM clips within steps
    assert "HeunDiscreteScheduler" in repr(pipe.components)


def test_a_saved_pipeline_comes_back(digits, tmp_path):
    pipe = GoldDiffPipeline.from_pretrained(digits, "golddiff", diffusers.UniPCMultistepScheduler(**DDPM), k_max=0.2,
                                            retrieval="paper")  # fmt: skip
    pipe.save_pretrained(tmp_path / "saved")
    again = GoldDiffPipeline.from_pretrained(tmp_path / "saved")
    assert type(again.scheduler) is diffusers.UniPCMultistepScheduler
    assert again.denoiser.options == pipe.denoiser.options
    a, b = (quiet(p)(2, generators([0, 1]), output_type="pt").images for p in (pipe, again))
    assert torch.equal(a, b)
    (tmp_path / "saved" / "golddiff.json").write_text("{}")
    with pytest.raises(gd.GolddiffError, match="save it again"):
        GoldDiffPipeline.from_pretrained(tmp_path / "saved")


def test_a_pipeline_stays_float32(toy):
    pipe = GoldDiffPipeline.from_pretrained(toy)
    assert pipe.to("cpu") is pipe
    assert (pipe.device, pipe.dtype) == (torch.device("cpu"), torch.float32)
    for wrong in ((torch.float16,), ("cpu", torch.float16)):
        with pytest.raises(gd.GolddiffError, match="give a device; images stay float32"):
            pipe.to(*wrong)


def test_a_pipeline_that_cannot_be_saved(toy, tmp_path):
    with pytest.raises(gd.GolddiffError, match="over a whole bank in a folder"):
        GoldDiffPipeline.from_pretrained(toy).save_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        ({"batch_size": 0}, "batch_size is 0"),
        ({"batch_size": 2, "generator": generators([1])}, "1 generators for batch_size=2"),
        ({"output_type": "png"}, "did you mean 'np'|unknown output_type"),
        ({"callback_on_step_end_tensor_inputs": ["latent"]}, "did you mean 'latents'"),
        ({"batch_size": 2, "latents": torch.zeros(1, 1, 8, 8)}, "1 latents for batch_size=2"),
        ({"latents": torch.zeros(1, 1, 4, 4)}, "give a tensor of shape"),
        ({"class_labels": 77}, "no image has label 77"),
        ({"batch_size": 2, "class_labels": [1, 2, 3]}, "one for each of the 2 images"),
    ],
)
def test_wrong_arguments(digits, call, says):
    with pytest.raises(gd.GolddiffError, match=says):
        quiet(GoldDiffPipeline.from_pretrained(digits, "optimal"))(**call)


@pytest.mark.parametrize(
    "name",
    ["IPNDM", "ScoreSdeVe", "CMStochasticIterative", "DDIMInverse", "DPMSolverMultistepInverse", "UnCLIP", "RePaint",
     "KDPM2AncestralDiscrete", "Helios"],
)  # fmt: skip
def test_schedulers_that_are_not_understood(digits, name):
    if not hasattr(diffusers, f"{name}Scheduler"):
        pytest.skip(f"this diffusers has no {name}Scheduler")
    with pytest.raises(gd.GolddiffError, match="not understood: take DDIM"):
        GoldDiffPipeline.from_pretrained(digits, "optimal", getattr(diffusers, f"{name}Scheduler")())


def test_kinds_of_schedulers():
    kinds = {name: scheduler_kind(variants(name)[0]) for name in SCHEDULERS}
    assert {name for name, kind in kinds.items() if kind == "table"} == {"DDIM", "DDPM", "PNDM"}
    assert {name for name, kind in kinds.items() if kind == "flow"} == {
        "FlowMatchEulerDiscrete",
        "FlowMatchHeunDiscrete",
    }
    assert kinds["EDMEuler"] == kinds["LMSDiscrete"] == "ve"
    assert kinds["SASolver"] == kinds["UniPCMultistep"] == "vp"


# ---- GoldDiffUNet -----------------------------------------------------------------------------------------


def test_diffusers_ddim_pipeline_runs_the_denoiser(digits):
    unet = GoldDiffUNet(gd.denoiser("golddiff", digits), seed=[0, 1, 2])
    pipe = quiet(diffusers.DDIMPipeline(unet, diffusers.DDIMScheduler(**DDPM)))
    images = pipe(3, generators(range(3)), num_inference_steps=10, output_type="np").images
    ours = gd.sample(unet.denoiser, range(3))
    assert np.abs(images[..., 0] - (ours[:, 0] / 2 + 0.5).clamp(0, 1).numpy()).max() < 1e-5


def test_diffusers_ddpm_pipeline_is_ours(digits):
    unet, scheduler = GoldDiffUNet(gd.denoiser("optimal", digits)), diffusers.DDPMScheduler(**DDPM)
    theirs = quiet(diffusers.DDPMPipeline(unet, scheduler))
    images = theirs(2, generators([0, 1]), num_inference_steps=10, output_type="np").images
    ours = (piped(unet.denoiser, scheduler, [0, 1], num_inference_steps=10) / 2 + 0.5).clamp(0, 1)
    assert np.abs(images[..., 0] - ours[:, 0].numpy()).max() < 1e-5


def test_unet_interface(toy):
    unet = GoldDiffUNet(gd.denoiser("optimal", toy))
    assert (unet.config.in_channels, unet.config.out_channels, unet.config.sample_size) == (3, 3, (4, 5))
    assert (unet.dtype, unet.device, list(unet.parameters())) == (torch.float32, torch.device("cpu"), [])
    x = torch.randn(2, 3, 4, 5, requires_grad=True)
    said = unet(x, 500).sample
    exact = unet.denoiser(x.detach(), gd.DDPM()(500)).eps()
    assert torch.equal(said, exact)
    assert not said.requires_grad
    assert torch.equal(unet(x, torch.tensor([500, 20]), return_dict=False)[0][0], exact[0])
    labelled = unet(x, torch.tensor(500), class_labels=torch.tensor([1, -1])).sample
    assert torch.equal(labelled[1], exact[1])
    assert off(labelled[0], exact[0]) > 1e-4


def test_unet_between_times_is_what_diffusers_means(toy):
    """Karras sigmas of a scheduler lie between the times of its table; its fractional times lead back to them."""
    scheduler = diffusers.EulerDiscreteScheduler(**DDPM, use_karras_sigmas=True)
    scheduler.set_timesteps(9)
    unet = GoldDiffUNet(gd.denoiser("wiener", toy), scheduler.alphas_cumprod)
    for time, sigma in zip(scheduler.timesteps, scheduler.sigmas, strict=False):
        assert float(unet._noise(time.double()).rho) == pytest.approx(float(sigma), rel=2e-4)
    with pytest.raises(gd.GolddiffError, match="from 0 to 999"):
        unet(torch.zeros(1, 3, 4, 5), 1000)


# ---- EDM --------------------------------------------------------------------------------------------------


def heun(denoise, x, levels):
    """Heun's method for dx/dsigma = (x - D) / sigma, written out anew."""
    for now, after in zip(levels, [*levels[1:], 0.0], strict=True):
        slope = (x - denoise(x, now)) / now
        ahead = x + (after - now) * slope
        if after > 0:
            ahead = x + (after - now) * (slope + (ahead - denoise(ahead, after)) / after) / 2
        x = ahead
    return x


@pytest.mark.parametrize("method", ["optimal", "golddiff"])
def test_a_loop_over_d_of_x_and_sigma_is_our_heun(digits, method):
    denoiser, seeds = gd.denoiser(method, digits), [0, 1, 2]
    network = EDMDenoiser(denoiser, seed=seeds)
    levels = [time for time, _ in gd.EDM().levels(8)]
    x = torch.cat([torch.randn(1, 1, 8, 8, generator=generator) for generator in generators(seeds)]) * levels[0]
    ours = gd.sample(denoiser, seeds, steps=8, schedule=gd.EDM(), sampler=gd.Heun())
    assert off(heun(network, x, levels), ours) < 1e-5


def test_edm_shapes_of_sigma_and_labels(digits):
    denoiser = gd.denoiser("optimal", digits)
    network, x = EDMDenoiser(denoiser), torch.randn(2, 1, 8, 8)
    assert (network.img_resolution, network.img_channels, network.label_dim) == (8, 1, 10)
    exact = denoiser(x, gd.Noise(1.0, [0.5, 2.0]), [3, -1]).mean
    sigmas = torch.tensor([0.5, 2.0])
    one_hot = torch.zeros(2, 10)
    one_hot[0, 3] = 1
    for sigma in (sigmas, sigmas.reshape(2, 1, 1, 1)):
        for labels in ([3, -1], torch.tensor([3, -1]), one_hot):
            assert torch.equal(network(x, sigma, labels, force_fp32=True), exact)
    alone = denoiser(x[:1].double(), gd.Noise(1, 0.5)).mean
    assert torch.allclose(network(x.double(), network.round_sigma(0.5))[:1], alone, rtol=0, atol=1e-14)
    with pytest.raises(gd.GolddiffError, match="one-hot"):
        network(x, 0.5, torch.ones(2, 10))
    with pytest.raises(gd.GolddiffError, match="one-hot"):
        network(x, 0.5, torch.zeros(2, 7))


def test_edm_wants_square_images(toy):
    with pytest.raises(gd.GolddiffError, match="square"):
        EDMDenoiser(gd.denoiser("optimal", toy))
