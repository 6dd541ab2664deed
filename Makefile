# fastl2o: every target sets up what it needs in $(VENV) and reuses what is there.
#
#   make demo     train a classifier with the shipped learned optimizer and with tuned hand-designed ones
#   make test     lint, types, build, tests (what CI runs)
#   make test-torch   torch's own optimizer test machinery over fastl2o's optimizers (about two minutes)
#   make test-sanitize   the kernels' tests under AddressSanitizer and UBSan (about ten minutes)
#   make fuzz     100,000 damaged files and states (about ten minutes)
#   make build    the compiled parts in place        make bench            microbenchmarks and suite
#   make lint     checks of the sources              make format           rewrites them
#   make docs     the manual as a site, in site/        make examples  Lightning, Accelerate, Trainer
#   make examples-timm   timm, in an environment of its own (its torchvision takes gigabytes)
#   make wheel    sdist and one abi3 wheel in dist/  make clean            removes what was built
#
# Settings: PYTHON=python3.12, VENV=.venv, PIP_ARGS="--index-url ..." (for example PyTorch's index of CPU
# builds; pip's own PIP_* environment variables work too), PYTEST_ARGS="-k name".

PYTHON ?= python3
VENV ?= .venv
PIP_ARGS ?=
PYTEST_ARGS ?=
TORCH_VERSION := 2.13.0

BIN := $(VENV)/bin
PY := $(BIN)/python
PIP := $(PY) -m pip install $(PIP_ARGS)
# Stamps lie in the environment, so that removing it removes them.
TORCH_STAMP := $(VENV)/.torch-$(TORCH_VERSION)
DEMO_STAMP := $(VENV)/.fastl2o-demo
DEV_STAMP := $(VENV)/.fastl2o-dev
OPS_STAMP := $(VENV)/.fastl2o-ops
CUDA_STAMP := $(VENV)/.fastl2o-cuda
CORE_STAMP := $(VENV)/.fastl2o-core
CPP := $(shell find csrc -type f \( -name '*.cpp' -o -name '*.h' -o -name '*.hpp' -o -name '*.inl' -o -name '*.cu' -o -name '*.cuh' \) 2>/dev/null)

export FASTL2O_WERROR := 1

.PHONY: demo test test-torch test-sanitize fuzz build bench lint format types docs examples examples-timm wheel clean

demo: $(DEMO_STAMP) $(OPS_STAMP)
	$(BIN)/fastl2o demo

test: lint types build
	$(PY) -m pytest -n auto --dist loadfile $(PYTEST_ARGS)

# A file of its own name, so that `make test` does not collect it.
test-torch: $(DEV_STAMP) $(OPS_STAMP)
	$(PY) -m pytest -n auto $(PYTEST_ARGS) tests/torch_machinery/battery.py tests/torch_machinery/large.py

# A copy, so that the usual build stays. Python itself leaks by design, so leaks are not looked for.
SANITIZE := -fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer
SANITIZED_TESTS := tests/test_cpu_kernels.py tests/test_hierarchical_cpu.py \
  tests/test_hierarchical_cpu_unroll.py tests/test_hierarchical_ops.py tests/test_ops.py \
  tests/test_ops_functional.py tests/test_ops_nonfinite.py tests/test_opcheck.py \
  tests/test_optim_determinism.py tests/test_optim_memory.py tests/test_stochastic_rounding.py
