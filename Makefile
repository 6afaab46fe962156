# Every target creates .venv when it is missing and reuses it otherwise.
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip install -c constraints.txt
CXXFLAGS ?= -Werror
export CXXFLAGS
CSRC = $(shell find csrc -name '*.cpp' -o -name '*.cu' -o -name '*.h')

.DEFAULT_GOAL := help
.PHONY: help install test check format demo build bench-ops clean

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

test: install ## run the tests
	$(BIN)/python -m pytest

check: install ## lint, formatting, types
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(CSRC)

format: install ## rewrite the sources in the house format
	$(BIN)/ruff check --fix
	$(BIN)/ruff format
	$(BIN)/clang-format -i $(CSRC)

demo: install ## satellite tiles, pre-training, reconstructions and a probe in runs/demo
	$(BIN)/mae-fast demo runs/demo

build: install ## write an sdist and a wheel to dist/
	$(BIN)/python -m build --no-isolation

bench-ops: install ## eager, torch.compile and mae_fast side by side, per op
	OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m benchmarks.ops $(RESULTS)

clean: ## remove build products, keep .venv
	rm -rf build dist mae_fast/*.so *.egg-info
	rm -f .venv/.compiled
