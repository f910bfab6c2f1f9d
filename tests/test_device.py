"""The same results on another device (`--device cuda`; `--device cpu` runs these tests against themselves)."""

import pytest
import torch

import golddiff as gd
from conftest import noisy
from golddiff.denoise import METHODS

CASES = [(name, {}) for name in METHODS] + [
    ("golddiff", {"retrieval": "paper"}),
    ("golddiff", {"retrieval": "reference"}),
    ("golddiff", {"retrieval": "local", "tol": 0.06}),
    ("optimal", {"retrieval": "certified"}),
    ("golddiff", {"locality": "optimal"}),
    ("pca", {"mask_rule": "published", "legacy_batch": 256}),
]


@pytest.mark.parametrize(("name", "options"), CASES)
@pytest.mark.parametrize("t", [900, 300, 0])
def test_posteriors_are_those_of_the_cpu(device, digits, name, options, t):
    noise, there = gd.DDPM()(t), digits.to(device)
    x_t = noisy(digits, noise, rows=range(5), dtype=torch.float32)
    given = {"label": [-1, 3, -1, 3, 5], "seed": [1, 2, 3, 4, 5]}
    ours = gd.denoiser(name, digits, **options)(x_t.double(), noise, **given)
    theirs = gd.denoiser(name, there, **options)(x_t.to(device), noise, **given)
    assert theirs.mean.device.type == device.type
    assert float((theirs.mean.cpu() - ours.mean).abs().max()) < 1e-4
    assert torch.allclose(theirs.log_evidence.cpu(), ours.log_evidence, rtol=1e-4, atol=1e-3)
    if ours.support is not None:
        for b in range(5):
            assert theirs.support.rows_of(b).tolist() == ours.support.rows_of(b).tolist()
            pixels = [27] if name in ("els", "bbels") else None  # weights over patches are of pixels that are named
            rows, weights = theirs.weights(b, pixels)
            assert rows.device == weights.device
            assert torch.allclose(weights.cpu().double(), ours.weights(b, pixels)[1], atol=1e-4)


def test_samples_are_those_of_the_cpu(device, digits):
    ours = gd.sample(gd.denoiser("golddiff", digits), range(3))
    theirs = gd.sample(gd.denoiser("golddiff", digits.to(device)), range(3))
    assert float((theirs.cpu() - ours).abs().max()) < 1e-3
