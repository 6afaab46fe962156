# Every target creates .venv when it is missing and reuses it otherwise.
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip install -c constraints.txt
CXXFLAGS ?= -Werror
export CXXFLAGS
CSRC = $(shell find csrc -name '*.cpp' -o -name '*.cu' -o -name '*.h')

.DEFAULT_GOAL := help
.PHONY: help install test check format demo study demo-transfer build gpu gpu-kernels gpu-baselines gpu-parity proof budget torture bench-ops bench-model bench-data docs readme-tables sanitize clean

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 16

$(BIN)/python:
	$(PYTHON) -m venv .venv

.venv/.installed: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) torch torchvision setuptools ninja
	$(PIP) --no-build-isolation -e '.[dev]'
	touch $@

.venv/.compiled: .venv/.installed setup.py $(CSRC)
	$(BIN)/python setup.py --quiet build_ext --inplace
	touch $@

install: .venv/.compiled ## create .venv with mae_fast (editable) and its tools; compile what changed in csrc

# A file's tests share a process, so that what they share is made once; waiting threads leave the cores to the others.
test: install ## run the tests, on each core some
	OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m pytest -n $$(nproc) --maxprocesses 4 --dist loadfile

check: install ## lint, formatting, types, layers
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/clang-format --dry-run --Werror $(CSRC)

format: install ## rewrite the sources in the house format
	$(BIN)/ruff check --fix
	$(BIN)/ruff format
	$(BIN)/clang-format -i $(CSRC)

demo: install ## Fashion-MNIST, pre-training, reconstructions, fine-tuning with and without it, in runs/demo; 5 minutes
	$(BIN)/mae-fast demo runs/demo

study: install ## MAE on Fashion-MNIST: against random weights, ablations, shorter training, in runs/study; about an hour
	$(BIN)/mae-fast study runs/study

demo-transfer: install ## what it is worth to segmentation and detection of the same maps, 3 seeds, in runs/demo-transfer
	$(BIN)/mae-fast demo-transfer runs/demo-transfer

build: install ## write an sdist and a wheel to dist/
	$(BIN)/python -m build --no-isolation

# They need no .venv and build nothing: the compiled extension, mae_fast/_C.abi3.so, has to be there.
GPU = $(or $(wildcard $(BIN)/python),$(PYTHON)) -m benchmarks.gpu $(if $(RESULTS),--results $(RESULTS)) $(if $(DRY_RUN),--dry-run)
gpu: ## measure and test on an NVIDIA GPU, the three parts below in turn, 12 minutes; into the folder RESULTS
	status=0; for part in kernels baselines parity; do $(MAKE) gpu-$$part || status=$$?; done; exit $$status

gpu-kernels: ## the training step by kernel, attention, ops, products; 150 seconds
	$(GPU) kernels

gpu-baselines: ## training steps beside torch.compile, transformers and timm; 400 seconds
	$(GPU) baselines

gpu-parity: ## tests on the GPU, compute-sanitizer, ncu; 120 seconds
	$(GPU) parity

# One test of these may take longer than pytest lets a test take (pyproject.toml).
NO_LIMIT := -o faulthandler_timeout=0
proof: install ## what is claimed of the GPU kernels, shown without a GPU, every case of it with its tables; long
	$(BIN)/python -m pytest -s --exhaustive $(NO_LIMIT) tests/ops tests/gpu_proof

budget: install ## compile the GPU kernels for sm_80 and sm_90, write what they take to tests/gpu_proof/budget.json
	PYTHONPATH=tests $(BIN)/python -m gpu_proof.budget

torture: install ## kill training 200 times, signal its group 100 times, fail at every operation on a file, 10,000 configurations, all whole runs; long
	$(BIN)/python -m pytest -s $(NO_LIMIT) tests/training/test_torture.py --kills 200 --every-operation
	$(BIN)/python -m pytest $(NO_LIMIT) tests/test_configurations.py --configurations 10000
	$(BIN)/python -m pytest $(NO_LIMIT) --exhaustive -m exhaustive tests/runs tests/training tests/benchmarks tests/test_packaging.py

bench-ops: install ## eager, torch.compile and mae_fast side by side, per op
	OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m benchmarks.ops $(RESULTS)

# What docs/speed.md tells of; long cases have few rounds and leave out who would only repeat what shorter ones say.
BENCH := $(BIN)/mae-fast bench --output-dir $(or $(RESULTS),runs/bench)
SWEEP := $(BENCH) --dtypes bf16 --baselines eager transformers timm
bench-model: install ## steps of mae_fast and its baselines, how cost grows; into the folder RESULTS or runs/bench; an hour
	$(BENCH) --tasks train finetune infer reconstruct --dtypes bf16 --batches 16 --rounds 7
	$(SWEEP) --batches 4 --image-sizes 112 160 224 320 448
	$(SWEEP) --batches 8 --mask-ratios 0.25 0.5 0.75 0.9
	$(SWEEP) --batches 1 --rounds 7
	$(SWEEP) --tasks train finetune infer --models large --batches 8 --rounds 3
	$(SWEEP) --tasks infer reconstruct --models huge --batches 4 --rounds 3
	$(BENCH) --dtypes fp32 --batches 16 --rounds 3 --baselines eager timm
	if grep -q amx_bf16 /proc/cpuinfo; then ONEDNN_MAX_CPU_ISA=AVX512_CORE_BF16 $(SWEEP) --batches 16 --rounds 3; fi

bench-data: install ## loaders of augmented images, ours and others, interleaved
	$(BIN)/python -m benchmarks.data $(RESULTS)

docs: install ## build the documentation in site/, offline; a broken link is an error
	PYTHONPATH=. $(BIN)/mkdocs build --strict

readme-tables: install ## write the tables of measurements in README.md and docs anew, from benchmarks/results
	$(BIN)/python -m benchmarks.readme

# A copy of the package with its C++ under AddressSanitizer and UndefinedBehaviorSanitizer; the ops' tests run on it.
SANITIZED := build/sanitized
OP_TESTS := $(patsubst mae_fast/ops/%/op.py,tests/ops/test_%.py,$(wildcard mae_fast/ops/*/op.py))
sanitize: install ## run the ops' tests with the C++ kernels under ASan and UBSan
	rm -rf $(SANITIZED) && mkdir -p $(SANITIZED) && cp -r mae_fast $(SANITIZED)
	TORCH=$$($(BIN)/python -c 'import torch; print(torch.__path__[0])') && \
	INCLUDE=$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("include"))') && \
	$(CXX) -std=c++20 -O1 -g -Wno-psabi -fPIC -shared -fno-omit-frame-pointer -fsanitize=address,undefined \
	  -fno-sanitize-recover=undefined -isystem $$TORCH/include -isystem $$INCLUDE csrc/module.cpp csrc/cpu/*.cpp \
	  -o $(SANITIZED)/mae_fast/_C.abi3.so -L$$TORCH/lib -lc10 -ltorch_cpu
	LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libubsan.so)" \
	  ASAN_OPTIONS=detect_leaks=0 $(BIN)/python -m pytest -q --exhaustive -o pythonpath='$(SANITIZED) tests' -p no:cacheprovider \
	  $(OP_TESTS) -k 'not opcheck and not compile'

clean: ## remove build products, keep .venv
	rm -rf build dist mae_fast/*.so *.egg-info
	rm -f .venv/.compiled
