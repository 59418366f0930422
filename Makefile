# farstep from nothing but make and Python 3.11 or newer. `make` lists what there is.

VENV ?= .venv
PY := $(VENV)/bin/python
PIP := PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_CONSTRAINT=constraints.txt PIP_BUILD_CONSTRAINT=constraints.txt $(PY) -m pip install

# An install is redone when what it was made from has changed; the demo's, a part of the full one, is quick.
INPUTS := $(shell cat pyproject.toml constraints.txt | cksum | cut -d ' ' -f 1)
DEMO_STAMP := $(VENV)/.farstep-demo-$(INPUTS)
FULL_STAMP := $(VENV)/.farstep-full-$(INPUTS)
BENCH_STAMP := $(VENV)/.farstep-bench-$(INPUTS)

PROTOS := $(wildcard proto/farstep_wire/v1/*.proto)
SERVICE_PROTOS := $(shell grep -l '^service ' $(PROTOS) /dev/null)
STUBS := proto/farstep_wire/v1
PROTOC := PATH="$(abspath $(VENV)/bin):$$PATH" $(PY) -m grpc_tools.protoc -I proto

PYTEST_ARGS ?=
# Tests spend half of their time waiting for processes. A file's tests stay together: they share servers.
PYTEST_JOBS ?= 2

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.NOTPARALLEL:
.SUFFIXES:
.PHONY: help venv demo test lint types imports format protos check-protos soak bench clean distclean

help: ## List these targets
	@echo 'usage: make TARGET   (PYTHON=python3.x picks another interpreter, VENV=DIR another place to install)'
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  \1|\2/p' $(firstword $(MAKEFILE_LIST)) | \
		while IFS='|' read -r name text; do printf '  %-14s %s\n' $$name "$$text"; done

demo: $(DEMO_STAMP) ## Train digits: two workers, one farstep server, beside plain torch.optim
	@$(PY) client/examples/demo.py

test: venv check-protos lint imports types ## Run every check and every test, the quick ones first
	@echo '== tests'
	@$(PY) -m pytest -n $(PYTEST_JOBS) --dist loadfile --no-loadscope-reorder $(PYTEST_ARGS)

venv: $(FULL_STAMP) ## Install farstep and all that its tests need into .venv

lint: venv ## Check style
	@echo '== style'
	@$(PY) -m ruff check .
	@$(PY) -m ruff format --check .

imports: venv ## Check which layer imports which
	@echo '== imports between layers'
	@$(VENV)/bin/lint-imports --no-cache --no-logo

types: venv ## Check types
	@echo '== types'
	@$(PY) -m mypy

format: venv ## Put the code into style
	@$(PY) -m ruff check --fix-only .
	@$(PY) -m ruff format .

protos: venv ## Generate the stubs anew from the protos
	@rm -f $(STUBS)/*_pb2*.py $(STUBS)/*_pb2*.pyi
	@$(call calm,$(call generate,proto))

check-protos: venv ## Check that the stubs are those of the protos
	@echo '== generated stubs'
	@fresh=$$(mktemp -d); trap 'rm -rf "$$fresh"' EXIT; trap 'exit 130' INT TERM; \
		{ $(call generate,"$$fresh"); } >"$$fresh/said" 2>&1 || { cat "$$fresh/said" >&2; exit 1; }; \
		diff -r -x '*.proto' -x __init__.py -x __pycache__ "$$fresh/farstep_wire/v1" $(STUBS) \
		|| { echo 'the stubs differ from the protos: run `make protos` and commit what it changes' >&2; exit 1; }

soak: venv ## Run the fault and load tests at full count (long)
	@FARSTEP_SOAK=big $(PY) -m pytest -m soak --timeout=0 -s $(PYTEST_ARGS)

bench: $(BENCH_STAMP) ## Measure, beside peers in the same run (long)
	@$(PY) -m pytest -m bench --timeout=0 -s $(PYTEST_ARGS) tests/benchmarks

clean: ## Remove what builds and checks leave behind
	@rm -rf build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	@find proto client server tests -name __pycache__ -type d -prune -exec rm -rf {} +

distclean: clean ## Remove .venv too
	@rm -rf $(VENV)

# $(call generate,DIR): the stubs of all protos, under DIR.
define generate
$(PROTOC) --python_out=$(1) --mypy_out=quiet:$(1) $(PROTOS) && \
$(PROTOC) --grpc_python_out=$(1) --mypy_grpc_out=quiet:$(1) $(SERVICE_PROTOS)
endef

# $(call calm,COMMAND): shows what the command says on stderr once it is over, and nothing of it after a Ctrl-C, when that
# is a stack trace.
define calm
said=$$(mktemp); trap 'rm -f "$$said"' EXIT; trap 'exit 130' INT TERM; \
{ $(1); } 2>"$$said" || { cat "$$said" >&2; exit 1; }
endef

# Found only when it is needed; a name that is there may still not run (a version manager's shim).
define find_python
py='$(PYTHON)'; \
for candidate in python3.11 python3 python3.12 python3.13 python3.14; do \
	test -z "$$py" && "$$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && py=$$candidate; \
done; \
"$${py:-false}" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	echo "farstep needs Python 3.11 or newer; $${py:-python3} is $$("$${py:-python3}" --version 2>&1 | head -n 1)." >&2; \
	echo 'Name one that is: make PYTHON=/path/to/python3.11' >&2; exit 1; }
endef

$(VENV)/bin/python:
	@$(find_python); echo "== $(VENV), with $$("$$py" --version)"; \
		$(call calm,"$$py" -m venv $(VENV))

# torch first and by itself: what comes after then takes the build that is there.
$(DEMO_STAMP): | $(VENV)/bin/python
	@echo '== install torch'
	@if $(PY) -c 'import torch' 2>/dev/null; then $(PIP) --quiet torch; else $(PIP) torch; fi
	@echo '== install farstep with what the demo needs'
	@$(PIP) --quiet -e '.[demo]'
	@rm -f $(VENV)/.farstep-*; touch $@

$(FULL_STAMP): $(DEMO_STAMP)
	@echo '== install what the tests need'
	@$(PIP) --quiet -e '.[demo,test,frameworks]'
	@touch $@

$(BENCH_STAMP): $(FULL_STAMP)
	@echo '== install what the benchmarks measure beside'
	@$(PIP) --quiet -e '.[bench]'
	@touch $@