test-sanitize: $(DEV_STAMP)
	mkdir -p build/sanitize
	cp -ru csrc fastl2o kernels tests setup.py pyproject.toml build/sanitize
	rm -f build/sanitize/fastl2o/*.so
	cd build/sanitize && export FASTL2O_CUDA=0 CFLAGS="$(SANITIZE)" LDFLAGS="$(SANITIZE)" && \
	  $(abspath $(PY)) setup.py -q build_ext --inplace && $(abspath $(PY)) setup.py -q build_core
	cd build/sanitize && ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 \
	  LD_PRELOAD="$$(g++ -print-file-name=libasan.so) $$(g++ -print-file-name=libubsan.so)" \
	  $(abspath $(PY)) -m pytest $(PYTEST_ARGS) $(SANITIZED_TESTS)

fuzz: $(DEV_STAMP) $(OPS_STAMP)
	$(PY) -m tests.fuzz

build: $(CUDA_STAMP) $(CORE_STAMP)

bench: $(DEV_STAMP) build
	$(BIN)/fastl2o bench
	$(PY) -m bench.suite

lint: $(DEV_STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(if $(CPP),$(BIN)/clang-format --dry-run -Werror $(CPP))

types: $(DEV_STAMP)
	$(BIN)/mypy

format: $(DEV_STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(if $(CPP),$(BIN)/clang-format -i $(CPP))

# Heavy libraries, so they are not in the environment of `make test`.
examples: $(DEV_STAMP) $(OPS_STAMP)
	FASTL2O_CPP=0 $(PIP) --no-build-isolation -e ".[examples]"
	$(PY) -m pytest $(PYTEST_ARGS) tests/test_examples.py

# In an environment of its own: timm needs torchvision, whose builds go with other builds of torch
# than the one that the Makefile pins.
TIMM_VENV ?= .venv-timm
examples-timm:
	$(PYTHON) -m venv $(TIMM_VENV)
	$(TIMM_VENV)/bin/python -m pip install $(PIP_ARGS) torch torchvision "setuptools>=77" wheel ninja
	$(TIMM_VENV)/bin/python -m pip install $(PIP_ARGS) --no-build-isolation ".[examples-timm,test]"
	cd examples && ../$(TIMM_VENV)/bin/python -m pytest -p no:cacheprovider -k timm ../tests/test_examples.py

docs: $(DEV_STAMP)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

wheel: $(DEV_STAMP)
	rm -rf dist
	$(PY) -m build --no-isolation

clean:
	rm -rf build dist runs site .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
	rm -rf *.egg-info fastl2o/*.so $(OPS_STAMP) $(CUDA_STAMP) $(CORE_STAMP)
	find fastl2o kernels tests bench -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true

$(PY):
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
	  echo "fastl2o needs Python >= 3.10; PYTHON=$(PYTHON) is not (make PYTHON=/path/to/python3.12)" >&2; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || { \
	  echo "$(PYTHON) has no venv module: install it (Debian, Ubuntu: apt-get install python3-venv)" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

# Without an NVIDIA driver torch's CPU build is enough, and several GB smaller; it is published on
# PyTorch's own package index, which is used when PIP_ARGS or pip's environment variables name it.
$(TORCH_STAMP): | $(PY)
	@if command -v nvidia-smi >/dev/null 2>&1 || [ -e /proc/driver/nvidia ]; then \
	  set -x; $(PIP) "torch==$(TORCH_VERSION)"; \
	elif $(PIP) "torch==$(TORCH_VERSION)+cpu"; then :; else \
	  echo "no CPU-only torch $(TORCH_VERSION) on the configured package indexes: installing the default build" >&2; \
	  set -x; $(PIP) "torch==$(TORCH_VERSION)"; \
	fi
	$(PIP) "setuptools>=77" wheel ninja
	@touch $@

# The editable install is pure Python here; the compiled parts have rules of their own, so that a
# change in csrc/ rebuilds without going through pip.
$(DEMO_STAMP): pyproject.toml $(TORCH_STAMP)
	FASTL2O_CPP=0 $(PIP) --no-build-isolation -e ".[demo]"
	@touch $@

$(DEV_STAMP): pyproject.toml $(TORCH_STAMP)
	FASTL2O_CPP=0 $(PIP) --no-build-isolation -e ".[dev]"
	@touch $@ $(DEMO_STAMP)

# CUDA kernels take minutes to compile, so whoever only uses the package gets them where torch can load
# them; `make build` compiles them wherever there is nvcc.
$(OPS_STAMP): $(CPP) setup.py pyproject.toml $(TORCH_STAMP)
	FASTL2O_CUDA=$${FASTL2O_CUDA:-$$($(PY) -c 'import torch; print("auto" if torch.version.cuda else "0")')} \
	  $(PY) setup.py -q build_ext --inplace
	@touch $@

$(CUDA_STAMP): $(OPS_STAMP)
	$(PY) setup.py -q build_ext --inplace
	@touch $@

$(CORE_STAMP): $(CPP) setup.py $(DEV_STAMP)
	$(PY) setup.py -q build_core
	@touch $@
