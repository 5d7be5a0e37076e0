# Everything runs in .venv, which the first target to need it creates. PYTHON=... names another one.

PYTHON ?= $(firstword $(foreach name,python3 python3.14 python3.13 python3.12 python3.11 python3.10 python,\
            $(if $(shell $(name) -c $(AT_LEAST_310) 2>/dev/null && echo yes),$(name))))
AT_LEAST_310 := 'import sys; sys.exit(sys.version_info < (3, 10))'
VENV := .venv
BIN := $(VENV)/bin
PIP_INSTALL := $(BIN)/python -m pip install --disable-pip-version-check --constraint constraints.txt
WORKERS ?= 2
DEVICE ?= fake
# One thread each: small matrices gain little from a second one, and threads of several processes
# that wait for each other on the same cores lose a lot. Each worker has half of the suite, in its
# order, so that a fixture of a file is made once, and helps the other at the end.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal

.DEFAULT_GOAL := help
.PHONY: help demo test test-device test-slow test-matrix lint reference format bench bench-scaling bench-clip clean

help: ## Lists the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-13s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: $(VENV)/.demo ## Trains a small GPT under gradwatch in a minute or less, with one poisoned batch
	OMP_NUM_THREADS=1 $(BIN)/python examples/plain_loop.py --logdir runs/plain_loop --poison-step 150
	@echo "Then read the loop that you ran, examples/plain_loop.py, and try it without the clip:"
	@echo "$(BIN)/python examples/plain_loop.py --clip 0"

# A process has one accelerator for good, so each stand-in has a session of its own.
test: $(VENV)/.dev $(VENV)/.browser ## Runs the tests, also on stand-in devices, all but the slow ones
	$(PYTEST) -m "not slow"
	$(PYTEST) -m "not slow" --device=fake
	$(PYTEST) -m "not slow" --device=mini

# DEVICE=mini is the one in C++; DEVICE=cuda, or another that torch has, a real one.
test-device: $(VENV)/.dev ## Runs the tests on a stand-in for an accelerator
	$(PYTEST) -m "not slow" --device=$(DEVICE)

test-slow: $(VENV)/.dev $(VENV)/.browser ## Runs the slow tests
	$(PYTEST) -m slow
	$(PYTEST) -m slow --device=fake
	$(PYTEST) -m slow --device=mini

# ROWS="oldest newest" picks some of tests/matrix/rows.cfg.
test-matrix: | $(VENV)/.created ## Runs the tests with the oldest and the newest versions, where their Python is found
	$(BIN)/python tests/matrix/run.py --workers $(WORKERS) $(ROWS)

lint: $(VENV)/.dev ## Checks style, types and the direction of imports
	$(BIN)/ruff check
	$(BIN)/ruff check --preview --select PLW1514 # a file has an encoding, whatever the locale
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports

reference: $(VENV)/.dev ## Writes docs/reference.md from the lists that the code declares
	$(BIN)/python docs/reference.py

format: $(VENV)/.dev ## Rewrites the files as `make lint` wants them
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

bench: $(VENV)/.bench ## Measures what gradwatch and others add to a training step (25 minutes)
	$(BIN)/python -m benchmarks.overhead

bench-scaling: $(VENV)/.dev ## Measures how that grows with parameters, steps and ranks (6 minutes)
	$(BIN)/python -m benchmarks.scaling

bench-clip: $(VENV)/.dev ## Trains through gradient spikes with every clipping policy (some 10 minutes)
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.spikes --jobs $(WORKERS)

clean: ## Removes the environment and everything that was generated
	rm -rf $(VENV) .matrix build dist .mypy_cache .pytest_cache .ruff_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The stamps below say what .venv holds, so that a second call installs nothing.
$(VENV)/.created:
	@test -n "$(PYTHON)" || { echo "gradwatch needs Python 3.10 or newer, and found none on the PATH." \
	  "Install it from your package manager or python.org, or name one: make PYTHON=/path/to/python3 ..." >&2; exit 1; }
	@$(PYTHON) -c $(AT_LEAST_310) || { echo "gradwatch needs Python 3.10 or newer, but $(PYTHON) is" \
	  "$$($(PYTHON) --version 2>&1)." >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/.demo: pyproject.toml constraints.txt | $(VENV)/.created
	@echo "Setting up $(VENV) (a few minutes the first time: PyTorch is large) ..."
	$(PIP_INSTALL) --editable '.[tensorboard]' tqdm
	@touch $@

$(VENV)/.bench: pyproject.toml constraints.txt | $(VENV)/.dev
	$(PIP_INSTALL) --editable '.[bench]' || echo "Some peers could not be installed; the page names them."
	@touch $@

# The tests of the TensorBoard tab drive Chromium; where there is none they are skipped, and say so.
$(VENV)/.browser: | $(VENV)/.created
	@command -v chromium || command -v chromium-browser || command -v google-chrome || \
	  { test "$$(id -u)" = 0 && command -v apt-get >/dev/null && echo "Installing Chromium ..." && \
	    apt-get -qq update && apt-get -qq install --yes --no-install-recommends chromium >/dev/null; } || \
	  echo "There is no Chromium, so the tests of the TensorBoard tab will be skipped: install chromium."
	@touch $@

$(VENV)/.dev: pyproject.toml constraints.txt | $(VENV)/.created
	@echo "Setting up $(VENV) (a few minutes the first time: PyTorch is large) ..."
	$(PIP_INSTALL) --editable '.[dev]'
	@touch $@ $(VENV)/.demo
