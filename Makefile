# make demo and make test work on a fresh machine with Python 3.11 or newer; `make PYTHON=python3.12 demo` names another.
PYTHON ?= python3
BIN := .venv/bin

help:  ## what there is to make
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 12

demo: .venv/installed  ## two minutes from photographs to a network that enlarges them
	$(BIN)/darkroom demo

test: .venv/installed  ## all tests but the longest; no GPU, no data, ten minutes on two cores
	$(BIN)/python -m pytest -n 2 --dist worksteal -m "not slow"

test-all: .venv/installed  ## the longer proofs too
	$(BIN)/python -m pytest -n 2 --dist worksteal

check: .venv/installed  ## format, lint, types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: .venv/installed  ## format, and mend what can be mended
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

install: .venv/installed  ## the environment in .venv, versions as locked in constraints.txt

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	$(BIN)/python -m pip install --quiet --no-deps sweeps==0.3.0  # W&B's schema, for tests; it asks for an older numpy
	@touch $@

.PHONY: help demo test test-all check format install
