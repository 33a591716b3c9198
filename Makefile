# Local name = CI step. Every target sets up what it needs from nothing but a Python >= 3.11 on PATH.

ifeq ($(origin PYTHON),undefined)
PYTHON := $(shell for python in python3.11 python3.12 python3.13 python3 python; do \
	"$$python" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && { echo "$$python"; break; }; \
	done)
endif
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
READY := $(VENV)/.ready
PIP := $(BIN)/python -m pip --disable-pip-version-check --no-input

SOURCES := $(wildcard proto/promoe compute_node expert_store predictor_service tests)
# What decides on the engine thread is compiled where there is a C compiler; setup.py says how.
COMPILED := $(shell cat compute_node/compiled_modules.txt)
PROTOS := $(wildcard proto/promoe/v1/*.proto)
GENERATED := .cache/generated
# The schemas of released versions: none of them may be broken, and tests speak the older ones.
RELEASED := proto/released
BENCHES := bench-overhead bench-sweep bench-ablation bench-predictors bench-drift bench-learner bench-split bench-upgrade bench-trace bench-device bench-page bench-pack bench-store

.DEFAULT_GOAL := help
.PHONY: help setup demo demo-upgrade test test-compose test-ui check style types schema architecture bench $(BENCHES) proto release-schema interpreted clean

help: ## Lists the targets.
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1\t/' | expand -t 10

setup: $(READY) ## Installs the locked environment into .venv (instant when nothing changed).

# torch comes first and by its exact version: a looser requirement of another package would fetch another build of it.
$(INSTALLED): requirements.lock pyproject.toml
	@test -n "$(PYTHON)" || { echo "There is no Python >= 3.11 with venv and ensurepip on PATH (Debian: python3-venv); set PYTHON=/path/to/python." >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(PIP) install "$$(grep '^torch==' requirements.lock)"
	$(PIP) install -r requirements.lock
	$(PIP) install --no-deps --no-build-isolation --editable .
	@touch $@

$(READY): $(INSTALLED) setup.py compute_node/compiled_modules.txt $(COMPILED)
	@$(call remove_compiled)
	@if PROMOE_COMPILE=1 $(BIN)/python setup.py -q build_ext --inplace >$(VENV)/compile.log 2>&1; \
		then rm -rf build; echo "The placement's code is compiled."; \
		else $(call remove_compiled); echo "The placement's code runs interpreted, slower and with the same decisions: it could not be" \
			"compiled, see $(VENV)/compile.log (a C compiler and Python's headers are needed)." >&2; fi
	@touch $@

define remove_compiled
rm -rf build compute_node/compiled.digest compute_node/*.so proto/promoe/*.so
endef

interpreted: $(INSTALLED) ## Removes what was compiled, until the next make setup after a change: to debug, to compare.
	@touch $(READY)
	$(call remove_compiled)

demo: $(READY) ## Builds the demo model once and answers three prompts through the whole stack.
	$(BIN)/promoe demo

demo-upgrade: $(READY) ## Changes predictors under a load of 8 streams and draws GoodPred over time.
	$(BIN)/python -m tests.bench.bench_upgrade --demo

# One thread each: the models are tiny, and several processes share the cores.
test: $(READY) ## Runs every test that this machine can run, but those of test-compose.
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(BIN)/python -m pytest -n $${TEST_PROCESSES:-2} --dist loadfile --ignore tests/ui
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(BIN)/python -m pytest tests/ui

# On the engine that docker's client finds; PROMOE_INSTALL_ENGINE=1 installs and starts one (root, Debian 12; .ci/run
# asks for it).
test-compose: $(READY) ## Builds the images and tries the stack in containers: minutes.
	PROMOE_TEST_COMPOSE=1 $(BIN)/python -m pytest --log-cli-level info --durations 0 --durations-min 1 tests/compose tests/deploy

test-ui: $(READY) ## Runs the tests of the page in a headless Chromium (Debian: chromium).
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(BIN)/python -m pytest tests/ui

check: style types schema architecture ## Format, lint, types, schema, fresh stubs, architecture.

style: $(INSTALLED)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

types: $(INSTALLED)
	$(BIN)/mypy --strict $(SOURCES)

schema: $(INSTALLED)
	BUF_CACHE_DIR=.cache/buf $(BIN)/buf lint
	@for released in $(RELEASED)/*.binpb; do echo "buf breaking --against $$released"; \
		BUF_CACHE_DIR=.cache/buf $(BIN)/buf breaking --against "$$released" || { \
		echo "This breaks peers of a released schema: keep the field (or reserve it), or begin a new major." >&2; exit 1; }; done
	rm -rf $(GENERATED) && mkdir -p $(GENERATED)
	$(call generate,$(GENERATED))
	@for file in $$(cd $(GENERATED) && find . -type f); do \
		diff -u "proto/$$file" "$(GENERATED)/$$file" || { echo "Stubs are stale: run make proto." >&2; exit 1; }; done

architecture: $(READY)
	$(BIN)/python -m pytest -q tests/test_architecture.py tests/test_packaging.py

bench: $(BENCHES) ## Runs all benchmarks, one after the other; each also has its own target bench-NAME.

$(BENCHES): bench-%: $(READY)
	$(BIN)/python -m tests.bench.bench_$*

proto: $(INSTALLED) ## Generates the gRPC stubs from proto/promoe/v1/*.proto.
	$(call generate,proto)

# Once for each version: what was recorded is what peers out there were made from.
release-schema: $(INSTALLED) ## Records the protos as the schema that promoe.schema names, when it is released.
	@version="$$($(BIN)/python -c 'from promoe.schema import OUR_SCHEMA; print(OUR_SCHEMA)')"; \
	record="$(RELEASED)/$$version.binpb"; \
	if [ -e "$$record" ]; then echo "$$record is there: what comes now is another version; see OUR_SCHEMA." >&2; exit 1; fi; \
	mkdir -p $(RELEASED) && $(BIN)/python -m grpc_tools.protoc --proto_path=proto --include_imports \
		--descriptor_set_out="$$record" $(PROTOS) && echo "Recorded $$record."

# mypy-protobuf's plug-ins are found on PATH.
define generate
PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m grpc_tools.protoc --proto_path=proto --python_out=$(1) \
	--grpc_python_out=$(1) --mypy_out=quiet:$(1) --mypy_grpc_out=quiet:$(1) $(PROTOS)
endef

clean: ## Removes the environment, caches and everything else that git ignores here.
	$(call remove_compiled)
	rm -rf $(VENV) .cache .mypy_cache .pytest_cache .ruff_cache .hypothesis build dist *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
