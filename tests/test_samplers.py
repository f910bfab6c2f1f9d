"""Samplers beyond DDIM: their order on a closed form, and equality with diffusers."""

import itertools

import diffusers
import pytest
import torch

import golddiff as gd
from golddiff.sample import SAMPLERS, initial_noise, sampler_named, step_noise


def gaussian_flow(bank, x_t, start, end):
    """Where the probability flow of the bank's Gaussian takes `x_t`, in closed form."""
    spectrum = bank.spectrum()
    u, lam, mu = spectrum.eigenvectors, spectrum.eigenvalues, spectrum.mean
    rest = x_t.flatten(1) / start.alpha - mu
    inside = rest @ u
    moved = inside * ((lam + end.rho**2) / (lam + start.rho**2)).sqrt()
    outside = (rest - inside @ u.T) * end.rho / start.rho
    return (end.alpha * (mu + moved @ u.T + outside)).reshape(x_t.shape)


def errors_of(bank, sampler, schedule, counts, until):
    """Distance to the closed form at the last level of at least `until`, for several numbers of steps."""
    out = []
    for steps in counts:
        run = gd.trajectory(
            gd.denoiser("wiener", bank), range(4), steps=steps, schedule=schedule, sampler=sampler, dtype=torch.float64
        )
        first, *_, last = (step for step in run if step.time >= until)
        exact = gaussian_flow(bank, first.x_t, first.noise, last.noise)
        out.append(float((last.x_t - exact).norm() / exact.norm()))
    return out


@pytest.mark.parametrize(
    ("sampler", "schedule", "counts", "until", "order"),
    [
        (gd.DDIM(clip_sample=False), gd.EDM(sigma_min=0.05), (40, 80, 160), 0, 1),
        (gd.Heun(), gd.EDM(sigma_min=0.05), (40, 80, 160), 0, 2),
        (gd.Heun(), gd.DDPM(), (50, 100, 200), 100, 2),
        (gd.DPMSolver(), gd.DDPM(), (50, 100, 200), 100, 2),
    ],
    ids=["ddim", "heun", "heun on ddpm", "dpm++"],
)
def test_order_on_a_gaussian_bank(toy, sampler, schedule, counts, until, order):
    errors = errors_of(toy, sampler, schedule, counts, until)
    slopes = [torch.log2(torch.tensor(a / b)) for a, b in itertools.pairwise(errors)]
    assert all(order - 0.35 < float(slope) < order + 0.6 for slope in slopes), (errors, slopes)
    assert errors[-1] < 0.02


def follow(denoiser, scheduler, schedule, sampler, steps=12):
    """Our trajectory, and that of a diffusers scheduler which is given our denoiser's epsilon."""
    ours = list(gd.trajectory(denoiser, range(3), steps=steps, schedule=schedule, sampler=sampler, dtype=torch.float64))
    scheduler.set_timesteps(steps)
    return ours, ours[0].x_t.clone()


@pytest.mark.parametrize(("theirs", "ours"), [("EulerDiscreteScheduler", "ddim"), ("HeunDiscreteScheduler", "heun")])
def test_sigma_schedulers_are_ours_on_their_levels(toy, theirs, ours):
    scheduler = getattr(diffusers, theirs)(beta_start=1e-4, beta_end=0.02, beta_schedule="linear")
    schedule = gd.DiffusersSchedule(scheduler)
    sampler = gd.DDIM(clip_sample=False) if ours == "ddim" else gd.Heun()
    denoiser = gd.denoiser("optimal", toy)
    steps, x_t = follow(denoiser, scheduler, schedule, sampler)
    count = 0
    for t, sigma in zip(scheduler.timesteps, scheduler.sigmas, strict=False):
        sigma = sigma.double()
        eps = denoiser(x_t.double(), gd.Noise(1.0, sigma)).eps()
        scheduler.scale_model_input(x_t, t)
        x_t = scheduler.step(eps, t, x_t).prev_sample
        count += 1
    assert count == (12 if ours == "ddim" else 23)
    assert float((steps[-1].x_next - x_t).abs().max()) < 1e-5


def test_flow_matching_scheduler_is_ddim_on_its_levels(toy):
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    schedule, denoiser = gd.DiffusersSchedule(scheduler), gd.denoiser("wiener", toy)
    steps, x_t = follow(denoiser, scheduler, schedule, gd.DDIM(clip_sample=False))
    for i, t in enumerate(scheduler.timesteps):
        s = scheduler.sigmas[i].double()
        posterior = denoiser(x_t.double(), gd.Noise(1 - s, s))
        x_t = scheduler.step(posterior.eps() - posterior.mean, t, x_t.double()).prev_sample
    assert float((steps[-1].x_next - x_t).abs().max()) < 1e-5


