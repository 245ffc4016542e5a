# SPDX-License-Identifier: Apache-2.0
# Two commands do everything on a bare machine with Python and git:
# `make demo` and `make test`. Each keeps a virtual environment of its own,
# built again only when pyproject.toml or requirements.txt change.

# Interpreter for the environments: 3.11, 3.12 or 3.13.
PYTHON ?= python3
# How pip gets torch (tests only). On Linux plain torch may bring gigabytes of
# CUDA: set PIP_EXTRA_INDEX_URL to PyTorch's CPU wheel index, or add the index
# here, e.g. TORCH='torch --index-url ...'.
TORCH ?= torch==2.13.0
# A folder of your own captioned images for `make demo`; empty renders data.
DATA ?=
# Test processes; each compiles on about one core.
WORKERS ?= 2

# The tests compile hundreds of small programs and run each once: with XLA's
# optimisations off they take a quarter of the time. A jaxlib that does not
# know these flags would abort, so they are tried first.
FAST_XLA := --xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true --xla_cpu_use_fusion_emitters=false

DEMO_BIN := .venv/bin
TEST_BIN := .venv-test/bin
PIP_FLAGS := --quiet --disable-pip-version-check
SUPPORTED := import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo demo-pipeline test acceptance lint clean

help:  ## show this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "make %-12s %s\n", $$1, $$2}' Makefile

demo: .venv/.stamp  ## render data, train, sample, score, write a report (DATA=folder: your images)
	$(DEMO_BIN)/python -m qi2_jax.demo $(if $(DATA),--data="$(DATA)")

demo-pipeline: .venv/.stamp  ## the same demo, its data made by the whole offline pipeline
	$(DEMO_BIN)/pip install $(PIP_FLAGS) -e '.[data,synthesis]'
	$(DEMO_BIN)/python -m qi2_jax.demo --pipeline

test: lint  ## style checks and every fast test
	@flags="$(FAST_XLA)"; \
	XLA_FLAGS="$$flags" $(TEST_BIN)/python -c 'import jax; jax.devices()' >/dev/null 2>&1 || flags=; \
	XLA_FLAGS="$$flags" $(TEST_BIN)/python -m pytest -n $(WORKERS) --dist loadfile --durations=15

acceptance: .venv-test/.stamp  ## every slow acceptance check, as one table
	$(TEST_BIN)/python tests/acceptance/run.py

lint: .venv-test/.stamp  ## ruff: rules and formatting
	$(TEST_BIN)/ruff check .
	$(TEST_BIN)/ruff format --check .

clean:  ## remove environments and caches; runs/ is kept
	rm -rf .venv .venv-test build *.egg-info .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -not -path './.git/*' -prune -exec rm -rf {} +

define new_venv
	@$(PYTHON) -c '$(SUPPORTED)' || { echo "$(PYTHON) is not Python 3.11 to 3.13; set PYTHON=python3.12, for example." >&2; exit 1; }
	@echo "installing into $(@D) (a few minutes the first time)"
	$(PYTHON) -m venv $(@D)
endef

.venv/.stamp: pyproject.toml requirements.txt
	$(new_venv)
	.venv/bin/pip install $(PIP_FLAGS) -e .
	@touch $@

# lpips comes alone: it asks for torchvision, which would bring another torch;
# the tests put a stand-in in its place.
.venv-test/.stamp: pyproject.toml requirements.txt
	$(new_venv)
	.venv-test/bin/pip install $(PIP_FLAGS) $(TORCH)
	.venv-test/bin/pip install $(PIP_FLAGS) -e '.[test]'
	.venv-test/bin/pip install $(PIP_FLAGS) --no-deps lpips==0.1.4
	@touch $@
