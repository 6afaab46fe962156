# Targets that need .venv create it once and reuse it.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install -c constraints.txt
UV := $(BIN)/uv pip install --python $(BIN)/python
CXXFLAGS ?= -Werror
export CXXFLAGS
CSRC = $(shell find csrc -name '*.cpp' -o -name '*.cu' -o -name '*.h')

.DEFAULT_GOAL := help
.PHONY: help install test test-floor test-latest check format demo study demo-transfer build wheel test-wheel gpu gpu-kernels gpu-baselines gpu-parity proof budget torture bench-ops bench-model bench-data docs readme-tables sanitize clean

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 20

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: pyproject.toml constraints.txt | $(BIN)/python
ifdef RESOLUTION
	$(BIN)/python -m pip install uv
	$(UV) --resolution $(RESOLUTION) -r pyproject.toml --extra dev 'setuptools>=77' 'ninja>=1.11'
	$(UV) --no-build-isolation --no-deps -e .
else
	$(PIP) torch torchvision setuptools ninja
	$(PIP) --no-build-isolation -e '.[dev]'
endif
	touch $@

$(VENV)/.compiled: $(VENV)/.installed setup.py $(CSRC)
	$(BIN)/python setup.py --quiet build_ext --inplace
	touch $@

install: $(VENV)/.compiled ## create .venv with mae_fast (editable) and its tools; compile changed files in csrc

# --dist loadfile: the tests of a file run in one process and share fixtures. PASSIVE: waiting threads free their core.
test: install ## run the tests in parallel
	OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m pytest -n $$(nproc) --maxprocesses 4 --dist loadfile

test-floor: ## run the tests with the oldest versions that pyproject.toml allows, in build/floor
	$(MAKE) test VENV=build/floor RESOLUTION=lowest-direct

test-latest: ## run the tests with the newest versions, in build/latest
	$(MAKE) test VENV=build/latest RESOLUTION=highest

check: install ## check lint, format, types and import layers
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/clang-format --dry-run --Werror $(CSRC)

format: install ## format the sources and fix lint errors
	$(BIN)/ruff check --fix
	$(BIN)/ruff format
	$(BIN)/clang-format -i $(CSRC)

demo: install ## pre-train on Fashion-MNIST, draw reconstructions, fine-tune with and without pre-training; 5 minutes
	$(BIN)/mae-fast demo runs/demo

study: install ## compare MAE with training from scratch on Fashion-MNIST, with ablations; about an hour
	$(BIN)/mae-fast study runs/study

demo-transfer: install ## compare segmentation and detection with and without pre-training on satellite images
	$(BIN)/mae-fast demo-transfer runs/demo-transfer

build: install ## build an sdist and a wheel in dist/
	$(BIN)/python -m build --no-isolation