def test_ddim_scheduler_gives_our_ddpm_levels(toy):
    scheduler = diffusers.DDIMScheduler(beta_start=1e-4, beta_end=0.02, beta_schedule="linear")
    a = gd.sample(gd.denoiser("golddiff", toy), range(3), schedule=gd.DiffusersSchedule(scheduler))
    assert torch.equal(a, gd.sample(gd.denoiser("golddiff", toy), range(3)))


def test_ancestral_is_ddpm_scheduler_with_the_same_noise(toy, monkeypatch):
    scheduler = diffusers.DDPMScheduler(
        beta_start=1e-4, beta_end=0.02, beta_schedule="linear", prediction_type="sample", variance_type="fixed_small"
    )
    steps, _ = follow(gd.denoiser("wiener", toy), scheduler, gd.DDPM(), gd.Ancestral(), steps=10)
    for step in steps:
        noise = step_noise(range(3), step.index, step.x_t)
        monkeypatch.setattr("diffusers.schedulers.scheduling_ddpm.randn_tensor", lambda *_, noise=noise, **__: noise)
        theirs = scheduler.step(step.posterior.mean, int(step.time), step.x_t).prev_sample
        assert float((step.x_next - theirs).abs().max()) < 1e-5


def test_ancestral_keeps_the_marginals_of_a_gaussian(toy):
    """With the exact denoiser of a Gaussian, small steps keep its distribution at every level."""
    denoiser, spectrum = gd.denoiser("wiener", toy), toy.spectrum()
    run = gd.trajectory(denoiser, range(400), steps=100, sampler=gd.Ancestral(clip_sample=False), dtype=torch.float64)
    *_, last = run
    end = (last.posterior.mean.flatten(1) - spectrum.mean) @ spectrum.eigenvectors[:, -5:]
    assert torch.allclose(end.var(0) / spectrum.eigenvalues[-5:], torch.ones(5, dtype=torch.float64), atol=0.25)


@pytest.mark.parametrize("name", SAMPLERS)
def test_one_seed_is_one_image_with_every_sampler(digits, name):
    denoiser, sampler = gd.denoiser("golddiff", digits), sampler_named(name)
    alone = gd.sample(denoiser, [5], sampler=sampler)
    many = gd.sample(denoiser, range(3, 9), sampler=sampler)
    assert float((alone[0] - many[2]).abs().max()) < 1e-5


@pytest.mark.parametrize("name", ["ddim", "heun", "ddpm"])
@pytest.mark.parametrize("schedule", [gd.DDPM(), gd.Cosine(), gd.EDM(), gd.Flow()], ids=lambda s: type(s).__name__)
def test_every_sampler_ends_near_the_data_on_every_schedule(digits, name, schedule):
    rows = digits.images(slice(None)).flatten(1)
    images = gd.sample(
        gd.denoiser("optimal", digits), range(6), steps=25, schedule=schedule, sampler=sampler_named(name)
    )
    assert float(torch.cdist(images.flatten(1), rows).min(1).values.max()) < 0.1


def test_noise_of_steps_is_normal_and_new_each_time():
    like = torch.zeros(50, 1, 20, 20)
    first, second = step_noise(range(50), 0, like), step_noise(range(50), 1, like)
    start = initial_noise(range(50), (1, 20, 20))
    for a, b in ((first, second), (first, start), (first, first.roll(1, 0))):
        assert abs(float((a * b).mean())) < 4 / 20000**0.5
    assert abs(float(first.mean())) < 4 / 20000**0.5
    assert abs(float(first.var()) - 1) < 4 * (2 / 20000) ** 0.5


def test_dpm_solver_refuses_other_schedules(toy):
    with pytest.raises(gd.GolddiffError, match="schedule ddpm"):
        gd.sample(gd.denoiser("wiener", toy), [0], schedule=gd.EDM(), sampler=gd.DPMSolver())


@pytest.mark.parametrize("thing", [object(), 3, diffusers.UNet2DModel])
def test_what_is_no_scheduler_is_refused(thing):
    with pytest.raises(gd.GolddiffError, match="no diffusers scheduler"):
        gd.DiffusersSchedule(thing)
