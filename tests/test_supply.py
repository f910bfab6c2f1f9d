"""What golddiff is made of: bounds, pins, and that nothing in it runs what a file says."""

import ast
import importlib.metadata
import re
import tomllib

import numpy as np
import pytest

import golddiff as gd
from check_sbom import ROOT, asked, normal, pins
from golddiff.recipe import read_settings

FILES = sorted((ROOT / "src" / "golddiff").rglob("*.py"))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]

# ---- versions ----------------------------------------------------------------------------------------


def numbers(version):
    return tuple(int(part) for part in re.findall(r"\d+", version.partition("+")[0]))


def as_long(version, length=4):
    """`2.4` and `2.4.0` are one version."""
    return numbers(version) + (0,) * (length - len(numbers(version)))


def test_the_minimum_file_has_the_lower_bounds():
    lowest = {name: as_long(version) for name, version in pins("constraints-minimum.txt").items()}
    stated = {name: as_long(version) for name, version in asked().items() if name != "torch"}
    assert len(stated) >= 17
    assert stated == {name: lowest.get(name) for name in stated}
    assert pins("constraints-minimum.txt")["torch"] == pins("constraints.txt")["torch"]


def test_pins_are_within_the_bounds():
    exact = pins("constraints.txt")
    for text in [*PROJECT["dependencies"], *(t for extra in PROJECT["optional-dependencies"].values() for t in extra)]:
        if "[" in text:
            continue
        name, lowest = re.fullmatch(r"([\w-]+)>=([\d.]+)", text).groups()
        assert as_long(exact[normal(name)]) >= as_long(lowest), text


@pytest.mark.parametrize("file", ["constraints.txt", "constraints-minimum.txt"])
def test_a_pin_is_one_version(file):
    lines = [line for line in (ROOT / file).read_text().splitlines() if not line.startswith("#")]
    assert all(re.fullmatch(r"[\w.-]+==[\w.]+", line) for line in lines)
    assert len(pins(file)) == len(lines)


def reached(name, extras=(), found=None):
    """Names of the distributions that are installed for one, and for its extras."""
    from packaging.requirements import Requirement

    found = {} if found is None else found
    for text in importlib.metadata.requires(name) or ():
        said = Requirement(text)
        wanted = said.marker is None or any(said.marker.evaluate({"extra": extra}) for extra in (*extras, ""))
        key = (normal(said.name), *sorted(said.extras))
        if wanted and key not in found:
            found[key] = importlib.metadata.version(said.name)
            reached(said.name, said.extras, found)
    return found


def test_all_that_the_set_up_installs_is_pinned():
    pytest.importorskip("packaging", reason="packaging reads what packages ask for")
    try:
        found = reached("golddiff", ["dev"])
    except importlib.metadata.PackageNotFoundError as error:
        pytest.skip(f"{error.name} is not installed: this is not the environment of make test")
    assert len(found) > 60
    unpinned = {key[0] for key in found} - {"golddiff"} - pins("constraints.txt").keys()
    assert not unpinned, "name them in constraints.txt"


# ---- what the code may not do ------------------------------------------------------------------------

MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal", "subprocess", "requests", "httpx"}
CALLS = {
    "eval", "exec", "compile", "__import__", "os.system", "os.popen", "yaml.load", "yaml.full_load",
    "yaml.unsafe_load", "yaml.load_all", "torch.save", "torch.hub.load", "pd.read_pickle",
    "dist.all_gather_object", "dist.broadcast_object_list", "dist.gather_object", "dist.scatter_object_list",
}  # fmt: skip


def faults(code):
    """What in a module would run or unpickle what it is given, as `(line, what)`."""
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            modules = [node.module or ""] if isinstance(node, ast.ImportFrom) else [a.name for a in node.names]
            yield from ((node.lineno, name) for name in modules if name.split(".")[0] in MODULES)
        elif isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            given = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            last = name.rpartition(".")[2]
            if (
                name in CALLS
                or given.get("trust_remote_code", "False") != "False"
                or given.get("allow_pickle", "False") != "False"
                or given.get("shell", "False") != "False"
                or (name == "torch.load" and given.get("weights_only") != "True")
                or (last == "from_pretrained" and given.get("local_files_only") != "True")
                or (last == "from_pretrained" and "Scheduler" not in name and given.get("use_safetensors") != "True")
            ):
                yield node.lineno, name


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT / "src")))
def test_nothing_runs_what_a_file_says(path):
    assert list(faults(path.read_text())) == []


@pytest.mark.parametrize(
    "code",
    ["import pickle", "from joblib import load", "eval(text)", "exec(text)", "yaml.load(file, Loader)",
     "np.load(path, allow_pickle=True)", "np.load(path, allow_pickle=wanted)", "torch.load(path)",
     "torch.load(path, weights_only=False)", "os.system(text)", "UNet2DModel.from_pretrained(path)",
     "UNet2DModel.from_pretrained(path, local_files_only=True)", "load_dataset(name, trust_remote_code=True)"],
)  # fmt: skip
def test_faults_are_found(code):
    assert len(list(faults(code))) == 1


def test_what_is_like_a_fault_and_is_none():
    assert list(faults("yaml.safe_load(t); np.load(p); model.eval(); torch.load(p, weights_only=True)")) == []


def test_one_place_runs_a_program_of_the_user():
    """TorchScript, which the security note names."""
    said = [path.name for path in FILES if "torch.jit.load" in path.read_text()]
    assert said == ["metrics.py"]
    assert "TorchScript" in (ROOT / "docs" / "security.md").read_text()


# ---- weights of others -------------------------------------------------------------------------------


def test_pickled_weights_of_a_network_are_not_read(tmp_path):
    diffusers = pytest.importorskip("diffusers", reason="the extra diffusers is not there")
    network = diffusers.UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        block_out_channels=(32,),
        layers_per_block=1,
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
    )
    network.save_pretrained(tmp_path / "safe")
    network.save_pretrained(tmp_path / "pickled", safe_serialization=False)
    bank = gd.Bank.build(np.zeros((4, 8, 8), np.uint8), layout="NHW")
    gd.oracle(tmp_path / "safe", bank, schedule="ddpm")
    with pytest.raises(gd.GolddiffError, match="no network that can be read .*safetensors"):
        gd.oracle(tmp_path / "pickled", bank, schedule="ddpm")


def test_settings_are_data(tmp_path):
    trap = tmp_path / "ran"
    recipe = tmp_path / "recipe.yaml"
    touch = f"!!python/object/apply:pathlib.Path.touch [!!python/object/apply:pathlib.Path ['{trap}']]"
    recipe.write_text(f"method: {touch}")
    with pytest.raises(gd.GolddiffError, match="neither YAML nor JSON"):
        read_settings(recipe)
    assert not trap.exists()
