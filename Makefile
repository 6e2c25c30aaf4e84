# Every target first makes .venv with plain pip where it is missing: nothing is assumed but Python >= 3.11 and make.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: demo test check bench docs clean

$(STAMP): pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $@

demo: $(STAMP)
	$(BIN)/gigaxt demo

# Two processes of one thread: on small tensors PyTorch's own threads gain little.
test: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(STAMP)
	PYTHON=$(BIN)/python benchmarks/cpu.sh

docs: $(STAMP)
	$(BIN)/pdoc --docformat google --output-directory docs/site gigaxt

clean:
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache
