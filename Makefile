# Two commands do all the set-up: `make demo` and `make test`. Both make their own environment in .venv.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: demo test lint format docs check-wheel clean

demo: $(VENV)/demo.done ## sample 16 digits from 5,000 training images
	$(BIN)/golddiff sample mnist5k --out runs/demo

test: $(VENV)/dev.done lint ## lint, types and all tests
	$(BIN)/python -m pytest -n auto --dist worksteal

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
	$(WHEEL)/venv/bin/python -m pip install --quiet $$(grep '^torch==' constraints.txt)
	$(WHEEL)/venv/bin/python -m pip install --quiet -c constraints.txt $(WHEEL)/golddiff-*.whl
	sh tests/check_wheel.sh $(WHEEL)/venv

$(VENV)/bin/python:
	$(PYTHON) -c 'import sys; sys.exit("golddiff needs Python 3.11 or newer: make PYTHON=python3.11" if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)

# torch first and by its exact version: an open range may fetch another build of several gigabytes
$(VENV)/torch.done: $(VENV)/bin/python constraints.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $$(grep '^torch==' constraints.txt)
	touch $@

$(VENV)/demo.done: $(VENV)/torch.done pyproject.toml
	$(PIP) -e '.[demo]'
	touch $@

# deepinv apart from the rest: it asks for torchvision, which nothing here needs (the tests stand in for it)
$(VENV)/dev.done: $(VENV)/torch.done pyproject.toml
	$(PIP) -e '.[dev]'
	$(PIP) --no-deps --target $(VENV)/apart deepinv
	$(BIN)/python -m pip check
	touch $@

$(VENV)/docs.done: $(VENV)/torch.done pyproject.toml
	$(PIP) -e '.[docs]'
	touch $@

clean:
	rm -rf $(VENV) runs build docs/_build .pytest_cache .mypy_cache .ruff_cache
