import pytest
import torch

import golddiff as gd
from conftest import outside
from golddiff.metrics import copies
from golddiff.sample import initial_noise
from test_denoisers import VARIANTS, build

SCHEDULES = [gd.DDPM(), gd.Cosine(), gd.EDM(), gd.Flow()]


@pytest.mark.parametrize("variant", ["wiener", "golddiff", "optimal"])
@pytest.mark.parametrize("steps", [10, 7])
def test_ddim_is_that_of_diffusers_step_by_step(toy, variant, steps):
    from diffusers import DDIMScheduler

    theirs = DDIMScheduler(beta_start=1e-4, beta_end=0.02, beta_schedule="linear", prediction_type="sample")
    theirs.set_timesteps(steps)
    x_t = initial_noise(range(4), toy.shape)
    ours = gd.trajectory(build(variant, toy), range(4), steps=steps)
    for t, step in zip(theirs.timesteps, ours, strict=True):
        assert step.time == int(t)
        assert float((step.x_t - x_t).abs().max()) < 1e-5
        x_t = theirs.step(step.posterior.mean, t, step.x_t, eta=0.0).prev_sample
    assert float((step.x_next - x_t).abs().max()) < 1e-5


def test_clipping_is_within_the_step_only(toy):
    class Loud(gd.Denoiser):
        bank, options, properties = toy, {}, frozenset()

        def _posterior(self, x_t, noise, label, eligible, seed):
            return gd.Posterior(torch.full_like(x_t, 3.0), torch.zeros(len(x_t)), None, None, x_t, noise)

    step = next(gd.trajectory(Loud(), [0], steps=10))
    after = gd.DDPM()(800)
    assert float(step.posterior.mean.max()) == 3
    expected = after.alpha * 1.0 + after.sigma * (step.x_t - step.noise.alpha * 3.0) / step.noise.sigma
    assert torch.allclose(step.x_next, expected, atol=1e-5)
    free = next(gd.trajectory(Loud(), [0], steps=10, sampler=gd.DDIM(clip_sample=False)))
    assert torch.allclose(free.x_next - step.x_next, 2.0 * after.alpha.float(), atol=1e-5)


@pytest.mark.parametrize("variant", VARIANTS)
def test_one_seed_is_one_image_on_digits(digits, variant):
    name, options = VARIANTS[variant]
    options = {"legacy_batch": 600} if "legacy_batch" in options else options
    one_seed_is_one_image(gd.denoiser(name, digits, **options))


@pytest.mark.parametrize("name", ["optimal", "wiener", "pca", "golddiff"])
@pytest.mark.parametrize("data", ["mnist", "cifar10"])
def test_one_seed_is_one_image_on_real_data(name, data):
    outside("GOLDDIFF_DATA")
    one_seed_is_one_image(gd.denoiser(name, gd.Bank.build(data, limit=600 if name in ("optimal", "wiener") else 200)))


def one_seed_is_one_image(denoiser):
    alone = gd.sample(denoiser, [5])
    three = gd.sample(denoiser, [9, 5, 2])
    many = gd.sample(denoiser, range(16))
    split = gd.sample(denoiser, range(4, 7), batch=2)
    assert float((alone[0] - three[1]).abs().max()) < 1e-5
    assert float((alone[0] - many[5]).abs().max()) < 1e-5
    assert float((alone[0] - split[1]).abs().max()) < 1e-5


def test_labels_go_with_their_seeds(toy):
    denoiser = gd.denoiser("optimal", toy)
    together = gd.sample(denoiser, [1, 2, 3], labels=[0, 2, -1])
    for i, label in enumerate([0, 2, None]):
        alone = gd.sample(denoiser, [i + 1], labels=label)
        assert float((together[i] - alone[0]).abs().max()) < 1e-5
    of_class = toy.images(toy.rows_of(2)).flatten(1)
    assert float((of_class - together[1].flatten()).abs().amax(1).min()) < 0.01


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: type(s).__name__)
def test_every_schedule_ends_at_sensible_pictures(digits, schedule):
    rows = digits.images(slice(None)).flatten(1)
    optimal = gd.sample(gd.denoiser("optimal", digits), range(8), schedule=schedule, steps=20).flatten(1)
    distance, nearest = torch.cdist(optimal, rows).min(1)
    assert float(distance.max()) < 0.1  # copies of training images
    assert len(nearest.unique()) > 4  # of several
    for name in ("pca", "golddiff", "wiener"):
        images = gd.sample(gd.denoiser(name, digits), range(8), schedule=schedule, steps=20).flatten(1)
        typical = torch.cdist(rows[:200], rows[200:]).min(1).values.mean()
        assert float(torch.cdist(images, rows).min(1).values.mean()) < 2 * float(typical)  # near the data
        assert float(images.std(0).mean()) > 0.3 * float(rows.std(0).mean())  # and not all the same


def test_ddim_error_falls_with_the_number_of_steps(toy):
    """Wiener's flow on a bank is linear, so DDIM converges to it, at first order."""
    denoiser = gd.denoiser("wiener", toy)
    schedule, sampler = gd.EDM(sigma_min=0.05), gd.DDIM(clip_sample=False)
    options = {"schedule": schedule, "sampler": sampler, "dtype": torch.float64}
    ends = {n: list(gd.trajectory(denoiser, range(4), steps=n, **options))[-1].x_t for n in (20, 40, 80, 640)}
    errors = [float((ends[n] - ends[640]).norm()) for n in (20, 40, 80)]
    assert 1.6 < errors[0] / errors[1] < 2.6
    assert 1.6 < errors[1] / errors[2] < 2.6


@pytest.mark.parametrize(
    "options",
    [
        {"seeds": "012"},
        {"seeds": 3},
        {"seeds": [0.5]},
        {"steps": 1.5},
        {"steps": 10**12, "schedule": gd.EDM()},
        {"batch": None},
        {"labels": ["a", "b", "c"]},
        {"labels": 0.5},
        {"schedule": "ddpm"},
        {"dtype": torch.int32},
        {"seeds": []},
        {"seeds": [-1]},
        {"steps": 0},
        {"steps": 1001},
        {"batch": 0},
        {"labels": [0, 1]},
        {"labels": 9},
    ],
)
def test_bad_requests_are_refused(toy, options):
    with pytest.raises(gd.GolddiffError):
        gd.sample(gd.denoiser("optimal", toy), **{"seeds": range(3), **options})


def test_sampling_can_start_from_noised_rows(digits):
    model = gd.denoiser("optimal", digits)
    steps = list(gd.trajectory(model, [3, 4], start=300, labels=[7, -1]))
    assert [step.time for step in steps] == [300, 200, 100, 0]
    alpha, sigma = steps[0].noise.alpha, steps[0].noise.sigma
    rows = (steps[0].x_t - sigma * initial_noise([3, 4], digits.shape)) / alpha
    found = copies(rows, digits)
    assert float(found.d1.max()) < 1e-5  # the first x_t is a row and the noise of the seed
    assert int(digits.labels[found.row[0]]) == 7
    alone = next(gd.trajectory(model, [4], start=300))
    assert torch.equal(alone.x_t[0], steps[0].x_t[1])
    assert gd.sample(model, [3, 4], start=0, steps=10).shape == (2, 1, 8, 8)
    for wrong in (-3, float("nan"), "300"):
        with pytest.raises(gd.GolddiffError, match="start"):
            gd.sample(model, [0], start=wrong)
