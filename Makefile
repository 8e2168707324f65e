# Needs make and Python 3.11, 3.12 or 3.13; everything else is set up on the first call.
.DEFAULT_GOAL := help
SHELL := bash
.DELETE_ON_ERROR:
.PHONY: help generate test lint check-types pytest smoke format clean

PYTHON ?=
PROMPT ?= def quicksort(items):
WORKERS ?= 2
export PROMPT
export PIP_DISABLE_PIP_VERSION_CHECK := 1
export PYRIGHT_PYTHON_IGNORE_WARNINGS := 1

bin := .venv/bin
pip := $(bin)/python -m pip -qq
suits := import ensurepip, sys, venv; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))

help:  ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

generate: .venv/.runtime  ## Continue PROMPT="def quicksort(items):" with the embedded model
	@$(bin)/jaxserve generate --seed 5 "$$PROMPT"

test: lint check-types pytest  ## Everything: lint, types, tests

lint: .venv/.dev  ## Check style and format with ruff
	@$(bin)/ruff check .
	@$(bin)/ruff format --check .

check-types: .venv/.dev  ## Check types with pyright
	@$(bin)/pyright

pytest: .venv/.dev  ## Run the tests in WORKERS=2 processes (ARGS="-m 'not slow'" picks some)
	@$(bin)/pytest -n $(WORKERS) --dist loadgroup $(ARGS)

smoke: .venv/.dev  ## See whether what was made fast still is, by ratios within one run (a minute)
	@$(bin)/python -m benchmarks.smoke

format: .venv/.dev  ## Format, and mend what ruff can mend
	@$(bin)/ruff check --fix .
	@$(bin)/ruff format .

clean:  ## Remove .venv, caches and build outputs
	@rm -rf .venv .cache .hypothesis .pytest_cache .ruff_cache build dist *.egg-info
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Two stamps: `generate` installs no development tools.
.venv/.dev: .venv/.runtime
	@echo "Installing the development tools into .venv"
	@$(pip) install --group dev --constraint constraints.txt
	@touch $@

.venv/.runtime: pyproject.toml constraints.txt | .venv/.python
	@echo "Installing jaxserve and what it needs into .venv (a few hundred megabytes, a minute or two, once)"
	@$(pip) install --editable . --constraint constraints.txt
	@touch $@

# An interpreter on PATH may be a shim that fails, too old, or without venv: each is tried before it is chosen.
.venv/.python:
	@$(bin)/python -c 'import pip; $(suits)' 2>/dev/null || { \
	  IFS=$$'\n'; \
	  for python in $$(type -aP $(or $(PYTHON),python3.12 python3.13 python3 python3.11)); do \
	    if "$$python" -c '$(suits)' 2>/dev/null; then \
	      echo "Creating .venv with $$python"; \
	      "$$python" -m venv --clear .venv; exit; \
	    fi; \
	  done; \
	  echo "No working Python 3.11, 3.12 or 3.13 with the venv module found. Name one: make PYTHON=/path/to/python3.12" >&2; \
	  exit 1; }
	@$(pip) install --upgrade 'pip>=25.1'  # the first with dependency groups
	@touch $@
