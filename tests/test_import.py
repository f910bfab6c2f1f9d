"""`import golddiff` is light: over torch it brings its base dependencies, and nothing of an extra."""

import json
import subprocess
import sys

import numpy as np
import pytest

HEAVY = {
    "IPython", "datasets", "deepinv", "diffusers", "fastapi", "matplotlib", "mlxtend", "numba", "pandas", "playwright",
    "scipy", "sklearn", "sphinx", "starlette", "torchvision", "transformers", "uvicorn",
}  # fmt: skip
BASE = {"PIL", "click", "numpy", "safetensors", "tqdm", "yaml"}
THEIRS = {"_yaml", "cloudpickle", "defusedxml", "olefile"}  # what some of these bring where it is there
TORCH = ("torch._dynamo", "torch._inductor", "torch._export", "torch.onnx", "torch.distributed.fsdp")

CODE = """
import json, sys
import torch
before = set(sys.modules)
import golddiff
print(json.dumps([sorted(before), sorted(set(sys.modules) - before)]))
"""


COMMAND = """
import sys
for name in {hidden}:
    sys.modules[name] = None
sys.argv = ["golddiff", *{arguments}]
from golddiff.cli import main
main()
"""


def without_extras(*arguments):
    """The command line where no package of an extra is."""
    hidden = sorted(HEAVY | {"starlette", "pydantic"})
    code = COMMAND.format(hidden=hidden, arguments=list(arguments))
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)


def test_the_command_line_works_without_extras(tmp_path):
    pictures = np.random.default_rng(0).integers(0, 256, (40, 8, 8, 1), dtype=np.uint8)
    np.save(tmp_path / "pictures.npy", pictures)
    source, out = str(tmp_path / "pictures.npy"), tmp_path / "run"
    done = without_extras("sample", source, "--seeds", "0-1", "--steps", "2", "--out", str(out))
    assert done.returncode == 0, done.stderr
    assert (out / "grid.png").exists()
    assert without_extras("doctor").returncode == 0
    refused = without_extras("serve", source)
    assert refused.returncode == 2
    assert "golddiff[web]" in refused.stderr
    assert refused.stderr.count("\n") == 1


@pytest.fixture(scope="module")
def modules():
    """Modules that `import torch` loads, and those that `import golddiff` adds, in a fresh interpreter."""
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=True)
    return [set(part) for part in json.loads(done.stdout)]


def test_no_extra_is_loaded(modules):
    _, added = modules
    assert not HEAVY & {module.split(".")[0] for module in added}


def test_what_is_loaded_beside_torch_is_known(modules):
    _, added = modules
    tops = {module.split(".")[0] for module in added}
    foreign = {top for top in tops if top not in sys.stdlib_module_names and not top.startswith("_cython")}
    assert foreign - {"cython_runtime", "golddiff"} <= BASE | THEIRS


def test_no_heavy_part_of_torch_is_added(modules):
    _, added = modules
    assert not [module for module in added if module.startswith(TORCH)]


def test_pyarrow_waits_for_a_file_of_it(modules):
    _, added = modules
    assert not [module for module in added if module.startswith("pyarrow")]
