# One environment for all clones, keyed by the pins and the Python version; this project itself is not
# installed into it: every target runs from here with PYTHONPATH.
PYTHON ?= python3.11
ifndef VENV
VENV := $(shell PYTHON=$(PYTHON) tools/make_venv.sh --print)
endif
PY := $(VENV)/bin/python

SOURCES = anchortp_sglang tests tools setup.py
TESTS = $(wildcard tests/unit tests/engine tests/chaos tests/fleet tests/kits)

export PYTHONPATH := $(CURDIR)
export PYTHONUNBUFFERED = 1

.DEFAULT_GOAL := help
.PHONY: help venv print-python lint format test test-gpu demo clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-13s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

venv: ## build the environment (11 GB, some minutes, once)
	@PYTHON=$(PYTHON) tools/make_venv.sh "$(VENV)"

print-python: ## print the environment's interpreter, build nothing
	@echo $(PY)

lint: venv ## ruff, mypy, import-linter
	$(PY) -m ruff check $(SOURCES)
	$(PY) -m ruff format --check $(SOURCES)
	$(PY) -m mypy
	$(VENV)/bin/lint-imports --no-cache

format: venv ## let ruff mend what it can
	$(PY) -m ruff check --fix $(SOURCES)
	$(PY) -m ruff format $(SOURCES)

test: lint ## lint, then every test that needs no GPU
	$(PY) -m pytest $(TESTS)

test-gpu: venv ## the tests that need a GPU, and the contracts on it
	$(PY) -m pytest -m gpu -s tests/gpu tests/unit/platforms/test_contract.py tests/unit/memory/test_arena_contract.py tests/unit/platforms/test_mover_contract.py

demo: venv ## a live server loses a device under load, and its clients only see a pause
	$(PY) -m anchortp_sglang.bench.demo

clean: ## remove caches and build products (not the environment)
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find $(SOURCES) -name __pycache__ -type d -prune -exec rm -rf {} +
