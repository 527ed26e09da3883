# make help says what there is. Everything is installed into .venv, nothing outside this folder.

# The first Python found that is 3.11 or newer; PYTHON=... picks one.
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
	"$$p" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo "$$p" && break; done)
# Where pip finds torch, if not where it finds everything else,
# e.g. TORCH_INDEX=https://download.pytorch.org/whl/cpu for the small build without CUDA.
TORCH_INDEX ?=

# make demo: a recording (none: one is made up), how to read and train on it, how fast to replay it.
RECORDING ?=
CONFIG ?= configs/demo.toml
SPEED ?= 4
OUT ?= demo-out
DEMO_FLAGS ?=

BIN := .venv/bin
PIP := $(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt
PARTS := pyproject.toml constraints.txt

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help install demo docs test check chaos format clean

help:  ## show this
	@echo "make demo    simulate, train, serve, replay and report; results in $(OUT)/"
	@echo "             RECORDING=file.nwb|.mat CONFIG=configs/your.toml   on your own recording"
	@echo "             SPEED=1|4|max   multiple of real time   OUT=folder   for the results"
	@echo "make test    every check and every test"
	@echo "make check   lint, format, types, layers (no tests)"
	@echo "make docs    the documentation site, in docs/_build/html; warnings are errors"
	@echo "make chaos   the fault tests at full size"
	@echo "make format  put the code into the project's format"
	@echo "make install what the demo needs, into .venv"
	@echo "make clean   remove .venv, caches and builds (not $(OUT)/)"
	@echo "PYTHON=python3.12 picks an interpreter; TORCH_INDEX=URL picks a build of torch."

# torch on its own first: its index may be another one, and it is by far the largest.
.venv/.torch: $(PARTS)
	@test -n "$(PYTHON)" || { echo "error: PYTHON: expected Python 3.11 or newer, got none" >&2; exit 2; }
	@echo "installing into .venv (once; $(PYTHON))"
	@$(PYTHON) -m venv .venv
	@$(PIP) $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) torch
	@touch $@

.venv/.engine: .venv/.torch
	@$(PIP) -q -e '.[engine]'
	@touch $@

.venv/.dev: .venv/.torch
	@$(PIP) -q -e '.[dev]'
	@touch .venv/.engine $@

install: .venv/.engine  ## what the demo needs

demo: .venv/.engine  ## the whole chain
	@$(BIN)/ilqr-vae demo "$(CONFIG)" $(if $(RECORDING),--recording "$(RECORDING)") \
		--out "$(OUT)" --speed "$(SPEED)" $(DEMO_FLAGS)

check: .venv/.dev  ## lint, format, types, layers
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/basedpyright
	$(BIN)/lint-imports

test: check  ## every check and every test
	$(BIN)/pytest

docs: .venv/.dev  ## the documentation site
	$(BIN)/python -m sphinx -q -W --keep-going -b html docs docs/_build/html
	@echo "wrote docs/_build/html/index.html"

chaos: .venv/.dev  ## every fault at full size
	CHAOS=full $(BIN)/pytest -m chaos --timeout 3600

format: .venv/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf docs/_build .venv .pytest_cache .ruff_cache .hypothesis .import_linter_cache build dist
	find src training service clients tests -name __pycache__ -type d -prune -exec rm -rf {} +
