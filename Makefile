# Everything runs in one virtual environment, made on first use and reused.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin

.PHONY: setup docs test stress test-gpu test-oldest test-newest aot lint format bench build native valgrind distributed clean

setup: $(VENV)/.done

$(VENV)/.done: pyproject.toml setup.py csrc/build.py $(wildcard csrc/cpu/*)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable ".[dev]"
	touch $@

test: setup
	$(BIN)/python -m pytest -n auto

# Kills, flipped bits, signals, mutated files and full disks; hours in full: make stress STRESS="--share 0.1 --only kills".
STRESS ?= --out build/stress.md
stress: setup
	mkdir -p build
	$(BIN)/python -m tests.stress $(STRESS)

test-gpu: setup
	$(BIN)/python -m pytest tests/test_gpu.py

# One run on 1, 2 and 4 processes, losses side by side.
distributed: setup
	$(BIN)/python -m bench.distributed

OVERLAY = $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --target

# The oldest and the newest versions that are tested, and each Triton between, laid over the environment.
$(VENV)/oldest/.done $(VENV)/newest/.done: $(VENV)/.done
	rm -rf $(@D)
	$(BIN)/python -m bench.versions $(notdir $(@D)) | xargs $(OVERLAY) $(@D)
	touch $@

$(VENV)/triton-%/.done: $(VENV)/.done
	rm -rf $(@D)
	$(OVERLAY) $(@D) triton==$* "numpy<2.4"
	touch $@

# What a version of torch or Triton can change: the kernels, compiled and interpreted, the ops, what they need of torch.
OF_VERSIONS = tests/test_triton.py tests/test_dispatch.py tests/test_ppap_loss.py \
	tests/test_contrastive_loss.py tests/test_relation_masks.py \
	tests/test_proxy_average.py tests/test_masked_log_softmax.py tests/test_versions.py

# Of the interpreter's files and of the architectures compiled for, which take minutes, `make test` runs all with the
# environment's own Triton.
UNINTERPRETED = contract or training or loss or launches or rows

test-oldest test-newest: test-%: $(VENV)/%/.done
	PYTHONPATH=$(CURDIR)/$(VENV)/$* $(BIN)/python -m pytest -n auto $(OF_VERSIONS) \
		-k "not (interpreter and ($(UNINTERPRETED))) and not (hardware and (sm_80 or gfx942))"

# Registers and spills of every Triton kernel with every tested Triton, all columns anew.
aot: setup
	rm -f bench/results/aot.md
	set -e; for version in $$($(BIN)/python -m bench.versions triton); do \
		$(MAKE) $(VENV)/triton-$$version/.done; \
		PYTHONPATH=$(CURDIR)/$(VENV)/triton-$$version $(BIN)/python -m bench.aot --out bench/results/aot.md; \
	done

# The site of docs/, into build/site; what is broken in it ends the build, and nothing is fetched.
docs: setup
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet

# The native CPU library, after a change of csrc/cpu.
native:
	$(PYTHON) csrc/build.py

valgrind:
	mkdir -p build
	$(PYTHON) csrc/build.py --out build/valgrind.so -- -g
	$(CXX) -std=c++17 -g csrc/cpu/driver.cpp build/valgrind.so -Wl,-rpath,$(CURDIR)/build -o build/driver
	valgrind --error-exitcode=1 build/driver

SOURCES = $(wildcard csrc/c*/*.cpp csrc/c*/*.h csrc/c*/*.inc csrc/c*/*.cu csrc/c*/*.cuh)

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(SOURCES)

format: setup
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(SOURCES)

bench: setup
	$(BIN)/python -m pytest bench --benchmark-only

build: setup
	$(BIN)/python -m build --outdir dist .

clean:
	rm -rf build dist *.egg-info
