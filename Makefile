# Two commands matter: `make demo` and `make test`. Both set up everything they need in .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
export OMP_NUM_THREADS ?= 2
export TOKENIZERS_PARALLELISM := false
export HF_HUB_DISABLE_TELEMETRY := 1

.PHONY: demo test test-all lint docs clean

demo: $(VENV)/.done  ## pretrain a small ViT, adapt it from six starts, write demo-out/index.html (under 3 minutes)
	$(BIN)/python examples/digits.py --output demo-out

test: $(VENV)/.done  ## the fast tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2

test-all: $(VENV)/.done  ## every test, the slow ones too
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -m "slow or not slow"

lint: $(VENV)/.done  ## format, lint, types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright --pythonpath $(BIN)/python

docs: .venv-docs/.done  ## the site, strictly: site/index.html; an environment of its own, without torch
	NO_MKDOCS_2_WARNING=1 .venv-docs/bin/mkdocs build --strict --quiet --clean

.venv-docs/.done: docs/requirements.txt
	$(PYTHON) -m venv .venv-docs
	.venv-docs/bin/python -m pip install --quiet --disable-pip-version-check -r docs/requirements.txt
	@touch $@

# torch first and alone: the pinned version, before anything else can ask for a newer one
$(VENV)/.done: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 10), "lorainit needs Python 3.10 or newer: make PYTHON=..."'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $$(grep '^torch==' constraints.txt)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

clean:
	rm -rf $(VENV) .venv-docs demo-out runs site
