# Everything runs in .venv, which the first target makes. PIP_ARGS and PYTHON can be set from outside.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PLUGINS := $(sort $(wildcard plugins/*))
PACKAGES := -e 'core[megatron]' $(addprefix -e ,$(PLUGINS))
TOOLS := pytest pytest-timeout pytest-xdist hypothesis scipy ruff mypy import-linter build hatchling twine types-PyYAML

.PHONY: setup demo test test-all lint dist clean

setup: $(STAMP)

$(STAMP): constraints.txt core/pyproject.toml $(addsuffix /pyproject.toml,$(PLUGINS))
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -c constraints.txt torch
	$(BIN)/python -m pip install -q -c constraints.txt $(TOOLS)
	$(BIN)/python -m pip install -q -c constraints.txt $(PACKAGES)
	touch $@

demo: setup
	$(BIN)/autodeco run --plugin qwen3

test: setup
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "not slow and not gpu"

test-all: setup
	$(BIN)/python -m pytest -m "not gpu"

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/mypy benchmarks/*.py tools/*.py
	$(BIN)/lint-imports

dist: setup
	rm -rf dist
	for source in core $(PLUGINS); do $(BIN)/python -m build -q --no-isolation --outdir dist $$source || exit; done
	$(BIN)/twine check --strict dist/*

clean:
	rm -rf $(VENV) dist .mypy_cache .ruff_cache .pytest_cache
