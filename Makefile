# From a fresh clone with Python >= 3.11, pip and make:  make demo   make test
VENV := .venv
BIN := $(VENV)/bin
PYTHON ?= $(shell for p in python3.11 python3 python; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
# Byte-compiling everything costs 34 s; what is imported is compiled once on first use, in 10 s, if Python may write it down.
unexport PYTHONDONTWRITEBYTECODE
PIP_INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile --constraint constraints.txt

# A file is tested in one process: its tests may share what is dear to set up.
PYTEST_PROCESSES := --numprocesses auto --maxprocesses 4 --dist loadfile

.PHONY: help demo install test test-slow lint format docs lock clean
help: ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 12

demo: $(VENV)/.engine ## train a small network by five methods on real data and write report.html
	$(BIN)/unloaf demo $(ARGS)

install: $(VENV)/.dev ## create the environment in .venv

test: $(VENV)/.dev ## the default test suite (ARGS="-k name" to choose)
	$(BIN)/python -m pytest $(PYTEST_PROCESSES) $(ARGS)

test-slow: $(VENV)/.dev ## the long counts
	$(BIN)/python -m pytest -m slow $(PYTEST_PROCESSES) $(ARGS)

lint: $(VENV)/.dev ## style, types, import contracts
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/lint-imports

format: $(VENV)/.dev ## rewrite the code in the project's style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(VENV)/.dev ## write the tables of the documentation that the code knows
	$(BIN)/python docs/generate.py $(ARGS)

lock: $(BIN)/python ## choose the newest versions again and write constraints.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv
	$(BIN)/uv pip compile pyproject.toml --extra engine --extra dev --universal --python-version 3.11 --upgrade \
		--no-annotate --quiet --custom-compile-command 'make lock' --output-file constraints.txt

clean: ## remove the environment and all caches
	rm -rf $(VENV) .pytest_cache .ruff_cache .hypothesis .import_linter_cache dist

$(BIN)/python:
	@test -n '$(PYTHON)' || { echo 'unloaf needs Python 3.11 or newer; say which: make PYTHON=/path/to/python3.11' >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)

# A stamp is younger than what it was made from, so that installing happens once and again when a version changes.
$(VENV)/.engine: pyproject.toml constraints.txt | $(BIN)/python
	@echo 'installing into $(VENV): about 3 GB of wheels the first time, a few minutes'
	$(PIP_INSTALL) --editable '.[engine]'
	@touch $@

$(VENV)/.dev: $(VENV)/.engine
	$(PIP_INSTALL) --editable '.[engine,dev]'
	@touch $@
