#!/bin/sh
# Uses an installed golddiff as a newcomer would, in an empty folder: sh tests/check_wheel.sh ENVIRONMENT
# The environment has the base dependencies only; the extra `demo` is added half way.
set -eu
root=$(cd "$(dirname "$0")/.." && pwd)
bin=$(cd "$1/bin" && pwd)
outside=$(mktemp -d)
trap 'rm -rf "$outside"' EXIT
cd "$outside"
unset PYTHONPATH
export GOLDDIFF_CACHE="$outside/cache"

"$bin/python" - <<'CHECK'
import importlib.util
from pathlib import Path

import golddiff
from golddiff.recipe import RECIPES

assert "site-packages" in golddiff.__file__, golddiff.__file__
extras = ("sklearn", "mlxtend", "numba", "diffusers", "datasets", "matplotlib", "sphinx", "scipy", "fastapi", "uvicorn")
there = [name for name in extras if importlib.util.find_spec(name)]
assert not there, f"the environment is not empty: {there}"
recipes = sorted(path.stem for path in RECIPES.rglob("*.yaml"))
assert recipes == ["afhq", "celeba_hq", "cifar10", "fashion_mnist", "imagenet", "mnist"], recipes
page = Path(golddiff.__file__).parent / "explorer" / "page"
kinds = {path.suffix for path in page.iterdir()}
assert kinds == {".html", ".css", ".js", ".svg"}, kinds
CHECK
"$bin/golddiff" doctor

"$bin/python" -m pip install --quiet -c "$root/constraints.txt" "$(ls "$root"/build/wheel/golddiff-*.whl)[demo]"
"$bin/golddiff" sample digits --seeds 0-1 --steps 3 --out run
test -s run/grid.png && test -s run/samples.npz && test -s run/recipe.json
echo "the wheel works"
