import math

import pytest
import torch

import golddiff as gd


def test_ddpm_levels_and_times_are_those_of_diffusers():
    from diffusers import DDIMScheduler

    theirs = DDIMScheduler(beta_start=1e-4, beta_end=0.02, beta_schedule="linear")
    ours = gd.DDPM()
    assert torch.equal(ours.alphas_cumprod, theirs.alphas_cumprod)
    for steps in (1, 3, 10, 250, 1000):
        theirs.set_timesteps(steps)
        assert ours.times(steps) == theirs.timesteps.tolist()
    assert float(ours(900).alpha) ** 2 == pytest.approx(float(theirs.alphas_cumprod[900]), rel=1e-12)


@pytest.mark.parametrize("schedule", [gd.DDPM(), gd.Cosine(), gd.EDM(), gd.Flow()])
def test_noise_falls_along_every_schedule(schedule):
    levels = [noise for _, noise in schedule.levels(10)]
    g = [float(n.g) for n in levels]
    assert g == sorted(g, reverse=True)
    assert g[0] > 0.999
    assert all(float(n.sigma) > 0 for n in levels)


def test_schedules_are_their_formulas():
    assert float(gd.Cosine()(0.5).alpha) == pytest.approx(
        math.cos(math.pi / 2 * 0.508 / 1.008) / math.cos(math.pi / 2 * 0.008 / 1.008)
    )
    for t in (0.0, 0.3, 0.9):
        n = gd.Cosine()(t)
        assert float(n.alpha) ** 2 + float(n.sigma) ** 2 == pytest.approx(1)
        assert (float(gd.Flow()(t).alpha), float(gd.Flow()(t).sigma)) == (t, 1 - t)
    edm = gd.EDM().times(18)
    assert edm[0] == pytest.approx(80)
    assert edm[-1] == pytest.approx(0.002)
    assert edm[9] == pytest.approx((80 ** (1 / 7) + 9 / 17 * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7)


def test_scaled_levels_have_the_same_angle():
    for c in (1e-3, 0.7, 3.0, 123.456):
        assert gd.Noise(0.6 * c, 0.3 * c).angle == gd.Noise(0.6, 0.3).angle


def test_ends_of_schedules_are_legal():
    assert float(gd.Flow()(0).alpha) == 0
    assert float(gd.Cosine()(1.0).alpha) == 0
    assert float(gd.Flow()(1).sigma) == 0


@pytest.mark.parametrize(
    "pair",
    [(math.nan, 1), (1, math.nan), (math.inf, 1), (-1, 1), (1, -1), (0, 0), ([1, 2], [1, 2, 3]), ("a", 1)],
)
def test_bad_levels_are_refused(pair):
    with pytest.raises(gd.GolddiffError):
        gd.Noise(*pair)


@pytest.mark.parametrize(
    ("schedule", "time"),
    [(gd.DDPM(), 1000), (gd.DDPM(), 3.5), (gd.DDPM(), -1), (gd.Flow(), 1.5), (gd.Cosine(), -0.1)],
)
def test_times_outside_are_refused(schedule, time):
    with pytest.raises(gd.GolddiffError, match="from 0"):
        schedule(time)
