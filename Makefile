# `make demo` and `make test` require only Python 3.11 or newer. Select another interpreter with `make PYTHON=python3.12 demo`.
PYTHON ?= python3
BIN := .venv/bin

help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 12

demo: .venv/installed  ## train a super-resolution network on photographs, in two minutes
	$(BIN)/darkroom demo

test: .venv/installed  ## run all tests except the slow ones, in ten minutes on two cores (no GPU or datasets needed)
	$(BIN)/python -m pytest -n 2 --dist worksteal -m "not slow and not gpu and not gpus2"

test-all: .venv/installed  ## run all tests, including the slow ones
	$(BIN)/python -m pytest -n 2 --dist worksteal

test-gpu: .venv/installed  ## run the tests that need a GPU; they are skipped without one
	$(BIN)/python -m pytest -n 4 --dist worksteal -m "gpu or gpus2" -rs

check: .venv/installed  ## check format, lint rules and types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: .venv/installed  ## format the code and apply automatic fixes
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

install: .venv/installed  ## create the environment in .venv with the versions in constraints.txt

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	$(BIN)/python -m pip install --quiet --no-deps sweeps==0.3.0  # W&B's schema, for tests; it declares an older numpy
	@touch $@

.PHONY: help demo test test-all test-gpu check format install
