# make demo    install, export the bundled policy, serve it, and play a game over HTTP with each runtime
# make test    install and run the tests (10 to 20 minutes)
# make test-wide   more policies and games of the kinds that `make test` tries
# make test-fast   the tests of the server, the client and the store in process (2 minutes)
# make check   lint, types, format
# make docs    the Python API reference, into build/api
# make bench   CPU time per action, for actserve and other servers (half an hour): docs/cost.md
PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
# The code around the kernels of a .pt2 is compiled without optimisation: it takes a third less time.
export AOT_INDUCTOR_COMPILE_WRAPPER_OPT_LEVEL ?= O0
# What is imported is compiled then, and kept: compiling everything takes a minute of the installation.
export PYTHONDONTWRITEBYTECODE :=
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses=3 --dist=loadfile --no-loadscope-reorder
QUIET := --quiet --disable-pip-version-check --no-compile
PIP := $(BIN)/pip install $(QUIET) --constraint .ci/constraints.txt
PINNED := $(QUIET) --no-deps
# Robots' clients, which tests/e2e/test_robot_clients.py runs.
ROBOTS := $(patsubst %,.venv/%/installed,openpi vla-eval positronic json-numpy gr00t)

.PHONY: demo test test-wide test-fast chromium servers aarch64 check format docs bench

demo: .venv/all
	$(BIN)/python -m actserve_export.demo

test: .venv/dev .venv/kserve/installed .venv/s3/installed .venv/lerobot/installed $(ROBOTS) chromium servers aarch64
	$(PYTEST) -m "not wide"

test-wide: .venv/dev .venv/ray/installed .venv/robots/installed
	$(PYTEST) -m wide

test-fast: .venv/dev
	$(PYTEST) -m fast

# For the tests of the page. Without a Chromium they are skipped, and say how to install one.
chromium:
	@.ci/chromium

# For the tests behind a proxy and of the metrics: nginx and Prometheus, skipped in the same way.
servers:
	@.ci/servers

# For the tests of C++ on another processor: a cross-compiler, an emulator and ONNX Runtime, skipped in the same way.
aarch64: .venv/dev
	@.ci/aarch64

check: .venv/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: .venv/dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: .venv/dev
	$(BIN)/python -m tests.api build/api

bench: .venv/peers .venv/bentoml/installed .venv/ray/installed .venv/triton/installed
	$(BIN)/actserve bench
	$(BIN)/python -m tests.benchmarks.startup
	@mkdir -p .cache
	$(BIN)/python -m tests.benchmarks.cost --json .cache/cost.json --docs docs
	$(BIN)/python -m tests.benchmarks.overload --json .cache/overload.json
	$(BIN)/python -m tests.benchmarks.workers --json .cache/workers.json
	$(BIN)/python -m tests.benchmarks.scale

.venv/all: pyproject.toml .ci/constraints.txt
	@echo "installing into .venv: a few minutes, 2 GB (PyTorch is the large part)"
	$(PYTHON) -m venv .venv
	$(PIP) --editable '.[all]'
	@touch $@

.venv/dev: .venv/all
	$(PIP) --editable '.[all,dev]'
	@touch $@

.venv/peers: .venv/all
	$(PIP) --editable '.[all,peers]'
	@touch $@

# The libraries of tests/robots, and LeRobot's datasets, over what .venv has: they pin other versions of it, so nothing but
# they is installed.
.venv/robots/installed .venv/lerobot/installed: .venv/%/installed: .ci/%.txt | .venv/dev
	$(PYTHON) -m venv .venv/$*
	.venv/$*/bin/pip install $(PINNED) --requirement .ci/$*.txt
	$(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' > \
		"$$(.venv/$*/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/actserve.pth"
	@touch $@

# Tools with conflicting dependencies get their own virtual environment.
.venv/%/installed: .ci/%.txt | .venv/all
	$(PYTHON) -m venv .venv/$*
	.venv/$*/bin/pip install $(PINNED) --requirement .ci/$*.txt
	@touch $@
