"""Banks that many tests share, and the data that only some machines have."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch

import golddiff as gd


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", default="cuda", help="device of the tests that compare one with the CPU")


def pytest_configure(config: pytest.Config) -> None:
    """Processes that test side by side (`-n auto`) share the cores."""
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    if workers > 1:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // workers))


@pytest.fixture(scope="session")
def device(request: pytest.FixtureRequest) -> torch.device:
    """The device that is compared with the CPU; tests are skipped where it is not there."""
    wanted = torch.device(request.config.getoption("--device"))
    if wanted.type == "cuda" and not torch.cuda.is_available():
        pytest.skip("there is no CUDA device here")
    return wanted


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every session builds its banks anew, in a cache of its own."""
    folder = tmp_path_factory.mktemp("cache")
    os.environ["GOLDDIFF_CACHE"] = str(folder)
    return folder


def outside(variable: str) -> Path:
    """The folder that an environment variable names; the test is skipped without it."""
    if not os.environ.get(variable):
        pytest.skip(f"{variable} is not set")
    return Path(os.environ[variable])


def toy_arrays(count: int = 60, shape: tuple[int, int, int] = (3, 4, 5), seed: int = 0):
    """Correlated random pictures, uint8, with labels of three classes."""
    rng = np.random.default_rng(seed)
    base = rng.normal(size=(6, *shape))
    pictures = np.tensordot(rng.normal(size=(count, 6)), base, 1) + 0.3 * rng.normal(size=(count, *shape))
    return np.clip(128 + 40 * pictures, 0, 255).astype(np.uint8), rng.integers(0, 3, count)


@pytest.fixture(scope="session")
def toy() -> gd.Bank:
    pixels, labels = toy_arrays()
    return gd.Bank.build(pixels, labels=labels)


@pytest.fixture(scope="session")
def digits() -> gd.Bank:
    return gd.Bank.build("digits")


def noisy(bank: gd.Bank, noise: gd.Noise, rows=(0, 1, 2), seed: int = 0, dtype=torch.float64) -> torch.Tensor:
    """Rows of a bank at a noise level."""
    x = bank.images(torch.tensor(list(rows)), torch.float64)
    alpha, sigma = noise.like(x)
    z = torch.randn(x.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (alpha * x + sigma * z).to(dtype)
