# One command each. `make help` lists them.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
# Test processes: compiling kernels takes most of the time, one core each.
JOBS   ?= 2

.DEFAULT_GOAL := help
.PHONY: help env compare test lint format types bench panel bench-check gpu-check gpu-cubins clean

help:  ## list the commands
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

$(STAMP): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' \
	  || { echo "fastconv needs Python >= 3.10; name one with: make PYTHON=python3.12 ..."; exit 1; }
	@echo "Setting up $(VENV) (a few minutes the first time) ..."
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[dev,report]" \
	  --config-settings editable_mode=compat
	@touch $@

env: $(STAMP)  ## make .venv with everything that the other commands need

compare: $(STAMP)  ## time every convolution algorithm against PyTorch on real layers (ARGS="--network vgg16 ...")
	@$(BIN)/python -m fastconv compare $(ARGS)

test: $(STAMP)  ## run the tests (ARGS="-k pool ...")
	$(BIN)/python -m pytest -n $(JOBS) -q $(ARGS)

lint: $(STAMP)  ## check style
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(STAMP)  ## mend style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types: $(STAMP)  ## check types
	$(BIN)/mypy

bench: $(STAMP)  ## run the pytest-benchmark suites (ARGS="-k mnist ...")
	$(BIN)/python -m pytest benchmarks -p benchmark --benchmark-group-by=group \
	  --benchmark-columns=min,median,iqr,rounds $(ARGS)

panel: $(STAMP)  ## time the panel of layers against PyTorch; goes on where it stopped (ARGS="--minutes 5")
	$(BIN)/python -m benchmarks.panel $(ARGS)

bench-check: $(STAMP)  ## name what got slower against PyTorch than the committed results say (ARGS="--all")
	@$(BIN)/python -m benchmarks.panel --check $(ARGS)

gpu-check:  ## on a GPU, with the python3 that is there: tests, sanitizer and benchmark (ARGS="--minutes 5")
	@$(PYTHON) -m benchmarks.gpu_check $(ARGS)

gpu-cubins: $(STAMP)  ## without one: compile what gpu-check launches, to take along in .cubins
	@$(BIN)/python -m benchmarks.gpu_check --prebuild --minutes 60 $(ARGS)

clean:  ## remove caches and the environment
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
