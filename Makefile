# Two commands on a fresh machine with Python 3.11+ and make: `make demo` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: demo test slow install lint clean

demo: install ## train, measure, write the report, open the dashboard (ARGS=--no-dashboard stops before)
	$(BIN)/kronscope demo $(ARGS)

test: install ## all tests but the slow ones, on all cores (ARGS are given to pytest)
	$(BIN)/python -m pytest --numprocesses auto --dist worksteal -m "not slow" $(ARGS)

slow: install ## the tests marked slow: real epochs, thousands of draws, a wheel in a fresh environment
	$(BIN)/python -m pytest --numprocesses auto --dist worksteal -m slow $(ARGS)

lint: install ## format check, lint, types, import contracts
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	mkdir -p build/links/kronscope && ln -sfn $(CURDIR)/kronscope/__init__.py build/links/kronscope/
	for folder in diag optim studies app; do ln -sfn $(CURDIR)/$$folder build/links/kronscope/; done
	$(BIN)/mypy
	cd build/links && PYTHONPATH=$(CURDIR) ../../$(BIN)/lint-imports --config ../../pyproject.toml

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Kronscope needs Python 3.11 or newer, not " + sys.version.split()[0])'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $(STAMP)

clean:
	rm -rf $(VENV) results build kronscope.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
