# make quickstart | test | test-fast | test-long | check | format | clean. Needs Python 3.11 to 3.13 and a network to PyPI on the first call, nothing else.

VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

# The newest interpreter on the PATH that is supported and really runs, with the modules that an installation needs: a
# version manager may leave shims that only print an error, in front of others of the same name.
# Override with `make PYTHON=/path/to/python3.12 ...`.
PYTHON ?= $(shell IFS=:; for name in python3.13 python3.12 python3.11 python3 python; do for folder in $$PATH; do \
	"$$folder/$$name" -c 'import bz2, ctypes, ensurepip, lzma, ssl, sys, venv; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' \
	>/dev/null 2>&1 && { echo "$$folder/$$name"; exit; }; done; done)

.DEFAULT_GOAL := help
.PHONY: help install quickstart test test-fast test-long fuzz check format clean

help:
	@echo "make quickstart  train a small policy on arithmetic, SFT then GRPO (minutes, CPU)"
	@echo "make test        every promise (at most 35 minutes on two cores)"
	@echo "make test-fast   what builds no model (under three minutes)"
	@echo "make test-long   what make test leaves out: chaos, whole matrices, packages that are no dependency"
	@echo "make fuzz        new hostile input to everything before the first compilation, for an hour or FUZZ_SECONDS"
	@echo "make check       format, lint and type checks, then make test"
	@echo "make format      rewrite the sources in the project's format"
	@echo "make clean       remove the virtual environment and the caches, never a run"

install: $(INSTALLED)

# Installed anew only when pyproject.toml changes: the sources themselves are used from this folder (editable). The stamp is
# written last, so an interrupted installation is taken up again.
$(INSTALLED): pyproject.toml
	@test -n "$(PYTHON)" || { echo "error: no working Python 3.11, 3.12 or 3.13 with venv found; install one or pass PYTHON=..." >&2; exit 2; }
	@echo "installing into $(VENV) with $(PYTHON)"
	@test -x $(BIN)/python && $(BIN)/python -m pip --version >/dev/null 2>&1 || "$(PYTHON)" -m venv --clear $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable ".[dev]"
	@touch $@

quickstart: $(INSTALLED)
	@$(BIN)/python examples/arithmetic/run.py

test: $(INSTALLED)
	@$(BIN)/python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder --max-worker-restart 0

test-fast: $(INSTALLED)
	@$(BIN)/python -m pytest -q -n 2 --fast --durations=5 --durations-min=2

test-long: $(INSTALLED)
	@$(BIN)/python -m pytest -q -m long

fuzz: $(INSTALLED)
	@FUZZ_SECONDS=$${FUZZ_SECONDS:-3600} $(BIN)/python -m pytest -q -s tests/whole_runs/test_fuzz.py

check: $(INSTALLED)
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/pyright --pythonpath $(BIN)/python
	@$(MAKE) --no-print-directory test

format: $(INSTALLED)
	@$(BIN)/ruff format .
	@$(BIN)/ruff check --fix .

clean:
	@rm -rf $(VENV) .cache .pytest_cache .ruff_cache build dist *.egg-info
