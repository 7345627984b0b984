# Everything runs in one virtual environment, made on first use and reused.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin

.PHONY: setup test test-gpu test-triton36 lint bench build native valgrind clean

setup: $(VENV)/.done

$(VENV)/.done: pyproject.toml setup.py csrc/build.py $(wildcard csrc/cpu/*)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable ".[dev]"
	touch $@

test: setup
	$(BIN)/python -m pytest -n auto

test-gpu: setup
	$(BIN)/python -m pytest tests/test_gpu.py

# The oldest Triton that is supported, laid over the environment.
$(VENV)/triton36/.done: $(VENV)/.done
	rm -rf $(@D)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --target $(@D) triton==3.6.0 "numpy<2.4"
	touch $@

test-triton36: $(VENV)/triton36/.done
	PYTHONPATH=$(VENV)/triton36 $(BIN)/python -m pytest -n auto tests/test_triton.py -k "compiled or test_ops or test_loss"

# The native CPU library, after a change of csrc/cpu.
native:
	$(PYTHON) csrc/build.py

valgrind:
	mkdir -p build
	$(PYTHON) csrc/build.py --out build/valgrind.so -- -g
	$(CXX) -std=c++17 -g csrc/cpu/driver.cpp build/valgrind.so -Wl,-rpath,$(CURDIR)/build -o build/driver
	valgrind --error-exitcode=1 build/driver

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

bench: setup
	$(BIN)/python -m pytest bench --benchmark-only

build: setup
	$(BIN)/python -m build --outdir dist .

clean:
	rm -rf build dist *.egg-info
