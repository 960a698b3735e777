# Everything here sets itself up: Python 3.11 or newer is enough, no GPU and nothing installed beforehand.
#
# torch is installed first and by itself, so that the machine's own choice of build is kept. On Linux the plain name
# brings CUDA with it; on a machine without a GPU the CPU build is much smaller:
#   make demo TORCH="torch --index-url https://download.pytorch.org/whl/cpu"

TORCH  ?= torch==2.13.0
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11 python; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
JOBS   ?= 2
BIN    := .venv/bin
PIP    := $(BIN)/python -m pip --disable-pip-version-check --quiet

.PHONY: help demo test test-clients docs check format clean

help:  ## show this list
	@grep -E '^[a-z-]+:.*##' Makefile | sed -E 's/:.*## /\t/' | expand -t 16

demo: .venv/demo.stamp  ## quantize the packaged model five ways, export one, reload it, write a sentence
	@echo "Set-up is finished; the demo itself starts here."
	@bash -c 'time $(BIN)/python examples/demo.py'

test: .venv/dev.stamp  ## run the test suite (JOBS=N processes)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(JOBS) --dist worksteal -m "not client" $(ARGS)

test-clients: .venv/dev.stamp  ## run the tests of real clients (CLIENTS="vllm mlx …", WITHIN=seconds to make them; they are kept)
	$(BIN)/python scripts/clients.py $(CLIENTS) $(if $(WITHIN),--within $(WITHIN)) -- env OMP_NUM_THREADS=1 \
		$(BIN)/python -m pytest -q -n $(JOBS) --dist loadfile -m client $(ARGS)

docs: .venv/dev.stamp  ## regenerate the tables in docs/ that are made from the sources
	$(BIN)/python scripts/formats_table.py --write

check: .venv/dev.stamp  ## lint, format, types, import rules: what CI runs before the tests
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q tests/test_imports.py

format: .venv/dev.stamp  ## rewrite the sources in the house format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:  ## remove the environment and every cache
	rm -rf .venv build dist .pytest_cache .mypy_cache .ruff_cache

.venv/demo.stamp: pyproject.toml
	@test -n "$(PYTHON)" || { echo "lowbit needs Python 3.11 or newer: install it, or name it with PYTHON=path"; exit 1; }
	@echo "Setting up .venv with $$($(PYTHON) --version); this takes some minutes the first time."
	@test -x $(BIN)/pip || $(PYTHON) -m venv .venv
	$(PIP) install $(TORCH)
	$(PIP) install -e ".[export]"
	@touch $@

.venv/dev.stamp: .venv/demo.stamp
	$(PIP) install -e ".[dev]"
	@touch $@
