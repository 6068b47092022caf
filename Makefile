# `make demo` and `make test` do their own set-up on a machine with make and Python 3.11 or newer.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
CONSTRAINTS := cluster/deploy/constraints.txt
PYTEST := $(BIN)/python -m pytest

.PHONY: help venv demo test quick check format bench results chaos
.DEFAULT_GOAL := help

help:
	@echo "make demo     the whole chain on generated images, with a report in demo/report.html"
	@echo "make test     all that CI runs: check, then every test"
	@echo "make quick    the tests that take seconds"
	@echo "make check    format, lint, types, import contracts"
	@echo "make format   put the code into the form that check wants"
	@echo "make bench    ratios against peers, side by side"
	@echo "make results  every figure of README, resumable"
	@echo "make chaos    a hundred kills, and what else takes many minutes"

venv: $(STAMP)

$(STAMP): pyproject.toml $(CONSTRAINTS)
	@command -v $(PYTHON) >/dev/null || { echo "$(PYTHON) not found: install Python 3.11 or newer, or make PYTHON=/path/to/python"; exit 1; }
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(None if v >= (3, 11) else "Python 3.11 or newer is needed, $(PYTHON) is %d.%d: make PYTHON=/path/to/python" % v[:2])'
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)
	$(BIN)/python -m pip install --quiet -c $(CONSTRAINTS) -e '.[dev]'
	@touch $@

demo: $(STAMP)
	$(BIN)/rayograph demo --out demo

test: check
	$(PYTEST) -m "not chaos" --durations=40 --durations-min=5

quick: $(STAMP)
	$(PYTEST) -m "not slow and not chaos"

check: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/mypy --explicit-package-bases tests
	$(BIN)/lint-imports

format: $(STAMP)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: $(STAMP)
	$(BIN)/python -m tests.benchmarks.bench

results: $(STAMP)
	$(BIN)/python -m tests.benchmarks.results

chaos: $(STAMP)
	$(PYTEST) -m chaos
