"""Reading order = import order = data flow: a module imports only from those above it."""

import ast
from pathlib import Path

import golddiff

ORDER = [
    "errors", "files", "memory", "progress", "foreign", "jsons", "ranks", "images", "networks", "latents", "noise",
    "proxy", "spectrum", "prepare", "derived", "kernels", "bank", "locality", "golden", "scan", "scores", "drawing",
    "cells", "importance", "certified", "posterior", "denoise", "oracle", "metrics", "sample", "calibrate",
    "concentrate", "training", "pictures", "recipe", "runs", "compare", "attribution", "reports", "doctor",
    "adapters", "explorer", "cli",
]  # fmt: skip
FOLDER = Path(golddiff.__file__).parent


def layer_of(path):
    return path.relative_to(FOLDER).parts[0].removesuffix(".py")


def imported_layers(path):
    """Names of the top-level modules of golddiff that a file imports."""
    depth = len(path.relative_to(FOLDER).parts)
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level == depth:
            yield from [node.module.split(".")[0]] if node.module else [alias.name for alias in node.names]
        assert not (isinstance(node, ast.ImportFrom) and not node.level and node.module.startswith("golddiff"))


def test_modules_import_only_from_those_above():
    files = [p for p in FOLDER.rglob("*.py") if layer_of(p) not in ("__init__", "__main__")]
    assert {layer_of(p) for p in files} == set(ORDER)
    for path in files:
        for layer in imported_layers(path):
            if layer != "__version__":
                assert ORDER.index(layer) < ORDER.index(layer_of(path)), f"{path.name} imports {layer}"