wheel: install ## build a manylinux wheel in dist/ that works with Python 3.10 and torch 2.10 or newer
	rm -rf build/lib* build/wheel dist/*.whl
	$(BIN)/python -m build --no-isolation --wheel --outdir build/wheel
	PATH="$(abspath $(BIN)):$$PATH" auditwheel repair --exclude 'libtorch*' --exclude 'libc10*' --exclude 'libcudart*' -w dist build/wheel/*.whl

# The tests run outside of the source tree, so that they import mae_fast from the wheel.
TORCHES ?= 2.10.0 2.11.0 2.14.1 2.15.0
test-wheel: wheel ## run the ops' tests with the wheel under each torch in TORCHES, in build/torch-*
	rm -rf build/with-wheel && mkdir -p build/with-wheel && cp -r tests pyproject.toml README.md build/with-wheel
	for torch in $(TORCHES); do \
	  $(PYTHON) -m venv --clear build/torch-$$torch && \
	  $(BIN)/uv pip install --python build/torch-$$torch/bin/python torch==$$torch pytest hypothesis dist/*.whl && \
	  (cd build/with-wheel && ../torch-$$torch/bin/python tests/installed.py && \
	   ../torch-$$torch/bin/python -m pytest -q tests/ops tests/test_symbols.py) || exit 1; \
	done

# These targets do not need .venv, and compile nothing: mae_fast/_C.abi3.so must exist.
GPU = $(or $(wildcard $(BIN)/python),$(PYTHON)) -m benchmarks.gpu $(if $(RESULTS),--results $(RESULTS)) $(if $(DRY_RUN),--dry-run)
gpu: ## measure and test on an NVIDIA GPU: the three parts below, 12 minutes; RESULTS=folder for the results
	status=0; for part in kernels baselines parity; do $(MAKE) gpu-$$part || status=$$?; done; exit $$status

gpu-kernels: ## measure our training step, its kernels, attention and ops on a GPU; 150 seconds
	$(GPU) kernels

gpu-baselines: ## compare training steps with torch.compile, transformers and timm on a GPU; 400 seconds
	$(GPU) baselines

gpu-parity: ## run the GPU tests, compute-sanitizer and ncu; 120 seconds
	$(GPU) parity

# Some of these tests take longer than the time limit in pyproject.toml.
NO_LIMIT := -o faulthandler_timeout=0
proof: install ## run all tests of ops and GPU kernels, without a GPU; long
	$(BIN)/python -m pytest -s --exhaustive $(NO_LIMIT) tests/ops tests/gpu_proof

budget: install ## compile the GPU kernels for sm_80 and sm_90, write their resources to tests/gpu_proof/budget.json
	PYTHONPATH=tests $(BIN)/python -m gpu_proof.budget

torture: install ## test kills, signals and file errors in training, 10,000 configurations, all complete runs; long
	$(BIN)/python -m pytest -s $(NO_LIMIT) tests/training/test_torture.py --kills 200 --every-operation
	$(BIN)/python -m pytest $(NO_LIMIT) tests/test_configurations.py --configurations 10000
	$(BIN)/python -m pytest $(NO_LIMIT) --exhaustive -m exhaustive tests/runs tests/training tests/benchmarks tests/test_packaging.py

bench-ops: install ## time each op against eager torch and torch.compile; RESULTS=file for JSON
	OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m benchmarks.ops $(RESULTS)

# The cases of docs/speed.md. Long cases have fewer rounds and baselines.
BENCH := $(BIN)/mae-fast bench --output-dir $(or $(RESULTS),runs/bench)
SWEEP := $(BENCH) --dtypes bf16 --baselines eager transformers timm
bench-model: install ## time steps against the baselines at many sizes; RESULTS=folder, default runs/bench; an hour
	$(BENCH) --tasks train finetune infer reconstruct --dtypes bf16 --batches 16 --rounds 7
	$(SWEEP) --batches 4 --image-sizes 112 160 224 320 448
	$(SWEEP) --batches 8 --mask-ratios 0.25 0.5 0.75 0.9
	$(SWEEP) --batches 1 --rounds 7
	$(SWEEP) --tasks train finetune infer --models large --batches 8 --rounds 3
	$(SWEEP) --tasks infer reconstruct --models huge --batches 4 --rounds 3
	$(BENCH) --dtypes fp32 --batches 16 --rounds 3 --baselines eager timm
	if grep -q amx_bf16 /proc/cpuinfo; then ONEDNN_MAX_CPU_ISA=AVX512_CORE_BF16 $(SWEEP) --batches 16 --rounds 3; fi

bench-data: install ## compare our image loader with others; RESULTS=file for JSON
	$(BIN)/python -m benchmarks.data $(RESULTS)

docs: install ## build the documentation in site/; broken links are errors
	PYTHONPATH=. $(BIN)/mkdocs build --strict

readme-tables: install ## update the tables and plots in README.md and docs from benchmarks/results
	$(BIN)/python -m benchmarks.readme

# Compiles a copy of the package with AddressSanitizer and UndefinedBehaviorSanitizer, and runs the tests of the ops.
SANITIZED := build/sanitized
OP_TESTS := $(patsubst mae_fast/ops/%/op.py,tests/ops/test_%.py,$(wildcard mae_fast/ops/*/op.py))
sanitize: install ## run the tests of the ops with the C++ kernels under ASan and UBSan
	rm -rf $(SANITIZED) && mkdir -p $(SANITIZED) && cp -r mae_fast $(SANITIZED)
	TORCH=$$($(BIN)/python -c 'import torch; print(torch.__path__[0])') && \
	INCLUDE=$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("include"))') && \
	$(CXX) -std=c++20 -O1 -g -Wno-psabi -fPIC -shared -fno-omit-frame-pointer -fsanitize=address,undefined \
	  -fno-sanitize-recover=undefined -isystem $$TORCH/include -isystem $$INCLUDE csrc/module.cpp csrc/cpu/*.cpp \
	  -o $(SANITIZED)/mae_fast/_C.abi3.so -L$$TORCH/lib -lc10 -ltorch_cpu
	LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libubsan.so)" \
	  ASAN_OPTIONS=detect_leaks=0 $(BIN)/python -m pytest -q --exhaustive -o pythonpath='$(SANITIZED) tests' -p no:cacheprovider \
	  $(OP_TESTS) -k 'not opcheck and not compile'

clean: ## remove build products, except .venv
	rm -rf build dist mae_fast/*.so *.egg-info
	rm -f $(VENV)/.compiled
