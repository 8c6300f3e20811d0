# Every target sets up what it needs: a virtual environment in .venv with the pinned CPU build of PyTorch.
PYTHON ?= python3
BIN := .venv/bin
OUT ?= runs/demo
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: setup demo bench test lint check clean

setup: .venv/installed

# PyTorch first, by its exact version: a looser requirement would take a CUDA build of several gigabytes.
.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --constraint constraints.txt torch==2.13.0
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

demo: setup
	OMP_NUM_THREADS=1 $(BIN)/fewstep train sinusoid --iterations 20000 --plan-seconds 60 --no-ablations --out $(OUT)
	OMP_NUM_THREADS=1 $(BIN)/fewstep evaluate $(OUT)
	$(BIN)/fewstep report $(OUT)

# The peers come on top of the pinned PyTorch; none of them may bring another.
bench: setup
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[bench]'
	$(BIN)/fewstep bench speed

test: setup
	$(BIN)/pytest

lint: setup
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/mypy

check: lint test

clean:
	rm -rf .venv dist .mypy_cache .ruff_cache .pytest_cache
