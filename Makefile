# make demo     set up, train a VQ-VAE on real photographs, show what came out
# make test     set up, pass the tests (a CPU is enough)
# make lint     ruff, mypy, clang-format
# make bench    the measurements behind the README's numbers (CPU); benchmarks/gpu.sh does the same on a GPU

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: demo test lint bench clean

# one stamp a set of extras: the second run starts at once, a changed requirement installs again
$(VENV)/.ready-%: pyproject.toml setup.py constraints.txt
	@test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV)
	@echo "setting up $(VENV) for $*: a minute or two the first time"
	@$(PIP) --editable '.[$*]'
	@touch $@

demo: $(VENV)/.ready-demo
	$(BIN)/vqkernels demo

test: $(VENV)/.ready-test
	$(BIN)/python -m pytest -n auto --dist loadfile

lint: $(VENV)/.ready-lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $$(find csrc tests/host_cuda -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh')

bench: $(VENV)/.ready-bench
	PATH="$(abspath $(BIN)):$$PATH" bash benchmarks/run_cpu.sh

clean:
	rm -rf build dist *.egg-info runs $(VENV)
