# Two commands do all the set-up: `make demo` and `make test`. Both make their own environment in .venv.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
TORCH := $(shell grep '^torch==' constraints.txt)
# by the environment, since `-c` says nothing of what builds the package
export PIP_CONSTRAINT := constraints.txt
export PIP_BUILD_CONSTRAINT := constraints.txt

.PHONY: demo test test-minimum test-newest lint format docs check-wheel sbom clean

demo: $(VENV)/demo.done ## sample 16 digits from 5,000 training images
	$(BIN)/golddiff sample mnist5k --out runs/demo

test: $(VENV)/dev.done lint ## lint, types and all tests
	$(BIN)/python -m pytest -n auto --dist worksteal

# what other versions could break; not the pages, the browser, the long comparisons with stored outputs
CORE := $(addprefix tests/test_,adapters.py bank.py cli.py compiled.py denoisers.py explorer.py golden.py images.py \
	import.py masks.py noise.py runs.py sample.py samplers.py scan.py supply.py)
TOOLS := pytest pytest-xdist hypothesis httpx httpx2

MINIMUM := .venv-minimum
test-minimum: $(MINIMUM)/done ## the core of the tests, with the lowest versions that pyproject.toml allows
	$(MINIMUM)/bin/python -m pytest -n auto --dist worksteal $(CORE)

$(MINIMUM)/done: export PIP_CONSTRAINT := constraints-minimum.txt
$(MINIMUM)/done: export PIP_BUILD_CONSTRAINT := constraints-minimum.txt
$(MINIMUM)/done: constraints-minimum.txt pyproject.toml
	$(PYTHON) -m venv --clear $(MINIMUM)
	$(MINIMUM)/bin/python -m pip install --quiet $(TORCH)
	$(MINIMUM)/bin/python -m pip install --quiet -e '.[all]' $(TOOLS)
	$(MINIMUM)/bin/python -m pip check
	touch $@

NEWEST := .venv-newest
test-newest: export PIP_CONSTRAINT :=
test-newest: export PIP_BUILD_CONSTRAINT :=
test-newest: ## all tests with the newest versions there are today, torch at its pin; says where the pins are older
	$(PYTHON) -m venv --clear $(NEWEST)
	$(NEWEST)/bin/python -m pip install --quiet $(TORCH)
	$(NEWEST)/bin/python -m pip install --quiet $(TORCH) -e '.[dev]'
	$(NEWEST)/bin/python -m pip check
	$(NEWEST)/bin/python -m pip freeze --exclude-editable | sed 's/+cpu$$//' | tr A-Z_ a-z- | grep -vxFf constraints.txt || true
	$(NEWEST)/bin/python -m pytest -n auto --dist worksteal

lint: $(VENV)/dev.done
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/dev.done
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(VENV)/docs.done ## the documentation as HTML, in docs/_build/html
	$(BIN)/sphinx-build -q -W --keep-going -b html -d docs/_build/trees docs docs/_build/html

WHEEL := build/wheel
check-wheel: ## the wheel in an empty environment, used from a folder outside of the repository
	rm -rf $(WHEEL) && $(PYTHON) -m venv $(WHEEL)/venv
	$(WHEEL)/venv/bin/python -m pip wheel --quiet --no-deps --wheel-dir $(WHEEL) .
	$(WHEEL)/venv/bin/python -m pip install --quiet $(TORCH)
	$(WHEEL)/venv/bin/python -m pip install --quiet $(WHEEL)/golddiff-*.whl
	sh tests/check_wheel.sh $(WHEEL)/venv

# an environment that holds nothing but what golddiff runs with, and beside it one with the tool that looks at it
SBOM := build/sbom
sbom: ## what golddiff with all extras for users consists of, as CycloneDX: build/sbom.json
	rm -rf $(SBOM) && $(PYTHON) -m venv --without-pip $(SBOM)/venv && $(PYTHON) -m venv $(SBOM)/tool
	$(SBOM)/tool/bin/python -m pip --python $(SBOM)/venv install --quiet $(TORCH)
	$(SBOM)/tool/bin/python -m pip --python $(SBOM)/venv install --quiet -e '.[all]'
	$(SBOM)/tool/bin/python -m pip install --quiet cyclonedx-bom
	$(SBOM)/tool/bin/cyclonedx-py environment --pyproject pyproject.toml --mc-type library --output-reproducible \
		-o build/sbom.json $(SBOM)/venv
	$(PYTHON) tests/check_sbom.py build/sbom.json
	rm -rf $(SBOM)

$(VENV)/bin/python:
	$(PYTHON) -c 'import sys; sys.exit("golddiff needs Python 3.11 or newer: make PYTHON=python3.11" if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)

# torch first and by its exact version: an open range may fetch another build of several gigabytes
$(VENV)/torch.done: $(VENV)/bin/python constraints.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(TORCH)
	touch $@

$(VENV)/demo.done: $(VENV)/torch.done pyproject.toml
	$(PIP) -e '.[demo]'
	$(BIN)/python -m pip check
	touch $@

# deepinv apart from the rest: it asks for torchvision, which nothing here needs (the tests stand in for it)
$(VENV)/dev.done: $(VENV)/torch.done pyproject.toml
	$(PIP) -e '.[dev]'
	$(PIP) --no-deps --target $(VENV)/apart deepinv
	$(BIN)/python -m pip check
	touch $@

$(VENV)/docs.done: $(VENV)/torch.done pyproject.toml
	$(PIP) -e '.[docs]'
	$(BIN)/python -m pip check
	touch $@

clean:
	rm -rf $(VENV) $(MINIMUM) $(NEWEST) runs build docs/_build .pytest_cache .mypy_cache .ruff_cache
