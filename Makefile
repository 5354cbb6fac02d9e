# make demo and make test work on a fresh machine: python3 with venv, make and a C compiler.
.DEFAULT_GOAL := help
SHELL := /bin/bash

PYTHON ?= python3
BIN := .venv/bin
# uv does not read pip's settings: hand on where pip is told to find wheels (a CPU build of
# torch, say). Empty where pip has no such setting.
export UV_FIND_LINKS ?= $(or $(PIP_FIND_LINKS),$(shell $(PYTHON) -m pip config get global.find-links 2>/dev/null))
# Tests run in processes of one thread each; more threads than cores is a cliff (OpenMP spins).
JOBS ?= $(shell $(PYTHON) -c "import os; print(min(4, len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()))")

.PHONY: help setup demo test check-zoo test-triton test-emit check lint types format bench bench-light fuzz schema validation step-fit bench-train-step clean

help: ## show this list
	@grep -hE '^[a-z-]+:.*?## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

setup: .venv.stamp ## make .venv with everything in it

.venv.stamp: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet uv
	$(BIN)/uv pip install --quiet --python $(BIN)/python -c constraints.txt -e '.[dev]' \
	  || $(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	touch .venv.stamp

demo: .venv.stamp ## the whole loop on this machine, at most 4 minutes
	$(BIN)/isoflop demo -o demo-out

test: .venv.stamp ## all tests that fit in minutes
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(JOBS) --dist loadfile

check-zoo: .venv.stamp ## every named model against its built module, about a minute
	OMP_NUM_THREADS=1 $(BIN)/isoflop check --zoo

test-triton: .venv.stamp ## our kernels in Triton's interpreter (installs Triton: 286 MB, 1 GB unpacked)
	$(BIN)/uv pip install --quiet --python $(BIN)/python -c constraints.txt -e '.[dev,triton]' \
	  || $(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev,triton]'
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q tests/test_attention_triton.py

# Pinned: emitted text is for these versions. torchao turns linear maps to 8 bits.
PEERS := megatron-core==0.16.1 torchtitan==0.3.0 torchao triton

test-emit: ## emitted plans read by Megatron-Core and torchtitan (in .venv-emit: 2.6 GB)
	$(PYTHON) -m venv .venv-emit
	.venv-emit/bin/python -m pip install --quiet uv
	.venv-emit/bin/uv pip install --quiet --python .venv-emit/bin/python -c constraints.txt -e '.[dev]' $(PEERS) \
	  || .venv-emit/bin/python -m pip install --quiet -c constraints.txt -e '.[dev]' $(PEERS)
	OMP_NUM_THREADS=1 .venv-emit/bin/python -m pytest -q tests/test_emit_peers.py

check: lint types test ## ruff, mypy --strict and the tests

lint: .venv.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: .venv.stamp
	$(BIN)/mypy

format: .venv.stamp ## let ruff mend what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

schema: .venv.stamp ## write docs/schema.json anew
	$(BIN)/isoflop schema > docs/schema.json

bench: .venv.stamp ## predicted against measured step time and memory at six shapes
	$(BIN)/python benchmarks/step_time_cpu.py -o benchmarks

validation: .venv.stamp ## write docs/validation.md anew; TABLES=FOLDER adds larger tables
	$(BIN)/python benchmarks/validation_page.py $(TABLES) -o docs/validation.md

bench-light: .venv.stamp ## a cold `isoflop count`, and parameter trees per second
	$(BIN)/python benchmarks/light.py -o benchmarks

bench-train-step: .venv-bench.stamp ## a training step against transformers, litgpt and x-transformers
	OMP_NUM_THREADS=2 .venv-bench/bin/python benchmarks/train_step_cpu.py --threads 1 2 --compile \
	  -o benchmarks/train_step_cpu.md

# litgpt asks for an older huggingface-hub than transformers does, and needs neither here.
.venv-bench.stamp: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv-bench
	.venv-bench/bin/python -m pip install --quiet -c constraints.txt -e '.[train]' \
	  transformers==5.23.0 x-transformers==2.31.10 lightning==2.6.6 jsonargparse==4.53.0 psutil
	.venv-bench/bin/python -m pip install --quiet --no-deps litgpt==0.5.13
	touch .venv-bench.stamp

fuzz: .venv.stamp ## 15 minutes: examples drawn anew, and 10,000 malformed inputs of each kind
	OMP_NUM_THREADS=1 ISOFLOP_MALFORMED=10000 $(BIN)/python -m pytest -q tests/test_malformed.py
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(JOBS) --dist loadfile -m hypothesis --hypothesis-profile new

clean: ## remove what make made
	rm -rf .venv .venv.stamp .venv-emit .venv-bench .venv-bench.stamp demo-out

step-fit: .venv.stamp ## refit the step-time model: make step-fit ROWS=steps.csv
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/step_fit.py $(ROWS) --write
