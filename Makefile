PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
SOURCES := configs deployments flows methods tasks tests

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-demo test-lifecycle test-methods test-families test-targets test-operations test-e2e test-postgres bench lint format clean

help:
	@echo "make setup   create $(VENV) with the tuneline command in it (PYTHON=... chooses the interpreter)"
	@echo "make demo    fine-tune, evaluate, merge, deploy and ask a small real model"
	@echo "make test    lint, type check and the tests that need neither a model nor a GPU"
	@echo "make test-demo  the demo on the real model, and its figures"
	@echo "make test-lifecycle  whole trains by flows and commands: the README's tour, every path, kills, retraining"
	@echo "make test-methods  every training method through every stage, each in its own environment"
	@echo "make test-families  every method on a tiny model of every family, and their table; FAMILIES_WRITE=1 into the docs"
	@echo "make test-targets  llama.cpp built and serving, Ollama's interface, the demo's model quantised"
	@echo "make test-e2e  a real browser on the pages: form, progress, copy, compare, cancel; pictures in build/e2e"
	@echo "make test-operations  workers, conda environments, GPU slots: what dies, what is left, what goes on"
	@echo "make test-postgres  the tests of servers and flows on PostgreSQL, which it installs where it is missing"
	@echo "make bench   speed and memory of checking datasets (MEGABYTES=300 a format), speed of evaluation; half an hour"
	@echo "make lint    ruff and mypy only"
	@echo "make format  let ruff rewrite the sources"
	@echo "make clean   remove $(VENV) and all caches"

setup: $(STAMP)

# The stamp is written last: an installation that was interrupted is taken up again by the next call.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "Tuneline needs Python 3.11 or newer; '$(PYTHON)' is $$($(PYTHON) --version 2>&1 | head -n 1)." >&2; \
	  echo "Name another one: make $(or $(MAKECMDGOALS),setup) PYTHON=/path/to/python3.11" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	@touch $@

demo: setup
	$(BIN)/tuneline demo

# Two test files side by side, each with one thread a process: two processes of two threads on two cores wait for
# each other at every step, and take ten times as long.
test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m 'not (slow or lifecycle or operations or e2e or methods or families or targets)' -n 2 --dist loadfile

test-demo: setup
	$(BIN)/python -m pytest -m slow

# Chromium is installed where it is missing and that is allowed; CHROMIUM=... names another one.
test-e2e: setup
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev,e2e]'
	CHROMIUM='$(CHROMIUM)' $(BIN)/python -m tests.e2e.chromium
	CHROMIUM='$(CHROMIUM)' OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m e2e -x

test-lifecycle: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m lifecycle

# Each in the environment that its method names, which `tuneline envs create` makes of the method's own file.
test-methods: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m methods -n 2 --dist loadfile

# Prints the table family × method. FAMILIES_WRITE=1 puts it into the documents instead of comparing it with them.
test-families: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/families -m families -n 2

# llama.cpp is compiled once, into the cache of the user; its server then really serves.
test-targets: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m targets

# One at a time: each has servers, workers and trains of its own.
test-operations: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m operations

# PostgreSQL behind both servers of every home; T= chooses other tests: make test-postgres T='-m operations tests'
test-postgres: setup
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev,postgres]'
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.postgres $(T)

# Fails where a figure is below what is asked.
bench: setup
	$(BIN)/python -m tests.bench.bench_datasets $(MEGABYTES)
	$(BIN)/python -m tests.bench.bench_answers

lint: setup
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/mypy

format: setup
	$(BIN)/ruff check --fix $(SOURCES)
	$(BIN)/ruff format $(SOURCES)

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
	find $(SOURCES) -type d -name __pycache__ -prune -exec rm -rf {} +
