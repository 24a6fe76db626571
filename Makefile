# `make demo` and `make test` work on a fresh clone: the first call makes .venv and installs the pinned versions.

PYTHON ?= $(firstword $(foreach python,python3 python3.11 python3.12 python3.13 python3.14,$(shell \
	$(python) -c 'import sys; sys.version_info >= (3, 11) and print(sys.executable)' 2>/dev/null)))
BIN := .venv/bin

.PHONY: demo test format

demo: .venv/package
	$(BIN)/intaglio demo

# One thread a worker: two workers with two threads each would fight for two cores.
test: .venv/developing
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2

format: .venv/developing
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

.venv/package: pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "intaglio needs Python 3.11 or newer: install it, or make PYTHON=/path/to/python3.11"; exit 1; }
	@"$(PYTHON)" -c 'import sys; sys.version_info >= (3, 11) or sys.exit("intaglio needs Python 3.11 or newer; $(PYTHON) is " + sys.version.split()[0])'
	"$(PYTHON)" -m venv .venv
	$(BIN)/pip install --disable-pip-version-check --quiet --constraint constraints.txt --editable .
	@touch $@

.venv/developing: .venv/package
	$(BIN)/pip install --disable-pip-version-check --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $@
