# make demo    install, export the bundled policy, serve it, and play a game over HTTP with each runtime
# make test    install and run every test
# make check   lint, types, format
# make bench   what it costs
PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
PIP := $(BIN)/pip install --quiet --disable-pip-version-check --constraint .ci/constraints.txt

.PHONY: demo test check format bench

demo: .venv/all
	$(BIN)/python -m app.demo

test: .venv/dev .venv/kserve/installed
	$(BIN)/python -m pytest

check: .venv/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: .venv/dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: .venv/all
	$(BIN)/actserve bench
	$(BIN)/python -m tests.benchmarks.startup

.venv/all: pyproject.toml .ci/constraints.txt
	@echo "installing into .venv (PyTorch is the large part)"
	$(PYTHON) -m venv .venv
	$(PIP) --editable '.[all]'
	@touch $@

.venv/dev: .venv/all
	$(PIP) --editable '.[all,dev]'
	@touch $@

# kserve's client pins older versions of what everything else needs.
.venv/kserve/installed: .ci/kserve.txt .venv/all
	$(PYTHON) -m venv .venv/kserve
	.venv/kserve/bin/pip install --quiet --disable-pip-version-check --requirement .ci/kserve.txt
	@touch $@
