# The README's commands. Everything is installed into .venv, which needs nothing but Python 3.11 or newer.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test check clean

# Raw text to a released model, on a laptop's CPU.
demo: .venv/installed
	$(BIN)/tinyllama demo

# The README's test command.
test: .venv/installed-dev
	$(BIN)/python -m pytest

# The linters: formatting, rules, types.
check: .venv/installed-dev
	$(BIN)/ruff format --check src tests benchmarks
	$(BIN)/ruff check src tests benchmarks
	$(BIN)/mypy

clean:
	rm -rf .venv build dist

.venv/bin/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and f"{sys.executable}: Python 3.11 or newer is needed; make demo PYTHON=/path/to/one")'
	$(PYTHON) -m venv .venv

.venv/installed: pyproject.toml | .venv/bin/python
	$(BIN)/python -m pip install --quiet --editable '.[all]'
	touch $@

.venv/installed-dev: pyproject.toml | .venv/bin/python
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $@
