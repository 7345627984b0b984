# Everything runs in one virtual environment, made on first use and reused.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin

.PHONY: setup test lint bench build clean

setup: $(VENV)/.done

$(VENV)/.done: pyproject.toml setup.py
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable ".[dev]"
	touch $@

test: setup
	$(BIN)/python -m pytest

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

bench: setup
	$(BIN)/python -m pytest bench --benchmark-only

build: setup
	$(BIN)/python -m build --outdir dist .

clean:
	rm -rf build dist *.egg-info
