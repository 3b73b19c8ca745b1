# make quickstart | test | check | format | clean. Needs Python 3.11 to 3.13 and a network to PyPI on the first call, nothing else.

VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

# The newest interpreter that is supported and really runs: a version manager may leave shims that only print an error.
# Override with `make PYTHON=/path/to/python3.12 ...`.
PYTHON ?= $(shell for python in python3.13 python3.12 python3.11 python3; do \
	"$$python" -c 'import sys, venv, ensurepip; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' >/dev/null 2>&1 \
	&& { command -v "$$python"; break; }; done)

.DEFAULT_GOAL := help
.PHONY: help install quickstart test check format clean

help:
	@echo "make quickstart  train a small policy on arithmetic, SFT then GRPO (minutes, CPU)"
	@echo "make test        the whole test suite"
	@echo "make check       format, lint and type checks, then the test suite"
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
	@$(BIN)/python -m pytest -q -n 2 --dist loadfile

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
