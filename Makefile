# make train: train the SSM policy on HalfCheetah-v5 and print its evaluation. make test: the test suite.
# make docs: the documentation site, in build/site.
# Every target builds what it needs: a virtual environment in .venv with the package installed in it.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SOURCES := pyproject.toml CMakeLists.txt constraints.txt README.md LICENSE \
           $(wildcard csrc/*) $(shell find ssm_fast kernels -name '*.py' -o -name '*.pyi' -o -name '*.yaml')
CXX_FILES := $(wildcard csrc/*.cpp csrc/*.h tests/native/*.cpp)
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

SEED ?= 0
STEPS ?= 1000000
OUT ?= runs/improved-HalfCheetah-v5-seed$(SEED)
RESULTS ?= build/bench
CASES ?= 10000

.PHONY: train test test-isa fuzz sanitize bench wheel docs lint format clean

train: $(VENV)/.installed-rl
	$(BIN)/ssm-fast train --mode improved --env HalfCheetah-v5 --steps $(STEPS) --seed $(SEED) --out $(OUT)

test: $(VENV)/.installed-dev
	$(BIN)/pytest
	$(MAKE) test-isa

# The kernels once more at every instruction set below the one that the processor would choose.
test-isa: $(VENV)/.installed-dev
	set -e; levels="$$($(BIN)/python -I -c "from ssm_fast.ops.backend import native; print(*native.available_isas()[:-1])")"; \
	for isa in $$levels; do \
	  echo "SSM_FAST_ISA=$$isa"; SSM_FAST_ISA=$$isa $(BIN)/pytest tests/ops -m "not isa_independent"; \
	done

# Random calls of the ops, CASES of them where `make test` makes a few hundred.
fuzz: $(VENV)/.installed-dev
	SSM_FAST_FUZZ_CASES=$(CASES) $(BIN)/pytest tests/ops/test_fuzz.py

# The C++ under AddressSanitizer, UndefinedBehaviorSanitizer and ThreadSanitizer.
sanitize: $(VENV)/.installed-dev
	CXX=$(CXX) .ci/sanitize $(BIN)/python

bench: $(VENV)/.installed-bench
	mkdir -p $(RESULTS)
	SSM_FAST_BENCH_RESULTS=$(RESULTS) $(BIN)/pytest benchmarks --benchmark-json=$(RESULTS)/pytest-benchmark.json

wheel: $(VENV)/.installed-dev
	rm -rf dist
	$(BIN)/python -m pip wheel --quiet --no-deps --wheel-dir dist .
	@ls -l dist

# A warning, as of a link that leads nowhere, is an error. Nothing is fetched.
docs: $(VENV)/.installed-dev
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(CXX_FILES)

format: $(VENV)/.installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CXX_FILES)

clean:
	rm -rf build dist wheelhouse $(VENV)

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed-rl: $(BIN)/python $(SOURCES)
	$(PIP) ".[rl]"
	@touch $@

$(VENV)/.installed-dev: $(BIN)/python $(SOURCES)
	$(PIP) ".[dev]"
	@touch $@ $(VENV)/.installed-rl

$(VENV)/.installed-bench: $(VENV)/.installed-dev
	$(PIP) ".[bench,peers]"
	@touch $@
