# Everything a clone needs: `make demo` and `make test` set up what is missing first.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
MINUTES ?= 3
WORKERS ?= auto

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-slow lint format docs docs-serve clean

help:  ## list these targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /|/' | awk -F'|' '{printf "  make %-10s %s\n", $$1, $$2}'

setup: $(STAMP)  ## create .venv and install the package with everything for development

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "DC-SSDAE needs Python 3.11 or newer; choose one with: make setup PYTHON=python3.12" >&2; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) \
		|| { echo "python3 -m venv failed; on Debian and Ubuntu: apt install python3-venv" >&2; exit 1; }
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt uv
	$(BIN)/uv pip install --quiet --compile-bytecode --python $(BIN)/python --constraint constraints.txt --editable '.[dev]'
	@touch $@

demo: $(STAMP)  ## use the shipped model, train a small one (MINUTES=3) and write runs/demo/report.html
	$(BIN)/dc-ssdae demo --minutes $(MINUTES) --out runs/demo --overwrite

test: $(STAMP)  ## run the test suite (WORKERS=auto processes)
	$(BIN)/python -m pytest --numprocesses $(WORKERS)

test-slow: $(STAMP)  ## run the long tests too
	$(BIN)/python -m pytest --numprocesses $(WORKERS) -m 'slow or not slow'

lint: $(STAMP)  ## check style, types and the direction of imports
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(STAMP)  ## format the code and fix what can be fixed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(STAMP)  ## build the documentation: open site/index.html
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

docs-serve: $(STAMP)  ## show the documentation on this machine, and anew after each change
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs serve

clean:  ## remove the environment and what the tools cache
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .import_linter_cache site
