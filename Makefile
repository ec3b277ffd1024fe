# `make demo` and `make test` set up what they need themselves. Nothing is installed outside this folder.
#   make demo     sets up .venv and has the bundled model complete a prompt
#   make test     lint, types and the fast tests
#   make check    lint and types only
#   make slow     the tests marked slow
#   make compat   the core tests on the oldest supported jax, in .venv-oldest (Python 3.11 to 3.13)
#   make system   Debian's chromium and promtool, for the tests that look at the page and the alert rules (needs root)
#   make bench    the offline benchmark, one JSON line
#   make clean    removes both environments and what was built
# PYTHON names the interpreter that makes the environments: make test PYTHON=python3.12

PYTHON ?= python3
OLDEST_JAX := 0.7.0
PACKAGES := engine backends kernels models server bench

VENV := .venv
OLDEST := .venv-oldest
BIN := $(VENV)/bin
# A stamp per set of dependencies, touched once they are installed; pyproject.toml says what they are.
# What the CPU kernels are built from when the package is installed; without a C++ compiler it is installed without them.
NATIVE := setup.py $(wildcard kernels/*/*.cc kernels/*/*.h)
RUN_READY := $(VENV)/.ready-to-run
TEST_READY := $(VENV)/.ready-to-test
OLDEST_READY := $(OLDEST)/.ready-to-test

.PHONY: help demo test check lint types slow compat system bench clean
.DELETE_ON_ERROR:

help:
	@sed -n 's/^#   //p' Makefile

# Runs before an environment is made, so that too old a Python is told about by name and not by pip.
define make_environment
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "quire needs Python 3.11 or newer and $(PYTHON) is not one;" \
		"name one that is: make $(MAKECMDGOALS) PYTHON=python3.12"; exit 1; } >&2
	@echo "installing into $(@D), which takes a few minutes the first time"
	@$(PYTHON) -m venv $(@D)
endef

$(RUN_READY): pyproject.toml $(NATIVE)
	$(make_environment)
	@$(BIN)/python -m pip install --quiet --editable .
	@touch $@

$(TEST_READY): pyproject.toml $(NATIVE)
	$(make_environment)
	@$(BIN)/python -m pip install --quiet --editable '.[test,dev,train]'
	@touch $@ $(RUN_READY)

# Without torch, which is only the oracle of tests/models.
$(OLDEST_READY): pyproject.toml $(NATIVE)
	$(make_environment)
	@$(OLDEST)/bin/python -m pip install --quiet --editable . jax==$(OLDEST_JAX) jaxlib==$(OLDEST_JAX) \
		pytest pytest-xdist hypothesis scipy
	@touch $@

demo: $(RUN_READY)
	$(BIN)/quire generate --max-tokens 64 --prompt "def fibonacci(n):"

test: check
	$(BIN)/pytest -n 2 --dist worksteal -m "not slow"

slow: $(TEST_READY)
	$(BIN)/pytest -n 2 -m slow

compat: $(OLDEST_READY)
	$(OLDEST)/bin/pytest -n 2 -m "not slow" tests/kernels tests/engine tests/backends

# Without them those tests are skipped, and say so.
system:
	apt-get update -qq
	DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends chromium chromium-driver prometheus

check: lint types

lint: $(TEST_READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# mypy follows folders and not an editable install's import hook, so it is shown the packages under their installed names.
types: $(TEST_READY)
	@mkdir -p build/types/quire
	@for package in $(PACKAGES); do ln -sfn "../../../$$package" "build/types/quire/$$package"; done
	$(BIN)/mypy $(PACKAGES:%=--package quire.%)

bench: $(RUN_READY)
	$(BIN)/quire bench offline

clean:
	rm -rf $(VENV) $(OLDEST) build .mypy_cache .ruff_cache .pytest_cache
